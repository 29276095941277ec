//! What can go wrong with images. The kinds are what a caller decides by (retry, other credentials, free space);
//! the server maps them to gRPC codes.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// Result of an image operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A cause that several waiters of one pull can share.
#[derive(Clone)]
pub struct Cause(Arc<dyn StdError + Send + Sync>);

impl Cause {
    /// Wraps any error.
    pub fn new(error: impl StdError + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl StdError for Cause {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}

/// Failure of an image operation.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image, tag, manifest or blob does not exist where it was looked for.
    #[error("{0} not found")]
    NotFound(String),
    /// The registry wants credentials, or refuses those given.
    #[error("registry {registry} refused {what}: give credentials that may pull it")]
    Unauthorized {
        /// Host that refused.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// The text is no image reference.
    #[error("{reference:?} is not an image reference: {reason}")]
    InvalidReference {
        /// The text, shortened.
        reference: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Content is not what its digest or declared size says.
    #[error("{what} is not what was asked for: expected {expected}, got {actual}")]
    DigestMismatch {
        /// Manifest, configuration or layer.
        what: String,
        /// The declared digest or size.
        expected: String,
        /// The digest or size of what came.
        actual: String,
    },
    /// Content that breaks the rules of image layers or exceeds a bound; nothing of it is kept.
    #[error("image content refused: {0}")]
    Hostile(String),
    /// Content this store does not support (media types, platforms, artifacts that are no images).
    #[error("unsupported image: {0}")]
    Unsupported(String),
    /// Malformed content: JSON that does not parse, fields that contradict each other.
    #[error("malformed {what}")]
    Malformed {
        /// What was parsed.
        what: String,
        /// The parser's complaint.
        #[source]
        source: Cause,
    },
    /// No progress within the configured time.
    #[error("no progress in {seconds} s while {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// The configured bound.
        seconds: u64,
    },
    /// The file system of the store is full (space, inodes or quota).
    #[error("no space left to {what}: remove images or enlarge the file system")]
    NoSpace {
        /// What was tried, with the path.
        what: String,
    },
    /// The registry cannot be reached or answers with a failure of its own.
    #[error("registry {registry} is unavailable: {reason}")]
    Unavailable {
        /// Host that was asked.
        registry: String,
        /// What it answered or where the connection failed.
        reason: String,
    },
    /// The container already has a snapshot, of another image.
    #[error("container {container} already holds a snapshot of {image}")]
    InUse {
        /// The container.
        container: String,
        /// The image of its snapshot.
        image: String,
    },
    /// A configuration file (hosts.toml, docker's config.json) cannot be used.
    #[error("configuration file {path}: {reason}")]
    Config {
        /// The file.
        path: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// An operation of the operating system failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// The system's error.
        #[source]
        source: Cause,
    },
    /// The metadata database failed.
    #[error("image metadata: cannot {what}")]
    Metadata {
        /// What was tried.
        what: &'static str,
        /// The database's error.
        #[source]
        source: Cause,
    },
    /// A defect of this program: a task panicked.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// Wraps an I/O error; a full file system gets its own kind.
    pub(crate) fn io(what: impl Into<String>, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        let what = what.into();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::NoSpace { what },
            _ => Self::Io {
                what,
                source: Cause::new(error),
            },
        }
    }

    pub(crate) fn malformed(what: impl Into<String>, error: impl StdError + Send + Sync + 'static) -> Self {
        Self::Malformed {
            what: what.into(),
            source: Cause::new(error),
        }
    }
}
