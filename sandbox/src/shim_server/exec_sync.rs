//! ExecSync: one process in a running container, its output gathered up to a bound, under a time limit that
//! includes the runtime's own time. What outlives the process with its output open is not waited for. What is
//! too long for one answer is left with a session, from which the caller reads it.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ShimError;
use super::backend::Reader;
use super::container::{Container, wants_terminal};
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
/// A killed process has so long to end.
const DEATH: Duration = Duration::from_secs(5);

/// Runs the request; dropping the future kills the process and what it started.
pub(crate) async fn run(
    pod: &Arc<Pod>,
    container: Arc<Container>,
    request: ExecSyncRequest,
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
    let (_caller, gone) = oneshot::channel::<()>();
    detached(gather(pod.clone(), container, request, deadline, gone)).await
}

async fn gather(
    pod: Arc<Pod>,
    container: Arc<Container>,
    request: ExecSyncRequest,
    deadline: Option<Instant>,
    mut gone: oneshot::Receiver<()>,
) -> Result<ExecSyncResponse, ShimError> {
    let bound = usize::try_from(request.max_output)
        .unwrap_or(usize::MAX)
        .min(MAX_KEPT);
    let mut process = container.exec(request.process, false, false).await?;
    let mut stdout = Gathered::new(process.stdout.take(), bound);
    let mut stderr = Gathered::new(process.stderr.take(), bound);
    let mut exit = process.exit;
    let mut record = None;
    let mut timed_out = false;
    let mut cancelled = false;
    let mut drain_until = None;
    let mut quiet_until = None;
    let mut give_up = None;
    let far = || Instant::now() + Duration::from_secs(86_400 * 365);
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
            () = tokio::time::sleep_until(deadline.unwrap_or_else(far)),
                if deadline.is_some() && record.is_none() && !timed_out =>
            {
                timed_out = true;
                process.control.kill_tree().await;
                give_up = Some(Instant::now() + DEATH);
            }
            _ = &mut gone, if record.is_none() && !cancelled => {
                cancelled = true;
                process.control.kill_tree().await;
                give_up = Some(Instant::now() + DEATH);
            }
            () = tokio::time::sleep_until(give_up.unwrap_or_else(far)), if give_up.is_some() && record.is_none() => {
                tracing::warn!(container = container.id, pid = process.pid, "killed process does not end");
                break;
            }
            () = tokio::time::sleep_until(silent.unwrap_or_else(far)), if silent.is_some() => break,
        }
    }
    let mut response = ExecSyncResponse::new();
    response.exit_code = record.map_or(128 + libc::SIGKILL, |record| record.exit_code);
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
