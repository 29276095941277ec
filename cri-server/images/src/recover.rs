//! What a start makes of the records and directories a former process left: complete things are taken over, the
//! rest is removed.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::metadata::{Changes, ImageRecord, Records};
use crate::store::{Inner, State, names_in, remove_file, remove_tree};

impl Inner {
    /// Takes over what is complete and removes the rest.
    pub(crate) fn recover(&self, records: Records) -> Result<()> {
        let mut changes = Changes::default();
        let mut state = self.state();
        let mut highest = 0;
        for (chain_id, record) in records.layers {
            highest = highest.max(u64::from_str_radix(&record.name, 36).unwrap_or(0));
            if self.layer_directory(&record).is_dir() {
                state.layers.insert(chain_id, record);
            } else {
                tracing::warn!(%chain_id, "layer is recorded and its directory is gone");
                changes.delete_layers.push(chain_id);
            }
        }
        self.count_from(highest + 1);
        for (id, record) in records.images {
            match self.load_image(&state, &id, &record) {
                Ok(image) => drop(state.images.insert(id, (record, Arc::new(image)))),
                Err(error) => {
                    tracing::warn!(%id, %error, "image is incomplete and dropped");
                    changes.delete_images.push(id);
                }
            }
        }
        state.leases = crate::snapshot::recover(&self.config)?;
        let dead: Vec<String> = state
            .layers
            .keys()
            .filter(|id| !state.is_live(id))
            .cloned()
            .collect();
        for chain_id in dead {
            state.layers.remove(&chain_id);
            changes.delete_layers.push(chain_id);
        }
        if !changes.delete_images.is_empty() || !changes.delete_layers.is_empty() {
            match self.metadata.write(&changes) {
                // The next start drops them again; what is removed below may make the room.
                Err(error @ Error::NoSpace { .. }) => tracing::warn!(%error, "stale image records stay"),
                other => other?,
            }
        }
        let names: BTreeSet<&str> = state.layers.values().map(|record| record.name.as_str()).collect();
        for name in names_in(&self.config.root.join("layers"))? {
            if !names.contains(name.as_str()) {
                remove_tree(&self.config.root.join("layers").join(&name))?;
            }
        }
        for name in names_in(&self.config.root.join("l"))? {
            if !names.contains(name.as_str()) {
                remove_file(&self.config.root.join("l").join(&name))?;
            }
        }
        let content: BTreeSet<&String> = state
            .images
            .values()
            .flat_map(|(record, _)| record.content.keys())
            .collect();
        for name in names_in(&self.config.root.join("content"))? {
            if !content.contains(&name.replacen('-', ":", 1)) {
                remove_file(&self.config.root.join("content").join(&name))?;
            }
        }
        Ok(())
    }

    /// Builds an image from its record; every part must be there.
    fn load_image(&self, state: &State, id: &str, record: &ImageRecord) -> Result<Image> {
        let digest = Digest::parse(id).ok_or_else(|| Error::NotFound(format!("image {id:?}")))?;
        let path = self.content_path(&digest);
        let config =
            std::fs::read(&path).map_err(|error| Error::io(format!("read {}", path.display()), error))?;
        let actual = digest.of_same_kind(&config);
        if actual != digest {
            return Err(Error::DigestMismatch {
                what: "image configuration".into(),
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        self.image(state, id, record, &config)
    }
}
