//! One pull, from the reference to the recorded image.
//!
//! Layers are fetched side by side; two pulls that need the same layer fetch it once. Each layer is unpacked while
//! it arrives, below `tmp`, and moved to `layers` when its digests were verified. Nothing of it counts until the
//! last step: one sync of the file system, then one transaction that records the image with its layers.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::credentials::{self, Auth};
use crate::digest::{Digest, chain_ids};
use crate::error::{Error, Result};
use crate::fetch::{Below, Job, Stopped, Work, obtain};
use crate::hosts;
use crate::image::{Image, diff_ids, parse_config};
use crate::kept;
use crate::layer::{self, Expected};
use crate::manifest::{self, Content, Descriptor, ImageManifest};
use crate::metadata::{Changes, ImageRecord};
use crate::reference::{Pick, Reference};
use crate::registry::{MAX_DOCUMENT, Manifest, Registry};
use crate::store::{Inner, blocking};

/// Pulls an image; `abandoned` stops the transfers, and the pull fails.
pub(crate) async fn pull(
    inner: &Arc<Inner>,
    reference: &Reference,
    auth: Option<&Auth>,
    abandoned: &CancellationToken,
) -> Result<Arc<Image>> {
    let hosts = hosts::hosts_for(&inner.config.hosts_dirs, &reference.registry)?;
    let credentials = |host: &hosts::RegistryHost| match (auth, &inner.config.docker_config) {
        (Some(auth), _) => Ok(Some(auth.clone())),
        (None, None) => Ok(None),
        (None, Some(file)) => {
            let name = if host.mirror {
                host.name()
            } else {
                reference.registry.clone()
            };
            credentials::from_docker_config(file, &name, &reference.repository)
        }
    };
    let registry = Registry::new(
        reference.clone(),
        hosts,
        credentials,
        inner.config.progress_timeout,
    )?;
    let gave_up = || Error::Timeout {
        what: format!("pulling {reference}: nobody waits for it any more"),
        seconds: 0,
    };
    let (places, target) = tokio::select! {
        found = async { Ok((inner.places.for_pull().await?, Target::find(inner, &registry).await?)) } => found?,
        () = abandoned.cancelled() => return Err(gave_up()),
    };
    let mut pins = Pins {
        inner: inner.clone(),
        chain_ids: Vec::new(),
    };
    let stop = abandoned.child_token();
    let work = Work {
        inner,
        registry: &registry,
        places: &places,
        stop: &stop,
    };
    let result = match target.fetch_layers(work, &mut pins).await {
        Ok(()) => target.commit(inner, reference).await,
        Err(Stopped::Failed(error)) => Err(error),
        Err(Stopped::ByOther) => Err(gave_up()),
    };
    match &result {
        Ok(image) => {
            drop(pins);
            tracing::info!(image = %reference, id = %image.id, bytes = image.size, "pulled");
        }
        Err(error) => {
            kept::after_failure(inner, &pins.chain_ids, error);
            drop(pins);
            let _changes = inner.changes.lock().await;
            if let Err(error) = inner.collect_layers().await {
                tracing::warn!(image = %reference, %error, "layers of a failed pull cannot be removed");
            }
        }
    }
    result
}

/// Layers this pull is about to use.
struct Pins {
    inner: Arc<Inner>,
    chain_ids: Vec<String>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        for chain_id in &self.chain_ids {
            if let Some(count) = state.pins.get_mut(chain_id) {
                *count -= 1;
                if *count == 0 {
                    state.pins.remove(chain_id);
                }
            }
        }
    }
}

/// What the reference names, down to the configuration.
struct Target {
    /// Digest of what the reference named: of the index where there is one.
    digest: Digest,
    id: Digest,
    config: Bytes,
    /// Documents to keep, by digest.
    documents: BTreeMap<Digest, Bytes>,
    layers: Vec<Job>,
}

impl Target {
    async fn find(inner: &Inner, registry: &Registry) -> Result<Self> {
        let top = registry.resolve().await?;
        let digest = top.digest.clone();
        let mut documents = BTreeMap::from([(top.digest.clone(), top.bytes.clone())]);
        let manifest = match parse(&top)? {
            Content::Image(manifest) => manifest,
            Content::Index(entries) => {
                let chosen = manifest::choose(&entries, &inner.config.platform)?;
                let found = registry.manifest(&chosen.digest()?).await?;
                check_size(chosen, &found.bytes, "manifest")?;
                documents.insert(found.digest.clone(), found.bytes.clone());
                match parse(&found)? {
                    Content::Image(manifest) => manifest,
                    Content::Index(_) => return Err(Error::Unsupported("an index inside an index".into())),
                }
            }
        };
        let (id, config) = Self::configuration(registry, &manifest).await?;
        documents.insert(id.clone(), config.clone());
        let layers = Self::jobs(&manifest, &config)?;
        Ok(Self {
            digest,
            id,
            config,
            documents,
            layers,
        })
    }

    async fn configuration(registry: &Registry, manifest: &ImageManifest) -> Result<(Digest, Bytes)> {
        if manifest.config.size > MAX_DOCUMENT {
            return Err(Error::Hostile(format!(
                "a configuration of {} bytes",
                manifest.config.size
            )));
        }
        let id = manifest.config.digest()?;
        let config = registry.small_blob(&id).await?;
        check_size(&manifest.config, &config, "configuration")?;
        Ok((id, config))
    }

    fn jobs(manifest: &ImageManifest, config: &[u8]) -> Result<Vec<Job>> {
        let diff_ids = diff_ids(&parse_config(config)?)?;
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::Hostile(format!(
                "the manifest lists {} layers, the configuration {}",
                manifest.layers.len(),
                diff_ids.len()
            )));
        }
        let chain_ids = chain_ids(&diff_ids);
        let parts = manifest.layers.iter().zip(diff_ids).zip(chain_ids);
        parts
            .map(|((layer, diff_id), chain_id)| {
                let expected = Expected {
                    blob: layer.digest()?,
                    size: layer.size,
                    diff_id,
                };
                Ok(Job {
                    chain_id: chain_id.to_string(),
                    expected,
                })
            })
            .collect()
    }

    /// Has all layers ready and pinned, or fails with the first failure after the others have stopped.
    async fn fetch_layers(&self, work: Work<'_>, pins: &mut Pins) -> std::result::Result<(), Stopped> {
        let ready: Vec<watch::Sender<bool>> = self.layers.iter().map(|_| watch::Sender::new(false)).collect();
        let layers = self.layers.iter().enumerate().map(|(index, job)| {
            let ready = &ready;
            async move {
                let below = Below {
                    jobs: &self.layers[..index],
                    ready: &ready[..index],
                };
                let result = obtain(work, job, below).await;
                match &result {
                    Ok(()) => drop(ready[index].send_replace(true)),
                    Err(_) => work.stop.cancel(),
                }
                result
            }
        });
        let mut first = Ok(());
        for (job, result) in self.layers.iter().zip(futures::future::join_all(layers).await) {
            match result {
                Ok(()) => pins.chain_ids.push(job.chain_id.clone()),
                // A layer that was stopped says less than the one that failed.
                Err(Stopped::Failed(error)) if first.is_ok() => first = Err(error),
                Err(_) => {}
            }
        }
        match first {
            Ok(()) if work.stop.is_cancelled() => Err(Stopped::ByOther),
            other => other.map_err(Stopped::Failed),
        }
    }

    /// Records the image. Everything it consists of is on disk before.
    async fn commit(&self, inner: &Arc<Inner>, reference: &Reference) -> Result<Arc<Image>> {
        let _changes = inner.changes.lock().await;
        let result = self.commit_locked(inner, reference).await;
        if result.is_err() {
            inner
                .collect_content(self.documents.keys().map(Digest::to_string))
                .await?;
        }
        result
    }

    async fn commit_locked(&self, inner: &Arc<Inner>, reference: &Reference) -> Result<Arc<Image>> {
        let id = self.id.to_string();
        let chain_ids: Vec<String> = self.layers.iter().map(|job| job.chain_id.clone()).collect();
        let content = self
            .documents
            .iter()
            .map(|(digest, bytes)| (digest.to_string(), bytes.len() as u64))
            .collect();
        let mut changes = Changes::default();
        let mut record = ImageRecord {
            tags: [].into(),
            digests: [].into(),
            layers: chain_ids.clone(),
            content,
        };
        let known = {
            let state = inner.state();
            let existing = state.images.get(&id).map(|(record, _)| record.clone());
            if let Some(existing) = &existing {
                record.tags.clone_from(&existing.tags);
                record.digests.clone_from(&existing.digests);
                record.content.extend(existing.content.clone());
            }
            record.digests.insert(reference.with_digest(&self.digest));
            if let Pick::Tag(_) = reference.pick {
                let tag = reference.to_string();
                // A tag names one image: it moves.
                for (other, (theirs, _)) in &state.images {
                    if *other != id && theirs.tags.contains(&tag) {
                        let mut theirs = theirs.clone();
                        theirs.tags.remove(&tag);
                        changes.put_images.push((other.clone(), theirs));
                    }
                }
                record.tags.insert(tag);
            }
            for chain_id in &chain_ids {
                let layer = state
                    .layers
                    .get(chain_id)
                    .ok_or_else(|| Error::NotFound(format!("layer {chain_id}")))?;
                changes.put_layers.push((chain_id.clone(), layer.clone()));
            }
            existing.is_some_and(|existing| existing == record)
        };
        if !known {
            changes.put_images.push((id.clone(), record.clone()));
            self.make_durable(inner).await?;
            let moved = changes.put_images.clone();
            inner.write(changes).await?;
            return self.publish(inner, moved);
        }
        let state = inner.state();
        let image = state.images.get(&id).map(|(_, image)| image.clone());
        image.ok_or_else(|| Error::Internal("an image vanished while it was pulled".into()))
    }

    /// Writes the documents and syncs them with the layers.
    async fn make_durable(&self, inner: &Arc<Inner>) -> Result<()> {
        let documents = self.documents.clone();
        let worker = inner.clone();
        blocking(move || {
            for (digest, bytes) in documents {
                let path = worker.content_path(&digest);
                if path.exists() {
                    continue;
                }
                let aside = worker.config.root.join("tmp").join(worker.fresh_name());
                let written = std::fs::write(&aside, &bytes).and_then(|()| std::fs::rename(&aside, &path));
                if let Err(error) = written {
                    crate::store::remove_file(&aside)?;
                    return Err(Error::io(format!("write {}", path.display()), error));
                }
            }
            layer::sync_file_system(&worker.config.root)
        })
        .await
    }

    fn publish(&self, inner: &Inner, records: Vec<(String, ImageRecord)>) -> Result<Arc<Image>> {
        let mut state = inner.state();
        let own = self.id.to_string();
        let mut published = None;
        for (id, record) in records {
            let image = if id == own {
                let image = Arc::new(inner.image(&state, &id, &record, &self.config)?);
                published = Some(image.clone());
                image
            } else if let Some((_, old)) = state.images.get(&id) {
                let repo_tags: Vec<String> = record.tags.iter().cloned().collect();
                let names = || record.tags.iter().chain(&record.digests);
                let pinned = names().any(|name| inner.pinned.contains(name));
                Arc::new(Image {
                    repo_tags,
                    pinned,
                    ..Image::clone(old)
                })
            } else {
                continue;
            };
            state.images.insert(id, (record, image));
        }
        published.ok_or_else(|| Error::Internal("an image was not published".into()))
    }
}

fn parse(manifest: &Manifest) -> Result<Content> {
    manifest::parse(&manifest.bytes, manifest.media_type.as_deref())
}

fn check_size(descriptor: &Descriptor, bytes: &[u8], what: &str) -> Result<()> {
    if descriptor.size == bytes.len() as u64 {
        return Ok(());
    }
    Err(Error::DigestMismatch {
        what: what.to_owned(),
        expected: format!("{} bytes", descriptor.size),
        actual: format!("{} bytes", bytes.len()),
    })
}
