//! Port-forward over SPDY (`portforward.k8s.io`): for each connection to forward, the client opens an error
//! stream and a data stream with the same request id and port; as many as it wants on one connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::backend::{Backend, PortForwardRequest};
use crate::spdy::{Connection, Stream};

/// The protocol's name in the HTTP upgrade.
pub(crate) const PROTOCOL: &str = "portforward.k8s.io";

/// Pairs of which one stream is still missing.
const HALF_OPEN_MAX: usize = 128;

struct HalfOpen {
    first: Stream,
    is_error: bool,
    since: Instant,
}

/// Serves a connection until the client closes it.
pub(crate) async fn serve(
    mut connection: Connection,
    request: &PortForwardRequest,
    backend: Arc<dyn Backend>,
    creation_timeout: Duration,
) {
    let mut waiting: HashMap<String, HalfOpen> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let oldest = waiting.values().map(|half| half.since).min();
        let expiry = async {
            match oldest {
                Some(since) => tokio::time::sleep_until(since + creation_timeout).await,
                None => std::future::pending().await,
            }
        };
        let stream = tokio::select! {
            stream = connection.accept() => match stream {
                Some(stream) => stream,
                // Dropping the set ends what is still forwarded.
                None => return,
            },
            () = expiry => {
                let now = Instant::now();
                waiting.retain(|_, half| half.since + creation_timeout > now);
                continue;
            }
            Some(_) = forwards.join_next() => continue,
        };
        let is_error = match stream.headers.get("streamtype") {
            Some("error") => true,
            Some("data") => false,
            kind => {
                tracing::debug!(?kind, "a stream of unknown type");
                continue;
            }
        };
        let id = match stream.headers.get("requestid") {
            Some(id) => id.to_owned(),
            // Clients before request ids opened the data stream right after its error stream.
            None => (if is_error {
                stream.id
            } else {
                stream.id.saturating_sub(2)
            })
            .to_string(),
        };
        match waiting.remove(&id) {
            None if waiting.len() < HALF_OPEN_MAX => {
                waiting.insert(
                    id,
                    HalfOpen {
                        first: stream,
                        is_error,
                        since: Instant::now(),
                    },
                );
            }
            Some(half) if half.is_error != is_error => {
                let (error, data) = if is_error {
                    (stream, half.first)
                } else {
                    (half.first, stream)
                };
                forwards.spawn(forward(error, data, request.clone(), Arc::clone(&backend)));
            }
            // Too many, or two of a kind: both are given up.
            None | Some(_) => tracing::debug!(id, "streams of a port-forward that do not pair up"),
        }
    }
}

async fn forward(error: Stream, data: Stream, request: PortForwardRequest, backend: Arc<dyn Backend>) {
    let text = data.headers.get("port").unwrap_or("").to_owned();
    let port = text.parse::<u16>().ok().filter(|port| *port != 0);
    let result = match port {
        None => Err(format!("{text:?} is not a port")),
        Some(port) if !request.ports.is_empty() && !request.ports.contains(&port) => {
            Err(format!("port {port} was not asked for"))
        }
        Some(port) => {
            let stream = tokio::io::join(data.reader, data.writer);
            let forwarded = backend
                .port_forward(&request.sandbox_id, port, Box::new(stream))
                .await;
            forwarded.map_err(|e| format!("error forwarding port {port} to pod {}: {e}", request.sandbox_id))
        }
    };
    let mut writer = error.writer;
    if let Err(message) = result {
        tracing::debug!(message, "port-forward");
        let _ = writer.write_all(message.as_bytes()).await;
    }
    let _ = writer.shutdown().await;
}
