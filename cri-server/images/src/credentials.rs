//! Credentials for registries: from the CRI request, or from a file in the format of docker's `config.json`.
//! Only its `auths` are read; credential helpers are programs of a user's session and are not run here.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use base64::Engine as _;
use serde::Deserialize;

use crate::error::{Error, Result};

/// Credentials for a pull.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Auth {
    /// User name and password, sent to the registry or to its token server.
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// A bearer token that the registry itself takes (CRI `registry_token`).
    RegistryToken(String),
    /// A refresh token that the token server exchanges (CRI `identity_token`).
    IdentityToken(String),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Basic(redacted)",
            Self::RegistryToken(_) => "RegistryToken(redacted)",
            Self::IdentityToken(_) => "IdentityToken(redacted)",
        })
    }
}

impl Auth {
    /// Reads the fields of a CRI `AuthConfig`; `None` when all are empty.
    ///
    /// # Errors
    /// [`Error::Config`] when `auth` is not base64 of `user:password`.
    pub fn from_cri(
        username: &str,
        password: &str,
        auth: &str,
        identity_token: &str,
        registry_token: &str,
    ) -> Result<Option<Self>> {
        if !registry_token.is_empty() {
            return Ok(Some(Self::RegistryToken(registry_token.to_owned())));
        }
        if !identity_token.is_empty() {
            return Ok(Some(Self::IdentityToken(identity_token.to_owned())));
        }
        if !username.is_empty() {
            return Ok(Some(Self::Basic {
                username: username.to_owned(),
                password: password.to_owned(),
            }));
        }
        if auth.is_empty() {
            return Ok(None);
        }
        decode_basic(auth).map(Some).ok_or_else(|| Error::Config {
            path: "the request's auth field".into(),
            reason: "expected base64 of \"user:password\"".into(),
        })
    }
}

/// Decodes base64 of `user:password`, as docker's `config.json` has it (it may be padded with zero bytes).
fn decode_basic(text: &str) -> Option<Auth> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text.trim())
        .ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Auth::Basic {
        username: username.to_owned(),
        password: password.trim_end_matches('\0').to_owned(),
    })
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
    #[serde(default, rename = "registrytoken")]
    registry_token: String,
}

/// Looks for the credentials of `registry` (and of the longest configured prefix of `registry/repository`) in a
/// docker configuration file. A file that does not exist holds none.
///
/// # Errors
/// [`Error::Config`] for a file that cannot be read or parsed.
pub(crate) fn from_docker_config(path: &Path, registry: &str, repository: &str) -> Result<Option<Auth>> {
    let bad = |reason: String| Error::Config {
        path: path.display().to_string(),
        reason,
    };
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(error.to_string())),
    };
    // The parser's own message could quote a secret: only the position is told.
    let config: DockerConfig = serde_json::from_slice(&bytes).map_err(|error| {
        bad(format!(
            "not docker's JSON at line {}, column {}",
            error.line(),
            error.column()
        ))
    })?;
    let wanted = format!("{registry}/{repository}");
    let mut best: Option<(usize, &DockerAuth)> = None;
    for (key, auth) in &config.auths {
        let key = normal_key(key);
        let matches = wanted == key
            || wanted
                .strip_prefix(&key)
                .is_some_and(|rest| rest.starts_with('/'));
        if matches && best.is_none_or(|(length, _)| length < key.len()) {
            best = Some((key.len(), auth));
        }
    }
    let Some((_, auth)) = best else { return Ok(None) };
    Auth::from_cri(
        &auth.username,
        &auth.password,
        &auth.auth,
        &auth.identity_token,
        &auth.registry_token,
    )
    .map_err(|_| {
        bad(format!(
            "the auth of {registry} is not base64 of \"user:password\""
        ))
    })
}

/// `https://index.docker.io/v1/` and `registry.example/v2/` name hosts, in docker's tradition.
fn normal_key(key: &str) -> String {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key
        .strip_suffix("/v1")
        .or_else(|| key.strip_suffix("/v2"))
        .unwrap_or(key);
    match key {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(username: &str, password: &str) -> Option<Auth> {
        Some(Auth::Basic {
            username: username.into(),
            password: password.into(),
        })
    }

    #[test]
    fn docker_config_is_matched_by_host_and_longest_prefix() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // dTpw = u:p, djpxOnI= = v:q:r
        std::fs::write(
            file.path(),
            r#"{"credsStore":"desktop","auths":{"https://index.docker.io/v1/":{"auth":"dTpw"},
               "r.example:5000":{"username":"a","password":"b"},"r.example:5000/team":{"auth":"djpxOnI="},
               "t.example":{"identitytoken":"xyz"}}}"#,
        )
        .unwrap();
        let get =
            |registry: &str, repository: &str| from_docker_config(file.path(), registry, repository).unwrap();
        assert_eq!(get("docker.io", "library/busybox"), basic("u", "p"));
        assert_eq!(get("r.example:5000", "x"), basic("a", "b"));
        assert_eq!(get("r.example:5000", "team/x"), basic("v", "q:r"));
        assert_eq!(get("r.example:5000", "teams/x"), basic("a", "b"));
        assert_eq!(get("t.example", "x"), Some(Auth::IdentityToken("xyz".into())));
        assert_eq!(get("r.example", "x"), None);
        assert_eq!(
            from_docker_config(Path::new("/nonexistent/config.json"), "r", "x").unwrap(),
            None
        );
    }

    #[test]
    fn a_broken_file_is_named_without_its_secrets() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            r#"{"auths":{"r":{"password":7}}, "secret": "hunter2"}"#,
        )
        .unwrap();
        let error = from_docker_config(file.path(), "r", "x").unwrap_err().to_string();
        assert!(error.contains("line 1") && !error.contains("hunter2"), "{error}");
        assert!(!format!("{:?}", Auth::RegistryToken("hunter2".into())).contains("hunter2"));
    }

    #[test]
    fn the_auth_field_of_a_request_is_decoded() {
        assert_eq!(Auth::from_cri("", "", "dTpw", "", "").unwrap(), basic("u", "p"));
        assert_eq!(Auth::from_cri("", "", "", "", "").unwrap(), None);
        assert!(Auth::from_cri("", "", "%%", "", "").is_err());
    }
}
