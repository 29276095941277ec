//! Where the cgroup file systems are mounted, and which version has the controllers.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{CgroupError, Result};

const MOUNTINFO: &str = "/proc/self/mountinfo";
/// Controllers whose presence on version 1 makes a hybrid host a version 1 host.
const RESOURCE_CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// Version of the control group interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    /// One hierarchy for each controller.
    V1,
    /// One hierarchy for all.
    V2,
}

/// The mounts that cgroups are made in.
#[derive(Debug, Clone)]
pub struct Hierarchy {
    pub(crate) mounts: Mounts,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mounts {
    V1 {
        /// Mount point by controller, also `name=systemd`. Several controllers may share one.
        controllers: BTreeMap<String, PathBuf>,
        /// The version 2 hierarchy without controllers of a hybrid host. Runtimes may put processes there.
        unified: Option<PathBuf>,
    },
    V2 {
        root: PathBuf,
    },
}

impl Hierarchy {
    /// The host's, looked up once.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`].
    pub fn host() -> Result<&'static Self> {
        static HOST: OnceLock<Hierarchy> = OnceLock::new();
        if let Some(host) = HOST.get() {
            return Ok(host);
        }
        let text = std::fs::read(MOUNTINFO).map_err(CgroupError::io("read", MOUNTINFO))?;
        let host = Self {
            mounts: from_mountinfo(&text).ok_or(CgroupError::NotMounted)?,
        };
        Ok(HOST.get_or_init(|| host))
    }

    /// Version 1 with the given mount point for each controller.
    #[must_use]
    pub fn v1(controllers: BTreeMap<String, PathBuf>) -> Self {
        Self {
            mounts: Mounts::V1 {
                controllers,
                unified: None,
            },
        }
    }

    /// Version 2, mounted at `root`.
    #[must_use]
    pub fn v2(root: PathBuf) -> Self {
        Self {
            mounts: Mounts::V2 { root },
        }
    }

    /// Which version it is.
    #[must_use]
    pub fn version(&self) -> CgroupVersion {
        match self.mounts {
            Mounts::V1 { .. } => CgroupVersion::V1,
            Mounts::V2 { .. } => CgroupVersion::V2,
        }
    }

    /// Controllers that are mounted (version 1) or that the root has (version 2).
    ///
    /// # Errors
    /// [`CgroupError::Io`].
    pub fn controllers(&self) -> Result<Vec<String>> {
        match &self.mounts {
            Mounts::V1 { controllers, .. } => Ok(controllers.keys().cloned().collect()),
            Mounts::V2 { root } => {
                let file = root.join("cgroup.controllers");
                let text = std::fs::read_to_string(&file).map_err(CgroupError::io("read", file))?;
                Ok(text.split_whitespace().map(str::to_owned).collect())
            }
        }
    }

    /// Every mount once, in which a cgroup is a directory. The first has all processes.
    pub(crate) fn roots(&self) -> Vec<&Path> {
        match &self.mounts {
            Mounts::V1 { controllers, .. } => {
                let mut roots: Vec<&Path> = Vec::new();
                // A controller that every runtime puts processes in comes first.
                let first = ["pids", "memory", "freezer", "devices"];
                let first = first.iter().filter_map(|name| controllers.get(*name));
                for root in first.chain(controllers.values()) {
                    if !roots.contains(&root.as_path()) {
                        roots.push(root);
                    }
                }
                roots
            }
            Mounts::V2 { root } => vec![root],
        }
    }
}

/// The path below a mount; refuses what is not absolute, the root itself, and what could leave it.
pub(crate) fn relative(path: &str) -> Result<&Path> {
    let inner = path.strip_prefix('/').map(Path::new);
    inner
        .filter(|inner| inner.components().next().is_some() && !path.contains('\0'))
        .filter(|inner| {
            inner
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
        })
        .filter(|_| !path.split('/').any(|part| part == "."))
        .ok_or_else(|| CgroupError::InvalidPath(path.chars().take(200).collect()))
}

/// Reads proc_pid_mountinfo(5).
fn from_mountinfo(text: &[u8]) -> Option<Mounts> {
    let mut controllers: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut unified = None;
    for line in text.split(|byte| *byte == b'\n') {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let Some(separator) = fields.iter().position(|field| *field == b"-") else {
            continue;
        };
        let (Some(point), Some(kind), Some(options)) = (
            fields.get(4),
            fields.get(separator + 1),
            fields.get(separator + 3),
        ) else {
            continue;
        };
        let point = || PathBuf::from(std::ffi::OsString::from_vec(unescape(point)));
        match *kind {
            b"cgroup2" => {
                unified.get_or_insert_with(point);
            }
            b"cgroup" => {
                // The options that are not controllers are few; others may be added by later kernels.
                let flags: [&[u8]; 9] = [
                    b"rw",
                    b"ro",
                    b"xattr",
                    b"clone_children",
                    b"noprefix",
                    b"cpuset_v2_mode",
                    b"favordynmods",
                    b"none",
                    b"all",
                ];
                for option in options.split(|byte| *byte == b',') {
                    if !flags.contains(&option) && !option.starts_with(b"release_agent") {
                        let name = String::from_utf8_lossy(option).into_owned();
                        controllers.entry(name).or_insert_with(point);
                    }
                }
            }
            _ => {}
        }
    }
    if RESOURCE_CONTROLLERS
        .iter()
        .any(|name| controllers.contains_key(*name))
    {
        return Some(Mounts::V1 { controllers, unified });
    }
    unified.map(|root| Mounts::V2 { root })
}

/// Undoes mountinfo's escapes: a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(code) = code {
            plain.push(code);
            rest = &after[3..];
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const V1: &str = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/mem\\040ory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn versions_are_told_apart() {
        let Some(Mounts::V1 { controllers, unified }) = from_mountinfo(V1.as_bytes()) else {
            panic!("a hybrid host is version 1")
        };
        assert_eq!(controllers["cpuacct"], controllers["cpu"]);
        assert_eq!(controllers["memory"], Path::new("/sys/fs/cgroup/mem ory"));
        assert!(controllers.contains_key("name=systemd") && !controllers.contains_key("rw"));
        assert_eq!(unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));

        let named = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                     41 31 0:38 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            from_mountinfo(named.as_bytes()),
            Some(Mounts::V2 {
                root: "/sys/fs/cgroup".into()
            }),
            "a named hierarchy has no controllers"
        );
        assert_eq!(from_mountinfo(b"22 27 0:21 / /proc rw - proc proc rw\n"), None);
    }

    #[test]
    fn this_host_has_a_hierarchy() {
        let host = Hierarchy::host().unwrap();
        let roots = host.roots();
        assert!(roots.iter().all(|root| root.is_dir()), "{roots:?}");
        assert!(!host.controllers().unwrap().is_empty());
    }

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(relative("/kubepods/pod1").unwrap(), Path::new("kubepods/pod1"));
        for bad in ["", "/", "//", "a", "/a/../b", "/..", "/./a", "/a/.", "/a\0"] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn accepted_paths_stay_below(path in "[a./]{0,12}") {
            if let Ok(inner) = relative(&path) {
                prop_assert!(inner.is_relative());
                prop_assert!(inner.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }

        #[test]
        fn any_mountinfo_is_read(text in any::<Vec<u8>>()) {
            let _ = from_mountinfo(&text);
        }
    }
}
