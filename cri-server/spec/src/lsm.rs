//! AppArmor profiles and SELinux labels: honoured where the kernel has the module, refused where a container
//! asks for what the kernel cannot enforce.
//!
//! Two cases ask for nothing that could be missed and pass on any kernel: Unconfined, and AppArmor's
//! RuntimeDefault on a kernel without AppArmor, which is what every container there gets.

use catamaran_cri_api::v1::security_profile::ProfileType;
use catamaran_cri_api::v1::{LinuxContainerSecurityContext, SeLinuxOption, SecurityProfile};

use crate::error::{Result, SpecError};
use crate::host::{Apparmor, HostFeatures, SelinuxDefaults};
use crate::input::ContainerInput;

const APPARMOR: &str = "linux.security_context.apparmor";
const SELINUX: &str = "linux.security_context.selinux_options";

/// `process.apparmorProfile`. `None`: the runtime changes nothing.
pub(crate) fn apparmor_profile(
    security: Option<&LinuxContainerSecurityContext>,
    apparmor: &Apparmor,
) -> Result<Option<String>> {
    let Some(security) = security else {
        return default_profile(false, apparmor);
    };
    let profile = match &security.apparmor {
        Some(profile) => Some(profile.clone()),
        None => deprecated_profile(security)?,
    };
    let Some(profile) = profile else {
        return default_profile(security.privileged, apparmor);
    };
    match ProfileType::try_from(profile.profile_type) {
        Ok(ProfileType::Unconfined) => Ok(None),
        // A privileged container is confined only by a profile named for it.
        Ok(ProfileType::RuntimeDefault) if security.privileged => Ok(None),
        Ok(ProfileType::RuntimeDefault) => match apparmor {
            Apparmor::Absent => Ok(None),
            Apparmor::Enabled {
                default_profile: Some(name),
            } => Ok(Some(name.clone())),
            Apparmor::Enabled {
                default_profile: None,
            } => Err(SpecError::precondition(
                APPARMOR,
                format!(
                    "the profile {:?} is not loaded on the node",
                    crate::host::APPARMOR_DEFAULT_PROFILE
                ),
            )),
        },
        Ok(ProfileType::Localhost) => {
            let name = profile
                .localhost_ref
                .strip_prefix("localhost/")
                .unwrap_or(&profile.localhost_ref);
            if name.is_empty() || name.contains(['\0', '\n']) {
                return Err(SpecError::invalid(
                    format!("{APPARMOR}.localhost_ref"),
                    "names no profile",
                ));
            }
            match apparmor {
                Apparmor::Absent => Err(SpecError::precondition(APPARMOR, "the kernel has no AppArmor")),
                Apparmor::Enabled { .. } => Ok(Some(name.to_owned())),
            }
        }
        Err(unknown) => Err(SpecError::invalid(
            format!("{APPARMOR}.profile_type"),
            format!("unknown value {}", unknown.0),
        )),
    }
}

/// A container that says nothing gets the default where one is loaded.
fn default_profile(privileged: bool, apparmor: &Apparmor) -> Result<Option<String>> {
    match apparmor {
        Apparmor::Enabled { default_profile } if !privileged => Ok(default_profile.clone()),
        _ => Ok(None),
    }
}

#[allow(deprecated)] // older kubelets send this field alone
fn deprecated_profile(security: &LinuxContainerSecurityContext) -> Result<Option<SecurityProfile>> {
    profile_by_name(
        &security.apparmor_profile,
        "linux.security_context.apparmor_profile",
    )
}

/// The names of the time before SecurityProfile.
pub(crate) fn profile_by_name(name: &str, field: &str) -> Result<Option<SecurityProfile>> {
    let (profile_type, localhost_ref) = match name {
        "" => return Ok(None),
        "runtime/default" | "docker/default" => (ProfileType::RuntimeDefault, ""),
        "unconfined" => (ProfileType::Unconfined, ""),
        _ => match name.strip_prefix("localhost/") {
            Some(rest) => (ProfileType::Localhost, rest),
            None => return Err(SpecError::invalid(field, format!("unknown profile {name:?}"))),
        },
    };
    Ok(Some(SecurityProfile {
        profile_type: profile_type.into(),
        localhost_ref: localhost_ref.into(),
    }))
}

/// Labels of a container's process and of its files.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SelinuxLabels {
    pub(crate) process: String,
    pub(crate) mount: String,
}

/// The container's options, else the pod's. Without either no label is set: separating containers by generated
/// categories (MCS) is not done.
pub(crate) fn selinux_labels(
    input: &ContainerInput<'_>,
    kernel: &HostFeatures,
) -> Result<Option<SelinuxLabels>> {
    let security = input
        .container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let pod = input
        .pod
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let of_container = security.and_then(|security| security.selinux_options.as_ref());
    let of_pod = pod.and_then(|security| security.selinux_options.as_ref());
    let Some(options) = [of_container, of_pod]
        .into_iter()
        .flatten()
        .find(|options| asks(options))
    else {
        return Ok(None);
    };
    let Some(defaults) = &kernel.selinux else {
        return Err(SpecError::precondition(
            SELINUX,
            "the kernel has no SELinux, or it is disabled",
        ));
    };
    // As with any privileged container, nothing confines it.
    if security.is_some_and(|security| security.privileged) {
        return Ok(None);
    }
    labels(options, defaults).map(Some)
}

fn asks(options: &SeLinuxOption) -> bool {
    ![&options.user, &options.role, &options.r#type, &options.level]
        .into_iter()
        .all(String::is_empty)
}

fn labels(options: &SeLinuxOption, defaults: &SelinuxDefaults) -> Result<SelinuxLabels> {
    for (part, name) in [
        (&options.user, "user"),
        (&options.role, "role"),
        (&options.r#type, "type"),
        (&options.level, "level"),
    ] {
        let separator = name != "level" && part.contains(':');
        if separator || part.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(SpecError::invalid(
                format!("{SELINUX}.{name}"),
                format!("{part:?} is not part of a context"),
            ));
        }
    }
    let fill = |context: &str, with_type: bool| {
        let mut parts = context.splitn(4, ':');
        let mut next = |own: &str| {
            let default = parts.next().unwrap_or("");
            if own.is_empty() {
                default.to_owned()
            } else {
                own.to_owned()
            }
        };
        let (user, role) = (
            next(&options.user),
            next(if with_type { &options.role } else { "" }),
        );
        let kind = next(if with_type { &options.r#type } else { "" });
        [user, role, kind, next(&options.level)].join(":")
    };
    Ok(SelinuxLabels {
        process: fill(&defaults.process, true),
        mount: fill(&defaults.file, false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpecErrorKind::{FailedPrecondition, InvalidArgument};

    fn with(profile: Option<(ProfileType, &str)>, privileged: bool) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            apparmor: profile.map(|(kind, name)| SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: name.into(),
            }),
            privileged,
            ..Default::default()
        }
    }

    #[test]
    fn apparmor() {
        use ProfileType::{Localhost, RuntimeDefault, Unconfined};
        let loaded = Apparmor::Enabled {
            default_profile: Some("d".into()),
        };
        let unloaded = Apparmor::Enabled {
            default_profile: None,
        };
        type Expected<'a> = std::result::Result<Option<&'a str>, crate::SpecErrorKind>;
        type Case<'a> = (Option<(ProfileType, &'a str)>, bool, &'a Apparmor, Expected<'a>);
        let cases: &[Case<'_>] = &[
            (None, false, &loaded, Ok(Some("d"))),
            (None, true, &loaded, Ok(None)),
            (None, false, &unloaded, Ok(None)),
            (None, false, &Apparmor::Absent, Ok(None)),
            (Some((RuntimeDefault, "")), false, &loaded, Ok(Some("d"))),
            (Some((RuntimeDefault, "")), true, &loaded, Ok(None)),
            (
                Some((RuntimeDefault, "")),
                false,
                &unloaded,
                Err(FailedPrecondition),
            ),
            (Some((RuntimeDefault, "")), false, &Apparmor::Absent, Ok(None)),
            (Some((Unconfined, "")), false, &loaded, Ok(None)),
            (Some((Localhost, "p")), false, &loaded, Ok(Some("p"))),
            (Some((Localhost, "localhost/p")), true, &unloaded, Ok(Some("p"))),
            (
                Some((Localhost, "p")),
                false,
                &Apparmor::Absent,
                Err(FailedPrecondition),
            ),
            (Some((Localhost, "")), false, &loaded, Err(InvalidArgument)),
        ];
        for (profile, privileged, host, expected) in cases {
            let found = apparmor_profile(Some(&with(*profile, *privileged)), host).map_err(|e| e.kind);
            assert_eq!(
                found.as_ref().map(Option::as_deref).map_err(|kind| *kind),
                *expected,
                "{profile:?} {host:?}"
            );
        }
    }

    #[test]
    #[allow(deprecated)]
    fn names_of_old() {
        let security = LinuxContainerSecurityContext {
            apparmor_profile: "localhost/x".into(),
            ..Default::default()
        };
        let enabled = Apparmor::Enabled {
            default_profile: None,
        };
        assert_eq!(apparmor_profile(Some(&security), &enabled), Ok(Some("x".into())));
        let security = LinuxContainerSecurityContext {
            apparmor_profile: "x".into(),
            ..Default::default()
        };
        assert_eq!(
            apparmor_profile(Some(&security), &enabled).map_err(|e| e.kind),
            Err(InvalidArgument)
        );
    }

    #[test]
    fn selinux() {
        let defaults = SelinuxDefaults {
            process: "system_u:system_r:container_t:s0".into(),
            file: "system_u:object_r:container_file_t:s0".into(),
        };
        let options = SeLinuxOption {
            r#type: "spc_t".into(),
            level: "s0:c1,c2".into(),
            ..Default::default()
        };
        let found = labels(&options, &defaults).expect("ok");
        assert_eq!(found.process, "system_u:system_r:spc_t:s0:c1,c2");
        assert_eq!(found.mount, "system_u:object_r:container_file_t:s0:c1,c2");
        let options = SeLinuxOption {
            user: "a:b".into(),
            ..Default::default()
        };
        assert_eq!(
            labels(&options, &defaults).expect_err("separator").field,
            format!("{SELINUX}.user")
        );
    }
}
