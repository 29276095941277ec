//! What a shim's verbs fail with, and the one place where that becomes a ttrpc status.

use containerd_shim_protos::ttrpc;

/// Failure of a shim's verb; the variant is the gRPC code that the caller sees, the text says what was wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ShimError {
    /// No such container, exec or sandbox.
    #[error("{0}")]
    NotFound(String),
    /// The name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The state does not allow it.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request cannot be honoured as written.
    #[error("{0}")]
    InvalidArgument(String),
    /// The runtime has no such verb.
    #[error("{0}")]
    Unimplemented(String),
    /// A time limit passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// Too many of something bounded.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The runtime, the VM or the kernel failed.
    #[error("{0}")]
    Internal(String),
}

impl ShimError {
    /// [`Self::Internal`] from an error and what was being done, with the error's sources in the text, as only
    /// text crosses the socket.
    pub fn internal(doing: impl std::fmt::Display, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::Internal(format!("{doing}: {}", chain(error)))
    }
}

/// An error and its sources on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        let code = match &error {
            ShimError::NotFound(_) => ttrpc::Code::NOT_FOUND,
            ShimError::AlreadyExists(_) => ttrpc::Code::ALREADY_EXISTS,
            ShimError::FailedPrecondition(_) => ttrpc::Code::FAILED_PRECONDITION,
            ShimError::InvalidArgument(_) => ttrpc::Code::INVALID_ARGUMENT,
            ShimError::Unimplemented(_) => ttrpc::Code::UNIMPLEMENTED,
            ShimError::DeadlineExceeded(_) => ttrpc::Code::DEADLINE_EXCEEDED,
            ShimError::ResourceExhausted(_) => ttrpc::Code::RESOURCE_EXHAUSTED,
            ShimError::Internal(_) => ttrpc::Code::INTERNAL,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}
