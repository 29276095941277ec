//! The connection to the guest's agent. The guest is not trusted: what it says is bounded and made printable, and
//! every call has a time limit unless waiting is its purpose.

use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use catamaran_guest_protocol::ConnectError;
use catamaran_guest_protocol::v1::agent_client::AgentClient;
use catamaran_guest_protocol::v1::{HelloRequest, HelloResponse};
use catamaran_sandbox::shim_server::ShimError;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::Channel;

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

/// Waits for the agent on `stream`, then sets the guest's clock and gives it entropy. Has no time limit.
///
/// # Errors
/// [`GuestError`].
pub async fn connect(stream: UnixStream) -> Result<(Agent, HelloResponse), GuestError> {
    let nonce = hex::encode(random::<16>()?);
    let mut agent = catamaran_guest_protocol::connect(stream, &nonce).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let clock_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    let entropy = random::<ENTROPY_BYTES>()?.to_vec();
    let hello = agent.hello(limited(HelloRequest { clock_ns, entropy })).await;
    let mut hello = hello
        .map_err(|status| GuestError::Hello(printable(status.message())))?
        .into_inner();
    hello.kernel_release = printable(&hello.kernel_release).chars().take(64).collect();
    hello.agent_version = printable(&hello.agent_version).chars().take(64).collect();
    Ok((agent, hello))
}

fn random<const N: usize>() -> Result<[u8; N], GuestError> {
    let mut bytes = [0; N];
    let mut source = std::fs::File::open("/dev/urandom").map_err(GuestError::Random)?;
    source.read_exact(&mut bytes).map_err(GuestError::Random)?;
    Ok(bytes)
}

/// A request with the usual time limit.
pub fn limited<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

/// The agent's refusal as the shim's, with what was being done.
pub fn refused(doing: &str, status: &tonic::Status) -> ShimError {
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
        let status = tonic::Status::not_found("no \u{1b}[2Jexec");
        assert_eq!(refused("exec", &status).to_string(), "exec: no  [2Jexec");
        assert!(matches!(refused("exec", &status), ShimError::NotFound(_)));
        assert!(printable(&"x".repeat(5000)).len() <= 600);
    }
}
