//! What can go wrong with a cgroup.

use std::path::PathBuf;

/// Shorthand.
pub type Result<T, E = CgroupError> = std::result::Result<T, E>;

/// A failure, with the path it is about.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup file system.
    #[error("no cgroup file system is mounted: mount cgroup2 on /sys/fs/cgroup")]
    NotMounted,

    /// The path is not below the root or could leave it.
    #[error("{0:?} is no cgroup path: an absolute path without . and .. is expected, not the root")]
    InvalidPath(String),

    /// The name is no systemd slice.
    #[error("{0:?} is no systemd slice: a name like kubepods-pod1.slice is expected")]
    InvalidSlice(String),

    /// There is no such cgroup.
    #[error("cgroup {0} does not exist")]
    NotFound(String),

    /// Processes are left in it.
    #[error(
        "cgroup {path} cannot be removed: it is still in use after {waited_ms} ms ({processes} processes)"
    )]
    Busy {
        /// The directory.
        path: PathBuf,
        /// How long it was tried.
        waited_ms: u128,
        /// Processes found in it.
        processes: usize,
    },

    /// Processes that SIGKILL did not end in time; they sit in the kernel.
    #[error("{processes} processes of cgroup {path} did not end within {waited_ms} ms of SIGKILL")]
    Unkillable {
        /// The cgroup.
        path: String,
        /// How long it was waited.
        waited_ms: u128,
        /// How many.
        processes: usize,
    },

    /// A limit that this host has no controller or no file for.
    #[error("cgroup {path}: {file} cannot be set, this host does not have it")]
    Unsupported {
        /// The cgroup.
        path: String,
        /// The file.
        file: String,
    },

    /// The kernel refused a limit.
    #[error("cannot write {value:?} to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// Why.
        source: std::io::Error,
    },

    /// A file of the kernel has a content that this program does not know.
    #[error("{path} has unexpected content: {content:?}")]
    Content {
        /// The file.
        path: PathBuf,
        /// Its start.
        content: String,
    },

    /// Another failure of the file system.
    #[error("cannot {what} {path}")]
    Io {
        /// `read`, `create`, …
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl CgroupError {
    /// For `map_err`.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
