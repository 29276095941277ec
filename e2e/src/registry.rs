//! Debian's docker-registry on a free loopback port, and pushing images to it.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::http;
use crate::image::{Blob, Image};
use crate::process::Service;

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    // Held for its Drop.
    _service: Service,
}

impl Registry {
    /// Starts a registry that keeps everything below `directory`.
    ///
    /// # Errors
    /// docker-registry is not installed or does not answer.
    pub fn start(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let address = free_port()?;
        let data = directory.join("data");
        let config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n\
             http:\n  addr: {address}\n  secret: e2e\n",
            data.display()
        );
        let file = directory.join("config.yml");
        std::fs::write(&file, config)?;
        let mut command = Command::new("docker-registry");
        command
            .arg("serve")
            .arg(&file)
            .env("OTEL_TRACES_EXPORTER", "none");
        let mut service = Service::start(&mut command, &directory.join("registry.log"))?;
        let limit = Duration::from_secs(20);
        service.wait_until("answer from the registry", limit, || {
            TcpStream::connect(address).is_ok()
        })?;
        Ok(Self {
            address,
            _service: service,
        })
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The reference of a repository with its tag or digest.
    #[must_use]
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Pushes an image as `name` (`repository:tag`) and returns its full reference.
    ///
    /// # Errors
    /// The registry refuses a part of it.
    pub fn push(&self, name: &str, image: &Image) -> Result<String> {
        let (repository, tag) = name
            .split_once(':')
            .with_context(|| format!("{name:?} has no tag"))?;
        for blob in &image.blobs {
            self.push_blob(repository, blob)?;
        }
        self.push_manifest(repository, tag, &image.manifest)?;
        Ok(self.reference(name))
    }

    /// Pushes images of several architectures under one index.
    ///
    /// # Errors
    /// The registry refuses a part of it.
    pub fn push_index(&self, name: &str, images: &[&Image], index: &Blob) -> Result<String> {
        let (repository, tag) = name
            .split_once(':')
            .with_context(|| format!("{name:?} has no tag"))?;
        for image in images {
            for blob in &image.blobs {
                self.push_blob(repository, blob)?;
            }
            self.push_manifest(repository, &image.manifest.digest, &image.manifest)?;
        }
        self.push_manifest(repository, tag, index)?;
        Ok(self.reference(name))
    }

    fn push_blob(&self, repository: &str, blob: &Blob) -> Result<()> {
        let begin = http::request(
            self.address,
            "POST",
            &format!("/v2/{repository}/blobs/uploads/"),
            &[],
            &[],
        )?;
        let location = begin
            .headers
            .get("location")
            .context("the registry names no place to upload to")?;
        let path = http::path_of(location);
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{path}{separator}digest={}", blob.digest);
        let kind = [("content-type", "application/octet-stream")];
        let answer = http::request(self.address, "PUT", &path, &kind, &blob.bytes)?;
        expect_created("blob", &blob.digest, &answer)
    }

    fn push_manifest(&self, repository: &str, tag: &str, manifest: &Blob) -> Result<()> {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let kind = [("content-type", manifest.media_type.as_str())];
        let answer = http::request(self.address, "PUT", &path, &kind, &manifest.bytes)?;
        expect_created("manifest", &manifest.digest, &answer)
    }
}

fn expect_created(what: &str, digest: &str, answer: &http::Answer) -> Result<()> {
    if answer.status == 201 {
        return Ok(());
    }
    bail!(
        "the registry refused {what} {digest}: {} {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    )
}

/// A loopback port that nothing listens on. Another process may take it before it is used; the caller's
/// start then fails loudly.
///
/// # Errors
/// No port is free.
pub fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
