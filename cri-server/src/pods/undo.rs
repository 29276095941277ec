//! The undo stack: each side effect's inverse is pushed, with its name, before the side effect begins. On
//! failure the steps run in reverse, each with its own time limit, all of them even when some fail; what
//! failed is reported beside the error that caused the undoing.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// Time limit of one undo step.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(30);

type Inverse = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send>;

struct Step {
    name: &'static str,
    inverse: Inverse,
}

/// Inverses of what has been begun, the last first.
#[derive(Default)]
pub(crate) struct Undo {
    steps: Vec<Step>,
}

/// A step that could not be undone: what it would have released may be left behind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("undoing {step} failed: {error}")]
pub struct UndoFailure {
    /// The step's name.
    pub step: &'static str,
    /// Why.
    pub error: String,
}

impl Undo {
    /// Pushes the inverse of a side effect that is about to begin. It must be right also when the side effect
    /// did not happen, or happened in part.
    pub(crate) fn push<F, R>(&mut self, name: &'static str, inverse: F)
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.steps.push(Step {
            name,
            inverse: Box::new(move || Box::pin(inverse())),
        });
    }

    /// Runs every step, the last pushed first, each for at most [`STEP_LIMIT`].
    pub(crate) async fn run(self) -> Vec<UndoFailure> {
        self.run_within(STEP_LIMIT).await
    }

    async fn run_within(self, limit: Duration) -> Vec<UndoFailure> {
        let mut failures = Vec::new();
        for Step { name: step, inverse } in self.steps.into_iter().rev() {
            let result = match tokio::time::timeout(limit, inverse()).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {} s", limit.as_secs_f32())),
            };
            match result {
                Ok(()) => tracing::debug!(step, "undone"),
                Err(error) => {
                    tracing::warn!(step, error, "undo failed");
                    failures.push(UndoFailure { step, error });
                }
            }
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn steps_run_in_reverse_and_go_on_after_a_failure() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::default();
        for (name, fails) in [("first", false), ("second", true), ("third", false)] {
            let seen = seen.clone();
            undo.push(name, move || async move {
                seen.lock().unwrap().push(name);
                if fails { Err("stuck".to_owned()) } else { Ok(()) }
            });
        }
        let failures = undo.run().await;
        assert_eq!(*seen.lock().unwrap(), ["third", "second", "first"]);
        assert_eq!(
            failures,
            [UndoFailure {
                step: "second",
                error: "stuck".into()
            }]
        );
    }

    #[tokio::test]
    async fn a_step_that_hangs_is_given_up_and_the_others_run() {
        let seen = Arc::new(Mutex::new(false));
        let mut undo = Undo::default();
        let flag = seen.clone();
        undo.push("below", move || async move {
            *flag.lock().unwrap() = true;
            Ok(())
        });
        undo.push("hangs", std::future::pending::<Result<(), String>>);
        let failures = undo.run_within(Duration::from_millis(100)).await;
        assert_eq!(failures.len(), 1);
        assert!(
            failures[0]
                .to_string()
                .contains("undoing hangs failed: no answer within 0.1 s")
        );
        assert!(*seen.lock().unwrap());
    }
}
