//! The Node Resource Interface: plugins that are told of every pod and container, and may adjust containers before
//! they are made and limits of those that run. This crate owns the plugins' connections (mux.rs, ttrpc.rs,
//! connection.rs), the plugins (plugin.rs, launch.rs), the merging of their answers (merge.rs, claims.rs) and the
//! order of it all (this file); what a pod is, it learns from [`Runtime`].
//!
//! Architecture invariant: a plugin is in the list exactly when it was synchronized, and a synchronization and an
//! event never overlap. So each plugin learns of each pod and container once: in the state, or by an event. Both
//! are bounded by the plugins' time limits, and nothing slower happens in between.

mod claims;
mod connection;
mod error;
mod events;
mod launch;
mod listen;
mod merge;
mod mux;
mod plugin;
mod ttrpc;

/// NRI's messages.
#[allow(missing_docs, clippy::doc_markdown)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{RwLock, Semaphore, watch};
use tokio_util::sync::CancellationToken;

pub use connection::CallError;
pub use error::Error;
pub use events::{Pair, Starting};
pub use merge::{Wanted, removal};
use plugin::{Limits, Plugin};

/// Plugins, and connections that may become some, at once.
const MAX_PLUGINS: usize = 64;

/// Where plugins are, and how long they may take.
#[derive(Debug, Clone)]
pub struct Config {
    /// The socket that plugins connect to; none: they cannot.
    pub socket: Option<PathBuf>,
    /// Directory of pre-installed plugins.
    pub plugin_dir: PathBuf,
    /// Directory of their configurations.
    pub config_dir: PathBuf,
    /// Time to register after connecting.
    pub registration_timeout: Duration,
    /// Time for one request.
    pub request_timeout: Duration,
}

/// Which pods and containers plugins know of although they are still being made, and which they know to be gone
/// although they are not yet.
#[derive(Debug, Clone, Default)]
pub struct Known {
    announced: HashSet<String>,
    departed: HashSet<String>,
}

impl Known {
    /// Whether a new plugin is to be told of it; `creating`: it is still being made.
    #[must_use]
    pub fn tells(&self, id: &str, creating: bool) -> bool {
        !self.departed.contains(id) && (!creating || self.announced.contains(id))
    }
}

/// What plugins are told about and may change.
#[async_trait::async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// All pods and containers that [`Known::tells`] of. May read files.
    fn state(&self, known: &Known) -> (Vec<api::PodSandbox>, Vec<api::Container>);
    /// Sets limits and stops containers; returns the updates that failed and may not.
    async fn change(&self, wanted: Wanted) -> Vec<api::ContainerUpdate>;
}

/// Why plugins cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket.
    #[error("cannot listen for NRI plugins on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else serves there.
    #[error("another runtime serves NRI plugins on {0}; set another nri.socket_path, or nri.disabled")]
    InUse(PathBuf),
    /// Nothing that may be replaced.
    #[error("{0} exists and is not a socket; remove it, or set another nri.socket_path")]
    NotASocket(PathBuf),
}

/// The interface. Clones share it.
#[derive(Clone, Default)]
pub struct Nri {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    config: Config,
    runtime: OnceLock<Arc<dyn Runtime>>,
    plugins: Mutex<Arc<Vec<Arc<Plugin>>>>,
    /// Held for reading around each event, for writing around a synchronization.
    order: RwLock<()>,
    known: Mutex<Known>,
    ends: Mutex<HashMap<String, watch::Receiver<bool>>>,
    starts: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    connections: Arc<Semaphore>,
    stop: CancellationToken,
}

impl std::fmt::Debug for Nri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nri")
            .field("enabled", &self.inner.is_some())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nri {
    /// Without plugins until it is started; [`Nri::default`] never has any.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            inner: Some(Arc::new(Inner {
                config,
                runtime: OnceLock::new(),
                plugins: Mutex::default(),
                order: RwLock::default(),
                known: Mutex::default(),
                ends: Mutex::default(),
                starts: Mutex::default(),
                connections: Arc::new(Semaphore::new(MAX_PLUGINS)),
                stop: CancellationToken::new(),
            })),
        }
    }

    /// Launches the pre-installed plugins, synchronizes them, and listens for others.
    ///
    /// # Errors
    /// [`StartError`], when the pre-installed plugins run.
    pub async fn start(&self, runtime: Arc<dyn Runtime>) -> Result<(), StartError> {
        let Some(inner) = &self.inner else {
            return Ok(());
        };
        if inner.runtime.set(runtime).is_err() {
            return Ok(());
        }
        launch::all(inner).await;
        match &inner.config.socket {
            Some(path) => listen::start(inner, path).await,
            None => Ok(()),
        }
    }

    /// Ends the plugins' connections, and the processes of those that were launched.
    pub async fn shutdown(&self) {
        let Some(inner) = &self.inner else {
            return;
        };
        inner.stop.cancel();
        let plugins = std::mem::take(&mut *lock(&inner.plugins));
        for plugin in plugins.iter() {
            plugin.end("the runtime ends").await;
        }
    }

    /// Names of the plugins, in their order.
    #[must_use]
    pub fn plugins(&self) -> Vec<String> {
        self.list().iter().map(|plugin| plugin.full_name()).collect()
    }

    fn list(&self) -> Arc<Vec<Arc<Plugin>>> {
        let list = self.inner.as_ref().map(|inner| lock(&inner.plugins).clone());
        list.unwrap_or_default()
    }
}

impl Inner {
    fn limits(&self) -> Limits {
        Limits {
            registration: self.config.registration_timeout,
            request: self.config.request_timeout,
        }
    }

    /// Synchronizes a plugin that has registered, and lists it.
    async fn join(self: &Arc<Self>, plugin: Plugin) {
        let Some(runtime) = self.runtime.get().cloned() else {
            return plugin.close("the runtime is not ready");
        };
        let name = plugin.full_name();
        let plugin = Arc::new(plugin);
        let synchronized = {
            let _order = self.order.write().await;
            let (known, state) = (lock(&self.known).clone(), runtime.clone());
            let state = tokio::task::spawn_blocking(move || state.state(&known)).await;
            let Ok((pods, containers)) = state else {
                return plugin.close("the state could not be read");
            };
            let synchronized = plugin.synchronize(pods, containers).await;
            if synchronized.is_ok() {
                let mut plugins = lock(&self.plugins);
                let mut list: Vec<Arc<Plugin>> = plugins.to_vec();
                list.retain(|other| !other.is_closed());
                list.push(plugin.clone());
                // Stable: of the same index, who came first is called first.
                list.sort_by(|a, b| a.index.cmp(&b.index));
                *plugins = Arc::new(list);
            }
            synchronized
        };
        match synchronized {
            Ok(updates) => {
                tracing::info!(plugin = name, "NRI plugin connected and synchronized");
                tokio::spawn(watch_end(self.clone(), plugin));
                let wanted = Wanted {
                    updates,
                    evictions: Vec::new(),
                };
                for failed in runtime.change(wanted).await {
                    tracing::warn!(plugin = name, container = failed.container_id, "an update failed");
                }
            }
            Err(refusal) => {
                let why = connection::chain(&refusal);
                tracing::warn!(plugin = name, why, "an NRI plugin was not taken");
                plugin.close(&why);
            }
        }
    }
}

async fn watch_end(inner: Arc<Inner>, plugin: Arc<Plugin>) {
    let why = plugin.closed().await;
    plugin.close(&why);
    tracing::info!(plugin = plugin.full_name(), why, "NRI plugin gone");
    let mut plugins = lock(&inner.plugins);
    let left = plugins.iter().filter(|other| !Arc::ptr_eq(other, &plugin));
    *plugins = Arc::new(left.cloned().collect());
}
