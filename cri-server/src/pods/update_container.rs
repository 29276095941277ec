//! UpdateContainerResources: new limits for a container that exists.

use std::sync::Arc;

use catamaran_sandbox::pod_spec::RuntimeSpec;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::record::{ContainerRecord, PodRecord, PodView};
use super::update_sandbox::fits_vm;
use crate::cri::api::LinuxContainerResources;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::shim::Shim;

/// Applies the limits and returns those in force: what the request leaves at its default stays as it was.
pub(super) async fn run(
    node: &Node,
    shim: &Shim,
    pod: &PodRecord,
    container: &ContainerRecord,
    wanted: &LinuxContainerResources,
) -> Result<LinuxContainerResources> {
    let merged = merge(&container.resources, wanted);
    let guest;
    let host = match &pod.spec.runtime {
        RuntimeSpec::Oci { .. } => &node.host,
        RuntimeSpec::Vm(vm) => {
            fits_vm(vm, "linux", &container.resources, &merged)?;
            guest = catamaran_spec::HostFeatures::guest(&node.host.hostname);
            &guest
        }
    };
    let mut none = oci_spec::runtime::LinuxResources::default();
    none.set_devices(None);
    let resources = catamaran_spec::apply_resources(&none, &merged, host)?;
    let json = serde_json::to_vec(&resources).map_err(|e| Error::Internal(e.to_string()))?;
    shim.update(container.id.as_str(), json).await?;
    Ok(merged)
}

/// Updates of one container come one after the other, each on what the one before has left.
pub(super) struct Turn {
    pub(super) lock: Arc<Mutex<()>>,
    pub(super) view: watch::Receiver<Arc<PodView>>,
}

/// Limits in force.
pub(super) struct Updated {
    pub(super) resources: LinuxContainerResources,
    /// Held until they are on record.
    _turn: OwnedMutexGuard<()>,
}

/// As [`run`], when its turn comes.
pub(super) async fn in_turn(
    node: &Node,
    shim: &Shim,
    pod: &PodRecord,
    container: &ContainerRecord,
    wanted: &LinuxContainerResources,
    turn: Turn,
) -> Result<Updated> {
    let held = turn.lock.lock_owned().await;
    let view = turn.view.borrow().clone();
    // As the update before has left it.
    let current = view
        .containers
        .get(&container.id)
        .map_or(container, |current| current);
    let resources = run(node, shim, pod, current, wanted).await?;
    Ok(Updated {
        resources,
        _turn: held,
    })
}

/// As [`in_turn`], with NRI plugins asked before: they may want other limits, and limits of other containers. They
/// are asked out of turn, as what they want of another container may wait for this one's.
pub(super) async fn with_plugins(
    node: Arc<Node>,
    shim: Shim,
    pod: Arc<PodRecord>,
    container: Arc<ContainerRecord>,
    wanted: LinuxContainerResources,
    turn: Turn,
) -> Result<Updated> {
    let request = || {
        let (pod, container) = crate::nri::pair(&node, &pod, &container);
        catamaran_nri::api::UpdateContainerRequest {
            pod: Some(pod),
            container: Some(container),
            linux_resources: Some(crate::nri::resources(&wanted)),
        }
    };
    let wanted = match node.nri.update_container(request).await? {
        Some((own, others)) => {
            let own = crate::nri::to_cri(&own, "update")?;
            change_others(&node, others).await?;
            merge(&wanted, &own)
        }
        None => wanted,
    };
    let applied = in_turn(&node, &shim, &pod, &container, &wanted, turn).await?;
    let after = || {
        let updated = ContainerRecord {
            resources: applied.resources.clone(),
            ..(*container).clone()
        };
        crate::nri::pair(&node, &pod, &updated)
    };
    node.nri.container_updated(after).await;
    Ok(applied)
}

/// A limit above what the pod's VM has is no promise of more, so the container is made; but who asked for it may
/// not know that the VM's size comes from the pod's limits at RunPodSandbox, which a kubelet always gives.
pub(super) fn warn_of_limits_above_vm(pod: &PodRecord, container: &ContainerRecord) {
    if let RuntimeSpec::Vm(vm) = &pod.spec.runtime
        && let Err(error) = fits_vm(
            vm,
            "config.linux.resources",
            &Default::default(),
            &container.resources,
        )
    {
        tracing::warn!(container = %container.id, %error, "a limit above the VM's size has no effect");
    }
}

/// Does what NRI plugins want of other containers.
///
/// # Errors
/// [`Error::FailedPrecondition`] with the ids of those that may not fail and did.
pub(super) async fn change_others(node: &Node, wanted: catamaran_nri::Wanted) -> Result<()> {
    node.nri.change(wanted).await.map_err(|failed| {
        Error::FailedPrecondition(format!(
            "limits that NRI plugins want could not be set in container {}",
            failed.join(", ")
        ))
    })
}

/// CRI: a field at its default value is not changed.
pub(crate) fn merge(old: &LinuxContainerResources, new: &LinuxContainerResources) -> LinuxContainerResources {
    let number = |old: i64, new: i64| if new == 0 { old } else { new };
    let text = |old: &String, new: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let mut unified = old.unified.clone();
    unified.extend(new.unified.clone());
    LinuxContainerResources {
        cpu_period: number(old.cpu_period, new.cpu_period),
        cpu_quota: number(old.cpu_quota, new.cpu_quota),
        cpu_shares: number(old.cpu_shares, new.cpu_shares),
        memory_limit_in_bytes: number(old.memory_limit_in_bytes, new.memory_limit_in_bytes),
        memory_swap_limit_in_bytes: number(old.memory_swap_limit_in_bytes, new.memory_swap_limit_in_bytes),
        oom_score_adj: number(old.oom_score_adj, new.oom_score_adj),
        cpuset_cpus: text(&old.cpuset_cpus, &new.cpuset_cpus),
        cpuset_mems: text(&old.cpuset_mems, &new.cpuset_mems),
        hugepage_limits: if new.hugepage_limits.is_empty() {
            old.hugepage_limits.clone()
        } else {
            new.hugepage_limits.clone()
        },
        unified,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_stays() {
        let old = LinuxContainerResources {
            cpu_shares: 5,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        let new = LinuxContainerResources {
            cpu_quota: 7,
            cpuset_cpus: "1".into(),
            ..Default::default()
        };
        let merged = merge(&old, &new);
        assert_eq!(
            (merged.cpu_shares, merged.cpu_quota, merged.cpuset_cpus.as_str()),
            (5, 7, "1")
        );
    }
}
