//! StartContainer: lets the waiting process run, with NRI plugins told before and after.

use std::sync::Arc;
use std::time::Duration;

use super::record::{ContainerRecord, PodRecord};
use super::state::ContainerState;
use crate::error::Result;
use crate::node::{Node, now_ns};
use crate::shim::{Shim, ShimError, TaskState};
use crate::store::Written;

/// Between two starts of one container that are not answered.
const PAUSE: Duration = Duration::from_secs(1);

/// Returns the process id.
pub(super) async fn run(
    node: Arc<Node>,
    pod: Arc<PodRecord>,
    container: Arc<ContainerRecord>,
    shim: Shim,
    announced: Written,
) -> Result<u32> {
    announced.durable().await?;
    let id = container.id.as_str();
    let before = || crate::nri::pair(&node, &pod, &container);
    // Held until plugins know of the start: its end is told after that.
    let _starting = node.nri.start_container(id, before).await?;
    let pid = start(&shim, id).await?;
    tell_started(&node, &pod, &container, pid).await;
    Ok(pid)
}

/// Goes on with a start that was not answered in time, until the shim says what became of it.
pub(super) async fn again(
    node: Arc<Node>,
    pod: Arc<PodRecord>,
    container: Arc<ContainerRecord>,
    shim: Shim,
) -> Result<u32> {
    loop {
        match start(&shim, container.id.as_str()).await {
            Err(ShimError::Timeout { .. }) => tokio::time::sleep(PAUSE).await,
            result => {
                let pid = result?;
                tell_started(&node, &pod, &container, pid).await;
                return Ok(pid);
            }
        }
    }
}

/// Task.Start. A refusal or a silence says little of a process that an earlier request has started, or that
/// starts later than its answer was waited for: the shim's state of it does.
async fn start(shim: &Shim, id: &str) -> Result<u32, ShimError> {
    let error = match shim.start(id).await {
        Ok(pid) => return Ok(pid),
        Err(error) if error.is_gone() => return Err(error),
        Err(error) => error,
    };
    match shim.state(id).await {
        Ok((TaskState::Running, pid)) => Ok(pid),
        // It ran, as nothing refused it; its watcher tells how it ended.
        Ok((TaskState::Stopped, pid)) if matches!(error, ShimError::Timeout { .. }) => Ok(pid),
        _ => Err(error),
    }
}

async fn tell_started(node: &Node, pod: &PodRecord, container: &ContainerRecord, pid: u32) {
    let after = || {
        let running = ContainerRecord {
            state: ContainerState::Running,
            started_at_ns: now_ns(),
            pid,
            ..container.clone()
        };
        crate::nri::pair(node, pod, &running)
    };
    node.nri.container_started(after).await;
}
