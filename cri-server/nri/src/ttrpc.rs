//! ttrpc messages: a header of ten bytes (length, stream, type, flags) and a protobuf envelope. Unary calls only,
//! which is all that NRI has. The ttrpc crate serves listeners and sockets; here two peers share one socket, and
//! every byte of a plugin is bounded and checked.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;

/// Bytes of a header.
pub(crate) const HEADER: usize = 10;
/// The protocol's limit of a message without its header.
pub(crate) const MAX_MESSAGE: usize = 4 << 20;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// Status codes, as gRPC has them.
pub(crate) mod code {
    pub(crate) const INVALID_ARGUMENT: i32 = 3;
    pub(crate) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(crate) const FAILED_PRECONDITION: i32 = 9;
    pub(crate) const UNIMPLEMENTED: i32 = 12;
}

/// A call.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Request {
    #[prost(string, tag = "1")]
    pub(crate) service: String,
    #[prost(string, tag = "2")]
    pub(crate) method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    pub(crate) timeout_nano: i64,
}

/// Its answer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Response {
    #[prost(message, optional, tag = "1")]
    pub(crate) status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) payload: Vec<u8>,
}

/// google.rpc.Status without details.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Status {
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
}

/// What came on a connection.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Message {
    Request(u32, Request),
    Response(u32, Response),
    /// Of a type that this side does not know; to be passed over.
    Other,
}

/// Bytes that are no ttrpc.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CodecError {
    #[error("a message of {0} bytes, more than the {MAX_MESSAGE} that the protocol allows")]
    TooLong(usize),
    #[error("a message is no protobuf")]
    Envelope(#[from] prost::DecodeError),
}

/// A request with its header.
///
/// # Errors
/// The length that is too much.
pub(crate) fn request(stream: u32, request: &Request) -> Result<Bytes, usize> {
    encode(stream, REQUEST, request)
}

/// A response with its header.
///
/// # Errors
/// The length that is too much.
pub(crate) fn response(stream: u32, response: &Response) -> Result<Bytes, usize> {
    encode(stream, RESPONSE, response)
}

fn encode(stream: u32, kind: u8, message: &impl prost::Message) -> Result<Bytes, usize> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(length);
    }
    let mut out = BytesMut::with_capacity(HEADER + length);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    out.put_u32(stream);
    out.put_u8(kind);
    out.put_u8(0);
    // The buffer grows: this cannot fail.
    message.encode(&mut out).map_err(|_| length)?;
    Ok(out.freeze())
}

/// Puts the bytes of one logical connection together to messages.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Takes what came.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message; none until more bytes come.
    ///
    /// # Errors
    /// [`CodecError`]; the connection is then of no more use.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, CodecError> {
        if self.buffer.len() < HEADER {
            return Ok(None);
        }
        let mut header = &self.buffer[..HEADER];
        let (length, stream, kind) = (header.get_u32() as usize, header.get_u32(), header.get_u8());
        if length > MAX_MESSAGE {
            return Err(CodecError::TooLong(length));
        }
        if self.buffer.len() < HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        let payload = self.buffer.split_to(length);
        Ok(Some(match kind {
            REQUEST => Message::Request(stream, Request::decode(&payload[..])?),
            RESPONSE => Message::Response(stream, Response::decode(&payload[..])?),
            _ => Message::Other,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_survive_any_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..5),
            cut in 1usize..50,
        ) {
            let mut bytes = Vec::new();
            let mut sent = Vec::new();
            for (at, payload) in payloads.into_iter().enumerate() {
                let stream = u32::try_from(at).unwrap();
                let whole = Request { service: "s".into(), method: "m".into(), payload, timeout_nano: 7 };
                bytes.extend_from_slice(&request(stream, &whole).unwrap());
                sent.push(Message::Request(stream, whole));
            }
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for part in bytes.chunks(cut) {
                decoder.push(part);
                while let Some(message) = decoder.next().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn any_bytes_end_in_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            for _ in 0..=bytes.len() {
                match decoder.next() {
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
            prop_assert!(false, "more messages than bytes");
        }
    }

    #[test]
    fn a_header_that_promises_too_much_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(&[0xff; HEADER]);
        assert!(matches!(decoder.next(), Err(CodecError::TooLong(_))));
        let big = Response {
            status: None,
            payload: vec![0; MAX_MESSAGE],
        };
        assert!(response(1, &big).unwrap_err() > MAX_MESSAGE);
    }
}
