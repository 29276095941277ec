//! A process in the guest as the shim server sees it: its stdio as byte streams, signals, terminal size, exit.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use catamaran_guest_protocol::MAX_CHUNK_BYTES;
use catamaran_guest_protocol::v1::{
    InputChunk, OutputChunk, PortChunk, ProcessRequest, ResizeRequest, SignalRequest,
};
use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::shim_server::ShimError;
use catamaran_sandbox::shim_server::backend::{Duplex, Process, ProcessControl, Reader, Writer};
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::guest_client::{Agent, limited, refused, within};
use crate::life::Life;

/// Bytes on their way between the guest and the shim server, for each stream.
const BUFFER: usize = 64 * 1024;
/// Exit code of a process whose VM went away under it: 128 + SIGKILL.
const KILLED: i32 = 137;
/// A VM whose connection broke is ended within this, see [`crate::life`].
const VM_END_LIMIT: Duration = Duration::from_secs(5);
/// After its exit an exec's output has so long to be read before the agent forgets it.
const OUTPUT_LIMIT: Duration = Duration::from_secs(60);

/// Names a process; an empty `exec` is the container's first.
#[derive(Debug, Clone)]
pub(crate) struct Name {
    pub(crate) container: String,
    pub(crate) exec: String,
}

impl Name {
    pub(crate) fn request(&self) -> ProcessRequest {
        ProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
        }
    }
}

/// What the process was started with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streams {
    pub(crate) terminal: bool,
    pub(crate) stdin: bool,
}

/// Connects a process that the agent has made. The pipes are duplex streams of which one direction is used: unlike
/// tokio's simplex, dropping the writing end is the end for the reader.
pub(crate) fn adopt(agent: &Agent, life: &Arc<Life>, name: Name, pid: u32, streams: Streams) -> Process {
    let (stdout, stdout_end) = tokio::io::duplex(BUFFER);
    let (stderr, stderr_end) = tokio::io::duplex(BUFFER);
    let read = tokio::spawn(read_output(agent.clone(), name.clone(), stdout_end, stderr_end));
    let stdin = streams.stdin.then(|| {
        let (ours, theirs) = tokio::io::duplex(BUFFER);
        tokio::spawn(write_input(agent.clone(), name.clone(), ours));
        Box::new(theirs) as Writer
    });
    let exit = tokio::spawn(wait(agent.clone(), Arc::clone(life), name.clone()));
    if !name.exec.is_empty() {
        tokio::spawn(forget(agent.clone(), name.clone(), read));
    }
    let exit: BoxFuture<'static, ExitRecord> =
        Box::pin(async move { exit.await.unwrap_or_else(|_| killed(false)) });
    Process {
        pid,
        stdin,
        stdout: Some(Box::new(stdout) as Reader),
        stderr: (!streams.terminal).then(|| Box::new(stderr) as Reader),
        control: Arc::new(Control {
            agent: agent.clone(),
            name,
        }),
        exit,
    }
}

/// The record of a process that ended with its VM, which may have been killed for memory.
fn killed(oom_killed: bool) -> ExitRecord {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    ExitRecord {
        exit_code: KILLED,
        exited_at_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        oom_killed,
    }
}

async fn wait(mut agent: Agent, life: Arc<Life>, name: Name) -> ExitRecord {
    let answer = tokio::select! {
        answer = agent.wait(name.request()) => answer,
        _ = life.ended() => return killed(life.out_of_memory()),
    };
    match answer {
        Ok(answer) => {
            let answer = answer.into_inner();
            ExitRecord {
                exit_code: answer.exit_code.clamp(0, 255),
                exited_at_ns: answer.exited_at_ns,
                oom_killed: answer.oom_killed,
            }
        }
        Err(status) => {
            tracing::warn!(container = name.container, exec = name.exec, %status, "waiting broke off");
            // Where the connection broke, the process lives until the VM has ended. Where the agent just does not
            // know the process, there is no more to learn.
            let _ = tokio::time::timeout(VM_END_LIMIT, life.ended()).await;
            killed(life.out_of_memory())
        }
    }
}

async fn read_output(
    mut agent: Agent,
    name: Name,
    mut stdout: impl AsyncWrite + Unpin,
    mut stderr: impl AsyncWrite + Unpin,
) {
    let mut chunks: Streaming<OutputChunk> = match agent.read_output(name.request()).await {
        Ok(response) => response.into_inner(),
        Err(status) => {
            tracing::warn!(container = name.container, exec = name.exec, %status, "no output");
            return;
        }
    };
    while let Some(Ok(chunk)) = chunks.next().await {
        // An end that nobody reads any more loses its output, the other does not.
        let _ = match chunk.stream {
            1 => stdout.write_all(&chunk.data).await,
            2 => stderr.write_all(&chunk.data).await,
            _ => Ok(()),
        };
    }
}

async fn write_input(mut agent: Agent, name: Name, mut input: impl AsyncRead + Unpin) {
    let (sender, receiver) = mpsc::channel(2);
    let names = InputChunk {
        container_id: name.container.clone(),
        exec_id: name.exec.clone(),
        data: Vec::new(),
        eof: false,
    };
    let feed = async move {
        if sender.send(names).await.is_err() {
            return;
        }
        let mut buffer = vec![0; MAX_CHUNK_BYTES];
        loop {
            let length = input.read(&mut buffer).await.unwrap_or(0);
            let chunk = InputChunk {
                container_id: String::new(),
                exec_id: String::new(),
                data: buffer[..length].to_vec(),
                eof: length == 0,
            };
            if sender.send(chunk).await.is_err() || length == 0 {
                return;
            }
        }
    };
    let (answer, ()) = tokio::join!(agent.write_input(ReceiverStream::new(receiver)), feed);
    if let Err(status) = answer {
        // A process that ended or closed its input is the usual reason.
        tracing::debug!(container = name.container, exec = name.exec, %status, "input ended");
    }
}

/// Lets the agent forget an exec when it has ended and its output is read.
async fn forget(mut agent: Agent, name: Name, read: tokio::task::JoinHandle<()>) {
    if agent.wait(name.request()).await.is_err() {
        return;
    }
    // A grandchild may keep the output open for ever.
    let _ = tokio::time::timeout(OUTPUT_LIMIT, read).await;
    if let Err(status) = within(agent.delete(limited(name.request()))).await {
        tracing::debug!(container = name.container, exec = name.exec, %status, "forgetting");
    }
}

struct Control {
    agent: Agent,
    name: Name,
}

impl Control {
    /// `tree`: with all that the process started.
    async fn send(&self, signal: i32, tree: bool) -> Result<(), ShimError> {
        let signal = u32::try_from(signal)
            .map_err(|_| ShimError::InvalidArgument(format!("signal {signal} does not exist")))?;
        let request = SignalRequest {
            container_id: self.name.container.clone(),
            exec_id: self.name.exec.clone(),
            signal,
            all: false,
            tree,
        };
        let answer = within(self.agent.clone().signal(limited(request))).await;
        answer.map(drop).map_err(|status| refused("signal", &status))
    }
}

#[async_trait]
impl ProcessControl for Control {
    async fn signal(&self, signal: i32) -> Result<(), ShimError> {
        self.send(signal, false).await
    }

    async fn kill_tree(&self) {
        if let Err(error) = self.send(libc::SIGKILL, true).await {
            tracing::debug!(container = self.name.container, exec = self.name.exec, %error, "killing");
        }
    }

    async fn resize(&self, width: u16, height: u16) -> Result<(), ShimError> {
        let request = ResizeRequest {
            container_id: self.name.container.clone(),
            exec_id: self.name.exec.clone(),
            width: width.into(),
            height: height.into(),
        };
        let answer = within(self.agent.clone().resize_terminal(limited(request))).await;
        answer
            .map(drop)
            .map_err(|status| refused("resize terminal", &status))
    }
}

/// A connection to a port on the guest's own localhost.
///
/// # Errors
/// The agent's, when nothing listens there.
pub(crate) async fn connect(mut agent: Agent, port: u16) -> Result<Box<dyn Duplex>, ShimError> {
    let (sender, receiver) = mpsc::channel(2);
    let first = PortChunk {
        port: port.into(),
        data: Vec::new(),
        eof: false,
    };
    // Just made, with room for two.
    let _ = sender.try_send(first);
    // The stream itself has no limit, only its beginning.
    let answer = within(agent.port_forward(ReceiverStream::new(receiver))).await;
    let mut chunks = answer.map_err(|status| refused(&format!("port {port}"), &status))?;
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    let (mut input, mut output) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut buffer = vec![0; MAX_CHUNK_BYTES];
        loop {
            let length = input.read(&mut buffer).await.unwrap_or(0);
            let chunk = PortChunk {
                port: 0,
                data: buffer[..length].to_vec(),
                eof: length == 0,
            };
            if sender.send(chunk).await.is_err() || length == 0 {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(chunk)) = chunks.next().await {
            if output.write_all(&chunk.data).await.is_err() {
                return;
            }
            if chunk.eof {
                // The other direction goes on.
                let _ = output.shutdown().await;
            }
        }
        let _ = output.shutdown().await;
    });
    Ok(Box::new(ours))
}
