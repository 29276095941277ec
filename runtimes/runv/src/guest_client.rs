//! The connection to the guest's agent. The guest is not trusted: what it says is bounded and made printable, and
//! every call has a time limit unless waiting is its purpose.

use std::io::{self, Read};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use catamaran_guest_protocol::ConnectError;
use catamaran_guest_protocol::v1::agent_client::AgentClient;
use catamaran_guest_protocol::v1::{HelloRequest, HelloResponse};
use catamaran_sandbox::shim_server::ShimError;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// Limit for each call that does not wait for something on purpose. Under emulation on a busy host even simple
/// ones take long.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Stirred into the guest's random pool.
const ENTROPY_BYTES: usize = 64;

/// The agent's client.
pub type Agent = AgentClient<Channel>;

/// An agent that cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No HTTP/2 connection came about.
    #[error("the agent cannot be reached")]
    Connect(#[from] ConnectError),
    /// The host's random source.
    #[error("cannot read /dev/urandom")]
    Random(#[source] std::io::Error),
    /// It did not return the greeting.
    #[error("the agent refused the greeting: {0}")]
    Hello(String),
}

/// An agent that answered.
#[derive(Debug, Clone)]
pub struct Connected {
    /// Its client.
    pub agent: Agent,
    /// What it said of itself.
    pub hello: HelloResponse,
    /// The connection.
    pub connection: Connection,
}

/// The one connection to the agent: nothing sets up another.
#[derive(Debug, Clone)]
pub struct Connection(watch::Receiver<()>);

impl Connection {
    /// Resolves when it has ended, whoever ended it.
    pub async fn ended(mut self) {
        // Nothing is ever sent.
        while self.0.changed().await.is_ok() {}
    }
}

/// A stream whose owner, the task of the HTTP/2 connection, drops it with the connection's end.
struct Held {
    stream: UnixStream,
    _open: watch::Sender<()>,
}

impl AsyncRead for Held {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Held {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Waits for the agent on `stream`, then sets the guest's clock and gives it entropy. Has no time limit.
///
/// # Errors
/// [`GuestError`].
pub async fn connect(stream: UnixStream) -> Result<Connected, GuestError> {
    let nonce = hex::encode(random::<16>()?);
    let (open, connection) = watch::channel(());
    let held = Held { stream, _open: open };
    let mut agent = catamaran_guest_protocol::connect(held, &nonce).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let clock_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    let entropy = random::<ENTROPY_BYTES>()?.to_vec();
    let hello = within(agent.hello(limited(HelloRequest { clock_ns, entropy }))).await;
    let mut hello = hello.map_err(|status| GuestError::Hello(printable(status.message())))?;
    hello.kernel_release = printable(&hello.kernel_release).chars().take(64).collect();
    hello.agent_version = printable(&hello.agent_version).chars().take(64).collect();
    Ok(Connected {
        agent,
        hello,
        connection: Connection(connection),
    })
}

fn random<const N: usize>() -> Result<[u8; N], GuestError> {
    let mut bytes = [0; N];
    let mut source = std::fs::File::open("/dev/urandom").map_err(GuestError::Random)?;
    source.read_exact(&mut bytes).map_err(GuestError::Random)?;
    Ok(bytes)
}

/// A request with the usual time limit, as the agent is told. What holds is [`within`].
pub fn limited<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

/// The answer to a [`limited`] call, which a guest can begin in time and never end.
///
/// # Errors
/// The agent's, and DEADLINE_EXCEEDED.
pub async fn within<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "the guest's agent gave no whole answer within {} s",
            CALL_LIMIT.as_secs()
        ))),
    }
}

/// The agent's refusal as the shim's, with what was being done.
pub fn refused(doing: &str, status: &Status) -> ShimError {
    let text = format!("{doing}: {}", printable(status.message()));
    match status.code() {
        Code::NotFound => ShimError::NotFound(text),
        Code::AlreadyExists => ShimError::AlreadyExists(text),
        Code::FailedPrecondition => ShimError::FailedPrecondition(text),
        Code::InvalidArgument | Code::OutOfRange => ShimError::InvalidArgument(text),
        Code::Unimplemented => ShimError::Unimplemented(text),
        Code::DeadlineExceeded | Code::Cancelled => ShimError::DeadlineExceeded(text),
        Code::ResourceExhausted => ShimError::ResourceExhausted(text),
        _ => ShimError::Internal(text),
    }
}

/// What the guest says, as people may see it: without control characters and short.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(600)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_keep_their_code_and_lose_control_characters() {
        let status = Status::not_found("no \u{1b}[2Jexec");
        assert_eq!(refused("exec", &status).to_string(), "exec: no  [2Jexec");
        assert!(matches!(refused("exec", &status), ShimError::NotFound(_)));
        assert!(printable(&"x".repeat(5000)).len() <= 600);
    }

    /// The agent's side of the handshake, and nothing more.
    async fn answer_greeting(stream: &mut UnixStream) {
        use catamaran_guest_protocol::handshake::{Finder, answer};
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut finder = Finder::greetings();
        let mut buffer = [0; 4096];
        let nonce = loop {
            let read = stream.read(&mut buffer).await.unwrap();
            if let Some(nonce) = finder.feed(&buffer[..read]) {
                break nonce;
            }
        };
        stream.write_all(&answer(&nonce)).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_told() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (open, receiver) = watch::channel(());
        let connection = Connection(receiver);
        let held = Held {
            stream: ours,
            _open: open,
        };
        let nonce = "0123456789abcdef0123456789abcdef";
        let (agent, ()) = tokio::join!(
            catamaran_guest_protocol::connect(held, nonce),
            answer_greeting(&mut theirs)
        );
        let mut agent = agent.unwrap();
        let soon = Duration::from_millis(100);
        let ended = tokio::time::timeout(soon, connection.clone().ended());
        assert!(ended.await.is_err(), "while it is open");
        drop(theirs);
        connection.ended().await;
        assert!(agent.wait(tonic::Request::new(Default::default())).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_never_ends_is_given_up() {
        let answer = within(std::future::pending::<Result<Response<()>, Status>>()).await;
        assert_eq!(answer.unwrap_err().code(), Code::DeadlineExceeded);
    }
}
