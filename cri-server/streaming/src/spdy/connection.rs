//! A SPDY/3.1 connection: one task reads frames and hands them to streams, one writes what the streams queue.
//!
//! What is bounded: the length of every frame that is held, the number of streams, of chunks waiting in each
//! stream and of frames waiting to be written, the time without any traffic. A peer that sends faster than its
//! stream is read is stopped by not reading the connection.
//!
//! Flow control: the Go clients ignore windows in both directions, and waiting for credit from one would stop
//! its output after 64 KiB. So windows bind our sending only once the peer has shown that it manages them, by a
//! WINDOW_UPDATE or a SETTINGS; credit is given to every peer.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::frame::{
    Control, DATA_MAX, FrameError, GOAWAY_OK, GOAWAY_PROTOCOL_ERROR, HEAD, Head, ResetStatus, data_head,
};
use super::headers::{Deflater, Headers, Inflater};
use super::shared::{Outgoing, Shared};
use super::stream::Stream;

/// Bounds of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Streams open at once.
    pub(crate) streams: usize,
    /// Streams that nobody has accepted yet.
    pub(crate) unaccepted: usize,
    /// Without data for this long the connection is closed.
    pub(crate) idle: Duration,
    /// Between our PINGs, which find out that the peer is gone.
    pub(crate) ping: Duration,
}

/// Frames that wait for the connection's writer.
const OUTGOING_FRAMES: usize = 32;
/// For how long a peer that broke the protocol is told so.
const GOODBYE: Duration = Duration::from_secs(1);

/// One end of a connection. Dropping it closes the connection.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    incoming: mpsc::Receiver<Stream>,
}

impl Connection {
    /// Starts the server's end on a transport.
    pub(crate) fn server<IO>(io: IO, limits: Limits) -> Connection
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (outgoing, queue) = mpsc::channel(OUTGOING_FRAMES);
        let (accepted, incoming) = mpsc::channel(limits.unaccepted);
        let shared = Shared::new(outgoing, limits);
        let (read, write) = tokio::io::split(io);
        tokio::spawn(read_task(Arc::clone(&shared), read, accepted));
        tokio::spawn(write_task(Arc::clone(&shared), write, queue));
        Connection { shared, incoming }
    }

    /// The next stream that the peer opens; `None` when the connection is closed.
    pub(crate) async fn accept(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Completes when the connection is closed by whichever end.
    pub(crate) async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// Lets the peer close, who does so when it has read everything; after `patience` we do. Closing at once
    /// would make the Go clients lose what they have not read yet.
    pub(crate) async fn close(mut self, patience: Duration) {
        let peer = async {
            // Refuses nothing and keeps reading: a stream that comes late is just not used.
            while self.incoming.recv().await.is_some() {}
            self.shared.closed.cancelled().await;
        };
        if tokio::time::timeout(patience, peer).await.is_err() {
            let goodbye = self.shared.outgoing.send(Outgoing::Close { status: GOAWAY_OK });
            if tokio::time::timeout(patience, goodbye)
                .await
                .is_ok_and(|sent| sent.is_ok())
            {
                let _ = tokio::time::timeout(patience, self.shared.closed.cancelled()).await;
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("reading from the peer: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the connection is closing")]
    Closed,
}

async fn read_task<IO>(shared: Arc<Shared>, read: ReadHalf<IO>, accepted: mpsc::Sender<Stream>)
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let closed = shared.closed.clone();
    let result = tokio::select! {
        result = read_frames(&shared, read, &accepted) => result,
        () = closed.cancelled() => Err(ReadError::Closed),
    };
    drop(accepted);
    match result {
        Err(ReadError::Frame(error)) => {
            tracing::warn!(%error, "closing a SPDY connection");
            // The writer ends with it and closes the rest.
            if shared
                .outgoing
                .try_send(Outgoing::Close {
                    status: GOAWAY_PROTOCOL_ERROR,
                })
                .is_ok()
            {
                let _ = tokio::time::timeout(GOODBYE, closed.cancelled()).await;
            }
            shared.close();
        }
        Err(ReadError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
            tracing::debug!(%error, "a SPDY connection broke");
            shared.close();
        }
        _ => shared.close(),
    }
}

async fn read_frames<IO>(
    shared: &Arc<Shared>,
    read: ReadHalf<IO>,
    accepted: &mpsc::Sender<Stream>,
) -> Result<(), ReadError>
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut read = tokio::io::BufReader::with_capacity(DATA_MAX, read);
    let mut inflater = Inflater::new();
    loop {
        let mut head = [0; HEAD];
        read.read_exact(&mut head).await?;
        match Head::parse(head)? {
            Head::Data { stream, fin, length } => {
                shared.activity.touch();
                read_data(shared, &mut read, stream, length).await?;
                if fin {
                    shared.remote_finished(stream);
                }
            }
            Head::Control { kind, flags, length } => {
                let mut payload = vec![0; length];
                read.read_exact(&mut payload).await?;
                let control = Control::parse(kind, flags, &payload, &mut inflater)?;
                handle(shared, control, accepted).await?;
            }
        }
    }
}

/// Hands a data frame to its stream in chunks, waiting while the stream has enough of them.
async fn read_data(
    shared: &Arc<Shared>,
    read: &mut (impl AsyncRead + Unpin),
    stream: u32,
    length: usize,
) -> Result<(), ReadError> {
    let (inbound, known) = {
        let state = shared.lock();
        let inbound = state.streams.get(&stream).and_then(|entry| entry.inbound.clone());
        (inbound, stream <= state.last_remote || stream <= state.last_local)
    };
    if !known {
        return Err(FrameError::Malformed("data on a stream that was never opened").into());
    }
    let mut left = length;
    while left > 0 {
        let mut chunk = BytesMut::with_capacity(left.min(DATA_MAX));
        let mut limited = (&mut *read).take(left.min(DATA_MAX) as u64);
        if limited.read_buf(&mut chunk).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        left -= chunk.len();
        let discarded = match &inbound {
            Some(inbound) => inbound
                .send(chunk.freeze())
                .await
                .err()
                .map(|error| error.0.len()),
            None => Some(chunk.len()),
        };
        // What nobody reads must not use up the connection's window.
        if let Some(length) = discarded {
            let credit = Control::WindowUpdate {
                stream: 0,
                delta: length as u32,
            };
            queue(shared, credit).await?;
        }
    }
    Ok(())
}

async fn queue(shared: &Shared, control: Control) -> Result<(), ReadError> {
    shared
        .outgoing
        .send(Outgoing::Control(control))
        .await
        .map_err(|_| ReadError::Closed)
}

async fn handle(
    shared: &Arc<Shared>,
    control: Control,
    accepted: &mpsc::Sender<Stream>,
) -> Result<(), ReadError> {
    match control {
        Control::SynStream { stream, fin, headers } => {
            shared.activity.touch();
            let full = {
                let mut state = shared.lock();
                if stream % 2 == 0 || stream <= state.last_remote {
                    return Err(FrameError::Malformed("stream id of the wrong side or out of order").into());
                }
                state.last_remote = stream;
                state.streams.len() >= shared.limits.streams
            };
            let slot = if full { None } else { accepted.try_reserve().ok() };
            let Some(slot) = slot else {
                let status = ResetStatus::RefusedStream as u32;
                return queue(shared, Control::Reset { stream, status }).await;
            };
            let opened = shared.add(stream, headers, fin);
            queue(
                shared,
                Control::SynReply {
                    stream,
                    fin: false,
                    headers: Headers::default(),
                },
            )
            .await?;
            slot.send(opened);
        }
        Control::SynReply { stream, fin, .. } => {
            #[cfg(test)]
            if let Some(replied) = shared
                .lock()
                .streams
                .get_mut(&stream)
                .and_then(|entry| entry.replied.take())
            {
                let _ = replied.send(());
            }
            if fin {
                shared.remote_finished(stream);
            }
        }
        Control::Reset { stream, .. } => shared.reset(stream),
        Control::Settings { initial_window } => shared.settings(initial_window),
        Control::Ping { id } => {
            // Even ids are answers to ours.
            if id % 2 == 1 {
                queue(shared, Control::Ping { id }).await?;
            }
        }
        Control::GoAway { .. } | Control::Unknown => {}
        Control::Headers { stream, fin, .. } => {
            if fin {
                shared.remote_finished(stream);
            }
        }
        Control::WindowUpdate { stream, delta } => shared.window_update(stream, delta)?,
    }
    Ok(())
}

async fn write_task<IO>(shared: Arc<Shared>, write: WriteHalf<IO>, mut queue: mpsc::Receiver<Outgoing>)
where
    IO: AsyncRead + AsyncWrite + Send + 'static,
{
    let closed = shared.closed.clone();
    let mut write = tokio::io::BufWriter::with_capacity(2 * DATA_MAX, write);
    // Between frames the writer sees by itself that nothing moves, and says goodbye.
    let hangs = shared.limits.idle + 2 * shared.limits.ping;
    let result = tokio::select! {
        result = write_frames(&shared, &mut write, &mut queue) => result,
        () = closed.cancelled() => Ok(()),
        () = shared.activity.idle_for(hangs) => {
            tracing::info!("closing a streaming connection whose client does not read");
            Ok(())
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "writing to a SPDY connection");
    }
    shared.close();
    queue.close();
    // Otherwise the peer would wait for more.
    let _ = tokio::time::timeout(Duration::from_secs(1), write.shutdown()).await;
}

async fn write_frames<W>(
    shared: &Shared,
    write: &mut W,
    queue: &mut mpsc::Receiver<Outgoing>,
) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    let mut deflater = Deflater::new();
    let mut ticks = interval(shared.limits.ping);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    let mut control = Vec::new();
    loop {
        let next = match queue.try_recv() {
            Ok(next) => next,
            Err(mpsc::error::TryRecvError::Disconnected) => return Ok(()),
            Err(mpsc::error::TryRecvError::Empty) => {
                write.flush().await?;
                tokio::select! {
                    next = queue.recv() => match next {
                        Some(next) => next,
                        None => return Ok(()),
                    },
                    _ = ticks.tick() => {
                        let idle = shared.activity.idle();
                        if idle >= shared.limits.idle {
                            tracing::info!(?idle, "closing an idle streaming connection");
                            Outgoing::Close { status: GOAWAY_OK }
                        } else {
                            Outgoing::Control(Control::Ping { id: 2 })
                        }
                    }
                }
            }
        };
        match next {
            Outgoing::Control(frame) => {
                control.clear();
                frame.encode(&mut deflater, &mut control);
                write.write_all(&control).await?;
            }
            Outgoing::Data { stream, fin, bytes } => {
                shared.activity.touch();
                write.write_all(&data_head(stream, fin, &bytes)).await?;
                write.write_all(&bytes).await?;
            }
            Outgoing::Close { status } => {
                control.clear();
                let last_stream = shared.lock().last_remote;
                Control::GoAway { last_stream, status }.encode(&mut deflater, &mut control);
                write.write_all(&control).await?;
                return write.flush().await;
            }
        }
    }
}

#[cfg(test)]
impl Connection {
    /// The client's end, for tests: ids that a client uses, and no check of what the server opens.
    pub(crate) fn client<IO>(io: IO, limits: Limits) -> Connection
    where
        IO: AsyncRead + AsyncWrite + Send + 'static,
    {
        Connection::server(io, limits)
    }

    /// Opens a stream and waits for the reply, as the Go client does.
    pub(crate) async fn open(&mut self, headers: Headers) -> io::Result<Stream> {
        let (replied, reply) = tokio::sync::oneshot::channel();
        let id = {
            let mut state = self.shared.lock();
            state.last_local = if state.last_local == 0 {
                1
            } else {
                state.last_local + 2
            };
            state.last_local
        };
        let stream = self.shared.add(id, headers.clone(), false);
        if let Some(entry) = self.shared.lock().streams.get_mut(&id) {
            entry.replied = Some(replied);
        }
        let syn = Control::SynStream {
            stream: id,
            fin: false,
            headers,
        };
        let sent = self.shared.outgoing.send(Outgoing::Control(syn)).await;
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        reply
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::ConnectionReset))?;
        Ok(stream)
    }

    pub(crate) fn open_streams(&self) -> usize {
        self.shared.lock().streams.len()
    }
}
