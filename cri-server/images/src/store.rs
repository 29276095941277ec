//! The store: what exists on this node, who holds it, and what goes when nobody does.
//!
//! A layer lives while an image refers to it, a container or image mount holds a lease on it, or a pull is about to
//! use it. Records of images and layers are durable ([`crate::metadata`]); a lease is a file in the directory of
//! what it protects, so both come and go by one rename.
//!
//! Locks: `state` is held briefly and never across a wait; `changes` (async) orders the changes of records and of
//! the directories that belong to them, and is taken first.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::attempts::InFlight;
use crate::config::{FsUsage, ImagesConfig, RootfsMount, Snapshot, SnapshotUsage};
use crate::credentials::Auth;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::kept::Kept;
use crate::layer::{self, Merged};
use crate::metadata::{Changes, ImageRecord, LayerRecord, Metadata};
use crate::places::NodePlaces;
use crate::reference::{Pick, Reference};
use crate::snapshot::Lease;

/// The store of one node; cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

/// A writable layer is measured again after this time, as often as the kubelet asks for statistics.
const USAGE_AGE_NS: i64 = 10_000_000_000;

pub(crate) struct Inner {
    pub(crate) config: ImagesConfig,
    /// `config.pinned`, normalised.
    pub(crate) pinned: Vec<String>,
    pub(crate) state: Mutex<State>,
    pub(crate) changes: tokio::sync::Mutex<()>,
    pub(crate) metadata: Metadata,
    pub(crate) in_flight: Mutex<InFlight>,
    pub(crate) places: NodePlaces,
    /// Numbers for names of directories.
    next: AtomicU64,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) images: BTreeMap<String, (ImageRecord, Arc<Image>)>,
    /// Complete layers by chain id; not all are recorded yet.
    pub(crate) layers: HashMap<String, LayerRecord>,
    /// Layers being unpacked; the channel closes when that ends.
    pub(crate) unpacking: HashMap<String, watch::Receiver<()>>,
    /// Uses by pulls in flight.
    pub(crate) pins: HashMap<String, usize>,
    /// Layers of pulls that broke off.
    pub(crate) kept: Kept,
    pub(crate) leases: HashMap<String, Lease>,
    /// Writable layers as they were measured last, by container.
    pub(crate) measured: HashMap<String, SnapshotUsage>,
}

pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Runs file system work beside the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::Internal(format!("a file system task failed: {error}"))),
    }
}

pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

impl ImageStore {
    /// Opens the store, creating it where it does not exist; removes what a crash left half made.
    ///
    /// # Errors
    /// Directories that cannot be made or read, metadata that is damaged, newer, or open in another process.
    pub async fn open(config: ImagesConfig) -> Result<Self> {
        let inner = blocking(move || Inner::open(config)).await?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Pulls an image, or joins an attempt in flight for the same reference with the same credentials. The attempt
    /// goes on for a while when its callers go away, then it is stopped. A failed pull leaves nothing, but where the
    /// registry broke off its complete layers stay for a while, so that a retry goes on from them.
    ///
    /// `auth` is for the registry of the reference and its configured mirrors; without it the docker configuration
    /// file is asked for each host.
    ///
    /// # Errors
    /// Every kind of [`Error`].
    pub async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Image> {
        let reference = Reference::parse(reference)?;
        crate::attempts::join(&self.inner, reference, auth)
            .await
            .map(|image| Image::clone(&image))
    }

    /// All images, by id.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner
            .state()
            .images
            .values()
            .map(|(_, image)| image.clone())
            .collect()
    }

    /// The image of an id (with or without `sha256:`), a tag, a digest reference or an unambiguous start of an id.
    #[must_use]
    pub fn get(&self, id_or_reference: &str) -> Option<Arc<Image>> {
        self.inner.state().find(id_or_reference)
    }

    /// Removes an image with all its names; layers that containers hold stay until these release them. An image
    /// that does not exist is a success.
    ///
    /// # Errors
    /// Failures of the metadata and the file system.
    pub async fn remove(&self, id_or_reference: &str) -> Result<()> {
        let inner = &self.inner;
        let _changes = inner.changes.lock().await;
        let Some(image) = inner.state().find(id_or_reference) else {
            return Ok(());
        };
        inner
            .write(Changes {
                delete_images: vec![image.id.clone()],
                ..Changes::default()
            })
            .await?;
        let removed = {
            let mut state = inner.state();
            // Who removes images wants the space.
            state.kept.clear();
            state.images.remove(&image.id)
        };
        if let Some((record, _)) = removed {
            inner.collect_content(record.content.into_keys()).await?;
        }
        inner.collect_layers().await
    }

    /// What the store takes on disk, by its records.
    ///
    /// # Errors
    /// When the metadata's file cannot be examined.
    pub fn usage(&self) -> Result<FsUsage> {
        let root = &self.inner.config.root;
        let database = std::fs::metadata(root.join(METADATA))
            .map_err(|error| Error::io(format!("examine {}", root.join(METADATA).display()), error))?;
        let state = self.inner.state();
        let content: BTreeMap<&String, &u64> = state
            .images
            .values()
            .flat_map(|(record, _)| &record.content)
            .collect();
        let layers = || state.layers.values();
        Ok(FsUsage {
            mountpoint: root.clone(),
            used_bytes: layers().map(|layer| layer.bytes).sum::<u64>()
                + content.values().copied().sum::<u64>()
                + database.len(),
            inodes_used: layers().map(|layer| layer.inodes).sum::<u64>() + content.len() as u64 + 1,
            timestamp_ns: now_ns(),
        })
    }

    /// Makes a container's writable layer over an image and leases the image's layers to the container. Asked again
    /// for the same container and image it answers the same.
    ///
    /// `read_only` is kept with the lease; the writable layer exists all the same, because the runtime makes mount
    /// points in it before it turns the root read-only.
    ///
    /// # Errors
    /// [`Error::NotFound`] without the image, [`Error::InUse`] when the container has a snapshot of another image.
    pub async fn prepare(&self, image_id: &str, container_id: &str, read_only: bool) -> Result<Snapshot> {
        crate::snapshot::prepare(&self.inner, image_id, container_id, read_only).await
    }

    /// Removes what [`Self::prepare`] or [`Self::prepare_image_mount`] made under this name; nothing there is a
    /// success. The root file system must be unmounted.
    ///
    /// # Errors
    /// Failures of the file system.
    pub async fn release(&self, container_id: &str) -> Result<()> {
        crate::snapshot::release(&self.inner, container_id).await
    }

    /// The containers that hold a snapshot.
    #[must_use]
    pub fn snapshots(&self) -> Vec<String> {
        let state = self.inner.state();
        let mut ids: Vec<String> = state
            .leases
            .iter()
            .filter(|(_, lease)| !lease.image_mount)
            .map(|(id, _)| id.clone())
            .collect();
        ids.sort();
        ids
    }

    /// The names under which layers are held: containers and image volumes.
    #[must_use]
    pub fn leases(&self) -> Vec<String> {
        let mut keys: Vec<String> = self.inner.state().leases.keys().cloned().collect();
        keys.sort();
        keys
    }

    /// Measures a container's writable layer, unless that was done less than 10 s ago: walking many
    /// layers for each list of statistics would cost more than everything else in it. The answer has the time.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the container has none; failures of the file system.
    pub fn snapshot_usage(&self, container_id: &str) -> Result<SnapshotUsage> {
        {
            let state = self.inner.state();
            if state.leases.get(container_id).map(|lease| lease.image_mount) != Some(false) {
                return Err(Error::NotFound(format!("snapshot of container {container_id}")));
            }
            // A clock that was set back makes no measure recent.
            let recent = |usage: &&SnapshotUsage| {
                (0..USAGE_AGE_NS).contains(&now_ns().saturating_sub(usage.timestamp_ns))
            };
            if let Some(usage) = state.measured.get(container_id).filter(recent) {
                return Ok(usage.clone());
            }
        }
        let (bytes, inodes) =
            layer::disk_usage(&self.inner.config.snapshots.join(container_id).join("upper"))?;
        let usage = SnapshotUsage {
            bytes,
            inodes,
            timestamp_ns: now_ns(),
        };
        let mut state = self.inner.state();
        // It may have been released meanwhile.
        if state.leases.contains_key(container_id) {
            state.measured.insert(container_id.to_owned(), usage.clone());
        }
        Ok(usage)
    }

    /// Reads a regular file of an image, links followed inside the image only; `None` when there is no such file.
    ///
    /// # Errors
    /// [`Error::NotFound`] without the image, [`Error::Hostile`] for a file larger than `limit` bytes.
    pub fn read_file(&self, image_id: &str, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let layers = {
            let state = self.inner.state();
            let image = state
                .find(image_id)
                .ok_or_else(|| Error::NotFound(format!("image {image_id}")))?;
            self.inner.lower_directories(&state, &image.layers)?
        };
        Merged::open(layers.iter().map(PathBuf::as_path))?.read_file(path, limit)
    }

    /// A read-only view of an image for an image volume, leased to `key` until [`Self::release`].
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub async fn prepare_image_mount(&self, image_ref: &str, key: &str) -> Result<Vec<RootfsMount>> {
        crate::snapshot::prepare_image_mount(&self.inner, image_ref, key).await
    }
}

const METADATA: &str = "metadata.redb";

impl State {
    pub(crate) fn find(&self, text: &str) -> Option<Arc<Image>> {
        let by_id = |id: &str| self.images.get(id).map(|(_, image)| image.clone());
        if let Some(image) = by_id(text).or_else(|| by_id(&format!("sha256:{text}"))) {
            return Some(image);
        }
        if let Ok(reference) = Reference::parse(text) {
            let name = reference.to_string();
            let named = |record: &ImageRecord| match reference.pick {
                Pick::Tag(_) => record.tags.contains(&name),
                Pick::Digest(_) => record.digests.contains(&name),
            };
            if let Some((_, image)) = self.images.values().find(|(record, _)| named(record)) {
                return Some(image.clone());
            }
        }
        let start = text.strip_prefix("sha256:").unwrap_or(text);
        if start.is_empty() || !start.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let start = format!("sha256:{start}");
        let mut found = self
            .images
            .range(start.clone()..)
            .take_while(|(id, _)| id.starts_with(&start));
        match (found.next(), found.next()) {
            (Some((_, (_, image))), None) => Some(image.clone()),
            _ => None,
        }
    }

    pub(crate) fn is_live(&self, chain_id: &String) -> bool {
        self.pins.contains_key(chain_id)
            || self.kept.contains(chain_id)
            || self
                .images
                .values()
                .any(|(record, _)| record.layers.contains(chain_id))
            || self.leases.values().any(|lease| lease.layers.contains(chain_id))
    }
}

impl Inner {
    fn open(config: ImagesConfig) -> Result<Self> {
        for path in [&config.root, &config.snapshots] {
            // Overlayfs's options give these characters a meaning.
            if path
                .as_os_str()
                .as_encoded_bytes()
                .iter()
                .any(|byte| b":,\\\"".contains(byte))
            {
                return Err(Error::Config {
                    path: path.display().to_string(),
                    reason: "a directory of images must not contain ':', ',', '\\' or '\"'".into(),
                });
            }
        }
        let pinned = config
            .pinned
            .iter()
            .map(|name| Reference::parse(name).map(|reference| reference.to_string()))
            .collect::<Result<Vec<_>>>()?;
        for name in ["content", "layers", "l", "leases", "empty", "tmp"] {
            make_directory(&config.root.join(name))?;
        }
        make_directory(&config.snapshots)?;
        // Layers hold setuid programs that only containers may run.
        for path in [&config.root, &config.snapshots] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
                .map_err(|error| Error::io(format!("set mode of {}", path.display()), error))?;
        }
        let (metadata, records) = Metadata::open(&config.root.join(METADATA))?;
        clear(&config.root.join("tmp"))?;
        let places = NodePlaces::new(config.max_parallel_downloads);
        let inner = Self {
            pinned,
            state: Mutex::default(),
            changes: tokio::sync::Mutex::default(),
            metadata,
            in_flight: Mutex::default(),
            places,
            next: AtomicU64::new(0),
            config,
        };
        inner.recover(records)?;
        Ok(inner)
    }

    pub(crate) fn image(
        &self,
        state: &State,
        id: &str,
        record: &ImageRecord,
        config: &[u8],
    ) -> Result<Image> {
        let mut bytes = 0;
        for chain_id in &record.layers {
            let layer = state
                .layers
                .get(chain_id)
                .ok_or_else(|| Error::NotFound(format!("layer {chain_id}")))?;
            bytes += layer.bytes;
        }
        Image::new(id, record, config, bytes, &self.pinned)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the number of the next fresh name.
    pub(crate) fn count_from(&self, number: u64) {
        self.next.store(number, Ordering::Relaxed);
    }

    /// A short name no other directory of this store has.
    pub(crate) fn fresh_name(&self) -> String {
        let mut number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut name = Vec::new();
        loop {
            name.push(char::from_digit((number % 36) as u32, 36).unwrap_or('0'));
            number /= 36;
            if number == 0 {
                return name.into_iter().rev().collect();
            }
        }
    }

    pub(crate) fn layer_directory(&self, record: &LayerRecord) -> PathBuf {
        self.config.root.join("layers").join(&record.name).join("fs")
    }

    pub(crate) fn content_path(&self, digest: &Digest) -> PathBuf {
        self.config
            .root
            .join("content")
            .join(format!("{}-{}", digest.algorithm(), digest.hex()))
    }

    /// Directories of the layers that count, the topmost first.
    pub(crate) fn lower_directories(&self, state: &State, layers: &[String]) -> Result<Vec<PathBuf>> {
        let records = self.lower_records(state, layers)?;
        Ok(records
            .into_iter()
            .map(|record| self.layer_directory(record))
            .collect())
    }

    /// Records of the layers that count, the topmost first: none without entries, none below an opaque root.
    pub(crate) fn lower_records<'a>(
        &self,
        state: &'a State,
        layers: &[String],
    ) -> Result<Vec<&'a LayerRecord>> {
        let mut records = Vec::new();
        for chain_id in layers.iter().rev() {
            let record = state
                .layers
                .get(chain_id)
                .ok_or_else(|| Error::NotFound(format!("layer {chain_id}")))?;
            if !record.empty {
                records.push(record);
            }
            if record.opaque_root {
                break;
            }
        }
        Ok(records)
    }

    pub(crate) async fn write(self: &Arc<Self>, changes: Changes) -> Result<()> {
        let inner = self.clone();
        blocking(move || inner.metadata.write(&changes)).await
    }

    /// Removes layers nobody needs. The caller holds `changes`.
    pub(crate) async fn collect_layers(self: &Arc<Self>) -> Result<()> {
        let dead: Vec<(String, LayerRecord)> = {
            let mut state = self.state();
            let ids: Vec<String> = state
                .layers
                .keys()
                .filter(|id| !state.is_live(id))
                .cloned()
                .collect();
            ids.into_iter()
                .filter_map(|id| state.layers.remove_entry(&id))
                .collect()
        };
        if dead.is_empty() {
            return Ok(());
        }
        let delete_layers = dead.iter().map(|(id, _)| id.clone()).collect();
        // Even without their records' deletion on disk the directories may go: the next start drops such records.
        let written = self
            .write(Changes {
                delete_layers,
                ..Changes::default()
            })
            .await;
        let inner = self.clone();
        let removed = blocking(move || {
            let mut result = Ok(());
            for (_, record) in dead {
                let removed = remove_file(&inner.config.root.join("l").join(&record.name))
                    .and_then(|()| remove_tree(&inner.config.root.join("layers").join(&record.name)));
                result = result.and(removed);
            }
            result
        })
        .await;
        written.and(removed)
    }

    /// Removes those of the documents that no image needs. The caller holds `changes`.
    pub(crate) async fn collect_content(
        self: &Arc<Self>,
        candidates: impl IntoIterator<Item = String>,
    ) -> Result<()> {
        let paths: Vec<PathBuf> = {
            let state = self.state();
            let needed = |name: &String| {
                state
                    .images
                    .values()
                    .any(|(record, _)| record.content.contains_key(name))
            };
            let unneeded = candidates.into_iter().filter(|name| !needed(name));
            unneeded
                .filter_map(|name| Digest::parse(&name))
                .map(|digest| self.content_path(&digest))
                .collect()
        };
        blocking(move || paths.iter().try_for_each(|path| remove_file(path))).await
    }
}

fn make_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::io(format!("make directory {}", path.display()), error))
}

pub(crate) fn names_in(directory: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io(format!("list {}", directory.display()), error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

fn clear(directory: &Path) -> Result<()> {
    for name in names_in(directory)? {
        let path = directory.join(name);
        if path.symlink_metadata().is_ok_and(|data| data.is_dir()) {
            remove_tree(&path)?;
        } else {
            remove_file(&path)?;
        }
    }
    Ok(())
}

pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}
