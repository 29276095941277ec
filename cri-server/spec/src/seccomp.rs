//! The seccomp filter of a container: none, the default profile, or a profile file of the node.

use std::path::PathBuf;

use catamaran_cri_api::v1::security_profile::ProfileType;
use catamaran_cri_api::v1::{ContainerConfig, SecurityProfile};
use oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp};

use crate::error::{Result, SpecError};
use crate::host::HostFeatures;
use crate::input::ContainerInput;
use crate::lsm::profile_by_name;
use crate::seccomp_default::default_profile;

const FIELD: &str = "linux.security_context.seccomp";

/// What a container asks for. Nothing is Unconfined, as the kubelet and critest expect; a privileged container
/// is never filtered.
#[allow(deprecated)] // older kubelets send seccomp_profile_path alone
fn wanted(container: &ContainerConfig) -> Result<Option<SecurityProfile>> {
    let Some(security) = container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
    else {
        return Ok(None);
    };
    if security.privileged {
        return Ok(None);
    }
    match &security.seccomp {
        Some(profile) => Ok(Some(profile.clone())),
        None => profile_by_name(
            &security.seccomp_profile_path,
            "linux.security_context.seccomp_profile_path",
        ),
    }
}

fn kind(profile: &SecurityProfile) -> Result<ProfileType> {
    ProfileType::try_from(profile.profile_type).map_err(|unknown| {
        SpecError::invalid(
            format!("{FIELD}.profile_type"),
            format!("unknown value {}", unknown.0),
        )
    })
}

/// Path of the profile file, if the container wants one.
pub(crate) fn localhost_profile_path(container: &ContainerConfig) -> Result<Option<PathBuf>> {
    let Some(profile) = wanted(container)? else {
        return Ok(None);
    };
    if kind(&profile)? != ProfileType::Localhost {
        return Ok(None);
    }
    let path = profile
        .localhost_ref
        .strip_prefix("localhost/")
        .unwrap_or(&profile.localhost_ref);
    if !path.starts_with('/') || path.contains('\0') {
        return Err(SpecError::invalid(
            format!("{FIELD}.localhost_ref"),
            format!("{path:?} is not an absolute path"),
        ));
    }
    Ok(Some(path.into()))
}

/// `linux.seccomp` of a container with these capabilities.
pub(crate) fn seccomp(
    input: &ContainerInput<'_>,
    kernel: &HostFeatures,
    capabilities: Option<&LinuxCapabilities>,
) -> Result<Option<LinuxSeccomp>> {
    let Some(profile) = wanted(input.container)? else {
        return Ok(None);
    };
    let kind = kind(&profile)?;
    if kind == ProfileType::Unconfined {
        return Ok(None);
    }
    if !kernel.seccomp {
        return Err(SpecError::precondition(
            FIELD,
            "the kernel has no seccomp filters",
        ));
    }
    match kind {
        ProfileType::Localhost => {
            let Some(bytes) = &input.inputs.seccomp_profile else {
                return Err(SpecError::not_found(
                    format!("{FIELD}.localhost_ref"),
                    "not read from the node",
                ));
            };
            parse(bytes).map(Some)
        }
        _ => {
            let bounding = capabilities
                .and_then(|sets| sets.bounding().clone())
                .unwrap_or_default();
            Ok(Some(default_profile(&bounding)))
        }
    }
}

/// Docker's own format has conditions that the OCI format has not; leaving them out would change the filter's
/// meaning without a word.
fn parse(bytes: &[u8]) -> Result<LinuxSeccomp> {
    let field = || format!("{FIELD}.localhost_ref");
    let value: serde_json::Value = serde_json::from_slice(bytes)
        .map_err(|e| SpecError::invalid(field(), format!("the profile is not JSON: {e}")))?;
    let rules = value
        .get("syscalls")
        .and_then(|rules| rules.as_array())
        .into_iter()
        .flatten();
    let conditional = rules
        .into_iter()
        .any(|rule| rule.get("includes").is_some() || rule.get("excludes").is_some());
    if conditional || value.get("archMap").is_some() {
        let reason =
            "the profile is in Docker's format (archMap, includes, excludes), not the OCI runtime spec's";
        return Err(SpecError::invalid(field(), reason));
    }
    serde_json::from_value(value).map_err(|e| {
        SpecError::invalid(
            field(),
            format!("the profile is not one of the OCI runtime spec: {e}"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxSeccompAction;

    #[test]
    fn profiles_from_files() {
        let profile = parse(
            br#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
                 "syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":1,
                 "args":[{"index":0,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#,
        )
        .expect("a good profile");
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActAllow);
        for bad in [
            &b"{"[..],
            b"[]",
            br#"{"defaultAction":"SCMP_ACT_NOTHING"}"#,
            br#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[]}"#,
            br#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW","includes":{}}]}"#,
        ] {
            assert_eq!(parse(bad).expect_err("bad").field, "linux.security_context.seccomp.localhost_ref");
        }
    }
}
