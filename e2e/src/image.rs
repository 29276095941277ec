//! Images that the tests make for themselves: layers written with the `tar` crate around Debian's static
//! busybox, a configuration, a manifest. Nothing is fetched, so every digest is known beforehand.

use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Path of the package busybox-static's binary.
pub const BUSYBOX: &str = "/bin/busybox";

/// How a layer's tar is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// Whose media types the manifest names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OCI image-spec.
    Oci,
    /// Docker image manifest, version 2, schema 2.
    Docker,
}

/// A blob with its digest.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:…` of the bytes.
    pub digest: String,
    /// Media type where something names the blob.
    pub media_type: String,
    /// Content.
    pub bytes: Vec<u8>,
}

impl Blob {
    fn new(media_type: &str, bytes: Vec<u8>) -> Self {
        Self {
            digest: digest(&bytes),
            media_type: media_type.to_owned(),
            bytes,
        }
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.bytes.len()})
    }
}

/// `sha256:` and the hex digest.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// One layer in the making.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }
}

impl Layer {
    /// An empty layer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// A path that a tar header cannot hold.
    pub fn file(mut self, path: &str, mode: u32, owner: (u64, u64), bytes: &[u8]) -> Result<Self> {
        let mut header = header(tar::EntryType::Regular, mode, owner);
        header.set_size(bytes.len() as u64);
        self.tar.append_data(&mut header, path, bytes)?;
        Ok(self)
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// A path that a tar header cannot hold.
    pub fn directory(mut self, path: &str, mode: u32) -> Result<Self> {
        let mut header = header(tar::EntryType::Directory, mode, (0, 0));
        header.set_size(0);
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// A path that a tar header cannot hold.
    pub fn symlink(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(tar::EntryType::Symlink, 0o777, (0, 0));
        header.set_size(0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds a hard link to a file of this layer.
    ///
    /// # Errors
    /// A path that a tar header cannot hold.
    pub fn hard_link(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(tar::EntryType::Link, 0o755, (0, 0));
        header.set_size(0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds what a busybox root needs: the binary, a link for each applet, accounts, common directories.
    ///
    /// # Errors
    /// The package busybox-static is not installed.
    pub fn busybox(mut self) -> Result<Self> {
        let binary = std::fs::read(BUSYBOX)
            .with_context(|| format!("{BUSYBOX} is missing: install busybox-static (cargo xtask setup)"))?;
        for path in ["bin", "etc", "home", "root", "tmp", "usr", "var"] {
            self = self.directory(path, if path == "tmp" { 0o1777 } else { 0o755 })?;
        }
        self = self.file("bin/busybox", 0o755, (0, 0), &binary)?;
        let applets = std::process::Command::new(BUSYBOX)
            .arg("--list")
            .output()
            .context("busybox --list")?;
        for applet in String::from_utf8(applets.stdout)?
            .lines()
            .filter(|a| *a != "busybox")
        {
            self = self.symlink(&format!("bin/{applet}"), "/bin/busybox")?;
        }
        self.file(
            "etc/passwd",
            0o644,
            (0, 0),
            b"root:x:0:0:root:/root:/bin/sh\napp:x:1234:2345:app:/home:/bin/sh\n",
        )?
        .file(
            "etc/group",
            0o644,
            (0, 0),
            b"root:x:0:\napp:x:2345:\nextra:x:3456:app\n",
        )
    }

    fn finish(self, packing: Packing) -> Result<(String, Vec<u8>)> {
        let plain = self.tar.into_inner()?;
        let diff_id = digest(&plain);
        let packed = match packing {
            Packing::Plain => plain,
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&plain)?;
                encoder.finish()?
            }
            Packing::Zstd => zstd::encode_all(plain.as_slice(), 1)?,
        };
        Ok((diff_id, packed))
    }
}

fn header(kind: tar::EntryType, mode: u32, owner: (u64, u64)) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mtime(1_700_000_000);
    header
}

/// An image ready to be pushed.
#[derive(Debug, Clone)]
pub struct Image {
    /// Layers and configuration.
    pub blobs: Vec<Blob>,
    /// The manifest.
    pub manifest: Blob,
    /// Digest of the configuration: the image's id in the CRI.
    pub id: String,
}

/// Builds an image of one platform.
///
/// # Errors
/// Compression failed.
pub fn build(
    layers: Vec<(Layer, Packing)>,
    config: &Value,
    format: Format,
    architecture: &str,
) -> Result<Image> {
    let (mut blobs, mut diff_ids) = (Vec::new(), Vec::new());
    for (layer, packing) in layers {
        let (diff_id, bytes) = layer.finish(packing)?;
        diff_ids.push(diff_id);
        blobs.push(Blob::new(layer_type(format, packing), bytes));
    }
    let document = json!({
        "architecture": architecture, "os": "linux", "created": "2026-01-01T00:00:00Z",
        "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": diff_ids.iter().map(|_| json!({"created_by": "catamaran-e2e"})).collect::<Vec<_>>(),
    });
    let (config_type, manifest_type) = match format {
        Format::Oci => (
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.oci.image.manifest.v1+json",
        ),
        Format::Docker => (
            "application/vnd.docker.container.image.v1+json",
            "application/vnd.docker.distribution.manifest.v2+json",
        ),
    };
    let config = Blob::new(config_type, serde_json::to_vec(&document)?);
    let manifest = json!({
        "schemaVersion": 2, "mediaType": manifest_type, "config": config.descriptor(),
        "layers": blobs.iter().map(Blob::descriptor).collect::<Vec<_>>(),
    });
    let manifest = Blob::new(manifest_type, serde_json::to_vec(&manifest)?);
    let id = config.digest.clone();
    blobs.push(config);
    Ok(Image { blobs, manifest, id })
}

fn layer_type(format: Format, packing: Packing) -> &'static str {
    match (format, packing) {
        (Format::Oci, Packing::Plain) => "application/vnd.oci.image.layer.v1.tar",
        (Format::Oci, Packing::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
        (Format::Oci, Packing::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        (Format::Docker, Packing::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
        (Format::Docker, _) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
    }
}

/// An OCI index or Docker manifest list over images of several architectures.
///
/// # Errors
/// None today; JSON cannot fail here.
pub fn index(images: &[(&str, &Image)], format: Format) -> Result<Blob> {
    let media_type = match format {
        Format::Oci => "application/vnd.oci.image.index.v1+json",
        Format::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
    };
    let manifests: Vec<Value> = images
        .iter()
        .map(|(architecture, image)| {
            let mut entry = image.manifest.descriptor();
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entry
        })
        .collect();
    let document = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
    Ok(Blob::new(media_type, serde_json::to_vec(&document)?))
}

/// The architecture that this host pulls, as image configurations spell it.
#[must_use]
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// busybox with a shell as its command.
///
/// # Errors
/// As [`Layer::busybox`].
pub fn busybox() -> Result<Image> {
    let config = json!({"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["sh"]});
    build(
        vec![(Layer::new().busybox()?, Packing::Gzip)],
        &config,
        Format::Oci,
        host_architecture(),
    )
}

/// A command that only waits: what a peer that needs a pause image gets.
///
/// # Errors
/// As [`Layer::busybox`].
pub fn pause() -> Result<Image> {
    let binary = std::fs::read(BUSYBOX).with_context(|| format!("{BUSYBOX}: install busybox-static"))?;
    let layer = Layer::new().file("pause", 0o755, (0, 0), &binary)?;
    // busybox picks its applet by argument when its own name is not one.
    let layer = layer.symlink("sleep", "/pause")?;
    let config = json!({"Entrypoint": ["/sleep", "2147483647"]});
    build(
        vec![(layer, Packing::Gzip)],
        &config,
        Format::Docker,
        host_architecture(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_has_the_same_digest() {
        let make = |packing| {
            let layer = Layer::new().file("a", 0o644, (0, 0), b"x").unwrap();
            build(vec![(layer, packing)], &json!({}), Format::Oci, "amd64").unwrap()
        };
        assert_eq!(
            make(Packing::Gzip).manifest.digest,
            make(Packing::Gzip).manifest.digest
        );
        // The packing changes the blob but not what is in it: the image's id stays.
        assert_eq!(make(Packing::Gzip).id, make(Packing::Zstd).id);
        assert_ne!(
            make(Packing::Gzip).manifest.digest,
            make(Packing::Zstd).manifest.digest
        );
    }
}
