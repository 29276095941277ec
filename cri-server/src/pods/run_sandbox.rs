//! RunPodSandbox: namespaces or VM by the shim, network by CNI, side by side.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catamaran_network::PodNetwork;
use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::{
    IdMapping, POD_SPEC_VERSION, PidNamespace, PodNamespaces, PodSpec, RuntimeSpec, UserNamespace,
};
use catamaran_spec::RuntimeFeatures;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::files::Files;
use super::record::PodRecord;
use super::state::PodState;
use super::steps::Steps;
use super::undo::{Undo, UndoFailure};
use super::{network, teardown, update_sandbox, vm};
use crate::config::{CgroupDriver, Config, HandlerType};
use crate::cri::api::{NamespaceMode, NamespaceOption, PodSandboxConfig};
use crate::error::{Error, Result, chain};
use crate::node::{Node, now_ns};
use crate::shim::Shim;
use crate::store::Written;

/// As the CRI's other implementations have it (Docker's default).
const SHM_BYTES: u64 = 64 << 20;

/// Time that a CNI plugin has to finish when the pod's creation has failed already.
const PLUGIN_GRACE: Duration = Duration::from_secs(3);

/// A sandbox that is ready.
pub(super) struct Started {
    pub(super) shim: Shim,
    pub(super) ips: Vec<IpAddr>,
    pub(super) info: BTreeMap<String, String>,
}

/// A sandbox that did not come to be.
pub(super) struct Failed {
    pub(super) error: Error,
    /// What could not be undone; the record must then stay.
    pub(super) left: Vec<UndoFailure>,
}

/// Checks a request and turns it into a record, before anything is done.
///
/// # Errors
/// [`Error::InvalidArgument`] and [`Error::Spec`] naming the field; [`Error::FailedPrecondition`] where the
/// handler cannot be used.
pub(super) async fn plan(node: &Node, config: PodSandboxConfig, handler: &str) -> Result<PodRecord> {
    let handler = node.handlers.resolve(handler)?;
    verify_metadata(&config)?;
    let features = handler.features().await;
    // Whether the request makes sense comes first, then whether this node can do it, with the reason.
    let able = RuntimeFeatures {
        user_namespaces: true,
        ..features
    };
    catamaran_spec::validate_pod(&config, handler.side(), &able)?;
    if wants_user_namespace(&config) && !features.user_namespaces {
        return Err(Error::FailedPrecondition(format!(
            "config.linux.security_context.namespace_options.userns_options: runtime handler {} has no user \
             namespaces: {}",
            handler.name,
            handler.no_user_namespaces().await
        )));
    }
    network::port_mappings(&config)?;
    network::bandwidth(&config)?;
    update_sandbox::verify_linux(config.linux.as_ref())?;
    handler.shim()?;
    let id = Id::random().map_err(Error::io("read", "/dev/urandom"))?;
    let runtime = match handler.kind {
        HandlerType::Oci => handler.oci_spec()?,
        HandlerType::Vm => vm::vm_spec(node, handler, &config).await?,
    };
    let given = config
        .linux
        .as_ref()
        .map(|linux| linux.cgroup_parent.clone())
        .unwrap_or_default();
    let systemd = node.config.cgroup_driver == CgroupDriver::Systemd;
    let owns_cgroup = given.is_empty() && !systemd;
    let cgroup_parent = match (given.is_empty(), systemd) {
        (false, _) => given,
        (true, false) => format!("{}/{id}", node.config.cgroup_parent.trim_end_matches('/')),
        // systemd makes and removes the scopes in it.
        (true, true) => "system.slice".to_owned(),
    };
    let spec = pod_spec(node, &config, &id, &cgroup_parent, runtime)?;
    Ok(PodRecord {
        id,
        state: PodState::Creating,
        handler: handler.name.clone(),
        created_at_ns: now_ns(),
        config,
        cgroup_parent,
        owns_cgroup,
        ips: Vec::new(),
        info: BTreeMap::new(),
        spec,
        problem: None,
    })
}

fn verify_metadata(config: &PodSandboxConfig) -> Result<()> {
    let Some(metadata) = &config.metadata else {
        return Err(Error::invalid("config.metadata", "is missing"));
    };
    for (field, value) in [
        ("name", &metadata.name),
        ("namespace", &metadata.namespace),
        ("uid", &metadata.uid),
    ] {
        if value.is_empty() {
            return Err(Error::invalid(format!("config.metadata.{field}"), "is empty"));
        }
    }
    if !config.log_directory.is_empty() && !config.log_directory.starts_with('/') {
        return Err(Error::invalid("config.log_directory", "is not an absolute path"));
    }
    if config.hostname.len() > 64 {
        return Err(Error::invalid(
            "config.hostname",
            "is longer than the 64 bytes that Linux allows",
        ));
    }
    if config.windows.is_some() {
        return Err(Error::invalid("config.windows", "this is a Linux node"));
    }
    Ok(())
}

fn pod_spec(
    node: &Node,
    config: &PodSandboxConfig,
    id: &Id,
    cgroup_parent: &str,
    runtime: RuntimeSpec,
) -> Result<PodSpec> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default();
    let options = security.namespace_options.clone().unwrap_or_default();
    let host_network = options.network() == NamespaceMode::Node;
    let netns: Option<PathBuf> = (!host_network).then(|| node.dirs.netns().join(id.as_str()));
    let pid = match options.pid() {
        NamespaceMode::Pod => PidNamespace::Pod,
        NamespaceMode::Node => PidNamespace::Host,
        NamespaceMode::Container | NamespaceMode::Target => PidNamespace::Container,
    };
    let hostname = if host_network {
        String::new()
    } else {
        config.hostname.clone()
    };
    Ok(PodSpec {
        version: POD_SPEC_VERSION,
        id: id.clone(),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        hostname,
        annotations: config.annotations.clone().into_iter().collect(),
        namespaces: PodNamespaces {
            network: netns,
            host_ipc: options.ipc() == NamespaceMode::Node,
            pid,
            user: user_namespace(&options),
        },
        sysctls: sysctls(&node.config, config),
        cgroup_parent: cgroup_parent.to_owned(),
        systemd_cgroup: node.config.cgroup_driver == CgroupDriver::Systemd,
        shm_bytes: SHM_BYTES,
        privileged: security.privileged,
        runtime,
    })
}

/// The pod's sysctls, and what a pod with a network namespace of its own gets besides unless it says otherwise: so
/// that processes without privileges can bind low ports and ping, as with containerd 2.
fn sysctls(node: &Config, config: &PodSandboxConfig) -> BTreeMap<String, String> {
    let linux = config.linux.clone().unwrap_or_default();
    let options = linux
        .security_context
        .and_then(|security| security.namespace_options)
        .unwrap_or_default();
    let mut sysctls: BTreeMap<String, String> = linux.sysctls.into_iter().collect();
    if options.network() == NamespaceMode::Node {
        return sysctls;
    }
    // In a user namespace the range would hold groups that are not mapped, which the kernel refuses.
    let ping = node.enable_unprivileged_icmp && user_namespace(&options).is_none();
    for (wanted, name, value) in [
        (
            node.enable_unprivileged_ports,
            "net.ipv4.ip_unprivileged_port_start",
            "0",
        ),
        (ping, "net.ipv4.ping_group_range", "0 2147483647"),
    ] {
        let set = sysctls.contains_key(name) || sysctls.contains_key(&name.replace('.', "/"));
        if wanted && !set {
            sysctls.insert(name.to_owned(), value.to_owned());
        }
    }
    sysctls
}

fn wants_user_namespace(config: &PodSandboxConfig) -> bool {
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    security
        .and_then(|security| security.namespace_options.as_ref())
        .is_some_and(|options| user_namespace(options).is_some())
}

fn user_namespace(options: &NamespaceOption) -> Option<UserNamespace> {
    let user = options
        .userns_options
        .as_ref()
        .filter(|user| user.mode() == NamespaceMode::Pod)?;
    let map = |mappings: &[crate::cri::api::IdMapping]| {
        let convert = |m: &crate::cri::api::IdMapping| IdMapping {
            container_id: m.container_id,
            host_id: m.host_id,
            length: m.length,
        };
        mappings.iter().map(convert).collect()
    };
    Some(UserNamespace {
        uids: map(&user.uids),
        gids: map(&user.gids),
    })
}

/// Makes the sandbox; `announced` is the durable record of the intent. Undoes everything when a step fails or
/// `cancel` comes.
pub(super) async fn run(
    node: Arc<Node>,
    pod: Arc<PodRecord>,
    announced: Written,
    cancel: CancellationToken,
) -> Result<Started, Failed> {
    let (mut undo, steps) = (Undo::default(), Steps::default());
    let result = tokio::select! {
        result = begin(&node, &pod, announced, (&mut undo, &steps)) => result,
        () = cancel.cancelled() => Err(Error::Aborted(format!("pod sandbox {} was stopped while it was created", pod.id))),
    };
    match result {
        Ok(started) => Ok(started),
        Err(error) => {
            tracing::info!(pod = %pod.id, error = %chain(&error), "undoing a pod sandbox");
            node.nri.undo_pod(pod.id.as_str(), || crate::nri::pod(&pod)).await;
            let mut left = steps.settle().await;
            if left.is_empty() {
                left = undo.run().await;
            }
            Err(Failed { error, left })
        }
    }
}

async fn begin(
    node: &Arc<Node>,
    pod: &Arc<PodRecord>,
    announced: Written,
    (undo, steps): (&mut Undo, &Steps),
) -> Result<Started> {
    announced.durable().await?;
    let attaching = Attaching::default();
    push_undo(node, pod, undo, &attaching);
    let bundle = node.dirs.pod(&pod.id);
    let files = Files::of(&bundle);
    let host_network = pod.netns().is_none();
    std::fs::create_dir_all(bundle.join("containers")).map_err(Error::io("create", &bundle))?;
    std::fs::create_dir_all(node.dirs.runtime_root(&pod.handler))
        .map_err(Error::io("create", node.dirs.runtime_root(&pod.handler)))?;
    files.write(&pod.config, host_network, &node.host.hostname)?;
    if !pod.config.log_directory.is_empty() {
        std::fs::create_dir_all(&pod.config.log_directory)
            .map_err(Error::io("create", &pod.config.log_directory))?;
    }
    if pod.owns_cgroup {
        steps.run(make_cgroup(pod.clone())).await?;
    }
    // The shim starts while the namespace is made, and makes the sandbox while CNI configures it. In a pod with a
    // user namespace the shim makes the network namespace too, so that the user namespace owns it; CNI comes after.
    let by_shim = pod.spec.namespaces.user.is_some();
    let (netns_made, netns_ready) = oneshot::channel::<()>();
    let (sandbox_made, sandbox_ready) = oneshot::channel::<()>();
    let sandbox = async {
        let shim = teardown::launch(node, pod)?.start().await?;
        if !by_shim {
            // An error on the other side ends this one too.
            let _ = netns_ready.await;
        }
        shim.create_sandbox(&bundle, &pod.spec).await?;
        let _ = sandbox_made.send(());
        Ok::<Shim, Error>(shim)
    };
    let network = async {
        if host_network {
            let _ = netns_made.send(());
            return Ok(Vec::new());
        }
        let netns = match (by_shim, pod.netns()) {
            (true, Some(netns)) => {
                if sandbox_ready.await.is_err() {
                    return Err(Error::Aborted("the pod's namespaces were not made".to_owned()));
                }
                netns.clone()
            }
            _ => {
                let (node, id) = (node.clone(), pod.id.clone());
                let made = async move { Ok(node.network.create_netns(id.as_str()).await?) };
                steps.run(made).await?
            }
        };
        let _ = netns_made.send(());
        attaching.begin(node, network::pod_network(pod, netns)?).await
    };
    let (shim, ips) = tokio::try_join!(sandbox, network)?;
    shim.start_sandbox(boot_limit(pod)).await?;
    if !host_network {
        files.write_addresses(&ips, &pod.config.hostname)?;
    }
    let info = shim.sandbox_status().await?.info;
    let ready = || {
        let mut ready = PodRecord::clone(pod);
        ready.ips.clone_from(&ips);
        crate::nri::pod(&ready)
    };
    node.nri.run_pod(pod.id.as_str(), ready).await?;
    Ok(Started { shim, ips, info })
}

/// The pod's own cgroup, limited as a later UpdatePodSandboxResources would limit it.
async fn make_cgroup(pod: Arc<PodRecord>) -> Result<()> {
    let path = pod.cgroup_parent.clone();
    teardown::blocking(move || {
        catamaran_cgroups::create(&path).map_err(|e| Error::Cgroup {
            problem: chain(&e),
            path,
        })
    })
    .await?;
    let linux = pod.config.linux.as_ref();
    update_sandbox::limit_cgroup(&pod, &update_sandbox::PodResources::of(linux)).await
}

/// A CNI ADD in its own task: a plugin that is at work when the pod's creation fails is better let finish than
/// killed, as long as it is quick.
#[derive(Clone, Default)]
struct Attaching {
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Attaching {
    async fn begin(&self, node: &Arc<Node>, pod: PodNetwork) -> Result<Vec<IpAddr>> {
        let (done, attached) = oneshot::channel();
        let network = node.network.clone();
        let task = tokio::spawn(async move {
            // Nobody waits where the creation has failed meanwhile; then it is undone.
            let _ = done.send(network.attach(&pod).await);
        });
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        match attached.await {
            Ok(result) => Ok(result?.ips),
            Err(_) => Err(Error::Internal("the task of a CNI ADD ended".to_owned())),
        }
    }

    /// Waits until no plugin is at work any more.
    async fn settle(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut task) = task
            && tokio::time::timeout(PLUGIN_GRACE, &mut task).await.is_err()
        {
            task.abort();
            let _ = task.await;
        }
    }
}

fn boot_limit(pod: &PodRecord) -> Duration {
    match &pod.spec.runtime {
        RuntimeSpec::Oci { .. } => Duration::ZERO,
        RuntimeSpec::Vm(vm) => Duration::from_millis(vm.boot_timeout_ms),
    }
}

/// Everything that [`begin`] does, undone in reverse: the sandbox, the network, the cgroup, the bundle.
fn push_undo(node: &Arc<Node>, pod: &Arc<PodRecord>, undo: &mut Undo, attaching: &Attaching) {
    let text = |error: Error| chain(&error);
    let (n, p) = (node.clone(), pod.clone());
    undo.push("bundle", move || async move {
        teardown::remove_bundle(&n, &p.id).await.map_err(text)
    });
    let p = pod.clone();
    undo.push("cgroup", move || async move {
        teardown::remove_cgroup(&p).await.map_err(text)
    });
    let (n, p, attaching) = (node.clone(), pod.clone(), attaching.clone());
    undo.push("network", move || async move {
        attaching.settle().await;
        teardown::release_network(&n, &p.id).await.map_err(text)
    });
    let (n, p) = (node.clone(), pod.clone());
    undo.push("sandbox", move || async move {
        teardown::end_sandbox(&n, &p, None, |_| async { Ok(()) })
            .await
            .map_err(text)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::api::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext};

    #[test]
    fn pods_can_bind_low_ports_and_ping_without_privileges() {
        let pod = |set: &[(&str, &str)], options: NamespaceOption| PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                sysctls: set
                    .iter()
                    .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                    .collect(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let (ports, ping) = ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range");
        let config = Config::default();
        let of = |set: &[(&str, &str)], options| sysctls(&config, &pod(set, options));
        let plain = of(&[], NamespaceOption::default());
        assert_eq!(
            (plain[ports].as_str(), plain[ping].as_str()),
            ("0", "0 2147483647")
        );
        let set = of(
            &[(ports, "80"), ("net/ipv4/ping_group_range", "1 0")],
            NamespaceOption::default(),
        );
        assert_eq!((set.len(), set[ports].as_str()), (2, "80"));
        let host = NamespaceOption {
            network: NamespaceMode::Node.into(),
            ..Default::default()
        };
        assert!(of(&[], host).is_empty());
        let user = NamespaceOption {
            userns_options: Some(crate::cri::api::UserNamespace::default()),
            ..Default::default()
        };
        assert_eq!(of(&[], user).keys().collect::<Vec<_>>(), [ports]);
        let off = Config {
            enable_unprivileged_ports: false,
            enable_unprivileged_icmp: false,
            ..Config::default()
        };
        assert!(sysctls(&off, &PodSandboxConfig::default()).is_empty());
        assert_eq!(sysctls(&config, &PodSandboxConfig::default()).len(), 2);
    }
}
