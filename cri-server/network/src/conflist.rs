//! The network configuration in force: which file of the configuration directory it is from, and its
//! checked content (CNI spec, section 1).
//!
//! Files ending in `.conflist`, `.conf` and `.json` count, in lexical order; the first one that is valid is
//! the network, as containerd and CRI-O have it. Files before it that are not valid are passed over with a
//! warning. Where there are files and none is valid there is no network: the embedded default is only for a
//! node on which nothing is installed, since an operator who installed something does not mean the default.
//! The directory is read again when a name, size, inode or time of modification in it changed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{NetworkError, Result};
use crate::pod::PodNetwork;
use crate::{NetworkConfig, NetworkSummary, default_network, plugin};

/// Versions that this client speaks, oldest first. 0.1 and 0.2 have another result and no chains.
pub(crate) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// A configuration is a few hundred bytes; more is a mistake.
const MAX_FILE: u64 = 1 << 20;

/// Where a network configuration is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file of the configuration directory.
    File(PathBuf),
    /// The default that the daemon brings along.
    Default,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("embedded default"),
        }
    }
}

/// A chain of plugins as it is called, and as it is stored for DEL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ConfList {
    /// One of [`VERSIONS`].
    pub(crate) cni_version: String,
    /// The network's name.
    pub(crate) name: String,
    /// The plugins' configurations, each with its `type`, in the order of ADD.
    pub(crate) plugins: Vec<Map<String, Value>>,
}

/// The configuration that attachments made now get.
#[derive(Debug)]
pub(crate) struct InForce {
    pub(crate) list: ConfList,
    pub(crate) source: Source,
    skipped: Vec<String>,
}

/// What was read last, and from which state of the directory.
#[derive(Debug)]
pub(crate) struct Current {
    seen: Vec<FileState>,
    outcome: std::result::Result<Arc<InForce>, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct FileState {
    path: PathBuf,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// The configuration in force, from `current` where the directory is as it was.
pub(crate) fn in_force(config: &NetworkConfig, current: &mut Option<Current>) -> Result<Arc<InForce>> {
    let seen = files(&config.conf_dir)?;
    if let Some(current) = current.as_ref().filter(|current| current.seen == seen) {
        return current.outcome.clone().map_err(NetworkError::NotReady);
    }
    let outcome = choose(config, &seen).map(Arc::new);
    match &outcome {
        Ok(network) => {
            for reason in &network.skipped {
                tracing::warn!(%reason, "network configuration passed over");
            }
            tracing::info!(network = %network.list.name, source = %network.source, "network configuration read");
        }
        Err(reason) => tracing::warn!(%reason, "no network configuration"),
    }
    let answer = outcome.clone().map_err(NetworkError::NotReady);
    *current = Some(Current { seen, outcome });
    answer
}

fn files(dir: &Path) -> Result<Vec<FileState>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(NetworkError::io("read", dir)(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(NetworkError::io("read", dir))?.path();
        let counts = path
            .extension()
            .is_some_and(|end| end == "conflist" || end == "conf" || end == "json");
        // A file that goes away meanwhile is not there; a dangling link is passed over with its reason.
        if counts {
            let meta = std::fs::metadata(&path).or_else(|_| std::fs::symlink_metadata(&path));
            if let Ok(meta) = meta.as_ref().map(|meta| (meta, meta.is_dir()))
                && !meta.1
            {
                let meta = meta.0;
                let modified = (meta.mtime(), meta.mtime_nsec());
                files.push(FileState {
                    path,
                    inode: meta.ino(),
                    size: meta.size(),
                    modified,
                });
            }
        }
    }
    files.sort();
    Ok(files)
}

fn choose(config: &NetworkConfig, files: &[FileState]) -> std::result::Result<InForce, String> {
    if files.is_empty() {
        let list = default_network::list(config).map_err(|reason| {
            format!(
                "no configuration in {} and no default: {reason}",
                config.conf_dir.display()
            )
        })?;
        return Ok(InForce {
            list,
            source: Source::Default,
            skipped: Vec::new(),
        });
    }
    let mut skipped = Vec::new();
    for file in files {
        match read(&file.path) {
            Ok(list) => {
                return Ok(InForce {
                    list,
                    source: Source::File(file.path.clone()),
                    skipped,
                });
            }
            Err(reason) => skipped.push(format!("{}: {reason}", file.path.display())),
        }
    }
    Err(format!(
        "no valid configuration in {}: {}",
        config.conf_dir.display(),
        skipped.join("; ")
    ))
}

fn read(path: &Path) -> std::result::Result<ConfList, String> {
    let size = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > MAX_FILE {
        return Err(format!("{size} bytes, more than {MAX_FILE}"));
    }
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    parse(&text)
}

/// A conflist, or the configuration of a single plugin, which becomes a list of one.
pub(crate) fn parse(text: &[u8]) -> std::result::Result<ConfList, String> {
    let mut top: Map<String, Value> = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let cni_version = version(&top)?;
    let name = match top.get("name") {
        Some(Value::String(name)) if good_name(name) => name.clone(),
        Some(name) => return Err(format!("name {name} is not a network name")),
        None => return Err("the key name is missing".to_owned()),
    };
    let plugins = match top.remove("plugins") {
        Some(Value::Array(plugins)) => plugins,
        Some(_) => return Err("plugins is not a list".to_owned()),
        None if top.contains_key("type") => vec![Value::Object(top)],
        None => return Err("the key plugins is missing (or type, in a single plugin's file)".to_owned()),
    };
    if plugins.is_empty() {
        return Err("plugins is empty".to_owned());
    }
    let plugins = plugins.into_iter().enumerate().map(|(index, value)| match value {
        Value::Object(plugin) => match plugin.get("type") {
            Some(Value::String(name)) if plugin::good_type(name) => Ok(plugin),
            _ => Err(format!("plugins[{index}] has no type that names an executable")),
        },
        _ => Err(format!("plugins[{index}] is not an object")),
    });
    Ok(ConfList {
        cni_version,
        name,
        plugins: plugins.collect::<std::result::Result<_, _>>()?,
    })
}

/// `cniVersion`, or the highest of `cniVersions` (CNI 1.1) that this client speaks.
fn version(top: &Map<String, Value>) -> std::result::Result<String, String> {
    let mut offered = Vec::new();
    match top.get("cniVersion") {
        Some(Value::String(version)) => offered.push(version.as_str()),
        Some(other) => return Err(format!("cniVersion {other} is not a string")),
        None => {}
    }
    match top.get("cniVersions") {
        Some(Value::Array(versions)) => offered.extend(versions.iter().filter_map(Value::as_str)),
        Some(_) => return Err("cniVersions is not a list".to_owned()),
        None => {}
    }
    if offered.is_empty() {
        // The spec reads an absent version as 0.1.0.
        offered.push("0.1.0");
    }
    let spoken = VERSIONS.iter().rev().find(|spoken| offered.contains(spoken));
    spoken.map(|version| (*version).to_owned()).ok_or_else(|| {
        format!(
            "cniVersion {} is not supported, only {}",
            offered.join(", "),
            VERSIONS.join(", ")
        )
    })
}

/// The id, if it follows the spec's rule for container ids and fits a file name.
pub(crate) fn checked_id(id: &str) -> Result<&str> {
    let good = good_name(id) && id.len() <= 128;
    if good {
        Ok(id)
    } else {
        Err(NetworkError::Id(id.chars().take(80).collect()))
    }
}

/// The spec's rule for names and ids: a letter or digit, then letters, digits, `_`, `.` and `-`.
pub(crate) fn good_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

impl ConfList {
    /// CNI spec 1.1: the plugins know STATUS.
    pub(crate) fn has_status(&self) -> bool {
        self.cni_version == "1.1.0"
    }

    /// CNI spec 0.4: DEL gets the result of ADD.
    pub(crate) fn del_has_result(&self) -> bool {
        !self.cni_version.starts_with("0.3.")
    }

    /// A plugin's type.
    pub(crate) fn plugin_type(plugin: &Map<String, Value>) -> &str {
        plugin.get("type").and_then(Value::as_str).unwrap_or_default()
    }

    /// What one plugin of the chain gets on stdin (CNI spec, section 3): its own configuration with the
    /// list's name and version, the pod's arguments for the capabilities that it declares, and the result of
    /// what ran before it.
    pub(crate) fn request(
        &self,
        plugin: &Map<String, Value>,
        pod: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let mut request = plugin.clone();
        request.insert("cniVersion".to_owned(), Value::from(self.cni_version.as_str()));
        request.insert("name".to_owned(), Value::from(self.name.as_str()));
        request.remove("cniVersions");
        let declared = |name: &str| {
            plugin
                .get("capabilities")
                .and_then(|all| all.get(name))
                .and_then(Value::as_bool)
                == Some(true)
        };
        let arguments: Map<String, Value> = pod
            .iter()
            .filter(|(name, _)| declared(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !arguments.is_empty() {
            request.insert("runtimeConfig".to_owned(), Value::Object(arguments));
        }
        if let Some(previous) = previous {
            request.insert("prevResult".to_owned(), previous.clone());
        }
        request
    }
}

impl InForce {
    /// The chain for this pod. The default network leaves out what the pod has no use for; a conflist of the
    /// operator's is taken as it is.
    pub(crate) fn list_for(&self, pod: &PodNetwork) -> ConfList {
        match self.source {
            Source::Default => default_network::for_pod(&self.list, pod),
            Source::File(_) => self.list.clone(),
        }
    }

    /// Checks that every plugin has its executable, including address management plugins.
    pub(crate) fn find_plugins(&self, bin_dirs: &[PathBuf]) -> Result<()> {
        for plugin in &self.list.plugins {
            plugin::find(bin_dirs, ConfList::plugin_type(plugin))?;
            if let Some(ipam) = plugin
                .get("ipam")
                .and_then(|ipam| ipam.get("type"))
                .and_then(Value::as_str)
                && !ipam.is_empty()
            {
                plugin::find(bin_dirs, ipam)?;
            }
        }
        match self.source {
            Source::Default => default_network::find_tools(&self.list),
            Source::File(_) => Ok(()),
        }
    }

    pub(crate) fn summary(&self) -> NetworkSummary {
        NetworkSummary {
            name: self.list.name.clone(),
            source: self.source.clone(),
            cni_version: self.list.cni_version.clone(),
            plugins: self
                .list
                .plugins
                .iter()
                .map(|plugin| ConfList::plugin_type(plugin).to_owned())
                .collect(),
            skipped: self.skipped.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn config(dir: &Path) -> NetworkConfig {
        NetworkConfig {
            conf_dir: dir.to_owned(),
            bin_dirs: vec![],
            netns_dir: dir.join("netns"),
            cache_dir: dir.join("cache"),
            default_bridge: "cat9".to_owned(),
            default_subnet: "10.9.0.0/24".to_owned(),
            default_ipam_dir: dir.join("ipam"),
            plugin_timeout: std::time::Duration::from_secs(1),
        }
    }

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list = parse(
            br#"{"cniVersion":"1.0.0","name":"n","disableCheck":true,"plugins":[{"type":"a"},{"type":"b"}]}"#,
        )
        .unwrap();
        assert_eq!((list.cni_version.as_str(), list.plugins.len()), ("1.0.0", 2));
        let single = parse(br#"{"cniVersion":"0.3.1","name":"n","type":"a","mtu":9}"#).unwrap();
        assert_eq!(single.plugins[0]["mtu"], 9);
        assert!(!single.del_has_result());
        let newer = parse(br#"{"cniVersion":"0.4.0","cniVersions":["1.0.0","2.0.0"],"name":"n","type":"a"}"#)
            .unwrap();
        assert_eq!(newer.cni_version, "1.0.0");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, expected) in [
            ("{", "EOF"),
            (r#"{"name":"n","type":"a"}"#, "cniVersion 0.1.0 is not supported"),
            (
                r#"{"cniVersion":"2.0.0","name":"n","type":"a"}"#,
                "cniVersion 2.0.0",
            ),
            (r#"{"cniVersion":"1.0.0","type":"a"}"#, "name is missing"),
            (
                r#"{"cniVersion":"1.0.0","name":"../n","type":"a"}"#,
                "not a network name",
            ),
            (r#"{"cniVersion":"1.0.0","name":"n"}"#, "plugins is missing"),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#,
                "plugins is empty",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{}]}"#,
                "plugins[0] has no type",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"../x"}]}"#,
                "plugins[0] has no type",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"n","plugins":[3]}"#,
                "plugins[0] is not an object",
            ),
        ] {
            let reason = parse(text.as_bytes()).unwrap_err();
            assert!(reason.contains(expected), "{text}: {reason}");
        }
    }

    #[test]
    fn the_first_valid_file_wins_and_changes_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let mut current = None;
        let network = in_force(&config, &mut current).unwrap();
        assert_eq!(network.source, Source::Default);

        std::fs::write(dir.path().join("10-bad.conflist"), "{").unwrap();
        let error = in_force(&config, &mut current).unwrap_err().to_string();
        assert!(
            error.contains("no valid configuration") && error.contains("10-bad.conflist"),
            "{error}"
        );

        std::fs::write(
            dir.path().join("30-b.conf"),
            r#"{"cniVersion":"1.0.0","name":"b","type":"x"}"#,
        )
        .unwrap();
        std::fs::write(
            dir.path().join("20-a.conflist.bak"),
            r#"{"cniVersion":"1.0.0","name":"c","type":"x"}"#,
        )
        .unwrap();
        let network = in_force(&config, &mut current).unwrap();
        assert_eq!(network.list.name, "b");
        assert_eq!(network.skipped.len(), 1);
        assert!(
            Arc::ptr_eq(&network, &in_force(&config, &mut current).unwrap()),
            "read only once"
        );

        std::fs::write(
            dir.path().join("20-a.conflist"),
            r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"x"}]}"#,
        )
        .unwrap();
        assert_eq!(in_force(&config, &mut current).unwrap().list.name, "a");
    }

    #[test]
    fn a_request_has_only_the_declared_capabilities() {
        let list = parse(
            br#"{"cniVersion":"1.0.0","cniVersions":["1.0.0"],"name":"n","plugins":[
                {"type":"a","capabilities":{"portMappings":true,"dns":false}},{"type":"b"}]}"#,
        )
        .unwrap();
        let Value::Object(pod) = json!({"portMappings": [1], "dns": {}, "mac": "x"}) else {
            unreachable!()
        };
        let previous = json!({"ips": []});
        assert_eq!(
            Value::Object(list.request(&list.plugins[0], &pod, Some(&previous))),
            json!({"type": "a", "name": "n", "cniVersion": "1.0.0",
                   "capabilities": {"portMappings": true, "dns": false},
                   "runtimeConfig": {"portMappings": [1]}, "prevResult": {"ips": []}})
        );
        assert_eq!(
            Value::Object(list.request(&list.plugins[1], &pod, None)),
            json!({"type": "b", "name": "n", "cniVersion": "1.0.0"})
        );
    }

    proptest! {
        #[test]
        fn any_text_is_a_list_or_refused(text in ".{0,200}") {
            if let Ok(list) = parse(text.as_bytes()) {
                prop_assert!(!list.plugins.is_empty());
            }
        }
    }
}
