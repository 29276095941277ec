//! Limits of a pod's cgroup, in CRI's terms (LinuxContainerResources: those of version 1), written as each
//! version has them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{CgroupError, Result};
use crate::hierarchy::{Hierarchy, Mounts, relative};
use crate::parse;

/// Limits; `None` leaves what is there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Bytes of memory; -1: no limit.
    pub memory_bytes: Option<i64>,
    /// Bytes of memory and swap together; -1: no limit. Passed over on a host that does not account for swap,
    /// as every runtime does.
    pub memory_swap_bytes: Option<i64>,
    /// Share of the CPU beside other cgroups, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// CPU time in each period, in microseconds; -1: no limit.
    pub cpu_quota_us: Option<i64>,
    /// Length of a period in microseconds, 1000 to 1000000.
    pub cpu_period_us: Option<u64>,
    /// CPUs, as a list of ranges.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes, as a list of ranges.
    pub cpuset_mems: Option<String>,
    /// Threads; -1: no limit.
    pub pids: Option<i64>,
    /// Files of version 2 by name, written as they are, after everything else.
    pub unified: BTreeMap<String, String>,
}

/// `cpu.weight` for `cpu.shares`, by the formula that runc 1.3.2 and crun 1.23 brought in: 2 becomes 1, 1024
/// becomes 100, 262144 becomes 10000, on a parabola of the logarithms between. 0 (not set) stays 0.
pub(crate) fn weight_from_shares(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1..=2 => 1,
        262_144.. => 10_000,
        shares => {
            // Lossless below 2^53.
            #[allow(clippy::cast_precision_loss)]
            let log = (shares as f64).log2();
            let weight = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil();
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let weight = weight as u64;
            weight.clamp(1, 10_000)
        }
    }
}

impl Hierarchy {
    /// Sets limits of an existing cgroup.
    ///
    /// # Errors
    /// [`CgroupError::NotFound`]; [`CgroupError::Unsupported`] for a limit that the host has no controller
    /// for; [`CgroupError::Write`] where the kernel refuses a value. Limits before that one are set.
    pub fn set(&self, path: &str, resources: &Resources) -> Result<()> {
        let inner = relative(path)?;
        if !self.exists(path)? {
            return Err(CgroupError::NotFound(path.to_owned()));
        }
        match &self.mounts {
            Mounts::V1 { controllers, .. } => {
                if let Some(file) = resources.unified.keys().next() {
                    return Err(CgroupError::Unsupported {
                        path: path.to_owned(),
                        file: file.clone(),
                    });
                }
                let dir = |controller: &str| controllers.get(controller).map(|root| root.join(inner));
                Limits { path, dir: &dir }.set_v1(resources)
            }
            Mounts::V2 { root } => {
                let dir = |_: &str| Some(root.join(inner));
                Limits { path, dir: &dir }.set_v2(resources)
            }
        }
    }
}

struct Limits<'a> {
    path: &'a str,
    /// The cgroup's directory by controller.
    dir: &'a dyn Fn(&str) -> Option<PathBuf>,
}

impl Limits<'_> {
    fn unsupported(&self, file: &str) -> CgroupError {
        CgroupError::Unsupported {
            path: self.path.to_owned(),
            file: file.to_owned(),
        }
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let controller = name.split('.').next().unwrap_or(name);
        let path = (self.dir)(controller).map(|dir| dir.join(name));
        path.filter(|path| path.exists())
            .ok_or_else(|| self.unsupported(name))
    }

    fn write(&self, name: &str, value: impl ToString) -> Result<()> {
        let (path, value) = (self.file(name)?, value.to_string());
        std::fs::write(&path, &value).map_err(|source| CgroupError::Write { path, value, source })
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.file(name)?;
        std::fs::read_to_string(&path).map_err(CgroupError::io("read", path))
    }

    fn set_v1(&self, resources: &Resources) -> Result<()> {
        self.cpuset(resources)?;
        if let Some(shares) = resources.cpu_shares.filter(|shares| *shares > 0) {
            self.write("cpu.shares", shares)?;
        }
        if let Some(period) = resources.cpu_period_us.filter(|period| *period > 0) {
            self.write("cpu.cfs_period_us", period)?;
        }
        if let Some(quota) = resources.cpu_quota_us.filter(|quota| *quota != 0) {
            self.write("cpu.cfs_quota_us", quota)?;
        }
        self.memory_v1(resources)?;
        match resources.pids {
            Some(pids) if pids > 0 => self.write("pids.max", pids),
            Some(pids) if pids < 0 => self.write("pids.max", "max"),
            _ => Ok(()),
        }
    }

    /// The limit of both must never be below that of memory, so the order depends on the direction.
    fn memory_v1(&self, resources: &Resources) -> Result<()> {
        const MEMORY: &str = "memory.limit_in_bytes";
        const BOTH: &str = "memory.memsw.limit_in_bytes";
        let memory = resources.memory_bytes.filter(|bytes| *bytes != 0);
        let both = resources
            .memory_swap_bytes
            .filter(|bytes| *bytes != 0 && self.file(BOTH).is_ok());
        let (Some(memory), Some(both)) = (memory, both) else {
            // No memory limit includes no limit for both: the kernel wants that one lifted first.
            if memory == Some(-1) && self.file(BOTH).is_ok() {
                self.write(BOTH, -1)?;
            }
            return match (memory, both) {
                (Some(memory), _) => self.write(MEMORY, memory),
                (_, Some(both)) => self.write(BOTH, both),
                _ => Ok(()),
            };
        };
        let now = parse::limit_v1(&self.read(BOTH)?).flatten();
        let above_now = match (now, u64::try_from(memory)) {
            (Some(now), Ok(memory)) => memory > now,
            (Some(_), Err(_)) => true,
            (None, _) => false,
        };
        if above_now {
            self.write(BOTH, both)?;
            self.write(MEMORY, memory)
        } else {
            self.write(MEMORY, memory)?;
            self.write(BOTH, both)
        }
    }

    fn set_v2(&self, resources: &Resources) -> Result<()> {
        self.cpuset(resources)?;
        if let Some(shares) = resources.cpu_shares.filter(|shares| *shares > 0) {
            self.write("cpu.weight", weight_from_shares(shares))?;
        }
        self.cpu_max(resources)?;
        let max = |value: i64| {
            if value < 0 {
                "max".to_owned()
            } else {
                value.to_string()
            }
        };
        if let Some(memory) = resources.memory_bytes.filter(|bytes| *bytes != 0) {
            self.write("memory.max", max(memory))?;
        }
        if let Some(both) = resources.memory_swap_bytes.filter(|bytes| *bytes != 0)
            && self.file("memory.swap.max").is_ok()
        {
            let memory = match resources.memory_bytes.filter(|bytes| *bytes != 0) {
                Some(memory) => u64::try_from(memory).ok(),
                None => parse::limit(&self.read("memory.max")?).flatten(),
            };
            let swap = match (u64::try_from(both), memory) {
                // Version 2 has no way to limit both where memory has no limit.
                (Err(_), _) | (Ok(_), None) => "max".to_owned(),
                (Ok(both), Some(memory)) => both.saturating_sub(memory).to_string(),
            };
            self.write("memory.swap.max", swap)?;
        }
        if let Some(pids) = resources.pids.filter(|pids| *pids != 0) {
            self.write("pids.max", max(pids))?;
        }
        for (name, value) in &resources.unified {
            if name.contains('/') || !name.contains('.') {
                return Err(self.unsupported(name));
            }
            self.write(name, value)?;
        }
        Ok(())
    }

    /// Quota and period are one file; what is not given stays.
    fn cpu_max(&self, resources: &Resources) -> Result<()> {
        let quota = resources.cpu_quota_us.filter(|quota| *quota != 0);
        let period = resources.cpu_period_us.filter(|period| *period > 0);
        if quota.is_none() && period.is_none() {
            return Ok(());
        }
        let now = self.read("cpu.max")?;
        let (quota_now, period_now) = now.trim().split_once(' ').unwrap_or(("max", "100000"));
        let quota = match quota {
            Some(quota) if quota < 0 => "max".to_owned(),
            Some(quota) => quota.to_string(),
            None => quota_now.to_owned(),
        };
        let period = period.map_or_else(|| period_now.to_owned(), |period| period.to_string());
        self.write("cpu.max", format!("{quota} {period}"))
    }

    fn cpuset(&self, resources: &Resources) -> Result<()> {
        for (name, list) in [
            ("cpuset.cpus", &resources.cpuset_cpus),
            ("cpuset.mems", &resources.cpuset_mems),
        ] {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                self.write(name, list)?;
            }
        }
        Ok(())
    }
}

/// Used by the tests of both versions.
#[cfg(test)]
pub(crate) fn fixture(dir: &std::path::Path, files: &[(&str, &str)]) {
    std::fs::create_dir_all(dir).unwrap();
    for (name, content) in files {
        std::fs::write(dir.join(name), content).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn weights_meet_the_fixed_points() {
        for (shares, weight) in [
            (0, 0),
            (1, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(weight_from_shares(shares), weight, "{shares}");
        }
    }

    #[test]
    fn version_2_files_are_written() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("kubepods/pod1");
        let empty = [
            "cpu.weight",
            "memory.swap.max",
            "pids.max",
            "cpuset.cpus",
            "memory.high",
        ];
        fixture(&dir, &empty.map(|name| (name, "")));
        fixture(&dir, &[("cpu.max", "max 100000\n"), ("memory.max", "max\n")]);
        let hierarchy = Hierarchy::v2(root.path().to_owned());
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let resources = Resources {
            memory_bytes: Some(1 << 20),
            memory_swap_bytes: Some(3 << 20),
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            pids: Some(-1),
            cpuset_cpus: Some("0-1".to_owned()),
            unified: BTreeMap::from([("memory.high".to_owned(), "1000".to_owned())]),
            ..Resources::default()
        };
        hierarchy.set("/kubepods/pod1", &resources).unwrap();
        assert_eq!(read("memory.max"), "1048576");
        assert_eq!(read("memory.swap.max"), "2097152");
        assert_eq!(read("cpu.weight"), "100");
        assert_eq!(read("cpu.max"), "50000 100000");
        assert_eq!(read("pids.max"), "max");
        assert_eq!(read("cpuset.cpus"), "0-1");
        assert_eq!(read("memory.high"), "1000");
        hierarchy
            .set(
                "/kubepods/pod1",
                &Resources {
                    cpu_quota_us: Some(-1),
                    ..Resources::default()
                },
            )
            .unwrap();
        assert_eq!(read("cpu.max"), "max 100000");

        let hugetlb = Resources {
            unified: BTreeMap::from([("hugetlb.2MB.max".to_owned(), "0".to_owned())]),
            ..Resources::default()
        };
        let error = hierarchy.set("/kubepods/pod1", &hugetlb).unwrap_err();
        assert!(
            matches!(&error, CgroupError::Unsupported { file, .. } if file == "hugetlb.2MB.max"),
            "{error}"
        );
        let error = hierarchy.set("/kubepods/pod2", &resources).unwrap_err();
        assert!(matches!(error, CgroupError::NotFound(_)), "{error}");
        for escape in ["../cpu.max", "cgroup/../x.y"] {
            let unified = BTreeMap::from([(escape.to_owned(), "0".to_owned())]);
            assert!(
                hierarchy
                    .set(
                        "/kubepods/pod1",
                        &Resources {
                            unified,
                            ..Resources::default()
                        }
                    )
                    .is_err()
            );
        }
    }

    proptest! {
        #[test]
        fn weights_are_in_range_and_grow(shares in 1u64..300_000) {
            let weight = weight_from_shares(shares);
            prop_assert!((1..=10_000).contains(&weight));
            prop_assert!(weight <= weight_from_shares(shares + 1));
        }
    }
}
