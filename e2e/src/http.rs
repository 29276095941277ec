//! The little HTTP/1.1 that the harness needs to push images to a registry on loopback: one request for
//! each connection, bodies with a length. Not a client for anything else.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// An answer: status, headers with lower-case names, body.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers by lower-case name.
    pub headers: BTreeMap<String, String>,
    /// Body.
    pub body: Vec<u8>,
}

/// Sends one request and reads its answer.
///
/// # Errors
/// No connection, no answer within 20 s, or one that is not HTTP.
pub fn request(
    server: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Answer> {
    let limit = Duration::from_secs(20);
    let mut stream = TcpStream::connect_timeout(&server, limit)
        .with_context(|| format!("no connection to the registry at {server}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {server}\r\nconnection: close\r\n");
    head.push_str(&format!("content-length: {}\r\n", body.len()));
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut bytes = Vec::new();
    stream
        .read_to_end(&mut bytes)
        .with_context(|| format!("no answer to {method} {path}"))?;
    parse(&bytes).with_context(|| format!("{method} {path} at {server}"))
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let end = bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .context("the answer has no end of headers")?;
    let head = std::str::from_utf8(&bytes[..end]).context("the answer's headers are not text")?;
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let Some(status) = first.split(' ').nth(1).and_then(|s| s.parse().ok()) else {
        bail!("{first:?} is no status line");
    };
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Answer {
        status,
        headers,
        body: bytes[end + 4..].to_vec(),
    })
}

/// The path and query of an absolute URL or of a path, as `Location` headers have either.
#[must_use]
pub fn path_of(location: &str) -> &str {
    match location.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => location,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let answer = parse(b"HTTP/1.1 202 Accepted\r\nLocation: /v2/a?x=1\r\n\r\nbody").unwrap();
        assert_eq!((answer.status, answer.body.as_slice()), (202, b"body".as_slice()));
        assert_eq!(answer.headers["location"], "/v2/a?x=1");
        assert!(parse(b"garbage").is_err());
    }

    #[test]
    fn locations_are_reduced_to_their_path() {
        assert_eq!(path_of("http://127.0.0.1:5000/v2/x?a=b"), "/v2/x?a=b");
        assert_eq!(path_of("/v2/x"), "/v2/x");
        assert_eq!(path_of("http://host"), "/");
    }
}
