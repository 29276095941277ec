//! Everything that [`crate::container_spec`] reads: the CRI messages and what the daemon resolved for them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use catamaran_cri_api::v1::{ContainerConfig, PodSandboxConfig};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::LinuxIdMapping;

use crate::gather::HostInputs;
use crate::host::{HostFeatures, RuntimeFeatures};

/// `/dev/shm` of a pod inside its VM: the agent mounts the tmpfs there and each container binds it. The vm
/// shim must leave this source as it is.
pub const GUEST_SHM: &str = "/run/catamaran/shm";

/// One container to be made.
#[derive(Debug, Clone, Copy)]
pub struct ContainerInput<'a> {
    /// The pod's configuration, as RunPodSandbox had it.
    pub pod: &'a PodSandboxConfig,
    /// The container's configuration, from CreateContainer.
    pub container: &'a ContainerConfig,
    /// Configuration of the image that the container runs.
    pub image: &'a ImageConfiguration,
    /// Id of the container.
    pub container_id: &'a str,
    /// Id of the pod sandbox.
    pub sandbox_id: &'a str,
    /// Where the container runs.
    pub target: Target<'a>,
    /// This node. A [`Target::Guest`] container has its own kernel: then only the hostname is read from it.
    pub host: &'a HostFeatures,
    /// What the handler's OCI runtime can do.
    pub runtime: RuntimeFeatures,
    /// The pod's files that are bound into each of its containers.
    pub files: &'a PodFiles,
    /// `/etc/passwd` and `/etc/group` of the image.
    pub users: &'a ImageUsers,
    /// What [`HostInputs::gather`] found on the host for this container.
    pub inputs: &'a HostInputs,
    /// `root.path`: `rootfs` (relative to the bundle) or absolute.
    pub rootfs: &'a Path,
    /// Image as the user named it, for the annotation `io.kubernetes.cri.image-name`.
    pub image_name: &'a str,
    /// systemd manages cgroups: `cgroup_parent` is a slice.
    pub systemd_cgroup: bool,
    /// Parent cgroup of the container, resolved (never empty); not read for a guest.
    pub cgroup_parent: &'a str,
    /// Annotations that go to the OCI runtime beside `io.kubernetes.cri.*`, which win.
    pub annotations: &'a BTreeMap<String, String>,
}

/// Where a container runs.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// On this kernel, in the pod's pinned namespaces.
    Host(&'a HostNamespaces),
    /// In the pod's VM, whose network, IPC and UTS namespaces are the pod's.
    Guest,
}

impl Target<'_> {
    /// Which side it is, without its namespaces.
    pub fn side(self) -> Side {
        match self {
            Target::Host(_) => Side::Host,
            Target::Guest => Side::Guest,
        }
    }
}

/// Which kernel runs a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The node's.
    Host,
    /// The pod's own.
    Guest,
}

/// Namespaces that a container of a namespace pod joins. `None`: the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostNamespaces {
    /// Pinned network namespace.
    pub network: Option<PathBuf>,
    /// Pinned IPC namespace.
    pub ipc: Option<PathBuf>,
    /// Pinned UTS namespace.
    pub uts: Option<PathBuf>,
    /// PID namespace.
    pub pid: PidNamespace,
    /// Pinned user namespace with its mappings.
    pub user: Option<UserNamespace>,
}

/// PID namespace of a container of a namespace pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    Private,
    /// The pod's, or that of the container which CRI `target_id` names.
    Join(PathBuf),
    /// The host's.
    Host,
}

/// A pinned user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNamespace {
    /// Path of the pinned namespace.
    pub path: PathBuf,
    /// uid mappings.
    pub uids: Vec<LinuxIdMapping>,
    /// gid mappings.
    pub gids: Vec<LinuxIdMapping>,
}

/// Host paths of the pod's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFiles {
    /// Bound to `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
    /// Bound to `/etc/hosts`.
    pub hosts: PathBuf,
    /// Bound to `/etc/hostname`.
    pub hostname: PathBuf,
    /// The pod's tmpfs, bound to `/dev/shm` (`/dev/shm` of the host where the pod is in its IPC namespace).
    /// A guest has its own, [`GUEST_SHM`].
    pub shm: PathBuf,
}

/// User databases of an image; `None` where the image has no such file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageUsers {
    /// Bytes of `/etc/passwd`.
    pub passwd: Option<Vec<u8>>,
    /// Bytes of `/etc/group`.
    pub group: Option<Vec<u8>>,
}
