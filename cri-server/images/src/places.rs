//! How many layers are transferred and unpacked at once: a bound for each pull and one for the node.
//!
//! Each pull has one place that no other pull can take, so a registry that is slow never stops the pulls from others;
//! what a pull does beyond that waits for one of the node's common places.

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::error::{Error, Result};

/// Common places of the node for each one that a pull may have.
const COMMON: usize = 4;
/// Pulls at work at once; each may hold a thread of the file system's even when the common places are taken.
const MAX_PULLS: usize = 64;

fn gone<E>(_: E) -> Error {
    Error::Internal("the download permits are gone".into())
}

/// The places of the node.
pub(crate) struct NodePlaces {
    pulls: Semaphore,
    common: Semaphore,
    each: usize,
}

/// The places of one pull.
pub(crate) struct PullPlaces<'a> {
    node: &'a NodePlaces,
    limit: Semaphore,
    own: Semaphore,
    _pull: SemaphorePermit<'a>,
}

/// A place taken, until it is dropped.
pub(crate) struct Place<'a> {
    _limit: SemaphorePermit<'a>,
    _place: SemaphorePermit<'a>,
}

impl NodePlaces {
    /// `each` layers at once for one pull.
    pub(crate) fn new(each: usize) -> Self {
        let each = each.max(1);
        Self {
            pulls: Semaphore::new(MAX_PULLS),
            common: Semaphore::new(each * COMMON),
            each,
        }
    }

    /// Waits until another pull may be at work.
    pub(crate) async fn for_pull(&self) -> Result<PullPlaces<'_>> {
        let pull = self.pulls.acquire().await.map_err(gone)?;
        Ok(PullPlaces {
            node: self,
            limit: Semaphore::new(self.each),
            own: Semaphore::new(1),
            _pull: pull,
        })
    }
}

impl PullPlaces<'_> {
    /// Waits for a place for one layer.
    pub(crate) async fn take(&self) -> Result<Place<'_>> {
        let limit = self.limit.acquire().await.map_err(gone)?;
        let place = tokio::select! {
            biased;
            own = self.own.acquire() => own,
            common = self.node.common.acquire() => common,
        };
        Ok(Place {
            _limit: limit,
            _place: place.map_err(gone)?,
        })
    }
}
