//! A container in the guest, for the shim server.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use catamaran_guest_protocol::v1::{
    ContainerRequest, ExecRequest, SignalRequest, StatsRequest, UpdateRequest,
};
use catamaran_sandbox::shim_server::ShimError;
use catamaran_sandbox::shim_server::backend::{ContainerBackend, ExecProcess, Process};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use tonic::Code;

use crate::boot::chain;
use crate::guest_client::{Agent, limited, refused, within};
use crate::life::Life;
use crate::process::{Name, Streams, adopt};
use crate::share::{Share, oci};

/// One container of the pod.
pub(crate) struct GuestContainer {
    pub(crate) id: String,
    pub(crate) agent: Agent,
    pub(crate) life: Arc<Life>,
    pub(crate) share: Share,
}

impl GuestContainer {
    fn name(&self, exec: &str) -> Name {
        Name {
            container: self.id.clone(),
            exec: exec.to_owned(),
        }
    }

    /// True when the VM is gone, so nothing of the guest is left to undo.
    async fn vm_ended(&self) -> bool {
        let now = std::time::Duration::from_millis(1);
        tokio::time::timeout(now, self.life.ended()).await.is_ok()
    }
}

#[async_trait]
impl ContainerBackend for GuestContainer {
    async fn start(&self) -> Result<(), ShimError> {
        let request = ContainerRequest {
            container_id: self.id.clone(),
        };
        let answer = within(self.agent.clone().start_container(limited(request))).await;
        answer
            .map(drop)
            .map_err(|status| refused("start container", &status))
    }

    async fn exec(&self, request: ExecProcess) -> Result<Process, ShimError> {
        let streams = Streams {
            terminal: request.terminal,
            stdin: request.stdin,
        };
        let message = ExecRequest {
            container_id: self.id.clone(),
            exec_id: request.exec_id.clone(),
            process: request.process,
            stdin: request.stdin,
        };
        let answer = within(self.agent.clone().exec(limited(message))).await;
        let pid = answer.map_err(|status| refused("exec", &status))?.pid;
        Ok(adopt(
            &self.agent,
            &self.life,
            self.name(&request.exec_id),
            pid,
            streams,
        ))
    }

    async fn signal_all(&self, signal: i32) -> Result<(), ShimError> {
        let signal = u32::try_from(signal)
            .map_err(|_| ShimError::InvalidArgument(format!("signal {signal} does not exist")))?;
        let request = SignalRequest {
            container_id: self.id.clone(),
            exec_id: String::new(),
            signal,
            all: true,
            tree: false,
        };
        let answer = within(self.agent.clone().signal(limited(request))).await;
        answer.map(drop).map_err(|status| refused("signal", &status))
    }

    async fn delete(&self) -> Result<(), ShimError> {
        let answer = within(self.agent.clone().delete(limited(self.name("").request()))).await;
        match answer {
            Err(status) if status.code() != Code::NotFound && !self.vm_ended().await => {
                return Err(refused("delete container", &status));
            }
            _ => {}
        }
        let removed = self.share.remove_container(&self.id);
        removed.map_err(|error| ShimError::Internal(format!("delete container: {}", chain(&error))))
    }

    async fn update(&self, resources: &[u8]) -> Result<(), ShimError> {
        let mut resources: serde_json::Value = serde_json::from_slice(resources)
            .map_err(|error| ShimError::InvalidArgument(format!("resources: {error}")))?;
        oci::drop_cpusets(&self.id, &mut resources);
        let request = UpdateRequest {
            container_id: self.id.clone(),
            resources: resources.to_string().into_bytes(),
        };
        let answer = within(self.agent.clone().update_resources(limited(request))).await;
        answer
            .map(drop)
            .map_err(|status| refused("update resources", &status))
    }

    async fn stats(&self) -> Result<Any, ShimError> {
        let request = StatsRequest {
            container_id: self.id.clone(),
        };
        let answer = within(self.agent.clone().stats(limited(request))).await;
        let stats = answer.map_err(|status| refused("statistics", &status))?;
        crate::stats::metrics(&stats)
    }

    async fn pids(&self) -> Result<Vec<u32>, ShimError> {
        Err(ShimError::Unimplemented(
            "process ids of a container in a VM are the guest's own".to_owned(),
        ))
    }

    async fn checkpoint(&self, _images: &Path) -> Result<(), ShimError> {
        Err(ShimError::Unimplemented(
            "a container in a VM cannot be checkpointed: criu is not in the guest".to_owned(),
        ))
    }

    async fn freeze(&self, _frozen: bool) -> Result<(), ShimError> {
        Err(ShimError::Unimplemented(
            "a container in a VM cannot be paused".to_owned(),
        ))
    }
}
