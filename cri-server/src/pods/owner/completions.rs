//! What a pod's owner does when work has ended, and when something ended by itself.

use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::id::Id;

use super::records::{answer_ended, answer_when};
use super::{Done, Owner, Reply, answer};
use crate::cri::api::{ContainerEventType, LinuxContainerResources};
use crate::error::{Error, Result, chain};
use crate::node::now_ns;
use crate::pods::record::Exit;
use crate::pods::run_sandbox::{Failed, Started};
use crate::pods::state::{ContainerState, PodState, after_exit};
use crate::pods::{host_pid, start_container, watch};
use crate::shim::ShimError;

/// How long the end of a process that has just been started waits for the answer to the start.
const EARLY_EXIT: Duration = Duration::from_secs(2);

impl Owner {
    /// Returns those who wait, with the error, when the creation failed and nothing of the pod is left.
    pub(super) fn created(
        &mut self,
        result: Result<Started, Failed>,
    ) -> Option<(Vec<Reply<Id>>, Arc<Error>)> {
        let waiting = self
            .at_work
            .creation
            .take()
            .map(|creation| creation.waiting)
            .unwrap_or_default();
        match result {
            Ok(Started { shim, ips, info }) => {
                self.shim = Some(shim);
                let id = self.pod.id.clone();
                let written = self.change_pod(|pod| {
                    pod.state = PodState::Ready;
                    pod.ips = ips;
                    pod.info = info;
                });
                self.node.nri.settled(id.as_str());
                self.watch_all();
                if waiting.iter().all(|reply| reply.is_closed()) {
                    self.unclaimed.push(id.clone());
                }
                answer_when(written, waiting, id);
                for kind in [
                    ContainerEventType::ContainerCreatedEvent,
                    ContainerEventType::ContainerStartedEvent,
                ] {
                    self.send_event(&self.pod.id, kind);
                }
                if let Some(stops) = self.at_work.stop.take() {
                    self.begin_stop(stops);
                }
                self.begin_wanted_removal();
                None
            }
            Err(Failed { error, left }) if left.is_empty() => Some((waiting, Arc::new(error))),
            Err(Failed { error, left }) => {
                let error = Arc::new(Error::UndoIncomplete {
                    error: Box::new(error),
                    failures: left,
                });
                let problem = chain(&error);
                self.change_pod(|pod| {
                    pod.state = PodState::Broken;
                    pod.problem = Some(problem);
                })
                .queued();
                answer(waiting, &Err(error));
                if let Some(stops) = self.at_work.stop.take() {
                    self.begin_stop(stops);
                }
                self.begin_wanted_removal();
                None
            }
        }
    }

    pub(super) fn done(&mut self, done: Done) {
        match done {
            // Handled by the loop, as they may end it.
            Done::Created(_) | Done::Removed(Ok(())) | Done::Undone(Ok(())) => {}
            Done::Undone(Err(problem)) => self.not_undone(problem),
            Done::ContainerUndone(id, result) => self.container_undone(&id, result),
            Done::Found(found) => self.found(found),
            Done::Told(told) => self.told(told),
            Done::ExitHeld(id) => self.let_exit_go(&id),
            Done::CleanedUp(result) => self.cleaned_up(result),
            Done::CleanUpAgain => self.clean_up_again(),
            Done::Stopped(result) => self.stopped(result),
            Done::Removed(Err(error)) => {
                let error = Arc::new(error);
                self.broken(chain(&error));
                answer(self.at_work.removal.take().unwrap_or_default(), &Err(error));
            }
            Done::ContainerCreated(id, result) => self.container_created(&id, result),
            Done::ContainerStarted(id, result) => self.container_started(&id, result),
            Done::ContainerStopped(id, result) => {
                let waiting = self
                    .at_work
                    .stopping
                    .remove(&id)
                    .map(|s| s.waiting)
                    .unwrap_or_default();
                if result.is_err() {
                    // It is as it was, so it can be stopped again.
                    self.not_stopped(&id);
                }
                answer(waiting, &result.map_err(Arc::new));
            }
            Done::ContainerRemoved(id, result) => self.container_removed(&id, result),
            Done::ContainerUpdated(id, result, reply) => match result {
                Ok(updated) => {
                    let written = self.change_container(&id, |c| c.resources.clone_from(&updated.resources));
                    drop(updated);
                    answer_when(written, vec![reply], ());
                }
                Err(error) => answer(vec![reply], &Err(Arc::new(error))),
            },
            Done::PodUpdated(result, reply) => self.pod_updated(result, reply),
        }
        self.begin_wanted_removal();
    }

    fn stopped(&mut self, result: Result<()>) {
        let waiting = self.at_work.stop.take().unwrap_or_default();
        match result {
            Ok(()) => {
                self.shim = None;
                self.silent = false;
                self.settle_containers("the pod sandbox was stopped");
                self.finish_containers();
                let written = self.change_pod(|pod| {
                    pod.state = PodState::Stopped;
                    pod.problem = None;
                });
                self.send_event(&self.pod.id, ContainerEventType::ContainerStoppedEvent);
                answer_ended(written, waiting);
            }
            Err(error) => {
                let error = Arc::new(error);
                self.broken(chain(&error));
                answer(waiting, &Err(error));
            }
        }
    }

    pub(super) fn broken(&mut self, problem: String) {
        self.change_pod(|pod| {
            pod.state = PodState::Broken;
            pod.problem = Some(problem);
        })
        .queued();
    }

    /// Gives every container without a recorded end the one that the shim left, or none that is known.
    pub(super) fn settle_containers(&mut self, message: &str) {
        let open: Vec<Id> = self
            .containers
            .iter()
            .filter(|(_, c)| c.exit.is_none() && c.state != ContainerState::Creating)
            .map(|(id, _)| id.clone())
            .collect();
        for id in open {
            let exit = self.left_exit(&id, message);
            self.ended(&id, exit);
        }
    }

    fn container_created(&mut self, id: &Id, result: Result<LinuxContainerResources, Failed>) {
        let waiting = self
            .at_work
            .creating
            .remove(id)
            .map(|creation| creation.waiting)
            .unwrap_or_default();
        match result {
            Ok(resources) => {
                let written = self.change_container(id, |c| {
                    c.state = ContainerState::Created;
                    c.created_at_ns = now_ns();
                    c.resources = resources;
                });
                self.node.nri.settled(id.as_str());
                self.watch_container(id);
                if self.pod.state == PodState::Stopped {
                    // The pod's stop was complete when this was heard.
                    self.settle_containers("the pod sandbox was stopped");
                }
                if waiting.iter().all(|reply| reply.is_closed()) {
                    self.unclaimed.push(id.clone());
                }
                self.send_event(id, ContainerEventType::ContainerCreatedEvent);
                answer_when(written, waiting, id.clone());
            }
            Err(Failed { error, left }) if left.is_empty() => {
                let removed = self.drop_container(id);
                let error = Arc::new(error);
                tokio::spawn(async move {
                    // The record would only be undone once more at the next start.
                    let _ = removed.durable().await;
                    answer(waiting, &Err(error));
                });
            }
            Err(Failed { error, left }) => {
                let error = Arc::new(Error::UndoIncomplete {
                    error: Box::new(error),
                    failures: left,
                });
                let exit = Exit::start_error(chain(&error), now_ns());
                self.change_container(id, |c| {
                    c.state = ContainerState::Exited;
                    c.exit = Some(exit);
                })
                .queued();
                answer(waiting, &Err(error));
            }
        }
    }

    fn container_started(&mut self, id: &Id, result: Result<u32>) {
        let waiting = self.at_work.starting.remove(id).unwrap_or_default();
        match result {
            Ok(pid) => {
                let (now, pid) = (now_ns(), host_pid(&self.pod, pid));
                let early = self.early_exits.get(id).cloned();
                let written = self.change_container(id, |c| {
                    if c.state == ContainerState::Starting {
                        c.state = ContainerState::Running;
                    }
                    // A process that has ended before this was known started before its end.
                    c.started_at_ns = c
                        .exit
                        .as_ref()
                        .or(early.as_ref())
                        .map_or(now, |exit| exit.at_ns.min(now));
                    if c.exit.is_none() {
                        c.pid = pid;
                    }
                });
                // Of one whose end was told there is nothing more to tell.
                if self.containers.get(id).is_some_and(|c| c.exit.is_none()) {
                    self.send_event(id, ContainerEventType::ContainerStartedEvent);
                }
                answer_when(written, waiting, ());
            }
            Err(error) => {
                let error = Arc::new(error);
                self.not_started(id, &error);
                answer(waiting, &Err(error));
            }
        }
        self.let_exit_go(id);
    }

    /// A start that failed, or of which it is not known what became.
    fn not_started(&mut self, id: &Id, error: &Error) {
        let starting = self
            .containers
            .get(id)
            .is_some_and(|c| c.started_at_ns == 0 && c.state == ContainerState::Starting);
        match error {
            // Nothing was asked of the shim.
            Error::Store(_) if starting => {
                self.change_container(id, |c| c.state = ContainerState::Created)
                    .queued();
                return;
            }
            // It may come to run yet: who asked is told, and the start goes on.
            Error::Shim(ShimError::Timeout { .. }) if starting => {
                if let (Some(shim), Some(container)) = (self.shim.clone(), self.containers.get(id).cloned()) {
                    self.at_work.starting.insert(id.clone(), Vec::new());
                    let (node, pod, id) = (self.node.clone(), self.pod.clone(), id.clone());
                    self.begin(async move {
                        let started = start_container::again(node, pod, container, shim).await;
                        Done::ContainerStarted(id, started)
                    });
                }
                return;
            }
            // The shim tells on its next connection, or its death does.
            Error::Shim(error) if error.is_gone() && starting => {
                self.ask(vec![id.clone()], Duration::ZERO);
                return;
            }
            _ => {}
        }
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let over = container.exit.is_some();
        if container.started_at_ns != 0
            || !matches!(container.state, ContainerState::Starting | ContainerState::Exited)
        {
            return;
        }
        self.early_exits.remove(id);
        let exit = Exit::start_error(chain(error), now_ns());
        self.change_container(id, |c| {
            c.state = ContainerState::Exited;
            c.exit = Some(exit);
        })
        .queued();
        self.tell_end(id);
        if !over {
            self.send_event(id, ContainerEventType::ContainerStoppedEvent);
        }
        self.delete_task(id);
    }

    fn container_removed(&mut self, id: &Id, result: Result<()>) {
        let waiting = self.at_work.removing.remove(id).unwrap_or_default();
        match result {
            Ok(()) => {
                self.send_event(id, ContainerEventType::ContainerDeletedEvent);
                answer_ended(self.drop_container(id), waiting);
            }
            // The intent stays: the next removal, or the next start, goes on with it.
            Err(error) => answer(waiting, &Err(Arc::new(error))),
        }
    }

    // --- what happens by itself ---

    /// The first process of a container has ended. Where the answer to its start has not come yet, the end waits a
    /// moment for it, so that both are told in their order.
    pub(super) fn exited(&mut self, id: &Id, exit: Exit) {
        let starting = self
            .containers
            .get(id)
            .is_some_and(|c| c.state == ContainerState::Starting);
        if starting && self.at_work.starting.contains_key(id) && self.is_ready() {
            self.early_exits.insert(id.clone(), exit);
            let id = id.clone();
            self.begin(async move {
                tokio::time::sleep(EARLY_EXIT).await;
                Done::ExitHeld(id)
            });
        } else {
            self.ended(id, exit);
        }
    }

    /// Records an end that was held back.
    pub(super) fn let_exit_go(&mut self, id: &Id) {
        if let Some(exit) = self.early_exits.remove(id) {
            self.ended(id, exit);
        }
    }

    pub(super) fn let_exits_go(&mut self) {
        for (id, exit) in std::mem::take(&mut self.early_exits) {
            self.ended(&id, exit);
        }
    }

    /// Records how a container ended, once.
    pub(super) fn ended(&mut self, id: &Id, exit: Exit) {
        self.early_exits.remove(id);
        let Some(container) = self.containers.get(id) else {
            return;
        };
        if container.exit.is_some() {
            return;
        }
        tracing::info!(container = %id, code = exit.code, reason = exit.reason, "ended");
        let state = after_exit(container.state, exit.is_known());
        self.change_container(id, |c| {
            c.state = state;
            c.exit = Some(exit);
            c.pid = 0;
        })
        .queued();
        self.tell_end(id);
        self.send_event(id, ContainerEventType::ContainerStoppedEvent);
        if state != ContainerState::Removing {
            self.delete_task(id);
        }
    }

    /// The runtime's state and the rootfs mount of an ended container are of no more use.
    fn delete_task(&self, id: &Id) {
        if let (Some(shim), PodState::Ready) = (self.shim.clone(), self.pod.state) {
            let id = id.to_string();
            tokio::spawn(async move {
                if let Err(error) = shim.delete(&id).await {
                    tracing::debug!(container = id, %error, "its runtime state stays until its removal");
                }
            });
        }
    }

    pub(super) fn sandbox_ended(&mut self, problem: String, shim_died: bool) {
        match self.pod.state {
            PodState::Ready => {
                tracing::warn!(pod = %self.pod.id, problem, "a pod sandbox ended by itself");
                self.broken(problem);
                self.send_event(&self.pod.id, ContainerEventType::ContainerStoppedEvent);
            }
            PodState::Broken => {}
            _ => return,
        }
        if shim_died {
            self.shim_died();
        }
    }

    /// Watches the sandbox and every container whose end is not recorded.
    pub(super) fn watch_all(&self) {
        self.watch_sandbox();
        for (id, container) in &self.containers {
            if container.exit.is_none() && container.state != ContainerState::Creating {
                self.watch_container(id);
            }
        }
    }

    fn watch_sandbox(&self) {
        if let Some(shim) = &self.shim {
            watch::sandbox(&self.node.dirs, shim.clone(), &self.pod.id, self.me.clone());
        }
    }

    pub(super) fn watch_container(&self, id: &Id) {
        if let Some(shim) = &self.shim {
            watch::container(
                &self.node.dirs,
                shim.clone(),
                &self.pod.id,
                id.clone(),
                self.me.clone(),
            );
        }
    }
}
