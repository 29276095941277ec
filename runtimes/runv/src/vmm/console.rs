//! The last lines of a stream that nobody reads while all is well: the guest's serial console, and what the
//! VMM writes to its standard error.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes kept. A guest may write for ever.
const KEPT: usize = 32 * 1024;

/// A bounded tail of a stream, shared between its reader and those who look at it.
#[derive(Debug, Clone, Default)]
pub struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
}

impl Tail {
    /// Reads `stream` to its end in the background.
    pub fn follow(stream: impl AsyncRead + Send + Unpin + 'static) -> (Self, tokio::task::JoinHandle<()>) {
        let tail = Self::default();
        let task = tokio::spawn(tail.clone().read(stream));
        (tail, task)
    }

    async fn read(self, mut stream: impl AsyncRead + Unpin) {
        let mut chunk = [0; 1024];
        while let Ok(length @ 1..) = stream.read(&mut chunk).await {
            self.push(&chunk[..length]);
        }
    }

    fn push(&self, chunk: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.extend(chunk);
        let over = bytes.len().saturating_sub(KEPT);
        bytes.drain(..over);
    }

    /// All that is kept, with control characters but line ends made visible.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = bytes.as_slices();
        let joined = [front, back].concat();
        let text = String::from_utf8_lossy(&joined).replace("\r\n", "\n");
        text.chars()
            .map(|c| {
                if c.is_control() && c != '\n' && c != '\t' {
                    '\u{b7}'
                } else {
                    c
                }
            })
            .collect()
    }

    /// The last `count` lines that are not empty, each of at most 200 characters.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let text = self.text();
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty())
            .collect();
        lines[lines.len().saturating_sub(count)..]
            .iter()
            .map(|line| line.chars().take(200).collect())
            .collect()
    }

    /// The last line with `needle` in it, of at most 200 characters.
    #[must_use]
    pub fn line_with(&self, needle: &str) -> Option<String> {
        let text = self.text();
        let line = text.lines().rfind(|line| line.contains(needle))?;
        Some(line.trim_end().chars().take(200).collect())
    }

    /// True when `needle` is in what is kept.
    #[must_use]
    pub fn contains(&self, needle: &str) -> bool {
        self.text().contains(needle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_bounded_and_printable() {
        let tail = Tail::default();
        for number in 0..5000 {
            tail.push(format!("line {number}\r\n").as_bytes());
        }
        tail.push(b"\x1b[2Jlast\r\n\r\n");
        assert!(tail.text().len() <= KEPT + 2);
        assert_eq!(tail.last_lines(2), ["line 4999", "\u{b7}[2Jlast"]);
        assert!(tail.contains("line 4999") && !tail.contains("line 1\n"));
    }

    #[tokio::test]
    async fn a_stream_is_followed_to_its_end() {
        let (tail, task) = Tail::follow(&b"one\ntwo"[..]);
        task.await.unwrap();
        assert_eq!(tail.last_lines(9), ["one", "two"]);
    }
}
