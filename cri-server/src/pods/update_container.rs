//! UpdateContainerResources: new limits for a container that exists.

use std::sync::Arc;

use super::record::ContainerRecord;
use crate::config::HandlerType;
use crate::cri::api::LinuxContainerResources;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::shim::Shim;

/// Applies the limits and returns those in force: what the request leaves at its default stays as it was.
pub(super) async fn run(
    node: Arc<Node>,
    shim: Shim,
    handler: HandlerType,
    container: Arc<ContainerRecord>,
    wanted: LinuxContainerResources,
) -> Result<LinuxContainerResources> {
    let merged = merge(&container.resources, &wanted);
    let guest;
    let host = match handler {
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

/// CRI: a field at its default value is not changed.
fn merge(old: &LinuxContainerResources, new: &LinuxContainerResources) -> LinuxContainerResources {
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
