//! Memory as the kernel attributes it: proportional set size, where a page that several processes share counts
//! for each in part.

use anyhow::{Context, Result};
use catamaran_e2e::leaks;
use catamaran_e2e::node::Node;

/// MiB of PSS of these processes together.
pub(crate) fn of(pids: &[u32]) -> Result<f64> {
    let mut kib = 0u64;
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .with_context(|| path.clone())?;
        kib += line
            .trim()
            .trim_end_matches(" kB")
            .parse::<u64>()
            .with_context(|| path)?;
    }
    Ok(kib as f64 / 1024.0)
}

/// What serves pods beside the daemon: shims, pause containers, VMMs; not the containers' own processes, which
/// are busybox here.
pub(crate) fn pod_processes(node: &Node, daemon: u32) -> Result<Vec<u32>> {
    let all = leaks::find_processes(&node.layout, &node.subnet)?;
    let payload = |pid: u32| {
        std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("bin/busybox"))
    };
    Ok(all
        .into_iter()
        .map(|(pid, _)| pid)
        .filter(|pid| *pid != daemon && !payload(*pid))
        .collect())
}
