//! What a runtime provides: a sandbox, its containers and their processes. Three small traits, one per thing;
//! states, stdio routing, logs, waiting and idempotence are not theirs but the shim server's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

use super::ShimError;
use crate::exit::ExitRecord;
use crate::pod_spec::PodSpec;

/// Reading end of a process's output.
pub type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// Writing end of a process's input; dropping it is the input's end.
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A byte stream both ways; `shutdown` ends the writing half.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The pod: what CreateSandbox to ShutdownSandbox mean. The server calls each of `create`, `start` and `stop`
/// until it succeeded once, one at a time.
#[async_trait]
pub trait SandboxBackend: Send + Sync + 'static {
    /// Makes what containers will share: namespaces, or a VM that begins to boot. Returns without waiting for a
    /// guest; CNI works on the netns meanwhile.
    async fn create(&self, request: CreateSandbox) -> Result<(), ShimError>;
    /// CNI is done: waits until containers can be made. Returns the sandbox's pid on the host.
    async fn start(&self) -> Result<u32, ShimError>;
    /// Ends what `create` and `start` made; every container has ended or could not be ended in time. Must
    /// succeed also where `create` failed half-way.
    async fn stop(&self) -> Result<(), ShimError>;
    /// The verbose status, keys in [`crate::pod_spec::info`].
    async fn info(&self) -> BTreeMap<String, String>;
    /// Resolves with the reason when the sandbox ends without `stop`, as a VM does that crashes; never, where
    /// it cannot.
    async fn ended(&self) -> String;
    /// Connects to a TCP port on the pod's own localhost, IPv4 or else IPv6.
    async fn connect(&self, port: u16) -> Result<Box<dyn Duplex>, ShimError>;
    /// Makes a container; its first process exists and waits to be started.
    async fn create_container(
        &self,
        request: CreateContainer,
    ) -> Result<(Arc<dyn ContainerBackend>, Process), ShimError>;
}

/// A container that was created. The server serialises `start` and `delete`; the others may overtake them.
#[async_trait]
pub trait ContainerBackend: Send + Sync + 'static {
    /// Lets the first process run.
    async fn start(&self) -> Result<(), ShimError>;
    /// Starts a further process. Dropping the future ends the start, and what it has started.
    async fn exec(&self, request: ExecProcess) -> Result<Process, ShimError>;
    /// Signals every process of the container.
    async fn signal_all(&self, signal: i32) -> Result<(), ShimError>;
    /// Removes what is left of an ended container: runtime state, cgroup, rootfs mounts. Idempotent; keeps the
    /// bundle's exit record.
    async fn delete(&self) -> Result<(), ShimError>;
    /// Applies OCI runtime-spec LinuxResources, JSON.
    async fn update(&self, resources: &[u8]) -> Result<(), ShimError>;
    /// `io.containerd.cgroups.v1.Metrics` or `.v2.Metrics`.
    async fn stats(&self) -> Result<Any, ShimError>;
    /// Process ids, as the host (or the guest) numbers them.
    async fn pids(&self) -> Result<Vec<u32>, ShimError>;
    /// Writes criu's images of the running container, which goes on running, into the directory.
    async fn checkpoint(&self, images: &Path) -> Result<(), ShimError>;
    /// Freezes (`true`) or thaws every process.
    async fn freeze(&self, frozen: bool) -> Result<(), ShimError>;
}

/// One process: a container's first one or an exec.
#[async_trait]
pub trait ProcessControl: Send + Sync + 'static {
    /// Sends a signal; [`ShimError::NotFound`] where it has ended.
    async fn signal(&self, signal: i32) -> Result<(), ShimError>;
    /// SIGKILL for the process and what it started, as far as that can be told.
    async fn kill_tree(&self);
    /// Sets its terminal's size in characters.
    async fn resize(&self, width: u16, height: u16) -> Result<(), ShimError>;
}

/// A process that a backend started, with the near ends of its stdio.
pub struct Process {
    /// Process id on the host, or in the guest's first PID namespace.
    pub pid: u32,
    /// Present where it was asked for; with a terminal the terminal's input.
    pub stdin: Option<Writer>,
    /// Output; with a terminal the terminal's.
    pub stdout: Option<Reader>,
    /// None with a terminal.
    pub stderr: Option<Reader>,
    /// Signals and terminal size.
    pub control: Arc<dyn ProcessControl>,
    /// Resolves when the process has ended, with `oom_killed` already determined.
    pub exit: BoxFuture<'static, ExitRecord>,
}

/// Arguments of [`SandboxBackend::create`].
#[derive(Debug, Clone)]
pub struct CreateSandbox {
    /// Absolute path of the sandbox bundle.
    pub bundle: PathBuf,
    /// The pod.
    pub spec: PodSpec,
}

/// Arguments of [`SandboxBackend::create_container`].
#[derive(Debug, Clone)]
pub struct CreateContainer {
    /// Checked container id.
    pub id: String,
    /// Absolute path of the container bundle, with config.json in it.
    pub bundle: PathBuf,
    /// Mounts that make the root file system, for `<bundle>/rootfs`.
    pub rootfs: Vec<RootfsMount>,
    /// The process gets a terminal.
    pub terminal: bool,
    /// The process gets an input; otherwise `/dev/null`.
    pub stdin: bool,
}

/// One mount of a root file system, as containerd's types.Mount.
#[derive(Debug, Clone)]
pub struct RootfsMount {
    /// File system type, or `bind`.
    pub fs_type: String,
    /// Source.
    pub source: String,
    /// Path below the root file system; empty for the root itself.
    pub target: String,
    /// fstab-style options.
    pub options: Vec<String>,
}

/// Arguments of [`ContainerBackend::exec`].
#[derive(Debug, Clone)]
pub struct ExecProcess {
    /// Unique among the container's execs, present and past.
    pub exec_id: String,
    /// OCI runtime-spec Process, JSON.
    pub process: Vec<u8>,
    /// The process gets a terminal (as `terminal` in `process` says).
    pub terminal: bool,
    /// The process gets an input; otherwise `/dev/null`.
    pub stdin: bool,
}
