//! Complete, verified layers of pulls that broke off: kept for a while, so that a retry goes on where the registry
//! stopped. In memory only: after a restart they belong to nobody and are removed with everything unrecorded.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::store::Inner;

/// Longer than the longest pause of the kubelet between two pulls of an image, 5 minutes.
const KEEP: Duration = Duration::from_secs(600);

/// Layers by chain id, with the time until which they are kept.
#[derive(Default)]
pub(crate) struct Kept(HashMap<String, Instant>);

impl Kept {
    /// Whether the layer is still kept.
    pub(crate) fn contains(&self, chain_id: &str) -> bool {
        self.0.get(chain_id).is_some_and(|until| Instant::now() < *until)
    }

    /// Gives all up.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    fn keep(&mut self, chain_ids: &[String]) {
        let until = Instant::now() + KEEP;
        self.0
            .extend(chain_ids.iter().map(|chain_id| (chain_id.clone(), until)));
    }

    fn forget_expired(&mut self) {
        let now = Instant::now();
        self.0.retain(|_, until| now < *until);
    }
}

/// Whether a retry may find the registry in a better state.
fn may_go_on(error: &Error) -> bool {
    matches!(error, Error::Timeout { .. } | Error::Unavailable { .. })
}

/// Keeps the layers of a pull that failed with `error`, where a retry may use them, and sees to their end; a full
/// disk gives up all that are kept.
pub(crate) fn after_failure(inner: &Arc<Inner>, chain_ids: &[String], error: &Error) {
    if matches!(error, Error::NoSpace { .. }) {
        inner.state().kept.clear();
    }
    if chain_ids.is_empty() || !may_go_on(error) {
        return;
    }
    inner.state().kept.keep(chain_ids);
    let inner = Arc::downgrade(inner);
    tokio::spawn(async move {
        tokio::time::sleep(KEEP).await;
        let Some(inner) = inner.upgrade() else { return };
        let _changes = inner.changes.lock().await;
        inner.state().kept.forget_expired();
        if let Err(error) = inner.collect_layers().await {
            tracing::warn!(%error, "layers of a failed pull cannot be removed");
        }
    });
}
