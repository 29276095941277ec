//! The seccomp filter of a container: none, the default profile, or a profile file of the node.

use std::path::PathBuf;

use catamaran_cri_api::v1::security_profile::ProfileType;
use catamaran_cri_api::v1::{ContainerConfig, SecurityProfile};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, LinuxSeccomp};

use crate::error::{Result, SpecError};
use crate::host::HostFeatures;
use crate::input::ContainerInput;
use crate::lsm::profile_by_name;
use crate::seccomp_default::default_profile;
use crate::seccomp_docker;

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
    let bounding = capabilities
        .and_then(|sets| sets.bounding().clone())
        .unwrap_or_default();
    match kind {
        ProfileType::Localhost => {
            let Some(bytes) = &input.inputs.seccomp_profile else {
                return Err(SpecError::not_found(
                    format!("{FIELD}.localhost_ref"),
                    "not read from the node",
                ));
            };
            parse(bytes, &bounding, input.inputs.kernel).map(Some)
        }
        _ => Ok(Some(default_profile(&bounding))),
    }
}

/// A profile file, of the OCI runtime spec or in Docker's format, whose conditions are decided for a container with
/// this bounding set on this kernel.
fn parse(bytes: &[u8], bounding: &Capabilities, kernel: (u32, u32)) -> Result<LinuxSeccomp> {
    let invalid = |reason: String| SpecError::invalid(format!("{FIELD}.localhost_ref"), reason);
    let mut value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| invalid(format!("the profile is not JSON: {e}")))?;
    seccomp_docker::resolve(&mut value, bounding, kernel)
        .map_err(|reason| invalid(format!("the profile cannot be used: {reason}")))?;
    serde_json::from_value(value).map_err(|e| {
        invalid(format!(
            "the profile is neither one of the OCI runtime spec nor in Docker's format: {e}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{Capability, LinuxSeccompAction};

    fn parse(bytes: &[u8]) -> Result<LinuxSeccomp> {
        let bounding = [Capability::SysAdmin].into_iter().collect();
        super::parse(bytes, &bounding, (6, 1))
    }

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
            br#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"SCMP_ARCH_X86"}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW","includes":{"moon":1}}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"new"}}]}"#,
        ] {
            assert_eq!(parse(bad).expect_err("bad").field, "linux.security_context.seccomp.localhost_ref");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn dockers_format_is_decided_for_the_container() {
        let profile = parse(
            br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"archMap":[
                {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]},
                {"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]}],
              "syscalls":[
                {"names":["all"],"action":"SCMP_ACT_ALLOW","args":null,"comment":"x","includes":{},"excludes":{}},
                {"name":"single","action":"SCMP_ACT_ALLOW","args":[]},
                {"names":["admin"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
                {"names":["both"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN","CAP_SYS_BOOT"]}},
                {"names":["boot"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_BOOT"]}},
                {"names":["plain"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]}},
                {"names":["here"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64","x32"]}},
                {"names":["there"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"]}},
                {"names":["not_here"],"action":"SCMP_ACT_ALLOW","excludes":{"arches":["amd64"]}},
                {"names":["old"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
                {"names":["future"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"6.10"}}]}"#,
        )
        .expect("Docker's format");
        let rules = profile.syscalls().as_ref().expect("rules").iter();
        let names: Vec<&String> = rules.flat_map(|rule| rule.names()).collect();
        assert_eq!(names, ["all", "single", "admin", "here", "old"]);
        let architectures = serde_json::to_value(profile.architectures()).expect("json");
        assert_eq!(
            architectures,
            serde_json::json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
        );
    }
}
