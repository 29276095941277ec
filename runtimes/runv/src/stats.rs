//! What a guest's cgroup tells, in the shape that Task.Stats has.

use catamaran_guest_protocol::v1::StatsResponse;
use catamaran_sandbox::shim_server::ShimError;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

/// `type_url` of the message, as containerd has it.
const TYPE: &str = "io.containerd.cgroups.v2.Metrics";
const NANOSECONDS_PER_MICROSECOND: u64 = 1000;

/// `io.containerd.cgroups.v2.Metrics`, whatever cgroup version the guest has.
///
/// # Errors
/// When the message cannot be encoded.
pub(crate) fn metrics(stats: &StatsResponse) -> Result<Any, ShimError> {
    let cpu = CPUStat {
        usage_usec: stats.cpu_usage_ns / NANOSECONDS_PER_MICROSECOND,
        user_usec: stats.cpu_user_ns / NANOSECONDS_PER_MICROSECOND,
        system_usec: stats.cpu_system_ns / NANOSECONDS_PER_MICROSECOND,
        throttled_usec: stats.cpu_throttled_ns / NANOSECONDS_PER_MICROSECOND,
        nr_periods: stats.cpu_periods,
        nr_throttled: stats.cpu_throttled_periods,
        ..Default::default()
    };
    let memory = MemoryStat {
        usage: stats.memory_usage_bytes,
        usage_limit: stats.memory_limit_bytes,
        // The working set is the usage without inactive file pages; readers compute it back from these.
        inactive_file: stats
            .memory_usage_bytes
            .saturating_sub(stats.memory_working_set_bytes),
        anon: stats.memory_rss_bytes,
        file: stats.memory_cache_bytes,
        pgfault: stats.page_faults,
        pgmajfault: stats.major_page_faults,
        swap_usage: stats.swap_usage_bytes,
        ..Default::default()
    };
    let io = IOEntry {
        rbytes: stats.io_read_bytes,
        wbytes: stats.io_write_bytes,
        ..Default::default()
    };
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory),
        io: MessageField::some(IOStat {
            usage: vec![io],
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            oom_kill: stats.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    };
    let value = metrics
        .write_to_bytes()
        .map_err(|error| ShimError::internal("encode statistics", &error))?;
    Ok(Any {
        type_url: TYPE.to_owned(),
        value,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_working_set_can_be_computed_back() {
        let stats = StatsResponse {
            cpu_usage_ns: 5_000_000,
            memory_usage_bytes: 100,
            memory_working_set_bytes: 60,
            cpu_throttled_periods: 4,
            memory_cache_bytes: 30,
            oom_kills: 2,
            ..Default::default()
        };
        let any = metrics(&stats).unwrap();
        let read = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(read.cpu.usage_usec, 5000);
        assert_eq!(read.memory.usage - read.memory.inactive_file, 60);
        assert_eq!((read.cpu.nr_throttled, read.memory.file), (4, 30));
        assert_eq!(read.memory_events.oom_kill, 2);
    }
}
