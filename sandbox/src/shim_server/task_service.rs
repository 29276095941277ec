//! containerd's Task service (`containerd.task.v3`), checks and conversions.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc;
use ttrpc::r#async::TtrpcContext;

use super::ShimError;
use super::backend::{CreateContainer, ExecProcess, RootfsMount};
use super::container::{Container, Exec, RunningProcess, State, Stdio, wants_terminal};
use super::output::lock;
use super::pod::{Pod, detached};
use super::sandbox_service::timestamp;
use crate::exit::ExitRecord;
use crate::id::Id;
use crate::protocol::{OCI_PROCESS_TYPE, OCI_RESOURCES_TYPE};

type Empty = containerd_shim_protos::api::Empty;

pub(crate) struct TaskService(pub(crate) Arc<Pod>);

fn invalid(text: impl Into<String>) -> ShimError {
    ShimError::InvalidArgument(text.into())
}

fn absolute(field: &str, path: &str) -> Result<PathBuf, ShimError> {
    let path = Path::new(path);
    if path.is_absolute() && !path.components().any(|part| part == Component::ParentDir) {
        return Ok(path.to_owned());
    }
    Err(invalid(format!(
        "{field}: {path:?} is not an absolute path without `..`"
    )))
}

/// The value of an Any of the expected type.
fn value_of<'a>(field: &str, any: Option<&'a Any>, expected: &str) -> Result<&'a [u8], ShimError> {
    let any = any.ok_or_else(|| invalid(format!("{field}: is missing")))?;
    if any.type_url != expected {
        return Err(invalid(format!(
            "{field}: type {:?}, {expected} is expected",
            any.type_url
        )));
    }
    Ok(&any.value)
}

/// Exit codes are 0 to 255.
fn status_of(record: &ExitRecord) -> u32 {
    record.exit_code.unsigned_abs()
}

fn create_request(request: api::CreateTaskRequest) -> Result<(CreateContainer, Stdio), ShimError> {
    Id::parse(&request.id).map_err(|error| invalid(format!("id: {error}")))?;
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return Err(ShimError::Unimplemented(
            "checkpoint: restoring is not supported".into(),
        ));
    }
    let stdio = Stdio::parse([request.stdin, request.stdout, request.stderr], request.terminal)?;
    let mount = |mount: api::Mount| RootfsMount {
        fs_type: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    };
    let create = CreateContainer {
        id: request.id,
        bundle: absolute("bundle", &request.bundle)?,
        rootfs: request.rootfs.into_iter().map(mount).collect(),
        terminal: request.terminal,
        stdin: stdio.wants_stdin(),
    };
    Ok((create, stdio))
}

/// A container that runs already was started by a caller that did not live to hear it, so that is no error; it
/// would be for containerd's own shims.
async fn start(container: &Arc<Container>) -> Result<u32, ShimError> {
    let _one = container.verbs.lock().await;
    let init = &container.init;
    match init.state() {
        State::Created => container.backend.start().await?,
        State::Running => return Ok(init.pid),
        State::Paused => {
            return Err(ShimError::FailedPrecondition(format!(
                "container {} is paused",
                container.id
            )));
        }
        State::Stopped(_) => {
            return Err(ShimError::FailedPrecondition(format!(
                "container {} has ended",
                container.id
            )));
        }
    }
    init.enter(State::Running);
    Ok(init.pid)
}

async fn start_exec(container: &Arc<Container>, exec_id: &str) -> Result<u32, ShimError> {
    container.require_running()?;
    let named = |what: &str| format!("exec {exec_id} of container {} {what}", container.id);
    let (process, stdio) = {
        let mut execs = lock(&container.execs);
        let exec = execs
            .get_mut(exec_id)
            .ok_or_else(|| ShimError::NotFound(named("is unknown")))?;
        match std::mem::replace(exec, Exec::Starting) {
            Exec::Prepared { process, stdio } => (process, stdio),
            other => {
                *exec = other;
                return Err(ShimError::FailedPrecondition(named("was started already")));
            }
        }
    };
    let started = async {
        let open = stdio.open()?;
        let request = ExecProcess {
            exec_id: exec_id.to_owned(),
            process: process.clone(),
            terminal: stdio.terminal,
            stdin: stdio.wants_stdin(),
        };
        let process = container.backend.exec(request).await?;
        Ok(RunningProcess::adopt(process, stdio.clone(), open, None))
    }
    .await;
    let mut execs = lock(&container.execs);
    match started {
        Ok(running) => {
            running.enter(State::Running);
            let pid = running.pid;
            execs.insert(exec_id.to_owned(), Exec::Started(running));
            Ok(pid)
        }
        Err(error) => {
            execs.insert(exec_id.to_owned(), Exec::Prepared { process, stdio });
            Err(error)
        }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let (create, stdio) = create_request(request)?;
        let pod = self.0.clone();
        let container = detached(async move { pod.create_container(create, stdio).await }).await?;
        let mut response = api::CreateTaskResponse::new();
        response.pid = container.init.pid;
        Ok(response)
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let container = self.0.container(&request.id)?;
        let pid = detached(async move {
            match request.exec_id.as_str() {
                "" => start(&container).await,
                exec_id => start_exec(&container, exec_id).await,
            }
        })
        .await?;
        let mut response = api::StartResponse::new();
        response.pid = pid;
        Ok(response)
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        Id::parse(&request.exec_id).map_err(|error| invalid(format!("exec_id: {error}")))?;
        let process = value_of("spec", request.spec.as_ref(), OCI_PROCESS_TYPE)?.to_vec();
        if wants_terminal(&process)? != request.terminal {
            return Err(invalid("terminal: differs from the process's terminal").into());
        }
        let stdio = Stdio::parse([request.stdin, request.stdout, request.stderr], request.terminal)?;
        container.require_running()?;
        let mut execs = lock(&container.execs);
        if execs.contains_key(&request.exec_id) {
            let text = format!("exec {} of container {} exists", request.exec_id, container.id);
            return Err(ShimError::AlreadyExists(text).into());
        }
        execs.insert(request.exec_id, Exec::Prepared { process, stdio });
        Ok(Empty::new())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let (pid, record) = if request.exec_id.is_empty() {
            let pod = self.0.clone();
            detached(async move { pod.delete_container(&request.id).await }).await?
        } else {
            let container = self.0.container(&request.id)?;
            let mut execs = lock(&container.execs);
            let named = |what| format!("exec {} of container {} {what}", request.exec_id, container.id);
            let ended = match execs.get(&request.exec_id) {
                None => return Err(ShimError::NotFound(named("is unknown")).into()),
                Some(Exec::Prepared { .. }) => (
                    0,
                    ExitRecord {
                        exit_code: 0,
                        exited_at_ns: super::pod::now_ns(),
                        oom_killed: false,
                    },
                ),
                Some(Exec::Started(process)) => match process.state() {
                    State::Stopped(record) => (process.pid, record),
                    _ => return Err(ShimError::FailedPrecondition(named("is running")).into()),
                },
                Some(Exec::Starting) => {
                    return Err(ShimError::FailedPrecondition(named("is starting")).into());
                }
            };
            execs.remove(&request.exec_id);
            ended
        };
        let mut response = api::DeleteResponse::new();
        response.pid = pid;
        response.exit_status = status_of(&record);
        response.exited_at = timestamp(record.exited_at_ns);
        Ok(response)
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut response = api::StateResponse::new();
        response.id = request.id;
        response.exec_id = request.exec_id;
        response.bundle = container.bundle.display().to_string();
        response.pid = process.pid;
        let [stdin, stdout, stderr] = process.stdio.spelled.clone();
        (response.stdin, response.stdout, response.stderr) = (stdin, stdout, stderr);
        response.terminal = process.stdio.terminal;
        let status = match process.state() {
            State::Created => api::Status::CREATED,
            State::Running => api::Status::RUNNING,
            State::Paused => api::Status::PAUSED,
            State::Stopped(record) => {
                response.exit_status = status_of(&record);
                response.exited_at = timestamp(record.exited_at_ns);
                api::Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        let record = process.wait().await;
        let mut response = api::WaitResponse::new();
        response.exit_status = status_of(&record);
        response.exited_at = timestamp(record.exited_at_ns);
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let container = self.0.settled_container(&request.id).await?;
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (1..=64).contains(signal))
            .ok_or_else(|| invalid(format!("signal: {} is none", request.signal)))?;
        let process = container.process(&request.exec_id)?;
        if matches!(process.state(), State::Stopped(_)) {
            return Err(ShimError::NotFound(format!("process {} has ended", process.pid)).into());
        }
        let all = request.all && request.exec_id.is_empty();
        detached(async move {
            if all {
                container.backend.signal_all(signal).await
            } else {
                process.control.signal(signal).await
            }
        })
        .await?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let pids = self.0.container(&request.id)?.backend.pids().await?;
        let mut response = api::PidsResponse::new();
        response.processes = pids
            .into_iter()
            .map(|pid| {
                let mut info = api::ProcessInfo::new();
                info.pid = pid;
                info
            })
            .collect();
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.freeze(&request.id, true).await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.freeze(&request.id, false).await
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        if request.options.is_some() {
            return Err(
                invalid("options: a container is checkpointed and goes on; nothing can be set").into(),
            );
        }
        let container = self.0.container(&request.id)?;
        let images = absolute("path", &request.path)?;
        detached(async move {
            let _one = container.verbs.lock().await;
            if container.init.state() != State::Running {
                return Err(ShimError::FailedPrecondition(format!(
                    "container {} is not running",
                    container.id
                )));
            }
            container.backend.checkpoint(&images).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        if !process.stdio.terminal {
            return Err(ShimError::FailedPrecondition("the process has no terminal".into()).into());
        }
        let size = |field: &str, value: u32| {
            u16::try_from(value).map_err(|_| invalid(format!("{field}: {value} characters are too many")))
        };
        let (width, height) = (size("width", request.width)?, size("height", request.height)?);
        process.control.resize(width, height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin().await;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.id)?;
        let resources = value_of("resources", request.resources.as_ref(), OCI_RESOURCES_TYPE)?.to_vec();
        detached(async move { container.backend.update(&resources).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let container = self.0.container(&request.id)?;
        let mut response = api::StatsResponse::new();
        response.stats = Some(container.backend.stats().await?).into();
        Ok(response)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let mut response = api::ConnectResponse::new();
        response.shim_pid = std::process::id();
        if let Ok(container) = self.0.container(&request.id) {
            response.task_pid = container.init.pid;
        }
        response.version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(response)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        // containerd asks after every task; the pod's life is the Sandbox service's.
        if request.now {
            self.0.shutdown.notify_one();
        }
        Ok(Empty::new())
    }
}

impl TaskService {
    async fn freeze(&self, id: &str, frozen: bool) -> ttrpc::Result<Empty> {
        let container = self.0.container(id)?;
        detached(async move {
            let _one = container.verbs.lock().await;
            let (from, to) = if frozen {
                (State::Running, State::Paused)
            } else {
                (State::Paused, State::Running)
            };
            let is = container.init.state();
            if is == to {
                return Ok(());
            }
            if is != from {
                return Err(ShimError::FailedPrecondition(format!(
                    "container {} is not {from:?}",
                    container.id
                )));
            }
            container.backend.freeze(frozen).await?;
            container.init.enter(to);
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}
