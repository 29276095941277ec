//! Output of one process on its way to the CRI log, a FIFO and everybody who is attached.
//!
//! One pump per stream reads and delivers in order. An attached reader that is slow holds the process back, as
//! a full pipe would, but only for [`Stall`]; then it is dropped and told so, and the log goes on.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use super::backend::Reader;
use crate::cri_log::{CriLog, LogStream};
use crate::stream_frames::Frame;

/// Bytes read at once.
const CHUNK: usize = 16 * 1024;
/// Chunks that wait for one attached reader; with [`CHUNK`] the bound of its memory.
const QUEUE: usize = 32;
/// After a process has ended, a pipe that something still holds open is given up when silent for so long.
const QUIET: Duration = Duration::from_millis(500);

/// How long a reader that takes nothing may hold the process back.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stall {
    /// For ever: it is the only reader, and its session watches whether it is still there.
    Unbounded,
    /// So long.
    Limit(Duration),
}

/// See the module.
pub(crate) struct Output {
    log: Mutex<Option<CriLog>>,
    stall: Stall,
    readers: Mutex<HashMap<u64, Attached>>,
    next_reader: AtomicU64,
    /// Pumps that have not seen their stream's end.
    open: watch::Sender<usize>,
    /// Pumps that hold bytes not delivered yet.
    busy: AtomicUsize,
    /// Reads that returned something.
    reads: AtomicU64,
}

/// Where an attached reader's chunks go, and whether it was dropped.
type Attached = (mpsc::Sender<Frame>, Arc<AtomicBool>);

/// One attached reader's end.
pub(crate) struct Subscription {
    frames: mpsc::Receiver<Frame>,
    dropped: Arc<AtomicBool>,
    output: Arc<Output>,
    key: u64,
}

impl Output {
    pub(crate) fn new(log: Option<CriLog>, stall: Stall) -> Arc<Self> {
        Arc::new(Self {
            log: Mutex::new(log),
            stall,
            readers: Mutex::default(),
            next_reader: AtomicU64::new(0),
            open: watch::Sender::new(0),
            busy: AtomicUsize::new(0),
            reads: AtomicU64::new(0),
        })
    }

    /// Begins to read a stream, for as long as it lasts.
    pub(crate) fn pump(self: &Arc<Self>, stream: LogStream, reader: Reader, fifo: Option<pipe::Sender>) {
        self.open.send_modify(|open| *open += 1);
        let output = self.clone();
        tokio::spawn(async move {
            output.run_pump(stream, reader, fifo).await;
            if let Some(log) = lock(&output.log).as_mut() {
                log.end(stream);
            }
            let mut left = 0;
            output.open.send_modify(|open| {
                *open -= 1;
                left = *open;
            });
            if left == 0 {
                lock(&output.readers).clear();
            }
        });
    }

    async fn run_pump(&self, stream: LogStream, mut reader: Reader, mut fifo: Option<pipe::Sender>) {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            match reader.read_buf(&mut buffer).await {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, ?stream, "reading output");
                    return;
                }
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.busy.fetch_add(1, Ordering::Relaxed);
            if let Some(log) = lock(&self.log).as_mut() {
                log.write(stream, &buffer);
            }
            if let Some(sink) = &mut fifo
                && let Err(error) = sink.write_all(&buffer).await
            {
                tracing::warn!(%error, ?stream, "output FIFO given up");
                fifo = None;
            }
            if lock(&self.readers).is_empty() {
                buffer.clear();
            } else {
                let bytes = buffer.split().freeze();
                self.broadcast(match stream {
                    LogStream::Stdout => Frame::Stdout(bytes),
                    LogStream::Stderr => Frame::Stderr(bytes),
                })
                .await;
            }
            self.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }

    async fn broadcast(&self, frame: Frame) {
        let readers: Vec<_> = lock(&self.readers)
            .iter()
            .map(|(key, (sender, _))| (*key, sender.clone()))
            .collect();
        for (key, sender) in readers {
            let sent = match self.stall {
                Stall::Unbounded => sender.send(frame.clone()).await.is_ok(),
                Stall::Limit(limit) => {
                    matches!(
                        tokio::time::timeout(limit, sender.send(frame.clone())).await,
                        Ok(Ok(()))
                    )
                }
            };
            if !sent && let Some((_, dropped)) = lock(&self.readers).remove(&key) {
                dropped.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Attaches a reader to what comes from now on.
    pub(crate) fn subscribe(self: &Arc<Self>) -> Subscription {
        let (sender, frames) = mpsc::channel(QUEUE);
        let dropped = Arc::new(AtomicBool::new(false));
        let key = self.next_reader.fetch_add(1, Ordering::Relaxed);
        lock(&self.readers).insert(key, (sender, dropped.clone()));
        Subscription {
            frames,
            dropped,
            output: self.clone(),
            key,
        }
    }

    /// Resolves when every stream has ended and was delivered, or when what is still open has been silent for
    /// a while. To be called after the process has ended.
    pub(crate) async fn drained(&self) {
        let mut open = self.open.subscribe();
        loop {
            let before = self.reads.load(Ordering::Relaxed);
            if let Ok(result) = tokio::time::timeout(QUIET, open.wait_for(|open| *open == 0)).await {
                // The sender lives in `self`, so this is the end of the last pump.
                drop(result);
                return;
            }
            if self.busy.load(Ordering::Relaxed) == 0 && self.reads.load(Ordering::Relaxed) == before {
                return;
            }
        }
    }

    /// Opens the log's path again. False: there is no log.
    pub(crate) fn reopen_log(&self) -> std::io::Result<bool> {
        match lock(&self.log).as_mut() {
            Some(log) => log.reopen().map(|()| true),
            None => Ok(false),
        }
    }
}

impl Subscription {
    /// The next piece of output; `None` at its end, or where this reader was dropped.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        self.frames.recv().await
    }

    /// What has already arrived.
    pub(crate) fn queued(&mut self) -> Option<Frame> {
        self.frames.try_recv().ok()
    }

    /// This reader was too slow.
    pub(crate) fn was_dropped(&self) -> bool {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.output.readers).remove(&self.key);
    }
}

/// A lock whose holder panicked guards data that is still whole: every critical section here is one update.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    fn reader_of(near: tokio::io::DuplexStream) -> Reader {
        Box::new(near)
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_dropped_and_the_log_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let output = Output::new(
            Some(CriLog::open(&path).unwrap()),
            Stall::Limit(Duration::from_millis(50)),
        );
        let mut slow = output.subscribe();
        let mut good = output.subscribe();
        let (mut far, near) = duplex(64);
        output.pump(LogStream::Stdout, reader_of(near), None);
        let counter = tokio::spawn(async move {
            let mut bytes = 0;
            while let Some(Frame::Stdout(data)) = good.next().await {
                bytes += data.len();
            }
            bytes
        });
        for _ in 0..1000 {
            far.write_all(b"0123456789abcde\n").await.unwrap();
        }
        drop(far);
        output.drained().await;
        assert_eq!(counter.await.unwrap(), 16_000);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1000);
        assert!(slow.was_dropped());
        assert!(slow.queued().is_some());
    }

    #[tokio::test]
    async fn draining_waits_for_a_slow_reader_but_not_for_a_silent_pipe() {
        let output = Output::new(None, Stall::Unbounded);
        let mut reader = output.subscribe();
        let (mut far, near) = duplex(1 << 20);
        output.pump(LogStream::Stdout, reader_of(near), None);
        far.write_all(&vec![1; CHUNK * (QUEUE + 5)]).await.unwrap();
        let draining = tokio::spawn({
            let output = output.clone();
            async move { output.drained().await }
        });
        // `far` stays open, as a pipe does that a grandchild holds.
        tokio::time::sleep(QUIET * 3).await;
        assert!(!draining.is_finished(), "the pump still holds bytes");
        let mut bytes = 0;
        while bytes < CHUNK * (QUEUE + 5) {
            let Some(Frame::Stdout(data)) = reader.next().await else {
                panic!("output ended")
            };
            bytes += data.len();
        }
        draining.await.unwrap();
        assert!(reader.queued().is_none());
    }
}
