//! A CDI specification file as it is written (Container Device Interface, SPEC.md, versions 0.1 to 1.0), and what
//! makes one valid. The files are the device vendors': bounded, and refused as a whole when anything in them is
//! unknown, so that no edit is dropped silently.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Versions whose fields are all known here.
const VERSIONS: [&str; 9] = [
    "0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0",
];

/// One file.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Document {
    pub(super) cdi_version: String,
    /// `vendor/class`.
    pub(super) kind: String,
    #[serde(default)]
    #[allow(
        dead_code,
        reason = "free text for people; read so that the unknown can be refused"
    )]
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) devices: Vec<Device>,
    /// Applied once for any of the devices.
    #[serde(default)]
    pub(super) container_edits: Edits,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Device {
    pub(super) name: String,
    #[serde(default)]
    #[allow(
        dead_code,
        reason = "free text for people; read so that the unknown can be refused"
    )]
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) container_edits: Edits,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Edits {
    pub(super) env: Vec<String>,
    pub(super) device_nodes: Vec<DeviceNode>,
    pub(super) mounts: Vec<Mount>,
    pub(super) hooks: Vec<Hook>,
    pub(super) additional_gids: Vec<u32>,
    /// Refused where a device that carries it is asked for: other devices of the file may still be used.
    pub(super) intel_rdt: Option<serde_json::Value>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct DeviceNode {
    pub(super) path: String,
    pub(super) host_path: Option<String>,
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) major: Option<i64>,
    pub(super) minor: Option<i64>,
    pub(super) file_mode: Option<u32>,
    pub(super) permissions: Option<String>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Mount {
    pub(super) host_path: String,
    pub(super) container_path: String,
    #[serde(default)]
    pub(super) options: Vec<String>,
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Hook {
    pub(super) hook_name: HookName,
    pub(super) path: String,
    #[serde(default)]
    pub(super) args: Vec<String>,
    #[serde(default)]
    pub(super) env: Vec<String>,
    pub(super) timeout: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum HookName {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

/// Reads one file's bytes; `json` by its extension.
pub(super) fn parse(bytes: &[u8], json: bool) -> Result<Document, String> {
    let document: Document = if json {
        serde_json::from_slice(bytes).map_err(|e| e.to_string())?
    } else {
        serde_yaml::from_slice(bytes).map_err(|e| e.to_string())?
    };
    verify(&document)?;
    Ok(document)
}

fn verify(document: &Document) -> Result<(), String> {
    let version = document.cdi_version.trim_start_matches('v');
    if !VERSIONS.contains(&version) {
        return Err(format!(
            "cdiVersion {version:?} is not one of {}",
            VERSIONS.join(", ")
        ));
    }
    match document.kind.split_once('/') {
        Some((vendor, class)) if is_vendor(vendor) && is_class(class) => {}
        _ => return Err(format!("kind {:?} is not vendor/class", document.kind)),
    }
    if document.devices.is_empty() {
        return Err("has no devices".to_owned());
    }
    verify_edits(&document.container_edits)?;
    for (index, device) in document.devices.iter().enumerate() {
        if !is_device(&device.name) {
            return Err(format!("{:?} is not a device's name", device.name));
        }
        if document.devices[..index]
            .iter()
            .any(|other| other.name == device.name)
        {
            return Err(format!("has the device {:?} twice", device.name));
        }
        verify_edits(&device.container_edits)
            .map_err(|problem| format!("device {}: {problem}", device.name))?;
    }
    Ok(())
}

fn verify_edits(edits: &Edits) -> Result<(), String> {
    let path = |what: &str, path: &str| {
        let good = path.starts_with('/') && !path.contains('\0');
        good.then_some(())
            .ok_or_else(|| format!("{what} {path:?} is not an absolute path"))
    };
    for env in &edits.env {
        if env.contains('\0') || env.find('=').is_none_or(|at| at == 0) {
            return Err(format!("env {env:?} is not NAME=value"));
        }
    }
    for node in &edits.device_nodes {
        path("deviceNodes.path", &node.path)?;
        if let Some(host) = &node.host_path {
            path("deviceNodes.hostPath", host)?;
        }
        if let Some(kind) = node.kind.as_deref()
            && !matches!(kind, "" | "b" | "c" | "u" | "p")
        {
            return Err(format!("deviceNodes.type {kind:?} is not one of b, c, u, p"));
        }
        if let Some(access) = node.permissions.as_deref()
            && !access.bytes().all(|byte| b"rwm".contains(&byte))
        {
            return Err(format!(
                "deviceNodes.permissions {access:?} is not made of r, w and m"
            ));
        }
    }
    for mount in &edits.mounts {
        path("mounts.containerPath", &mount.container_path)?;
        if mount.host_path.is_empty() || mount.host_path.contains('\0') {
            return Err(format!("mounts.hostPath {:?} is no path", mount.host_path));
        }
    }
    for hook in &edits.hooks {
        path("hooks.path", &hook.path)?;
        if hook.timeout.is_some_and(|seconds| seconds <= 0) {
            return Err("hooks.timeout is not positive".to_owned());
        }
    }
    Ok(())
}

/// `vendor.com`: begins with a letter, ends with a letter or digit, between them also `_`, `-`, `.`.
pub(super) fn is_vendor(name: &str) -> bool {
    named(name, u8::is_ascii_alphabetic, b"_-.")
}

/// As a vendor, without dots.
pub(super) fn is_class(name: &str) -> bool {
    named(name, u8::is_ascii_alphabetic, b"_-")
}

/// Begins and ends with a letter or digit, between them also `_`, `-`, `.`, `:`.
pub(super) fn is_device(name: &str) -> bool {
    named(name, u8::is_ascii_alphanumeric, b"_-.:")
}

fn named(name: &str, first: impl Fn(&u8) -> bool, inner: &[u8]) -> bool {
    let bytes = name.as_bytes();
    bytes.first().is_some_and(first)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || inner.contains(byte))
}
