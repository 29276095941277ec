//! The daemon under test: its configuration and command line. Catamaran is what is tested; Debian's
//! containerd takes its place to prove the harness itself and to be measured beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::binaries;

/// Which CRI server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Ours.
    Catamaran,
    /// Debian's containerd with its CRI plugin.
    Containerd,
}

impl Flavour {
    /// The daemon that the suites run against: Catamaran unless `CATAMARAN_E2E_DAEMON` is `containerd`.
    ///
    /// # Errors
    /// The variable names neither.
    pub fn from_environment() -> Result<Self> {
        match std::env::var("CATAMARAN_E2E_DAEMON").as_deref() {
            Err(_) | Ok("" | "catamaran") => Ok(Self::Catamaran),
            Ok("containerd") => Ok(Self::Containerd),
            Ok(other) => anyhow::bail!("CATAMARAN_E2E_DAEMON={other}: catamaran or containerd is expected"),
        }
    }
}

/// Where a node's things are.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Everything of this node.
    pub base: PathBuf,
    /// The daemon's persistent directory.
    pub root: PathBuf,
    /// The daemon's volatile directory.
    pub state: PathBuf,
    /// The CRI socket.
    pub socket: PathBuf,
    /// The daemon's output.
    pub log: PathBuf,
    /// CNI configuration directory.
    pub cni: PathBuf,
    /// Directories of CNI plugins.
    pub cni_bins: Vec<PathBuf>,
    /// Where host-local keeps leases.
    pub leases: PathBuf,
    /// Registries' hosts.toml directories.
    pub certs: PathBuf,
    /// Logs of containers, a directory for each pod.
    pub logs: PathBuf,
}

impl Layout {
    /// The layout below a directory, created.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub fn create(base: &Path) -> Result<Self> {
        let layout = Self {
            base: base.to_owned(),
            root: base.join("root"),
            state: base.join("run"),
            socket: base.join("run/cri.sock"),
            log: base.join("daemon.log"),
            cni: base.join("cni"),
            cni_bins: vec!["/usr/lib/cni".into()],
            leases: base.join("leases"),
            certs: base.join("certs.d"),
            logs: base.join("logs"),
        };
        for directory in [
            &layout.root,
            &layout.state,
            &layout.cni,
            &layout.leases,
            &layout.certs,
            &layout.logs,
        ] {
            std::fs::create_dir_all(directory)?;
        }
        Ok(layout)
    }

    /// Where this daemon pins network namespaces.
    #[must_use]
    pub fn netns(&self) -> PathBuf {
        self.state.join("netns")
    }
}

/// What differs from one test daemon to the next.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Entries of Catamaran's `handlers`.
    pub handlers: BTreeMap<String, Value>,
    /// Further top-level keys of Catamaran's configuration, merged over the harness's.
    pub overrides: BTreeMap<String, Value>,
    /// The pause image that containerd needs.
    pub pause_image: Option<String>,
    /// The default cgroup parent.
    pub cgroup_parent: String,
}

/// Writes the daemon's configuration file and returns the command that serves with it.
///
/// # Errors
/// The daemon's binary is missing, or the file cannot be written.
pub fn prepare(flavour: Flavour, layout: &Layout, settings: &Settings) -> Result<Command> {
    match flavour {
        Flavour::Catamaran => catamaran(layout, settings),
        Flavour::Containerd => containerd(layout, settings),
    }
}

fn catamaran(layout: &Layout, settings: &Settings) -> Result<Command> {
    let mut config = json!({
        "log": "info,catamaran=debug",
        "cgroup_parent": settings.cgroup_parent,
        "handlers": settings.handlers,
        "network": {
            "conf_dir": layout.cni, "bin_dirs": layout.cni_bins, "plugin_timeout_seconds": 20,
        },
        "images": {"hosts_dirs": [layout.certs], "progress_timeout_seconds": 5},
    });
    for (key, value) in &settings.overrides {
        config[key] = value.clone();
    }
    let file = layout.base.join("catamaran.yaml");
    // JSON is YAML.
    std::fs::write(&file, serde_json::to_vec_pretty(&config)?)?;
    let mut command = Command::new(binaries::ours("catamaran")?);
    command.arg("serve").arg("--config").arg(file);
    command
        .arg("--root")
        .arg(&layout.root)
        .arg("--state")
        .arg(&layout.state);
    command.arg("--listen").arg(&layout.socket);
    Ok(command)
}

fn containerd(layout: &Layout, settings: &Settings) -> Result<Command> {
    let pause = settings.pause_image.as_deref().unwrap_or("pause-image-not-set");
    let bins = layout
        .cni_bins
        .first()
        .map(|p| p.display().to_string())
        .unwrap_or_default();
    let config = format!(
        r#"version = 2
root = "{root}"
state = "{state}"
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
netns_mounts_under_state_dir = true
restrict_oom_score_adj = true
disable_apparmor = true
stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bins}"
conf_dir = "{cni}"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{certs}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#,
        root = layout.root.display(),
        state = layout.state.display(),
        socket = layout.socket.display(),
        cni = layout.cni.display(),
        certs = layout.certs.display(),
    );
    let file = layout.base.join("containerd.toml");
    std::fs::write(&file, config)?;
    let mut command = Command::new(binaries::system("containerd")?);
    command.arg("--config").arg(file);
    Ok(command)
}
