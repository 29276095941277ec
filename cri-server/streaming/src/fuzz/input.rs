//! Inputs: frames and messages as clients send them, with odd ids, lengths and orders, and sometimes damaged bytes.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::spdy::{Control, Deflater, Headers};

#[derive(Debug, Clone, Copy)]
pub(super) enum Verb {
    Exec { tty: bool },
    Attach,
    PortForward,
}

/// What a client asks for, and what it sends then.
pub(super) struct Session {
    pub(super) verb: Verb,
    web_socket: bool,
    protocol: &'static str,
    body: Vec<u8>,
    damage: Option<u64>,
}

/// What the streams of Kubernetes' protocols are, the resize text and the goodbye of an outcome among the data.
const KINDS: [&str; 8] = [
    "error", "stdin", "stdout", "stderr", "resize", "data", "", "unknown",
];
const DATA: [&[u8]; 6] = [
    b"",
    b"hello",
    b"{\"Width\":80,\"Height\":24}",
    b"{\"Width\":99999,\"Height\":-1}",
    b"\xff\x00\xfe",
    &[0x55; 5000],
];

/// The bytes of a SPDY connection, some streams of which ask for `port`.
pub(super) fn spdy(rng: &mut StdRng, port: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut deflater = Deflater::new();
    let mut next = 1u32;
    for _ in 0..rng.random_range(0..30) {
        let known = next.saturating_sub(2 * rng.random_range(0..4)).max(1);
        let id = match rng.random_range(0..12) {
            0 => rng.random(),
            1 => 0,
            _ => known,
        };
        let fin = rng.random_ratio(1, 5);
        let control = match rng.random_range(0..17) {
            0..5 => {
                let stream = if rng.random_ratio(1, 12) { id } else { next };
                next = next.wrapping_add(2);
                Control::SynStream {
                    stream,
                    fin,
                    headers: headers(rng, port),
                }
            }
            5..10 => {
                data(&mut bytes, rng, id, fin);
                continue;
            }
            10 => Control::Reset {
                stream: id,
                status: rng.random_range(0..12),
            },
            11 => Control::WindowUpdate {
                stream: if rng.random() { 0 } else { id },
                delta: odd_number(rng),
            },
            12 => Control::Settings {
                initial_window: rng.random_ratio(3, 4).then(|| odd_number(rng)),
            },
            15 => Control::Ping { id: odd_number(rng) },
            13 => Control::Headers {
                stream: id,
                fin,
                headers: headers(rng, port),
            },
            14 => Control::SynReply {
                stream: id,
                fin,
                headers: Headers::default(),
            },
            _ => Control::GoAway {
                last_stream: id,
                status: 0,
            },
        };
        control.encode(&mut deflater, &mut bytes);
    }
    if rng.random_ratio(1, 3) {
        damage(&mut bytes, rng);
    }
    bytes
}

fn data(bytes: &mut Vec<u8>, rng: &mut StdRng, id: u32, fin: bool) {
    let data = *DATA.choose(rng).unwrap_or(&DATA[0]);
    let length = match rng.random_range(0..30) {
        0 => odd_number(rng) & 0x00ff_ffff,
        _ => data.len() as u32,
    };
    bytes.extend((id & 0x7fff_ffff).to_be_bytes());
    bytes.extend(((u32::from(fin) << 24) | length).to_be_bytes());
    bytes.extend(data);
}

fn headers(rng: &mut StdRng, port: u16) -> Headers {
    let kind = *KINDS.choose(rng).unwrap_or(&"");
    let number = rng.random_range(0..4u32).to_string();
    let port = port.to_string();
    let long = "x".repeat(rng.random_range(0..40) * 1000);
    match rng.random_range(0..8) {
        0 => Headers::default(),
        1 => Headers::from([("streamtype", kind), ("long", &long)]),
        2..5 => Headers::from([("streamtype", kind), ("requestid", &number), ("port", &port)]),
        5 => Headers::from([("streamtype", kind), ("port", "99999"), ("requestid", "\0")]),
        _ => Headers::from([("streamtype", kind)]),
    }
}

fn odd_number(rng: &mut StdRng) -> u32 {
    let edges = [
        0,
        1,
        2,
        7,
        0xff,
        0xffff,
        0x1_0000,
        0x00ff_ffff,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX,
    ];
    if rng.random_ratio(2, 3) {
        *edges.choose(rng).unwrap_or(&0)
    } else {
        rng.random()
    }
}

/// Messages of a WebSocket, masked as a client's are.
fn messages(rng: &mut StdRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.random_range(0..20) {
        let mut payload = vec![*[0u8, 0, 0, 1, 3, 4, 4, 255, 255, 9].choose(rng).unwrap_or(&0)];
        payload.extend(*DATA.choose(rng).unwrap_or(&DATA[0]));
        if rng.random_ratio(1, 10) {
            payload.clear();
        }
        let operation = *[2u8, 2, 2, 2, 2, 2, 0, 1, 8, 9, 10, 3, 15]
            .choose(rng)
            .unwrap_or(&2);
        message(&mut bytes, rng, operation, &payload);
    }
    bytes
}

/// One message (RFC 6455, section 5.2), now and then of a length or with bits that lie.
fn message(bytes: &mut Vec<u8>, rng: &mut StdRng, operation: u8, payload: &[u8]) {
    let last = if rng.random_ratio(9, 10) { 0x80 } else { 0 };
    let reserved = if rng.random_ratio(1, 40) { 0x40 } else { 0 };
    bytes.push(last | reserved | operation);
    let masked = if rng.random_ratio(29, 30) { 0x80 } else { 0 };
    let length = if rng.random_ratio(1, 30) {
        u64::from(odd_number(rng)) << rng.random_range(0..33)
    } else {
        payload.len() as u64
    };
    match length {
        0..126 => bytes.push(masked | length as u8),
        126..0x1_0000 => {
            bytes.push(masked | 126);
            bytes.extend((length as u16).to_be_bytes());
        }
        _ => {
            bytes.push(masked | 127);
            bytes.extend(length.to_be_bytes());
        }
    }
    let mask: [u8; 4] = rng.random();
    bytes.extend(mask);
    bytes.extend(
        payload
            .iter()
            .zip(mask.iter().cycle())
            .map(|(byte, mask)| byte ^ mask),
    );
}

/// A SPDY connection in the messages of a tunnel, cut anywhere.
fn tunnelled(rng: &mut StdRng, port: u16) -> Vec<u8> {
    let inner = spdy(rng, port);
    let (mut bytes, mut rest) = (Vec::new(), inner.as_slice());
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rng.random_range(1..=rest.len()));
        message(&mut bytes, rng, 2, piece);
        rest = after;
    }
    bytes
}

pub(super) fn session(rng: &mut StdRng, port: u16) -> Session {
    let verb = match rng.random_range(0..5) {
        0 => Verb::Exec { tty: true },
        1 => Verb::Exec { tty: false },
        2 => Verb::Attach,
        _ => Verb::PortForward,
    };
    let web_socket = rng.random();
    let protocols: &[&str] = match (verb, web_socket) {
        (Verb::PortForward, false) => &["portforward.k8s.io"],
        (Verb::PortForward, true) => &["SPDY/3.1+portforward.k8s.io", "v2.portforward.k8s.io"],
        (_, false) => &[
            "v4.channel.k8s.io",
            "v3.channel.k8s.io",
            "v2.channel.k8s.io",
            "channel.k8s.io",
        ],
        (_, true) => &["v5.channel.k8s.io", "v4.channel.k8s.io"],
    };
    let protocol = if rng.random_ratio(1, 40) {
        "\u{1}wrong"
    } else {
        protocols.choose(rng).unwrap_or(&"")
    };
    let body = match (verb, web_socket) {
        (_, false) => spdy(rng, port),
        (Verb::PortForward, true) => tunnelled(rng, port),
        (_, true) => messages(rng),
    };
    Session {
        verb,
        web_socket,
        protocol,
        body,
        damage: rng.random_ratio(1, 4).then(|| rng.random()),
    }
}

impl Session {
    /// Everything that the client writes, to the URL's path.
    pub(super) fn bytes(&self, path: &str) -> Vec<u8> {
        let protocol = self.protocol;
        let upgrade = if self.web_socket {
            format!(
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                 Sec-WebSocket-Protocol: {protocol}\r\n"
            )
        } else {
            format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n")
        };
        let head = format!("GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n{upgrade}\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend(&self.body);
        if let Some(seed) = self.damage {
            damage(&mut bytes, &mut StdRng::seed_from_u64(seed));
        }
        bytes
    }
}

/// Changes, drops, doubles and inserts some bytes.
fn damage(bytes: &mut Vec<u8>, rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..5) {
        if bytes.is_empty() {
            return;
        }
        let at = rng.random_range(0..bytes.len());
        let some = rng.random_range(1..=32).min(bytes.len() - at);
        match rng.random_range(0..6) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => drop(bytes.drain(at..at + some)),
            3 => bytes.truncate(at),
            4 => {
                let copy = bytes[at..at + some].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                let edge = odd_number(rng).to_be_bytes();
                let count = edge.len().min(bytes.len() - at);
                bytes[at..at + count].copy_from_slice(&edge[..count]);
            }
        }
    }
}
