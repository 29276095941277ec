//! StopContainer: the stop signal, the grace, SIGKILL. The exit itself comes from the watcher (watch.rs); this
//! waits until it is seen.

use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::id::Id;
use tokio::sync::watch;
use tokio::time::Instant;

use super::record::PodView;
use crate::error::{Error, Result};
use crate::shim::Shim;
use crate::store::Written;

const SIGKILL: u32 = 9;
/// Time for the exit to be seen after SIGKILL; longer means a process stuck in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// What a stop needs.
pub(super) struct Stop {
    pub(super) shim: Shim,
    pub(super) container: Id,
    pub(super) signal: u32,
    pub(super) view: watch::Receiver<Arc<PodView>>,
    /// When the grace is over; a later, more impatient StopContainer moves it.
    pub(super) deadline: watch::Receiver<Instant>,
}

/// Returns when the container's end is recorded.
pub(super) async fn run(mut stop: Stop, announced: Written) -> Result<()> {
    announced.attempted().await;
    let id = stop.container.to_string();
    if *stop.deadline.borrow() > Instant::now() && stop.signal != SIGKILL {
        stop.shim.kill(&id, stop.signal, false).await?;
        if over_by_deadline(&mut stop).await {
            return Ok(());
        }
    }
    stop.shim.kill(&id, SIGKILL, true).await?;
    match tokio::time::timeout(KILL_LIMIT, over(&mut stop.view, &stop.container)).await {
        Ok(()) => Ok(()),
        Err(_) => Err(Error::DeadlineExceeded(format!(
            "container {id} has not ended {} s after SIGKILL",
            KILL_LIMIT.as_secs()
        ))),
    }
}

async fn over_by_deadline(stop: &mut Stop) -> bool {
    loop {
        let deadline = *stop.deadline.borrow_and_update();
        tokio::select! {
            () = over(&mut stop.view, &stop.container) => return true,
            () = tokio::time::sleep_until(deadline) => return false,
            Ok(()) = stop.deadline.changed() => {}
        }
    }
}

/// Waits until the container has ended, or is no longer there.
pub(super) async fn over(view: &mut watch::Receiver<Arc<PodView>>, container: &Id) {
    let ended = |view: &Arc<PodView>| {
        view.containers
            .get(container)
            .is_none_or(|container| container.exit.is_some())
    };
    // The owner has gone: so has the container.
    let _ = view.wait_for(ended).await;
}
