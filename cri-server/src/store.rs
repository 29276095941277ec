//! The durable record of what the daemon has begun and what exists: pods and containers, in one redb file.
//!
//! Records are JSON with a version. Writes are queued in the order of the calls and committed by one thread,
//! many at once when they come together, each commit synced; a caller awaits [`Written`] before the side
//! effect that the record announces. A write that fails (a full or failing disk) is told to who waits for it, and
//! is kept: the store is opened anew and writes the latest value of each record as soon as it can, before or with
//! what comes later, so that what was only queued is not lost. A store that was written by a newer, incompatible
//! daemon is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Version of the records that this daemon writes.
const VERSION: u32 = 1;
/// The oldest daemon that can read what this one writes; stored, and compared by whoever opens the file.
const FLOOR: u32 = 1;
/// redb would take up to 1 GiB; the records of a full node are a few MiB.
const CACHE_BYTES: usize = 1 << 20;
/// Pause before what could not be written is tried again where nothing new comes.
const RETRY: Duration = Duration::from_secs(1);

const META: TableDefinition<'_, &str, u32> = TableDefinition::new("meta");
const PODS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("pods");
const CONTAINERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("containers");

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened or read.
    #[error("cannot open the store {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A newer daemon wrote it.
    #[error(
        "the store {path} needs a daemon with record version {floor}, this one has {VERSION}: install the newer daemon, or remove all pods with it first"
    )]
    TooNew {
        /// The file.
        path: PathBuf,
        /// What is needed.
        floor: u32,
    },
    /// A record is not what it should be.
    #[error("record {key} in table {table} of the store cannot be read")]
    Record {
        /// Which table.
        table: &'static str,
        /// Which record.
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A write did not become durable.
    #[error("cannot write to the store: {0}")]
    Write(String),
    /// The thread that writes has ended.
    #[error("the store is closed")]
    Closed,
}

/// The two kinds of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Pod sandboxes, by id.
    Pods,
    /// Containers, by id.
    Containers,
}

impl Table {
    fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        match self {
            Self::Pods => PODS,
            Self::Containers => CONTAINERS,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Containers => "containers",
        }
    }
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    version: u32,
    record: &'a T,
}

#[derive(Deserialize)]
struct OpenedEnvelope<T> {
    #[allow(dead_code, reason = "a later version converts by it")]
    version: u32,
    record: T,
}

/// Records to be written by table and key, the latest value of each; `None` removes.
type Unwritten = BTreeMap<(Table, String), Option<Vec<u8>>>;

struct Write {
    table: Table,
    key: String,
    /// `None` removes.
    value: Option<Vec<u8>>,
    done: oneshot::Sender<Result<(), String>>,
}

/// The open store; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    queue: mpsc::Sender<Write>,
    problem: Arc<Mutex<Option<String>>>,
}

/// A queued write: await it before what depends on it.
#[must_use = "a side effect must wait until its record is durable"]
#[derive(Debug)]
pub struct Written(Result<oneshot::Receiver<Result<(), String>>, StoreError>);

impl Written {
    /// For work whose intent was recorded by who started it.
    pub(crate) fn already() -> Self {
        let (done, written) = oneshot::channel();
        let _ = done.send(Ok(()));
        Self(Ok(written))
    }

    /// The order of the queue is enough for the caller.
    pub(crate) fn queued(self) {}

    /// Waits until the record is durable or could not be made so. For teardown, which goes on without its
    /// intent: the next start finds what is half gone by itself, and the store goes on trying.
    pub(crate) async fn attempted(self) {
        if let Err(error) = self.durable().await {
            tracing::warn!(%error, "going on without a durable record");
        }
    }

    /// Waits until the record is durable.
    ///
    /// # Errors
    /// [`StoreError::Write`] when it did not become so; then it is written later, unless another value comes.
    pub async fn durable(self) -> Result<(), StoreError> {
        match self.0?.await {
            Ok(result) => result.map_err(StoreError::Write),
            Err(_) => Err(StoreError::Closed),
        }
    }
}

/// All records of one kind.
pub type Records<T> = Vec<T>;

impl Store {
    /// Opens or creates the file and reads every record.
    ///
    /// # Errors
    /// See [`StoreError`]. A record that cannot be read fails the opening: starting without it would leak
    /// what it describes.
    pub fn open<P: DeserializeOwned, C: DeserializeOwned>(
        path: &Path,
    ) -> Result<(Self, Records<P>, Records<C>), StoreError> {
        let opened = |source: redb::Error| StoreError::Open {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let database = open_database(path).map_err(opened)?;
        let transaction = database.begin_write().map_err(|e| opened(e.into()))?;
        {
            let mut meta = transaction.open_table(META).map_err(|e| opened(e.into()))?;
            let floor = meta
                .get("floor")
                .map_err(|e| opened(e.into()))?
                .map(|value| value.value());
            if let Some(floor) = floor.filter(|floor| *floor > VERSION) {
                return Err(StoreError::TooNew {
                    path: path.to_owned(),
                    floor,
                });
            }
            meta.insert("floor", FLOOR).map_err(|e| opened(e.into()))?;
            transaction.open_table(PODS).map_err(|e| opened(e.into()))?;
            transaction.open_table(CONTAINERS).map_err(|e| opened(e.into()))?;
        }
        transaction.commit().map_err(|e| opened(e.into()))?;
        let pods = read_all(&database, Table::Pods, &opened)?;
        let containers = read_all(&database, Table::Containers, &opened)?;
        let (queue, writes) = mpsc::channel();
        let problem = Arc::default();
        let writer = Writer {
            path: path.to_owned(),
            database: Some(database),
            unwritten: Unwritten::new(),
            problem: Arc::clone(&problem),
        };
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(&writes))
            .map_err(|e| opened(redb::Error::Io(e)))?;
        Ok((Self { queue, problem }, pods, containers))
    }

    /// Why records cannot be written at present; `None` where they can.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Queues a record.
    pub fn put<T: Serialize>(&self, table: Table, key: &str, record: &T) -> Written {
        match serde_json::to_vec(&Envelope {
            version: VERSION,
            record,
        }) {
            Ok(value) => self.queue(table, key, Some(value)),
            Err(error) => Written(Err(StoreError::Write(error.to_string()))),
        }
    }

    /// Queues a record's removal.
    pub fn remove(&self, table: Table, key: &str) -> Written {
        self.queue(table, key, None)
    }

    fn queue(&self, table: Table, key: &str, value: Option<Vec<u8>>) -> Written {
        let (done, written) = oneshot::channel();
        match self.queue.send(Write {
            table,
            key: key.to_owned(),
            value,
            done,
        }) {
            Ok(()) => Written(Ok(written)),
            Err(_) => Written(Err(StoreError::Closed)),
        }
    }
}

fn read_all<T: DeserializeOwned>(
    database: &Database,
    table: Table,
    opened: &dyn Fn(redb::Error) -> StoreError,
) -> Result<Vec<T>, StoreError> {
    let transaction = database.begin_read().map_err(|e| opened(e.into()))?;
    let open = transaction
        .open_table(table.definition())
        .map_err(|e| opened(e.into()))?;
    let mut records = Vec::new();
    for entry in open.iter().map_err(|e| opened(e.into()))? {
        let (key, value) = entry.map_err(|e| opened(e.into()))?;
        let envelope: OpenedEnvelope<T> =
            serde_json::from_slice(value.value()).map_err(|source| StoreError::Record {
                table: table.name(),
                key: key.value().to_owned(),
                source,
            })?;
        records.push(envelope.record);
    }
    Ok(records)
}

/// The writing thread: takes what has come in, commits it together with what is left from before, answers each.
struct Writer {
    path: PathBuf,
    /// `None` after a failed write: redb refuses everything after an I/O error, so the file is opened anew.
    database: Option<Database>,
    unwritten: Unwritten,
    problem: Arc<Mutex<Option<String>>>,
}

impl Writer {
    fn run(mut self, writes: &mpsc::Receiver<Write>) {
        loop {
            let first = if self.unwritten.is_empty() {
                writes.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                writes.recv_timeout(RETRY)
            };
            let batch: Vec<Write> = match first {
                Ok(first) => std::iter::once(first).chain(writes.try_iter()).collect(),
                Err(RecvTimeoutError::Timeout) => Vec::new(),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let mut waiting = Vec::with_capacity(batch.len());
            for write in batch {
                self.unwritten.insert((write.table, write.key), write.value);
                waiting.push(write.done);
            }
            let result = self.write();
            for done in waiting {
                // A caller that has gone needs no answer.
                let _ = done.send(result.clone());
            }
        }
        if !self.unwritten.is_empty() {
            // Said in the log; the next start takes what is recorded for what is.
            let _ = self.write();
        }
    }

    fn write(&mut self) -> Result<(), String> {
        let result = self.commit();
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => {
                self.unwritten.clear();
                if problem.take().is_some() {
                    tracing::info!(path = %self.path.display(), "records can be written again");
                }
                Ok(())
            }
            Err(error) => {
                let error = error.to_string();
                if problem.is_none() {
                    let (path, records) = (self.path.display(), self.unwritten.len());
                    tracing::error!(%path, %error, records, "records cannot be written; trying on");
                }
                *problem = Some(format!(
                    "the store {} cannot be written: {error}; free space on its file system, or replace the disk",
                    self.path.display()
                ));
                Err(error)
            }
        }
    }

    fn commit(&mut self) -> Result<(), redb::Error> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open_database(&self.path)?,
        };
        commit(&database, &self.unwritten)?;
        self.database = Some(database);
        Ok(())
    }
}

fn open_database(path: &Path) -> Result<Database, redb::Error> {
    Ok(Database::builder().set_cache_size(CACHE_BYTES).create(path)?)
}

fn commit(database: &Database, records: &Unwritten) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut pods = transaction.open_table(PODS)?;
        let mut containers = transaction.open_table(CONTAINERS)?;
        for ((table, key), value) in records {
            let table = match table {
                Table::Pods => &mut pods,
                Table::Containers => &mut containers,
            };
            match value {
                Some(value) => {
                    table.insert(key.as_str(), value.as_slice())?;
                }
                None => {
                    table.remove(key.as_str())?;
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Numbers = (Store, Vec<u32>, Vec<u32>);

    /// Opens again once the former store's thread has let go of the file.
    fn reopen(path: &Path) -> Result<Numbers, StoreError> {
        for _ in 0..200 {
            match Store::open::<u32, u32>(path) {
                Err(StoreError::Open { source, .. })
                    if matches!(*source, redb::Error::DatabaseAlreadyOpen) =>
                {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                other => return other,
            }
        }
        panic!("the store stayed open");
    }

    #[tokio::test]
    async fn records_are_read_back_in_the_last_version_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let (store, pods, containers) = Store::open::<u32, u32>(&path).unwrap();
        assert!(pods.is_empty() && containers.is_empty());
        let first = store.put(Table::Pods, "a", &1u32);
        let second = store.put(Table::Pods, "a", &2u32);
        let other = store.put(Table::Containers, "c", &7u32);
        let gone = store.put(Table::Containers, "d", &8u32);
        store.remove(Table::Containers, "d").durable().await.unwrap();
        for written in [first, second, other, gone] {
            written.durable().await.unwrap();
        }
        drop(store);
        let (_store, pods, containers) = reopen(&path).unwrap();
        assert_eq!((pods, containers), (vec![2], vec![7]));
    }

    #[test]
    fn a_store_of_a_newer_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        {
            let database = Database::create(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction
                .open_table(META)
                .unwrap()
                .insert("floor", VERSION + 1)
                .unwrap();
            transaction.commit().unwrap();
        }
        let error = Store::open::<u32, u32>(&path).unwrap_err();
        assert!(
            matches!(error, StoreError::TooNew { floor, .. } if floor == VERSION + 1),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let (store, ..) = Store::open::<u32, u32>(&path).unwrap();
        store.put(Table::Pods, "broken", &"text").durable().await.unwrap();
        drop(store);
        let error = reopen(&path).unwrap_err();
        assert!(
            error.to_string().contains("record broken in table pods"),
            "{error}"
        );
    }

    /// A file system of 4 MiB at a directory, until dropped.
    struct SmallDisk(tempfile::TempDir);

    impl SmallDisk {
        fn mount() -> Self {
            use rustix::mount::{MountFlags, mount};
            let dir = tempfile::tempdir().unwrap();
            mount(
                "tmpfs",
                dir.path(),
                "tmpfs",
                MountFlags::empty(),
                Some(c"size=4m"),
            )
            .unwrap();
            Self(dir)
        }

        fn filler(&self) -> PathBuf {
            self.0.path().join("filler")
        }

        fn fill(&self) {
            use std::io::Write as _;
            let mut file = std::fs::File::create(self.filler()).unwrap();
            for chunk in [vec![0u8; 1 << 16], vec![0u8; 1]] {
                while file.write_all(&chunk).is_ok() {}
            }
        }
    }

    impl Drop for SmallDisk {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
        }
    }

    #[tokio::test]
    async fn what_a_full_disk_refuses_is_told_and_written_when_there_is_room() {
        let disk = SmallDisk::mount();
        let path = disk.0.path().join("state.redb");
        let (store, ..) = Store::open::<String, String>(&path).unwrap();
        store.put(Table::Pods, "before", &"x").durable().await.unwrap();
        disk.fill();
        // Larger than what the file has left of its own.
        let large = "y".repeat(3 << 19);
        let refused = store.put(Table::Pods, "pod", &large).durable().await;
        assert!(matches!(refused, Err(StoreError::Write(_))), "{refused:?}");
        assert!(store.problem().unwrap().contains("state.redb"));
        // Nobody waits for these; the last value of a record is the one that counts.
        store.put(Table::Containers, "queued", &"first").queued();
        store.put(Table::Containers, "queued", &"last").queued();
        store.put(Table::Pods, "pod", &"small").queued();
        store.remove(Table::Pods, "before").queued();
        std::fs::remove_file(disk.filler()).unwrap();
        for _ in 0..100 {
            if store.problem().is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(store.problem(), None);
        store
            .put(Table::Containers, "after", &"z")
            .durable()
            .await
            .unwrap();
        drop(store);
        for _ in 0..200 {
            match Store::open::<String, String>(&path) {
                Err(StoreError::Open { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
                opened => {
                    let (_store, pods, mut containers) = opened.unwrap();
                    containers.sort();
                    assert_eq!(pods, ["small"]);
                    assert_eq!(containers, ["last", "z"]);
                    return;
                }
            }
        }
        panic!("the store stayed open");
    }
}
