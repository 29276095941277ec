//! Device nodes of a container and the device controller's rules.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup};

use crate::error::{Result, SpecError};
use crate::input::{ContainerInput, Side};

/// Nodes to create and rules in their order; the OCI runtime adds the standard devices (null, zero, tty, …).
pub(crate) fn devices(input: &ContainerInput<'_>) -> Result<(Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>)> {
    let container = input.container;
    let privileged = container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .is_some_and(|security| security.privileged);
    // Under this kernel they are edits of the finished spec ([`crate::inject_cdi_devices`]).
    if !container.cdi_devices.is_empty() && input.target.side() == Side::Guest {
        return Err(SpecError::precondition(
            "CDI_devices",
            "devices of the node cannot be given to a pod in a virtual machine",
        ));
    }

    let mut nodes: Vec<LinuxDevice> = Vec::new();
    let mut rules = vec![rule(privileged, None, "rwm")];
    if privileged {
        nodes.clone_from(&input.inputs.host_devices);
    }
    for (index, device) in container.devices.iter().enumerate() {
        let field = |name: &str| format!("devices[{index}].{name}");
        if input.target.side() == Side::Guest {
            let reason = "a device of the node cannot be given to a pod in a virtual machine";
            return Err(SpecError::precondition(field("host_path"), reason));
        }
        let inside = if device.container_path.is_empty() {
            &device.host_path
        } else {
            &device.container_path
        };
        if !inside.starts_with('/') || inside.contains('\0') {
            return Err(SpecError::invalid(
                field("container_path"),
                format!("{inside:?} is not an absolute path"),
            ));
        }
        let access = device.permissions.as_str();
        if access.is_empty() || !access.bytes().all(|byte| b"rwm".contains(&byte)) {
            return Err(SpecError::invalid(
                field("permissions"),
                format!("{access:?} is not made of r, w and m"),
            ));
        }
        let Some(found) = input.inputs.devices.get(index) else {
            return Err(SpecError::not_found(
                field("host_path"),
                "not looked up on the node",
            ));
        };
        for node in found {
            nodes.retain(|known| known.path() != node.path());
            nodes.push(node.clone());
            if !privileged {
                rules.push(rule(true, Some(node), access));
            }
        }
    }
    Ok((nodes, rules))
}

fn rule(allow: bool, device: Option<&LinuxDevice>, access: &str) -> LinuxDeviceCgroup {
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(allow).set_access(Some(access.to_owned()));
    if let Some(device) = device {
        rule.set_typ(Some(device.typ()))
            .set_major(Some(device.major()))
            .set_minor(Some(device.minor()));
    }
    rule
}
