//! Mounts that the shim asks for: shared directories, disks, overlays. All below `/run`, where the guest's
//! root is writable.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use catamaran_guest_protocol::v1::MountRequest;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Context, Error, Result};

/// How long a plugged device or a virtiofs tag may take to appear.
const APPEARS_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(10);

const TYPES: [&str; 7] = ["virtiofs", "9p", "ext4", "erofs", "tmpfs", "bind", "overlay"];

/// Mounts; the same mount a second time is no error.
pub(crate) async fn add(request: &MountRequest) -> Result<()> {
    let kind = request.r#type.as_str();
    if !TYPES.contains(&kind) {
        return Err(Error::Unsupported(format!(
            "type {kind:?} is none of {}",
            TYPES.join(", ")
        )));
    }
    let target = checked_target(&request.target)?;
    let options = Options::parse(&request.options);
    let fstype = (kind != "bind").then_some(kind);
    match mounted(
        &fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
        target,
    ) {
        Some((found, _)) if fstype.is_none_or(|fstype| fstype == found) => return Ok(()),
        Some((found, _)) => {
            return Err(Error::State(format!(
                "{} is the mount point of a {found} already",
                request.target
            )));
        }
        None => {}
    }
    make_target(request, target)?;
    let mut flags = options.flags;
    if kind == "bind" {
        flags |= MsFlags::MS_BIND;
    }
    let data = (!options.data.is_empty()).then_some(options.data.as_str());
    let deadline = Instant::now() + APPEARS_WITHIN;
    loop {
        let result = mount(Some(request.source.as_str()), target, fstype, flags, data);
        match result {
            // The device is plugged but the guest has not seen it yet.
            Err(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV | Errno::EINVAL)
                if comes_by_hotplug(request) && Instant::now() < deadline =>
            {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            result => {
                result
                    .context(|| format!("cannot mount {kind} {:?} at {}", request.source, request.target))?;
                break;
            }
        }
    }
    if kind == "bind" && flags.contains(MsFlags::MS_RDONLY) {
        let read_only = flags | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, read_only, None::<&str>)
            .context(|| format!("cannot make {} read-only", request.target))?;
    }
    if !options.propagation.is_empty() {
        mount(
            None::<&str>,
            target,
            None::<&str>,
            options.propagation,
            None::<&str>,
        )
        .context(|| format!("cannot set the propagation of {}", request.target))?;
    }
    Ok(())
}

/// Unmounts; nothing mounted there is no error. A mount in use is detached.
pub(crate) fn remove(target: &str) -> Result<()> {
    let path = checked_target(target)?;
    match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(Errno::EBUSY) => umount2(path, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
            .context(|| format!("cannot unmount {target}")),
        Err(error) => Err(error).context(|| format!("cannot unmount {target}")),
    }
}

fn comes_by_hotplug(request: &MountRequest) -> bool {
    match request.r#type.as_str() {
        "virtiofs" | "9p" => true,
        "ext4" | "erofs" => request.source.starts_with("/dev/") && !Path::new(&request.source).exists(),
        _ => false,
    }
}

fn checked_target(target: &str) -> Result<&Path> {
    let path = Path::new(target);
    let plain = path.components().all(|part| {
        matches!(
            part,
            std::path::Component::RootDir | std::path::Component::Normal(_)
        )
    });
    if path.is_absolute() && plain && path != Path::new("/") {
        Ok(path)
    } else {
        Err(Error::Invalid(format!(
            "target {target:?} is not an absolute path without . and .."
        )))
    }
}

/// A bind of a file needs a file.
fn make_target(request: &MountRequest, target: &Path) -> Result<()> {
    let what = || format!("cannot make mount point {}", request.target);
    if target.exists() {
        return Ok(());
    }
    if request.r#type == "bind" && fs::metadata(&request.source).context(what)?.is_file() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).context(what)?;
        }
        return fs::File::create(target).map(drop).context(what);
    }
    fs::create_dir_all(target).context(what)
}

/// File system type and source of the topmost mount at a path (proc_pid_mountinfo(5)).
fn mounted<'a>(mountinfo: &'a str, target: &Path) -> Option<(&'a str, &'a str)> {
    let target = target.to_str()?;
    mountinfo.lines().rev().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        (mount.split(' ').nth(4)? == target).then(|| {
            let mut fields = file_system.split(' ');
            (
                fields.next().unwrap_or_default(),
                fields.next().unwrap_or_default(),
            )
        })
    })
}

struct Options {
    flags: MsFlags,
    propagation: MsFlags,
    data: String,
}

impl Options {
    /// Words that are mount flags, and the rest for the file system.
    fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            propagation: MsFlags::empty(),
            data: String::new(),
        };
        for option in options {
            match option.as_str() {
                "ro" => parsed.flags |= MsFlags::MS_RDONLY,
                "rw" => parsed.flags &= !MsFlags::MS_RDONLY,
                "nosuid" => parsed.flags |= MsFlags::MS_NOSUID,
                "nodev" => parsed.flags |= MsFlags::MS_NODEV,
                "noexec" => parsed.flags |= MsFlags::MS_NOEXEC,
                "noatime" => parsed.flags |= MsFlags::MS_NOATIME,
                "nodiratime" => parsed.flags |= MsFlags::MS_NODIRATIME,
                "relatime" => parsed.flags |= MsFlags::MS_RELATIME,
                "sync" => parsed.flags |= MsFlags::MS_SYNCHRONOUS,
                "bind" => parsed.flags |= MsFlags::MS_BIND,
                "rbind" => parsed.flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                "private" => parsed.propagation = MsFlags::MS_PRIVATE,
                "rprivate" => parsed.propagation = MsFlags::MS_PRIVATE | MsFlags::MS_REC,
                "slave" => parsed.propagation = MsFlags::MS_SLAVE,
                "rslave" => parsed.propagation = MsFlags::MS_SLAVE | MsFlags::MS_REC,
                "shared" => parsed.propagation = MsFlags::MS_SHARED,
                "rshared" => parsed.propagation = MsFlags::MS_SHARED | MsFlags::MS_REC,
                data => {
                    if !parsed.data.is_empty() {
                        parsed.data.push(',');
                    }
                    parsed.data.push_str(data);
                }
            }
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_propagation_and_data() {
        let options: Vec<String> = ["ro", "nosuid", "rslave", "size=1m", "mode=755"]
            .map(String::from)
            .into_iter()
            .collect();
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(parsed.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(parsed.data, "size=1m,mode=755");
    }

    #[test]
    fn targets_with_dots_are_refused() {
        assert!(checked_target("/run/catamaran/share").is_ok());
        for target in ["", "/", "relative", "/run/../etc", "/run/./x/.."] {
            let refused = checked_target(target).is_err();
            assert!(refused || target == "/run/./x", "{target}");
        }
    }

    #[test]
    fn the_topmost_mount_is_found() {
        let mountinfo = "1 0 0:1 / /run rw - tmpfs tmpfs rw\n2 1 0:2 / /run/x rw shared:1 - tmpfs a rw\n\
                         3 2 0:3 / /run/x rw - virtiofs tag rw\n";
        assert_eq!(mounted(mountinfo, Path::new("/run/x")), Some(("virtiofs", "tag")));
        assert_eq!(mounted(mountinfo, Path::new("/run/y")), None);
    }
}
