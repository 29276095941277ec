//! UpdateContainerResources: new limits for a container that exists.

use std::sync::Arc;

use super::record::{ContainerRecord, PodRecord};
use crate::config::HandlerType;
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
    let host = match super::handler_kind(pod) {
        HandlerType::Oci => &node.host,
        HandlerType::Vm => {
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

/// As [`run`], with NRI plugins asked before: they may want other limits, and limits of other containers.
pub(super) async fn with_plugins(
    node: Arc<Node>,
    shim: Shim,
    pod: Arc<PodRecord>,
    container: Arc<ContainerRecord>,
    wanted: LinuxContainerResources,
) -> Result<LinuxContainerResources> {
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
    let applied = run(&node, &shim, &pod, &container, &wanted).await?;
    let after = || {
        let updated = ContainerRecord {
            resources: applied.clone(),
            ..(*container).clone()
        };
        crate::nri::pair(&node, &pod, &updated)
    };
    node.nri.container_updated(after).await;
    Ok(applied)
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
