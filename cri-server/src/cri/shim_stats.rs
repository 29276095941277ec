//! What a shim answers to Task.Stats: containerd's cgroup metrics of either version, in our form.

use catamaran_cgroups::{CgroupStats, CpuStats, IoDevice, IoStats, MemoryStats, PidsStats, Pressure, Stall};
use containerd_shim_protos::{cgroups, cgroups_v2};
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;

use crate::error::{Error, Result};
use crate::node::now_ns;

/// Reads the message.
///
/// # Errors
/// [`Error::Internal`] for one of another kind, or one that is broken.
pub(super) fn parse(any: &Any) -> Result<CgroupStats> {
    let bad = |e: protobuf::Error| Error::Internal(format!("the shim's statistics: {e}"));
    let mut used = match any.type_url.rsplit('/').next().unwrap_or_default() {
        "io.containerd.cgroups.v2.Metrics" => {
            v2(&cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).map_err(bad)?)
        }
        "io.containerd.cgroups.v1.Metrics" => {
            v1(&cgroups::metrics::Metrics::parse_from_bytes(&any.value).map_err(bad)?)
        }
        other => {
            return Err(Error::Internal(format!(
                "the shim's statistics are of an unknown kind {other:?}"
            )));
        }
    };
    used.timestamp_ns = now_ns();
    Ok(used)
}

/// A limit as version 2 has it: 0 and the greatest number are none.
fn limit(value: u64) -> Option<u64> {
    Some(value).filter(|limit| *limit != 0 && *limit != u64::MAX)
}

fn v2(m: &cgroups_v2::metrics::Metrics) -> CgroupStats {
    let cpu = m.cpu.as_ref().map(|cpu| CpuStats {
        usage_ns: cpu.usage_usec.saturating_mul(1000),
        user_ns: cpu.user_usec.saturating_mul(1000),
        system_ns: cpu.system_usec.saturating_mul(1000),
        periods: cpu.nr_periods,
        throttled_periods: cpu.nr_throttled,
        throttled_ns: cpu.throttled_usec.saturating_mul(1000),
        pressure: cpu.psi.as_ref().map(pressure),
    });
    let memory = m.memory.as_ref().map(|memory| {
        let limit_bytes = limit(memory.usage_limit);
        let working_set = memory.usage.saturating_sub(memory.inactive_file);
        MemoryStats {
            usage: memory.usage,
            working_set,
            rss: memory.anon,
            cache: memory.file,
            mapped_file: memory.file_mapped,
            kernel: memory.kernel_stack.saturating_add(memory.slab),
            limit: limit_bytes,
            available: limit_bytes.map(|limit| limit.saturating_sub(working_set)),
            swap_usage: memory.swap_usage,
            swap_limit: limit(memory.swap_limit),
            max_usage: Some(memory.max_usage).filter(|max| *max != 0),
            limit_hits: m.memory_events.max,
            page_faults: memory.pgfault,
            major_page_faults: memory.pgmajfault,
            oom_kills: m.memory_events.oom_kill,
            pressure: memory.psi.as_ref().map(pressure),
        }
    });
    let io = m.io.as_ref().map(|io| IoStats {
        devices: io
            .usage
            .iter()
            .map(|entry| IoDevice {
                major: u32::try_from(entry.major).unwrap_or_default(),
                minor: u32::try_from(entry.minor).unwrap_or_default(),
                read_bytes: entry.rbytes,
                write_bytes: entry.wbytes,
                read_operations: entry.rios,
                write_operations: entry.wios,
            })
            .collect(),
        pressure: io.psi.as_ref().map(pressure),
    });
    CgroupStats {
        cpu,
        memory,
        pids: m.pids.as_ref().map(|pids| tasks(pids.current, pids.limit)),
        io,
        ..CgroupStats::default()
    }
}

fn v1(m: &cgroups::metrics::Metrics) -> CgroupStats {
    let cpu = m.cpu.as_ref().map(|cpu| CpuStats {
        usage_ns: cpu.usage.total,
        user_ns: cpu.usage.user,
        system_ns: cpu.usage.kernel,
        periods: cpu.throttling.periods,
        throttled_periods: cpu.throttling.throttled_periods,
        throttled_ns: cpu.throttling.throttled_time,
        pressure: None,
    });
    let memory = m.memory.as_ref().map(|memory| {
        let usage = memory.usage.usage;
        // Without a limit version 1 says the greatest multiple of a page.
        let limit = Some(memory.usage.limit).filter(|limit| *limit != 0 && *limit < 1 << 62);
        let working_set = usage.saturating_sub(memory.total_inactive_file);
        MemoryStats {
            usage,
            working_set,
            rss: memory.total_rss,
            cache: memory.total_cache,
            mapped_file: memory.total_mapped_file,
            kernel: memory.kernel.usage,
            limit,
            available: limit.map(|limit| limit.saturating_sub(working_set)),
            max_usage: Some(memory.usage.max).filter(|max| *max != 0),
            limit_hits: memory.usage.failcnt,
            page_faults: memory.total_pg_fault,
            major_page_faults: memory.total_pg_maj_fault,
            oom_kills: m.memory_oom_control.oom_kill,
            // What version 1 counts there is memory and swap together.
            swap_usage: memory.swap.usage.saturating_sub(usage),
            ..MemoryStats::default()
        }
    });
    CgroupStats {
        cpu,
        memory,
        pids: m.pids.as_ref().map(|pids| tasks(pids.current, pids.limit)),
        ..CgroupStats::default()
    }
}

/// The message counts tasks; of processes it says nothing.
fn tasks(current: u64, most: u64) -> PidsStats {
    PidsStats {
        processes: current,
        threads: current,
        limit: limit(most),
    }
}

fn pressure(psi: &cgroups_v2::metrics::PSIStats) -> Pressure {
    let stall = |data: &cgroups_v2::metrics::PSIData| Stall {
        avg10: data.avg10,
        avg60: data.avg60,
        avg300: data.avg300,
        total_us: data.total,
    };
    Pressure {
        some: psi.some.as_ref().map(stall).unwrap_or_default(),
        full: psi.full.as_ref().map(stall).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(kind: &str, message: &impl protobuf::Message) -> Any {
        Any {
            type_url: kind.to_owned(),
            value: message.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn both_versions_are_read_and_others_are_refused() {
        let mut v2 = cgroups_v2::metrics::Metrics::new();
        v2.cpu.mut_or_insert_default().nr_throttled = 3;
        let memory = v2.memory.mut_or_insert_default();
        (memory.usage, memory.inactive_file, memory.usage_limit) = (100, 40, u64::MAX);
        v2.memory_events.mut_or_insert_default().oom_kill = 2;
        let used = parse(&any("io.containerd.cgroups.v2.Metrics", &v2)).unwrap();
        assert_eq!(used.cpu.unwrap().throttled_periods, 3);
        let memory = used.memory.unwrap();
        assert_eq!(
            (memory.working_set, memory.limit, memory.oom_kills),
            (60, None, 2)
        );

        let mut v1 = cgroups::metrics::Metrics::new();
        let memory = v1.memory.mut_or_insert_default();
        memory.usage.mut_or_insert_default().usage = 100;
        memory.usage.mut_or_insert_default().limit = 150;
        memory.swap.mut_or_insert_default().usage = 130;
        let used = parse(&any("type.url/io.containerd.cgroups.v1.Metrics", &v1)).unwrap();
        let memory = used.memory.unwrap();
        assert_eq!(
            (memory.swap_usage, memory.limit, memory.available),
            (30, Some(150), Some(50))
        );

        assert!(parse(&any("io.containerd.runhcs.v1.Statistics", &v1)).is_err());
        let broken = Any {
            type_url: "io.containerd.cgroups.v2.Metrics".into(),
            value: vec![0xff],
            ..Any::default()
        };
        assert!(parse(&broken).is_err());
    }
}
