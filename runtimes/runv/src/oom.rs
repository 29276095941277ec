//! Whom the host's kernel takes first when it is out of memory. It sees one VM where a namespace pod would have
//! containers, so VMM and virtiofsd are protected as the pod's best protected container asks
//! (`process.oomScoreAdj`, which the kubelet derives from the pod's QoS class: -997 Guaranteed, 1000 BestEffort),
//! and as an ordinary process, 0, before the first one. What the daemon's unit gives the daemon and the shim is not
//! theirs. See proc_pid_oom_score_adj(5).

use std::collections::BTreeSet;

/// A process that no container speaks for.
pub(crate) const ORDINARY: i32 = 0;
/// One less exempts a process altogether, which a guest's memory must not be.
const LEAST: i32 = -999;

/// Makes the calling process an ordinary one; for use between fork and exec, so that it also holds for what it forks.
/// It may be forbidden where a higher value is inherited, see [`set`].
pub(crate) fn reset_own() {
    // SAFETY: system calls with constants; the descriptor is closed.
    unsafe {
        let file = libc::open(
            c"/proc/self/oom_score_adj".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        );
        if file >= 0 {
            libc::write(file, b"0".as_ptr().cast(), 1);
            libc::close(file);
        }
    }
}

/// Sets it for `pids`. Lowering it below what was inherited needs CAP_SYS_RESOURCE: without, a likelier victim than
/// asked for beats a pod that does not start, and the log says so.
pub(crate) fn set(pids: &BTreeSet<i32>, wanted: i32) {
    let wanted = wanted.clamp(LEAST, 1000);
    for pid in pids {
        let path = format!("/proc/{pid}/oom_score_adj");
        match std::fs::write(&path, wanted.to_string()) {
            // It has ended.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            Err(error) => tracing::warn!(pid, wanted, %error, "oom_score_adj stays as it is"),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_set_and_never_exempts() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        let value = || std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        let before: i32 = value().trim().parse().unwrap();
        set(&BTreeSet::from([pid, i32::MAX]), 2000);
        assert_eq!(value(), "1000\n");
        set(&BTreeSet::from([pid]), -1000);
        let after: i32 = value().trim().parse().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(after == LEAST || after == 1000, "{before} {after}");
    }
}
