//! Container events for the kubelet (CRI GetContainerEvents): one ordered, bounded channel. A subscriber that
//! falls behind is told so by the end of its stream; it lists again and subscribes anew.

use tokio::sync::broadcast;

use crate::cri::api::ContainerEventResponse;

/// Events that a slow subscriber may be behind.
const BACKLOG: usize = 256;

/// The channel.
#[derive(Debug, Clone)]
pub struct Events {
    sender: broadcast::Sender<ContainerEventResponse>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            sender: broadcast::channel(BACKLOG).0,
        }
    }
}

impl Events {
    /// Sends what `event` makes, if anyone listens.
    pub(crate) fn send(&self, event: impl FnOnce() -> ContainerEventResponse) {
        if self.sender.receiver_count() > 0 {
            // All may have gone since; then nobody misses it.
            let _ = self.sender.send(event());
        }
    }

    /// Everything from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.sender.subscribe()
    }
}
