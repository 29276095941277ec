//! A runtime process: one request, one answer.

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;

use super::payload::Payload;
use super::{Answer, Request, SOCKET, STATE, exec, log};
use crate::error::chain;

/// Why a request failed.
pub(super) enum Failure {
    /// The caller's mistake.
    Invalid(String),
    /// Anything else.
    Failed(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Failed(message)
    }
}

/// Does what the agent asks on the socket.
pub(crate) fn main() -> ExitCode {
    // SAFETY: the agent passes its socket as this descriptor and nothing else here uses it.
    let mut socket = unsafe { UnixStream::from_raw_fd(SOCKET) };
    let log = log::install();
    let answer = match serve(&mut socket) {
        Ok(pid) => Answer::Pid(pid),
        Err(Failure::Invalid(message)) => Answer::Invalid(message),
        Err(Failure::Failed(message)) => match payload_error(&message) {
            Some(message) => Answer::Invalid(message),
            None => Answer::Failed(log::with_details(message, log)),
        },
    };
    let failed = !matches!(answer, Answer::Pid(_));
    let mut line = serde_json::to_vec(&answer).unwrap_or_default();
    line.push(b'\n');
    if socket.write_all(&line).is_err() || failed {
        return ExitCode::FAILURE;
    }
    // The new process becomes the agent's child when this one exits: not before the agent watches it.
    let mut word = [0];
    match socket.read_exact(&mut word) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// A message of [`Payload`]'s check, found in what libcontainer made of it.
fn payload_error(message: &str) -> Option<String> {
    let at = message.rfind(super::payload::MARK)?;
    Some(
        message[at + super::payload::MARK.len()..]
            .trim_end_matches('"')
            .to_owned(),
    )
}

fn serve(socket: &mut UnixStream) -> Result<i32, Failure> {
    let mut body = Vec::new();
    socket
        .read_to_end(&mut body)
        .map_err(|error| format!("cannot read the request: {error}"))?;
    let request: Request =
        serde_json::from_slice(&body).map_err(|error| format!("cannot read the request: {error}"))?;
    // The agent's own protection from the OOM killer is not for containers.
    std::fs::write("/proc/self/oom_score_adj", "0")
        .map_err(|error| format!("cannot set oom_score_adj: {error}"))?;
    match request {
        Request::Create { id, bundle, console } => create(id, &bundle, console).map_err(Failure::Failed),
        Request::Exec {
            bundle,
            init,
            process,
            cgroup,
            cgroup_v2,
            console,
        } => exec::run(&exec::Exec {
            bundle,
            init,
            process: *process,
            cgroup,
            cgroup_v2,
            console,
        }),
    }
}

fn create(id: String, bundle: &Path, console: Option<PathBuf>) -> Result<i32, String> {
    let build = || {
        ContainerBuilder::new(id, SyscallType::default())
            .with_root_path(STATE)?
            .with_executor(Payload::default())
            .with_console_socket(console)
            .validate_id()?
            .as_init(bundle)
            .with_systemd(false)
            .with_detach(true)
            .build()
    };
    let container = build().map_err(|error| chain(&error))?;
    container
        .pid()
        .map(|pid| pid.as_raw())
        .ok_or_else(|| "libcontainer made no process".into())
}
