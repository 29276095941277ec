//! Connections to the pod's own localhost: the socket is made in the pod's network namespace and keeps it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use catamaran_sandbox::shim_server::ShimError;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::net::{TcpSocket, TcpStream};

use crate::namespaces::in_network_namespace;

/// On a loopback interface an answer comes at once; a full backlog is given some time.
const LIMIT: Duration = Duration::from_secs(10);

/// Connects over IPv4, then over IPv6.
pub(crate) async fn connect(network: Option<&Path>, port: u16) -> Result<TcpStream, ShimError> {
    let mut failures = Vec::new();
    for address in [
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    ] {
        match tokio::time::timeout(LIMIT, connect_to(network, address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failures.push(format!("{address}: {error}")),
            Err(_) => failures.push(format!("{address}: no answer within {} s", LIMIT.as_secs())),
        }
    }
    Err(ShimError::Internal(format!(
        "connect to port {port} in the pod: {}",
        failures.join("; ")
    )))
}

async fn connect_to(network: Option<&Path>, address: SocketAddr) -> std::io::Result<TcpStream> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let make = move || -> std::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(socket_with(family, SocketType::STREAM, flags, None)?)
    };
    let socket = match network {
        Some(path) => in_network_namespace(path, make).map_err(std::io::Error::other)?,
        None => make()?,
    };
    TcpSocket::from_std_stream(StdTcpStream::from(socket))
        .connect(address)
        .await
}
