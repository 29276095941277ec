//! Image volumes: an image, or a directory or file of it, mounted read-only into a container (CRI `Mount.image`,
//! `image_sub_path`). The view is mounted by the daemon inside the container's bundle, so whatever takes the
//! bundle apart takes it too, and its lease carries the container's id, so a start finds what a crash left.
//!
//! Such volumes are read-only, nosuid and nodev. Kubernetes' documentation has them without execution too, but its
//! conformance suite (cri-tools 1.37) runs programs from them, as containerd and CRI-O allow.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use catamaran_images::RootfsMount;
use catamaran_sandbox::id::Id;
use catamaran_spec::{MountSource, SourcePropagation};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_bind, mount_change,
    mount_remount, move_mount, open_tree,
};

use super::steps::Steps;
use super::{declared_volumes, teardown};
use crate::cri::api::ContainerConfig;
use crate::error::{Error, Result, chain};
use crate::node::Node;

/// What the kubelet looks for in an error to tell this failure from others (cri-api, errors).
const KUBELET_REASON: &str = "ImageVolumeMountFailed";

/// One image volume of a container to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageVolume {
    /// Index among the container's mounts.
    pub(super) index: usize,
    image_id: String,
    sub_path: String,
    /// Below the bundle.
    directory: PathBuf,
}

impl ImageVolume {
    /// Where the container's mount comes from, once [`mount_all`] has made it.
    pub(super) fn source(&self) -> MountSource {
        let name = if self.sub_path.is_empty() { "image" } else { "part" };
        MountSource {
            path: self.directory.join(name),
            propagation: SourcePropagation::Private,
        }
    }

    fn field(&self, name: &str) -> String {
        format!("config.mounts[{}].{name}", self.index)
    }
}

fn is_image(mount: &crate::cri::api::Mount) -> bool {
    mount.image.as_ref().is_some_and(|image| !image.image.is_empty())
}

/// Finds the images of a container's image volumes, and notes in `config` which they are (`image.image_ref`, as
/// PullImage names them), for its status. Nothing is made.
///
/// # Errors
/// [`Error::NotFound`] for an image that was not pulled, [`Error::InvalidArgument`] for a path out of it.
pub(super) fn plan(node: &Node, bundle: &Path, config: &mut ContainerConfig) -> Result<Vec<ImageVolume>> {
    let mut volumes = Vec::new();
    for (index, mount) in config.mounts.iter_mut().enumerate() {
        let sub_path = mount.image_sub_path.clone();
        let Some(wanted) = mount.image.as_mut().filter(|image| !image.image.is_empty()) else {
            continue;
        };
        let image = node.images.get(&wanted.image).ok_or_else(|| Error::NotFound {
            what: "image",
            id: wanted.image.clone(),
        })?;
        wanted.image_ref = image.id.clone();
        let volume = ImageVolume {
            index,
            image_id: image.id.clone(),
            sub_path,
            directory: bundle.join("image-volumes").join(index.to_string()),
        };
        if !stays_inside(&volume.sub_path) {
            return Err(Error::invalid(
                volume.field("image_sub_path"),
                format!("{:?} is not a relative path without '..'", volume.sub_path),
            ));
        }
        volumes.push(volume);
    }
    Ok(volumes)
}

fn stays_inside(sub_path: &str) -> bool {
    !sub_path.contains('\0')
        && Path::new(sub_path)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// Leases and mounts them all. What was made when one fails goes with the bundle and by [`release`].
///
/// # Errors
/// A part that the image does not have, or that is neither directory nor file; failures of mounting.
pub(super) async fn mount_all(
    node: &Arc<Node>,
    container: &Id,
    volumes: &[ImageVolume],
    steps: &Steps,
) -> Result<()> {
    for volume in volumes {
        let key = key(container, volume.index);
        let (node, volume) = (node.clone(), volume.clone());
        let mounted = async move {
            let mounts = node.images.prepare_image_mount(&volume.image_id, &key).await?;
            teardown::blocking(move || mount_one(&volume, &mounts)).await
        };
        steps.run(mounted).await?;
    }
    Ok(())
}

fn mount_one(volume: &ImageVolume, mounts: &[RootfsMount]) -> Result<()> {
    let image = volume.directory.join("image");
    std::fs::create_dir_all(&image).map_err(Error::io("create", &image))?;
    for one in mounts {
        mount_view(one, &image).map_err(|e| Error::io("mount the image at", &image)(e.into()))?;
    }
    if volume.sub_path.is_empty() {
        return Ok(());
    }
    let part = open_part(&image, volume)?;
    let target = volume.directory.join("part");
    let kind = FileType::from_raw_mode(
        rustix::fs::fstat(&part)
            .map_err(|e| unusable(volume, &e))?
            .st_mode,
    );
    match kind {
        FileType::Directory => std::fs::create_dir_all(&target),
        FileType::RegularFile => File::create(&target).map(drop),
        _ => {
            return Err(unusable(volume, &"is neither a directory nor a file"));
        }
    }
    .map_err(Error::io("create", &target))?;
    // By the descriptor: what was resolved is what is mounted.
    let source = format!("/proc/self/fd/{}", part.as_raw_fd());
    mount_bind(source, &target)
        .and_then(|()| mount_change(&target, MountPropagationFlags::PRIVATE))
        .map_err(|e| Error::io("mount", &target)(e.into()))
}

/// Resolves the path as if the image were the root: absolute links and `..` in links stay inside.
fn open_part(image: &Path, volume: &ImageVolume) -> Result<OwnedFd> {
    open_inside(image, &volume.sub_path, OFlags::PATH).map_err(|e| match e {
        rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => {
            unusable(volume, &"does not exist in the image")
        }
        other => unusable(volume, &other),
    })
}

/// Opens a path below `root` as if that were the root.
pub(super) fn open_inside(root: &Path, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let directory = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
    let root = rustix::fs::open(root, directory, Mode::empty())?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        match openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), inside) {
            // The kernel asks for another try when a rename elsewhere raced with the walk.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            other => return other,
        }
    }
}

fn unusable(volume: &ImageVolume, why: &dyn std::fmt::Display) -> Error {
    Error::FailedPrecondition(format!(
        "{}: {KUBELET_REASON}: {:?} {why}",
        volume.field("image_sub_path"),
        volume.sub_path
    ))
}

/// Mounts an image's content read-only.
pub(super) fn mount_view(one: &RootfsMount, target: &Path) -> rustix::io::Result<()> {
    if one.fs_type == "bind" {
        bind_view(&one.source, target)?;
    } else {
        let restricted = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        let data: Vec<&str> = one
            .options
            .iter()
            .map(String::as_str)
            .filter(|option| *option != "ro")
            .collect();
        let data = std::ffi::CString::new(data.join(",")).map_err(|_| rustix::io::Errno::INVAL)?;
        mount(
            one.source.as_str(),
            target,
            one.fs_type.as_str(),
            restricted,
            Some(data.as_c_str()),
        )?;
    }
    mount_change(target, MountPropagationFlags::PRIVATE)
}

/// A bind that is read-only before it is attached: at no moment can anything be written, or removed, through it.
fn bind_view(source: &str, target: &Path) -> rustix::io::Result<()> {
    let tree = open_tree(
        CWD,
        source,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    match restrict(&tree) {
        Ok(()) => move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH),
        // Before Linux 5.12 there is only the way with a moment in between.
        Err(rustix::io::Errno::NOSYS) => {
            mount_bind(source, target)?;
            let restricted = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
            mount_remount(target, MountFlags::BIND | restricted, "")
        }
        Err(error) => Err(error),
    }
}

/// mount_setattr(2) of a mount that is attached nowhere.
fn restrict(tree: &OwnedFd) -> rustix::io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, the structure is of the size given; both live until the call returns.
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
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::INVAL))
}

/// Releases the leases that a container has besides its own: those of its image volumes, and that of the view that
/// its declared volumes are filled from. Its bundle must be gone, and the mounts with it.
pub(super) async fn release(node: &Node, container: &Id, config: &ContainerConfig) -> Result<()> {
    let mut first = None;
    let volumes = config.mounts.iter().enumerate();
    let volumes = volumes.filter(|(_, mount)| is_image(mount));
    let volumes = volumes.map(|(index, _)| key(container, index));
    for key in volumes.chain([declared_volumes::view_key(container)]) {
        if let Err(error) = node.images.release(&key).await {
            tracing::warn!(%container, key, error = %chain(&error), "releasing a view of an image");
            first.get_or_insert(error);
        }
    }
    first.map_or(Ok(()), |error| Err(error.into()))
}

fn key(container: &Id, index: usize) -> String {
    format!("{container}.volume{index}")
}

/// The container that a lease belongs to, by its key.
pub(super) fn holder(key: &str) -> &str {
    key.split('.').next().unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(directory: &Path, sub_path: &str) -> ImageVolume {
        ImageVolume {
            index: 0,
            image_id: String::new(),
            sub_path: sub_path.to_owned(),
            directory: directory.to_owned(),
        }
    }

    #[test]
    fn a_lease_names_its_container() {
        let id = Id::random().unwrap();
        assert_eq!(holder(&key(&id, 12)), id.as_str());
        assert_eq!(holder(id.as_str()), id.as_str());
    }

    #[test]
    fn paths_out_of_the_image_are_refused() {
        for good in ["", "a", "a/b", "./a"] {
            assert!(stays_inside(good), "{good}");
        }
        for bad in ["/a", "..", "a/../b", "a/..", "a\0b"] {
            assert!(!stays_inside(bad), "{bad}");
        }
    }

    /// What `source` shows is never writable at `target`: looked at by its descriptor before it is attached.
    #[test]
    fn a_bind_is_read_only_before_it_is_attached() {
        let image = tempfile::tempdir().unwrap();
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, image.path(), flags).unwrap();
        restrict(&tree).unwrap();
        let written = rustix::fs::openat(&tree, "new", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
        assert_eq!(written.unwrap_err(), rustix::io::Errno::ROFS);
        let target = tempfile::tempdir().unwrap();
        bind_view(&image.path().display().to_string(), target.path()).unwrap();
        let refused = std::fs::write(target.path().join("new"), "x").unwrap_err();
        rustix::mount::unmount(target.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    }

    #[test]
    fn parts_are_resolved_inside_the_image_and_mounted_read_only() {
        let image = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(image.path().join("etc/deep")).unwrap();
        std::fs::write(image.path().join("etc/passwd"), "of the image").unwrap();
        std::os::unix::fs::symlink("/etc", image.path().join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../../../../etc/passwd", image.path().join("up")).unwrap();
        std::os::unix::fs::symlink("/proc/self/root", image.path().join("magic")).unwrap();
        let status = std::process::Command::new("mkfifo")
            .arg(image.path().join("fifo"))
            .status()
            .unwrap();
        assert!(status.success());
        let bind = RootfsMount {
            fs_type: "bind".into(),
            source: image.path().display().to_string(),
            target: String::new(),
            options: vec!["rbind".into(), "ro".into()],
        };
        let mounted = |sub_path: &str| {
            let dir = tempfile::tempdir().unwrap();
            let bundle = dir.path().canonicalize().unwrap().join("bundle");
            let volume = volume(&bundle, sub_path);
            let result = mount_one(&volume, std::slice::from_ref(&bind)).map(|()| {
                let path = volume.source().path;
                let write = std::fs::write(path.join("new"), "x").map_err(|e| e.kind());
                let read =
                    std::fs::read_to_string(path.join("passwd")).or_else(|_| std::fs::read_to_string(&path));
                (read.unwrap_or_default(), write.is_err())
            });
            teardown::remove_tree(&bundle).unwrap();
            result.map_err(|e| e.to_string())
        };
        for inside in ["etc", "absolute", "etc/passwd", "up", "absolute/passwd"] {
            assert_eq!(mounted(inside), Ok(("of the image".to_owned(), true)), "{inside}");
        }
        for (path, why) in [
            ("gone", "does not exist"),
            ("etc/passwd/x", "does not exist"),
            ("magic", "does not exist"),
            ("fifo", "neither a directory nor a file"),
        ] {
            let error = mounted(path).unwrap_err();
            assert!(
                error.contains(why) && error.contains("mounts[0].image_sub_path"),
                "{error}"
            );
        }
        assert!(image.path().join("etc/passwd").exists());
    }
}
