//! Sessions of the streaming verbs: an exec, an attachment or a port's connection at the pod's shim, as a
//! socket with frames (`stream_frames`).

use std::path::Path;

use catamaran_sandbox::protocol::stream;
use catamaran_sandbox::stream_frames;
use tokio::net::UnixStream;

use super::state::{Request, admit};
use super::{Pods, exec_sync};
use crate::error::{Error, Result};
use crate::shim::Shim;

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Error output.
    pub stderr: bool,
}

impl Pods {
    /// CRI Exec: the command with the container's user, environment, capabilities and working directory.
    ///
    /// # Errors
    /// [`Error::Denied`] where the container does not run; the shim's.
    pub async fn open_exec(
        &self,
        id: &str,
        command: &[String],
        tty: bool,
        wanted: Wanted,
    ) -> Result<UnixStream> {
        let (shim, view, container) = self.running(id)?;
        let process = exec_sync::process(self.node(), &view, &container, command, tty).await?;
        let exec = stream::ExecSession {
            container_id: container.id.to_string(),
            process,
            stdin: wanted.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr,
            ..Default::default()
        };
        open(&shim, stream::open_request::Session::Exec(exec)).await
    }

    /// CRI Attach: the streams of the container's first process.
    ///
    /// # Errors
    /// As [`Self::open_exec`].
    pub async fn open_attach(&self, id: &str, wanted: Wanted) -> Result<UnixStream> {
        let (shim, _, container) = self.running(id)?;
        let attach = stream::AttachSession {
            container_id: container.id.to_string(),
            stdin: wanted.stdin,
            stdout: wanted.stdout,
            stderr: wanted.stderr,
            ..Default::default()
        };
        open(&shim, stream::open_request::Session::Attach(attach)).await
    }

    /// CRI PortForward: a TCP port on the pod's own localhost.
    ///
    /// # Errors
    /// [`Error::Denied`] where the sandbox is not ready; the shim's, also where nothing listens.
    pub async fn open_port(&self, sandbox: &str, port: u16) -> Result<UnixStream> {
        let view = self.pod(sandbox)?;
        admit(view.pod.state, None, Request::CreateContainer).map_err(|denial| Error::Denied {
            what: "pod sandbox",
            id: sandbox.to_owned(),
            denial,
        })?;
        let shim = view.shim.clone();
        let shim =
            shim.ok_or_else(|| Error::Unavailable(format!("the shim of pod sandbox {sandbox} is gone")))?;
        let forward = stream::PortForwardSession {
            port: u32::from(port),
            ..Default::default()
        };
        open(&shim, stream::open_request::Session::PortForward(forward)).await
    }

    /// Whether streaming requests for the container can be served now, and whether it has a terminal.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Denied`] where it does not run.
    pub fn attachable(&self, id: &str) -> Result<bool> {
        let (_, _, container) = self.running(id)?;
        Ok(container.config.tty)
    }
}

async fn open(shim: &Shim, session: stream::open_request::Session) -> Result<UnixStream> {
    let request = stream::OpenRequest {
        session: Some(session),
        ..Default::default()
    };
    let opened = shim.open(request).await?;
    let address = Path::new(&opened.address);
    stream_frames::connect(address, &opened.token)
        .await
        .map_err(Error::io("connect to", address))
}
