//! One layer of a pull: waited for where another pull unpacks it already, otherwise transferred and unpacked at once.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::layer::{self, Expected, Limits, Merged};
use crate::metadata::LayerRecord;
use crate::places::PullPlaces;
use crate::registry::{Blob, Registry};
use crate::store::{Inner, blocking, remove_tree};

/// Transferred pieces that may wait for the unpacker.
const PIPE: usize = 16;

/// One layer to have.
pub(crate) struct Job {
    pub(crate) chain_id: String,
    pub(crate) expected: Expected,
}

/// What the layers of one pull share.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) inner: &'a Arc<Inner>,
    pub(crate) registry: &'a Registry,
    pub(crate) places: &'a PullPlaces<'a>,
    pub(crate) stop: &'a CancellationToken,
}

/// Why a layer is not there.
pub(crate) enum Stopped {
    Failed(Error),
    /// Another layer of the image failed, or nobody waits for the pull.
    ByOther,
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The layers below, and for each the signal that it is complete.
pub(crate) struct Below<'a> {
    pub(crate) jobs: &'a [Job],
    pub(crate) ready: &'a [watch::Sender<bool>],
}

/// Right to unpack a layer; others wait until it is dropped.
struct Claim {
    inner: Arc<Inner>,
    chain_id: String,
    _done: watch::Sender<()>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.inner.state().unpacking.remove(&self.chain_id);
    }
}

/// Has one layer complete and pinned, by its own work or by another pull's.
pub(crate) async fn obtain(work: Work<'_>, job: &Job, below: Below<'_>) -> std::result::Result<(), Stopped> {
    let Work { inner, stop, .. } = work;
    let claim = loop {
        let mut other = {
            let mut state = inner.state();
            if state.layers.contains_key(&job.chain_id) {
                *state.pins.entry(job.chain_id.clone()).or_default() += 1;
                return Ok(());
            }
            match state.unpacking.get(&job.chain_id) {
                Some(other) => other.clone(),
                None => {
                    let (done, waiting) = watch::channel(());
                    state.unpacking.insert(job.chain_id.clone(), waiting);
                    break Claim {
                        inner: inner.clone(),
                        chain_id: job.chain_id.clone(),
                        _done: done,
                    };
                }
            }
        };
        tokio::select! {
            _ = other.changed() => {}
            () = stop.cancelled() => return Err(Stopped::ByOther),
        }
    };
    let name = inner.fresh_name();
    let result = fetch(work, job, &name, below).await;
    if result.is_err() {
        let aside = inner.config.root.join("tmp").join(&name);
        if let Err(error) = blocking(move || remove_tree(&aside)).await {
            tracing::warn!(%error, "a layer that failed cannot be removed");
        }
    }
    let record = result?;
    let mut state = inner.state();
    state.layers.insert(job.chain_id.clone(), record);
    *state.pins.entry(job.chain_id.clone()).or_default() += 1;
    // The claim ends after the layer is listed; its drop takes the lock.
    drop(state);
    drop(claim);
    Ok(())
}

async fn fetch(
    work: Work<'_>,
    job: &Job,
    name: &str,
    below: Below<'_>,
) -> std::result::Result<LayerRecord, Stopped> {
    let Work {
        inner,
        registry,
        places,
        stop,
    } = work;
    let aside = inner.config.root.join("tmp").join(name);
    let root = aside.join("fs");
    let (unpacked, bytes, inodes) = {
        let _place = tokio::select! {
            place = places.take() => place?,
            () = stop.cancelled() => return Err(Stopped::ByOther),
        };
        let (sender, receiver) = mpsc::channel(PIPE);
        let unpacker = tokio::task::spawn_blocking({
            let (aside, root, expected) = (aside.clone(), root.clone(), job.expected.clone());
            move || -> Result<(layer::Unpacked, u64, u64)> {
                std::fs::create_dir(&aside).map_err(|e| Error::io(format!("make {}", aside.display()), e))?;
                let pipe = Pipe {
                    receiver,
                    current: Bytes::new(),
                };
                let unpacked = layer::unpack_blob(pipe, &expected, &root, Limits::default())?;
                let (bytes, inodes) = layer::disk_usage(&root)?;
                Ok((unpacked, bytes, inodes))
            }
        });
        let transfer = transfer(registry.blob(&job.expected.blob, job.expected.size), sender, stop).await;
        // The unpacker's task always ends before the layer's directory is touched again.
        let unpacked = unpacker
            .await
            .map_err(|error| Error::Internal(format!("unpacking failed: {error}")))?;
        if let Err(Stopped::ByOther) = transfer {
            return Err(Stopped::ByOther);
        }
        unpacked?
    };
    if !below.jobs.is_empty() && !unpacked.implied.is_empty() {
        for ready in below.ready {
            let mut ready = ready.subscribe();
            tokio::select! {
                _ = ready.wait_for(|ready| *ready) => {}
                () = stop.cancelled() => return Err(Stopped::ByOther),
            }
        }
        let chain_ids: Vec<String> = below.jobs.iter().map(|job| job.chain_id.clone()).collect();
        let lower = {
            let state = inner.state();
            inner.lower_directories(&state, &chain_ids)?
        };
        let (root, implied) = (root.clone(), unpacked.implied);
        blocking(move || {
            let below = Merged::open(lower.iter().map(PathBuf::as_path))?;
            layer::inherit(&root, &implied, &below)
        })
        .await?;
    }
    let place = inner.config.root.join("layers").join(name);
    std::fs::rename(&aside, &place).map_err(|error| Error::io(format!("make {}", place.display()), error))?;
    Ok(LayerRecord {
        name: name.to_owned(),
        diff_id: job.expected.diff_id.to_string(),
        bytes,
        inodes,
        opaque_root: unpacked.opaque_root,
        empty: unpacked.empty,
    })
}

/// Moves a blob into the unpacker. A failure travels through the pipe and comes back as the unpacker's error.
async fn transfer(
    mut blob: Blob<'_>,
    sender: mpsc::Sender<Result<Bytes>>,
    stop: &CancellationToken,
) -> std::result::Result<(), Stopped> {
    loop {
        let piece = tokio::select! {
            piece = blob.next() => piece,
            // The unpacker has failed; its error says why.
            () = sender.closed() => return Ok(()),
            () = stop.cancelled() => {
                // Without this the unpacker would take the end of the pipe for the end of the blob.
                let _ = sender.send(Err(Error::Internal("stopped".into()))).await;
                return Err(Stopped::ByOther);
            }
        };
        let Some(piece) = piece.transpose() else {
            return Ok(());
        };
        let last = piece.is_err();
        if sender.send(piece).await.is_err() || last {
            return Ok(());
        }
    }
}

/// The unpacker's end of the transfer.
struct Pipe {
    receiver: mpsc::Receiver<Result<Bytes>>,
    current: Bytes,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                None => return Ok(0),
                Some(Ok(piece)) => self.current = piece,
                Some(Err(error)) => return Err(io::Error::other(error)),
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
