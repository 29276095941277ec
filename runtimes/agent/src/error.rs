//! Why a request of the shim failed, and the gRPC code for it.

use tonic::{Code, Status};

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// No such container or process.
    #[error("{0} not found")]
    NotFound(String),
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// The container or process is not in a state for this.
    #[error("{0}")]
    State(String),
    /// This guest cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// Did not happen in time.
    #[error("{0}")]
    Timeout(String),
    /// The kernel or libcontainer refused.
    #[error("{what}")]
    Failed {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Result of a request.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Names what was being done when something failed.
pub(crate) trait Context<T> {
    /// `what` in the form "cannot mount /x".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Failed {
            what: what(),
            source: source.into(),
        })
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Invalid(_) => Code::InvalidArgument,
            Error::NotFound(_) => Code::NotFound,
            Error::Exists(_) => Code::AlreadyExists,
            Error::State(_) => Code::FailedPrecondition,
            Error::Unsupported(_) => Code::Unimplemented,
            Error::Timeout(_) => Code::DeadlineExceeded,
            Error::Failed { .. } => Code::Internal,
        };
        // HTTP/2 limits header size; the end of a long message says least.
        let mut message = chain(&error);
        if message.len() > 4096 {
            let cut = (0..=4096)
                .rev()
                .find(|at| message.is_char_boundary(*at))
                .unwrap_or(0);
            message.truncate(cut);
        }
        Status::new(code, message)
    }
}
