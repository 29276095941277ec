//! Statistics from version 2's files (cgroup-v2.rst, "Controllers"). All counters are hierarchical.

use std::path::Path;

use crate::error::Result;
use crate::lifecycle::count_processes;
use crate::parse;
use crate::stats::{
    CgroupStats, CpuStats, Detail, IoStats, MemoryStats, PidsStats, Pressure, read_file, read_value,
};

/// Reads the cgroup whose directory is `dir`.
pub(crate) fn read(detail: Detail, dir: &Path) -> Result<CgroupStats> {
    let full = detail == Detail::Full;
    Ok(CgroupStats {
        timestamp_ns: 0,
        cpu: cpu(dir)?,
        memory: memory(full, dir)?,
        pids: if detail >= Detail::Processes {
            pids(dir)?
        } else {
            None
        },
        io: io(full, dir)?,
    })
}

fn pressure(dir: &Path, name: &str) -> Result<Option<Pressure>> {
    Ok(read_file(&dir.join(name), parse::pressure)?.flatten())
}

fn cpu(dir: &Path) -> Result<Option<CpuStats>> {
    let mut cpu = CpuStats::default();
    let known = read_file(&dir.join("cpu.stat"), |text| {
        for (key, number) in parse::keyed(text) {
            let ns = number.saturating_mul(1000);
            match key {
                "usage_usec" => cpu.usage_ns = ns,
                "user_usec" => cpu.user_ns = ns,
                "system_usec" => cpu.system_ns = ns,
                "nr_periods" => cpu.periods = number,
                "nr_throttled" => cpu.throttled_periods = number,
                "throttled_usec" => cpu.throttled_ns = ns,
                _ => {}
            }
        }
    })?;
    if known.is_none() {
        return Ok(None);
    }
    cpu.pressure = pressure(dir, "cpu.pressure")?;
    Ok(Some(cpu))
}

fn memory(full: bool, dir: &Path) -> Result<Option<MemoryStats>> {
    let Some(usage) = read_value(dir.join("memory.current"), parse::number)? else {
        return Ok(None);
    };
    let mut memory = MemoryStats {
        usage,
        limit: read_value(dir.join("memory.max"), parse::limit)?.flatten(),
        swap_usage: read_value(dir.join("memory.swap.current"), parse::number)?.unwrap_or(0),
        swap_limit: read_value(dir.join("memory.swap.max"), parse::limit)?.flatten(),
        pressure: pressure(dir, "memory.pressure")?,
        ..MemoryStats::default()
    };
    let mut inactive_file = 0;
    read_file(&dir.join("memory.stat"), |text| {
        for (key, number) in parse::keyed(text) {
            match key {
                "anon" => memory.rss = number,
                "file" => memory.cache = number,
                "file_mapped" => memory.mapped_file = number,
                "kernel" => memory.kernel = number,
                "pgfault" => memory.page_faults = number,
                "pgmajfault" => memory.major_page_faults = number,
                "inactive_file" => inactive_file = number,
                _ => {}
            }
        }
    })?;
    memory.derive(inactive_file);
    if !full {
        return Ok(Some(memory));
    }
    memory.max_usage = read_value(dir.join("memory.peak"), parse::number)?;
    read_file(&dir.join("memory.events"), |text| {
        for (key, number) in parse::keyed(text) {
            match key {
                "max" => memory.limit_hits = number,
                "oom_kill" => memory.oom_kills = number,
                _ => {}
            }
        }
    })?;
    Ok(Some(memory))
}

fn pids(dir: &Path) -> Result<Option<PidsStats>> {
    let Some(threads) = read_value(dir.join("pids.current"), parse::number)? else {
        return Ok(None);
    };
    let limit = read_value(dir.join("pids.max"), parse::limit)?.flatten();
    Ok(Some(PidsStats {
        processes: count_processes(dir)?,
        threads,
        limit,
    }))
}

fn io(full: bool, dir: &Path) -> Result<Option<IoStats>> {
    let pressure = pressure(dir, "io.pressure")?;
    let devices = if full {
        read_file(&dir.join("io.stat"), parse::io_stat)?
    } else {
        None
    };
    if devices.is_none() && pressure.is_none() {
        return Ok(None);
    }
    Ok(Some(IoStats {
        devices: devices.unwrap_or_default(),
        pressure,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::fixture;
    use crate::{CgroupError, Hierarchy, Stall};

    #[test]
    fn a_full_cgroup_is_read() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("kubepods/pod1");
        let psi = "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        fixture(
            &dir,
            &[
                (
                    "cpu.stat",
                    "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 5\nnr_throttled 2\nthrottled_usec 9\n",
                ),
                ("cpu.pressure", psi),
                ("memory.current", "1000000\n"),
                ("memory.max", "4000000\n"),
                ("memory.peak", "2000000\n"),
                ("memory.swap.current", "4096\n"),
                ("memory.swap.max", "max\n"),
                (
                    "memory.stat",
                    "anon 500\nfile 900\nkernel 77\nfile_mapped 60\ninactive_file 400000\npgfault 11\npgmajfault 3\n",
                ),
                (
                    "memory.events",
                    "low 0\nhigh 0\nmax 6\noom 2\noom_kill 1\noom_group_kill 0\n",
                ),
                ("memory.pressure", psi),
                ("pids.current", "12\n"),
                ("pids.max", "100\n"),
                ("cgroup.procs", "10\n11\n"),
                (
                    "io.stat",
                    "254:0 rbytes=4096 wbytes=512 rios=2 wios=1 dbytes=0 dios=0\n",
                ),
                ("io.pressure", psi),
            ],
        );
        fixture(&dir.join("child"), &[("cgroup.procs", "12\n")]);
        let stats = Hierarchy::v2(root.path().to_owned())
            .stats("/kubepods/pod1", Detail::Full)
            .unwrap();
        assert!(stats.timestamp_ns > 0);
        let cpu = stats.cpu.unwrap();
        assert_eq!(
            (cpu.usage_ns, cpu.user_ns, cpu.system_ns),
            (30_000, 20_000, 10_000)
        );
        assert_eq!(
            (cpu.periods, cpu.throttled_periods, cpu.throttled_ns),
            (5, 2, 9_000)
        );
        let stall = Stall {
            avg10: 1.5,
            avg60: 0.0,
            avg300: 0.0,
            total_us: 42,
        };
        assert_eq!(cpu.pressure.unwrap().some, stall);
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage, memory.working_set), (1_000_000, 600_000));
        assert_eq!(
            (memory.limit, memory.available),
            (Some(4_000_000), Some(3_400_000))
        );
        assert_eq!(
            (memory.rss, memory.cache, memory.kernel, memory.mapped_file),
            (500, 900, 77, 60)
        );
        assert_eq!(
            (memory.swap_usage, memory.swap_limit, memory.max_usage),
            (4096, None, Some(2_000_000))
        );
        assert_eq!((memory.limit_hits, memory.oom_kills), (6, 1));
        assert_eq!((memory.page_faults, memory.major_page_faults), (11, 3));
        assert_eq!(memory.pressure.unwrap().full.total_us, 7);
        assert_eq!(
            stats.pids,
            Some(PidsStats {
                processes: 3,
                threads: 12,
                limit: Some(100)
            })
        );
        let io = stats.io.unwrap();
        assert_eq!(io.totals(), (4096, 512, 2, 1));
        assert_eq!(io.pressure.unwrap().some, stall);
    }

    #[test]
    fn what_is_missing_is_none_and_what_is_damaged_is_named() {
        let root = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::v2(root.path().to_owned());
        assert!(
            matches!(hierarchy.stats("/pod1", Detail::Full), Err(CgroupError::NotFound(path)) if path == "/pod1")
        );
        fixture(
            &root.path().join("pod1"),
            &[("cpu.stat", "usage_usec 1\n"), ("cgroup.procs", "")],
        );
        let stats = hierarchy.stats("/pod1", Detail::Full).unwrap();
        assert_eq!(
            (stats.cpu.unwrap().usage_ns, stats.memory, stats.pids),
            (1000, None, None)
        );
        fixture(&root.path().join("pod1"), &[("memory.current", "many\n")]);
        let error = hierarchy.stats("/pod1", Detail::Full).unwrap_err().to_string();
        assert!(
            error.contains("memory.current") && error.contains("many"),
            "{error}"
        );
    }
}
