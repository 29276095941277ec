//! A container as its shim keeps it, with its first process and its execs.
//!
//! ```text
//! Created ── start ──▶ Running ◀── pause, resume ──▶ Paused
//!    └──────────── the process ends ─────────┴──▶ Stopped(record)
//! ```
//! Stopped is entered once, after the output was drained and the exit record is in the bundle; Wait answers then.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::ShimError;
use super::backend::{ContainerBackend, ExecProcess, Process, ProcessControl, Writer};
use super::output::{Output, Stall, lock};
use crate::cri_log::{CriLog, LogStream};
use crate::exit::ExitRecord;
use crate::stdio::{InputSource, OutputTarget};

/// How long an attached reader that takes nothing may hold a container's output back.
const ATTACH_STALL: std::time::Duration = std::time::Duration::from_secs(10);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running,
    Paused,
    Stopped(ExitRecord),
}

/// stdio of a process, as asked for.
#[derive(Debug, Clone)]
pub(crate) struct Stdio {
    /// As spelled in the request, for Task.State.
    pub(crate) spelled: [String; 3],
    pub(crate) stdin: InputSource,
    pub(crate) stdout: OutputTarget,
    pub(crate) stderr: OutputTarget,
    pub(crate) terminal: bool,
}

impl Stdio {
    pub(crate) fn parse(spelled: [String; 3], terminal: bool) -> Result<Self, ShimError> {
        let invalid = |error: crate::stdio::InvalidStdio| ShimError::InvalidArgument(error.to_string());
        let stdin = InputSource::parse(&spelled[0]).map_err(invalid)?;
        let stdout = OutputTarget::parse(&spelled[1]).map_err(invalid)?;
        let stderr = OutputTarget::parse(&spelled[2]).map_err(invalid)?;
        if matches!(stderr, OutputTarget::CriLog(_)) {
            let text = "stderr names a CRI log; the log named by stdout takes both streams";
            return Err(ShimError::InvalidArgument(text.to_owned()));
        }
        Ok(Self {
            spelled,
            stdin,
            stdout,
            stderr,
            terminal,
        })
    }

    pub(crate) fn wants_stdin(&self) -> bool {
        self.stdin != InputSource::Null
    }

    /// Opens what output goes to, before the process exists, so that a wrong path leaves nothing behind.
    pub(crate) fn open(&self) -> Result<OpenStdio, ShimError> {
        let log = match &self.stdout {
            OutputTarget::CriLog(path) => Some(
                CriLog::open(path)
                    .map_err(|error| ShimError::internal(format!("open log {}", path.display()), &error))?,
            ),
            _ => None,
        };
        let fifo = |target: &OutputTarget| match target {
            OutputTarget::Fifo(path) => open_fifo(path, |options, path| options.open_sender(path)).map(Some),
            _ => Ok(None),
        };
        let stdin = match &self.stdin {
            InputSource::Fifo(path) => Some(open_fifo(path, |options, path| options.open_receiver(path))?),
            _ => None,
        };
        Ok(OpenStdio {
            log,
            stdin,
            stdout: fifo(&self.stdout)?,
            stderr: fifo(&self.stderr)?,
        })
    }
}

/// What [`Stdio`] names, open.
pub(crate) struct OpenStdio {
    log: Option<CriLog>,
    stdin: Option<pipe::Receiver>,
    stdout: Option<pipe::Sender>,
    stderr: Option<pipe::Sender>,
}

/// Both ways, so that a reader that comes later or comes back does not matter.
fn open_fifo<T>(
    path: &Path,
    open: impl FnOnce(&pipe::OpenOptions, &Path) -> std::io::Result<T>,
) -> Result<T, ShimError> {
    open(pipe::OpenOptions::new().read_write(true), path)
        .map_err(|error| ShimError::internal(format!("open FIFO {}", path.display()), &error))
}

/// A process of a container: its first or an exec.
pub(crate) struct RunningProcess {
    pub(crate) pid: u32,
    pub(crate) stdio: Stdio,
    pub(crate) control: Arc<dyn ProcessControl>,
    pub(crate) output: Arc<Output>,
    /// Taken when it closes.
    pub(crate) stdin: tokio::sync::Mutex<Option<Writer>>,
    state: watch::Sender<State>,
}

impl RunningProcess {
    /// Takes over a process that a backend made: pumps its stdio and waits for its end. `record_in` is the
    /// bundle that gets the exit record.
    pub(crate) fn adopt(
        process: Process,
        stdio: Stdio,
        open: OpenStdio,
        record_in: Option<PathBuf>,
    ) -> Arc<Self> {
        let output = Output::new(open.log, Stall::Limit(ATTACH_STALL));
        let pumps = (open.stdin, open.stdout, open.stderr);
        Self::adopt_with(process, stdio, output, pumps, record_in)
    }

    /// As [`Self::adopt`] for an exec session: `output` already has its reader.
    pub(crate) fn adopt_session(process: Process, stdio: Stdio, output: Arc<Output>) -> Arc<Self> {
        Self::adopt_with(process, stdio, output, (None, None, None), None)
    }

    fn adopt_with(
        process: Process,
        stdio: Stdio,
        output: Arc<Output>,
        fifos: (Option<pipe::Receiver>, Option<pipe::Sender>, Option<pipe::Sender>),
        record_in: Option<PathBuf>,
    ) -> Arc<Self> {
        let this = Arc::new(Self {
            pid: process.pid,
            stdio,
            control: process.control,
            output,
            stdin: tokio::sync::Mutex::new(process.stdin),
            state: watch::Sender::new(State::Created),
        });
        if let Some(stdout) = process.stdout {
            this.output.pump(LogStream::Stdout, stdout, fifos.1);
        }
        if let Some(stderr) = process.stderr {
            this.output.pump(LogStream::Stderr, stderr, fifos.2);
        }
        if let Some(fifo) = fifos.0 {
            tokio::spawn(copy_input(fifo, this.clone()));
        }
        let (exit, waiting) = (process.exit, this.clone());
        tokio::spawn(async move {
            let record = exit.await;
            waiting.output.drained().await;
            if let Some(bundle) = record_in
                && let Err(error) = record.write(&bundle)
            {
                tracing::error!(%error, bundle = %bundle.display(), "exit record not written");
            }
            waiting.state.send_replace(State::Stopped(record));
        });
        this
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Moves between the living states; Stopped is final.
    pub(crate) fn enter(&self, next: State) {
        self.state.send_if_modified(|state| {
            let living = !matches!(state, State::Stopped(_));
            if living {
                *state = next;
            }
            living
        });
    }

    /// Resolves when the process is Stopped.
    pub(crate) async fn wait(&self) -> ExitRecord {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(record) = &*state.borrow_and_update() {
                return record.clone();
            }
            if state.changed().await.is_err() {
                // The sender is in `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends the process's input.
    pub(crate) async fn close_stdin(&self) {
        self.stdin.lock().await.take();
    }

    /// Writes to the process's input; false where it is closed.
    pub(crate) async fn write_stdin(&self, data: &[u8]) -> bool {
        let mut stdin = self.stdin.lock().await;
        let Some(writer) = stdin.as_mut() else {
            return false;
        };
        let written = async {
            writer.write_all(data).await?;
            writer.flush().await
        };
        let open = written.await.is_ok();
        if !open {
            stdin.take();
        }
        open
    }
}

async fn copy_input(mut fifo: pipe::Receiver, process: Arc<RunningProcess>) {
    use tokio::io::AsyncReadExt;
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            read = fifo.read(&mut buffer) => match read {
                Ok(count) if count > 0 && process.write_stdin(&buffer[..count]).await => {}
                _ => break,
            },
            _ = process.wait() => break,
        }
    }
    process.close_stdin().await;
}

/// An exec by Task.Exec.
pub(crate) enum Exec {
    /// Not started.
    Prepared {
        process: Vec<u8>,
        stdio: Stdio,
    },
    /// Start is at work.
    Starting,
    Started(Arc<RunningProcess>),
}

/// See the module.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) backend: Arc<dyn ContainerBackend>,
    pub(crate) init: Arc<RunningProcess>,
    pub(crate) execs: Mutex<HashMap<String, Exec>>,
    /// One Start or Delete at a time.
    pub(crate) verbs: tokio::sync::Mutex<()>,
    next_exec: AtomicU64,
}

impl Container {
    pub(crate) fn new(
        id: String,
        bundle: PathBuf,
        backend: Arc<dyn ContainerBackend>,
        init: Arc<RunningProcess>,
    ) -> Self {
        let (execs, verbs) = (Mutex::default(), tokio::sync::Mutex::default());
        Self {
            id,
            bundle,
            backend,
            init,
            execs,
            verbs,
            next_exec: AtomicU64::new(0),
        }
    }

    /// The container's first process, or an exec that was started.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<RunningProcess>, ShimError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        match lock(&self.execs).get(exec_id) {
            Some(Exec::Started(process)) => Ok(process.clone()),
            Some(_) => Err(ShimError::FailedPrecondition(format!(
                "exec {exec_id} of container {} is not started",
                self.id
            ))),
            None => Err(ShimError::NotFound(format!(
                "container {} has no exec {exec_id}",
                self.id
            ))),
        }
    }

    pub(crate) fn require_running(&self) -> Result<(), ShimError> {
        let is = match self.init.state() {
            State::Running => return Ok(()),
            State::Created => "not started",
            State::Paused => "paused",
            State::Stopped(_) => "stopped",
        };
        Err(ShimError::FailedPrecondition(format!(
            "container {} is {is}",
            self.id
        )))
    }

    /// Starts a process for a caller that is not the Task service; its exec id is made up.
    pub(crate) async fn exec(
        &self,
        process: Vec<u8>,
        terminal: bool,
        stdin: bool,
    ) -> Result<Process, ShimError> {
        self.require_running()?;
        let exec_id = format!("stream-{}", self.next_exec.fetch_add(1, Ordering::Relaxed));
        self.backend
            .exec(ExecProcess {
                exec_id,
                process,
                terminal,
                stdin,
            })
            .await
    }
}

/// Whether an OCI Process, JSON, asks for a terminal.
pub(crate) fn wants_terminal(process: &[u8]) -> Result<bool, ShimError> {
    #[derive(serde::Deserialize)]
    struct OciProcess {
        #[serde(default)]
        terminal: bool,
    }
    serde_json::from_slice::<OciProcess>(process)
        .map(|process| process.terminal)
        .map_err(|error| ShimError::InvalidArgument(format!("process is not an OCI process: {error}")))
}
