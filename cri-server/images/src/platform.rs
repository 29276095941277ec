//! Platforms of images: the host's own, and the choice from an index (OCI image-spec, image-index.md).

use serde::{Deserialize, Serialize};

/// Operating system and processor in the OCI's (Go's) names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system; `linux` here.
    pub os: String,
    /// Processor architecture, for example `amd64`.
    pub architecture: String,
    /// Variant of the architecture, for example `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The platform this program was built for.
    #[must_use]
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "riscv64" => ("riscv64", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(Into::into),
        }
    }

    /// How well an image for `other` runs here: `None` not at all, otherwise lower is better.
    ///
    /// An arm processor runs the code of its lower variants; an image without a variant is taken to be for the
    /// architecture's common one (arm64: v8, arm: v7), as containerd normalises it.
    #[must_use]
    pub fn rank(&self, other: &Self) -> Option<u32> {
        if self.os != other.os || self.architecture != other.architecture {
            return None;
        }
        let level = |platform: &Self| -> Option<u32> {
            let text = match (platform.architecture.as_str(), platform.variant.as_deref()) {
                ("arm64", None | Some("")) => "v8",
                ("arm", None | Some("")) => "v7",
                ("amd64", None | Some("")) => "v1",
                (_, None) => "",
                (_, Some(variant)) => variant,
            };
            text.strip_prefix('v').unwrap_or("0").parse().ok()
        };
        match (level(self), level(other)) {
            (Some(mine), Some(theirs)) if theirs <= mine => Some(mine - theirs),
            _ if self.variant == other.variant => Some(0),
            _ => None,
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

impl Default for Platform {
    fn default() -> Self {
        Self::host()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(architecture: &str, variant: Option<&str>) -> Platform {
        Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: variant.map(Into::into),
        }
    }

    #[test]
    fn the_best_variant_wins_and_others_do_not_run() {
        let v7 = platform("arm", Some("v7"));
        assert_eq!(v7.rank(&platform("arm", None)), Some(0));
        assert_eq!(v7.rank(&platform("arm", Some("v6"))), Some(1));
        assert_eq!(v7.rank(&platform("arm", Some("v8"))), None);
        assert_eq!(
            platform("arm64", None).rank(&platform("arm64", Some("v8"))),
            Some(0)
        );
        let amd64 = platform("amd64", None);
        assert_eq!(amd64.rank(&platform("amd64", None)), Some(0));
        assert_eq!(amd64.rank(&platform("amd64", Some("v3"))), None);
        assert_eq!(amd64.rank(&platform("arm64", None)), None);
        assert_eq!(
            amd64.rank(&Platform {
                os: "windows".into(),
                ..amd64.clone()
            }),
            None
        );
    }
}
