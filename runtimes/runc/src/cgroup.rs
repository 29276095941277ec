//! A container's cgroup, found by its first process, in whichever version each controller is mounted.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// One mounted hierarchy.
struct Hierarchy {
    /// v1 controllers, or empty for v2.
    controllers: Vec<String>,
    mountpoint: PathBuf,
    /// The part of the hierarchy that is mounted.
    root: String,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    /// (v1 controller, directory).
    v1: Vec<(String, PathBuf)>,
    v2: Option<PathBuf>,
}

fn hierarchies() -> &'static [Hierarchy] {
    static MOUNTED: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    MOUNTED.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        text.lines().filter_map(hierarchy).collect()
    })
}

/// A line of mountinfo, see proc_pid_mountinfo(5).
fn hierarchy(line: &str) -> Option<Hierarchy> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, mountpoint) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (fs_type, _source, options) = (after.next()?, after.next()?, after.next()?);
    let controllers = match fs_type {
        "cgroup2" => Vec::new(),
        "cgroup" => options
            .split(',')
            .filter(|option| *option != "rw")
            .map(str::to_owned)
            .collect(),
        _ => return None,
    };
    Some(Hierarchy {
        controllers,
        mountpoint: mountpoint.into(),
        root: root.to_owned(),
    })
}

/// To be called before a runtime that will move a process into a cgroup is started. Unless `favordynmods` is
/// set, the first such move on a quiet host waits for an RCU grace period, 5 to 20 ms, and those soon after it do
/// not (`cgroup_threadgroup_rwsem`, kernel/cgroup/cgroup.c). So this process is moved to the cgroup that it is in,
/// which changes nothing, while the runtime starts: its own move then finds the wait behind it or half over.
pub(crate) fn hasten_move() {
    static AT_WORK: AtomicBool = AtomicBool::new(false);
    if AT_WORK.swap(true, Ordering::AcqRel) {
        return;
    }
    let thread = std::thread::Builder::new().stack_size(64 * 1024).spawn(|| {
        if let Err(error) = move_to_own() {
            tracing::debug!(%error, "the cgroups' grace period is not begun early");
        }
        AT_WORK.store(false, Ordering::Release);
    });
    if let Err(error) = thread {
        AT_WORK.store(false, Ordering::Release);
        tracing::debug!(%error, "starting a thread");
    }
}

/// Moves this process to where it is.
fn move_to_own() -> std::io::Result<()> {
    let own = Cgroup::of_process(std::process::id())?;
    let directory = own.v1.first().map(|(_, path)| path).or(own.v2.as_ref());
    let directory = directory.ok_or(std::io::ErrorKind::NotFound)?;
    // Zero is who writes.
    std::fs::write(directory.join("cgroup.procs"), "0")
}

impl Cgroup {
    /// That of nobody: without processes.
    pub(crate) fn none() -> Self {
        Self {
            v1: Vec::new(),
            v2: None,
        }
    }

    /// The cgroup of a container, by its first process. Where the runtime was told to make none, the process is
    /// in the shim's own or one above, which is not the container's to be killed or counted: then there is none.
    pub(crate) fn of_container(pid: u32) -> std::io::Result<Self> {
        Ok(Self::of_process(pid)?.without(&Self::of_process(std::process::id())?))
    }

    /// Where a container's configured path is, in every hierarchy; never the shim's own or one above.
    pub(crate) fn of_path(path: &str) -> std::io::Result<Self> {
        let mut cgroup = Self {
            v1: Vec::new(),
            v2: None,
        };
        for hierarchy in hierarchies() {
            cgroup.add(&hierarchy.controllers.join(","), path);
        }
        Ok(cgroup.without(&Self::of_process(std::process::id())?))
    }

    fn of_process(pid: u32) -> std::io::Result<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let mut cgroup = Self {
            v1: Vec::new(),
            v2: None,
        };
        for line in text.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            if let (Some(controllers), Some(path)) = (parts.next(), parts.next()) {
                cgroup.add(controllers, path);
            }
        }
        Ok(cgroup)
    }

    fn without(mut self, own: &Self) -> Self {
        let above =
            |directory: &Path, mine: Option<&Path>| mine.is_some_and(|mine| mine.starts_with(directory));
        self.v1
            .retain(|(name, directory)| !above(directory, own.v1(name)));
        self.v2 = self.v2.filter(|directory| !above(directory, own.v2.as_deref()));
        self
    }

    fn add(&mut self, controllers: &str, path: &str) {
        for mounted in hierarchies() {
            let matches = match controllers {
                "" => mounted.controllers.is_empty(),
                names => names
                    .split(',')
                    .any(|name| mounted.controllers.iter().any(|other| other == name)),
            };
            if !matches {
                continue;
            }
            let below = match mounted.root.as_str() {
                "/" => path,
                root => path.strip_prefix(root).unwrap_or(path),
            };
            let directory = mounted.mountpoint.join(below.trim_start_matches('/'));
            if controllers.is_empty() {
                self.v2 = Some(directory);
            } else {
                self.v1.extend(
                    controllers
                        .split(',')
                        .map(|name| (name.to_owned(), directory.clone())),
                );
            }
            return;
        }
    }

    /// Directory of a v1 controller.
    pub(crate) fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1
            .iter()
            .find(|(name, _)| name == controller)
            .map(|(_, path)| path.as_path())
    }

    /// Directory in v2, where the controllers are there.
    pub(crate) fn v2(&self) -> Option<&Path> {
        if self.v1("memory").is_some() {
            None
        } else {
            self.v2.as_deref()
        }
    }

    /// The directory whose processes are the container's.
    fn processes_directory(&self) -> Option<&Path> {
        self.v2().or_else(|| {
            ["pids", "memory", "devices", "cpu"]
                .iter()
                .find_map(|name| self.v1(name))
        })
    }

    /// Processes in it and below. Empty where it is gone.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        if let Some(directory) = self.processes_directory() {
            // The root of a hierarchy is everybody's: no container is there.
            let is_root = hierarchies()
                .iter()
                .any(|mounted| mounted.mountpoint == directory);
            if !is_root {
                collect(directory, &mut found, 0);
            }
        }
        found
    }

    /// How many processes the OOM killer has ended; 0 where that cannot be told.
    pub(crate) fn oom_kills(&self) -> u64 {
        let file = match (self.v2(), self.v1("memory")) {
            (Some(directory), _) => directory.join("memory.events"),
            (None, Some(directory)) => directory.join("memory.oom_control"),
            (None, None) => return 0,
        };
        let text = std::fs::read_to_string(file).unwrap_or_default();
        value_of(&text, "oom_kill").unwrap_or(0)
    }

    /// Lets frozen processes run, so that SIGKILL reaches them.
    pub(crate) fn thaw(&self) {
        let (file, value) = match (self.v2(), self.v1("freezer")) {
            (Some(directory), _) => (directory.join("cgroup.freeze"), "0"),
            (None, Some(directory)) => (directory.join("freezer.state"), "THAWED"),
            (None, None) => return,
        };
        if let Err(error) = std::fs::write(&file, value) {
            tracing::debug!(file = %file.display(), %error, "thawing");
        }
    }

    /// Removes the directories, children first. What is gone is no error.
    pub(crate) fn remove(&self) -> std::io::Result<()> {
        let mut directories: Vec<&Path> = self.v1.iter().map(|(_, path)| path.as_path()).collect();
        directories.extend(self.v2.as_deref());
        directories.into_iter().try_for_each(remove_tree)
    }
}

fn collect(directory: &Path, found: &mut Vec<i32>, depth: usize) {
    let text = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    found.extend(
        text.lines()
            .filter_map(|line| line.parse::<i32>().ok())
            .filter(|pid| *pid > 0),
    );
    if depth < 16 {
        for child in children(directory) {
            collect(&child, found, depth + 1);
        }
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let directories = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

fn remove_tree(directory: &Path) -> std::io::Result<()> {
    children(directory)
        .iter()
        .try_for_each(|child| remove_tree(child))?;
    match std::fs::remove_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The number after `key` in a file of `key value` lines.
pub(crate) fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_to_the_own_cgroup_changes_nothing() {
        let before = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        move_to_own().unwrap();
        assert_eq!(std::fs::read_to_string("/proc/self/cgroup").unwrap(), before);
    }

    #[test]
    fn lines_of_mountinfo_are_read() {
        let line = "30 23 0:26 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct";
        let found = hierarchy(line).unwrap();
        assert_eq!(found.controllers, ["cpu", "cpuacct"]);
        assert_eq!(
            (found.root.as_str(), found.mountpoint),
            ("/", PathBuf::from("/sys/fs/cgroup/cpu"))
        );
        let v2 = hierarchy("31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate").unwrap();
        assert!(v2.controllers.is_empty());
        assert!(hierarchy("1 0 8:1 / / rw - ext4 /dev/sda1 rw").is_none());
    }

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(value_of(text, "oom_kill"), Some(3));
        assert_eq!(value_of(text, "oom"), None);
    }

    #[test]
    fn the_shims_own_cgroup_is_never_a_containers() {
        let own = Cgroup::of_process(std::process::id()).unwrap();
        assert!(
            own.v2
                .as_deref()
                .or(own.v1("memory"))
                .unwrap()
                .join("cgroup.procs")
                .exists()
        );
        let none = Cgroup::of_container(std::process::id()).unwrap();
        assert!(none.v1.is_empty() && none.v2.is_none() && none.processes().is_empty());
        let root = Cgroup::of_path("/").unwrap();
        assert!(root.v1.is_empty() && root.v2.is_none());
        let other = Cgroup::of_path("/catamaran-nowhere/x").unwrap();
        assert!(other.v2.is_some() || !other.v1.is_empty());
    }
}
