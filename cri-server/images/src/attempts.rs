//! Attempts to pull, and who waits for them. A request for the same reference with the same credentials joins the
//! attempt in flight; an attempt that nobody has waited for in a while is stopped.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::credentials::Auth;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::pull::pull;
use crate::reference::Reference;
use crate::store::Inner;

type Key = (Reference, Option<Auth>);
type Outcome = Option<Result<Arc<Image>>>;
/// Attempts others can join, by subscribing while they hold the lock.
pub(crate) type InFlight = HashMap<Key, Arc<watch::Sender<Outcome>>>;

/// How long an attempt goes on when nobody waits: a kubelet that restarts asks again.
const GRACE: Duration = Duration::from_secs(30);

/// Waits for the attempt in flight, starting one where there is none.
pub(crate) async fn join(inner: &Arc<Inner>, reference: Reference, auth: Option<Auth>) -> Result<Arc<Image>> {
    let key = (reference, auth);
    let mut outcome = {
        let mut in_flight = lock(inner);
        match in_flight.get(&key) {
            Some(attempt) => attempt.subscribe(),
            None => {
                let (sender, outcome) = watch::channel(None);
                let entry = Entry {
                    inner: inner.clone(),
                    key: key.clone(),
                    sender: Arc::new(sender),
                };
                in_flight.insert(key, entry.sender.clone());
                tokio::spawn(run(entry));
                outcome
            }
        }
    };
    let result = outcome
        .wait_for(Option::is_some)
        .await
        .map(|result| result.clone());
    result
        .ok()
        .flatten()
        .unwrap_or_else(|| Err(Error::Internal("the pull ended without a result".into())))
}

fn lock(inner: &Inner) -> MutexGuard<'_, InFlight> {
    inner.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn run(entry: Entry) {
    let abandoned = CancellationToken::new();
    let result = {
        let work = pull(&entry.inner, &entry.key.0, entry.key.1.as_ref(), &abandoned);
        tokio::pin!(work);
        tokio::select! {
            result = &mut work => result,
            () = entry.abandoned() => {
                tracing::info!(image = %entry.key.0, "nobody waits for the pull, it is stopped");
                abandoned.cancel();
                work.await
            }
        }
    };
    let sender = entry.sender.clone();
    // A retry after this failure starts anew.
    drop(entry);
    sender.send_replace(Some(result));
}

/// Takes an attempt off the list however it ends.
struct Entry {
    inner: Arc<Inner>,
    key: Key,
    sender: Arc<watch::Sender<Outcome>>,
}

impl Entry {
    /// Ends when nobody has waited for a while; the attempt is off the list then.
    async fn abandoned(&self) {
        loop {
            self.sender.closed().await;
            tokio::time::sleep(GRACE).await;
            // Who joins does so under the lock: either it is counted here or it finds no attempt.
            let mut in_flight = lock(&self.inner);
            if self.sender.receiver_count() == 0 {
                in_flight.remove(&self.key);
                return;
            }
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut in_flight = lock(&self.inner);
        // After an abandoned attempt the key may be another's.
        let own = in_flight
            .get(&self.key)
            .is_some_and(|sender| Arc::ptr_eq(sender, &self.sender));
        if own {
            in_flight.remove(&self.key);
        }
    }
}
