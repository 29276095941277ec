//! Adjusts the OCI spec of a new container as NRI plugins want it. What cannot be done is refused by its name:
//! nothing that a plugin asks for is left out silently.

use std::path::Path;

use catamaran_nri::{api, removal};
use catamaran_spec::{HostFeatures, Side};
use oci_spec::runtime as oci;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::cri::api::LinuxContainerResources;
use crate::error::{Error, Result};

fn refused(field: &str, problem: &str) -> Error {
    Error::FailedPrecondition(format!("NRI adjustment {field}: {problem}"))
}

/// Something of the OCI spec from its JSON, which has the spellings that plugins use.
fn parse<T: DeserializeOwned>(field: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| refused(field, &error.to_string()))
}

/// Adjusts `spec`, which `kernel` will run, and the limits on record. In a VM there is nothing of the host that a
/// plugin could add. CDI devices are the caller's to inject.
///
/// # Errors
/// [`Error::FailedPrecondition`] naming the field.
pub(crate) fn apply(
    spec: &mut oci::Spec,
    limits: &mut LinuxContainerResources,
    adjust: api::ContainerAdjustment,
    side: Side,
    kernel: &HostFeatures,
) -> Result<()> {
    let linux = adjust.linux.unwrap_or_default();
    refuse(&linux, side, adjust.hooks.as_ref(), &adjust.cdi_devices)?;
    let annotations = spec.annotations_mut().get_or_insert_default();
    for (key, value) in adjust.annotations {
        match removal(&key) {
            (key, true) => drop(annotations.remove(key)),
            (key, false) => drop(annotations.insert(key.to_owned(), value)),
        }
    }
    mounts(spec.mounts_mut().get_or_insert_default(), adjust.mounts)?;
    if let Some(process) = spec.process_mut() {
        let env = process.env_mut().get_or_insert_default();
        for variable in &adjust.env {
            let (key, removed) = removal(&variable.key);
            let prefix = format!("{key}=");
            env.retain(|other| !other.starts_with(&prefix));
            if !removed {
                env.push(format!("{prefix}{}", variable.value));
            }
        }
        if !adjust.args.is_empty() {
            process.set_args(Some(adjust.args));
        }
        let mut rlimits = process.rlimits().clone().unwrap_or_default();
        for limit in &adjust.rlimits {
            let json = json!({"type": limit.r#type, "hard": limit.hard, "soft": limit.soft});
            let limit: oci::PosixRlimit = parse("rlimits", json)?;
            rlimits.retain(|other| other.typ() != limit.typ());
            rlimits.push(limit);
        }
        process.set_rlimits((!rlimits.is_empty()).then_some(rlimits));
        if let Some(score) = linux.oom_score_adj {
            let score = i32::try_from(score.value)
                .ok()
                .filter(|score| (-1000..=1000).contains(score));
            let score =
                score.ok_or_else(|| refused("linux.oom_score_adj", "is not within -1000 and 1000"))?;
            process.set_oom_score_adj(Some(kernel.settable_oom_score_adj(score)));
            limits.oom_score_adj = i64::from(score);
        }
    }
    if let Some(wanted) = adjust.hooks {
        hooks(spec.hooks_mut().get_or_insert_default(), &wanted)?;
    }
    let into = spec.linux_mut().get_or_insert_default();
    namespaces(into.namespaces_mut().get_or_insert_default(), &linux.namespaces)?;
    let sysctls = into.sysctl_mut().get_or_insert_default();
    for (key, value) in linux.sysctl {
        match removal(&key) {
            (key, true) => drop(sysctls.remove(key)),
            (key, false) => drop(sysctls.insert(key.to_owned(), value)),
        }
    }
    if let Some(policy) = linux.seccomp_policy {
        into.set_seccomp(Some(seccomp(policy)?));
    }
    devices(into, &linux.devices)?;
    match linux.resources {
        Some(wanted) => resources(into.resources_mut().get_or_insert_default(), limits, &wanted),
        None => Ok(()),
    }
}

fn refuse(
    linux: &api::LinuxContainerAdjustment,
    side: Side,
    hooks: Option<&api::Hooks>,
    cdi: &[api::CdiDevice],
) -> Result<()> {
    let resources = linux.resources.clone().unwrap_or_default();
    let unsupported = "is not supported";
    let in_vm = "is of the host, and the container is in a VM";
    let vm = side == Side::Guest;
    for (field, set, problem) in [
        ("CDI_devices", vm && !cdi.is_empty(), in_vm),
        (
            "linux.cgroups_path",
            !linux.cgroups_path.is_empty(),
            "limits, statistics and teardown go by the pod's cgroup",
        ),
        ("linux.io_priority", linux.io_priority.is_some(), unsupported),
        ("linux.scheduler", linux.scheduler.is_some(), unsupported),
        ("linux.net_devices", !linux.net_devices.is_empty(), unsupported),
        ("linux.rdt", linux.rdt.is_some(), unsupported),
        ("linux.memory_policy", linux.memory_policy.is_some(), unsupported),
        (
            "linux.resources.blockio_class",
            resources.blockio_class.is_some(),
            unsupported,
        ),
        (
            "linux.resources.rdt_class",
            resources.rdt_class.is_some(),
            unsupported,
        ),
        (
            "hooks",
            vm && hooks.is_some_and(|hooks| *hooks != api::Hooks::default()),
            in_vm,
        ),
        ("linux.devices", vm && !linux.devices.is_empty(), in_vm),
        ("linux.namespaces", vm && !linux.namespaces.is_empty(), in_vm),
    ] {
        if set {
            return Err(refused(field, problem));
        }
    }
    Ok(())
}

fn mounts(into: &mut Vec<oci::Mount>, wanted: Vec<api::Mount>) -> Result<()> {
    for mount in wanted {
        let (destination, removed) = removal(&mount.destination);
        if !destination.starts_with('/') || destination.contains('\0') {
            let problem = format!("destination {destination:?} is not an absolute path");
            return Err(refused("mounts", &problem));
        }
        let destination = Path::new(destination).to_owned();
        into.retain(|other| *other.destination() != destination);
        if removed {
            continue;
        }
        let json = json!({
            "destination": destination, "type": mount.r#type, "source": mount.source, "options": mount.options,
        });
        // Before what is mounted below it, which it would hide.
        let below = |other: &oci::Mount| other.destination().starts_with(&destination);
        let at = into.iter().position(below).unwrap_or(into.len());
        into.insert(at, parse("mounts", json)?);
    }
    Ok(())
}

fn hooks(into: &mut oci::Hooks, wanted: &api::Hooks) -> Result<()> {
    let add = |into: &mut Option<Vec<oci::Hook>>, wanted: &[api::Hook]| {
        for hook in wanted {
            let mut json = json!({"path": hook.path, "args": hook.args, "env": hook.env});
            if let Some(timeout) = &hook.timeout {
                json["timeout"] = timeout.value.into();
            }
            into.get_or_insert_default().push(parse("hooks", json)?);
        }
        Ok::<(), Error>(())
    };
    #[allow(deprecated)]
    add(into.prestart_mut(), &wanted.prestart)?;
    add(into.create_runtime_mut(), &wanted.create_runtime)?;
    add(into.create_container_mut(), &wanted.create_container)?;
    add(into.start_container_mut(), &wanted.start_container)?;
    add(into.poststart_mut(), &wanted.poststart)?;
    add(into.poststop_mut(), &wanted.poststop)
}

fn namespaces(into: &mut Vec<oci::LinuxNamespace>, wanted: &[api::LinuxNamespace]) -> Result<()> {
    for namespace in wanted {
        let (kind, removed) = removal(&namespace.r#type);
        let mut json = json!({"type": kind});
        if !namespace.path.is_empty() {
            json["path"] = namespace.path.clone().into();
        }
        let namespace: oci::LinuxNamespace = parse("linux.namespaces", json)?;
        into.retain(|other| other.typ() != namespace.typ());
        if !removed {
            into.push(namespace);
        }
    }
    Ok(())
}

fn devices(into: &mut oci::Linux, wanted: &[api::LinuxDevice]) -> Result<()> {
    for device in wanted {
        let (path, removed) = removal(&device.path);
        let path = Path::new(path).to_owned();
        let list = into.devices_mut().get_or_insert_default();
        list.retain(|other| *other.path() != path);
        if removed {
            continue;
        }
        if !path.is_absolute() {
            return Err(refused(
                "linux.devices",
                &format!("{} is not an absolute path", path.display()),
            ));
        }
        let mut json =
            json!({"path": path, "type": device.r#type, "major": device.major, "minor": device.minor});
        let optional = [
            ("fileMode", device.file_mode.as_ref().map(|v| v.value)),
            ("uid", device.uid.as_ref().map(|v| v.value)),
            ("gid", device.gid.as_ref().map(|v| v.value)),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                json[key] = value.into();
            }
        }
        list.push(parse("linux.devices", json)?);
        let rule = json!({
            "allow": true, "type": device.r#type, "major": device.major, "minor": device.minor, "access": "rwm",
        });
        let rule = parse("linux.devices", rule)?;
        let resources = into.resources_mut().get_or_insert_default();
        resources.devices_mut().get_or_insert_default().push(rule);
    }
    Ok(())
}

fn seccomp(policy: api::LinuxSeccomp) -> Result<oci::LinuxSeccomp> {
    let argument = |arg: api::LinuxSeccompArg| json!({"index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op});
    let call = |call: api::LinuxSyscall| {
        let mut json = json!({"names": call.names, "action": call.action});
        if let Some(errno) = call.errno_ret {
            json["errnoRet"] = errno.value.into();
        }
        if !call.args.is_empty() {
            json["args"] = call.args.into_iter().map(argument).collect();
        }
        json
    };
    let mut json = json!({
        "defaultAction": policy.default_action,
        "architectures": policy.architectures,
        "flags": policy.flags,
        "syscalls": policy.syscalls.into_iter().map(call).collect::<Vec<Value>>(),
    });
    if let Some(errno) = policy.default_errno {
        json["defaultErrnoRet"] = errno.value.into();
    }
    for (key, text) in [
        ("listenerPath", policy.listener_path),
        ("listenerMetadata", policy.listener_metadata),
    ] {
        if !text.is_empty() {
            json[key] = text.into();
        }
    }
    parse("linux.seccomp_policy", json)
}

fn resources(
    into: &mut oci::LinuxResources,
    limits: &mut LinuxContainerResources,
    wanted: &api::LinuxResources,
) -> Result<()> {
    // By JSON: what is not wanted stays as it is.
    let mut json = serde_json::to_value(&*into).map_err(|e| Error::Internal(e.to_string()))?;
    let memory = wanted.memory.unwrap_or_default();
    let cpu = wanted.cpu.clone().unwrap_or_default();
    macro_rules! set {
        ($part:literal: $($key:literal = $value:expr),* $(,)?) => { $(if let Some(wanted) = &$value {
            json[$part][$key] = wanted.value.into();
        })* };
    }
    set!("memory": "limit" = memory.limit, "reservation" = memory.reservation, "swap" = memory.swap,
        "kernel" = memory.kernel, "kernelTCP" = memory.kernel_tcp, "swappiness" = memory.swappiness,
        "disableOOMKiller" = memory.disable_oom_killer, "useHierarchy" = memory.use_hierarchy);
    set!("cpu": "shares" = cpu.shares, "quota" = cpu.quota, "period" = cpu.period,
        "realtimeRuntime" = cpu.realtime_runtime, "realtimePeriod" = cpu.realtime_period);
    for (key, text) in [("cpus", &cpu.cpus), ("mems", &cpu.mems)] {
        if !text.is_empty() {
            json["cpu"][key] = text.clone().into();
        }
    }
    if let Some(pids) = &wanted.pids {
        json["pids"]["limit"] = pids.limit.into();
    }
    for (key, value) in &wanted.unified {
        json["unified"][key] = value.clone().into();
    }
    *into = parse("linux.resources", json)?;
    for page in &wanted.hugepage_limits {
        let json = json!({"pageSize": page.page_size, "limit": page.limit});
        let limit: oci::LinuxHugepageLimit = parse("linux.resources.hugepage_limits", json)?;
        let list = into.hugepage_limits_mut().get_or_insert_default();
        list.retain(|other| other.page_size() != limit.page_size());
        list.push(limit);
    }
    for rule in &wanted.devices {
        let mut json = json!({"allow": rule.allow, "access": rule.access});
        if !rule.r#type.is_empty() {
            json["type"] = rule.r#type.clone().into();
        }
        for (key, number) in [("major", &rule.major), ("minor", &rule.minor)] {
            if let Some(number) = number {
                json[key] = number.value.into();
            }
        }
        let rule = parse("linux.resources.devices", json)?;
        into.devices_mut().get_or_insert_default().push(rule);
    }
    on_record(limits, wanted);
    Ok(())
}

/// Later updates start from what is on record.
fn on_record(limits: &mut LinuxContainerResources, wanted: &api::LinuxResources) {
    let known = api::LinuxResources {
        memory: wanted.memory.as_ref().map(|memory| api::LinuxMemory {
            limit: memory.limit,
            swap: memory.swap,
            ..Default::default()
        }),
        cpu: wanted.cpu.as_ref().map(|cpu| api::LinuxCpu {
            shares: cpu.shares,
            quota: cpu.quota,
            period: cpu.period,
            cpus: cpu.cpus.clone(),
            mems: cpu.mems.clone(),
            ..Default::default()
        }),
        unified: wanted.unified.clone(),
        hugepage_limits: wanted.hugepage_limits.clone(),
        ..Default::default()
    };
    if let Ok(known) = super::to_cri(&known, "adjustment") {
        *limits = crate::pods::merge_resources(limits, &known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adjusted(
        adjust: api::ContainerAdjustment,
        side: Side,
    ) -> Result<(oci::Spec, LinuxContainerResources)> {
        let mut spec = oci::Spec::default();
        let mut limits = LinuxContainerResources::default();
        let mut kernel = HostFeatures::guest("n");
        kernel.min_oom_score_adj = Some(-10);
        apply(&mut spec, &mut limits, adjust, side, &kernel).map(|()| (spec, limits))
    }

    fn linux(linux: api::LinuxContainerAdjustment) -> api::ContainerAdjustment {
        api::ContainerAdjustment {
            linux: Some(linux),
            ..Default::default()
        }
    }

    #[test]
    fn the_spec_has_what_plugins_want() {
        let resources = api::LinuxResources {
            memory: Some(api::LinuxMemory {
                limit: Some(api::OptionalInt64 { value: 4096 }),
                ..Default::default()
            }),
            pids: Some(api::LinuxPids { limit: 7 }),
            ..Default::default()
        };
        let adjust = api::ContainerAdjustment {
            env: vec![api::KeyValue {
                key: "A".into(),
                value: "b=c".into(),
            }],
            mounts: vec![
                api::Mount {
                    destination: "-/proc".into(),
                    ..Default::default()
                },
                api::Mount {
                    destination: "/dev".into(),
                    r#type: "tmpfs".into(),
                    ..Default::default()
                },
            ],
            rlimits: vec![api::PosixRlimit {
                r#type: "RLIMIT_NOFILE".into(),
                hard: 9,
                soft: 8,
            }],
            annotations: [("k".to_owned(), "v".to_owned())].into(),
            ..linux(api::LinuxContainerAdjustment {
                resources: Some(resources),
                seccomp_policy: Some(api::LinuxSeccomp {
                    default_action: "SCMP_ACT_ALLOW".into(),
                    ..Default::default()
                }),
                ..Default::default()
            })
        };
        let (spec, limits) = adjusted(adjust, Side::Host).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert!(process.env().as_ref().unwrap().contains(&"A=b=c".to_owned()));
        let files: Vec<u64> = process
            .rlimits()
            .iter()
            .flatten()
            .map(oci::PosixRlimit::hard)
            .collect();
        assert_eq!(files, [9]);
        let destinations: Vec<String> = spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| mount.destination().display().to_string())
            .collect();
        assert!(!destinations.contains(&"/proc".to_owned()));
        let at = |path: &str| destinations.iter().position(|d| d == path).unwrap();
        assert!(at("/dev") < at("/dev/pts"), "{destinations:?}");
        let oci = spec.linux().as_ref().unwrap().resources().as_ref().unwrap();
        assert_eq!(oci.memory().unwrap().limit(), Some(4096));
        assert_eq!(oci.pids().unwrap().limit(), 7);
        assert_eq!(limits.memory_limit_in_bytes, 4096);
        assert!(spec.linux().as_ref().unwrap().seccomp().is_some());
    }

    #[test]
    fn a_score_that_cannot_be_set_becomes_the_nearest_that_can() {
        for (wanted, set) in [(-900, -10), (-5, -5), (7, 7)] {
            let adjust = linux(api::LinuxContainerAdjustment {
                oom_score_adj: Some(api::OptionalInt { value: wanted }),
                ..Default::default()
            });
            let (spec, limits) = adjusted(adjust, Side::Host).unwrap();
            assert_eq!(spec.process().as_ref().unwrap().oom_score_adj(), Some(set));
            assert_eq!(limits.oom_score_adj, wanted);
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let scheduler = linux(api::LinuxContainerAdjustment {
            scheduler: Some(api::LinuxScheduler::default()),
            ..Default::default()
        });
        let error = adjusted(scheduler, Side::Host).unwrap_err().to_string();
        assert!(error.contains("linux.scheduler"), "{error}");
        let device = linux(api::LinuxContainerAdjustment {
            devices: vec![api::LinuxDevice {
                path: "/dev/x".into(),
                r#type: "c".into(),
                ..Default::default()
            }],
            ..Default::default()
        });
        adjusted(device.clone(), Side::Host).unwrap();
        let error = adjusted(device, Side::Guest).unwrap_err().to_string();
        assert!(error.contains("linux.devices") && error.contains("VM"), "{error}");
        let limit = api::ContainerAdjustment {
            rlimits: vec![api::PosixRlimit {
                r#type: "RLIMIT_NONSENSE".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(
            adjusted(limit, Side::Host)
                .unwrap_err()
                .to_string()
                .contains("rlimits")
        );
    }
}
