//! Metrics of containers under both handlers, as crictl gets them, and ExecSync with much output.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::{Handler, Skip, Suite};
use serde_json::Value;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("containers_have_metrics", metrics)
        .both("exec_sync_returns_megabytes_whole", megabytes)
        .main()
}

/// The label values of a metric by their keys, and its value, for one container.
fn sample(descriptors: &Value, container: &Value, name: &str) -> Result<(Vec<(String, String)>, u64)> {
    let entries = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let texts = |value: &Value| -> Vec<String> {
        let all = entries(value);
        all.iter()
            .map(|text| text.as_str().unwrap_or_default().to_owned())
            .collect()
    };
    let described = entries(&descriptors["descriptors"]);
    let keys = described
        .iter()
        .find(|d| d["name"] == name)
        .with_context(|| format!("no {name}"))?;
    let keys = texts(&keys["labelKeys"]);
    let found = entries(&container["metrics"]);
    let found = found
        .iter()
        .find(|m| m["name"] == name)
        .with_context(|| format!("no sample of {name}"))?;
    let values = texts(&found["labelValues"]);
    ensure!(keys.len() == values.len(), "{name}: {keys:?} {values:?}");
    let number = found["value"]["value"]
        .as_str()
        .and_then(|text| text.parse().ok());
    Ok((keys.into_iter().zip(values).collect(), number.unwrap_or(0)))
}

fn metrics(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(Skip("containerd 1.6 has no metrics RPCs".to_owned()).into());
    }
    let crictl = &t.node.crictl;
    let pod = t.pod()?;
    let busy = t.script("busy", "while :; do :; done");
    let id = t.start(&pod, &busy)?;
    let descriptors = crictl.json(&["metricdescs"])?;
    t.eventually(Duration::from_secs(30), || {
        let listed = crictl.json(&["metricsp"])?;
        let pods = listed["podMetrics"].as_array().cloned().unwrap_or_default();
        let of = pods.iter().find(|p| p["podSandboxId"] == pod.id.as_str());
        let of = of.with_context(|| format!("no metrics of the pod: {listed}"))?;
        let containers = of["containerMetrics"].as_array().cloned().unwrap_or_default();
        let container = containers.iter().find(|c| c["containerId"] == id.as_str());
        let container = container.with_context(|| of.to_string())?;
        let (labels, seconds) = sample(&descriptors, container, "container_cpu_usage_seconds_total")?;
        ensure!(seconds >= 1, "{seconds} s of CPU time");
        for (key, value) in [
            ("name", id.as_str()),
            ("container", "busy"),
            ("namespace", "e2e"),
            ("cpu", "total"),
        ] {
            let label = (key.to_owned(), value.to_owned());
            ensure!(labels.contains(&label), "{key} is not {value} in {labels:?}");
        }
        ensure!(sample(&descriptors, container, "container_memory_usage_bytes")?.1 > 0);
        ensure!(sample(&descriptors, container, "container_threads")?.1 >= 1);
        if t.handler == Handler::Runc {
            ensure!(sample(&descriptors, container, "container_file_descriptors")?.1 >= 3);
            ensure!(sample(&descriptors, container, "container_sockets").is_ok());
        }
        ensure!(sample(&descriptors, container, "container_start_time_seconds")?.1 > 1_600_000_000);
        ensure!(
            sample(&descriptors, of, "container_network_receive_bytes_total").is_ok(),
            "{of}"
        );
        Ok(())
    })
}

/// More than one message between daemon and shim holds, and the exit code with it.
fn megabytes(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let output = t
        .node
        .crictl
        .run(&["exec", "-s", &id, "sh", "-c", "seq 700000"])?;
    ensure!(output.code == 0, "{}", output.stderr);
    let mut expected = 0;
    // crictl adds an empty line.
    for line in output.stdout.trim_end().lines() {
        expected += 1;
        ensure!(line == expected.to_string(), "line {expected} is {line:?}");
    }
    ensure!(expected == 700_000, "{expected} lines");
    Ok(())
}
