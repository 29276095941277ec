//! Files of the share by way of descriptors: whatever the guest puts into a directory that it can write, a symbolic
//! link or another directory under a known name, no step of the host's leads out of the share (openat2(2),
//! Linux 5.6).

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Levels of directories that are removed; the share's own are five.
const DEPTH: usize = 64;

fn open_with(
    directory: BorrowedFd<'_>,
    path: &Path,
    flags: OFlag,
    further: ResolveFlag,
) -> io::Result<OwnedFd> {
    let mut how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | further);
    if flags.contains(OFlag::O_CREAT) {
        how = how.mode(Mode::from_bits_truncate(0o644));
    }
    Ok(openat2(directory, path, how)?)
}

/// A directory whose path is the host's alone.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(path, flags, Mode::empty())?)
}

/// What `path` below `directory` is now, with what is mounted there; as a place only (`O_PATH`).
pub(super) fn open(directory: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    open_with(directory.as_fd(), path, OFlag::O_PATH, ResolveFlag::empty())
}

/// Makes what is missing of the directories `path` below `directory` and opens the last as a place.
pub(super) fn make_directories(directory: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let mut here = directory.as_fd().try_clone_to_owned()?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            let text = format!("{} is no plain path", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        match mkdirat(&here, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        here = open_with(
            here.as_fd(),
            Path::new(name),
            OFlag::O_PATH | OFlag::O_DIRECTORY,
            ResolveFlag::empty(),
        )?;
    }
    Ok(here)
}

/// Makes the file `name` in `directory` if it is missing, and opens it as a place.
pub(super) fn make_file(directory: impl AsFd, name: &Path) -> io::Result<OwnedFd> {
    // O_NONBLOCK: nothing that lies there can hold this up.
    let flags = OFlag::O_CREAT | OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    drop(open_with(directory.as_fd(), name, flags, ResolveFlag::empty())?);
    open(directory, name)
}

/// Removes a file or a directory with all in it, but nothing that is mounted there; fine when it is gone, also
/// meanwhile: two clean-ups may run beside each other, the one after the shim's death and the one of
/// StopPodSandbox.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    match open_directory(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        parent => remove_entry(parent?.as_fd(), &c_name(name)?, 0),
    }
}

fn remove_entry(parent: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    let failed = |errno: Errno| {
        let name = name.to_string_lossy();
        let text = match errno {
            Errno::EXDEV | Errno::EBUSY => format!("{name} is still a mount point"),
            errno => format!("{name}: {errno}"),
        };
        io::Error::new(io::Error::from(errno).kind(), text)
    };
    match unlinkat(parent, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR) => {}
        Err(errno) => return Err(failed(errno)),
    }
    if depth >= DEPTH {
        let text = format!(
            "{} lies more than {DEPTH} directories deep",
            name.to_string_lossy()
        );
        return Err(io::Error::other(text));
    }
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV,
        );
    let opened = match openat2(parent, name, how) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other.map_err(failed)?,
    };
    let mut directory = Dir::from_fd(opened.try_clone()?).map_err(failed)?;
    let mut names = Vec::new();
    for entry in directory.iter() {
        let name = entry.map_err(failed)?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    for name in names {
        remove_entry(opened.as_fd(), &name, depth + 1)?;
    }
    match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(failed(errno)),
    }
}

fn c_name(name: &OsStr) -> io::Result<CString> {
    Ok(CString::new(name.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_leads_nowhere() {
        let outside = tempfile::tempdir().unwrap();
        let share = tempfile::tempdir().unwrap();
        let root = open_directory(share.path()).unwrap();
        make_directories(&root, Path::new("c1")).unwrap();
        symlink(outside.path(), share.path().join("c1/mounts")).unwrap();
        symlink(outside.path().join("file"), share.path().join("c1/file")).unwrap();
        assert!(make_directories(&root, Path::new("c1/mounts/0")).is_err());
        assert!(make_directories(&root, Path::new("c1/../..")).is_err());
        let container = open(&root, Path::new("c1")).unwrap();
        assert!(make_file(&container, Path::new("file")).is_err());
        assert!(open(&root, Path::new("c1/mounts")).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn foreign_files_are_removed_and_what_links_name_is_not() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        let share = tempfile::tempdir().unwrap();
        let tree = share.path().join("tree");
        std::fs::create_dir_all(tree.join("c1/mounts/deep/deeper/deepest")).unwrap();
        std::fs::write(tree.join("c1/mounts/full"), "not empty").unwrap();
        symlink(outside.path(), tree.join("c1/link")).unwrap();
        remove(&tree).unwrap();
        remove(&tree).unwrap();
        remove(&tree.join("c1")).unwrap();
        assert!(!tree.exists());
        assert!(outside.path().join("kept").exists());
    }
}
