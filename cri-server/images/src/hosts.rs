//! Where a registry is asked: containerd's `hosts.toml` convention (containerd docs/hosts.md), so that mirrors
//! (Spegel, Dragonfly, pull-through caches) configured for containerd work here too.
//!
//! `<dir>/<registry>/hosts.toml`, or `<dir>/<host>_<port>_/hosts.toml`, or `<dir>/_default/hosts.toml`. A directory
//! with certificates but no file is docker's layout: `*.crt` are authorities, `*.cert` with `*.key` the client's.
//! Plain http is used for a URL that says `http://`, and, as containerd does, for a loopback registry that is not
//! configured and not on port 443; for nothing else.

use std::path::{Path, PathBuf};

use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use toml::{Table, Value};

use crate::error::{Error, Result};

/// Keys of a host and of the file; `dial_timeout` is accepted, connecting has a bound of its own.
const KEYS: [&str; 9] = [
    "server",
    "host",
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "dial_timeout",
];

/// One endpoint of a registry.
#[derive(Debug, Clone)]
pub(crate) struct RegistryHost {
    /// Base of all requests, with the `/v2` that most have.
    pub(crate) base: Url,
    /// May turn tags into digests.
    pub(crate) resolve: bool,
    /// May hand out content by digest.
    pub(crate) pull: bool,
    /// Serves several registries: told which one by the query parameter `ns`.
    pub(crate) mirror: bool,
    /// Certificate authorities added to the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// Client certificates, with their key where it is in a file of its own.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
    /// Takes any certificate.
    pub(crate) skip_verify: bool,
    /// Headers sent with every request.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

impl RegistryHost {
    /// Host and port, for messages.
    pub(crate) fn name(&self) -> String {
        let host = self.base.host_str().unwrap_or("");
        self.base
            .port()
            .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }

    fn at(base: Url) -> Self {
        Self {
            base,
            resolve: true,
            pull: true,
            mirror: false,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: false,
            headers: Vec::new(),
        }
    }
}

/// Whether a host is this machine itself (`localhost`, 127.0.0.0/8, `::1`).
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(host);
    host == "localhost"
        || address
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// The endpoints of `registry`, in the order to try: mirrors as the file lists them, then the registry itself.
///
/// # Errors
/// [`Error::Config`] for a file that cannot be read or says what cannot be done.
pub(crate) fn hosts_for(dirs: &[PathBuf], registry: &str) -> Result<Vec<RegistryHost>> {
    let own = origin(registry)?;
    for name in directory_names(registry) {
        for dir in dirs {
            let directory = dir.join(&name);
            let file = directory.join("hosts.toml");
            match std::fs::read_to_string(&file) {
                Ok(text) => return parse(&text, &file, registry, own),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(config_error(&file, error.to_string())),
            }
            if directory.is_dir() {
                return Ok(vec![docker_layout(&directory, own)?]);
            }
        }
    }
    Ok(vec![own])
}

/// Names under which a registry is configured, the most specific first.
fn directory_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    // A port is behind the last colon, unless that belongs to an IPv6 address.
    if let Some((host, port)) = registry.rsplit_once(':')
        && !port.contains(']')
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

/// The registry as its name says: https, or http on the loopback; Docker Hub's API has a host of its own.
fn origin(registry: &str) -> Result<RegistryHost> {
    let host = if registry == "docker.io" {
        "registry-1.docker.io"
    } else {
        registry
    };
    let url = |scheme: &str| {
        Url::parse(&format!("{scheme}://{host}/v2")).map_err(|_| Error::InvalidReference {
            reference: registry.to_owned(),
            reason: "the registry is no host name",
        })
    };
    let https = url("https")?;
    let plain = https.host_str().is_some_and(is_loopback) && !host.ends_with(":443");
    Ok(RegistryHost::at(if plain { url("http")? } else { https }))
}

fn config_error(path: &Path, reason: impl Into<String>) -> Error {
    Error::Config {
        path: path.display().to_string(),
        reason: reason.into(),
    }
}

fn docker_layout(directory: &Path, mut host: RegistryHost) -> Result<RegistryHost> {
    let entries = std::fs::read_dir(directory).map_err(|e| config_error(directory, e.to_string()))?;
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry.map_err(|e| config_error(directory, e.to_string()))?.path());
    }
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                if !key.exists() {
                    return Err(config_error(
                        &file,
                        "a client certificate needs its key in a .key file beside it",
                    ));
                }
                host.client.push((file, Some(key)));
            }
            _ => {}
        }
    }
    Ok(host)
}

fn parse(text: &str, file: &Path, registry: &str, own: RegistryHost) -> Result<Vec<RegistryHost>> {
    let table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| config_error(file, error.to_string()))?;
    let mut hosts = Vec::new();
    match table.get("host") {
        None => {}
        Some(Value::Table(entries)) => {
            for (url, entry) in entries {
                let entry = entry
                    .as_table()
                    .ok_or_else(|| config_error(file, format!("host {url:?} must be a table")))?;
                hosts.push(endpoint(Some(url), entry, file, registry, &own)?);
            }
        }
        Some(_) => return Err(config_error(file, "\"host\" must be a table of URLs")),
    }
    let server = match table.get("server") {
        None => None,
        Some(Value::String(server)) => Some(server.as_str()),
        Some(_) => return Err(config_error(file, "\"server\" must be a URL")),
    };
    hosts.push(endpoint(server, &table, file, registry, &own)?);
    Ok(hosts)
}

fn endpoint(
    url: Option<&str>,
    table: &Table,
    file: &Path,
    registry: &str,
    own: &RegistryHost,
) -> Result<RegistryHost> {
    let bad = |reason: String| config_error(file, reason);
    let flag = |key: &str| match table.get(key) {
        None => Ok(false),
        Some(Value::Boolean(flag)) => Ok(*flag),
        Some(_) => Err(bad(format!("{key:?} must be true or false"))),
    };
    for key in table.keys() {
        if !KEYS.contains(&key.as_str()) {
            tracing::warn!(file = %file.display(), key, "unknown key is ignored");
        }
    }
    let mut host = match url {
        None => own.clone(),
        Some(text) => RegistryHost::at(base_url(text, flag("override_path")?).map_err(bad)?),
    };
    // containerd's rule: asked by another name than its own, it serves more than one registry.
    let asked = if registry == "docker.io" {
        "registry-1.docker.io"
    } else {
        registry
    };
    host.mirror = host.name() != asked && host.name() != own.name();
    if let Some(capabilities) = table.get("capabilities") {
        let capabilities =
            strings(capabilities).ok_or_else(|| bad("\"capabilities\" must be strings".into()))?;
        (host.pull, host.resolve) = (false, false);
        for capability in capabilities {
            match capability.as_str() {
                "pull" => host.pull = true,
                "resolve" => host.resolve = true,
                "push" | "referrers" => {}
                other => tracing::warn!(
                    file = %file.display(), capability = other, "unknown capability; a pull needs pull and resolve"
                ),
            }
        }
    }
    host.skip_verify = flag("skip_verify")?;
    let directory = file.parent().unwrap_or(Path::new("/"));
    if let Some(ca) = table.get("ca") {
        let files = strings(ca).ok_or_else(|| bad("\"ca\" must be a file or a list of files".into()))?;
        host.ca = files.into_iter().map(|name| directory.join(name)).collect();
    }
    if let Some(client) = table.get("client") {
        host.client = client_pairs(client, directory).ok_or_else(|| {
            bad("\"client\" must be a file, a list of files or a list of [certificate, key]".into())
        })?;
    }
    if let Some(headers) = table.get("header") {
        let headers = headers
            .as_table()
            .ok_or_else(|| bad("\"header\" must be a table".into()))?;
        for (name, values) in headers {
            let values = strings(values).ok_or_else(|| bad(format!("header {name:?} must be strings")))?;
            let parsed =
                HeaderName::try_from(name).map_err(|_| bad(format!("{name:?} is no header name")))?;
            for value in values {
                let value = HeaderValue::try_from(value)
                    .map_err(|_| bad(format!("the value of header {name:?} is invalid")))?;
                host.headers.push((parsed.clone(), value));
            }
        }
    }
    Ok(host)
}

fn base_url(text: &str, override_path: bool) -> std::result::Result<Url, String> {
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let mut url = Url::parse(&full).map_err(|error| format!("{text:?} is not a URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("{text:?} is not a http or https URL"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if override_path || path.ends_with("/v2") {
        path
    } else {
        format!("{path}/v2")
    };
    url.set_path(&path);
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

/// A string or a list of strings.
fn strings(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned))
            .collect(),
        _ => None,
    }
}

fn client_pairs(value: &Value, directory: &Path) -> Option<Vec<(PathBuf, Option<PathBuf>)>> {
    let pair = |item: &Value| match item {
        Value::String(file) => Some((directory.join(file), None)),
        Value::Array(_) => match strings(item)?.as_slice() {
            [certificate, key] => Some((directory.join(certificate), Some(directory.join(key)))),
            _ => None,
        },
        _ => None,
    };
    match value {
        Value::Array(items) => items.iter().map(pair).collect(),
        single => pair(single).map(|pair| vec![pair]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(hosts: &[RegistryHost]) -> Vec<String> {
        hosts.iter().map(|host| host.base.to_string()).collect()
    }

    #[test]
    fn without_configuration_only_the_loopback_is_plain() {
        for (registry, url) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("r.example", "https://r.example/v2"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("localhost", "http://localhost/v2"),
            ("localhost:443", "https://localhost/v2"),
            ("127.3.2.1:5000", "http://127.3.2.1:5000/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("[::1]:443", "https://[::1]/v2"),
            ("localhost.example:5000", "https://localhost.example:5000/v2"),
        ] {
            assert_eq!(urls(&hosts_for(&[], registry).unwrap()), [url], "{registry}");
        }
    }

    #[test]
    fn mirrors_come_in_the_order_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("docker.io");
        std::fs::create_dir(&place).unwrap();
        std::fs::write(
            place.join("hosts.toml"),
            r#"
            server = "https://upstream.example"
            [host."http://z.example:30020"]
              capabilities = ["pull", "resolve"]
            [host."https://a.example/proxy/v9"]
              capabilities = "pull"
              override_path = true
              skip_verify = true
              ca = ["ca.crt", "/abs/ca.crt"]
              client = [["c.cert", "c.key"]]
              [host."https://a.example/proxy/v9".header]
                x-token = ["one", "two"]
            [host."plain.example/cache"]
            "#,
        )
        .unwrap();
        let hosts = hosts_for(&[dir.path().to_owned()], "docker.io").unwrap();
        assert_eq!(
            urls(&hosts),
            [
                "http://z.example:30020/v2",
                "https://a.example/proxy/v9",
                "https://plain.example/cache/v2",
                "https://upstream.example/v2"
            ]
        );
        let a = &hosts[1];
        assert!(a.pull && !a.resolve && a.mirror && a.skip_verify);
        assert_eq!(a.ca, [place.join("ca.crt"), PathBuf::from("/abs/ca.crt")]);
        assert_eq!(a.client, [(place.join("c.cert"), Some(place.join("c.key")))]);
        assert_eq!(a.headers.len(), 2);
        assert!(hosts[0].resolve && hosts[3].resolve && hosts[3].mirror);
    }

    #[test]
    fn directories_of_host_and_port_and_the_default_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["r.example_5000_", "_default"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(
            dir.path().join("r.example_5000_/hosts.toml"),
            "[host.\"http://one\"]",
        )
        .unwrap();
        std::fs::write(dir.path().join("_default/hosts.toml"), "[host.\"http://two\"]").unwrap();
        let dirs = [dir.path().to_owned()];
        let found = urls(&hosts_for(&dirs, "r.example:5000").unwrap());
        assert_eq!(found, ["http://one/v2", "https://r.example:5000/v2"]);
        let found = urls(&hosts_for(&dirs, "other.example").unwrap());
        assert_eq!(found, ["http://two/v2", "https://other.example/v2"]);
        assert!(!hosts_for(&dirs, "other.example").unwrap()[1].mirror);
    }

    #[test]
    fn dockers_certificate_layout_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("r.example");
        std::fs::create_dir(&place).unwrap();
        for name in ["ca.crt", "client.cert", "client.key"] {
            std::fs::write(place.join(name), "").unwrap();
        }
        let dirs = [dir.path().to_owned()];
        let hosts = hosts_for(&dirs, "r.example").unwrap();
        assert_eq!(hosts[0].ca, [place.join("ca.crt")]);
        assert_eq!(
            hosts[0].client,
            [(place.join("client.cert"), Some(place.join("client.key")))]
        );
        std::fs::remove_file(place.join("client.key")).unwrap();
        assert!(hosts_for(&dirs, "r.example").is_err());
    }

    #[test]
    fn what_a_pull_does_not_need_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("r.example");
        std::fs::create_dir(&place).unwrap();
        let text = "[host.\"http://x\"]\ncapabilities = [\"pull\", \"resolve\", \"referrers\", \"fly\"]\n\
            dial_timeout = \"3s\"\nnovel = 1\n";
        std::fs::write(place.join("hosts.toml"), text).unwrap();
        let hosts = hosts_for(&[dir.path().to_owned()], "r.example").unwrap();
        assert!(hosts[0].pull && hosts[0].resolve);
    }

    #[test]
    fn mistakes_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("r.example");
        std::fs::create_dir(&place).unwrap();
        for text in [
            "server = 5",
            "[host]\n\"http://x\" = 1",
            "not toml at all",
            "[host.\"ftp://x\"]",
            "[host.\"http://x\"]\ncapabilities = [1]",
            "[host.\"http://x\"]\nskip_verify = \"yes\"",
            "[host.\"http://x\"]\nclient = [[\"a\"]]",
            "[host.\"http://x\".header]\n\"bad name\" = \"x\"",
        ] {
            std::fs::write(place.join("hosts.toml"), text).unwrap();
            let error = hosts_for(&[dir.path().to_owned()], "r.example")
                .unwrap_err()
                .to_string();
            assert!(error.contains("r.example/hosts.toml"), "{text}: {error}");
        }
    }
}
