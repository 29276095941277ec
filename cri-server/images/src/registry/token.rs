//! Answers to a registry's `WWW-Authenticate`: basic, and bearer tokens from its token server (distribution's
//! token specification; OAuth2's refresh grant for identity tokens).

use base64::Engine as _;
use http_auth::parser::ChallengeParser;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::{Endpoint, Failure, Registry};
use crate::credentials::Auth;
use crate::error::Error;

#[derive(Default)]
struct Bearer {
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

enum Challenge {
    Basic,
    Bearer(Bearer),
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    access_token: String,
}

impl Registry {
    /// The `Authorization` that answers the challenges in `headers`; `rejected` is what was just refused.
    pub(super) async fn answer_challenge(
        &self,
        endpoint: &Endpoint,
        headers: &HeaderMap,
        rejected: Option<&HeaderValue>,
    ) -> std::result::Result<HeaderValue, Failure> {
        let refused = || Failure::lasting(self.unauthorized(endpoint));
        let answer = match (choose(headers), &endpoint.auth) {
            (Some(Challenge::Basic), Some(Auth::Basic { username, password })) => {
                let pair = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
                header("Basic", &pair)
            }
            (Some(Challenge::Bearer(_)), Some(Auth::RegistryToken(_))) => None,
            (Some(Challenge::Bearer(bearer)), _) => header("Bearer", &self.token(endpoint, &bearer).await?),
            _ => None,
        };
        // The same credentials again would be refused again; a token may only have expired.
        answer
            .filter(|answer| Some(answer) != rejected)
            .ok_or_else(refused)
    }

    async fn token(&self, endpoint: &Endpoint, bearer: &Bearer) -> std::result::Result<String, Failure> {
        let unusable = |reason: &str| {
            Failure::lasting(Error::Unavailable {
                registry: endpoint.host.name(),
                reason: reason.to_owned(),
            })
        };
        let mut realm =
            Url::parse(&bearer.realm).map_err(|_| unusable("its token server's address is no URL"))?;
        if realm.scheme() != "https" && endpoint.host.base.scheme() != "http" {
            return Err(unusable(
                "its token server is not https, credentials are not sent there",
            ));
        }
        let default_scope = format!("repository:{}:pull", self.reference.repository);
        let scope = bearer.scope.as_deref().unwrap_or(&default_scope);
        let client = endpoint.client().map_err(Failure::lasting)?;
        let request = if let Some(Auth::IdentityToken(refresh)) = &endpoint.auth {
            let mut form = Url::parse("http://form/").map_err(|_| unusable("no form"))?;
            form.query_pairs_mut()
                .append_pair("grant_type", "refresh_token")
                .append_pair("client_id", "catamaran")
                .append_pair("service", bearer.service.as_deref().unwrap_or_default())
                .append_pair("scope", scope)
                .append_pair("refresh_token", refresh);
            client
                .post(realm)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or_default().to_owned())
        } else {
            if let Some(service) = &bearer.service {
                realm.query_pairs_mut().append_pair("service", service);
            }
            // One parameter for each scope of a list.
            for scope in scope.split(' ').filter(|scope| !scope.is_empty()) {
                realm.query_pairs_mut().append_pair("scope", scope);
            }
            let request = client.get(realm);
            match &endpoint.auth {
                Some(Auth::Basic { username, password }) => request.basic_auth(username, Some(password)),
                _ => request,
            }
        };
        let response = self
            .in_time(endpoint, request.send())
            .await?
            .map_err(|error| self.broken(endpoint, error))?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                return Err(Failure::lasting(self.unauthorized(endpoint)));
            }
            status => {
                let reason = format!("its token server answers {status}");
                let error = Error::Unavailable {
                    registry: endpoint.host.name(),
                    reason,
                };
                return Err(Failure {
                    error,
                    passing: status.is_server_error(),
                });
            }
        }
        let body = self.body(endpoint, response).await?;
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| unusable("its token server's answer holds no token"))?;
        let token = if answer.token.is_empty() {
            answer.access_token
        } else {
            answer.token
        };
        if token.is_empty() {
            Err(unusable("its token server's answer holds no token"))
        } else {
            Ok(token)
        }
    }
}

/// A header value that is kept out of logs.
pub(super) fn header(scheme: &str, secret: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("{scheme} {secret}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Bearer before basic, as docker and containerd do.
fn choose(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(text) = value.to_str() else { continue };
        for challenge in ChallengeParser::new(text).flatten() {
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let mut bearer = Bearer::default();
                for (name, value) in &challenge.params {
                    let value = value.to_unescaped();
                    match name.to_ascii_lowercase().as_str() {
                        "realm" => bearer.realm = value,
                        "service" => bearer.service = Some(value),
                        "scope" => bearer.scope = Some(value),
                        _ => {}
                    }
                }
                return Some(Challenge::Bearer(bearer));
            }
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(values: &[&'static str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(value));
        }
        choose(&headers)
    }

    #[test]
    fn bearer_is_preferred_and_parsed() {
        let found = challenge(&[
            "Basic realm=\"x\"",
            "Bearer realm=\"https://auth.example/token\",service=\"r, x\",scope=\"repository:a/b:pull\"",
        ]);
        let Some(Challenge::Bearer(bearer)) = found else {
            panic!("no bearer")
        };
        assert_eq!(bearer.realm, "https://auth.example/token");
        assert_eq!(bearer.service.as_deref(), Some("r, x"));
        assert_eq!(bearer.scope.as_deref(), Some("repository:a/b:pull"));
        assert!(matches!(
            challenge(&["basic realm=\"x\""]),
            Some(Challenge::Basic)
        ));
        assert!(challenge(&["Negotiate"]).is_none());
        assert!(challenge(&[]).is_none());
    }

    #[test]
    fn secrets_do_not_show() {
        let value = header("Bearer", "hunter2").unwrap();
        assert!(!format!("{value:?}").contains("hunter2"));
        assert!(header("Bearer", "line\nbreak").is_none());
    }
}
