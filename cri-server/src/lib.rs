//! Catamaran's daemon: the CRI server of a node.
//!
//! Code map: `cri` (the gRPC services), `pods` (the verbs, states, owners and the recovery), `shim` (the
//! protocols towards shims), `store` (durable records), `streaming` (exec, attach and port-forward sessions), `handlers` (what a RuntimeClass names), `cli` (the
//! operator's commands).
//!
//! Architecture invariant: the daemon links no runtime; a pod's processes are a shim's, which outlives it.
//! Architecture invariant: only a pod's owner task changes its states; readers take snapshots.
//! Architecture invariant: a side effect begins after the record of its intent is durable.

mod apparmor;
pub mod cli;
pub mod config;
pub mod cpu_rates;
pub mod cri;
pub mod error;
pub mod events;
mod favordynmods;
pub mod handlers;
mod metrics;
pub mod node;
pub mod nri;
pub mod pods;
pub mod shim;
pub mod store;
pub mod streaming;
