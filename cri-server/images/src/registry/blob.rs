//! The transfer of one blob: resumed by Range after an interruption where the endpoint can, begun again and
//! skipped forward where it cannot, continued at the next endpoint when one is given up.

use bytes::{Buf, Bytes};
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};

use super::{Failure, Progress, Registry, TRIES};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Stalls of the last endpoint after which the transfer is resumed there; those of others lead to the next endpoint.
const RESUMED_STALLS: u32 = 2;

/// A blob on its way. Its digest is the consumer's to verify.
pub(crate) struct Blob<'a> {
    registry: &'a Registry,
    digest: Digest,
    size: u64,
    /// Bytes handed out.
    offset: u64,
    /// Bytes of the current response that were handed out before.
    skip: u64,
    endpoint: usize,
    response: Option<Response>,
    progress: Progress,
    /// Failures and stalls since enough came to count as progress.
    failures: u32,
    stalls: u32,
    /// Bytes handed out since the last failure.
    gained: u64,
}

impl Registry {
    /// Begins the transfer of a blob of `size` bytes.
    pub(crate) fn blob(&self, digest: &Digest, size: u64) -> Blob<'_> {
        let digest = digest.clone();
        Blob {
            registry: self,
            digest,
            size,
            offset: 0,
            skip: 0,
            endpoint: 0,
            response: None,
            progress: Progress::new(self.timeout),
            failures: 0,
            stalls: 0,
            gained: 0,
        }
    }
}

impl Blob<'_> {
    /// The next bytes; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let failure = match self.attempt().await {
                Ok(Some(chunk)) => {
                    self.offset += chunk.len() as u64;
                    self.gained += chunk.len() as u64;
                    if self.gained >= self.progress.enough() {
                        (self.failures, self.stalls) = (0, 0);
                    }
                    return Ok(Some(chunk));
                }
                Ok(None) if self.offset == self.size => return Ok(None),
                Ok(None) => Failure {
                    error: Error::Unavailable {
                        registry: self.registry.endpoints[self.endpoint].host.name(),
                        reason: format!(
                            "it ended the transfer after {} of {} bytes",
                            self.offset, self.size
                        ),
                    },
                    passing: true,
                },
                Err(failure) => failure,
            };
            self.response = None;
            self.gained = 0;
            self.progress.reset();
            self.failures += 1;
            let again = if let Error::Timeout { .. } = failure.error {
                self.stalls += 1;
                self.is_last_endpoint() && self.stalls <= RESUMED_STALLS
            } else {
                failure.passing
            };
            if again && self.failures < TRIES {
                tracing::debug!(digest = %self.digest, offset = self.offset, error = %failure.error, "resuming blob");
                self.registry.pause(self.failures).await;
                continue;
            }
            self.registry.note(self.endpoint, &failure.error);
            (self.failures, self.stalls) = (0, 0);
            self.endpoint += 1;
            if self.endpoint >= self.registry.endpoints.len() {
                return Err(failure.error);
            }
        }
    }

    fn is_last_endpoint(&self) -> bool {
        let mut later = self.registry.endpoints.iter().skip(self.endpoint + 1);
        !later.any(|endpoint| endpoint.host.pull)
    }

    async fn attempt(&mut self) -> std::result::Result<Option<Bytes>, Failure> {
        let registry = self.registry;
        while !registry.endpoints[self.endpoint].host.pull {
            if self.endpoint + 1 >= registry.endpoints.len() {
                return Err(Failure::lasting(registry.no_endpoint()));
            }
            self.endpoint += 1;
        }
        let endpoint = &registry.endpoints[self.endpoint];
        let mut response = match self.response.take() {
            Some(response) => response,
            None => self.begin().await?,
        };
        loop {
            let chunk = self.progress.chunk(&mut response).await;
            let chunk = chunk.ok_or_else(|| Failure::lasting(registry.stalled(endpoint)))?;
            let Some(mut chunk) = chunk.map_err(|error| registry.broken(endpoint, error))? else {
                return Ok(None);
            };
            let skipped = self.skip.min(chunk.len() as u64);
            self.skip -= skipped;
            chunk.advance(skipped as usize);
            if chunk.is_empty() {
                continue;
            }
            self.response = Some(response);
            return Ok(Some(chunk));
        }
    }

    async fn begin(&mut self) -> std::result::Result<Response, Failure> {
        let registry = self.registry;
        let endpoint = &registry.endpoints[self.endpoint];
        let from = (self.offset > 0).then_some(self.offset);
        let response = registry
            .get(endpoint, &format!("blobs/{}", self.digest), from)
            .await?;
        self.skip = match (from, response.status()) {
            (Some(from), StatusCode::PARTIAL_CONTENT) => {
                let range = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|value| value.to_str().ok());
                let wanted = format!("bytes {from}-");
                if !range.is_some_and(|range| range.starts_with(&wanted)) {
                    return Err(Failure::lasting(Error::Unavailable {
                        registry: endpoint.host.name(),
                        reason: format!("asked to resume at byte {from}, it sends {range:?}"),
                    }));
                }
                0
            }
            // The endpoint knows no ranges and begins anew.
            _ => self.offset,
        };
        let coming = self.size.saturating_sub(self.offset) + self.skip;
        match response.content_length() {
            Some(length) if length != coming => Err(Failure::lasting(Error::DigestMismatch {
                what: format!("blob {}", self.digest),
                expected: format!("{coming} bytes"),
                actual: format!("{length} bytes"),
            })),
            _ => Ok(response),
        }
    }
}
