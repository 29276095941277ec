//! Volumes that an image declares (OCI image-spec, config, `Volumes`; VOLUME of a Dockerfile): each is a fresh
//! writable directory of the container's own with what the image has at its path, unless the CRI mounts something
//! there. They are on disk beside the container's writable layer, so they go with its snapshot.
//!
//! The content is copied from a read-only view of the image, whose lease carries the container's id: what a crash
//! left of it, the next start finds.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use catamaran_images::RootfsMount;
use catamaran_sandbox::id::Id;
use oci_spec::image::ImageConfiguration;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timestamps, Uid, XattrFlags, chownat, fchmod, fchown,
    fgetxattr, flistxattr, fsetxattr, fstat, futimens, mkdirat, mknodat, openat, readlinkat, statat,
    symlinkat,
};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::image_volumes::{mount_view, open_inside};
use super::steps::Steps;
use super::teardown;
use crate::cri::api::{IdMapping, Mount};
use crate::error::{Error, Result};
use crate::node::Node;

/// One volume to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeclaredVolume {
    /// Absolute, in the container.
    inside: PathBuf,
    /// On the node.
    pub(super) source: PathBuf,
}

impl DeclaredVolume {
    /// As a mount of the CRI, in a pod with these id mappings.
    pub(super) fn mount(&self, ids: Option<(&[IdMapping], &[IdMapping])>) -> Mount {
        let (uids, gids) = ids.unwrap_or_default();
        Mount {
            container_path: self.inside.display().to_string(),
            host_path: self.source.display().to_string(),
            uid_mappings: uids.to_vec(),
            gid_mappings: gids.to_vec(),
            ..Mount::default()
        }
    }
}

/// The volumes that the image declares and `mounts` do not replace; they will be below `snapshot`.
///
/// # Errors
/// [`Error::FailedPrecondition`] for a path that nothing can be mounted at.
pub(super) fn plan(
    image: &ImageConfiguration,
    mounts: &[Mount],
    snapshot: &Path,
) -> Result<Vec<DeclaredVolume>> {
    let declared = image
        .config()
        .as_ref()
        .and_then(|config| config.volumes().clone());
    let mut paths = declared
        .unwrap_or_default()
        .iter()
        .map(|path| {
            clean(path).ok_or_else(|| {
                Error::FailedPrecondition(format!(
                    "image config.Volumes: {path:?} is not a path below the root"
                ))
            })
        })
        .collect::<Result<Vec<PathBuf>>>()?;
    paths.sort();
    paths.dedup();
    paths.retain(|path| {
        let replaced = |mount: &Mount| clean(&mount.container_path).as_ref() == Some(path);
        !mounts.iter().any(replaced)
    });
    let volume = |(index, inside)| DeclaredVolume {
        inside,
        source: snapshot.join("volumes").join(format!("{index}")),
    };
    Ok(paths.into_iter().enumerate().map(volume).collect())
}

/// Absolute and without `.` and doubled slashes; `None` for the root, and where `..` or a NUL byte is in it.
fn clean(path: &str) -> Option<PathBuf> {
    let mut result = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => return None,
            _ => {}
        }
    }
    (!path.contains('\0') && result != Path::new("/")).then_some(result)
}

/// Makes them. The container's snapshot must be there.
///
/// # Errors
/// A path of the image that is no directory; failures of mounting and copying.
pub(super) async fn make(
    node: &Arc<Node>,
    (container, image_id): (&Id, &str),
    bundle: &Path,
    volumes: &[DeclaredVolume],
    steps: &Steps,
) -> Result<()> {
    if volumes.is_empty() {
        return Ok(());
    }
    let (node, key, image_id) = (node.clone(), view_key(container), image_id.to_owned());
    let (view, volumes) = (bundle.join("image"), volumes.to_vec());
    let made = async move {
        let mounts = node.images.prepare_image_mount(&image_id, &key).await?;
        teardown::blocking(move || fill_all(&mounts, &view, &volumes)).await?;
        node.images.release(&key).await?;
        Ok(())
    };
    steps.run(made).await
}

/// Key of the lease of the view that they are filled from.
pub(super) fn view_key(container: &Id) -> String {
    format!("{container}.volumes")
}

fn fill_all(mounts: &[RootfsMount], view: &Path, volumes: &[DeclaredVolume]) -> Result<()> {
    std::fs::create_dir_all(view).map_err(Error::io("create", view))?;
    for one in mounts {
        mount_view(one, view).map_err(|e| Error::io("mount the image at", view)(e.into()))?;
    }
    for volume in volumes {
        fill(view, volume)?;
    }
    for _ in mounts {
        unmount(view, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .map_err(|e| Error::io("unmount", view)(e.into()))?;
    }
    Ok(())
}

fn fill(view: &Path, volume: &DeclaredVolume) -> Result<()> {
    std::fs::create_dir_all(&volume.source).map_err(Error::io("create", &volume.source))?;
    let inside = volume.inside.display().to_string();
    let from = match open_inside(view, &inside, OFlags::RDONLY | OFlags::DIRECTORY) {
        // The image has nothing there; it gets an empty directory.
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => {
            return Err(Error::FailedPrecondition(format!(
                "image config.Volumes: {inside:?} cannot be used as a directory of the image: {error}"
            )));
        }
        Ok(from) => from,
    };
    let copied = rustix::fs::open(&volume.source, DIRECTORY, Mode::empty())
        .and_then(|to| copy_directory(from.as_fd(), to.as_fd(), 0));
    copied.map_err(|e| Error::io("copy the image's content to", &volume.source)(e.into()))
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// Layers have none deeper.
const MAX_DEPTH: usize = 255;

/// Copies what is in a directory, and its own attributes. Both sides go by descriptors and no link is followed.
fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> rustix::io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let (source, copy) = (
                    openat(from, name, DIRECTORY, Mode::empty())?,
                    openat(to, name, DIRECTORY, Mode::empty())?,
                );
                copy_directory(source.as_fd(), copy.as_fd(), depth + 1)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = openat(from, name, flags | OFlags::RDONLY, Mode::empty())?;
                let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let copy = openat(to, name, flags | new, Mode::RUSR | Mode::WUSR)?;
                let (mut source, mut copy) = (File::from(source), File::from(copy));
                io::copy(&mut source, &mut copy)
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
                copy_attributes(source.as_fd(), copy.as_fd(), &stat)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?, to, name)?;
                let (uid, gid) = owner(&stat);
                chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            // A socket without its server is nothing.
            FileType::Socket => {}
            _ => {
                mknodat(to, name, kind, mode(&stat), stat.st_rdev)?;
                let (uid, gid) = owner(&stat);
                chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
                rustix::fs::chmodat(to, name, mode(&stat), AtFlags::empty())?;
            }
        }
    }
    copy_attributes(from, to, &fstat(from)?)
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

/// Owner first: a change of it takes set-user-ID and capabilities away.
fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>, stat: &Stat) -> rustix::io::Result<()> {
    let (uid, gid) = owner(stat);
    fchown(to, uid, gid)?;
    fchmod(to, mode(stat))?;
    copy_xattrs(from, to)?;
    let time = |seconds, nanoseconds| rustix::fs::Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_wrap)] // their types differ between targets
    let times = Timestamps {
        last_access: time(stat.st_atime as i64, stat.st_atime_nsec as i64),
        last_modification: time(stat.st_mtime as i64, stat.st_mtime_nsec as i64),
    };
    futimens(to, &times)
}

/// Those that belong to the file; overlayfs's own (`trusted.`) and a security module's labels do not.
fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> rustix::io::Result<()> {
    // xattr(7): a list, and a value, has at most 64 KiB.
    let mut names = vec![0_u8; 64 << 10];
    let length = match flistxattr(from, &mut names[..]) {
        Err(Errno::NOTSUP) => return Ok(()),
        other => other?,
    };
    let mut value = Vec::new();
    for name in names[..length].split(|byte| *byte == 0) {
        let wanted = name.starts_with(b"user.")
            || name.starts_with(b"system.posix_acl_")
            || name == b"security.capability";
        if !wanted {
            continue;
        }
        value.resize(64 << 10, 0);
        let name = OsStr::from_bytes(name);
        let length = fgetxattr(from, name, &mut value[..])?;
        match fsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            // A file system without user attributes cannot have the image's.
            Err(Errno::NOTSUP) => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::{ConfigBuilder, ImageConfigurationBuilder, RootFsBuilder};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn image(volumes: &[&str]) -> ImageConfiguration {
        let volumes: Vec<String> = volumes.iter().map(ToString::to_string).collect();
        let config = ConfigBuilder::default().volumes(volumes).build().unwrap();
        let rootfs = RootFsBuilder::default()
            .typ("layers")
            .diff_ids(Vec::<String>::new())
            .build()
            .unwrap();
        ImageConfigurationBuilder::default()
            .architecture("amd64")
            .os("linux")
            .rootfs(rootfs)
            .config(config)
            .build()
            .unwrap()
    }

    #[test]
    fn volumes_are_those_that_no_mount_replaces() {
        let mounts = [Mount {
            container_path: "/data/".into(),
            ..Mount::default()
        }];
        let planned = plan(
            &image(&["/var//lib/x", "/data", "cache", "/cache"]),
            &mounts,
            Path::new("/s"),
        );
        let planned = planned.unwrap();
        let paths: Vec<_> = planned
            .iter()
            .map(|v| (v.inside.to_str(), v.source.to_str()))
            .collect();
        assert_eq!(
            paths,
            [
                (Some("/cache"), Some("/s/volumes/0")),
                (Some("/var/lib/x"), Some("/s/volumes/1"))
            ]
        );
        let mount = planned[0].mount(None);
        assert_eq!(
            (
                mount.container_path.as_str(),
                mount.host_path.as_str(),
                mount.readonly
            ),
            ("/cache", "/s/volumes/0", false)
        );
        for bad in ["/", "", "/a/../b"] {
            let error = plan(&image(&[bad]), &[], Path::new("/s"))
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("image config.Volumes: "), "{bad}: {error}");
        }
    }

    #[test]
    fn a_volume_has_what_the_image_has_and_nothing_of_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("image"), dir.path().join("outside"));
        let data = root.join("real/data");
        std::fs::create_dir_all(data.join("sub")).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("secret"), "of the node").unwrap();
        std::fs::write(data.join("sub/file"), "content").unwrap();
        std::fs::set_permissions(data.join("sub/file"), std::fs::Permissions::from_mode(0o4750)).unwrap();
        std::os::unix::fs::chown(data.join("sub/file"), Some(70), Some(71)).unwrap();
        std::os::unix::fs::chown(&data, Some(70), Some(71)).unwrap();
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o1770)).unwrap();
        std::os::unix::fs::chown(data.join("sub/file"), Some(70), Some(71)).unwrap();
        std::fs::set_permissions(data.join("sub/file"), std::fs::Permissions::from_mode(0o4750)).unwrap();
        symlink(&outside, data.join("escape")).unwrap();
        // The way to the volume leads over links, which count from the image's root.
        symlink("/real", root.join("var")).unwrap();
        symlink("../../../../outside", root.join("up")).unwrap();
        std::fs::write(root.join("plain"), "").unwrap();
        let volume = |inside: &str, name: &str| DeclaredVolume {
            inside: inside.into(),
            source: dir.path().join("volumes").join(name),
        };
        let made = volume("/var/data", "0");
        fill(&root, &made).unwrap();
        let copied = std::fs::metadata(&made.source).unwrap();
        assert_eq!(
            (copied.uid(), copied.gid(), copied.mode() & 0o7777),
            (70, 71, 0o1770)
        );
        let file = made.source.join("sub/file");
        let copied = std::fs::metadata(&file).unwrap();
        assert_eq!(
            (copied.uid(), copied.gid(), copied.mode() & 0o7777),
            (70, 71, 0o4750)
        );
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "content");
        assert_eq!(std::fs::read_link(made.source.join("escape")).unwrap(), outside);
        for (inside, name) in [("/none/x", "1"), ("/up", "2")] {
            let empty = volume(inside, name);
            fill(&root, &empty).unwrap();
            assert_eq!(std::fs::read_dir(&empty.source).unwrap().count(), 0, "{inside}");
        }
        let error = fill(&root, &volume("/plain", "3")).unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    }
}
