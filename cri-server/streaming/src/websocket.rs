//! Exec and attach over a WebSocket: the channel protocols `v4.channel.k8s.io` and `v5.channel.k8s.io`. Each
//! binary message is for the channel that its first byte names; version 5 adds a channel on which the client
//! closes another one, that is, ends its input.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::SplitStream;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::io::StreamReader;
use tokio_util::sync::{CancellationToken, PollSender};

use crate::activity::Activity;
use crate::backend::{Backend, Streams, TerminalSize};
use crate::remote_command::Command;
use crate::resize::ResizeParser;

/// Protocols with their versions, the server's choice first.
pub(crate) const PROTOCOLS: [(&str, u8); 2] = [("v5.channel.k8s.io", 5), ("v4.channel.k8s.io", 4)];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Version 5: the payload names the channel that the client closes.
const CLOSE: u8 = 255;

/// Largest message, either way. Clients send at most 32 KiB.
const MESSAGE_MAX: usize = 1 << 20;
/// Data in a message of ours.
const CHUNK: usize = 32 << 10;
/// Messages that wait for the client, and for the command's input.
const QUEUE: usize = 16;
/// For how long a client may take to answer the close.
const LINGER: Duration = Duration::from_secs(10);

/// Bounds of a WebSocket's messages.
pub(crate) fn message_limits() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_MAX))
        .max_frame_size(Some(MESSAGE_MAX))
        .write_buffer_size(2 * CHUNK)
        .max_write_buffer_size(4 * MESSAGE_MAX)
}

/// Times of a WebSocket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) idle: Duration,
    pub(crate) ping: Duration,
}

/// Serves one command to its end.
pub(crate) async fn serve<IO>(
    socket: WebSocketStream<IO>,
    version: u8,
    command: &Command,
    backend: &dyn Backend,
    times: Times,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let wanted = command.wanted();
    let gone = CancellationToken::new();
    let activity = Arc::new(Activity::new());
    let (sink, source) = socket.split();
    let (outgoing, queue) = mpsc::channel(QUEUE);
    let writer = tokio::spawn(write_task(
        sink,
        queue,
        times,
        Arc::clone(&activity),
        gone.clone(),
    ));

    // An empty message tells the client that its command is being served.
    let first = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    let _ = outgoing.send(message(first, &[])).await;

    let (input, chunks) = mpsc::channel(QUEUE);
    let ended = Arc::new(AtomicBool::new(false));
    let (sizes, resize) = watch::channel(None);
    let reader = Incoming {
        version,
        stdin: wanted.stdin.then_some(input),
        stdin_ended: Arc::clone(&ended),
        sizes: wanted.tty.then_some(sizes),
        resize: ResizeParser::default(),
        activity,
    };
    let reader = tokio::spawn(read_task(source, reader, gone.clone()));

    let output = |channel| {
        Box::new(ChannelWriter {
            channel,
            queue: PollSender::new(outgoing.clone()),
        }) as _
    };
    let streams = Streams {
        stdin: wanted.stdin.then(|| Box::new(stdin(chunks, ended)) as _),
        stdout: wanted.stdout.then(|| output(STDOUT)),
        stderr: wanted.stderr.then(|| output(STDERR)),
        resize,
    };
    let outcome = tokio::select! {
        outcome = command.run(backend, streams) => Some(outcome),
        () = gone.cancelled() => None,
    };
    match outcome {
        Some(outcome) => {
            let goodbye = async {
                let _ = outgoing.send(message(ERROR, &outcome.message(true))).await;
                let frame = CloseFrame {
                    code: CloseCode::Normal,
                    reason: "".into(),
                };
                let _ = outgoing.send(Message::Close(Some(frame))).await;
                gone.cancelled().await;
            };
            let _ = tokio::time::timeout(LINGER, goodbye).await;
        }
        None => tracing::debug!("the client of a command has gone"),
    }
    reader.abort();
    writer.abort();
}

fn message(channel: u8, data: &[u8]) -> Message {
    let mut bytes = BytesMut::with_capacity(1 + data.len());
    bytes.extend_from_slice(&[channel]);
    bytes.extend_from_slice(data);
    Message::Binary(bytes.freeze())
}

struct Incoming {
    version: u8,
    stdin: Option<mpsc::Sender<Bytes>>,
    stdin_ended: Arc<AtomicBool>,
    sizes: Option<watch::Sender<Option<TerminalSize>>>,
    resize: ResizeParser,
    activity: Arc<Activity>,
}

impl Incoming {
    async fn take(&mut self, mut data: Bytes) {
        if data.is_empty() {
            return;
        }
        self.activity.touch();
        let channel = data.split_to(1)[0];
        match channel {
            STDIN if !data.is_empty() => {
                if let Some(stdin) = &self.stdin
                    && stdin.send(data).await.is_err()
                {
                    self.stdin = None;
                }
            }
            RESIZE => match self.resize.push(&data) {
                Ok(Some(size)) => {
                    if let Some(sizes) = &self.sizes {
                        let _ = sizes.send(Some(size));
                    }
                }
                Ok(None) => {}
                Err(()) => self.sizes = None,
            },
            CLOSE if self.version >= 5 && data.first() == Some(&STDIN) => {
                self.stdin_ended.store(true, Ordering::Release);
                self.stdin = None;
            }
            _ => {}
        }
    }
}

async fn read_task<IO>(
    mut source: SplitStream<WebSocketStream<IO>>,
    mut incoming: Incoming,
    gone: CancellationToken,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match source.next().await {
            Some(Ok(Message::Binary(data))) => incoming.take(data).await,
            Some(Ok(Message::Text(_))) => {
                tracing::debug!("a text message on a channel protocol");
                break;
            }
            Some(Ok(Message::Close(_))) | None => break,
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                if !matches!(error, Error::ConnectionClosed | Error::AlreadyClosed) {
                    tracing::debug!(%error, "reading from a WebSocket");
                }
                break;
            }
        }
    }
    gone.cancel();
}

async fn write_task<S>(
    mut sink: S,
    mut queue: mpsc::Receiver<Message>,
    times: Times,
    activity: Arc<Activity>,
    gone: CancellationToken,
) where
    S: SinkExt<Message, Error = Error> + Unpin,
{
    let mut ticks = interval(times.ping);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    loop {
        let next = tokio::select! {
            next = queue.recv() => match next {
                Some(next) => {
                    activity.touch();
                    next
                }
                None => return,
            },
            _ = ticks.tick() => {
                if activity.idle() >= times.idle {
                    tracing::info!("closing an idle streaming connection");
                    break;
                }
                Message::Ping(Bytes::new())
            }
        };
        let last = next.is_close();
        let sent = tokio::select! {
            sent = sink.send(next) => sent,
            () = activity.idle_for(times.idle) => {
                tracing::info!("closing a streaming connection whose client does not read");
                break;
            }
        };
        if last {
            return;
        }
        if let Err(error) = sent {
            tracing::debug!(%error, "writing to a WebSocket");
            break;
        }
    }
    gone.cancel();
}

/// The client's input; an error where the client goes without having ended it.
fn stdin(mut chunks: mpsc::Receiver<Bytes>, ended: Arc<AtomicBool>) -> impl AsyncRead + Send + Unpin {
    let mut broken = false;
    StreamReader::new(futures::stream::poll_fn(move |cx| {
        if broken {
            return Poll::Ready(None);
        }
        Poll::Ready(match ready!(chunks.poll_recv(cx)) {
            Some(chunk) => Some(Ok(chunk)),
            None if ended.load(Ordering::Acquire) => None,
            None => {
                broken = true;
                Some(Err(io::Error::from(io::ErrorKind::ConnectionReset)))
            }
        })
    }))
}

struct ChannelWriter {
    channel: u8,
    queue: PollSender<Message>,
}

impl AsyncWrite for ChannelWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let broken = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.queue.poll_reserve(cx)).map_err(broken)?;
        let length = data.len().min(CHUNK);
        let message = message(self.channel, &data[..length]);
        self.queue.send_item(message).map_err(broken)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The protocol has no end of output but the outcome.
    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.queue.close();
        Poll::Ready(Ok(()))
    }
}
