//! Around every RPC: a span with its name, the caller's deadline, a log line with its status and time, and the
//! same for the daemon's metrics. A failed one is logged where it failed for the operator, too; a fast good one only at debug.
//!
//! The deadline is held here because tonic's own answers CANCELLED where gRPC has DEADLINE_EXCEEDED.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{Request, Response};
use tonic::Status;
use tower::{Layer, Service};
use tracing::Instrument as _;

use crate::metrics::RpcMetrics;

/// A successful RPC that took longer is worth a line.
const SLOW: Duration = Duration::from_secs(2);

/// gRPC's number of NOT_FOUND, as its header spells it.
const NOT_FOUND: &str = "5";

/// The layer.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    /// Where they are counted.
    pub(super) rpcs: Arc<RpcMetrics>,
}

/// A service within the layer.
#[derive(Debug, Clone)]
pub(super) struct ObservedService<S> {
    inner: S,
    rpcs: Arc<RpcMetrics>,
}

/// An RPC that is counted when it is answered, or as cancelled when its caller goes before.
struct Counted {
    rpcs: Arc<RpcMetrics>,
    name: String,
    begun: Instant,
    code: tonic::Code,
}

impl Counted {
    /// A status that is an error comes in the headers; a good one only with the body.
    fn answered<Out>(&mut self, response: &Response<Out>) {
        self.code = match response.headers().get("grpc-status") {
            Some(code) => tonic::Code::from_bytes(code.as_bytes()),
            None => tonic::Code::Ok,
        };
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.rpcs
            .observe(&self.name, self.code.into(), self.begun.elapsed());
    }
}

impl<S> Layer<S> for Observed {
    type Service = ObservedService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ObservedService {
            inner,
            rpcs: self.rpcs.clone(),
        }
    }
}

impl<S, In, Out> Service<Request<In>> for ObservedService<S>
where
    S: Service<Request<In>, Response = Response<Out>>,
    S::Future: Send + 'static,
    S::Error: Send,
    Out: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<In>) -> Self::Future {
        let rpc = request
            .uri()
            .path()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let span = tracing::info_span!("rpc", name = rpc);
        let begun = Instant::now();
        let mut counted = Counted {
            rpcs: self.rpcs.clone(),
            name: rpc,
            begun,
            code: tonic::Code::Cancelled,
        };
        let limit = request
            .headers()
            .get("grpc-timeout")
            .and_then(|value| deadline(value.to_str().ok()?));
        let future = self.inner.call(request);
        let observed = async move {
            let result = match limit {
                None => future.await,
                Some(limit) => match tokio::time::timeout(limit, future).await {
                    Ok(result) => result,
                    Err(_) => Ok(Status::deadline_exceeded("the caller's deadline has passed").into_http()),
                },
            };
            if let Ok(response) = &result {
                counted.answered(response);
                log(response, begun.elapsed());
            }
            result
        };
        Box::pin(observed.instrument(span))
    }
}

/// gRPC over HTTP/2: `grpc-timeout` is up to eight digits and a unit. A little is taken off, so that this answer
/// precedes tonic's.
fn deadline(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    let limit = match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    Some(limit - (limit / 20).min(Duration::from_millis(5)))
}

/// A status that is an error comes in the headers; a good one only with the body.
fn log<Out>(response: &Response<Out>, took: Duration) {
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let ms = took.as_millis();
    match header("grpc-status").filter(|code| *code != "0") {
        // Kubelets ask for what they have just removed.
        Some(NOT_FOUND) => {
            let message = header("grpc-message").unwrap_or_default();
            tracing::debug!(code = NOT_FOUND, message = percent_decode(message), ms, "failed");
        }
        Some(code) => {
            let message = header("grpc-message").unwrap_or_default();
            tracing::warn!(code, message = percent_decode(message), ms, "failed");
        }
        None if took > SLOW => tracing::info!(ms, "slow"),
        None => tracing::debug!(ms, "done"),
    }
}

/// gRPC over HTTP/2: `grpc-message` is percent-encoded.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match hex.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                out.push(byte);
                at += 3;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_read_and_leave_time_to_answer() {
        assert_eq!(deadline("100m"), Some(Duration::from_millis(95)));
        assert_eq!(deadline("1H"), Some(Duration::from_millis(3_599_995)));
        for text in ["", "5", "m", "-1S", "123456789S", "5x", "5\u{e9}"] {
            assert_eq!(deadline(text), None, "{text:?}");
        }
    }

    #[tokio::test]
    async fn answers_errors_and_callers_that_go_are_counted() {
        let rpcs = Arc::new(RpcMetrics::default());
        let layer = Observed { rpcs: rpcs.clone() };
        let mut service = layer.layer(tower::service_fn(async |request: Request<&'static str>| {
            match *request.body() {
                "good" => {}
                "bad" => return Ok(Status::not_found("no").into_http::<String>()),
                _ => std::future::pending().await,
            }
            Ok::<_, std::convert::Infallible>(Response::new(String::new()))
        }));
        let request = |body| {
            Request::builder()
                .uri("/runtime.v1.RuntimeService/Version")
                .body(body)
        };
        service.call(request("good").unwrap()).await.unwrap();
        service.call(request("bad").unwrap()).await.unwrap();
        let hanging = service.call(request("hang").unwrap());
        assert!(
            tokio::time::timeout(Duration::from_millis(20), hanging)
                .await
                .is_err()
        );
        for code in [tonic::Code::Ok, tonic::Code::NotFound, tonic::Code::Cancelled] {
            assert_eq!(rpcs.count("Version", code.into()), 1, "{code:?}");
        }
        let mut timed = request("hang").unwrap();
        timed.headers_mut().insert("grpc-timeout", "20m".parse().unwrap());
        service.call(timed).await.unwrap();
        assert_eq!(rpcs.count("Version", tonic::Code::DeadlineExceeded.into()), 1);
    }

    #[test]
    fn messages_are_decoded() {
        assert_eq!(
            percent_decode("no%20such pod: %22x%22 100%"),
            "no such pod: \"x\" 100%"
        );
    }
}
