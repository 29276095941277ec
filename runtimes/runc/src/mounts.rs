//! Mounts that the shim makes: containers' root file systems and the pod's `/dev/shm`.

use std::os::fd::BorrowedFd;
use std::path::{Component, Path, PathBuf};

use catamaran_sandbox::shim_server::backend::RootfsMount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::idmap;

/// Bytes of mount data that mount(2) takes: a page, with its end.
const MAX_DATA: usize = 4095;

#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("rootfs mount target {0:?} leaves the root file system")]
    Target(String),
    #[error("mount options of {0} bytes, the kernel takes {MAX_DATA}: the image has too many layers")]
    TooLong(usize),
    #[error("mount {fs_type} at {}", target.display())]
    Mount {
        fs_type: String,
        target: PathBuf,
        source: Errno,
    },
    #[error("a root file system of type {fs_type} cannot be id-mapped for a user namespace: {reason}")]
    NotMappable { fs_type: String, reason: String },
    #[error("mount layer {} through the pod's id mappings: {source}", layer.display())]
    IdMap { layer: PathBuf, source: std::io::Error },
    #[error("unmount {}", path.display())]
    Unmount { path: PathBuf, source: Errno },
    #[error("prepare mount point {}", path.display())]
    Point { path: PathBuf, source: std::io::Error },
}

/// Mounts a root file system at `rootfs`, which is made; id-mapped where the pod has a user namespace. What was
/// mounted is undone on failure.
pub(crate) fn mount_rootfs(
    mounts: &[RootfsMount],
    rootfs: &Path,
    user: Option<BorrowedFd<'_>>,
) -> Result<(), MountError> {
    std::fs::create_dir_all(rootfs).map_err(|source| MountError::Point {
        path: rootfs.to_owned(),
        source,
    })?;
    for one in mounts {
        let mounted = match user {
            Some(user) => mount_mapped(one, rootfs, user),
            None => mount_one(one, rootfs),
        };
        if let Err(error) = mounted {
            if let Err(undo) = unmount_all(rootfs) {
                tracing::warn!(error = %undo, "undoing rootfs mounts");
            }
            return Err(error);
        }
    }
    Ok(())
}

fn mount_mapped(one: &RootfsMount, rootfs: &Path, user: BorrowedFd<'_>) -> Result<(), MountError> {
    let points = idmap::points_of(rootfs);
    let mounted = idmap::map_layers(one, user, &points).and_then(|one| mount_one(&one, rootfs));
    // The overlay has its own copies of the layers' mounts.
    let cleared = idmap::clear(&points);
    mounted.and(cleared)
}

/// Takes a root file system away, and what a crash left of its making. Idempotent.
pub(crate) fn unmount_rootfs(rootfs: &Path) -> Result<(), MountError> {
    unmount_all(rootfs)?;
    idmap::clear(&idmap::points_of(rootfs))
}

fn mount_one(one: &RootfsMount, rootfs: &Path) -> Result<(), MountError> {
    let relative = Path::new(&one.target);
    let inside = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
    if !inside {
        return Err(MountError::Target(one.target.clone()));
    }
    let target = match one.target.trim_start_matches('/') {
        "" => rootfs.to_owned(),
        relative => rootfs.join(relative),
    };
    let (mut flags, mut propagation, mut data) = (MsFlags::empty(), MsFlags::empty(), Vec::new());
    for option in &one.options {
        match flag(option) {
            Some((bits, true)) => flags |= bits,
            Some((bits, false)) => flags &= !bits,
            None => match self::propagation(option) {
                Some(bits) => propagation |= bits,
                None => data.push(option.as_str()),
            },
        }
    }
    if one.fs_type == "bind" {
        flags |= MsFlags::MS_BIND;
    }
    let failed = |source| MountError::Mount {
        fs_type: one.fs_type.clone(),
        target: target.clone(),
        source,
    };
    let bind = flags.contains(MsFlags::MS_BIND);
    let fs_type = (!bind).then_some(one.fs_type.as_str());
    let first = if bind {
        flags & (MsFlags::MS_BIND | MsFlags::MS_REC)
    } else {
        flags
    };
    let data = data.join(",");
    if data.len() > MAX_DATA {
        mount_overlay_relative(one, &data, first, &target)?;
    } else {
        let data = (!data.is_empty() && !bind).then_some(data.as_str());
        mount(Some(one.source.as_str()), &target, fs_type, first, data).map_err(failed)?;
    }
    if bind && flags != first {
        // Flags of a bind mount are taken in a second step.
        mount(
            None::<&str>,
            &target,
            None::<&str>,
            flags | MsFlags::MS_REMOUNT,
            None::<&str>,
        )
        .map_err(failed)?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, &target, None::<&str>, propagation, None::<&str>).map_err(failed)?;
    }
    Ok(())
}

/// An overlay whose options are longer than a page: its lower directories, relative to what they have in
/// common, usually fit. The shim has one thread, so its current directory is free for the moment.
fn mount_overlay_relative(
    one: &RootfsMount,
    data: &str,
    flags: MsFlags,
    target: &Path,
) -> Result<(), MountError> {
    let lower = one
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="));
    let Some((common, shorter)) = lower.and_then(shorten) else {
        return Err(MountError::TooLong(data.len()));
    };
    let lower = lower.unwrap_or_default();
    let data = data.replace(&format!("lowerdir={lower}"), &format!("lowerdir={shorter}"));
    if data.len() > MAX_DATA {
        return Err(MountError::TooLong(data.len()));
    }
    let failed = |source| MountError::Mount {
        fs_type: one.fs_type.clone(),
        target: target.to_owned(),
        source,
    };
    std::env::set_current_dir(&common).map_err(|source| MountError::Point { path: common, source })?;
    let result = mount(
        Some(one.source.as_str()),
        target,
        Some(one.fs_type.as_str()),
        flags,
        Some(data.as_str()),
    );
    std::env::set_current_dir("/").map_err(|source| MountError::Point {
        path: "/".into(),
        source,
    })?;
    result.map_err(failed)
}

/// The directory that all of a `lowerdir` list are in, and the list relative to it. `None` where an escaped
/// character or a missing common directory makes it impossible.
fn shorten(lower: &str) -> Option<(PathBuf, String)> {
    if lower.contains('\\') {
        return None;
    }
    let first = lower.split(':').next()?;
    let mut common = Path::new(first).parent()?.to_owned();
    while !lower
        .split(':')
        .all(|directory| Path::new(directory).starts_with(&common))
    {
        common = common.parent()?.to_owned();
    }
    let mut parts = Vec::new();
    for directory in lower.split(':') {
        match Path::new(directory).strip_prefix(&common).ok()?.to_str()? {
            "" => return None,
            relative => parts.push(relative),
        }
    }
    Some((common, parts.join(":")))
}

fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "ro" => (MsFlags::MS_RDONLY, true),
        "rw" => (MsFlags::MS_RDONLY, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
        "defaults" => (MsFlags::empty(), true),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<MsFlags> {
    Some(match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE.union(MsFlags::MS_REC),
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE.union(MsFlags::MS_REC),
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED.union(MsFlags::MS_REC),
        _ => return None,
    })
}

/// The pod's shared memory: a tmpfs of its own, whose root belongs to `owner` (uid and gid), or the host's where
/// the pod is in the host's IPC namespace.
pub(crate) fn mount_shm(path: &Path, bytes: u64, host: bool, owner: (u32, u32)) -> Result<(), MountError> {
    std::fs::create_dir_all(path).map_err(|source| MountError::Point {
        path: path.to_owned(),
        source,
    })?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let result = if host {
        mount(
            Some("/dev/shm"),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
    } else {
        let data = format!("mode=1777,size={bytes},uid={},gid={}", owner.0, owner.1);
        mount(Some("shm"), path, Some("tmpfs"), safe, Some(data.as_str()))
    };
    result.map_err(|source| MountError::Mount {
        fs_type: "tmpfs".to_owned(),
        target: path.to_owned(),
        source,
    })
}

/// Takes away everything that is mounted at or below `path`. Idempotent.
pub(crate) fn unmount_all(path: &Path) -> Result<(), MountError> {
    // Detached with what is below; mounts that were stacked on one another go one by one.
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(source) => {
                return Err(MountError::Unmount {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_directories_are_shortened() {
        let (common, list) = shorten("/i/layers/ab/fs:/i/layers/cd/fs").unwrap();
        assert_eq!(
            (common.as_path(), list.as_str()),
            (Path::new("/i/layers"), "ab/fs:cd/fs")
        );
        assert!(shorten("/a\\:b/fs:/c").is_none());
        assert_eq!(shorten("/a:/b").unwrap().1, "a:b");
    }

    /// More layers than a page of options names.
    #[test]
    fn an_overlay_of_a_hundred_layers_mounts() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory
            .path()
            .join("a-rather-long-name-for-a-directory-of-layers");
        let layers: Vec<String> = (0..100)
            .map(|index| {
                let layer = base.join(format!("{index:03}/fs"));
                std::fs::create_dir_all(&layer).unwrap();
                std::fs::write(layer.join(format!("file{index}")), "").unwrap();
                layer.display().to_string()
            })
            .collect();
        let one = RootfsMount {
            fs_type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![format!("lowerdir={}", layers.join(":"))],
        };
        assert!(one.options[0].len() > MAX_DATA);
        let rootfs = directory.path().join("rootfs");
        mount_rootfs(&[one], &rootfs, None).unwrap();
        let files = std::fs::read_dir(&rootfs).unwrap().count();
        unmount_all(&rootfs).unwrap();
        unmount_all(&rootfs).unwrap();
        assert_eq!(files, 100);
        assert_eq!(std::fs::read_dir(&rootfs).unwrap().count(), 0);
    }

    #[test]
    fn targets_stay_inside() {
        let mount = |target: &str| RootfsMount {
            fs_type: "tmpfs".to_owned(),
            source: "none".to_owned(),
            target: target.to_owned(),
            options: Vec::new(),
        };
        let directory = tempfile::tempdir().unwrap();
        let refused = mount_rootfs(&[mount("../out")], &directory.path().join("rootfs"), None);
        assert!(matches!(refused, Err(MountError::Target(_))));
    }
}
