//! A cgroup's life: made in every hierarchy, its processes listed and killed, removed.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{CgroupError, Result};
use crate::hierarchy::{Hierarchy, Mounts, relative};

/// A process that was killed leaves its cgroup when it is reaped or a little later.
const REMOVE_LIMIT: Duration = Duration::from_secs(3);
/// A killed process may have to finish a system call first.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// First pause between two looks; doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

impl Hierarchy {
    /// Makes the cgroup and its parents in every hierarchy, usable for processes: on version 1 with cpus and
    /// memory nodes taken from the parent, on version 2 with every available controller switched on for the
    /// parents' children. Idempotent.
    ///
    /// # Errors
    /// [`CgroupError::InvalidPath`], [`CgroupError::Io`].
    pub fn create(&self, path: &str) -> Result<()> {
        let inner = relative(path)?;
        match &self.mounts {
            Mounts::V1 { .. } => {
                for root in self.roots() {
                    for dir in levels(root, inner) {
                        make_dir(&dir)?;
                        take_from_parent(&dir, "cpuset.cpus")?;
                        take_from_parent(&dir, "cpuset.mems")?;
                    }
                }
                Ok(())
            }
            Mounts::V2 { root } => {
                let mut parent = root.clone();
                for dir in levels(root, inner) {
                    make_dir(&dir)?;
                    enable_controllers(&parent)?;
                    parent = dir;
                }
                Ok(())
            }
        }
    }

    /// Whether the cgroup exists in any hierarchy.
    ///
    /// # Errors
    /// [`CgroupError::InvalidPath`].
    pub fn exists(&self, path: &str) -> Result<bool> {
        let inner = relative(path)?;
        Ok(self.all_roots().iter().any(|root| root.join(inner).is_dir()))
    }

    /// Names of the cgroups right below this one in any hierarchy. A cgroup that does not exist has none.
    ///
    /// # Errors
    /// [`CgroupError::InvalidPath`], [`CgroupError::Io`].
    pub fn children(&self, path: &str) -> Result<BTreeSet<String>> {
        let inner = relative(path)?;
        let mut names = BTreeSet::new();
        for root in self.all_roots() {
            let dir = root.join(inner);
            match children(&dir) {
                Ok(below) => names.extend(below.iter().filter_map(|path| {
                    let name = path.file_name()?.to_str()?;
                    Some(name.to_owned())
                })),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(CgroupError::io("list", dir)(error)),
            }
        }
        Ok(names)
    }

    /// Removes the cgroup and those below it in every hierarchy. Kills nothing; waits up to three seconds for
    /// processes that are about to be gone. Idempotent.
    ///
    /// # Errors
    /// [`CgroupError::Busy`] where processes are left; other hierarchies are cleaned nevertheless.
    pub fn remove(&self, path: &str) -> Result<()> {
        let inner = relative(path)?;
        let deadline = Instant::now() + REMOVE_LIMIT;
        let mut first_error = None;
        for root in self.all_roots() {
            if let Err(error) = remove_tree(&root.join(inner), deadline) {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Processes of the cgroup and of those below it, in the daemon's PID namespace. A cgroup that does not
    /// exist has none.
    ///
    /// # Errors
    /// [`CgroupError::InvalidPath`], [`CgroupError::Io`].
    pub fn pids(&self, path: &str) -> Result<Vec<i32>> {
        let inner = relative(path)?;
        let mut pids = Vec::new();
        if let Some(root) = self.roots().first() {
            collect_pids(&root.join(inner), &mut pids)?;
        }
        Ok(pids)
    }

    /// Kills every process of the cgroup and of those below it, also frozen ones and those that fork
    /// meanwhile, and waits until none is left. A cgroup that does not exist has none.
    ///
    /// # Errors
    /// [`CgroupError::Unkillable`] after ten seconds.
    pub fn kill_all(&self, path: &str) -> Result<()> {
        let inner = relative(path)?;
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut round = 0u32;
        loop {
            let pids = self.pids(path)?;
            if pids.is_empty() {
                return Ok(());
            }
            if start.elapsed() > KILL_LIMIT {
                let (path, waited_ms) = (path.to_owned(), start.elapsed().as_millis());
                return Err(CgroupError::Unkillable {
                    path,
                    waited_ms,
                    processes: pids.len(),
                });
            }
            self.kill_once(inner, &pids, round > 0);
            round += 1;
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One round. From the second on, version 1 is frozen meanwhile, so that nothing can fork ahead of it.
    fn kill_once(&self, inner: &Path, pids: &[i32], freeze: bool) {
        let write = |file: &Path, value: &str| std::fs::write(file, value).is_ok();
        match &self.mounts {
            Mounts::V2 { root } => {
                let dir = root.join(inner);
                if !write(&dir.join("cgroup.kill"), "1") {
                    // Before Linux 5.14.
                    signal_all(pids);
                    write(&dir.join("cgroup.freeze"), "0");
                }
            }
            Mounts::V1 { controllers, .. } => {
                let state = controllers
                    .get("freezer")
                    .map(|root| root.join(inner).join("freezer.state"));
                if let Some(state) = state.as_deref().filter(|_| freeze) {
                    write(state, "FROZEN");
                }
                if freeze {
                    let root = self.roots();
                    let mut now = Vec::new();
                    // Those that came since; an error shows in the next look.
                    if root
                        .first()
                        .is_some_and(|root| collect_pids(&root.join(inner), &mut now).is_ok())
                    {
                        signal_all(&now);
                    }
                } else {
                    signal_all(pids);
                }
                if let Some(state) = &state {
                    // Also for a container that was paused: a frozen process does not die.
                    write(state, "THAWED");
                }
            }
        }
    }

    fn all_roots(&self) -> Vec<&Path> {
        let mut roots = self.roots();
        if let Mounts::V1 {
            unified: Some(unified),
            ..
        } = &self.mounts
        {
            roots.push(unified);
        }
        roots
    }
}

/// The directories from below the root down to the cgroup.
fn levels(root: &Path, inner: &Path) -> Vec<PathBuf> {
    let mut dir = root.to_owned();
    inner
        .components()
        .map(|part| {
            dir.push(part);
            dir.clone()
        })
        .collect()
}

fn make_dir(dir: &Path) -> Result<()> {
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(CgroupError::io("create", dir)(error)),
        _ => Ok(()),
    }
}

/// A new version 1 cpuset is empty and takes no process; other controllers do not have the file.
fn take_from_parent(dir: &Path, file: &str) -> Result<()> {
    let own = dir.join(file);
    let Ok(text) = std::fs::read_to_string(&own) else {
        return Ok(());
    };
    let (true, Some(parent)) = (text.trim().is_empty(), dir.parent()) else {
        return Ok(());
    };
    let value = std::fs::read_to_string(parent.join(file))
        .map_err(CgroupError::io("read", parent.join(file)))?
        .trim()
        .to_owned();
    std::fs::write(&own, &value).map_err(|source| CgroupError::Write {
        path: own,
        value,
        source,
    })
}

/// Switches on for a cgroup's children what it has itself. One that cannot be switched on (a realtime
/// process blocks `cpu`) must not keep the others off.
fn enable_controllers(dir: &Path) -> Result<()> {
    let read = |file: &str| {
        let path = dir.join(file);
        std::fs::read_to_string(&path).map_err(CgroupError::io("read", path))
    };
    let (available, enabled) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let missing: Vec<&str> = available
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|on| on == *name))
        .collect();
    let file = dir.join("cgroup.subtree_control");
    if missing.is_empty() {
        return Ok(());
    }
    let all: Vec<String> = missing.iter().map(|name| format!("+{name}")).collect();
    if std::fs::write(&file, all.join(" ")).is_ok() {
        return Ok(());
    }
    for one in all {
        if let Err(error) = std::fs::write(&file, &one) {
            tracing::warn!(cgroup = %dir.display(), controller = %one, %error, "cgroup controller stays off");
        }
    }
    Ok(())
}

/// Directories below; a cgroup's link count is two and one for each, so that a leaf costs one call.
fn children(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    if std::fs::symlink_metadata(dir)?.nlink() == 2 {
        return Ok(Vec::new());
    }
    let mut children = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

fn gone(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

/// Number of processes in the cgroup and below it.
pub(crate) fn count_processes(dir: &Path) -> Result<u64> {
    let mut pids = Vec::new();
    collect_pids(dir, &mut pids)?;
    Ok(pids.len() as u64)
}

fn collect_pids(dir: &Path, pids: &mut Vec<i32>) -> Result<()> {
    let file = dir.join("cgroup.procs");
    match std::fs::read_to_string(&file) {
        Ok(text) => {
            for line in text.lines() {
                let pid = line.trim().parse().map_err(|_| CgroupError::Content {
                    path: file.clone(),
                    content: line.chars().take(40).collect(),
                })?;
                pids.push(pid);
            }
        }
        Err(error) if gone(&error) => return Ok(()),
        // A threaded cgroup of version 2: its processes are listed by its threaded root.
        Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {}
        Err(error) => return Err(CgroupError::io("read", file)(error)),
    }
    match children(dir) {
        Ok(children) => children.iter().try_for_each(|child| collect_pids(child, pids)),
        Err(error) if gone(&error) => Ok(()),
        Err(error) => Err(CgroupError::io("read", dir)(error)),
    }
}

fn signal_all(pids: &[i32]) {
    // 0 stands for a process of another PID namespace; as an argument it would be our own group.
    for pid in pids.iter().filter(|pid| **pid > 1) {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
}

fn remove_tree(dir: &Path, deadline: Instant) -> Result<()> {
    match children(dir) {
        Ok(children) => children
            .iter()
            .try_for_each(|child| remove_tree(child, deadline))?,
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(CgroupError::io("read", dir)(error)),
    }
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if gone(&error) => return Ok(()),
            Err(error) if error.raw_os_error() != Some(Errno::EBUSY as i32) => {
                return Err(CgroupError::io("remove", dir)(error));
            }
            Err(_) if Instant::now() >= deadline => {
                let mut pids = Vec::new();
                collect_pids(dir, &mut pids)?;
                let waited_ms = start.elapsed().as_millis();
                return Err(CgroupError::Busy {
                    path: dir.to_owned(),
                    waited_ms,
                    processes: pids.len(),
                });
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
