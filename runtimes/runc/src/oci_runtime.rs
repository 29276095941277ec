//! The OCI runtime's command line: runc's, which crun, youki and runsc also have.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use catamaran_sandbox::shim_server::ShimError;
use tokio::sync::oneshot;

use crate::cgroup::Cgroup;
use crate::process::HostProcess;
use crate::reaper::{Exit, Reaper};

/// A runtime that takes longer is killed.
const LIMIT: Duration = Duration::from_secs(120);
/// A killed one has so long to end.
const DEATH: Duration = Duration::from_secs(5);
/// Bytes of the runtime's messages that are looked at.
const MAX_MESSAGE: u64 = 16 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    #[error("start {}", binary.display())]
    Start { binary: PathBuf, source: std::io::Error },
    #[error("{binary} {command} failed: {message}")]
    Failed {
        binary: String,
        command: String,
        message: String,
    },
    #[error("{binary} {command} did not end within {} s", LIMIT.as_secs())]
    TimedOut { binary: String, command: String },
    #[error("{binary} {command} was ended because the pod is being stopped")]
    Ended { binary: String, command: String },
}

impl From<RuntimeError> for ShimError {
    fn from(error: RuntimeError) -> Self {
        match &error {
            RuntimeError::TimedOut { .. } => Self::DeadlineExceeded(error.to_string()),
            RuntimeError::Ended { .. } => Self::FailedPrecondition(error.to_string()),
            RuntimeError::Start { source, .. } => Self::Internal(format!("{error}: {source}")),
            RuntimeError::Failed { .. } => Self::Internal(error.to_string()),
        }
    }
}

/// stdio of the runtime's process; containers' first processes and execs inherit it.
#[derive(Default)]
pub(crate) struct CommandStdio {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// A runtime at work. It is killed where nobody awaits its end any more, with what it has put into the cgroup.
struct AtWork(Option<HostProcess>);

impl AtWork {
    fn kill(&self) {
        if let Some(process) = &self.0 {
            process.kill_tree_now();
        }
    }

    fn ended(&mut self) {
        self.0 = None;
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One runtime with the node's settings for it.
pub(crate) struct OciRuntime {
    binary: PathBuf,
    arguments: Vec<String>,
    root: PathBuf,
    reaper: Arc<Reaper>,
    next_log: AtomicU64,
    /// The pod ends: a `create` at work is ended too.
    ending: tokio::sync::watch::Sender<bool>,
}

impl OciRuntime {
    pub(crate) fn new(binary: PathBuf, arguments: Vec<String>, root: PathBuf, reaper: Arc<Reaper>) -> Self {
        Self {
            binary,
            arguments,
            root,
            reaper,
            next_log: AtomicU64::new(0),
            ending: tokio::sync::watch::Sender::new(false),
        }
    }

    /// Kills every `create` at work, and any to come: a runtime that hangs must not hold up the pod's end.
    pub(crate) fn end_creations(&self) {
        self.ending.send_replace(true);
    }

    /// Whether a container's processes are ordinary processes of this kernel, which can be signalled without
    /// the runtime. Known of these three; of others (runsc: the process is a kernel of its own) it is not.
    pub(crate) fn is_native(&self) -> bool {
        let name = self
            .binary
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        ["runc", "crun", "youki"]
            .iter()
            .any(|native| name.starts_with(native))
    }

    /// Runs a command to its end. `bundle` takes the runtime's log for the moment.
    pub(crate) async fn run<A: Into<OsString>>(
        &self,
        bundle: &Path,
        arguments: impl IntoIterator<Item = A>,
        stdio: CommandStdio,
    ) -> Result<(), RuntimeError> {
        self.run_in(Cgroup::none(), bundle, arguments, stdio).await
    }

    /// As [`Self::run`]. Where the runtime is killed, as it hangs or as the future is dropped, what it has started
    /// in the container's cgroup is killed as well.
    pub(crate) async fn run_in<A: Into<OsString>>(
        &self,
        cgroup: Cgroup,
        bundle: &Path,
        arguments: impl IntoIterator<Item = A>,
        stdio: CommandStdio,
    ) -> Result<(), RuntimeError> {
        let number = self.next_log.fetch_add(1, Ordering::Relaxed);
        // Some runtimes make no log where there is nothing to say.
        let log = Temporary(bundle.join(format!("runtime-{number}.log")));
        self.run_logged(&log.0, cgroup, arguments, stdio).await
    }

    async fn run_logged<A: Into<OsString>>(
        &self,
        log: &Path,
        cgroup: Cgroup,
        arguments: impl IntoIterator<Item = A>,
        stdio: CommandStdio,
    ) -> Result<(), RuntimeError> {
        let start = |source| RuntimeError::Start {
            binary: self.binary.clone(),
            source,
        };
        let arguments: Vec<OsString> = arguments.into_iter().map(Into::into).collect();
        let mut command = Command::new(&self.binary);
        command
            .args(global_arguments(&self.arguments, &self.root, log))
            .args(&arguments)
            .current_dir("/")
            .stdin(stdio.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(stdio.stdout.map_or_else(Stdio::null, Stdio::from));
        let messages = match stdio.stderr {
            Some(stderr) => {
                command.stderr(stderr);
                None
            }
            None => {
                let file = memory_file().map_err(start)?;
                command.stderr(file.try_clone().map_err(start)?);
                Some(file)
            }
        };
        let (pid, mut exit) = self.reaper.spawn(&mut command).map_err(start)?;
        let mut at_work = AtWork(Some(HostProcess::new(pid, None, cgroup, None)));
        // The runtime's ends of pipes live in `command` too.
        drop(command);
        let name = self
            .binary
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let verb = arguments
            .first()
            .map(|word| word.to_string_lossy().into_owned())
            .unwrap_or_default();
        let mut ending = self.ending.subscribe();
        let ended = async {
            if verb != "create" || ending.wait_for(|ending| *ending).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let code = tokio::select! {
            exit = &mut exit => exit.map_or(255, |exit| exit.code),
            () = ended => {
                at_work.kill();
                tracing::info!(pid, "a creation is ended with its pod");
                await_death(exit).await;
                at_work.ended();
                return Err(RuntimeError::Ended { binary: name, command: verb });
            }
            () = tokio::time::sleep(LIMIT) => {
                at_work.kill();
                tracing::error!(pid, verb, "the runtime hangs");
                await_death(exit).await;
                at_work.ended();
                return Err(RuntimeError::TimedOut {
                    binary: name,
                    command: verb,
                });
            }
        };
        at_work.ended();
        if code == 0 {
            return Ok(());
        }
        let message = last_error(log)
            .or_else(|| messages.and_then(text_of))
            .unwrap_or_else(|| format!("exit code {code}"));
        Err(RuntimeError::Failed {
            message: without_own_name(&message, &verb).to_owned(),
            binary: name,
            command: verb,
        })
    }
}

/// The end of a runtime that was killed precedes the clean-up of what it made.
async fn await_death(exit: oneshot::Receiver<Exit>) {
    if tokio::time::timeout(DEATH, exit).await.is_err() {
        tracing::error!("a killed runtime does not end");
    }
}

/// A file for the runtime. Where it cannot be removed it goes with the bundle.
pub(crate) struct Temporary(pub(crate) PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Arguments before the subcommand.
pub(crate) fn global_arguments(configured: &[String], root: &Path, log: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = configured.iter().map(OsString::from).collect();
    arguments.extend(["--root".into(), root.into(), "--log".into(), log.into()]);
    arguments.extend(["--log-format".into(), "json".into()]);
    arguments
}

/// An anonymous file.
pub(crate) fn memory_file() -> std::io::Result<File> {
    let fd = rustix::fs::memfd_create("runtime", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(File::from(fd))
}

/// Last error in a log of JSON lines, as logrus writes them.
fn last_error(log: &Path) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let mut text = String::new();
    File::open(log)
        .ok()?
        .take(1 << 20)
        .read_to_string(&mut text)
        .ok()?;
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))
        .map(|line| line.msg.trim().to_owned())
}

/// runc begins some of its messages with what failed, as ours do.
fn without_own_name<'a>(message: &'a str, verb: &str) -> &'a str {
    message
        .strip_prefix("runc ")
        .and_then(|rest| rest.strip_prefix(verb)?.strip_prefix(" failed: "))
        .unwrap_or(message)
}

fn text_of(mut file: File) -> Option<String> {
    file.rewind().ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_MESSAGE).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_said_once() {
        let one = |message| without_own_name(message, "create");
        assert_eq!(one("runc create failed: no such file"), "no such file");
        assert_eq!(
            one("runc run failed: no such file"),
            "runc run failed: no such file"
        );
        assert_eq!(one("no such file"), "no such file");
    }

    #[test]
    fn the_last_error_of_a_log_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let lines = "{\"level\":\"error\",\"msg\":\"first\",\"time\":\"t\"}\n\
                     {\"level\":\"error\",\"msg\":\"second\\n\",\"time\":\"t\"}\n\
                     {\"level\":\"warning\",\"msg\":\"later\",\"time\":\"t\"}\nnot json\n";
        std::fs::write(&log, lines).unwrap();
        assert_eq!(last_error(&log).unwrap(), "second");
        assert_eq!(last_error(&directory.path().join("none")), None);
    }
}
