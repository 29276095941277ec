//! Mounting on the host: fstab-style options, recursive binds with read-only and propagation, and unmounting all
//! below a directory. Where something is mounted is told by a descriptor, which nobody can turn elsewhere.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::oci::Binding;

/// Options of mount(8) that are flags, by what they set or clear.
const FLAGS: &[(&str, bool, MsFlags)] = &[
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("suid", false, MsFlags::MS_NOSUID),
    ("nodev", true, MsFlags::MS_NODEV),
    ("dev", false, MsFlags::MS_NODEV),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
];

/// Splits fstab-style options into flags and the file system's own data.
fn split_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match FLAGS.iter().find(|(name, ..)| name == option) {
            Some((_, true, flag)) => flags |= *flag,
            Some((_, false, flag)) => flags &= !*flag,
            None => data.push(option),
        }
    }
    (flags, data.join(","))
}

/// mount(2) with options as containerd's mounts have them.
///
/// # Errors
/// The kernel's.
pub fn mount_options(fs_type: &str, source: &str, target: &OwnedFd, options: &[String]) -> io::Result<()> {
    let (mut flags, data) = split_options(options);
    if fs_type == "bind" || fs_type == "rbind" {
        flags |= MsFlags::MS_BIND;
    }
    if flags.contains(MsFlags::MS_BIND) {
        let tree = clone_tree(Path::new(source), flags.contains(MsFlags::MS_REC))?;
        set_attributes(&tree, false, restrictions(flags), 0)?;
        return attach(&tree, target);
    }
    let place = format!("/proc/self/fd/{}", target.as_raw_fd());
    mount(
        Some(source),
        place.as_str(),
        Some(fs_type),
        flags,
        Some(data.as_str()),
    )?;
    Ok(())
}

/// Flags of a bind mount, as mount_setattr(2) has them.
fn restrictions(flags: MsFlags) -> u64 {
    [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        (MsFlags::MS_NOATIME, libc::MOUNT_ATTR_NOATIME),
        (MsFlags::MS_STRICTATIME, libc::MOUNT_ATTR_STRICTATIME),
    ]
    .iter()
    .filter(|(flag, _)| flags.contains(*flag))
    .fold(0, |all, (_, attribute)| all | attribute)
}

/// A detached copy of the mount at `source` for [`attach`], as a container's volume has to be.
///
/// The mount is made apart from the tree and gets its propagation before it is attached. Attached first, its copy
/// in virtiofsd's namespace would stay a slave of the host's mount whatever is set later.
///
/// # Errors
/// The kernel's; mount_setattr(2) needs Linux 5.12.
pub fn copy(source: &Path, binding: &Binding) -> io::Result<OwnedFd> {
    let tree = clone_tree(source, binding.recursive)?;
    // Nothing that the guest or virtiofsd does may travel to the host; what the host mounts later travels to the
    // guest only where the container asked for that.
    let propagation = if binding.follows_host {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    set_attributes(&tree, binding.recursive, 0, propagation)?;
    if binding.read_only {
        // As an OCI runtime has it: the mount itself, not what is mounted below it.
        set_attributes(&tree, false, libc::MOUNT_ATTR_RDONLY, 0)?;
    }
    Ok(tree)
}

/// Mounts a second view of `tree`, a mount with shared propagation, at `target`: what is mounted in the tree appears
/// there as it is, and the tree itself is read-only.
///
/// # Errors
/// The kernel's.
pub fn read_only_view(tree: &Path, target: &OwnedFd) -> io::Result<()> {
    let view = clone_tree(tree, true)?;
    set_attributes(&view, true, 0, libc::MS_SLAVE)?;
    set_attributes(&view, false, libc::MOUNT_ATTR_RDONLY, 0)?;
    attach(&view, target)
}

/// open_tree(2) with a detached copy.
fn clone_tree(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(source)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: the path is a C string that lives until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let descriptor = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn set_attributes(tree: &OwnedFd, recursive: bool, set: u64, propagation: libc::c_ulong) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        // The kinds of access times are one field: it is cleared to be set.
        attr_clr: if set & libc::MOUNT_ATTR__ATIME == 0 {
            0
        } else {
            libc::MOUNT_ATTR__ATIME
        },
        propagation,
        userns_fd: 0,
    };
    let depth = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, the structure is of the size given; both live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | depth,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// move_mount(2) from the detached copy.
///
/// # Errors
/// The kernel's.
pub fn attach(tree: &OwnedFd, target: impl AsFd) -> io::Result<()> {
    // SAFETY: both paths are empty C strings that live until the call returns, the descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Mount points at or below `directory`.
#[must_use]
pub fn below(directory: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mount_points(&text)
        .filter(|path| path.starts_with(directory))
        .collect()
}

/// The fifth field of each line of mountinfo (proc(5)), unescaped.
fn mount_points(text: &str) -> impl Iterator<Item = PathBuf> + '_ {
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
}

/// mountinfo writes space, tab, line end and backslash as three octal digits.
fn unescape(field: &str) -> std::ffi::OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| more.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[3..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    std::os::unix::ffi::OsStringExt::from_vec(bytes)
}

/// Detaches everything at or below `directory`: the outermost mounts, with what is mounted in them. A path that leads
/// through a mount is never resolved, since the guest may have turned its directories elsewhere.
///
/// # Errors
/// The last of the kernel's errors, after all were tried.
pub fn unmount_below(directory: &Path) -> io::Result<()> {
    let mut last = Ok(());
    // A mount over a mount shows once a round.
    for _ in 0..16 {
        let points = below(directory);
        if points.is_empty() {
            return Ok(());
        }
        last = Ok(());
        for point in outermost(&points) {
            match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                // Gone with its parent.
                Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
                Err(errno) => last = Err(io::Error::from(errno)),
            }
        }
    }
    last
}

fn outermost(points: &[PathBuf]) -> impl Iterator<Item = &PathBuf> {
    let within = |point: &PathBuf, other: &PathBuf| point != other && point.starts_with(other);
    points
        .iter()
        .filter(move |point| !points.iter().any(|other| within(point, other)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn options_are_split() {
        let options = ["lowerdir=/a:/b", "ro", "nosuid", "rw", "index=off"].map(str::to_owned);
        assert_eq!(
            split_options(&options),
            (MsFlags::MS_NOSUID, "lowerdir=/a:/b,index=off".to_owned())
        );
    }

    #[test]
    fn escaped_mount_points_are_read() {
        let text = "1 2 0:3 / /with\\040space\\134x rw shared:1 - tmpfs none rw\n";
        assert_eq!(
            mount_points(text).collect::<Vec<_>>(),
            [PathBuf::from("/with space\\x")]
        );
    }

    #[test]
    fn nothing_within_a_mount_is_unmounted_by_its_path() {
        let points = [
            "/s/c/rootfs/a/b",
            "/s/c/rootfs",
            "/s/c/mounts/1",
            "/s/c/mounts/10",
        ]
        .map(PathBuf::from);
        let found: Vec<_> = outermost(&points).map(|point| point.to_str().unwrap()).collect();
        assert_eq!(found, ["/s/c/rootfs", "/s/c/mounts/1", "/s/c/mounts/10"]);
    }

    proptest! {
        #[test]
        fn any_field_is_unescaped(field in "[ -~]{0,40}") {
            prop_assert!(unescape(&field).len() <= field.len());
        }
    }
}
