//! Statistics: from the cgroups of namespace pods, read here, and from the shim of VM pods, whose containers'
//! cgroups are in the guest. No process is started for them.

use std::path::PathBuf;
use std::sync::Arc;

use catamaran_cgroups::{CgroupStats, InterfaceStats, Pressure};
use catamaran_network::POD_INTERFACE;
use futures::future::join_all;

use super::{api, convert, shim_stats};
use crate::config::{CgroupDriver, HandlerType};
use crate::error::{Error, Result, chain};
use crate::node::{Node, now_ns};
use crate::pods::record::{ContainerRecord, PodRecord, PodView};
use crate::pods::state::{ContainerState, PodState};
use crate::pods::{Pods, handler_kind};

/// ContainerStats of one container.
pub(super) async fn container(
    node: &Arc<Node>,
    view: &Arc<PodView>,
    container: &Arc<ContainerRecord>,
) -> Result<api::ContainerStats> {
    let used = match (runs(container), handler_kind(&view.pod)) {
        (false, _) => CgroupStats {
            timestamp_ns: now_ns(),
            ..CgroupStats::default()
        },
        (true, HandlerType::Vm) => guest_stats(view, container).await?,
        (true, HandlerType::Oci) => {
            let path = cgroup_path(node, &view.pod, container)?;
            blocking(move || read(catamaran_cgroups::container_stats, &path)).await?
        }
    };
    let (node, record) = (node.clone(), container.clone());
    blocking(move || Ok(container_message(&node, &record, used))).await
}

/// ListContainerStats. A container that ends meanwhile is left out.
pub(super) async fn containers(pods: &Pods, filter: &api::ContainerStatsFilter) -> Vec<api::ContainerStats> {
    let mut wanted = Vec::new();
    for view in pods.views() {
        for record in view.containers.values() {
            let matches = convert::id_matches(&record.id, &filter.id)
                && convert::id_matches(&record.pod, &filter.pod_sandbox_id)
                && convert::labels_match(&record.config.labels, &filter.label_selector);
            if matches && runs(record) {
                wanted.push((view.clone(), record.clone()));
            }
        }
    }
    many(pods.node(), wanted).await
}

/// Threads that read cgroups for one request.
fn readers() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(4))
}

/// Statistics of many containers: the cgroups of this host shared out to a few threads, guests beside each other.
async fn many(
    node: &Arc<Node>,
    wanted: Vec<(Arc<PodView>, Arc<ContainerRecord>)>,
) -> Vec<api::ContainerStats> {
    let (guests, hosts): (Vec<_>, Vec<_>) = wanted
        .into_iter()
        .partition(|(view, _)| handler_kind(&view.pod) == HandlerType::Vm);
    let each = hosts.len().div_ceil(readers()).max(1);
    let on_host = join_all(hosts.chunks(each).map(|chunk| {
        let (node, chunk) = (node.clone(), chunk.to_vec());
        blocking(move || {
            let one = |(view, record): &(Arc<PodView>, Arc<ContainerRecord>)| {
                let path = cgroup_path(&node, &view.pod, record).ok()?;
                let used = read(catamaran_cgroups::container_stats, &path).ok()?;
                Some(container_message(&node, record, used))
            };
            Ok(chunk.iter().filter_map(one).collect::<Vec<_>>())
        })
    }));
    let in_guests = join_all(guests.iter().map(|(view, record)| container(node, view, record)));
    let (on_host, in_guests) = tokio::join!(on_host, in_guests);
    let mut all: Vec<_> = on_host.into_iter().filter_map(Result::ok).flatten().collect();
    all.extend(in_guests.into_iter().filter_map(|stats| match stats {
        Ok(stats) => Some(stats),
        Err(error) => {
            tracing::debug!(error = %chain(&error), "a guest's statistics are left out");
            None
        }
    }));
    all
}

/// PodSandboxStats of one pod.
pub(super) async fn pod(node: &Arc<Node>, view: Arc<PodView>) -> Result<api::PodSandboxStats> {
    let wanted: Vec<_> = view
        .containers
        .values()
        .filter(|c| runs(c))
        .map(|c| (view.clone(), c.clone()))
        .collect();
    let containers = many(node, wanted).await;
    let (node, pod) = (node.clone(), view.pod.clone());
    blocking(move || Ok(pod_message(&node, &pod, containers))).await
}

/// ListPodSandboxStats.
pub(super) async fn pods(pods: &Pods, filter: &api::PodSandboxStatsFilter) -> Vec<api::PodSandboxStats> {
    let views = pods.views().into_iter().filter(|view| {
        view.pod.state == PodState::Ready
            && convert::id_matches(&view.pod.id, &filter.id)
            && convert::labels_match(&view.pod.config.labels, &filter.label_selector)
    });
    let all = join_all(views.map(|view| pod(pods.node(), view))).await;
    all.into_iter().filter_map(Result::ok).collect()
}

pub(super) fn runs(container: &ContainerRecord) -> bool {
    matches!(
        container.state,
        ContainerState::Running | ContainerState::Stopping
    )
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Internal(format!("a task ended: {error}"))),
    }
}

/// Path of the pod's cgroup below the hierarchies' mounts.
pub(super) fn pod_cgroup(node: &Node, pod: &PodRecord) -> Result<String> {
    match node.config.cgroup_driver {
        CgroupDriver::Cgroupfs => Ok(pod.cgroup_parent.clone()),
        CgroupDriver::Systemd => {
            let slice = pod.cgroup_parent.rsplit('/').next().unwrap_or_default();
            catamaran_cgroups::systemd::slice_path(slice).map_err(|e| Error::Cgroup {
                path: pod.cgroup_parent.clone(),
                problem: chain(&e),
            })
        }
    }
}

/// The container's cgroup as its spec names it.
pub(super) fn cgroup_path(node: &Node, pod: &PodRecord, container: &ContainerRecord) -> Result<String> {
    let id = container.id.as_str();
    match node.config.cgroup_driver {
        CgroupDriver::Cgroupfs => Ok(format!("{}/{id}", pod.cgroup_parent.trim_end_matches('/'))),
        CgroupDriver::Systemd => {
            let slice = pod.cgroup_parent.rsplit('/').next().unwrap_or_default();
            catamaran_cgroups::systemd::scope_path(slice, "catamaran", id).map_err(|e| Error::Cgroup {
                path: pod.cgroup_parent.clone(),
                problem: chain(&e),
            })
        }
    }
}

/// Reads a cgroup by one of `catamaran_cgroups`' functions.
pub(super) fn read(
    by: impl Fn(&str) -> catamaran_cgroups::Result<CgroupStats>,
    path: &str,
) -> Result<CgroupStats> {
    by(path).map_err(|e| Error::Cgroup {
        path: path.to_owned(),
        problem: chain(&e),
    })
}

fn value(value: u64) -> Option<api::UInt64Value> {
    Some(api::UInt64Value { value })
}

fn attributes(container: &ContainerRecord) -> api::ContainerAttributes {
    api::ContainerAttributes {
        id: container.id.to_string(),
        metadata: container.config.metadata.clone(),
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
    }
}

fn container_message(node: &Node, container: &ContainerRecord, used: CgroupStats) -> api::ContainerStats {
    let layer = node.images.snapshot_usage(container.id.as_str()).ok();
    let swap = used.memory.as_ref().map(|memory| api::SwapUsage {
        timestamp: used.timestamp_ns,
        swap_available_bytes: memory
            .swap_limit
            .and_then(|limit| value(limit.saturating_sub(memory.swap_usage))),
        swap_usage_bytes: value(memory.swap_usage),
    });
    api::ContainerStats {
        attributes: Some(attributes(container)),
        cpu: cpu(node, container.id.as_str(), &used),
        memory: memory(&used),
        writable_layer: layer.map(|usage| api::FilesystemUsage {
            timestamp: usage.timestamp_ns,
            fs_id: Some(api::FilesystemIdentifier {
                mountpoint: node.dirs.snapshots().display().to_string(),
            }),
            used_bytes: value(usage.bytes),
            inodes_used: value(usage.inodes),
        }),
        swap,
        io: io(&used),
    }
}

fn pod_message(node: &Node, pod: &PodRecord, containers: Vec<api::ContainerStats>) -> api::PodSandboxStats {
    let used = pod_cgroup(node, pod)
        .and_then(|path| read(catamaran_cgroups::pod_stats, &path))
        .unwrap_or_else(|error| {
            tracing::debug!(pod = %pod.id, error = %chain(&error), "the pod's cgroup cannot be read");
            CgroupStats {
                timestamp_ns: now_ns(),
                ..CgroupStats::default()
            }
        });
    api::PodSandboxStats {
        attributes: Some(api::PodSandboxAttributes {
            id: pod.id.to_string(),
            metadata: pod.config.metadata.clone(),
            labels: pod.config.labels.clone(),
            annotations: pod.config.annotations.clone(),
        }),
        linux: Some(api::LinuxPodSandboxStats {
            cpu: cpu(node, pod.id.as_str(), &used),
            memory: memory(&used),
            network: network(pod.netns()),
            process: used.pids.as_ref().map(|pids| api::ProcessUsage {
                timestamp: used.timestamp_ns,
                process_count: value(pids.processes),
            }),
            containers,
            io: io(&used),
        }),
        windows: None,
    }
}

fn cpu(node: &Node, id: &str, used: &CgroupStats) -> Option<api::CpuUsage> {
    used.cpu.as_ref().map(|cpu| api::CpuUsage {
        timestamp: used.timestamp_ns,
        usage_core_nano_seconds: value(cpu.usage_ns),
        usage_nano_cores: node
            .cpu_rates
            .sample(id, used.timestamp_ns, cpu.usage_ns)
            .and_then(value),
        psi: cpu.pressure.map(psi),
    })
}

fn memory(used: &CgroupStats) -> Option<api::MemoryUsage> {
    used.memory.as_ref().map(|memory| api::MemoryUsage {
        timestamp: used.timestamp_ns,
        working_set_bytes: value(memory.working_set),
        available_bytes: memory.available.and_then(value),
        usage_bytes: value(memory.usage),
        rss_bytes: value(memory.rss),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: memory.pressure.map(psi),
    })
}

fn io(used: &CgroupStats) -> Option<api::IoUsage> {
    let pressure = used.io.as_ref()?.pressure?;
    Some(api::IoUsage {
        timestamp: used.timestamp_ns,
        psi: Some(psi(pressure)),
    })
}

fn psi(pressure: Pressure) -> api::PsiStats {
    let data = |stall: catamaran_cgroups::Stall| api::PsiData {
        // The kernel counts microseconds, the CRI nanoseconds.
        total: stall.total_us.saturating_mul(1000),
        avg10: stall.avg10,
        avg60: stall.avg60,
        avg300: stall.avg300,
    };
    api::PsiStats {
        full: Some(data(pressure.full)),
        some: Some(data(pressure.some)),
    }
}

fn network(netns: Option<&PathBuf>) -> Option<api::NetworkUsage> {
    let interfaces = catamaran_cgroups::network_stats(netns?).ok()?;
    let usage = |i: &InterfaceStats| api::NetworkInterfaceUsage {
        name: i.name.clone(),
        rx_bytes: value(i.rx_bytes),
        rx_errors: value(i.rx_errors),
        tx_bytes: value(i.tx_bytes),
        tx_errors: value(i.tx_errors),
    };
    let others = interfaces
        .iter()
        .filter(|i| i.name != "lo" && i.name != POD_INTERFACE);
    Some(api::NetworkUsage {
        timestamp: now_ns(),
        default_interface: interfaces.iter().find(|i| i.name == POD_INTERFACE).map(usage),
        interfaces: others.map(usage).collect(),
    })
}

pub(super) async fn guest_stats(view: &PodView, container: &ContainerRecord) -> Result<CgroupStats> {
    let shim = view
        .shim
        .as_ref()
        .ok_or_else(|| Error::Unavailable(format!("the shim of container {} is gone", container.id)))?;
    shim_stats::parse(&shim.stats(container.id.as_str()).await?)
}
