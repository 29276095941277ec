//! The CRI's gRPC services. A handler verifies and converts; what is asked for is done in `pods` and the
//! libraries. [`api`] is the only place that names the generated types.

pub mod convert;
mod image_service;
mod layer;
mod metric_descriptors;
mod metrics;
mod node_status;
mod open_files;
mod runtime_service;
mod serve;
mod shim_stats;
mod stats;

/// Messages, clients and servers of the CRI.
pub mod api {
    pub use catamaran_cri_api::v1::*;
}

pub use serve::{ServeError, serve};
