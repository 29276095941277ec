//! The steps that take a pod apart, each idempotent and right also for what was only half made: used by the
//! undo of a failed creation, by stop and remove, and by the reconciliation at start.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::RuntimeSpec;
use rustix::mount::{UnmountFlags, unmount};

use super::record::PodRecord;
use super::watch;
use crate::error::{Error, Result, chain};
use crate::handlers::{RUNC_SHIM, RUNV_SHIM};
use crate::node::Node;
use crate::shim::{Launch, Shim, ShimError, TaskState, absent_is_fine, find_shim, lives};

/// Time that a creation which nobody waits for any more has to end: what Task.Create itself has.
pub(super) const CREATION_LIMIT: Duration = Duration::from_secs(120);

/// Time that StopSandbox gives the processes to be gone once they were killed.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(10);

/// How a pod's shim is started and cleaned up.
pub(super) fn launch(node: &Node, pod: &PodRecord) -> Result<Launch> {
    let shim = match node
        .handlers
        .resolve(&pod.handler)
        .and_then(|handler| handler.shim())
    {
        Ok(path) => path,
        // The handler may have gone from the configuration while its pods lived.
        Err(error) => {
            let name = match &pod.spec.runtime {
                RuntimeSpec::Oci { .. } => RUNC_SHIM,
                RuntimeSpec::Vm(_) => RUNV_SHIM,
            };
            find_shim(name, node.config.shim_dir.as_deref()).map_err(|_| error)?
        }
    };
    Ok(Launch {
        shim,
        id: pod.id.to_string(),
        bundle: node.dirs.pod(&pod.id),
    })
}

/// Ends the sandbox: by its shim where that lives, else by the shim's `delete`. `before_shutdown` runs while
/// the shim still serves.
pub(super) async fn end_sandbox<F, Fut>(
    node: &Node,
    pod: &PodRecord,
    shim: Option<Shim>,
    before_shutdown: F,
) -> Result<()>
where
    F: FnOnce(Shim) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    if !node.dirs.pod(&pod.id).exists() {
        // A reboot took the bundle, and with it everything that ran.
        return Ok(());
    }
    let shim = match shim {
        Some(shim) => Some(shim),
        // One that is silent is not waited for: it is ended like a dead one.
        None => watch::connect(&pod.id, &node.dirs.socket(&pod.id)).await.ok(),
    };
    if let Some(shim) = shim {
        match shim.stop_sandbox(STOP_GRACE).await {
            Ok(()) => {
                before_shutdown(shim.clone()).await?;
                match shim.shutdown().await {
                    Err(error @ ShimError::Timeout { .. }) => {
                        tracing::warn!(pod = %pod.id, error = %chain(&error), "the shim does not end; cleaning up")
                    }
                    ended => return Ok(ended?),
                }
            }
            Err(ShimError::Refused { verb, code, message }) => {
                return Err(ShimError::Refused { verb, code, message }.into());
            }
            Err(error) => {
                tracing::warn!(pod = %pod.id, error = %chain(&error), "the shim does not answer; cleaning up")
            }
        }
    }
    launch(node, pod)?.delete().await?;
    Ok(())
}

/// Ends and deletes a container that may or may not have come to be in its shim. One that the shim is still
/// creating is waited for: bundle and snapshot are in use until then.
///
/// # Errors
/// When it is not known that nothing of it is left at work in the shim.
pub(super) async fn end_task(node: &Node, pod: &Id, shim: &Shim, id: &str) -> Result<()> {
    const SIGKILL: u32 = 9;
    let ended = async {
        match state_when_made(shim, id).await {
            Ok(TaskState::Stopped) => {}
            Ok(_) => {
                match shim.kill(id, SIGKILL, true).await {
                    // It may have ended since; whether it has is seen below.
                    Err(error @ ShimError::Refused { .. }) => {
                        tracing::debug!(container = id, %error, "killing")
                    }
                    killed => killed?,
                }
                match tokio::time::timeout(STOP_GRACE, shim.wait(id)).await {
                    Ok(waited) => absent_is_fine(waited)?,
                    Err(_) => return Err(not_ended(id)),
                }
            }
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        Ok(shim.delete(id).await?)
    };
    match ended.await {
        // A shim that is gone has no task. One that only lost its connection has.
        Err(Error::Shim(error)) if error.is_gone() => match is_dead(&node.dirs.pod(pod)).await {
            true => Ok(()),
            false => Err(error.into()),
        },
        result => result,
    }
}

/// Whether the shim of a bundle has died. One that is just ending has a moment: its connections go first.
async fn is_dead(bundle: &Path) -> bool {
    for _ in 0..50 {
        if !lives(bundle) {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

fn not_ended(id: &str) -> Error {
    Error::DeadlineExceeded(format!(
        "container {id} has not ended {} s after SIGKILL",
        STOP_GRACE.as_secs()
    ))
}

/// The state of a container, asked until its creation has ended.
async fn state_when_made(shim: &Shim, id: &str) -> Result<TaskState, ShimError> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        match shim.state(id).await {
            // Nothing else refuses to say a state: it is still being created.
            Err(ShimError::Refused {
                code: ttrpc::Code::FAILED_PRECONDITION,
                ..
            }) if begun.elapsed() < CREATION_LIMIT => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(500));
            }
            other => return other.map(|(state, _)| state),
        }
    }
}

/// CNI DEL and the namespace's pin.
pub(super) async fn release_network(node: &Node, pod: &Id) -> Result<()> {
    node.network.detach_id(pod.as_str()).await?;
    node.network.remove_netns(pod.as_str()).await?;
    Ok(())
}

/// The pod's own cgroup, where the daemon made it.
pub(super) async fn remove_cgroup(pod: &PodRecord) -> Result<()> {
    if !pod.owns_cgroup {
        return Ok(());
    }
    let path = pod.cgroup_parent.clone();
    blocking(move || {
        catamaran_cgroups::remove(&path).map_err(|e| Error::Cgroup {
            problem: chain(&e),
            path,
        })
    })
    .await
}

/// The bundle with all that is mounted in it, and the shim's sockets.
pub(super) async fn remove_bundle(node: &Arc<Node>, pod: &Id) -> Result<()> {
    let (node, pod) = (node.clone(), pod.clone());
    blocking(move || {
        remove_tree(&node.dirs.pod(&pod))?;
        remove_sockets(&node.dirs.sockets(), pod.short())
    })
    .await
}

/// A container's bundle with all that is mounted in it.
pub(super) async fn remove_container_bundle(node: &Node, pod: &Id, container: &Id) -> Result<()> {
    let bundle = node.dirs.container(pod, container);
    blocking(move || remove_tree(&bundle)).await
}

fn remove_sockets(dir: &Path, short: &str) -> Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(short) {
            absent(std::fs::remove_file(entry.path())).map_err(Error::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

/// Unmounts all below `dir`, then removes it. Never removes through a mount: a volume's files are not ours.
pub(super) fn remove_tree(dir: &Path) -> Result<()> {
    unmount_below(dir)?;
    let left = mounts_below(dir)?;
    if let Some(mount) = left.first() {
        return Err(Error::Internal(format!("{} is still mounted", mount.display())));
    }
    absent(super::trees::remove(dir)).map_err(Error::io("remove", dir))
}

fn unmount_below(dir: &Path) -> Result<()> {
    // A mount may hide others of the same path, so look again until nothing is left.
    for _ in 0..16 {
        let mounts = mounts_below(dir)?;
        if mounts.is_empty() {
            break;
        }
        for mount in mounts {
            if let Err(error) = unmount(&mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                && !matches!(error, rustix::io::Errno::INVAL | rustix::io::Errno::NOENT)
            {
                return Err(Error::io("unmount", mount)(error.into()));
            }
        }
    }
    Ok(())
}

/// Mount points at or below `dir`, the deepest first.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let text =
        std::fs::read_to_string("/proc/self/mountinfo").map_err(Error::io("read", "/proc/self/mountinfo"))?;
    Ok(mount_points_below(&text, dir))
}

fn mount_points_below(mountinfo: &str, dir: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|point| point.starts_with(dir))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    points
}

/// proc_pid_mountinfo(5): space, tab, newline and backslash are octal escapes.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

/// What is gone already needs no removal.
fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Runs file system work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Internal(format!("a task ended: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::{MountFlags, mount};

    #[test]
    fn mount_points_are_found_unescaped_and_deepest_first() {
        let text = "22 1 0:1 / /run/p/a rw - tmpfs tmpfs rw\n23 22 0:2 / /run/p/a/b\\040c rw - tmpfs tmpfs rw\n24 1 0:3 / /run/pa rw - tmpfs tmpfs rw\n";
        assert_eq!(
            mount_points_below(text, Path::new("/run/p")),
            [PathBuf::from("/run/p/a/b c"), PathBuf::from("/run/p/a")]
        );
    }

    #[test]
    fn a_tree_is_removed_with_its_mounts_and_what_they_show_stays() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bundle");
        let (bound, tmpfs) = (bundle.join("volume dir"), bundle.join("shm"));
        std::fs::create_dir_all(&bound).unwrap();
        std::fs::create_dir_all(&tmpfs).unwrap();
        mount(outside.path(), &bound, "", MountFlags::BIND, None).unwrap();
        mount("tmpfs", &tmpfs, "tmpfs", MountFlags::empty(), None).unwrap();
        mount("tmpfs", &tmpfs, "tmpfs", MountFlags::empty(), None).unwrap();
        remove_tree(&bundle).unwrap();
        assert!(!bundle.exists());
        assert!(outside.path().join("kept").exists());
        remove_tree(&bundle).unwrap();
    }

    #[test]
    fn sockets_of_one_pod_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["abc.sock", "abc-stream.sock", "abd.sock"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        remove_sockets(dir.path(), "abc").unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["abd.sock"]);
    }
}
