//! Frames of SPDY/3.1 (draft 3 of the SPDY protocol, section 2.2, and draft 3.1 for window updates of stream 0).
//! Pure parsing and encoding, every length bounded before anything is allocated.

use bytes::Bytes;

use super::headers::{Deflater, Headers, Inflater};

/// Bytes of every frame's head.
pub(crate) const HEAD: usize = 8;
/// Largest payload of a control frame.
pub(crate) const CONTROL_MAX: usize = 16 << 10;
/// Largest data frame that we send, and the most that is held of one that we read.
pub(crate) const DATA_MAX: usize = 32 << 10;

const VERSION: u16 = 3;
const FLAG_FIN: u8 = 0x01;
const SETTING_INITIAL_WINDOW: u32 = 7;

/// Why a connection's bytes are not SPDY/3.1 within our bounds. Ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// Not as the draft says.
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
    /// More than anyone needs.
    #[error("too large: {0}")]
    TooLarge(&'static str),
    /// Another protocol version.
    #[error("SPDY version {0}, not 3")]
    Version(u16),
}

/// The first eight bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Head {
    Data { stream: u32, fin: bool, length: usize },
    Control { kind: u16, flags: u8, length: usize },
}

impl Head {
    pub(crate) fn parse(bytes: [u8; HEAD]) -> Result<Head, FrameError> {
        let [a, b, c, d, flags, x, y, z] = bytes;
        let length = u32::from_be_bytes([0, x, y, z]) as usize;
        let word = u32::from_be_bytes([a, b, c, d]);
        if word & 0x8000_0000 == 0 {
            if word == 0 {
                return Err(FrameError::Malformed("data on stream 0"));
            }
            return Ok(Head::Data {
                stream: word,
                fin: flags & FLAG_FIN != 0,
                length,
            });
        }
        let version = (word >> 16) as u16 & 0x7fff;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > CONTROL_MAX {
            return Err(FrameError::TooLarge("control frame"));
        }
        Ok(Head::Control {
            kind: word as u16,
            flags,
            length,
        })
    }
}

/// Status of a RST_STREAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum ResetStatus {
    RefusedStream = 3,
    Cancel = 5,
}

/// Status of a GOAWAY.
pub(crate) const GOAWAY_OK: u32 = 0;
/// See [`GOAWAY_OK`].
pub(crate) const GOAWAY_PROTOCOL_ERROR: u32 = 1;

/// A control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Control {
    SynStream {
        stream: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        stream: u32,
        fin: bool,
        headers: Headers,
    },
    Reset {
        stream: u32,
        status: u32,
    },
    /// The initial window, if the settings have one.
    Settings {
        initial_window: Option<u32>,
    },
    Ping {
        id: u32,
    },
    GoAway {
        last_stream: u32,
        status: u32,
    },
    Headers {
        stream: u32,
        fin: bool,
        headers: Headers,
    },
    /// Stream 0: the connection's window.
    WindowUpdate {
        stream: u32,
        delta: u32,
    },
    /// A kind that we do not know; the draft says to ignore it.
    Unknown,
}

impl Control {
    pub(crate) fn parse(
        kind: u16,
        flags: u8,
        payload: &[u8],
        inflater: &mut Inflater,
    ) -> Result<Control, FrameError> {
        let fin = flags & FLAG_FIN != 0;
        let mut rest = payload;
        let control = match kind {
            1 => {
                let stream = stream_id(&mut rest)?;
                // Associated stream, priority and slot: nothing here uses them.
                rest = rest
                    .get(6..)
                    .ok_or(FrameError::Malformed("SYN_STREAM too short"))?;
                return Ok(Control::SynStream {
                    stream,
                    fin,
                    headers: inflater.headers(rest)?,
                });
            }
            2 => {
                let stream = stream_id(&mut rest)?;
                return Ok(Control::SynReply {
                    stream,
                    fin,
                    headers: inflater.headers(rest)?,
                });
            }
            3 => Control::Reset {
                stream: stream_id(&mut rest)?,
                status: word(&mut rest)?,
            },
            4 => return settings(rest),
            6 => Control::Ping { id: word(&mut rest)? },
            7 => Control::GoAway {
                last_stream: word(&mut rest)? & 0x7fff_ffff,
                status: word(&mut rest)?,
            },
            8 => {
                let stream = stream_id(&mut rest)?;
                return Ok(Control::Headers {
                    stream,
                    fin,
                    headers: inflater.headers(rest)?,
                });
            }
            9 => {
                let stream = word(&mut rest)? & 0x7fff_ffff;
                let delta = word(&mut rest)? & 0x7fff_ffff;
                if delta == 0 {
                    return Err(FrameError::Malformed("WINDOW_UPDATE of 0"));
                }
                Control::WindowUpdate { stream, delta }
            }
            _ => return Ok(Control::Unknown),
        };
        if rest.is_empty() {
            Ok(control)
        } else {
            Err(FrameError::Malformed("control frame too long"))
        }
    }

    pub(crate) fn encode(&self, deflater: &mut Deflater, into: &mut Vec<u8>) {
        let flags = |fin: &bool| if *fin { FLAG_FIN } else { 0 };
        match self {
            Control::SynStream { stream, fin, headers } => {
                let block = deflater.block(headers);
                frame(into, 1, flags(fin), &[&stream.to_be_bytes(), &[0; 6], &block]);
            }
            Control::SynReply { stream, fin, headers } => {
                let block = deflater.block(headers);
                frame(into, 2, flags(fin), &[&stream.to_be_bytes(), &block]);
            }
            Control::Reset { stream, status } => {
                frame(into, 3, 0, &[&stream.to_be_bytes(), &status.to_be_bytes()])
            }
            Control::Settings { initial_window } => {
                let Some(window) = initial_window else {
                    return frame(into, 4, 0, &[&0u32.to_be_bytes()]);
                };
                let id = SETTING_INITIAL_WINDOW.to_be_bytes();
                frame(into, 4, 0, &[&1u32.to_be_bytes(), &id, &window.to_be_bytes()]);
            }
            Control::Ping { id } => frame(into, 6, 0, &[&id.to_be_bytes()]),
            Control::GoAway { last_stream, status } => {
                frame(into, 7, 0, &[&last_stream.to_be_bytes(), &status.to_be_bytes()]);
            }
            Control::Headers { stream, fin, headers } => {
                let block = deflater.block(headers);
                frame(into, 8, flags(fin), &[&stream.to_be_bytes(), &block]);
            }
            Control::WindowUpdate { stream, delta } => {
                frame(into, 9, 0, &[&stream.to_be_bytes(), &delta.to_be_bytes()]);
            }
            Control::Unknown => {}
        }
    }
}

/// Head of a data frame with `length` bytes, which is at most [`DATA_MAX`].
pub(crate) fn data_head(stream: u32, fin: bool, data: &Bytes) -> [u8; HEAD] {
    let [a, b, c, d] = stream.to_be_bytes();
    let [_, x, y, z] = (data.len() as u32).to_be_bytes();
    [a, b, c, d, u8::from(fin), x, y, z]
}

fn frame(into: &mut Vec<u8>, kind: u16, flags: u8, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    into.extend_from_slice(&(0x8000 | VERSION).to_be_bytes());
    into.extend_from_slice(&kind.to_be_bytes());
    into.extend_from_slice(&((u32::from(flags) << 24) | length as u32).to_be_bytes());
    for part in parts {
        into.extend_from_slice(part);
    }
}

fn word(rest: &mut &[u8]) -> Result<u32, FrameError> {
    let (bytes, after) = rest
        .split_first_chunk::<4>()
        .ok_or(FrameError::Malformed("control frame too short"))?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes))
}

fn stream_id(rest: &mut &[u8]) -> Result<u32, FrameError> {
    match word(rest)? & 0x7fff_ffff {
        0 => Err(FrameError::Malformed("stream 0")),
        id => Ok(id),
    }
}

fn settings(payload: &[u8]) -> Result<Control, FrameError> {
    let mut rest = payload;
    let count = word(&mut rest)? as usize;
    if !rest.len().is_multiple_of(8) || rest.len() / 8 != count {
        return Err(FrameError::Malformed("SETTINGS of another length than it says"));
    }
    let mut initial_window = None;
    for entry in rest.chunks_exact(8) {
        let mut entry = entry;
        let (id, value) = (word(&mut entry)? & 0x00ff_ffff, word(&mut entry)?);
        if id == SETTING_INITIAL_WINDOW {
            if value > 0x7fff_ffff {
                return Err(FrameError::Malformed("initial window over 2^31-1"));
            }
            initial_window = Some(value);
        }
    }
    Ok(Control::Settings { initial_window })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(control: Control) {
        let mut bytes = Vec::new();
        control.encode(&mut Deflater::new(), &mut bytes);
        let head = Head::parse(bytes[..HEAD].try_into().expect("8 bytes")).expect("a head");
        let Head::Control { kind, flags, length } = head else {
            panic!("not a control frame")
        };
        assert_eq!(length, bytes.len() - HEAD);
        let parsed = Control::parse(kind, flags, &bytes[HEAD..], &mut Inflater::new()).expect("parses");
        assert_eq!(parsed, control);
    }

    #[test]
    fn every_kind_round_trips() {
        let headers = || Headers::from([("streamtype", "error"), ("port", "1")]);
        for fin in [false, true] {
            round_trip(Control::SynStream {
                stream: 1,
                fin,
                headers: headers(),
            });
            round_trip(Control::SynReply {
                stream: 0x7fff_ffff,
                fin,
                headers: Headers::default(),
            });
            round_trip(Control::Headers {
                stream: 3,
                fin,
                headers: headers(),
            });
        }
        round_trip(Control::Reset {
            stream: 5,
            status: ResetStatus::Cancel as u32,
        });
        round_trip(Control::Settings {
            initial_window: Some(70_000),
        });
        round_trip(Control::Settings { initial_window: None });
        round_trip(Control::Ping { id: 2 });
        round_trip(Control::GoAway {
            last_stream: 7,
            status: GOAWAY_OK,
        });
        round_trip(Control::WindowUpdate { stream: 0, delta: 1 });
    }

    /// As a Go client writes it on the wire.
    #[test]
    fn bytes_of_the_draft() {
        let ping = [0x80, 3, 0, 6, 0, 0, 0, 4];
        assert_eq!(
            Head::parse(ping),
            Ok(Head::Control {
                kind: 6,
                flags: 0,
                length: 4
            })
        );
        let data = [0, 0, 0, 9, 1, 0, 1, 0];
        assert_eq!(
            Head::parse(data),
            Ok(Head::Data {
                stream: 9,
                fin: true,
                length: 256
            })
        );
        assert_eq!(data_head(9, true, &Bytes::from(vec![0; 256])), data);
    }

    #[test]
    fn refused() {
        assert_eq!(
            Head::parse([0x80, 2, 0, 6, 0, 0, 0, 4]),
            Err(FrameError::Version(2))
        );
        assert_eq!(
            Head::parse([0x80, 3, 0, 1, 0, 0xff, 0, 0]),
            Err(FrameError::TooLarge("control frame"))
        );
        assert!(Head::parse([0; 8]).is_err());
        let parse = |kind, payload: &[u8]| Control::parse(kind, 0, payload, &mut Inflater::new());
        for (kind, payload) in [
            (1, &[0, 0, 0, 1][..]),
            (3, &[0, 0, 0, 0, 0, 0, 0, 1]),
            (3, &[0, 0, 0, 1, 0, 0, 0]),
            (4, &[0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]),
            (4, &[0xff, 0xff, 0xff, 0xff]),
            (4, &[0, 0, 0, 1, 0, 0, 0, 7, 0xff, 0, 0, 0]),
            (6, &[0, 0, 0, 1, 9]),
            (9, &[0, 0, 0, 1, 0, 0, 0, 0]),
        ] {
            assert!(parse(kind, payload).is_err(), "{kind} {payload:?}");
        }
        assert_eq!(parse(77, b"anything"), Ok(Control::Unknown));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]

        #[test]
        fn never_panics(head in any::<[u8; 8]>(), payload in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Head::parse(head);
            for kind in 0..12 {
                let _ = Control::parse(kind, head[0], &payload, &mut Inflater::new());
            }
        }
    }
}
