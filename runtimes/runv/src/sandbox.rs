//! The pod as a VM, for the shim server.
//!
//! ```text
//! create: record, user, cgroup, share, VMM starts ──▶ booting (in the background)
//! start:  agent answered, CNI done ──▶ network plugged and configured, guest configured ──▶ ready
//! first container: virtiofsd starts, its device is plugged and mounted in the guest
//! stop:   agent syncs and powers off, or the VMM is killed ──▶ everything undone
//! ```
//! A VM that loses its agent's connection or virtiofsd is ended, see [`crate::life`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use catamaran_guest_protocol::v1::{
    ConfigureInterfaceRequest, ConfigureSandboxRequest, CreateContainerRequest, Empty, MountRequest,
    Neighbour, Route,
};
use catamaran_sandbox::bootstrap::Context;
use catamaran_sandbox::pod_spec::{Acceleration, PidNamespace, PodSpec, RuntimeSpec, VmSpec, info};
use catamaran_sandbox::shim_server::ShimError;
use catamaran_sandbox::shim_server::backend::{
    ContainerBackend, CreateContainer, CreateSandbox, Duplex, Process, SandboxBackend,
};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::sync::{OnceCell, watch};

use crate::boot::{self, Booted, Stage, chain, failure};
use crate::confinement::{Confinement, VmUser};
use crate::container::GuestContainer;
use crate::guest_client::{Agent, limited, refused, within};
use crate::life::Life;
use crate::network::{self, Attached};
use crate::oom;
use crate::process::{self, Name, Streams, adopt};
use crate::record::{self, Record};
use crate::share::{self, Share, Virtiofsd, oci};
use crate::vmm::console::Tail;
use crate::vmm::{Nic, SharedFs, Vmm};

/// The agent's farewell: sync and power off.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(3);
/// A device that was plugged appears in the guest within this.
const PLUG_LIMIT: Duration = Duration::from_secs(15);
const PLUG_RETRY: Duration = Duration::from_millis(10);

type BootResult = Shared<BoxFuture<'static, Result<Booted, ShimError>>>;

/// A pod in a VM.
pub struct VmSandbox {
    bundle: PathBuf,
    id: String,
    machine: Mutex<Option<Arc<Running>>>,
    /// Set with the machine; those who wait for its end before it was made learn of it.
    made: watch::Sender<bool>,
}

/// A VM that was started.
struct Running {
    spec: PodSpec,
    netns: PathBuf,
    vmm: Arc<dyn Vmm>,
    life: Arc<Life>,
    console: Tail,
    boot: BootResult,
    confinement: Confinement,
    share: Share,
    /// Serves the share to a device that is plugged.
    virtiofsd: OnceCell<Virtiofsd>,
    /// The shared directory is mounted in the guest.
    shared: OnceCell<()>,
    /// The lowest oom_score_adj that a container has asked for.
    oom_score_adj: Mutex<Option<i32>>,
}

impl VmSandbox {
    /// A sandbox that is not made yet.
    #[must_use]
    pub fn new(context: &Context) -> Self {
        Self {
            bundle: context.bundle.clone(),
            id: context.id.as_str().to_owned(),
            machine: Mutex::new(None),
            made: watch::Sender::new(false),
        }
    }

    fn running(&self) -> Result<Arc<Running>, ShimError> {
        let machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine
            .clone()
            .ok_or_else(|| ShimError::FailedPrecondition("the pod's VM is not made".to_owned()))
    }

    async fn make(&self, spec: PodSpec, bundle: &Path) -> Result<Running, ShimError> {
        let (vm, netns) = check(&spec)?;
        let step = |doing: &'static str| move |error: std::io::Error| ShimError::internal(doing, &error);
        let record = Record {
            id: self.id.clone(),
            cgroup_parent: spec.cgroup_parent.clone(),
            systemd_cgroup: spec.systemd_cgroup,
        };
        let cgroup = record
            .cgroup()
            .map_err(|error| ShimError::InvalidArgument(error.to_string()))?;
        record.write(bundle).map_err(step("write the VM's record"))?;
        let user = VmUser::claim(&record::users_directory(bundle), &self.id).map_err(step("claim a user"))?;
        cgroup.create().map_err(step("make the VM's cgroup"))?;
        let share = Share::create(bundle).map_err(|error| ShimError::Internal(chain(&error)))?;
        let kvm = vm.acceleration == Acceleration::Kvm;
        let confinement = Confinement {
            id: user.id(),
            netns: netns.clone(),
            cgroup,
            kvm,
        };
        let boot = boot::begin(format!("catamaran-{}", self.id), &vm, &confinement).await?;
        let (vmm, console) = (Arc::clone(&boot.vmm), boot.console.clone());
        // It has done so itself; this says in the log where it could not.
        oom::set(&BTreeSet::from([vmm.pid().cast_signed()]), oom::ORDINARY);
        let boot: BootResult = boot.wait().boxed().shared();
        // The guest boots while CNI works, whether somebody waits yet or not.
        let booting = boot.clone();
        let life = Life::new(Arc::clone(&vmm), confinement.cgroup.clone());
        life.depend_on(async move {
            match booting.await {
                Ok(booted) => booted.guest.connection.ended().await,
                // That is for `start` to report.
                Err(_) => std::future::pending().await,
            }
            "the connection to the guest's agent ended".to_owned()
        });
        Ok(Running {
            spec,
            netns,
            vmm,
            life,
            console,
            boot,
            confinement,
            share,
            virtiofsd: OnceCell::new(),
            shared: OnceCell::new(),
            oom_score_adj: Mutex::default(),
        })
    }

    /// Undoes everything; the VMM is killed if it still runs.
    async fn undo(&self) -> Result<(), ShimError> {
        let bundle = self.bundle.clone();
        let cleaned = tokio::task::spawn_blocking(move || record::clean_up(&bundle)).await;
        match cleaned {
            Ok(cleaned) => cleaned.map_err(|error| ShimError::Internal(chain(&error))),
            Err(error) => Err(ShimError::internal("clean up", &error)),
        }
    }
}

/// What a VM cannot be is refused here, whoever asked.
fn check(spec: &PodSpec) -> Result<(VmSpec, PathBuf), ShimError> {
    let invalid = |text: &str| Err(ShimError::InvalidArgument(text.to_owned()));
    let RuntimeSpec::Vm(vm) = &spec.runtime else {
        return invalid("runtime: this shim runs pods in VMs, not with an OCI runtime");
    };
    let Some(netns) = &spec.namespaces.network else {
        return invalid("namespaces.network: a pod in a VM cannot be in the host's network");
    };
    if spec.namespaces.host_ipc {
        return invalid("namespaces.host_ipc: a pod in a VM cannot share the host's IPC");
    }
    if spec.namespaces.pid == PidNamespace::Host {
        return invalid("namespaces.pid: a pod in a VM cannot see the host's processes");
    }
    if spec.namespaces.user.is_some() {
        return invalid("namespaces.user: a pod in a VM has its own users already");
    }
    if vm.memory_mib < 64 {
        return invalid("memory_mib: a VM needs at least 64 MiB");
    }
    Ok((vm.clone(), netns.clone()))
}

#[async_trait]
impl SandboxBackend for VmSandbox {
    async fn create(&self, request: CreateSandbox) -> Result<(), ShimError> {
        match self.make(request.spec, &request.bundle).await {
            Ok(running) => {
                *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(running));
                self.made.send_replace(true);
                Ok(())
            }
            Err(error) => {
                if let Err(undo) = self.undo().await {
                    tracing::warn!(error = %undo, "undoing a failed start");
                }
                Err(error)
            }
        }
    }

    async fn start(&self) -> Result<u32, ShimError> {
        let running = self.running()?;
        let booted = running.boot.clone().await;
        let booted = booted.inspect_err(|_| boot::save_console(&self.bundle, &running.console))?;
        running.join_network(&booted.guest.agent).await?;
        running.configure(&booted.guest.agent).await?;
        tracing::info!(
            kernel = booted.guest.hello.kernel_release,
            boot_ms = booted.took.as_millis(),
            "the guest is ready"
        );
        Ok(running.vmm.pid())
    }

    async fn stop(&self) -> Result<(), ShimError> {
        if let Ok(running) = self.running() {
            running.power_off().await;
        }
        self.undo().await
    }

    async fn info(&self) -> BTreeMap<String, String> {
        let mut map = BTreeMap::new();
        let Ok(running) = self.running() else { return map };
        if let RuntimeSpec::Vm(vm) = &running.spec.runtime {
            let name = boot::acceleration_name(vm.acceleration);
            map.insert(info::ACCELERATION.to_owned(), name.to_owned());
        }
        map.insert(info::VMM_PID.to_owned(), running.vmm.pid().to_string());
        if let Some(Ok(booted)) = running.boot.peek() {
            map.insert(info::KERNEL.to_owned(), booted.guest.hello.kernel_release.clone());
            map.insert(info::BOOT_MS.to_owned(), booted.took.as_millis().to_string());
        }
        map
    }

    async fn ended(&self) -> String {
        // The sender is in `self`.
        let _ = self.made.subscribe().wait_for(|made| *made).await;
        match self.running() {
            Ok(running) => {
                let reason = running.life.ended().await;
                boot::save_console(&self.bundle, &running.console);
                reason
            }
            Err(_) => std::future::pending().await,
        }
    }

    async fn connect(&self, port: u16) -> Result<Box<dyn Duplex>, ShimError> {
        let agent = self.running()?.agent().await?;
        process::connect(agent, port).await
    }

    async fn create_container(
        &self,
        request: CreateContainer,
    ) -> Result<(Arc<dyn ContainerBackend>, Process), ShimError> {
        let running = self.running()?;
        let agent = running.agent().await?;
        running
            .shared
            .get_or_try_init(|| running.mount_share(&agent))
            .await?;
        let made = running.make_container(&agent, &request).await;
        let pid = match made {
            Ok(pid) => pid,
            Err(error) => {
                if let Err(undo) = running.share.remove_container(&request.id) {
                    tracing::warn!(
                        container = request.id,
                        error = chain(&undo),
                        "undoing a failed container"
                    );
                }
                return Err(error);
            }
        };
        let name = Name {
            container: request.id.clone(),
            exec: String::new(),
        };
        let streams = Streams {
            terminal: request.terminal,
            stdin: request.stdin,
        };
        let process = adopt(&agent, &running.life, name, pid, streams);
        let container = GuestContainer {
            id: request.id,
            agent,
            life: Arc::clone(&running.life),
            share: running.share.clone(),
        };
        Ok((Arc::new(container), process))
    }
}

impl Running {
    async fn agent(&self) -> Result<Agent, ShimError> {
        Ok(self.boot.clone().await?.guest.agent)
    }

    /// Every interface that CNI left in the namespace appears in the guest.
    async fn join_network(&self, agent: &Agent) -> Result<(), ShimError> {
        let failed = |why: String| failure(Stage::Network, why, None);
        let attached = network::attach(&self.netns)
            .await
            .map_err(|error| failed(chain(&error)))?;
        for (number, Attached { interface, tap }) in attached.into_iter().enumerate() {
            let nic = Nic {
                id: format!("nic{number}"),
                tap,
                mac: interface.mac,
            };
            self.vmm
                .plug_nic(nic)
                .await
                .map_err(|error| failed(chain(&error)))?;
            let name = interface.name.clone();
            let request = limited(interface_request(interface));
            let answer = within(agent.clone().configure_interface(request)).await;
            answer.map_err(|status| failed(refused(&name, &status).to_string()))?;
        }
        Ok(())
    }

    async fn configure(&self, agent: &Agent) -> Result<(), ShimError> {
        let request = ConfigureSandboxRequest {
            hostname: self.spec.hostname.clone(),
            sysctls: self.spec.sysctls.clone().into_iter().collect(),
            shared_pid: self.spec.namespaces.pid == PidNamespace::Pod,
            shm_bytes: self.spec.shm_bytes,
        };
        let answer = within(agent.clone().configure_sandbox(limited(request))).await;
        answer
            .map(drop)
            .map_err(|status| refused("configure the guest", &status))
    }

    /// Starts virtiofsd and plugs its device.
    async fn plug_share(&self) -> Result<Virtiofsd, ShimError> {
        let failed = |why: String| failure(Stage::Rootfs, why, Some(&self.console));
        let RuntimeSpec::Vm(vm) = &self.spec.runtime else {
            return Err(failed("the pod has no VM".to_owned()));
        };
        let started = share::serve(&self.share, &vm.virtiofsd, &self.confinement.cgroup).await;
        let (daemon, back_end) = started.map_err(|error| failed(chain(&error)))?;
        let device = SharedFs {
            tag: share::TAG.to_owned(),
            back_end,
        };
        if let Err(error) = self.vmm.plug_shared_fs(device).await {
            daemon.stop().await;
            return Err(failed(chain(&error)));
        }
        let ended = daemon.ended();
        self.life.depend_on(async move {
            format!("virtiofsd, which serves the pod's files, ended ({})", ended.await)
        });
        Ok(daemon)
    }

    /// Mounts the share in the guest. What was done by an attempt that failed is not done again: a device can be
    /// plugged once.
    async fn mount_share(&self, agent: &Agent) -> Result<(), ShimError> {
        let daemon = self.virtiofsd.get_or_try_init(|| self.plug_share()).await?;
        let failed = |why: String| failure(Stage::Rootfs, why, Some(&self.console));
        let request = MountRequest {
            r#type: "virtiofs".to_owned(),
            source: share::TAG.to_owned(),
            target: share::GUEST_DIRECTORY.to_owned(),
            options: Vec::new(),
        };
        // The guest knows the tag only once it has found the device.
        let deadline = tokio::time::Instant::now() + PLUG_LIMIT;
        loop {
            match within(agent.clone().mount(limited(request.clone()))).await {
                Ok(_) => return Ok(()),
                Err(status) if tokio::time::Instant::now() >= deadline => {
                    let words = daemon.last_words();
                    return Err(failed(format!("{} {words}", refused("mount the share", &status))));
                }
                Err(_) => tokio::time::sleep(PLUG_RETRY).await,
            }
        }
    }

    async fn make_container(&self, agent: &Agent, request: &CreateContainer) -> Result<u32, ShimError> {
        let of_share = |error: share::ShareError| match &error {
            share::ShareError::Refused(text) => ShimError::InvalidArgument(text.clone()),
            _ => failure(Stage::Rootfs, chain(&error), None),
        };
        let config = request.bundle.join("config.json");
        let bytes = std::fs::read(&config)
            .map_err(|error| ShimError::internal(format!("read {}", config.display()), &error))?;
        let mut spec: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|error| ShimError::InvalidArgument(format!("config.json: {error}")))?;
        let root = self
            .share
            .mount_rootfs(&request.id, &request.rootfs)
            .map_err(of_share)?;
        oci::rewrite(&mut spec, &self.share, &request.id, &root).map_err(of_share)?;
        let oom_score_adj = spec
            .pointer("/process/oomScoreAdj")
            .and_then(|value| value.as_i64());
        let message = CreateContainerRequest {
            container_id: request.id.clone(),
            spec: spec.to_string().into_bytes(),
            stdin: request.stdin,
        };
        let answer = within(agent.clone().create_container(limited(message))).await;
        let made = answer.map_err(|status| refused("create container", &status))?;
        self.protect(oom_score_adj.and_then(|value| i32::try_from(value).ok()));
        Ok(made.pid)
    }

    /// A container asks for `oom_score_adj`, or does not care.
    fn protect(&self, oom_score_adj: Option<i32>) {
        let wanted = oom_score_adj.unwrap_or(oom::ORDINARY);
        let mut lowest = self.oom_score_adj.lock().unwrap_or_else(PoisonError::into_inner);
        if lowest.is_none_or(|lowest| wanted < lowest) {
            *lowest = Some(wanted);
            oom::set(&self.confinement.cgroup.pids(), wanted);
        }
    }

    /// Ends the VM: in order where the guest answers, by force otherwise.
    async fn power_off(&self) {
        self.life.stopping();
        if let Some(Ok(booted)) = self.boot.peek() {
            let mut agent = booted.guest.agent.clone();
            let orderly = async {
                // The connection breaks when it is done, which is no error here.
                let _ = agent.shutdown(Empty {}).await;
                self.vmm.ended().await
            };
            if tokio::time::timeout(SHUTDOWN_LIMIT, orderly).await.is_err() {
                tracing::warn!("the guest did not power off in time");
            }
        }
        self.vmm.kill();
        self.vmm.ended().await;
        if let Some(daemon) = self.virtiofsd.get() {
            daemon.stop().await;
        }
    }
}

fn interface_request(interface: network::Interface) -> ConfigureInterfaceRequest {
    let routes = interface.routes.into_iter().map(|route| Route {
        destination: route.destination,
        gateway: route.gateway.unwrap_or_default(),
        source: route.source.unwrap_or_default(),
        scope: route.scope.into(),
        priority: route.priority,
        onlink: route.onlink,
    });
    let neighbours = interface.neighbours.into_iter().map(|neighbour| Neighbour {
        address: neighbour.address,
        mac: neighbour.mac,
        state: neighbour.state.into(),
    });
    ConfigureInterfaceRequest {
        name: interface.name,
        mac: interface.mac.to_vec(),
        mtu: interface.mtu,
        addresses: interface.addresses,
        routes: routes.collect(),
        neighbours: neighbours.collect(),
    }
}
