//! What is left of pods that no record names: an id is recorded before anything of it is made, so it can only be
//! a rest, of a store that was lost or of a daemon of other directories.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use catamaran_sandbox::id::Id;

use super::{image_volumes, teardown, watch};
use crate::error::{Error, Result, chain};
use crate::handlers::{RUNC_SHIM, RUNV_SHIM};
use crate::node::Node;
use crate::shim::{Launch, find_shim};

/// What each of our shims notes in a bundle before it makes anything of the pod, for its `delete`.
const NOTES: [(&str, &str); 2] = [("runtime.json", RUNC_SHIM), ("vm.json", RUNV_SHIM)];

/// Rests by kind.
#[derive(Debug, Default)]
pub(super) struct Rests {
    bundles: Vec<Id>,
    networks: Vec<String>,
    namespaces: Vec<String>,
    snapshots: Vec<String>,
    /// Paths below every hierarchy's mount.
    cgroups: Vec<String>,
}

/// Looks for what none of these pods and containers is.
pub(super) fn find(node: &Node, pods: &HashSet<Id>, containers: &HashSet<String>) -> Rests {
    let stranger = |id: &String| Id::parse(id).is_ok_and(|id| !pods.contains(&id));
    let mut rests = Rests::default();
    for name in names(&node.dirs.pods()).into_iter().filter(stranger) {
        rests.bundles.extend(Id::parse(&name));
    }
    match node.network.attached() {
        Ok(ids) => rests.networks.extend(ids.into_iter().filter(stranger)),
        Err(error) => warn("network records", "", &chain(&error)),
    }
    match node.network.netns_list() {
        Ok(ids) => rests.namespaces.extend(ids.into_iter().filter(stranger)),
        Err(error) => warn("network namespaces", "", &chain(&error)),
    }
    let leases = node.images.leases().into_iter();
    rests
        .snapshots
        .extend(leases.filter(|key| !containers.contains(image_volumes::holder(key))));
    let parent = &node.config.cgroup_parent;
    match catamaran_cgroups::children(parent) {
        Ok(children) => rests.cgroups.extend(
            children
                .into_iter()
                .filter(|name| is_random(name) && stranger(name))
                .map(|name| format!("{}/{name}", parent.trim_end_matches('/'))),
        ),
        Err(error) => warn("cgroups", parent, &chain(&error)),
    }
    rests
}

/// Removes them; what cannot be is named in the log.
pub(super) async fn remove(node: &Arc<Node>, rests: Rests) {
    let note = |what: &str, id: &str, result: Result<()>| {
        if let Err(error) = result {
            warn(what, id, &chain(&error));
        }
    };
    for id in &rests.bundles {
        tracing::info!(pod = %id, "removing a bundle without a record");
        note("pod", id.as_str(), remove_pod(node, id).await);
    }
    for id in &rests.networks {
        let detached = node.network.detach_id(id).await;
        note("network", id, detached.map_err(Error::from));
    }
    for id in &rests.namespaces {
        let removed = node.network.remove_netns(id).await;
        note("network namespace", id, removed.map_err(Error::from));
    }
    for id in &rests.snapshots {
        note("snapshot", id, node.images.release(id).await.map_err(Error::from));
    }
    for path in rests.cgroups {
        note("cgroup", &path, remove_cgroup(path.clone()).await);
    }
}

/// Ends what may still run of a pod, by its shim or by what a dead one has noted, then removes the bundle.
async fn remove_pod(node: &Arc<Node>, id: &Id) -> Result<()> {
    if let Ok(shim) = watch::connect(id, &node.dirs.socket(id)).await {
        shim.stop_sandbox(teardown::STOP_GRACE).await?;
        shim.shutdown().await?;
    } else {
        let bundle = node.dirs.pod(id);
        let noted = NOTES.iter().find(|(note, _)| bundle.join(note).exists());
        let name = noted.map_or(RUNC_SHIM, |(_, shim)| *shim);
        let shim = find_shim(name, node.config.shim_dir.as_deref()).map_err(Error::FailedPrecondition)?;
        let id = id.to_string();
        Launch { shim, id, bundle }.delete().await?;
    }
    teardown::remove_bundle(node, id).await
}

async fn remove_cgroup(path: String) -> Result<()> {
    teardown::blocking(move || {
        tracing::info!(cgroup = path, "removing a cgroup without a record");
        // Nothing in it is killed: a pod's processes went with its bundle, and others are not ours.
        catamaran_cgroups::remove(&path).map_err(|e| Error::Cgroup {
            problem: chain(&e),
            path,
        })
    })
    .await
}

/// As ids of pods are made: another cgroup below the same parent may be someone else's.
fn is_random(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn warn(what: &str, id: &str, problem: &str) {
    tracing::warn!(what, id, problem, "a rest without a record could not be removed");
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
