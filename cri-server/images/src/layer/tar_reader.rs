//! Reads the tar stream of a layer: ustar, PAX and GNU headers, long names, sparse files, extended attributes.
//!
//! Why not the iterator of crate `tar`: it keeps extension records of any size in memory and follows no bound on
//! their number; here the stream is hostile until its digest is known. Its header type does the field parsing.

use std::io::{self, Read};

use tar::{EntryType, Header};

use crate::error::{Error, Result};

const BLOCK: u64 = 512;
/// Extension records (PAX, GNU long names) beyond this are refused; Go's archive/tar has the same bound.
const MAX_EXTENSION: u64 = 1024 * 1024;
/// Data areas of one sparse file.
const MAX_SPARSE_AREAS: usize = 65_536;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    Char,
    Block,
    Fifo,
}

/// One entry, its extension records applied.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(crate) mtime: (i64, u32),
    /// Size of the file once unpacked.
    pub(crate) size: u64,
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Offset and length of the data areas of a sparse file.
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
}

#[derive(Default)]
struct Extensions {
    records: Vec<(Vec<u8>, Vec<u8>)>,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Extensions {
    fn last(&self, key: &[u8]) -> Option<&[u8]> {
        self.records
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_slice())
    }

    fn number(&self, key: &[u8]) -> Result<Option<u64>> {
        self.last(key).map(|value| decimal(value, key)).transpose()
    }
}

/// The reader; call [`TarReader::next_entry`], then read the entry's data from it.
pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes of the current entry's data not read yet, and the padding behind them.
    data: u64,
    padding: u64,
    headers: u64,
    max_headers: u64,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(input: R, max_headers: u64) -> Self {
        Self {
            input,
            data: 0,
            padding: 0,
            headers: 0,
            max_headers,
        }
    }

    /// Reads what follows the archive's end, so that the digests below see every byte.
    pub(crate) fn drain(&mut self) -> Result<()> {
        io::copy(&mut self.input, &mut io::sink())
            .map(drop)
            .map_err(input_error)
    }

    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            self.skip(self.data.saturating_add(self.padding))?;
            (self.data, self.padding) = (0, 0);
            let mut block = [0u8; BLOCK as usize];
            if !self.read_block(&mut block)? || block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            self.headers += 1;
            if self.headers > self.max_headers {
                return Err(hostile(format!("more than {} entries", self.max_headers)));
            }
            let header = Header::from_byte_slice(&block);
            check_sum(header, &block)?;
            let size = header
                .entry_size()
                .map_err(|_| hostile("an entry's size is not a number"))?;
            match header.entry_type() {
                EntryType::XHeader => extensions.records = parse_pax(&self.extension(size)?)?,
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                EntryType::GNULongName => extensions.long_path = Some(until_nul(self.extension(size)?)),
                EntryType::GNULongLink => extensions.long_link = Some(until_nul(self.extension(size)?)),
                _ => return self.entry(header, size, extensions).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header, size: u64, mut extensions: Extensions) -> Result<Entry> {
        let field = |name: &str| hostile(format!("an entry's {name} is not a number"));
        let stored = extensions.number(b"size")?.unwrap_or(size);
        self.begin_data(stored)?;
        let (long_path, long_link) = (extensions.long_path.take(), extensions.long_link.take());
        let mut path = match (extensions.last(b"path"), long_path) {
            (Some(path), _) => path.to_vec(),
            (None, Some(path)) => path,
            (None, None) => header.path_bytes().into_owned(),
        };
        let link = match (extensions.last(b"linkpath"), long_link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link,
            (None, None) => header
                .link_name_bytes()
                .map(|link| link.into_owned())
                .unwrap_or_default(),
        };
        let kind = match header.entry_type() {
            // Before POSIX a directory was a file whose name ends in a slash.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char => Kind::Char,
            EntryType::Block => Kind::Block,
            EntryType::Directory => Kind::Directory,
            EntryType::Fifo => Kind::Fifo,
            other => {
                return Err(hostile(format!(
                    "entry type {:?} is not known",
                    char::from(other.as_byte())
                )));
            }
        };
        let mut size = stored;
        let sparse = if header.entry_type() == EntryType::GNUSparse {
            let (areas, real) = self.gnu_sparse(header)?;
            size = real;
            Some(areas)
        } else if kind == Kind::File {
            let found = self.pax_sparse(&extensions)?;
            if let Some((_, real, name)) = &found {
                size = *real;
                if let Some(name) = name {
                    path.clone_from(name);
                }
            }
            found.map(|(areas, _, _)| areas)
        } else {
            None
        };
        if let Some(areas) = &sparse {
            check_areas(areas, size, self.data)?;
        }
        let id = |value: u64| u32::try_from(value).map_err(|_| hostile("an owner id exceeds 32 bits"));
        let uid = match extensions.number(b"uid")? {
            Some(uid) => uid,
            None => header.uid().map_err(|_| field("uid"))?,
        };
        let gid = match extensions.number(b"gid")? {
            Some(gid) => gid,
            None => header.gid().map_err(|_| field("gid"))?,
        };
        let mtime = match extensions.last(b"mtime") {
            Some(text) => parse_time(text)?,
            None => (
                i64::try_from(header.mtime().map_err(|_| field("mtime"))?).unwrap_or(0),
                0,
            ),
        };
        let device = if matches!(kind, Kind::Char | Kind::Block) {
            (
                header
                    .device_major()
                    .map_err(|_| field("device number"))?
                    .unwrap_or(0),
                header
                    .device_minor()
                    .map_err(|_| field("device number"))?
                    .unwrap_or(0),
            )
        } else {
            (0, 0)
        };
        let xattrs = extensions
            .records
            .into_iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value)))
            .collect();
        let mode = header.mode().map_err(|_| field("mode"))? & 0o7777;
        Ok(Entry {
            path,
            link,
            kind,
            mode,
            uid: id(uid)?,
            gid: id(gid)?,
            mtime,
            size,
            device,
            xattrs,
            sparse,
        })
    }

    fn begin_data(&mut self, size: u64) -> Result<()> {
        if size > i64::MAX as u64 - BLOCK {
            return Err(hostile("an entry's size exceeds 63 bits"));
        }
        self.data = size;
        self.padding = (BLOCK - size % BLOCK) % BLOCK;
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(hostile(format!(
                "an extension record of {size} bytes (at most {MAX_EXTENSION})"
            )));
        }
        self.begin_data(size)?;
        let mut bytes = vec![0; size as usize];
        self.input.read_exact(&mut bytes).map_err(input_error)?;
        self.data = 0;
        Ok(bytes)
    }

    /// The map of the old GNU format: four areas in the header, then blocks of 21 while the flag says so.
    fn gnu_sparse(&mut self, header: &Header) -> Result<(Vec<(u64, u64)>, u64)> {
        let bad = |_| hostile("a sparse map that is no numbers");
        let header = header
            .as_gnu()
            .ok_or_else(|| hostile("a sparse entry without a GNU header"))?;
        let mut areas = Vec::new();
        let mut push = |block: &tar::GnuSparseHeader| -> Result<()> {
            if !block.is_empty() {
                areas.push((block.offset().map_err(bad)?, block.length().map_err(bad)?));
            }
            if areas.len() > MAX_SPARSE_AREAS {
                return Err(hostile("a sparse map without end"));
            }
            Ok(())
        };
        for block in &header.sparse {
            push(block)?;
        }
        let mut extended = header.is_extended();
        while extended {
            let mut more = tar::GnuExtSparseHeader::new();
            // These blocks lie before the data and are not part of its size.
            self.input.read_exact(more.as_mut_bytes()).map_err(input_error)?;
            for block in &more.sparse {
                push(block)?;
            }
            extended = more.is_extended();
        }
        let real = header.real_size().map_err(bad)?;
        Ok((areas, real))
    }

    /// The maps of the PAX formats 0.0, 0.1 (in the records) and 1.0 (before the data, counted in its size).
    #[allow(clippy::type_complexity)]
    fn pax_sparse(
        &mut self,
        extensions: &Extensions,
    ) -> Result<Option<(Vec<(u64, u64)>, u64, Option<Vec<u8>>)>> {
        let real = match extensions.number(b"GNU.sparse.realsize")? {
            Some(real) => Some(real),
            None => extensions.number(b"GNU.sparse.size")?,
        };
        let name = extensions.last(b"GNU.sparse.name").map(<[u8]>::to_vec);
        let mut numbers: Vec<u64> = Vec::new();
        if extensions.last(b"GNU.sparse.major") == Some(b"1") {
            let count = self.map_line()?;
            if count > MAX_SPARSE_AREAS as u64 {
                return Err(hostile("a sparse map without end"));
            }
            for _ in 0..count * 2 {
                numbers.push(self.map_line()?);
            }
            // The map fills whole blocks; what is left of the data is block-aligned again from its start.
            let misaligned = (self.data + self.padding) % BLOCK;
            let skip = misaligned.min(self.data);
            self.skip(skip)?;
            self.data -= skip;
        } else if let Some(map) = extensions.last(b"GNU.sparse.map") {
            for number in map.split(|byte| *byte == b',').filter(|text| !text.is_empty()) {
                numbers.push(decimal(number, b"GNU.sparse.map")?);
            }
        } else {
            for (key, value) in &extensions.records {
                if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
                    numbers.push(decimal(value, key)?);
                }
            }
            if numbers.is_empty() && real.is_none() {
                return Ok(None);
            }
        }
        if !numbers.len().is_multiple_of(2) {
            return Err(hostile("a sparse map with an offset but no length"));
        }
        let real = real.ok_or_else(|| hostile("a sparse file without its real size"))?;
        let areas = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Ok(Some((areas, real, name)))
    }

    fn map_line(&mut self) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            let mut byte = [0u8];
            if self.data == 0 || digits.len() > 20 {
                return Err(hostile("a sparse map that is no numbers"));
            }
            self.input.read_exact(&mut byte).map_err(input_error)?;
            self.data -= 1;
            match byte[0] {
                b'\n' => return decimal(&digits, b"GNU.sparse.map"),
                digit => digits.push(digit),
            }
        }
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        let skipped = io::copy(&mut self.input.by_ref().take(bytes), &mut io::sink()).map_err(input_error)?;
        if skipped == bytes {
            Ok(())
        } else {
            Err(hostile("the archive ends inside an entry"))
        }
    }

    /// False at a clean end of the stream.
    fn read_block(&mut self, block: &mut [u8; BLOCK as usize]) -> Result<bool> {
        let mut filled = 0;
        while filled < block.len() {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(hostile("the archive ends inside a header")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(input_error(error)),
            }
        }
        Ok(true)
    }
}

/// Reads the current entry's data; ends with it.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.data).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut buffer[..want])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.data -= count as u64;
        Ok(count)
    }
}

pub(crate) fn hostile(what: impl Into<String>) -> Error {
    Error::Hostile(what.into())
}

/// An error of the stream below: our own passes through, a truncated or undecodable stream is bad content.
pub(crate) fn input_error(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => hostile("the archive ends inside an entry"),
        _ => match error.downcast::<Error>() {
            Ok(own) => own,
            Err(error) => hostile(format!("the layer cannot be decompressed: {error}")),
        },
    }
}

fn check_sum(header: &Header, block: &[u8; BLOCK as usize]) -> Result<()> {
    let expected = header
        .cksum()
        .map_err(|_| hostile("a header's checksum is not a number"))?;
    let sum = |from: usize, to: usize| block[from..to].iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let actual = sum(0, 148) + 8 * u32::from(b' ') + sum(156, 512);
    if expected == actual {
        Ok(())
    } else {
        Err(hostile("a header's checksum is wrong"))
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn decimal(text: &[u8], key: &[u8]) -> Result<u64> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| hostile(format!("{} is not a number", String::from_utf8_lossy(key))))
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record (POSIX pax, "pax Extended Header").
fn parse_pax(mut bytes: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let bad = || hostile("a PAX record that does not parse");
    let mut records = Vec::new();
    while !bytes.is_empty() && bytes[0] != 0 {
        let space = bytes
            .iter()
            .take(20)
            .position(|byte| *byte == b' ')
            .ok_or_else(bad)?;
        let length =
            usize::try_from(decimal(&bytes[..space], b"a PAX record's length")?).map_err(|_| bad())?;
        if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &bytes[space + 1..length - 1];
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[length..];
    }
    Ok(records)
}

/// `SECONDS[.FRACTION]`, possibly negative. Times outside 64 bits are taken as the epoch.
fn parse_time(text: &[u8]) -> Result<(i64, u32)> {
    let text = std::str::from_utf8(text).map_err(|_| hostile("a time that is not a number"))?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let bad = |part: &str| part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit());
    if bad(whole.strip_prefix('-').unwrap_or(whole)) || (!fraction.is_empty() && bad(fraction)) {
        return Err(hostile("a time that is not a number"));
    }
    let seconds: i64 = whole.parse().unwrap_or(0);
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanos: u32 = digits.parse().unwrap_or(0);
    // A negative time counts back from its whole second.
    if whole.starts_with('-') && nanos > 0 {
        return Ok((seconds.saturating_sub(1), 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}

/// Areas in order, not overlapping, inside the file, and together exactly the stored data.
fn check_areas(areas: &[(u64, u64)], real: u64, stored: u64) -> Result<()> {
    let bad = || hostile("a sparse map that contradicts itself");
    let (mut end, mut total) = (0u64, 0u64);
    for (offset, length) in areas {
        let stop = offset.checked_add(*length).ok_or_else(bad)?;
        if *offset < end || stop > real {
            return Err(bad());
        }
        end = stop;
        total += length;
    }
    if total == stored { Ok(()) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(path: &str, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_path(path).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        header
    }

    fn refusal(bytes: &[u8]) -> String {
        let mut reader = TarReader::new(bytes, 10);
        loop {
            match reader.next_entry() {
                Ok(Some(_)) => {}
                Ok(None) => return "accepted".into(),
                Err(error) => return error.to_string(),
            }
        }
    }

    #[test]
    fn extension_records_are_bounded() {
        let endless = header("x", EntryType::XHeader, 1 << 40);
        assert!(refusal(endless.as_bytes()).contains("extension record of 1099511627776 bytes"));
        let many: Vec<u8> = (0..20)
            .flat_map(|_| *header("f", EntryType::Regular, 0).as_bytes())
            .collect();
        assert!(refusal(&many).contains("more than 10 entries"));
    }

    #[test]
    fn broken_streams_are_refused() {
        let mut wrong = *header("f", EntryType::Regular, 0).as_bytes();
        wrong[0] ^= 1;
        assert!(refusal(&wrong).contains("checksum"));
        assert!(refusal(&header("f", EntryType::Regular, 5).as_bytes()[..300]).contains("inside a header"));
        assert!(refusal(header("f", EntryType::Regular, 5).as_bytes()).contains("inside an entry"));
        assert!(refusal(header("f", EntryType::new(b'V'), 0).as_bytes()).contains("'V'"));
    }

    #[test]
    fn pax_records_and_times_are_parsed() {
        assert_eq!(
            parse_pax(b"12 path=abc\n").unwrap(),
            [(b"path".to_vec(), b"abc".to_vec())]
        );
        for bad in [&b"11 path=abc\n"[..], b"99 path=abc\n", b"x", b"5 a=b", b"4 ab\n"] {
            assert!(parse_pax(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse_time(b"1.5").unwrap(), (1, 500_000_000));
        assert_eq!(parse_time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert!(parse_time(b"1.x").is_err());
        assert!(parse_time(b"").is_err());
    }

    #[test]
    fn sparse_maps_must_fit_their_data() {
        assert!(check_areas(&[(0, 5), (10, 5)], 20, 10).is_ok());
        assert!(check_areas(&[(0, 5), (4, 5)], 20, 10).is_err());
        assert!(check_areas(&[(0, 5), (18, 5)], 20, 10).is_err());
        assert!(check_areas(&[(0, 5)], 20, 6).is_err());
        assert!(check_areas(&[(u64::MAX, 5)], 20, 5).is_err());
    }
}
