//! Unpacks the tar stream of one layer into a directory that serves as a lower directory of overlayfs:
//! OCI whiteouts become character devices 0:0, opaque markers become `trusted.overlay.opaque`
//! (OCI image-spec, layer.md; kernel, filesystems/overlayfs).

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::rooted::{Parent, Rooted, components, failed, is_whiteout, join, set_opaque};
use super::tar_reader::{Entry, Kind, TarReader, hostile, input_error};
use crate::error::{Error, Result};

/// Bounds of one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Headers in the archive, extension records included.
    pub(crate) entries: u64,
    /// Bytes of the uncompressed archive, and of each file's size.
    pub(crate) bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 8_000_000,
            bytes: 256 << 30,
        }
    }
}

/// What the archive left open.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Directories no entry described (the layer's root is the empty path): their owner and mode are those of the
    /// layers below, where these have them.
    pub(crate) implied: Vec<Vec<u8>>,
    /// The root itself is opaque: lower layers do not count. Overlayfs ignores the mark on a root.
    pub(crate) opaque_root: bool,
    /// The archive held nothing.
    pub(crate) empty: bool,
}

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// Prefix of aufs's own bookkeeping, which no layer means.
const AUFS: &[u8] = b".wh..wh.";

struct Unpacker {
    tree: Rooted,
    limits: Limits,
    opaque_root: bool,
    /// Modification times of directories, set last because each entry made in one changes it.
    times: BTreeMap<Vec<u8>, (i64, u32)>,
    buffer: Vec<u8>,
}

/// Unpacks `input` (uncompressed tar) into the empty directory `root` and reads it to its end.
pub(crate) fn unpack(input: impl Read, root: OwnedFd, limits: Limits) -> Result<Unpacked> {
    let mut reader = TarReader::new(input, limits.entries);
    let mut tree = Rooted::new(root);
    tree.implied.insert(Vec::new());
    let mut unpacker = Unpacker {
        tree,
        limits,
        opaque_root: false,
        times: BTreeMap::new(),
        buffer: vec![0; 128 * 1024],
    };
    let mut empty = true;
    while let Some(entry) = reader.next_entry()? {
        empty = false;
        unpacker.entry(&entry, &mut reader)?;
    }
    reader.drain()?;
    unpacker.finish_times()?;
    let implied = unpacker.tree.implied.into_iter().collect();
    Ok(Unpacked {
        implied,
        opaque_root: unpacker.opaque_root,
        empty,
    })
}

impl Unpacker {
    fn entry<R: Read>(&mut self, entry: &Entry, data: &mut TarReader<R>) -> Result<()> {
        let parts = components(&entry.path)?;
        let Some((name, above)) = parts.split_last() else {
            return match entry.kind {
                Kind::Directory => self.root(entry),
                _ => Err(hostile("the layer's root is not a directory")),
            };
        };
        if *name == OPAQUE_MARKER {
            return self.opaque(above);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let parent = self.tree.directory(above)?;
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(hostile(format!(
                    "whiteout of {:?}",
                    String::from_utf8_lossy(&entry.path)
                )));
            }
            return self.whiteout(&parent, hidden);
        }
        match entry.kind {
            Kind::Directory => self.directory(&parent, name, entry),
            Kind::HardLink => self.hard_link(&parent, name, entry),
            Kind::File => {
                self.make_room(&parent, name)?;
                self.file(&parent, name, entry, data)
            }
            Kind::Symlink => self.symlink(&parent, name, entry),
            Kind::Char | Kind::Block | Kind::Fifo => self.node(&parent, name, entry),
        }
    }

    fn root(&mut self, entry: &Entry) -> Result<()> {
        let root = self.tree.open_readable(b"")?;
        set_attributes(&root, b"/", entry)?;
        self.tree.implied.remove(b"".as_slice());
        self.times.insert(Vec::new(), entry.mtime);
        Ok(())
    }

    fn opaque(&mut self, above: &[&[u8]]) -> Result<()> {
        let directory = self.tree.directory(above)?;
        if directory.path.is_empty() {
            self.opaque_root = true;
            return Ok(());
        }
        set_opaque(self.tree.open_readable(&directory.path)?, &directory.path)
    }

    /// Hides `name` of the layers below. What this layer itself has by that name stays (OCI layer.md).
    fn whiteout(&mut self, parent: &Parent, name: &[u8]) -> Result<()> {
        let path = join(&parent.path, name);
        match self.stat(parent, name)? {
            None => rustix::fs::mknodat(
                &parent.fd,
                OsStr::from_bytes(name),
                FileType::CharacterDevice,
                Mode::empty(),
                rustix::fs::makedev(0, 0),
            )
            .map_err(|errno| failed("make whiteout", &path, errno)),
            Some(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                set_opaque(self.tree.open_readable(&path)?, &path)
            }
            Some(_) => Ok(()),
        }
    }

    fn directory(&mut self, parent: &Parent, name: &[u8], entry: &Entry) -> Result<()> {
        let path = join(&parent.path, name);
        let existing = self.stat(parent, name)?;
        let mut hides_lower = false;
        let is_directory =
            |stat: &rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !existing.as_ref().is_some_and(is_directory) {
            if let Some(stat) = existing {
                hides_lower = is_whiteout(&stat);
                self.tree.remove(parent, name, false)?;
            }
            rustix::fs::mkdirat(&parent.fd, OsStr::from_bytes(name), Mode::from_raw_mode(0o700))
                .map_err(|errno| failed("make directory", &path, errno))?;
        }
        let directory = self.tree.open_readable(&path)?;
        if hides_lower {
            set_opaque(&directory, &path)?;
        }
        set_attributes(&directory, &path, entry)?;
        self.tree.implied.remove(&path);
        self.times.insert(path, entry.mtime);
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        parent: &Parent,
        name: &[u8],
        entry: &Entry,
        data: &mut TarReader<R>,
    ) -> Result<()> {
        let path = join(&parent.path, name);
        if entry.size > self.limits.bytes {
            return Err(hostile(format!(
                "a file of {} bytes (at most {})",
                entry.size, self.limits.bytes
            )));
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(
            &parent.fd,
            OsStr::from_bytes(name),
            flags,
            Mode::from_raw_mode(0o600),
        )
        .map_err(|errno| failed("create", &path, errno))?;
        let mut file = File::from(fd);
        match &entry.sparse {
            None => self.copy(data, &mut file, u64::MAX, &path)?,
            Some(areas) => {
                for (offset, length) in areas {
                    file.seek(SeekFrom::Start(*offset))
                        .map_err(|e| write_error(&path, e))?;
                    self.copy(data, &mut file, *length, &path)?;
                }
                file.set_len(entry.size).map_err(|e| write_error(&path, e))?;
            }
        }
        set_attributes(&file, &path, entry)?;
        rustix::fs::futimens(&file, &timestamps(entry.mtime)).map_err(|e| failed("set time of", &path, e))
    }

    fn copy<R: Read>(
        &mut self,
        data: &mut TarReader<R>,
        file: &mut File,
        length: u64,
        path: &[u8],
    ) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let want = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match data.read(&mut self.buffer[..want]) {
                Ok(0) => break,
                Ok(count) => {
                    file.write_all(&self.buffer[..count])
                        .map_err(|e| write_error(path, e))?;
                    left -= count as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(input_error(error)),
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, parent: &Parent, name: &[u8], entry: &Entry) -> Result<()> {
        let path = join(&parent.path, name);
        let shown = || String::from_utf8_lossy(&entry.link).into_owned();
        let target = components(&entry.link)?;
        let Some((target_name, above)) = target.split_last() else {
            return Err(hostile("a hard link to the layer's root"));
        };
        let source = self.tree.existing_directory(above)?;
        let missing = || {
            hostile(format!(
                "a hard link to {:?}, which the layer does not have",
                shown()
            ))
        };
        let stat = self.stat(&source, target_name)?.ok_or_else(missing)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory || is_whiteout(&stat) {
            return Err(hostile(format!("a hard link to {:?}, which is no file", shown())));
        }
        if join(&source.path, target_name) == path {
            return Err(hostile(format!("a hard link of {:?} to itself", shown())));
        }
        self.make_room(parent, name)?;
        let from = OsStr::from_bytes(target_name);
        // Making room may have removed a directory on the way to the target.
        match rustix::fs::linkat(
            &source.fd,
            from,
            &parent.fd,
            OsStr::from_bytes(name),
            AtFlags::empty(),
        ) {
            Err(Errno::NOENT) => Err(missing()),
            other => other.map_err(|errno| failed("make hard link", &path, errno)),
        }
    }

    fn symlink(&mut self, parent: &Parent, name: &[u8], entry: &Entry) -> Result<()> {
        let path = join(&parent.path, name);
        let target = CString::new(entry.link.clone())
            .ok()
            .filter(|text| (1..4096).contains(&text.as_bytes().len()));
        let Some(target) = target else {
            return Err(hostile(
                "a symbolic link's target is empty, too long or holds a zero byte",
            ));
        };
        self.make_room(parent, name)?;
        let os_name = OsStr::from_bytes(name);
        rustix::fs::symlinkat(&target, &parent.fd, os_name)
            .map_err(|e| failed("make symbolic link", &path, e))?;
        self.named_attributes(parent, name, entry, &path)
    }

    fn node(&mut self, parent: &Parent, name: &[u8], entry: &Entry) -> Result<()> {
        let path = join(&parent.path, name);
        self.make_room(parent, name)?;
        let kind = match entry.kind {
            Kind::Char => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let device = rustix::fs::makedev(entry.device.0, entry.device.1);
        rustix::fs::mknodat(
            &parent.fd,
            OsStr::from_bytes(name),
            kind,
            Mode::from_raw_mode(0o600),
            device,
        )
        .map_err(|errno| failed("make device or fifo", &path, errno))?;
        self.named_attributes(parent, name, entry, &path)
    }

    /// Attributes of what cannot be opened without side effects; the name is fresh and nobody else writes here.
    fn named_attributes(&self, parent: &Parent, name: &[u8], entry: &Entry, path: &[u8]) -> Result<()> {
        let os_name = OsStr::from_bytes(name);
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(
            &parent.fd,
            os_name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| failed("set owner of", path, errno))?;
        if entry.kind != Kind::Symlink {
            rustix::fs::chmodat(
                &parent.fd,
                os_name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )
            .map_err(|errno| failed("set mode of", path, errno))?;
        }
        let by_fd = [
            format!("/proc/self/fd/{}/", parent.fd.as_raw_fd()).as_bytes(),
            name,
        ]
        .concat();
        for (key, value) in entry.xattrs.iter().filter(|(key, _)| may_set(key)) {
            let file = OsStr::from_bytes(&by_fd);
            let set = rustix::fs::lsetxattr(file, OsStr::from_bytes(key), value, XattrFlags::empty());
            tolerate_user_xattr(key, path, set)?;
        }
        rustix::fs::utimensat(
            &parent.fd,
            os_name,
            &timestamps(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| failed("set time of", path, errno))
    }

    /// The last entry of a name wins: removes what an earlier one made.
    fn make_room(&mut self, parent: &Parent, name: &[u8]) -> Result<()> {
        match self.stat(parent, name)? {
            None => Ok(()),
            Some(stat) => {
                let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                self.tree.remove(parent, name, directory)
            }
        }
    }

    fn stat(&self, parent: &Parent, name: &[u8]) -> Result<Option<rustix::fs::Stat>> {
        match rustix::fs::statat(&parent.fd, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(failed("look up", &join(&parent.path, name), errno)),
        }
    }

    fn finish_times(&mut self) -> Result<()> {
        for (path, mtime) in &self.times {
            match self.tree.open_real(path) {
                // A later entry replaced the directory.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => return Err(failed("open directory", path, errno)),
                Ok(_) => {}
            }
            let directory = self.tree.open_readable(path)?;
            rustix::fs::futimens(&directory, &timestamps(*mtime))
                .map_err(|e| failed("set time of", path, e))?;
        }
        Ok(())
    }
}

/// Owner, then mode (a change of owner clears setuid), then extended attributes (it clears capabilities too).
fn set_attributes(fd: impl AsFd, path: &[u8], entry: &Entry) -> Result<()> {
    rustix::fs::fchown(
        &fd,
        Some(Uid::from_raw(entry.uid)),
        Some(Gid::from_raw(entry.gid)),
    )
    .map_err(|errno| failed("set owner of", path, errno))?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(entry.mode)).map_err(|e| failed("set mode of", path, e))?;
    for (key, value) in entry.xattrs.iter().filter(|(key, _)| may_set(key)) {
        let set = rustix::fs::fsetxattr(&fd, OsStr::from_bytes(key), value, XattrFlags::empty());
        tolerate_user_xattr(key, path, set)?;
    }
    Ok(())
}

/// Names of users are decoration that not every file system and kind of file takes; a capability that is lost
/// would break the program that has it.
fn tolerate_user_xattr(key: &[u8], path: &[u8], result: rustix::io::Result<()>) -> Result<()> {
    match result {
        Err(errno @ (Errno::NOTSUP | Errno::PERM)) if key.starts_with(b"user.") => {
            let (key, path) = (String::from_utf8_lossy(key), String::from_utf8_lossy(path));
            tracing::warn!(%key, %path, %errno, "extended attribute of an image's file cannot be stored");
            Ok(())
        }
        other => other.map_err(|errno| failed("set extended attribute of", path, errno)),
    }
}

/// What an image may set: file capabilities, access lists and the users' own names. Overlayfs's names would steer
/// the merge; labels of security modules are the host's to give.
fn may_set(key: &[u8]) -> bool {
    let allowed: [&[u8]; 3] = [
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    let user = key.starts_with(b"user.") && !key.starts_with(b"user.overlay.");
    (user || allowed.contains(&key)) && !key.contains(&0)
}

fn timestamps((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(nanos),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn write_error(path: &[u8], error: std::io::Error) -> Error {
    Error::io(
        format!("write {:?} of a layer", String::from_utf8_lossy(path)),
        error,
    )
}
