//! The streaming server of the CRI: exec, attach and port-forward over SPDY/3.1 and WebSocket. The daemon asks
//! for a URL ([`Server::exec`], …), the client comes to it within the token's lifetime, and the daemon's
//! [`Backend`] does the work on plain byte streams.
//!
//! Architecture invariant: nothing here knows of processes, shims or the host; everything that a client sends is
//! bounded in length, number and time.

mod activity;
mod backend;
mod port_forward;
mod remote_command;
mod resize;
mod server;
mod spdy;
mod status;
mod token;
mod tunnel;
mod upgrade;
mod websocket;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

pub use backend::{
    AttachRequest, Backend, BackendError, Duplex, ExecRequest, PortForwardRequest, Streams, TerminalSize,
};
pub use server::{Config, RequestError, Server, ServerError, tls_from_files};
