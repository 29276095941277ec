//! Whatever a client sends, the answer is a spec or an error that names a field; a spec survives its JSON.

mod fixture;

use catamaran_cri_api::v1::{
    Capability, ContainerConfig, Device, HugepageLimit, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, Mount, NamespaceOption, SecurityProfile,
};
use catamaran_spec::{
    HostFeatures, ImageUsers, MountSource, RuntimeFeatures, Side, SourcePropagation, apply_resources,
    exec_process, stop_signal, validate_pod,
};
use fixture::{Fixture, image};
use oci_spec::image::ConfigBuilder;
use oci_spec::runtime::{LinuxResources, Spec};
use proptest::collection::{hash_map, vec};
use proptest::prelude::*;

/// Mostly a value that means something in its field, sometimes one of another field or anything.
fn word(good: &'static [&'static str]) -> impl Strategy<Value = String> {
    let any_field = [
        "",
        "ALL",
        "root:root",
        "-1",
        "/",
        "/a/../..",
        "/dev",
        "rwm",
        "localhost/x",
        "2-1",
        "A=B",
        "a\0b",
        "memory.max",
    ];
    prop_oneof![
        60 => proptest::sample::select(good).prop_map(str::to_owned),
        2 => proptest::sample::select(any_field.to_vec()).prop_map(str::to_owned),
        1 => ".{0,12}",
    ]
}

fn text() -> impl Strategy<Value = String> {
    word(&["sh", "-c", "a b", "A", "x=1", "\u{e9}"])
}

fn capability() -> impl Strategy<Value = String> {
    word(&["ALL", "CAP_CHOWN", "net_admin", "SYS_PTRACE"])
}

fn path() -> impl Strategy<Value = String> {
    word(&[
        "/a",
        "/a/b",
        "/dev/shm",
        "/etc/hosts",
        "/proc/x",
        "/dev",
        "/a/./b/",
    ])
}

/// A number that limits take as "not set" or as a value, or any.
fn number() -> impl Strategy<Value = i64> {
    prop_oneof![30 => Just(0), 20 => 1000..100_000i64, 1 => Just(-1), 1 => any::<i64>()]
}

fn mode() -> impl Strategy<Value = i32> {
    prop_oneof![30 => 0..2i32, 1 => any::<i32>()]
}

prop_compose! {
    fn security()(
        lists in (vec(capability(), 0..3), vec(capability(), 0..3), vec(capability(), 0..2)),
        flags in any::<(bool, bool, bool)>(),
        ids in (proptest::option::of(number()), proptest::option::of(number()), word(&["", "0", "17"])),
        groups in (vec(number(), 0..3), mode()),
        modes in (mode(), mode(), mode()),
        profiles in (proptest::option::of((mode(), path())), proptest::option::of((mode(), path()))),
        paths in (vec(path(), 0..2), vec(path(), 0..2)),
    ) -> LinuxContainerSecurityContext {
        let profile = |(profile_type, localhost_ref)| SecurityProfile { profile_type, localhost_ref };
        LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: lists.0, drop_capabilities: lists.1, add_ambient_capabilities: lists.2,
            }),
            privileged: flags.0,
            readonly_rootfs: flags.1,
            no_new_privs: flags.2,
            run_as_user: ids.0.map(|value| Int64Value { value }),
            run_as_group: ids.1.map(|value| Int64Value { value }),
            run_as_username: ids.2,
            supplemental_groups: groups.0,
            supplemental_groups_policy: groups.1,
            namespace_options: Some(NamespaceOption {
                network: modes.0, pid: modes.1, ipc: modes.2, ..Default::default()
            }),
            seccomp: profiles.0.map(profile),
            apparmor: profiles.1.map(profile),
            masked_paths: paths.0,
            readonly_paths: paths.1,
            ..Default::default()
        }
    }
}

prop_compose! {
    fn resources()(
        cpu in (number(), number(), number()),
        memory in (number(), number(), number()),
        sets in (word(&["", "0-1", "0,3"]), word(&["", "0"])),
        pages in vec((word(&["2MB", "1GB"]), prop_oneof![4 => Just(0), 1 => any::<u64>()]), 0..2),
        unified in hash_map(word(&["memory.max", "io.weight"]), text(), 0..2),
    ) -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_period: cpu.0,
            cpu_quota: cpu.1,
            cpu_shares: cpu.2,
            memory_limit_in_bytes: memory.0,
            memory_swap_limit_in_bytes: memory.1,
            oom_score_adj: memory.2,
            cpuset_cpus: sets.0,
            cpuset_mems: sets.1,
            hugepage_limits: pages.into_iter().map(|(page_size, limit)| HugepageLimit { page_size, limit }).collect(),
            unified: unified.into_iter().collect(),
        }
    }
}

prop_compose! {
    fn container()(
        words in (vec(text(), 0..3), vec(text(), 0..3), word(&["", "/", "/srv"])),
        envs in vec((word(&["A", "B", "TERM"]), text()), 0..3),
        mounts in vec((path(), proptest::sample::select(vec![(false, false), (true, false), (true, true)]), mode()), 0..4),
        devices in vec((path(), word(&["rwm", "r"])), 0..2),
        tty in any::<bool>(),
        linux in proptest::option::of((proptest::option::of(security()), proptest::option::of(resources()))),
        stop_signal in mode(),
    ) -> ContainerConfig {
        ContainerConfig {
            command: words.0,
            args: words.1,
            working_dir: words.2,
            envs: envs.into_iter().map(|(key, value)| KeyValue { key, value }).collect(),
            mounts: mounts.into_iter().map(|(container_path, (readonly, recursive_read_only), propagation)| Mount {
                container_path, readonly, recursive_read_only, propagation, ..Default::default()
            }).collect(),
            devices: devices.into_iter().map(|(container_path, permissions)| Device {
                container_path, permissions, ..Default::default()
            }).collect(),
            tty,
            linux: linux.map(|(security_context, resources)| LinuxContainerConfig { resources, security_context }),
            stop_signal,
            ..Default::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_spec_or_an_error(
        container in container(),
        guest in any::<bool>(),
        from_image in (word(&["", "0", "1:2"]), vec(text(), 0..3), vec(text(), 0..3), word(&["", "SIGTERM"])),
        users in proptest::option::of(vec(any::<u8>(), 0..60)),
    ) {
        let mut fixture = if guest { Fixture::in_guest() } else { Fixture::default() };
        let config = ConfigBuilder::default()
            .user(from_image.0).env(from_image.1).cmd(from_image.2).stop_signal(from_image.3)
            .build().expect("image config");
        fixture.image = image(config);
        fixture.users = ImageUsers { passwd: users.clone(), group: users };
        fixture.pod_linux().security_context.get_or_insert_default().privileged = true;
        let source = MountSource { path: "/data".into(), propagation: SourcePropagation::Shared };
        fixture.inputs.mounts = vec![Some(source); container.mounts.len()];
        fixture.inputs.devices = vec![vec![]; container.devices.len()];
        fixture.container = container;
        let _ = stop_signal(&fixture.container, &fixture.image);
        match fixture.spec() {
            Ok(spec) => {
                let json = serde_json::to_vec(&spec).expect("json");
                let read: Spec = serde_json::from_slice(&json).expect("reads back");
                prop_assert_eq!(&read, &spec);
                prop_assert!(exec_process(&spec, &["ls".into()], true).is_ok());
            }
            Err(error) => prop_assert!(!error.field.is_empty() && !error.reason.is_empty()),
        }
    }

    #[test]
    fn updates(first in resources(), second in resources()) {
        let host = HostFeatures::guest("n");
        if let Ok(resources) = apply_resources(&LinuxResources::default(), &first, &host)
            && let Ok(updated) = apply_resources(&resources, &second, &host)
        {
            // Nothing is lost by an update that does not speak of it.
            let (old, new) = (resources.cpu().clone().unwrap_or_default(), updated.cpu().clone().unwrap_or_default());
            prop_assert!(second.cpu_shares != 0 || old.shares() == new.shares());
            prop_assert!(second.cpu_quota != 0 || old.quota() == new.quota());
        }
    }

    #[test]
    fn pods(hostname in word(&["", "pod-1"]), sysctls in hash_map(word(&["net.core.somaxconn", "kernel.panic", "net/a.b/c"]), text(), 0..3), modes in (mode(), mode(), mode()), guest in any::<bool>()) {
        let mut fixture = Fixture::default();
        fixture.pod.hostname = hostname;
        let linux = fixture.pod_linux();
        linux.sysctls = sysctls.into_iter().collect();
        linux.security_context.get_or_insert_default().namespace_options = Some(NamespaceOption {
            network: modes.0, pid: modes.1, ipc: modes.2, ..Default::default()
        });
        let side = if guest { Side::Guest } else { Side::Host };
        if let Err(error) = validate_pod(&fixture.pod, side, &RuntimeFeatures::default()) {
            prop_assert!(!error.field.is_empty() && !error.reason.is_empty());
        }
    }
}
