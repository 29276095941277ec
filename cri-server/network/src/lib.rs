//! Pod networks: pinned network namespaces and the CNI client that configures them.
//!
//! What is here: the conflist that is in force ([`conflist`], [`default_network`]), the plugin processes
//! ([`plugin`]), the chain of plugins for each verb and the durable record that makes DEL certain
//! ([`attach`], [`record`]), the pins ([`netns`]).
//!
//! Architecture invariant: no ADD runs before its record is written (and synced, where ADD may do something
//! that outlives a power failure), and the record goes only after a DEL that succeeded. So whatever ends the
//! daemon, [`Network::attached`] names every sandbox that may hold a lease, an interface or a firewall rule,
//! and [`Network::detach`] gives it back.

mod attach;
mod bandwidth;
mod conflist;
mod default_network;
mod error;
mod holders;
mod masquerade;
mod netlink;
mod netns;
mod plugin;
mod pod;
mod record;
mod result;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use bandwidth::{Bandwidth, InvalidBandwidth};
pub use conflist::Source;
pub use error::{NetworkError, Result};
pub use pod::{DnsConfig, PodNetwork, PortMapping, Protocol};
pub use result::{Attachment, Dns, Interface, Route};

/// Name of the pod's interface, as every CRI implementation has it.
pub const POD_INTERFACE: &str = "eth0";

/// Where things are, and the network for a node on which no CNI configuration is installed.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Directory of the conflists, `/etc/cni/net.d`. It need not exist.
    pub conf_dir: PathBuf,
    /// Directories in which plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of the pinned network namespaces. Must be on a file system that a reboot empties.
    pub netns_dir: PathBuf,
    /// Directory of the records of attachments. Must survive a reboot.
    pub cache_dir: PathBuf,
    /// Bridge of the embedded default network; empty: no default, the node is not ready without a conflist.
    pub default_bridge: String,
    /// Subnet of the embedded default network, or two (IPv4 and IPv6) with a comma between them.
    pub default_subnet: String,
    /// Directory of the embedded default network's address leases. Should be on a file system that a
    /// reboot empties, as the namespaces that hold the addresses are then gone too.
    pub default_ipam_dir: PathBuf,
    /// Time that one plugin process may take; then its process group is killed.
    pub plugin_timeout: Duration,
}

/// The network that pods are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSummary {
    /// The network's name from its configuration.
    pub name: String,
    /// Where the configuration is from.
    pub source: Source,
    /// CNI version that the plugins are called with.
    pub cni_version: String,
    /// The plugins' types, in the order of ADD.
    pub plugins: Vec<String>,
    /// Files of the configuration directory that were passed over, each with the reason.
    pub skipped: Vec<String>,
}

/// The CNI client. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    config: Arc<NetworkConfig>,
    current: Arc<Mutex<Option<conflist::Current>>>,
    masquerade: Arc<masquerade::Masquerade>,
}

impl Network {
    /// A client for this configuration. Touches nothing yet.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self {
            config: Arc::new(config),
            current: Arc::default(),
            masquerade: Arc::default(),
        }
    }

    /// The network in force, or why there is none (CRI `NetworkReady`'s message). Reads the configuration
    /// directory again when something in it changed and looks for the plugins' executables; starts no
    /// process. See [`Self::ready`] for the plugins' own opinion.
    ///
    /// # Errors
    /// A sentence that says what is missing and what to do.
    pub fn status(&self) -> std::result::Result<NetworkSummary, String> {
        let network = self.in_force().map_err(|error| error.to_string())?;
        network
            .find_plugins(&self.config.bin_dirs)
            .map_err(|error| error.to_string())?;
        Ok(network.summary())
    }

    /// As [`Self::status`], and asks each plugin by the STATUS verb where the configuration is of CNI 1.1 or
    /// later.
    ///
    /// # Errors
    /// As [`Self::status`]; also the plugin's own message.
    pub async fn ready(&self) -> std::result::Result<NetworkSummary, String> {
        let summary = self.status()?;
        let network = self.in_force().map_err(|error| error.to_string())?;
        self.prepare(&network).await.map_err(|error| error.to_string())?;
        attach::status(&self.config, &network)
            .await
            .map_err(|error| error.to_string())?;
        Ok(summary)
    }

    /// A new network namespace, pinned by a bind mount at the returned path, with its loopback interface up.
    /// Idempotent: an existing pin is returned as it is.
    ///
    /// # Errors
    /// [`NetworkError::Netns`], and nothing is left.
    pub async fn create_netns(&self, id: &str) -> Result<PathBuf> {
        netns::create(&self.config.netns_dir, id).await
    }

    /// Unpins the namespace; the kernel frees it with its interfaces when its last process has gone.
    /// Idempotent.
    ///
    /// # Errors
    /// [`NetworkError::Netns`].
    pub async fn remove_netns(&self, id: &str) -> Result<()> {
        netns::remove(&self.config.netns_dir, id).await
    }

    /// Ids that have a pin, or what a crash left of one.
    ///
    /// # Errors
    /// [`NetworkError::Io`].
    pub fn netns_list(&self) -> Result<Vec<String>> {
        netns::list(&self.config.netns_dir)
    }

    /// CNI ADD of each plugin of the network in force. An attached sandbox keeps its attachment; what an
    /// interrupted ADD left is undone first. When a plugin fails, DEL has been run before this returns.
    ///
    /// Dropping the future kills the running plugin and leaves the record: call [`Self::detach`] then.
    ///
    /// # Errors
    /// [`NetworkError::NotReady`] without a network; the plugin's error; [`NetworkError::Undo`] where the DEL
    /// after a failed ADD failed too (the record stays, [`Self::detach`] tries again).
    pub async fn attach(&self, pod: &PodNetwork) -> Result<Attachment> {
        let network = self.in_force()?;
        self.prepare(&network).await?;
        attach::attach(&self.config, &network, pod).await
    }

    /// CNI DEL with the configuration and the result that ADD had, in reverse order. Idempotent: nothing is
    /// done for a sandbox without a record. Works when the namespace is gone.
    ///
    /// # Errors
    /// The first plugin's error; the record stays and a further call tries again.
    pub async fn detach(&self, pod: &PodNetwork) -> Result<()> {
        attach::detach(&self.config, &pod.id).await
    }

    /// As [`Self::detach`], for reconciliation, where only the id is known: the record has the rest.
    ///
    /// # Errors
    /// As [`Self::detach`].
    pub async fn detach_id(&self, id: &str) -> Result<()> {
        attach::detach(&self.config, id).await
    }

    /// Sandbox ids with a record: attached ones, and those whose ADD was interrupted.
    ///
    /// # Errors
    /// [`NetworkError::Io`].
    pub fn attached(&self) -> Result<Vec<String>> {
        record::list(&self.config.cache_dir)
    }

    /// Takes away what the embedded default network leaves on the node when its last pod has gone: the
    /// bridge and the masquerading rules. For an uninstallation, and for tests. Idempotent.
    ///
    /// # Errors
    /// [`NetworkError::Masquerade`], [`NetworkError::Io`].
    pub async fn remove_default(&self) -> Result<()> {
        let bridge = &self.config.default_bridge;
        if bridge.is_empty() {
            return Ok(());
        }
        self.masquerade.remove(&self.config).await?;
        netlink::delete_interface(bridge).map_err(NetworkError::io("delete interface", bridge))
    }

    /// What the default network needs beside its plugins.
    async fn prepare(&self, network: &conflist::InForce) -> Result<()> {
        if network.source != Source::Default {
            return Ok(());
        }
        network.find_plugins(&self.config.bin_dirs)?;
        default_network::allow_forwarding(&network.list)?;
        self.masquerade.ensure(&self.config).await
    }

    fn in_force(&self) -> Result<Arc<conflist::InForce>> {
        let mut current = self
            .current
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        conflist::in_force(&self.config, &mut current)
    }
}
