//! What the daemon and the shims share: identifiers, the pod's specification as the daemon hands it to a
//! shim, exit records, the shim protocols and the shim's bootstrap, stdio and CRI log.
//!
//! Architecture invariant: nothing here depends on the daemon or on a runtime.

pub mod bootstrap;
pub mod cri_log;
pub mod exit;
pub mod guest_image;
pub mod id;
pub mod pod_spec;
pub mod protocol;
pub mod shim_log;
pub mod shim_server;
pub mod stdio;
pub mod stream_frames;
