//! The pod as namespaces: pinned, with shared memory; its containers are made by the OCI runtime.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use catamaran_sandbox::bootstrap::Context;
use catamaran_sandbox::pod_spec::{RuntimeSpec, UserNamespace, info};
use catamaran_sandbox::shim_server::ShimError;
use catamaran_sandbox::shim_server::backend::{
    ContainerBackend, CreateContainer, CreateSandbox, Duplex, Process, SandboxBackend,
};
use tokio::sync::Notify;

use crate::cleanup;
use crate::container::{OciContainer, Shared};
use crate::mounts;
use crate::namespaces::{NamespaceError, PinnedNamespaces, path_of};
use crate::oci_runtime::OciRuntime;
use crate::port;
use crate::reaper::Reaper;

/// See the module.
pub(crate) struct NamespaceSandbox {
    context: Context,
    reaper: Arc<Reaper>,
    made: Mutex<Option<Made>>,
    /// The init of a shared PID namespace has ended.
    init_ended: Arc<Notify>,
}

/// What `create` made.
struct Made {
    namespaces: PinnedNamespaces,
    network: Option<PathBuf>,
    shm: PathBuf,
    shared: Arc<Shared>,
}

impl NamespaceSandbox {
    pub(crate) fn new(context: Context, reaper: Arc<Reaper>) -> Self {
        Self {
            context,
            reaper,
            made: Mutex::new(None),
            init_ended: Arc::new(Notify::new()),
        }
    }

    fn made(&self) -> MutexGuard<'_, Option<Made>> {
        // Every critical section is one update.
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_made<T>(&self, get: impl FnOnce(&Made) -> T) -> Result<T, ShimError> {
        let gone = || ShimError::FailedPrecondition(format!("sandbox {} has no namespaces", self.context.id));
        self.made().as_ref().map(get).ok_or_else(gone)
    }
}

#[async_trait]
impl SandboxBackend for NamespaceSandbox {
    async fn create(&self, request: CreateSandbox) -> Result<(), ShimError> {
        let RuntimeSpec::Oci { binary, args, root } = &request.spec.runtime else {
            return Err(ShimError::InvalidArgument(
                "runtime: this shim runs OCI runtimes, not VMs".into(),
            ));
        };
        cleanup::remember_runtime(&self.context.bundle, &request.spec.runtime)
            .map_err(|error| ShimError::internal("note the runtime", &error))?;
        let shm = request.bundle.join("shm");
        let namespaces = &request.spec.namespaces;
        let owner = namespaces.user.as_ref().map_or((0, 0), UserNamespace::root);
        // A first attempt may have failed after this.
        mounts::unmount_all(&shm)
            .and_then(|()| mounts::mount_shm(&shm, request.spec.shm_bytes, namespaces.host_ipc, owner))
            .map_err(|error| ShimError::internal("make /dev/shm", &error))?;
        let made = PinnedNamespaces::create(&request.spec, &self.reaper).map_err(|error| match error {
            NamespaceError::Sysctl(_) | NamespaceError::HostSysctl(_) => {
                ShimError::InvalidArgument(format!("sysctls: {error}"))
            }
            _ => ShimError::internal("make the pod's namespaces", &error),
        });
        let (namespaces, init) = match made {
            Ok(made) => made,
            Err(error) => {
                if let Err(undo) = mounts::unmount_all(&shm) {
                    tracing::warn!(error = %undo, "undoing /dev/shm");
                }
                return Err(error);
            }
        };
        if let Some(init) = init {
            let ended = self.init_ended.clone();
            tokio::spawn(async move {
                // An error is the reaper's end, with the process.
                let _ = init.await;
                ended.notify_one();
            });
        }
        let user = namespaces.user.as_ref().map(OwnedFd::try_clone).transpose();
        let user = user.map_err(|error| ShimError::internal("keep the pod's user namespace", &error))?;
        let runtime = OciRuntime::new(binary.clone(), args.clone(), root.clone(), self.reaper.clone());
        let shared = Arc::new(Shared {
            context: self.context.clone(),
            runtime,
            reaper: self.reaper.clone(),
            user,
            next_console: AtomicU64::new(0),
        });
        *self.made() = Some(Made {
            namespaces,
            network: request.spec.namespaces.network,
            shm,
            shared,
        });
        Ok(())
    }

    async fn start(&self) -> Result<u32, ShimError> {
        self.of_made(|made| made.namespaces.init().unwrap_or_else(std::process::id))
    }

    async fn stop(&self) -> Result<(), ShimError> {
        let mut made = self.made();
        let shm = made
            .as_ref()
            .map_or_else(|| self.context.bundle.join("shm"), |made| made.shm.clone());
        if let Some(made) = made.as_mut() {
            made.namespaces.end_init();
            made.shared.runtime.end_creations();
        }
        mounts::unmount_all(&shm).map_err(|error| ShimError::internal("remove /dev/shm", &error))?;
        *made = None;
        Ok(())
    }

    async fn info(&self) -> BTreeMap<String, String> {
        let mut map = BTreeMap::new();
        let mut put = |key: &str, value: String| drop(map.insert(key.to_owned(), value));
        let release = rustix::system::uname();
        put(info::KERNEL, release.release().to_string_lossy().into_owned());
        if let Some(made) = self.made().as_ref() {
            let mut namespace = |key: &str, fd: &Option<OwnedFd>| {
                if let Some(fd) = fd {
                    put(key, path_of(fd));
                }
            };
            namespace(info::IPC_NAMESPACE, &made.namespaces.ipc);
            namespace(info::UTS_NAMESPACE, &made.namespaces.uts);
            namespace(info::PID_NAMESPACE, &made.namespaces.pid);
            namespace(info::USER_NAMESPACE, &made.namespaces.user);
            put(info::SHM, made.shm.display().to_string());
        }
        map
    }

    async fn ended(&self) -> String {
        self.init_ended.notified().await;
        "the init of the pod's PID namespace has ended".to_owned()
    }

    async fn connect(&self, port: u16) -> Result<Box<dyn Duplex>, ShimError> {
        let network = self.of_made(|made| made.network.clone())?;
        Ok(Box::new(port::connect(network.as_deref(), port).await?))
    }

    async fn create_container(
        &self,
        request: CreateContainer,
    ) -> Result<(Arc<dyn ContainerBackend>, Process), ShimError> {
        let shared = self.of_made(|made| made.shared.clone())?;
        OciContainer::create(shared, request).await
    }
}
