//! What the store is told at start, and the values it hands out.

use std::path::PathBuf;
use std::time::Duration;

use crate::platform::Platform;

/// Configuration of the store.
#[derive(Debug, Clone)]
pub struct ImagesConfig {
    /// Directory of content, layers and metadata (`<root>/images`).
    pub root: PathBuf,
    /// Directory of the containers' writable layers (`<root>/snapshots`); on the same file system or another one.
    pub snapshots: PathBuf,
    /// Directories of `<registry>/hosts.toml`, the first that knows the registry wins.
    pub hosts_dirs: Vec<PathBuf>,
    /// Layers downloaded at once for one image.
    pub max_parallel_downloads: usize,
    /// A registry that does not answer for this long, or brings less than 1 KiB/s over it, has stalled.
    pub progress_timeout: Duration,
    /// Credentials in the format of docker's `config.json` (`auths` only), for pulls without any of their own.
    pub docker_config: Option<PathBuf>,
    /// References of images that are reported as pinned (the kubelet never collects them).
    pub pinned: Vec<String>,
    /// Platform chosen from indexes and manifest lists.
    pub platform: Platform,
}

/// Usage of the store's file system (CRI `FilesystemUsage`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsUsage {
    /// Directory by which the file system is known.
    pub mountpoint: PathBuf,
    /// Bytes on disk of layers, manifests, configurations and metadata.
    pub used_bytes: u64,
    /// Inodes of the same.
    pub inodes_used: u64,
    /// When it was measured, nanoseconds since the epoch.
    pub timestamp_ns: i64,
}

/// Usage of one container's writable layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotUsage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Inodes, the layer's own directory included.
    pub inodes: u64,
    /// When it was measured, nanoseconds since the epoch.
    pub timestamp_ns: i64,
}

/// One mount of a root file system, in the terms of mount(8) and the shim's `Task.Create`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsMount {
    /// `overlay` or `bind`.
    pub fs_type: String,
    /// Source; `overlay` for overlays.
    pub source: String,
    /// Mount point below the root file system; empty for the root itself.
    pub target: String,
    /// Mount options.
    pub options: Vec<String>,
}

/// A container's root file system, ready to be mounted by its shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Mounts to make, in order.
    pub mounts: Vec<RootfsMount>,
    /// The writable layer.
    pub upper: PathBuf,
}
