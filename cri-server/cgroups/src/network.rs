//! Interface counters of a pod's network namespace. Read by a short-lived thread that enters the namespace:
//! a process's `/proc/<pid>/net` would need a process in it, which a pinned namespace need not have.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

use crate::error::{CgroupError, Result};
use crate::parse;

/// Counters of one interface since it was made (CRI NetworkInterfaceUsage).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// Its name in the namespace.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets received with an error.
    pub rx_errors: u64,
    /// Packets dropped on reception.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Errors in sending.
    pub tx_errors: u64,
    /// Packets dropped in sending.
    pub tx_dropped: u64,
}

/// Counters of all interfaces, loopback too, of the namespace pinned at `netns`.
///
/// # Errors
/// [`CgroupError::Io`], also where the pin is gone.
pub fn network_stats(netns: &Path) -> Result<Vec<InterfaceStats>> {
    network_stats_all(&[netns.to_owned()])
        .pop()
        .unwrap_or_else(|| Ok(Vec::new()))
}

/// As [`network_stats`] for many namespaces with one thread; the answers are in the order of `netns`.
#[must_use]
pub fn network_stats_all(netns: &[PathBuf]) -> Vec<Result<Vec<InterfaceStats>>> {
    std::thread::scope(|scope| {
        let reader = std::thread::Builder::new()
            .name("net-stats".to_owned())
            .spawn_scoped(scope, || {
                netns.iter().map(|path| read_inside(path)).collect::<Vec<_>>()
            });
        let failed = |error: std::io::Error| {
            let path = PathBuf::from("/proc/thread-self/net/dev");
            CgroupError::Io {
                what: "start a thread to read",
                path,
                source: error,
            }
        };
        match reader {
            Ok(reader) => match reader.join() {
                Ok(stats) => stats,
                Err(panic) => std::panic::resume_unwind(panic),
            },
            Err(error) => {
                let kind = error.kind();
                netns.iter().map(|_| Err(failed(kind.into()))).collect()
            }
        }
    })
}

/// Moves the calling thread into the namespace; it must not be used for anything else afterwards.
fn read_inside(path: &Path) -> Result<Vec<InterfaceStats>> {
    let pin = File::open(path).map_err(CgroupError::io("open", path))?;
    setns(pin, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| CgroupError::io("enter network namespace", path)(errno.into()))?;
    // Not /proc/net, which is that of the process's first thread.
    let file = "/proc/thread-self/net/dev";
    let text = std::fs::read_to_string(file).map_err(CgroupError::io("read", file))?;
    Ok(parse::net_dev(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_namespace_and_a_missing_one() {
        let answers = network_stats_all(&[
            "/proc/self/ns/net".into(),
            "/nonexistent".into(),
            "/proc/self/ns/net".into(),
        ]);
        assert!(
            answers[0]
                .as_ref()
                .unwrap()
                .iter()
                .any(|interface| interface.name == "lo")
        );
        assert!(
            answers[1]
                .as_ref()
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
        assert_eq!(
            answers[0].as_ref().unwrap().len(),
            answers[2].as_ref().unwrap().len()
        );
        assert!(network_stats(Path::new("/proc/self/ns/net")).is_ok());
    }
}
