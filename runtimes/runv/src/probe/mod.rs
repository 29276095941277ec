//! Whether this host's `/dev/kvm` runs an ordinary guest. The device may open and still not do so (nested
//! paravirtual hosts), and a VMM is a bad way to find out: it aborts or hangs silently. So a child process
//! runs one virtual CPU with a few instructions that every kernel needs, under a time limit, and is killed
//! when it passes.

mod vcpu;

use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, pipe};
use serde::Serialize;

/// The child's time limit; a host whose KVM works needs 20 to 30 ms.
const LIMIT: Duration = Duration::from_millis(100);
/// The limit of a second trial after one that was too slow: a busy host may not have run the child in time.
const SECOND_LIMIT: Duration = Duration::from_millis(400);

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Hardware virtualization runs an ordinary guest.
    pub usable: bool,
    /// Why, in a sentence for an operator.
    pub reason: String,
    #[serde(skip)]
    timed_out: bool,
}

impl Verdict {
    fn unusable(reason: impl Into<String>) -> Self {
        Self {
            usable: false,
            reason: reason.into(),
            timed_out: false,
        }
    }
}

/// Probes `/dev/kvm`. Must be called while the process has one thread, since it forks.
#[must_use]
pub fn probe() -> Verdict {
    if !std::path::Path::new("/dev/kvm").exists() {
        return Verdict::unusable("/dev/kvm does not exist");
    }
    let first = run_bounded(vcpu::run, LIMIT);
    if first.timed_out {
        run_bounded(vcpu::run, SECOND_LIMIT)
    } else {
        first
    }
}

/// Runs `trial` in a child that is killed after `limit`.
fn run_bounded(trial: fn() -> Result<(), String>, limit: Duration) -> Verdict {
    let (reader, writer) = match pipe() {
        Ok(ends) => ends,
        Err(error) => return Verdict::unusable(format!("cannot make a pipe for the probe: {error}")),
    };
    let started = Instant::now();
    // SAFETY: the caller has one thread, so the child may allocate; it only runs the trial and leaves by _exit.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            drop(reader);
            let answer = match trial() {
                Ok(()) => "ok".to_owned(),
                Err(reason) => reason,
            };
            // A lost answer reads as "ended without an answer" in the parent.
            let _ = nix::unistd::write(&writer, answer.as_bytes());
            // SAFETY: _exit ends the child without running the parent's exit handlers twice.
            unsafe { libc::_exit(0) }
        }
        Ok(ForkResult::Parent { child }) => child,
        Err(error) => return Verdict::unusable(format!("cannot start the probe: {error}")),
    };
    drop(writer);
    let answered = wait_readable(&reader, limit);
    if !answered {
        let _ = kill(child, Signal::SIGKILL);
    }
    let mut answer = String::new();
    if answered {
        let _ = std::fs::File::from(reader).take(4096).read_to_string(&mut answer);
    }
    // A vCPU that hangs inside the kernel dies from SIGKILL, but not always at once: do not wait for ever.
    let ended = reap(child, started + limit + Duration::from_millis(400));
    match (answered, answer.as_str(), ended) {
        (true, "ok", _) => Verdict {
            usable: true,
            reason: format!("a vCPU ran in {} ms", started.elapsed().as_millis()),
            timed_out: false,
        },
        (false, ..) => Verdict {
            timed_out: true,
            ..Verdict::unusable(format!(
                "a vCPU did not finish a few thousand instructions within {} ms",
                limit.as_millis()
            ))
        },
        (true, "", Some(WaitStatus::Signaled(_, signal, _))) => {
            Verdict::unusable(format!("the probe's process was ended by {signal}"))
        }
        (true, "", _) => Verdict::unusable("the probe ended without an answer"),
        (true, reason, _) => Verdict::unusable(reason),
    }
}

/// True when the pipe has data or its writer is gone before `limit`.
fn wait_readable(reader: &impl AsFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(reader.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

fn reap(child: nix::unistd::Pid, deadline: Instant) -> Option<WaitStatus> {
    loop {
        match waitpid(child, Some(nix::sys::wait::WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(status) => return Some(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The test harness has several threads; the children below only write a constant and leave.
    fn fine() -> Result<(), String> {
        Ok(())
    }

    fn hangs() -> Result<(), String> {
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn dies() -> Result<(), String> {
        let _ = nix::sys::signal::raise(Signal::SIGKILL);
        Ok(())
    }

    #[test]
    fn a_trial_that_ends_in_time_is_usable() {
        assert!(run_bounded(fine, Duration::from_secs(10)).usable);
    }

    #[test]
    fn a_trial_that_hangs_is_killed_at_the_limit() {
        let started = Instant::now();
        let verdict = run_bounded(hangs, Duration::from_millis(50));
        assert!(!verdict.usable);
        assert!(verdict.reason.contains("50 ms"), "{}", verdict.reason);
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_trial_that_dies_is_not_usable() {
        let verdict = run_bounded(dies, Duration::from_secs(10));
        assert!(!verdict.usable);
        assert!(verdict.reason.contains("SIGKILL"), "{}", verdict.reason);
    }
}
