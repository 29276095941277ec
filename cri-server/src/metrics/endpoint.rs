//! The HTTP side: few connections at once, none of which waits long for a request.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::{RpcMetrics, render};
use crate::error::{Error, Result};
use crate::pods::Pods;

/// Connections at once; one more is closed.
const MAX_CONNECTIONS: usize = 16;
/// Time for a request's head, also for the next one on the same connection.
const HEAD: Duration = Duration::from_secs(10);
/// Time that a whole connection has. A scraper makes a new one.
const LIFE: Duration = Duration::from_secs(300);

/// Serves until it is dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens on the address and serves.
///
/// # Errors
/// The socket's.
pub(crate) async fn bind(
    address: SocketAddr,
    rpcs: Arc<RpcMetrics>,
    pods: Pods,
) -> std::io::Result<Endpoint> {
    let listener = TcpListener::bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "serving the daemon's metrics");
    let render = move || {
        let (rpcs, pods) = (rpcs.clone(), pods.clone());
        async move {
            // The image store's size needs a look at the file system.
            let text = tokio::task::spawn_blocking(move || render(&rpcs, &pods)).await;
            text.map_err(|error| Error::Internal(format!("a task ended: {error}")))
        }
    };
    Ok(Endpoint {
        task: tokio::spawn(accept(listener, render)),
    })
}

async fn accept<F>(listener: TcpListener, render: impl Fn() -> F + Clone + Send + Sync + 'static)
where
    F: Future<Output = Result<String>> + Send,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: some will be closed.
                tracing::warn!(%error, "accepting a connection for metrics");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::debug!("too many connections for metrics");
            continue;
        };
        let render = render.clone();
        tokio::spawn(async move {
            let _place = place;
            if tokio::time::timeout(LIFE, connection(stream, render))
                .await
                .is_err()
            {
                tracing::debug!("a connection for metrics was closed at the end of its time");
            }
        });
    }
}

async fn connection<F>(stream: TcpStream, render: impl Fn() -> F + Clone + Send + Sync)
where
    F: Future<Output = Result<String>> + Send,
{
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let render = render.clone();
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), render).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection for metrics");
    }
}

async fn answer<F>(method: &Method, path: &str, render: impl Fn() -> F) -> Response<String>
where
    F: Future<Output = Result<String>>,
{
    let plain = |status: StatusCode, body: String| {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    };
    if path != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned());
    }
    if *method != Method::GET && *method != Method::HEAD {
        return plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "metrics are read by GET\n".to_owned(),
        );
    }
    match render().await {
        Ok(text) => plain(StatusCode::OK, text),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn started() -> (Endpoint, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let render = || async { Ok("catamaran_up 1\n".to_owned()) };
        let endpoint = Endpoint {
            task: tokio::spawn(accept(listener, render)),
        };
        (endpoint, address)
    }

    async fn asked(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn only_a_get_of_metrics_is_answered_with_them() {
        let (_endpoint, address) = started().await;
        let text = asked(address, "GET /metrics").await;
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        assert!(text.contains("text/plain; version=0.0.4"), "{text}");
        assert!(text.ends_with("\r\n\r\ncatamaran_up 1\n"), "{text}");
        assert!(asked(address, "GET /").await.starts_with("HTTP/1.1 404 "));
        assert!(asked(address, "POST /metrics").await.starts_with("HTTP/1.1 405 "));
    }

    #[tokio::test]
    async fn connections_that_say_nothing_do_not_take_all_places_for_long() {
        let (_endpoint, address) = started().await;
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        // One more is closed without an answer.
        let mut more = TcpStream::connect(address).await.unwrap();
        let mut buffer = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(5), more.read_to_end(&mut buffer)).await;
        assert!(closed.is_ok() && buffer.is_empty());
        drop(silent);
        let until = tokio::time::Instant::now() + Duration::from_secs(5);
        loop {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let _ = stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await;
            let mut text = String::new();
            if stream.read_to_string(&mut text).await.is_ok() && text.contains("catamaran_up 1") {
                return;
            }
            assert!(tokio::time::Instant::now() < until, "places are not given back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
