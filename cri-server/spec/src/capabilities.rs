//! Capability sets, capabilities(7), from the CRI's add, drop and ambient lists.

use catamaran_cri_api::v1::LinuxContainerSecurityContext;
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use crate::error::{Result, SpecError};

/// All capabilities in the order of their numbers in the kernel's linux/capability.h.
const BY_NUMBER: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// What a container has if it asks for nothing; the same set under every CRI runtime.
const DEFAULT: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

const FIELD: &str = "linux.security_context.capabilities";

/// The set of a mask as /proc/pid/status prints it.
pub(crate) fn from_mask(mask: u64) -> Capabilities {
    let named = BY_NUMBER.iter().enumerate();
    named
        .filter(|(number, _)| mask & (1 << number) != 0)
        .map(|(_, capability)| *capability)
        .collect()
}

/// The sets of a container's first process. `available` is the most that can be given.
///
/// Order as with containerd: ALL in either list first, then single additions, then single removals. Ambient
/// capabilities (KEP-2763) are in every other set too, as the kernel demands. The inheritable set is otherwise
/// empty (CVE-2022-24769).
pub(crate) fn capabilities(
    security: Option<&LinuxContainerSecurityContext>,
    available: &Capabilities,
) -> Result<LinuxCapabilities> {
    if security.is_some_and(|security| security.privileged) {
        return Ok(sets(available.clone(), Capabilities::new()));
    }
    let mut set: Capabilities = DEFAULT.into_iter().filter(|c| available.contains(c)).collect();
    let mut ambient = Capabilities::new();
    if let Some(lists) = security.and_then(|security| security.capabilities.as_ref()) {
        let add = List::parse(&lists.add_capabilities, "add_capabilities")?;
        let drop = List::parse(&lists.drop_capabilities, "drop_capabilities")?;
        let raise = List::parse(&lists.add_ambient_capabilities, "add_ambient_capabilities")?;
        add.check(available, "add_capabilities")?;
        raise.check(available, "add_ambient_capabilities")?;
        if add.all {
            set.clone_from(available);
        }
        if drop.all {
            set.clear();
        }
        set.extend(&add.named);
        set.retain(|capability| !drop.named.contains(capability));
        if raise.all {
            ambient.clone_from(available);
        }
        ambient.extend(raise.named);
        set.extend(&ambient);
    }
    Ok(sets(set, ambient))
}

fn sets(set: Capabilities, ambient: Capabilities) -> LinuxCapabilities {
    let ambient = (!ambient.is_empty()).then_some(ambient);
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(set.clone()))
        .set_effective(Some(set.clone()))
        .set_permitted(Some(set))
        .set_inheritable(ambient.clone())
        .set_ambient(ambient);
    capabilities
}

struct List {
    all: bool,
    named: Vec<Capability>,
}

impl List {
    /// Names come with and without `CAP_`, in either case.
    fn parse(names: &[String], which: &str) -> Result<List> {
        let mut list = List {
            all: false,
            named: Vec::new(),
        };
        for name in names {
            let upper = name.to_ascii_uppercase();
            let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
            if bare == "ALL" {
                list.all = true;
            } else {
                let capability = bare.parse().map_err(|_| {
                    SpecError::invalid(format!("{FIELD}.{which}"), format!("unknown capability {name:?}"))
                })?;
                list.named.push(capability);
            }
        }
        Ok(list)
    }

    fn check(&self, available: &Capabilities, which: &str) -> Result<()> {
        match self
            .named
            .iter()
            .find(|capability| !available.contains(capability))
        {
            None => Ok(()),
            Some(missing) => Err(SpecError::precondition(
                format!("{FIELD}.{which}"),
                format!(
                    "CAP_{missing} is not in the bounding set of the node's runtime, so no container can have it"
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpecErrorKind;
    use catamaran_cri_api::v1;

    fn of(add: &[&str], drop: &[&str], ambient: &[&str]) -> Result<LinuxCapabilities> {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let security = LinuxContainerSecurityContext {
            capabilities: Some(v1::Capability {
                add_capabilities: list(add),
                drop_capabilities: list(drop),
                add_ambient_capabilities: list(ambient),
            }),
            ..Default::default()
        };
        // Everything but CAP_SYS_RESOURCE.
        capabilities(Some(&security), &from_mask(!(1 << 24)))
    }

    fn bounding(sets: &LinuxCapabilities) -> Vec<String> {
        let mut names: Vec<String> = sets
            .bounding()
            .iter()
            .flatten()
            .map(ToString::to_string)
            .collect();
        names.sort();
        names
    }

    #[test]
    fn defaults() {
        let sets = capabilities(None, &from_mask(u64::MAX)).expect("default");
        assert_eq!(bounding(&sets).len(), 14);
        assert_eq!(sets.permitted(), sets.bounding());
        assert_eq!(sets.effective(), sets.bounding());
        assert_eq!((sets.inheritable(), sets.ambient()), (&None, &None));
        // Without CAP_MKNOD in the daemon's bounding set nobody asked for it, so it just is not there.
        let without = capabilities(None, &from_mask(!(1 << 27))).expect("default");
        assert_eq!(bounding(&without).len(), 13);
    }

    #[test]
    fn add_and_drop() {
        assert_eq!(
            bounding(&of(&["NET_ADMIN"], &["ALL"], &[]).expect("ok")),
            ["NET_ADMIN"]
        );
        assert_eq!(
            bounding(&of(&["cap_net_admin"], &["all"], &[]).expect("ok")),
            ["NET_ADMIN"]
        );
        assert!(bounding(&of(&["ALL"], &["ALL"], &[]).expect("ok")).is_empty());
        let most = bounding(&of(&["ALL"], &["CHOWN"], &[]).expect("ok"));
        assert_eq!(most.len(), 39);
        assert!(!most.contains(&"CHOWN".to_owned()) && !most.contains(&"SYS_RESOURCE".to_owned()));
        assert_eq!(bounding(&of(&[], &["KILL"], &[]).expect("ok")).len(), 13);
        assert!(bounding(&of(&["KILL"], &["KILL", "ALL"], &[]).expect("ok")).is_empty());
    }

    #[test]
    fn ambient_is_in_every_set() {
        let sets = of(&[], &["ALL"], &["NET_BIND_SERVICE"]).expect("ok");
        let expected = Some([Capability::NetBindService].into_iter().collect::<Capabilities>());
        for set in [
            sets.ambient(),
            sets.inheritable(),
            sets.permitted(),
            sets.effective(),
            sets.bounding(),
        ] {
            assert_eq!(set, &expected);
        }
    }

    #[test]
    fn refused() {
        let error = of(&["NET_ADMIM"], &[], &[]).expect_err("unknown");
        assert_eq!(error.kind, SpecErrorKind::InvalidArgument);
        assert_eq!(
            error.field,
            "linux.security_context.capabilities.add_capabilities"
        );
        let error = of(&["SYS_RESOURCE"], &[], &[]).expect_err("the daemon lacks it");
        assert_eq!(error.kind, SpecErrorKind::FailedPrecondition);
        assert!(error.reason.starts_with("CAP_SYS_RESOURCE "), "{}", error.reason);
        assert!(of(&[], &["nothing"], &[]).is_err());
    }

    #[test]
    fn privileged_has_all_there_is() {
        let security = LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        let sets = capabilities(Some(&security), &from_mask(0b11)).expect("ok");
        assert_eq!(bounding(&sets), ["CHOWN", "DAC_OVERRIDE"]);
    }
}
