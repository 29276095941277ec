//! Removing a directory with all that is in it, and nothing of what is mounted there: a mount that came after the
//! last look fails the removal, whatever device it is of (openat2(2), RESOLVE_NO_XDEV).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat, unlinkat};
use rustix::io::Errno;

/// Removes `dir`.
///
/// # Errors
/// `EXDEV` where something is mounted at it or below it; its own absence.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = rustix::fs::open(parent, flags, Mode::empty())?;
    Ok(remove_directory(parent.as_fd(), name)?)
}

fn remove_directory(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = ResolveFlags::NO_XDEV | ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let directory = loop {
        match openat2(parent, name, flags, Mode::empty(), here) {
            // The kernel asks for another try when a rename elsewhere raced with it.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => break other?,
        }
    };
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let child = OsStr::from_bytes(entry.file_name().to_bytes());
        if child == "." || child == ".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                FileType::from_raw_mode(statat(&directory, child, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
            }
            known => known,
        };
        let removed = if kind == FileType::Directory {
            remove_directory(directory.as_fd(), child)
        } else {
            unlinkat(&directory, child, AtFlags::empty())
        };
        match removed {
            // What a dying shim removes meanwhile needs no removal.
            Err(Errno::NOENT) => {}
            other => other?,
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{UnmountFlags, mount_bind, unmount};

    #[test]
    fn what_is_mounted_below_is_not_removed() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("deep/mounted")).unwrap();
        std::fs::write(tree.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(outside.path(), tree.join("link")).unwrap();
        // Of the same device: only the mount itself tells.
        mount_bind(outside.path(), tree.join("deep/mounted")).unwrap();
        let refused = remove(&tree);
        unmount(tree.join("deep/mounted"), UnmountFlags::DETACH).unwrap();
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EXDEV));
        remove(&tree).unwrap();
        assert!(!tree.exists() && outside.path().join("kept").exists());
        assert_eq!(remove(&tree).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
