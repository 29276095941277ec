//! Steps of a creation that go on when the creation is given up: what a blocking thread has begun (a mount, a
//! cgroup, a snapshot) ends when it ends. Undoing beside it would leave what it makes last, so the undo waits.

use tokio_util::task::TaskTracker;

use super::undo::{STEP_LIMIT, UndoFailure};
use crate::error::{Error, Result};

/// The steps of one creation. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Steps {
    at_work: TaskTracker,
}

impl Steps {
    /// Runs a step to its end, also where the caller is dropped meanwhile.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        step: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        match self.at_work.spawn(step).await {
            Ok(result) => result,
            Err(error) => Err(Error::Internal(format!("a step of a creation ended: {error}"))),
        }
    }

    /// Waits until no step is at work. Where one hangs it is what could not be undone, and nothing is to be undone
    /// beside it: that is left to a later removal.
    pub(super) async fn settle(&self) -> Vec<UndoFailure> {
        self.at_work.close();
        match tokio::time::timeout(STEP_LIMIT, self.at_work.wait()).await {
            Ok(()) => Vec::new(),
            Err(_) => vec![UndoFailure {
                step: "steps at work",
                error: format!("not ended within {} s", STEP_LIMIT.as_secs()),
            }],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[tokio::test]
    async fn a_step_whose_creation_was_given_up_is_waited_for() {
        let steps = Steps::default();
        let made = Arc::new(AtomicBool::new(false));
        let flag = made.clone();
        let step = steps.run(async move {
            crate::pods::teardown::blocking(move || {
                std::thread::sleep(Duration::from_millis(200));
                flag.store(true, Ordering::SeqCst);
                Ok(())
            })
            .await
        });
        assert!(
            tokio::time::timeout(Duration::from_millis(20), step)
                .await
                .is_err()
        );
        assert!(!made.load(Ordering::SeqCst));
        assert_eq!(steps.settle().await, []);
        assert!(made.load(Ordering::SeqCst));
    }
}
