//! The daemon's side of the shim protocols: starting a shim ([`launch`]), and its Task, Sandbox and Stream
//! services with a time limit on every call. Nothing here knows of CRI.

mod cancel;
mod launch;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use catamaran_sandbox::pod_spec::PodSpec;
use catamaran_sandbox::protocol::{OCI_RESOURCES_TYPE, POD_SPEC_TYPE, stream, stream_ttrpc::StreamClient};
use containerd_shim_protos::api;
use containerd_shim_protos::sandbox_api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::TaskClient;
use protobuf::well_known_types::any::Any;
use ttrpc::context::{self, Context};

pub(crate) use launch::find_in_path;
pub use launch::{Launch, find_shim, lives};

/// Time limits of the verbs. A shim that needs longer is taken for hung; the caller undoes.
mod limit {
    use std::time::Duration;

    pub(super) const CONNECT: Duration = Duration::from_secs(2);
    /// Verbs that only look or pass something on.
    pub(super) const QUICK: Duration = Duration::from_secs(10);
    /// Verbs that run the OCI runtime, in a guest perhaps an emulated one.
    pub(super) const RUNTIME: Duration = Duration::from_secs(120);
    /// What StopSandbox takes beyond its own grace.
    pub(super) const STOP: Duration = Duration::from_secs(30);
    /// How much later the shim gives a call's work up by itself.
    pub(super) const LATER: Duration = Duration::from_secs(1);
}

/// What a call to a shim gives.
pub type Result<T> = std::result::Result<T, ShimError>;

/// Why a shim did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// The shim could not be started, or ended without serving.
    #[error("cannot start the shim {shim}: {problem}")]
    Start {
        /// Its executable.
        shim: String,
        /// What happened, with the end of its log.
        problem: String,
    },
    /// Nothing answers at its address.
    #[error("cannot connect to the shim at {address}: {problem}")]
    Connect {
        /// The socket.
        address: String,
        /// Why.
        problem: String,
    },
    /// It refused.
    #[error("{verb}: {message}")]
    Refused {
        /// The protocol's verb.
        verb: &'static str,
        /// As gRPC has it.
        code: ttrpc::Code,
        /// The shim's own words.
        message: String,
    },
    /// It did not answer in time. It may live and do what it was asked all the same.
    #[error("the shim did not answer {verb} within {} s", .limit.as_secs())]
    Timeout {
        /// The protocol's verb.
        verb: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The connection broke: it died, or was killed.
    #[error("the shim went away during {verb}: {problem}")]
    Gone {
        /// The protocol's verb.
        verb: &'static str,
        /// Why.
        problem: String,
    },
}

impl ShimError {
    fn from_call(verb: &'static str, error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused {
                verb,
                code: status.code(),
                message: status.message().to_owned(),
            },
            other => Self::Gone {
                verb,
                problem: other.to_string(),
            },
        }
    }

    /// The shim does not know the container, sandbox or process.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: ttrpc::Code::NOT_FOUND,
                ..
            }
        )
    }

    /// The connection is gone, rather than the request refused or not answered in time. The shim may live on: the
    /// lock on its pid file tells ([`lives`]).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Connect { .. })
    }
}

/// Turns "there is no such thing" into success, for teardown.
pub fn absent_is_fine<T>(result: Result<T>) -> Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

/// One rootfs mount, as containerd's types.Mount.
#[derive(Debug, Clone)]
pub struct Mount {
    /// File system type.
    pub fs_type: String,
    /// Source.
    pub source: String,
    /// Mount options.
    pub options: Vec<String>,
}

/// Task.Create of a container.
#[derive(Debug, Clone)]
pub struct CreateTask<'a> {
    /// Container id.
    pub id: &'a str,
    /// Bundle directory.
    pub bundle: &'a Path,
    /// What the shim mounts at `<bundle>/rootfs`.
    pub rootfs: Vec<Mount>,
    /// A terminal instead of three pipes.
    pub terminal: bool,
    /// Standard input, see the constants of the protocol module; empty: none.
    pub stdin: String,
    /// Standard output (and error), see there.
    pub stdout: String,
}

/// What the Sandbox service says of its sandbox.
#[derive(Debug, Clone)]
pub struct SandboxState {
    /// It can run containers.
    pub ready: bool,
    /// The sandbox's process: the VMM, or the shim where there is none.
    pub pid: u32,
    /// See `catamaran_sandbox::pod_spec::info`.
    pub info: BTreeMap<String, String>,
}

/// What ran and what came of it, from ExecSync.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// 0 to 255.
    pub exit_code: i32,
    /// The limit passed and the process was killed.
    pub timed_out: bool,
    /// The session with what did not fit into the answer.
    pub rest: Option<stream::OpenResponse>,
}

/// State of a container's first process, from Task.State.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// Waits for Start.
    Created,
    /// Runs (or is paused).
    Running,
    /// Has ended.
    Stopped,
}

/// A live shim. Clones share the connection.
#[derive(Clone)]
pub struct Shim {
    task: TaskClient,
    sandbox: SandboxClient,
    stream: StreamClient,
    id: String,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Makes a call with a time limit of the daemon's own, so that a shim that is slow is told from one that is gone.
/// The limit that the protocol carries ends the work in the shim; it is a little later, for this one to come first.
async fn call<T, F>(verb: &'static str, limit: Duration, make: impl FnOnce(Context) -> F) -> Result<T>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    let context = context::with_duration(limit + limit::LATER);
    match tokio::time::timeout(limit, make(context)).await {
        Ok(result) => result.map_err(|error| ShimError::from_call(verb, error)),
        Err(_) => Err(ShimError::Timeout { verb, limit }),
    }
}

impl Shim {
    /// Connects to a shim that serves already.
    ///
    /// # Errors
    /// [`ShimError::Connect`] when nothing answers within two seconds.
    pub async fn connect(id: &str, socket: &Path) -> Result<Self> {
        let address = format!("unix://{}", socket.display());
        let problem = |problem: String| ShimError::Connect {
            address: address.clone(),
            problem,
        };
        let client = tokio::time::timeout(limit::CONNECT, ttrpc::asynchronous::Client::connect(&address))
            .await
            .map_err(|_| problem("no answer".into()))?
            .map_err(|error| problem(error.to_string()))?;
        Ok(Self {
            task: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client.clone()),
            stream: StreamClient::new(client),
            id: id.to_owned(),
        })
    }

    /// Sandbox.PingSandbox.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn ping(&self) -> Result<()> {
        let request = sandbox_api::PingRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer = call("PingSandbox", limit::CONNECT, |context| {
            self.sandbox.ping_sandbox(context, &request)
        })
        .await;
        answer.map(drop)
    }

    /// Sandbox.CreateSandbox: namespaces are pinned, or the VM's boot has begun.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn create_sandbox(&self, bundle: &Path, spec: &PodSpec) -> Result<()> {
        let value = serde_json::to_vec(spec).map_err(|e| ShimError::Refused {
            verb: "CreateSandbox",
            code: ttrpc::Code::INVALID_ARGUMENT,
            message: e.to_string(),
        })?;
        let netns = spec.namespaces.network.as_deref();
        let request = sandbox_api::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: bundle.display().to_string(),
            netns_path: netns.map(|path| path.display().to_string()).unwrap_or_default(),
            options: Some(any(POD_SPEC_TYPE, value)).into(),
            ..Default::default()
        };
        let answer = call("CreateSandbox", limit::RUNTIME, |context| {
            self.sandbox.create_sandbox(context, &request)
        })
        .await;
        answer.map(drop)
    }

    /// Sandbox.StartSandbox: waits until containers can be created. `boot` is the VM's own limit, zero for
    /// namespaces.
    ///
    /// # Errors
    /// [`ShimError`]; of a VM it names the stage that failed.
    pub async fn start_sandbox(&self, boot: Duration) -> Result<u32> {
        let request = sandbox_api::StartSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer = call("StartSandbox", boot + limit::RUNTIME, |context| {
            self.sandbox.start_sandbox(context, &request)
        })
        .await;
        answer.map(|a| a.pid)
    }

    /// Sandbox.SandboxStatus, verbose.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn sandbox_status(&self) -> Result<SandboxState> {
        let request = sandbox_api::SandboxStatusRequest {
            sandbox_id: self.id.clone(),
            verbose: true,
            ..Default::default()
        };
        let answer = call("SandboxStatus", limit::QUICK, |context| {
            self.sandbox.sandbox_status(context, &request)
        })
        .await?;
        Ok(SandboxState {
            ready: answer.state == "SANDBOX_READY",
            pid: answer.pid,
            info: answer.info.into_iter().collect(),
        })
    }

    /// Sandbox.WaitSandbox: returns when the sandbox has ended.
    ///
    /// # Errors
    /// [`ShimError::Gone`] when the shim died.
    pub async fn wait_sandbox(&self) -> Result<()> {
        let request = sandbox_api::WaitSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.sandbox.wait_sandbox(Context::default(), &request).await;
        answer
            .map(drop)
            .map_err(|e| ShimError::from_call("WaitSandbox", e))
    }

    /// Sandbox.StopSandbox: every container is killed, the VM is off, namespaces are released.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn stop_sandbox(&self, grace: Duration) -> Result<()> {
        let request = sandbox_api::StopSandboxRequest {
            sandbox_id: self.id.clone(),
            timeout_secs: u32::try_from(grace.as_secs()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer = call("StopSandbox", grace + limit::STOP, |context| {
            self.sandbox.stop_sandbox(context, &request)
        })
        .await;
        absent_is_fine(answer)
    }

    /// Sandbox.ShutdownSandbox: the shim's process ends. A shim that is gone before it answers has done so.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn shutdown(&self) -> Result<()> {
        let request = sandbox_api::ShutdownSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer = call("ShutdownSandbox", limit::QUICK, |context| {
            self.sandbox.shutdown_sandbox(context, &request)
        })
        .await;
        match absent_is_fine(answer) {
            Err(error) if error.is_gone() => Ok(()),
            other => other,
        }
    }

    /// Task.Create.
    ///
    /// # Errors
    /// [`ShimError`] with the runtime's message.
    pub async fn create(&self, create: &CreateTask<'_>) -> Result<u32> {
        let rootfs = create.rootfs.iter().map(|mount| api::Mount {
            type_: mount.fs_type.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
            ..Default::default()
        });
        let request = api::CreateTaskRequest {
            id: create.id.to_owned(),
            bundle: create.bundle.display().to_string(),
            rootfs: rootfs.collect(),
            terminal: create.terminal,
            stdin: create.stdin.clone(),
            stdout: create.stdout.clone(),
            ..Default::default()
        };
        let answer = call("Create", limit::RUNTIME, |context| {
            self.task.create(context, &request)
        })
        .await;
        answer.map(|a| a.pid)
    }

    /// Task.Start; the process id.
    ///
    /// # Errors
    /// [`ShimError`] with the runtime's message.
    pub async fn start(&self, id: &str) -> Result<u32> {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("Start", limit::RUNTIME, |context| {
            self.task.start(context, &request)
        })
        .await;
        answer.map(|a| a.pid)
    }

    /// Task.Wait: returns the exit status when the container's first process has ended.
    ///
    /// # Errors
    /// [`ShimError::Gone`] when the shim died.
    pub async fn wait(&self, id: &str) -> Result<(u32, i64)> {
        let request = api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self
            .task
            .wait(Context::default(), &request)
            .await
            .map_err(|e| ShimError::from_call("Wait", e))?;
        let at = answer
            .exited_at
            .as_ref()
            .map_or(0, |t| t.seconds * 1_000_000_000 + i64::from(t.nanos));
        Ok((answer.exit_status, at))
    }

    /// Task.State, with the process id.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn state(&self, id: &str) -> Result<(TaskState, u32)> {
        let request = api::StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("State", limit::QUICK, |context| {
            self.task.state(context, &request)
        })
        .await?;
        let state = match answer.status.enum_value() {
            Ok(api::Status::CREATED) => TaskState::Created,
            Ok(api::Status::RUNNING | api::Status::PAUSED | api::Status::PAUSING) => TaskState::Running,
            Ok(api::Status::STOPPED) => TaskState::Stopped,
            other => {
                return Err(ShimError::Refused {
                    verb: "State",
                    code: ttrpc::Code::INTERNAL,
                    message: format!("the shim reports an unknown state {other:?}"),
                });
            }
        };
        Ok((state, answer.pid))
    }

    /// Task.Kill. A container that is gone already needs no signal.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<()> {
        let request = api::KillRequest {
            id: id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let answer = call("Kill", limit::QUICK, |context| self.task.kill(context, &request)).await;
        absent_is_fine(answer)
    }

    /// Task.Delete: its rootfs is unmounted and the runtime's state is gone.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn delete(&self, id: &str) -> Result<()> {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("Delete", limit::RUNTIME, |context| {
            self.task.delete(context, &request)
        })
        .await;
        absent_is_fine(answer)
    }

    /// Task.Update with OCI LinuxResources.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let request = api::UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(any(OCI_RESOURCES_TYPE, resources)).into(),
            ..Default::default()
        };
        let answer = call("Update", limit::RUNTIME, |context| {
            self.task.update(context, &request)
        })
        .await;
        answer.map(drop)
    }

    /// Task.Checkpoint: writes criu's images of a container, which goes on running, into a directory.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn checkpoint(&self, id: &str, images: &Path, limit: Duration) -> Result<()> {
        let request = api::CheckpointTaskRequest {
            id: id.to_owned(),
            path: images.display().to_string(),
            ..Default::default()
        };
        let answer = call("Checkpoint", limit, |context| {
            self.task.checkpoint(context, &request)
        })
        .await;
        answer.map(drop)
    }

    /// Task.Stats: containerd's cgroup metrics.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn stats(&self, id: &str) -> Result<Any> {
        let request = api::StatsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("Stats", limit::QUICK, |context| {
            self.task.stats(context, &request)
        })
        .await?;
        Ok(answer.stats.into_option().unwrap_or_default())
    }

    /// Stream.ExecSync of an OCI process; `timeout` zero: no limit. Dropping the future kills the process.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn exec_sync(
        &self,
        container: &str,
        process: Vec<u8>,
        timeout: Duration,
        max_output: u64,
    ) -> Result<ExecOutput> {
        let guard = cancel::ExecSyncGuard::new(&self.stream)?;
        let request = stream::ExecSyncRequest {
            container_id: container.to_owned(),
            process,
            timeout_ms: i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX),
            max_output,
            cancel_key: guard.key(),
            ..Default::default()
        };
        let answer = if timeout.is_zero() {
            let answer = self.stream.exec_sync(Context::default(), &request).await;
            answer.map_err(|e| ShimError::from_call("ExecSync", e))?
        } else {
            call("ExecSync", timeout + limit::RUNTIME, |context| {
                self.stream.exec_sync(context, &request)
            })
            .await?
        };
        guard.answered();
        Ok(ExecOutput {
            stdout: answer.stdout,
            stderr: answer.stderr,
            exit_code: answer.exit_code,
            timed_out: answer.timed_out,
            rest: answer.rest.into_option(),
        })
    }

    /// Stream.ReopenLog.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn reopen_log(&self, container: &str) -> Result<()> {
        let request = stream::ReopenLogRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let answer = call("ReopenLog", limit::QUICK, |context| {
            self.stream.reopen_log(context, &request)
        })
        .await;
        answer.map(drop)
    }

    /// Stream.Open: where to connect for the session's bytes, and the token that opens it.
    ///
    /// # Errors
    /// [`ShimError`].
    pub async fn open(&self, request: stream::OpenRequest) -> Result<stream::OpenResponse> {
        call("Open", limit::RUNTIME, |context| {
            self.stream.open(context, &request)
        })
        .await
    }
}

fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    }
}
