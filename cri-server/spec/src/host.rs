//! What the node's kernel and the handler's OCI runtime can do, as far as a spec depends on it. [`HostFeatures::detect`]
//! reads /proc and /sys once at start; everything else takes the result as a value.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{Capabilities, Capability};
use serde::Deserialize;

use crate::capabilities::from_mask;

/// Version of the cgroup interface that the resource controllers are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    /// Controllers on v1 hierarchies, also where a v2 hierarchy is mounted beside them.
    V1,
    /// The unified hierarchy.
    V2,
}

/// AppArmor on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Apparmor {
    /// The kernel has none, or it is switched off.
    Absent,
    /// Enabled.
    Enabled {
        /// Name of the loaded profile that RuntimeDefault means; `None`: no such profile is loaded.
        default_profile: Option<String>,
    },
}

/// SELinux contexts that a container gets where its options leave parts out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelinuxDefaults {
    /// Process context, `user:role:type:level`.
    pub process: String,
    /// Context of its files.
    pub file: String,
}

/// A kernel as a spec sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFeatures {
    /// Where resource limits go.
    pub cgroup: CgroupVersion,
    /// The hugetlb controller is there.
    pub hugetlb: bool,
    /// Swap is accounted (memory.memsw.* or memory.swap.*).
    pub swap: bool,
    /// Filters can be installed.
    pub seccomp: bool,
    /// See [`Apparmor`].
    pub apparmor: Apparmor,
    /// `None`: SELinux is absent or disabled.
    pub selinux: Option<SelinuxDefaults>,
    /// The daemon's bounding set: the most that a container can be given.
    pub capabilities: Capabilities,
    /// Lowest `oom_score_adj` that can be set; `None` where any can (CAP_SYS_RESOURCE is there).
    pub min_oom_score_adj: Option<i32>,
    /// Hostname of the node, the `HOSTNAME` of pods in its UTS namespace.
    pub hostname: String,
}

/// Name of the AppArmor profile that RuntimeDefault means, where the node's operator has loaded it.
pub const APPARMOR_DEFAULT_PROFILE: &str = "catamaran-default";

impl HostFeatures {
    /// Reads this node's features. What cannot be read counts as absent: a container that asks for it is then
    /// refused by name instead of failing in its runtime.
    pub fn detect() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let cgroup = cgroup_version(&mounts);
        let effective = status_mask(&status, "CapEff:").unwrap_or(0);
        let can_lower_oom = from_mask(effective).contains(&Capability::SysResource);
        HostFeatures {
            cgroup,
            hugetlb: match cgroup {
                CgroupVersion::V1 => v1_mount(&mounts, "hugetlb").is_some(),
                CgroupVersion::V2 => fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
                    .is_ok_and(|controllers| controllers.split_whitespace().any(|c| c == "hugetlb")),
            },
            swap: match cgroup {
                CgroupVersion::V1 => v1_mount(&mounts, "memory")
                    .is_some_and(|mount| Path::new(mount).join("memory.memsw.limit_in_bytes").exists()),
                CgroupVersion::V2 => v2_swap(),
            },
            seccomp: status.lines().any(|line| line.starts_with("Seccomp:"))
                && Path::new("/proc/sys/kernel/seccomp/actions_avail").exists(),
            apparmor: detect_apparmor(),
            selinux: detect_selinux(),
            capabilities: from_mask(status_mask(&status, "CapBnd:").unwrap_or(0)),
            min_oom_score_adj: if can_lower_oom {
                None
            } else {
                let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
                Some(own.trim().parse().unwrap_or(0))
            },
            hostname: fs::read_to_string("/proc/sys/kernel/hostname")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        }
    }

    /// The nearest `oom_score_adj` that can be set: a container that is a likelier victim than asked for beats one
    /// that does not start.
    pub fn settable_oom_score_adj(&self, wanted: i32) -> i32 {
        self.min_oom_score_adj.map_or(wanted, |lowest| wanted.max(lowest))
    }

    /// The guest kernel of a VM pod, which the agent sets up: cgroup v2, every capability, no LSM.
    /// `hostname` is the node's, for pods that set none.
    pub fn guest(hostname: &str) -> Self {
        HostFeatures {
            cgroup: CgroupVersion::V2,
            hugetlb: false,
            swap: true,
            seccomp: true,
            apparmor: Apparmor::Absent,
            selinux: None,
            capabilities: from_mask(u64::MAX),
            min_oom_score_adj: None,
            hostname: hostname.to_owned(),
        }
    }
}

/// What a handler's OCI runtime can do beyond the basics; the first two are the CRI's RuntimeHandlerFeatures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RuntimeFeatures {
    /// Mount option `rro`.
    pub recursive_read_only_mounts: bool,
    /// User namespaces with id-mapped mounts.
    pub user_namespaces: bool,
    /// A pod is a container of its own to it, made before the others: so with the shims of kata and gVisor, not
    /// with an OCI runtime below our namespace shim. Containers then say that they are not the pod's
    /// (`io.kubernetes.cri.container-type`); runsc without the pod's container refuses one that says so.
    pub sandbox_container: bool,
}

impl RuntimeFeatures {
    /// From the output of `<runtime> features` (OCI runtime spec, features.md). A runtime without that command
    /// has the default: neither.
    ///
    /// # Errors
    /// The bytes are not such a document.
    pub fn from_features_json(json: &[u8]) -> serde_json::Result<Self> {
        let features: Features = serde_json::from_slice(json)?;
        let user = features
            .linux
            .namespaces
            .iter()
            .any(|namespace| namespace == "user");
        Ok(RuntimeFeatures {
            recursive_read_only_mounts: features.mount_options.iter().any(|option| option == "rro"),
            user_namespaces: user && features.linux.mount_extensions.idmap.enabled.unwrap_or(false),
            sandbox_container: false,
        })
    }
}

// Only what is read: oci-spec's own type refuses documents of newer runtimes (unknown enum values).
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Features {
    mount_options: Vec<String>,
    linux: LinuxFeatures,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct LinuxFeatures {
    namespaces: Vec<String>,
    mount_extensions: MountExtensions,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct MountExtensions {
    idmap: Idmap,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Idmap {
    enabled: Option<bool>,
}

fn status_mask(status: &str, key: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(key))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

fn cgroup_version(mounts: &str) -> CgroupVersion {
    let unified = mounts.lines().any(|line| {
        let mut fields = line.split(' ');
        (fields.nth(1), fields.next()) == (Some("/sys/fs/cgroup"), Some("cgroup2"))
    });
    if unified {
        CgroupVersion::V2
    } else {
        CgroupVersion::V1
    }
}

/// Mount point of the v1 hierarchy that has `controller`.
fn v1_mount<'a>(mounts: &'a str, controller: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let found = fields.get(2) == Some(&"cgroup") && fields.get(3)?.split(',').any(|o| o == controller);
        found.then(|| fields[1])
    })
}

/// The root cgroup has no memory.swap.max, so a child tells.
fn v2_swap() -> bool {
    let Ok(children) = fs::read_dir("/sys/fs/cgroup") else {
        return false;
    };
    children
        .flatten()
        .any(|child| child.path().join("memory.swap.max").exists())
}

fn detect_apparmor() -> Apparmor {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|value| value.trim() == "Y") {
        return Apparmor::Absent;
    }
    // Lines are "name (mode)".
    let loaded = fs::read_to_string("/sys/kernel/security/apparmor/profiles").unwrap_or_default();
    let has_default = loaded
        .lines()
        .any(|line| line.split(" (").next() == Some(APPARMOR_DEFAULT_PROFILE));
    Apparmor::Enabled {
        default_profile: has_default.then(|| APPARMOR_DEFAULT_PROFILE.to_owned()),
    }
}

fn detect_selinux() -> Option<SelinuxDefaults> {
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        return None;
    }
    let config = fs::read_to_string("/etc/selinux/config").unwrap_or_default();
    let policy = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("SELINUXTYPE="))
        .unwrap_or("targeted");
    let contexts = fs::read_to_string(format!("/etc/selinux/{policy}/contexts/lxc_contexts"));
    Some(lxc_contexts(&contexts.unwrap_or_default()))
}

/// The policy's own contexts for containers, lines like `process = "system_u:system_r:container_t:s0"`.
fn lxc_contexts(text: &str) -> SelinuxDefaults {
    let value = |key: &str| {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
        })
    };
    SelinuxDefaults {
        process: value("process").unwrap_or_else(|| "system_u:system_r:container_t:s0".into()),
        file: value("file").unwrap_or_else(|| "system_u:object_r:container_file_t:s0".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";

    #[test]
    fn hybrid_is_v1() {
        assert_eq!(cgroup_version(V1), CgroupVersion::V1);
        assert_eq!(v1_mount(V1, "memory"), Some("/sys/fs/cgroup/memory"));
        assert_eq!(v1_mount(V1, "hugetlb"), None);
        assert_eq!(
            cgroup_version("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            CgroupVersion::V2
        );
    }

    #[test]
    fn features_of_runtimes() {
        let old =
            br#"{"ociVersionMin":"1.0.0","mountOptions":["bind","rro"],"linux":{"namespaces":["user"]}}"#;
        let features = RuntimeFeatures::from_features_json(old).expect("runc 1.1");
        assert!(features.recursive_read_only_mounts);
        assert!(!features.user_namespaces);
        let new = br#"{"mountOptions":["rro"],"linux":{"namespaces":["user","net"],
            "mountExtensions":{"idmap":{"enabled":true}},"netDevices":{"enabled":true}}}"#;
        let features = RuntimeFeatures::from_features_json(new).expect("runc 1.3");
        assert!(features.user_namespaces);
        assert!(RuntimeFeatures::from_features_json(b"runc: unknown command").is_err());
    }

    #[test]
    fn selinux_contexts() {
        let policy = "process = \"system_u:system_r:svirt_lxc_net_t:s0\"\ncontent = \"x\"\n";
        let contexts = lxc_contexts(policy);
        assert_eq!(contexts.process, "system_u:system_r:svirt_lxc_net_t:s0");
        assert_eq!(contexts.file, "system_u:object_r:container_file_t:s0");
    }

    #[test]
    fn this_host() {
        let host = HostFeatures::detect();
        assert!(!host.capabilities.is_empty());
        assert!(!host.hostname.is_empty());
        assert_eq!(HostFeatures::guest("n").capabilities.len(), 41);
    }
}
