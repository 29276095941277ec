//! Connects a stream of the shim to a port of the pod's own localhost, IPv4 first, then IPv6.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use catamaran_guest_protocol::MAX_CHUNK_BYTES;
use catamaran_guest_protocol::v1::PortChunk;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use crate::error::{Context, Error, Result};

/// Answers of the stream.
pub(crate) type Chunks = mpsc::Receiver<std::result::Result<PortChunk, Status>>;

/// Connects and carries bytes both ways until both ends are closed or one breaks.
pub(crate) async fn start(mut input: Streaming<PortChunk>) -> Result<Chunks> {
    let first = input
        .message()
        .await
        .context(|| "cannot read the first message".into())?
        .ok_or_else(|| Error::Invalid("the first message must name the port".into()))?;
    let port = u16::try_from(first.port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Error::Invalid(format!("port {} is none of 1 to 65535", first.port)))?;
    let socket = connect(port).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            Error::State(format!("nothing listens on port {port} of the pod's localhost"))
        }
        _ => Error::Failed {
            what: format!("cannot connect to port {port}"),
            source: error.into(),
        },
    })?;
    let (mut from_socket, mut to_socket) = socket.into_split();
    let (sender, receiver) = mpsc::channel(2);
    let reading = sender.clone();
    tokio::spawn(async move {
        loop {
            let Ok(permit) = reading.reserve().await else {
                return;
            };
            let mut buffer = vec![0; MAX_CHUNK_BYTES];
            let read = tokio::select! {
                biased;
                () = reading.closed() => return,
                read = from_socket.read(&mut buffer) => read,
            };
            match read {
                Ok(0) => {
                    permit.send(Ok(PortChunk {
                        port: 0,
                        data: Vec::new(),
                        eof: true,
                    }));
                    return;
                }
                Ok(length) => {
                    buffer.truncate(length);
                    permit.send(Ok(PortChunk {
                        port: 0,
                        data: buffer,
                        eof: false,
                    }));
                }
                Err(error) => {
                    permit.send(Err(Status::unavailable(format!("the connection broke: {error}"))));
                    return;
                }
            }
        }
    });
    tokio::spawn(async move {
        let mut next = Some(Ok(first));
        while let Some(Ok(chunk)) = next {
            if to_socket.write_all(&chunk.data).await.is_err() {
                return;
            }
            if chunk.eof {
                break;
            }
            // Without this the writing half would outlive a shim that has gone.
            next = tokio::select! {
                next = input.next() => next,
                () = sender.closed() => return,
            };
        }
        // The other end may have gone already.
        let _ = to_socket.shutdown().await;
    });
    Ok(receiver)
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(socket) => Ok(socket),
        Err(first) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
            .await
            .map_err(|_| first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_of_one_family_only_is_reached() {
        let v6 = tokio::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await;
        let Ok(v6) = v6 else {
            println!("skipped: a_listener_of_one_family_only_is_reached: no IPv6 on this machine");
            return;
        };
        assert!(
            connect(v6.local_addr().unwrap().port())
                .await
                .unwrap()
                .peer_addr()
                .unwrap()
                .is_ipv6()
        );
        let v4 = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .unwrap();
        assert!(
            connect(v4.local_addr().unwrap().port())
                .await
                .unwrap()
                .peer_addr()
                .unwrap()
                .is_ipv4()
        );
    }
}
