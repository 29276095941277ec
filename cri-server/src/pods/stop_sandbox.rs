//! StopPodSandbox: every process ends, the network and the namespaces are released; records, logs and
//! root file systems stay until the removal. What can go on goes on when a step fails.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;

use super::handler_kind;
use super::record::PodView;
use super::stop_container::{self, over};
use super::teardown;
use crate::config::HandlerType;
use crate::error::{Error, Result, chain};
use crate::node::Node;
use crate::shim::Shim;
use crate::store::Written;

/// Time for the exits to be recorded after the shim has said that all ended.
const EXITS_LIMIT: Duration = Duration::from_secs(5);

/// Stops the sandbox. Idempotent; the first failure is returned when all was tried.
pub(super) async fn run(
    node: Arc<Node>,
    shim: Option<Shim>,
    view: watch::Receiver<Arc<PodView>>,
    announced: Written,
) -> Result<()> {
    announced.attempted().await;
    let pod = view.borrow().pod.clone();
    let watched = shim.is_some();
    tell_plugins(&node, shim.as_ref(), &view).await;
    let sandbox = teardown::end_sandbox(&node, &pod, shim, |shim| async move {
        let containers: Vec<_> = view.borrow().containers.keys().cloned().collect();
        if watched {
            let exits = containers.iter().map(|id| {
                let mut view = view.clone();
                async move { over(&mut view, id).await }
            });
            if tokio::time::timeout(EXITS_LIMIT, join_all(exits)).await.is_err() {
                tracing::warn!("containers of a stopped pod have no recorded end");
            }
        }
        for result in join_all(containers.iter().map(|id| shim.delete(id.as_str()))).await {
            result?;
        }
        Ok(())
    });
    let network = async {
        match pod.netns() {
            Some(_) => teardown::release_network(&node, &pod.id).await,
            None => Ok(()),
        }
    };
    let (sandbox, network) = match handler_kind(&pod) {
        // Nothing that the shim does to end them needs the network.
        HandlerType::Oci => tokio::join!(sandbox, network),
        // A VM's network device goes with the VM, so the network is released when the sandbox has ended.
        HandlerType::Vm => (sandbox.await, network.await),
    };
    let mut first: Option<Error> = None;
    for result in [sandbox, network] {
        if let Err(error) = result {
            tracing::warn!(pod = %pod.id, error = %chain(&error), "stopping a pod sandbox");
            first.get_or_insert(error);
        }
    }
    first.map_or(Ok(()), Err)
}

/// NRI plugins hear of the stop when the containers have ended and the namespaces are still there. Without
/// plugins all ends at once. Whatever fails here, the shim's own stop comes after it.
async fn tell_plugins(node: &Node, shim: Option<&Shim>, view: &watch::Receiver<Arc<PodView>>) {
    if node.nri.plugins().is_empty() {
        return;
    }
    let now = view.borrow().clone();
    if let Some(shim) = shim {
        let ends = now
            .containers
            .values()
            .filter(|c| c.exit.is_none())
            .map(|container| {
                let (keep, deadline) = watch::channel(Instant::now() + teardown::STOP_GRACE);
                let stop = stop_container::Stop {
                    shim: shim.clone(),
                    container: container.id.clone(),
                    signal: container.stop_signal,
                    view: view.clone(),
                    deadline,
                };
                async move {
                    let ended = stop_container::run(stop, Written::already());
                    // Longer than the grace: a shim that does not answer.
                    let ended = tokio::time::timeout(teardown::STOP_GRACE + EXITS_LIMIT, ended).await;
                    if !matches!(ended, Ok(Ok(()))) {
                        tracing::debug!(container = %container.id, "has not ended before its pod");
                    }
                    drop(keep);
                }
            });
        join_all(ends).await;
    }
    for id in now.containers.keys() {
        node.nri.end_told(id.as_str()).await;
    }
    node.nri.stop_pod(|| crate::nri::pod(&now.pod)).await;
}
