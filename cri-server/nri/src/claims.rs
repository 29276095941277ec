//! Who set what: a field, or a key of a field, of a container belongs to the first plugin that sets it. A plugin
//! that removes what another has set may set it anew.

use std::collections::BTreeMap;

use crate::api::{self, Field};
use crate::error::Error;

#[derive(Debug, Clone)]
struct Owner {
    plugin: String,
    cleared: bool,
}

/// The claims of one request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Claims {
    owners: BTreeMap<(String, i32, String), Owner>,
}

impl Claims {
    /// Claims `field` (its `key`, where it has keys; else empty) of `container` for `plugin`.
    ///
    /// # Errors
    /// [`Error::Conflict`].
    pub(crate) fn claim(
        &mut self,
        container: &str,
        field: Field,
        key: &str,
        plugin: &str,
    ) -> Result<(), Error> {
        let at = (container.to_owned(), field as i32, key.to_owned());
        if let Some(owner) = self.owners.get(&at)
            && !(owner.cleared && owner.plugin == plugin)
        {
            let name = field.as_str_name();
            return Err(Error::Conflict {
                first: owner.plugin.clone(),
                second: plugin.to_owned(),
                field: if key.is_empty() {
                    name.to_owned()
                } else {
                    format!("{name} {key}")
                },
                container: container.to_owned(),
            });
        }
        let plugin = plugin.to_owned();
        self.owners.insert(
            at,
            Owner {
                plugin,
                cleared: false,
            },
        );
        Ok(())
    }

    /// Several plugins add to it.
    pub(crate) fn share(&mut self, container: &str, field: Field, plugin: &str) {
        let at = (container.to_owned(), field as i32, String::new());
        let owner = self.owners.entry(at).or_insert(Owner {
            plugin: String::new(),
            cleared: false,
        });
        if !owner.plugin.is_empty() {
            owner.plugin.push(',');
        }
        owner.plugin.push_str(plugin);
    }

    /// `plugin` removes what another may have set.
    pub(crate) fn clear(&mut self, container: &str, field: Field, key: &str, plugin: &str) {
        let at = (container.to_owned(), field as i32, key.to_owned());
        if let Some(owner) = self.owners.get_mut(&at) {
            *owner = Owner {
                plugin: plugin.to_owned(),
                cleared: true,
            };
        }
    }

    /// As validating plugins are told.
    pub(crate) fn message(&self) -> api::OwningPlugins {
        let mut all = api::OwningPlugins::default();
        for ((container, field, key), owner) in self.owners.iter().filter(|(_, owner)| !owner.cleared) {
            let fields = all.owners.entry(container.clone()).or_default();
            if key.is_empty() {
                fields.simple.insert(*field, owner.plugin.clone());
            } else {
                let keys = fields.compound.entry(*field).or_default();
                keys.owners.insert(key.clone(), owner.plugin.clone());
            }
        }
        all
    }
}
