//! Pinned network namespaces: one empty file for each sandbox, with the namespace mounted on it.
//!
//! The pin is a plain bind mount in the daemon's mount namespace, which plugins and shims share. Where the
//! root is a shared mount (systemd makes it so) pins and their removal also reach other mount namespaces;
//! where it is not, a mount namespace that copied a pin keeps the network namespace until it ends. No mount
//! of our own is put under the directory.
//!
//! A namespace is complete before it is pinned, so a pin that exists is good; a file without a mount is what
//! a crash left.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{FsType, statfs};

use crate::conflist::{checked_id, good_name};
use crate::error::{NetworkError, Result};
use crate::netlink;

const NSFS: FsType = FsType(0x6e73_6673);

/// See [`crate::Network::create_netns`].
pub(crate) async fn create(dir: &Path, id: &str) -> Result<PathBuf> {
    let path = dir.join(checked_id(id)?);
    let (dir, pin) = (dir.to_owned(), path.clone());
    // A thread that has left the host's namespace must not be used again.
    in_own_thread(move || {
        if is_pinned(&pin) {
            return Ok(());
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&dir)
            .map_err(NetworkError::io("create", &dir))?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&pin)
            .map_err(NetworkError::io("create", &pin))?;
        let outcome = fresh_namespace_at(&pin);
        if outcome.is_err() {
            // Nobody else uses the name: the sandbox's owner creates and removes in turn.
            let _ = std::fs::remove_file(&pin);
        }
        outcome
    })
    .await?;
    Ok(path)
}

/// See [`crate::Network::remove_netns`].
pub(crate) async fn remove(dir: &Path, id: &str) -> Result<()> {
    let path = dir.join(checked_id(id)?);
    in_own_thread(move || {
        // A crash between two creations may have stacked mounts. Lazily, as a shim may have the pin open.
        loop {
            match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => return Err(failure("unpin", &path)(errno)),
            }
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(NetworkError::io("remove", path)(error))
            }
            _ => Ok(()),
        }
    })
    .await
}

/// See [`crate::Network::netns_list`].
pub(crate) fn list(dir: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetworkError::io("read", dir)(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(NetworkError::io("read", dir))?.file_name();
        ids.extend(name.into_string().ok().filter(|name| good_name(name)));
    }
    ids.sort();
    Ok(ids)
}

/// Whether a namespace is mounted on the path.
pub(crate) fn is_pinned(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS)
}

fn fresh_namespace_at(pin: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(failure("create", pin))?;
    netlink::raise_loopback().map_err(|source| NetworkError::Netns {
        what: "raise the loopback interface in",
        path: pin.to_owned(),
        source,
    })?;
    mount(
        Some("/proc/thread-self/ns/net"),
        pin,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(failure("pin", pin))
}

fn failure(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> NetworkError {
    let path = path.to_owned();
    move |errno| NetworkError::Netns {
        what,
        path,
        source: errno.into(),
    }
}

async fn in_own_thread(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let (done, outcome) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".to_owned())
        // The receiver is gone when the request was dropped.
        .spawn(move || drop(done.send(work())))
        .map_err(NetworkError::io("start a thread for", "/proc/self/ns/net"))?;
    outcome.await.unwrap_or_else(|_| {
        Err(NetworkError::io("end the thread for", "/proc/self/ns/net")(
            io::Error::other("it panicked"),
        ))
    })
}

/// Runs `work` in a thread inside the namespace pinned at `path`.
#[cfg(test)]
pub(crate) fn inside<T: Send + 'static>(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let pin = std::fs::File::open(path).unwrap();
    std::thread::spawn(move || {
        nix::sched::setns(pin, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
    .join()
    .unwrap()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_namespace_is_made_once_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let pins = dir.path().join("netns");
        assert!(list(&pins).unwrap().is_empty());
        let path = create(&pins, "pod1").await.unwrap();
        assert!(is_pinned(&path));
        let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
        let first = inode(&path);
        assert_eq!(create(&pins, "pod1").await.unwrap(), path);
        assert_eq!(inode(&path), first);
        assert_eq!(list(&pins).unwrap(), ["pod1"]);
        let echoed = inside(&path, || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            std::net::TcpStream::connect(listener.local_addr().unwrap()).is_ok()
        });
        assert!(echoed, "loopback carries traffic");
        remove(&pins, "pod1").await.unwrap();
        remove(&pins, "pod1").await.unwrap();
        assert!(list(&pins).unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_a_crash_left_is_taken_over_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pod1"), "").unwrap();
        assert_eq!(list(dir.path()).unwrap(), ["pod1"]);
        let path = create(dir.path(), "pod1").await.unwrap();
        assert!(is_pinned(&path));
        remove(dir.path(), "pod1").await.unwrap();
        std::fs::write(dir.path().join("pod2"), "").unwrap();
        remove(dir.path(), "pod2").await.unwrap();
        assert!(list(dir.path()).unwrap().is_empty());
        assert!(create(dir.path(), "../x").await.is_err());
    }
}
