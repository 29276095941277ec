//! What of the host a pod's guest sees: one directory per pod, `<sandbox bundle>/share`, served by virtiofsd. Each
//! container has `share/<id>/rootfs`, where its root file system is mounted here on the host, and
//! `share/<id>/mounts/<n>`, its volumes. The directory is a mount with shared propagation, so that what is mounted
//! below it later reaches virtiofsd, which has a mount namespace of its own. Everything is in place before the
//! guest looks it up, since a directory that it has seen stays as it was for about a second.

pub mod mounts;
pub mod oci;
mod virtiofsd;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use catamaran_sandbox::shim_server::backend::RootfsMount;
use nix::mount::{MsFlags, mount};

pub use virtiofsd::Virtiofsd;

/// Tag of the pod's shared file system, and its device id.
pub const TAG: &str = "catamaran";
/// Where the guest has it.
pub const GUEST_DIRECTORY: &str = "/run/catamaran/share";
/// Directory in the sandbox bundle.
pub const DIRECTORY: &str = "share";

/// A step of showing the host's files to the guest that failed.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A mount.
    #[error("cannot mount {source_path} at {target}")]
    Mount {
        /// What.
        source_path: String,
        /// Where.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file or directory.
    #[error("cannot {action} {path}")]
    File {
        /// "make", "read", …
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// virtiofsd.
    #[error("cannot start {program}")]
    Daemon {
        /// Its path.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A container's config.json asks for what a VM cannot give.
    #[error("{0}")]
    Refused(String),
}

/// A pod's directory.
#[derive(Debug, Clone)]
pub struct Share {
    directory: PathBuf,
}

impl Share {
    /// Makes the directory a mount with shared propagation; fine when it is one already.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn create(bundle: &Path) -> Result<Self, ShareError> {
        let directory = bundle.join(DIRECTORY);
        make_directory(&directory)?;
        if mounts::below(&directory)
            .first()
            .is_none_or(|first| *first != directory)
        {
            let failed = mount_failed(&directory.to_string_lossy(), &directory);
            let none: Option<&str> = None;
            mount(Some(&directory), &directory, none, MsFlags::MS_BIND, none)
                .and_then(|()| mount(none, &directory, none, MsFlags::MS_SHARED, none))
                .map_err(|errno| failed(errno.into()))?;
        }
        Ok(Self { directory })
    }

    /// The directory on the host.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Mounts a container's root file system and returns its path in the guest.
    ///
    /// # Errors
    /// [`ShareError`]; what was mounted is for [`Self::remove_container`].
    pub fn mount_rootfs(&self, container: &str, rootfs: &[RootfsMount]) -> Result<String, ShareError> {
        let root = self.directory.join(container).join("rootfs");
        make_directory(&root)?;
        for mount in rootfs {
            let target = match mount.target.trim_start_matches('/') {
                "" => root.clone(),
                path if Path::new(path)
                    .components()
                    .all(|part| matches!(part, std::path::Component::Normal(_))) =>
                {
                    root.join(path)
                }
                path => {
                    return Err(ShareError::Refused(format!(
                        "root file system mount target {path:?} leaves it"
                    )));
                }
            };
            mounts::mount_options(&mount.fs_type, &mount.source, &target, &mount.options)
                .map_err(mount_failed(&mount.source, &target))?;
        }
        Ok(format!("{GUEST_DIRECTORY}/{container}/rootfs"))
    }

    /// Bind-mounts a file or directory of the host, with what is mounted below it, as the container's `number`th
    /// mount, and returns its path in the guest.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn bind(
        &self,
        container: &str,
        number: usize,
        source: &Path,
        binding: &oci::Binding,
    ) -> Result<String, ShareError> {
        let parent = self.directory.join(container).join("mounts");
        make_directory(&parent)?;
        let target = parent.join(number.to_string());
        let kind = std::fs::metadata(source)
            .map_err(|error| ShareError::File {
                action: "find",
                path: source.to_owned(),
                source: error,
            })?
            .file_type();
        if kind.is_dir() {
            make_directory(&target)?;
        } else if kind.is_file() {
            std::fs::File::create(&target).map_err(|error| ShareError::File {
                action: "make",
                path: target.clone(),
                source: error,
            })?;
        } else {
            return Err(ShareError::Refused(format!(
                "mount source {} is no file or directory: sockets, pipes and devices of the host cannot be \
                 given to a VM",
                source.display()
            )));
        }
        mounts::bind(source, &target, binding).map_err(mount_failed(&source.to_string_lossy(), &target))?;
        Ok(format!("{GUEST_DIRECTORY}/{container}/mounts/{number}"))
    }

    /// Unmounts and removes all of a container's; fine when it is gone.
    ///
    /// # Errors
    /// [`ShareError`] of the last step that failed; the others were done.
    pub fn remove_container(&self, container: &str) -> Result<(), ShareError> {
        remove_tree(&self.directory.join(container))
    }

    /// Unmounts and removes everything; fine when it is gone.
    ///
    /// # Errors
    /// [`ShareError`] of the last step that failed; the others were done.
    pub fn remove(bundle: &Path) -> Result<(), ShareError> {
        remove_tree(&bundle.join(DIRECTORY))
    }
}

/// Unmounts all below, and then removes what is left: empty directories and files that were mount points. It
/// never removes recursively: a mount that is still there would lose its files.
fn remove_tree(directory: &Path) -> Result<(), ShareError> {
    let failed = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| ShareError::File { action, path, source }
    };
    mounts::unmount_below(directory).map_err(failed("unmount", directory))?;
    let metadata = match std::fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed("find", directory))?,
    };
    if metadata.is_dir() {
        remove_mount_points(directory, 0).map_err(failed("remove", directory))
    } else {
        std::fs::remove_file(directory).map_err(failed("remove", directory))
    }
}

/// Levels of the directory's own layout: share, container, mounts, number.
const DEPTH: usize = 4;

/// Two clean-ups may run beside each other, the one after the shim's death and the one of StopPodSandbox: what
/// the other has removed is removed.
fn remove_mount_points(directory: &Path, depth: usize) -> io::Result<()> {
    let Some(entries) = unless_gone(std::fs::read_dir(directory))? else {
        return Ok(());
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let Some(metadata) = unless_gone(std::fs::symlink_metadata(&path))? else {
            continue;
        };
        if metadata.is_dir() {
            if depth >= DEPTH {
                return Err(io::Error::other(format!("{} is not ours", path.display())));
            }
            remove_mount_points(&path, depth + 1)?;
        } else if metadata.len() == 0 {
            unless_gone(std::fs::remove_file(&path))?;
        } else {
            return Err(io::Error::other(format!("{} is not empty", path.display())));
        }
    }
    unless_gone(std::fs::remove_dir(directory)).map(|_| ())
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

fn make_directory(path: &Path) -> Result<(), ShareError> {
    std::fs::create_dir_all(path).map_err(|source| ShareError::File {
        action: "make",
        path: path.to_owned(),
        source,
    })
}

fn mount_failed(source_path: &str, target: &Path) -> impl FnOnce(io::Error) -> ShareError + use<> {
    let (source_path, target) = (source_path.to_owned(), target.to_owned());
    move |source| ShareError::Mount {
        source_path,
        target,
        source,
    }
}

/// A connected socket to a new virtiofsd that serves the share.
///
/// # Errors
/// [`ShareError::Daemon`].
pub async fn serve(
    share: &Share,
    program: &Path,
    cgroup: &crate::cgroup::Cgroup,
) -> Result<(Virtiofsd, OwnedFd), ShareError> {
    virtiofsd::start(program, share.directory(), cgroup)
        .await
        .map_err(|source| ShareError::Daemon {
            program: program.to_owned(),
            source,
        })
}
