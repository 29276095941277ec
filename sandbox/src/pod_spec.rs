//! What the daemon tells a shim about its pod: the options of the Sandbox service's CreateSandbox, in JSON.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::id::Id;

/// Version of [`PodSpec`]; a shim refuses another major shape.
pub const POD_SPEC_VERSION: u32 = 1;

/// A pod sandbox, as much of it as a shim must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// [`POD_SPEC_VERSION`].
    pub version: u32,
    /// Sandbox id; also the shim's `-id`.
    pub id: Id,
    /// Kubernetes namespace, name and uid of the pod, for logs and annotations.
    pub namespace: String,
    /// See [`Self::namespace`].
    pub name: String,
    /// See [`Self::namespace`].
    pub uid: String,
    /// Hostname; empty where the pod is in the host's UTS namespace.
    pub hostname: String,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The pod's namespaces.
    pub namespaces: PodNamespaces,
    /// Sysctls by name, with dots (`net.ipv4.ip_forward`).
    pub sysctls: BTreeMap<String, String>,
    /// cgroup that is the parent of the sandbox's and of every container's cgroup, as CRI `cgroup_parent`.
    pub cgroup_parent: String,
    /// systemd manages cgroups (`cgroup_parent` is a slice name).
    pub systemd_cgroup: bool,
    /// Bytes of the pod's `/dev/shm`.
    pub shm_bytes: u64,
    /// The pod asked for privileged containers.
    pub privileged: bool,
    /// Which runtime, with what the node's configuration says of it.
    pub runtime: RuntimeSpec,
}

/// CRI NamespaceOption, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNamespaces {
    /// Path of the pinned network namespace; `None`: the host's. With a user namespace the shim makes and pins
    /// it there, as the user namespace has to own it; otherwise it exists.
    pub network: Option<PathBuf>,
    /// The host's IPC namespace.
    pub host_ipc: bool,
    /// PID namespaces.
    pub pid: PidNamespace,
    /// User namespace, if the pod has one.
    pub user: Option<UserNamespace>,
}

/// Whose PID namespace the pod's containers are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PidNamespace {
    /// Each container has its own.
    Container,
    /// One for the pod, pinned by the shim.
    Pod,
    /// The host's.
    Host,
}

/// Mappings of the pod's user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// uid mappings.
    pub uids: Vec<IdMapping>,
    /// gid mappings.
    pub gids: Vec<IdMapping>,
}

impl UserNamespace {
    /// The host's uid and gid of the namespace's root; 0 where a mapping has no root.
    #[must_use]
    pub fn root(&self) -> (u32, u32) {
        let of = |ranges: &[IdMapping]| {
            let range = ranges.iter().find(|range| range.container_id == 0);
            range.map_or(0, |range| range.host_id)
        };
        (of(&self.uids), of(&self.gids))
    }
}

/// One range of ids, see user_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id inside.
    pub container_id: u32,
    /// First id on the host.
    pub host_id: u32,
    /// How many.
    pub length: u32,
}

/// The runtime behind a handler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RuntimeSpec {
    /// An OCI runtime's command line (runc, crun, youki, runsc).
    Oci {
        /// Absolute path of the executable.
        binary: PathBuf,
        /// Arguments before the subcommand.
        args: Vec<String>,
        /// The runtime's `--root`.
        root: PathBuf,
    },
    /// A virtual machine.
    Vm(VmSpec),
}

/// A pod's virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Absolute path of the VMM's executable.
    pub vmm: PathBuf,
    /// Absolute path of virtiofsd.
    pub virtiofsd: PathBuf,
    /// Uncompressed guest kernel with a PVH entry note.
    pub kernel: PathBuf,
    /// initramfs with the agent as `/init`.
    pub initramfs: PathBuf,
    /// Further words for the kernel's command line.
    pub kernel_args: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// KVM or TCG, from the probe that the daemon did.
    pub acceleration: Acceleration,
    /// Milliseconds from the VMM's start to the agent's answer, after which the boot has failed.
    pub boot_timeout_ms: u64,
}

/// How guest instructions run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// Hardware virtualization.
    Kvm,
    /// Emulation: runs anywhere, slowly, and is not promised to isolate as strongly.
    Tcg,
}

/// Keys of the `info` map in the Sandbox service's SandboxStatus.
pub mod info {
    /// Kernel release that the pod's containers see.
    pub const KERNEL: &str = "kernel";
    /// `kvm` or `tcg`.
    pub const ACCELERATION: &str = "acceleration";
    /// Process id of the VMM.
    pub const VMM_PID: &str = "vmmPid";
    /// Milliseconds from the VMM's start to the agent's answer.
    pub const BOOT_MS: &str = "bootMs";
    /// Why the sandbox ended without being asked to.
    pub const ENDED: &str = "ended";
    /// Path of the pinned IPC namespace.
    pub const IPC_NAMESPACE: &str = "ipcNamespace";
    /// Path of the pinned UTS namespace.
    pub const UTS_NAMESPACE: &str = "utsNamespace";
    /// Path of the pinned PID namespace, where the pod shares one.
    pub const PID_NAMESPACE: &str = "pidNamespace";
    /// Path of the pinned user namespace.
    pub const USER_NAMESPACE: &str = "userNamespace";
    /// Directory whose `/dev/shm` tmpfs the pod's containers share.
    pub const SHM: &str = "shm";
}
