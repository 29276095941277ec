//! Why a request cannot become a spec: the field as CRI spells it, the kind that the daemon turns into a gRPC
//! code, and a sentence for the one who wrote the pod.

use std::fmt;

/// A field of a CRI request that cannot be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct SpecError {
    /// What kind of refusal it is.
    pub kind: SpecErrorKind,
    /// Path of the field in the request, as CRI spells it (`linux.security_context.run_as_username`).
    pub field: String,
    /// What is wrong with it and what to do.
    pub reason: String,
}

/// Kinds of refusal; each is one gRPC code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecErrorKind {
    /// The value is wrong wherever it is sent.
    InvalidArgument,
    /// The value is well formed; this node, runtime or image cannot give it.
    FailedPrecondition,
    /// Not built (yet).
    Unimplemented,
    /// It names something that does not exist (a user of the image, a profile file, a device).
    NotFound,
}

/// What functions of this crate give.
pub type Result<T> = std::result::Result<T, SpecError>;

impl SpecError {
    fn new(kind: SpecErrorKind, field: impl fmt::Display, reason: impl fmt::Display) -> Self {
        SpecError {
            kind,
            field: field.to_string(),
            reason: reason.to_string(),
        }
    }

    /// A [`SpecErrorKind::InvalidArgument`].
    pub fn invalid(field: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::InvalidArgument, field, reason)
    }

    /// A [`SpecErrorKind::FailedPrecondition`].
    pub fn precondition(field: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::FailedPrecondition, field, reason)
    }

    /// A [`SpecErrorKind::Unimplemented`].
    pub fn unimplemented(field: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::Unimplemented, field, reason)
    }

    /// A [`SpecErrorKind::NotFound`].
    pub fn not_found(field: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::new(SpecErrorKind::NotFound, field, reason)
    }
}
