//! What the daemon tells NRI plugins of its pods, and does for them: the messages are made in nri/describe.rs, a
//! new container's spec is adjusted in nri/adjust.rs. The plugins themselves are crate catamaran-nri's.

mod adjust;
mod describe;

use std::sync::Arc;
use std::time::Duration;

use catamaran_nri::api::ContainerUpdate;
use catamaran_nri::{Known, Wanted, api};

pub(crate) use adjust::apply;
pub(crate) use describe::{created_pair, pair, pod, resources, to_cri};

use crate::config::Config;
use crate::error::chain;
use crate::pods::Pods;
use crate::pods::state::{ContainerState, PodState};

/// Grace of a container that a plugin evicts, as the kubelet's shortest for a pod that nobody asked to end.
const EVICTION_GRACE: Duration = Duration::from_secs(10);

/// The interface as configured.
#[must_use]
pub fn new(config: &Config) -> catamaran_nri::Nri {
    let section = &config.nri;
    if section.disabled {
        return catamaran_nri::Nri::default();
    }
    catamaran_nri::Nri::new(catamaran_nri::Config {
        socket: (!section.disable_connections).then(|| config.nri_socket()),
        plugin_dir: section.plugin_path.clone(),
        config_dir: section.plugin_config_path.clone(),
        registration_timeout: Duration::from_millis(section.plugin_registration_timeout_ms),
        request_timeout: Duration::from_millis(section.plugin_request_timeout_ms),
    })
}

/// What plugins see of the daemon.
#[derive(Debug, Clone)]
pub struct Bridge {
    pods: Pods,
}

impl Bridge {
    /// Over these pods.
    #[must_use]
    pub fn new(pods: Pods) -> Self {
        Self { pods }
    }

    async fn update(&self, update: &ContainerUpdate) -> crate::error::Result<()> {
        let wanted = update
            .linux
            .clone()
            .and_then(|linux| linux.resources)
            .unwrap_or_default();
        let wanted = to_cri(&wanted, "update")?;
        self.pods
            .update_container_for_plugin(&update.container_id, wanted)
            .await
    }
}

#[async_trait::async_trait]
impl catamaran_nri::Runtime for Bridge {
    fn state(&self, known: &Known) -> (Vec<api::PodSandbox>, Vec<api::Container>) {
        let node = self.pods.node();
        let (mut pods, mut containers) = (Vec::new(), Vec::new());
        for view in self.pods.all_views() {
            let record = &view.pod;
            if known.tells(record.id.as_str(), record.state == PodState::Creating) {
                pods.push(pod(record));
            }
            for container in view.containers.values() {
                let creating = container.state == ContainerState::Creating;
                if known.tells(container.id.as_str(), creating) {
                    containers.push(pair(node, record, container).1);
                }
            }
        }
        (pods, containers)
    }

    async fn change(&self, wanted: Wanted) -> Vec<ContainerUpdate> {
        let mut failed = Vec::new();
        for update in wanted.updates {
            if let Err(error) = self.update(&update).await {
                let id = &update.container_id;
                tracing::warn!(
                    container = id,
                    error = chain(&error),
                    "an NRI plugin's update failed"
                );
                if !update.ignore_failure {
                    failed.push(update);
                }
            }
        }
        for eviction in wanted.evictions {
            let (pods, id) = (self.pods.clone(), eviction.container_id);
            tracing::warn!(
                container = id,
                reason = eviction.reason,
                "evicted by an NRI plugin"
            );
            tokio::spawn(async move {
                if let Err(error) = pods.stop_container(&id, EVICTION_GRACE).await {
                    tracing::warn!(container = id, error = chain(&error), "an eviction failed");
                }
            });
        }
        failed
    }
}

/// Starts the interface; without its socket the node works on, and `catamaran check` says so.
pub async fn start(nri: &catamaran_nri::Nri, pods: &Pods) {
    if let Err(error) = nri.start(Arc::new(Bridge::new(pods.clone()))).await {
        tracing::warn!(error = chain(&error), "no NRI plugin can connect");
    }
}
