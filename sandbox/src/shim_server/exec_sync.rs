//! ExecSync: one process in a running container, its output gathered up to a bound, under a time limit that
//! includes the runtime's own time. What outlives the process with its output open is not waited for. What is
//! too long for one answer is left with a session, from which the caller reads it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::ShimError;
use super::backend::{Process, Reader};
use super::container::{Container, wants_terminal};
use super::output::lock;
use super::pod::{Pod, detached};
use super::sessions::Session;
use crate::protocol::stream::{ExecSyncRequest, ExecSyncResponse, OpenResponse};

/// Bytes of stdout and stderr together that an answer holds: ttrpc's limit of a message, less what else it has.
const MAX_ANSWER: usize = (4 << 20) - 4096;
/// Bytes of each stream that are kept, whatever is asked: the CRI's bound of ExecSync.
const MAX_KEPT: usize = 16 << 20;
/// After the process has ended, its output is awaited so long after the last piece of it.
const QUIET: Duration = Duration::from_millis(500);
/// And so long in all.
const DRAIN: Duration = Duration::from_secs(5);
/// 128 + SIGKILL.
const KILLED: i32 = 137;
/// A killed process has so long to end, and one that nobody wants any more to be started before that is ended.
const DEATH: Duration = Duration::from_secs(5);

/// Calls at work that can be cancelled, by their key.
#[derive(Default)]
pub(crate) struct ExecSyncs(Mutex<HashMap<String, mpsc::WeakSender<()>>>);

impl ExecSyncs {
    /// `caller` lives as long as the call.
    fn add(&self, key: String, caller: &mpsc::Sender<()>) -> Result<(), ShimError> {
        let mut calls = lock(&self.0);
        calls.retain(|_, call| call.strong_count() > 0);
        if calls.contains_key(&key) {
            return Err(ShimError::AlreadyExists(format!(
                "cancel_key: another call has {key:?}"
            )));
        }
        calls.insert(key, caller.downgrade());
        Ok(())
    }

    /// One that has ended, or never came, is no error.
    pub(crate) fn cancel(&self, key: &str) {
        let call = lock(&self.0).remove(key);
        if let Some(caller) = call.and_then(|call| call.upgrade()) {
            // It was told before, where that fails.
            let _ = caller.try_send(());
        }
    }
}

/// Runs the request; dropping the future kills the process and what it started, as [`ExecSyncs::cancel`] does.
pub(crate) async fn run(
    pod: &Arc<Pod>,
    container: Arc<Container>,
    mut request: ExecSyncRequest,
) -> Result<ExecSyncResponse, ShimError> {
    if wants_terminal(&request.process)? {
        return Err(ShimError::InvalidArgument(
            "process.terminal: ExecSync has no terminal".to_owned(),
        ));
    }
    let limit = match request.timeout_ms {
        0 => None,
        limit => Some(Duration::from_millis(u64::try_from(limit).map_err(|_| {
            ShimError::InvalidArgument(format!("timeout_ms: {limit} is negative"))
        })?)),
    };
    let deadline = limit.map(|limit| Instant::now() + limit);
    // The caller's half is dropped with the caller's future.
    let (caller, gone) = mpsc::channel(1);
    let key = std::mem::take(&mut request.cancel_key);
    if !key.is_empty() {
        pod.exec_syncs.add(key, &caller)?;
    }
    detached(gather(pod.clone(), container, request, deadline, gone)).await
}

async fn gather(
    pod: Arc<Pod>,
    container: Arc<Container>,
    request: ExecSyncRequest,
    deadline: Option<Instant>,
    mut gone: mpsc::Receiver<()>,
) -> Result<ExecSyncResponse, ShimError> {
    let bound = usize::try_from(request.max_output)
        .unwrap_or(usize::MAX)
        .min(MAX_KEPT);
    let id = container.id.clone();
    let mut starting = async move { container.exec(request.process, false, false).await }.boxed();
    let mut process = tokio::select! {
        process = &mut starting => process?,
        () = at(deadline) => {
            abandon(starting);
            return Ok(ExecSyncResponse {
                exit_code: KILLED,
                timed_out: true,
                ..ExecSyncResponse::default()
            });
        }
        _ = gone.recv() => {
            abandon(starting);
            return Err(cancelled(&id));
        }
    };
    let mut stdout = Gathered::new(process.stdout.take(), bound);
    let mut stderr = Gathered::new(process.stderr.take(), bound);
    let mut exit = process.exit;
    let mut record = None;
    let mut timed_out = false;
    let mut caller_gone = false;
    let mut drain_until = None;
    let mut quiet_until = None;
    let mut give_up = None;
    while record.is_none() || stdout.reader.is_some() || stderr.reader.is_some() {
        let silent = match (drain_until, quiet_until) {
            (Some(drain), Some(quiet)) => Some(std::cmp::min::<Instant>(drain, quiet)),
            _ => None,
        };
        tokio::select! {
            () = stdout.read() => quiet_until = Some(Instant::now() + QUIET),
            () = stderr.read() => quiet_until = Some(Instant::now() + QUIET),
            ended = &mut exit, if record.is_none() => {
                record = Some(ended);
                drain_until = Some(Instant::now() + DRAIN);
                quiet_until = Some(Instant::now() + QUIET);
            }
            () = at(deadline), if record.is_none() && !timed_out => {
                timed_out = true;
                process.control.kill_tree().await;
                give_up = Some(Instant::now() + DEATH);
            }
            _ = gone.recv(), if record.is_none() && !caller_gone => {
                caller_gone = true;
                process.control.kill_tree().await;
                give_up = Some(Instant::now() + DEATH);
            }
            () = at(give_up), if record.is_none() => {
                tracing::warn!(container = id, pid = process.pid, "killed process does not end");
                break;
            }
            () = at(silent) => break,
        }
    }
    if caller_gone {
        return Err(cancelled(&id));
    }
    let mut response = ExecSyncResponse::new();
    response.exit_code = record.map_or(KILLED, |record| record.exit_code);
    response.timed_out = timed_out;
    response.truncated = stdout.truncated || stderr.truncated;
    let out_room = stdout.kept.len().min(MAX_ANSWER);
    let err_room = stderr.kept.len().min(MAX_ANSWER - out_room);
    let rest = Session::Rest {
        stdout: stdout.kept.split_off(out_room),
        stderr: stderr.kept.split_off(err_room),
        exit_code: response.exit_code,
    };
    if matches!(&rest, Session::Rest { stdout, stderr, .. } if !stdout.is_empty() || !stderr.is_empty()) {
        let (address, token) = pod.sessions.open_large(&pod, rest)?;
        response.rest = protobuf::MessageField::some(OpenResponse {
            address: address.display().to_string(),
            token: token.to_vec(),
            ..Default::default()
        });
    }
    response.stdout = stdout.kept;
    response.stderr = stderr.kept;
    Ok(response)
}

/// Nobody hears it but who cancelled.
fn cancelled(container: &str) -> ShimError {
    ShimError::FailedPrecondition(format!(
        "the command in container {container} was killed, as its caller went away"
    ))
}

/// Never, where there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Ends a process that is only being started: it is killed when it is known, or its start is ended.
fn abandon(starting: BoxFuture<'static, Result<Process, ShimError>>) {
    tokio::spawn(async move {
        if let Ok(Ok(process)) = tokio::time::timeout(DEATH, starting).await {
            process.control.kill_tree().await;
        }
    });
}

/// One output stream up to a bound; the rest is read and dropped.
struct Gathered {
    reader: Option<Reader>,
    kept: Vec<u8>,
    bound: usize,
    truncated: bool,
}

impl Gathered {
    fn new(reader: Option<Reader>, bound: usize) -> Self {
        Self {
            reader,
            kept: Vec::new(),
            bound,
            truncated: false,
        }
    }

    /// Reads one piece; never resolves after the end.
    async fn read(&mut self) {
        let Some(reader) = &mut self.reader else {
            return std::future::pending().await;
        };
        let mut piece = [0; 8192];
        match reader.read(&mut piece).await {
            Ok(count) if count > 0 => {
                let keep = count.min(self.bound - self.kept.len());
                self.kept.extend_from_slice(&piece[..keep]);
                self.truncated |= keep < count;
            }
            _ => self.reader = None,
        }
    }
}
