//! The daemon's start: the store's records against what is there. What lives is adopted, what was half made
//! is undone, what was half torn down is finished, what nobody has a record of is removed. Each pod has its
//! own time limits, and only some are looked at at once.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use catamaran_sandbox::id::Id;
use futures::stream::{self, StreamExt as _};
use tokio::sync::oneshot;

use super::owner::{Call, Message, Owner};
use super::record::{ContainerRecord, Exit, PodRecord};
use super::state::{ContainerState, PodState};
use super::{Pods, image_volumes, teardown, watch};
use crate::error::chain;
use crate::node::{Node, now_ns};
use crate::shim::{Shim, TaskState};
use crate::store::Table;

/// Pods looked at at once.
const AT_ONCE: usize = 16;

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
    sweep(&node, &known, &known_containers).await;
    let found = records.len();
    stream::iter(records)
        .for_each_concurrent(AT_ONCE, |pod| {
            let containers = of_pod.remove(&pod.id).unwrap_or_default();
            one(pods, pod, containers)
        })
        .await;
    if found > 0 {
        tracing::info!(found, left = pods.views().len(), "pods taken over");
    }
}

async fn one(pods: &Pods, mut pod: PodRecord, mut containers: BTreeMap<Id, Arc<ContainerRecord>>) {
    let node = pods.node().clone();
    if pod.state == PodState::Creating {
        tracing::info!(pod = %pod.id, "undoing a pod sandbox whose creation was interrupted");
        match undo_creation(&node, &pod).await {
            Ok(()) => {
                node.store.remove(Table::Pods, pod.id.as_str()).queued();
                return;
            }
            Err(problem) => {
                pod.state = PodState::Broken;
                pod.problem = Some(problem);
            }
        }
    }
    let shim = match pod.state {
        PodState::Stopped => None,
        _ => connect(&node, &pod).await,
    };
    let was = pod.state;
    if was == PodState::Ready && shim.is_none() {
        let problem = "its shim did not survive".to_owned();
        tracing::warn!(pod = %pod.id, problem);
        pod.state = PodState::Broken;
        pod.problem = Some(problem);
        if node.dirs.pod(&pod.id).exists()
            && let Err(error) = clean_up(&node, &pod).await
        {
            tracing::warn!(pod = %pod.id, error, "cleaning up after a dead shim");
        }
    }
    let mut redo = Vec::new();
    let ids: Vec<Id> = containers.keys().cloned().collect();
    for id in ids {
        let Some(record) = containers.get_mut(&id) else {
            continue;
        };
        match settle(&node, shim.as_ref(), Arc::make_mut(record)).await {
            Settled::Keep => node.store.put(Table::Containers, id.as_str(), &**record).queued(),
            Settled::Remove => redo.push(id),
            Settled::Gone => {
                containers.remove(&id);
                node.store.remove(Table::Containers, id.as_str()).queued();
            }
        }
    }
    if matches!(was, PodState::Stopping | PodState::Removing) {
        // Admitted again below.
        pod.state = PodState::Broken;
    }
    node.store.put(Table::Pods, pod.id.as_str(), &pod).queued();
    let (key, id) = (pod.key(), pod.id.clone());
    let handle = Owner::adopt(node, pods.clone(), pod, containers, shim);
    pods.register(key, id.clone(), handle.clone());
    // Goes on beside the start; the kubelet asks again for what it wants.
    let call = |call: Call| drop(handle.inbox.send(Message::Call(call)));
    for container in redo {
        call(Call::RemoveContainer(container, oneshot::channel().0));
    }
    match was {
        PodState::Stopping => call(Call::StopPod(oneshot::channel().0)),
        PodState::Removing => call(Call::RemovePod(oneshot::channel().0)),
        _ => {}
    }
}

async fn connect(node: &Node, pod: &PodRecord) -> Option<Shim> {
    let shim = match Shim::connect(pod.id.as_str(), &node.dirs.socket(&pod.id)).await {
        Ok(shim) => shim,
        Err(error) => {
            tracing::debug!(pod = %pod.id, %error, "no shim");
            return None;
        }
    };
    match shim.ping().await {
        Ok(()) => Some(shim),
        Err(error) => {
            tracing::warn!(pod = %pod.id, %error, "the shim does not answer");
            None
        }
    }
}

async fn undo_creation(node: &Arc<Node>, pod: &PodRecord) -> Result<(), String> {
    let mut problems = Vec::new();
    let mut note = |step: &str, result: crate::error::Result<()>| {
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

async fn clean_up(node: &Node, pod: &PodRecord) -> Result<(), String> {
    let launch = teardown::launch(node, pod).map_err(|e| chain(&e))?;
    launch.delete().await.map_err(|e| chain(&e))
}

/// What becomes of a container's record.
enum Settled {
    Keep,
    /// Its removal goes on.
    Remove,
    /// Its creation was undone.
    Gone,
}

async fn settle(node: &Arc<Node>, shim: Option<&Shim>, container: &mut ContainerRecord) -> Settled {
    match container.state {
        ContainerState::Creating => {
            tracing::info!(container = %container.id, "undoing a container whose creation was interrupted");
            return undo_container(node, shim, container).await;
        }
        ContainerState::Removing => return Settled::Remove,
        ContainerState::Exited | ContainerState::Unknown => return Settled::Keep,
        _ => {}
    }
    let state = match shim {
        Some(shim) => shim
            .state(container.id.as_str())
            .await
            .map_err(|error| error.to_string()),
        None => Err("its shim is gone".to_owned()),
    };
    match state {
        Ok((TaskState::Created, _)) => container.state = ContainerState::Created,
        Ok((TaskState::Running, pid)) => {
            container.state = ContainerState::Running;
            container.pid = pid;
            if container.started_at_ns == 0 {
                container.started_at_ns = now_ns();
            }
        }
        // The watcher gets its exit from the shim at once.
        Ok((TaskState::Stopped, _)) => {
            if container.started_at_ns == 0 {
                container.started_at_ns = container.created_at_ns;
            }
        }
        Err(problem) => {
            let bundle = node.dirs.container(&container.pod, &container.id);
            let exit = watch::recorded(&bundle).unwrap_or_else(|| Exit::unknown(&problem, now_ns()));
            container.state = if exit.is_known() {
                ContainerState::Exited
            } else {
                ContainerState::Unknown
            };
            container.exit = Some(exit);
            container.pid = 0;
        }
    }
    Settled::Keep
}

async fn undo_container(node: &Arc<Node>, shim: Option<&Shim>, container: &mut ContainerRecord) -> Settled {
    let mut problems = Vec::new();
    if let Some(shim) = shim
        && let Err(error) = teardown::end_task(shim, container.id.as_str()).await
    {
        problems.push(chain(&error));
    }
    if let Err(error) = teardown::remove_container_bundle(node, &container.pod, &container.id).await {
        problems.push(chain(&error));
    }
    if let Err(error) = image_volumes::release(node, &container.id, &container.config).await {
        problems.push(chain(&error));
    }
    if let Err(error) = node.images.release(container.id.as_str()).await {
        problems.push(chain(&error));
    }
    if problems.is_empty() {
        return Settled::Gone;
    }
    container.state = ContainerState::Exited;
    container.exit = Some(Exit::start_error(problems.join("; "), now_ns()));
    Settled::Keep
}

/// Removes what no record names: an id is recorded before anything of it is made, so it can only be a rest.
async fn sweep(node: &Arc<Node>, pods: &HashSet<Id>, containers: &HashSet<String>) {
    let stranger = |id: &String| Id::parse(id).is_ok_and(|id| !pods.contains(&id));
    let warn = |what: &str, id: &str, problem: String| {
        tracing::warn!(what, id, problem, "a rest without a record could not be removed");
    };
    for id in names(&node.dirs.pods()).into_iter().filter(stranger) {
        let Ok(id) = Id::parse(&id) else { continue };
        tracing::info!(pod = %id, "removing a bundle without a record");
        if let Ok(shim) = Shim::connect(id.as_str(), &node.dirs.socket(&id)).await {
            let ended = match shim.stop_sandbox(teardown::STOP_GRACE).await {
                Ok(()) => shim.shutdown().await,
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                warn("shim", id.as_str(), chain(&error));
                continue;
            }
        }
        if let Err(error) = teardown::remove_bundle(node, &id).await {
            warn("bundle", id.as_str(), chain(&error));
        }
    }
    match node.network.attached() {
        Ok(ids) => {
            for id in ids.into_iter().filter(stranger) {
                if let Err(error) = node.network.detach_id(&id).await {
                    warn("network", &id, chain(&error));
                }
            }
        }
        Err(error) => warn("network records", "", chain(&error)),
    }
    match node.network.netns_list() {
        Ok(ids) => {
            for id in ids.into_iter().filter(stranger) {
                if let Err(error) = node.network.remove_netns(&id).await {
                    warn("network namespace", &id, chain(&error));
                }
            }
        }
        Err(error) => warn("network namespaces", "", chain(&error)),
    }
    for id in node
        .images
        .leases()
        .into_iter()
        .filter(|key| !containers.contains(image_volumes::holder(key)))
    {
        if let Err(error) = node.images.release(&id).await {
            warn("snapshot", &id, chain(&error));
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect(),
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "cannot be read");
            Vec::new()
        }
    }
}
