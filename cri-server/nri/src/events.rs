//! The events: what each is called, who may refuse, and what becomes of the answers. What an event needs is only
//! made where a plugin listens.

use std::sync::Arc;

use tokio::sync::{OwnedMutexGuard, watch};

use crate::api::{self, Container, ContainerAdjustment, Event, LinuxResources, PodSandbox};
use crate::error::Error;
use crate::merge::{Creation, Updates, overlay};
use crate::plugin::Plugin;
use crate::{Inner, Nri, Wanted, lock};

/// A pod and one of its containers.
pub type Pair = (PodSandbox, Container);

/// An event that plugins are told of and do not change.
struct Told {
    event: Event,
    method: &'static str,
    /// The first error ends it; else all are told, and the first error is returned then.
    may_refuse: bool,
}

const fn told(event: Event, method: &'static str, may_refuse: bool) -> Told {
    Told {
        event,
        method,
        may_refuse,
    }
}

impl Nri {
    /// The pod is ready to be; a plugin may refuse it. From here on plugins know of it.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn run_pod(&self, id: &str, pod: impl FnOnce() -> PodSandbox) -> Result<(), Error> {
        let Some(inner) = &self.inner else { return Ok(()) };
        let _order = inner.order.read().await;
        lock(&inner.known).announced.insert(id.to_owned());
        inner
            .tell_pod(&told(Event::RunPodSandbox, "RunPodSandbox", true), pod)
            .await
    }

    /// The pod's resources are to be changed; a plugin may refuse that.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn update_pod(
        &self,
        request: impl FnOnce() -> api::UpdatePodSandboxRequest,
    ) -> Result<(), Error> {
        let Some(inner) = &self.inner else { return Ok(()) };
        let _order = inner.order.read().await;
        let plugins = inner.listening(Event::UpdatePodSandbox);
        if plugins.is_empty() {
            return Ok(());
        }
        let request = request();
        for plugin in plugins {
            plugin
                .ask::<_, api::Empty>(Event::UpdatePodSandbox, "UpdatePodSandbox", &request)
                .await?;
        }
        Ok(())
    }

    /// The pod's resources were changed.
    pub async fn pod_updated(&self, pod: impl FnOnce() -> PodSandbox) {
        let Some(inner) = &self.inner else { return };
        let _order = inner.order.read().await;
        let event = told(Event::PostUpdatePodSandbox, "PostUpdatePodSandbox", false);
        noted(inner.tell_pod(&event, pod).await);
    }

    /// The pod's containers have ended; its namespaces and network are still there.
    pub async fn stop_pod(&self, pod: impl FnOnce() -> PodSandbox) {
        let Some(inner) = &self.inner else { return };
        let _order = inner.order.read().await;
        noted(
            inner
                .tell_pod(&told(Event::StopPodSandbox, "StopPodSandbox", false), pod)
                .await,
        );
    }

    /// The pod goes. Plugins are told once, however often its removal is tried.
    pub async fn remove_pod(&self, id: &str, pod: impl FnOnce() -> PodSandbox) {
        let Some(inner) = &self.inner else { return };
        let _order = inner.order.read().await;
        if inner.depart(id) {
            noted(
                inner
                    .tell_pod(&told(Event::RemovePodSandbox, "RemovePodSandbox", false), pod)
                    .await,
            );
        }
    }

    /// The container is about to be made: plugins adjust it, in their order, and validating ones judge the whole.
    /// From here on plugins know of it. `None`: nothing is to be adjusted.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_container(
        &self,
        id: &str,
        pair: impl FnOnce() -> Pair,
    ) -> Result<Option<(ContainerAdjustment, Wanted)>, Error> {
        let Some(inner) = &self.inner else { return Ok(None) };
        let _order = inner.order.read().await;
        lock(&inner.known).announced.insert(id.to_owned());
        let plugins = inner.listening(Event::CreateContainer);
        let validators = inner.listening(Event::ValidateContainerAdjustment);
        if plugins.is_empty() && validators.is_empty() {
            return Ok(None);
        }
        let (pod, container) = pair();
        let original = container.clone();
        let mut creation = Creation::new(container);
        for plugin in &plugins {
            let request = api::CreateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(creation.container.clone()),
            };
            let answer = plugin
                .ask(Event::CreateContainer, "CreateContainer", &request)
                .await?;
            if let Some(answer) = answer {
                creation.apply(answer, &plugin.full_name())?;
            }
        }
        let Creation { adjust, updates, .. } = creation;
        let owners = updates.claims.message();
        let wanted = updates.finish();
        if !validators.is_empty() {
            let instance = |plugin: &Arc<Plugin>| api::PluginInstance {
                name: plugin.name.clone(),
                index: plugin.index.clone(),
            };
            let request = api::ValidateContainerAdjustmentRequest {
                pod: Some(pod),
                container: Some(original),
                adjust: Some(adjust.clone()),
                update: wanted.updates.clone(),
                owners: Some(owners),
                plugins: plugins.iter().map(instance).collect(),
            };
            for validator in validators {
                validator.validate(&request).await?;
            }
        }
        Ok(Some((adjust, wanted)))
    }

    /// The container was made.
    pub async fn container_created(&self, pair: impl FnOnce() -> Pair) {
        let event = told(Event::PostCreateContainer, "PostCreateContainer", false);
        noted(self.tell(&event, pair).await);
    }

    /// The container is about to be started; a plugin may refuse that. The end of the container is told after the
    /// guard is gone, so that plugins hear of things in their order.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub async fn start_container(
        &self,
        id: &str,
        pair: impl FnOnce() -> Pair,
    ) -> Result<Option<Starting>, Error> {
        let Some(inner) = &self.inner else { return Ok(None) };
        let lane = lock(&inner.starts).entry(id.to_owned()).or_default().clone();
        let guard = lane.lock_owned().await;
        self.tell(&told(Event::StartContainer, "StartContainer", true), pair)
            .await?;
        Ok(Some(Starting { _guard: guard }))
    }

    /// The container was started.
    pub async fn container_started(&self, pair: impl FnOnce() -> Pair) {
        let event = told(Event::PostStartContainer, "PostStartContainer", false);
        noted(self.tell(&event, pair).await);
    }

    /// New limits are asked for; plugins change them, in their order. Returns what they want of this container,
    /// and of others.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn update_container(
        &self,
        request: impl FnOnce() -> api::UpdateContainerRequest,
    ) -> Result<Option<(LinuxResources, Wanted)>, Error> {
        let Some(inner) = &self.inner else { return Ok(None) };
        let _order = inner.order.read().await;
        let plugins = inner.listening(Event::UpdateContainer);
        if plugins.is_empty() {
            return Ok(None);
        }
        let mut request = request();
        let asked = request.linux_resources.clone().unwrap_or_default();
        let id = request
            .container
            .as_ref()
            .map(|c| c.id.clone())
            .unwrap_or_default();
        let mut updates = Updates::default();
        for plugin in plugins {
            let answer: Option<api::UpdateContainerResponse> = plugin
                .ask(Event::UpdateContainer, "UpdateContainer", &request)
                .await?;
            if let Some(answer) = answer {
                updates.apply(answer.update, answer.evict, &plugin.full_name())?;
                let mut resources = asked.clone();
                if let Some(changed) = updates.of(&id) {
                    overlay(changed, &mut resources);
                }
                request.linux_resources = Some(resources);
            }
        }
        let mut wanted = updates.finish();
        let own = wanted.updates.iter().position(|update| update.container_id == id);
        let own = own.map(|at| wanted.updates.remove(at));
        let own = own
            .and_then(|update| update.linux)
            .and_then(|linux| linux.resources);
        Ok(Some((own.unwrap_or_default(), wanted)))
    }

    /// The container has new limits.
    pub async fn container_updated(&self, pair: impl FnOnce() -> Pair) {
        let event = told(Event::PostUpdateContainer, "PostUpdateContainer", false);
        noted(self.tell(&event, pair).await);
    }

    /// The container has ended. Plugins are told beside; [`Nri::end_told`] waits for that.
    pub fn container_ended(&self, id: &str, pair: impl FnOnce() -> Pair + Send + 'static) {
        let Some(inner) = &self.inner else { return };
        let (done, seen) = watch::channel(false);
        if lock(&inner.ends).insert(id.to_owned(), seen).is_some() {
            // Once is enough; the first goes on.
            return;
        }
        let (inner, id) = (inner.clone(), id.to_owned());
        tokio::spawn(async move {
            let lane = lock(&inner.starts).get(&id).cloned();
            if let Some(lane) = lane {
                // A start that hangs must not hold back the end.
                let limit = inner.config.request_timeout;
                let _ = tokio::time::timeout(limit, lane.lock()).await;
            }
            inner.tell_end(pair).await;
            done.send_replace(true);
        });
    }

    /// Waits until plugins have been told that the container has ended, where it has.
    pub async fn end_told(&self, id: &str) {
        let Some(inner) = &self.inner else { return };
        let seen = lock(&inner.ends).get(id).cloned();
        if let Some(mut seen) = seen {
            // A sender that has gone will say no more.
            let _ = seen.wait_for(|told| *told).await;
        }
    }

    /// The container goes. Plugins are told once, however often its removal is tried, and after its end.
    pub async fn remove_container(&self, id: &str, pair: impl FnOnce() -> Pair) {
        let Some(inner) = &self.inner else { return };
        self.end_told(id).await;
        let _order = inner.order.read().await;
        if inner.depart(id) {
            let event = told(Event::RemoveContainer, "RemoveContainer", false);
            noted(inner.tell_pair(&event, pair).await);
        }
    }

    /// A creation has failed after plugins were asked: they are told that the container has ended and goes.
    pub async fn undo_container(&self, id: &str, pair: impl FnOnce() -> Pair) {
        let Some(inner) = &self.inner else { return };
        if !lock(&inner.known).announced.contains(id) || self.list().is_empty() {
            return;
        }
        let pair = pair();
        let same = pair.clone();
        inner.tell_end(|| same).await;
        self.remove_container(id, || pair).await;
    }

    /// As [`Nri::undo_container`], of a pod.
    pub async fn undo_pod(&self, id: &str, pod: impl FnOnce() -> PodSandbox) {
        let Some(inner) = &self.inner else { return };
        if !lock(&inner.known).announced.contains(id) || self.list().is_empty() {
            return;
        }
        let pod = pod();
        let same = pod.clone();
        self.stop_pod(|| same).await;
        self.remove_pod(id, || pod).await;
    }

    /// The pod or container is on record now: being made is no longer what keeps plugins from it.
    pub fn settled(&self, id: &str) {
        if let Some(inner) = &self.inner {
            lock(&inner.known).announced.remove(id);
        }
    }

    /// The pod or container is gone.
    pub fn forget(&self, id: &str) {
        if let Some(inner) = &self.inner {
            let mut known = lock(&inner.known);
            known.announced.remove(id);
            known.departed.remove(id);
            lock(&inner.ends).remove(id);
            lock(&inner.starts).remove(id);
        }
    }

    /// Does what plugins want of containers that exist.
    ///
    /// # Errors
    /// The ids of those that may not fail and did.
    pub async fn change(&self, wanted: Wanted) -> Result<(), Vec<String>> {
        let runtime = self.inner.as_ref().and_then(|inner| inner.runtime.get());
        let Some(runtime) = runtime.filter(|_| wanted != Wanted::default()) else {
            return Ok(());
        };
        let failed = runtime.change(wanted).await;
        if failed.is_empty() {
            return Ok(());
        }
        Err(failed.into_iter().map(|update| update.container_id).collect())
    }

    async fn tell(&self, event: &Told, pair: impl FnOnce() -> Pair) -> Result<(), Error> {
        let Some(inner) = &self.inner else { return Ok(()) };
        let _order = inner.order.read().await;
        inner.tell_pair(event, pair).await
    }
}

/// Held while a container starts.
#[derive(Debug)]
pub struct Starting {
    _guard: OwnedMutexGuard<()>,
}

/// Plugins cannot refuse what is so already.
fn noted(result: Result<(), Error>) {
    if let Err(error) = result {
        tracing::warn!(error = crate::connection::chain(&error), "an NRI plugin failed");
    }
}

impl Inner {
    fn listening(&self, event: Event) -> Vec<Arc<Plugin>> {
        let plugins = lock(&self.plugins).clone();
        plugins
            .iter()
            .filter(|plugin| plugin.wants(event))
            .cloned()
            .collect()
    }

    /// Whether this is the first time.
    fn depart(&self, id: &str) -> bool {
        lock(&self.known).departed.insert(id.to_owned())
    }

    async fn tell_pod(&self, told: &Told, pod: impl FnOnce() -> PodSandbox) -> Result<(), Error> {
        let plugins = self.listening(told.event);
        if plugins.is_empty() {
            return Ok(());
        }
        // Every request about a pod alone has it as its first field.
        let request = api::RunPodSandboxRequest { pod: Some(pod()) };
        let change = || api::StateChangeEvent {
            event: told.event as i32,
            pod: request.pod.clone(),
            container: None,
        };
        tell_all(told, plugins, &request, change).await
    }

    async fn tell_pair(&self, told: &Told, pair: impl FnOnce() -> Pair) -> Result<(), Error> {
        let plugins = self.listening(told.event);
        if plugins.is_empty() {
            return Ok(());
        }
        let (pod, container) = pair();
        // Every request about a pod and a container has them as its first fields.
        let request = api::StartContainerRequest {
            pod: Some(pod),
            container: Some(container),
        };
        let change = || api::StateChangeEvent {
            event: told.event as i32,
            pod: request.pod.clone(),
            container: request.container.clone(),
        };
        tell_all(told, plugins, &request, change).await
    }

    /// StopContainer, whose answers may change other containers.
    async fn tell_end(&self, pair: impl FnOnce() -> Pair) {
        let mut updates = Updates::default();
        {
            let _order = self.order.read().await;
            let plugins = self.listening(Event::StopContainer);
            if plugins.is_empty() {
                return;
            }
            let (pod, container) = pair();
            let request = api::StopContainerRequest {
                pod: Some(pod),
                container: Some(container),
            };
            for plugin in plugins {
                let answer: Result<Option<api::StopContainerResponse>, Error> =
                    plugin.ask(Event::StopContainer, "StopContainer", &request).await;
                let applied = match answer {
                    Ok(Some(answer)) => updates.apply(answer.update, Vec::new(), &plugin.full_name()),
                    Ok(None) => Ok(()),
                    Err(error) => Err(error),
                };
                noted(applied);
            }
        }
        let wanted = updates.finish();
        if let Some(runtime) = self.runtime.get().filter(|_| wanted != Wanted::default()) {
            for failed in runtime.change(wanted).await {
                tracing::warn!(container = failed.container_id, "an NRI plugin's update failed");
            }
        }
    }
}

async fn tell_all<Q: prost::Message>(
    told: &Told,
    plugins: Vec<Arc<Plugin>>,
    request: &Q,
    change: impl Fn() -> api::StateChangeEvent,
) -> Result<(), Error> {
    let mut first = Ok(());
    for plugin in plugins {
        let result = plugin.tell(told.event, told.method, request, &change).await;
        if told.may_refuse {
            result?;
        } else if first.is_ok() {
            first = result;
        } else {
            noted(result);
        }
    }
    first
}
