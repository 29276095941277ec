//! RuntimeService: each RPC verified, converted, passed on. What is not served yet says so by its name.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use catamaran_streaming::{RequestError, Server};
use futures::Stream;
use futures::stream;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use super::api::runtime_service_server::RuntimeService;
use super::{api, convert, metrics, node_status, stats};
use crate::config::CgroupDriver;
use crate::error::Error;
use crate::pods::Pods;
use crate::pods::state::ContainerState;

type Reply<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
#[derive(Clone)]
pub(super) struct Runtime {
    pods: Pods,
    streaming: Arc<Server>,
}

impl Runtime {
    pub(super) fn new(pods: Pods, streaming: Arc<Server>) -> Self {
        Self { pods, streaming }
    }

    fn pod_list(&self, filter: Option<&api::PodSandboxFilter>) -> Vec<api::PodSandbox> {
        let views = self.pods.views();
        let matching = views
            .iter()
            .filter(|view| convert::pod_matches(&view.pod, filter));
        matching.map(|view| convert::pod_entry(&view.pod)).collect()
    }

    fn container_list(&self, filter: Option<&api::ContainerFilter>) -> Vec<api::Container> {
        let views = self.pods.views();
        let containers = views.iter().flat_map(|view| view.containers.values());
        containers
            .filter(|c| c.state != ContainerState::Creating && convert::container_matches(c, filter))
            .map(|container| convert::container_entry(container))
            .collect()
    }
}

fn ok<T>(message: T) -> Reply<T> {
    Ok(Response::new(message))
}

fn required<T>(value: Option<T>, field: &str) -> Result<T, Error> {
    value.ok_or_else(|| Error::invalid(field, "is missing"))
}

fn named<'a>(id: &'a str, field: &str) -> Result<&'a str, Error> {
    if id.is_empty() {
        Err(Error::invalid(field, "is empty"))
    } else {
        Ok(id)
    }
}

/// CreateContainer repeats the pod's configuration; the pod is what RunPodSandbox made of it, so one of another pod
/// is a mistake. The rest of it is not looked at: crictl gives a pod without a uid another one in each request.
fn of_pod(pod: &api::PodSandboxConfig, given: &api::PodSandboxConfig) -> Result<(), Error> {
    let (Some(pod), Some(given)) = (&pod.metadata, &given.metadata) else {
        return Ok(());
    };
    for (field, is, given) in [
        ("name", &pod.name, &given.name),
        ("namespace", &pod.namespace, &given.namespace),
    ] {
        if !given.is_empty() && given != is {
            return Err(Error::invalid(
                format!("sandbox_config.metadata.{field}"),
                format!("is {given:?}, and that of the pod sandbox is {is:?}"),
            ));
        }
    }
    Ok(())
}

/// CRI timeouts are seconds; negative ones are mistakes.
fn seconds(value: i64, field: &str) -> Result<Duration, Error> {
    let seconds = u64::try_from(value).map_err(|_| Error::invalid(field, format!("{value} is negative")))?;
    Ok(Duration::from_secs(seconds))
}

fn refused(error: RequestError) -> Status {
    match error {
        RequestError::Invalid(text) => Status::invalid_argument(text),
        RequestError::TooMany => Status::resource_exhausted(error.to_string()),
    }
}

/// A list in messages of bounded size, for the Stream* list RPCs.
fn chunks<T, M>(items: Vec<T>, size: usize, message: impl Fn(Vec<T>) -> M + Send + 'static) -> Streamed<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut items = items.into_iter();
    let parts = std::iter::from_fn(move || {
        let part: Vec<T> = items.by_ref().take(size).collect();
        (!part.is_empty()).then(|| Ok(message(part)))
    });
    Box::pin(stream::iter(parts))
}

/// Entries in one message of a streamed list.
const CHUNK: usize = 100;

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<api::VersionRequest>) -> Reply<api::VersionResponse> {
        ok(api::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: "catamaran".to_owned(),
            runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
            runtime_api_version: "v1".to_owned(),
        })
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<api::RunPodSandboxRequest>,
    ) -> Reply<api::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = required(request.config, "config")?;
        let id = self.pods.run_sandbox(config, &request.runtime_handler).await?;
        ok(api::RunPodSandboxResponse {
            pod_sandbox_id: id.to_string(),
        })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<api::StopPodSandboxRequest>,
    ) -> Reply<api::StopPodSandboxResponse> {
        self.pods
            .stop_sandbox(named(&request.into_inner().pod_sandbox_id, "pod_sandbox_id")?)
            .await?;
        ok(api::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<api::RemovePodSandboxRequest>,
    ) -> Reply<api::RemovePodSandboxResponse> {
        self.pods
            .remove_sandbox(named(&request.into_inner().pod_sandbox_id, "pod_sandbox_id")?)
            .await?;
        ok(api::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<api::PodSandboxStatusRequest>,
    ) -> Reply<api::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let view = self.pods.pod(named(&request.pod_sandbox_id, "pod_sandbox_id")?)?;
        ok(api::PodSandboxStatusResponse {
            status: Some(convert::pod_status(&view.pod)),
            info: if request.verbose {
                convert::pod_info(&view)
            } else {
                Default::default()
            },
            containers_statuses: convert::statuses(&view),
            timestamp: crate::node::now_ns(),
        })
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<api::ListPodSandboxRequest>,
    ) -> Reply<api::ListPodSandboxResponse> {
        ok(api::ListPodSandboxResponse {
            items: self.pod_list(request.into_inner().filter.as_ref()),
        })
    }

    type StreamPodSandboxesStream = Streamed<api::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<api::StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        let items = self.pod_list(request.into_inner().filter.as_ref());
        ok(chunks(items, CHUNK, |pod_sandboxes| {
            api::StreamPodSandboxesResponse { pod_sandboxes }
        }))
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Reply<api::CreateContainerResponse> {
        let request = request.into_inner();
        let config = required(request.config, "config")?;
        let pod = named(&request.pod_sandbox_id, "pod_sandbox_id")?;
        if let Some(given) = &request.sandbox_config {
            of_pod(&self.pods.pod(pod)?.pod.config, given)?;
        }
        let id = self.pods.create_container(pod, config).await?;
        ok(api::CreateContainerResponse {
            container_id: id.to_string(),
        })
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Reply<api::StartContainerResponse> {
        self.pods
            .start_container(named(&request.into_inner().container_id, "container_id")?)
            .await?;
        ok(api::StartContainerResponse {})
    }

    async fn stop_container(
        &self,
        request: Request<api::StopContainerRequest>,
    ) -> Reply<api::StopContainerResponse> {
        let request = request.into_inner();
        let grace = seconds(request.timeout, "timeout")?;
        self.pods
            .stop_container(named(&request.container_id, "container_id")?, grace)
            .await?;
        ok(api::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Reply<api::RemoveContainerResponse> {
        self.pods
            .remove_container(named(&request.into_inner().container_id, "container_id")?)
            .await?;
        ok(api::RemoveContainerResponse {})
    }

    async fn list_containers(
        &self,
        request: Request<api::ListContainersRequest>,
    ) -> Reply<api::ListContainersResponse> {
        ok(api::ListContainersResponse {
            containers: self.container_list(request.into_inner().filter.as_ref()),
        })
    }

    type StreamContainersStream = Streamed<api::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<api::StreamContainersRequest>,
    ) -> Reply<Self::StreamContainersStream> {
        let items = self.container_list(request.into_inner().filter.as_ref());
        ok(chunks(items, CHUNK, |containers| api::StreamContainersResponse {
            containers,
        }))
    }

    async fn container_status(
        &self,
        request: Request<api::ContainerStatusRequest>,
    ) -> Reply<api::ContainerStatusResponse> {
        let request = request.into_inner();
        let (view, container) = self
            .pods
            .container(named(&request.container_id, "container_id")?)?;
        ok(api::ContainerStatusResponse {
            status: Some(convert::container_status(&container)),
            info: if request.verbose {
                convert::container_info(&view, &container)
            } else {
                Default::default()
            },
        })
    }

    async fn update_container_resources(
        &self,
        request: Request<api::UpdateContainerResourcesRequest>,
    ) -> Reply<api::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        if request.windows.is_some() {
            return Err(Error::invalid("windows", "this is a Linux node").into());
        }
        // "Experimental resources or other options" by the CRI: there are none here that could be meant.
        if let Some(key) = request.annotations.keys().min() {
            return Err(Error::invalid(
                format!("annotations[{key}]"),
                "no option of an update is known by that name",
            )
            .into());
        }
        let wanted = required(request.linux, "linux")?;
        self.pods
            .update_container(named(&request.container_id, "container_id")?, wanted)
            .await?;
        ok(api::UpdateContainerResourcesResponse {})
    }

    async fn reopen_container_log(
        &self,
        request: Request<api::ReopenContainerLogRequest>,
    ) -> Reply<api::ReopenContainerLogResponse> {
        self.pods
            .reopen_log(named(&request.into_inner().container_id, "container_id")?)
            .await?;
        ok(api::ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: Request<api::ExecSyncRequest>) -> Reply<api::ExecSyncResponse> {
        let request = request.into_inner();
        if request.cmd.is_empty() {
            return Err(Error::invalid("cmd", "is empty").into());
        }
        let timeout = seconds(request.timeout, "timeout")?;
        let id = named(&request.container_id, "container_id")?;
        let output = self.pods.exec_sync(id, &request.cmd, timeout).await?;
        ok(api::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.exit_code,
        })
    }

    async fn exec(&self, request: Request<api::ExecRequest>) -> Reply<api::ExecResponse> {
        let request = request.into_inner();
        self.pods
            .attachable(named(&request.container_id, "container_id")?)?;
        let url = self.streaming.exec(catamaran_streaming::ExecRequest {
            container_id: request.container_id,
            command: request.cmd,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        ok(api::ExecResponse {
            url: url.map_err(refused)?,
        })
    }

    async fn attach(&self, request: Request<api::AttachRequest>) -> Reply<api::AttachResponse> {
        let request = request.into_inner();
        let tty = self
            .pods
            .attachable(named(&request.container_id, "container_id")?)?;
        if tty != request.tty {
            let is = if tty { "has a terminal" } else { "has no terminal" };
            return Err(Error::invalid("tty", format!("is {}, but the container {is}", request.tty)).into());
        }
        let url = self.streaming.attach(catamaran_streaming::AttachRequest {
            container_id: request.container_id,
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        });
        ok(api::AttachResponse {
            url: url.map_err(refused)?,
        })
    }

    async fn port_forward(
        &self,
        request: Request<api::PortForwardRequest>,
    ) -> Reply<api::PortForwardResponse> {
        let request = request.into_inner();
        self.pods.pod(named(&request.pod_sandbox_id, "pod_sandbox_id")?)?;
        let port = |port: i32| match u16::try_from(port) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(Error::invalid(
                "port",
                format!("{port} is not a port; 1 to 65535 are"),
            )),
        };
        let ports = request
            .port
            .into_iter()
            .map(port)
            .collect::<Result<Vec<u16>, Error>>()?;
        let url = self
            .streaming
            .port_forward(catamaran_streaming::PortForwardRequest {
                sandbox_id: request.pod_sandbox_id,
                ports,
            });
        ok(api::PortForwardResponse {
            url: url.map_err(refused)?,
        })
    }

    async fn container_stats(
        &self,
        request: Request<api::ContainerStatsRequest>,
    ) -> Reply<api::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        let (view, container) = self.pods.container(named(&id, "container_id")?)?;
        let stats = stats::container(self.pods.node(), &view, &container).await?;
        ok(api::ContainerStatsResponse { stats: Some(stats) })
    }

    async fn list_container_stats(
        &self,
        request: Request<api::ListContainerStatsRequest>,
    ) -> Reply<api::ListContainerStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        ok(api::ListContainerStatsResponse {
            stats: stats::containers(&self.pods, &filter).await,
        })
    }

    type StreamContainerStatsStream = Streamed<api::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<api::StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let items = stats::containers(&self.pods, &filter).await;
        ok(chunks(items, CHUNK, |container_stats| {
            api::StreamContainerStatsResponse { container_stats }
        }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<api::PodSandboxStatsRequest>,
    ) -> Reply<api::PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let view = self.pods.pod(named(&id, "pod_sandbox_id")?)?;
        ok(api::PodSandboxStatsResponse {
            stats: Some(stats::pod(self.pods.node(), view).await?),
        })
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<api::ListPodSandboxStatsRequest>,
    ) -> Reply<api::ListPodSandboxStatsResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        ok(api::ListPodSandboxStatsResponse {
            stats: stats::pods(&self.pods, &filter).await,
        })
    }

    type StreamPodSandboxStatsStream = Streamed<api::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<api::StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let items = stats::pods(&self.pods, &filter).await;
        ok(chunks(items, CHUNK, |pod_sandbox_stats| {
            api::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<api::UpdateRuntimeConfigRequest>,
    ) -> Reply<api::UpdateRuntimeConfigResponse> {
        // The kubelet sends the node's pod CIDR to whoever makes CNI configurations of it. Ours come from files.
        let config = request.into_inner().runtime_config.unwrap_or_default();
        let cidr = config.network_config.unwrap_or_default().pod_cidr;
        if !cidr.is_empty() {
            tracing::info!(cidr, "the kubelet's pod CIDR is left to the CNI configuration");
        }
        ok(api::UpdateRuntimeConfigResponse {})
    }

    async fn status(&self, request: Request<api::StatusRequest>) -> Reply<api::StatusResponse> {
        ok(node_status::status(self.pods.node(), request.into_inner().verbose).await)
    }

    async fn checkpoint_container(
        &self,
        request: Request<api::CheckpointContainerRequest>,
    ) -> Reply<api::CheckpointContainerResponse> {
        let request = request.into_inner();
        let limit = seconds(request.timeout, "timeout")?;
        self.pods
            .checkpoint_container(
                named(&request.container_id, "container_id")?,
                &request.location,
                limit,
            )
            .await?;
        ok(api::CheckpointContainerResponse {})
    }

    type GetContainerEventsStream = Streamed<api::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<api::GetEventsRequest>,
    ) -> Reply<Self::GetContainerEventsStream> {
        let receiver = self.pods.node().events.subscribe();
        let events = stream::unfold(Some(receiver), |receiver| async {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Ok(event) => Some((Ok(event), Some(receiver))),
                Err(RecvError::Closed) => None,
                Err(RecvError::Lagged(missed)) => {
                    let text =
                        format!("{missed} events were missed by a slow reader: list, then subscribe again");
                    Some((Err(Status::resource_exhausted(text)), None))
                }
            }
        });
        ok(Box::pin(events))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<api::ListMetricDescriptorsRequest>,
    ) -> Reply<api::ListMetricDescriptorsResponse> {
        ok(api::ListMetricDescriptorsResponse {
            descriptors: metrics::descriptors(),
        })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<api::ListPodSandboxMetricsRequest>,
    ) -> Reply<api::ListPodSandboxMetricsResponse> {
        ok(api::ListPodSandboxMetricsResponse {
            pod_metrics: metrics::pods(&self.pods).await?,
        })
    }

    type StreamPodSandboxMetricsStream = Streamed<api::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<api::StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        let items = metrics::pods(&self.pods).await?;
        ok(chunks(items, CHUNK, |pod_sandbox_metrics| {
            api::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<api::RuntimeConfigRequest>,
    ) -> Reply<api::RuntimeConfigResponse> {
        let driver = match self.pods.node().config.cgroup_driver {
            CgroupDriver::Cgroupfs => api::CgroupDriver::Cgroupfs,
            CgroupDriver::Systemd => api::CgroupDriver::Systemd,
        };
        ok(api::RuntimeConfigResponse {
            linux: Some(api::LinuxRuntimeConfiguration {
                cgroup_driver: driver.into(),
            }),
        })
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<api::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<api::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let id = named(&request.pod_sandbox_id, "pod_sandbox_id")?;
        self.pods
            .update_sandbox(id, request.overhead, request.resources)
            .await?;
        ok(api::UpdatePodSandboxResourcesResponse {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_of_another_pod_is_refused() {
        let pod = |name: &str, uid: &str| api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.into(),
                uid: uid.into(),
                namespace: "default".into(),
                attempt: 0,
            }),
            ..Default::default()
        };
        of_pod(&pod("a", "1"), &pod("a", "2")).unwrap();
        of_pod(&pod("a", "1"), &api::PodSandboxConfig::default()).unwrap();
        let error = of_pod(&pod("a", "1"), &pod("b", "1")).unwrap_err().to_string();
        assert!(
            error.starts_with("sandbox_config.metadata.name: is \"b\""),
            "{error}"
        );
    }
}
