//! The directory that a container's first process starts in is made where it is missing, as runc does it;
//! libcontainer only changes into it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};
use oci_spec::runtime::Spec;

use crate::error::{Context, Result};

/// Makes the working directory in the root file system, or in the volume that will be mounted over its place.
/// Links are not followed: what lies behind one is left as it is.
pub(crate) fn make(spec: &Spec) -> Result<()> {
    let (Some(root), Some(process)) = (spec.root(), spec.process()) else {
        return Ok(());
    };
    let Some((base, below)) = place(spec, root.path(), process.cwd()) else {
        return Ok(());
    };
    create(&base, &below).context(|| format!("cannot make the working directory {}", process.cwd().display()))
}

/// The directory that will hold the working directory, and the way from there; `None` where it will be in a
/// file system that the container mounts itself, or in one that is read-only.
fn place(spec: &Spec, root: &Path, directory: &Path) -> Option<(PathBuf, PathBuf)> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let over = mounts
        .iter()
        .filter(|mount| directory.starts_with(mount.destination()) && mount.destination() != Path::new("/"))
        .max_by_key(|mount| mount.destination().components().count());
    let Some(mount) = over else {
        return Some((root.to_owned(), directory.strip_prefix("/").ok()?.to_owned()));
    };
    let options = mount.options().as_deref().unwrap_or_default();
    let bind = options.iter().any(|option| option == "bind" || option == "rbind");
    if !bind || options.iter().any(|option| option == "ro") {
        return None;
    }
    let below = directory.strip_prefix(mount.destination()).ok()?;
    Some((mount.source().clone()?, below.to_owned()))
}

fn create(base: &Path, below: &Path) -> nix::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at: OwnedFd = nix::fcntl::open(base, flags, Mode::empty())?;
    for part in below.components() {
        let Component::Normal(name) = part else {
            return Ok(());
        };
        at = match openat(&at, name, flags, Mode::empty()) {
            Ok(next) => next,
            Err(Errno::ENOENT) => {
                mkdirat(&at, name, Mode::from_bits_truncate(0o755))?;
                openat(&at, name, flags, Mode::empty())?
            }
            // A link or a file: the change of directory says what is wrong with it, if anything is.
            Err(Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
            Err(error) => return Err(error),
        };
    }
    drop(File::from(at));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(root: &Path, directory: &str, mounts: serde_json::Value) -> Spec {
        serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2", "root": {"path": root}, "mounts": mounts,
            "process": {"args": ["sh"], "cwd": directory, "user": {"uid": 0, "gid": 0}},
        }))
        .unwrap()
    }

    #[test]
    fn it_is_made_in_the_root_and_links_are_left() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        make(&spec(root.path(), "/a/b", serde_json::json!([]))).unwrap();
        assert!(root.path().join("a/b").is_dir());
        make(&spec(root.path(), "/a/b", serde_json::json!([]))).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        make(&spec(root.path(), "/link/x", serde_json::json!([]))).unwrap();
        assert!(!outside.path().join("x").exists(), "a link was followed");
    }

    #[test]
    fn it_is_made_in_the_volume_that_covers_it() {
        let (root, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mount = |options: serde_json::Value| serde_json::json!([{"destination": "/data", "type": "bind", "source": volume.path(), "options": options}]);
        make(&spec(
            root.path(),
            "/data/read-only",
            mount(serde_json::json!(["rbind", "ro"])),
        ))
        .unwrap();
        assert!(!volume.path().join("read-only").exists());
        make(&spec(
            root.path(),
            "/data/sub/dir",
            mount(serde_json::json!(["rbind", "rw"])),
        ))
        .unwrap();
        assert!(volume.path().join("sub/dir").is_dir());
        assert!(!root.path().join("data").exists());
    }
}
