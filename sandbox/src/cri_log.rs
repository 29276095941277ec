//! The CRI log file of one container, written by its shim: `<RFC 3339 time> <stream> <P|F> <text>\n`.
//!
//! - A line without its end yet is kept, up to [`MAX_LINE`] bytes per stream; longer lines, and the rest at the
//!   end of the output, get the tag P.
//! - The file is written directly and never waited for: a full disk must not stop the container. What could not
//!   be written is dropped whole lines at a time, and a line on stderr counts the lost bytes as soon as there is
//!   room again.
//! - Only this shim writes the file; the kubelet renames it and asks for [`CriLog::reopen`].

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of a line at most; longer ones are split (containerd's `max_container_log_line_size`).
pub const MAX_LINE: usize = 16 * 1024;
/// Bytes gathered before they are written, so that short lines do not need much memory.
const BATCH: usize = 32 * 1024;

/// Which output a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    /// stdout, and a terminal's output.
    Stdout,
    /// stderr.
    Stderr,
}

impl LogStream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// An open log file.
#[derive(Debug)]
pub struct CriLog {
    path: PathBuf,
    file: File,
    /// Begun lines of stdout and stderr.
    pending: [Vec<u8>; 2],
    batch: Vec<u8>,
    /// Bytes of output in lines that could not be written.
    lost: u64,
    /// Bytes of output in `batch`.
    batched: u64,
}

impl CriLog {
    /// Opens the file to append, making its directory where that is missing.
    ///
    /// # Errors
    /// Any of the file system's.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = open(path)?;
        let pending = [Vec::new(), Vec::new()];
        Ok(Self {
            path: path.to_owned(),
            file,
            pending,
            batch: Vec::new(),
            lost: 0,
            batched: 0,
        })
    }

    /// Opens the path again, after the file was renamed or removed. Begun lines go to the new file.
    ///
    /// # Errors
    /// Any of the file system's; the old file then stays in use.
    pub fn reopen(&mut self) -> std::io::Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }

    /// Takes output as it comes; every line that it completes is in the file on return (or counted as lost).
    pub fn write(&mut self, stream: LogStream, mut data: &[u8]) {
        let time = Timestamp::now();
        while !data.is_empty() {
            let pending = &mut self.pending[stream as usize];
            let room = MAX_LINE - pending.len();
            let end = data.iter().take(room + 1).position(|byte| *byte == b'\n');
            match end {
                Some(length) => {
                    let line = &data[..length];
                    data = &data[length + 1..];
                    let begun = std::mem::take(pending);
                    self.put(&time, stream, 'F', &begun, line);
                }
                None if data.len() > room => {
                    let line = &data[..room];
                    data = &data[room..];
                    let begun = std::mem::take(pending);
                    self.put(&time, stream, 'P', &begun, line);
                }
                None => {
                    pending.extend_from_slice(data);
                    break;
                }
            }
        }
        self.flush(&time);
    }

    /// The stream has ended: writes a begun line, if any.
    pub fn end(&mut self, stream: LogStream) {
        let begun = std::mem::take(&mut self.pending[stream as usize]);
        if !begun.is_empty() {
            let time = Timestamp::now();
            self.put(&time, stream, 'P', &begun, &[]);
            self.flush(&time);
        }
    }

    fn put(&mut self, time: &Timestamp, stream: LogStream, tag: char, begun: &[u8], line: &[u8]) {
        if self.batch.len() > BATCH {
            self.flush(time);
        }
        // Writing to memory does not fail.
        let _ = write!(self.batch, "{time} {} {tag} ", stream.name());
        self.batch.extend_from_slice(begun);
        self.batch.extend_from_slice(line);
        self.batch.push(b'\n');
        self.batched += (begun.len() + line.len()) as u64;
    }

    fn flush(&mut self, time: &Timestamp) {
        if self.batch.is_empty() {
            return;
        }
        let batched = std::mem::take(&mut self.batched);
        if self.lost > 0 && self.append(notice(time, self.lost).as_bytes()) {
            self.lost = 0;
        }
        let batch = std::mem::take(&mut self.batch);
        if self.lost > 0 || !self.append(&batch) {
            self.lost += batched;
        }
        self.batch = batch;
        self.batch.clear();
        // A burst of short lines, or one long one, shall not stay in a small shim's memory.
        self.batch.shrink_to(4096);
    }

    /// Appends all or nothing. False: nothing was appended.
    fn append(&mut self, bytes: &[u8]) -> bool {
        let mut written = 0;
        while written < bytes.len() {
            match self.file.write(&bytes[written..]) {
                Ok(count) if count > 0 => written += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => {
                    if self.lost == 0 {
                        tracing::warn!(path = %self.path.display(), ?result, "log file not writable");
                    }
                    self.take_back(written);
                    return false;
                }
            }
        }
        true
    }

    /// Removes the torn end of a batch that did not fit.
    fn take_back(&self, written: usize) {
        let cut = self
            .file
            .metadata()
            .and_then(|meta| match meta.len().checked_sub(written as u64) {
                Some(length) if written > 0 => self.file.set_len(length),
                _ => Ok(()),
            });
        if let Err(error) = cut {
            tracing::warn!(path = %self.path.display(), %error, "log file keeps a torn line");
        }
    }
}

/// The line that stands where output was lost.
fn notice(time: &Timestamp, lost: u64) -> String {
    format!("{time} stderr F [catamaran: {lost} bytes of output lost, the log file could not be written]\n")
}

fn open(path: &Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.create(true).append(true).mode(0o640);
    match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if let Some(directory) = path.parent() {
                std::fs::create_dir_all(directory)?;
            }
            options.open(path)
        }
        result => result,
    }
}

/// A moment, shown as RFC 3339 in UTC with nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Timestamp {
    seconds: u64,
    nanoseconds: u32,
}

impl Timestamp {
    /// The present moment.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: since.as_secs(),
            nanoseconds: since.subsec_nanos(),
        }
    }
}

impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (days, second) = (self.seconds / 86_400, self.seconds % 86_400);
        // Days since 0000-03-01 in eras of 400 years (proleptic Gregorian).
        let day = days + 719_468;
        let (era, day) = (day / 146_097, day % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let shifted = (5 * day + 2) / 153;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z",
            era * 400 + year + u64::from(month <= 2),
            month,
            day - (153 * shifted + 2) / 5 + 1,
            second / 3600,
            second / 60 % 60,
            second % 60,
            self.nanoseconds
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// (stream, tag, text) of every line, with the time checked for its shape.
    fn lines(path: &Path) -> Vec<(String, String, Vec<u8>)> {
        let bytes = std::fs::read(path).unwrap();
        assert!(bytes.is_empty() || bytes.ends_with(b"\n"));
        let mut rows: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
        rows.pop();
        rows.into_iter()
            .map(|row| {
                let mut parts = row.splitn(4, |byte| *byte == b' ');
                let mut word = || String::from_utf8(parts.next().unwrap().to_vec()).unwrap();
                let (time, stream, tag) = (word(), word(), word());
                assert_eq!((time.len(), &time[10..11], &time[29..]), (30, "T", "Z"));
                (stream, tag, parts.next().unwrap().to_vec())
            })
            .collect()
    }

    #[test]
    fn times_are_rfc_3339() {
        let show = |seconds| {
            Timestamp {
                seconds,
                nanoseconds: 7,
            }
            .to_string()
        };
        assert_eq!(show(0), "1970-01-01T00:00:00.000000007Z");
        assert_eq!(show(951_782_400), "2000-02-29T00:00:00.000000007Z");
        assert_eq!(show(1_735_689_599), "2024-12-31T23:59:59.000000007Z");
        assert_eq!(show(4_107_542_400), "2100-03-01T00:00:00.000000007Z");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_byte_is_logged_once_and_in_order(
            text in proptest::collection::vec(
                prop_oneof![8 => any::<u8>(), 1 => Just(b'\n')], 0..70_000),
            step in 1usize..40_000,
            reopen_every in 1usize..5,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("0.log");
            let mut log = CriLog::open(&path).unwrap();
            for (index, part) in text.chunks(step).enumerate() {
                log.write(LogStream::Stdout, part);
                log.write(LogStream::Stderr, b"other\n");
                if index % reopen_every == 0 {
                    log.reopen().unwrap();
                }
            }
            log.end(LogStream::Stdout);
            let mut seen = Vec::new();
            for (stream, tag, line) in lines(&path) {
                prop_assert!(line.len() <= MAX_LINE);
                if stream == "stderr" {
                    prop_assert_eq!((tag.as_str(), &line[..]), ("F", &b"other"[..]));
                    continue;
                }
                seen.extend_from_slice(&line);
                if tag == "F" { seen.push(b'\n'); }
            }
            prop_assert_eq!(seen, text);
        }
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made/0.log");
        let mut log = CriLog::open(&path).unwrap();
        log.write(
            LogStream::Stdout,
            &[b"x".repeat(MAX_LINE), b"\n".to_vec()].concat(),
        );
        log.write(
            LogStream::Stdout,
            &[b"y".repeat(MAX_LINE + 1), b"\n".to_vec()].concat(),
        );
        let tags: Vec<(String, usize)> = lines(&path)
            .into_iter()
            .map(|(_, tag, l)| (tag, l.len()))
            .collect();
        assert_eq!(
            tags,
            [("F".into(), MAX_LINE), ("P".into(), MAX_LINE), ("F".into(), 1)]
        );
    }

    #[test]
    fn lines_before_reopen_stay_in_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
        let mut log = CriLog::open(&path).unwrap();
        log.write(LogStream::Stdout, b"one\ntw");
        std::fs::rename(&path, &old).unwrap();
        log.write(LogStream::Stdout, b"o\nthr");
        log.reopen().unwrap();
        log.write(LogStream::Stdout, b"ee\n");
        let text = |path: &Path| lines(path).into_iter().map(|(_, _, l)| l).collect::<Vec<_>>();
        assert_eq!(text(&old), [b"one".to_vec(), b"two".to_vec()]);
        assert_eq!(text(&path), [b"three".to_vec()]);
    }

    struct Unmount(PathBuf);

    impl Drop for Unmount {
        fn drop(&mut self) {
            nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }

    /// A full disk, for real: a tmpfs of a few pages (root only, as the shims are).
    #[test]
    fn a_full_disk_loses_whole_lines_and_says_how_many_bytes() {
        let directory = tempfile::tempdir().unwrap();
        nix::mount::mount(
            Some("none"),
            directory.path(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=16k"),
        )
        .expect("this test needs root, to mount a tmpfs");
        let _unmount = Unmount(directory.path().to_owned());
        let path = directory.path().join("0.log");
        let mut log = CriLog::open(&path).unwrap();
        let line = [vec![b'z'; 1000], b"\n".to_vec()].concat();
        for _ in 0..20 {
            log.write(LogStream::Stdout, &line);
        }
        let fitted = lines(&path).len();
        log.file.set_len(0).unwrap();
        log.write(LogStream::Stdout, b"after\n");
        let after = lines(&path);
        assert!((10..20).contains(&fitted), "{fitted} lines fitted");
        assert_eq!(after.len(), 2);
        let said = String::from_utf8(after[0].2.clone()).unwrap();
        assert!(
            said.contains(&format!("{} bytes of output lost", (20 - fitted) * 1000)),
            "{said}"
        );
        assert_eq!(after[1].2, b"after");
    }
}
