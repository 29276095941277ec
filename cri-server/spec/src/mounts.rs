//! Mounts of a container: the kernel's file systems, the pod's files, the CRI's mounts, in the order in which
//! they must be made.

use std::path::{Component, Path, PathBuf};

use catamaran_cri_api::v1::{IdMapping, Mount as CriMount, MountPropagation};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceType, Mount};

use crate::error::{Result, SpecError};
use crate::gather::{MountSource, SourcePropagation};
use crate::input::{ContainerInput, GUEST_SHM, Side, Target};
use crate::lsm;

/// Mounts, and the propagation that the root must have for them.
pub(crate) struct Mounts {
    pub(crate) list: Vec<Mount>,
    pub(crate) rootfs_propagation: Option<&'static str>,
}

pub(crate) fn mounts(input: &ContainerInput<'_>, namespaces: &[LinuxNamespace]) -> Result<Mounts> {
    let mut rootfs_propagation = None;
    let mut binds = Vec::new();
    for (index, mount) in input.container.mounts.iter().enumerate() {
        binds.push(cri_mount(input, index, mount, &mut rootfs_propagation)?);
    }
    // A CRI mount replaces the pod's file or the kernel's file system at the same place.
    let taken: Vec<PathBuf> = binds.iter().map(|mount| clean(mount.destination())).collect();
    binds.extend(
        pod_files(input)
            .into_iter()
            .filter(|mount| !taken.contains(&clean(mount.destination()))),
    );
    // What is higher up is mounted first, so that it hides nothing; the given order decides among equals.
    binds.sort_by_key(|mount| clean(mount.destination()).components().count());

    let places: Vec<PathBuf> = binds.iter().map(|mount| clean(mount.destination())).collect();
    let own_dev = places.iter().any(|place| place == Path::new("/dev"));
    let mut list = kernel_file_systems(input, namespaces);
    list.retain(|mount| {
        let place = mount.destination();
        let hidden = own_dev && place.starts_with("/dev");
        !hidden && !places.contains(place)
    });
    list.append(&mut binds);
    Ok(Mounts {
        list,
        rootfs_propagation,
    })
}

fn kernel_file_systems(input: &ContainerInput<'_>, namespaces: &[LinuxNamespace]) -> Vec<Mount> {
    let security = input
        .container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let access = if security.is_some_and(|security| security.privileged) {
        "rw"
    } else {
        "ro"
    };
    let has = |kind| {
        namespaces
            .iter()
            .any(|namespace: &LinuxNamespace| namespace.typ() == kind)
    };
    // In a user namespace the kernel lets no one mount sysfs or mqueue of a namespace that it does not own.
    let user = has(LinuxNamespaceType::User);
    let sysfs = if user && !has(LinuxNamespaceType::Network) {
        mount(
            "/sys",
            "bind",
            "/sys",
            &["rbind", "nosuid", "noexec", "nodev", access],
        )
    } else {
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])
    };
    let mqueue = if user && !has(LinuxNamespaceType::Ipc) {
        mount(
            "/dev/mqueue",
            "bind",
            "/dev/mqueue",
            &["rbind", "nosuid", "noexec", "nodev"],
        )
    } else {
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])
    };
    vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mqueue,
        sysfs,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
    ]
}

fn pod_files(input: &ContainerInput<'_>) -> Vec<Mount> {
    let security = input
        .container
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let access = if security.is_some_and(|security| security.readonly_rootfs) {
        "ro"
    } else {
        "rw"
    };
    let shm = match input.target.side() {
        Side::Host => input.files.shm.as_path(),
        Side::Guest => Path::new(GUEST_SHM),
    };
    let mut mounts = vec![
        mount("/dev/shm", "bind", shm, &["rbind", "rprivate", "rw"]),
        mount(
            "/etc/resolv.conf",
            "bind",
            &input.files.resolv_conf,
            &["rbind", "rprivate", access],
        ),
        mount(
            "/etc/hosts",
            "bind",
            &input.files.hosts,
            &["rbind", "rprivate", access],
        ),
        mount(
            "/etc/hostname",
            "bind",
            &input.files.hostname,
            &["rbind", "rprivate", access],
        ),
    ];
    if let Target::Host(namespaces) = input.target
        && let Some(user) = &namespaces.user
    {
        for mount in mounts.iter_mut().skip(1) {
            mount
                .set_uid_mappings(Some(user.uids.clone()))
                .set_gid_mappings(Some(user.gids.clone()));
        }
    }
    mounts
}

fn cri_mount(
    input: &ContainerInput<'_>,
    index: usize,
    wanted: &CriMount,
    rootfs_propagation: &mut Option<&'static str>,
) -> Result<Mount> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let inside = wanted.container_path.as_str();
    if !inside.starts_with('/') || inside.contains('\0') || clean(Path::new(inside)) == Path::new("/") {
        let reason = format!("{inside:?} is not an absolute path below the root");
        return Err(SpecError::invalid(field("container_path"), reason));
    }
    let is_image = wanted.image.as_ref().is_some_and(|image| !image.image.is_empty());
    if !is_image && !wanted.image_sub_path.is_empty() {
        return Err(SpecError::invalid(field("image_sub_path"), "set without image"));
    }
    let Some(source) = input.inputs.mounts.get(index).and_then(Option::as_ref) else {
        return Err(SpecError::not_found(
            field(if is_image { "image" } else { "host_path" }),
            "not looked up on the node",
        ));
    };
    if is_image {
        if !wanted.host_path.is_empty() {
            return Err(SpecError::invalid(field("host_path"), "set together with image"));
        }
        if !wanted.readonly {
            return Err(SpecError::invalid(
                field("readonly"),
                "must be true for an image volume",
            ));
        }
        if wanted.propagation() != MountPropagation::PropagationPrivate {
            return Err(SpecError::invalid(
                field("propagation"),
                "an image volume has PROPAGATION_PRIVATE only",
            ));
        }
    }
    // Without a label of its own a container needs none on its volumes, and without SELinux there are none.
    if wanted.selinux_relabel
        && input.target.side() == Side::Host
        && lsm::selinux_labels(input, input.host)?.is_some()
    {
        let reason = "volumes are not relabelled: give the files the label that the pod's seLinuxOptions name and \
                      mount them without relabelling, or leave seLinuxOptions out";
        return Err(SpecError::unimplemented(field("selinux_relabel"), reason));
    }

    let propagation = MountPropagation::try_from(wanted.propagation).map_err(|unknown| {
        SpecError::invalid(field("propagation"), format!("unknown value {}", unknown.0))
    })?;
    let mut options = vec!["rbind"];
    options.push(propagate(
        input,
        propagation,
        source,
        &field("propagation"),
        rootfs_propagation,
    )?);
    options.push(match (wanted.readonly, wanted.recursive_read_only) {
        (false, false) => "rw",
        (true, false) => "ro",
        (false, true) => {
            return Err(SpecError::invalid(
                field("recursive_read_only"),
                "set on a mount that is not readonly",
            ));
        }
        (true, true) if propagation != MountPropagation::PropagationPrivate => {
            return Err(SpecError::invalid(
                field("recursive_read_only"),
                "needs PROPAGATION_PRIVATE",
            ));
        }
        (true, true) if !input.runtime.recursive_read_only_mounts => {
            let reason = "the handler's runtime has no recursive read-only mounts (mount option rro)";
            return Err(SpecError::precondition(field("recursive_read_only"), reason));
        }
        (true, true) => "rro",
    });
    if is_image {
        options.extend(["nosuid", "nodev"]);
    }

    let mut result = mount(inside, "bind", &source.path, &options);
    let uids = id_mappings(&wanted.uid_mappings);
    let gids = id_mappings(&wanted.gid_mappings);
    match (uids, gids) {
        (None, None) => {}
        (Some(uids), Some(gids)) => {
            if input.target.side() == Side::Guest {
                return Err(SpecError::unimplemented(
                    field("uidMappings"),
                    "VM pods have no user namespaces",
                ));
            }
            if !input.runtime.user_namespaces {
                let reason = "the handler's runtime has no id-mapped mounts";
                return Err(SpecError::precondition(field("uidMappings"), reason));
            }
            result.set_uid_mappings(Some(uids)).set_gid_mappings(Some(gids));
        }
        _ => {
            return Err(SpecError::invalid(
                field("uidMappings"),
                "uidMappings and gidMappings come together",
            ));
        }
    }
    Ok(result)
}

/// The mount option of a propagation, after checking that the source can give it.
fn propagate(
    input: &ContainerInput<'_>,
    propagation: MountPropagation,
    source: &MountSource,
    field: &str,
    rootfs_propagation: &mut Option<&'static str>,
) -> Result<&'static str> {
    let path = &source.path;
    match propagation {
        MountPropagation::PropagationPrivate => Ok("rprivate"),
        MountPropagation::PropagationHostToContainer => {
            if source.propagation == SourcePropagation::Private {
                let reason = format!(
                    "{path:?} is on a private mount; it must be shared or slave (mount --make-rslave)"
                );
                return Err(SpecError::precondition(field, reason));
            }
            rootfs_propagation.get_or_insert("rslave");
            Ok("rslave")
        }
        MountPropagation::PropagationBidirectional => {
            if input.target.side() == Side::Guest {
                let reason = "mounts made in a virtual machine cannot appear on the node";
                return Err(SpecError::invalid(field, reason));
            }
            if source.propagation != SourcePropagation::Shared {
                let reason = format!("{path:?} is not on a shared mount (mount --make-rshared)");
                return Err(SpecError::precondition(field, reason));
            }
            *rootfs_propagation = Some("rshared");
            Ok("rshared")
        }
    }
}

fn id_mappings(mappings: &[IdMapping]) -> Option<Vec<LinuxIdMapping>> {
    (!mappings.is_empty()).then(|| mappings.iter().map(id_mapping).collect())
}

fn id_mapping(mapping: &IdMapping) -> LinuxIdMapping {
    LinuxIdMappingBuilder::default()
        .host_id(mapping.host_id)
        .container_id(mapping.container_id)
        .size(mapping.length)
        .build()
        .expect("no field of the builder is required")
}

fn mount(destination: &str, kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.as_ref().to_owned()))
        .set_options(Some(options.iter().map(ToString::to_string).collect()));
    mount
}

/// Without `.`, `..` and doubled slashes, by the text alone.
fn clean(path: &Path) -> PathBuf {
    let mut result = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            _ => {}
        }
    }
    result
}
