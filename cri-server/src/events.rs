//! Container events for the kubelet (CRI GetContainerEvents): one ordered, bounded channel. A subscriber that
//! falls behind is told so by the end of its stream; it lists again and subscribes anew.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::broadcast;

use crate::cri::api::ContainerEventResponse;

/// Events that a slow subscriber may be behind.
const BACKLOG: usize = 256;

/// The channel; clones share it.
#[derive(Debug, Clone)]
pub struct Events {
    /// `None` once closed.
    sender: Arc<Mutex<Option<broadcast::Sender<ContainerEventResponse>>>>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            sender: Arc::new(Mutex::new(Some(broadcast::channel(BACKLOG).0))),
        }
    }
}

impl Events {
    fn with<T>(&self, look: impl FnOnce(&mut Option<broadcast::Sender<ContainerEventResponse>>) -> T) -> T {
        look(&mut self.sender.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends what `event` makes, if anyone listens.
    pub(crate) fn send(&self, event: impl FnOnce() -> ContainerEventResponse) {
        self.with(|sender| {
            if let Some(sender) = sender.as_ref().filter(|sender| sender.receiver_count() > 0) {
                // All may have gone since; then nobody misses it.
                let _ = sender.send(event());
            }
        });
    }

    /// Everything from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<ContainerEventResponse> {
        self.with(|sender| match sender {
            Some(sender) => sender.subscribe(),
            None => broadcast::channel(1).1,
        })
    }

    /// Ends every subscription, so that none holds the daemon when it is asked to end.
    pub(crate) fn close(&self) {
        self.with(Option::take);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::broadcast::error::{RecvError, TryRecvError};

    fn event(at: i64) -> ContainerEventResponse {
        ContainerEventResponse {
            created_at: at,
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn events_come_in_order_and_a_slow_reader_is_told() {
        let events = Events::default();
        events.send(|| event(0));
        let mut quick = events.subscribe();
        let mut slow = events.subscribe();
        for at in 1..=300 {
            events.send(|| event(at));
            assert_eq!(quick.recv().await.unwrap().created_at, at);
        }
        assert!(matches!(slow.recv().await, Err(RecvError::Lagged(_))));
        events.close();
        assert!(matches!(quick.recv().await, Err(RecvError::Closed)));
        assert!(matches!(events.subscribe().try_recv(), Err(TryRecvError::Closed)));
    }
}
