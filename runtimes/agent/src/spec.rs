//! Makes a container's OCI spec fit the guest: what the pod has as a whole is taken out, what libcontainer
//! takes differently is corrected, what makes no sense in a guest is refused.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxNamespaceBuilder, LinuxNamespaceType, Process, Spec};

use crate::cgroup;
use crate::error::{Context, Error, Result};

/// A container's spec, ready for libcontainer, and what the agent needs of it.
pub(crate) struct Prepared {
    pub(crate) spec: Spec,
    pub(crate) terminal: bool,
    pub(crate) owner: Owner,
    /// Sysctls of the pod's namespaces.
    pub(crate) sysctls: HashMap<String, String>,
    pub(crate) devices: Vec<LinuxDeviceCgroup>,
}

/// To whom a process's streams belong, and the size of its terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Rows and columns.
    pub(crate) console_size: Option<(u16, u16)>,
}

impl Owner {
    pub(crate) fn of(process: &Process) -> Self {
        let clip = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        Self {
            uid: process.user().uid(),
            gid: process.user().gid(),
            console_size: process
                .console_size()
                .map(|size| (clip(size.height()), clip(size.width()))),
        }
    }
}

/// Checks and changes a spec. `shared_pid` is the init of the pod's shared PID namespace.
pub(crate) fn prepare(json: &[u8], container_id: &str, shared_pid: Option<i32>) -> Result<Prepared> {
    let mut spec: Spec =
        serde_json::from_slice(json).map_err(|error| Error::Invalid(format!("spec: {error}")))?;
    if spec
        .hooks()
        .as_ref()
        .is_some_and(|hooks| serde_json::to_value(hooks).is_ok_and(|hooks| !is_empty(&hooks)))
    {
        return Err(Error::Invalid(
            "spec.hooks: hooks are programs of the host and cannot run in a guest".into(),
        ));
    }
    let mut linux = spec
        .linux()
        .clone()
        .ok_or_else(|| Error::Invalid("spec.linux is missing".into()))?;
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| Error::Invalid("spec.process is missing".into()))?;
    if spec.root().is_none() {
        return Err(Error::Invalid("spec.root is missing".into()));
    }
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &namespaces {
        if namespace.path().is_some() {
            return Err(Error::Invalid(format!(
                "spec.linux.namespaces: {} has a path, which is the host's and not the guest's",
                namespace.typ()
            )));
        }
    }
    if !namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Mount)
    {
        return Err(Error::Invalid(
            "spec.linux.namespaces: a container needs its own mount namespace".into(),
        ));
    }
    match shared_pid {
        Some(init) => {
            namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
            let shared = LinuxNamespaceBuilder::default()
                .typ(LinuxNamespaceType::Pid)
                .path(format!("/proc/{init}/ns/pid"))
                .build()
                .context(|| "cannot name the pod's PID namespace".into())?;
            namespaces.push(shared);
        }
        None if !namespaces
            .iter()
            .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid) =>
        {
            return Err(Error::Invalid(
                "spec.linux.namespaces: a container needs a PID namespace where the pod shares none".into(),
            ));
        }
        None => {}
    }
    // The pod's hostname is the guest's, set for all.
    if !namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Uts)
    {
        spec.set_hostname(None).set_domainname(None);
    }
    linux.set_namespaces(Some(namespaces));
    // libcontainer refuses sysctls of namespaces that the container does not own; here they are the pod's.
    let sysctls = linux.sysctl().clone().unwrap_or_default();
    linux.set_sysctl(None);
    linux.set_cgroups_path(Some(cgroup::container_path(container_id).into()));
    // libcontainer knows only the names of the recursive kinds without their letter, and makes every one recursive.
    let propagation = linux
        .rootfs_propagation()
        .as_deref()
        .and_then(|name| name.strip_prefix('r'));
    if let Some(kind) = propagation.map(str::to_owned) {
        linux.set_rootfs_propagation(Some(kind));
    }
    // libcontainer takes "false" for a reason to load the filter after dropping the privilege to do so.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    let devices = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().clone())
        .unwrap_or_default();
    let prepared = Prepared {
        terminal: process.terminal().unwrap_or(false),
        owner: Owner::of(&process),
        sysctls,
        devices,
        spec: Spec::default(),
    };
    spec.set_linux(Some(linux)).set_process(Some(process));
    Ok(Prepared { spec, ..prepared })
}

/// No hook of any kind.
fn is_empty(hooks: &serde_json::Value) -> bool {
    hooks.as_object().is_none_or(|kinds| {
        kinds
            .values()
            .all(|kind| kind.is_null() || kind.as_array().is_some_and(Vec::is_empty))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
        let mut spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 7, "gid": 8}, "noNewPrivileges": false},
            "root": {"path": "/x"},
            "hostname": "pod",
            "linux": {
                "namespaces": [{"type": "mount"}, {"type": "pid"}],
                "sysctl": {"net.ipv4.ip_forward": "1"},
                "cgroupsPath": "/elsewhere"
            }
        });
        change(&mut spec);
        serde_json::to_vec(&spec).unwrap()
    }

    #[test]
    fn pod_wide_parts_leave_the_spec() {
        let prepared = prepare(&json(|_| ()), "c1", None).unwrap();
        let linux = prepared.spec.linux().clone().unwrap();
        assert_eq!(linux.cgroups_path().clone().unwrap().to_str(), Some("/pod/c1"));
        assert!(linux.sysctl().is_none());
        assert_eq!(prepared.sysctls["net.ipv4.ip_forward"], "1");
        assert!(prepared.spec.hostname().is_none());
        assert_eq!(prepared.spec.process().clone().unwrap().no_new_privileges(), None);
        assert_eq!(
            (prepared.owner.uid, prepared.owner.gid, prepared.terminal),
            (7, 8, false)
        );
    }

    #[test]
    fn propagation_has_the_names_that_libcontainer_knows() {
        for (given, taken) in [("rslave", "slave"), ("rshared", "shared"), ("private", "private")] {
            let prepared = prepare(
                &json(|spec| spec["linux"]["rootfsPropagation"] = given.into()),
                "c1",
                None,
            );
            let linux = prepared.unwrap().spec.linux().clone().unwrap();
            assert_eq!(linux.rootfs_propagation().as_deref(), Some(taken));
        }
    }

    #[test]
    fn a_shared_pid_namespace_replaces_the_own_one() {
        let prepared = prepare(&json(|_| ()), "c1", Some(42)).unwrap();
        let namespaces = prepared
            .spec
            .linux()
            .clone()
            .unwrap()
            .namespaces()
            .clone()
            .unwrap();
        let pid: Vec<_> = namespaces
            .iter()
            .filter(|ns| ns.typ() == LinuxNamespaceType::Pid)
            .collect();
        assert_eq!(pid.len(), 1);
        assert_eq!(pid[0].path().clone().unwrap().to_str(), Some("/proc/42/ns/pid"));
    }

    #[test]
    fn what_a_guest_cannot_do_is_refused_by_name() {
        let refused = |change: fn(&mut serde_json::Value), word: &str| {
            let error = prepare(&json(change), "c1", None)
                .err()
                .expect("refused")
                .to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(
            |s| s["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}]),
            "PID namespace",
        );
        refused(|s| s["linux"]["namespaces"][1]["path"] = "/run/x".into(), "path");
        refused(
            |s| s["linux"]["namespaces"] = serde_json::json!([{"type": "pid"}]),
            "mount namespace",
        );
        refused(
            |s| s["hooks"] = serde_json::json!({"prestart": [{"path": "/bin/true"}]}),
            "hooks",
        );
        refused(|s| s["linux"] = serde_json::Value::Null, "linux");
        refused(|s| s["process"] = serde_json::Value::Null, "process");
        assert!(prepare(b"{", "c1", None).is_err());
    }
}
