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
        let given = request.auth.unwrap_or_default();
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
