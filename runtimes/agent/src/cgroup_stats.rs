//! Reads what a cgroup tells about its use: one read per file.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use catamaran_guest_protocol::v1::StatsResponse;

use crate::cgroup::{ROOT, Version};

/// Statistics of a cgroup path such as `/pod/<id>`; 0 where the kernel does not tell.
pub(crate) fn read(version: Version, path: &str) -> StatsResponse {
    match version {
        Version::V2 => unified(&Path::new(ROOT).join(path.trim_start_matches('/'))),
        Version::V1 => legacy(path.trim_start_matches('/')),
    }
}

fn unified(directory: &Path) -> StatsResponse {
    let cpu = pairs(&text(directory, "cpu.stat"));
    let memory = pairs(&text(directory, "memory.stat"));
    let usage = number(directory, "memory.current");
    let (io_read_bytes, io_write_bytes) = io_stat(&text(directory, "io.stat"));
    StatsResponse {
        cpu_usage_ns: get(&cpu, "usage_usec") * 1000,
        cpu_user_ns: get(&cpu, "user_usec") * 1000,
        cpu_system_ns: get(&cpu, "system_usec") * 1000,
        cpu_throttled_ns: get(&cpu, "throttled_usec") * 1000,
        cpu_periods: get(&cpu, "nr_periods"),
        cpu_throttled_periods: get(&cpu, "nr_throttled"),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.saturating_sub(get(&memory, "inactive_file")),
        memory_rss_bytes: get(&memory, "anon"),
        memory_cache_bytes: get(&memory, "file"),
        oom_kills: get(&pairs(&text(directory, "memory.events")), "oom_kill"),
        memory_limit_bytes: number(directory, "memory.max"),
        page_faults: get(&memory, "pgfault"),
        major_page_faults: get(&memory, "pgmajfault"),
        swap_usage_bytes: number(directory, "memory.swap.current"),
        pids: number(directory, "pids.current"),
        pids_limit: number(directory, "pids.max"),
        io_read_bytes,
        io_write_bytes,
    }
}

fn legacy(path: &str) -> StatsResponse {
    let of = |controller: &str| Path::new(ROOT).join(controller).join(path);
    let (cpu, memory, tasks, io) = (of("cpuacct"), of("memory"), of("pids"), of("blkio"));
    let split = pairs(&text(&cpu, "cpuacct.stat"));
    let throttled = pairs(&text(&of("cpu"), "cpu.stat"));
    let stat = pairs(&text(&memory, "memory.stat"));
    let usage = number(&memory, "memory.usage_in_bytes");
    let (io_read_bytes, io_write_bytes) = blkio(&text(&io, "blkio.throttle.io_service_bytes"));
    // USER_HZ is 100 on every architecture that Linux runs containers on.
    let tick_ns = 10_000_000;
    StatsResponse {
        cpu_usage_ns: number(&cpu, "cpuacct.usage"),
        cpu_user_ns: get(&split, "user") * tick_ns,
        cpu_system_ns: get(&split, "system") * tick_ns,
        cpu_throttled_ns: get(&throttled, "throttled_time"),
        cpu_periods: get(&throttled, "nr_periods"),
        cpu_throttled_periods: get(&throttled, "nr_throttled"),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.saturating_sub(get(&stat, "total_inactive_file")),
        memory_rss_bytes: get(&stat, "total_rss"),
        memory_cache_bytes: get(&stat, "total_cache"),
        oom_kills: get(&pairs(&text(&memory, "memory.oom_control")), "oom_kill"),
        // The kernel's "no limit" is the largest number of pages.
        memory_limit_bytes: match number(&memory, "memory.limit_in_bytes") {
            limit if limit >= 1 << 62 => 0,
            limit => limit,
        },
        page_faults: get(&stat, "total_pgfault"),
        major_page_faults: get(&stat, "total_pgmajfault"),
        swap_usage_bytes: get(&stat, "total_swap"),
        pids: number(&tasks, "pids.current"),
        pids_limit: number(&tasks, "pids.max"),
        io_read_bytes,
        io_write_bytes,
    }
}

fn text(directory: &Path, file: &str) -> String {
    fs::read_to_string(directory.join(file)).unwrap_or_default()
}

/// A file with one number; `max` is 0.
fn number(directory: &Path, file: &str) -> u64 {
    text(directory, file).trim().parse().unwrap_or(0)
}

fn pairs(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn get(pairs: &HashMap<String, u64>, key: &str) -> u64 {
    pairs.get(key).copied().unwrap_or(0)
}

/// Bytes read and written over all devices: `8:0 rbytes=1 wbytes=2 …`.
fn io_stat(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        text.split_ascii_whitespace()
            .filter_map(|field| field.strip_prefix(key)?.parse::<u64>().ok())
            .fold(0, u64::saturating_add)
    };
    (sum("rbytes="), sum("wbytes="))
}

/// Bytes read and written over all devices: `8:0 Read 1`.
fn blkio(text: &str) -> (u64, u64) {
    let sum = |operation: &str| {
        text.lines()
            .filter_map(|line| {
                let mut fields = line.split_ascii_whitespace();
                (fields.nth(1)? == operation).then_some(fields.next()?.parse::<u64>().ok()?)
            })
            .fold(0, u64::saturating_add)
    };
    (sum("Read"), sum("Write"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v2_directory_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for (file, content) in [
            (
                "cpu.stat",
                "usage_usec 7\nuser_usec 4\nsystem_usec 3\nnr_periods 6\nnr_throttled 5\nthrottled_usec 2\n",
            ),
            (
                "memory.stat",
                "anon 100\nfile 50\ninactive_file 30\npgfault 9\npgmajfault 1\n",
            ),
            ("memory.current", "150\n"),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
            ("memory.max", "max\n"),
            ("pids.current", "3\n"),
            ("pids.max", "64\n"),
            (
                "io.stat",
                "253:0 rbytes=10 wbytes=20 rios=1 wios=1\n253:16 rbytes=5 wbytes=6 rios=1 wios=1\n",
            ),
        ] {
            fs::write(dir.path().join(file), content).unwrap();
        }
        let stats = unified(dir.path());
        assert_eq!(stats.cpu_usage_ns, 7000);
        assert_eq!(stats.cpu_throttled_ns, 2000);
        assert_eq!(stats.memory_working_set_bytes, 120);
        assert_eq!((stats.cpu_periods, stats.cpu_throttled_periods), (6, 5));
        assert_eq!((stats.memory_rss_bytes, stats.memory_cache_bytes), (100, 50));
        assert_eq!(stats.oom_kills, 1);
        assert_eq!(stats.memory_limit_bytes, 0);
        assert_eq!((stats.pids, stats.pids_limit), (3, 64));
        assert_eq!((stats.io_read_bytes, stats.io_write_bytes), (15, 26));
    }

    #[test]
    fn v1_block_io_is_summed_by_operation() {
        assert_eq!(blkio("8:0 Read 1\n8:0 Write 2\n8:16 Read 3\nTotal 6\n"), (4, 2));
    }
}
