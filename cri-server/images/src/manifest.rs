//! Manifests, indexes and configurations as far as a pull needs them: OCI image-spec and docker's schema 2.

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::platform::Platform;

/// Layers of one image beyond this are refused; overlayfs itself stacks 500.
pub(crate) const MAX_LAYERS: usize = 500;
/// Entries of an index.
const MAX_MANIFESTS: usize = 1000;

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    digest: String,
    pub(crate) size: u64,
    #[serde(default)]
    platform: Option<Platform>,
}

impl Descriptor {
    pub(crate) fn digest(&self) -> Result<Digest> {
        Digest::parse(&self.digest).ok_or_else(|| {
            Error::Hostile(format!(
                "digest {:?} of a manifest",
                self.digest.chars().take(100).collect::<String>()
            ))
        })
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

/// What a registry has under a name.
#[derive(Debug)]
pub(crate) enum Content {
    Index(Vec<Descriptor>),
    Image(ImageManifest),
}

#[derive(Debug)]
pub(crate) struct ImageManifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// Parses a manifest or an index and refuses what is no container image.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Content> {
    let document: Document =
        serde_json::from_slice(bytes).map_err(|error| Error::malformed("manifest", error))?;
    if document.schema_version != 2 {
        return Err(Error::Unsupported(format!(
            "manifest schema {}; push the image again with a current tool",
            document.schema_version
        )));
    }
    match (document.manifests, document.config, document.layers) {
        (Some(manifests), None, None) => {
            if manifests.len() > MAX_MANIFESTS {
                return Err(Error::Hostile(format!(
                    "an index of {} manifests",
                    manifests.len()
                )));
            }
            Ok(Content::Index(manifests))
        }
        (None, Some(config), layers) => {
            let layers = layers.unwrap_or_default();
            if !is_config(&config.media_type) {
                return Err(Error::Unsupported(format!(
                    "{:?} is the configuration of an artifact, not of a container image",
                    config.media_type
                )));
            }
            if let Some(odd) = layers.iter().find(|layer| !is_layer(&layer.media_type)) {
                return Err(Error::Unsupported(format!(
                    "layers of media type {:?}",
                    odd.media_type
                )));
            }
            if layers.len() > MAX_LAYERS {
                return Err(Error::Unsupported(format!(
                    "{} layers (at most {MAX_LAYERS})",
                    layers.len()
                )));
            }
            Ok(Content::Image(ImageManifest { config, layers }))
        }
        // Both at once would let two readers see two images in one digest.
        _ => Err(Error::Unsupported(format!(
            "a manifest of type {:?} that is neither an image nor an index",
            document
                .media_type
                .as_deref()
                .or(content_type)
                .unwrap_or("unknown")
        ))),
    }
}

/// The entry that runs best on `platform`. Attestations and other entries without a real platform never do.
pub(crate) fn choose<'a>(manifests: &'a [Descriptor], platform: &Platform) -> Result<&'a Descriptor> {
    let mut best: Option<(u32, &Descriptor)> = None;
    for manifest in manifests {
        // An entry that names no platform is the last resort, as for containerd.
        let rank = manifest
            .platform
            .as_ref()
            .map_or(Some(u32::MAX), |theirs| platform.rank(theirs));
        let Some(rank) = rank else { continue };
        if best.is_none_or(|(found, _)| rank < found) {
            best = Some((rank, manifest));
        }
    }
    best.map(|(_, manifest)| manifest).ok_or_else(|| {
        let offered: Vec<String> = manifests
            .iter()
            .filter_map(|m| m.platform.as_ref())
            .map(|p| p.to_string())
            .collect();
        Error::NotFound(format!(
            "an image for {platform} (the index offers {})",
            offered.join(", ")
        ))
    })
}

fn is_config(media_type: &str) -> bool {
    matches!(
        media_type,
        "" | "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json"
    )
}

fn is_layer(media_type: &str) -> bool {
    let tar = media_type
        .strip_prefix("application/vnd.oci.image.layer.v1.tar")
        .or_else(|| media_type.strip_prefix("application/vnd.oci.image.layer.nondistributable.v1.tar"))
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.diff.tar"))
        .or_else(|| media_type.strip_prefix("application/vnd.docker.image.rootfs.foreign.diff.tar"));
    matches!(tar, Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest() -> String {
        format!("sha256:{}", "a".repeat(64))
    }

    fn image(config_type: &str, layer_type: &str) -> Result<Content> {
        let d = digest();
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config_type}","digest":"{d}","size":2}},
            "layers":[{{"mediaType":"{layer_type}","digest":"{d}","size":3}}]}}"#
        );
        parse(text.as_bytes(), None)
    }

    #[test]
    fn images_of_both_families_are_taken_and_artifacts_are_not() {
        let (oci, docker) = (
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.docker.container.image.v1+json",
        );
        assert!(image(oci, "application/vnd.oci.image.layer.v1.tar+zstd").is_ok());
        assert!(image(docker, "application/vnd.docker.image.rootfs.diff.tar.gzip").is_ok());
        let error = image("application/vnd.cncf.helm.config.v1+json", "x")
            .unwrap_err()
            .to_string();
        assert!(error.contains("helm"), "{error}");
        let error = image(oci, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
            .unwrap_err()
            .to_string();
        assert!(error.contains("encrypted"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        /// Whatever a registry sends is read or refused, and what is read can be asked for everything.
        #[test]
        fn mangled_documents(
            which in 0..3usize,
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
            doubled in any::<(proptest::sample::Index, proptest::sample::Index)>(),
            cut in proptest::option::of(any::<proptest::sample::Index>()),
        ) {
            let d = digest();
            let mut bytes = [
                format!(
                    r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json",
                    "digest":"{d}","size":2}},"layers":[{{"digest":"{d}","size":3,
                    "mediaType":"application/vnd.oci.image.layer.v1.tar"}}]}}"#
                ),
                format!(
                    r#"{{"schemaVersion":2,"manifests":[{{"digest":"{d}","size":1,
                    "platform":{{"os":"linux","architecture":"arm","variant":"v7"}}}}]}}"#
                ),
                format!(
                    r#"{{"created":"2020-01-02T03:04:05.5+01:00","architecture":"amd64","os":"linux",
                    "config":{{"User":"7:8","Env":["A=b"],"Volumes":{{"/v":{{}}}}}},
                    "rootfs":{{"type":"layers","diff_ids":["{d}"]}}}}"#
                ),
            ][which]
                .clone()
                .into_bytes();
            let (from, to) = (doubled.0.index(bytes.len()), doubled.1.index(bytes.len()));
            if from % 3 == 0 && from < to {
                let part = bytes[from..to].to_vec();
                bytes.splice(to..to, part);
            }
            for (index, byte) in damage {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            match parse(&bytes, None) {
                Ok(Content::Image(manifest)) => {
                    let _ = manifest.config.digest();
                    manifest.layers.iter().for_each(|layer| drop(layer.digest()));
                }
                Ok(Content::Index(entries)) => {
                    let platform = Platform { os: "linux".into(), architecture: "arm".into(), variant: None };
                    let _ = choose(&entries, &platform).map(Descriptor::digest);
                }
                Err(_) => {}
            }
            if let Ok(config) = crate::image::parse_config(&bytes) {
                let _ = crate::image::diff_ids(&config);
                let record = crate::metadata::ImageRecord {
                    tags: [].into(),
                    digests: [].into(),
                    layers: Vec::new(),
                    content: [].into(),
                };
                let _ = crate::image::Image::new("sha256:0", &record, &bytes, 0, &[]);
            }
        }
    }

    #[test]
    fn ambiguous_and_old_documents_are_refused() {
        let d = digest();
        let both = format!(
            r#"{{"schemaVersion":2,"manifests":[],"config":{{"digest":"{d}","size":1}},"layers":[]}}"#
        );
        assert!(matches!(parse(both.as_bytes(), None), Err(Error::Unsupported(_))));
        assert!(matches!(
            parse(br#"{"schemaVersion":1}"#, None),
            Err(Error::Unsupported(_))
        ));
        assert!(matches!(parse(b"<html>", None), Err(Error::Malformed { .. })));
    }

    #[test]
    fn an_index_without_the_platform_says_what_it_has() {
        let d = digest();
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[
            {{"digest":"{d}","size":1,"platform":{{"os":"linux","architecture":"s390x"}}}},
            {{"digest":"{d}","size":2,"platform":{{"os":"linux","architecture":"amd64"}}}},
            {{"digest":"{d}","size":3,"platform":{{"os":"unknown","architecture":"unknown"}}}}]}}"#
        );
        let Content::Index(manifests) = parse(text.as_bytes(), None).unwrap() else {
            panic!("no index")
        };
        let platform = |architecture: &str| Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: None,
        };
        assert_eq!(choose(&manifests, &platform("amd64")).unwrap().size, 2);
        let unnamed = Descriptor {
            platform: None,
            size: 9,
            ..manifests[0].clone()
        };
        assert_eq!(
            choose(&[unnamed.clone(), manifests[1].clone()], &platform("amd64"))
                .unwrap()
                .size,
            2
        );
        assert_eq!(choose(&[unnamed], &platform("amd64")).unwrap().size, 9);
        let error = choose(&manifests, &platform("riscv64")).unwrap_err().to_string();
        assert!(error.contains("linux/s390x"), "{error}");
    }
}
