//! Container edits applied to an OCI spec, CDI SPEC.md section "OCI Edits".

use std::path::Path;

use oci_spec::runtime::{
    Hook as OciHook, Hooks, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount as OciMount, Spec,
};

use super::document::{DeviceNode, Edits, Hook, HookName, Mount};
use crate::gather::node_at;

/// Applies one set. The error is a sentence; the caller says which device it belongs to.
pub(super) fn apply(spec: &mut Spec, edits: &Edits) -> Result<(), String> {
    if edits.intel_rdt.is_some() {
        return Err("intelRdt is not supported".to_owned());
    }
    for node in &edits.device_nodes {
        add_device(spec, node)?;
    }
    let process = spec.process_mut().get_or_insert_default();
    let env = process.env_mut().get_or_insert_default();
    for entry in &edits.env {
        let name = entry.split_inclusive('=').next().unwrap_or(entry);
        env.retain(|known| !known.starts_with(name));
        env.push(entry.clone());
    }
    let groups = process.user_mut().additional_gids_mut().get_or_insert_default();
    for gid in &edits.additional_gids {
        // 0 means none there.
        if *gid != 0 && !groups.contains(gid) {
            groups.push(*gid);
        }
    }
    if !edits.mounts.is_empty() {
        add_mounts(spec.mounts_mut().get_or_insert_default(), &edits.mounts);
    }
    for hook in &edits.hooks {
        add_hook(spec.hooks_mut().get_or_insert_default(), hook);
    }
    Ok(())
}

/// What the file leaves out of a device node is looked up on this host.
fn add_device(spec: &mut Spec, wanted: &DeviceNode) -> Result<(), String> {
    let kind = match wanted.kind.as_deref() {
        None | Some("") => None,
        Some("b") => Some(LinuxDeviceType::B),
        Some("c") => Some(LinuxDeviceType::C),
        Some("u") => Some(LinuxDeviceType::U),
        Some("p") => Some(LinuxDeviceType::P),
        Some(other) => return Err(format!("deviceNodes.type {other:?} is unknown")),
    };
    let mut device = LinuxDevice::default();
    device.set_path(wanted.path.clone().into());
    match (kind, wanted.major, wanted.minor) {
        (Some(kind), Some(major), minor) if major != 0 => {
            device
                .set_typ(kind)
                .set_major(major)
                .set_minor(minor.unwrap_or(0));
        }
        (Some(LinuxDeviceType::P), ..) => {
            device.set_typ(LinuxDeviceType::P);
        }
        (kind, ..) => {
            let host = wanted.host_path.as_deref().unwrap_or(&wanted.path);
            let found = node_at(Path::new(host)).map_err(|e| format!("device node {host:?}: {e}"))?;
            let found = found.ok_or_else(|| format!("{host:?} on the node is not a device"))?;
            // An unbuffered character device looks like any other.
            let as_written = kind.map(|kind| match kind {
                LinuxDeviceType::U => LinuxDeviceType::C,
                other => other,
            });
            if as_written.is_some_and(|kind| kind != found.typ()) {
                return Err(format!(
                    "{host:?} on the node is not a device of the type that is written"
                ));
            }
            device
                .set_typ(kind.unwrap_or(found.typ()))
                .set_major(found.major())
                .set_minor(found.minor());
        }
    }
    // The owner is the container's user where the file names none.
    let user = spec
        .process()
        .as_ref()
        .map(|process| process.user().clone())
        .unwrap_or_default();
    let own = |written: Option<u32>, user: u32| written.or((user != 0).then_some(user));
    device
        .set_file_mode(wanted.file_mode)
        .set_uid(own(wanted.uid, user.uid()))
        .set_gid(own(wanted.gid, user.gid()));
    let linux = spec.linux_mut().get_or_insert_default();
    if device.typ() != LinuxDeviceType::P {
        let access = wanted.permissions.as_deref().filter(|access| !access.is_empty());
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(match device.typ() {
                LinuxDeviceType::U => LinuxDeviceType::C,
                other => other,
            }))
            .set_major(Some(device.major()))
            .set_minor(Some(device.minor()))
            .set_access(Some(access.unwrap_or("rwm").to_owned()));
        let resources = linux.resources_mut().get_or_insert_default();
        resources.devices_mut().get_or_insert_default().push(rule);
    }
    let devices = linux.devices_mut().get_or_insert_default();
    devices.retain(|known| known.path() != device.path());
    devices.push(device);
    Ok(())
}

fn add_mounts(list: &mut Vec<OciMount>, wanted: &[Mount]) {
    for mount in wanted {
        let mut new = OciMount::default();
        let mut options = mount.options.clone();
        let kind = mount.kind.as_deref().filter(|kind| !kind.is_empty());
        // Of a bind without the option some runtimes make a mount of an unknown file system.
        if kind.is_none_or(|kind| kind == "bind") && !options.iter().any(|o| o == "bind" || o == "rbind") {
            options.push("rbind".to_owned());
        }
        new.set_destination(mount.container_path.clone().into())
            .set_source(Some(mount.host_path.clone().into()))
            .set_typ(Some(kind.unwrap_or("bind").to_owned()))
            .set_options(Some(options));
        list.retain(|known| known.destination() != new.destination());
        list.push(new);
    }
    // What is higher up is mounted first; the order among equals stays.
    list.sort_by_key(|mount| mount.destination().components().count());
}

#[allow(deprecated, reason = "CDI files still have prestart hooks")]
fn add_hook(hooks: &mut Hooks, wanted: &Hook) {
    let mut hook = OciHook::default();
    hook.set_path(wanted.path.clone().into())
        .set_args((!wanted.args.is_empty()).then(|| wanted.args.clone()))
        .set_env((!wanted.env.is_empty()).then(|| wanted.env.clone()))
        .set_timeout(wanted.timeout);
    let list = match wanted.hook_name {
        HookName::Prestart => hooks.prestart_mut(),
        HookName::CreateRuntime => hooks.create_runtime_mut(),
        HookName::CreateContainer => hooks.create_container_mut(),
        HookName::StartContainer => hooks.start_container_mut(),
        HookName::Poststart => hooks.poststart_mut(),
        HookName::Poststop => hooks.poststop_mut(),
    };
    list.get_or_insert_default().push(hook);
}
