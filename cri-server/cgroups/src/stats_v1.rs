//! Statistics from version 1's files. Its counters are hierarchical in cpuacct, pids and the `total_` and
//! `_recursive` forms.

use std::path::PathBuf;

use crate::error::Result;
use crate::lifecycle::count_processes;
use crate::parse;
use crate::stats::{CgroupStats, CpuStats, Detail, IoStats, MemoryStats, PidsStats, read_file, read_value};

/// Nanoseconds of a tick of cpuacct.stat: USER_HZ is 100 on every architecture that Rust runs on.
const TICK_NS: u64 = 10_000_000;

/// `file` gives a file's path by controller and name; `None` where the controller is not mounted.
pub(crate) fn read(detail: Detail, file: impl Fn(&str, &str) -> Option<PathBuf>) -> Result<CgroupStats> {
    let full = detail == Detail::Full;
    Ok(CgroupStats {
        timestamp_ns: 0,
        cpu: cpu(full, &file)?,
        memory: memory(full, &file)?,
        pids: if detail >= Detail::Processes {
            pids(&file)?
        } else {
            None
        },
        io: if full { io(&file)? } else { None },
    })
}

type Files<'a> = &'a dyn Fn(&str, &str) -> Option<PathBuf>;

fn value(files: Files<'_>, controller: &str, name: &str) -> Result<Option<u64>> {
    match files(controller, name) {
        Some(path) => read_value(path, parse::number),
        None => Ok(None),
    }
}

fn with_keys(files: Files<'_>, controller: &str, name: &str, mut each: impl FnMut(&str, u64)) -> Result<()> {
    if let Some(path) = files(controller, name) {
        read_file(&path, |text| {
            parse::keyed(text).for_each(|(key, number)| each(key, number))
        })?;
    }
    Ok(())
}

fn cpu(full: bool, files: Files<'_>) -> Result<Option<CpuStats>> {
    let Some(usage_ns) = value(files, "cpuacct", "cpuacct.usage")? else {
        return Ok(None);
    };
    let mut cpu = CpuStats {
        usage_ns,
        ..CpuStats::default()
    };
    if !full {
        return Ok(Some(cpu));
    }
    with_keys(files, "cpuacct", "cpuacct.stat", |key, ticks| match key {
        "user" => cpu.user_ns = ticks.saturating_mul(TICK_NS),
        "system" => cpu.system_ns = ticks.saturating_mul(TICK_NS),
        _ => {}
    })?;
    with_keys(files, "cpu", "cpu.stat", |key, number| match key {
        "nr_periods" => cpu.periods = number,
        "nr_throttled" => cpu.throttled_periods = number,
        "throttled_time" => cpu.throttled_ns = number,
        _ => {}
    })?;
    Ok(Some(cpu))
}

fn memory(full: bool, files: Files<'_>) -> Result<Option<MemoryStats>> {
    let Some(usage) = value(files, "memory", "memory.usage_in_bytes")? else {
        return Ok(None);
    };
    let limit = |name: &str| match files("memory", name) {
        Some(path) => read_value(path, parse::limit_v1).map(Option::flatten),
        None => Ok(None),
    };
    let mut memory = MemoryStats {
        usage,
        limit: limit("memory.limit_in_bytes")?,
        ..MemoryStats::default()
    };
    // Version 1 limits memory and swap together, and swap only where memory is limited.
    let both = match memory.limit {
        Some(_) => limit("memory.memsw.limit_in_bytes")?,
        None => None,
    };
    memory.swap_limit = both
        .zip(memory.limit)
        .map(|(both, memory)| both.saturating_sub(memory));
    let mut inactive_file = 0;
    with_keys(files, "memory", "memory.stat", |key, number| match key {
        "total_cache" => memory.cache = number,
        "total_rss" => memory.rss = number,
        "total_mapped_file" => memory.mapped_file = number,
        "total_swap" => memory.swap_usage = number,
        "total_pgfault" => memory.page_faults = number,
        "total_pgmajfault" => memory.major_page_faults = number,
        "total_inactive_file" => inactive_file = number,
        _ => {}
    })?;
    memory.derive(inactive_file);
    if !full {
        return Ok(Some(memory));
    }
    memory.kernel = value(files, "memory", "memory.kmem.usage_in_bytes")?.unwrap_or(0);
    memory.max_usage = value(files, "memory", "memory.max_usage_in_bytes")?;
    memory.limit_hits = value(files, "memory", "memory.failcnt")?.unwrap_or(0);
    with_keys(files, "memory", "memory.oom_control", |key, number| {
        if key == "oom_kill" {
            memory.oom_kills = number;
        }
    })?;
    Ok(Some(memory))
}

fn pids(files: Files<'_>) -> Result<Option<PidsStats>> {
    let Some(threads) = value(files, "pids", "pids.current")? else {
        return Ok(None);
    };
    let limit = match files("pids", "pids.max") {
        Some(path) => read_value(path, parse::limit)?.flatten(),
        None => None,
    };
    let processes = match files("pids", "") {
        Some(dir) => count_processes(&dir)?,
        None => 0,
    };
    Ok(Some(PidsStats {
        processes,
        threads,
        limit,
    }))
}

fn io(files: Files<'_>) -> Result<Option<IoStats>> {
    let Some(path) = files("blkio", "blkio.throttle.io_service_bytes_recursive") else {
        return Ok(None);
    };
    let mut io = IoStats::default();
    let known = read_file(&path, |text| {
        parse::blkio(text, &mut io.devices, |device| {
            (&mut device.read_bytes, &mut device.write_bytes)
        });
    })?;
    if known.is_none() {
        return Ok(None);
    }
    if let Some(path) = files("blkio", "blkio.throttle.io_serviced_recursive") {
        read_file(&path, |text| {
            parse::blkio(text, &mut io.devices, |device| {
                (&mut device.read_operations, &mut device.write_operations)
            });
        })?;
    }
    Ok(Some(io))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::Hierarchy;
    use crate::resources::fixture;

    #[test]
    fn a_full_cgroup_is_read() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fixture(
            &root.join("cpu,cpuacct/pod1"),
            &[
                ("cpuacct.usage", "30\n"),
                ("cpuacct.stat", "user 2\nsystem 1\n"),
                ("cpu.stat", "nr_periods 5\nnr_throttled 2\nthrottled_time 9\n"),
            ],
        );
        fixture(
            &root.join("memory/pod1"),
            &[
                ("memory.usage_in_bytes", "1000000\n"),
                ("memory.limit_in_bytes", "4000000\n"),
                ("memory.memsw.limit_in_bytes", "5000000\n"),
                ("memory.max_usage_in_bytes", "2000000\n"),
                ("memory.failcnt", "6\n"),
                ("memory.kmem.usage_in_bytes", "77\n"),
                (
                    "memory.oom_control",
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
                ),
                (
                    "memory.stat",
                    "cache 1\nrss 1\ninactive_file 1\ntotal_cache 900\ntotal_rss 500\ntotal_mapped_file 60\n\
                 total_swap 4096\ntotal_pgfault 11\ntotal_pgmajfault 3\ntotal_inactive_file 400000\n",
                ),
            ],
        );
        fixture(
            &root.join("pids/pod1"),
            &[
                ("pids.current", "12\n"),
                ("pids.max", "max\n"),
                ("cgroup.procs", "4\n"),
            ],
        );
        fixture(
            &root.join("blkio/pod1"),
            &[
                (
                    "blkio.throttle.io_service_bytes_recursive",
                    "254:0 Read 4096\n254:0 Write 512\nTotal 4608\n",
                ),
                (
                    "blkio.throttle.io_serviced_recursive",
                    "254:0 Read 2\n254:0 Write 1\nTotal 3\n",
                ),
            ],
        );
        let shared = root.join("cpu,cpuacct");
        let mounts: BTreeMap<String, PathBuf> = [
            ("cpu", shared.clone()),
            ("cpuacct", shared),
            ("memory", root.join("memory")),
            ("pids", root.join("pids")),
            ("blkio", root.join("blkio")),
        ]
        .into_iter()
        .map(|(name, path)| (name.to_owned(), path))
        .collect();
        let hierarchy = Hierarchy::v1(mounts);
        let stats = hierarchy.stats("/pod1", Detail::Full).unwrap();
        let cpu = stats.cpu.unwrap();
        assert_eq!(
            (cpu.usage_ns, cpu.user_ns, cpu.system_ns),
            (30, 20_000_000, 10_000_000)
        );
        assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled_ns), (5, 2, 9));
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage, memory.working_set), (1_000_000, 600_000));
        assert_eq!(
            (memory.limit, memory.available),
            (Some(4_000_000), Some(3_400_000))
        );
        assert_eq!((memory.swap_usage, memory.swap_limit), (4096, Some(1_000_000)));
        assert_eq!(
            (memory.rss, memory.cache, memory.kernel, memory.mapped_file),
            (500, 900, 77, 60)
        );
        assert_eq!(
            (memory.max_usage, memory.limit_hits, memory.oom_kills),
            (Some(2_000_000), 6, 1)
        );
        assert_eq!((memory.page_faults, memory.major_page_faults), (11, 3));
        assert_eq!(
            stats.pids,
            Some(PidsStats {
                processes: 1,
                threads: 12,
                limit: None
            })
        );
        assert_eq!(stats.io.unwrap().totals(), (4096, 512, 2, 1));

        let usage = hierarchy.stats("/pod1", Detail::Usage).unwrap();
        let read = usage.memory.unwrap();
        assert_eq!(
            (usage.cpu.unwrap().usage_ns, read.working_set, read.oom_kills),
            (30, 600_000, 0)
        );
        assert_eq!((usage.pids, usage.io), (None, None));
    }
}
