//! Root file systems of containers and read-only views of images, and the leases that keep their layers.
//!
//! A lease is the file `lease` in the directory it protects; the directory is made aside and renamed, so both exist
//! or neither. It needs no sync: after a loss of power no container lives that could need its layers.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Uid};
use serde::{Deserialize, Serialize};

use crate::config::{ImagesConfig, RootfsMount, Snapshot};
use crate::error::{Error, Result};
use crate::store::{Inner, State, blocking, names_in, remove_tree};

const LEASE: &str = "lease";
/// mount(2) copies one page of options; the terminating zero byte counts.
const MAX_OPTIONS: usize = 4095;

/// A hold on layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) image: String,
    /// Chain ids, the lowest first.
    pub(crate) layers: Vec<String>,
    pub(crate) read_only: bool,
    /// Held for an image volume, not for a container.
    pub(crate) image_mount: bool,
}

impl Lease {
    fn directory(&self, config: &ImagesConfig, key: &str) -> PathBuf {
        if self.image_mount {
            config.root.join("leases").join(key)
        } else {
            config.snapshots.join(key)
        }
    }
}

pub(crate) async fn prepare(
    inner: &Arc<Inner>,
    image: &str,
    container: &str,
    read_only: bool,
) -> Result<Snapshot> {
    let (lease, lower) = acquire(inner, image, container, read_only, false)?;
    let directory = lease.directory(&inner.config, container);
    let upper = directory.join("upper");
    let work = directory.join("work");
    let tail = format!(",upperdir={},workdir={}", upper.display(), work.display());
    let worker = inner.clone();
    let key = container.to_owned();
    let prepared = blocking(move || {
        let lowerdir = lowerdir_option(&worker, &lower, tail.len())?;
        make(&worker, &key, &lease, lower.first())?;
        Ok(lowerdir)
    })
    .await;
    match prepared {
        Ok(lowerdir) => {
            let mut options = overlay_options();
            options.extend([
                lowerdir,
                format!("upperdir={}", upper.display()),
                format!("workdir={}", work.display()),
            ]);
            Ok(Snapshot {
                mounts: vec![overlay(options)],
                upper,
            })
        }
        Err(error) => Err(undo(inner, container, error).await),
    }
}

pub(crate) async fn prepare_image_mount(
    inner: &Arc<Inner>,
    image: &str,
    key: &str,
) -> Result<Vec<RootfsMount>> {
    let (lease, lower) = acquire(inner, image, key, true, true)?;
    let worker = inner.clone();
    let name = key.to_owned();
    let prepared = blocking(move || {
        let mount = match lower.as_slice() {
            // An overlay without a writable layer needs two lower ones.
            [] => read_only_bind(&worker.config.root.join("empty")),
            [only] => read_only_bind(only),
            _ => {
                let mut options = overlay_options();
                options.push("ro".to_owned());
                options.push(lowerdir_option(&worker, &lower, 0)?);
                overlay(options)
            }
        };
        make(&worker, &name, &lease, None)?;
        Ok(vec![mount])
    })
    .await;
    match prepared {
        Ok(mounts) => Ok(mounts),
        Err(error) => Err(undo(inner, key, error).await),
    }
}

/// Takes the lease in memory, so that the layers stay from here on.
fn acquire(
    inner: &Inner,
    image: &str,
    key: &str,
    read_only: bool,
    image_mount: bool,
) -> Result<(Lease, Vec<PathBuf>)> {
    check_key(key)?;
    let mut state = inner.state();
    let image = find(&state, image)?;
    let lower = inner.lower_directories(&state, &image.layers)?;
    let lease = Lease {
        image: image.id.clone(),
        layers: image.layers.clone(),
        read_only,
        image_mount,
    };
    if let Some(existing) = state.leases.get(key) {
        if existing.image != lease.image || existing.image_mount != image_mount {
            return Err(Error::InUse {
                container: key.to_owned(),
                image: existing.image.clone(),
            });
        }
        return Ok((existing.clone(), lower));
    }
    state.leases.insert(key.to_owned(), lease.clone());
    Ok((lease, lower))
}

fn find(state: &State, image: &str) -> Result<Arc<crate::image::Image>> {
    state
        .find(image)
        .ok_or_else(|| Error::NotFound(format!("image {image}")))
}

/// A key becomes a directory's name.
fn check_key(key: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if (1..=200).contains(&key.len()) && !key.starts_with('.') && key.bytes().all(good) {
        return Ok(());
    }
    Err(Error::Internal(format!(
        "{:?} cannot name a snapshot",
        key.chars().take(80).collect::<String>()
    )))
}

async fn undo(inner: &Arc<Inner>, key: &str, error: Error) -> Error {
    if let Err(undo) = release(inner, key).await {
        tracing::warn!(%key, %undo, "snapshot that failed cannot be removed");
    }
    error
}

/// Makes the directory of a lease; one that exists is the same lease's.
fn make(inner: &Inner, key: &str, lease: &Lease, top: Option<&PathBuf>) -> Result<()> {
    let directory = lease.directory(&inner.config, key);
    if directory.join(LEASE).exists() {
        return Ok(());
    }
    let parent = directory.parent().unwrap_or(Path::new("/"));
    let aside = parent.join(format!(".new-{}-{}", inner.fresh_name(), key));
    let made = (|| {
        let failed = |error: std::io::Error| Error::io(format!("make snapshot {}", aside.display()), error);
        std::fs::create_dir(&aside).map_err(failed)?;
        if !lease.image_mount {
            std::fs::create_dir(aside.join("work")).map_err(failed)?;
            make_upper(&aside.join("upper"), top).map_err(failed)?;
        }
        let text = serde_json::to_vec(lease).map_err(|error| Error::malformed("lease", error))?;
        std::fs::write(aside.join(LEASE), text).map_err(failed)?;
        std::fs::rename(&aside, &directory).map_err(failed)
    })();
    if made.is_err()
        && let Err(error) = remove_tree(&aside)
    {
        tracing::warn!(%error, "half made snapshot cannot be removed");
    }
    made
}

/// The root directory of an overlay is the writable layer's: it gets the owner and mode of the image's.
fn make_upper(upper: &Path, top: Option<&PathBuf>) -> std::io::Result<()> {
    std::fs::create_dir(upper)?;
    let (mut mode, mut owner) = (0o755, (0, 0));
    if let Some(top) = top {
        let stat = rustix::fs::statat(CWD, top, AtFlags::SYMLINK_NOFOLLOW)?;
        mode = stat.st_mode & 0o7777;
        owner = (stat.st_uid, stat.st_gid);
    }
    rustix::fs::chown(upper, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))?;
    Ok(rustix::fs::chmod(upper, Mode::from_raw_mode(mode))?)
}

pub(crate) async fn release(inner: &Arc<Inner>, key: &str) -> Result<()> {
    let Some(lease) = inner.state().leases.get(key).cloned() else {
        return Ok(());
    };
    let directory = lease.directory(&inner.config, key);
    let name = format!(".gone-{}-{key}", inner.fresh_name());
    let gone = directory.parent().unwrap_or(Path::new("/")).join(name);
    let removed = {
        let gone = gone.clone();
        blocking(move || match std::fs::rename(&directory, &gone) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(
                format!("remove snapshot {}", directory.display()),
                error,
            )),
            _ => Ok(()),
        })
        .await
    };
    removed?;
    // From here on the lease is gone for a restart too.
    let last_use = {
        let mut state = inner.state();
        state.leases.remove(key);
        state.measured.remove(key);
        lease.layers.iter().any(|chain_id| !state.is_live(chain_id))
    };
    let cleared = blocking(move || remove_tree(&gone)).await;
    if !last_use {
        return cleared;
    }
    let _changes = inner.changes.lock().await;
    inner.collect_layers().await.and(cleared)
}

/// Reads the leases that a former process left, and removes what it had half made or half removed.
pub(crate) fn recover(config: &ImagesConfig) -> Result<HashMap<String, Lease>> {
    let mut leases = HashMap::new();
    for directory in [config.snapshots.clone(), config.root.join("leases")] {
        for name in names_in(&directory)? {
            let path = directory.join(&name);
            if name.starts_with(".new-") || name.starts_with(".gone-") {
                remove_tree(&path)?;
                continue;
            }
            let file = path.join(LEASE);
            let lease =
                std::fs::read(&file).map_err(|error| Error::io(format!("read {}", file.display()), error));
            let lease = lease.and_then(|bytes| {
                serde_json::from_slice::<Lease>(&bytes).map_err(|error| Error::malformed("lease", error))
            });
            match lease {
                Ok(lease) => drop(leases.insert(name, lease)),
                // A loss of power may have taken it; the container of this name is not alive then.
                Err(error) => {
                    tracing::warn!(snapshot = %name, %error, "snapshot without a lease");
                    let image_mount = directory != config.snapshots;
                    let lease = Lease {
                        image: String::new(),
                        layers: Vec::new(),
                        read_only: false,
                        image_mount,
                    };
                    leases.insert(name, lease);
                }
            }
        }
    }
    Ok(leases)
}

fn overlay(options: Vec<String>) -> RootfsMount {
    RootfsMount {
        fs_type: "overlay".into(),
        source: "overlay".into(),
        target: String::new(),
        options,
    }
}

fn read_only_bind(source: &Path) -> RootfsMount {
    RootfsMount {
        fs_type: "bind".into(),
        source: source.display().to_string(),
        target: String::new(),
        options: vec!["rbind".into(), "ro".into()],
    }
}

/// `index=off` where the kernel has the feature: a mount that leaked into another mount namespace must not make the
/// next mount of the same writable layer fail.
fn overlay_options() -> Vec<String> {
    if Path::new("/sys/module/overlay/parameters/index").exists() {
        vec!["index=off".into()]
    } else {
        Vec::new()
    }
}

/// The layers' option. Where the plain directories do not fit into a page, short links to them do.
fn lowerdir_option(inner: &Inner, lower: &[PathBuf], others: usize) -> Result<String> {
    let none = [inner.config.root.join("empty")];
    let lower = if lower.is_empty() { &none } else { lower };
    let join = |paths: &[PathBuf]| {
        let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        format!("lowerdir={}", paths.join(":"))
    };
    // Room for the options that the mounter may add ("index=off,", "ro,").
    let room = MAX_OPTIONS - others - 32;
    let plain = join(lower);
    if plain.len() <= room {
        return Ok(plain);
    }
    let links: Vec<PathBuf> = lower
        .iter()
        .map(|path| link(inner, path))
        .collect::<Result<_>>()?;
    let short = join(&links);
    if short.len() <= room {
        return Ok(short);
    }
    Err(Error::Unsupported(format!(
        "{} layers do not fit into the mount options of overlayfs; use a shorter root directory than {}",
        lower.len(),
        inner.config.root.display()
    )))
}

/// `l/<name>` to `layers/<name>/fs`.
fn link(inner: &Inner, layer: &Path) -> Result<PathBuf> {
    let name = layer.parent().and_then(Path::file_name).unwrap_or(OsStr::new(""));
    let link = inner.config.root.join("l").join(name);
    let target = Path::new("..").join("layers").join(name).join("fs");
    match std::os::unix::fs::symlink(target, &link) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::io(format!("link {}", link.display()), error))
        }
        _ => Ok(link),
    }
}
