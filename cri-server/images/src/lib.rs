//! Images of a node: pulled from registries, verified, unpacked into layers, leased to containers.
//!
//! Code map: `reference` (names), `hosts` and `credentials` (configuration), `registry` (the HTTP client),
//! `manifest` and `image` (documents), `layer` (the only place that knows how a layer lies on disk), `metadata` (the
//! durable records), `store` (the public verbs), `recover` (what a start does), `attempts` (who waits for which pull), `pull`
//! and `fetch` (what one pull does, and each of its layers), `places` (how many at once), `kept` (layers of a broken
//! pull), `snapshot` (containers' root file systems).
//!
//! Below the root directory: `metadata.redb`, `content/<algorithm>-<hex>` (manifests, configurations),
//! `layers/<short>/fs`, `l/<short>` (short links where many layers must fit into mount options), `leases/<key>`
//! (image volumes), `empty`, `tmp`.
//!
//! Architecture invariants: nothing is visible before its digest was verified and its bytes are on disk; no path
//! of a layer is ever resolved outside the layer's own directory; a failed pull leaves nothing but verified layers, for
//! a while, where a retry may go on; only root may enter the directories (images hold setuid programs).

mod attempts;
mod config;
mod credentials;
mod digest;
mod error;
mod fetch;
mod hosts;
mod image;
mod kept;
mod layer;
mod manifest;
mod metadata;
mod places;
mod platform;
mod pull;
mod recover;
mod reference;
mod registry;
mod snapshot;
mod store;

pub use config::{FsUsage, ImagesConfig, RootfsMount, Snapshot, SnapshotUsage};
pub use credentials::Auth;
pub use error::{Cause, Error, Result};
pub use image::Image;
pub use platform::Platform;
pub use store::ImageStore;
