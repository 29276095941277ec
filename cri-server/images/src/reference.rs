//! Names of images, normalised as containerd does (distribution's reference grammar): `busybox` is
//! `docker.io/library/busybox:latest`; of a name with tag and digest only the digest counts.

use std::fmt;

use crate::digest::Digest;
use crate::error::{Error, Result};

const HUB: &str = "docker.io";
/// Longest repository, the registry included.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// What a reference picks from its repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Pick {
    Tag(String),
    Digest(Digest),
}

/// A normalised reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Reference {
    /// Registry host with its port, `docker.io` for Docker Hub.
    pub(crate) registry: String,
    /// Path in the registry, for example `library/busybox`.
    pub(crate) repository: String,
    pub(crate) pick: Pick,
}

impl Reference {
    /// Parses and normalises a reference.
    ///
    /// # Errors
    /// [`Error::InvalidReference`] with the part that is wrong.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = |reason| Error::InvalidReference {
            reference: text.chars().take(300).collect(),
            reason,
        };
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = Digest::parse(digest)
                    .ok_or_else(|| bad("the digest is not sha256: or sha512: with lower-case hex digits"))?;
                (rest, Some(digest))
            }
        };
        // A colon behind the last slash begins the tag; one before it is a port.
        let name_start = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_start..].find(':') {
            None => (rest, None),
            Some(colon) => (&rest[..name_start + colon], Some(&rest[name_start + colon + 1..])),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(bad(
                "the tag must be 1 to 128 of [A-Za-z0-9_.-], not starting with '.' or '-'",
            ));
        }
        let (registry, repository) = match name.split_once('/') {
            Some((host, path)) if is_host_like(host) => (host, path.to_owned()),
            _ => (HUB, name.to_owned()),
        };
        let registry = if registry == "index.docker.io" {
            HUB
        } else {
            registry
        };
        if !is_host(registry) {
            return Err(bad("the registry is not a host name with an optional port"));
        }
        let repository = if registry == HUB && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository
        };
        if !repository.split('/').all(is_path_component) {
            return Err(bad(
                "the repository must be lower-case letters, digits and single separators ('.', '_', '__', '-') between them",
            ));
        }
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(bad("the name is longer than 255 characters"));
        }
        let pick = match digest {
            Some(digest) => Pick::Digest(digest),
            None => Pick::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            pick,
        })
    }

    /// `registry/repository`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// `registry/repository@digest`.
    pub(crate) fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pick {
            Pick::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.repository),
            Pick::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.repository),
        }
    }
}

/// Whether the part before the first slash is a registry and not the start of a Docker Hub path.
fn is_host_like(host: &str) -> bool {
    host.contains(['.', ':']) || host == "localhost" || host.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
                return port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
            }
            _ => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=MAX_TAG).contains(&tag.len())
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
        && tag.bytes().next().is_some_and(word)
}

/// Words of lower-case letters and digits with one separator between: a dot, one or two underscores, dashes.
fn is_path_component(component: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !word(*first) || !word(*last) {
        return false;
    }
    bytes.split(|b| word(*b)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normal(text: &str) -> String {
        Reference::parse(text).unwrap().to_string()
    }

    #[test]
    fn names_are_normalised_as_containerd_does() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        for (text, expected) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("opensuse/leap:15.3", "docker.io/opensuse/leap:15.3"),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:y", "localhost:5000/x:y"),
            ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("test.com:tag", "docker.io/library/test.com:tag"),
            ("a/b__c-d--e.f", "docker.io/a/b__c-d--e.f:latest"),
        ] {
            assert_eq!(normal(text), expected);
            assert_eq!(normal(expected), expected, "normalising is idempotent");
        }
        assert_eq!(
            normal(&format!("r.io/x:tag@{digest}")),
            format!("r.io/x@{digest}")
        );
    }

    #[test]
    fn bad_names_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "empty"),
            (":tag", "repository"),
            ("@sha256:00", "digest"),
            ("x@sha256:short", "digest"),
            ("Upper", "repository"),
            ("docker.io/Busybox", "repository"),
            ("x:-tag", "tag"),
            ("a..b/c", "registry"),
            ("r.io/a..b", "repository"),
            ("r.io/a//b", "repository"),
            ("r.io:99999/a", "registry"),
            ("r.io/../../etc", "repository"),
            ("has space", "repository"),
            (&"a".repeat(300), "longer"),
        ] {
            let error = Reference::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    proptest! {
        /// Every name that oci-spec's parser takes is taken with the same parts (it knows no IPv6 hosts, takes
        /// upper-case hosts for paths, and keeps the tag beside a digest).
        #[test]
        fn agrees_with_another_parser(text in "[a-z0-9A-Z.:/_@-]{0,40}") {
            let ours = Reference::parse(&text).ok();
            let theirs = oci_spec::distribution::Reference::try_from(text.as_str()).ok();
            if let (Some(ours), Some(theirs)) = (&ours, &theirs)
                && ours.registry == ours.registry.to_lowercase()
            {
                prop_assert_eq!(&ours.registry, theirs.registry());
                prop_assert_eq!(&ours.repository, theirs.repository());
            }
            if ours.is_some() {
                prop_assert!(theirs.is_some(), "only ours takes {}", text);
            }
        }
    }
}
