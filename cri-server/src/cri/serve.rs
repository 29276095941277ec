//! The daemon's life: lock, directories, store, recovery, socket, serving, and an end that leaves pods alone.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use catamaran_images::{ImageStore, ImagesConfig, Platform};
use catamaran_network::{Network, NetworkConfig, Source};
use catamaran_spec::HostFeatures;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::api::image_service_server::ImageServiceServer;
use super::api::runtime_service_server::RuntimeServiceServer;
use super::image_service::Images;
use super::layer::Observed;
use super::runtime_service::Runtime;
use crate::config::Config;
use crate::cpu_rates::CpuRates;
use crate::error::Error;
use crate::events::Events;
use crate::handlers::Handlers;
use crate::metrics::RpcMetrics;
use crate::node::{Dirs, Node};
use crate::pods::Pods;
use crate::store::{Store, StoreError};

/// Time that RPCs at work have when the daemon is asked to end. Their work goes on at the next start.
const DRAIN: Duration = Duration::from_secs(10);
/// The kubelet's own limit of a message.
const MAX_MESSAGE: usize = 16 << 20;

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another one runs on these directories.
    #[error("another catamaran runs on {0}; stop it, or use another --root and --state")]
    Running(PathBuf),
    /// Someone else listens at the address.
    #[error("{0} is in use by another server; stop it, or use another --listen")]
    AddressInUse(PathBuf),
    /// What is at the address is no socket.
    #[error("{0} exists and is not a socket; remove it, or use another --listen")]
    NotASocket(PathBuf),
    /// Files and directories.
    #[error(transparent)]
    Setup(#[from] Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Images.
    #[error(transparent)]
    Images(#[from] catamaran_images::Error),
    /// The socket.
    #[error("cannot listen on {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The metrics' address.
    #[error("cannot serve metrics on {address}; free it, or set another metrics.address")]
    Metrics {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The streaming server.
    #[error(transparent)]
    Streaming(#[from] catamaran_streaming::ServerError),
    /// Serving ended.
    #[error("serving failed")]
    Transport(#[from] tonic::transport::Error),
}

/// Serves until `stop` resolves. Pods live on.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    config: Config,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let dirs = Dirs::new(&config.root, &config.state);
    dirs.create()?;
    let _root_lock = lock(&dirs.lock(), &config.root)?;
    let _state_lock = lock(&config.state.join("lock"), &config.state)?;
    if config.favordynmods {
        crate::favordynmods::enable();
    }
    let (store, pods, containers) = Store::open(&dirs.store())?;
    let images = ImageStore::open(images_config(&config, &dirs)).await?;
    crate::apparmor::load(&config.state).await;
    let node = Arc::new(Node {
        network: Network::new(network_config(&config, &dirs)),
        handlers: Handlers::new(&config, &dirs),
        host: HostFeatures::detect(),
        events: Events::default(),
        cpu_rates: CpuRates::default(),
        nri: crate::nri::new(&config),
        images,
        store,
        dirs,
        config,
    });
    let path = node.config.listen();
    free_address(&path).await?;
    let pods = Pods::recover(node.clone(), pods, containers).await;
    ask_ahead(&node);
    crate::nri::start(&node.nri, &pods).await;
    let streaming = Arc::new(crate::streaming::bind(pods.clone(), streaming_config(&node.config)?).await?);
    let rpcs = Arc::new(RpcMetrics::default());
    let _metrics = match node.config.metrics.address {
        Some(address) => {
            let bound = crate::metrics::bind(address, rpcs.clone(), pods.clone()).await;
            Some(bound.map_err(|source| ServeError::Metrics { address, source })?)
        }
        None => None,
    };
    let listener = listen(&path)?;
    tracing::info!(socket = %path.display(), "serving");
    let events = node.events.clone();
    let (ending, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = Server::builder()
        .layer(Observed { rpcs })
        .add_service(
            RuntimeServiceServer::new(Runtime::new(pods.clone(), streaming.clone()))
                .max_decoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            ImageServiceServer::new(Images::new(node.clone())).max_decoding_message_size(MAX_MESSAGE),
        )
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            stop.await;
            tracing::info!("ending; pods live on");
            events.close();
            let _ = ending.send(());
        });
    let drained = async {
        // A dropped sender means that serving failed, which the other side reports.
        if ended.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(DRAIN).await;
    };
    let result = tokio::select! {
        result = serving => result.map_err(ServeError::from),
        () = drained => {
            tracing::info!("requests at work are left to the next start");
            Ok(())
        }
    };
    node.nri.shutdown().await;
    streaming.shutdown().await;
    if pods.is_empty() {
        remove_default_network(&node).await;
    }
    if pods.is_empty()
        && let Err(error) = catamaran_cgroups::remove(&node.config.cgroup_parent)
    {
        tracing::debug!(%error, "the parent cgroup stays");
    }
    if let Err(error) = std::fs::remove_file(&path) {
        tracing::debug!(%error, "the socket stays");
    }
    result
}

/// The embedded network's bridge and rule serve no pod any more; the next start makes them again. With a
/// configuration of the operator's, a bridge of that name is not ours.
async fn remove_default_network(node: &Node) {
    let ours = node
        .network
        .status()
        .is_ok_and(|summary| summary.source == Source::Default);
    if ours && let Err(error) = node.network.remove_default().await {
        tracing::warn!(error = %crate::error::chain(&error), "the default network's bridge or rule stays");
    }
}

/// Asks what is asked of each pod later, beside the start.
fn ask_ahead(node: &Arc<Node>) {
    let node = node.clone();
    tokio::spawn(async move {
        for handler in node.handlers.iter() {
            handler.features().await;
        }
        let verdict = node.handlers.verdict().await;
        tracing::info!(kvm = verdict.usable, reason = verdict.reason, "virtual machines");
    });
}

fn streaming_config(config: &Config) -> Result<catamaran_streaming::Config, ServeError> {
    let section = &config.streaming;
    let tls = match (&section.tls_certificate, &section.tls_key) {
        (Some(certificate), Some(key)) => Some(catamaran_streaming::tls_from_files(certificate, key)?),
        _ => None,
    };
    Ok(catamaran_streaming::Config {
        address: section.address,
        tls,
        ..Default::default()
    })
}

fn images_config(config: &Config, dirs: &Dirs) -> ImagesConfig {
    ImagesConfig {
        root: dirs.images(),
        snapshots: dirs.snapshots(),
        hosts_dirs: config.images.hosts_dirs.clone(),
        max_parallel_downloads: config.images.max_parallel_downloads,
        progress_timeout: Duration::from_secs(config.images.progress_timeout_seconds),
        docker_config: config.images.docker_config.clone(),
        pinned: config.images.pinned.clone(),
        platform: Platform::host(),
    }
}

fn network_config(config: &Config, dirs: &Dirs) -> NetworkConfig {
    NetworkConfig {
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs: config.network.bin_dirs.clone(),
        netns_dir: dirs.netns(),
        cache_dir: dirs.cni(),
        default_bridge: config.network.default_bridge.clone(),
        default_subnet: config.network.default_subnet.clone(),
        default_ipam_dir: config
            .network
            .default_ipam_dir
            .clone()
            .unwrap_or_else(|| config.state.join("ipam")),
        plugin_timeout: config.plugin_timeout(),
    }
}

/// Held until the file is dropped, also over `kill -9`.
fn lock(path: &Path, of: &Path) -> Result<File, ServeError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::io("open", path))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::Running(of.to_owned())),
        Err(error) => Err(Error::io("lock", path)(error.into()).into()),
    }
}

/// Removes a socket that nobody serves any more.
async fn free_address(path: &Path) -> Result<(), ServeError> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("look at", path)(error).into()),
    };
    if !metadata.file_type().is_socket() {
        return Err(ServeError::NotASocket(path.to_owned()));
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(ServeError::AddressInUse(path.to_owned()));
    }
    std::fs::remove_file(path).map_err(Error::io("remove", path))?;
    Ok(())
}

/// Bound under another name, closed to others, then named: nobody can connect to it before.
fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source: std::io::Error| ServeError::Listen {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary).map_err(failed)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = listen(&path).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o660
        );
        assert!(matches!(
            free_address(&path).await,
            Err(ServeError::AddressInUse(_))
        ));
        drop(listener);
        free_address(&path).await.unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(
            free_address(&path).await,
            Err(ServeError::NotASocket(_))
        ));
    }

    #[test]
    fn a_second_daemon_on_the_same_root_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = lock(&path, dir.path()).unwrap();
        assert!(matches!(lock(&path, dir.path()), Err(ServeError::Running(_))));
        drop(first);
        lock(&path, dir.path()).unwrap();
    }
}
