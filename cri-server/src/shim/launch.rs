//! Running a shim's executable: `start`, which forks the server and prints its address, and `delete`, which
//! cleans up what a dead one left (containerd's shim v2 command line).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use catamaran_sandbox::bootstrap::PID_FILE;
use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::{Shim, ShimError};

const START_LIMIT: Duration = Duration::from_secs(20);
const DELETE_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a shim's output that are read; its answer is one line.
const OUTPUT_LIMIT: u64 = 64 << 10;
/// The containerd namespace that shims and tools expect of Kubernetes containers.
const NAMESPACE: &str = "k8s.io";

/// A shim of a pod, as it is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Its executable.
    pub shim: PathBuf,
    /// Sandbox id.
    pub id: String,
    /// The sandbox's bundle; the shim's working directory.
    pub bundle: PathBuf,
}

#[derive(Deserialize)]
struct BootstrapAnswer {
    version: u32,
    address: String,
    protocol: String,
}

impl Launch {
    /// Starts the shim and connects to it. A shim of this pod that already serves is connected to.
    ///
    /// # Errors
    /// [`ShimError::Start`] with what it wrote, or [`ShimError::Connect`].
    pub async fn start(&self) -> super::Result<Shim> {
        let output = self.run("start", START_LIMIT).await?;
        let answer: BootstrapAnswer = serde_json::from_slice(&output)
            .map_err(|e| self.problem(format!("its answer is not the bootstrap JSON: {e}")))?;
        if answer.protocol != "ttrpc" || answer.version < 2 {
            return Err(self.problem(format!(
                "it speaks {} version {}; ttrpc version 2 or later is needed",
                answer.protocol, answer.version
            )));
        }
        let Some(socket) = answer.address.strip_prefix("unix://") else {
            return Err(self.problem(format!("its address {:?} is no unix socket", answer.address)));
        };
        Shim::connect(&self.id, Path::new(socket)).await
    }

    /// Cleans up after a shim that died: its processes, mounts and runtime state.
    ///
    /// # Errors
    /// [`ShimError::Start`] with what it wrote.
    pub async fn delete(&self) -> super::Result<()> {
        self.run("delete", DELETE_LIMIT).await.map(drop)
    }

    async fn run(&self, action: &str, limit: Duration) -> super::Result<Vec<u8>> {
        let mut command = Command::new(&self.shim);
        command.args(["-namespace", NAMESPACE, "-id", &self.id, "-address", ""]);
        if action == "delete" {
            command.arg("-bundle").arg(&self.bundle);
        }
        let mut child = command
            .arg(action)
            .current_dir(&self.bundle)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| self.problem(e.to_string()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let finished = async {
            let (stdout, stderr, status) =
                tokio::join!(read_bounded(stdout), read_bounded(stderr), child.wait());
            (stdout, stderr, status)
        };
        let (stdout, stderr, status) = tokio::time::timeout(limit, finished)
            .await
            .map_err(|_| self.problem(format!("`{action}` did not end within {} s", limit.as_secs())))?;
        let status = status.map_err(|e| self.problem(e.to_string()))?;
        if status.success() {
            return Ok(stdout);
        }
        let said = String::from_utf8_lossy(&stderr);
        let said = said.trim();
        let said = if said.is_empty() {
            self.log_tail()
        } else {
            said.to_owned()
        };
        Err(self.problem(format!("`{action}` ended with {status}: {said}")))
    }

    fn problem(&self, problem: String) -> ShimError {
        ShimError::Start {
            shim: self.shim.display().to_string(),
            problem,
        }
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read(self.bundle.join("shim.log")).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(2000)..])
            .trim()
            .to_owned()
    }
}

/// Whether the shim of a sandbox bundle lives, however slow it is: it holds the lock on its pid file for its life.
/// A shim that keeps no such file (a third party's) is not known to live.
#[must_use]
pub fn lives(bundle: &Path) -> bool {
    let Ok(file) = File::open(bundle.join(PID_FILE)) else {
        return false;
    };
    // Shared: two that look at once do not see each other. Released with the file.
    matches!(
        flock(&file, FlockOperation::NonBlockingLockShared),
        Err(rustix::io::Errno::WOULDBLOCK)
    )
}

async fn read_bounded<R: tokio::io::AsyncRead + Unpin>(from: Option<R>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(from) = from
        && let Err(error) = from.take(OUTPUT_LIMIT).read_to_end(&mut bytes).await
    {
        tracing::debug!(%error, "a shim's output could not be read to its end");
    }
    bytes
}

/// Finds a shim's executable: in the configured directory, else beside this executable, in
/// `/usr/lib/catamaran`, in `PATH`.
///
/// # Errors
/// A sentence naming the places.
pub fn find_shim(name: &str, configured: Option<&Path>) -> Result<PathBuf, String> {
    if let Some(dir) = configured {
        let path = dir.join(name);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(format!(
                "{} does not exist; check the configuration key shim_dir",
                path.display()
            ))
        };
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(name)));
    let installed = Some(Path::new("/usr/lib/catamaran").join(name));
    beside.into_iter().chain(installed).find(|path| path.is_file()).or_else(|| find_in_path(name)).ok_or_else(
        || {
            format!(
                "{name} is neither beside the daemon nor in /usr/lib/catamaran nor in PATH; install it or set shim_dir"
            )
        },
    )
}

/// Looks an executable up in `PATH`.
pub(crate) fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_on_the_pid_file_is_proof_of_life() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(!lives(bundle.path()));
        let file = File::create(bundle.path().join(PID_FILE)).unwrap();
        assert!(!lives(bundle.path()));
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert!(lives(bundle.path()));
        drop(file);
        assert!(!lives(bundle.path()));
    }
}
