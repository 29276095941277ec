//! The connection to the guest's agent: a handshake on the byte stream of the agent's port, then gRPC.
//!
//! A port may still hold what an earlier reader left, and the guest may open it late. So the shim sends
//! `CATAMARAN <nonce>\n` and throws away everything until `CATAMARAN-OK <nonce>\n` with its newest nonce comes
//! back; only then HTTP/2 begins. The agent answers every nonce, in order, until HTTP/2 begins. The guest is not
//! trusted: all that is read is bounded, and every call has a time limit unless waiting is its purpose.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use catamaran_guest_protocol::v1::agent_client::AgentClient;
use catamaran_guest_protocol::v1::{HelloRequest, HelloResponse};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Greeting of the shim, before the nonce.
pub const GREETING: &str = "CATAMARAN ";
/// Answer of the agent, before the nonce.
pub const ANSWER: &str = "CATAMARAN-OK ";
/// Time after which a nonce that was not answered is followed by another.
const NEXT_NONCE: Duration = Duration::from_secs(3);
/// Limit for each call that does not wait for something on purpose. Under emulation on a busy host even simple
/// ones take long.
pub const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Largest message from the guest.
const LARGEST_MESSAGE: usize = 1 << 20;
const ENTROPY_BYTES: usize = 64;

/// The agent's client.
pub type Agent = AgentClient<Channel>;

/// An agent that cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The byte stream ended or broke.
    #[error("the connection to the guest broke")]
    Stream(#[from] io::Error),
    /// HTTP/2 did not come about.
    #[error("the agent does not speak its protocol")]
    Transport(#[from] tonic::transport::Error),
    /// A call failed.
    #[error("the agent refused {call}: {message}")]
    Refused {
        /// Name of the call.
        call: &'static str,
        /// The agent's words.
        message: String,
    },
}

/// Waits for the agent on `stream` and greets it. Has no time limit of its own.
///
/// # Errors
/// [`GuestError`].
pub async fn connect(mut stream: UnixStream) -> Result<(Agent, HelloResponse), GuestError> {
    shake_hands(&mut stream).await?;
    let only = Arc::new(Mutex::new(Some(stream)));
    let connector = tower::service_fn(move |_| {
        let stream = only.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { stream.map(TokioIo::new).ok_or_else(|| io::Error::other("the guest's connection is gone")) }
    });
    // The address is only a name; the connection is the stream above.
    let endpoint = Endpoint::from_static("http://guest")
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(1 << 20)
        .http2_max_header_list_size(16 * 1024);
    let channel = endpoint.connect_with_connector(connector).await?;
    let mut agent = AgentClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE);
    let mut entropy = vec![0; ENTROPY_BYTES];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut entropy)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let clock_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    let hello = agent.hello(limited(HelloRequest { clock_ns, entropy })).await;
    let hello = hello.map_err(|status| refused("Hello", &status))?.into_inner();
    Ok((agent, checked(hello)))
}

/// A request with the usual limit.
pub fn limited<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

/// The error of a call, its text bounded.
pub fn refused(call: &'static str, status: &tonic::Status) -> GuestError {
    GuestError::Refused { call, message: bounded(status.message()) }
}

/// What the guest says is shown to people: printable and short.
pub fn bounded(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(400).collect()
}

fn checked(mut hello: HelloResponse) -> HelloResponse {
    hello.kernel_release = bounded(&hello.kernel_release).chars().take(64).collect();
    hello.agent_version = bounded(&hello.agent_version).chars().take(64).collect();
    hello
}

async fn shake_hands(stream: &mut UnixStream) -> io::Result<()> {
    let mut seen = Window::default();
    loop {
        let nonce = nonce()?;
        stream.write_all(format!("{GREETING}{nonce}\n").as_bytes()).await?;
        let expected = format!("{ANSWER}{nonce}\n");
        match tokio::time::timeout(NEXT_NONCE, wait_for(stream, &mut seen, expected.as_bytes())).await {
            Ok(result) => return result,
            Err(_) => continue,
        }
    }
}

/// Reads until `expected` has come, and no byte more.
async fn wait_for(stream: &mut UnixStream, seen: &mut Window, expected: &[u8]) -> io::Result<()> {
    loop {
        // Byte by byte: what follows the line belongs to HTTP/2. It is one line, so this costs nothing.
        let byte = stream.read_u8().await?;
        if seen.push(byte, expected) {
            return Ok(());
        }
    }
}

/// The last bytes that came.
#[derive(Debug, Default)]
struct Window {
    bytes: std::collections::VecDeque<u8>,
}

impl Window {
    /// True when the stream now ends with `expected`.
    fn push(&mut self, byte: u8, expected: &[u8]) -> bool {
        self.bytes.push_back(byte);
        let over = self.bytes.len().saturating_sub(expected.len());
        self.bytes.drain(..over);
        self.bytes.iter().eq(expected)
    }
}

fn nonce() -> io::Result<String> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(hex::encode(bytes))
}

/// A stream for tests and callers that hold a plain descriptor.
///
/// # Errors
/// When the descriptor cannot be made non-blocking.
pub fn stream_from(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncBufReadExt, BufReader};

    #[tokio::test(start_paused = true)]
    async fn stale_bytes_and_a_late_agent_do_no_harm() {
        let (mut shim, guest) = UnixStream::pair().unwrap();
        let agent = tokio::spawn(async move {
            let mut guest = BufReader::new(guest);
            guest.get_mut().write_all(b"CATAMARAN-OK 00112233\nPRI * stale\0\xff").await.unwrap();
            // Late: two nonces are waiting when the agent opens the port.
            let (mut first, mut second) = (String::new(), String::new());
            guest.read_line(&mut first).await.unwrap();
            guest.read_line(&mut second).await.unwrap();
            for line in [first, second] {
                let nonce = line.strip_prefix(GREETING).unwrap();
                guest.get_mut().write_all(format!("{ANSWER}{nonce}").as_bytes()).await.unwrap();
            }
            guest.get_mut().write_all(b"HTTP").await.unwrap();
        });
        shake_hands(&mut shim).await.unwrap();
        agent.await.unwrap();
        let mut rest = [0; 4];
        shim.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"HTTP");
    }

    #[tokio::test]
    async fn a_closed_stream_is_an_error() {
        let (mut shim, guest) = UnixStream::pair().unwrap();
        drop(guest);
        assert!(shake_hands(&mut shim).await.is_err());
    }

    proptest! {
        #[test]
        fn the_line_is_found_after_any_noise(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let expected = b"CATAMARAN-OK 0123\n";
            let mut window = Window::default();
            let all: Vec<u8> = noise.iter().chain(expected).copied().collect();
            let found = all.iter().map(|byte| window.push(*byte, expected)).collect::<Vec<_>>();
            prop_assert!(found.last().unwrap());
        }
    }
}
