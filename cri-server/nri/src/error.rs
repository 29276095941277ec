//! Why plugins made a request fail.

use crate::connection::CallError;

/// A request that failed because of plugins.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plugin answered with an error.
    #[error("NRI plugin {plugin} refused {request}")]
    Refused {
        /// Index and name.
        plugin: String,
        /// What it was asked.
        request: &'static str,
        /// Its words.
        source: CallError,
    },
    /// Two plugins want the same.
    #[error("NRI plugins {first} and {second} both set {field} of container {container}; only one may")]
    Conflict {
        /// Who set it first.
        first: String,
        /// Who set it then.
        second: String,
        /// Field and, where it has one, key.
        field: String,
        /// Of which container.
        container: String,
    },
    /// A validating plugin vetoed.
    #[error("NRI plugin {plugin} rejected the container's adjustment: {reason}")]
    Rejected {
        /// Index and name.
        plugin: String,
        /// Its words.
        reason: String,
    },
    /// A plugin changes a container by an update that it was asked to adjust.
    #[error("NRI plugin {plugin} asked for an update of container {container}, which is only being created")]
    UpdateOfNew {
        /// Index and name.
        plugin: String,
        /// Its id.
        container: String,
    },
}
