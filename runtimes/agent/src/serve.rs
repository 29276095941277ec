//! The agent's life after boot: one connection after the other on the transport, gRPC on each. Containers
//! do not notice when a connection breaks.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use catamaran_guest_protocol::handshake::{Finder, GREETING_BYTES, Next, answer, next};
use catamaran_guest_protocol::v1::agent_server::AgentServer;
use catamaran_guest_protocol::{MAX_MESSAGE_BYTES, Replay};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::boot::Guest;
use crate::console;
use crate::containers::Containers;
use crate::error::{Context, chain};
use crate::reaper::Reaper;
use crate::service::Service;
use crate::transport::Transport;

/// Unread input that the agent buffers for one stream, and for all.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 8 << 20;
const STREAMS_MAX: u32 = 4096;
/// After a failed connection.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the guest goes down.
pub(crate) fn run(guest: Guest) -> Result<Infallible, Box<dyn std::error::Error + Send + Sync>> {
    // One thread: the agent forks.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let reaper = Reaper::start().context(|| "cannot watch for ended processes".into())?;
        let transport = Transport::open(&guest.command_line).await?;
        let containers = Arc::new(Containers::new(guest.cgroups, Arc::clone(&reaper)));
        let service = AgentServer::new(Service::new(guest, containers))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        loop {
            if let Err(error) = connection(&transport, service.clone()).await {
                console::say(&format!("connection ended: {}", chain(&*error)));
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    })
}

async fn connection(
    transport: &Transport,
    service: AgentServer<Service>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut stream = transport.accept().await?;
    let Some(first) = handshake(&mut stream).await? else {
        return Ok(());
    };
    http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .serve_connection(
            TokioIo::new(Replay::new(first, stream)),
            TowerToHyperService::new(service),
        )
        .await?;
    Ok(())
}

/// Answers greetings until something else comes, and returns that: the beginning of HTTP/2. `None` where the
/// host end goes away before. A nonce is answered once: the shim may repeat its greeting before the answer
/// reaches it, and a second answer would land in its HTTP/2.
async fn handshake<S>(stream: &mut S) -> io::Result<Option<Vec<u8>>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut finder = Finder::greetings();
    let mut buffer = [0; 4096];
    let mut answered = loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(None);
        }
        if let Some(nonce) = finder.feed(&buffer[..read]) {
            break nonce;
        }
    };
    let mut pending = finder.rest();
    stream.write_all(&answer(&answered)).await?;
    loop {
        match next(&pending) {
            Next::Other => return Ok(Some(pending)),
            Next::Greeting(nonce) => {
                pending.drain(..GREETING_BYTES);
                if nonce != answered {
                    stream.write_all(&answer(&nonce)).await?;
                    answered = nonce;
                }
            }
            Next::Incomplete => {
                let read = stream.read(&mut buffer).await?;
                if read == 0 {
                    return Ok(None);
                }
                pending.extend_from_slice(&buffer[..read]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use catamaran_guest_protocol::handshake::greeting;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const TWO: &str = "fedcba9876543210fedcba9876543210";

    async fn exchange(bytes: Vec<u8>) -> (Option<Vec<u8>>, Vec<u8>) {
        let (mut shim, mut agent) = tokio::io::duplex(4096);
        shim.write_all(&bytes).await.unwrap();
        let first = if bytes.is_empty() {
            drop(shim);
            return (handshake(&mut agent).await.unwrap(), Vec::new());
        } else {
            handshake(&mut agent).await.unwrap()
        };
        drop(agent);
        let mut answers = Vec::new();
        shim.read_to_end(&mut answers).await.unwrap();
        (first, answers)
    }

    #[tokio::test]
    async fn http_begins_after_the_answer() {
        let bytes = [b"stale".to_vec(), greeting(ONE), b"PRI * HTTP/2.0".to_vec()].concat();
        let (first, answers) = exchange(bytes).await;
        assert_eq!(first.as_deref(), Some(&b"PRI * HTTP/2.0"[..]));
        assert_eq!(answers, answer(ONE));
    }

    #[tokio::test]
    async fn a_repeated_greeting_is_answered_once_and_a_new_one_again() {
        let bytes = [greeting(ONE), greeting(ONE), b"PRI".to_vec()].concat();
        assert_eq!(exchange(bytes).await.1, answer(ONE));
        let (mut shim, mut agent) = tokio::io::duplex(4096);
        let serving = tokio::spawn(async move { handshake(&mut agent).await.unwrap() });
        let mut read = vec![0; answer(ONE).len()];
        for (sent, expected) in [
            (greeting(ONE), answer(ONE)),
            ([greeting(ONE), greeting(TWO)].concat(), answer(TWO)),
        ] {
            shim.write_all(&sent).await.unwrap();
            shim.read_exact(&mut read).await.unwrap();
            assert_eq!(read, expected);
        }
        shim.write_all(b"P").await.unwrap();
        assert_eq!(serving.await.unwrap().as_deref(), Some(&b"P"[..]));
    }

    #[tokio::test]
    async fn a_host_that_goes_away_is_no_error() {
        assert_eq!(exchange(Vec::new()).await.0, None);
    }
}
