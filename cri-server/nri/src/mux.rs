//! Frames of the multiplexer: several logical connections on one socket. A frame is the connection's number and
//! the payload's length, big-endian, and the payload.
//!
//! The peer's reader takes a frame as one read into a buffer of 4096 bytes or of the rest of a message, and keeps
//! at most 256 frames. So a message goes out as one frame of at most 4096 bytes and one with all the rest, and
//! never shares a frame with another.

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::ttrpc::{HEADER as TTRPC_HEADER, MAX_MESSAGE};

/// The connection on which the plugin serves.
pub(crate) const PLUGIN_SERVICE: u32 = 1;
/// The connection on which the runtime serves.
pub(crate) const RUNTIME_SERVICE: u32 = 2;

const HEADER: usize = 8;
/// A whole ttrpc message.
const MAX_PAYLOAD: usize = TTRPC_HEADER + MAX_MESSAGE;
const FIRST: usize = 4096;
/// Memory is taken as bytes come, not as a header promises.
const STEP: usize = 64 << 10;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) connection: u32,
    pub(crate) payload: Bytes,
}

/// Why nothing more can be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("the connection was closed")]
    Closed,
    #[error("reading failed")]
    Io(#[source] std::io::Error),
    #[error("a frame of {0} bytes, more than the {MAX_PAYLOAD} that the protocol has")]
    TooLong(usize),
}

/// A message as frames, ready to be written.
pub(crate) fn encode(connection: u32, message: &[u8]) -> Bytes {
    let (first, rest) = message.split_at(message.len().min(FIRST));
    let mut out = BytesMut::with_capacity(message.len() + 2 * HEADER);
    for part in [first, rest] {
        if part.is_empty() {
            continue;
        }
        out.put_u32(connection);
        out.put_u32(u32::try_from(part.len()).unwrap_or(u32::MAX));
        out.put_slice(part);
    }
    out.freeze()
}

/// Reads one frame.
///
/// # Errors
/// [`ReadError`]; the stream is then of no more use.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Frame, ReadError> {
    let mut header = [0; HEADER];
    let ended = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => ReadError::Closed,
        _ => ReadError::Io(error),
    };
    stream.read_exact(&mut header).await.map_err(ended)?;
    let number = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (connection, length) = (number(0), number(4) as usize);
    if length > MAX_PAYLOAD {
        return Err(ReadError::TooLong(length));
    }
    let mut payload = Vec::new();
    while payload.len() < length {
        let at = payload.len();
        payload.resize(length.min(at + STEP), 0);
        stream.read_exact(&mut payload[at..]).await.map_err(ended)?;
    }
    Ok(Frame {
        connection,
        payload: payload.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    proptest! {
        #[test]
        fn a_message_comes_back_in_at_most_two_frames(connection in any::<u32>(), length in 1usize..20_000) {
            let message: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let bytes = encode(connection, &message);
            let mut stream = &bytes[..];
            let (mut got, mut frames) = (Vec::new(), 0);
            while !stream.is_empty() {
                let frame = run(read(&mut stream)).unwrap();
                prop_assert_eq!(frame.connection, connection);
                frames += 1;
                prop_assert!(frames == 2 || frame.payload.len() <= FIRST);
                got.extend_from_slice(&frame.payload);
            }
            prop_assert!(frames <= 2);
            prop_assert_eq!(got, message);
        }

        #[test]
        fn any_bytes_end_in_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut stream = &bytes[..];
            while let Ok(frame) = run(read(&mut stream)) {
                prop_assert!(frame.payload.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut header = vec![0, 0, 0, 1];
        header.extend_from_slice(&u32::try_from(MAX_PAYLOAD + 1).unwrap().to_be_bytes());
        assert!(matches!(run(read(&mut &header[..])), Err(ReadError::TooLong(_))));
    }
}
