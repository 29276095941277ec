//! Root file systems of pods with a user namespace. The layers of an image belong to the node's ids; for the
//! pod, each is mounted once more through the pod's id mappings, and the overlay is made of those mounts. Nothing
//! on disk changes owner but the container's own writable layer.
//!
//! The overlay keeps private copies of its layers' mounts, so ours go as soon as it is mounted. What a crash
//! leaves in between lies in one directory of the bundle, which every removal clears.
//!
//! Sources: mount_setattr(2), open_tree(2); overlayfs takes id-mapped layers from Linux 5.19 on.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use catamaran_sandbox::pod_spec::IdMapping;
use catamaran_sandbox::shim_server::backend::RootfsMount;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::mounts::{self, MountError};
use crate::namespaces::{NamespaceError, new_user_namespace};

/// In the bundle, beside the root file system.
const POINTS: &str = "lower";

/// Where the layers of the root file system at `rootfs` are mounted for the moment.
pub(crate) fn points_of(rootfs: &Path) -> PathBuf {
    rootfs.with_file_name(POINTS)
}

/// Mounts the lower layers of `one` through the mappings of `user` below `points` and gives the overlay of
/// those. The writable layer's root gets the owner that the topmost layer's root has in the pod.
pub(crate) fn map_layers(
    one: &RootfsMount,
    user: BorrowedFd<'_>,
    points: &Path,
) -> Result<RootfsMount, MountError> {
    let refused = |reason: &str| MountError::NotMappable {
        fs_type: one.fs_type.clone(),
        reason: reason.to_owned(),
    };
    if one.fs_type != "overlay" {
        return Err(refused("only an overlay of layers can be"));
    }
    let option = |name: &str| one.options.iter().find_map(|option| option.strip_prefix(name));
    let lower = option("lowerdir=").ok_or_else(|| refused("it has no lowerdir"))?;
    if lower.contains('\\') {
        return Err(refused("a layer's path has a colon or a backslash in it"));
    }
    let mut mapped = Vec::new();
    for (index, layer) in lower.split(':').enumerate() {
        let point = points.join(index.to_string());
        std::fs::create_dir_all(&point).map_err(|source| MountError::Point {
            path: point.clone(),
            source,
        })?;
        attach(Path::new(layer), user, &point)?;
        mapped.push(point);
    }
    if let (Some(upper), Some(top)) = (option("upperdir="), mapped.first()) {
        let owner = std::fs::metadata(top);
        owner
            .and_then(|top| std::os::unix::fs::chown(upper, Some(top.uid()), Some(top.gid())))
            .map_err(|source| MountError::Point {
                path: upper.into(),
                source,
            })?;
    }
    let list: Vec<String> = mapped.iter().map(|point| point.display().to_string()).collect();
    let options = one.options.iter().map(|option| {
        if option.starts_with("lowerdir=") {
            format!("lowerdir={}", list.join(":"))
        } else {
            option.clone()
        }
    });
    Ok(RootfsMount {
        options: options.collect(),
        ..one.clone()
    })
}

fn attach(layer: &Path, user: BorrowedFd<'_>, point: &Path) -> Result<(), MountError> {
    let failed = |source: std::io::Error| MountError::IdMap {
        layer: layer.to_owned(),
        source,
    };
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(rustix::fs::CWD, layer, clone).map_err(|errno| failed(errno.into()))?;
    set_mappings(&tree, user).map_err(failed)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, c"", rustix::fs::CWD, point, flags).map_err(|errno| failed(errno.into()))
}

fn set_mappings(tree: &OwnedFd, user: BorrowedFd<'_>) -> std::io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::from(user.as_raw_fd().unsigned_abs()),
    };
    // SAFETY: the path and the attributes live longer than the call, which reads as many bytes as it is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Takes away what [`map_layers`] mounted, with the directories. Idempotent.
pub(crate) fn clear(points: &Path) -> Result<(), MountError> {
    let failed = |source| MountError::Point {
        path: points.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(points) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let point = entry.map_err(failed)?.path();
        mounts::unmount_all(&point)?;
        // Not the whole tree: where a mount stayed, these are the image's files.
        std::fs::remove_dir(&point).map_err(failed)?;
    }
    std::fs::remove_dir(points).map_err(failed)
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("a file of root's shows up as {found}'s through a mapping to {wanted}")]
    Owner { found: u32, wanted: u32 },
}

/// Whether containers in a user namespace can have layers that lie in `directory`: tries it, in a mount
/// namespace that ends with this process. For the command line; the caller must have one thread.
pub(crate) fn probe(directory: &Path) -> Result<(), ProbeError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(std::io::Error::from)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(std::io::Error::from)?;
    // So named, it is removed by the image store's next start where this process dies.
    let scratch = directory.join(format!(".new-idmap-probe-{}", std::process::id()));
    std::fs::create_dir(&scratch)?;
    let result = try_in(&scratch);
    let removed = std::fs::remove_dir_all(&scratch);
    result?;
    Ok(removed?)
}

fn try_in(scratch: &Path) -> Result<(), ProbeError> {
    const MAPPED: u32 = 65_536;
    let range = [IdMapping {
        container_id: 0,
        host_id: MAPPED,
        length: 65_536,
    }];
    let user = new_user_namespace(&range, &range)?;
    let [lower, upper, work, rootfs] = ["layer", "upper", "work", "rootfs"].map(|name| scratch.join(name));
    for path in [&lower, &upper, &work] {
        std::fs::create_dir(path)?;
    }
    std::fs::write(lower.join("file"), "")?;
    let overlay = RootfsMount {
        fs_type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec![
            format!("lowerdir={}", lower.display()),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
            // Its unmount does not wait for the node's disk.
            "volatile".to_owned(),
        ],
    };
    mounts::mount_rootfs(&[overlay], &rootfs, Some(user.as_fd()))?;
    let owners = [&rootfs, &rootfs.join("file")].map(|path| std::fs::metadata(path).map(|meta| meta.uid()));
    mounts::unmount_all(&rootfs)?;
    for owner in owners {
        match owner? {
            MAPPED => {}
            found => {
                return Err(ProbeError::Owner {
                    found,
                    wanted: MAPPED,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(base: &Path) -> RootfsMount {
        let layers = ["top", "bottom"].map(|name| {
            let layer = base.join(name);
            std::fs::create_dir(&layer).unwrap();
            std::fs::write(layer.join(name), name).unwrap();
            layer.display().to_string()
        });
        std::os::unix::fs::chown(base.join("bottom/bottom"), Some(7), Some(8)).unwrap();
        for name in ["upper", "work"] {
            std::fs::create_dir(base.join(name)).unwrap();
        }
        RootfsMount {
            fs_type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: vec![
                format!("lowerdir={}", layers.join(":")),
                format!("upperdir={}", base.join("upper").display()),
                format!("workdir={}", base.join("work").display()),
            ],
        }
    }

    fn user() -> OwnedFd {
        let range = |host_id| {
            [IdMapping {
                container_id: 0,
                host_id,
                length: 1000,
            }]
        };
        new_user_namespace(&range(100_000), &range(300_000)).unwrap()
    }

    #[test]
    fn every_layer_shows_the_pods_ids_and_keeps_its_own() {
        let base = tempfile::tempdir().unwrap();
        let one = overlay(base.path());
        let rootfs = base.path().join("rootfs");
        let user = user();
        mounts::mount_rootfs(&[one], &rootfs, Some(user.as_fd())).unwrap();
        let owner = |path: PathBuf| {
            let meta = std::fs::metadata(path).unwrap();
            (meta.uid(), meta.gid())
        };
        let inside = [rootfs.clone(), rootfs.join("top"), rootfs.join("bottom")].map(owner);
        let points = points_of(&rootfs).exists();
        // A change copies the file up with the owner that the pod sees.
        std::fs::write(rootfs.join("bottom"), "changed").unwrap();
        let copied = owner(base.path().join("upper/bottom"));
        mounts::unmount_all(&rootfs).unwrap();
        assert_eq!(
            inside,
            [(100_000, 300_000), (100_000, 300_000), (100_007, 300_008)]
        );
        assert_eq!(copied, (100_007, 300_008));
        assert_eq!(owner(base.path().join("bottom/bottom")), (7, 8));
        assert!(!points, "the layers' own mounts go when the overlay is mounted");
    }

    #[test]
    fn what_a_crash_left_is_cleared() {
        let base = tempfile::tempdir().unwrap();
        let one = overlay(base.path());
        let points = points_of(&base.path().join("rootfs"));
        map_layers(&one, user().as_fd(), &points).unwrap();
        assert!(points.join("1/bottom").exists());
        clear(&points).unwrap();
        clear(&points).unwrap();
        assert!(!points.exists() && base.path().join("bottom/bottom").exists());
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_by_name() {
        let base = tempfile::tempdir().unwrap();
        let bind = RootfsMount {
            fs_type: "bind".to_owned(),
            source: "/usr".to_owned(),
            target: String::new(),
            options: vec!["rbind".to_owned()],
        };
        let rootfs = base.path().join("rootfs");
        let error = mounts::mount_rootfs(&[bind], &rootfs, Some(user().as_fd())).unwrap_err();
        assert!(error.to_string().contains("bind"), "{error}");
        let mut gone = overlay(base.path());
        gone.options[0] += ":/nowhere/at/all";
        let error = mounts::mount_rootfs(&[gone], &rootfs, Some(user().as_fd())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
        assert!(!points_of(&rootfs).exists(), "the layers before it are unmounted");
    }
}
