//! What a container's plan looks up on the node may hang for as long as a server is away: a hostPath on a dead NFS
//! mount holds a thread in the kernel. So these lookups have a time limit, a retried request waits for the thread
//! that its former attempt has instead of taking another, and all of them together take only some of the threads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use catamaran_sandbox::id::Id;
use tokio::sync::Semaphore;

use super::record::ContainerKey;
use super::teardown;
use crate::error::{Error, Result};

/// Half of the daemon's threads for blocking work; the rest goes on.
const AT_ONCE: usize = 32;
/// Shorter than the kubelet's own limit of a request (2 min), so that it hears the reason.
const LIMIT: Duration = Duration::from_secs(30);

/// Which container's.
type Key = (Id, ContainerKey);

/// See the module.
#[derive(Debug)]
pub(super) struct Lookups {
    permits: Arc<Semaphore>,
    limit: Duration,
    at_work: Mutex<HashMap<Key, Weak<Attempt>>>,
}

/// The lookups of one container, which are made one after the other.
#[derive(Debug, Default)]
struct Attempt {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Field and path that is being looked up.
    at: Mutex<Option<Place>>,
}

/// A path with the field that names it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) field: String,
    pub(super) path: String,
}

impl Default for Lookups {
    fn default() -> Self {
        Self::new(AT_ONCE, LIMIT)
    }
}

impl Lookups {
    fn new(at_once: usize, limit: Duration) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(at_once)),
            limit,
            at_work: Mutex::default(),
        }
    }

    /// Does `work`, which looks up `places`, on a thread for blocking work.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] naming the place that does not answer; the work's own.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        key: Key,
        places: Vec<Place>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let attempt = self.attempt(key);
        match tokio::time::timeout(self.limit, self.look(&attempt, places, work)).await {
            Ok(result) => result,
            Err(_) => Err(Error::DeadlineExceeded(self.too_late(&attempt))),
        }
    }

    async fn look<T: Send + 'static>(
        &self,
        attempt: &Arc<Attempt>,
        places: Vec<Place>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let turn = attempt.turn.clone().lock_owned().await;
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.map_err(|e| Error::Internal(e.to_string()))?;
        let at = attempt.clone();
        teardown::blocking(move || {
            // Held until the thread is free, also when nobody waits for it any more.
            let _held = (turn, permit);
            for place in places {
                let path = place.path.clone();
                at.is_at(Some(place));
                // Only whether it answers; what is wrong with it, the work says.
                let _ = std::fs::metadata(path);
            }
            at.is_at(None);
            work()
        })
        .await
    }

    fn attempt(&self, key: Key) -> Arc<Attempt> {
        let mut at_work = self.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        at_work.retain(|_, attempt| attempt.strong_count() > 0);
        if let Some(attempt) = at_work.get(&key).and_then(Weak::upgrade) {
            return attempt;
        }
        let attempt = Arc::new(Attempt::default());
        at_work.insert(key, Arc::downgrade(&attempt));
        attempt
    }

    fn too_late(&self, attempt: &Attempt) -> String {
        let seconds = self.limit.as_secs_f32();
        if let Some(Place { field, path }) = attempt.place() {
            return format!(
                "{field}: {path:?} was not looked up within {seconds} s: the file system that it is on does not answer"
            );
        }
        let at_work = self.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        let hung: Vec<String> = at_work
            .values()
            .filter_map(|attempt| attempt.upgrade()?.place())
            .map(|place| format!("{:?}", place.path))
            .collect();
        format!(
            "the container's volumes were not looked up within {seconds} s: lookups of other containers' do not end \
             ({})",
            hung.join(", ")
        )
    }
}

impl Attempt {
    fn is_at(&self, place: Option<Place>) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }

    fn place(&self) -> Option<Place> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    fn key(pod: &str) -> Key {
        let container = ContainerKey {
            name: "c".into(),
            attempt: 0,
        };
        (Id::parse(pod).unwrap(), container)
    }

    fn no_places() -> Vec<Place> {
        Vec::new()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_retry_takes_no_second_thread_and_other_containers_go_on() {
        let lookups = Lookups::new(2, Duration::from_millis(200));
        let (go, hangs) = mpsc::channel::<()>();
        let error = lookups
            .run(key("a"), no_places(), move || {
                let _ = hangs.recv();
                Ok(())
            })
            .await
            .unwrap_err();
        assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
        let began = Arc::new(AtomicUsize::new(0));
        for _ in 0..3 {
            let began = began.clone();
            let again = lookups.run(key("a"), no_places(), move || {
                Ok(began.fetch_add(1, Ordering::SeqCst))
            });
            assert_eq!(again.await.unwrap_err().code(), tonic::Code::DeadlineExceeded);
        }
        assert_eq!(began.load(Ordering::SeqCst), 0);
        lookups.run(key("b"), no_places(), || Ok(())).await.unwrap();
        go.send(()).unwrap();
        lookups.run(key("a"), no_places(), || Ok(())).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_place_that_does_not_answer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| Place {
            field: "config.mounts[1].host_path".into(),
            path: dir.path().join(name).display().to_string(),
        };
        let lookups = Lookups::new(1, Duration::from_millis(200));
        let attempt = lookups.attempt(key("a"));
        attempt.is_at(Some(place("nfs")));
        let text = lookups.too_late(&attempt);
        assert!(
            text.starts_with("config.mounts[1].host_path: ") && text.contains("nfs"),
            "{text}"
        );
        // One that waits for its turn says whom it waits for.
        let other = lookups.attempt(key("b"));
        assert!(lookups.too_late(&other).contains("nfs"));
        // A missing path is no obstacle.
        lookups
            .run(key("c"), vec![place("none")], || Ok(()))
            .await
            .unwrap();
    }
}
