//! ImageService.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use catamaran_images::{Auth, FsUsage};
use futures::Stream;
use futures::stream;
use serde_json::json;
use tonic::{Request, Response, Status};

use super::api::image_service_server::ImageService;
use super::{api, convert};
use crate::error::Error;
use crate::node::{Node, now_ns};

type Reply<T> = Result<Response<T>, Status>;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct Images {
    node: Arc<Node>,
}

impl Images {
    pub(super) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    fn list(&self, filter: Option<api::ImageFilter>) -> Vec<api::Image> {
        let wanted = filter
            .and_then(|filter| filter.image)
            .map(|image| image.image)
            .unwrap_or_default();
        if wanted.is_empty() {
            return self
                .node
                .images
                .list()
                .iter()
                .map(|image| convert::image(image))
                .collect();
        }
        self.node
            .images
            .get(&wanted)
            .iter()
            .map(|image| convert::image(image))
            .collect()
    }
}

fn reference(spec: Option<api::ImageSpec>) -> Result<String, Error> {
    let reference = spec.map(|spec| spec.image).unwrap_or_default();
    if reference.is_empty() {
        Err(Error::invalid("image.image", "is empty"))
    } else {
        Ok(reference)
    }
}

/// Whether credentials with this CRI `server_address` are for the registry that an image comes from. Without an
/// address they are; with another's they must not reach it, and the pull goes on without them, as with containerd.
fn is_for(server_address: &str, reference: &str) -> bool {
    const HUB: &str = "docker.io";
    // A registry has a dot or a port in its name, or is the local host; all else is a repository of Docker Hub.
    let registry = match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => HUB,
    };
    let server = server_address
        .split_once("://")
        .map_or(server_address, |(_, rest)| rest);
    let server = server.split('/').next().unwrap_or_default();
    let known = |name: &str| match name.to_ascii_lowercase().as_str() {
        "index.docker.io" | "registry-1.docker.io" => HUB.to_owned(),
        other => other.to_owned(),
    };
    server_address.is_empty() || known(server) == known(registry)
}

fn filesystem(usage: FsUsage) -> api::FilesystemUsage {
    api::FilesystemUsage {
        timestamp: usage.timestamp_ns,
        fs_id: Some(api::FilesystemIdentifier {
            mountpoint: usage.mountpoint.display().to_string(),
        }),
        used_bytes: Some(api::UInt64Value {
            value: usage.used_bytes,
        }),
        inodes_used: Some(api::UInt64Value {
            value: usage.inodes_used,
        }),
    }
}

#[tonic::async_trait]
impl ImageService for Images {
    async fn list_images(&self, request: Request<api::ListImagesRequest>) -> Reply<api::ListImagesResponse> {
        Ok(Response::new(api::ListImagesResponse {
            images: self.list(request.into_inner().filter),
        }))
    }

    type StreamImagesStream = Pin<Box<dyn Stream<Item = Result<api::StreamImagesResponse, Status>> + Send>>;

    async fn stream_images(
        &self,
        request: Request<api::StreamImagesRequest>,
    ) -> Reply<Self::StreamImagesStream> {
        let images = self.list(request.into_inner().filter);
        let parts: Vec<_> = images
            .chunks(100)
            .map(|part| {
                Ok(api::StreamImagesResponse {
                    images: part.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(stream::iter(parts))))
    }

    async fn image_status(
        &self,
        request: Request<api::ImageStatusRequest>,
    ) -> Reply<api::ImageStatusResponse> {
        let request = request.into_inner();
        let reference = reference(request.image)?;
        let Some(image) = self.node.images.get(&reference) else {
            // CRI: an image that is not there is an empty answer.
            return Ok(Response::new(api::ImageStatusResponse::default()));
        };
        let info = if request.verbose {
            let document = json!({ "chainIDs": image.layers, "imageSpec": image.config });
            HashMap::from([("info".to_owned(), document.to_string())])
        } else {
            HashMap::new()
        };
        Ok(Response::new(api::ImageStatusResponse {
            image: Some(convert::image(&image)),
            info,
        }))
    }

    async fn pull_image(&self, request: Request<api::PullImageRequest>) -> Reply<api::PullImageResponse> {
        let request = request.into_inner();
        let reference = reference(request.image)?;
        let mut given = request.auth.unwrap_or_default();
        if !is_for(&given.server_address, &reference) {
            tracing::debug!(
                image = reference,
                server = given.server_address,
                "credentials of another registry are not used"
            );
            given = api::AuthConfig::default();
        }
        let auth = Auth::from_cri(
            &given.username,
            &given.password,
            &given.auth,
            &given.identity_token,
            &given.registry_token,
        )
        .map_err(|e| Error::invalid("auth.auth", e.to_string()))?;
        let image = self
            .node
            .images
            .pull(&reference, auth)
            .await
            .map_err(Error::from)?;
        Ok(Response::new(api::PullImageResponse {
            image_ref: image.id.clone(),
        }))
    }

    async fn remove_image(
        &self,
        request: Request<api::RemoveImageRequest>,
    ) -> Reply<api::RemoveImageResponse> {
        let reference = reference(request.into_inner().image)?;
        self.node.images.remove(&reference).await.map_err(Error::from)?;
        Ok(Response::new(api::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<api::ImageFsInfoRequest>) -> Reply<api::ImageFsInfoResponse> {
        let node = self.node.clone();
        let (images, containers) = tokio::task::spawn_blocking(move || -> Result<_, Error> {
            let images = node.images.usage()?;
            let mut containers = FsUsage {
                mountpoint: node.dirs.snapshots(),
                used_bytes: 0,
                inodes_used: 0,
                timestamp_ns: now_ns(),
            };
            for id in node.images.snapshots() {
                // One that is removed meanwhile uses nothing.
                if let Ok(usage) = node.images.snapshot_usage(&id) {
                    containers.used_bytes += usage.bytes;
                    containers.inodes_used += usage.inodes;
                }
            }
            Ok((images, containers))
        })
        .await
        .map_err(|e| Error::Internal(e.to_string()))??;
        Ok(Response::new(api::ImageFsInfoResponse {
            image_filesystems: vec![filesystem(images)],
            container_filesystems: vec![filesystem(containers)],
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_for_the_registry_that_they_name() {
        for (server, reference) in [
            ("", "r.example/a"),
            ("r.example", "r.example/a:1"),
            ("https://R.example/v2/", "r.example/a@sha256:0"),
            ("http://localhost:5000", "localhost:5000/a"),
            ("https://index.docker.io/v1/", "busybox"),
            ("docker.io", "library/busybox:1"),
            ("registry-1.docker.io", "docker.io/library/busybox"),
        ] {
            assert!(is_for(server, reference), "{server} {reference}");
        }
        for (server, reference) in [
            ("r.example", "busybox"),
            ("r.example", "other.example/r.example/a"),
            ("r.example", "r.example:5000/a"),
            ("https://docker.io", "r.example/a"),
            ("https://", "r.example/a"),
        ] {
            assert!(!is_for(server, reference), "{server} {reference}");
        }
    }
}
