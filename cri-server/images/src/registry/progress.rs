//! Tells a transfer that goes on from one that stalls. A byte now and then is no progress: a registry that sends one
//! a minute would hold a pull for ever.

use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::Response;

/// What a transfer must bring for each second of the timeout, in bytes; less is a stall.
const SLOWEST: u64 = 1024;

/// The wait for one transfer since it last brought enough. Only waits for the network count, not those for the
/// consumer.
pub(super) struct Progress {
    timeout: Duration,
    waited: Duration,
    brought: u64,
}

impl Progress {
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            waited: Duration::ZERO,
            brought: 0,
        }
    }

    /// Bytes that must come within the timeout.
    pub(super) fn enough(&self) -> u64 {
        let wanted = self.timeout.as_millis() * u128::from(SLOWEST) / 1000;
        u64::try_from(wanted).unwrap_or(u64::MAX).max(1)
    }

    /// Begins anew, for a new response.
    pub(super) fn reset(&mut self) {
        (self.waited, self.brought) = (Duration::ZERO, 0);
    }

    /// The next piece of a body; `None` when the transfer stalls.
    pub(super) async fn chunk(&mut self, response: &mut Response) -> Option<reqwest::Result<Option<Bytes>>> {
        let begun = Instant::now();
        let left = self.timeout.saturating_sub(self.waited);
        let chunk = tokio::time::timeout(left, response.chunk()).await.ok()?;
        self.waited += begun.elapsed();
        if let Ok(Some(chunk)) = &chunk {
            self.brought += chunk.len() as u64;
            if self.brought >= self.enough() {
                self.reset();
            }
        }
        Some(chunk)
    }
}
