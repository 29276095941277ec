//! Pods: the registry of all of them, and the verbs that requests call. Each verb has its file; each pod has
//! its owner task (owner.rs), and readers take snapshots that wait for nobody.

mod checkpoint_container;
mod create_container;
mod declared_volumes;
mod exec_sync;
mod files;
mod image_volumes;
mod lookups;
mod network;
mod owner;
pub mod record;
mod recover;
mod remove_container;
mod remove_sandbox;
mod run_sandbox;
pub mod session;
mod start_container;
pub mod state;
mod steps;
mod stop_container;
mod stop_sandbox;
mod sweep;
mod teardown;
mod trees;
pub mod undo;
mod update_container;
mod update_sandbox;
pub mod vm;
mod watch;

pub(crate) use update_container::merge as merge_resources;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use catamaran_images::Image;
use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::RuntimeSpec;
use tokio::sync::oneshot;

use self::lookups::Lookups;
use self::owner::{Asker, Call, Handle, Message, Owner, Reply};
use self::record::{ContainerRecord, PodKey, PodRecord, PodView};
use self::state::{ContainerState, PodState, Request, admit};
use crate::config::HandlerType;
use crate::cri::api::{ContainerConfig, LinuxContainerResources, PodSandboxConfig};
use crate::error::{Error, Result};
use crate::node::Node;
use crate::shim::{ExecOutput, Shim};

/// All pods of the node. Clones share them.
#[derive(Debug, Clone)]
pub struct Pods {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Arc<Node>,
    index: RwLock<Index>,
    lookups: Lookups,
}

#[derive(Debug, Default)]
struct Index {
    pods: HashMap<Id, Handle>,
    names: HashMap<PodKey, Id>,
}

impl Pods {
    /// Takes over what the store says: adopts what lives, undoes what was half made, removes what leaked.
    pub async fn recover(node: Arc<Node>, pods: Vec<PodRecord>, containers: Vec<ContainerRecord>) -> Self {
        let this = Self {
            inner: Arc::new(Inner {
                node,
                index: RwLock::default(),
                lookups: Lookups::default(),
            }),
        };
        recover::run(&this, pods, containers).await;
        this
    }

    /// What the pods share.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.inner.node
    }

    fn index<T>(&self, look: impl FnOnce(&mut Index) -> T) -> T {
        look(&mut self.inner.index.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// There is no pod, not even one being created.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner
            .index
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .pods
            .is_empty()
    }

    /// Every pod that is listed (not those still being created), in no order.
    #[must_use]
    pub fn views(&self) -> Vec<Arc<PodView>> {
        let index = self.inner.index.read().unwrap_or_else(PoisonError::into_inner);
        let views = index.pods.values().map(|handle| handle.view.borrow().clone());
        views
            .filter(|view| view.pod.state != PodState::Creating)
            .collect()
    }

    /// Every pod, also those still being created, in no order.
    #[must_use]
    pub(crate) fn all_views(&self) -> Vec<Arc<PodView>> {
        let index = self.inner.index.read().unwrap_or_else(PoisonError::into_inner);
        index
            .pods
            .values()
            .map(|handle| handle.view.borrow().clone())
            .collect()
    }

    /// A pod by id or by an unambiguous beginning of it.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::InvalidArgument`] for a beginning of several ids.
    pub fn pod(&self, id: &str) -> Result<Arc<PodView>> {
        self.pod_handle(id).map(|handle| handle.view.borrow().clone())
    }

    fn pod_handle(&self, id: &str) -> Result<Handle> {
        let index = self.inner.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut meant = Meant::by(id);
        for (full, handle) in &index.pods {
            meant.see(full, || handle.clone());
        }
        meant.only("pod sandbox")
    }

    /// A container by id or by an unambiguous beginning of it, with its pod.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::InvalidArgument`] for a beginning of several ids.
    pub fn container(&self, id: &str) -> Result<(Arc<PodView>, Arc<ContainerRecord>)> {
        self.container_handle(id)
            .map(|(_, view, container)| (view, container))
    }

    fn container_handle(&self, id: &str) -> Result<(Handle, Arc<PodView>, Arc<ContainerRecord>)> {
        let index = self.inner.index.read().unwrap_or_else(PoisonError::into_inner);
        let mut meant = Meant::by(id);
        for handle in index.pods.values() {
            let view = handle.view.borrow().clone();
            let made = view.containers.values();
            for container in made.filter(|container| container.state != ContainerState::Creating) {
                meant.see(&container.id, || {
                    (handle.clone(), view.clone(), container.clone())
                });
            }
        }
        meant.only("container")
    }

    /// RunPodSandbox. A repeated request joins the attempt in flight.
    ///
    /// # Errors
    /// As the steps give them, with what could not be undone.
    pub async fn run_sandbox(&self, config: PodSandboxConfig, handler: &str) -> Result<Id> {
        let plan = run_sandbox::plan(self.node(), config, handler).await?;
        let key = plan.key();
        loop {
            let (reply, answer) = oneshot::channel();
            let joined = self.index(
                |index| match index.names.get(&key).and_then(|id| index.pods.get(id)) {
                    Some(existing) => Some((existing.clone(), reply)),
                    None => {
                        let id = plan.id.clone();
                        let handle = Owner::create(self.node().clone(), self.clone(), plan.clone(), reply);
                        index.names.insert(key.clone(), id.clone());
                        index.pods.insert(id, handle);
                        None
                    }
                },
            );
            if let Some((existing, reply)) = joined {
                // An owner that has just gone has forgotten its name: then this attempt is the first.
                let _ = existing.inbox.send(Message::Call(Call::Join(reply)));
            }
            match answer.await {
                Ok(result) => return result.map_err(Error::from),
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    /// StopPodSandbox. An unknown pod is stopped.
    ///
    /// # Errors
    /// As the steps give them; what could be stopped is.
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        match self.pod_handle(id) {
            Ok(handle) => teardown_call(&handle, Call::StopPod).await,
            Err(error) => unknown_is_done(error),
        }
    }

    /// RemovePodSandbox. An unknown pod is removed.
    ///
    /// # Errors
    /// As the steps give them; what could be removed is.
    pub async fn remove_sandbox(&self, id: &str) -> Result<()> {
        match self.pod_handle(id) {
            Ok(handle) => teardown_call(&handle, Call::RemovePod).await,
            Err(error) => unknown_is_done(error),
        }
    }

    /// CreateContainer. A repeated request joins the attempt in flight.
    ///
    /// # Errors
    /// As the steps give them, with what could not be undone.
    pub async fn create_container(&self, pod: &str, config: ContainerConfig) -> Result<Id> {
        let handle = self.pod_handle(pod)?;
        let view = handle.view.borrow().clone();
        admit(view.pod.state, None, Request::CreateContainer).map_err(|denial| Error::Denied {
            what: "pod sandbox",
            id: pod.to_owned(),
            denial,
        })?;
        let plan = create_container::plan(self.node(), &self.inner.lookups, &view, config).await?;
        let (reply, answer) = oneshot::channel();
        let _ = handle
            .inbox
            .send(Message::Call(Call::CreateContainer(Box::new(plan), reply)));
        match answer.await {
            Ok(result) => result.map_err(Error::from),
            Err(_) => Err(Error::NotFound {
                what: "pod sandbox",
                id: pod.to_owned(),
            }),
        }
    }

    /// StartContainer.
    ///
    /// # Errors
    /// [`Error::Denied`] in another state than created; the runtime's error.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (handle, _, container) = self.container_handle(id)?;
        container_call(&handle, id, |reply| {
            Call::StartContainer(container.id.clone(), reply)
        })
        .await
    }

    /// StopContainer with this grace. An unknown container, and one that has ended, is stopped.
    ///
    /// # Errors
    /// The shim's.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        match self.container_handle(id) {
            Ok((handle, _, container)) => {
                teardown_call(&handle, |reply| {
                    Call::StopContainer(container.id.clone(), grace, reply)
                })
                .await
            }
            Err(error) => unknown_is_done(error),
        }
    }

    /// RemoveContainer; one that runs is killed. An unknown container is removed.
    ///
    /// # Errors
    /// The shim's, the file system's.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        match self.container_handle(id) {
            Ok((handle, _, container)) => {
                teardown_call(&handle, |reply| {
                    Call::RemoveContainer(container.id.clone(), reply)
                })
                .await
            }
            Err(error) => unknown_is_done(error),
        }
    }

    /// UpdateContainerResources.
    ///
    /// # Errors
    /// [`Error::Denied`] for a container that has ended; limits out of range; the runtime's error.
    pub async fn update_container(&self, id: &str, wanted: LinuxContainerResources) -> Result<()> {
        let (handle, _, container) = self.container_handle(id)?;
        container_call(&handle, id, |reply| {
            Call::UpdateContainer(container.id.clone(), Box::new(wanted), Asker::Cri, reply)
        })
        .await
    }

    /// As [`Pods::update_container`], wanted by an NRI plugin: no other is asked.
    ///
    /// # Errors
    /// As there.
    pub(crate) async fn update_container_for_plugin(
        &self,
        id: &str,
        wanted: LinuxContainerResources,
    ) -> Result<()> {
        let (handle, _, container) = self.container_handle(id)?;
        container_call(&handle, id, |reply| {
            Call::UpdateContainer(container.id.clone(), Box::new(wanted), Asker::Plugin, reply)
        })
        .await
    }

    /// CheckpointContainer: the container goes on running. Beside the pod's owner, as nothing of its state changes.
    ///
    /// # Errors
    /// A location that is not meant, a container that does not run, no criu that works, the time limit.
    pub async fn checkpoint_container(&self, id: &str, location: &str, limit: Duration) -> Result<()> {
        let (_, view, container) = self.container_handle(id)?;
        checkpoint_container::run(self.node().clone(), view, container, location, limit).await
    }

    /// UpdatePodSandboxResources.
    ///
    /// # Errors
    /// [`Error::Denied`] for a pod that is not ready; numbers out of range; the kernel's where it refuses a limit.
    pub async fn update_sandbox(
        &self,
        id: &str,
        overhead: Option<LinuxContainerResources>,
        resources: Option<LinuxContainerResources>,
    ) -> Result<()> {
        let wanted = update_sandbox::verify(overhead, resources)?;
        let handle = self.pod_handle(id)?;
        let (reply, answer) = oneshot::channel();
        let _ = handle
            .inbox
            .send(Message::Call(Call::UpdatePod(Box::new(wanted), reply)));
        match answer.await {
            Ok(result) => result.map_err(Error::from),
            Err(_) => Err(Error::NotFound {
                what: "pod sandbox",
                id: id.to_owned(),
            }),
        }
    }

    /// ExecSync; `timeout` zero: no limit.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] when the limit passed; [`Error::Denied`] where the container does not run.
    pub async fn exec_sync(&self, id: &str, command: &[String], timeout: Duration) -> Result<ExecOutput> {
        let (shim, view, container) = self.running(id)?;
        exec_sync::run(self.node(), &shim, &view, &container, command, timeout).await
    }

    /// ReopenContainerLog.
    ///
    /// # Errors
    /// [`Error::Denied`] where the container does not run.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let (shim, _, container) = self.running(id)?;
        Ok(shim.reopen_log(container.id.as_str()).await?)
    }

    /// A running container with its shim.
    fn running(&self, id: &str) -> Result<(Shim, Arc<PodView>, Arc<ContainerRecord>)> {
        let (view, container) = self.container(id)?;
        admit(view.pod.state, Some(container.state), Request::UseContainer).map_err(|denial| {
            Error::Denied {
                what: "container",
                id: id.to_owned(),
                denial,
            }
        })?;
        let shim = view.shim.clone();
        let shim = shim.ok_or_else(|| Error::Unavailable(format!("the shim of container {id} is gone")))?;
        Ok((shim, view, container))
    }

    /// Registers a pod found at the daemon's start.
    fn register(&self, key: PodKey, id: Id, handle: Handle) {
        self.index(|index| {
            index.names.insert(key, id.clone());
            index.pods.insert(id, handle);
        });
    }

    /// Frees the name of a pod that is gone.
    fn forget(&self, id: &Id) {
        self.index(|index| {
            index.pods.remove(id);
            index.names.retain(|_, named| named != id);
        });
    }
}

/// A teardown of what is gone already has succeeded.
async fn teardown_call(handle: &Handle, call: impl FnOnce(Reply<()>) -> Call) -> Result<()> {
    let (reply, answer) = oneshot::channel();
    let _ = handle.inbox.send(Message::Call(call(reply)));
    match answer.await {
        Ok(Err(error))
            if matches!(
                *error,
                Error::Denied {
                    denial: state::Denial::NoContainer,
                    ..
                }
            ) =>
        {
            Ok(())
        }
        Ok(result) => result.map_err(Error::from),
        Err(_) => Ok(()),
    }
}

async fn container_call(handle: &Handle, id: &str, call: impl FnOnce(Reply<()>) -> Call) -> Result<()> {
    let (reply, answer) = oneshot::channel();
    let _ = handle.inbox.send(Message::Call(call(reply)));
    match answer.await {
        Ok(result) => result.map_err(Error::from),
        Err(_) => Err(Error::NotFound {
            what: "container",
            id: id.to_owned(),
        }),
    }
}

/// A teardown of what is not there has succeeded; an id that may mean several has named nothing.
fn unknown_is_done(error: Error) -> Result<()> {
    match error {
        Error::NotFound { .. } => Ok(()),
        other => Err(other),
    }
}

/// What an id, or a beginning of one, means among all that there are.
struct Meant<'a, T> {
    text: &'a str,
    exact: bool,
    found: Option<T>,
    matches: usize,
}

impl<'a, T> Meant<'a, T> {
    fn by(text: &'a str) -> Self {
        Self {
            text,
            exact: false,
            found: None,
            matches: 0,
        }
    }

    fn see(&mut self, id: &Id, what: impl FnOnce() -> T) {
        if self.exact || self.text.is_empty() || !id.as_str().starts_with(self.text) {
            return;
        }
        self.exact = id.as_str() == self.text;
        self.matches += 1;
        self.found = Some(what());
    }

    fn only(self, what: &'static str) -> Result<T> {
        match self.found {
            Some(_) if self.matches > 1 && !self.exact => Err(Error::invalid(
                format!("{what} id"),
                format!(
                    "{:?} is the beginning of {} ids; give more of it",
                    self.text, self.matches
                ),
            )),
            Some(found) => Ok(found),
            None => Err(Error::NotFound {
                what,
                id: self.text.to_owned(),
            }),
        }
    }
}

/// How an image can be pulled again: by repository digest where it came from a registry, else by its id.
#[must_use]
pub fn image_ref(image: &Image) -> String {
    image.repo_digests.first().unwrap_or(&image.id).clone()
}

/// Namespaces or VM, from what the shim was told.
#[must_use]
pub fn handler_kind(pod: &PodRecord) -> HandlerType {
    match pod.spec.runtime {
        RuntimeSpec::Oci { .. } => HandlerType::Oci,
        RuntimeSpec::Vm(_) => HandlerType::Vm,
    }
}

/// A process id that a pod's shim gave, as one of this node: what a guest numbers is none.
fn host_pid(pod: &PodRecord, pid: u32) -> u32 {
    match handler_kind(pod) {
        HandlerType::Oci => pid,
        HandlerType::Vm => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_by_an_unambiguous_beginning() {
        let ids: Vec<Id> = ["abc1", "abd2", "ab", "xyz"]
            .iter()
            .map(|id| Id::parse(id).unwrap())
            .collect();
        let find = |text: &str| {
            let mut forwards = Meant::by(text);
            let mut backwards = Meant::by(text);
            for id in &ids {
                forwards.see(id, || id.to_string());
            }
            for id in ids.iter().rev() {
                backwards.see(id, || id.to_string());
            }
            let code = |meant: Meant<'_, String>| meant.only("container").map_err(|error| error.code());
            let found = code(forwards);
            assert_eq!(found, code(backwards), "{text}");
            found
        };
        assert_eq!(find("abc"), Ok("abc1".to_owned()));
        assert_eq!(find("ab"), Ok("ab".to_owned()));
        assert_eq!(find("a"), Err(tonic::Code::InvalidArgument));
        assert_eq!(find(""), Err(tonic::Code::NotFound));
        assert_eq!(find("w"), Err(tonic::Code::NotFound));
    }

    #[test]
    fn only_what_is_not_there_is_torn_down_already() {
        let unknown = Meant::<()>::by("x").only("container").unwrap_err();
        assert!(unknown_is_done(unknown).is_ok());
        let mut several = Meant::by("a");
        for id in ["ab", "ac", "ad"] {
            several.see(&Id::parse(id).unwrap(), || ());
        }
        let error = unknown_is_done(several.only("container").unwrap_err()).unwrap_err();
        assert!(error.to_string().contains("beginning of 3 ids"), "{error}");
    }
}
