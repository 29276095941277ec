//! StartContainer: lets the waiting process run, with NRI plugins told before and after.

use std::sync::Arc;

use super::record::{ContainerRecord, PodRecord};
use super::state::ContainerState;
use crate::error::Result;
use crate::node::{Node, now_ns};
use crate::shim::Shim;
use crate::store::Written;

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
    let pid = shim.start(id).await?;
    let after = || {
        let running = ContainerRecord {
            state: ContainerState::Running,
            started_at_ns: now_ns(),
            pid,
            ..(*container).clone()
        };
        crate::nri::pair(&node, &pod, &running)
    };
    node.nri.container_started(after).await;
    Ok(pid)
}
