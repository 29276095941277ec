//! Frames of the byte streams that Stream.Open hands out: the same encoder and decoder for the daemon and for
//! every shim.
//!
//! The client connects to the answered unix socket and sends the 16-byte token. Then frames flow both ways:
//! kind (1 byte), length (4 bytes, little endian, at most [`MAX_PAYLOAD`]), payload.
//!
//! | kind | direction | payload |
//! |---|---|---|
//! | 0 | client to shim | stdin, or bytes for the port |
//! | 1 | shim to client | stdout, or bytes from the port |
//! | 2 | shim to client | stderr |
//! | 3 | shim to client | JSON `{"exit_code":n}` or `{"error":"…"}`; the last frame |
//! | 4 | client to shim | JSON `{"width":w,"height":h}` |
//! | 5 | both | empty: no more bytes this way (end of stdin, half-closed port) |
//! | 6 | shim to client | empty: stdout and stderr have ended |
//!
//! A connection that closes without frame 5 is a client that went away.

use std::path::Path;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

/// Bytes of a frame's payload at most.
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Bytes of a session's token.
pub const TOKEN_LENGTH: usize = 16;
/// Bytes of kind and length.
pub const HEADER_LENGTH: usize = 5;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Bytes from the client: stdin or the port's.
    Input(Bytes),
    /// stdout, or bytes from the port.
    Stdout(Bytes),
    /// stderr.
    Stderr(Bytes),
    /// How the session ended; nothing follows.
    Exit(Exit),
    /// New terminal size.
    Resize(TerminalSize),
    /// No more bytes in this direction.
    End,
    /// stdout and stderr have ended.
    OutputEnd,
}

/// End of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The process ended; 128 + signal number for one that a signal ended.
    #[serde(rename = "exit_code")]
    Code(i32),
    /// The session failed, or never began.
    #[serde(rename = "error")]
    Error(String),
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The peer broke the framing, or the connection broke.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A kind that is not in the table.
    #[error("stream frame of unknown kind {0}")]
    UnknownKind(u8),
    /// Longer than [`MAX_PAYLOAD`].
    #[error("stream frame of {0} bytes, {MAX_PAYLOAD} are allowed")]
    TooLong(u32),
    /// A payload that is not the JSON it should be, or is not empty.
    #[error("stream frame of kind {0} with a malformed payload")]
    Malformed(u8),
    /// The connection closed inside a frame.
    #[error("stream connection closed inside a frame")]
    Truncated,
    /// Socket error.
    #[error("stream connection failed")]
    Io(#[from] std::io::Error),
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Input(_) => 0,
            Self::Stdout(_) => 1,
            Self::Stderr(_) => 2,
            Self::Exit(_) => 3,
            Self::Resize(_) => 4,
            Self::End => 5,
            Self::OutputEnd => 6,
        }
    }

    /// Appends the frame's bytes. Data longer than [`MAX_PAYLOAD`] becomes several frames; an exit's message is
    /// cut to fit.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Input(data) | Self::Stdout(data) | Self::Stderr(data) => {
                for part in data.chunks(MAX_PAYLOAD) {
                    put(out, self.kind(), part);
                }
            }
            Self::Exit(exit) => put(out, self.kind(), &exit.to_json()),
            Self::Resize(TerminalSize { width, height }) => {
                put(
                    out,
                    self.kind(),
                    format!("{{\"width\":{width},\"height\":{height}}}").as_bytes(),
                );
            }
            Self::End | Self::OutputEnd => put(out, self.kind(), &[]),
        }
    }

    /// Takes one frame from the front of `buffer`; `None` where it is not complete yet.
    ///
    /// # Errors
    /// [`FrameError`] for bytes that are no frame; the connection is then of no further use.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(header) = buffer.get(..HEADER_LENGTH) else {
            return Ok(None);
        };
        let kind = header[0];
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
        if kind > 6 {
            return Err(FrameError::UnknownKind(kind));
        }
        if length as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        if buffer.len() < HEADER_LENGTH + length as usize {
            return Ok(None);
        }
        buffer.advance(HEADER_LENGTH);
        let payload = buffer.split_to(length as usize).freeze();
        let malformed = |_| FrameError::Malformed(kind);
        Ok(Some(match kind {
            0 => Self::Input(payload),
            1 => Self::Stdout(payload),
            2 => Self::Stderr(payload),
            3 => Self::Exit(serde_json::from_slice(&payload).map_err(malformed)?),
            4 => Self::Resize(serde_json::from_slice(&payload).map_err(malformed)?),
            _ if !payload.is_empty() => return Err(FrameError::Malformed(kind)),
            5 => Self::End,
            _ => Self::OutputEnd,
        }))
    }
}

impl Exit {
    fn to_json(&self) -> Vec<u8> {
        let json = |exit: &Self| serde_json::to_vec(exit).expect("a number or a string is always JSON");
        let bytes = json(self);
        match self {
            Self::Error(text) if bytes.len() > MAX_PAYLOAD => {
                // An escaped character takes up to six bytes.
                json(&Self::Error(text.chars().take(MAX_PAYLOAD / 8).collect()))
            }
            _ => bytes,
        }
    }
}

/// Appends one frame; the payload is known to fit.
fn put(out: &mut BytesMut, kind: u8, payload: &[u8]) {
    out.reserve(HEADER_LENGTH + payload.len());
    out.put_u8(kind);
    out.put_u32_le(payload.len() as u32);
    out.put_slice(payload);
}

/// Reads frames from a connection; keeps what was read beyond a frame.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader for a connection after its token.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: BytesMut::new(),
        }
    }

    /// The connection.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The next frame; `None` where the peer closed the connection between frames. May be cancelled without
    /// losing bytes.
    ///
    /// # Errors
    /// [`FrameError`]; the connection is then of no further use.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = Frame::decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            // `decode` has refused lengths beyond the bound, so the buffer stays under one frame and one read.
            self.buffer.reserve(8 * 1024);
            if self.inner.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(FrameError::Truncated)
                };
            }
        }
    }
}

impl FrameReader<OwnedReadHalf> {
    /// Resolves when the peer has closed its end, even while frames that it sent before are unread.
    pub async fn closed(&self) {
        // Priority is readiness of its own, which comes with a peer's end and never with its frames. An error is an
        // end, too.
        let _ = self.inner.ready(Interest::PRIORITY).await;
    }
}

/// Writes one frame.
///
/// # Errors
/// The socket's.
pub async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, frame: &Frame) -> std::io::Result<()> {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    writer.write_all(&bytes).await
}

/// Connects to a session that Stream.Open prepared and presents its token; frames follow.
///
/// # Errors
/// The socket's; a wrong or expired token shows as a connection that closes at once.
pub async fn connect(address: &Path, token: &[u8]) -> std::io::Result<UnixStream> {
    let mut stream = UnixStream::connect(address).await?;
    stream.write_all(token).await?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let data = || proptest::collection::vec(any::<u8>(), 1..3000).prop_map(Bytes::from);
        prop_oneof![
            data().prop_map(Frame::Input),
            data().prop_map(Frame::Stdout),
            data().prop_map(Frame::Stderr),
            any::<i32>().prop_map(|code| Frame::Exit(Exit::Code(code))),
            ".{0,60}".prop_map(|text| Frame::Exit(Exit::Error(text))),
            any::<(u16, u16)>().prop_map(|(width, height)| Frame::Resize(TerminalSize { width, height })),
            Just(Frame::End),
            Just(Frame::OutputEnd),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_split_of_the_stream(
            frames in proptest::collection::vec(any_frame(), 0..12),
            step in 1usize..700,
        ) {
            let mut wire = BytesMut::new();
            frames.iter().for_each(|frame| frame.encode(&mut wire));
            let (mut buffer, mut decoded) = (BytesMut::new(), Vec::new());
            for part in wire.chunks(step) {
                buffer.extend_from_slice(part);
                while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                    decoded.push(frame);
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(decoded, frames);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_hoard(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
            prop_assert!(buffer.len() <= bytes.len());
        }
    }

    #[test]
    fn long_data_becomes_several_frames_and_nothing_longer_is_accepted() {
        let mut wire = BytesMut::new();
        Frame::Stdout(Bytes::from(vec![7; MAX_PAYLOAD + 1])).encode(&mut wire);
        assert_eq!(wire.len(), MAX_PAYLOAD + 1 + 2 * HEADER_LENGTH);
        let mut too_long = BytesMut::from(&[0u8, 1, 0, 1, 0][..]);
        assert!(matches!(
            Frame::decode(&mut too_long),
            Err(FrameError::TooLong(65537))
        ));
        let mut unknown = BytesMut::from(&[7u8, 0, 0, 0, 0][..]);
        assert!(matches!(
            Frame::decode(&mut unknown),
            Err(FrameError::UnknownKind(7))
        ));
    }

    #[test]
    fn exit_frames_are_spelled_as_documented() {
        let mut wire = BytesMut::new();
        Frame::Exit(Exit::Code(7)).encode(&mut wire);
        assert_eq!(&wire[HEADER_LENGTH..], br#"{"exit_code":7}"#);
        wire.clear();
        Frame::Exit(Exit::Error("\u{1}".repeat(MAX_PAYLOAD))).encode(&mut wire);
        assert!(wire.len() <= MAX_PAYLOAD + HEADER_LENGTH);
        assert!(matches!(
            Frame::decode(&mut wire),
            Ok(Some(Frame::Exit(Exit::Error(_))))
        ));
    }

    #[tokio::test]
    async fn a_connection_that_closes_inside_a_frame_is_an_error() {
        let mut reader = FrameReader::new(&[1u8, 9, 0, 0, 0, 1][..]);
        assert!(matches!(reader.next().await, Err(FrameError::Truncated)));
        let mut reader = FrameReader::new(&[5u8, 0, 0, 0, 0][..]);
        assert_eq!(reader.next().await.unwrap(), Some(Frame::End));
        assert_eq!(reader.next().await.unwrap(), None);
    }
}
