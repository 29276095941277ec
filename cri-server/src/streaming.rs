//! What the streaming server asks of this node: sessions at the pods' shims, their frames turned into plain
//! streams. The same for namespace and VM pods: nothing here knows of a host process.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use catamaran_sandbox::stream_frames::{self, Exit, Frame, FrameReader};
use catamaran_streaming::{
    AttachRequest, Backend, BackendError, Config, Duplex, ExecRequest, Server, ServerError, Streams,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

use crate::error::chain;
use crate::pods::Pods;
use crate::pods::session::Wanted;

/// Bytes read from a client at once; a frame holds as many.
const BLOCK: usize = 32 * 1024;

/// Listens for the clients of Exec, Attach and PortForward.
///
/// # Errors
/// The address cannot be listened on.
pub async fn bind(pods: Pods, config: Config) -> Result<Server, ServerError> {
    Server::bind(config, Arc::new(Sessions { pods })).await
}

struct Sessions {
    pods: Pods,
}

#[async_trait]
impl Backend for Sessions {
    async fn exec(&self, request: &ExecRequest, streams: Streams) -> Result<i32, BackendError> {
        let wanted = Wanted {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
        };
        let opened = self
            .pods
            .open_exec(&request.container_id, &request.command, request.tty, wanted);
        let socket = opened.await.map_err(shown)?;
        match join(socket, streams).await? {
            Some(code) => Ok(code),
            None => Err(BackendError::new("the shim went away before the command ended")),
        }
    }

    async fn attach(&self, request: &AttachRequest, streams: Streams) -> Result<(), BackendError> {
        let wanted = Wanted {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
        };
        let opened = self.pods.open_attach(&request.container_id, wanted);
        let socket = opened.await.map_err(shown)?;
        join(socket, streams).await.map(drop)
    }

    async fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
        data: Box<dyn Duplex>,
    ) -> Result<(), BackendError> {
        let socket = self.pods.open_port(sandbox_id, port).await.map_err(shown)?;
        let (from_shim, to_shim) = socket.into_split();
        let (from_client, to_client) = tokio::io::split(data);
        // Each direction may end before the other; a connection that breaks ends both.
        let send = upload(from_client, to_shim, watch::channel(None).1);
        let receive = async {
            let mut frames = FrameReader::new(from_shim);
            let mut to_client = Some(to_client);
            loop {
                match frames.next().await.map_err(BackendError::new)? {
                    Some(Frame::Stdout(bytes)) => write(&mut to_client, &bytes).await,
                    Some(Frame::End | Frame::OutputEnd) => end(&mut to_client).await,
                    Some(Frame::Exit(Exit::Error(text))) => return Err(BackendError::new(text)),
                    Some(Frame::Exit(Exit::Code(_))) | None => break,
                    Some(_) => return Err(BackendError::new("the shim sent a frame that no port has")),
                }
            }
            end(&mut to_client).await;
            Ok(())
        };
        tokio::pin!(send, receive);
        tokio::select! {
            result = &mut receive => result,
            // The client has said all: what the port answers still has to come.
            gone = &mut send => if gone { Ok(()) } else { receive.await },
        }
    }
}

fn shown(error: crate::error::Error) -> BackendError {
    BackendError::new(chain(&error))
}

/// Runs a command's session to its end; its exit code, `None` where the session ended without one.
async fn join(socket: UnixStream, streams: Streams) -> Result<Option<i32>, BackendError> {
    let (from_shim, to_shim) = socket.into_split();
    let Streams {
        stdin,
        stdout,
        stderr,
        resize,
    } = streams;
    let receive = download(from_shim, stdout, stderr);
    let send = async {
        let gone = match stdin {
            Some(stdin) => upload(stdin, to_shim, resize).await,
            None => sizes_only(to_shim, resize).await,
        };
        if !gone {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        result = receive => result,
        // Dropping the socket tells the shim that the client has gone.
        () = send => Err(BackendError::new("the client went away")),
    }
}

/// Passes a client's bytes and terminal sizes on. Ends with `true` when the client has gone, with `false` when
/// its input has ended; the sizes after that are passed on as well.
async fn upload(
    mut input: impl AsyncRead + Send + Unpin,
    mut socket: OwnedWriteHalf,
    mut sizes: watch::Receiver<Option<catamaran_streaming::TerminalSize>>,
) -> bool {
    let mut buffer = vec![0; BLOCK];
    let mut sized = true;
    loop {
        let frame = tokio::select! {
            read = input.read(&mut buffer) => match read {
                Ok(0) => Frame::End,
                Ok(count) => Frame::Input(Bytes::copy_from_slice(&buffer[..count])),
                Err(_) => return true,
            },
            changed = sizes.changed(), if sized => match changed {
                Ok(()) => match size_frame(&mut sizes) {
                    Some(frame) => frame,
                    None => continue,
                },
                Err(_) => {
                    sized = false;
                    continue;
                }
            },
        };
        let last = frame == Frame::End;
        // A shim that no longer reads says why on its own side.
        if stream_frames::write_frame(&mut socket, &frame).await.is_err() {
            return false;
        }
        if last {
            return sizes_only(socket, sizes).await;
        }
    }
}

/// Terminal sizes of a client without input. The socket stays open in both directions: a shim takes its end for
/// a client that went away.
async fn sizes_only(
    mut socket: OwnedWriteHalf,
    mut sizes: watch::Receiver<Option<catamaran_streaming::TerminalSize>>,
) -> bool {
    while sizes.changed().await.is_ok() {
        if let Some(frame) = size_frame(&mut sizes)
            && stream_frames::write_frame(&mut socket, &frame).await.is_err()
        {
            return false;
        }
    }
    // Kept, not dropped.
    std::future::pending::<()>().await;
    drop(socket);
    false
}

fn size_frame(sizes: &mut watch::Receiver<Option<catamaran_streaming::TerminalSize>>) -> Option<Frame> {
    let size = (*sizes.borrow_and_update())?;
    Some(Frame::Resize(stream_frames::TerminalSize {
        width: size.width,
        height: size.height,
    }))
}

type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// Writes what the shim sends to the client's streams, each by a task of its own so that a stream that nobody
/// reads does not hold up the other beyond its queue.
async fn download(
    from_shim: OwnedReadHalf,
    stdout: Option<Output>,
    stderr: Option<Output>,
) -> Result<Option<i32>, BackendError> {
    let (out, out_done) = writer(stdout);
    let (err, err_done) = writer(stderr);
    let mut queues = Some((out, err));
    let mut frames = FrameReader::new(from_shim);
    let code = loop {
        match frames.next().await.map_err(BackendError::new)? {
            Some(Frame::Stdout(bytes)) => {
                if let Some((out, _)) = &queues {
                    let _ = out.send(bytes).await;
                }
            }
            Some(Frame::Stderr(bytes)) => {
                if let Some((_, err)) = &queues {
                    let _ = err.send(bytes).await;
                }
            }
            Some(Frame::OutputEnd) => queues = None,
            Some(Frame::Exit(Exit::Code(code))) => break Some(code),
            Some(Frame::Exit(Exit::Error(text))) => return Err(BackendError::new(text)),
            Some(Frame::End) => {}
            Some(_) => return Err(BackendError::new("the shim sent a frame that no command has")),
            None => break None,
        }
    };
    drop(queues);
    // The exit code is told after everything that was written before it.
    out_done.await;
    err_done.await;
    Ok(code)
}

/// A queue into one stream, and what waits until it is written and the stream ended.
fn writer(stream: Option<Output>) -> (mpsc::Sender<Bytes>, impl Future<Output = ()>) {
    let (queue, mut blocks) = mpsc::channel::<Bytes>(4);
    let task = tokio::spawn(async move {
        let mut stream = stream;
        while let Some(bytes) = blocks.recv().await {
            write(&mut stream, &bytes).await;
        }
        end(&mut stream).await;
    });
    let guard = AbortOnDrop(task);
    (queue, async move {
        let mut guard = guard;
        // A writer that panicked has lost its client already.
        let _ = (&mut guard.0).await;
    })
}

/// A session that is dropped must not leave its writers behind.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Writes; a stream that takes no more is given up, the session goes on.
async fn write<W: AsyncWrite + Unpin>(stream: &mut Option<W>, bytes: &[u8]) {
    if let Some(open) = stream
        && open.write_all(bytes).await.is_err()
    {
        *stream = None;
    }
}

async fn end<W: AsyncWrite + Unpin>(stream: &mut Option<W>) {
    if let Some(mut open) = stream.take() {
        // It is gone either way.
        let _ = open.shutdown().await;
    }
}
