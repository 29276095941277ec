//! One process of a container: signals, its terminal, and the tree that it started.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};

use async_trait::async_trait;
use catamaran_sandbox::shim_server::ShimError;
use catamaran_sandbox::shim_server::backend::ProcessControl;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::console::Terminal;

/// Looks for new descendants so often, as they may fork while they are being killed.
const ROUNDS: usize = 50;

/// What /proc/<pid>/stat tells, see proc_pid_stat(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) parent: i32,
    pub(crate) session: i32,
}

/// `None` where the process is gone.
pub(crate) fn stat(pid: i32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have anything in it.
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    let parent = fields.nth(1)?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Stat { parent, session })
}

/// How a container's first process is signalled where it is not an ordinary process of this kernel.
#[async_trait]
pub(crate) trait SignalByRuntime: Send + Sync {
    async fn signal(&self, signal: i32) -> Result<(), ShimError>;
}

/// A process whose end this shim is told of.
pub(crate) struct HostProcess {
    pid: i32,
    /// Made while the process could not have been reaped, so it is this process for ever.
    pidfd: Option<OwnedFd>,
    terminal: Option<Terminal>,
    cgroup: Cgroup,
    by_runtime: Option<Box<dyn SignalByRuntime>>,
}

impl HostProcess {
    pub(crate) fn new(
        pid: i32,
        terminal: Option<Terminal>,
        cgroup: Cgroup,
        by_runtime: Option<Box<dyn SignalByRuntime>>,
    ) -> Self {
        Self {
            pid,
            pidfd: crate::reaper::open_pidfd(pid),
            terminal,
            cgroup,
            by_runtime,
        }
    }

    fn send(&self, signal: i32) -> Result<(), ShimError> {
        let gone = || ShimError::NotFound(format!("process {} has ended", self.pid));
        let pidfd = self.pidfd.as_ref().ok_or_else(gone)?;
        // SAFETY: plain numbers, a descriptor that is open, and no siginfo. rustix has no real-time signals.
        let sent = unsafe {
            let (fd, none) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
            libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0)
        };
        match Errno::result(sent) {
            Ok(_) => Ok(()),
            Err(Errno::ESRCH) => Err(gone()),
            Err(Errno::EINVAL) => Err(ShimError::InvalidArgument(format!("signal: {signal} is none"))),
            Err(error) => Err(ShimError::internal(
                format!("signal process {}", self.pid),
                &error,
            )),
        }
    }

    /// SIGKILL for the process and what it started in the cgroup.
    pub(crate) fn kill_tree_now(&self) {
        // The tree is known by its root, so the root goes last.
        let mut known = HashSet::from([self.pid]);
        for _ in 0..ROUNDS {
            let more = descendants(&self.cgroup, self.pid, &mut known);
            for pid in &more {
                // It was in the container's cgroup a moment ago; one that ended meanwhile is none the worse.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            if more.is_empty() {
                break;
            }
        }
        if let Err(error) = self.send(libc::SIGKILL) {
            tracing::debug!(pid = self.pid, %error, "kill");
        }
        for pid in descendants(&self.cgroup, self.pid, &mut known) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

#[async_trait]
impl ProcessControl for HostProcess {
    async fn signal(&self, signal: i32) -> Result<(), ShimError> {
        if let Some(runtime) = &self.by_runtime {
            return runtime.signal(signal).await;
        }
        self.send(signal)?;
        if signal == libc::SIGKILL {
            self.cgroup.thaw();
        }
        Ok(())
    }

    async fn kill_tree(&self) {
        self.kill_tree_now();
    }

    async fn resize(&self, width: u16, height: u16) -> Result<(), ShimError> {
        let Some(terminal) = &self.terminal else {
            return Err(ShimError::FailedPrecondition(
                "the process has no terminal".into(),
            ));
        };
        terminal
            .resize(width, height)
            .map_err(|error| ShimError::internal("resize the terminal", &error))
    }
}

/// Processes of the cgroup that are new in `known`, which they descend from, or whose session is that of
/// `root`: runtimes make each exec the leader of a session.
fn descendants(cgroup: &Cgroup, root: i32, known: &mut HashSet<i32>) -> Vec<i32> {
    let all: Vec<(i32, Stat)> = cgroup
        .processes()
        .into_iter()
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .collect();
    let mut new = Vec::new();
    loop {
        let before = new.len();
        for (pid, stat) in &all {
            if !known.contains(pid) && (known.contains(&stat.parent) || stat.session == root) {
                known.insert(*pid);
                new.push(*pid);
            }
        }
        if new.len() == before {
            return new;
        }
    }
}

/// Kills everything in a cgroup until it is empty, or does not become so.
pub(crate) fn kill_cgroup(cgroup: &Cgroup) {
    cgroup.thaw();
    for _ in 0..ROUNDS {
        let mut living = 0;
        for pid in cgroup.processes() {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) => living += 1,
                Err(Errno::ESRCH) => {}
                Err(error) => tracing::warn!(pid, %error, "kill"),
            }
        }
        if living == 0 {
            return;
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    /// A leader of a session, so that the expected session is known: the test's own may have begun outside this PID
    /// namespace, and then reads as 0.
    #[test]
    fn stat_survives_a_strange_name() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join(") R 1 (x");
        std::fs::copy("/bin/sleep", &program).unwrap();
        let mut child = Command::new("setsid").arg(&program).arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let expected = Stat {
            parent: std::process::id().cast_signed(),
            session: pid,
        };
        let begun = Instant::now();
        let mut name = String::new();
        while name.trim_end() != ") R 1 (x" && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
            name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        }
        let found = stat(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((name.trim_end(), found), (") R 1 (x", Some(expected)));
        assert_eq!(stat(i32::MAX), None);
    }
}
