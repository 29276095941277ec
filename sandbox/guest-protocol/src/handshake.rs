//! Finds the beginning of a connection on a byte stream that may carry the rest of an earlier one: the shim
//! sends `CATAMARAN <nonce>\n` again and again until the agent answers `CATAMARAN-OK <nonce>\n` with the same
//! nonce, which it does once for each nonce; both drop every byte before. HTTP/2 follows at once.

/// Characters of a nonce: lower-case hexadecimal.
pub const NONCE_LEN: usize = 32;

const GREETING: &[u8] = b"CATAMARAN ";
const ANSWER: &[u8] = b"CATAMARAN-OK ";

/// What the shim sends.
#[must_use]
pub fn greeting(nonce: &str) -> Vec<u8> {
    [GREETING, nonce.as_bytes(), b"\n"].concat()
}

/// What the agent answers.
#[must_use]
pub fn answer(nonce: &str) -> Vec<u8> {
    [ANSWER, nonce.as_bytes(), b"\n"].concat()
}

/// Looks for lines of the handshake in bytes as they arrive, with bounded memory.
#[derive(Debug)]
pub struct Finder {
    prefix: &'static [u8],
    buffer: Vec<u8>,
}

impl Finder {
    /// For the agent: finds greetings.
    #[must_use]
    pub fn greetings() -> Self {
        Self {
            prefix: GREETING,
            buffer: Vec::new(),
        }
    }

    /// For the shim: finds answers.
    #[must_use]
    pub fn answers() -> Self {
        Self {
            prefix: ANSWER,
            buffer: Vec::new(),
        }
    }

    /// Adds bytes and returns the nonce of the last complete line among all bytes so far, if there is one.
    /// What follows that line stays in the finder ([`Self::rest`]).
    pub fn feed(&mut self, bytes: &[u8]) -> Option<String> {
        self.buffer.extend_from_slice(bytes);
        let line = self.prefix.len() + NONCE_LEN + 1;
        let mut found = None;
        let mut at = 0;
        while at + line <= self.buffer.len() {
            match nonce_of(&self.buffer[at..at + line], self.prefix) {
                Some(nonce) => {
                    found = Some((nonce, at + line));
                    at += line;
                }
                None => at += 1,
            }
        }
        if let Some((nonce, end)) = found {
            self.buffer.drain(..end);
            return Some(nonce);
        }
        // A line may still be arriving: keep one less than its length.
        let keep = self.buffer.len().min(line - 1);
        self.buffer.drain(..self.buffer.len() - keep);
        None
    }

    /// The bytes after the last line found, taken.
    #[must_use]
    pub fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }
}

/// What the agent finds after a greeting.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A further greeting; the line's bytes are to be dropped ([`GREETING_BYTES`]).
    Greeting(String),
    /// Nothing, or what may become a greeting.
    Incomplete,
    /// Anything else: the beginning of HTTP/2.
    Other,
}

/// Bytes of a greeting.
pub const GREETING_BYTES: usize = GREETING.len() + NONCE_LEN + 1;

/// Tells a repeated greeting from the beginning of HTTP/2.
#[must_use]
pub fn next(bytes: &[u8]) -> Next {
    let compared = bytes.len().min(GREETING.len());
    if bytes[..compared] != GREETING[..compared] {
        return Next::Other;
    }
    match bytes.get(..GREETING_BYTES) {
        None => Next::Incomplete,
        Some(line) => nonce_of(line, GREETING).map_or(Next::Other, Next::Greeting),
    }
}

fn nonce_of(line: &[u8], prefix: &[u8]) -> Option<String> {
    let nonce = line.strip_prefix(prefix)?.strip_suffix(b"\n")?;
    let hex = nonce
        .iter()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b));
    hex.then(|| String::from_utf8_lossy(nonce).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const TWO: &str = "ffffffffffffffffffffffffffffffff";

    #[test]
    fn a_line_is_found_in_garbage_however_it_is_cut() {
        let mut bytes = b"\0\0\x04garbage\nCATAMARAN CATAMARAN 012".to_vec();
        bytes.extend(greeting(ONE));
        for cut in 0..bytes.len() {
            let mut finder = Finder::greetings();
            let found = finder.feed(&bytes[..cut]).or_else(|| finder.feed(&bytes[cut..]));
            assert_eq!(found.as_deref(), Some(ONE), "cut at {cut}");
            assert!(finder.rest().is_empty());
        }
    }

    #[test]
    fn the_last_of_several_lines_wins_and_the_rest_stays() {
        let mut finder = Finder::greetings();
        let mut bytes = greeting(ONE);
        bytes.extend(greeting(TWO));
        bytes.extend(b"PRI * HTTP/2.0");
        assert_eq!(finder.feed(&bytes).as_deref(), Some(TWO));
        assert_eq!(finder.rest(), b"PRI * HTTP/2.0");
    }

    #[test]
    fn memory_stays_bounded_without_a_line() {
        let mut finder = Finder::answers();
        for _ in 0..100 {
            assert_eq!(finder.feed(&[b'C'; 4096]), None);
            assert!(finder.buffer.len() < 64);
        }
    }

    #[test]
    fn a_nonce_that_is_not_lower_case_hexadecimal_is_no_line() {
        let mut finder = Finder::greetings();
        assert_eq!(finder.feed(&greeting(&ONE.replace('a', "G"))), None);
    }

    #[test]
    fn a_repeated_greeting_is_told_from_http() {
        assert_eq!(next(b""), Next::Incomplete);
        assert_eq!(next(b"CATAM"), Next::Incomplete);
        assert_eq!(next(b"PRI * HTTP/2.0\r\n"), Next::Other);
        assert_eq!(next(b"CATAX"), Next::Other);
        let mut bytes = greeting(ONE);
        assert_eq!(bytes.len(), GREETING_BYTES);
        bytes.extend(b"PRI");
        assert_eq!(next(&bytes), Next::Greeting(ONE.into()));
    }
}
