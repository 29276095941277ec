//! The daemon's metrics endpoint, the CRI's metrics and UpdatePodSandboxResources on a real daemon with a real
//! namespace pod.

#[allow(dead_code, reason = "other tests use the rest of it")]
mod daemon;

use std::collections::BTreeMap;
use std::path::PathBuf;

use catamaran::cri::api::{
    LinuxContainerResources, ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest,
    PodSandboxStatsRequest, PodSandboxStatusRequest, RemovePodSandboxRequest, StopPodSandboxRequest,
    StreamPodSandboxMetricsRequest, UpdatePodSandboxResourcesRequest,
};
use daemon::{Daemon, pod, real_shim};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

/// A port that nothing listened at a moment ago.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// The samples of an endpoint by series.
async fn scrape(port: u16) -> BTreeMap<String, f64> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.") && head.contains(" 200 "), "{head}");
    let samples = body.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
            (
                series.to_owned(),
                value.parse().unwrap_or_else(|_| panic!("{line:?}")),
            )
        })
        .collect()
}

#[tokio::test]
async fn the_endpoint_tells_of_rpcs_and_pods() {
    real_shim();
    let port = free_port();
    let daemon = Daemon::start(&format!("metrics:\n  address: 127.0.0.1:{port}\n")).await;
    let mut client = daemon.client().await;
    let before = scrape(port).await;
    let ready = "catamaran_pods{handler=\"runc\",state=\"ready\"}";
    assert_eq!(before[ready], 0.0);
    assert!(before["catamaran_image_store_bytes"] > 0.0);
    assert!(!before.contains_key("catamaran_rpc_duration_seconds_count{rpc=\"RunPodSandbox\"}"));

    let id = client
        .run_pod_sandbox(pod("m"))
        .await
        .unwrap()
        .into_inner()
        .pod_sandbox_id;
    let unknown = PodSandboxStatusRequest {
        pod_sandbox_id: "nosuch".into(),
        verbose: false,
    };
    client.pod_sandbox_status(unknown).await.unwrap_err();
    let after = scrape(port).await;
    assert_eq!(after[ready], 1.0);
    assert_eq!(
        after["catamaran_rpc_duration_seconds_count{rpc=\"RunPodSandbox\"}"],
        1.0
    );
    assert!(after["catamaran_rpc_duration_seconds_sum{rpc=\"RunPodSandbox\"}"] > 0.0);
    assert_eq!(
        after["catamaran_rpc_failures_total{rpc=\"PodSandboxStatus\",code=\"NotFound\"}"],
        1.0
    );

    client
        .stop_pod_sandbox(StopPodSandboxRequest {
            pod_sandbox_id: id.clone(),
        })
        .await
        .unwrap();
    let stopped = scrape(port).await;
    assert_eq!(stopped[ready], 0.0);
    assert_eq!(stopped["catamaran_pods{handler=\"runc\",state=\"stopped\"}"], 1.0);
    client
        .remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id })
        .await
        .unwrap();
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    std::fs::write(
        dir.path().join("c.yaml"),
        format!("root: {at}/root\nstate: {at}/state\nmetrics:\n  address: {address}\n"),
    )
    .unwrap();
    let ended = tokio::process::Command::new(env!("CARGO_BIN_EXE_catamaran"))
        .arg("serve")
        .arg("--config")
        .arg(dir.path().join("c.yaml"))
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(20), ended).await;
    let ended = ended.expect("it does not run").unwrap();
    assert!(!ended.status.success());
    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(
        text.contains(&address.to_string()) && text.contains("metrics.address"),
        "{text}"
    );
}

#[tokio::test]
async fn a_pods_metrics_are_described_and_labelled() {
    real_shim();
    let daemon = Daemon::start("").await;
    let mut client = daemon.client().await;
    let id = client
        .run_pod_sandbox(pod("m"))
        .await
        .unwrap()
        .into_inner()
        .pod_sandbox_id;
    let described = client
        .list_metric_descriptors(ListMetricDescriptorsRequest {})
        .await
        .unwrap();
    let keys: BTreeMap<String, Vec<String>> = described
        .into_inner()
        .descriptors
        .into_iter()
        .map(|descriptor| (descriptor.name, descriptor.label_keys))
        .collect();
    let listed = client
        .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})
        .await
        .unwrap();
    let mut listed = listed.into_inner().pod_metrics;
    assert_eq!(listed.len(), 1);
    let listed = listed.remove(0);
    assert_eq!(listed.pod_sandbox_id, id);
    for sample in &listed.metrics {
        let labels: BTreeMap<_, _> = keys[&sample.name].iter().zip(&sample.label_values).collect();
        assert_eq!(labels.len(), sample.label_values.len(), "{}", sample.name);
        assert_eq!(labels[&"name".to_owned()], &id);
        assert_eq!(labels[&"pod".to_owned()], "m");
        assert_eq!(labels[&"namespace".to_owned()], "test");
    }
    for name in [
        "container_cpu_usage_seconds_total",
        "container_memory_usage_bytes",
        "container_threads",
    ] {
        assert!(listed.metrics.iter().any(|sample| sample.name == name), "{name}");
    }
    let mut stream = client
        .stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest {})
        .await
        .unwrap()
        .into_inner();
    let streamed = stream.message().await.unwrap().unwrap().pod_sandbox_metrics;
    assert_eq!(streamed[0].pod_sandbox_id, id);
    let stats = client
        .pod_sandbox_stats(PodSandboxStatsRequest { pod_sandbox_id: id })
        .await
        .unwrap();
    let linux = stats.into_inner().stats.unwrap().linux.unwrap();
    assert!(linux.process.unwrap().process_count.is_some());
}

/// The pod's memory limit as the kernel has it, on either version.
fn memory_limit(daemon: &Daemon, pod: &str) -> String {
    let parent = daemon.path("").file_name().unwrap().to_owned();
    let files = [
        PathBuf::from("/sys/fs/cgroup/memory")
            .join(&parent)
            .join(pod)
            .join("memory.limit_in_bytes"),
        PathBuf::from("/sys/fs/cgroup")
            .join(&parent)
            .join(pod)
            .join("memory.max"),
    ];
    let found = files.iter().find_map(|file| std::fs::read_to_string(file).ok());
    found
        .unwrap_or_else(|| panic!("none of {files:?}"))
        .trim()
        .to_owned()
}

#[tokio::test]
async fn a_pods_resources_limit_its_cgroup_and_outlive_the_daemon() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let mut client = daemon.client().await;
    let id = client
        .run_pod_sandbox(pod("r"))
        .await
        .unwrap()
        .into_inner()
        .pod_sandbox_id;
    let memory = |bytes| {
        Some(LinuxContainerResources {
            memory_limit_in_bytes: bytes,
            ..Default::default()
        })
    };
    let update = |overhead, resources| UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.clone(),
        overhead: memory(overhead),
        resources: memory(resources),
    };
    client
        .update_pod_sandbox_resources(update(16 << 20, 64 << 20))
        .await
        .unwrap();
    assert_eq!(memory_limit(&daemon, &id), (80 << 20).to_string());
    let refused = client
        .update_pod_sandbox_resources(update(-7, 64 << 20))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(
        refused.message().contains("overhead.memory_limit_in_bytes"),
        "{refused}"
    );
    assert_eq!(memory_limit(&daemon, &id), (80 << 20).to_string());
    let mut unknown = update(1, 1);
    unknown.pod_sandbox_id = "nosuch".into();
    assert_eq!(
        client
            .update_pod_sandbox_resources(unknown)
            .await
            .unwrap_err()
            .code(),
        Code::NotFound
    );

    daemon.kill();
    daemon.spawn().await;
    let mut client = daemon.client().await;
    let status = client
        .pod_sandbox_status(PodSandboxStatusRequest {
            pod_sandbox_id: id.clone(),
            verbose: true,
        })
        .await
        .unwrap()
        .into_inner();
    let shown = format!("{:?}", status.info);
    assert!(
        shown.contains(&(64 << 20).to_string()) && shown.contains(&(16 << 20).to_string()),
        "{shown}"
    );

    client
        .stop_pod_sandbox(StopPodSandboxRequest {
            pod_sandbox_id: id.clone(),
        })
        .await
        .unwrap();
    let late = client
        .update_pod_sandbox_resources(update(1, 1))
        .await
        .unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
}
