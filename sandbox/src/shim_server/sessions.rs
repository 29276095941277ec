//! Hands out tokens for byte streams and accepts the connections that present them, on a socket of their own
//! that is opened with the first session.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

use super::ShimError;
use super::container::Container;
use super::output::lock;
use super::pod::Pod;
use crate::stream_frames::TOKEN_LENGTH;

/// A token that nobody presents in this time is void.
const TOKEN_LIFE: Duration = Duration::from_secs(30);
/// A connection has so long to present its token.
const GREETING: Duration = Duration::from_secs(5);
/// Tokens handed out and not presented.
const MAX_PENDING: usize = 256;

type Token = [u8; TOKEN_LENGTH];

/// What a token stands for.
pub(crate) enum Session {
    Exec {
        container: Arc<Container>,
        process: Vec<u8>,
        terminal: bool,
        wants: Wants,
    },
    Attach {
        container: Arc<Container>,
        wants: Wants,
    },
    PortForward {
        port: u16,
    },
    /// What did not fit into the answer of ExecSync.
    Rest {
        stdout: Vec<u8>,
        stderr: Vec<u8>,
        exit_code: i32,
    },
}

/// Which streams a client wants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wants {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

/// See the module.
pub(crate) struct Sessions {
    socket: PathBuf,
    listening: Mutex<bool>,
    pending: Mutex<HashMap<Token, (Session, Instant)>>,
}

impl Sessions {
    pub(crate) fn new(socket: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            socket,
            listening: Mutex::new(false),
            pending: Mutex::default(),
        })
    }

    /// Path of the socket and the token for one connection to it.
    pub(crate) fn open(&self, pod: &Arc<Pod>, session: Session) -> Result<(&Path, Token), ShimError> {
        let failed = |error: std::io::Error| {
            ShimError::internal(format!("open stream socket {}", self.socket.display()), &error)
        };
        {
            let mut listening = lock(&self.listening);
            if !*listening {
                self.listen(pod.clone()).map_err(failed)?;
                *listening = true;
            }
        }
        let mut token = Token::default();
        std::fs::File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut token))
            .map_err(failed)?;
        let mut pending = lock(&self.pending);
        let now = Instant::now();
        pending.retain(|_, (_, expiry)| *expiry > now);
        if pending.len() >= MAX_PENDING {
            let text = format!("{MAX_PENDING} streams were opened that nobody has connected to");
            return Err(ShimError::ResourceExhausted(text));
        }
        pending.insert(token, (session, now + TOKEN_LIFE));
        Ok((&self.socket, token))
    }

    /// As [`Self::open`], for a session that holds much: it goes when its token is void, not with the next one.
    pub(crate) fn open_large(&self, pod: &Arc<Pod>, session: Session) -> Result<(&Path, Token), ShimError> {
        let opened = self.open(pod, session)?;
        let (pod, token) = (pod.clone(), opened.1);
        tokio::spawn(async move {
            tokio::time::sleep(TOKEN_LIFE).await;
            lock(&pod.sessions.pending).remove(&token);
        });
        Ok(opened)
    }

    fn listen(&self, pod: Arc<Pod>) -> std::io::Result<()> {
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket)?;
        std::fs::set_permissions(&self.socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        tokio::spawn(greet(pod.clone(), stream));
                    }
                    Err(error) => {
                        // Out of descriptors: some will be closed.
                        tracing::warn!(%error, "accepting a stream");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(())
    }

    fn take(&self, token: &Token) -> Option<Session> {
        let (session, expiry) = lock(&self.pending).remove(token)?;
        (expiry > Instant::now()).then_some(session)
    }
}

async fn greet(pod: Arc<Pod>, mut stream: UnixStream) {
    if !super::serve::is_own_user(&stream) {
        tracing::warn!("stream connection of another user refused");
        return;
    }
    let mut token = Token::default();
    match tokio::time::timeout(GREETING, stream.read_exact(&mut token)).await {
        Ok(Ok(_)) => {}
        _ => return,
    }
    match pod.sessions.take(&token) {
        Some(session) => super::session_run::run(&pod, session, stream).await,
        None => tracing::warn!("stream connection with an unknown token"),
    }
}
