//! The only place that waits for processes: pid 1 gets every orphan of the guest, so all children are reaped
//! here and those that somebody watches are told to him.
//!
//! A pid is watched either by the one who has just forked it, in the same step of this one thread, or while
//! its parent, a runtime process, still lives and waits for the agent's word (see [`crate::runtime`]): so no
//! exit is seen before its watch, and no watch outlives a reused pid.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::guest_clock;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255; 128 + signal.
    pub(crate) code: i32,
    /// Nanoseconds since the epoch.
    pub(crate) at_ns: i64,
}

/// Receives `Some` once the process has ended.
pub(crate) type ExitWatch = watch::Receiver<Option<Exit>>;

/// Waits for all children.
#[derive(Default)]
pub(crate) struct Reaper {
    watched: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Starts reaping for the rest of the process's life. Call on the agent's runtime.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let this = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                this.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Watches a child that cannot have been reaped yet, see the module's documentation.
    pub(crate) fn watch(&self, pid: i32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.watched
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pid, sender);
        receiver
    }

    fn reap(&self) {
        loop {
            let mut status = 0;
            // SAFETY: the pointer is to a local integer.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let watcher = self
                .watched
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&pid);
            if let Some(watcher) = watcher {
                watcher.send_replace(Some(Exit {
                    code: exit_code(status),
                    at_ns: guest_clock::now_ns(),
                }));
            }
        }
    }
}

/// Exit code of a wait status. Not nix's enum: it knows no realtime signals.
fn exit_code(status: i32) -> i32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}

/// Waits for the end of a watched process.
pub(crate) async fn ended(mut watch: ExitWatch) -> Exit {
    match watch.wait_for(Option::is_some).await {
        Ok(exit) => exit.unwrap_or(LOST),
        Err(_) => LOST,
    }
}

/// The reaper itself is gone: only while the guest goes down.
const LOST: Exit = Exit { code: 255, at_ns: 0 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_128_and_more() {
        assert_eq!(exit_code(0), 0);
        assert_eq!(exit_code(3 << 8), 3);
        assert_eq!(exit_code(9), 137);
        assert_eq!(exit_code(11 | 0x80), 139, "with a core dump");
        assert_eq!(exit_code(40), 168, "a realtime signal");
    }
}
