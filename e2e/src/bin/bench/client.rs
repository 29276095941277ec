//! The CRI over its socket, with k8s-cri: a binding that is not ours.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use catamaran_e2e::node::Node;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, ImageSpec,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListContainerStatsRequest, ListContainersRequest, ListPodSandboxRequest, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopPodSandboxRequest,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// One connection to a daemon; clones share it.
#[derive(Clone)]
pub(crate) struct Client {
    runtime: RuntimeServiceClient<Channel>,
}

/// As a kubelet asks: network and IPC the pod's, PID each container's own.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        pid: 1,
        ..NamespaceOption::default()
    }
}

/// A command that ends only when it is killed.
pub(crate) fn sleep_for_ever() -> Vec<String> {
    vec!["sleep".to_owned(), "2147483647".to_owned()]
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Self> {
        let socket: PathBuf = socket.to_owned();
        // The name is never resolved: the connector goes to the socket.
        let channel = Endpoint::try_from("http://localhost")?
            .connect_with_connector(service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel),
        })
    }

    pub(crate) fn pod(&self, node: &Node, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: node.layout.logs.join(name).display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}/{name}", node.subnet.name()),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    pub(crate) async fn run_pod(
        &mut self,
        config: &PodSandboxConfig,
        handler: &str,
    ) -> Result<(String, Duration)> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let begun = Instant::now();
        let answer = self.runtime.run_pod_sandbox(request).await?;
        Ok((answer.into_inner().pod_sandbox_id, begun.elapsed()))
    }

    pub(crate) async fn create_and_start(
        &mut self,
        pod: &str,
        pod_config: &PodSandboxConfig,
        image: &str,
        attempt: u32,
    ) -> Result<(String, Duration)> {
        let begun = Instant::now();
        let container_id = self
            .create(pod, pod_config, image, attempt, &sleep_for_ever())
            .await?;
        self.start(&container_id).await?;
        Ok((container_id, begun.elapsed()))
    }

    pub(crate) async fn create(
        &mut self,
        pod: &str,
        pod_config: &PodSandboxConfig,
        image: &str,
        attempt: u32,
        command: &[String],
    ) -> Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "main".to_owned(),
                attempt,
            }),
            image: Some(ImageSpec {
                image: image.to_owned(),
                annotations: HashMap::new(),
                ..ImageSpec::default()
            }),
            command: command.to_vec(),
            log_path: format!("main-{attempt}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxContainerSecurityContext::default()
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod_config.clone()),
        };
        let answer = self.runtime.create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    pub(crate) async fn start(&mut self, container: &str) -> Result<()> {
        let container_id = container.to_owned();
        self.runtime
            .start_container(StartContainerRequest { container_id })
            .await?;
        Ok(())
    }

    /// How many containers' statistics were listed.
    pub(crate) async fn stats(&mut self) -> Result<(usize, Duration)> {
        let begun = Instant::now();
        let request = ListContainerStatsRequest { filter: None };
        let answer = self.runtime.list_container_stats(request).await?.into_inner();
        Ok((answer.stats.len(), begun.elapsed()))
    }

    /// How many containers were listed.
    pub(crate) async fn list_containers(&mut self) -> Result<(usize, Duration)> {
        let begun = Instant::now();
        let request = ListContainersRequest { filter: None };
        let answer = self.runtime.list_containers(request).await?.into_inner();
        Ok((answer.containers.len(), begun.elapsed()))
    }

    /// How many pods were listed.
    pub(crate) async fn list_pods(&mut self) -> Result<(usize, Duration)> {
        let begun = Instant::now();
        let request = ListPodSandboxRequest { filter: None };
        let answer = self.runtime.list_pod_sandbox(request).await?.into_inner();
        Ok((answer.items.len(), begun.elapsed()))
    }

    pub(crate) async fn exec(&mut self, container: &str) -> Result<Duration> {
        let cmd = vec!["echo".to_owned(), "x".to_owned()];
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd,
            timeout: 30,
        };
        let begun = Instant::now();
        let answer = self.runtime.exec_sync(request).await?.into_inner();
        let took = begun.elapsed();
        if answer.exit_code != 0 || answer.stdout != b"x\n" {
            bail!("echo ended with {}: {:?}", answer.exit_code, answer.stdout);
        }
        Ok(took)
    }

    pub(crate) async fn remove(&mut self, pod: &str) -> Result<Duration> {
        let pod_sandbox_id = pod.to_owned();
        let begun = Instant::now();
        self.runtime
            .stop_pod_sandbox(StopPodSandboxRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
            })
            .await?;
        self.runtime
            .remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })
            .await?;
        Ok(begun.elapsed())
    }
}
