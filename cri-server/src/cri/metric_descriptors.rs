//! The metrics that ListMetricDescriptors announces, by the names and labels that cAdvisor gives them and
//! dashboards know. The kubelet pairs label keys and values by their order.

use super::api;

/// Labels that every metric has, before its own: as the kubelet's cAdvisor endpoint has them. `id` is the
/// cgroup's path, `name` the id of the container or pod sandbox.
pub(super) const BASE_LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// One metric.
#[derive(Debug)]
pub(super) struct Descriptor {
    /// Its name.
    pub(super) name: &'static str,
    /// For humans.
    pub(super) help: &'static str,
    /// Whether it only grows.
    pub(super) kind: api::MetricType,
    /// Labels besides [`BASE_LABELS`].
    pub(super) labels: &'static [&'static str],
}

impl Descriptor {
    /// As the CRI has it.
    pub(super) fn message(&self) -> api::MetricDescriptor {
        let keys = BASE_LABELS.iter().chain(self.labels);
        api::MetricDescriptor {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            label_keys: keys.map(|key| (*key).to_owned()).collect(),
        }
    }
}

/// Declares the constants and [`ALL`], so that no metric can be sampled that is not announced.
macro_rules! descriptors {
    ($($constant:ident: $kind:ident $name:literal $labels:expr, $help:literal;)*) => {
        $(pub(super) const $constant: Descriptor = Descriptor {
            name: $name,
            help: $help,
            kind: api::MetricType::$kind,
            labels: &$labels,
        };)*

        /// Every metric.
        pub(super) const ALL: &[&Descriptor] = &[$(&$constant),*];
    };
}

descriptors! {
    LAST_SEEN: Gauge "container_last_seen" [], "Seconds since the epoch when this was sampled.";
    START_TIME: Gauge "container_start_time_seconds" [], "Seconds since the epoch when it started.";

    CPU_USAGE: Counter "container_cpu_usage_seconds_total" ["cpu"], "CPU time used, in seconds.";
    CPU_USER: Counter "container_cpu_user_seconds_total" [], "CPU time used in user mode, in seconds.";
    CPU_SYSTEM: Counter "container_cpu_system_seconds_total" [], "CPU time used in the kernel, in seconds.";
    CPU_PERIODS: Counter "container_cpu_cfs_periods_total" [], "Enforcement periods of the CPU quota that passed.";
    CPU_THROTTLED_PERIODS: Counter "container_cpu_cfs_throttled_periods_total" [], "Enforcement periods with throttling.";
    CPU_THROTTLED: Counter "container_cpu_cfs_throttled_seconds_total" [], "Time of throttling, in seconds.";

    MEMORY_USAGE: Gauge "container_memory_usage_bytes" [], "Memory in use with page cache, in bytes.";
    MEMORY_WORKING_SET: Gauge "container_memory_working_set_bytes" [], "Memory in use without inactive file pages, in bytes.";
    MEMORY_RSS: Gauge "container_memory_rss" [], "Anonymous memory, in bytes.";
    MEMORY_CACHE: Gauge "container_memory_cache" [], "Page cache, in bytes.";
    MEMORY_MAPPED_FILE: Gauge "container_memory_mapped_file" [], "Mapped file pages, in bytes.";
    MEMORY_KERNEL: Gauge "container_memory_kernel_usage" [], "Kernel memory, in bytes.";
    MEMORY_SWAP: Gauge "container_memory_swap" [], "Swap in use, in bytes.";
    MEMORY_MAX_USAGE: Gauge "container_memory_max_usage_bytes" [], "Greatest memory use so far, in bytes.";
    MEMORY_FAILCNT: Counter "container_memory_failcnt" [], "How often the memory limit was hit.";
    MEMORY_FAILURES: Counter "container_memory_failures_total" ["failure_type", "scope"], "Page faults, by type.";
    OOM_EVENTS: Counter "container_oom_events_total" [], "Processes that the kernel killed for want of memory.";

    PROCESSES: Gauge "container_processes" [], "Processes.";
    THREADS: Gauge "container_threads" [], "Threads, the first one of each process with them.";
    THREADS_MAX: Gauge "container_threads_max" [], "Limit of threads; 0: none.";
    FILE_DESCRIPTORS: Gauge "container_file_descriptors" [], "Open file descriptors; not known of a VM pod.";
    SOCKETS: Gauge "container_sockets" [], "Open sockets; not known of a VM pod.";

    FS_USAGE: Gauge "container_fs_usage_bytes" ["device"], "Bytes of the container's writable layer.";
    FS_LIMIT: Gauge "container_fs_limit_bytes" ["device"], "Bytes of the file system with the writable layer.";
    FS_INODES_TOTAL: Gauge "container_fs_inodes_total" ["device"], "Inodes of the file system with the writable layer.";
    FS_INODES_FREE: Gauge "container_fs_inodes_free" ["device"], "Free inodes of the file system with the writable layer.";
    FS_READS: Counter "container_fs_reads_total" ["device"], "Requests to read from the device.";
    FS_READS_BYTES: Counter "container_fs_reads_bytes_total" ["device"], "Bytes read from the device.";
    FS_WRITES: Counter "container_fs_writes_total" ["device"], "Requests to write to the device.";
    FS_WRITES_BYTES: Counter "container_fs_writes_bytes_total" ["device"], "Bytes written to the device.";
    BLKIO_USAGE: Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"], "Bytes moved, by device and operation.";

    NETWORK_RX_BYTES: Counter "container_network_receive_bytes_total" ["interface"], "Bytes received.";
    NETWORK_RX_PACKETS: Counter "container_network_receive_packets_total" ["interface"], "Packets received.";
    NETWORK_RX_ERRORS: Counter "container_network_receive_errors_total" ["interface"], "Packets received with an error.";
    NETWORK_RX_DROPPED: Counter "container_network_receive_packets_dropped_total" ["interface"], "Received packets that were dropped.";
    NETWORK_TX_BYTES: Counter "container_network_transmit_bytes_total" ["interface"], "Bytes sent.";
    NETWORK_TX_PACKETS: Counter "container_network_transmit_packets_total" ["interface"], "Packets sent.";
    NETWORK_TX_ERRORS: Counter "container_network_transmit_errors_total" ["interface"], "Errors in sending.";
    NETWORK_TX_DROPPED: Counter "container_network_transmit_packets_dropped_total" ["interface"], "Packets dropped in sending.";

    SPEC_CPU_PERIOD: Gauge "container_spec_cpu_period" [], "Period of the CPU quota, in microseconds.";
    SPEC_CPU_QUOTA: Gauge "container_spec_cpu_quota" [], "CPU time in each period, in microseconds.";
    SPEC_CPU_SHARES: Gauge "container_spec_cpu_shares" [], "Share of the CPU beside others.";
    SPEC_MEMORY_LIMIT: Gauge "container_spec_memory_limit_bytes" [], "Memory limit in bytes; 0: none.";
    SPEC_MEMORY_RESERVATION: Gauge "container_spec_memory_reservation_limit_bytes" [], "Memory reservation in bytes; 0: none.";
    SPEC_SWAP_LIMIT: Gauge "container_spec_memory_swap_limit_bytes" [], "Limit of memory and swap together in bytes; 0: none.";

    PRESSURE_CPU_STALLED: Counter "container_pressure_cpu_stalled_seconds_total" [], "Time that all tasks waited for the CPU, in seconds.";
    PRESSURE_CPU_WAITING: Counter "container_pressure_cpu_waiting_seconds_total" [], "Time that some task waited for the CPU, in seconds.";
    PRESSURE_MEMORY_STALLED: Counter "container_pressure_memory_stalled_seconds_total" [], "Time that all tasks waited for memory, in seconds.";
    PRESSURE_MEMORY_WAITING: Counter "container_pressure_memory_waiting_seconds_total" [], "Time that some task waited for memory, in seconds.";
    PRESSURE_IO_STALLED: Counter "container_pressure_io_stalled_seconds_total" [], "Time that all tasks waited for I/O, in seconds.";
    PRESSURE_IO_WAITING: Counter "container_pressure_io_waiting_seconds_total" [], "Time that some task waited for I/O, in seconds.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What Prometheus demands of names, and refuses of two descriptors.
    #[test]
    fn names_are_unique_and_valid() {
        let valid = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let mut names = BTreeSet::new();
        for descriptor in ALL {
            assert!(names.insert(descriptor.name), "{} twice", descriptor.name);
            assert!(valid(descriptor.name), "{}", descriptor.name);
            let keys = descriptor.message().label_keys;
            assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), keys.len());
            assert!(keys.iter().all(|key| valid(key)), "{keys:?}");
            let counter = descriptor.kind == api::MetricType::Counter;
            let total = descriptor.name.ends_with("_total") && !descriptor.name.contains("_inodes_");
            assert_eq!(
                counter,
                total || descriptor.name.ends_with("_failcnt"),
                "{}",
                descriptor.name
            );
        }
    }
}
