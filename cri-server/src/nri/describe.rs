//! Pods and containers as NRI's messages: from the records, and from the OCI spec that the container was made of.

use std::path::Path;

use catamaran_nri::Pair;
use catamaran_nri::api::{self, OptionalInt64, OptionalUInt64};
use oci_spec::runtime as oci;
use serde_json::Value;

use crate::cri::api::{HugepageLimit, LinuxContainerResources};
use crate::error::{Error, Result};
use crate::node::Node;
use crate::pods::record::{ContainerRecord, PodRecord};
use crate::pods::state::ContainerState;

/// A pod.
pub(crate) fn pod(record: &PodRecord) -> api::PodSandbox {
    let metadata = record.config.metadata.clone().unwrap_or_default();
    let linux = record.config.linux.clone().unwrap_or_default();
    api::PodSandbox {
        id: record.id.to_string(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: record.config.labels.clone().into_iter().collect(),
        annotations: record.config.annotations.clone().into_iter().collect(),
        runtime_handler: record.handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(resources),
            pod_resources: linux.resources.as_ref().map(resources),
            cgroup_parent: record.cgroup_parent.clone(),
            ..Default::default()
        }),
        ips: record.ips.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

/// A container that was made, with its pod.
pub(crate) fn pair(node: &Node, sandbox: &PodRecord, record: &ContainerRecord) -> Pair {
    let bundle = node.dirs.container(&sandbox.id, &record.id).join("config.json");
    (pod(sandbox), container(record, read_spec(&bundle).as_ref()))
}

/// A container that is being made of this spec, with its pod.
pub(crate) fn created_pair(sandbox: &PodRecord, record: &ContainerRecord, spec: &oci::Spec) -> Pair {
    (pod(sandbox), container(record, Some(spec)))
}

/// A bundle goes with its container; what is on record is said all the same.
fn read_spec(path: &Path) -> Option<oci::Spec> {
    let bytes = std::fs::read(path).ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn state(record: &ContainerRecord) -> api::ContainerState {
    match record.state {
        ContainerState::Creating | ContainerState::Created | ContainerState::Starting => {
            api::ContainerState::ContainerCreated
        }
        ContainerState::Running | ContainerState::Stopping => api::ContainerState::ContainerRunning,
        ContainerState::Exited | ContainerState::Unknown | ContainerState::Removing => {
            api::ContainerState::ContainerStopped
        }
    }
}

fn container(record: &ContainerRecord, spec: Option<&oci::Spec>) -> api::Container {
    let metadata = record.config.metadata.clone().unwrap_or_default();
    let mut linux = api::LinuxContainer {
        resources: Some(resources(&record.resources)),
        ..Default::default()
    };
    let mut described = api::Container {
        id: record.id.to_string(),
        pod_sandbox_id: record.pod.to_string(),
        name: metadata.name,
        state: state(record) as i32,
        labels: record.config.labels.clone().into_iter().collect(),
        annotations: record.config.annotations.clone().into_iter().collect(),
        pid: record.pid,
        created_at: record.created_at_ns,
        started_at: record.started_at_ns,
        ..Default::default()
    };
    if let Some(exit) = &record.exit {
        described.finished_at = exit.at_ns;
        described.exit_code = exit.code;
        described.status_reason.clone_from(&exit.reason);
        described.status_message.clone_from(&exit.message);
    }
    if let Some(spec) = spec {
        of_process(&mut described, &mut linux, spec);
        described.mounts = spec.mounts().iter().flatten().map(mount).collect();
        described.hooks = spec.hooks().as_ref().map(hooks);
        if let Some(from) = spec.linux() {
            of_linux(&mut linux, from);
        }
    }
    described.linux = Some(linux);
    described
}

fn of_process(described: &mut api::Container, linux: &mut api::LinuxContainer, spec: &oci::Spec) {
    let Some(process) = spec.process() else {
        return;
    };
    described.args = process.args().clone().unwrap_or_default();
    described.env = process.env().clone().unwrap_or_default();
    let user = process.user();
    described.user = Some(api::User {
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
    });
    let limit = |limit: &oci::PosixRlimit| api::PosixRlimit {
        r#type: name(&limit.typ()),
        hard: limit.hard(),
        soft: limit.soft(),
    };
    described.rlimits = process.rlimits().iter().flatten().map(limit).collect();
    linux.oom_score_adj = process.oom_score_adj().map(|value| api::OptionalInt {
        value: i64::from(value),
    });
}

/// An OCI enumeration's spelling.
fn name(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(text)) => text,
        _ => String::new(),
    }
}

fn text(path: Option<&Path>) -> String {
    path.map(|path| path.display().to_string()).unwrap_or_default()
}

fn mount(mount: &oci::Mount) -> api::Mount {
    api::Mount {
        destination: text(Some(mount.destination())),
        r#type: mount.typ().clone().unwrap_or_default(),
        source: text(mount.source().as_deref()),
        options: mount.options().clone().unwrap_or_default(),
    }
}

fn hooks(hooks: &oci::Hooks) -> api::Hooks {
    let list = |hooks: &Option<Vec<oci::Hook>>| {
        let one = |hook: &oci::Hook| api::Hook {
            path: text(Some(hook.path())),
            args: hook.args().clone().unwrap_or_default(),
            env: hook.env().clone().unwrap_or_default(),
            timeout: hook.timeout().map(|value| api::OptionalInt { value }),
        };
        hooks.iter().flatten().map(one).collect()
    };
    #[allow(deprecated)]
    let prestart = list(hooks.prestart());
    api::Hooks {
        prestart,
        create_runtime: list(hooks.create_runtime()),
        create_container: list(hooks.create_container()),
        start_container: list(hooks.start_container()),
        poststart: list(hooks.poststart()),
        poststop: list(hooks.poststop()),
    }
}

fn of_linux(linux: &mut api::LinuxContainer, from: &oci::Linux) {
    let namespace = |ns: &oci::LinuxNamespace| api::LinuxNamespace {
        r#type: name(&ns.typ()),
        path: text(ns.path().as_deref()),
    };
    linux.namespaces = from.namespaces().iter().flatten().map(namespace).collect();
    let device = |device: &oci::LinuxDevice| api::LinuxDevice {
        path: text(Some(device.path())),
        r#type: name(&device.typ()),
        major: device.major(),
        minor: device.minor(),
        file_mode: device.file_mode().map(|value| api::OptionalFileMode { value }),
        uid: device.uid().map(|value| api::OptionalUInt32 { value }),
        gid: device.gid().map(|value| api::OptionalUInt32 { value }),
    };
    linux.devices = from.devices().iter().flatten().map(device).collect();
    linux.cgroups_path = text(from.cgroups_path().as_deref());
    linux.sysctl = from.sysctl().clone().unwrap_or_default().into_iter().collect();
    let Some(limits) = from.resources() else {
        return;
    };
    let into = linux.resources.get_or_insert_default();
    into.pids = limits.pids().map(|pids| api::LinuxPids { limit: pids.limit() });
    let rule = |rule: &oci::LinuxDeviceCgroup| api::LinuxDeviceCgroup {
        allow: rule.allow(),
        r#type: rule.typ().map(|typ| name(&typ)).unwrap_or_default(),
        major: rule.major().map(|value| OptionalInt64 { value }),
        minor: rule.minor().map(|value| OptionalInt64 { value }),
        access: rule.access().clone().unwrap_or_default(),
    };
    into.devices = limits.devices().iter().flatten().map(rule).collect();
}

/// Limits; the CRI's zero is none.
pub(crate) fn resources(from: &LinuxContainerResources) -> api::LinuxResources {
    let signed = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let unsigned = |value: i64| {
        let value = u64::try_from(value).ok().filter(|value| *value != 0);
        value.map(|value| OptionalUInt64 { value })
    };
    let page = |limit: &HugepageLimit| api::HugepageLimit {
        page_size: limit.page_size.clone(),
        limit: limit.limit,
    };
    api::LinuxResources {
        memory: Some(api::LinuxMemory {
            limit: signed(from.memory_limit_in_bytes),
            swap: signed(from.memory_swap_limit_in_bytes),
            ..Default::default()
        }),
        cpu: Some(api::LinuxCpu {
            shares: unsigned(from.cpu_shares),
            quota: signed(from.cpu_quota),
            period: unsigned(from.cpu_period),
            cpus: from.cpuset_cpus.clone(),
            mems: from.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: from.hugepage_limits.iter().map(page).collect(),
        unified: from.unified.clone().into_iter().collect(),
        ..Default::default()
    }
}

/// Limits as the CRI has them, for the update of a container.
///
/// # Errors
/// [`Error::FailedPrecondition`] naming a limit that an update cannot set.
pub(crate) fn to_cri(from: &api::LinuxResources, of: &str) -> Result<LinuxContainerResources> {
    let memory = from.memory.unwrap_or_default();
    let cpu = from.cpu.clone().unwrap_or_default();
    for (field, set) in [
        ("memory.reservation", memory.reservation.is_some()),
        ("memory.kernel", memory.kernel.is_some()),
        ("memory.kernel_tcp", memory.kernel_tcp.is_some()),
        ("memory.swappiness", memory.swappiness.is_some()),
        ("memory.disable_oom_killer", memory.disable_oom_killer.is_some()),
        ("memory.use_hierarchy", memory.use_hierarchy.is_some()),
        ("cpu.realtime_runtime", cpu.realtime_runtime.is_some()),
        ("cpu.realtime_period", cpu.realtime_period.is_some()),
        ("blockio_class", from.blockio_class.is_some()),
        ("rdt_class", from.rdt_class.is_some()),
        ("pids", from.pids.is_some()),
        ("devices", !from.devices.is_empty()),
    ] {
        if set {
            let text = format!("NRI {of}: resources.{field} cannot be changed in a container that exists");
            return Err(Error::FailedPrecondition(text));
        }
    }
    let unsigned = |field: &str, value: Option<OptionalUInt64>| {
        let value = value.map_or(0, |value| value.value);
        i64::try_from(value).map_err(|_| {
            Error::FailedPrecondition(format!("NRI {of}: resources.{field}: {value} is too large"))
        })
    };
    let signed = |value: Option<OptionalInt64>| value.map_or(0, |value| value.value);
    let page = |limit: api::HugepageLimit| HugepageLimit {
        page_size: limit.page_size,
        limit: limit.limit,
    };
    Ok(LinuxContainerResources {
        cpu_period: unsigned("cpu.period", cpu.period)?,
        cpu_quota: signed(cpu.quota),
        cpu_shares: unsigned("cpu.shares", cpu.shares)?,
        memory_limit_in_bytes: signed(memory.limit),
        memory_swap_limit_in_bytes: signed(memory.swap),
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepage_limits: from.hugepage_limits.iter().cloned().map(page).collect(),
        unified: from.unified.clone().into_iter().collect(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_survive_both_ways_and_others_are_refused_by_name() {
        let limits = LinuxContainerResources {
            cpu_shares: 7,
            cpu_quota: -1,
            memory_limit_in_bytes: 9,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        assert_eq!(to_cri(&resources(&limits), "update").unwrap(), limits);
        let pids = api::LinuxResources {
            pids: Some(api::LinuxPids { limit: 5 }),
            ..Default::default()
        };
        let error = to_cri(&pids, "update").unwrap_err().to_string();
        assert!(error.contains("resources.pids"), "{error}");
    }
}
