//! What every operation shares: the node's directories, configuration, store, images, network, handlers.

use std::path::{Path, PathBuf};

use catamaran_images::ImageStore;
use catamaran_network::Network;
use catamaran_sandbox::id::Id;
use catamaran_spec::HostFeatures;

use crate::config::Config;
use crate::cpu_rates::CpuRates;
use crate::error::Error;
use crate::events::Events;
use crate::handlers::Handlers;
use crate::store::Store;

/// The daemon's parts, made once at start.
pub struct Node {
    /// As read at start.
    pub config: Config,
    /// Where things are.
    pub dirs: Dirs,
    /// Durable records.
    pub store: Store,
    /// Images and snapshots.
    pub images: ImageStore,
    /// Network namespaces and CNI.
    pub network: Network,
    /// Runtime handlers.
    pub handlers: Handlers,
    /// This node's kernel.
    pub host: HostFeatures,
    /// Container events.
    pub events: Events,
    /// CPU use of late.
    pub cpu_rates: CpuRates,
    /// NRI plugins.
    pub nri: catamaran_nri::Nri,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("dirs", &self.dirs)
            .finish_non_exhaustive()
    }
}

/// The daemon's directories: `root` outlives a reboot, `state` does not.
#[derive(Debug, Clone)]
pub struct Dirs {
    root: PathBuf,
    state: PathBuf,
}

impl Dirs {
    /// Below these two.
    #[must_use]
    pub fn new(root: &Path, state: &Path) -> Self {
        Self {
            root: root.to_owned(),
            state: state.to_owned(),
        }
    }

    /// Content and layers.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Containers' writable layers.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// CNI's records.
    #[must_use]
    pub fn cni(&self) -> PathBuf {
        self.root.join("cni")
    }

    /// The store's file.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.root.join("state.redb")
    }

    /// Locked while a daemon runs on this root.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Directories of guest artefacts, the first that has what is wanted wins.
    #[must_use]
    pub fn guests(&self) -> Vec<PathBuf> {
        vec![self.root.join("guest"), "/usr/lib/catamaran/guest".into()]
    }

    /// All sandbox bundles.
    #[must_use]
    pub fn pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    /// Shim sockets.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.state.join("s")
    }

    /// Pinned network namespaces.
    #[must_use]
    pub fn netns(&self) -> PathBuf {
        self.state.join("netns")
    }

    /// What the vCPU probe found since boot.
    #[must_use]
    pub fn acceleration(&self) -> PathBuf {
        self.state.join("acceleration.json")
    }

    /// A sandbox's bundle.
    #[must_use]
    pub fn pod(&self, pod: &Id) -> PathBuf {
        self.pods().join(pod.as_str())
    }

    /// A container's bundle.
    #[must_use]
    pub fn container(&self, pod: &Id, container: &Id) -> PathBuf {
        self.pod(pod).join("containers").join(container.as_str())
    }

    /// A shim's socket.
    #[must_use]
    pub fn socket(&self, pod: &Id) -> PathBuf {
        self.sockets().join(format!("{}.sock", pod.short()))
    }

    /// An OCI runtime's own state directory; one for each handler.
    #[must_use]
    pub fn runtime_root(&self, handler: &str) -> PathBuf {
        self.state.join("runtime").join(handler)
    }

    /// Makes the directories, closed to all but root.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(&self) -> Result<(), Error> {
        use std::os::unix::fs::DirBuilderExt;
        for dir in [
            self.root.clone(),
            self.state.clone(),
            self.images(),
            self.snapshots(),
            self.cni(),
            self.pods(),
            self.sockets(),
            self.netns(),
        ] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(&dir)
                .map_err(Error::io("create directory", &dir))?;
        }
        Ok(())
    }
}

/// Now, in nanoseconds since the epoch, as the CRI has all its times.
#[must_use]
pub fn now_ns() -> i64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
