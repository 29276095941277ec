//! What the two tasks and the streams of a connection share: which streams there are, which of their directions
//! have ended, and how much may be sent.
//!
//! A stream is `open` both ways; each side ends its direction by FIN; a stream whose directions have both ended,
//! or that nobody here holds any more, is forgotten (the latter with RST_STREAM).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::connection::Limits;
use super::frame::{Control, FrameError, ResetStatus};
use super::headers::Headers;
use super::stream::Stream;
use crate::activity::Activity;

/// Chunks of at most [`super::frame::DATA_MAX`] that wait in a stream for its reader.
const INBOUND_CHUNKS: usize = 8;
/// Window of a stream and of the connection before anyone says otherwise.
const INITIAL_WINDOW: i64 = 64 << 10;
/// The draft's largest window.
const WINDOW_MAX: i64 = 0x7fff_ffff;

/// What the writer's queue holds.
pub(crate) enum Outgoing {
    Control(Control),
    Data {
        stream: u32,
        fin: bool,
        bytes: Bytes,
    },
    /// Say GOAWAY and stop.
    Close {
        status: u32,
    },
}

/// What the tasks and the streams of a connection share.
pub(crate) struct Shared {
    pub(crate) outgoing: mpsc::Sender<Outgoing>,
    state: Mutex<State>,
    pub(crate) closed: CancellationToken,
    pub(crate) activity: Activity,
    pub(crate) limits: Limits,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) streams: HashMap<u32, Entry>,
    /// Streams whose end was reached, until their reader has seen it.
    ended_well: HashSet<u32>,
    pub(crate) last_remote: u32,
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) last_local: u32,
    /// The peer manages windows of streams.
    controls_streams: bool,
    /// The peer manages the connection's window, which SPDY/3 without .1 had not.
    controls_connection: bool,
    initial_window: i64,
    connection_window: i64,
}

pub(crate) struct Entry {
    /// `None` once the peer has finished or nobody reads.
    pub(crate) inbound: Option<mpsc::Sender<Bytes>>,
    remote_finished: bool,
    local_finished: bool,
    reader_gone: bool,
    writer_gone: bool,
    window: i64,
    blocked: Option<Waker>,
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) replied: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Shared {
    pub(crate) fn new(outgoing: mpsc::Sender<Outgoing>, limits: Limits) -> Arc<Shared> {
        let state = State {
            initial_window: INITIAL_WINDOW,
            connection_window: INITIAL_WINDOW,
            ..State::default()
        };
        Arc::new(Shared {
            outgoing,
            state: Mutex::new(state),
            closed: CancellationToken::new(),
            activity: Activity::new(),
            limits,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the tasks and everything that waits on a stream.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        let mut state = self.lock();
        for (stream, entry) in std::mem::take(&mut state.streams) {
            if entry.remote_finished && !entry.reader_gone {
                state.ended_well.insert(stream);
            }
            if let Some(waker) = entry.blocked {
                waker.wake();
            }
        }
    }

    /// Whether a stream without further data came to its end, rather than being cut.
    pub(crate) fn ended_well(&self, stream: u32) -> bool {
        let state = self.lock();
        state.ended_well.contains(&stream) || state.streams.get(&stream).is_some_and(|e| e.remote_finished)
    }

    /// How many of `wanted` bytes the stream may send now; `None` where it cannot send any more at all.
    pub(crate) fn poll_take_window(
        &self,
        stream: u32,
        wanted: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<usize>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if self.closed.is_cancelled() {
            return Poll::Ready(None);
        }
        let Some(entry) = state.streams.get_mut(&stream) else {
            return Poll::Ready(None);
        };
        let mut allowed = wanted as i64;
        if state.controls_streams {
            allowed = allowed.min(entry.window);
        }
        if state.controls_connection {
            allowed = allowed.min(state.connection_window);
        }
        if allowed <= 0 {
            entry.blocked = Some(cx.waker().clone());
            return Poll::Pending;
        }
        entry.window -= allowed;
        state.connection_window -= allowed;
        Poll::Ready(Some(allowed as usize))
    }

    /// Our direction ends: the frame that says so, unless there is nobody to say it to.
    pub(crate) fn finish(&self, stream: u32) -> Option<Outgoing> {
        let mut state = self.lock();
        let entry = state.streams.get_mut(&stream)?;
        if entry.local_finished {
            return None;
        }
        entry.local_finished = true;
        Some(Outgoing::Data {
            stream,
            fin: true,
            bytes: Bytes::new(),
        })
    }

    /// See [`Self::settle`].
    pub(crate) fn writer_gone(&self, stream: u32) -> Option<Outgoing> {
        let mut state = self.lock();
        state.streams.get_mut(&stream)?.writer_gone = true;
        Self::settle(&mut state, stream)
    }

    /// See [`Self::settle`].
    pub(crate) fn reader_gone(&self, stream: u32) -> Option<Outgoing> {
        let mut state = self.lock();
        state.ended_well.remove(&stream);
        let entry = state.streams.get_mut(&stream)?;
        entry.reader_gone = true;
        entry.inbound = None;
        Self::settle(&mut state, stream)
    }

    /// Forgets a stream that nobody uses. If the peer has not finished its direction, it is told not to.
    fn settle(state: &mut State, stream: u32) -> Option<Outgoing> {
        let entry = state.streams.get(&stream)?;
        let done = entry.remote_finished && entry.local_finished;
        let abandoned = entry.reader_gone && entry.writer_gone;
        if !done && !abandoned {
            return None;
        }
        let (unfinished, reader_gone) = (!entry.remote_finished, entry.reader_gone);
        state.streams.remove(&stream);
        if !unfinished && !reader_gone {
            state.ended_well.insert(stream);
        }
        unfinished.then(|| {
            Outgoing::Control(Control::Reset {
                stream,
                status: ResetStatus::Cancel as u32,
            })
        })
    }

    pub(crate) fn remote_finished(&self, stream: u32) {
        let mut state = self.lock();
        if let Some(entry) = state.streams.get_mut(&stream) {
            entry.remote_finished = true;
            entry.inbound = None;
            Self::settle(&mut state, stream);
        }
    }

    pub(crate) fn reset(&self, stream: u32) {
        let mut state = self.lock();
        let Some(entry) = state.streams.remove(&stream) else {
            return;
        };
        // The end that came before stays the end: the peer only stops what we send.
        if entry.remote_finished && !entry.reader_gone {
            state.ended_well.insert(stream);
        }
        if let Some(waker) = entry.blocked {
            waker.wake();
        }
    }

    pub(crate) fn window_update(&self, stream: u32, delta: u32) -> Result<(), FrameError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let window = if stream == 0 {
            state.controls_connection = true;
            &mut state.connection_window
        } else {
            state.controls_streams = true;
            match state.streams.get_mut(&stream) {
                Some(entry) => &mut entry.window,
                // It may be gone already.
                None => return Ok(()),
            }
        };
        *window += i64::from(delta);
        if *window > WINDOW_MAX {
            return Err(FrameError::Malformed("window over 2^31-1"));
        }
        wake_all(state);
        Ok(())
    }

    pub(crate) fn settings(&self, initial_window: Option<u32>) {
        let Some(window) = initial_window.map(i64::from) else {
            return;
        };
        let mut guard = self.lock();
        let state = &mut *guard;
        state.controls_streams = true;
        let change = window - state.initial_window;
        state.initial_window = window;
        for entry in state.streams.values_mut() {
            entry.window += change;
        }
        wake_all(state);
    }

    pub(crate) fn add(self: &Arc<Self>, stream: u32, headers: Headers, finished: bool) -> Stream {
        let (inbound, chunks) = mpsc::channel(INBOUND_CHUNKS);
        let mut state = self.lock();
        let window = state.initial_window;
        let entry = Entry {
            inbound: (!finished).then_some(inbound),
            remote_finished: finished,
            local_finished: false,
            reader_gone: false,
            writer_gone: false,
            window,
            blocked: None,
            replied: None,
        };
        state.streams.insert(stream, entry);
        drop(state);
        Stream::new(self, stream, headers, chunks)
    }
}

fn wake_all(state: &mut State) {
    for entry in state.streams.values_mut() {
        if let Some(waker) = entry.blocked.take() {
            waker.wake();
        }
    }
}
