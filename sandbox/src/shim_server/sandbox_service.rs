//! containerd's Sandbox service (`containerd.runtime.sandbox.v1`), checks and conversions.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc;
use ttrpc::r#async::TtrpcContext;

use super::ShimError;
use super::backend::CreateSandbox;
use super::pod::{Phase, Pod, detached};
use crate::pod_spec::{POD_SPEC_VERSION, PodSpec, info};
use crate::protocol::POD_SPEC_TYPE;

/// `SandboxStatusResponse.state` of a pod that can run containers.
const READY: &str = "SANDBOX_READY";
/// Any other.
const NOT_READY: &str = "SANDBOX_NOTREADY";

pub(crate) struct SandboxService(pub(crate) Arc<Pod>);

/// A protobuf time from nanoseconds since the epoch.
pub(crate) fn timestamp(ns: i64) -> MessageField<Timestamp> {
    let mut time = Timestamp::new();
    time.seconds = ns.div_euclid(1_000_000_000);
    time.nanos = ns.rem_euclid(1_000_000_000) as i32;
    MessageField::some(time)
}

fn pod_spec(request: &api::CreateSandboxRequest) -> Result<PodSpec, ShimError> {
    let invalid = |text: String| ShimError::InvalidArgument(text);
    let options = request
        .options
        .as_ref()
        .ok_or_else(|| invalid("options: a PodSpec is missing".into()))?;
    if options.type_url != POD_SPEC_TYPE {
        return Err(invalid(format!(
            "options: type {:?}, {POD_SPEC_TYPE} is expected",
            options.type_url
        )));
    }
    let mut spec: PodSpec = serde_json::from_slice(&options.value)
        .map_err(|error| invalid(format!("options: not a PodSpec: {error}")))?;
    if spec.version != POD_SPEC_VERSION {
        let text = format!(
            "options: PodSpec version {}, this shim knows {POD_SPEC_VERSION}",
            spec.version
        );
        return Err(invalid(text));
    }
    if !request.netns_path.is_empty() {
        let path = PathBuf::from(&request.netns_path);
        match &spec.namespaces.network {
            Some(network) if *network != path => {
                return Err(invalid(
                    "netns_path: differs from the PodSpec's network namespace".into(),
                ));
            }
            _ => spec.namespaces.network = Some(path),
        }
    }
    Ok(spec)
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        self.0.check_id(&request.sandbox_id)?;
        let spec = pod_spec(&request)?;
        let bundle = match request.bundle_path.as_str() {
            "" => self.0.context.bundle.clone(),
            path => PathBuf::from(path),
        };
        let pod = self.0.clone();
        detached(async move { pod.create(CreateSandbox { bundle, spec }).await }).await?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        self.0.check_id(&request.sandbox_id)?;
        let pod = self.0.clone();
        let (pid, created_at_ns) = detached(async move { pod.start().await }).await?;
        let mut response = api::StartSandboxResponse::new();
        response.pid = pid;
        response.created_at = timestamp(created_at_ns);
        Ok(response)
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> ttrpc::Result<api::PlatformResponse> {
        self.0.check_id(&request.sandbox_id)?;
        let mut response = api::PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        self.0.check_id(&request.sandbox_id)?;
        let pod = self.0.clone();
        detached(async move { pod.stop(request.timeout_secs).await }).await?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        self.0.check_id(&request.sandbox_id)?;
        let mut response = api::WaitSandboxResponse::new();
        response.exited_at = timestamp(self.0.wait().await);
        Ok(response)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        self.0.check_id(&request.sandbox_id)?;
        let mut response = api::SandboxStatusResponse::new();
        response.sandbox_id = request.sandbox_id;
        let state = match self.0.phase() {
            Phase::Ready { pid, created_at_ns } => {
                response.pid = pid;
                response.created_at = timestamp(created_at_ns);
                READY
            }
            Phase::Stopped {
                pid,
                created_at_ns,
                exited_at_ns,
            } => {
                response.pid = pid;
                response.created_at = timestamp(created_at_ns);
                response.exited_at = timestamp(exited_at_ns);
                NOT_READY
            }
            Phase::New | Phase::Created => NOT_READY,
        };
        response.state = state.to_owned();
        if request.verbose {
            response.info = self.0.backend.info().await.into_iter().collect();
            if let Some(reason) = self.0.ended.get() {
                response.info.insert(info::ENDED.to_owned(), reason.clone());
            }
        }
        Ok(response)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::PingRequest,
    ) -> ttrpc::Result<api::PingResponse> {
        self.0.check_id(&request.sandbox_id)?;
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        self.0.check_id(&request.sandbox_id)?;
        if !matches!(self.0.phase(), Phase::Stopped { .. } | Phase::New) {
            let text = format!("sandbox {} is not stopped", request.sandbox_id);
            return Err(ShimError::FailedPrecondition(text).into());
        }
        self.0.shutdown.notify_one();
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        Err(ShimError::Unimplemented("SandboxMetrics: ask each container's Task.Stats".into()).into())
    }
}
