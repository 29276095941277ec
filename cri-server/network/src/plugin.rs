//! One plugin process: found, started, fed, bounded in time and output, its answer or error read (CNI spec,
//! section 2 and 5). The plugin leads a process group of its own, so that a time limit ends its helpers too
//! (address management plugins, iptables).

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::error::{NetworkError, Result};

/// A result lists interfaces, addresses and routes; a mebibyte is thousands of them.
const MAX_STDOUT: usize = 1 << 20;
/// Of stderr only what fits a message is kept; the rest is read and dropped.
const MAX_STDERR: usize = 4096;
/// How long output may stay open after the plugin itself has ended.
const LINGER: Duration = Duration::from_secs(2);

/// What is asked of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Attach the pod.
    Add,
    /// Detach it.
    Del,
    /// Whether the plugin could attach pods (CNI 1.1).
    Status,
}

impl Verb {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Status => "STATUS",
        }
    }
}

/// One call of a plugin.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    /// The plugin's type.
    pub(crate) plugin: &'a str,
    pub(crate) verb: Verb,
    pub(crate) bin_dirs: &'a [PathBuf],
    /// CNI_* variables beside CNI_COMMAND and CNI_PATH.
    pub(crate) variables: &'a [(&'static str, OsString)],
    pub(crate) stdin: &'a [u8],
    pub(crate) limit: Duration,
    /// A locked file that the plugin and its children keep open, see [`crate::record::lock`].
    pub(crate) lock: Option<&'a File>,
}

/// Whether a plugin's type can name an executable in a plugin directory and nothing else.
pub(crate) fn good_type(name: &str) -> bool {
    !name.is_empty() && !matches!(name, "." | "..") && !name.contains(['/', '\0'])
}

/// The plugin's executable.
pub(crate) fn find(bin_dirs: &[PathBuf], plugin: &str) -> Result<PathBuf> {
    if good_type(plugin)
        && let Some(path) = bin_dirs
            .iter()
            .map(|dir| dir.join(plugin))
            .find(|path| path.is_file())
    {
        return Ok(path);
    }
    let dirs: Vec<_> = bin_dirs.iter().map(|dir| dir.display().to_string()).collect();
    Err(NetworkError::Missing {
        plugin: plugin.to_owned(),
        dirs: dirs.join(", "),
    })
}

/// The PATH that plugins get. Some service managers set none, and plugins start iptables.
pub(crate) fn search_path() -> OsString {
    std::env::var_os("PATH")
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| OsString::from("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"))
}

/// Kills the plugin's process group unless the plugin was waited for: its id is then free for others.
struct Running(Child);

impl Running {
    fn kill_group(&self) {
        if let Some(leader) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            // The group may have ended by itself.
            let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group();
    }
}

impl Call<'_> {
    /// Runs the plugin to its end and gives what it wrote to stdout.
    pub(crate) async fn run(&self) -> Result<Vec<u8>> {
        let path = find(self.bin_dirs, self.plugin)?;
        let mut running = Running(
            self.command(&path)?
                .spawn()
                .map_err(|source| NetworkError::Spawn {
                    path: path.clone(),
                    source,
                })?,
        );
        let outcome = tokio::time::timeout(self.limit, self.converse(&mut running.0)).await;
        if outcome.is_err() || matches!(outcome, Ok(Err(_))) {
            running.kill_group();
            // A killed process is gone at once, unless it sits in the kernel; then tokio reaps it later.
            let _ = tokio::time::timeout(LINGER, running.0.wait()).await;
        }
        let Ok(outcome) = outcome else {
            let (plugin, verb) = (self.plugin.to_owned(), self.verb.name());
            return Err(NetworkError::Timeout {
                plugin,
                verb,
                limit: self.limit,
            });
        };
        let (status, stdout, stderr) = outcome?;
        if status.success() {
            Ok(stdout)
        } else {
            Err(self.refusal(status, &stdout, &stderr))
        }
    }

    fn command(&self, path: &Path) -> Result<Command> {
        let cni_path = std::env::join_paths(self.bin_dirs).map_err(|error| NetworkError::Spawn {
            path: path.to_owned(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidInput, error),
        })?;
        let mut command = Command::new(path);
        command
            .env("PATH", search_path())
            .env("CNI_COMMAND", self.verb.name())
            .env("CNI_PATH", cni_path)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(lock) = self.lock {
            let lock = lock.as_raw_fd();
            let inherit = move || {
                // SAFETY: fcntl(2) with F_SETFD takes no pointer; the descriptor is open, since `self.lock`
                // outlives the spawn.
                if unsafe { libc::fcntl(lock, libc::F_SETFD, 0) } == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            };
            // SAFETY: between fork and exec only the above runs: one async-signal-safe call, no allocation.
            unsafe { command.pre_exec(inherit) };
        }
        Ok(command)
    }

    /// Feeds stdin and reads both outputs while waiting for the end.
    async fn converse(&self, child: &mut Child) -> Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(self.protocol("its pipes are missing"));
        };
        let feed = async {
            // A plugin may end without reading everything.
            let _ = stdin.write_all(self.stdin).await;
            drop(stdin);
        };
        let talk = async {
            let ((), stdout, stderr) = tokio::join!(
                feed,
                read_bounded(stdout, MAX_STDOUT),
                read_bounded(stderr, MAX_STDERR)
            );
            (stdout, stderr)
        };
        tokio::pin!(talk);
        let (status, (stdout, stderr)) = tokio::select! {
            talked = &mut talk => (child.wait().await, talked),
            status = child.wait() => {
                let talked = tokio::time::timeout(LINGER, talk).await;
                (status, talked.map_err(|_| self.protocol("it left its output open after its end"))?)
            }
        };
        let status = status.map_err(|error| self.protocol(&format!("it cannot be waited for: {error}")))?;
        let (stdout, whole) =
            stdout.map_err(|error| self.protocol(&format!("unreadable output: {error}")))?;
        if !whole {
            return Err(self.protocol(&format!("it wrote more than {MAX_STDOUT} bytes")));
        }
        Ok((status, stdout, stderr.map(|(text, _)| text).unwrap_or_default()))
    }

    /// The error that a plugin wrote, or what else is known of its failure.
    fn refusal(&self, status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> NetworkError {
        #[derive(Deserialize)]
        struct CniError {
            code: u64,
            #[serde(default)]
            msg: String,
            #[serde(default)]
            details: String,
        }
        match serde_json::from_slice::<CniError>(stdout) {
            Ok(CniError { code, msg, details }) => {
                let message = match (msg.is_empty(), details.is_empty()) {
                    (false, false) => format!("{msg}: {details}"),
                    (true, true) => excerpt(stderr),
                    _ => msg + &details,
                };
                let (plugin, verb) = (self.plugin.to_owned(), self.verb.name());
                NetworkError::Plugin {
                    plugin,
                    verb,
                    code,
                    message: bounded(&message),
                }
            }
            Err(_) if stdout.is_empty() => self.protocol(&format!("{status}; stderr: {}", excerpt(stderr))),
            Err(_) => self.protocol(&format!(
                "{status}; stdout: {}; stderr: {}",
                excerpt(stdout),
                excerpt(stderr)
            )),
        }
    }

    /// A breach of the protocol by this plugin.
    pub(crate) fn protocol(&self, what: &str) -> NetworkError {
        let (plugin, verb) = (self.plugin.to_owned(), self.verb.name());
        NetworkError::Protocol {
            plugin,
            verb,
            what: what.to_owned(),
        }
    }
}

/// Reads to the end and keeps the first `limit` bytes; says whether that was all. Stops at the limit of
/// stdout's size, as that is an error anyway; stderr is drained, so that a talkative plugin does not block.
async fn read_bounded(mut from: impl AsyncRead + Unpin, limit: usize) -> std::io::Result<(Vec<u8>, bool)> {
    let mut kept = Vec::new();
    let mut buffer = [0u8; 8192];
    let mut whole = true;
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok((kept, whole));
        }
        let room = limit - kept.len();
        kept.extend_from_slice(&buffer[..count.min(room)]);
        if count > room {
            whole = false;
            if limit == MAX_STDOUT {
                return Ok((kept, false));
            }
        }
    }
}

/// The start of some output for a message, on one line.
pub(crate) fn excerpt(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(&output[..output.len().min(MAX_STDERR)]);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.is_empty() {
        "(nothing)".to_owned()
    } else {
        bounded(&line)
    }
}

fn bounded(message: &str) -> String {
    const LONGEST: usize = 600;
    if message.chars().count() <= LONGEST {
        message.to_owned()
    } else {
        message.chars().take(LONGEST).chain("…".chars()).collect()
    }
}
