//! What a cgroup has used, in one form for both versions, and the reading of its files: each once.

use std::cell::RefCell;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;

use crate::error::{CgroupError, Result};
use crate::hierarchy::{Hierarchy, Mounts, relative};
use crate::{stats_v1, stats_v2};

/// How many files to read: each costs about ten microseconds, so that a list of a hundred containers is a
/// matter of which files it does without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// What the CRI's ContainerStats has: CPU time, use and limit of memory and swap, page faults, pressure.
    /// Fields that say they need [`Detail::Full`] are then zero, `None` or empty.
    Usage,
    /// Also processes and threads, as in PodSandboxStats.
    Processes,
    /// Everything, for metrics.
    Full,
}

/// Use of resources by a cgroup and all below it. A part is `None` where the host lacks its controller.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CgroupStats {
    /// When it was read, nanoseconds since the epoch.
    pub timestamp_ns: i64,
    /// Processor time.
    pub cpu: Option<CpuStats>,
    /// Memory.
    pub memory: Option<MemoryStats>,
    /// Processes and threads; not with [`Detail::Usage`].
    pub pids: Option<PidsStats>,
    /// Block devices.
    pub io: Option<IoStats>,
}

/// Processor time, all in nanoseconds since the cgroup was made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CpuStats {
    /// All of it.
    pub usage_ns: u64,
    /// In user mode; needs [`Detail::Full`], as all of what follows but `pressure`.
    pub user_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// Enforcement intervals of the quota that have passed.
    pub periods: u64,
    /// Those in which it was throttled.
    pub throttled_periods: u64,
    /// Time for which it was throttled.
    pub throttled_ns: u64,
    /// Stalls; version 2 only.
    pub pressure: Option<Pressure>,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryStats {
    /// With page cache.
    pub usage: u64,
    /// Usage without inactive file pages, as kubelet defines it.
    pub working_set: u64,
    /// Anonymous pages and swap cache.
    pub rss: u64,
    /// File pages.
    pub cache: u64,
    /// Mapped file pages.
    pub mapped_file: u64,
    /// Kernel memory; needs [`Detail::Full`].
    pub kernel: u64,
    /// The cgroup's own limit; `None`: none.
    pub limit: Option<u64>,
    /// Limit less working set; `None` without a limit.
    pub available: Option<u64>,
    /// Swap in use.
    pub swap_usage: u64,
    /// Limit of swap alone; `None`: none, or the host does not account for swap.
    pub swap_limit: Option<u64>,
    /// Greatest usage so far; needs [`Detail::Full`]. `None` on version 2 before Linux 5.19.
    pub max_usage: Option<u64>,
    /// How often the limit was hit; needs [`Detail::Full`].
    pub limit_hits: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Those that had to read a device.
    pub major_page_faults: u64,
    /// Processes that the kernel killed for want of memory; needs [`Detail::Full`].
    pub oom_kills: u64,
    /// Stalls; version 2 only.
    pub pressure: Option<Pressure>,
}

/// Processes and threads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// Processes.
    pub processes: u64,
    /// Threads, also the first one of each process.
    pub threads: u64,
    /// Limit of threads; `None`: none.
    pub limit: Option<u64>,
}

/// Block devices.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct IoStats {
    /// Those that were used; needs [`Detail::Full`].
    pub devices: Vec<IoDevice>,
    /// Stalls; version 2 only.
    pub pressure: Option<Pressure>,
}

/// Use of one block device since the cgroup was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoDevice {
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Requests to read.
    pub read_operations: u64,
    /// Requests to write.
    pub write_operations: u64,
}

/// Pressure stall information (psi.rst, CRI PsiStats).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: Stall,
    /// All tasks waited.
    pub full: Stall,
}

/// One line of pressure stall information.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stall {
    /// Share of the last 10 seconds, in percent.
    pub avg10: f64,
    /// Share of the last 60 seconds, in percent.
    pub avg60: f64,
    /// Share of the last 300 seconds, in percent.
    pub avg300: f64,
    /// All stall time, in microseconds.
    pub total_us: u64,
}

impl IoStats {
    /// Sums over the devices: bytes read, bytes written, requests to read, requests to write.
    #[must_use]
    pub fn totals(&self) -> (u64, u64, u64, u64) {
        self.devices.iter().fold((0, 0, 0, 0), |(a, b, c, d), io| {
            (
                a.saturating_add(io.read_bytes),
                b.saturating_add(io.write_bytes),
                c.saturating_add(io.read_operations),
                d.saturating_add(io.write_operations),
            )
        })
    }
}

impl MemoryStats {
    /// Fills in what follows from usage, inactive file pages and limit.
    pub(crate) fn derive(&mut self, inactive_file: u64) {
        self.working_set = self.usage.saturating_sub(inactive_file);
        self.available = self.limit.map(|limit| limit.saturating_sub(self.working_set));
    }
}

impl Hierarchy {
    /// What the cgroup and those below it have used. Each file that `detail` needs is read once
    /// and no process is started.
    ///
    /// # Errors
    /// [`CgroupError::NotFound`], also where the cgroup goes away meanwhile.
    pub fn stats(&self, path: &str, detail: Detail) -> Result<CgroupStats> {
        let inner = relative(path)?;
        let mut stats = match &self.mounts {
            Mounts::V1 { controllers, .. } => stats_v1::read(detail, |controller, file| {
                let root = controllers.get(controller)?;
                Some(root.join(inner).join(file))
            })?,
            Mounts::V2 { root } => stats_v2::read(detail, &root.join(inner))?,
        };
        if stats.cpu.is_none() && stats.memory.is_none() && stats.pids.is_none() && !self.exists(path)? {
            return Err(CgroupError::NotFound(path.to_owned()));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        stats.timestamp_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        Ok(stats)
    }
}

thread_local! {
    /// One buffer serves all reads of a thread; `memory.stat`, the longest, has about 2 KiB.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; 16 * 1024]);
}

/// Reads a file and gives its text to `parse`. `None`: this kernel or hierarchy does not have the file, or
/// the cgroup has gone.
pub(crate) fn read_file<T>(path: &Path, parse: impl FnOnce(&str) -> T) -> Result<Option<T>> {
    BUFFER.with_borrow_mut(
        |buffer| match File::open(path).and_then(|file| read_whole(file, buffer)) {
            Ok(length) => Ok(Some(parse(&String::from_utf8_lossy(&buffer[..length])))),
            Err(error) if absent(&error) => Ok(None),
            Err(error) => Err(CgroupError::io("read", path)(error)),
        },
    )
}

/// The kernel makes the whole content of such a file for one read, so a read that does not fill the buffer
/// was the last: no second one to see the end, and none of the calls by which std guesses the size.
fn read_whole(mut file: File, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut length = 0;
    loop {
        length += file.read(&mut buffer[length..])?;
        if length < buffer.len() {
            return Ok(length);
        }
        buffer.resize(buffer.len() * 2, 0);
    }
}

/// As [`read_file`] for content that must be understood.
pub(crate) fn read_value<T>(path: PathBuf, parse: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>> {
    let outcome = read_file(&path, |text| {
        parse(text).ok_or_else(|| text.chars().take(80).collect())
    })?;
    outcome
        .transpose()
        .map_err(|content: String| CgroupError::Content { path, content })
}

/// No such file; the cgroup was removed while open; or, for pressure files, switched off at boot.
fn absent(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
        || [Errno::ENODEV, Errno::EOPNOTSUPP]
            .iter()
            .any(|errno| error.raw_os_error() == Some(*errno as i32))
}
