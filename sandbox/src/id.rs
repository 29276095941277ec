//! Identifiers of pod sandboxes and containers: 64 lower-case hex digits, as containerd and CRI-O have them.

use std::fmt;
use std::io::Read;

use serde::{Deserialize, Serialize};

/// Identifier of a pod sandbox or container; its text is safe in paths, cgroup names and arguments.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

/// The text is no identifier.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not an id: 1 to 64 of [A-Za-z0-9._-] are expected, starting with a letter or digit")]
pub struct InvalidId(String);

impl Id {
    /// A fresh random identifier from the kernel's random source.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be read.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0u8; 32];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(hex::encode(bytes)))
    }

    /// Checks an identifier that came from outside. Accepts what containerd accepts as an id, so that a shim
    /// can serve other callers than our daemon.
    ///
    /// # Errors
    /// [`InvalidId`] when the text could not be a single path component.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let ok = (1..=64).contains(&text.len())
            && text.chars().all(good)
            && text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if ok {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId(text.chars().take(80).collect()))
        }
    }

    /// The identifier's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 32 characters, for names with a length limit (unix socket paths).
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..self.0.len().min(32)]
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Id {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        Self::parse(&text)
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn random_ids_differ_and_parse() {
        let (a, b) = (Id::random().unwrap(), Id::random().unwrap());
        assert_ne!(a, b);
        assert_eq!(Id::parse(a.as_str()).unwrap(), a);
        assert_eq!(a.as_str().len(), 64);
    }

    proptest! {
        #[test]
        fn accepted_ids_are_single_path_components(text in ".{0,70}") {
            if let Ok(id) = Id::parse(&text) {
                let path = std::path::Path::new("/base").join(id.as_str());
                prop_assert_eq!(path.components().count(), 3);
                prop_assert!(!matches!(id.as_str(), "." | ".."));
            }
        }
    }
}
