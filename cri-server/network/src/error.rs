//! What can go wrong with a pod's network. Knows nothing of gRPC; the daemon maps it.

use std::path::PathBuf;
use std::time::Duration;

/// Shorthand.
pub type Result<T, E = NetworkError> = std::result::Result<T, E>;

/// A failure, worded for the pod's events.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no usable network configuration. The text says why and what to do.
    #[error("no pod network: {0}")]
    NotReady(String),

    /// The id is no CNI container id (spec, section 2), which also makes it safe as a file name.
    #[error("{0:?} is no sandbox id for CNI: a letter or digit, then letters, digits, . _ - are expected")]
    Id(String),

    /// A value cannot be passed on in CNI_ARGS.
    #[error("cannot attach the pod: its {field} {value:?} has a ; or a control character")]
    Pod {
        /// `namespace`, `name` or `uid`.
        field: &'static str,
        /// What it is.
        value: String,
    },

    /// A plugin said no (CNI spec, section 5, Error).
    #[error("cni plugin {plugin} refused {verb}: {message} (code {code})")]
    Plugin {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL or STATUS.
        verb: &'static str,
        /// CNI error code; 1 to 99 are the spec's, 100 and above the plugin's own.
        code: u64,
        /// `msg` and `details`, or what the plugin wrote to stderr.
        message: String,
    },

    /// A plugin ended in a way that the protocol does not have: no JSON, too much output, a signal.
    #[error("cni plugin {plugin} broke the protocol in {verb}: {what}")]
    Protocol {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL or STATUS.
        verb: &'static str,
        /// What it did, with the start of its output.
        what: String,
    },

    /// A plugin did not end in time and was killed with its process group.
    #[error("cni plugin {plugin} did not finish {verb} within {} s and was killed", limit.as_secs_f32())]
    Timeout {
        /// The plugin's type.
        plugin: String,
        /// ADD, DEL or STATUS.
        verb: &'static str,
        /// `plugin_timeout` of the configuration.
        limit: Duration,
    },

    /// A plugin could not be started.
    #[error("cannot start cni plugin {path}")]
    Spawn {
        /// The executable.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// No directory has the plugin.
    #[error("cni plugin {plugin:?} is not in {dirs}: install it, or correct the network configuration")]
    Missing {
        /// The plugin's type.
        plugin: String,
        /// The directories, with commas.
        dirs: String,
    },

    /// ADD failed, and so did the DEL that should have undone it. The record stays for a later DEL.
    #[error("{add}; undoing it failed too and will be tried again: {del}")]
    Undo {
        /// The first failure.
        add: Box<NetworkError>,
        /// The failure of the undo.
        del: Box<NetworkError>,
    },

    /// A network namespace could not be made, pinned or removed.
    #[error("cannot {what} network namespace {path}")]
    Netns {
        /// `create`, `pin`, …
        what: &'static str,
        /// The pin.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// The default network's way out could not be set up.
    #[error("cannot masquerade the default network's subnet {subnet}: {reason}")]
    Masquerade {
        /// In CIDR notation.
        subnet: String,
        /// Why.
        reason: String,
    },

    /// A record of an attachment is damaged.
    #[error(
        "the network record {path} is damaged ({reason}); remove it once the pod's lease is freed by hand"
    )]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// A plugin that an interrupted ADD left cannot be killed, so DEL would race with it. The record stays.
    #[error(
        "the cni plugins of an interrupted ADD for {id} do not die (processes {processes}); \
         DEL is tried again once they have ended"
    )]
    Unkillable {
        /// The sandbox.
        id: String,
        /// Their ids, with commas.
        processes: String,
    },

    /// A file or directory of ours could not be used.
    #[error("cannot {what} {path}")]
    Io {
        /// `read`, `write`, …
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl NetworkError {
    /// For `map_err`.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
