//! Task.Stats: a container's cgroup in containerd's metrics messages, one read per file.

use std::path::Path;

use catamaran_sandbox::shim_server::ShimError;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::{cgroups::metrics as v1, cgroups_v2::metrics as v2};

use crate::cgroup::{Cgroup, value_of};

/// `io.containerd.cgroups.v1.Metrics` or `io.containerd.cgroups.v2.Metrics`.
pub(crate) fn read(cgroup: &Cgroup) -> Result<Any, ShimError> {
    let (type_url, bytes) = match cgroup.v2() {
        Some(directory) => (
            "io.containerd.cgroups.v2.Metrics",
            metrics_v2(directory).write_to_bytes(),
        ),
        None => (
            "io.containerd.cgroups.v1.Metrics",
            metrics_v1(cgroup).write_to_bytes(),
        ),
    };
    let mut any = Any::new();
    any.type_url = type_url.to_owned();
    any.value = bytes.map_err(|error| ShimError::internal("encode statistics", &error))?;
    Ok(any)
}

/// Empty where the controller or the file is not there: the message's field then stays 0.
fn text(directory: Option<&Path>, file: &str) -> String {
    directory
        .map(|path| std::fs::read_to_string(path.join(file)).unwrap_or_default())
        .unwrap_or_default()
}

/// A file of one number; `max` is the largest.
fn number(directory: Option<&Path>, file: &str) -> u64 {
    match text(directory, file).trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

fn metrics_v1(cgroup: &Cgroup) -> v1::Metrics {
    let mut metrics = v1::Metrics::new();
    let pids = cgroup.v1("pids");
    let limit = number(pids, "pids.max");
    let entry = metrics.pids.mut_or_insert_default();
    entry.current = number(pids, "pids.current");
    // containerd's convention: 0 is no limit.
    entry.limit = if limit == u64::MAX { 0 } else { limit };

    let (account, cpu) = (cgroup.v1("cpuacct"), cgroup.v1("cpu"));
    let throttling = text(cpu, "cpu.stat");
    let entry = metrics.cpu.mut_or_insert_default();
    let usage = entry.usage.mut_or_insert_default();
    usage.total = number(account, "cpuacct.usage");
    usage.user = number(account, "cpuacct.usage_user");
    usage.kernel = number(account, "cpuacct.usage_sys");
    let throttle = entry.throttling.mut_or_insert_default();
    throttle.periods = value_of(&throttling, "nr_periods").unwrap_or(0);
    throttle.throttled_periods = value_of(&throttling, "nr_throttled").unwrap_or(0);
    throttle.throttled_time = value_of(&throttling, "throttled_time").unwrap_or(0);

    let memory = cgroup.v1("memory");
    let stat = text(memory, "memory.stat");
    let of = |key: &str| value_of(&stat, key).unwrap_or(0);
    let entry = metrics.memory.mut_or_insert_default();
    (entry.cache, entry.rss, entry.mapped_file) = (of("cache"), of("rss"), of("mapped_file"));
    (entry.pg_fault, entry.pg_maj_fault) = (of("pgfault"), of("pgmajfault"));
    (entry.inactive_anon, entry.active_anon) = (of("inactive_anon"), of("active_anon"));
    (entry.inactive_file, entry.active_file) = (of("inactive_file"), of("active_file"));
    entry.unevictable = of("unevictable");
    entry.hierarchical_memory_limit = of("hierarchical_memory_limit");
    (entry.total_cache, entry.total_rss) = (of("total_cache"), of("total_rss"));
    (entry.total_pg_fault, entry.total_pg_maj_fault) = (of("total_pgfault"), of("total_pgmajfault"));
    (entry.total_inactive_file, entry.total_active_file) =
        (of("total_inactive_file"), of("total_active_file"));
    (entry.total_inactive_anon, entry.total_active_anon) =
        (of("total_inactive_anon"), of("total_active_anon"));
    let usage = entry.usage.mut_or_insert_default();
    usage.usage = number(memory, "memory.usage_in_bytes");
    usage.limit = number(memory, "memory.limit_in_bytes");
    usage.max = number(memory, "memory.max_usage_in_bytes");
    usage.failcnt = number(memory, "memory.failcnt");
    let swap = entry.swap.mut_or_insert_default();
    swap.usage = number(memory, "memory.memsw.usage_in_bytes");
    swap.limit = number(memory, "memory.memsw.limit_in_bytes");
    let oom = text(memory, "memory.oom_control");
    let entry = metrics.memory_oom_control.mut_or_insert_default();
    entry.under_oom = value_of(&oom, "under_oom").unwrap_or(0);
    entry.oom_kill = value_of(&oom, "oom_kill").unwrap_or(0);

    let block = text(cgroup.v1("blkio"), "blkio.throttle.io_service_bytes_recursive");
    let entry = metrics.blkio.mut_or_insert_default();
    entry.io_service_bytes_recursive = block.lines().filter_map(block_entry).collect();
    metrics
}

/// `8:0 Read 4096`.
fn block_entry(line: &str) -> Option<v1::BlkIOEntry> {
    let mut words = line.split(' ');
    let (device, operation, value) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = device.split_once(':')?;
    let mut entry = v1::BlkIOEntry::new();
    entry.op = operation.to_owned();
    (entry.major, entry.minor) = (major.parse().ok()?, minor.parse().ok()?);
    entry.value = value.parse().ok()?;
    Some(entry)
}

fn metrics_v2(directory: &Path) -> v2::Metrics {
    let at = Some(directory);
    let mut metrics = v2::Metrics::new();
    let limit = number(at, "pids.max");
    let entry = metrics.pids.mut_or_insert_default();
    entry.current = number(at, "pids.current");
    entry.limit = if limit == u64::MAX { 0 } else { limit };

    let stat = text(at, "cpu.stat");
    let of = |key: &str| value_of(&stat, key).unwrap_or(0);
    let entry = metrics.cpu.mut_or_insert_default();
    (entry.usage_usec, entry.user_usec, entry.system_usec) =
        (of("usage_usec"), of("user_usec"), of("system_usec"));
    (entry.nr_periods, entry.nr_throttled) = (of("nr_periods"), of("nr_throttled"));
    entry.throttled_usec = of("throttled_usec");

    let stat = text(at, "memory.stat");
    let of = |key: &str| value_of(&stat, key).unwrap_or(0);
    let entry = metrics.memory.mut_or_insert_default();
    (entry.anon, entry.file, entry.file_mapped) = (of("anon"), of("file"), of("file_mapped"));
    (entry.kernel_stack, entry.slab, entry.sock, entry.shmem) =
        (of("kernel_stack"), of("slab"), of("sock"), of("shmem"));
    (entry.inactive_anon, entry.active_anon) = (of("inactive_anon"), of("active_anon"));
    (entry.inactive_file, entry.active_file) = (of("inactive_file"), of("active_file"));
    (entry.pgfault, entry.pgmajfault) = (of("pgfault"), of("pgmajfault"));
    entry.unevictable = of("unevictable");
    entry.usage = number(at, "memory.current");
    entry.usage_limit = number(at, "memory.max");
    entry.max_usage = number(at, "memory.peak");
    entry.swap_usage = number(at, "memory.swap.current");
    entry.swap_limit = number(at, "memory.swap.max");
    let events = text(at, "memory.events");
    let of = |key: &str| value_of(&events, key).unwrap_or(0);
    let entry = metrics.memory_events.mut_or_insert_default();
    (entry.low, entry.high, entry.max) = (of("low"), of("high"), of("max"));
    (entry.oom, entry.oom_kill) = (of("oom"), of("oom_kill"));

    let io = text(at, "io.stat");
    metrics.io.mut_or_insert_default().usage = io.lines().filter_map(io_entry).collect();
    metrics
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io_entry(line: &str) -> Option<v2::IOEntry> {
    let mut words = line.split(' ');
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = v2::IOEntry::new();
    (entry.major, entry.minor) = (major.parse().ok()?, minor.parse().ok()?);
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().ok()?;
        match key {
            "rbytes" => entry.rbytes = value,
            "wbytes" => entry.wbytes = value,
            "rios" => entry.rios = value,
            "wios" => entry.wios = value,
            _ => {}
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v2_cgroup_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put(
            "cpu.stat",
            "usage_usec 70\nuser_usec 30\nsystem_usec 40\nnr_throttled 2\n",
        );
        put("memory.current", "4096\n");
        put("memory.max", "max\n");
        put("memory.events", "oom 1\noom_kill 1\n");
        put("pids.current", "3\n");
        put(
            "io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:1 junk\n",
        );
        let metrics = metrics_v2(directory.path());
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.nr_throttled), (70, 2));
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (4096, u64::MAX)
        );
        assert_eq!((metrics.memory_events.oom_kill, metrics.pids.current), (1, 3));
        assert_eq!((metrics.io.usage[0].major, metrics.io.usage[0].wbytes), (8, 2));
    }

    #[test]
    fn block_lines_are_read() {
        let entry = block_entry("8:16 Write 512").unwrap();
        assert_eq!(
            (entry.major, entry.minor, entry.op.as_str(), entry.value),
            (8, 16, "Write", 512)
        );
        assert!(block_entry("Total 512").is_none());
    }
}
