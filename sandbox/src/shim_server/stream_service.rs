//! The Stream service: what containerd's Task service has no verb for.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc;
use ttrpc::r#async::TtrpcContext;

use super::ShimError;
use super::container::wants_terminal;
use super::pod::Pod;
use super::sessions::{Session, Wants};
use crate::protocol::stream::open_request::Session as Requested;
use crate::protocol::stream::{
    CancelExecSyncRequest, CancelExecSyncResponse, ExecSyncRequest, ExecSyncResponse, OpenRequest,
    OpenResponse, ReopenLogRequest, ReopenLogResponse,
};
use crate::protocol::stream_ttrpc::Stream;

pub(crate) struct StreamService(pub(crate) Arc<Pod>);

#[async_trait]
impl Stream for StreamService {
    async fn exec_sync(&self, _: &TtrpcContext, request: ExecSyncRequest) -> ttrpc::Result<ExecSyncResponse> {
        let container = self.0.container(&request.container_id)?;
        Ok(super::exec_sync::run(&self.0, container, request).await?)
    }

    async fn cancel_exec_sync(
        &self,
        _: &TtrpcContext,
        request: CancelExecSyncRequest,
    ) -> ttrpc::Result<CancelExecSyncResponse> {
        self.0.exec_syncs.cancel(&request.cancel_key);
        Ok(CancelExecSyncResponse::new())
    }

    async fn reopen_log(
        &self,
        _: &TtrpcContext,
        request: ReopenLogRequest,
    ) -> ttrpc::Result<ReopenLogResponse> {
        let container = self.0.container(&request.container_id)?;
        container.require_running()?;
        match container.init.output.reopen_log() {
            Ok(true) => Ok(ReopenLogResponse::new()),
            Ok(false) => {
                let text = format!("container {} has no log", request.container_id);
                Err(ShimError::FailedPrecondition(text).into())
            }
            Err(error) => Err(ShimError::internal("reopen log", &error).into()),
        }
    }

    async fn open(&self, _: &TtrpcContext, request: OpenRequest) -> ttrpc::Result<OpenResponse> {
        let session = match request.session {
            Some(Requested::Exec(exec)) => {
                let container = self.0.container(&exec.container_id)?;
                container.require_running()?;
                let terminal = wants_terminal(&exec.process)?;
                let wants = Wants {
                    stdin: exec.stdin,
                    stdout: exec.stdout,
                    stderr: exec.stderr,
                };
                Session::Exec {
                    container,
                    process: exec.process,
                    terminal,
                    wants,
                }
            }
            Some(Requested::Attach(attach)) => {
                let container = self.0.container(&attach.container_id)?;
                super::session_run::check_attach(&container)?;
                let wants = Wants {
                    stdin: attach.stdin,
                    stdout: attach.stdout,
                    stderr: attach.stderr,
                };
                Session::Attach { container, wants }
            }
            Some(Requested::PortForward(forward)) => {
                let port = u16::try_from(forward.port)
                    .ok()
                    .filter(|port| *port > 0)
                    .ok_or_else(|| {
                        ShimError::InvalidArgument(format!("port: {} is no TCP port", forward.port))
                    })?;
                Session::PortForward { port }
            }
            _ => {
                return Err(
                    ShimError::InvalidArgument("session: exec, attach or port_forward".into()).into(),
                );
            }
        };
        let (address, token) = self.0.sessions.open(&self.0, session)?;
        let mut response = OpenResponse::new();
        response.address = address.display().to_string();
        response.token = token.to_vec();
        Ok(response)
    }
}
