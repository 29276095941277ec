//! What of the host a pod's guest sees. In `<sandbox bundle>/share/tree` each container has `<id>/rootfs`, where its
//! root file system is mounted here on the host, and `<id>/mounts/<n>`, its volumes. The tree is a mount with shared
//! propagation, so that what is mounted in it later reaches virtiofsd, which has a mount namespace of its own.
//! Everything is in place before the guest looks it up, since a directory that it has seen stays as it was for about
//! a second.
//!
//! The guest is not trusted, and it may mount the whole that virtiofsd serves. That is `<sandbox bundle>/share/view`,
//! which is the tree once more, read-only but for what is mounted in it: so nothing of the guest's lies in the
//! directories that the host resolves, or fills the node's state directory. What the host does below a root file
//! system or volume, which the guest can write, it does by descriptors.

mod beneath;
pub mod mounts;
pub mod oci;
mod virtiofsd;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use catamaran_sandbox::shim_server::backend::RootfsMount;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::SFlag;

pub use virtiofsd::Virtiofsd;

/// Tag of the pod's shared file system, and its device id.
pub const TAG: &str = "catamaran";
/// Where the guest has it.
pub const GUEST_DIRECTORY: &str = "/run/catamaran/share";
/// Directory in the sandbox bundle.
pub const DIRECTORY: &str = "share";
/// What the host mounts into.
const TREE: &str = "tree";
/// What virtiofsd serves.
const VIEW: &str = "view";

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
    /// Makes the tree a mount with shared propagation, and its view; fine when they are there already.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn create(bundle: &Path) -> Result<Self, ShareError> {
        let share = bundle.join(DIRECTORY);
        let (tree, view) = (share.join(TREE), share.join(VIEW));
        for directory in [&tree, &view] {
            std::fs::create_dir_all(directory).map_err(file_failed("make", directory))?;
        }
        let mounted = mounts::below(&share);
        if !mounted.contains(&tree) {
            let none: Option<&str> = None;
            mount(Some(&tree), &tree, none, MsFlags::MS_BIND, none)
                .and_then(|()| mount(none, &tree, none, MsFlags::MS_SHARED, none))
                .map_err(|errno| mount_failed(&tree.to_string_lossy(), &tree)(errno.into()))?;
        }
        if !mounted.contains(&view) {
            beneath::open_directory(&view)
                .and_then(|target| mounts::read_only_view(&tree, &target))
                .map_err(mount_failed(&tree.to_string_lossy(), &view))?;
        }
        Ok(Self { directory: tree })
    }

    /// The tree on the host.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What virtiofsd serves of it.
    #[must_use]
    pub fn view(&self) -> PathBuf {
        self.directory.with_file_name(VIEW)
    }

    fn open(&self) -> Result<OwnedFd, ShareError> {
        beneath::open_directory(&self.directory).map_err(file_failed("open", &self.directory))
    }

    /// Mounts a container's root file system and returns its path in the guest.
    ///
    /// # Errors
    /// [`ShareError`]; what was mounted is for [`Self::remove_container`].
    pub fn mount_rootfs(&self, container: &str, rootfs: &[RootfsMount]) -> Result<String, ShareError> {
        let tree = self.open()?;
        let root = Path::new(container).join("rootfs");
        let path = self.directory.join(&root);
        beneath::make_directories(&tree, &root).map_err(file_failed("make", &path))?;
        for mount in rootfs {
            let below = Path::new(mount.target.trim_start_matches('/'));
            if below
                .components()
                .any(|part| !matches!(part, std::path::Component::Normal(_)))
            {
                return Err(ShareError::Refused(format!(
                    "root file system mount target {:?} leaves it",
                    mount.target
                )));
            }
            // Opened anew each time: what was mounted there before is part of the way.
            beneath::open(&tree, &root.join(below))
                .and_then(|target| {
                    mounts::mount_options(&mount.fs_type, &mount.source, &target, &mount.options)
                })
                .map_err(mount_failed(&mount.source, &path.join(below)))?;
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
        let copy = mounts::copy(source, binding).map_err(file_failed("open", source))?;
        // Of the copy, so that what is looked at is what is mounted.
        let kind = nix::sys::stat::fstat(&copy)
            .map(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT)
            .map_err(|errno| file_failed("open", source)(errno.into()))?;
        let parent = Path::new(container).join("mounts");
        let path = self.directory.join(&parent).join(number.to_string());
        let made = file_failed("make", &path);
        let parent = beneath::make_directories(self.open()?, &parent).map_err(file_failed("make", &path))?;
        let name = number.to_string();
        let target = match kind {
            SFlag::S_IFDIR => beneath::make_directories(&parent, Path::new(&name)).map_err(made)?,
            SFlag::S_IFREG => beneath::make_file(&parent, Path::new(&name)).map_err(made)?,
            _ => {
                return Err(ShareError::Refused(format!(
                    "mount source {} is no file or directory: sockets, pipes and devices of the host cannot be \
                     given to a VM",
                    source.display()
                )));
            }
        };
        mounts::attach(&copy, &target).map_err(mount_failed(&source.to_string_lossy(), &path))?;
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

/// Unmounts all below, and then removes what is left, never by way of a mount: one that is still there would lose
/// its files.
fn remove_tree(directory: &Path) -> Result<(), ShareError> {
    mounts::unmount_below(directory).map_err(file_failed("unmount", directory))?;
    beneath::remove(directory).map_err(file_failed("remove", directory))
}

fn file_failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ShareError + use<> {
    let path = path.to_owned();
    move |source| ShareError::File { action, path, source }
}

fn mount_failed(source_path: &str, target: &Path) -> impl FnOnce(io::Error) -> ShareError + use<> {
    let (source_path, target) = (source_path.to_owned(), target.to_owned());
    move |source| ShareError::Mount {
        source_path,
        target,
        source,
    }
}

/// A connected socket to a new virtiofsd that serves the share's view.
///
/// # Errors
/// [`ShareError::Daemon`].
pub async fn serve(
    share: &Share,
    program: &Path,
    cgroup: &crate::cgroup::Cgroup,
) -> Result<(Virtiofsd, OwnedFd), ShareError> {
    virtiofsd::start(program, &share.view(), cgroup)
        .await
        .map_err(|source| ShareError::Daemon {
            program: program.to_owned(),
            source,
        })
}
