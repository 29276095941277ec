//! Paths of a layer, resolved against the layer's directory and never outside it.
//!
//! Two ways to the same answer: one `openat2` that allows no symbolic link at all (nearly every entry), and a walk
//! component by component that expands links itself, creates missing directories, and refuses a link that climbs
//! above the root. Nothing else writes below the directory, so what was checked stays true.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::tar_reader::hostile;
use crate::error::{Error, Result};

/// Deepest directory; also bounds the recursion of everything that later walks a layer.
pub(crate) const MAX_DEPTH: usize = 255;
/// Longest path, as the kernel has it.
const MAX_PATH: usize = 4095;
const MAX_NAME: usize = 255;
/// Symbolic links followed in one path, as the kernel has it.
const MAX_LINKS: usize = 40;

/// Marks a directory that hides what lower layers have below it.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";

const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOFOLLOW);

/// A layer's directory.
pub(crate) struct Rooted {
    root: OwnedFd,
    /// The last parent looked up: entries of one directory follow one another.
    cached: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Directories that had to be made before any entry described them; the layer below may know their owner
    /// and mode.
    pub(crate) implied: BTreeSet<Vec<u8>>,
}

/// A directory and the real path (no links) by which it was reached.
pub(crate) struct Parent {
    pub(crate) fd: Rc<OwnedFd>,
    pub(crate) path: Vec<u8>,
}

/// Splits a name from the archive into clean components. Absolute names count from the layer's root.
pub(crate) fn components(name: &[u8]) -> Result<Vec<&[u8]>> {
    let shown = || String::from_utf8_lossy(&name[..name.len().min(200)]).into_owned();
    if name.len() > MAX_PATH || name.contains(&0) {
        return Err(hostile(format!(
            "path {:?} is longer than {MAX_PATH} bytes or holds a zero byte",
            shown()
        )));
    }
    let mut parts = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(hostile(format!("path {:?} holds \"..\"", shown()))),
            part if part.len() > MAX_NAME => {
                return Err(hostile(format!(
                    "path {:?} has a name longer than {MAX_NAME} bytes",
                    shown()
                )));
            }
            part => parts.push(part),
        }
    }
    if parts.len() > MAX_DEPTH {
        return Err(hostile(format!(
            "path {:?} is deeper than {MAX_DEPTH} directories",
            shown()
        )));
    }
    Ok(parts)
}

pub(crate) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() {
        name.to_vec()
    } else {
        [parent, b"/", name].concat()
    }
}

/// An errno with the path it is about.
pub(crate) fn failed(what: &str, path: &[u8], errno: Errno) -> Error {
    Error::io(
        format!("{what} {:?} of a layer", String::from_utf8_lossy(path)),
        errno,
    )
}

/// A character device 0:0, overlayfs's mark of a removed name.
pub(crate) fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

impl Rooted {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self {
            root,
            cached: None,
            implied: BTreeSet::new(),
        }
    }

    /// The directory of `parts`, made where it is missing.
    pub(crate) fn directory(&mut self, parts: &[&[u8]]) -> Result<Parent> {
        let path = parts.join(&b'/');
        if let Some((cached, fd)) = &self.cached
            && *cached == path
        {
            return Ok(Parent { fd: fd.clone(), path });
        }
        let parent = match self.open_real(&path) {
            Ok(fd) => Parent {
                fd: Rc::new(fd),
                path: path.clone(),
            },
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => self.walk(parts, true)?,
            Err(errno) => return Err(failed("open directory", &path, errno)),
        };
        // A path through links is not cached: its text is not its real path.
        if parent.path == path {
            self.cached = Some((path, parent.fd.clone()));
        }
        Ok(parent)
    }

    /// The directory of a hard link's target, which must exist.
    pub(crate) fn existing_directory(&mut self, parts: &[&[u8]]) -> Result<Parent> {
        let path = parts.join(&b'/');
        match self.open_real(&path) {
            Ok(fd) => Ok(Parent {
                fd: Rc::new(fd),
                path,
            }),
            Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => self.walk(parts, false),
            Err(errno) => Err(failed("open directory", &path, errno)),
        }
    }

    /// Opens a directory by its real path.
    pub(crate) fn open_real(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        let flags = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(
                &self.root,
                OsStr::from_bytes(path),
                DIRECTORY,
                Mode::empty(),
                flags,
            ) {
                // The kernel asks for another try when a rename elsewhere raced with the walk.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    fn walk(&mut self, parts: &[&[u8]], create: bool) -> Result<Parent> {
        let asked = parts.join(&b'/');
        let mut left: VecDeque<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let mut real: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if real.pop().is_none() {
                        let shown = String::from_utf8_lossy(&asked).into_owned();
                        return Err(hostile(format!(
                            "path {shown:?} leaves the layer through a symbolic link"
                        )));
                    }
                    continue;
                }
                _ => {}
            }
            let here = real.join(&b'/');
            let path = join(&here, &name);
            if path.len() > MAX_PATH || real.len() >= MAX_DEPTH {
                return Err(hostile("a path through symbolic links is too deep"));
            }
            let directory = self
                .open_real(&here)
                .map_err(|errno| failed("open directory", &here, errno))?;
            match rustix::fs::statat(&directory, OsStr::from_bytes(&name), AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) if create => self.make_implied(&directory, &name, &path, false)?,
                Err(Errno::NOENT) => {
                    let shown = String::from_utf8_lossy(&path).into_owned();
                    return Err(hostile(format!(
                        "a hard link to {shown:?}, which the layer does not have"
                    )));
                }
                Err(errno) => return Err(failed("look up", &path, errno)),
                Ok(stat) if is_whiteout(&stat) && create => {
                    self.make_implied(&directory, &name, &path, true)?
                }
                Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => {}
                    FileType::Symlink => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(hostile(format!(
                                "more than {MAX_LINKS} symbolic links in one path"
                            )));
                        }
                        let target = rustix::fs::readlinkat(&directory, OsStr::from_bytes(&name), Vec::new())
                            .map_err(|errno| failed("read link", &path, errno))?
                            .into_bytes();
                        if target.starts_with(b"/") {
                            real.clear();
                        }
                        for part in target.split(|byte| *byte == b'/').rev() {
                            left.push_front(part.to_vec());
                        }
                        continue;
                    }
                    _ => {
                        let shown = String::from_utf8_lossy(&path).into_owned();
                        return Err(hostile(format!("{shown:?} is used as a directory and is none")));
                    }
                },
            }
            real.push(name);
        }
        let path = real.join(&b'/');
        let fd = self
            .open_real(&path)
            .map_err(|errno| failed("open directory", &path, errno))?;
        Ok(Parent {
            fd: Rc::new(fd),
            path,
        })
    }

    fn make_implied(&mut self, directory: &OwnedFd, name: &[u8], path: &[u8], whiteout: bool) -> Result<()> {
        let os_name = OsStr::from_bytes(name);
        if whiteout {
            rustix::fs::unlinkat(directory, os_name, AtFlags::empty())
                .map_err(|e| failed("replace", path, e))?;
        }
        rustix::fs::mkdirat(directory, os_name, Mode::from_raw_mode(0o755))
            .map_err(|errno| failed("make directory", path, errno))?;
        let made = self.open_readable(path)?;
        rustix::fs::fchmod(&made, Mode::from_raw_mode(0o755)).map_err(|e| failed("set mode of", path, e))?;
        if whiteout {
            set_opaque(&made, path)?;
        }
        self.implied.insert(path.to_vec());
        Ok(())
    }

    /// A directory opened by its real path such that its attributes can be set.
    pub(crate) fn open_readable(&self, path: &[u8]) -> Result<OwnedFd> {
        let directory = self
            .open_real(path)
            .map_err(|errno| failed("open directory", path, errno))?;
        rustix::fs::openat(
            &directory,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| failed("open directory", path, errno))
    }

    /// Removes a name whatever it is; the name is known to exist.
    pub(crate) fn remove(&mut self, parent: &Parent, name: &[u8], is_directory: bool) -> Result<()> {
        let path = join(&parent.path, name);
        if is_directory {
            // A directory handed out before may lie below.
            self.cached = None;
            remove_tree(parent.fd.as_fd(), OsStr::from_bytes(name))
                .map_err(|e| failed("replace", &path, e))?;
            let below = [path.as_slice(), b"/"].concat();
            self.implied
                .retain(|implied| *implied != path && !implied.starts_with(&below));
            return Ok(());
        }
        rustix::fs::unlinkat(&parent.fd, OsStr::from_bytes(name), AtFlags::empty())
            .map_err(|errno| failed("replace", &path, errno))
    }
}

/// Marks a directory as opaque.
pub(crate) fn set_opaque(directory: impl AsFd, path: &[u8]) -> Result<()> {
    rustix::fs::fsetxattr(directory, OPAQUE, b"y", rustix::fs::XattrFlags::empty())
        .map_err(|errno| failed("mark as opaque", path, errno))
}

/// Removes a tree below an open directory without following links; its depth is bounded by [`MAX_DEPTH`].
fn remove_tree(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for entry in rustix::fs::Dir::read_from(&directory)? {
        let entry = entry?;
        let child = OsStr::from_bytes(entry.file_name().to_bytes());
        if child == "." || child == ".." {
            continue;
        }
        let stat = rustix::fs::statat(&directory, child, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            remove_tree(directory.as_fd(), child)?;
        } else {
            rustix::fs::unlinkat(&directory, child, AtFlags::empty())?;
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}
