//! The registry client (OCI distribution-spec, pull): manifests and blobs from the first endpoint that has them,
//! with authentication, bounded answers, retries and resumed transfers.
//!
//! Written on `reqwest` because crate `oci-client`, which is built on it too, offers no client certificates, no
//! headers and no path prefix per endpoint, no identity tokens, and reads manifests of any size into memory.

mod blob;
mod progress;
mod token;

use std::path::Path;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, RANGE};
use reqwest::{Certificate, Client, Identity, Response, StatusCode, Url};

pub(crate) use blob::Blob;
use progress::Progress;

use crate::credentials::Auth;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::hosts::{RegistryHost, is_loopback};
use crate::reference::{Pick, Reference};

/// Largest manifest, index or configuration read into memory.
pub(crate) const MAX_DOCUMENT: u64 = 8 * 1024 * 1024;
/// Tries of one request that fails for a passing reason.
const TRIES: u32 = 4;
const MAX_REDIRECTS: usize = 10;

const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// A manifest or index as the registry sent it, its digest verified.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) bytes: Bytes,
    pub(crate) digest: Digest,
    pub(crate) media_type: Option<String>,
}

/// One endpoint with what was learnt about it during this pull.
struct Endpoint {
    host: RegistryHost,
    auth: Option<Auth>,
    client: OnceLock<Client>,
    /// The last `Authorization` that the endpoint asked for.
    authorization: Mutex<Option<HeaderValue>>,
}

/// The endpoints of one repository, for one pull.
pub(crate) struct Registry {
    endpoints: Vec<Endpoint>,
    reference: Reference,
    timeout: Duration,
}

/// A failed request, and whether trying again may help.
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) passing: bool,
}

impl Failure {
    fn lasting(error: Error) -> Self {
        Self {
            error,
            passing: false,
        }
    }
}

impl Registry {
    /// `auth` gives the credentials for an endpoint; `timeout` bounds each wait for an answer and for progress.
    pub(crate) fn new(
        reference: Reference,
        hosts: Vec<RegistryHost>,
        auth: impl Fn(&RegistryHost) -> Result<Option<Auth>>,
        timeout: Duration,
    ) -> Result<Self> {
        let endpoint = |host: RegistryHost| -> Result<Endpoint> {
            let auth = auth(&host)?;
            Ok(Endpoint {
                host,
                auth,
                client: OnceLock::new(),
                authorization: Mutex::new(None),
            })
        };
        let endpoints = hosts.into_iter().map(endpoint).collect::<Result<_>>()?;
        Ok(Self {
            endpoints,
            reference,
            timeout,
        })
    }

    /// What the reference picks.
    pub(crate) async fn resolve(&self) -> Result<Manifest> {
        match &self.reference.pick {
            Pick::Digest(digest) => self.manifest(digest).await,
            Pick::Tag(tag) => self.document(&format!("manifests/{tag}"), None, true).await,
        }
    }

    /// The manifest of a digest.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<Manifest> {
        self.document(&format!("manifests/{digest}"), Some(digest), false)
            .await
    }

    /// A small blob (the configuration), in memory.
    pub(crate) async fn small_blob(&self, digest: &Digest) -> Result<Bytes> {
        Ok(self
            .document(&format!("blobs/{digest}"), Some(digest), false)
            .await?
            .bytes)
    }

    async fn document(&self, path: &str, digest: Option<&Digest>, resolve: bool) -> Result<Manifest> {
        let mut last = None;
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            if !(if resolve {
                endpoint.host.resolve
            } else {
                endpoint.host.pull
            }) {
                continue;
            }
            let mut tries = 0;
            let failure = loop {
                tries += 1;
                match self.document_from(endpoint, path, digest).await {
                    Ok(manifest) => return Ok(manifest),
                    Err(failure) if failure.passing && tries < TRIES => self.pause(tries).await,
                    Err(failure) => break failure.error,
                }
            };
            self.note(index, &failure);
            last = Some(failure);
        }
        Err(last.unwrap_or_else(|| self.no_endpoint()))
    }

    async fn document_from(
        &self,
        endpoint: &Endpoint,
        path: &str,
        digest: Option<&Digest>,
    ) -> std::result::Result<Manifest, Failure> {
        let response = self.get(endpoint, path, None).await?;
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|v| v.to_str().ok())
                .map(str::to_owned)
        };
        let media_type = header(CONTENT_TYPE.as_str());
        let declared = header("docker-content-digest").as_deref().and_then(Digest::parse);
        let bytes = self.body(endpoint, response).await?;
        let mismatch = |expected: &Digest, actual: &Digest| {
            Failure::lasting(Error::DigestMismatch {
                what: format!("{path} of {}", self.reference.name()),
                expected: expected.to_string(),
                actual: actual.to_string(),
            })
        };
        // A tag names what the registry says it names; a digest names bytes.
        let expected = match digest {
            Some(digest) => Some(digest.clone()),
            None => declared,
        };
        let actual = expected
            .as_ref()
            .map_or_else(|| Digest::sha256(&bytes), |e| e.of_same_kind(&bytes));
        match expected {
            Some(expected) if expected != actual => Err(mismatch(&expected, &actual)),
            _ => Ok(Manifest {
                bytes,
                digest: actual,
                media_type,
            }),
        }
    }

    async fn body(&self, endpoint: &Endpoint, mut response: Response) -> std::result::Result<Bytes, Failure> {
        let mut bytes = Vec::new();
        let mut progress = Progress::new(self.timeout);
        loop {
            let chunk = progress.chunk(&mut response).await;
            match chunk.ok_or_else(|| Failure::lasting(self.stalled(endpoint)))? {
                Ok(Some(chunk)) if bytes.len() as u64 + chunk.len() as u64 > MAX_DOCUMENT => {
                    let message = format!("a document of more than {MAX_DOCUMENT} bytes");
                    return Err(Failure::lasting(Error::Hostile(message)));
                }
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
                Ok(None) => return Ok(bytes.into()),
                Err(error) => return Err(self.broken(endpoint, error)),
            }
        }
    }

    /// One GET, authenticated when the endpoint asks for it; `from` resumes a transfer at an offset.
    async fn get(
        &self,
        endpoint: &Endpoint,
        path: &str,
        from: Option<u64>,
    ) -> std::result::Result<Response, Failure> {
        let mut url = endpoint.host.base.clone();
        url.set_path(&format!(
            "{}/{}/{path}",
            url.path().trim_end_matches('/'),
            self.reference.repository
        ));
        if endpoint.host.mirror {
            url.query_pairs_mut().append_pair("ns", &self.reference.registry);
        }
        let client = endpoint.client().map_err(Failure::lasting)?;
        let mut asked = false;
        loop {
            let mut request = client.get(url.clone()).header(
                ACCEPT,
                if path.starts_with("blobs/") {
                    "*/*"
                } else {
                    ACCEPTED
                },
            );
            for (name, value) in &endpoint.host.headers {
                request = request.header(name, value);
            }
            let authorization = endpoint.current_authorization();
            if let Some(authorization) = &authorization {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            if let Some(from) = from {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = self
                .in_time(endpoint, request.send())
                .await?
                .map_err(|error| self.broken(endpoint, error))?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return self.check(endpoint, path, response).await;
            }
            if asked {
                return Err(Failure::lasting(self.unauthorized(endpoint)));
            }
            asked = true;
            let answer = self
                .answer_challenge(endpoint, response.headers(), authorization.as_ref())
                .await?;
            *endpoint
                .authorization
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(answer);
        }
    }

    async fn check(
        &self,
        endpoint: &Endpoint,
        path: &str,
        response: Response,
    ) -> std::result::Result<Response, Failure> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let registry = endpoint.host.name();
        Err(match status {
            StatusCode::NOT_FOUND => Failure::lasting(Error::NotFound(match &self.reference.pick {
                Pick::Tag(tag) if path == format!("manifests/{tag}") => self.reference.to_string(),
                _ => format!("{path} of {}", self.reference.name()),
            })),
            StatusCode::FORBIDDEN => Failure::lasting(self.unauthorized(endpoint)),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Failure {
                error: Error::Unavailable {
                    registry,
                    reason: format!("it answers {status}"),
                },
                passing: true,
            },
            _ => Failure {
                error: Error::Unavailable {
                    registry,
                    reason: format!("it answers {status} for {path}"),
                },
                passing: status.is_server_error(),
            },
        })
    }

    /// Bounds a wait for the network.
    async fn in_time<T>(
        &self,
        endpoint: &Endpoint,
        work: impl Future<Output = T>,
    ) -> std::result::Result<T, Failure> {
        let done = tokio::time::timeout(self.timeout, work).await;
        done.map_err(|_| Failure::lasting(self.stalled(endpoint)))
    }

    fn stalled(&self, endpoint: &Endpoint) -> Error {
        Error::Timeout {
            what: format!("waiting for registry {}", endpoint.host.name()),
            seconds: self.timeout.as_secs(),
        }
    }

    fn broken(&self, endpoint: &Endpoint, error: reqwest::Error) -> Failure {
        // A refused connection, an unknown host and a bad certificate do not pass within a second.
        let passing = !error.is_connect() && !error.is_redirect() && !error.is_builder();
        Failure {
            error: Error::Unavailable {
                registry: endpoint.host.name(),
                reason: causes(error),
            },
            passing,
        }
    }

    fn unauthorized(&self, endpoint: &Endpoint) -> Error {
        Error::Unauthorized {
            registry: endpoint.host.name(),
            what: self.reference.to_string(),
        }
    }

    fn no_endpoint(&self) -> Error {
        Error::Unavailable {
            registry: self.reference.registry.clone(),
            reason: "no configured host has the capability (hosts.toml: pull, resolve)".into(),
        }
    }

    /// The last endpoint's failure is the answer; earlier ones are only logged.
    fn note(&self, index: usize, failure: &Error) {
        if index + 1 < self.endpoints.len() {
            let host = self.endpoints[index].host.name();
            tracing::warn!(image = %self.reference, %host, %failure, "registry host failed, trying the next");
        }
    }

    async fn pause(&self, tries: u32) {
        tokio::time::sleep(Duration::from_millis(100 << tries.min(5))).await;
    }
}

impl Endpoint {
    fn current_authorization(&self) -> Option<HeaderValue> {
        if let Some(Auth::RegistryToken(token)) = &self.auth {
            return token::header("Bearer", token);
        }
        self.authorization
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    fn client(&self) -> Result<Client> {
        if let Some(client) = self.client.get() {
            return Ok(client.clone());
        }
        let client = build_client(&self.host)?;
        Ok(self.client.get_or_init(|| client).clone())
    }
}

fn build_client(host: &RegistryHost) -> Result<Client> {
    let bad = |error: reqwest::Error| Error::Config {
        path: format!("TLS of {}", host.name()),
        reason: causes(error),
    };
    let builder = || -> Result<reqwest::ClientBuilder> {
        let mut builder = Client::builder()
            .user_agent(concat!("catamaran/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(30))
            .redirect(reqwest::redirect::Policy::custom(follow));
        if host.base.host_str().is_some_and(is_loopback) {
            builder = builder.no_proxy();
        }
        if host.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        let mut authorities = Vec::new();
        for file in &host.ca {
            let found = Certificate::from_pem_bundle(&read(file)?).map_err(|error| Error::Config {
                path: file.display().to_string(),
                reason: format!("not PEM certificates: {}", causes(error)),
            })?;
            authorities.extend(found);
        }
        if !authorities.is_empty() {
            builder = builder.tls_certs_merge(authorities);
        }
        // TLS takes one identity; containerd offers all and the server's request picks.
        if let Some((certificate, key)) = host.client.first() {
            let mut pem = read(certificate)?;
            if let Some(key) = key {
                pem.push(b'\n');
                pem.extend(read(key)?);
            }
            let identity = Identity::from_pem(&pem).map_err(|error| Error::Config {
                path: certificate.display().to_string(),
                reason: format!("not a PEM certificate with its key: {}", causes(error)),
            })?;
            builder = builder.identity(identity);
        }
        Ok(builder)
    };
    match builder()?.build() {
        // A machine without any certificate authority can still speak plain http.
        Err(_) if host.base.scheme() == "http" => builder()?.tls_certs_only([]).build().map_err(bad),
        other => other.map_err(bad),
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).map_err(|error| Error::Config {
        path: file.display().to_string(),
        reason: error.to_string(),
    })
}

/// Redirects go anywhere (content delivery networks) but never from https to http.
fn follow(attempt: reqwest::redirect::Attempt<'_>) -> reqwest::redirect::Action {
    if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error("too many redirects")
    } else if attempt.url().scheme() == "http"
        && attempt.previous().iter().any(|url: &Url| url.scheme() == "https")
    {
        attempt.error("redirected from https to plain http")
    } else {
        attempt.follow()
    }
}

/// An HTTP error with its causes in one line, without the URL (it may hold a signed query).
pub(crate) fn causes(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.ends_with(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text
}
