//! The HTTP server behind the URLs that Exec, Attach and PortForward answer with.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{AttachRequest, Backend, ExecRequest, PortForwardRequest};
use crate::remote_command::Command;
use crate::spdy::{Connection, Limits};
use crate::token::Tokens;
use crate::upgrade::{self, Protocol, response};
use crate::{port_forward, remote_command, tunnel, websocket};

/// How the server listens and what it allows.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on. Clients are the kubelet or the API server, by the URLs given; the default is a
    /// port of the loopback that the kernel chooses.
    pub address: SocketAddr,
    /// Scheme, host and port of the URLs where they are reached another way than by `address`, without a slash
    /// at the end (`https://node7.example:10010`).
    pub base_url: Option<String>,
    /// TLS, see [`tls_from_files`].
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// For how long a URL is good.
    pub token_lifetime: Duration,
    /// Most URLs that have been given and not used.
    pub max_tokens: usize,
    /// Most connections at once.
    pub max_connections: usize,
    /// For how long a client may take to open the streams of its command.
    pub stream_creation_timeout: Duration,
    /// Without data for this long a connection is closed.
    pub idle_timeout: Duration,
    /// Between pings to clients, which find out the ones that are gone.
    pub ping_interval: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            base_url: None,
            tls: None,
            token_lifetime: Duration::from_secs(60),
            max_tokens: 1000,
            max_connections: 1024,
            stream_creation_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(4 * 3600),
            ping_interval: Duration::from_secs(15),
        }
    }
}

/// What can go wrong with the server itself.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be listened on.
    #[error("listening on {address} for streaming requests")]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificate or key cannot be used.
    #[error("tls certificate {certificate} with key {key}: {reason}")]
    Tls {
        /// The certificate's file.
        certificate: String,
        /// The key's file.
        key: String,
        /// What is wrong with them.
        reason: String,
    },
}

/// Why a request gets no URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// gRPC INVALID_ARGUMENT.
    #[error("{0}")]
    Invalid(&'static str),
    /// gRPC RESOURCE_EXHAUSTED.
    #[error("too many streaming requests are waiting for their clients; try again later")]
    TooMany,
}

/// A server's TLS configuration from PEM files: the certificate with its chain, and the key.
///
/// # Errors
/// A file cannot be read, or they do not belong together.
pub fn tls_from_files(certificate: &Path, key: &Path) -> Result<Arc<rustls::ServerConfig>, ServerError> {
    let failed = |reason: String| ServerError::Tls {
        certificate: certificate.display().to_string(),
        key: key.display().to_string(),
        reason,
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate)
        .map_err(|e| failed(e.to_string()))?
        .collect();
    let chain = chain.map_err(|e| failed(e.to_string()))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| failed(e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|e| failed(e.to_string()))?;
    Ok(Arc::new(config))
}

#[derive(Debug)]
enum Waiting {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

impl Waiting {
    fn verb(&self) -> &'static str {
        match self {
            Waiting::Exec(_) => "exec",
            Waiting::Attach(_) => "attach",
            Waiting::PortForward(_) => "portforward",
        }
    }
}

struct Inner {
    config: Config,
    base_url: String,
    backend: Arc<dyn Backend>,
    tokens: Tokens<Waiting>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The running server. Cheap to clone; it stops by [`Self::shutdown`] alone.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
    address: SocketAddr,
}

impl Server {
    /// Listens and serves.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn bind(config: Config, backend: Arc<dyn Backend>) -> Result<Server, ServerError> {
        let wanted = config.address;
        let failed = |source| ServerError::Listen {
            address: wanted,
            source,
        };
        let listener = TcpListener::bind(wanted).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        let base_url = config
            .base_url
            .clone()
            .unwrap_or_else(|| format!("{scheme}://{address}"));
        let inner = Arc::new(Inner {
            tokens: Tokens::new(config.token_lifetime, config.max_tokens),
            base_url,
            backend,
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            config,
        });
        inner.tasks.spawn(accept_loop(Arc::clone(&inner), listener));
        Ok(Server { inner, address })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The URL of an exec, good for one client.
    ///
    /// # Errors
    /// No streams, a terminal with stderr, no command; or too many requests wait.
    pub fn exec(&self, request: ExecRequest) -> Result<String, RequestError> {
        if request.command.is_empty() {
            return Err(RequestError::Invalid("cmd: empty"));
        }
        streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        self.url(Waiting::Exec(request))
    }

    /// The URL of an attach, good for one client.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn attach(&self, request: AttachRequest) -> Result<String, RequestError> {
        streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        self.url(Waiting::Attach(request))
    }

    /// The URL of a port-forward, good for one client.
    ///
    /// # Errors
    /// Too many requests wait.
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String, RequestError> {
        self.url(Waiting::PortForward(request))
    }

    fn url(&self, request: Waiting) -> Result<String, RequestError> {
        let verb = request.verb();
        let token = self.inner.tokens.insert(request).ok_or(RequestError::TooMany)?;
        Ok(format!("{}/{verb}/{token}", self.inner.base_url))
    }

    /// Takes no more clients, cuts those that are served, and waits for their tasks.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

fn streams(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<(), RequestError> {
    if tty && stderr {
        return Err(RequestError::Invalid(
            "stderr: a terminal has only one output; tty and stderr exclude each other",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(RequestError::Invalid(
            "stdin, stdout, stderr: at least one must be set",
        ));
    }
    Ok(())
}

/// For how long the head of a request, or a TLS handshake, may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

async fn accept_loop(inner: Arc<Inner>, listener: TcpListener) {
    let tls = inner.config.tls.clone().map(TlsAcceptor::from);
    let slots = Arc::new(Semaphore::new(inner.config.max_connections));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = inner.stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Usually no descriptors are left; a moment later there may be.
                tracing::warn!(%error, "accepting a streaming connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!(
                most = inner.config.max_connections,
                "too many streaming connections; one is refused"
            );
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (inner, tls) = (Arc::clone(&inner), tls.clone());
        inner.tasks.clone().spawn(async move {
            let stop = inner.stop.clone();
            let serve = async {
                match tls {
                    None => serve_connection(&inner, stream).await,
                    Some(tls) => match tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                        Ok(Ok(stream)) => serve_connection(&inner, stream).await,
                        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake of a streaming client"),
                        Err(_) => tracing::debug!("a streaming client did not finish its TLS handshake"),
                    },
                }
            };
            tokio::select! {
                () = serve => {}
                () = stop.cancelled() => {}
            }
            drop(slot);
        });
    }
}

/// What a connection was upgraded for.
struct Upgrade {
    request: Waiting,
    protocol: Protocol,
    upgraded: hyper::upgrade::OnUpgrade,
}

async fn serve_connection<IO>(inner: &Arc<Inner>, io: IO)
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Upgrade>(1);
    let service = service_fn(|request: Request<Incoming>| {
        let response = answer(inner, request, &sender);
        async move { Ok::<_, std::convert::Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(32 << 10)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a streaming client's HTTP request");
    }
    let Ok(Upgrade {
        request,
        protocol,
        upgraded,
    }) = receiver.try_recv()
    else {
        return;
    };
    match upgraded.await {
        Ok(upgraded) => serve_upgraded(inner, request, protocol, upgraded).await,
        Err(error) => tracing::debug!(%error, "upgrade of a streaming client's connection"),
    }
}

fn answer(
    inner: &Inner,
    mut request: Request<Incoming>,
    upgrades: &tokio::sync::mpsc::Sender<Upgrade>,
) -> Response<String> {
    if request.method() != Method::GET && request.method() != Method::POST {
        return response(StatusCode::METHOD_NOT_ALLOWED, "only GET and POST".into());
    }
    let not_found = || {
        response(
            StatusCode::NOT_FOUND,
            "no such streaming request, or it is used up or too old".into(),
        )
    };
    let mut parts = request.uri().path().trim_start_matches('/').split('/');
    let (Some(verb), Some(token), None) = (parts.next(), parts.next(), parts.next()) else {
        return not_found();
    };
    let chosen = match verb {
        "exec" | "attach" => upgrade::remote_command(request.headers()),
        "portforward" => upgrade::port_forward(request.headers()),
        _ => return not_found(),
    };
    let (protocol, headers) = match chosen {
        Ok(chosen) => chosen,
        // The token stays good: the client may try another protocol.
        Err(refusal) => {
            let reason: String = refusal.body().chars().take(200).collect();
            tracing::warn!(verb, status = %refusal.status(), reason, "a streaming client is refused");
            return *refusal;
        }
    };
    let Some(waiting) = inner.tokens.take(token, |waiting| waiting.verb() == verb) else {
        return not_found();
    };
    let upgraded = hyper::upgrade::on(&mut request);
    if upgrades
        .try_send(Upgrade {
            request: waiting,
            protocol,
            upgraded,
        })
        .is_err()
    {
        return response(
            StatusCode::BAD_REQUEST,
            "the connection is upgraded already".into(),
        );
    }
    let mut answer = response(StatusCode::SWITCHING_PROTOCOLS, String::new());
    *answer.headers_mut() = headers;
    answer
}

async fn serve_upgraded(inner: &Inner, request: Waiting, protocol: Protocol, upgraded: Upgraded) {
    let config = &inner.config;
    let io = TokioIo::new(upgraded);
    let limits = |streams, unaccepted| Limits {
        streams,
        unaccepted,
        idle: config.idle_timeout,
        ping: config.ping_interval,
    };
    let backend = &inner.backend;
    let timeout = config.stream_creation_timeout;
    let command = match request {
        Waiting::Exec(request) => Command::Exec(request),
        Waiting::Attach(request) => Command::Attach(request),
        Waiting::PortForward(request) => {
            let limits = limits(PORT_FORWARD_STREAMS, 64);
            let connection = if protocol == Protocol::TunnelPortForward {
                Connection::server(tunnel::Tunnel::new(web_socket(io).await), limits)
            } else {
                Connection::server(io, limits)
            };
            return port_forward::serve(connection, &request, Arc::clone(backend), timeout).await;
        }
    };
    match protocol {
        Protocol::WebSocket(version) => {
            let times = websocket::Times {
                idle: config.idle_timeout,
                ping: config.ping_interval,
            };
            websocket::serve(web_socket(io).await, version, &command, backend.as_ref(), times).await;
        }
        Protocol::Spdy(version) => {
            let connection = Connection::server(io, limits(COMMAND_STREAMS, COMMAND_STREAMS));
            remote_command::serve(connection, version, &command, backend.as_ref(), timeout).await;
        }
        // `answer` chooses by the verb.
        Protocol::SpdyPortForward | Protocol::TunnelPortForward => {}
    }
}

/// Streams of a command: five, and some for clients that open ones which are then given up.
const COMMAND_STREAMS: usize = 16;
/// Two for each forwarded connection.
const PORT_FORWARD_STREAMS: usize = 1024;

async fn web_socket<IO: AsyncRead + AsyncWrite + Unpin>(io: IO) -> WebSocketStream<IO> {
    WebSocketStream::from_raw_socket(io, Role::Server, Some(websocket::message_limits())).await
}
