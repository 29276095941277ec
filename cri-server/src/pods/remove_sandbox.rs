//! RemovePodSandbox: stops what still runs, then removes containers, bundle and cgroup.

use std::sync::Arc;

use tokio::sync::watch;

use super::record::PodView;
use super::state::PodState;
use super::{image_volumes, stop_sandbox, teardown};
use crate::error::{Error, Result, chain};
use crate::node::Node;
use crate::shim::Shim;
use crate::store::Written;

/// Removes everything of the pod but its records and logs. `was` is its state when the removal began.
pub(super) async fn run(
    node: Arc<Node>,
    was: PodState,
    shim: Option<Shim>,
    view: watch::Receiver<Arc<PodView>>,
    announced: Written,
) -> Result<()> {
    announced.attempted().await;
    let current = view.borrow().clone();
    if was != PodState::Stopped {
        stop_sandbox::run(node.clone(), shim, view, Written::already()).await?;
    }
    let pod = &current.pod;
    for container in current.containers.values() {
        let pair = || crate::nri::pair(&node, pod, container);
        node.nri.remove_container(container.id.as_str(), pair).await;
    }
    node.nri
        .remove_pod(pod.id.as_str(), || crate::nri::pod(pod))
        .await;
    let mut first: Option<Error> = None;
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            tracing::warn!(pod = %pod.id, error = %chain(&error), "removing a pod sandbox");
            first.get_or_insert(error);
        }
    };
    note(teardown::remove_bundle(&node, &pod.id).await);
    for (id, container) in &current.containers {
        note(image_volumes::release(&node, id, &container.config).await);
        note(node.images.release(id.as_str()).await.map_err(Error::from));
    }
    note(teardown::remove_cgroup(pod).await);
    first.map_or(Ok(()), Err)
}
