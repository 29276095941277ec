//! What belongs to the pod as a whole: hostname, sysctls, loopback, the shared `/dev/shm` and the shared PID
//! namespace.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::MsFlags;

use catamaran_guest_protocol::v1::ConfigureSandboxRequest;

use crate::boot::{STATE, mount_at};
use crate::error::{Context, Error, Result};
use crate::{network, pause};

/// One tmpfs for the `/dev/shm` of all containers.
const SHM: &str = "shm";

/// Applies the request, again where it was applied before. Returns the pid of the shared PID namespace's
/// init where one was asked for and `pause` is not it already.
pub(crate) fn configure(request: &ConfigureSandboxRequest, pause: Option<i32>) -> Result<Option<i32>> {
    if request.hostname.len() > 64 {
        return Err(Error::Invalid("hostname is longer than 64 bytes".into()));
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .context(|| format!("cannot set the hostname to {:?}", request.hostname))?;
    }
    network::loopback_up()?;
    for (name, value) in &request.sysctls {
        set_sysctl(name, value)?;
    }
    if request.shm_bytes > 0 {
        mount_shm(request.shm_bytes)?;
    }
    match pause {
        None if request.shared_pid => pause::spawn().map(Some),
        pause => Ok(pause),
    }
}

/// Sets a sysctl by its name with dots, or with slashes where a part has dots (sysctl(8)).
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path = sysctl_path(name).ok_or_else(|| Error::Invalid(format!("{name:?} is no sysctl name")))?;
    fs::write(Path::new("/proc/sys").join(path), value).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => Error::Invalid(format!("the guest kernel has no sysctl {name}")),
        Some(libc::EINVAL) => Error::Invalid(format!("{value:?} is no value for sysctl {name}")),
        _ => Error::Failed {
            what: format!("cannot set sysctl {name}"),
            source: error.into(),
        },
    })
}

fn sysctl_path(name: &str) -> Option<String> {
    let path = match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => name.to_owned(),
        _ => {
            // Dots become slashes and slashes dots: net.ipv4.conf.eth0/1.forwarding.
            name.chars()
                .map(|letter| match letter {
                    '.' => '/',
                    '/' => '.',
                    other => other,
                })
                .collect()
        }
    };
    let plain = !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    plain.then_some(path)
}

fn mount_shm(bytes: u64) -> Result<()> {
    let target = format!("{STATE}/{SHM}");
    let size = format!("mode=1777,size={bytes}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mounted = fs::read_to_string("/proc/self/mountinfo")
        .context(|| "cannot read the mounts".into())?
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(&target));
    if !mounted {
        return mount_at("shm", &target, "tmpfs", flags, Some(&size));
    }
    let remount = nix::mount::mount(
        None::<&str>,
        target.as_str(),
        None::<&str>,
        flags | MsFlags::MS_REMOUNT,
        Some(size.as_str()),
    );
    match remount {
        Err(Errno::EINVAL) => Err(Error::State(format!(
            "{target} holds more than {bytes} bytes already"
        ))),
        result => result.context(|| format!("cannot resize {target}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_have_dots_or_slashes() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").as_deref(),
            Some("net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/1.forwarding").as_deref(),
            Some("net/ipv4/conf/eth0.1/forwarding")
        );
        for name in ["", "..", "net..x", "/etc/passwd", "net/../x"] {
            assert_eq!(sysctl_path(name), None, "{name}");
        }
    }
}
