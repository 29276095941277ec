//! The daemon's start: the store's records against what is there. What lives is adopted, what was half made
//! is undone, what was half torn down is finished, what nobody has a record of is removed (sweep.rs).
//!
//! Each pod's owner does this for its pod (owner/found.rs), and the start waits for all of them only so long: a
//! hung plugin or a shim that does not answer holds up its own pod and not the node. What is being undone is not
//! listed and keeps its name; a repeated RunPodSandbox or CreateContainer of that name waits for the undo and then
//! begins anew.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::id::Id;
use futures::future::join_all;
use tokio::sync::{Semaphore, mpsc};

use super::owner::Owner;
use super::record::{ContainerRecord, PodRecord};
use super::{Pods, image_volumes, sweep, teardown, watch};
use crate::error::{Error, Result, chain};
use crate::node::Node;
use crate::shim::{Shim, ShimError, TaskState};
use crate::store::Table;

/// Pods looked at at once.
const AT_ONCE: usize = 16;
/// How long the start waits for what it found to be in order; the rest goes on while the CRI is served.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the owners of found pods share.
#[derive(Debug, Clone)]
pub(super) struct Start {
    /// Bounds the looks at once.
    looks: Arc<Semaphore>,
    /// Dropped when a pod is in order.
    unsettled: mpsc::Sender<Infallible>,
}

/// See the module. Nothing here fails the start: what cannot be put in order stays on record, not ready, and
/// can be removed.
pub(super) async fn run(pods: &Pods, records: Vec<PodRecord>, containers: Vec<ContainerRecord>) {
    let node = pods.node().clone();
    let mut of_pod: HashMap<Id, BTreeMap<Id, Arc<ContainerRecord>>> = HashMap::new();
    let known: HashSet<Id> = records.iter().map(|pod| pod.id.clone()).collect();
    let mut known_containers: HashSet<String> = HashSet::new();
    for container in containers {
        if known.contains(&container.pod) {
            known_containers.insert(container.id.to_string());
            of_pod
                .entry(container.pod.clone())
                .or_default()
                .insert(container.id.clone(), Arc::new(container));
        } else {
            // Its pod's removal was complete but for this record.
            node.store
                .remove(Table::Containers, container.id.as_str())
                .queued();
        }
    }
    // Before the first new pod can be asked for: what is found now is not one's.
    let rests = sweep::find(&node, &known, &known_containers);
    let (unsettled, mut settled) = mpsc::channel(1);
    let start = Start {
        looks: Arc::new(Semaphore::new(AT_ONCE)),
        unsettled,
    };
    let found = records.len();
    for pod in records {
        let containers = of_pod.remove(&pod.id).unwrap_or_default();
        Owner::adopt(node.clone(), pods.clone(), pod, containers, start.clone());
    }
    let sweeping = start.unsettled.clone();
    tokio::spawn(async move {
        sweep::remove(&node, rests).await;
        drop(sweeping);
    });
    drop(start);
    if tokio::time::timeout(PATIENCE, settled.recv()).await.is_err() {
        tracing::warn!("what was found is not in order yet; that goes on beside serving");
    }
    if found > 0 {
        tracing::info!(found, left = pods.views().len(), "pods taken over");
    }
}

/// What a shim says of a container.
pub(super) type Told = (Id, Result<(TaskState, u32), ShimError>);

/// What is found of a pod's shim.
pub(super) enum Found {
    /// It answers, and this it says of the pod's containers.
    Answering(Shim, Vec<Told>),
    /// It lives and does not answer.
    Silent,
    /// It is dead, and what it watched may live on.
    Dead,
}

/// Looks for the shim of a pod and asks it about these containers.
pub(super) async fn look(node: &Node, pod: &Id, containers: Vec<Id>, start: &Start) -> Found {
    // Never closed.
    let _turn = start.looks.acquire().await;
    match watch::connect(pod, &node.dirs.socket(pod)).await {
        Ok(shim) => {
            let told = ask(&shim, containers).await;
            Found::Answering(shim, told)
        }
        Err(error) if watch::is_there(&error, &node.dirs.pod(pod)) => {
            tracing::warn!(%pod, %error, "the shim lives and does not answer; reaching for it");
            Found::Silent
        }
        Err(error) => {
            tracing::debug!(%pod, %error, "no shim");
            Found::Dead
        }
    }
}

/// Asks a shim about containers.
pub(super) async fn ask(shim: &Shim, containers: Vec<Id>) -> Vec<Told> {
    let asked = containers.into_iter().map(|id| async move {
        let answer = shim.state(id.as_str()).await;
        (id, answer)
    });
    join_all(asked).await
}

/// Undoes what an interrupted RunPodSandbox has made.
pub(super) async fn undo_creation(node: &Arc<Node>, pod: &PodRecord) -> Result<(), String> {
    tracing::info!(pod = %pod.id, "undoing a pod sandbox whose creation was interrupted");
    let mut problems = Vec::new();
    let mut note = |step: &str, result: Result<()>| {
        if let Err(error) = result {
            problems.push(format!("undoing {step} failed: {}", chain(&error)));
        }
    };
    note(
        "sandbox",
        teardown::end_sandbox(node, pod, None, |_| async { Ok(()) }).await,
    );
    note("network", teardown::release_network(node, &pod.id).await);
    note("cgroup", teardown::remove_cgroup(pod).await);
    note("bundle", teardown::remove_bundle(node, &pod.id).await);
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.join("; "))
    }
}

/// Undoes what an interrupted CreateContainer has made. As long as the shim may still be at the creation, what it
/// works on stays.
pub(super) async fn undo_container(
    node: &Arc<Node>,
    shim: Option<&Shim>,
    container: &ContainerRecord,
) -> Result<(), String> {
    tracing::info!(container = %container.id, "undoing a container whose creation was interrupted");
    if let Some(shim) = shim {
        let ended = teardown::end_task(node, &container.pod, shim, container.id.as_str()).await;
        ended.map_err(|error| format!("undoing task failed: {}", chain(&error)))?;
    }
    let mut problems = Vec::new();
    let mut note = |step: &str, result: Result<()>| {
        if let Err(error) = result {
            problems.push(format!("undoing {step} failed: {}", chain(&error)));
        }
    };
    note(
        "bundle",
        teardown::remove_container_bundle(node, &container.pod, &container.id).await,
    );
    note(
        "image volumes",
        image_volumes::release(node, &container.id, &container.config).await,
    );
    let released = node.images.release(container.id.as_str()).await;
    note("snapshot", released.map_err(Error::from));
    if problems.is_empty() {
        Ok(())
    } else {
        Err(problems.join("; "))
    }
}

/// Ends what outlived the shim of a pod, and has it recorded how containers ended.
pub(super) async fn clean_up(node: &Node, pod: &PodRecord) -> Result<()> {
    if !node.dirs.pod(&pod.id).exists() {
        // A reboot took the bundle, and with it everything that ran.
        return Ok(());
    }
    Ok(teardown::launch(node, pod)?.delete().await?)
}
