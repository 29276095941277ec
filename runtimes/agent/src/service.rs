//! The gRPC service: checks requests and hands them on.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use catamaran_guest_protocol::v1::agent_server::Agent;
use catamaran_guest_protocol::v1::{
    ConfigureInterfaceRequest, ConfigureSandboxRequest, ContainerRequest, CreateContainerRequest, Empty,
    ExecRequest, HelloRequest, HelloResponse, InputChunk, MountRequest, OutputChunk, PortChunk,
    ProcessRequest, ProcessResponse, ResizeRequest, SignalRequest, StatsRequest, StatsResponse,
    UnmountRequest, UpdateRequest, WaitResponse,
};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::boot::Guest;
use crate::containers::{Containers, Reach};
use crate::error::{Context, Error};
use crate::{cgroup_stats, console, guest_clock, mounts, network, port_forward, process};

/// What the shim calls.
pub(crate) struct Service {
    guest: Arc<Guest>,
    containers: Arc<Containers>,
}

impl Service {
    pub(crate) fn new(guest: Guest, containers: Arc<Containers>) -> Self {
        Self {
            guest: Arc::new(guest),
            containers,
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn empty() -> Answer<Empty> {
    Ok(Response::new(Empty {}))
}

#[tonic::async_trait]
impl Agent for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Answer<HelloResponse> {
        let request = request.into_inner();
        guest_clock::set(request.clock_ns)?;
        guest_clock::add_entropy(&request.entropy)?;
        let uname = nix::sys::utsname::uname().context(|| "cannot read the kernel's name".into())?;
        Ok(Response::new(HelloResponse {
            kernel_release: uname.release().to_string_lossy().into_owned(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            cgroup_version: self.guest.cgroups.name().into(),
            memory_bytes: self.guest.memory_bytes,
            cpus: self.guest.cpus,
        }))
    }

    async fn configure_interface(&self, request: Request<ConfigureInterfaceRequest>) -> Answer<Empty> {
        network::configure(request.get_ref()).await?;
        empty()
    }

    async fn configure_sandbox(&self, request: Request<ConfigureSandboxRequest>) -> Answer<Empty> {
        self.containers.configure_sandbox(request.get_ref())?;
        empty()
    }

    async fn mount(&self, request: Request<MountRequest>) -> Answer<Empty> {
        mounts::add(request.get_ref()).await?;
        empty()
    }

    async fn unmount(&self, request: Request<UnmountRequest>) -> Answer<Empty> {
        mounts::remove(&request.get_ref().target)?;
        empty()
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<ProcessResponse> {
        let CreateContainerRequest {
            container_id,
            spec,
            stdin,
        } = request.into_inner();
        let pid = self.containers.create(container_id, spec, stdin).await?;
        Ok(Response::new(ProcessResponse {
            pid: pid.cast_unsigned(),
        }))
    }

    async fn start_container(&self, request: Request<ContainerRequest>) -> Answer<Empty> {
        self.containers.start(&request.get_ref().container_id).await?;
        empty()
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ProcessResponse> {
        let ExecRequest {
            container_id,
            exec_id,
            process,
            stdin,
        } = request.into_inner();
        let pid = self
            .containers
            .exec(container_id, exec_id, process, stdin)
            .await?;
        Ok(Response::new(ProcessResponse {
            pid: pid.cast_unsigned(),
        }))
    }

    async fn signal(&self, request: Request<SignalRequest>) -> Answer<Empty> {
        let request = request.get_ref();
        let reach = match (request.all, request.tree) {
            (true, _) => Reach::Container,
            (false, true) => Reach::Tree,
            (false, false) => Reach::Process,
        };
        self.containers
            .signal(&request.container_id, &request.exec_id, request.signal, reach)?;
        empty()
    }

    async fn wait(&self, request: Request<ProcessRequest>) -> Answer<WaitResponse> {
        let request = request.get_ref();
        let ended = self
            .containers
            .find(&request.container_id, &request.exec_id)?
            .wait()
            .await?;
        Ok(Response::new(WaitResponse {
            exit_code: ended.code,
            exited_at_ns: ended.at_ns,
            oom_killed: ended.oom_killed,
        }))
    }

    async fn delete(&self, request: Request<ProcessRequest>) -> Answer<Empty> {
        let request = request.get_ref();
        self.containers
            .delete(&request.container_id, &request.exec_id)
            .await?;
        empty()
    }

    type ReadOutputStream = ReceiverStream<Result<OutputChunk, Status>>;

    async fn read_output(&self, request: Request<ProcessRequest>) -> Answer<Self::ReadOutputStream> {
        let request = request.get_ref();
        let process = self.containers.find(&request.container_id, &request.exec_id)?;
        Ok(Response::new(ReceiverStream::new(process::output(&process))))
    }

    async fn write_input(&self, request: Request<Streaming<InputChunk>>) -> Answer<Empty> {
        let mut chunks = request.into_inner();
        let mut process = None;
        while let Some(chunk) = chunks.message().await? {
            let process = match &process {
                Some(process) => process,
                None => process.insert(self.containers.find(&chunk.container_id, &chunk.exec_id)?),
            };
            if !chunk.data.is_empty() {
                process.stdio.write(&chunk.data, &process.ended).await?;
            }
            if chunk.eof {
                process.stdio.close_stdin().await;
                break;
            }
        }
        empty()
    }

    async fn resize_terminal(&self, request: Request<ResizeRequest>) -> Answer<Empty> {
        let request = request.get_ref();
        let size = |name: &str, value: u32| {
            u16::try_from(value).map_err(|_| Error::Invalid(format!("{name} {value} is more than 65535")))
        };
        let (rows, columns) = (size("height", request.height)?, size("width", request.width)?);
        self.containers
            .find(&request.container_id, &request.exec_id)?
            .stdio
            .resize(rows, columns)?;
        empty()
    }

    async fn update_resources(&self, request: Request<UpdateRequest>) -> Answer<Empty> {
        let request = request.get_ref();
        self.containers
            .update(&request.container_id, &request.resources)?;
        empty()
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Answer<StatsResponse> {
        let path = self.containers.cgroup_of(&request.get_ref().container_id)?;
        Ok(Response::new(cgroup_stats::read(self.guest.cgroups, &path)))
    }

    type PortForwardStream = Pin<Box<dyn Stream<Item = Result<PortChunk, Status>> + Send>>;

    async fn port_forward(&self, request: Request<Streaming<PortChunk>>) -> Answer<Self::PortForwardStream> {
        let chunks = port_forward::start(request.into_inner()).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(chunks))))
    }

    async fn shutdown(&self, _: Request<Empty>) -> Answer<Empty> {
        // SAFETY: -1 is every process but this one.
        unsafe { libc::kill(-1, libc::SIGKILL) };
        tokio::spawn(async {
            // The answer may still leave; the shim does not wait for it.
            tokio::time::sleep(Duration::from_millis(5)).await;
            // A file system whose server has gone would hold sync forever, and the shim kills a guest that
            // does not power off.
            let sync = std::thread::spawn(nix::unistd::sync);
            for _ in 0..200 {
                if sync.is_finished() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            console::power_off();
        });
        empty()
    }
}
