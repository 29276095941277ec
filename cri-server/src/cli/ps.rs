//! `catamaran ps`: pods and containers with the runtime and the kernel that they run on.

use std::collections::HashMap;
use std::process::ExitCode;

use serde_json::Value;

use super::{Outcome, block_on, connect};
use crate::config::Config;
use crate::cri::api::{self, runtime_service_client::RuntimeServiceClient};
use crate::node::now_ns;

pub(super) fn run(config: &Config) -> Outcome {
    let rows = block_on(rows(config))??;
    print!("{}", table(&rows));
    Ok(ExitCode::SUCCESS)
}

type Row = [String; 8];

const HEADER: [&str; 8] = [
    "POD",
    "CONTAINER",
    "ID",
    "STATE",
    "RUNTIME",
    "KERNEL",
    "IP",
    "AGE",
];

async fn rows(config: &Config) -> Result<Vec<Row>, Box<dyn std::error::Error>> {
    let mut client = RuntimeServiceClient::new(connect(config).await?);
    let fail = |status: tonic::Status| format!("{}: {}", status.code(), status.message());
    let mut pods = client
        .list_pod_sandbox(api::ListPodSandboxRequest::default())
        .await
        .map_err(fail)?
        .into_inner()
        .items;
    pods.sort_by_key(|pod| pod.created_at);
    let host_kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    let mut rows = Vec::new();
    for pod in pods {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: true,
        };
        let answer = match client.pod_sandbox_status(request).await {
            Ok(answer) => answer.into_inner(),
            // Removed since it was listed.
            Err(status) if status.code() == tonic::Code::NotFound => continue,
            Err(status) => return Err(fail(status).into()),
        };
        let status = answer.status.unwrap_or_default();
        let metadata = status.metadata.clone().unwrap_or_default();
        let name = format!("{}/{}", metadata.namespace, metadata.name);
        let kernel = kernel(&answer.info).unwrap_or_else(|| host_kernel.clone());
        let ip = status
            .network
            .clone()
            .map(|network| network.ip)
            .unwrap_or_default();
        let ready = status.state() == api::PodSandboxState::SandboxReady;
        rows.push([
            name.clone(),
            String::new(),
            short(&status.id),
            if ready { "Ready" } else { "NotReady" }.to_owned(),
            status.runtime_handler.clone(),
            kernel.clone(),
            ip.clone(),
            age(status.created_at),
        ]);
        let mut containers = answer.containers_statuses;
        containers.sort_by_key(|container| container.created_at);
        for container in containers {
            let state = match container.state() {
                api::ContainerState::ContainerCreated => "Created".to_owned(),
                api::ContainerState::ContainerRunning => "Running".to_owned(),
                api::ContainerState::ContainerExited => {
                    format!("{} ({})", container.reason, container.exit_code)
                }
                api::ContainerState::ContainerUnknown => "Unknown".to_owned(),
            };
            rows.push([
                name.clone(),
                container.metadata.clone().unwrap_or_default().name,
                short(&container.id),
                state,
                status.runtime_handler.clone(),
                kernel.clone(),
                ip.clone(),
                age(container.created_at),
            ]);
        }
    }
    Ok(rows)
}

/// The guest's kernel release, which the shim of a VM pod reports.
fn kernel(info: &HashMap<String, String>) -> Option<String> {
    let document: Value = serde_json::from_str(info.get("info")?).ok()?;
    let kernel = document
        .get("sandbox")?
        .get(catamaran_sandbox::pod_spec::info::KERNEL)?;
    Some(kernel.as_str()?.to_owned())
}

fn short(id: &str) -> String {
    id.chars().take(13).collect()
}

fn age(created_ns: i64) -> String {
    let seconds = now_ns().saturating_sub(created_ns).max(0) / 1_000_000_000;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn table(rows: &[Row]) -> String {
    let header = HEADER.map(str::to_owned);
    let mut widths = [0; 8];
    for row in std::iter::once(&header).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |name: &str| -> Row {
            std::array::from_fn(|at| if at == 0 { name.to_owned() } else { "x".into() })
        };
        let text = table(&[row("a"), row("longer-name")]);
        let columns: Vec<usize> = text
            .lines()
            .skip(1)
            .map(|line| line.find(" x").unwrap())
            .collect();
        assert_eq!(text.lines().count(), 3);
        assert!(columns[0] == 12 || columns[0] == columns[1], "{text}");
    }

    #[test]
    fn ages_are_short() {
        assert_eq!(age(now_ns() - 5_000_000_000), "5s");
        assert_eq!(age(now_ns() - 3 * 3_600_000_000_000), "3h");
    }

    #[test]
    fn the_guests_kernel_is_found_in_the_verbose_info() {
        let info = HashMap::from([("info".to_owned(), r#"{"sandbox":{"kernel":"6.12.1"}}"#.to_owned())]);
        assert_eq!(kernel(&info).as_deref(), Some("6.12.1"));
        assert_eq!(kernel(&HashMap::new()), None);
    }
}
