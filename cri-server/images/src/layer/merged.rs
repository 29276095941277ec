//! The union of layers as overlayfs would show it, read without mounting: for files of an image that the daemon
//! needs (`/etc/passwd`), and for the attributes of directories that a layer uses but does not describe.
//! Symbolic links are followed inside the image only.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::rooted::{OPAQUE, is_whiteout};
use crate::error::{Error, Result};

const MAX_LINKS: usize = 40;

/// One directory of the union: the layers that contribute to it, the topmost first.
type Union = Vec<Rc<OwnedFd>>;

pub(crate) struct Merged {
    root: Union,
}

enum Node {
    Absent,
    Directory(Union),
    /// A file, device or fifo in this layer's directory.
    Other(Rc<OwnedFd>, FileType),
    Symlink(Vec<u8>),
}

impl Merged {
    /// Opens layers, the topmost first.
    pub(crate) fn open<'a>(layers: impl IntoIterator<Item = &'a Path>) -> Result<Self> {
        let open = |path: &Path| -> Result<Rc<OwnedFd>> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
                .map(Rc::new)
                .map_err(|errno| Error::io(format!("open layer {}", path.display()), errno))
        };
        Ok(Self {
            root: layers.into_iter().map(open).collect::<Result<_>>()?,
        })
    }

    /// Reads a regular file; `None` when there is none at the path.
    ///
    /// # Errors
    /// [`Error::Hostile`] for more than `limit` bytes.
    pub(crate) fn read_file(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let failed = |errno: Errno| Error::io(format!("read {path:?} of an image"), errno);
        let Some((directory, name)) = self.find_file(path.as_bytes()).map_err(failed)? else {
            return Ok(None);
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            rustix::fs::openat(&directory, OsStr::from_bytes(&name), flags, Mode::empty()).map_err(failed)?;
        let mut bytes = Vec::new();
        File::from(fd)
            .take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|error| Error::io(format!("read {path:?} of an image"), error))?;
        if bytes.len() as u64 > limit {
            return Err(Error::Hostile(format!("{path:?} is larger than {limit} bytes")));
        }
        Ok(Some(bytes))
    }

    /// The topmost layer's directory that is at `path`, no links followed.
    pub(crate) fn directory(&self, path: &[u8]) -> rustix::io::Result<Option<Rc<OwnedFd>>> {
        let mut here = self.root.clone();
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            match step(&here, name)? {
                Node::Directory(union) => here = union,
                _ => return Ok(None),
            }
        }
        Ok(here.first().cloned())
    }

    fn find_file(&self, path: &[u8]) -> rustix::io::Result<Option<(Rc<OwnedFd>, Vec<u8>)>> {
        let mut left: VecDeque<Vec<u8>> = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
        let mut above: Vec<Union> = Vec::new();
        let mut here = self.root.clone();
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    // The parent of the root is the root.
                    here = above.pop().unwrap_or(here);
                    continue;
                }
                _ => {}
            }
            match step(&here, &name)? {
                Node::Absent => return Ok(None),
                Node::Directory(union) => above.push(std::mem::replace(&mut here, union)),
                Node::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    if target.starts_with(b"/") {
                        above.clear();
                        here = self.root.clone();
                    }
                    for part in target.split(|byte| *byte == b'/').rev() {
                        left.push_front(part.to_vec());
                    }
                }
                Node::Other(directory, FileType::RegularFile) => {
                    let last = left.iter().all(|rest| rest.is_empty());
                    return Ok(last.then_some((directory, name)));
                }
                Node::Other(..) => return Ok(None),
            }
        }
        Ok(None)
    }
}

fn step(here: &Union, name: &[u8]) -> rustix::io::Result<Node> {
    let name = OsStr::from_bytes(name);
    let mut union = Union::new();
    for directory in here {
        let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            other => other?,
        };
        if is_whiteout(&stat) {
            break;
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(directory, name, flags, Mode::empty())?;
                let mut value = [0u8; 4];
                let opaque = match rustix::fs::fgetxattr(&fd, OPAQUE, &mut value) {
                    Ok(length) => &value[..length] == b"y",
                    Err(Errno::NODATA | Errno::NOTSUP) => false,
                    Err(errno) => return Err(errno),
                };
                union.push(Rc::new(fd));
                if opaque {
                    break;
                }
            }
            // Below a directory of a higher layer a file does not show.
            _ if !union.is_empty() => break,
            FileType::Symlink => {
                return Ok(Node::Symlink(
                    rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes(),
                ));
            }
            other => return Ok(Node::Other(directory.clone(), other)),
        }
    }
    Ok(if union.is_empty() {
        Node::Absent
    } else {
        Node::Directory(union)
    })
}
