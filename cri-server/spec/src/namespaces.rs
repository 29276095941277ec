//! Namespaces of a container and its cgroup's path.

use std::path::{Path, PathBuf};

use catamaran_cri_api::v1::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace as CriUserNamespace};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespace, LinuxNamespaceType};

use crate::error::{Result, SpecError};
use crate::host::{CgroupVersion, HostFeatures};
use crate::input::{ContainerInput, PidNamespace, Target, UserNamespace};

const FIELD: &str = "linux.security_context.namespace_options";

/// Namespaces, with the mappings of the user namespace if there is one.
pub(crate) struct Namespaces {
    pub(crate) list: Vec<LinuxNamespace>,
    pub(crate) uids: Option<Vec<LinuxIdMapping>>,
    pub(crate) gids: Option<Vec<LinuxIdMapping>>,
}

pub(crate) fn namespaces(input: &ContainerInput<'_>, kernel: &HostFeatures) -> Result<Namespaces> {
    let security = input
        .container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let options = security
        .and_then(|security| security.namespace_options.clone())
        .unwrap_or_default();
    let privileged = security.is_some_and(|security| security.privileged);

    let mut all = Namespaces {
        list: vec![entry(LinuxNamespaceType::Mount, None)],
        uids: None,
        gids: None,
    };
    // Hides the pod's place in the hierarchy. On v1 and for privileged containers there is none, as tools that
    // manage cgroups from a container expect.
    if kernel.cgroup == CgroupVersion::V2 && !privileged {
        all.list.push(entry(LinuxNamespaceType::Cgroup, None));
    }
    match input.target {
        Target::Host(host) => {
            for (kind, path) in [
                (LinuxNamespaceType::Network, &host.network),
                (LinuxNamespaceType::Ipc, &host.ipc),
                (LinuxNamespaceType::Uts, &host.uts),
            ] {
                all.list
                    .extend(path.as_ref().map(|path| entry(kind, Some(path.clone()))));
            }
            match &host.pid {
                PidNamespace::Private => all.list.push(entry(LinuxNamespaceType::Pid, None)),
                PidNamespace::Join(path) => all.list.push(entry(LinuxNamespaceType::Pid, Some(path.clone()))),
                PidNamespace::Host => {}
            }
            let asked = options
                .userns_options
                .as_ref()
                .is_some_and(|user| user.mode() == NamespaceMode::Pod);
            match &host.user {
                Some(user) => {
                    if !input.runtime.user_namespaces {
                        let reason =
                            "the handler's runtime has no id-mapped mounts, which user namespaces need";
                        return Err(SpecError::precondition(format!("{FIELD}.userns_options"), reason));
                    }
                    if let Some(own) = &options.userns_options
                        && !same(own, user)
                    {
                        let reason =
                            "differs from the pod's; all containers of a pod are in its user namespace";
                        return Err(SpecError::invalid(format!("{FIELD}.userns_options"), reason));
                    }
                    all.list
                        .push(entry(LinuxNamespaceType::User, Some(user.path.clone())));
                    all.uids = Some(user.uids.clone());
                    all.gids = Some(user.gids.clone());
                }
                None if asked => {
                    let reason = "the pod has no user namespace that its container could be in";
                    return Err(SpecError::invalid(format!("{FIELD}.userns_options"), reason));
                }
                None => {}
            }
        }
        Target::Guest => {
            refuse_in_guest(&options, FIELD)?;
            match options.pid() {
                NamespaceMode::Container => all.list.push(entry(LinuxNamespaceType::Pid, None)),
                // The pod's is the guest's own.
                NamespaceMode::Pod => {}
                NamespaceMode::Target => {
                    let reason = "joining another container's PID namespace is not built for VM pods";
                    return Err(SpecError::unimplemented(format!("{FIELD}.pid"), reason));
                }
                NamespaceMode::Node => {}
            }
        }
    }
    Ok(all)
}

/// Whether a container asks for what its pod has.
fn same(own: &CriUserNamespace, pod: &UserNamespace) -> bool {
    let alike = |own: &[IdMapping], pod: &[LinuxIdMapping]| {
        let ids = |m: &IdMapping| (m.container_id, m.host_id, m.length);
        let oci = |m: &LinuxIdMapping| (m.container_id(), m.host_id(), m.size());
        own.iter().map(ids).eq(pod.iter().map(oci))
    };
    own.mode() == NamespaceMode::Pod && alike(&own.uids, &pod.uids) && alike(&own.gids, &pod.gids)
}

/// What a pod with its own kernel cannot have.
pub(crate) fn refuse_in_guest(options: &NamespaceOption, field: &str) -> Result<()> {
    for (mode, name, kubernetes) in [
        (options.network(), "network", "hostNetwork"),
        (options.pid(), "pid", "hostPID"),
        (options.ipc(), "ipc", "hostIPC"),
    ] {
        if mode == NamespaceMode::Node {
            let reason = format!(
                "NODE ({kubernetes}) cannot be given to a pod in a virtual machine: it has a kernel of its own; \
                 run it under a handler with Linux namespaces"
            );
            return Err(SpecError::invalid(format!("{field}.{name}"), reason));
        }
    }
    if options
        .userns_options
        .as_ref()
        .is_some_and(|user| user.mode() == NamespaceMode::Pod)
    {
        let reason = "user namespaces are not built for VM pods, whose root is not the node's anyway";
        return Err(SpecError::unimplemented(
            format!("{field}.userns_options"),
            reason,
        ));
    }
    Ok(())
}

fn entry(kind: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace.set_path(path);
    namespace
}

/// `cgroupsPath`: a path below the hierarchies, or with systemd `slice:prefix:name` as its OCI runtimes read it.
pub(crate) fn cgroups_path(input: &ContainerInput<'_>) -> Result<PathBuf> {
    let id = input.container_id;
    if let Target::Guest = input.target {
        return Ok(Path::new("/").join(id));
    }
    let parent = Path::new(input.cgroup_parent);
    if !input.systemd_cgroup {
        return Ok(Path::new("/").join(parent).join(id));
    }
    match parent.file_name().and_then(|name| name.to_str()) {
        Some(slice) if slice.ends_with(".slice") => Ok(format!("{slice}:catamaran:{id}").into()),
        _ => Err(SpecError::invalid(
            "linux.cgroup_parent",
            format!("{parent:?} is not a systemd slice; kubelet and runtime must use the same cgroup driver"),
        )),
    }
}
