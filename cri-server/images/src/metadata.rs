//! The durable records of images and layers, in a redb file of their own. One transaction per change; what is not
//! in here does not exist, whatever lies in the directories.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::{Deserialize, Serialize};

use crate::error::{Cause, Error, Result};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
const LAYERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("layers");

/// Version of the records; a file of a newer version is refused.
const VERSION: u64 = 1;
/// Bytes of redb's page cache: the records are few and read once.
const CACHE: usize = 256 * 1024;

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// `registry/repository:tag`.
    pub(crate) tags: BTreeSet<String>,
    /// `registry/repository@digest`.
    pub(crate) digests: BTreeSet<String>,
    /// Chain ids, the lowest first.
    pub(crate) layers: Vec<String>,
    /// Digest and size of the kept documents: indexes, manifests, the configuration.
    pub(crate) content: BTreeMap<String, u64>,
}

/// One unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// Name of its directory in `layers`.
    pub(crate) name: String,
    pub(crate) diff_id: String,
    /// On disk.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Lower layers do not count.
    pub(crate) opaque_root: bool,
    /// Has no entries: left out of mounts.
    pub(crate) empty: bool,
}

/// What one transaction changes.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    pub(crate) put_images: Vec<(String, ImageRecord)>,
    pub(crate) delete_images: Vec<String>,
    pub(crate) put_layers: Vec<(String, LayerRecord)>,
    pub(crate) delete_layers: Vec<String>,
}

/// Everything recorded, by image id and by chain id.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Records {
    pub(crate) images: BTreeMap<String, ImageRecord>,
    pub(crate) layers: BTreeMap<String, LayerRecord>,
}

/// The database. After a failed write it is opened anew, because redb refuses everything after an I/O error.
pub(crate) struct Metadata {
    path: PathBuf,
    database: Mutex<Option<Database>>,
}

fn failed<E>(what: &'static str) -> impl Fn(E) -> Error
where
    redb::Error: From<E>,
{
    move |error| match redb::Error::from(error) {
        redb::Error::Io(error) => Error::io("write the image metadata", error),
        error => Error::Metadata {
            what,
            source: Cause::new(error),
        },
    }
}

impl Metadata {
    /// Opens or creates the file and reads all records.
    pub(crate) fn open(path: &Path) -> Result<(Self, Records)> {
        let database = Self::open_database(path)?;
        let records = prepare(&database)?;
        Ok((
            Self {
                path: path.to_owned(),
                database: Mutex::new(Some(database)),
            },
            records,
        ))
    }

    fn open_database(path: &Path) -> Result<Database> {
        Database::builder()
            .set_cache_size(CACHE)
            .create(path)
            .map_err(failed("open the database"))
    }

    /// Makes the changes durable, all or none.
    pub(crate) fn write(&self, changes: &Changes) -> Result<()> {
        let mut slot = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match slot.take() {
            Some(database) => database,
            None => Self::open_database(&self.path)?,
        };
        let result = apply(&database, changes);
        if result.is_ok() {
            *slot = Some(database);
        }
        result
    }
}

/// Reads all records. An empty file gets its tables; otherwise nothing is written, so that a full disk does not
/// keep the store closed.
fn prepare(database: &Database) -> Result<Records> {
    match read(database)? {
        Some(records) => Ok(records),
        None => {
            make_tables(database)?;
            Ok(Records::default())
        }
    }
}

fn read(database: &Database) -> Result<Option<Records>> {
    let transaction = database.begin_read().map_err(failed("begin"))?;
    let meta = match transaction.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        other => other.map_err(failed("open a table"))?,
    };
    let version = meta
        .get("version")
        .map_err(failed("read"))?
        .map(|value| value.value());
    if version != Some(VERSION) {
        return Err(Error::Unsupported(format!(
            "image metadata of version {}; this program writes version {VERSION}: upgrade it or remove the images \
             directory",
            version.unwrap_or(0)
        )));
    }
    let mut records = Records::default();
    let images = transaction.open_table(IMAGES).map_err(failed("open a table"))?;
    for entry in images.iter().map_err(failed("read"))? {
        let (id, record) = entry.map_err(failed("read"))?;
        records
            .images
            .insert(id.value().to_owned(), parse(record.value())?);
    }
    let layers = transaction.open_table(LAYERS).map_err(failed("open a table"))?;
    for entry in layers.iter().map_err(failed("read"))? {
        let (id, record) = entry.map_err(failed("read"))?;
        records
            .layers
            .insert(id.value().to_owned(), parse(record.value())?);
    }
    Ok(Some(records))
}

fn make_tables(database: &Database) -> Result<()> {
    let transaction = database.begin_write().map_err(failed("begin"))?;
    {
        let mut meta = transaction.open_table(META).map_err(failed("open a table"))?;
        meta.insert("version", VERSION).map_err(failed("write"))?;
        transaction.open_table(IMAGES).map_err(failed("open a table"))?;
        transaction.open_table(LAYERS).map_err(failed("open a table"))?;
    }
    transaction.commit().map_err(failed("commit"))
}

fn apply(database: &Database, changes: &Changes) -> Result<()> {
    let transaction = database.begin_write().map_err(failed("begin"))?;
    {
        let mut images = transaction.open_table(IMAGES).map_err(failed("open a table"))?;
        for id in &changes.delete_images {
            images.remove(id.as_str()).map_err(failed("delete"))?;
        }
        for (id, record) in &changes.put_images {
            images
                .insert(id.as_str(), encode(record)?.as_slice())
                .map_err(failed("write"))?;
        }
        let mut layers = transaction.open_table(LAYERS).map_err(failed("open a table"))?;
        for id in &changes.delete_layers {
            layers.remove(id.as_str()).map_err(failed("delete"))?;
        }
        for (id, record) in &changes.put_layers {
            layers
                .insert(id.as_str(), encode(record)?.as_slice())
                .map_err(failed("write"))?;
        }
    }
    transaction.commit().map_err(failed("commit"))
}

fn parse<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::malformed("image metadata record", error))
}

fn encode(record: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(record).map_err(|error| Error::malformed("image metadata record", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_and_a_newer_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.redb");
        let (metadata, records) = Metadata::open(&path).unwrap();
        assert_eq!(records, Records::default());
        let image = ImageRecord {
            tags: ["a:b".to_owned()].into(),
            digests: BTreeSet::new(),
            layers: vec!["c".into()],
            content: [("d".to_owned(), 5)].into(),
        };
        let changes = Changes {
            put_images: vec![("i".into(), image.clone())],
            ..Changes::default()
        };
        metadata.write(&changes).unwrap();
        drop(metadata);
        let (metadata, records) = Metadata::open(&path).unwrap();
        assert_eq!(records.images["i"], image);
        metadata
            .write(&Changes {
                delete_images: vec!["i".into()],
                ..Changes::default()
            })
            .unwrap();
        drop(metadata);
        assert_eq!(Metadata::open(&path).unwrap().1, Records::default());
        {
            let database = Database::open(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction
                .open_table(META)
                .unwrap()
                .insert("version", 99)
                .unwrap();
            transaction.commit().unwrap();
        }
        let error = Metadata::open(&path).err().unwrap().to_string();
        assert!(error.contains("version 99"), "{error}");
    }
}
