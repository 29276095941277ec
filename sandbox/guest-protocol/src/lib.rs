//! What the vm shim and the guest's agent say to each other: gRPC over one HTTP/2 connection on the VM's
//! virtio-serial port (or vsock). The agent serves, the shim calls.

/// Messages, client and server of `catamaran.guest.v1`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("catamaran.guest.v1");
}
