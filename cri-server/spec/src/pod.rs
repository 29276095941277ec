//! Which pods are refused before anything is made for them.

use catamaran_cri_api::v1::{NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace};

use crate::error::{Result, SpecError};
use crate::host::RuntimeFeatures;
use crate::input::Side;
use crate::namespaces::refuse_in_guest;

/// Longest hostname of Linux.
const HOSTNAME_MAX: usize = 64;

/// Checks everything of a pod's configuration that decides whether its namespaces or VM can be made as asked.
/// Port mappings are the network's to check.
///
/// The pod's seccomp and AppArmor profiles are not looked at: they are for a sandbox process, and there is none.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn validate_pod(pod: &PodSandboxConfig, side: Side, runtime: &RuntimeFeatures) -> Result<()> {
    let metadata = pod
        .metadata
        .as_ref()
        .ok_or_else(|| SpecError::invalid("config.metadata", "missing"))?;
    for (value, name) in [
        (&metadata.name, "name"),
        (&metadata.uid, "uid"),
        (&metadata.namespace, "namespace"),
    ] {
        if value.is_empty() {
            return Err(SpecError::invalid(format!("config.metadata.{name}"), "empty"));
        }
    }
    hostname(&pod.hostname)?;
    if let Some(dns) = &pod.dns_config {
        for (list, name) in [
            (&dns.servers, "servers"),
            (&dns.searches, "searches"),
            (&dns.options, "options"),
        ] {
            // Each becomes a word of a line in resolv.conf.
            if let Some(bad) = list
                .iter()
                .find(|word| word.contains(|c: char| c.is_whitespace() || c.is_control()))
            {
                return Err(SpecError::invalid(
                    format!("config.dns_config.{name}"),
                    format!("{bad:?} is not one word"),
                ));
            }
        }
    }
    if pod.windows.is_some() {
        return Err(SpecError::invalid("config.windows", "this is a Linux node"));
    }
    let Some(linux) = &pod.linux else { return Ok(()) };
    if linux.cgroup_parent.split('/').any(|part| part == "..") || linux.cgroup_parent.contains('\0') {
        return Err(SpecError::invalid(
            "config.linux.cgroup_parent",
            "contains .. or a NUL byte",
        ));
    }
    let options = linux
        .security_context
        .as_ref()
        .and_then(|security| security.namespace_options.clone());
    let options = options.unwrap_or_default();
    namespaces(&options, side, runtime)?;
    for (name, value) in &linux.sysctls {
        sysctl(name, value, &options, side)?;
    }
    Ok(())
}

fn hostname(name: &str) -> Result<()> {
    let good = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' || byte == b'_');
    if name.len() > HOSTNAME_MAX || !good {
        let reason = format!("{name:?} is not a hostname of at most {HOSTNAME_MAX} characters");
        return Err(SpecError::invalid("config.hostname", reason));
    }
    Ok(())
}

const OPTIONS: &str = "config.linux.security_context.namespace_options";

fn namespaces(options: &NamespaceOption, side: Side, runtime: &RuntimeFeatures) -> Result<()> {
    for (value, name) in [
        (options.network, "network"),
        (options.pid, "pid"),
        (options.ipc, "ipc"),
    ] {
        let mode = NamespaceMode::try_from(value).map_err(|unknown| {
            SpecError::invalid(
                format!("{OPTIONS}.{name}"),
                format!("unknown value {}", unknown.0),
            )
        })?;
        let possible = match mode {
            NamespaceMode::Pod | NamespaceMode::Node => true,
            NamespaceMode::Container => name == "pid",
            NamespaceMode::Target => false,
        };
        if !possible {
            let reason = format!("{} is not a namespace mode of a pod's {name}", mode.as_str_name());
            return Err(SpecError::invalid(format!("{OPTIONS}.{name}"), reason));
        }
    }
    if side == Side::Guest {
        refuse_in_guest(options, OPTIONS)?;
    }
    match &options.userns_options {
        Some(user) => user_namespace(user, options, runtime),
        None => Ok(()),
    }
}

fn user_namespace(user: &UserNamespace, options: &NamespaceOption, runtime: &RuntimeFeatures) -> Result<()> {
    let field = format!("{OPTIONS}.userns_options");
    let mapped = !user.uids.is_empty() || !user.gids.is_empty();
    match NamespaceMode::try_from(user.mode) {
        Ok(NamespaceMode::Node) if mapped => Err(SpecError::invalid(field, "mode NODE with id mappings")),
        Ok(NamespaceMode::Node) => Ok(()),
        Ok(NamespaceMode::Pod) => {
            let ([uids], [gids]) = (user.uids.as_slice(), user.gids.as_slice()) else {
                return Err(SpecError::invalid(
                    field,
                    "there must be one mapping of uids and one of gids",
                ));
            };
            if uids != gids {
                return Err(SpecError::invalid(field, "uids and gids must be mapped alike"));
            }
            let end = u64::from(uids.host_id) + u64::from(uids.length);
            if uids.length == 0 || uids.container_id != 0 || end > u64::from(u32::MAX) {
                return Err(SpecError::invalid(
                    field,
                    "the mapping must begin with id 0, not be empty and fit 32 bits",
                ));
            }
            if options.pid() == NamespaceMode::Node || options.ipc() == NamespaceMode::Node {
                let reason = "a pod with a user namespace cannot be in the node's PID or IPC namespace";
                return Err(SpecError::invalid(field, reason));
            }
            if options.network() == NamespaceMode::Node {
                let reason = "a pod in the node's network cannot have a user namespace \
                              (see Status, features.user_namespaces_host_network)";
                return Err(SpecError::invalid(field, reason));
            }
            if !runtime.user_namespaces {
                let reason = "the handler offers no user namespaces (see Status, runtime_handlers)";
                return Err(SpecError::precondition(field, reason));
            }
            Ok(())
        }
        _ => Err(SpecError::invalid(field, "mode is neither POD nor NODE")),
    }
}

/// A sysctl reaches only the pod if it belongs to one of the pod's own namespaces, or if the kernel is its own.
fn sysctl(name: &str, value: &str, options: &NamespaceOption, side: Side) -> Result<()> {
    let field = || format!("config.linux.sysctls[{name}]");
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | ':' | '@' | '*');
    // With slashes, dots may be part of an interface's name (net/ipv4/conf/eth0.1/…).
    let separator = if name.contains('/') { '/' } else { '.' };
    let well_formed = name.split(separator).all(|part| {
        !part.is_empty()
            && part != ".."
            && part != "."
            && part.chars().all(|c| word(c) || (separator == '/' && c == '.'))
    });
    if !well_formed || !name.contains(separator) {
        return Err(SpecError::invalid(field(), "not the name of a sysctl"));
    }
    if value.contains('\0') {
        return Err(SpecError::invalid(field(), "the value contains a NUL byte"));
    }
    if side == Side::Guest {
        return Ok(());
    }
    let name = if separator == '/' {
        name.replace('/', ".")
    } else {
        name.to_owned()
    };
    let node = NamespaceMode::Node;
    let of_ipc = ["kernel.shm", "kernel.msg", "fs.mqueue."]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        || name == "kernel.sem"
        || name == "kernel.shm_rmid_forced";
    let (shared, what) = if name.starts_with("net.") {
        (options.network() == node, "network")
    } else if of_ipc {
        (options.ipc() == node, "IPC")
    } else {
        return Err(SpecError::invalid(
            field(),
            "not a sysctl of a network or IPC namespace; it would change the node",
        ));
    };
    if shared {
        let reason = format!("the pod is in the node's {what} namespace; it would change the node");
        return Err(SpecError::invalid(field(), reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpecErrorKind::{self, FailedPrecondition, InvalidArgument, Unimplemented};
    use catamaran_cri_api::v1::{
        DnsConfig, IdMapping, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, PodSandboxMetadata,
    };

    fn pod(
        change: impl FnOnce(&mut PodSandboxConfig, &mut LinuxPodSandboxConfig, &mut NamespaceOption),
    ) -> PodSandboxConfig {
        let metadata = PodSandboxMetadata {
            name: "n".into(),
            uid: "u".into(),
            namespace: "ns".into(),
            attempt: 0,
        };
        let mut pod = PodSandboxConfig {
            metadata: Some(metadata),
            ..Default::default()
        };
        let (mut linux, mut options) = (LinuxPodSandboxConfig::default(), NamespaceOption::default());
        change(&mut pod, &mut linux, &mut options);
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        };
        linux.security_context = Some(security);
        pod.linux = Some(linux);
        pod
    }

    fn check(
        side: Side,
        change: impl FnOnce(&mut PodSandboxConfig, &mut LinuxPodSandboxConfig, &mut NamespaceOption),
    ) -> std::result::Result<(), (SpecErrorKind, String)> {
        let features = RuntimeFeatures {
            user_namespaces: true,
            ..Default::default()
        };
        validate_pod(&pod(change), side, &features).map_err(|e| (e.kind, e.field))
    }

    const NODE: i32 = NamespaceMode::Node as i32;

    #[test]
    fn host_namespaces_in_a_vm() {
        for side in [Side::Host, Side::Guest] {
            assert_eq!(check(side, |_, _, _| {}), Ok(()));
            assert_eq!(
                check(side, |_, _, o| o.pid = NamespaceMode::Container.into()),
                Ok(())
            );
        }
        assert_eq!(
            check(Side::Host, |_, _, o| (o.network, o.pid, o.ipc) =
                (NODE, NODE, NODE)),
            Ok(())
        );
        let refused = |name: &str| Err((InvalidArgument, format!("{OPTIONS}.{name}")));
        assert_eq!(check(Side::Guest, |_, _, o| o.network = NODE), refused("network"));
        assert_eq!(check(Side::Guest, |_, _, o| o.pid = NODE), refused("pid"));
        assert_eq!(check(Side::Guest, |_, _, o| o.ipc = NODE), refused("ipc"));
        assert_eq!(
            check(Side::Host, |_, _, o| o.pid = NamespaceMode::Target.into()),
            refused("pid")
        );
        assert_eq!(
            check(Side::Host, |_, _, o| o.ipc = NamespaceMode::Container.into()),
            refused("ipc")
        );
        assert_eq!(check(Side::Host, |_, _, o| o.network = 17), refused("network"));
    }

    #[test]
    fn the_reason_names_the_kubernetes_field() {
        let error = validate_pod(
            &pod(|_, _, o| o.network = NODE),
            Side::Guest,
            &RuntimeFeatures::default(),
        );
        assert!(error.expect_err("refused").to_string().contains("hostNetwork"));
    }

    #[test]
    fn sysctls() {
        let of = |name: &str, side, options: NamespaceOption| {
            check(side, |_, linux, o| {
                linux.sysctls.insert(name.into(), "1".into());
                *o = options;
            })
            .map_err(|(kind, _)| kind)
        };
        let own = NamespaceOption::default;
        for name in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.1/forwarding",
            "kernel.shm_rmid_forced",
            "kernel.sem",
            "fs.mqueue.msg_max",
        ] {
            assert_eq!(of(name, Side::Host, own()), Ok(()), "{name}");
            assert_eq!(of(name, Side::Guest, own()), Ok(()), "{name}");
        }
        for name in [
            "kernel.panic",
            "vm.swappiness",
            "kernel.domainname",
            "kernel.semaphore",
            "network.x",
        ] {
            assert_eq!(of(name, Side::Host, own()), Err(InvalidArgument), "{name}");
            assert_eq!(of(name, Side::Guest, own()), Ok(()), "{name}");
        }
        for name in [
            "",
            "net",
            "net..x",
            "net/../kernel/panic",
            "net/./x",
            "net.ipv4\n.x",
            "/net/x",
            "net.a b",
        ] {
            assert_eq!(of(name, Side::Host, own()), Err(InvalidArgument), "{name:?}");
            assert_eq!(of(name, Side::Guest, own()), Err(InvalidArgument), "{name:?}");
        }
        let host_network = NamespaceOption {
            network: NODE,
            ..own()
        };
        assert_eq!(
            of("net.ipv4.ip_forward", Side::Host, host_network.clone()),
            Err(InvalidArgument)
        );
        assert_eq!(of("kernel.sem", Side::Host, host_network), Ok(()));
        assert_eq!(
            of("kernel.sem", Side::Host, NamespaceOption { ipc: NODE, ..own() }),
            Err(InvalidArgument)
        );
    }

    #[test]
    fn user_namespaces() {
        let mapping = |host_id, length| IdMapping {
            host_id,
            container_id: 0,
            length,
        };
        let of = |user: UserNamespace, side| {
            check(side, |_, _, o| o.userns_options = Some(user)).map_err(|(kind, _)| kind)
        };
        let good = || UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: vec![mapping(65536, 65536)],
            gids: vec![mapping(65536, 65536)],
        };
        assert_eq!(of(good(), Side::Host), Ok(()));
        assert_eq!(of(good(), Side::Guest), Err(Unimplemented));
        assert_eq!(
            of(
                UserNamespace {
                    mode: NODE,
                    ..Default::default()
                },
                Side::Guest
            ),
            Ok(())
        );
        for bad in [
            UserNamespace { mode: NODE, ..good() },
            UserNamespace {
                mode: NamespaceMode::Container.into(),
                ..good()
            },
            UserNamespace {
                uids: vec![],
                ..good()
            },
            UserNamespace {
                uids: vec![mapping(1, 1)],
                ..good()
            },
            UserNamespace {
                uids: vec![mapping(65536, 0)],
                gids: vec![mapping(65536, 0)],
                ..good()
            },
            UserNamespace {
                uids: vec![mapping(u32::MAX, 2)],
                gids: vec![mapping(u32::MAX, 2)],
                ..good()
            },
        ] {
            assert_eq!(of(bad.clone(), Side::Host), Err(InvalidArgument), "{bad:?}");
        }
        let with_pid = pod(|_, _, o| {
            o.userns_options = Some(good());
            o.pid = NODE;
        });
        let with_network = pod(|_, _, o| {
            o.userns_options = Some(good());
            o.network = NODE;
        });
        let able = RuntimeFeatures {
            user_namespaces: true,
            ..Default::default()
        };
        for pod in [with_pid, with_network] {
            let refused = validate_pod(&pod, Side::Host, &able).map_err(|e| e.kind);
            assert_eq!(refused, Err(InvalidArgument));
        }
        let plain = pod(|_, _, o| o.userns_options = Some(good()));
        let unable = validate_pod(&plain, Side::Host, &RuntimeFeatures::default());
        assert_eq!(unable.map_err(|e| e.kind), Err(FailedPrecondition));
    }

    #[test]
    fn names_and_words() {
        let field = |result: std::result::Result<(), (SpecErrorKind, String)>| result.expect_err("refused").1;
        assert_eq!(
            field(check(Side::Host, |p, _, _| p.metadata = None)),
            "config.metadata"
        );
        let no_uid =
            |p: &mut PodSandboxConfig, _: &mut _, _: &mut _| p.metadata.as_mut().expect("set").uid.clear();
        assert_eq!(field(check(Side::Host, no_uid)), "config.metadata.uid");
        for name in ["a b", "x\n", &"a".repeat(65)] {
            assert_eq!(
                field(check(Side::Host, |p, _, _| p.hostname = name.into())),
                "config.hostname"
            );
        }
        let dns = DnsConfig {
            searches: vec!["ok".into(), "x\nnameserver 1.2.3.4".into()],
            ..Default::default()
        };
        assert_eq!(
            field(check(Side::Host, |p, _, _| p.dns_config = Some(dns))),
            "config.dns_config.searches"
        );
        assert_eq!(
            field(check(Side::Host, |_, l, _| l.cgroup_parent = "/a/../b".into())),
            "config.linux.cgroup_parent"
        );
    }
}
