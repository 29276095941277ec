//! The Kubernetes Container Runtime Interface, version `runtime.v1` as of Kubernetes 1.36, generated from
//! `proto/runtime.proto`. The daemon imports it through one module of its own (`cri::api`), so that the API
//! version can move without touching anything else.

/// Messages, clients and servers of the protobuf package `runtime.v1`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}
