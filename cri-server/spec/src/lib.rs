//! OCI runtime specs from CRI requests: everything that a ContainerConfig, its PodSandboxConfig and the image's
//! configuration say, as one pure function ([`container_spec`]); what cannot be honoured is a [`SpecError`]
//! with the field's name. Where the CRI is silent this does as containerd's CRI plugin does.
//!
//! Architecture invariant: only [`HostFeatures::detect`], [`HostInputs::gather`] and [`CdiRegistry`] touch the host.

mod capabilities;
mod cdi;
mod devices;
mod error;
mod gather;
mod host;
mod identity;
mod input;
mod lsm;
mod mounts;
mod namespaces;
mod pod;
mod process;
mod resources;
mod seccomp;
mod seccomp_default;
mod seccomp_docker;
mod stop_signal;

use std::collections::HashMap;

use catamaran_cri_api::v1::LinuxContainerSecurityContext;
use oci_spec::runtime::{Linux, LinuxResources, Root, Spec};

pub use cdi::{CdiRegistry, inject_cdi_devices};
pub use error::{Result, SpecError, SpecErrorKind};
pub use gather::{HostInputs, MountSource, SourcePropagation};
pub use host::{
    APPARMOR_DEFAULT_PROFILE, Apparmor, CgroupVersion, HostFeatures, RuntimeFeatures, SelinuxDefaults,
};
pub use identity::{Identity, resolve_identity};
pub use input::{
    ContainerInput, GUEST_SHM, HostNamespaces, ImageUsers, PidNamespace, PodFiles, Side, Target,
    UserNamespace,
};
pub use pod::validate_pod;
pub use process::exec_process;
pub use resources::apply_resources;
pub use stop_signal::{StopSignal, stop_signal};

/// Version of the OCI runtime spec that ours follow; 1.0 runtimes ignore what they do not know of it.
const OCI_VERSION: &str = "1.1.0";

/// The spec of a container.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn container_spec(input: &ContainerInput<'_>) -> Result<Spec> {
    let container = input.container;
    if container.windows.is_some() {
        return Err(SpecError::invalid("windows", "this is a Linux node"));
    }
    // A guest's kernel is not the node's: what the node lacks does not matter there, and the reverse.
    let guest;
    let kernel = match input.target {
        Target::Host(_) => input.host,
        Target::Guest => {
            guest = HostFeatures::guest(&input.host.hostname);
            &guest
        }
    };
    let security = container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let privileged = security.is_some_and(|security| security.privileged);
    let pod_security = input
        .pod
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    if privileged && !pod_security.is_some_and(|security| security.privileged) {
        let reason = "the container is privileged and its pod sandbox is not";
        return Err(SpecError::invalid("linux.security_context.privileged", reason));
    }

    let process = process::container_process(input, kernel)?;
    let namespaces = namespaces::namespaces(input, kernel)?;
    let mounts = mounts::mounts(input, &namespaces.list)?;
    let (devices, rules) = devices::devices(input)?;
    let mut resources = LinuxResources::default();
    if let Some(wanted) = container
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref())
    {
        resources = resources::apply("linux.resources", &resources, wanted, kernel)?;
    }
    resources.set_devices(Some(rules));
    let (masked, read_only) = hidden_paths(security)?;

    let mut linux = Linux::default();
    linux
        .set_uid_mappings(namespaces.uids)
        .set_gid_mappings(namespaces.gids)
        .set_resources(Some(resources))
        .set_cgroups_path(Some(namespaces::cgroups_path(input)?))
        .set_seccomp(seccomp::seccomp(input, kernel, process.capabilities().as_ref())?)
        .set_namespaces(Some(namespaces.list))
        .set_devices(Some(devices))
        .set_rootfs_propagation(mounts.rootfs_propagation.map(str::to_owned))
        .set_masked_paths(Some(masked))
        .set_readonly_paths(Some(read_only))
        .set_mount_label(lsm::selinux_labels(input, kernel)?.map(|labels| labels.mount));
    let mut root = Root::default();
    root.set_path(input.rootfs.to_owned())
        .set_readonly(Some(security.is_some_and(|security| security.readonly_rootfs)));

    let mut spec = Spec::default();
    spec.set_version(OCI_VERSION.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts.list))
        .set_process(Some(process))
        // The pod's UTS namespace has its name already.
        .set_hostname(None)
        .set_annotations(Some(annotations(input)))
        .set_linux(Some(linux));
    Ok(spec)
}

/// What a container that sends no security context cannot see or write. The kubelet always sends one, with these
/// lists or, for procMount: Unmasked, with empty ones: so an empty list in a security context means none.
const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn hidden_paths(security: Option<&LinuxContainerSecurityContext>) -> Result<(Vec<String>, Vec<String>)> {
    let Some(security) = security else {
        let owned = |paths: &[&str]| paths.iter().map(ToString::to_string).collect();
        return Ok((owned(&MASKED_PATHS), owned(&READ_ONLY_PATHS)));
    };
    for (paths, name) in [
        (&security.masked_paths, "masked_paths"),
        (&security.readonly_paths, "readonly_paths"),
    ] {
        if let Some(bad) = paths
            .iter()
            .find(|path| !path.starts_with('/') || path.contains('\0'))
        {
            let field = format!("linux.security_context.{name}");
            return Err(SpecError::invalid(
                field,
                format!("{bad:?} is not an absolute path"),
            ));
        }
    }
    if security.privileged {
        return Ok((Vec::new(), Vec::new()));
    }
    Ok((security.masked_paths.clone(), security.readonly_paths.clone()))
}

/// containerd's annotations towards OCI runtimes and shims, which runsc and kata read.
fn annotations(input: &ContainerInput<'_>) -> HashMap<String, String> {
    let name = input
        .container
        .metadata
        .as_ref()
        .map_or("", |metadata| metadata.name.as_str());
    let pod = input.pod.metadata.clone().unwrap_or_default();
    let mut all: HashMap<String, String> = input
        .annotations
        .iter()
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if input.runtime.sandbox_container {
        all.insert("io.kubernetes.cri.container-type".into(), "container".into());
    }
    for (key, value) in [
        ("sandbox-id", input.sandbox_id),
        ("container-name", name),
        ("image-name", input.image_name),
        ("sandbox-name", &pod.name),
        ("sandbox-namespace", &pod.namespace),
        ("sandbox-uid", &pod.uid),
    ] {
        all.insert(format!("io.kubernetes.cri.{key}"), value.to_owned());
    }
    all
}
