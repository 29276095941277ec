//! One stream of a connection, as two halves that read and write bytes. Dropping the writer ends our direction
//! (FIN), never the other one.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use super::frame::{Control, DATA_MAX};
use super::headers::Headers;
use super::shared::{Outgoing, Shared};

/// Consumed bytes after which the peer gets new credit.
const CREDIT_STEP: u32 = 16 << 10;

/// A stream that the peer opened (or, in tests, that we did).
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) reader: StreamReader,
    pub(crate) writer: StreamWriter,
}

impl Stream {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        id: u32,
        headers: Headers,
        inbound: mpsc::Receiver<Bytes>,
    ) -> Stream {
        let reader = StreamReader {
            id,
            shared: Arc::clone(shared),
            inbound,
            current: Bytes::new(),
            consumed: 0,
            ended: false,
        };
        let queue = PollSender::new(shared.outgoing.clone());
        let writer = StreamWriter {
            id,
            shared: Arc::clone(shared),
            queue,
            finished: false,
        };
        Stream {
            id,
            headers,
            reader,
            writer,
        }
    }
}

/// The peer's direction.
pub(crate) struct StreamReader {
    id: u32,
    shared: Arc<Shared>,
    inbound: mpsc::Receiver<Bytes>,
    current: Bytes,
    consumed: u32,
    ended: bool,
}

impl AsyncRead for StreamReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if into.remaining() == 0 || self.ended {
            return Poll::Ready(Ok(()));
        }
        if self.current.is_empty() {
            match ready!(self.inbound.poll_recv(cx)) {
                Some(chunk) => self.current = chunk,
                None if self.shared.ended_well(self.id) => {
                    self.ended = true;
                    return Poll::Ready(Ok(()));
                }
                // The connection broke or the peer gave the stream up: what was read is not all.
                None => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            }
        }
        let length = self.current.len().min(into.remaining());
        into.put_slice(&self.current[..length]);
        self.current.advance(length);
        self.credit(length as u32);
        Poll::Ready(Ok(()))
    }
}

impl StreamReader {
    /// Tells the peer that there is room again. Only clients that control their flow heed it, so where the queue
    /// is full the credit may wait for the next read.
    fn credit(&mut self, length: u32) {
        self.consumed += length;
        if self.consumed < CREDIT_STEP {
            return;
        }
        let Ok(mut slots) = self.shared.outgoing.try_reserve_many(2) else {
            return;
        };
        for stream in [self.id, 0] {
            if let Some(slot) = slots.next() {
                slot.send(Outgoing::Control(Control::WindowUpdate {
                    stream,
                    delta: self.consumed,
                }));
            }
        }
        self.consumed = 0;
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        let frame = self.shared.reader_gone(self.id);
        send_detached(&self.shared, frame);
    }
}

/// Our direction.
pub(crate) struct StreamWriter {
    id: u32,
    shared: Arc<Shared>,
    queue: PollSender<Outgoing>,
    finished: bool,
}

fn broken() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.finished {
            return Poll::Ready(Err(broken()));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.queue.poll_reserve(cx)).map_err(|_| broken())?;
        let allowed = match self
            .shared
            .poll_take_window(self.id, data.len().min(DATA_MAX), cx)
        {
            Poll::Ready(Some(allowed)) => allowed,
            Poll::Ready(None) => {
                self.queue.abort_send();
                return Poll::Ready(Err(broken()));
            }
            Poll::Pending => {
                // The slot is for those who may send.
                self.queue.abort_send();
                return Poll::Pending;
            }
        };
        let bytes = Bytes::copy_from_slice(&data[..allowed]);
        let frame = Outgoing::Data {
            stream: self.id,
            fin: false,
            bytes,
        };
        self.queue.send_item(frame).map_err(|_| broken())?;
        Poll::Ready(Ok(allowed))
    }

    /// The connection's writer flushes whenever its queue is empty.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        ready!(self.queue.poll_reserve(cx)).map_err(|_| broken())?;
        self.finished = true;
        match self.shared.finish(self.id) {
            Some(frame) => self.queue.send_item(frame).map_err(|_| broken())?,
            None => {
                self.queue.abort_send();
            }
        }
        let after = self.shared.writer_gone(self.id);
        send_detached(&self.shared, after);
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // A reserved slot given back, lest the frames below wait for it.
        self.queue.abort_send();
        if !self.finished {
            let fin = self.shared.finish(self.id);
            let after = self.shared.writer_gone(self.id);
            let shared = Arc::clone(&self.shared);
            send_in_order(shared, [fin, after]);
        }
    }
}

fn send_detached(shared: &Arc<Shared>, frame: Option<Outgoing>) {
    send_in_order(Arc::clone(shared), [frame, None]);
}

/// Queues frames from where nothing can be awaited. At most two for each half of each stream, and streams are
/// bounded, so the tasks are.
fn send_in_order(shared: Arc<Shared>, frames: [Option<Outgoing>; 2]) {
    let mut frames = frames.into_iter().flatten();
    let mut waiting = None;
    for frame in frames.by_ref() {
        if let Err(error) = shared.outgoing.try_send(frame) {
            match error {
                mpsc::error::TrySendError::Full(frame) => waiting = Some(frame),
                mpsc::error::TrySendError::Closed(_) => return,
            }
            break;
        }
    }
    let Some(first) = waiting else { return };
    let rest: Vec<Outgoing> = std::iter::once(first).chain(frames).collect();
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(async move {
            for frame in rest {
                if shared.outgoing.send(frame).await.is_err() {
                    return;
                }
            }
        });
    }
}
