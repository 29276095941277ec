//! The node's configuration: one YAML file in which every key is optional. What is written is what runs: an
//! unknown key is refused with its line and column, and a key that a handler's type has no use for is refused
//! by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Handler of a pod that names none (CRI: empty `runtime_handler`).
pub const DEFAULT_HANDLER: &str = "runc";

/// The configuration file, with defaults for what it does not say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What must outlive a reboot: images, snapshots, the store.
    pub root: PathBuf,
    /// What a reboot may lose: sockets, bundles, pinned namespaces.
    pub state: PathBuf,
    /// The CRI socket; by default `catamaran.sock` in `state`.
    pub listen: Option<PathBuf>,
    /// Log filter: a level, or comma-separated `target=level`.
    pub log: String,
    /// cgroup below which pods without a `cgroup_parent` of their own are placed.
    pub cgroup_parent: String,
    /// Who manages cgroups; the kubelet asks for it by RuntimeConfig.
    pub cgroup_driver: CgroupDriver,
    /// Mounts the cgroup hierarchies with `favordynmods` at start: a container starts 5 to 20 ms sooner, each
    /// fork and exit on the host costs a little more, until the next reboot.
    pub favordynmods: bool,
    /// Processes without privileges may bind ports below 1024 in pods with a network namespace of their own
    /// (`net.ipv4.ip_unprivileged_port_start=0`), where the pod sets no other.
    pub enable_unprivileged_ports: bool,
    /// Processes without privileges may send ICMP echo requests in such pods (`net.ipv4.ping_group_range`), not in
    /// those with a user namespace.
    pub enable_unprivileged_icmp: bool,
    /// Where the shims are; by default beside this executable, then `/usr/lib/catamaran`, then `PATH`.
    pub shim_dir: Option<PathBuf>,
    /// Runtime handlers by name, as RuntimeClass objects name them. `runc` and `runv` exist without being
    /// listed; an entry of that name changes them.
    pub handlers: BTreeMap<String, HandlerConfig>,
    /// Pod networking.
    pub network: NetworkSection,
    /// Images.
    pub images: ImagesSection,
    /// Where the clients of exec, attach and port-forward come to.
    pub streaming: StreamingSection,
    /// Directories of CDI specifications; a later one overrides an earlier one.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// The daemon's own metrics.
    pub metrics: MetricsSection,
    /// Plugins that are told of pods and containers and may adjust them.
    pub nri: NriSection,
}

/// CRI CgroupDriver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// The runtime writes to the cgroup file system itself.
    Cgroupfs,
    /// systemd is asked for scopes and slices.
    Systemd,
}

/// What kind of runtime stands behind a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HandlerType {
    /// An OCI runtime's command line, under the namespace shim.
    Oci,
    /// A virtual machine per pod, under the vm shim.
    Vm,
}

/// One runtime handler. Keys that do not belong to its type are refused.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandlerConfig {
    /// By default `vm` for a handler named `runv`, else `oci`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<HandlerType>,
    /// oci: the runtime's executable, absolute or looked up in `PATH`; by default the handler's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// oci: arguments before the subcommand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// The shim's executable, where it is not the one that comes with Catamaran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shim: Option<PathBuf>,
    /// vm: the VMM; by default `qemu-system-x86_64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm: Option<PathBuf>,
    /// vm: virtiofsd; by default `/usr/lib/qemu/virtiofsd`, else `/usr/libexec/virtiofsd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtiofsd: Option<PathBuf>,
    /// vm: name of the guest kernel below the guest directories; by default the newest that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// vm: further guest kernels that a pod may choose by its annotation `catamaran.dev/kernel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_kernels: Option<Vec<String>>,
    /// vm: further words for the guest kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_args: Option<String>,
    /// vm: virtual CPUs of a pod without a CPU limit; by default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// vm: guest memory in MiB besides the sum of the pod's memory limits; by default 256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// vm: seconds for a guest to boot; by default 20 with KVM and 90 with emulation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_timeout_seconds: Option<u64>,
}

/// Pod networking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSection {
    /// Directory of CNI configurations; the first valid one in lexical order is used.
    pub conf_dir: PathBuf,
    /// Directories of CNI plugins.
    pub bin_dirs: Vec<PathBuf>,
    /// Bridge of the embedded default network, used where `conf_dir` has no configuration.
    pub default_bridge: String,
    /// Subnet of the embedded default network.
    pub default_subnet: String,
    /// Where host-local keeps the leases of the embedded default network.
    pub default_ipam_dir: Option<PathBuf>,
    /// Seconds that one CNI plugin may take.
    pub plugin_timeout_seconds: u64,
}

/// The streaming server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamingSection {
    /// Address and port to listen on; port 0 is one that the kernel chooses.
    pub address: std::net::SocketAddr,
    /// PEM file of the certificate with its chain; with `tls_key` it turns TLS on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// PEM file of the certificate's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
}

/// The daemon's own metrics, for Prometheus.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsSection {
    /// Address and port of an HTTP server with `/metrics`; none unless set.
    pub address: Option<std::net::SocketAddr>,
}

/// The Node Resource Interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NriSection {
    /// No plugin is launched or served.
    pub disabled: bool,
    /// The socket that plugins connect to; by default `/var/run/nri/nri.sock`, where plugins look for it, and
    /// `nri.sock` in `state` where that is not the default one.
    pub socket_path: Option<PathBuf>,
    /// Directory of plugins that are launched at start.
    pub plugin_path: PathBuf,
    /// Directory of their configurations.
    pub plugin_config_path: PathBuf,
    /// Only launched plugins are served.
    pub disable_connections: bool,
    /// Milliseconds that a plugin may take to register.
    pub plugin_registration_timeout_ms: u64,
    /// Milliseconds that a plugin may take for one request; one that takes longer is closed.
    pub plugin_request_timeout_ms: u64,
}

impl Default for NriSection {
    fn default() -> Self {
        Self {
            disabled: false,
            socket_path: None,
            plugin_path: "/opt/nri/plugins".into(),
            plugin_config_path: "/etc/nri/conf.d".into(),
            disable_connections: false,
            plugin_registration_timeout_ms: 5000,
            plugin_request_timeout_ms: 2000,
        }
    }
}

impl Default for StreamingSection {
    fn default() -> Self {
        Self {
            address: ([127, 0, 0, 1], 0).into(),
            tls_certificate: None,
            tls_key: None,
        }
    }
}

/// Images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagesSection {
    /// Directories with `<registry>/hosts.toml`, containerd's convention; the first that has the registry wins.
    pub hosts_dirs: Vec<PathBuf>,
    /// Layers downloaded at once for one image.
    pub max_parallel_downloads: usize,
    /// Seconds with less than 1 KiB/s of progress after which a transfer is begun anew, and at last a pull fails.
    pub progress_timeout_seconds: u64,
    /// A docker `config.json` with registry credentials, used where the request has none.
    pub docker_config: Option<PathBuf>,
    /// References that the kubelet must not garbage-collect.
    pub pinned: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/catamaran".into(),
            state: "/run/catamaran".into(),
            listen: None,
            log: "info".to_owned(),
            cgroup_parent: "/catamaran".to_owned(),
            cgroup_driver: CgroupDriver::Cgroupfs,
            favordynmods: false,
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            shim_dir: None,
            handlers: BTreeMap::new(),
            network: NetworkSection::default(),
            images: ImagesSection::default(),
            streaming: StreamingSection::default(),
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            metrics: MetricsSection::default(),
            nri: NriSection::default(),
        }
    }
}

impl Default for NetworkSection {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            default_bridge: "cat0".to_owned(),
            default_subnet: "10.88.0.0/16".to_owned(),
            default_ipam_dir: None,
            plugin_timeout_seconds: 60,
        }
    }
}

impl Default for ImagesSection {
    fn default() -> Self {
        Self {
            hosts_dirs: vec!["/etc/catamaran/certs.d".into(), "/etc/containerd/certs.d".into()],
            max_parallel_downloads: 4,
            progress_timeout_seconds: 60,
            docker_config: None,
            pinned: Vec::new(),
        }
    }
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not YAML, an unknown key, or a value of the wrong type. The source gives line and column.
    #[error("configuration {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_yaml::Error,
    },
    /// A value that cannot be meant.
    #[error("configuration key {key}: {problem}")]
    Value {
        /// The key, dotted.
        key: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl Config {
    /// Reads a file; `None` gives the defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let config = match path {
            None => Self::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
                    path: path.to_owned(),
                    source,
                })?;
                Self::parse(&text, path)?
            }
        };
        config.verify()?;
        Ok(config)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        // An empty document is YAML's null, which no struct accepts.
        if text
            .lines()
            .all(|line| matches!(line.trim(), "" | "---") || line.trim_start().starts_with('#'))
        {
            return Ok(Self::default());
        }
        serde_yaml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })
    }

    /// Checks what the types cannot say. Called again after command line options changed a value.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn verify(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, problem: String| {
            Err(ConfigError::Value {
                key: key.to_owned(),
                problem,
            })
        };
        for (key, path) in [
            ("root", &self.root),
            ("state", &self.state),
            ("listen", &self.listen()),
            ("nri.socket_path", &self.nri_socket()),
        ] {
            if !path.is_absolute() {
                return wrong(key, format!("{} is not an absolute path", path.display()));
            }
        }
        // sockaddr_un holds 108 bytes with the final NUL; the shims' sockets have the longest names.
        let longest = self.shim_socket_dir().join("0".repeat(32) + "-agent.sock");
        if longest.as_os_str().len() > 107 {
            return wrong(
                "state",
                format!("{} is too long for unix sockets below it", self.state.display()),
            );
        }
        if !self.cgroup_parent.starts_with('/') || self.cgroup_parent.split('/').any(|part| part == "..") {
            return wrong(
                "cgroup_parent",
                format!("{:?} is not an absolute cgroup path", self.cgroup_parent),
            );
        }
        if self.network.plugin_timeout_seconds == 0 {
            return wrong(
                "network.plugin_timeout_seconds",
                "0 would fail every plugin; use 1 or more".into(),
            );
        }
        if self.images.max_parallel_downloads == 0 {
            return wrong(
                "images.max_parallel_downloads",
                "0 would fetch nothing; use 1 or more".into(),
            );
        }
        if self.images.progress_timeout_seconds == 0 {
            return wrong(
                "images.progress_timeout_seconds",
                "0 would fail every pull; use 1 or more".into(),
            );
        }
        for (key, millis) in [
            (
                "nri.plugin_registration_timeout_ms",
                self.nri.plugin_registration_timeout_ms,
            ),
            (
                "nri.plugin_request_timeout_ms",
                self.nri.plugin_request_timeout_ms,
            ),
        ] {
            if millis == 0 {
                return wrong(key, "0 would fail every plugin; use 1 or more".into());
            }
        }
        if self.streaming.tls_certificate.is_some() != self.streaming.tls_key.is_some() {
            return wrong(
                "streaming.tls_key",
                "goes together with streaming.tls_certificate; set both".into(),
            );
        }
        for (name, handler) in &self.handlers {
            handler.verify(name)?;
        }
        Ok(())
    }

    /// The CRI socket.
    #[must_use]
    pub fn listen(&self) -> PathBuf {
        self.listen
            .clone()
            .unwrap_or_else(|| self.state.join("catamaran.sock"))
    }

    /// The socket of NRI plugins.
    #[must_use]
    pub fn nri_socket(&self) -> PathBuf {
        self.nri.socket_path.clone().unwrap_or_else(|| {
            if self.state == Self::default().state {
                "/var/run/nri/nri.sock".into()
            } else {
                self.state.join("nri.sock")
            }
        })
    }

    /// Where shims bind their sockets: short, because a socket's path is limited to 107 bytes.
    #[must_use]
    pub fn shim_socket_dir(&self) -> PathBuf {
        self.state.join("s")
    }

    /// Every handler with its entry: the built-in ones, then what the file adds or changes.
    #[must_use]
    pub fn all_handlers(&self) -> BTreeMap<String, HandlerConfig> {
        let mut all = BTreeMap::from([
            (DEFAULT_HANDLER.to_owned(), HandlerConfig::default()),
            ("runv".to_owned(), HandlerConfig::default()),
        ]);
        all.extend(
            self.handlers
                .iter()
                .map(|(name, handler)| (name.clone(), handler.clone())),
        );
        all
    }

    /// Time limit of one CNI plugin.
    #[must_use]
    pub fn plugin_timeout(&self) -> Duration {
        Duration::from_secs(self.network.plugin_timeout_seconds)
    }
}

impl HandlerConfig {
    /// The handler's type, from its entry or its name.
    #[must_use]
    pub fn kind(&self, name: &str) -> HandlerType {
        self.kind.unwrap_or(if name == "runv" {
            HandlerType::Vm
        } else {
            HandlerType::Oci
        })
    }

    fn verify(&self, name: &str) -> Result<(), ConfigError> {
        let wrong = |key: &str, problem: &str| {
            Err(ConfigError::Value {
                key: format!("handlers.{name}{key}"),
                problem: problem.to_owned(),
            })
        };
        // A RuntimeClass handler is a DNS label.
        let label = !name.is_empty()
            && name.len() <= 63
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !label {
            return wrong(
                "",
                "a handler's name is a DNS label: lower-case letters, digits and '-'",
            );
        }
        let kind = self.kind(name);
        let of_oci = [("binary", self.binary.is_some()), ("args", self.args.is_some())];
        let of_vm = [
            ("vmm", self.vmm.is_some()),
            ("virtiofsd", self.virtiofsd.is_some()),
            ("kernel", self.kernel.is_some()),
            ("allowed_kernels", self.allowed_kernels.is_some()),
            ("kernel_args", self.kernel_args.is_some()),
            ("cpus", self.cpus.is_some()),
            ("memory_mib", self.memory_mib.is_some()),
            ("boot_timeout_seconds", self.boot_timeout_seconds.is_some()),
        ];
        let strangers: &[(&str, bool)] = if kind == HandlerType::Oci { &of_vm } else { &of_oci };
        if let Some((key, _)) = strangers.iter().find(|(_, set)| *set) {
            let other = if kind == HandlerType::Oci { "vm" } else { "oci" };
            return wrong(
                &format!(".{key}"),
                &format!("this key belongs to handlers of type {other}"),
            );
        }
        if self.cpus == Some(0) {
            return wrong(".cpus", "a VM has at least 1");
        }
        if self.memory_mib.is_some_and(|mib| mib < 64) {
            return wrong(".memory_mib", "a guest does not boot with less than 64");
        }
        if self.boot_timeout_seconds == Some(0) {
            return wrong(".boot_timeout_seconds", "0 would fail every boot; use 1 or more");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
