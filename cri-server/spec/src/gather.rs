//! The only part of making a spec that touches the host: resolves what a container's configuration names there
//! (mount sources, devices, a seccomp profile), so that [`crate::container_spec`] stays a pure function.
//! Blocking; call it off the async threads.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use catamaran_cri_api::v1::ContainerConfig;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use crate::error::{Result, SpecError};
use crate::input::Side;
use crate::seccomp::localhost_profile_path;
use crate::seccomp_docker::kernel_version;

/// What a container's configuration names on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostInputs {
    /// One entry for each of `ContainerConfig.mounts`. `None` for an image mount, whose source the caller sets
    /// once the image is mounted.
    pub mounts: Vec<Option<MountSource>>,
    /// One entry for each of `ContainerConfig.devices`: the device, or those in the directory that it names.
    pub devices: Vec<Vec<LinuxDevice>>,
    /// Every device of the host, for a privileged container.
    pub host_devices: Vec<LinuxDevice>,
    /// Content of the Localhost seccomp profile.
    pub seccomp_profile: Option<Vec<u8>>,
    /// Version of the kernel, which conditions of that profile may name; read with it. A guest's counts as the same.
    pub kernel: (u32, u32),
}

/// A mount's source on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSource {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// Propagation of the mount that it is on.
    pub propagation: SourcePropagation,
}

/// Propagation of a mount of the host, mount_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourcePropagation {
    /// Neither sends nor receives.
    Private,
    /// Receives.
    Slave,
    /// Sends and receives.
    Shared,
}

/// A seccomp profile is a page or two; more is a wrong file.
const SECCOMP_PROFILE_LIMIT: u64 = 1 << 20;

impl HostInputs {
    /// Looks up everything that `container` names on this host. A missing mount source is created as a
    /// directory, as other CRI runtimes do (hostPath volumes of type "" rely on it).
    ///
    /// # Errors
    /// The field, where what it names is missing or cannot be read.
    pub fn gather(container: &ContainerConfig, side: Side) -> Result<Self> {
        let mounts = gather_mounts(container)?;
        let security = container
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref());
        let mut inputs = HostInputs {
            mounts,
            ..HostInputs::default()
        };
        if side == Side::Host {
            for (index, device) in container.devices.iter().enumerate() {
                let field = format!("devices[{index}].host_path");
                inputs
                    .devices
                    .push(devices_at(&device.host_path, &device.container_path, &field)?);
            }
            if security.is_some_and(|security| security.privileged) {
                walk_devices(Path::new("/dev"), Path::new("/dev"), 0, &mut inputs.host_devices).map_err(
                    |e| {
                        SpecError::precondition(
                            "linux.security_context.privileged",
                            format!("listing /dev: {e}"),
                        )
                    },
                )?;
                inputs.host_devices.sort_by(|a, b| a.path().cmp(b.path()));
            }
        }
        if let Some(path) = localhost_profile_path(container)? {
            inputs.seccomp_profile = Some(read_profile(&path)?);
            let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            inputs.kernel = kernel_version(&release).unwrap_or_default();
        }
        Ok(inputs)
    }
}

fn gather_mounts(container: &ContainerConfig) -> Result<Vec<Option<MountSource>>> {
    let needs_propagation = container.mounts.iter().any(|mount| mount.propagation != 0);
    let table = if needs_propagation {
        fs::read_to_string("/proc/self/mountinfo")
            .map_err(|e| SpecError::precondition("mounts", format!("reading /proc/self/mountinfo: {e}")))?
    } else {
        String::new()
    };
    let mut sources = Vec::with_capacity(container.mounts.len());
    for (index, mount) in container.mounts.iter().enumerate() {
        if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
            sources.push(None);
            continue;
        }
        let field = format!("mounts[{index}].host_path");
        if !mount.host_path.starts_with('/') {
            return Err(SpecError::invalid(
                field,
                format!("{:?} is not an absolute path", mount.host_path),
            ));
        }
        let path = match fs::canonicalize(&mount.host_path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&mount.host_path).and_then(|()| fs::canonicalize(&mount.host_path))
            }
            result => result,
        }
        .map_err(|e| SpecError::precondition(&field, format!("{:?}: {e}", mount.host_path)))?;
        let propagation = propagation_of(&table, &path);
        sources.push(Some(MountSource { path, propagation }));
    }
    Ok(sources)
}

/// Propagation of the mount that holds `path`, by proc_pid_mountinfo(5).
fn propagation_of(mountinfo: &str, path: &Path) -> SourcePropagation {
    let mut best: Option<(usize, SourcePropagation)> = None;
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(point) = fields.get(4) else { continue };
        let point = PathBuf::from(unescape(point));
        if !path.starts_with(&point) {
            continue;
        }
        let optional = || fields[5..].iter().skip(1).take_while(|field| **field != "-");
        let propagation = if optional().any(|field| field.starts_with("shared:")) {
            SourcePropagation::Shared
        } else if optional().any(|field| field.starts_with("master:")) {
            SourcePropagation::Slave
        } else {
            SourcePropagation::Private
        };
        // Of mounts on one point the last is on top.
        let depth = point.components().count();
        if best.is_none_or(|(deepest, _)| depth >= deepest) {
            best = Some((depth, propagation));
        }
    }
    best.map_or(SourcePropagation::Private, |(_, propagation)| propagation)
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut out = Vec::with_capacity(field.len());
    let bytes = field.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match octal
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn devices_at(host_path: &str, container_path: &str, field: &str) -> Result<Vec<LinuxDevice>> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => {
            SpecError::not_found(field, format!("{host_path:?} does not exist on the node"))
        }
        _ => SpecError::precondition(field, format!("{host_path:?}: {e}")),
    };
    let path = fs::canonicalize(host_path).map_err(failed)?;
    let inside = if container_path.is_empty() {
        Path::new(host_path)
    } else {
        Path::new(container_path)
    };
    let metadata = fs::metadata(&path).map_err(failed)?;
    if metadata.is_dir() {
        let mut devices = Vec::new();
        walk_devices(&path, inside, 0, &mut devices).map_err(failed)?;
        devices.sort_by(|a, b| a.path().cmp(b.path()));
        return Ok(devices);
    }
    match device_node(&metadata, inside) {
        Some(device) => Ok(vec![device]),
        None => Err(SpecError::invalid(
            field,
            format!("{host_path:?} is neither a device nor a directory of devices"),
        )),
    }
}

/// Directories of /dev that hold no devices for containers, or are the container's own.
const SKIPPED_DIRECTORIES: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];

/// Deepest directory of /dev that is searched; real ones are two or three deep.
const DEVICE_DEPTH: usize = 8;

fn walk_devices(host: &Path, inside: &Path, depth: usize, into: &mut Vec<LinuxDevice>) -> io::Result<()> {
    if depth > DEVICE_DEPTH {
        return Ok(());
    }
    for entry in fs::read_dir(host)? {
        let entry = entry?;
        let name = entry.file_name();
        // A device may vanish between listing and stat.
        let Ok(metadata) = fs::symlink_metadata(entry.path()) else {
            continue;
        };
        if metadata.is_dir() {
            if !SKIPPED_DIRECTORIES.iter().any(|skipped| name == *skipped) {
                walk_devices(&entry.path(), &inside.join(&name), depth + 1, into)?;
            }
        } else if name != "console"
            && let Some(device) = device_node(&metadata, &inside.join(&name))
        {
            into.push(device);
        }
    }
    Ok(())
}

/// The device node at a path of the host, links followed; `None`: something else is there.
pub(crate) fn node_at(path: &Path) -> io::Result<Option<LinuxDevice>> {
    Ok(device_node(&fs::metadata(path)?, path))
}

fn device_node(metadata: &fs::Metadata, inside: &Path) -> Option<LinuxDevice> {
    let kind = metadata.file_type();
    let typ = if kind.is_block_device() {
        LinuxDeviceType::B
    } else if kind.is_char_device() {
        LinuxDeviceType::C
    } else {
        return None;
    };
    let rdev = metadata.rdev();
    let mut device = LinuxDevice::default();
    device
        .set_path(inside.to_owned())
        .set_typ(typ)
        .set_major(device_major(rdev))
        .set_minor(device_minor(rdev))
        .set_file_mode(Some(metadata.mode() & 0o7777))
        .set_uid(Some(metadata.uid()))
        .set_gid(Some(metadata.gid()));
    Some(device)
}

// makedev(3) of glibc.
fn device_major(rdev: u64) -> i64 {
    (((rdev >> 32) & 0xffff_f000) | ((rdev >> 8) & 0xfff)) as i64
}

fn device_minor(rdev: u64) -> i64 {
    (((rdev >> 12) & 0xffff_ff00) | (rdev & 0xff)) as i64
}

fn read_profile(path: &Path) -> Result<Vec<u8>> {
    const FIELD: &str = "linux.security_context.seccomp.localhost_ref";
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => {
            SpecError::not_found(FIELD, format!("{path:?} does not exist on the node"))
        }
        _ => SpecError::precondition(FIELD, format!("{path:?}: {e}")),
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() || metadata.len() > SECCOMP_PROFILE_LIMIT {
        return Err(SpecError::invalid(
            FIELD,
            format!("{path:?} is not a file of at most {SECCOMP_PROFILE_LIMIT} bytes"),
        ));
    }
    fs::read(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SpecErrorKind;
    use catamaran_cri_api::v1::{Device, LinuxContainerConfig, LinuxContainerSecurityContext, Mount};

    #[test]
    fn propagation_by_the_deepest_mount() {
        let table = "21 1 0:20 / / rw - ext4 /dev/vda rw\n\
                     22 21 0:21 / /mnt/a\\040b rw shared:7 - tmpfs t rw\n\
                     23 22 0:22 / /mnt/a\\040b/in rw master:7 - tmpfs t rw\n\
                     24 21 0:21 / /over rw shared:8 - tmpfs t rw\n\
                     25 24 0:21 / /over rw - tmpfs t rw\n";
        let of = |path: &str| propagation_of(table, Path::new(path));
        assert_eq!(of("/etc"), SourcePropagation::Private);
        assert_eq!(of("/mnt/a b/x"), SourcePropagation::Shared);
        assert_eq!(of("/mnt/a b/in/x"), SourcePropagation::Slave);
        assert_eq!(of("/mnt/a bc"), SourcePropagation::Private);
        assert_eq!(of("/over/x"), SourcePropagation::Private);
    }

    #[test]
    fn a_missing_source_is_created_and_links_are_resolved() {
        let dir = tempfile::tempdir().expect("temp dir");
        let root = fs::canonicalize(dir.path()).expect("canonical");
        std::os::unix::fs::symlink("new", root.join("link")).expect("link");
        let new = root.join("new/deep");
        let mount = |path: &Path| Mount {
            host_path: path.to_str().expect("utf-8").into(),
            container_path: "/m".into(),
            ..Mount::default()
        };
        let config = ContainerConfig {
            mounts: vec![mount(&new), mount(&root.join("link"))],
            ..Default::default()
        };
        let inputs = HostInputs::gather(&config, Side::Host).expect("gathers");
        assert!(new.is_dir());
        assert_eq!(inputs.mounts[0].as_ref().map(|m| &m.path), Some(&new));
        assert_eq!(
            inputs.mounts[1].as_ref().map(|m| m.path.clone()),
            Some(root.join("new"))
        );

        let relative = ContainerConfig {
            mounts: vec![mount(Path::new("etc"))],
            ..Default::default()
        };
        let error = HostInputs::gather(&relative, Side::Host).expect_err("relative");
        assert_eq!(
            (error.kind, error.field.as_str()),
            (SpecErrorKind::InvalidArgument, "mounts[0].host_path")
        );
    }

    #[test]
    fn devices_of_the_host() {
        let device = |host: &str, inside: &str| Device {
            host_path: host.into(),
            container_path: inside.into(),
            permissions: "r".into(),
        };
        let config = ContainerConfig {
            devices: vec![device("/dev/null", "/dev/nothing")],
            ..Default::default()
        };
        let inputs = HostInputs::gather(&config, Side::Host).expect("gathers");
        let null = &inputs.devices[0][0];
        assert_eq!(
            (null.major(), null.minor(), null.typ()),
            (1, 3, LinuxDeviceType::C)
        );
        assert_eq!(null.path(), Path::new("/dev/nothing"));

        for (path, kind) in [
            ("/etc/passwd", SpecErrorKind::InvalidArgument),
            ("/dev/nowhere", SpecErrorKind::NotFound),
        ] {
            let config = ContainerConfig {
                devices: vec![device(path, "/dev/x")],
                ..Default::default()
            };
            assert_eq!(
                HostInputs::gather(&config, Side::Host).expect_err(path).kind,
                kind
            );
        }

        let security = LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        let linux = LinuxContainerConfig {
            security_context: Some(security),
            ..Default::default()
        };
        let config = ContainerConfig {
            linux: Some(linux),
            ..Default::default()
        };
        let inputs = HostInputs::gather(&config, Side::Host).expect("gathers");
        let paths: Vec<&PathBuf> = inputs.host_devices.iter().map(LinuxDevice::path).collect();
        assert!(paths.iter().any(|path| path.as_path() == Path::new("/dev/zero")));
        assert!(
            !paths
                .iter()
                .any(|path| path.starts_with("/dev/pts") || path.ends_with("console"))
        );
        let guest = HostInputs::gather(&config, Side::Guest).expect("gathers");
        assert!(guest.host_devices.is_empty());
    }

    #[test]
    fn large_device_numbers() {
        // makedev(511, 1048575) and makedev(259, 5).
        assert_eq!(
            (device_major(0xfff1_ffff), device_minor(0xfff1_ffff)),
            (511, 1_048_575)
        );
        assert_eq!((device_major(0x10305), device_minor(0x10305)), (259, 5));
    }
}
