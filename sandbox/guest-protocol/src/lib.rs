//! What the vm shim and the guest's agent say to each other: gRPC over one HTTP/2 connection on the VM's
//! virtio-serial port (or vsock). The agent serves, the shim calls.
//!
//! Before HTTP/2 both sides agree on where the connection begins ([`handshake`]); [`connect`] does that for
//! the shim and returns a client.

mod connect;
pub mod handshake;
mod replay;

pub use connect::{ConnectError, connect};
pub use replay::Replay;

/// Messages, client and server of `catamaran.guest.v1`.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("catamaran.guest.v1");
}

/// Name of the virtio-serial port that the agent listens on (`virtserialport,name=`).
pub const PORT_NAME: &str = "catamaran.agent";

/// vsock port that the agent listens on, where [`VSOCK_CMDLINE`] is on the kernel's command line.
pub const VSOCK_PORT: u32 = 1032;

/// Word of the kernel's command line that makes the agent listen on vsock instead of the virtio-serial port.
pub const VSOCK_CMDLINE: &str = "catamaran.transport=vsock";

/// Largest message of either direction, bytes. An OCI spec with a long seccomp profile stays far below.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// Most bytes of output or input in one chunk.
pub const MAX_CHUNK_BYTES: usize = 32 << 10;
