//! ListPodSandboxMetrics: everything that the cgroups, the network namespaces and the shims of VM pods tell, as
//! samples of the metrics in `metric_descriptors`.
//!
//! A sample's value is an integer (CRI UInt64Value), so counters of seconds lose what is below a second. The
//! timestamp is 0, which tells the kubelet that the value is of now.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catamaran_cgroups::{CgroupStats, CpuStats, InterfaceStats, IoStats, MemoryStats, PidsStats};
use catamaran_sandbox::id::Id;
use futures::future::join_all;

use super::metric_descriptors::{self as metric, Descriptor};
use super::{api, open_files, stats};
use crate::config::HandlerType;
use crate::error::{Result, chain};
use crate::node::{Node, now_ns};
use crate::pods::record::{ContainerRecord, PodRecord, PodView};
use crate::pods::state::PodState;
use crate::pods::{Pods, handler_kind};

const NANOSECONDS: u64 = 1_000_000_000;
const MICROSECONDS: u64 = 1_000_000;

/// ListMetricDescriptors.
pub(super) fn descriptors() -> Vec<api::MetricDescriptor> {
    metric::ALL
        .iter()
        .map(|descriptor| descriptor.message())
        .collect()
}

/// ListPodSandboxMetrics: of the pods that are ready and their running containers. One that ends meanwhile is
/// left out, or has only the samples that it still could give.
pub(super) async fn pods(pods: &Pods) -> Result<Vec<api::PodSandboxMetrics>> {
    let views: Vec<_> = pods
        .views()
        .into_iter()
        .filter(|view| view.pod.state == PodState::Ready)
        .collect();
    let guests = guests(&views).await;
    let node = pods.node().clone();
    stats::blocking(move || {
        let netns: Vec<PathBuf> = views
            .iter()
            .filter_map(|view| view.pod.netns().cloned())
            .collect();
        let mut networks: HashMap<&PathBuf, _> = netns
            .iter()
            .zip(catamaran_cgroups::network_stats_all(&netns))
            .collect();
        let disk = Disk::of(&node.dirs.snapshots());
        let all = views.iter().map(|view| {
            let network = view.pod.netns().and_then(|path| networks.remove(path)?.ok());
            api::PodSandboxMetrics {
                pod_sandbox_id: view.pod.id.to_string(),
                metrics: of_pod(&node, &view.pod, &network.unwrap_or_default()),
                container_metrics: running(view)
                    .filter_map(|container| {
                        let metrics = of_container(&node, &view.pod, container, &guests, &disk)?;
                        Some(api::ContainerMetrics {
                            container_id: container.id.to_string(),
                            metrics,
                        })
                    })
                    .collect(),
            }
        });
        Ok(all.collect())
    })
    .await
}

fn running(view: &PodView) -> impl Iterator<Item = &Arc<ContainerRecord>> {
    view.containers
        .values()
        .filter(|container| stats::runs(container))
}

/// What the shims of VM pods tell of their containers.
async fn guests(views: &[Arc<PodView>]) -> HashMap<Id, CgroupStats> {
    let asked = views
        .iter()
        .filter(|view| handler_kind(&view.pod) == HandlerType::Vm)
        .flat_map(|view| running(view).map(move |container| (view, container)))
        .map(
            async |(view, container)| match stats::guest_stats(view, container).await {
                Ok(used) => Some((container.id.clone(), used)),
                Err(error) => {
                    tracing::debug!(container = %container.id, error = %chain(&error), "no metrics");
                    None
                }
            },
        );
    join_all(asked).await.into_iter().flatten().collect()
}

/// Samples that share their first label values.
struct Samples {
    base: Vec<String>,
    all: Vec<api::Metric>,
}

impl Samples {
    /// `values` are those of [`metric::BASE_LABELS`].
    fn new(values: [&str; 6]) -> Self {
        Self {
            base: values.map(str::to_owned).to_vec(),
            all: Vec::new(),
        }
    }

    fn add(&mut self, metric: &Descriptor, value: u64) {
        self.labelled(metric, &[], value);
    }

    /// `labels` are the values of the metric's own.
    fn labelled(&mut self, metric: &Descriptor, labels: &[&str], value: u64) {
        debug_assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
        let own = labels.iter().map(|label| (*label).to_owned());
        self.all.push(api::Metric {
            name: metric.name.to_owned(),
            timestamp: 0,
            metric_type: metric.kind.into(),
            label_values: self.base.iter().cloned().chain(own).collect(),
            value: Some(api::UInt64Value { value }),
        });
    }

    fn cgroup(&mut self, used: &CgroupStats) {
        if let Some(cpu) = &used.cpu {
            self.cpu(cpu);
        }
        if let Some(memory) = &used.memory {
            self.memory(memory);
        }
        if let Some(pids) = &used.pids {
            self.pids(pids);
        }
        if let Some(io) = &used.io {
            self.io(io);
        }
    }

    fn cpu(&mut self, cpu: &CpuStats) {
        self.labelled(&metric::CPU_USAGE, &["total"], cpu.usage_ns / NANOSECONDS);
        self.add(&metric::CPU_USER, cpu.user_ns / NANOSECONDS);
        self.add(&metric::CPU_SYSTEM, cpu.system_ns / NANOSECONDS);
        self.add(&metric::CPU_PERIODS, cpu.periods);
        self.add(&metric::CPU_THROTTLED_PERIODS, cpu.throttled_periods);
        self.add(&metric::CPU_THROTTLED, cpu.throttled_ns / NANOSECONDS);
        if let Some(pressure) = cpu.pressure {
            self.add(
                &metric::PRESSURE_CPU_STALLED,
                pressure.full.total_us / MICROSECONDS,
            );
            self.add(
                &metric::PRESSURE_CPU_WAITING,
                pressure.some.total_us / MICROSECONDS,
            );
        }
    }

    fn memory(&mut self, memory: &MemoryStats) {
        self.add(&metric::MEMORY_USAGE, memory.usage);
        self.add(&metric::MEMORY_WORKING_SET, memory.working_set);
        self.add(&metric::MEMORY_RSS, memory.rss);
        self.add(&metric::MEMORY_CACHE, memory.cache);
        self.add(&metric::MEMORY_MAPPED_FILE, memory.mapped_file);
        self.add(&metric::MEMORY_KERNEL, memory.kernel);
        self.add(&metric::MEMORY_SWAP, memory.swap_usage);
        if let Some(max) = memory.max_usage {
            self.add(&metric::MEMORY_MAX_USAGE, max);
        }
        self.add(&metric::MEMORY_FAILCNT, memory.limit_hits);
        // Counted with the cgroups below, of which a container has none as a rule.
        for scope in ["container", "hierarchy"] {
            self.labelled(&metric::MEMORY_FAILURES, &["pgfault", scope], memory.page_faults);
            let major = memory.major_page_faults;
            self.labelled(&metric::MEMORY_FAILURES, &["pgmajfault", scope], major);
        }
        self.add(&metric::OOM_EVENTS, memory.oom_kills);
        if let Some(pressure) = memory.pressure {
            self.add(
                &metric::PRESSURE_MEMORY_STALLED,
                pressure.full.total_us / MICROSECONDS,
            );
            self.add(
                &metric::PRESSURE_MEMORY_WAITING,
                pressure.some.total_us / MICROSECONDS,
            );
        }
    }

    fn pids(&mut self, pids: &PidsStats) {
        self.add(&metric::PROCESSES, pids.processes);
        self.add(&metric::THREADS, pids.threads);
        self.add(&metric::THREADS_MAX, pids.limit.unwrap_or(0));
    }

    fn io(&mut self, io: &IoStats) {
        for device in &io.devices {
            let (major, minor) = (device.major.to_string(), device.minor.to_string());
            let name = device_name(device.major, device.minor);
            self.labelled(&metric::FS_READS, &[&name], device.read_operations);
            self.labelled(&metric::FS_READS_BYTES, &[&name], device.read_bytes);
            self.labelled(&metric::FS_WRITES, &[&name], device.write_operations);
            self.labelled(&metric::FS_WRITES_BYTES, &[&name], device.write_bytes);
            for (operation, bytes) in [("Read", device.read_bytes), ("Write", device.write_bytes)] {
                self.labelled(&metric::BLKIO_USAGE, &[&name, &major, &minor, operation], bytes);
            }
        }
        if let Some(pressure) = io.pressure {
            self.add(
                &metric::PRESSURE_IO_STALLED,
                pressure.full.total_us / MICROSECONDS,
            );
            self.add(
                &metric::PRESSURE_IO_WAITING,
                pressure.some.total_us / MICROSECONDS,
            );
        }
    }

    fn network(&mut self, interface: &InterfaceStats) {
        let name = [interface.name.as_str()];
        self.labelled(&metric::NETWORK_RX_BYTES, &name, interface.rx_bytes);
        self.labelled(&metric::NETWORK_RX_PACKETS, &name, interface.rx_packets);
        self.labelled(&metric::NETWORK_RX_ERRORS, &name, interface.rx_errors);
        self.labelled(&metric::NETWORK_RX_DROPPED, &name, interface.rx_dropped);
        self.labelled(&metric::NETWORK_TX_BYTES, &name, interface.tx_bytes);
        self.labelled(&metric::NETWORK_TX_PACKETS, &name, interface.tx_packets);
        self.labelled(&metric::NETWORK_TX_ERRORS, &name, interface.tx_errors);
        self.labelled(&metric::NETWORK_TX_DROPPED, &name, interface.tx_dropped);
    }

    /// Limits as the CRI has them; a negative one is none.
    fn limits(&mut self, limits: &api::LinuxContainerResources) {
        let bytes = |value: i64| u64::try_from(value).unwrap_or(0);
        if limits.cpu_shares > 0 {
            self.add(&metric::SPEC_CPU_SHARES, bytes(limits.cpu_shares));
        }
        // As cAdvisor has it: a container without a quota has no sample of one.
        if limits.cpu_quota > 0 {
            self.add(&metric::SPEC_CPU_QUOTA, bytes(limits.cpu_quota));
        }
        if limits.cpu_period > 0 {
            self.add(&metric::SPEC_CPU_PERIOD, bytes(limits.cpu_period));
        }
        self.add(&metric::SPEC_MEMORY_LIMIT, bytes(limits.memory_limit_in_bytes));
        self.add(&metric::SPEC_MEMORY_RESERVATION, 0);
        self.add(&metric::SPEC_SWAP_LIMIT, bytes(limits.memory_swap_limit_in_bytes));
    }

    fn times(&mut self, started_at_ns: i64) {
        let seconds = |ns: i64| u64::try_from(ns).unwrap_or(0) / NANOSECONDS;
        self.add(&metric::LAST_SEEN, seconds(now_ns()));
        self.add(&metric::START_TIME, seconds(started_at_ns));
    }
}

fn of_pod(node: &Node, pod: &PodRecord, interfaces: &[InterfaceStats]) -> Vec<api::Metric> {
    let metadata = pod.config.metadata.clone().unwrap_or_default();
    let path = stats::pod_cgroup(node, pod).unwrap_or_else(|_| pod.cgroup_parent.clone());
    let mut samples = Samples::new([
        &path,
        pod.id.as_str(),
        "",
        &metadata.namespace,
        &metadata.name,
        "",
    ]);
    samples.times(pod.created_at_ns);
    match stats::read(catamaran_cgroups::full_stats, &path) {
        Ok(used) => samples.cgroup(&used),
        Err(error) => {
            tracing::debug!(pod = %pod.id, error = %chain(&error), "the pod's cgroup cannot be read");
        }
    }
    for interface in interfaces.iter().filter(|interface| interface.name != "lo") {
        samples.network(interface);
    }
    samples.all
}

/// `None`: it is gone, or its VM does not answer.
fn of_container(
    node: &Node,
    pod: &PodRecord,
    container: &ContainerRecord,
    guests: &HashMap<Id, CgroupStats>,
    disk: &Disk,
) -> Option<Vec<api::Metric>> {
    let path = stats::cgroup_path(node, pod, container).ok()?;
    let read;
    let used = match handler_kind(pod) {
        HandlerType::Vm => guests.get(&container.id)?,
        HandlerType::Oci => {
            read = stats::read(catamaran_cgroups::full_stats, &path).ok()?;
            &read
        }
    };
    let of = pod.config.metadata.clone().unwrap_or_default();
    let own = container.config.metadata.clone().unwrap_or_default();
    let image = container.config.image.clone().unwrap_or_default();
    let image = if image.user_specified_image.is_empty() {
        &image.image
    } else {
        &image.user_specified_image
    };
    let id = container.id.as_str();
    let mut samples = Samples::new([&path, id, image, &of.namespace, &of.name, &own.name]);
    samples.times(container.started_at_ns);
    samples.cgroup(used);
    // Processes in a guest are the guest's.
    if let (HandlerType::Oci, Ok(pids)) = (handler_kind(pod), catamaran_cgroups::pids(&path)) {
        let open = open_files::of(&pids);
        samples.add(&metric::FILE_DESCRIPTORS, open.descriptors);
        samples.add(&metric::SOCKETS, open.sockets);
    }
    samples.limits(&container.resources);
    if let Ok(layer) = node.images.snapshot_usage(id) {
        let device = [disk.device.as_str()];
        samples.labelled(&metric::FS_USAGE, &device, layer.bytes);
        samples.labelled(&metric::FS_LIMIT, &device, disk.bytes);
        samples.labelled(&metric::FS_INODES_TOTAL, &device, disk.inodes);
        samples.labelled(&metric::FS_INODES_FREE, &device, disk.inodes_free);
    }
    Some(samples.all)
}

/// The file system with the containers' writable layers.
#[derive(Default)]
struct Disk {
    device: String,
    bytes: u64,
    inodes: u64,
    inodes_free: u64,
}

impl Disk {
    fn of(path: &Path) -> Self {
        let (Ok(file), Ok(fs)) = (rustix::fs::stat(path), rustix::fs::statvfs(path)) else {
            return Self::default();
        };
        Self {
            device: device_name(rustix::fs::major(file.st_dev), rustix::fs::minor(file.st_dev)),
            bytes: fs.f_blocks.saturating_mul(fs.f_frsize),
            inodes: fs.f_files,
            inodes_free: fs.f_ffree,
        }
    }
}

/// `/dev/<name>` of a block device; its number where the host has none of it (a guest's device, an overlay).
fn device_name(major: u32, minor: u32) -> String {
    let number = format!("{major}:{minor}");
    match std::fs::read_link(Path::new("/sys/dev/block").join(&number)) {
        Ok(link) if link.file_name().is_some() => {
            format!("/dev/{}", link.file_name().unwrap_or_default().to_string_lossy())
        }
        _ => number,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn check(samples: &Samples) {
        for sample in &samples.all {
            let described = metric::ALL.iter().find(|d| d.name == sample.name);
            let keys = described.expect(&sample.name).message().label_keys;
            assert_eq!(keys.len(), sample.label_values.len(), "{}", sample.name);
            assert_eq!(sample.timestamp, 0);
        }
        // Prometheus refuses a whole scrape for one series that is there twice.
        let series: BTreeSet<_> = samples.all.iter().map(|s| (&s.name, &s.label_values)).collect();
        assert_eq!(series.len(), samples.all.len());
    }

    fn value(samples: &Samples, name: &str) -> u64 {
        let sample = samples.all.iter().find(|sample| sample.name == name);
        sample.expect(name).value.as_ref().unwrap().value
    }

    #[test]
    fn every_sample_is_described_and_labels_have_their_keys_order() {
        let pressure = catamaran_cgroups::Pressure {
            some: catamaran_cgroups::Stall {
                total_us: 3_500_000,
                ..Default::default()
            },
            ..Default::default()
        };
        let used = CgroupStats {
            timestamp_ns: 1,
            cpu: Some(CpuStats {
                usage_ns: 2_900_000_000,
                pressure: Some(pressure),
                ..Default::default()
            }),
            memory: Some(MemoryStats {
                max_usage: Some(9),
                oom_kills: 4,
                pressure: Some(pressure),
                ..Default::default()
            }),
            pids: Some(PidsStats {
                processes: 1,
                threads: 5,
                limit: None,
            }),
            io: Some(IoStats {
                devices: vec![catamaran_cgroups::IoDevice {
                    major: 999,
                    minor: 7,
                    read_bytes: 11,
                    ..Default::default()
                }],
                pressure: Some(pressure),
            }),
        };
        let mut samples = Samples::new(["/p/c", "c", "image", "default", "web", "app"]);
        samples.cgroup(&used);
        samples.times(7_900_000_000);
        samples.limits(&api::LinuxContainerResources {
            cpu_shares: 2,
            cpu_quota: 3,
            cpu_period: 4,
            memory_limit_in_bytes: -1,
            ..Default::default()
        });
        for name in ["eth0", "eth1"] {
            samples.network(&InterfaceStats {
                name: name.into(),
                ..Default::default()
            });
        }
        check(&samples);
        assert_eq!(value(&samples, "container_cpu_usage_seconds_total"), 2);
        assert_eq!(value(&samples, "container_pressure_cpu_waiting_seconds_total"), 3);
        assert_eq!(value(&samples, "container_oom_events_total"), 4);
        assert_eq!(value(&samples, "container_threads"), 5);
        assert_eq!(value(&samples, "container_threads_max"), 0);
        assert_eq!(value(&samples, "container_start_time_seconds"), 7);
        assert_eq!(value(&samples, "container_spec_memory_limit_bytes"), 0);
        let blkio = samples
            .all
            .iter()
            .find(|s| s.name == "container_blkio_device_usage_total")
            .unwrap();
        assert_eq!(
            blkio.label_values,
            [
                "/p/c", "c", "image", "default", "web", "app", "999:7", "999", "7", "Read"
            ]
        );
        assert_eq!(metric::BASE_LABELS[..2], ["id", "name"]);
    }

    /// What the kernel counts of a process that computes and fills memory is what the samples say.
    #[test]
    fn a_real_cgroup_gives_its_samples() {
        let path = format!("/catamaran-metrics-test-{}", std::process::id());
        struct Gone(String, Option<std::process::Child>);
        impl Drop for Gone {
            fn drop(&mut self) {
                if let Some(mut child) = self.1.take() {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                let _ = catamaran_cgroups::remove(&self.0);
            }
        }
        catamaran_cgroups::create(&path).expect("a cgroup (this test needs root)");
        let mut gone = Gone(path.clone(), None);
        // Enters the cgroup by every controller's file of this host, then computes for more than a second.
        let script = "for f in /sys/fs/cgroup/*$0/cgroup.procs /sys/fs/cgroup$0/cgroup.procs; do [ -e $f ] && echo $$ > $f; done; \
                      echo in; read go; while :; do :; done";
        let mut child = std::process::Command::new("sh")
            .args(["-c", script, &path])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.take().unwrap()),
            &mut line,
        )
        .unwrap();
        let mut go = child.stdin.take().unwrap();
        gone.1 = Some(child);
        assert_eq!(line, "in\n");
        std::io::Write::write_all(&mut go, b"go\n").unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            let mut samples = Samples::new([&path, "c", "", "", "", ""]);
            samples.cgroup(&stats::read(catamaran_cgroups::full_stats, &path).unwrap());
            check(&samples);
            assert_eq!(value(&samples, "container_processes"), 1);
            assert_eq!(value(&samples, "container_threads"), 1);
            assert!(value(&samples, "container_memory_usage_bytes") > 0);
            if value(&samples, "container_cpu_usage_seconds_total") >= 1 {
                break;
            }
            assert!(
                std::time::Instant::now() < until,
                "a second of CPU time was not counted"
            );
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    #[test]
    fn device_names_are_those_of_dev_or_numbers() {
        assert_eq!(device_name(4095, 9), "4095:9");
        if let Some(entry) = std::fs::read_dir("/sys/dev/block")
            .into_iter()
            .flatten()
            .flatten()
            .next()
        {
            let name = entry.file_name().into_string().unwrap();
            let (major, minor) = name.split_once(':').unwrap();
            let device = device_name(major.parse().unwrap(), minor.parse().unwrap());
            assert!(device.starts_with("/dev/"), "{device}");
        }
    }
}
