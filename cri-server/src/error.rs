//! What a request can end with, and the one place where that becomes a gRPC status. Below the server errors
//! know nothing of gRPC; here each kind gets its code and the chain of sources becomes one sentence.

use std::path::PathBuf;
use std::sync::Arc;

use catamaran_spec::{SpecError, SpecErrorKind};
use tonic::{Code, Status};

use crate::pods::state::Denial;
use crate::pods::undo::UndoFailure;
use crate::shim::ShimError;
use crate::store::StoreError;

/// What the daemon's operations give.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such pod sandbox, container or image.
    #[error("{what} {id:?} not found")]
    NotFound {
        /// `pod sandbox`, `container` or `image`.
        what: &'static str,
        /// As the request has it.
        id: String,
    },
    /// A field's value cannot be meant.
    #[error("{field}: {problem}")]
    InvalidArgument {
        /// The field, dotted, as the CRI spells it.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// What was asked needs a state of things that is not given.
    #[error("{0}")]
    FailedPrecondition(String),
    /// Pod or container of the same name exists.
    #[error("{what} {name} exists already with id {id}")]
    AlreadyExists {
        /// `pod sandbox` or `container`.
        what: &'static str,
        /// Its name.
        name: String,
        /// Its id.
        id: String,
    },
    /// Not served.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// A time limit that the caller set has passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// A stop of the pod overtook the request.
    #[error("{0}")]
    Aborted(String),
    /// The daemon ends, or a part of it is out of service.
    #[error("{0}")]
    Unavailable(String),
    /// Not in this state.
    #[error("{what} {id}: {denial}")]
    Denied {
        /// `pod sandbox` or `container`.
        what: &'static str,
        /// Its id.
        id: String,
        /// Why.
        denial: Denial,
    },
    /// The container's or pod's configuration cannot be honoured.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Images.
    #[error(transparent)]
    Image(#[from] catamaran_images::Error),
    /// Pod networking.
    #[error(transparent)]
    Network(#[from] catamaran_network::NetworkError),
    /// cgroups.
    #[error("cgroup {path}: {problem}")]
    Cgroup {
        /// The cgroup.
        path: String,
        /// What went wrong.
        problem: String,
    },
    /// An NRI plugin, or two.
    #[error(transparent)]
    Nri(#[from] catamaran_nri::Error),
    /// The shim.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the daemon's own.
    #[error("cannot {doing} {path}")]
    Io {
        /// `create`, `write`, …
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something failed and undoing it failed in part: the record is kept, not ready, removable.
    #[error("{}; {}", chain(.error), .failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    UndoIncomplete {
        /// The first failure.
        error: Box<Error>,
        /// What could not be undone.
        failures: Vec<UndoFailure>,
    },
    /// The result of an attempt that several callers share.
    #[error(transparent)]
    Shared(#[from] Arc<Error>),
    /// A rule of the daemon's own was broken.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// A field's value cannot be meant.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::InvalidArgument {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// For `map_err` of file operations.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Its gRPC code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::InvalidArgument { .. } => Code::InvalidArgument,
            Self::FailedPrecondition(_) | Self::Nri(_) => Code::FailedPrecondition,
            Self::Denied {
                denial: Denial::NoContainer,
                ..
            } => Code::NotFound,
            Self::Denied { .. } => Code::FailedPrecondition,
            Self::AlreadyExists { .. } => Code::AlreadyExists,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::DeadlineExceeded(_) => Code::DeadlineExceeded,
            Self::Aborted(_) => Code::Aborted,
            Self::Unavailable(_) => Code::Unavailable,
            Self::Spec(error) => match error.kind {
                SpecErrorKind::InvalidArgument => Code::InvalidArgument,
                SpecErrorKind::FailedPrecondition => Code::FailedPrecondition,
                SpecErrorKind::Unimplemented => Code::Unimplemented,
                SpecErrorKind::NotFound => Code::NotFound,
            },
            Self::Image(error) => image_code(error),
            Self::Network(catamaran_network::NetworkError::NotReady(_)) => Code::Unavailable,
            Self::Shim(error) => shim_code(error),
            Self::UndoIncomplete { error, .. } => error.code(),
            Self::Shared(error) => error.code(),
            Self::Network(_) | Self::Cgroup { .. } | Self::Store(_) | Self::Io { .. } => Code::Internal,
            Self::Internal(_) => Code::Internal,
        }
    }
}

fn image_code(error: &catamaran_images::Error) -> Code {
    use catamaran_images::Error as E;
    match error {
        E::NotFound(_) => Code::NotFound,
        E::Unauthorized { .. } => Code::Unauthenticated,
        E::InvalidReference { .. } => Code::InvalidArgument,
        E::DigestMismatch { .. } | E::Hostile(_) | E::Malformed { .. } => Code::DataLoss,
        E::Unsupported(_) | E::InUse { .. } => Code::FailedPrecondition,
        E::Timeout { .. } => Code::DeadlineExceeded,
        E::NoSpace { .. } => Code::ResourceExhausted,
        E::Unavailable { .. } => Code::Unavailable,
        _ => Code::Internal,
    }
}

fn shim_code(error: &ShimError) -> Code {
    match error {
        ShimError::Refused { code, .. } => match code {
            ttrpc::Code::INVALID_ARGUMENT => Code::InvalidArgument,
            ttrpc::Code::NOT_FOUND => Code::NotFound,
            ttrpc::Code::ALREADY_EXISTS => Code::AlreadyExists,
            ttrpc::Code::FAILED_PRECONDITION => Code::FailedPrecondition,
            ttrpc::Code::DEADLINE_EXCEEDED => Code::DeadlineExceeded,
            ttrpc::Code::UNIMPLEMENTED => Code::Unimplemented,
            ttrpc::Code::UNAVAILABLE => Code::Unavailable,
            ttrpc::Code::RESOURCE_EXHAUSTED => Code::ResourceExhausted,
            ttrpc::Code::ABORTED => Code::Aborted,
            _ => Code::Internal,
        },
        ShimError::Start { .. } => Code::Internal,
        ShimError::Connect { .. } | ShimError::Gone { .. } => Code::Unavailable,
        ShimError::Timeout { .. } => Code::DeadlineExceeded,
    }
}

/// The error with its sources, outermost first, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code(), chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_become_one_sentence_and_nothing_is_said_twice() {
        let io = std::io::Error::new(std::io::ErrorKind::StorageFull, "no space left");
        let status = Status::from(Error::io("write", "/x/hosts")(io));
        assert_eq!(status.message(), "cannot write /x/hosts: no space left");
        assert_eq!(status.code(), Code::Internal);
    }

    #[test]
    fn a_shared_or_undone_error_keeps_its_code() {
        let first = Error::invalid("config.metadata.name", "is empty");
        let both = Error::UndoIncomplete {
            error: Box::new(first),
            failures: vec![UndoFailure {
                step: "network",
                error: "plugin hung".into(),
            }],
        };
        let status = Status::from(Error::from(Arc::new(both)));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(
            status.message(),
            "config.metadata.name: is empty; undoing network failed: plugin hung"
        );
    }
}
