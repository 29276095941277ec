//! The durable records of attachments, two files for each sandbox in the cache directory:
//! `<id>.intent`, written before the first ADD: the pod, the chain, where its plugins
//! are; `<id>.result`, written after the last ADD. DEL removes both, the intent last.
//!
//! While ADD runs, the intent's file is locked, and the plugins inherit the lock. They outlive a daemon that is
//! killed; whoever undoes the ADD later must not do so while one is still at it.
//!
//! An intent without a result is an ADD that was interrupted, or whose result a power failure took: DEL then
//! runs without `prevResult`, as the spec allows.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::conflist::{ConfList, checked_id, good_name};
use crate::error::{NetworkError, Result};
use crate::holders;
use crate::pod::PodNetwork;

/// Version of [`Intent`]; others are refused.
const VERSION: u32 = 1;
const RESULT_END: &str = ".result";
const INTENT_END: &str = ".intent";

/// For how long a killed plugin may take to end.
const KILLED: Duration = Duration::from_secs(5);

/// What DEL needs that ADD had.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Intent {
    version: u32,
    pub(crate) pod: PodNetwork,
    pub(crate) list: ConfList,
    pub(crate) bin_dirs: Vec<PathBuf>,
}

impl Intent {
    pub(crate) fn new(pod: PodNetwork, list: ConfList, bin_dirs: Vec<PathBuf>) -> Self {
        Self {
            version: VERSION,
            pod,
            list,
            bin_dirs,
        }
    }
}

/// Ids that have an intent. Unfinished temporary files are not among them.
pub(crate) fn list(cache_dir: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(cache_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetworkError::io("read", cache_dir)(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(NetworkError::io("read", cache_dir))?.file_name();
        ids.extend(
            name.to_str()
                .and_then(|name| name.strip_suffix(INTENT_END))
                .map(str::to_owned),
        );
    }
    ids.retain(|id| good_name(id));
    ids.sort();
    Ok(ids)
}

/// Stores the intent. With `sync` it is on disk when this returns; without, a power failure may take it, or
/// leave it empty, which costs milliseconds less and is enough where the failure takes ADD's effects too.
pub(crate) async fn begin(cache_dir: &Path, intent: &Intent, sync: bool) -> Result<()> {
    let path = intent_path(cache_dir, &intent.pod.id)?;
    let bytes = to_bytes(intent, &path)?;
    let dir = cache_dir.to_owned();
    off_runtime(move || {
        std::fs::create_dir_all(&dir).map_err(NetworkError::io("create", &dir))?;
        replace(&path, &bytes, sync)?;
        if !sync {
            return Ok(());
        }
        File::open(&dir)
            .and_then(|dir| dir.sync_all())
            .map_err(NetworkError::io("sync", &dir))
    })
    .await
}

/// Locks the intent for an ADD; the lock lasts until this file and the plugins' copies are closed.
pub(crate) fn lock(cache_dir: &Path, id: &str) -> Result<File> {
    let path = intent_path(cache_dir, id)?;
    let file = File::open(&path).map_err(NetworkError::io("open", &path))?;
    file.lock().map_err(NetworkError::io("lock", path))?;
    Ok(file)
}

/// Waits for the plugins of an interrupted ADD, at most for `limit`: one that takes longer would have been
/// killed, and is now.
///
/// # Errors
/// [`NetworkError::Unkillable`] where one does not even die by that.
pub(crate) async fn wait_for_add(cache_dir: &Path, id: &str, limit: Duration) -> Result<()> {
    let path = intent_path(cache_dir, id)?;
    let file = File::open(&path).map_err(NetworkError::io("open", &path))?;
    if locked_within(&file, limit)
        .await
        .map_err(NetworkError::io("lock", &path))?
    {
        return Ok(());
    }
    let (file, holders) = off_runtime(move || {
        let holders = holders::kill(&file).map_err(NetworkError::io("find the holders of", &path))?;
        Ok((file, holders))
    })
    .await?;
    let processes: Vec<String> = holders.iter().map(ToString::to_string).collect();
    let processes = processes.join(", ");
    tracing::warn!(
        sandbox = id,
        processes,
        "a plugin of an interrupted ADD hangs and is killed"
    );
    let ended = locked_within(&file, KILLED).await;
    if ended.map_err(NetworkError::io("lock", intent_path(cache_dir, id)?))? {
        return Ok(());
    }
    Err(NetworkError::Unkillable {
        id: id.to_owned(),
        processes,
    })
}

/// Whether the file could be locked within `limit`.
async fn locked_within(file: &File, limit: Duration) -> std::io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => return Ok(false),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Stores the result. Not synced: without it DEL still works, see the head of this file.
pub(crate) async fn complete(cache_dir: &Path, id: &str, result: &Value) -> Result<()> {
    let path = result_path(cache_dir, id)?;
    let bytes = to_bytes(result, &path)?;
    off_runtime(move || replace(&path, &bytes, false)).await
}

/// The intent; `None` where the sandbox has no record, or one that a power failure left empty.
pub(crate) fn intent(cache_dir: &Path, id: &str) -> Result<Option<Intent>> {
    let path = intent_path(cache_dir, id)?;
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(NetworkError::io("read", path)(error)),
    };
    if bytes.is_empty() {
        return Ok(None);
    }
    let intent: Intent = serde_json::from_slice(&bytes).map_err(|error| NetworkError::Record {
        path: path.clone(),
        reason: error.to_string(),
    })?;
    if intent.version != VERSION {
        let reason = format!("version {}, this daemon knows {VERSION}", intent.version);
        return Err(NetworkError::Record { path, reason });
    }
    Ok(Some(intent))
}

/// The result of ADD; `None` where there is none or where it is damaged.
pub(crate) fn result(cache_dir: &Path, id: &str) -> Result<Option<Value>> {
    let path = result_path(cache_dir, id)?;
    match std::fs::read(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(result) => Ok(Some(result)),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "damaged result of a network attachment left aside");
                Ok(None)
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(NetworkError::io("read", path)(error)),
    }
}

/// Forgets the sandbox. Idempotent.
pub(crate) fn forget(cache_dir: &Path, id: &str) -> Result<()> {
    for path in [result_path(cache_dir, id)?, intent_path(cache_dir, id)?] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(NetworkError::io("remove", path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn intent_path(cache_dir: &Path, id: &str) -> Result<PathBuf> {
    Ok(cache_dir.join(format!("{}{INTENT_END}", checked_id(id)?)))
}

fn result_path(cache_dir: &Path, id: &str) -> Result<PathBuf> {
    Ok(cache_dir.join(format!("{}{RESULT_END}", checked_id(id)?)))
}

fn to_bytes(value: &impl Serialize, path: &Path) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| NetworkError::io("encode", path)(error.into()))
}

/// Writes beside and renames, so that a reader sees the old content or the new.
fn replace(path: &Path, bytes: &[u8], sync: bool) -> Result<()> {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside).map_err(NetworkError::io("create", &beside))?;
    file.write_all(bytes)
        .map_err(NetworkError::io("write", &beside))?;
    if sync {
        file.sync_data().map_err(NetworkError::io("sync", &beside))?;
    }
    std::fs::rename(&beside, path).map_err(NetworkError::io("rename", beside))
}

/// Syncing can take tens of milliseconds, which would hold up everything else on the runtime.
async fn off_runtime<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn an_intent(id: &str) -> Intent {
        let list = crate::conflist::parse(br#"{"cniVersion":"1.0.0","name":"n","type":"a"}"#).unwrap();
        let pod = PodNetwork {
            id: id.to_owned(),
            ..PodNetwork::default()
        };
        Intent::new(pod, list, vec!["/bin".into()])
    }

    #[tokio::test]
    async fn records_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cni");
        assert!(list(&cache).unwrap().is_empty());
        begin(&cache, &an_intent("a.result"), true).await.unwrap();
        begin(&cache, &an_intent("b"), false).await.unwrap();
        complete(&cache, "b", &json!({"x": 1})).await.unwrap();
        std::fs::write(cache.join("c.new"), "half").unwrap();
        let listed = list(&cache).unwrap();
        assert_eq!(listed, ["a.result", "b"]);
        assert_eq!(intent(&cache, "b").unwrap().unwrap().pod.id, "b");
        assert_eq!(result(&cache, "b").unwrap(), Some(json!({"x": 1})));
        assert!(intent(&cache, "c").unwrap().is_none());
        forget(&cache, "b").unwrap();
        forget(&cache, "b").unwrap();
        assert_eq!(list(&cache).unwrap(), ["a.result"]);
    }

    #[tokio::test]
    async fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &an_intent("a"), true).await.unwrap();
        std::fs::write(dir.path().join("a.result"), "{").unwrap();
        assert_eq!(result(dir.path(), "a").unwrap(), None);
        std::fs::write(dir.path().join("a.intent"), "{").unwrap();
        let error = intent(dir.path(), "a").unwrap_err().to_string();
        assert!(error.contains("a.intent"), "{error}");
        assert!(intent(dir.path(), "../a").is_err());
    }
}
