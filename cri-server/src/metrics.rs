//! The daemon's own metrics for Prometheus: what the RPCs do, what pods and containers there are, what the image
//! store takes. Those of the containers are the CRI's (`cri/metrics.rs`), which the kubelet serves.
//!
//! Served in the text format 0.0.4 by plain HTTP at `/metrics`, where the configuration names an address. It is
//! read-only and tells no secrets; whoever binds it beyond loopback decides who may read it.

mod endpoint;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

pub(crate) use endpoint::bind;

use crate::node::Node;
use crate::pods::Pods;
use crate::pods::state::{ContainerState, PodState};

/// Upper bounds of the histogram's buckets, in seconds.
const BUCKETS: [f64; 12] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];
/// RPC names that are kept apart: more than the CRI has. What is over is counted together.
const MAX_NAMES: usize = 64;
/// gRPC's UNIMPLEMENTED: also the answer to a name that no service has.
const UNIMPLEMENTED: i32 = 12;

/// What became of the RPCs so far.
#[derive(Debug, Default)]
pub(crate) struct RpcMetrics {
    by_name: Mutex<BTreeMap<String, Rpc>>,
}

#[derive(Debug, Default)]
struct Rpc {
    /// Of those that took no longer than the bound, and longer than the one before; the last has no bound.
    counts: [u64; BUCKETS.len() + 1],
    seconds: f64,
    failures: BTreeMap<i32, u64>,
}

impl RpcMetrics {
    /// Counts one that has been answered, a stream when it began; `code` is its gRPC status.
    pub(crate) fn observe(&self, name: &str, code: i32, took: Duration) {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = by_name.contains_key(name) || (code != UNIMPLEMENTED && by_name.len() < MAX_NAMES);
        let rpc = by_name
            .entry(if kept { name } else { "other" }.to_owned())
            .or_default();
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound);
        rpc.counts[bucket.unwrap_or(BUCKETS.len())] += 1;
        rpc.seconds += seconds;
        if code != 0 {
            *rpc.failures.entry(code).or_default() += 1;
        }
    }

    /// How many ended with this status.
    #[cfg(test)]
    pub(crate) fn count(&self, name: &str, code: i32) -> u64 {
        let by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        let rpc = by_name.get(name);
        let failures = |rpc: &Rpc| rpc.failures.values().sum::<u64>();
        match code {
            0 => rpc.map_or(0, |rpc| rpc.counts.iter().sum::<u64>() - failures(rpc)),
            _ => rpc.and_then(|rpc| rpc.failures.get(&code)).copied().unwrap_or(0),
        }
    }

    fn render(&self, text: &mut Text) {
        let by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        let name = "catamaran_rpc_duration_seconds";
        text.head(
            name,
            "histogram",
            "Time from a CRI request to its answer, a stream's to its beginning.",
        );
        for (rpc, observed) in &*by_name {
            let mut sum = 0;
            for (count, bound) in observed.counts.iter().zip(BUCKETS.iter().map(Some).chain([None])) {
                sum += count;
                let bound = bound.map_or("+Inf".to_owned(), ToString::to_string);
                text.sample(
                    "catamaran_rpc_duration_seconds_bucket",
                    &[("rpc", rpc), ("le", &bound)],
                    sum,
                );
            }
            text.sample(
                "catamaran_rpc_duration_seconds_sum",
                &[("rpc", rpc)],
                observed.seconds,
            );
            text.sample("catamaran_rpc_duration_seconds_count", &[("rpc", rpc)], sum);
        }
        let name = "catamaran_rpc_failures_total";
        text.head(name, "counter", "CRI requests that failed, by gRPC status.");
        for (rpc, observed) in &*by_name {
            for (code, count) in &observed.failures {
                let code = format!("{:?}", tonic::Code::from_i32(*code));
                text.sample(name, &[("rpc", rpc), ("code", &code)], count);
            }
        }
    }
}

/// Everything, as Prometheus reads it.
fn render(rpcs: &RpcMetrics, pods: &Pods) -> String {
    let mut text = Text::default();
    let name = "catamaran_build_info";
    text.head(name, "gauge", "1, with the version as a label.");
    text.sample(name, &[("version", env!("CARGO_PKG_VERSION"))], 1);
    rpcs.render(&mut text);
    population(pods, &mut text);
    images(pods.node(), &mut text);
    text.0
}

/// Every state of every handler has a sample, also those that nothing is in: a series that comes and goes cannot
/// be alerted on.
fn population(pods: &Pods, text: &mut Text) {
    let mut of_pods: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut of_containers: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let views = pods.views();
    // A pod may be of a handler that the configuration no longer has.
    let configured = pods.node().handlers.iter().map(|handler| handler.name.as_str());
    for handler in configured.chain(views.iter().map(|view| view.pod.handler.as_str())) {
        of_pods.extend(POD_STATES.map(|state| ((handler, pod_state(state)), 0)));
        of_containers.extend(CONTAINER_STATES.map(|state| ((handler, container_state(state)), 0)));
    }
    for view in &views {
        let handler = view.pod.handler.as_str();
        *of_pods.entry((handler, pod_state(view.pod.state))).or_default() += 1;
        for container in view.containers.values() {
            *of_containers
                .entry((handler, container_state(container.state)))
                .or_default() += 1;
        }
    }
    for (name, help, counts) in [
        ("catamaran_pods", "Pod sandboxes.", of_pods),
        ("catamaran_containers", "Containers.", of_containers),
    ] {
        text.head(name, "gauge", help);
        for ((handler, state), count) in counts {
            text.sample(name, &[("handler", handler), ("state", state)], count);
        }
    }
}

fn images(node: &Node, text: &mut Text) {
    let name = "catamaran_images";
    text.head(name, "gauge", "Images.");
    text.sample(name, &[], node.images.list().len());
    match node.images.usage() {
        Ok(usage) => {
            let name = "catamaran_image_store_bytes";
            text.head(name, "gauge", "Bytes that layers, manifests and metadata take.");
            text.sample(name, &[], usage.used_bytes);
        }
        Err(error) => tracing::warn!(%error, "the image store's size cannot be told"),
    }
}

/// Those of pods that are listed.
const POD_STATES: [PodState; 5] = [
    PodState::Ready,
    PodState::Stopping,
    PodState::Stopped,
    PodState::Broken,
    PodState::Removing,
];

fn pod_state(state: PodState) -> &'static str {
    match state {
        PodState::Creating => "creating",
        PodState::Ready => "ready",
        PodState::Stopping => "stopping",
        PodState::Stopped => "stopped",
        PodState::Broken => "broken",
        PodState::Removing => "removing",
    }
}

const CONTAINER_STATES: [ContainerState; 8] = [
    ContainerState::Creating,
    ContainerState::Created,
    ContainerState::Starting,
    ContainerState::Running,
    ContainerState::Stopping,
    ContainerState::Exited,
    ContainerState::Removing,
    ContainerState::Unknown,
];

fn container_state(state: ContainerState) -> &'static str {
    match state {
        ContainerState::Creating => "creating",
        ContainerState::Created => "created",
        ContainerState::Starting => "starting",
        ContainerState::Running => "running",
        ContainerState::Stopping => "stopping",
        ContainerState::Exited => "exited",
        ContainerState::Removing => "removing",
        ContainerState::Unknown => "unknown",
    }
}

/// Prometheus' text format 0.0.4.
#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (index, (key, text)) in labels.iter().enumerate() {
            let escaped = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{key}=\"{escaped}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_failures_are_by_code() {
        let rpcs = RpcMetrics::default();
        rpcs.observe("Version", 0, Duration::from_millis(1));
        rpcs.observe("Version", 0, Duration::from_millis(2));
        rpcs.observe("Version", 5, Duration::from_secs(100));
        let mut text = Text::default();
        rpcs.render(&mut text);
        for line in [
            "# TYPE catamaran_rpc_duration_seconds histogram",
            "catamaran_rpc_duration_seconds_bucket{rpc=\"Version\",le=\"0.001\"} 1",
            "catamaran_rpc_duration_seconds_bucket{rpc=\"Version\",le=\"0.005\"} 2",
            "catamaran_rpc_duration_seconds_bucket{rpc=\"Version\",le=\"60\"} 2",
            "catamaran_rpc_duration_seconds_bucket{rpc=\"Version\",le=\"+Inf\"} 3",
            "catamaran_rpc_duration_seconds_sum{rpc=\"Version\"} 100.003",
            "catamaran_rpc_duration_seconds_count{rpc=\"Version\"} 3",
            "catamaran_rpc_failures_total{rpc=\"Version\",code=\"NotFound\"} 1",
        ] {
            assert!(text.0.lines().any(|l| l == line), "{line}\n{}", text.0);
        }
    }

    #[test]
    fn names_that_no_service_has_and_too_many_names_are_counted_together() {
        let rpcs = RpcMetrics::default();
        rpcs.observe("NoSuch\"\n", UNIMPLEMENTED, Duration::ZERO);
        for index in 0..1000 {
            rpcs.observe(&format!("Made{index}"), 3, Duration::ZERO);
        }
        let by_name = rpcs.by_name.lock().unwrap();
        assert!(by_name.len() <= MAX_NAMES + 1, "{}", by_name.len());
        assert!(!by_name.contains_key("NoSuch\"\n"));
        let all: u64 = by_name.values().flat_map(|rpc| rpc.counts).sum();
        assert_eq!(all, 1001);
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = Text::default();
        text.sample("m", &[("a", "x\"\\\n")], 1);
        assert_eq!(text.0, "m{a=\"x\\\"\\\\\\n\"} 1\n");
    }
}
