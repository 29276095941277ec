//! The shim's side of a new connection: handshake, then an HTTP/2 client with windows wide enough that
//! output which nobody reads cannot hold up the other calls.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::handshake::{Finder, greeting};
use crate::v1::agent_client::AgentClient;
use crate::{MAX_MESSAGE_BYTES, Replay};

/// Between two greetings while the agent has not answered.
const GREETING_INTERVAL: Duration = Duration::from_millis(250);
/// Each output stream may hold this much unread data.
const STREAM_WINDOW: u32 = 256 << 10;
/// All of them together; larger than any number of processes of a pod times [`STREAM_WINDOW`] would need in
/// practice, and an upper bound only: nothing is reserved.
const CONNECTION_WINDOW: u32 = 512 << 20;

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The stream broke.
    #[error("the connection to the guest's agent broke during the handshake")]
    Io(#[from] std::io::Error),
    /// The nonce is not 32 lower-case hexadecimal characters.
    #[error("the handshake's nonce must be 32 lower-case hexadecimal characters")]
    Nonce,
    /// HTTP/2 failed.
    #[error("HTTP/2 with the guest's agent failed")]
    Http(#[from] tonic::transport::Error),
}

/// Greets the agent on `io` until it answers, then returns a client. There is no time limit: drop the future
/// to give up. `nonce` is random and new for every connection.
///
/// # Errors
/// [`ConnectError`] where the stream breaks.
pub async fn connect<S>(mut io: S, nonce: &str) -> Result<AgentClient<Channel>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if nonce.len() != crate::handshake::NONCE_LEN
        || !nonce
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    {
        return Err(ConnectError::Nonce);
    }
    let rest = greet(&mut io, nonce).await?;
    let io = Arc::new(Mutex::new(Some(TokioIo::new(Replay::new(rest, io)))));
    // One stream, so one connection: a second attempt fails instead of greeting again.
    let connector = tower::service_fn(move |_: Uri| {
        let io = io.lock().map(|mut io| io.take()).unwrap_or(None);
        async move { io.ok_or_else(|| std::io::Error::other("the connection to the guest's agent is gone")) }
    });
    let channel = Endpoint::from_static("http://guest.invalid")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector(connector)
        .await?;
    Ok(AgentClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES))
}

async fn greet<S>(io: &mut S, nonce: &str) -> std::io::Result<Vec<u8>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut finder = Finder::answers();
    let mut buffer = [0; 4096];
    loop {
        io.write_all(&greeting(nonce)).await?;
        io.flush().await?;
        let again = tokio::time::sleep(GREETING_INTERVAL);
        tokio::pin!(again);
        loop {
            tokio::select! {
                read = io.read(&mut buffer) => {
                    let read = read?;
                    if read == 0 {
                        return Err(std::io::ErrorKind::UnexpectedEof.into());
                    }
                    // The agent answers a nonce once, so no answer can follow this one.
                    if finder.feed(&buffer[..read]).as_deref() == Some(nonce) {
                        return Ok(finder.rest());
                    }
                }
                () = &mut again => break,
            }
        }
    }
}
