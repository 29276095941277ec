//! The only place that knows how a layer lies on disk: a directory usable as an overlayfs lower directory.
//! Images of a layer (EROFS) will replace it behind these functions.

mod merged;
#[cfg(test)]
mod properties;
mod rooted;
mod tar_reader;
#[cfg(test)]
mod tests;
mod unpack;

use std::collections::HashSet;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Gid, Mode, OFlags, Uid};

pub(crate) use merged::Merged;
use tar_reader::input_error;
pub(crate) use unpack::{Limits, Unpacked};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};

/// What a blob must be.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Digest and size of the blob as it is transferred.
    pub(crate) blob: Digest,
    pub(crate) size: u64,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
}

/// Unpacks a blob into the new directory `target` while it arrives, and verifies all of it. On an error the
/// caller removes `target`.
pub(crate) fn unpack_blob(
    blob: impl Read,
    expected: &Expected,
    target: &Path,
    limits: Limits,
) -> Result<Unpacked> {
    let root = make_root(target)?;
    let mut transferred = Hashed::new(blob, &expected.blob, expected.size, "the layer's blob");
    let (unpacked, diff_id) = {
        let plain = decompressor(BufReader::with_capacity(64 * 1024, &mut transferred))?;
        let mut plain = Hashed::new(plain, &expected.diff_id, limits.bytes, "the uncompressed layer");
        let unpacked = unpack::unpack(BufReader::with_capacity(64 * 1024, &mut plain), root, limits);
        (unpacked, plain.hasher.finish())
    };
    // Bad content is first of all a wrong transfer where the digest differs; our own errors stand as they are.
    if !matches!(unpacked, Ok(_) | Err(Error::Hostile(_))) {
        return unpacked;
    }
    io::copy(&mut transferred, &mut io::sink()).map_err(input_error)?;
    transferred.verify(expected)?;
    let unpacked = unpacked?;
    if diff_id != expected.diff_id {
        return Err(Error::DigestMismatch {
            what: "uncompressed layer".into(),
            expected: expected.diff_id.to_string(),
            actual: diff_id.to_string(),
        });
    }
    Ok(unpacked)
}

fn make_root(target: &Path) -> Result<std::os::fd::OwnedFd> {
    let failed = |errno| Error::io(format!("make layer directory {}", target.display()), errno);
    rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)).map_err(failed)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(target, flags, Mode::empty()).map_err(failed)?;
    rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755)).map_err(failed)?;
    Ok(root)
}

/// Reader that hashes and refuses more than `limit` bytes.
struct Hashed<R> {
    input: R,
    hasher: Hasher,
    count: u64,
    limit: u64,
    what: &'static str,
}

impl<R: Read> Hashed<R> {
    fn new(input: R, like: &Digest, limit: u64, what: &'static str) -> Self {
        Self {
            input,
            hasher: Hasher::like(like),
            count: 0,
            limit,
            what,
        }
    }

    fn verify(self, expected: &Expected) -> Result<()> {
        let actual = self.hasher.finish();
        if actual == expected.blob && self.count == expected.size {
            return Ok(());
        }
        Err(Error::DigestMismatch {
            what: "layer".into(),
            expected: format!("{} of {} bytes", expected.blob, expected.size),
            actual: format!("{actual} of {} bytes", self.count),
        })
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.count += count as u64;
        if self.count > self.limit {
            let message = format!("{} is larger than {} bytes", self.what, self.limit);
            return Err(io::Error::other(Error::Hostile(message)));
        }
        Ok(count)
    }
}

/// The compression is told by the first bytes, as containerd does: media types are often wrong about it.
fn decompressor<'a>(mut blob: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    let start = blob.fill_buf().map_err(input_error)?;
    Ok(if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(blob))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable_zstd_frame(start) {
        let decoder = zstd::stream::read::Decoder::with_buffer(blob)
            .map_err(|error| Error::io("set up zstd", error))?;
        Box::new(decoder)
    } else {
        Box::new(blob)
    })
}

/// zstd:chunked blobs may begin with one.
fn is_skippable_zstd_frame(start: &[u8]) -> bool {
    start.len() >= 4 && (0x50..=0x5f).contains(&start[0]) && start[1..4] == [0x2a, 0x4d, 0x18]
}

/// Gives directories that the layer did not describe the owner, mode and time they have in the layers below.
pub(crate) fn inherit(layer: &Path, implied: &[Vec<u8>], below: &Merged) -> Result<()> {
    let failed = |errno| {
        Error::io(
            format!("inherit directory attributes in {}", layer.display()),
            errno,
        )
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(layer, flags, Mode::empty()).map_err(failed)?;
    let tree = rooted::Rooted::new(root);
    // The deepest first: nothing below changes a time any more.
    for path in implied.iter().rev() {
        let Some(original) = below.directory(path).map_err(failed)? else {
            continue;
        };
        let stat = rustix::fs::fstat(&*original).map_err(failed)?;
        let copy = tree.open_readable(path)?;
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::fchown(&copy, Some(uid), Some(gid)).map_err(failed)?;
        rustix::fs::fchmod(&copy, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed)?;
        let time = rustix::fs::Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec as _,
        };
        let times = rustix::fs::Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::futimens(&copy, &times).map_err(failed)?;
    }
    Ok(())
}

/// Bytes and inodes on disk below a directory, itself included; hard links count once. What vanishes meanwhile
/// (a running container's writable layer) is left out.
pub(crate) fn disk_usage(directory: &Path) -> Result<(u64, u64)> {
    let failed = |error| Error::io(format!("measure {}", directory.display()), error);
    let absent = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let root = std::fs::symlink_metadata(directory).map_err(failed)?;
    let (mut bytes, mut inodes) = (root.blocks() * 512, 1);
    let mut seen = HashSet::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(path) = left.pop() {
        let entries = match std::fs::read_dir(&path) {
            Err(error) if absent(&error) => continue,
            other => other.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let data = match entry.metadata() {
                Err(error) if absent(&error) => continue,
                other => other.map_err(failed)?,
            };
            if data.is_dir() {
                left.push(entry.path());
            } else if data.nlink() > 1 && !seen.insert((data.dev(), data.ino())) {
                continue;
            }
            bytes += data.blocks() * 512;
            inodes += 1;
        }
    }
    Ok((bytes, inodes))
}

/// Makes everything written so far to the file system of `directory` durable.
pub(crate) fn sync_file_system(directory: &Path) -> Result<()> {
    let failed = |errno| Error::io(format!("sync {}", directory.display()), errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty()).map_err(failed)?;
    rustix::fs::syncfs(fd.as_fd()).map_err(failed)
}
