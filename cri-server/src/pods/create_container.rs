//! CreateContainer: root file system, OCI spec, bundle, and the process waiting to be started.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catamaran_images::Image;
use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::info;
use catamaran_sandbox::protocol::{CRI_LOG_SCHEME, DISCARD_OUTPUT, STDIN_KEEP, STDIN_ONCE};
use catamaran_spec::{
    ContainerInput, HostFeatures, HostInputs, HostNamespaces, ImageUsers, MountSource, PidNamespace,
    PodFiles, Side, SourcePropagation, Target, UserNamespace, container_spec, inject_cdi_devices,
    resolve_identity, stop_signal,
};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, Spec};
use tokio_util::sync::CancellationToken;

use super::declared_volumes::{self, DeclaredVolume};
use super::files::Files;
use super::image_volumes::{self, ImageVolume};
use super::lookups::{Lookups, Place};
use super::record::{ContainerKey, ContainerRecord, PodRecord, PodView};
use super::run_sandbox::Failed;
use super::state::ContainerState;
use super::steps::Steps;
use super::undo::Undo;
use super::{image_ref, teardown, update_container};
use crate::config::CgroupDriver;
use crate::cri::api::{
    ContainerConfig, IdMapping, LinuxContainerResources, LinuxContainerUser, NamespaceMode, NamespaceOption,
    PodSandboxConfig,
};
use crate::error::{Error, Result, chain};
use crate::node::{Node, now_ns};
use crate::shim::{CreateTask, Mount, Shim};
use crate::store::Written;

/// `/etc/passwd` and `/etc/group` of an image; larger ones are not read.
const USER_FILE_LIMIT: u64 = 4 << 20;

/// A container that can be made: checked, nothing done yet.
pub(super) struct Plan {
    pub(super) record: ContainerRecord,
    spec: Spec,
    side: Side,
    read_only: bool,
    image_volumes: Vec<ImageVolume>,
    declared_volumes: Vec<DeclaredVolume>,
}

/// Checks a request and makes its spec.
///
/// # Errors
/// [`Error::InvalidArgument`] and [`Error::Spec`] naming the field, [`Error::NotFound`] for the image,
/// [`Error::DeadlineExceeded`] for a volume whose file system does not answer.
pub(super) async fn plan(
    node: &Arc<Node>,
    lookups: &Lookups,
    pod: &PodView,
    config: ContainerConfig,
) -> Result<Plan> {
    verify(&pod.pod, &config)?;
    let wanted = config
        .image
        .as_ref()
        .map(|image| image.image.clone())
        .unwrap_or_default();
    let image = node.images.get(&wanted).ok_or_else(|| Error::NotFound {
        what: "image",
        id: wanted,
    })?;
    let id = Id::random().map_err(Error::io("read", "/dev/urandom"))?;
    let handler = node.handlers.resolve(&pod.pod.handler)?;
    let features = handler.features().await;
    let node = node.clone();
    let pod = pod.clone();
    let side = handler.side();
    let key = (pod.pod.id.clone(), key(&config));
    let places = config
        .mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| !mount.host_path.is_empty());
    let places = places.map(|(index, mount)| Place {
        field: format!("config.mounts[{index}].host_path"),
        path: mount.host_path.clone(),
    });
    let places = places.collect();
    let work = move || plan_blocking(&node, &pod, config, &image, id, side, features);
    lookups.run(key, places, work).await
}

fn key(config: &ContainerConfig) -> ContainerKey {
    let metadata = config.metadata.clone().unwrap_or_default();
    ContainerKey {
        name: metadata.name,
        attempt: metadata.attempt,
    }
}

fn plan_blocking(
    node: &Node,
    pod: &PodView,
    mut config: ContainerConfig,
    image: &Image,
    id: Id,
    side: Side,
    runtime: catamaran_spec::RuntimeFeatures,
) -> Result<Plan> {
    let users = ImageUsers {
        passwd: node.images.read_file(&image.id, "/etc/passwd", USER_FILE_LIMIT)?,
        group: node.images.read_file(&image.id, "/etc/group", USER_FILE_LIMIT)?,
    };
    let sandbox = &pod.pod;
    let files = Files::of(&node.dirs.pod(&sandbox.id));
    let files = PodFiles {
        shm: if sandbox.spec.namespaces.host_ipc {
            "/dev/shm".into()
        } else {
            files.shm
        },
        resolv_conf: files.resolv_conf,
        hosts: files.hosts,
        hostname: files.hostname,
    };
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default();
    let options = security.namespace_options.clone().unwrap_or_default();
    let namespaces = host_namespaces(pod, &options)?;
    let image_volumes = image_volumes::plan(node, &node.dirs.container(&sandbox.id, &id), &mut config)?;
    let mut inputs = HostInputs::gather(&config, side)?;
    for volume in &image_volumes {
        if let Some(source) = inputs.mounts.get_mut(volume.index) {
            *source = Some(volume.source());
        }
    }
    // To the spec they are mounts like others; on record, and in the container's status, is what the CRI asked for.
    let snapshot = node.dirs.snapshots().join(id.as_str());
    let declared_volumes = declared_volumes::plan(&image.config, &config.mounts, &snapshot)?;
    let mut mounted = config.clone();
    let ids = pod_id_mappings(&sandbox.config);
    for volume in &declared_volumes {
        mounted.mounts.push(volume.mount(ids));
        inputs.mounts.push(Some(MountSource {
            path: volume.source.clone(),
            propagation: SourcePropagation::Private,
        }));
    }
    let annotations: BTreeMap<String, String> = BTreeMap::new();
    let image_name = config.image.as_ref().map(user_image_name).unwrap_or_default();
    let input = ContainerInput {
        pod: &sandbox.config,
        container: &mounted,
        image: &image.config,
        container_id: id.as_str(),
        sandbox_id: sandbox.id.as_str(),
        target: match side {
            Side::Host => Target::Host(&namespaces),
            Side::Guest => Target::Guest,
        },
        host: &node.host,
        runtime,
        files: &files,
        users: &users,
        inputs: &inputs,
        rootfs: Path::new("rootfs"),
        image_name: &image_name,
        systemd_cgroup: node.config.cgroup_driver == CgroupDriver::Systemd,
        cgroup_parent: &sandbox.cgroup_parent,
        annotations: &annotations,
    };
    let mut spec = container_spec(&input)?;
    let devices: Vec<&str> = config
        .cdi_devices
        .iter()
        .map(|device| device.name.as_str())
        .collect();
    inject_cdi_devices(&mut spec, &devices, &node.config.cdi_spec_dirs)?;
    let image_user = image
        .config
        .config()
        .as_ref()
        .and_then(|config| config.user().clone())
        .unwrap_or_default();
    let identity = resolve_identity(Some(&security), &image_user, &users)?;
    let signal = stop_signal(&config, &image.config)?;
    let log_path = log_path(&sandbox.config.log_directory, &config.log_path);
    let record = ContainerRecord {
        id,
        pod: sandbox.id.clone(),
        state: ContainerState::Creating,
        image_id: image.id.clone(),
        image_ref: image_ref(image),
        log_path,
        stop_signal: signal.number,
        user: LinuxContainerUser {
            uid: i64::from(identity.uid),
            gid: i64::from(identity.gid),
            supplemental_groups: identity.groups.iter().map(|gid| i64::from(*gid)).collect(),
        },
        resources: config
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.clone())
            .unwrap_or_default(),
        pid: 0,
        created_at_ns: now_ns(),
        started_at_ns: 0,
        exit: None,
        config,
    };
    Ok(Plan {
        record,
        spec,
        side,
        read_only: security.readonly_rootfs,
        image_volumes,
        declared_volumes,
    })
}

/// How the ids of a pod with a user namespace are mapped: what the image gives to root is the pod's root's.
fn pod_id_mappings(config: &PodSandboxConfig) -> Option<(&[IdMapping], &[IdMapping])> {
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    let user = security.namespace_options.as_ref()?.userns_options.as_ref()?;
    (user.mode() == NamespaceMode::Pod).then_some((&user.uids, &user.gids))
}

fn verify(pod: &PodRecord, config: &ContainerConfig) -> Result<()> {
    match &config.metadata {
        None => return Err(Error::invalid("config.metadata", "is missing")),
        Some(metadata) if metadata.name.is_empty() => {
            return Err(Error::invalid("config.metadata.name", "is empty"));
        }
        Some(_) => {}
    }
    if config.image.as_ref().is_none_or(|image| image.image.is_empty()) {
        return Err(Error::invalid("config.image.image", "is empty"));
    }
    if config.windows.is_some() {
        return Err(Error::invalid("config.windows", "this is a Linux node"));
    }
    if !config.log_path.is_empty() {
        if pod.config.log_directory.is_empty() && !config.log_path.starts_with('/') {
            return Err(Error::invalid(
                "config.log_path",
                "is relative, and the pod has no log_directory",
            ));
        }
        if Path::new(&config.log_path)
            .components()
            .any(|part| part == std::path::Component::ParentDir)
        {
            return Err(Error::invalid(
                "config.log_path",
                "leads out of the pod's log_directory by '..'",
            ));
        }
    }
    verify_namespaces(pod, config)?;
    if config.stdin_once && !config.stdin {
        return Err(Error::invalid("config.stdin_once", "needs config.stdin"));
    }
    Ok(())
}

/// A container's network and IPC namespaces are its pod's, so it may leave them at POD or say what the pod says.
///
/// # Errors
/// [`Error::InvalidArgument`] for the node's where the pod has its own, and for what is no mode of theirs.
fn verify_namespaces(pod: &PodRecord, config: &ContainerConfig) -> Result<()> {
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let Some(options) = security.and_then(|security| security.namespace_options.as_ref()) else {
        return Ok(());
    };
    let field = |name: &str| format!("config.linux.security_context.namespace_options.{name}");
    for (name, value, of_node) in [
        ("network", options.network, pod.netns().is_none()),
        ("ipc", options.ipc, pod.spec.namespaces.host_ipc),
        ("pid", options.pid, true),
    ] {
        let problem = match NamespaceMode::try_from(value) {
            Ok(_) if name == "pid" => continue,
            Ok(NamespaceMode::Pod) => continue,
            Ok(NamespaceMode::Node) if of_node => continue,
            Ok(NamespaceMode::Node) => "is NODE, and the pod sandbox has a namespace of its own".to_owned(),
            Ok(mode) => format!("is {}, and only pid has that mode", mode.as_str_name()),
            Err(unknown) => format!("has the unknown value {}", unknown.0),
        };
        return Err(Error::invalid(field(name), problem));
    }
    Ok(())
}

/// CRI: relative to the pod's log_directory. One that begins with a slash is taken for relative, as other
/// implementations have it, unless it names the directory itself.
fn log_path(directory: &str, path: &str) -> String {
    if path.is_empty() {
        return String::new();
    }
    let inside = match Path::new(path).strip_prefix(directory) {
        Ok(inside) if !directory.is_empty() => inside,
        _ if directory.is_empty() => return path.to_owned(),
        _ => Path::new(path.trim_start_matches('/')),
    };
    Path::new(directory).join(inside).display().to_string()
}

/// What the user wrote, for annotations and status.
fn user_image_name(image: &crate::cri::api::ImageSpec) -> String {
    if image.user_specified_image.is_empty() {
        image.image.clone()
    } else {
        image.user_specified_image.clone()
    }
}

/// The pinned namespaces that the container joins.
fn host_namespaces(pod: &PodView, options: &NamespaceOption) -> Result<HostNamespaces> {
    let field = "config.linux.security_context.namespace_options";
    let pinned = |key: &str| pod.pod.info.get(key).map(PathBuf::from);
    let pid = match options.pid() {
        NamespaceMode::Container => PidNamespace::Private,
        NamespaceMode::Node => PidNamespace::Host,
        NamespaceMode::Pod => match pinned(info::PID_NAMESPACE) {
            Some(path) => PidNamespace::Join(path),
            None if matches!(
                pod.pod.spec.runtime,
                catamaran_sandbox::pod_spec::RuntimeSpec::Vm(_)
            ) =>
            {
                PidNamespace::Private
            }
            None => {
                return Err(Error::invalid(
                    format!("{field}.pid"),
                    "is POD, but the pod sandbox was made without a PID namespace of its own",
                ));
            }
        },
        NamespaceMode::Target => {
            let target = pod.containers.iter().find(|(id, container)| {
                id.as_str() == options.target_id && container.state == ContainerState::Running
            });
            match target {
                Some((_, container)) if container.pid != 0 => {
                    PidNamespace::Join(format!("/proc/{}/ns/pid", container.pid).into())
                }
                Some(_) => PidNamespace::Private,
                None => {
                    return Err(Error::invalid(
                        format!("{field}.target_id"),
                        format!("{:?} is no running container of the pod", options.target_id),
                    ));
                }
            }
        }
    };
    let user = match (&pod.pod.spec.namespaces.user, pinned(info::USER_NAMESPACE)) {
        (Some(user), Some(path)) => Some(UserNamespace {
            path,
            uids: mappings(&user.uids)?,
            gids: mappings(&user.gids)?,
        }),
        (Some(_), None) => {
            return Err(Error::Internal(format!(
                "pod sandbox {} was asked for with a user namespace, and its shim has none",
                pod.pod.id
            )));
        }
        (None, _) => None,
    };
    Ok(HostNamespaces {
        network: pod.pod.netns().cloned(),
        ipc: pinned(info::IPC_NAMESPACE),
        uts: pinned(info::UTS_NAMESPACE),
        pid,
        user,
    })
}

fn mappings(list: &[catamaran_sandbox::pod_spec::IdMapping]) -> Result<Vec<LinuxIdMapping>> {
    let convert = |m: &catamaran_sandbox::pod_spec::IdMapping| {
        LinuxIdMappingBuilder::default()
            .container_id(m.container_id)
            .host_id(m.host_id)
            .size(m.length)
            .build()
            .map_err(|e| Error::Internal(e.to_string()))
    };
    list.iter().map(convert).collect()
}

/// Makes the container; `announced` is the durable record of the intent. Undoes everything when a step fails
/// or `cancel` comes.
pub(super) async fn run(
    node: Arc<Node>,
    pod: Arc<PodRecord>,
    shim: Shim,
    mut plan: Plan,
    announced: Written,
    cancel: CancellationToken,
) -> Result<LinuxContainerResources, Failed> {
    let (mut undo, steps) = (Undo::default(), Steps::default());
    let result = tokio::select! {
        result = begin(&node, &pod, &shim, &mut plan, announced, (&mut undo, &steps)) => result,
        () = cancel.cancelled() => {
            Err(Error::Aborted(format!("the pod of container {} was stopped while it was created", plan.record.id)))
        }
    };
    match result {
        Ok(()) => Ok(plan.record.resources),
        Err(error) => {
            tracing::info!(container = %plan.record.id, error = %chain(&error), "undoing a container");
            let mut left = steps.settle().await;
            if left.is_empty() {
                left = undo.run().await;
            }
            let pair = || crate::nri::created_pair(&pod, &plan.record, &plan.spec);
            node.nri.undo_container(plan.record.id.as_str(), pair).await;
            Err(Failed { error, left })
        }
    }
}

/// Lets NRI plugins adjust the container before anything of it is there.
async fn ask_plugins(node: &Node, pod: &PodRecord, plan: &mut Plan) -> Result<()> {
    let id = plan.record.id.to_string();
    let pair = || crate::nri::created_pair(pod, &plan.record, &plan.spec);
    let Some((adjust, wanted)) = node.nri.create_container(&id, pair).await? else {
        return Ok(());
    };
    let devices: Vec<String> = adjust.cdi_devices.iter().map(|d| d.name.clone()).collect();
    let guest;
    let kernel = match plan.side {
        Side::Host => &node.host,
        Side::Guest => {
            guest = HostFeatures::guest(&node.host.hostname);
            &guest
        }
    };
    let limits = &mut plan.record.resources;
    crate::nri::apply(&mut plan.spec, limits, adjust, plan.side, kernel)?;
    inject_cdi_devices(&mut plan.spec, &devices, &node.config.cdi_spec_dirs)?;
    super::update_container::change_others(node, wanted).await
}

/// What the CRI or a plugin asked for is on record, what can be set on this node is in the spec.
fn warn_of_oom_score(record: &ContainerRecord, spec: &Spec) {
    let wanted = record.resources.oom_score_adj;
    if let Some(set) = spec
        .process()
        .as_ref()
        .and_then(|process| process.oom_score_adj())
        && i64::from(set) > wanted
    {
        tracing::warn!(
            container = %record.id,
            wanted,
            set,
            "oom_score_adj cannot be lowered that far without CAP_SYS_RESOURCE"
        );
    }
}

async fn begin(
    node: &Arc<Node>,
    sandbox: &PodRecord,
    shim: &Shim,
    plan: &mut Plan,
    announced: Written,
    (undo, steps): (&mut Undo, &Steps),
) -> Result<()> {
    announced.durable().await?;
    ask_plugins(node, sandbox, plan).await?;
    update_container::warn_of_limits_above_vm(sandbox, &plan.record);
    warn_of_oom_score(&plan.record, &plan.spec);
    let text = |error: Error| chain(&error);
    let (pod, id) = (plan.record.pod.clone(), plan.record.id.clone());
    let (n, i) = (node.clone(), id.clone());
    undo.push("snapshot", move || async move {
        n.images.release(i.as_str()).await.map_err(|e| chain(&e))
    });
    let (n, i, config) = (node.clone(), id.clone(), plan.record.config.clone());
    undo.push("image volumes", move || async move {
        image_volumes::release(&n, &i, &config).await.map_err(text)
    });
    let (n, p, i) = (node.clone(), pod.clone(), id.clone());
    undo.push("bundle", move || async move {
        teardown::remove_container_bundle(&n, &p, &i).await.map_err(text)
    });
    let bundle = node.dirs.container(&pod, &id);
    std::fs::create_dir_all(bundle.join("rootfs")).map_err(Error::io("create", &bundle))?;
    let config = serde_json::to_vec(&plan.spec).map_err(|e| Error::Internal(e.to_string()))?;
    std::fs::write(bundle.join("config.json"), config)
        .map_err(Error::io("write", bundle.join("config.json")))?;
    if let Some(parent) = Path::new(&plan.record.log_path)
        .parent()
        .filter(|_| !plan.record.log_path.is_empty())
    {
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    }
    image_volumes::mount_all(node, &id, &plan.image_volumes, steps).await?;
    let (n, i, image, read_only) = (
        node.clone(),
        id.clone(),
        plan.record.image_id.clone(),
        plan.read_only,
    );
    let snapshot = steps
        .run(async move { Ok(n.images.prepare(&image, i.as_str(), read_only).await?) })
        .await?;
    let image = (&id, plan.record.image_id.as_str());
    declared_volumes::make(node, image, &bundle, &plan.declared_volumes, steps).await?;
    let (n, p, s, i) = (node.clone(), pod.clone(), shim.clone(), id.clone());
    undo.push_holding(
        "task",
        teardown::CREATION_LIMIT + teardown::STOP_GRACE * 2,
        move || async move { teardown::end_task(&n, &p, &s, i.as_str()).await.map_err(text) },
    );
    let config = &plan.record.config;
    let rootfs = snapshot.mounts.into_iter().map(|mount| Mount {
        fs_type: mount.fs_type,
        source: mount.source,
        options: mount.options,
    });
    shim.create(&CreateTask {
        id: id.as_str(),
        bundle: &bundle,
        rootfs: rootfs.collect(),
        terminal: config.tty,
        stdin: match (config.stdin, config.stdin_once) {
            (false, _) => String::new(),
            (true, false) => STDIN_KEEP.to_owned(),
            (true, true) => STDIN_ONCE.to_owned(),
        },
        stdout: match plan.record.log_path.as_str() {
            "" => DISCARD_OUTPUT.to_owned(),
            path => format!("{CRI_LOG_SCHEME}{path}"),
        },
    })
    .await?;
    let pair = || crate::nri::created_pair(sandbox, &plan.record, &plan.spec);
    node.nri.container_created(pair).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_path_is_below_the_pods_directory() {
        assert_eq!(log_path("/var/log/pods/x", "c/0.log"), "/var/log/pods/x/c/0.log");
        assert_eq!(log_path("/var/log/pods/x", ""), "");
        assert_eq!(log_path("", "/a/b.log"), "/a/b.log");
        assert_eq!(
            log_path("/var/log/pods/x", "//etc/cron.d/y"),
            "/var/log/pods/x/etc/cron.d/y"
        );
        assert_eq!(
            log_path("/var/log/pods/x/", "/var/log/pods/x/c/0.log"),
            "/var/log/pods/x/c/0.log"
        );
    }
}
