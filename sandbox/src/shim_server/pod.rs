//! The pod that a shim serves: the sandbox's life and the table of its containers.
//!
//! ```text
//! New ── create ──▶ Created ── start ──▶ Ready ── stop, or it ended by itself ──▶ Stopped
//! ```
//! Stop may come at any moment and overtakes a start that waits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::ShimError;
use super::backend::{CreateContainer, CreateSandbox, SandboxBackend};
use super::container::{Container, RunningProcess, State, Stdio};
use super::exec_sync::ExecSyncs;
use super::output::lock;
use super::sessions::Sessions;
use crate::bootstrap::Context;

/// StopSandbox without a time limit of its own.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Verbs that end a container which is still being created await the creation so long.
const CREATION_LIMIT: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    New,
    Created,
    Ready {
        pid: u32,
        created_at_ns: i64,
    },
    Stopped {
        pid: u32,
        created_at_ns: i64,
        exited_at_ns: i64,
    },
}

enum Slot {
    Creating,
    Made(Arc<Container>),
}

pub(crate) struct Pod {
    pub(crate) context: Context,
    pub(crate) backend: Arc<dyn SandboxBackend>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) exec_syncs: ExecSyncs,
    containers: Mutex<HashMap<String, Slot>>,
    /// A slot was filled or removed.
    slots_changed: Notify,
    phase: watch::Sender<Phase>,
    stopping: watch::Sender<bool>,
    /// One create, start or stop of the sandbox at a time; true when the backend's stop succeeded.
    lifecycle: tokio::sync::Mutex<bool>,
    /// The process shall exit.
    pub(crate) shutdown: Notify,
    /// Why the sandbox ended by itself.
    pub(crate) ended: OnceLock<String>,
}

/// Runs to its end even if the caller's future is dropped.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ShimError>> + Send + 'static,
) -> Result<T, ShimError> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(ShimError::Internal(format!("the shim's task ended: {error}"))),
    }
}

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Pod {
    pub(crate) fn new(context: Context, backend: Arc<dyn SandboxBackend>) -> Arc<Self> {
        let sessions = Sessions::new(context.socket_named("stream"));
        Arc::new(Self {
            context,
            backend,
            sessions,
            exec_syncs: ExecSyncs::default(),
            containers: Mutex::default(),
            slots_changed: Notify::new(),
            phase: watch::Sender::new(Phase::New),
            stopping: watch::Sender::new(false),
            lifecycle: tokio::sync::Mutex::new(false),
            shutdown: Notify::new(),
            ended: OnceLock::new(),
        })
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(crate) fn check_id(&self, sandbox_id: &str) -> Result<(), ShimError> {
        if sandbox_id == self.context.id.as_str() {
            return Ok(());
        }
        Err(ShimError::NotFound(format!(
            "this shim serves sandbox {}, not {sandbox_id}",
            self.context.id
        )))
    }

    fn refuse_when_stopping(&self) -> Result<(), ShimError> {
        if *self.stopping.borrow() || matches!(self.phase(), Phase::Stopped { .. }) {
            return Err(ShimError::FailedPrecondition(format!(
                "sandbox {} is stopped",
                self.context.id
            )));
        }
        Ok(())
    }

    pub(crate) async fn create(&self, request: CreateSandbox) -> Result<(), ShimError> {
        let _one = self.lifecycle.lock().await;
        self.refuse_when_stopping()?;
        if self.phase() != Phase::New {
            return Ok(());
        }
        self.backend.create(request).await?;
        self.phase.send_replace(Phase::Created);
        Ok(())
    }

    /// Returns pid and creation time.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<(u32, i64), ShimError> {
        let _one = self.lifecycle.lock().await;
        self.refuse_when_stopping()?;
        match self.phase() {
            Phase::New => {
                return Err(ShimError::FailedPrecondition(format!(
                    "sandbox {} is not created",
                    self.context.id
                )));
            }
            Phase::Ready { pid, created_at_ns } => return Ok((pid, created_at_ns)),
            Phase::Created | Phase::Stopped { .. } => {}
        }
        let mut stopping = self.stopping.subscribe();
        let pid = tokio::select! {
            pid = self.backend.start() => pid?,
            _ = stopping.wait_for(|stopping| *stopping) => {
                return Err(ShimError::FailedPrecondition(format!("sandbox {} is being stopped", self.context.id)));
            }
        };
        let created_at_ns = now_ns();
        self.phase.send_replace(Phase::Ready { pid, created_at_ns });
        let pod = self.clone();
        tokio::spawn(async move {
            let mut phase = pod.phase.subscribe();
            tokio::select! {
                reason = pod.backend.ended() => {
                    tracing::warn!(reason, "the sandbox ended by itself");
                    let _ = pod.ended.set(reason);
                    pod.enter_stopped();
                }
                _ = phase.wait_for(|phase| matches!(phase, Phase::Stopped { .. })) => {}
            }
        });
        Ok((pid, created_at_ns))
    }

    fn enter_stopped(&self) {
        self.phase.send_if_modified(|phase| {
            let (pid, created_at_ns) = match *phase {
                Phase::Stopped { .. } => return false,
                Phase::Ready { pid, created_at_ns } => (pid, created_at_ns),
                Phase::New | Phase::Created => (0, 0),
            };
            *phase = Phase::Stopped {
                pid,
                created_at_ns,
                exited_at_ns: now_ns(),
            };
            true
        });
    }

    /// Resolves with the time at which the sandbox stopped.
    pub(crate) async fn wait(&self) -> i64 {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped { exited_at_ns, .. } = *phase.borrow_and_update() {
                return exited_at_ns;
            }
            if phase.changed().await.is_err() {
                // The sender is in `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Kills every container and releases the sandbox. Idempotent; what could not be ended is tried again by
    /// the next call.
    pub(crate) async fn stop(&self, timeout_secs: u32) -> Result<(), ShimError> {
        self.stopping.send_replace(true);
        let limit = match timeout_secs {
            0 => STOP_LIMIT,
            seconds => Duration::from_secs(u64::from(seconds)),
        };
        let deadline = Instant::now() + limit;
        let mut released = self.lifecycle.lock().await;
        if *released {
            return Ok(());
        }
        let _ = tokio::time::timeout_at(deadline, self.end_containers()).await;
        self.backend.stop().await?;
        // A VM that is off has ended its containers, whatever they did before.
        let late = deadline.max(Instant::now() + Duration::from_secs(1));
        if tokio::time::timeout_at(late, self.end_containers())
            .await
            .is_err()
        {
            let left: Vec<String> = self
                .living()
                .iter()
                .map(|container| container.id.clone())
                .collect();
            let text = format!(
                "containers not ended within {} s: {}",
                limit.as_secs(),
                left.join(", ")
            );
            return Err(ShimError::DeadlineExceeded(text));
        }
        *released = true;
        self.enter_stopped();
        Ok(())
    }

    fn living(&self) -> Vec<Arc<Container>> {
        let alive = |container: &Arc<Container>| !matches!(container.init.state(), State::Stopped(_));
        self.containers().into_iter().filter(alive).collect()
    }

    async fn end_containers(&self) {
        loop {
            // Enabled before the look, so that a slot that changes in between is not missed.
            let changed = self.slots_changed.notified();
            if !lock(&self.containers)
                .values()
                .any(|slot| matches!(slot, Slot::Creating))
            {
                break;
            }
            changed.await;
        }
        for container in self.living() {
            if let Err(error) = container.backend.signal_all(libc::SIGKILL).await {
                tracing::debug!(container = container.id, %error, "killing");
            }
        }
        for container in self.living() {
            container.init.wait().await;
        }
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        let made = |slot: &Slot| match slot {
            Slot::Made(container) => Some(container.clone()),
            Slot::Creating => None,
        };
        lock(&self.containers).values().filter_map(made).collect()
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, ShimError> {
        match lock(&self.containers).get(id) {
            Some(Slot::Made(container)) => Ok(container.clone()),
            Some(Slot::Creating) => Err(ShimError::FailedPrecondition(format!(
                "container {id} is still being created"
            ))),
            None => Err(ShimError::NotFound(format!("no container {id}"))),
        }
    }

    /// As [`Self::container`], after a creation that is at work: its caller may have died, and whoever comes
    /// to undo it must find all that it makes, or nothing.
    pub(crate) async fn settled_container(&self, id: &str) -> Result<Arc<Container>, ShimError> {
        let deadline = Instant::now() + CREATION_LIMIT;
        loop {
            // Enabled before the look, so that a slot that changes in between is not missed.
            let changed = self.slots_changed.notified();
            if !matches!(lock(&self.containers).get(id), Some(Slot::Creating))
                || tokio::time::timeout_at(deadline, changed).await.is_err()
            {
                return self.container(id);
            }
        }
    }

    pub(crate) async fn create_container(
        &self,
        request: CreateContainer,
        stdio: Stdio,
    ) -> Result<Arc<Container>, ShimError> {
        self.refuse_when_stopping()?;
        if !matches!(self.phase(), Phase::Ready { .. }) {
            return Err(ShimError::FailedPrecondition(format!(
                "sandbox {} is not started",
                self.context.id
            )));
        }
        let id = request.id.clone();
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&id) {
                return Err(ShimError::AlreadyExists(format!("container {id} exists")));
            }
            containers.insert(id.clone(), Slot::Creating);
        }
        let made = self.make_container(request, stdio).await;
        {
            let mut containers = lock(&self.containers);
            match &made {
                Ok(container) => containers.insert(id, Slot::Made(container.clone())),
                Err(_) => containers.remove(&id),
            };
        }
        self.slots_changed.notify_waiters();
        made
    }

    async fn make_container(
        &self,
        request: CreateContainer,
        stdio: Stdio,
    ) -> Result<Arc<Container>, ShimError> {
        let (id, bundle) = (request.id.clone(), request.bundle.clone());
        let open = stdio.open()?;
        // A record of an earlier container in this bundle is not this one's.
        match std::fs::remove_file(bundle.join(crate::exit::EXIT_FILE)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(ShimError::internal("remove an old exit record", &error));
            }
            _ => {}
        }
        let (backend, process) = self.backend.create_container(request).await?;
        let init = RunningProcess::adopt(process, stdio, open, Some(bundle.clone()));
        Ok(Arc::new(Container::new(id, bundle, backend, init)))
    }

    /// Removes an ended container; one that was never started is ended first.
    pub(crate) async fn delete_container(
        &self,
        id: &str,
    ) -> Result<(u32, crate::exit::ExitRecord), ShimError> {
        let container = self.settled_container(id).await?;
        let _one = container.verbs.lock().await;
        match container.init.state() {
            State::Stopped(_) => {}
            State::Created => container.backend.signal_all(libc::SIGKILL).await?,
            State::Running | State::Paused => {
                return Err(ShimError::FailedPrecondition(format!(
                    "container {id} is running"
                )));
            }
        }
        let record = container.init.wait().await;
        container.backend.delete().await?;
        lock(&self.containers).remove(id);
        Ok((container.init.pid, record))
    }
}
