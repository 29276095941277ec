//! Exit statuses of everything that is, or becomes, a child of the shim: runtimes, containers' first processes
//! and execs (which reparent to the shim when their runtime exits, as it is their subreaper), orphans.
//!
//! A process may end before the shim has read its pid from the runtime. So while anything is being started
//! (an [`Expectation`] is held) unclaimed exits are kept, and forgotten after, before a pid could come again.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255, 128 + signal number.
    pub(crate) code: i32,
    /// Nanoseconds since the epoch.
    pub(crate) at_ns: i64,
}

/// Exit code of a process that is nobody's child here, so that only its end can be seen.
const UNKNOWN: i32 = 255;

#[derive(Default)]
struct Table {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    unclaimed: HashMap<i32, Exit>,
    expectations: usize,
}

pub(crate) struct Reaper {
    table: Mutex<Table>,
}

/// Held from before a process is started until it is watched.
pub(crate) struct Expectation(Arc<Reaper>);

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.expectations -= 1;
        if table.expectations == 0 {
            table.unclaimed.clear();
        }
    }
}

impl Reaper {
    /// Begins to reap.
    pub(crate) fn start() -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self {
            table: Mutex::default(),
        });
        let mut children = signal(SignalKind::child())?;
        let reaping = reaper.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                reaping.reap();
            }
        });
        Ok(reaper)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every critical section is one update.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn expect(self: &Arc<Self>) -> Expectation {
        self.table().expectations += 1;
        Expectation(self.clone())
    }

    /// The exit of a process that was started while an [`Expectation`] was held.
    pub(crate) fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        if let Some(exit) = table.unclaimed.remove(&pid) {
            // The receiver is at hand.
            let _ = sender.send(exit);
        } else if is_child(pid) {
            table.watched.insert(pid, sender);
        } else {
            tracing::warn!(pid, "not a child of the shim, its exit code will be unknown");
            tokio::spawn(async move {
                wait_for_stranger(pid).await;
                let _ = sender.send(Exit {
                    code: UNKNOWN,
                    at_ns: now_ns(),
                });
            });
        }
        receiver
    }

    /// Starts a command as a child that is watched.
    pub(crate) fn spawn(&self, command: &mut Command) -> std::io::Result<(i32, oneshot::Receiver<Exit>)> {
        // Nothing reaps between the two, as reaping happens on this thread.
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(std::io::Error::other)?;
        let (sender, receiver) = oneshot::channel();
        self.table().watched.insert(pid, sender);
        Ok((pid, receiver))
    }

    fn reap(&self) {
        loop {
            let mut status = 0;
            // nix's wait knows no real-time signals, and loses such an exit.
            // SAFETY: the pointer is to a local integer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            // No child has ended, or there is none; without blocking nothing interrupts it.
            if pid <= 0 {
                return;
            }
            let exit = Exit {
                code: exit_code(status),
                at_ns: now_ns(),
            };
            let mut table = self.table();
            match table.watched.remove(&pid) {
                // Nobody may wait any more.
                Some(waiting) => drop(waiting.send(exit)),
                None if table.expectations > 0 => drop(table.unclaimed.insert(pid, exit)),
                None => {}
            }
        }
    }
}

/// Exit code of a wait status.
fn exit_code(status: i32) -> i32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}

/// Whether the process, dead or alive, is a child of this one.
pub(crate) fn is_child(pid: i32) -> bool {
    crate::process::stat(pid).is_some_and(|stat| stat.parent == std::process::id().cast_signed())
}

async fn wait_for_stranger(pid: i32) {
    let Some(fd) = open_pidfd(pid) else { return };
    // SAFETY: the descriptor is owned by the AsyncFd, which nobody takes it out of.
    match unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) } {
        Ok(fd) => drop(fd.readable().await),
        Err(error) => tracing::warn!(pid, %error, "waiting for a process"),
    }
}

/// `None` where the process is gone.
pub(crate) fn open_pidfd(pid: i32) -> Option<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn exits_before_and_after_watching_are_delivered() {
        let reaper = Reaper::start().unwrap();
        let (_, exit) = reaper.spawn(Command::new("sh").args(["-c", "exit 7"])).unwrap();
        assert_eq!(exit.await.unwrap().code, 7);
        let (_, real_time) = reaper
            .spawn(Command::new("sh").args(["-c", "kill -37 $$"]))
            .unwrap();
        assert_eq!(real_time.await.unwrap().code, 165);
        let expectation = reaper.expect();
        // A child that nobody watches yet, as a runtime leaves it. The reaper waits for it.
        #[allow(clippy::zombie_processes)]
        let child = Command::new("sh").args(["-c", "kill -9 $$"]).spawn().unwrap();
        let pid = child.id().cast_signed();
        let (_, later) = reaper.spawn(Command::new("sleep").arg("0.2")).unwrap();
        later.await.unwrap();
        assert_eq!(reaper.watch(pid).await.unwrap().code, 137);
        drop(expectation);
        assert!(reaper.table().unclaimed.is_empty());
    }
}
