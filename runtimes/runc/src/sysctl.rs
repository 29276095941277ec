//! Which namespace a sysctl belongs to, and where it is written.

use std::path::PathBuf;

/// Namespace of a sysctl that has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Network,
    Ipc,
}

/// A sysctl that a pod may not have.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SysctlError {
    #[error("sysctl {0:?} is not a name")]
    Name(String),
    #[error("sysctl {0} belongs to the whole node, not to a namespace")]
    NotNamespaced(String),
}

/// Reads a name in either spelling: with dots, or with slashes where a part has dots in it
/// (`net/ipv4/conf/eth0.1/forwarding`; in the dotted spelling that dot is a slash), see sysctl(8).
pub(crate) fn locate(name: &str) -> Result<(Scope, PathBuf), SysctlError> {
    let slashed = name
        .find(['.', '/'])
        .is_some_and(|first| name[first..].starts_with('/'));
    let path: String = if slashed {
        name.to_owned()
    } else {
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    let good = |part: &str| !matches!(part, "" | "." | "..");
    if !path.split('/').all(good) || !path.contains('/') || path.contains('\0') {
        return Err(SysctlError::Name(name.to_owned()));
    }
    let scope = match path.split_once('/') {
        Some(("net", _)) => Scope::Network,
        Some(("fs", rest)) if rest.starts_with("mqueue/") => Scope::Ipc,
        Some(("kernel", "sem")) => Scope::Ipc,
        Some(("kernel", rest)) if rest.starts_with("shm") || rest.starts_with("msg") => Scope::Ipc,
        _ => return Err(SysctlError::NotNamespaced(name.to_owned())),
    };
    Ok((scope, PathBuf::from("/proc/sys").join(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_located() {
        let at = |name: &str| locate(name).map(|(scope, path)| (scope, path.display().to_string()));
        let ok = |name, scope, path: &str| assert_eq!(at(name).unwrap(), (scope, path.to_owned()));
        ok(
            "net.ipv4.ip_forward",
            Scope::Network,
            "/proc/sys/net/ipv4/ip_forward",
        );
        ok(
            "net.ipv4.conf.eth0/1.forwarding",
            Scope::Network,
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
        );
        ok(
            "net/ipv4/conf/eth0.1/forwarding",
            Scope::Network,
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
        );
        ok(
            "kernel.shm_rmid_forced",
            Scope::Ipc,
            "/proc/sys/kernel/shm_rmid_forced",
        );
        ok("fs.mqueue.msg_max", Scope::Ipc, "/proc/sys/fs/mqueue/msg_max");
        for name in [
            "kernel.panic",
            "vm.swappiness",
            "kernel.hostname",
            "fs.file-max",
            "kernel.semantics",
        ] {
            assert!(
                matches!(locate(name), Err(SysctlError::NotNamespaced(_))),
                "{name}"
            );
        }
        for name in ["", "net", "net/../kernel/panic", "net//x", "net.", "/net/x"] {
            assert!(matches!(locate(name), Err(SysctlError::Name(_))), "{name}");
        }
    }
}
