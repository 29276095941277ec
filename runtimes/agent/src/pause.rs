//! Init of the PID namespace that a pod's containers share: does nothing but reap orphans. Its namespace
//! lives as long as it does; the agent ends it with SIGKILL.

use std::ffi::CStr;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};

use crate::error::{Context, Result};

/// First argument of the process.
pub(crate) const ROLE: &str = "catamaran-pause";
const ARGUMENTS: [&CStr; 2] = [c"pause", c"catamaran-pause"];

/// Starts the process in a new PID namespace and returns its pid.
pub(crate) fn spawn() -> Result<i32> {
    let arguments: [*const libc::c_char; 3] =
        [ARGUMENTS[0].as_ptr(), ARGUMENTS[1].as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: clone without CLONE_VM is a fork of this single-threaded process; the child only execs.
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::CLONE_NEWPID | libc::SIGCHLD, 0, 0, 0, 0);
        if pid == 0 {
            libc::execve(c"/init".as_ptr(), arguments.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
        pid
    };
    nix::errno::Errno::result(pid)
        .map(|pid| i32::try_from(pid).unwrap_or(-1))
        .context(|| "cannot start the init of the pod's PID namespace".into())
}

/// Reaps until killed.
pub(crate) fn main() -> ExitCode {
    // SAFETY: sets this process's name; the pointer is to a NUL-terminated constant.
    unsafe { libc::prctl(libc::PR_SET_NAME, ARGUMENTS[0].as_ptr()) };
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    if signals.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        // SAFETY: a null status pointer is allowed.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
        if signals.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
