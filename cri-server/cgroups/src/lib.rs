//! Control groups for the daemon: paths, creation, limits of pods, killing, removal and statistics, on
//! version 1 (also hybrid) and version 2; and the interface counters of a pod's network namespace, which are
//! read the same way.
//!
//! Everything here blocks on the kernel's own files for micro- to milliseconds ([`remove`] and [`kill_all`]
//! for longer): callers on an async runtime use its blocking threads.
//!
//! Paths are as OCI's `cgroupsPath` for the cgroupfs driver has them: absolute, below the mount of each
//! hierarchy. [`systemd`] makes such paths from slices.
//!
//! The free functions work on the host's hierarchy; [`Hierarchy`] has the same as methods, and tests give it
//! other roots.

mod error;
mod hierarchy;
mod lifecycle;
mod network;
mod parse;
mod resources;
mod stats;
mod stats_v1;
mod stats_v2;
pub mod systemd;

use std::collections::BTreeSet;

pub use error::{CgroupError, Result};
pub use hierarchy::{CgroupVersion, Hierarchy};
pub use network::{InterfaceStats, network_stats, network_stats_all};
pub use resources::Resources;
pub use stats::{CgroupStats, CpuStats, Detail, IoDevice, IoStats, MemoryStats, PidsStats, Pressure, Stall};

/// Which version this host has. A hybrid host, where version 1 has the controllers, is version 1.
///
/// # Errors
/// [`CgroupError::NotMounted`].
pub fn detect() -> Result<CgroupVersion> {
    Ok(Hierarchy::host()?.version())
}

/// As [`Hierarchy::create`], on the host.
///
/// # Errors
/// As there.
pub fn create(path: &str) -> Result<()> {
    Hierarchy::host()?.create(path)
}

/// As [`Hierarchy::remove`], on the host.
///
/// # Errors
/// As there.
pub fn remove(path: &str) -> Result<()> {
    Hierarchy::host()?.remove(path)
}

/// As [`Hierarchy::kill_all`], on the host.
///
/// # Errors
/// As there.
pub fn kill_all(path: &str) -> Result<()> {
    Hierarchy::host()?.kill_all(path)
}

/// As [`Hierarchy::exists`], on the host.
///
/// # Errors
/// As there.
pub fn exists(path: &str) -> Result<bool> {
    Hierarchy::host()?.exists(path)
}

/// As [`Hierarchy::children`], on the host.
///
/// # Errors
/// As there.
pub fn children(path: &str) -> Result<BTreeSet<String>> {
    Hierarchy::host()?.children(path)
}

/// As [`Hierarchy::pids`], on the host.
///
/// # Errors
/// As there.
pub fn pids(path: &str) -> Result<Vec<i32>> {
    Hierarchy::host()?.pids(path)
}

/// As [`Hierarchy::set`], on the host.
///
/// # Errors
/// As there.
pub fn set(path: &str, resources: &Resources) -> Result<()> {
    Hierarchy::host()?.set(path, resources)
}

/// As [`Hierarchy::stats`] with [`Detail::Usage`], on the host: what the CRI lists of a container.
///
/// # Errors
/// As there.
pub fn container_stats(path: &str) -> Result<CgroupStats> {
    Hierarchy::host()?.stats(path, Detail::Usage)
}

/// As [`Hierarchy::stats`] with [`Detail::Processes`], on the host: what the CRI lists of a pod. All counters
/// include the cgroups below the pod's.
///
/// # Errors
/// As there.
pub fn pod_stats(path: &str) -> Result<CgroupStats> {
    Hierarchy::host()?.stats(path, Detail::Processes)
}

/// As [`Hierarchy::stats`] with [`Detail::Full`], on the host: for metrics, of a pod or a container.
///
/// # Errors
/// As there.
pub fn full_stats(path: &str) -> Result<CgroupStats> {
    Hierarchy::host()?.stats(path, Detail::Full)
}
