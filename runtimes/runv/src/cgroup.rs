//! The VMM's own cgroup, `<pod's cgroup>/<sandbox id>`: what the VM costs is counted and bounded there. Works on
//! cgroup v2 and on the v1 controllers that matter for it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// v1 hierarchies that account or bound a process; the first is joined before the VMM runs, so that its memory
/// is charged from the first page.
const V1_CONTROLLERS: &[&str] = &["memory", "cpu", "cpuacct", "pids", "blkio"];
const V2_CONTROLLERS: &[&str] = &["cpu", "memory", "pids", "io"];

/// A cgroup in every hierarchy that matters.
#[derive(Debug, Clone)]
pub struct Cgroup {
    directories: Vec<PathBuf>,
}

/// Path below a hierarchy of the cgroup that CRI's `cgroup_parent` names. A systemd slice name is expanded as
/// systemd.slice(5) says: `a-b.slice` lies in `a.slice`.
fn parent_path(cgroup_parent: &str, systemd: bool) -> PathBuf {
    if !systemd {
        return PathBuf::from(cgroup_parent.trim_matches('/'));
    }
    let slice = cgroup_parent.rsplit('/').next().unwrap_or(cgroup_parent);
    let Some(name) = slice.strip_suffix(".slice").filter(|name| *name != "-") else {
        return PathBuf::from(cgroup_parent.trim_matches('/'));
    };
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.map(|end| format!("{}.slice", &name[..end])).collect()
}

impl Cgroup {
    /// Names the cgroup; [`Self::create`] makes it.
    ///
    /// # Errors
    /// `InvalidInput` for a parent that leaves the hierarchy.
    pub fn new(cgroup_parent: &str, systemd: bool, name: &str) -> io::Result<Self> {
        let path = parent_path(cgroup_parent, systemd).join(name);
        if path
            .components()
            .any(|part| !matches!(part, std::path::Component::Normal(_)))
        {
            let text = format!("cgroup parent {cgroup_parent:?} must be a plain path");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let root = Path::new(ROOT);
        let hierarchies: Vec<PathBuf> = if is_v2() {
            vec![root.to_owned()]
        } else {
            // `cpu` and `cpuacct` are often one hierarchy under two names.
            let mut seen = BTreeSet::new();
            let existing = V1_CONTROLLERS
                .iter()
                .filter_map(|name| root.join(name).canonicalize().ok());
            existing
                .filter(|hierarchy| seen.insert(hierarchy.clone()))
                .collect()
        };
        Ok(Self {
            directories: hierarchies
                .into_iter()
                .map(|hierarchy| hierarchy.join(&path))
                .collect(),
        })
    }

    /// Makes it in every hierarchy.
    ///
    /// # Errors
    /// Any error of the cgroup file system.
    pub fn create(&self) -> io::Result<()> {
        for directory in &self.directories {
            if is_v2() {
                delegate(directory)?;
            }
            std::fs::create_dir_all(directory).map_err(|error| named(error, directory))?;
        }
        Ok(())
    }

    /// `cgroup.procs` that the VMM's process writes itself into before it runs.
    #[must_use]
    pub fn first_procs(&self) -> Option<PathBuf> {
        self.directories
            .first()
            .map(|directory| directory.join("cgroup.procs"))
    }

    /// `cgroup.procs` of every hierarchy, open for [`join`].
    ///
    /// # Errors
    /// Any error of the cgroup file system.
    pub fn open_procs(&self) -> io::Result<Vec<File>> {
        let open = |directory: &PathBuf| {
            let path = directory.join("cgroup.procs");
            File::options()
                .write(true)
                .open(&path)
                .map_err(|error| named(error, &path))
        };
        self.directories.iter().map(open).collect()
    }

    /// Moves a process into the hierarchies that it did not join itself.
    ///
    /// # Errors
    /// Any error of the cgroup file system but that the process has ended.
    pub fn adopt(&self, pid: u32) -> io::Result<()> {
        for directory in self.directories.iter().skip(1) {
            match std::fs::write(directory.join("cgroup.procs"), pid.to_string()) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(named(error, directory));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Process ids in any of the hierarchies.
    #[must_use]
    pub fn pids(&self) -> BTreeSet<i32> {
        let texts = self
            .directories
            .iter()
            .filter_map(|directory| std::fs::read_to_string(directory.join("cgroup.procs")).ok());
        texts
            .flat_map(|text| {
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// How many of its processes the kernel has killed for memory, by a limit of this cgroup or one above it:
    /// `oom_kill` of memory.events (cgroup v2) or memory.oom_control (v1).
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let files = ["memory.events", "memory.oom_control"];
        let texts = self
            .directories
            .iter()
            .flat_map(|directory| files.map(|file| directory.join(file)))
            .filter_map(|file| std::fs::read_to_string(file).ok());
        texts.filter_map(|text| oom_kills_of(&text)).max().unwrap_or(0)
    }

    /// Kills what is in it and removes it; fine when it is gone already. Blocks for at most `limit`.
    ///
    /// # Errors
    /// The last error of the cgroup file system, when a directory is still there after `limit`.
    pub fn remove(&self, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            for pid in self.pids() {
                // A process that ended meanwhile is what is wanted.
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            }
            let failed = self
                .directories
                .iter()
                .find_map(|directory| match std::fs::remove_dir(directory) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Some(named(error, directory)),
                    _ => None,
                });
            match failed {
                None => return Ok(()),
                Some(error) if Instant::now() >= deadline => return Err(error),
                Some(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Moves the calling process into the cgroup that `procs` was opened of; for use between fork and exec, so that what
/// the process forks cannot stay outside.
///
/// # Errors
/// The kernel's.
pub fn join(procs: &[File]) -> io::Result<()> {
    for file in procs {
        // SAFETY: an open descriptor and one byte.
        if unsafe { libc::write(file.as_raw_fd(), b"0".as_ptr().cast(), 1) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn oom_kills_of(text: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
}

fn is_v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// Makes the parents of a v2 cgroup and turns their controllers on, as far as the host has them.
fn delegate(directory: &Path) -> io::Result<()> {
    let Some(parent) = directory.parent() else {
        return Ok(());
    };
    std::fs::create_dir_all(parent).map_err(|error| named(error, parent))?;
    let mut ancestors: Vec<&Path> = parent
        .ancestors()
        .take_while(|path| path.starts_with(ROOT))
        .collect();
    ancestors.reverse();
    for ancestor in ancestors {
        let available = std::fs::read_to_string(ancestor.join("cgroup.controllers")).unwrap_or_default();
        let wanted: Vec<String> = V2_CONTROLLERS
            .iter()
            .filter(|name| available.split_whitespace().any(|word| word == **name))
            .map(|name| format!("+{name}"))
            .collect();
        // A cgroup with processes of its own refuses; then its limits cover the VM without this level.
        if let Err(error) = std::fs::write(ancestor.join("cgroup.subtree_control"), wanted.join(" ")) {
            tracing::debug!(%error, ancestor = %ancestor.display(), "controllers are not turned on");
        }
    }
    Ok(())
}

fn named(error: io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_expanded() {
        let slice = "kubepods-burstable-pod1.slice";
        assert_eq!(
            parent_path(slice, true),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice")
        );
        assert_eq!(parent_path("/kubepods/pod1", false), Path::new("kubepods/pod1"));
    }

    #[test]
    fn a_parent_outside_is_refused() {
        for parent in ["/../x", "a/../../b"] {
            assert_eq!(
                Cgroup::new(parent, false, "id").unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }

    #[test]
    fn kills_for_memory_are_read_in_both_formats() {
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n";
        let v2 = "low 0\nhigh 0\nmax 31\noom 3\noom_kill 1\noom_group_kill 0\n";
        assert_eq!((oom_kills_of(v1), oom_kills_of(v2)), (Some(2), Some(1)));
        assert_eq!(oom_kills_of("under_oom 0\n"), None);
    }

    #[test]
    fn processes_are_adopted_and_killed() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: processes_are_adopted_and_killed: needs root");
            return;
        }
        let parent = format!("/catamaran-test-{}", std::process::id());
        let cgroup = Cgroup::new(&parent, false, "vm").unwrap();
        cgroup.create().unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        std::fs::write(cgroup.first_procs().unwrap(), child.id().to_string()).unwrap();
        cgroup.adopt(child.id()).unwrap();
        assert_eq!(cgroup.pids().len(), 1);
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        cgroup.remove(Duration::from_secs(5)).unwrap();
        assert!(!reaper.join().unwrap().success());
        cgroup.remove(Duration::from_secs(5)).unwrap();
        Cgroup::new("/", false, parent.trim_start_matches('/'))
            .unwrap()
            .remove(Duration::from_secs(5))
            .unwrap();
    }
}
