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
    limit: Duration,
    /// What was pushed before is in use until this has succeeded.
    holds: bool,
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
        self.add(name, STEP_LIMIT, false, inverse);
    }

    /// As [`Undo::push`], of something that uses what was pushed before, and for a time limit of its own: where
    /// this cannot be undone, the rest stays for a later removal.
    pub(crate) fn push_holding<F, R>(&mut self, name: &'static str, limit: Duration, inverse: F)
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.add(name, limit, true, inverse);
    }

    fn add<F, R>(&mut self, name: &'static str, limit: Duration, holds: bool, inverse: F)
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.steps.push(Step {
            name,
            inverse: Box::new(move || Box::pin(inverse())),
            limit,
            holds,
        });
    }

    /// Runs every step, the last pushed first, each within its limit ([`STEP_LIMIT`] where it has none of its own).
    pub(crate) async fn run(self) -> Vec<UndoFailure> {
        let mut failures = Vec::new();
        for Step {
            name: step,
            inverse,
            limit,
            holds,
        } in self.steps.into_iter().rev()
        {
            let result = match tokio::time::timeout(limit, inverse()).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {} s", limit.as_secs_f32())),
            };
            match result {
                Ok(()) => tracing::debug!(step, "undone"),
                Err(error) => {
                    tracing::warn!(step, error, "undo failed");
                    failures.push(UndoFailure { step, error });
                    if holds {
                        break;
                    }
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
        let limit = Duration::from_millis(100);
        undo.add("hangs", limit, false, std::future::pending::<Result<(), String>>);
        let failures = undo.run().await;
        assert_eq!(failures.len(), 1);
        assert!(
            failures[0]
                .to_string()
                .contains("undoing hangs failed: no answer within 0.1 s")
        );
        assert!(*seen.lock().unwrap());
    }

    #[tokio::test]
    async fn what_is_in_use_stays_where_its_user_cannot_be_undone() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::default();
        let note = |name: &'static str| {
            let seen = seen.clone();
            move || async move {
                seen.lock().unwrap().push(name);
                Ok(())
            }
        };
        undo.push("bundle", note("bundle"));
        undo.push_holding("task", STEP_LIMIT, || async {
            Err("still being created".to_owned())
        });
        undo.push("above", note("above"));
        assert_eq!(undo.run().await.len(), 1);
        assert_eq!(*seen.lock().unwrap(), ["above"]);
    }
}
