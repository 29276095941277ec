//! RemoveContainer: a container that still runs is killed first; then runtime state, bundle, snapshot.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::record::{ContainerRecord, PodView};
use super::{image_volumes, stop_container, teardown};
use crate::error::Result;
use crate::node::Node;
use crate::shim::Shim;
use crate::store::Written;

/// Removes everything of the container but its record and its log, which is the kubelet's.
pub(super) async fn run(
    node: Arc<Node>,
    shim: Option<Shim>,
    container: Arc<ContainerRecord>,
    view: watch::Receiver<Arc<PodView>>,
    announced: Written,
) -> Result<()> {
    announced.attempted().await;
    let told = view.clone();
    if let Some(shim) = shim {
        if container.exit.is_none() {
            let (_keep, deadline) = watch::channel(Instant::now());
            let stop = stop_container::Stop {
                shim: shim.clone(),
                container: container.id.clone(),
                signal: container.stop_signal,
                view,
                deadline,
            };
            stop_container::run(stop, crate::store::Written::already()).await?;
        }
        // Whatever is on record, what the shim says of it counts.
        teardown::end_task(&node, &container.pod, &shim, container.id.as_str()).await?;
    }
    tell_plugins(&node, &container, &told).await;
    teardown::remove_container_bundle(&node, &container.pod, &container.id).await?;
    image_volumes::release(&node, &container.id, &container.config).await?;
    node.images.release(container.id.as_str()).await?;
    Ok(())
}

/// NRI plugins hear of it while the bundle still says what the container was.
async fn tell_plugins(node: &Node, container: &ContainerRecord, view: &watch::Receiver<Arc<PodView>>) {
    let view = view.borrow().clone();
    // As it ended meanwhile.
    let current = view.containers.get(&container.id);
    let pair = || crate::nri::pair(node, &view.pod, current.map_or(container, |current| current));
    node.nri.remove_container(container.id.as_str(), pair).await;
}
