//! Many at once: statistics of 100 running containers, lists of 1,000, and pods started by 8 callers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use catamaran_e2e::node::Node;
use k8s_cri::v1::PodSandboxConfig;
use tokio::task::JoinSet;

use crate::client::{Client, sleep_for_ever};
use crate::report::Report;

/// Callers at once, for what is only made ready and for what is timed.
const WORKERS: usize = 8;
/// Containers of each pod of the crowd.
const PER_POD: usize = 10;
/// Pods whose containers run: together 100 containers.
const RUNNING_PODS: usize = 10;

/// How much is measured.
pub(crate) struct Size {
    /// Pods of the crowd, the running ones among them.
    pub(crate) pods: usize,
    /// Times that each list is asked for.
    pub(crate) samples: usize,
    /// Pods that the workers start.
    pub(crate) burst: usize,
}

impl Size {
    pub(crate) fn full() -> Self {
        Self {
            pods: 100,
            samples: 20,
            burst: 48,
        }
    }

    /// For a look: the same steps, less of each.
    pub(crate) fn quick() -> Self {
        Self {
            pods: RUNNING_PODS,
            samples: 5,
            burst: 16,
        }
    }
}

/// Runs `work` for each number below `count`, as many at once as there are workers; results in no order.
async fn by_workers<T, F>(client: &Client, count: usize, work: impl Fn(Client, usize) -> F) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let next = Arc::new(AtomicUsize::new(0));
    let mut set: JoinSet<Result<T>> = JoinSet::new();
    let mut results = Vec::new();
    let begin = |set: &mut JoinSet<Result<T>>| {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number < count {
            set.spawn(work(client.clone(), number));
        }
    };
    for _ in 0..WORKERS {
        begin(&mut set);
    }
    while let Some(done) = set.join_next().await {
        results.push(done??);
        begin(&mut set);
    }
    Ok(results)
}

/// Pods that the workers start, per second; all are removed again.
pub(crate) async fn burst(
    client: &Client,
    node: &Node,
    name: &str,
    size: &Size,
    round: usize,
    report: &mut Report,
) -> Result<()> {
    let configs: Vec<PodSandboxConfig> = (0..size.burst)
        .map(|number| client.pod(node, &format!("burst-{round}-{number}")))
        .collect();
    let begun = Instant::now();
    let pods = by_workers(client, size.burst, |mut client, number| {
        let config = configs[number].clone();
        async move { client.run_pod(&config, "runc").await }
    })
    .await?;
    let seconds = begun.elapsed().as_secs_f64();
    report.rate(
        "pods started by 8 workers, per s",
        name,
        size.burst as f64 / seconds,
    );
    remove_all(client, pods.into_iter().map(|(pod, _)| pod).collect()).await
}

async fn remove_all(client: &Client, pods: Vec<String>) -> Result<()> {
    by_workers(client, pods.len(), |mut client, number| {
        let pod = pods[number].clone();
        async move { client.remove(&pod).await }
    })
    .await
    .map(drop)
}

/// Makes the crowd, times the reads over it, and removes it.
pub(crate) async fn read(
    client: &mut Client,
    node: &Node,
    name: &str,
    size: &Size,
    report: &mut Report,
) -> Result<()> {
    let mut pods = populate(client, node, 0..RUNNING_PODS, true).await?;
    // Daemons that gather statistics in the background have them now.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for sample in 0..=size.samples {
        let (count, took) = client.stats().await?;
        ensure!(
            count == RUNNING_PODS * PER_POD,
            "statistics of {count} containers were listed"
        );
        // The first warms caches on both sides and is not counted.
        if sample > 0 {
            report.time("statistics of 100 containers", name, took);
        }
    }
    pods.extend(populate(client, node, RUNNING_PODS..size.pods, false).await?);
    let many = size.pods * PER_POD;
    for sample in 0..=size.samples {
        let (containers, list) = client.list_containers().await?;
        let (sandboxes, pod_list) = client.list_pods().await?;
        ensure!(
            containers == many && sandboxes == size.pods,
            "{containers} containers and {sandboxes} pods were listed"
        );
        if sample > 0 {
            report.time(&format!("list of {many} containers"), name, list);
            report.time(&format!("list of {} pods", size.pods), name, pod_list);
        }
    }
    remove_all(client, pods).await
}

async fn populate(
    client: &Client,
    node: &Node,
    numbers: std::ops::Range<usize>,
    start: bool,
) -> Result<Vec<String>> {
    let configs: Vec<PodSandboxConfig> = numbers
        .map(|number| client.pod(node, &format!("crowd-{number}")))
        .collect();
    let image = node.busybox.clone();
    by_workers(client, configs.len(), |mut client, number| {
        let (config, image) = (configs[number].clone(), image.clone());
        async move {
            let (pod, _) = client.run_pod(&config, "runc").await?;
            for attempt in 0..u32::try_from(PER_POD)? {
                let id = client
                    .create(&pod, &config, &image, attempt, &sleep_for_ever())
                    .await?;
                if start {
                    client.start(&id).await?;
                }
            }
            Ok(pod)
        }
    })
    .await
}
