//! From the kernel's `execve("/init")` to a guest that can run containers: mounts, a root that `pivot_root`
//! can leave, modules, cgroups with a reserve for the agent.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use crate::cgroup::{self, Version};
use crate::error::{Context, Result};
use crate::{console, modules};

/// The prepared guest.
pub(crate) struct Guest {
    /// cgroup hierarchy in use.
    pub(crate) cgroups: Version,
    /// Kernel command line.
    pub(crate) command_line: String,
    /// `MemTotal`, bytes.
    pub(crate) memory_bytes: u64,
    /// Online CPUs.
    pub(crate) cpus: u32,
}

/// Directory of everything that changes; the root itself is read-only.
pub(crate) const STATE: &str = "/run/catamaran";

/// Prepares the guest.
pub(crate) fn prepare() -> std::result::Result<Guest, Box<dyn std::error::Error + Send + Sync>> {
    Ok(prepare_guest()?)
}

fn prepare_guest() -> Result<Guest> {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    // The mounts of the new root are made before moving it, so that nothing is mounted twice.
    leave_rootfs()?;
    mount_at("proc", "/proc", "proc", quiet, None)?;
    mount_at("sysfs", "/sys", "sysfs", quiet, None)?;
    mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        Some("mode=0755"),
    )?;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("ptmxmode=0666,mode=0620,gid=5"),
    )?;
    mount_at("tmpfs", "/dev/shm", "tmpfs", quiet, Some("mode=1777"))?;
    mount_at(
        "tmpfs",
        "/run",
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755"),
    )?;
    mount_at(
        "tmpfs",
        "/tmp",
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=1777"),
    )?;
    make_dir(STATE, 0o700)?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).context(|| format!("cannot link {link}"));
            }
            _ => {}
        }
    }
    modules::load().context(|| format!("cannot read {}", modules::LOAD_ORDER))?;
    protect_agent();
    raise_limits();
    let command_line = fs::read_to_string("/proc/cmdline").context(|| "cannot read /proc/cmdline".into())?;
    let memory_bytes = memory("MemTotal:")?;
    let cgroups = cgroup::mount(&command_line)?;
    cgroup::make_pod(cgroups, memory_bytes, memory("MemAvailable:")?)?;
    // The agent's own executable must not be writable through a container's view of /proc/<pid>/exe.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .context(|| "cannot make the root read-only".into())?;
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(1));
    Ok(Guest {
        cgroups,
        command_line,
        memory_bytes,
        cpus,
    })
}

/// `pivot_root` refuses to leave the kernel's first root file system. A bind mount of it over itself is an
/// ordinary mount with the same content, without copying a byte.
fn leave_rootfs() -> Result<()> {
    for directory in ["/newroot", "/proc", "/sys", "/dev", "/run", "/tmp"] {
        make_dir(directory, 0o755)?;
    }
    mount(
        Some("/"),
        "/newroot",
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .context(|| "cannot bind the root".into())?;
    nix::unistd::chdir("/newroot").context(|| "cannot enter the new root".into())?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context(|| "cannot move the root".into())?;
    nix::unistd::chroot(".").context(|| "cannot enter the new root".into())?;
    nix::unistd::chdir("/").context(|| "cannot enter the new root".into())
}

/// Makes the directory if needed and mounts a file system of the kernel's there. devtmpfs may be mounted
/// by the kernel already.
pub(crate) fn mount_at(
    source: &str,
    target: &str,
    fstype: &str,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<()> {
    make_dir(target, 0o755)?;
    mount(Some(source), target, Some(fstype), flags, data)
        .context(|| format!("cannot mount {fstype} at {target}"))
}

fn make_dir(path: &str, mode: u32) -> Result<()> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .context(|| format!("cannot make {path}"))
}

/// The kernel's OOM killer takes containers first.
fn protect_agent() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        console::say(&format!("cannot lower oom_score_adj: {error}"));
    }
}

/// Containers inherit the agent's limits where their spec sets none; as under a node's service manager.
fn raise_limits() {
    for (limit, value) in [
        (Resource::RLIMIT_NOFILE, 1 << 20),
        (Resource::RLIMIT_NPROC, RLIM_INFINITY),
    ] {
        if let Err(error) = setrlimit(limit, value, value) {
            console::say(&format!("cannot raise {limit:?}: {error}"));
        }
    }
}

/// A field of `/proc/meminfo`, bytes.
fn memory(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context(|| "cannot read /proc/meminfo".into())?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix(field)?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .map(|kib| kib * 1024)
        .ok_or_else(|| format!("no {field}"))
        .context(|| "cannot read /proc/meminfo".into())
}
