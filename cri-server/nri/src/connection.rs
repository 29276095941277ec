//! One plugin's socket: calls to the plugin, calls of the plugin, and its end. Whatever is wrong with the bytes
//! that come, the connection is closed and everyone who waits is told.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::mux::{self, PLUGIN_SERVICE, RUNTIME_SERVICE};
use crate::ttrpc::{self, Decoder, Message, Request, Response, Status, code};

const PLUGIN: &str = "nri.pkg.api.v1alpha1.Plugin";
/// Messages that wait for the socket.
const OUTGOING: usize = 64;
/// Calls of one plugin at once.
const SERVED_AT_ONCE: usize = 8;

/// Why a call has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    /// The plugin's own error.
    #[error("{message} (code {code})")]
    Status {
        /// gRPC's number.
        code: i32,
        /// The plugin's words.
        message: String,
    },
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The connection has ended.
    #[error("the connection has ended: {0}")]
    Closed(String),
    /// The request is longer than the protocol allows.
    #[error("a request of {0} bytes is longer than the protocol allows")]
    TooLong(usize),
    /// The answer is not what was asked for.
    #[error("the answer is no protobuf of the wanted type")]
    Answer,
}

impl CallError {
    /// The plugin did not do what was asked and said so; anything else is the end of the plugin.
    pub(crate) fn is_plugins_word(&self) -> bool {
        matches!(self, Self::Status { .. })
    }
}

/// What the runtime serves.
#[async_trait::async_trait]
pub(crate) trait Serve: Send + Sync + 'static {
    /// Answers a call of the plugin.
    async fn serve(&self, method: &str, payload: &[u8]) -> Result<Vec<u8>, Status>;
}

/// A plugin's socket. Clones share it; it is closed by [`Connection::close`].
#[derive(Clone)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
}

struct Shared {
    outgoing: mpsc::Sender<Bytes>,
    calls: Mutex<Calls>,
    closed: CancellationToken,
}

#[derive(Default)]
struct Calls {
    last: u32,
    waiting: HashMap<u32, oneshot::Sender<Response>>,
    why: Option<String>,
}

impl Shared {
    fn calls<T>(&self, look: impl FnOnce(&mut Calls) -> T) -> T {
        look(&mut self.calls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn close(&self, why: &str) {
        self.calls(|calls| {
            calls.why.get_or_insert_with(|| why.to_owned());
            calls.waiting.clear();
        });
        self.closed.cancel();
    }

    fn closed_error(&self) -> CallError {
        CallError::Closed(self.calls(|calls| calls.why.clone()).unwrap_or_default())
    }
}

impl Connection {
    /// Begins to read and write.
    pub(crate) fn start(stream: UnixStream, server: Arc<dyn Serve>) -> Self {
        let (reader, writer) = stream.into_split();
        let (outgoing, queue) = mpsc::channel(OUTGOING);
        let shared = Arc::new(Shared {
            outgoing,
            calls: Mutex::default(),
            closed: CancellationToken::new(),
        });
        tokio::spawn(write(shared.clone(), writer, queue));
        tokio::spawn(read(shared.clone(), reader, server));
        Self { shared }
    }

    /// Calls the plugin.
    ///
    /// # Errors
    /// [`CallError`].
    pub(crate) async fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: &str,
        message: &Q,
        limit: Duration,
    ) -> Result<A, CallError> {
        let request = Request {
            service: PLUGIN.to_owned(),
            method: method.to_owned(),
            payload: message.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        };
        let (sender, answer) = oneshot::channel();
        let stream = self.shared.calls(|calls| {
            // Odd and rising, as the protocol has it for clients.
            calls.last = if calls.last == 0 {
                1
            } else {
                calls.last.wrapping_add(2)
            };
            if calls.why.is_none() {
                calls.waiting.insert(calls.last, sender);
            }
            calls.last
        });
        let bytes = match ttrpc::request(stream, &request) {
            Ok(bytes) => bytes,
            Err(length) => {
                self.shared.calls(|calls| calls.waiting.remove(&stream));
                return Err(CallError::TooLong(length));
            }
        };
        let exchange = async {
            let sent = self.shared.outgoing.send(mux::encode(PLUGIN_SERVICE, &bytes));
            sent.await.map_err(|_| self.shared.closed_error())?;
            answer.await.map_err(|_| self.shared.closed_error())
        };
        let answered = tokio::time::timeout(limit, exchange).await;
        self.shared.calls(|calls| calls.waiting.remove(&stream));
        let response = answered.map_err(|_| CallError::Timeout(limit))??;
        match response.status {
            Some(status) if status.code != 0 => Err(CallError::Status {
                code: status.code,
                message: status.message,
            }),
            _ => A::decode(&response.payload[..]).map_err(|_| CallError::Answer),
        }
    }

    /// Ends it; the first reason stays.
    pub(crate) fn close(&self, why: &str) {
        self.shared.close(why);
    }

    /// It has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
    }

    /// Waits for its end; returns why.
    pub(crate) async fn closed(&self) -> String {
        self.shared.closed.cancelled().await;
        self.shared.calls(|calls| calls.why.clone()).unwrap_or_default()
    }
}

async fn write(shared: Arc<Shared>, mut writer: OwnedWriteHalf, mut queue: mpsc::Receiver<Bytes>) {
    let work = async {
        while let Some(bytes) = queue.recv().await {
            if let Err(error) = writer.write_all(&bytes).await {
                return shared.close(&format!("writing failed: {error}"));
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = shared.closed.cancelled() => {}
    }
}

async fn read(shared: Arc<Shared>, mut reader: OwnedReadHalf, server: Arc<dyn Serve>) {
    let work = async {
        let (mut answers, mut requests) = (Decoder::default(), Decoder::default());
        let permits = Arc::new(Semaphore::new(SERVED_AT_ONCE));
        loop {
            let frame = mux::read(&mut reader).await.map_err(|e| chain(&e))?;
            let decoder = match frame.connection {
                PLUGIN_SERVICE => &mut answers,
                RUNTIME_SERVICE => &mut requests,
                // Of a connection that nobody has opened.
                _ => continue,
            };
            decoder.push(&frame.payload);
            while let Some(message) = decoder.next().map_err(|e| chain(&e))? {
                match message {
                    Message::Response(stream, response) if frame.connection == PLUGIN_SERVICE => {
                        if let Some(waiting) = shared.calls(|calls| calls.waiting.remove(&stream)) {
                            // Who asked may have given up.
                            let _ = waiting.send(response);
                        }
                    }
                    Message::Request(stream, request) if frame.connection == RUNTIME_SERVICE => {
                        serve(&shared, &server, &permits, stream, request);
                    }
                    Message::Other => {}
                    _ => return Err("a message that is not for this side".to_owned()),
                }
            }
        }
    };
    let ended: Result<(), String> = tokio::select! {
        ended = work => ended,
        () = shared.closed.cancelled() => return,
    };
    if let Err(why) = ended {
        shared.close(&why);
    }
}

fn serve(
    shared: &Arc<Shared>,
    server: &Arc<dyn Serve>,
    permits: &Arc<Semaphore>,
    stream: u32,
    request: Request,
) {
    let (shared, server) = (shared.clone(), server.clone());
    let permit = permits.clone().try_acquire_owned();
    tokio::spawn(async move {
        let result = match permit {
            Ok(_permit) => server.serve(&request.method, &request.payload).await,
            Err(_) => Err(Status {
                code: code::RESOURCE_EXHAUSTED,
                message: format!("more than {SERVED_AT_ONCE} calls at once"),
            }),
        };
        let response = match result {
            Ok(payload) => Response {
                status: Some(Status::default()),
                payload,
            },
            Err(status) => Response {
                status: Some(status),
                payload: Vec::new(),
            },
        };
        match ttrpc::response(stream, &response) {
            Ok(bytes) => {
                // A socket that has ended needs no answer.
                let _ = shared.outgoing.send(mux::encode(RUNTIME_SERVICE, &bytes)).await;
            }
            Err(length) => shared.close(&format!("an answer of {length} bytes cannot be sent")),
        }
    });
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
