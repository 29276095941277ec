//! Name/value header blocks and their compression, SPDY draft 3, section 2.6.10. One zlib stream lasts as long
//! as a connection in each direction, so a block that cannot be read ends the connection.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::{DICTIONARY, DICTIONARY_ID};
use super::frame::FrameError;

/// Largest block, inflated. The protocols carried here send some hundred bytes.
const BLOCK_MAX: usize = 32 << 10;
/// Most pairs in a block.
const PAIRS_MAX: usize = 64;

/// Headers of a stream, in their order; names in lower case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of a name in lower case; several values of one name are separated by NUL.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    fn decode(block: &[u8]) -> Result<Headers, FrameError> {
        let mut rest = block;
        let pairs = take_u32(&mut rest)? as usize;
        if pairs > PAIRS_MAX {
            return Err(FrameError::TooLarge("number of headers"));
        }
        let mut headers = Headers::default();
        for _ in 0..pairs {
            // Some clients forget the lower case.
            let name = take_text(&mut rest)?.to_ascii_lowercase();
            let value = take_text(&mut rest)?;
            if name.is_empty() || headers.get(&name).is_some() {
                return Err(FrameError::Malformed("empty or repeated header name"));
            }
            headers.0.push((name, value.to_owned()));
        }
        if !rest.is_empty() {
            return Err(FrameError::Malformed("bytes after the last header"));
        }
        Ok(headers)
    }

    fn encode(&self) -> Vec<u8> {
        let mut block = (self.0.len() as u32).to_be_bytes().to_vec();
        for text in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(text.len() as u32).to_be_bytes());
            block.extend_from_slice(text.as_bytes());
        }
        block
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Headers {
    fn from(pairs: [(&str, &str); N]) -> Self {
        Headers(
            pairs
                .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
                .to_vec(),
        )
    }
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, FrameError> {
    let (bytes, after) = rest
        .split_first_chunk::<4>()
        .ok_or(FrameError::Malformed("header block too short"))?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes))
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, FrameError> {
    let length = take_u32(rest)? as usize;
    let (bytes, after) = rest
        .split_at_checked(length)
        .ok_or(FrameError::Malformed("header longer than its block"))?;
    *rest = after;
    std::str::from_utf8(bytes).map_err(|_| FrameError::Malformed("header that is not UTF-8"))
}

/// Reads the header blocks of one direction.
pub(crate) struct Inflater(Decompress);

impl Inflater {
    pub(crate) fn new() -> Inflater {
        Inflater(Decompress::new(true))
    }

    pub(crate) fn headers(&mut self, compressed: &[u8]) -> Result<Headers, FrameError> {
        let start = self.0.total_in();
        let mut block = Vec::with_capacity(1024);
        loop {
            let consumed = (self.0.total_in() - start) as usize;
            let before = block.len();
            if block.len() == block.capacity() {
                if block.len() >= BLOCK_MAX {
                    return Err(FrameError::TooLarge("header block"));
                }
                block.reserve_exact(block.len().min(BLOCK_MAX - block.len()));
            }
            match self
                .0
                .decompress_vec(&compressed[consumed..], &mut block, FlushDecompress::Sync)
            {
                Ok(Status::StreamEnd) => return Err(FrameError::Malformed("end of the compressed headers")),
                Ok(Status::Ok | Status::BufError) => {
                    let all = (self.0.total_in() - start) as usize == compressed.len();
                    if all && block.len() < block.capacity() {
                        return Headers::decode(&block);
                    }
                    let stuck = (self.0.total_in() - start) as usize == consumed && block.len() == before;
                    if stuck && block.len() < block.capacity() {
                        return Err(FrameError::Malformed("compressed headers that end early"));
                    }
                }
                Err(error) if error.needs_dictionary() == Some(DICTIONARY_ID) => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| FrameError::Malformed("zlib dictionary"))?;
                }
                Err(_) => return Err(FrameError::Malformed("headers that zlib cannot read")),
            }
        }
    }
}

/// Writes the header blocks of one direction.
pub(crate) struct Deflater(Compress);

impl Deflater {
    pub(crate) fn new() -> Deflater {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate
            .set_dictionary(&DICTIONARY)
            .expect("a new zlib stream takes a dictionary");
        Deflater(deflate)
    }

    pub(crate) fn block(&mut self, headers: &Headers) -> Vec<u8> {
        let plain = headers.encode();
        let start = self.0.total_in();
        let mut block = Vec::with_capacity(plain.len() + 64);
        loop {
            let consumed = (self.0.total_in() - start) as usize;
            self.0
                .compress_vec(&plain[consumed..], &mut block, FlushCompress::Sync)
                .expect("zlib compresses whatever it is given");
            // Room left over means that the flush is complete.
            if block.len() < block.capacity() && (self.0.total_in() - start) as usize == plain.len() {
                return block;
            }
            block.reserve(block.len().max(64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_connection_s_worth_of_blocks() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        let long = "x".repeat(5000);
        for headers in [
            Headers::default(),
            Headers::from([("streamType", "stdin"), ("port", "80")]),
            Headers::from([("long", long.as_str())]),
            Headers::from([("streamType", "stdout")]),
        ] {
            let block = deflater.block(&headers);
            assert_eq!(inflater.headers(&block).expect("reads"), headers);
        }
    }

    #[test]
    fn bombs_and_nonsense() {
        let bomb = "0".repeat(BLOCK_MAX);
        let block = Deflater::new().block(&Headers::from([("a", bomb.as_str())]));
        assert!(block.len() < 1000);
        assert!(matches!(
            Inflater::new().headers(&block),
            Err(FrameError::TooLarge(_))
        ));
        assert!(Inflater::new().headers(b"").is_err());
        assert!(Inflater::new().headers(&[0; 40]).is_err());
        for (block, what) in [
            (&[0, 0, 1, 0][..], "pairs"),
            (&[0, 0, 0, 1, 0, 0, 0, 0], "short"),
            (&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0, 0], "long name"),
            (&[0, 0, 0, 0, 7], "trailing"),
            (&[0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0, 0, 0, 0], "utf-8"),
        ] {
            assert!(Headers::decode(block).is_err(), "{what}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..4)) {
            let mut inflater = Inflater::new();
            for block in blocks {
                let _ = inflater.headers(&block);
                let _ = Headers::decode(&block);
            }
        }

        /// A valid stream with bytes changed: the interesting neighbourhood.
        #[test]
        fn damaged_blocks(at in 0..60usize, byte in any::<u8>()) {
            let mut deflater = Deflater::new();
            let mut block = deflater.block(&Headers::from([("streamType", "data"), ("port", "8080")]));
            if let Some(target) = block.get_mut(at) {
                *target = byte;
            }
            let mut inflater = Inflater::new();
            let _ = inflater.headers(&block);
            let _ = inflater.headers(&deflater.block(&Headers::default()));
        }
    }
}
