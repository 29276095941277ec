//! The guest's cgroups: one hierarchy mounted at boot (version 2, or version 1 for kernels and command lines
//! that want it), `/pod` with a limit that leaves the agent its reserve, and `/pod/<container id>` below.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use nix::mount::MsFlags;
use oci_spec::runtime::LinuxResources;

use crate::boot::mount_at;
use crate::console;
use crate::error::{Context, Result};

/// Where hierarchies are mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// Parent of all containers' cgroups.
pub(crate) const POD: &str = "/pod";
/// Word of the kernel's command line that selects version 1, for images that need it.
const V1_CMDLINE: &str = "catamaran.cgroup=v1";
/// Available memory that containers cannot take from kernel and agent: this and a 32nd of all memory.
const RESERVE_BYTES: u64 = 16 << 20;
/// Tasks that containers cannot take.
const RESERVE_TASKS: u64 = 256;
/// How long a cgroup's last processes may take to disappear after SIGKILL.
const REMOVE_TRIES: u32 = 200;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// cgroup version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// One directory per controller.
    V1,
    /// The unified hierarchy.
    V2,
}

impl Version {
    /// `v1` or `v2`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// Mounts the hierarchy: version 2 with every controller handed down, where it has the memory controller and
/// the command line does not say otherwise, else version 1.
pub(crate) fn mount(command_line: &str) -> Result<Version> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let wants_v1 = command_line
        .split_ascii_whitespace()
        .any(|word| word == V1_CMDLINE);
    if !wants_v1 && mount_at("cgroup2", ROOT, "cgroup2", flags, Some("nsdelegate")).is_ok() {
        let controllers = fs::read_to_string(format!("{ROOT}/cgroup.controllers")).unwrap_or_default();
        if controllers.split_ascii_whitespace().any(|name| name == "memory") {
            delegate(Path::new(ROOT))?;
            return Ok(Version::V2);
        }
        nix::mount::umount(ROOT).context(|| format!("cannot unmount {ROOT}"))?;
    }
    mount_at("tmpfs", ROOT, "tmpfs", flags, Some("mode=0755"))?;
    let list = fs::read_to_string("/proc/cgroups").context(|| "cannot read /proc/cgroups".into())?;
    for controller in v1_controllers(&list) {
        // One each, also for cpu and cpuacct: libcontainer cannot mount a pair in a container.
        let path = format!("{ROOT}/{controller}");
        if let Err(error) = mount_at("cgroup", &path, "cgroup", flags, Some(controller)) {
            // Newer kernels may be built without the old interface of a controller.
            console::say(&crate::error::chain(&error));
            fs::remove_dir(&path).context(|| format!("cannot remove {path}"))?;
            continue;
        }
        if controller == "memory" {
            write_if_present(&Path::new(ROOT).join("memory/memory.use_hierarchy"), "1");
        }
    }
    Ok(Version::V1)
}

/// Enabled controllers of `/proc/cgroups`.
fn v1_controllers(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let name = fields.next()?;
            (fields.nth(2)? == "1").then_some(name)
        })
}

/// Makes `/pod` with its limits. Of `available` memory, what kernel and agent have taken is off already.
pub(crate) fn make_pod(version: Version, memory_bytes: u64, available: u64) -> Result<()> {
    let memory = available.saturating_sub(RESERVE_BYTES + memory_bytes / 32);
    let tasks = max_tasks().saturating_sub(RESERVE_TASKS).max(RESERVE_TASKS);
    for directory in directories(version, POD) {
        fs::create_dir_all(&directory).context(|| format!("cannot make cgroup {}", directory.display()))?;
        match version {
            Version::V2 => {
                delegate(&directory)?;
                write_if_present(&directory.join("memory.max"), &memory.to_string());
                write_if_present(&directory.join("pids.max"), &tasks.to_string());
            }
            Version::V1 => {
                write_if_present(&directory.join("memory.limit_in_bytes"), &memory.to_string());
                write_if_present(&directory.join("pids.max"), &tasks.to_string());
                // A new cpuset is empty and takes no process until it is filled.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    let parent = Path::new(ROOT).join("cpuset").join(file);
                    if directory.join(file).exists() {
                        let all = fs::read_to_string(&parent)
                            .context(|| format!("cannot read {}", parent.display()))?;
                        write_if_present(&directory.join(file), all.trim());
                    }
                }
            }
        }
    }
    Ok(())
}

fn max_tasks() -> u64 {
    ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
        .min()
        .unwrap_or(4096)
}

/// Hands every controller of a v2 cgroup to its children.
fn delegate(directory: &Path) -> Result<()> {
    let controllers = fs::read_to_string(directory.join("cgroup.controllers"))
        .context(|| format!("cannot read controllers of {}", directory.display()))?;
    for controller in controllers.split_ascii_whitespace() {
        // One by one: a controller that cannot be had (cpu with realtime tasks) does not cost the others.
        if let Err(error) = fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}")) {
            console::say(&format!("cgroup controller {controller} not delegated: {error}"));
        }
    }
    Ok(())
}

fn write_if_present(path: &Path, value: &str) {
    if path.exists()
        && let Err(error) = fs::write(path, value)
    {
        console::say(&format!("cannot write {value} to {}: {error}", path.display()));
    }
}

/// Path of a container's cgroup below the hierarchy, as `linux.cgroupsPath`.
pub(crate) fn container_path(container_id: &str) -> String {
    format!("{POD}/{container_id}")
}

/// Directories of a cgroup: one in version 2, one per controller in version 1.
pub(crate) fn directories(version: Version, path: &str) -> Vec<PathBuf> {
    let relative = path.trim_start_matches('/');
    match version {
        Version::V2 => vec![Path::new(ROOT).join(relative)],
        Version::V1 => {
            let mut directories: Vec<PathBuf> = fs::read_dir(ROOT)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path().join(relative))
                .collect();
            directories.sort();
            directories
        }
    }
}

/// Moves the calling process into a container's cgroup.
pub(crate) fn join(version: Version, path: &str) -> Result<()> {
    for directory in directories(version, path) {
        let file = directory.join("cgroup.procs");
        match fs::write(&file, "0") {
            // A v1 controller that the container does not have.
            Err(error) if error.kind() == io::ErrorKind::NotFound && version == Version::V1 => {}
            result => result.context(|| format!("cannot join cgroup {}", directory.display()))?,
        }
    }
    Ok(())
}

/// Process ids in a cgroup and below it.
pub(crate) fn pids(version: Version, path: &str) -> Vec<i32> {
    let Some(directory) = directories(version, path)
        .into_iter()
        .find(|directory| directory.is_dir())
    else {
        return Vec::new();
    };
    let mut pids = Vec::new();
    let mut pending = vec![directory];
    while let Some(directory) = pending.pop() {
        let list = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        pids.extend(
            list.lines()
                .filter_map(|line| line.parse::<i32>().ok())
                .filter(|pid| *pid > 0),
        );
        pending.extend(children(&directory));
    }
    pids
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Sends a signal to every process of a cgroup. SIGKILL reaches also those that fork meanwhile.
pub(crate) fn signal_all(version: Version, path: &str, signal: i32) {
    let send = |pids: &[i32]| {
        for pid in pids {
            // SAFETY: kill has no memory effects; the pids are of a container's cgroup.
            unsafe { libc::kill(*pid, signal) };
        }
    };
    if signal != libc::SIGKILL {
        send(&pids(version, path));
        return;
    }
    if version == Version::V2
        && directories(version, path)
            .iter()
            .all(|dir| fs::write(dir.join("cgroup.kill"), "1").is_ok())
    {
        return;
    }
    // Older kernels: until nobody new appears, a bounded number of times.
    for _ in 0..50 {
        let pids = pids(version, path);
        if pids.is_empty() {
            return;
        }
        send(&pids);
        std::thread::yield_now();
    }
}

/// Kills what is left in a cgroup and removes it with everything below; nothing to do when it is gone.
pub(crate) async fn remove(version: Version, path: &str) -> Result<()> {
    let mut last = None;
    for _ in 0..REMOVE_TRIES {
        signal_all(version, path, libc::SIGKILL);
        last = directories(version, path)
            .iter()
            .filter_map(|directory| remove_tree(directory).err())
            .next();
        if last.is_none() {
            return Ok(());
        }
        tokio::time::sleep(REMOVE_PAUSE).await;
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::ResourceBusy.into()))
        .context(|| format!("cannot remove cgroup {path}"))
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for child in children(directory) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// How many processes of the cgroup the kernel's OOM killer ended.
pub(crate) fn oom_kills(version: Version, path: &str) -> u64 {
    let file = match version {
        Version::V2 => format!("{ROOT}{path}/memory.events"),
        Version::V1 => format!("{ROOT}/memory{path}/memory.oom_control"),
    };
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or(0)
}

/// Changes the limits of a container.
pub(crate) fn update(container_id: &str, resources: &LinuxResources) -> Result<()> {
    let manager = create_cgroup_manager(CgroupConfig {
        cgroup_path: PathBuf::from(container_path(container_id)),
        systemd_cgroup: false,
        container_name: container_id.to_owned(),
    })
    .context(|| format!("cannot open the cgroup of container {container_id}"))?;
    manager
        .apply(&ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        })
        .context(|| format!("cannot change the resources of container {container_id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_enabled_v1_controllers_are_mounted() {
        let list = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpuset\t0\t1\t1\nmemory\t0\t1\t0\npids\t0\t1\t1\n";
        assert_eq!(v1_controllers(list).collect::<Vec<_>>(), ["cpuset", "pids"]);
    }

    #[test]
    fn a_container_is_below_the_pod() {
        assert_eq!(
            directories(Version::V2, &container_path("abc")),
            [PathBuf::from("/sys/fs/cgroup/pod/abc")]
        );
    }
}
