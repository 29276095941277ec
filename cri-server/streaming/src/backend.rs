//! What the daemon provides: how a command is executed, a container attached to, a port of a pod reached. The
//! streams are plain byte streams, so that nothing here knows whether a process of this host or of a virtual
//! machine is behind them.

use async_trait::async_trait;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// Executes what clients ask for. Each call is dropped when its client has gone.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a container to its end; its exit code.
    ///
    /// # Errors
    /// It could not be run or watched; the text goes to the client.
    async fn exec(&self, request: &ExecRequest, streams: Streams) -> Result<i32, BackendError>;

    /// Joins the streams to those of a container's first process, until that ends or the client detaches.
    ///
    /// # Errors
    /// As [`Self::exec`].
    async fn attach(&self, request: &AttachRequest, streams: Streams) -> Result<(), BackendError>;

    /// Connects `data` to a port of the pod's localhost, until both directions have ended.
    ///
    /// # Errors
    /// As [`Self::exec`].
    async fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
        data: Box<dyn Duplex>,
    ) -> Result<(), BackendError>;
}

/// Bytes both ways; shutdown ends the direction to the client alone.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The client's ends of a command's streams; `None` where it did not ask for one.
pub struct Streams {
    /// Ends where the client closes it. A read error means that the client has gone, not the end.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Ends when dropped or shut down.
    pub stdout: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// As `stdout`; never there with a terminal.
    pub stderr: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// The terminal's latest size; stays `None` without a terminal. Sizes that follow each other faster than
    /// they are looked at are skipped.
    pub resize: watch::Receiver<Option<TerminalSize>>,
}

/// Size of a terminal in characters. Clients write the names with a capital letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    #[serde(alias = "Width")]
    pub width: u16,
    /// Rows.
    #[serde(alias = "Height")]
    pub height: u16,
}

/// Why a request failed, for its client.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(String);

impl BackendError {
    /// With the text that the client gets to see.
    pub fn new(message: impl std::fmt::Display) -> Self {
        BackendError(message.to_string())
    }
}

/// CRI Exec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Container in which the command is to run.
    pub container_id: String,
    /// The command.
    pub command: Vec<String>,
    /// With a terminal.
    pub tty: bool,
    /// The client sends input.
    pub stdin: bool,
    /// The client wants the output.
    pub stdout: bool,
    /// The client wants the error output.
    pub stderr: bool,
}

/// CRI Attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// Container to attach to.
    pub container_id: String,
    /// It has a terminal.
    pub tty: bool,
    /// The client sends input.
    pub stdin: bool,
    /// The client wants the output.
    pub stdout: bool,
    /// The client wants the error output.
    pub stderr: bool,
}

/// CRI PortForward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForwardRequest {
    /// The pod.
    pub sandbox_id: String,
    /// Ports that may be reached; empty: those that the client names.
    pub ports: Vec<u16>,
}
