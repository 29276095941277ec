//! The whole spec, for containers of both sides.

mod fixture;

use std::path::{Path, PathBuf};

use catamaran_cri_api::v1::{
    CdiDevice, Device, IdMapping, ImageSpec, LinuxContainerResources, Mount as CriMount, MountPropagation,
    NamespaceMode, NamespaceOption, SeLinuxOption, SecurityProfile, UserNamespace as CriUserNamespace,
    WindowsContainerConfig, security_profile::ProfileType,
};
use catamaran_spec::{
    CgroupVersion, HostFeatures, MountSource, PidNamespace, SelinuxDefaults, SourcePropagation,
    SpecErrorKind, UserNamespace,
};
use fixture::{Fixture, mount_at};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxIdMappingBuilder, LinuxNamespaceType, Spec};

use SpecErrorKind::{FailedPrecondition, InvalidArgument, NotFound, Unimplemented};

fn destinations(spec: &Spec) -> Vec<&str> {
    spec.mounts()
        .iter()
        .flatten()
        .filter_map(|mount| mount.destination().to_str())
        .collect()
}

fn options(spec: &Spec, destination: &str) -> String {
    let mount = mount_at(spec, destination).unwrap_or_else(|| panic!("no mount at {destination}"));
    mount.options().clone().unwrap_or_default().join(",")
}

fn namespaces(spec: &Spec) -> Vec<(LinuxNamespaceType, Option<PathBuf>)> {
    let linux = spec.linux().as_ref().expect("linux");
    linux
        .namespaces()
        .iter()
        .flatten()
        .map(|n| (n.typ(), n.path().clone()))
        .collect()
}

fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
    namespaces(spec)
        .into_iter()
        .find(|(typ, _)| *typ == kind)
        .map(|(_, path)| path)
}

fn refused(change: impl FnOnce(&mut Fixture)) -> (SpecErrorKind, String) {
    let error = Fixture::new(change).spec().expect_err("must be refused");
    (error.kind, error.field)
}

/// Adds a mount of `/data` on the host at `inside`.
fn bind(fixture: &mut Fixture, inside: &str, change: impl FnOnce(&mut CriMount)) {
    let mut mount = CriMount {
        container_path: inside.into(),
        host_path: "/data".into(),
        ..Default::default()
    };
    change(&mut mount);
    fixture.container.mounts.push(mount);
    let source = MountSource {
        path: "/data".into(),
        propagation: SourcePropagation::Shared,
    };
    fixture.inputs.mounts.push(Some(source));
}

#[test]
fn a_plain_container() {
    let spec = Fixture::default().spec().expect("spec");
    assert_eq!(
        destinations(&spec),
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/dev/shm",
            "/etc/resolv.conf",
            "/etc/hosts",
            "/etc/hostname"
        ]
    );
    assert_eq!(
        mount_at(&spec, "/dev/shm").and_then(|m| m.source().clone()),
        Some("/pods/1/shm".into())
    );
    assert_eq!(options(&spec, "/etc/hosts"), "rbind,rprivate,rw");
    assert!(options(&spec, "/sys").ends_with(",ro") && options(&spec, "/sys/fs/cgroup").ends_with(",ro"));

    use LinuxNamespaceType::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    let pin = |name: &str| Some(Path::new("/pinned").join(name));
    assert_eq!(
        namespaces(&spec),
        [
            (Mount, None),
            (Cgroup, None),
            (Network, pin("net")),
            (Ipc, pin("ipc")),
            (Uts, pin("uts")),
            (Pid, None)
        ]
    );

    let linux = spec.linux().as_ref().expect("linux");
    assert_eq!(linux.cgroups_path(), &Some("/kubepods/pod1/c1".into()));
    assert_eq!(linux.seccomp(), &None);
    assert_eq!(
        (linux.masked_paths().as_deref(), linux.readonly_paths().as_deref()),
        (Some(&[][..]), Some(&[][..]))
    );
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|r| r.devices().clone())
        .expect("device rules");
    assert_eq!(
        (rules.len(), rules[0].allow(), rules[0].access().as_deref()),
        (1, false, Some("rwm"))
    );

    let process = spec.process().as_ref().expect("process");
    assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
    assert_eq!(
        (process.terminal(), process.no_new_privileges()),
        (Some(false), Some(false))
    );
    assert_eq!((process.rlimits(), spec.hostname()), (&None, &None));
    assert_eq!(spec.root().as_ref().and_then(|root| root.readonly()), Some(false));

    let annotations = spec.annotations().as_ref().expect("annotations");
    for (key, value) in [
        ("sandbox-id", "s1"),
        ("container-name", "web"),
        ("image-name", "example.com/web:1"),
        ("sandbox-name", "pod"),
        ("sandbox-namespace", "default"),
        ("sandbox-uid", "uid"),
    ] {
        assert_eq!(annotations[&format!("io.kubernetes.cri.{key}")], value);
    }
}

#[test]
fn the_container_type_is_for_runtimes_with_a_sandbox_container() {
    let of = |sandbox_container| {
        let spec = Fixture::new(|f| f.runtime.sandbox_container = sandbox_container)
            .spec()
            .expect("spec");
        spec.annotations()
            .as_ref()
            .and_then(|all| all.get("io.kubernetes.cri.container-type").cloned())
    };
    assert_eq!(of(true).as_deref(), Some("container"));
    assert_eq!(of(false), None);
}

#[test]
fn a_container_of_a_vm() {
    let spec = Fixture::in_guest().spec().expect("spec");
    use LinuxNamespaceType::{Cgroup, Mount, Pid};
    assert_eq!(namespaces(&spec), [(Mount, None), (Cgroup, None)]);
    assert_eq!(
        spec.linux().as_ref().and_then(|l| l.cgroups_path().clone()),
        Some("/c1".into())
    );
    let shm = mount_at(&spec, "/dev/shm").and_then(|m| m.source().clone());
    assert_eq!(shm, Some(catamaran_spec::GUEST_SHM.into()));

    let with_mode = |mode: NamespaceMode| {
        let mut fixture = Fixture::in_guest();
        let options = NamespaceOption {
            pid: mode.into(),
            ..Default::default()
        };
        fixture.security().namespace_options = Some(options);
        fixture.spec()
    };
    let own = with_mode(NamespaceMode::Container).expect("own pid namespace");
    assert_eq!(namespaces(&own), [(Mount, None), (Cgroup, None), (Pid, None)]);
    assert_eq!(
        with_mode(NamespaceMode::Node).expect_err("host pid").kind,
        InvalidArgument
    );
    assert_eq!(
        with_mode(NamespaceMode::Target).expect_err("target").kind,
        Unimplemented
    );
}

#[test]
fn the_guest_is_not_limited_by_the_node() {
    let mut fixture = Fixture::in_guest();
    fixture.host = HostFeatures {
        cgroup: CgroupVersion::V1,
        seccomp: false,
        min_oom_score_adj: Some(0),
        capabilities: Default::default(),
        ..HostFeatures::guest("node")
    };
    fixture.security().seccomp = Some(SecurityProfile::default());
    let resources = LinuxContainerResources {
        oom_score_adj: -500,
        ..Default::default()
    };
    fixture.container.linux.as_mut().expect("linux").resources = Some(resources);
    let spec = fixture.spec().expect("spec");
    assert!(
        spec.linux()
            .as_ref()
            .is_some_and(|linux| linux.seccomp().is_some())
    );
    let process = spec.process().as_ref().expect("process");
    assert_eq!(process.oom_score_adj(), Some(-500));
    let bounding = process
        .capabilities()
        .as_ref()
        .and_then(|c| c.bounding().clone())
        .expect("set");
    assert_eq!(bounding.len(), 14);

    // The same on the node fails, each for its own reason.
    fixture.namespaces = Fixture::default().namespaces;
    assert_eq!(
        fixture.spec().expect_err("no seccomp").field,
        "linux.security_context.seccomp"
    );
}

#[test]
fn namespaces_of_the_node() {
    let spec = Fixture::new(|f| {
        let namespaces = f.namespaces.as_mut().expect("host");
        (namespaces.network, namespaces.ipc, namespaces.uts) = (None, None, None);
        namespaces.pid = PidNamespace::Host;
    });
    let spec = spec.spec().expect("spec");
    use LinuxNamespaceType::{Cgroup, Mount, Pid};
    assert_eq!(namespaces(&spec), [(Mount, None), (Cgroup, None)]);

    let joined = Fixture::new(|f| {
        f.namespaces.as_mut().expect("host").pid = PidNamespace::Join("/proc/7/ns/pid".into());
        f.host.cgroup = CgroupVersion::V1;
    });
    let spec = joined.spec().expect("spec");
    assert_eq!(namespace(&spec, Pid), Some(Some("/proc/7/ns/pid".into())));
    assert_eq!(namespace(&spec, Cgroup), None);
}

#[test]
fn cgroup_paths() {
    let path = |systemd: bool, parent: &str| {
        let fixture = Fixture::new(|f| (f.systemd_cgroup, f.cgroup_parent) = (systemd, parent.into()));
        fixture.spec().map(|spec| {
            spec.linux()
                .as_ref()
                .and_then(|l| l.cgroups_path().clone())
                .expect("path")
        })
    };
    assert_eq!(path(false, "/a/b"), Ok("/a/b/c1".into()));
    assert_eq!(path(false, "a"), Ok("/a/c1".into()));
    assert_eq!(
        path(true, "kubepods-pod1.slice"),
        Ok("kubepods-pod1.slice:catamaran:c1".into())
    );
    assert_eq!(
        path(true, "/kubepods.slice/kubepods-pod1.slice"),
        Ok("kubepods-pod1.slice:catamaran:c1".into())
    );
    let error = path(true, "/kubepods/pod1").expect_err("not a slice");
    assert_eq!(
        (error.kind, error.field.as_str()),
        (InvalidArgument, "linux.cgroup_parent")
    );
}

#[test]
fn mounts_in_their_order() {
    let spec = Fixture::new(|f| {
        bind(f, "/a/b/c", |_| {});
        bind(f, "/x", |_| {});
        bind(f, "/a/b/../b", |m| m.readonly = true);
        bind(f, "/etc//hosts", |_| {});
        bind(f, "/dev/shm/", |_| {});
    });
    let spec = spec.spec().expect("spec");
    let all = destinations(&spec);
    assert_eq!(
        all[6..],
        [
            "/x",
            "/a/b/../b",
            "/etc//hosts",
            "/dev/shm/",
            "/etc/resolv.conf",
            "/etc/hostname",
            "/a/b/c"
        ]
    );
    assert_eq!(options(&spec, "/a/b/../b"), "rbind,rprivate,ro");

    let own_dev = Fixture::new(|f| bind(f, "/dev", |_| {})).spec().expect("spec");
    assert_eq!(
        destinations(&own_dev),
        [
            "/proc",
            "/sys",
            "/sys/fs/cgroup",
            "/dev",
            "/dev/shm",
            "/etc/resolv.conf",
            "/etc/hosts",
            "/etc/hostname"
        ]
    );
}

#[test]
fn propagation() {
    let of = |wanted: MountPropagation, source: SourcePropagation| {
        let fixture = Fixture::new(|f| {
            bind(f, "/m", |m| m.propagation = wanted.into());
            f.inputs.mounts[0].as_mut().expect("source").propagation = source;
        });
        fixture.spec().map_err(|e| e.kind).map(|spec| {
            let root = spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.rootfs_propagation().clone());
            (options(&spec, "/m"), root)
        })
    };
    use MountPropagation::{
        PropagationBidirectional as Both, PropagationHostToContainer as In, PropagationPrivate as No,
    };
    use SourcePropagation::{Private, Shared, Slave};
    let made = |option: &str, root: &str| Ok((option.to_owned(), Some(root.to_owned())));
    assert_eq!(of(No, Private), Ok(("rbind,rprivate,rw".into(), None)));
    assert_eq!(of(In, Shared), made("rbind,rslave,rw", "rslave"));
    assert_eq!(of(In, Slave), made("rbind,rslave,rw", "rslave"));
    assert_eq!(of(In, Private), Err(FailedPrecondition));
    assert_eq!(of(Both, Shared), made("rbind,rshared,rw", "rshared"));
    assert_eq!(of(Both, Slave), Err(FailedPrecondition));

    // The widest of several decides for the root, in either order.
    for order in [[In, Both], [Both, In]] {
        let fixture = Fixture::new(|f| {
            bind(f, "/m", |m| m.propagation = order[0].into());
            bind(f, "/n", |m| m.propagation = order[1].into());
        });
        let spec = fixture.spec().expect("spec");
        assert_eq!(
            spec.linux()
                .as_ref()
                .and_then(|l| l.rootfs_propagation().clone())
                .as_deref(),
            Some("rshared")
        );
    }

    let mut guest = Fixture::in_guest();
    bind(&mut guest, "/m", |m| m.propagation = Both.into());
    assert_eq!(
        guest.spec().expect_err("out of a VM").field,
        "mounts[0].propagation"
    );
}

#[test]
fn read_only_mounts() {
    let spec = Fixture::new(|f| bind(f, "/m", |m| (m.readonly, m.recursive_read_only) = (true, true)));
    assert_eq!(options(&spec.spec().expect("spec"), "/m"), "rbind,rprivate,rro");
    let field = || "mounts[0].recursive_read_only".to_owned();
    assert_eq!(
        refused(|f| bind(f, "/m", |m| m.recursive_read_only = true)),
        (InvalidArgument, field())
    );
    let slave = |m: &mut CriMount| {
        (m.readonly, m.recursive_read_only) = (true, true);
        m.propagation = MountPropagation::PropagationHostToContainer.into();
    };
    assert_eq!(refused(|f| bind(f, "/m", slave)), (InvalidArgument, field()));
    let old_runtime = refused(|f| {
        bind(f, "/m", |m| (m.readonly, m.recursive_read_only) = (true, true));
        f.runtime.recursive_read_only_mounts = false;
    });
    assert_eq!(old_runtime, (FailedPrecondition, field()));
}

#[test]
fn mounts_that_are_refused() {
    for path in ["", "relative", "/", "/a/..", "/a\0b"] {
        assert_eq!(
            refused(|f| bind(f, path, |_| {})),
            (InvalidArgument, "mounts[0].container_path".into())
        );
    }
    assert_eq!(
        refused(|f| bind(f, "/m", |m| m.propagation = 9)),
        (InvalidArgument, "mounts[0].propagation".into())
    );
    let sub_path = refused(|f| bind(f, "/m", |m| m.image_sub_path = "x".into()));
    assert_eq!(sub_path, (InvalidArgument, "mounts[0].image_sub_path".into()));
    let image = refused(|f| {
        bind(f, "/m", |m| {
            m.image = Some(ImageSpec {
                image: "i".into(),
                ..Default::default()
            })
        });
        f.inputs.mounts[0] = None;
    });
    assert_eq!(image, (NotFound, "mounts[0].image".into()));
    for (change, name) in [
        ((|m| m.readonly = false) as fn(&mut CriMount), "readonly"),
        (|m| m.propagation = 1, "propagation"),
        (|m| m.host_path = "/x".into(), "host_path"),
    ] {
        let error = refused(|f| {
            bind(f, "/m", |m| {
                m.host_path = String::new();
                m.readonly = true;
                m.image = Some(ImageSpec {
                    image: "i".into(),
                    ..Default::default()
                });
                change(m);
            });
        });
        assert_eq!(error, (InvalidArgument, format!("mounts[0].{name}")));
    }
    let not_gathered = refused(|f| {
        bind(f, "/m", |_| {});
        f.inputs.mounts.clear();
    });
    assert_eq!(not_gathered, (NotFound, "mounts[0].host_path".into()));
    let mapping = IdMapping {
        host_id: 1,
        container_id: 0,
        length: 1,
    };
    let half = refused(|f| bind(f, "/m", |m| m.uid_mappings = vec![mapping]));
    assert_eq!(half, (InvalidArgument, "mounts[0].uidMappings".into()));
    let old_runtime = refused(|f| {
        bind(f, "/m", |m| {
            (m.uid_mappings, m.gid_mappings) = (vec![mapping], vec![mapping])
        });
        f.runtime.user_namespaces = false;
    });
    assert_eq!(old_runtime, (FailedPrecondition, "mounts[0].uidMappings".into()));
}

#[test]
fn a_pod_with_a_user_namespace() {
    let map = LinuxIdMappingBuilder::default()
        .container_id(0u32)
        .host_id(65536u32)
        .size(65536u32);
    let map = map.build().expect("mapping");
    let user = UserNamespace {
        path: "/pinned/user".into(),
        uids: vec![map],
        gids: vec![map],
    };
    let mut fixture = Fixture::new(|f| f.namespaces.as_mut().expect("host").user = Some(user.clone()));
    let spec = fixture.spec().expect("spec");
    assert_eq!(
        namespace(&spec, LinuxNamespaceType::User),
        Some(Some("/pinned/user".into()))
    );
    let linux = spec.linux().as_ref().expect("linux");
    assert_eq!(
        (linux.uid_mappings(), linux.gid_mappings()),
        (&Some(vec![map]), &Some(vec![map]))
    );
    assert_eq!(
        mount_at(&spec, "/etc/hosts").and_then(|m| m.uid_mappings().clone()),
        Some(vec![map])
    );
    assert_eq!(
        mount_at(&spec, "/sys").and_then(|m| m.typ().clone()).as_deref(),
        Some("sysfs")
    );

    fixture.namespaces.as_mut().expect("host").network = None;
    let spec = fixture.spec().expect("spec");
    assert_eq!(
        mount_at(&spec, "/sys").and_then(|m| m.typ().clone()).as_deref(),
        Some("bind")
    );

    fixture.runtime.user_namespaces = false;
    let error = fixture.spec().expect_err("runc 1.1 cannot");
    assert_eq!(
        error.field,
        "linux.security_context.namespace_options.userns_options"
    );

    // A container that asks for what its pod has not.
    let asked = |f: &mut Fixture| {
        let user = CriUserNamespace {
            mode: NamespaceMode::Pod.into(),
            ..Default::default()
        };
        let options = NamespaceOption {
            userns_options: Some(user),
            ..Default::default()
        };
        f.security().namespace_options = Some(options);
    };
    assert_eq!(refused(asked).0, InvalidArgument);
    let in_guest = refused(|f| {
        f.namespaces = None;
        asked(f);
    });
    assert_eq!(in_guest.0, Unimplemented);
}

fn device(path: &str, minor: i64) -> LinuxDevice {
    let mut device = LinuxDevice::default();
    device
        .set_path(path.into())
        .set_typ(LinuxDeviceType::C)
        .set_major(1)
        .set_minor(minor);
    device
}

#[test]
fn privileged() {
    let fixture = Fixture::new(|f| {
        f.privileged();
        f.security().masked_paths = vec!["/proc/kcore".into()];
        f.security().seccomp = Some(SecurityProfile::default());
        f.inputs.host_devices = vec![device("/dev/null", 3), device("/dev/zero", 5)];
    });
    let spec = fixture.spec().expect("spec");
    let linux = spec.linux().as_ref().expect("linux");
    assert_eq!((linux.seccomp(), linux.masked_paths()), (&None, &Some(vec![])));
    assert_eq!(linux.devices().as_ref().map(Vec::len), Some(2));
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|r| r.devices().clone())
        .expect("rules");
    assert_eq!((rules.len(), rules[0].allow()), (1, true));
    assert!(options(&spec, "/sys").ends_with(",rw") && options(&spec, "/sys/fs/cgroup").ends_with(",rw"));
    assert_eq!(namespace(&spec, LinuxNamespaceType::Cgroup), None);

    let alone = refused(|f| f.security().privileged = true);
    assert_eq!(
        alone,
        (InvalidArgument, "linux.security_context.privileged".into())
    );
}

#[test]
fn devices_of_the_node() {
    let with = |access: &str, inside: &str| {
        let wanted = Device {
            host_path: "/dev/zero".into(),
            container_path: inside.into(),
            permissions: access.into(),
        };
        Fixture::new(|f| {
            f.container.devices = vec![wanted];
            f.inputs.devices = vec![vec![device("/dev/z", 5)]];
        })
    };
    let spec = with("rm", "/dev/z").spec().expect("spec");
    let linux = spec.linux().as_ref().expect("linux");
    assert_eq!(
        linux.devices().as_ref().map(|d| d[0].path().clone()),
        Some("/dev/z".into())
    );
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|r| r.devices().clone())
        .expect("rules");
    let rule = &rules[1];
    assert!(!rules[0].allow() && rule.allow());
    assert_eq!(
        (rule.major(), rule.minor(), rule.access().as_deref()),
        (Some(1), Some(5), Some("rm"))
    );

    for (access, inside, field) in [
        ("", "/dev/z", "permissions"),
        ("rx", "/dev/z", "permissions"),
        ("r", "z", "container_path"),
    ] {
        let error = with(access, inside).spec().expect_err(field);
        assert_eq!(error.field, format!("devices[0].{field}"));
    }
    let mut guest = with("r", "/dev/z");
    guest.namespaces = None;
    assert_eq!(guest.spec().expect_err("in a VM").kind, FailedPrecondition);
    let cdi = refused(|f| {
        f.namespaces = None;
        f.container.cdi_devices = vec![CdiDevice { name: "v/c=d".into() }];
    });
    assert_eq!(cdi, (FailedPrecondition, "CDI_devices".into()));
}

#[test]
fn security_context() {
    let fixture = Fixture::new(|f| {
        let security = f.security();
        security.no_new_privs = true;
        security.readonly_rootfs = true;
        security.masked_paths = vec!["/proc/kcore".into()];
        security.readonly_paths = vec!["/proc/sys".into()];
        security.seccomp = Some(SecurityProfile::default());
        f.container.tty = true;
        f.annotations.insert("dev.gvisor.x".into(), "1".into());
    });
    let spec = fixture.spec().expect("spec");
    let process = spec.process().as_ref().expect("process");
    assert_eq!(
        (process.no_new_privileges(), process.terminal()),
        (Some(true), Some(true))
    );
    assert_eq!(spec.root().as_ref().and_then(|root| root.readonly()), Some(true));
    assert_eq!(options(&spec, "/etc/resolv.conf"), "rbind,rprivate,ro");
    assert_eq!(options(&spec, "/dev/shm"), "rbind,rprivate,rw");
    let linux = spec.linux().as_ref().expect("linux");
    assert_eq!(linux.masked_paths(), &Some(vec!["/proc/kcore".into()]));
    assert_eq!(linux.readonly_paths(), &Some(vec!["/proc/sys".into()]));
    assert!(linux.seccomp().is_some());
    assert_eq!(
        spec.annotations()
            .as_ref()
            .and_then(|a| a.get("dev.gvisor.x").cloned())
            .as_deref(),
        Some("1")
    );

    // crictl without a security context gets the usual ones.
    let bare = Fixture::new(|f| f.container.linux = None).spec().expect("spec");
    let linux = bare.linux().as_ref().expect("linux");
    assert!(
        linux
            .masked_paths()
            .iter()
            .flatten()
            .any(|path| path == "/proc/kcore")
    );
    assert!(
        linux
            .readonly_paths()
            .iter()
            .flatten()
            .any(|path| path == "/proc/sys")
    );
}

#[test]
fn seccomp_profiles() {
    let with = |kind: ProfileType, path: &str, content: Option<&[u8]>| {
        let fixture = Fixture::new(|f| {
            f.security().seccomp = Some(SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: path.into(),
            });
            f.inputs.seccomp_profile = content.map(<[u8]>::to_vec);
        });
        fixture
            .spec()
            .map(|spec| spec.linux().as_ref().and_then(|linux| linux.seccomp().clone()))
    };
    assert_eq!(with(ProfileType::Unconfined, "", None), Ok(None));
    let profile = with(
        ProfileType::Localhost,
        "/p.json",
        Some(br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#),
    );
    assert!(profile.expect("spec").is_some());
    assert_eq!(
        with(ProfileType::Localhost, "/p.json", None)
            .expect_err("not read")
            .kind,
        NotFound
    );
    let bad = with(ProfileType::Localhost, "/p.json", Some(b"no")).expect_err("not JSON");
    assert_eq!(
        (bad.kind, bad.field.as_str()),
        (InvalidArgument, "linux.security_context.seccomp.localhost_ref")
    );
}

#[test]
fn what_the_node_cannot_enforce() {
    let options = SeLinuxOption {
        level: "s0:c1".into(),
        ..Default::default()
    };
    let selinux = refused(|f| f.security().selinux_options = Some(options));
    assert_eq!(
        selinux,
        (
            FailedPrecondition,
            "linux.security_context.selinux_options".into()
        )
    );
    Fixture::new(|f| f.security().selinux_options = Some(SeLinuxOption::default()))
        .spec()
        .expect("asks for nothing");
    let windows = refused(|f| f.container.windows = Some(WindowsContainerConfig::default()));
    assert_eq!(windows, (InvalidArgument, "windows".into()));
    let resources = LinuxContainerResources {
        cpu_shares: -1,
        ..Default::default()
    };
    let shares = refused(|f| f.container.linux.as_mut().expect("linux").resources = Some(resources));
    assert_eq!(shares, (InvalidArgument, "linux.resources.cpu_shares".into()));
}

/// Relabelling matters only to a container with a label of its own; the pod's options give it one too.
#[test]
fn relabelled_volumes() {
    let labelled = SeLinuxOption {
        level: "s0:c1".into(),
        ..Default::default()
    };
    let fixture = |enabled: bool| {
        let mut fixture = Fixture::default();
        fixture.host.selinux = enabled.then(|| SelinuxDefaults {
            process: "system_u:system_r:container_t:s0".into(),
            file: "system_u:object_r:container_file_t:s0".into(),
        });
        fixture.container.mounts = vec![CriMount {
            container_path: "/data".into(),
            host_path: "/data".into(),
            selinux_relabel: true,
            ..Default::default()
        }];
        fixture.inputs.mounts = vec![Some(MountSource {
            path: "/data".into(),
            propagation: SourcePropagation::Private,
        })];
        fixture
    };
    fixture(false).spec().expect("no SELinux, no labels");
    fixture(true).spec().expect("a container without a label");
    let mut by_pod = fixture(true);
    let security = by_pod.pod_linux().security_context.get_or_insert_default();
    security.selinux_options = Some(labelled.clone());
    let mut by_container = fixture(true);
    by_container.security().selinux_options = Some(labelled);
    for fixture in [by_pod, by_container] {
        let error = fixture.spec().expect_err("cannot be relabelled");
        assert_eq!(
            (error.kind, error.field.as_str()),
            (Unimplemented, "mounts[0].selinux_relabel")
        );
    }
}
