//! The owner of a pod that was found at the daemon's start, or whose shim went silent or died: what the shim says
//! decides, what lives is adopted, what was half made is undone, what was half torn down is finished.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::id::Id;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{Call, Creation, Done, Owner, answer};
use crate::cri::api::ContainerEventType;
use crate::error::{Error, Result, chain};
use crate::node::{Node, now_ns};
use crate::pods::record::{ContainerRecord, Exit, PodRecord};
use crate::pods::recover::{self, Found, Start, Told};
use crate::pods::state::{ContainerState, PodState};
use crate::pods::{Pods, host_pid, watch};
use crate::shim::{Shim, TaskState};

/// Pause before a shim that did not say a container's state is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Longest pause between two attempts to end what outlived a shim.
const CLEAN_AGAIN: Duration = Duration::from_secs(60);

impl Owner {
    /// Starts the task of a pod that was found at the daemon's start, and gives it its name.
    pub(in crate::pods) fn adopt(
        node: Arc<Node>,
        pods: Pods,
        pod: PodRecord,
        containers: BTreeMap<Id, Arc<ContainerRecord>>,
        start: Start,
    ) {
        let (mut owner, handle, inbox) = Self::new(node, pods, pod, containers);
        owner.pods.register(owner.pod.key(), owner.pod.id.clone(), handle);
        owner.start = Some(start.clone());
        let (node, pod) = (owner.node.clone(), owner.pod.clone());
        match owner.pod.state {
            PodState::Creating => {
                owner.at_work.creation = Some(Creation {
                    // An undo is not given up.
                    cancel: CancellationToken::new(),
                    waiting: Vec::new(),
                });
                owner.begin(async move { Done::Undone(recover::undo_creation(&node, &pod).await) });
            }
            PodState::Stopped => {
                owner.settle_containers("the pod sandbox was stopped");
                owner.finish_containers();
                owner.start = None;
            }
            _ => {
                owner.at_work.look = Some(Vec::new());
                let open = owner.in_doubt();
                owner.begin(async move { Done::Found(recover::look(&node, &pod.id, open, &start).await) });
            }
        }
        tokio::spawn(owner.run(inbox));
    }

    /// Containers that the shim is asked about: those whose end is not on record, and that nothing is at work on.
    fn in_doubt(&self) -> Vec<Id> {
        let open = self.containers.iter().filter(|(id, c)| {
            let at_work = self.at_work.starting.contains_key(*id)
                || self.at_work.stopping.contains_key(*id)
                || self.at_work.removing.contains_key(*id);
            c.exit.is_none()
                && !at_work
                && !matches!(c.state, ContainerState::Creating | ContainerState::Removing)
        });
        open.map(|(id, _)| id.clone()).collect()
    }

    /// Keeps a request until it is known what it meets: the shim is being looked for, or what outlived it ended.
    pub(super) fn wait_for_order(&mut self, call: Call) -> Option<Call> {
        let teardown = matches!(
            call,
            Call::StopPod(_) | Call::RemovePod(_) | Call::StopContainer(..) | Call::RemoveContainer(..)
        );
        let waiting = match (&mut self.at_work.look, &mut self.at_work.cleanup) {
            (Some(waiting), _) if !matches!(call, Call::Join(_)) => waiting,
            (_, Some(waiting)) if teardown => waiting,
            _ => return Some(call),
        };
        waiting.push(call);
        None
    }

    pub(super) fn found(&mut self, found: Found) {
        let waiting = self.at_work.look.take().unwrap_or_default();
        let was = self.pod.state;
        if matches!(was, PodState::Stopping | PodState::Removing) {
            // What was begun is admitted again below.
            self.change_pod(|pod| pod.state = PodState::Broken).queued();
        }
        let mut dead = false;
        match found {
            Found::Answering(shim, told) => {
                self.link(shim);
                self.told(told);
            }
            Found::Silent => {
                self.silent = true;
                watch::shim_that_is_silent(&self.node.dirs, &self.pod.id, self.me.clone());
            }
            Found::Dead => dead = true,
        }
        // Goes on beside the start; the kubelet asks again for what it wants.
        match was {
            PodState::Stopping => self.stop_pod(oneshot::channel().0),
            PodState::Removing => self.remove_pod(oneshot::channel().0),
            PodState::Ready if dead => self.sandbox_ended("its shim did not survive".to_owned(), true),
            _ if dead => self.shim_died(),
            _ => {}
        }
        if self.at_work.cleanup.is_none() {
            self.start = None;
        }
        for call in waiting {
            self.call(call);
        }
    }

    /// Takes a connection to the shim.
    fn link(&mut self, shim: Shim) {
        self.shim = Some(shim);
        self.silent = false;
        self.publish();
        self.watch_all();
        self.finish_containers();
    }

    pub(super) fn reconnected(&mut self, shim: Shim) {
        if !matches!(self.pod.state, PodState::Ready | PodState::Broken) {
            return;
        }
        self.link(shim);
        self.ask(self.in_doubt(), Duration::ZERO);
    }

    pub(super) fn disconnected(&mut self) {
        tracing::warn!(pod = %self.pod.id, "the shim lives and cannot be reached");
        self.shim = None;
        self.silent = true;
        self.publish();
    }

    /// Asks the shim about containers, after a pause.
    pub(super) fn ask(&self, containers: Vec<Id>, pause: Duration) {
        if let Some(shim) = self.shim.clone().filter(|_| !containers.is_empty()) {
            self.begin(async move {
                tokio::time::sleep(pause).await;
                Done::Told(recover::ask(&shim, containers).await)
            });
        }
    }

    /// What the shim says of containers is so, whatever is on record. A shim that does not say it is asked again.
    pub(super) fn told(&mut self, told: Vec<Told>) {
        let in_doubt = self.in_doubt();
        let mut again = Vec::new();
        for (id, answer) in told.into_iter().filter(|(id, _)| in_doubt.contains(id)) {
            let Some(state) = self.containers.get(&id).map(|container| container.state) else {
                continue;
            };
            match answer {
                Ok((TaskState::Created, _)) if state == ContainerState::Starting && self.is_ready() => {
                    // Maybe the shim is at it still; it starts a container once.
                    self.begin_start(id, Vec::new());
                }
                Ok((TaskState::Created, _)) => {
                    self.change_container(&id, |c| c.state = ContainerState::Created)
                        .queued();
                }
                Ok((TaskState::Running, pid)) => {
                    let pid = host_pid(&self.pod, pid);
                    let unsaid = self.containers.get(&id).is_some_and(|c| c.started_at_ns == 0);
                    self.change_container(&id, |c| {
                        c.state = ContainerState::Running;
                        c.pid = pid;
                        if unsaid {
                            c.started_at_ns = now_ns();
                        }
                    })
                    .queued();
                    if unsaid {
                        self.send_event(&id, ContainerEventType::ContainerStartedEvent);
                    }
                }
                Ok((TaskState::Stopped, _)) => {
                    self.change_container(&id, |c| {
                        if c.started_at_ns == 0 {
                            c.started_at_ns = c.created_at_ns;
                        }
                    })
                    .queued();
                    // Where it is not recorded, the watcher gets it from the shim.
                    if let Some(exit) = watch::recorded(&self.node.dirs.container(&self.pod.id, &id)) {
                        self.ended(&id, exit);
                    }
                }
                Err(error) if error.is_not_found() => {
                    let exit = self.left_exit(&id, "its shim does not know it");
                    self.ended(&id, exit);
                }
                // The sandbox's watcher tells.
                Err(error) if error.is_gone() => {}
                Err(error) => {
                    tracing::warn!(container = %id, error = %chain(&error), "its state is not known yet");
                    again.push(id);
                }
            }
        }
        self.ask(again, ASK_AGAIN);
    }

    pub(super) fn is_ready(&self) -> bool {
        self.pod.state == PodState::Ready
    }

    /// Goes on with what an intent on record says: interrupted creations are undone, removals finished.
    pub(super) fn finish_containers(&mut self) {
        let in_state = |state| {
            let found = self.containers.iter().filter(move |(_, c)| c.state == state);
            found.map(|(id, c)| (id.clone(), c.clone())).collect::<Vec<_>>()
        };
        let (creating, removing) = (
            in_state(ContainerState::Creating),
            in_state(ContainerState::Removing),
        );
        for (id, container) in creating {
            if self.at_work.creating.contains_key(&id) || self.at_work.undoing.contains_key(&id) {
                continue;
            }
            self.at_work.undoing.insert(id.clone(), Vec::new());
            let (node, shim) = (self.node.clone(), self.shim.clone());
            self.begin(async move {
                let undone = recover::undo_container(&node, shim.as_ref(), &container).await;
                Done::ContainerUndone(id, undone)
            });
        }
        for (id, _) in removing {
            if !self.at_work.removing.contains_key(&id) {
                self.begin_container_removal(id, Vec::new());
            }
        }
    }

    pub(super) fn container_undone(&mut self, id: &Id, result: Result<(), String>) {
        let waiting = self.at_work.undoing.remove(id).unwrap_or_default();
        match result {
            Ok(()) => self.drop_container(id).queued(),
            Err(problem) => {
                let exit = Exit::start_error(problem, now_ns());
                self.change_container(id, |c| {
                    c.state = ContainerState::Exited;
                    c.exit = Some(exit);
                })
                .queued();
            }
        }
        for (plan, reply) in waiting {
            self.create_container(plan, reply);
        }
    }

    /// A creation that a former daemon had begun could not be undone.
    pub(super) fn not_undone(&mut self, problem: String) {
        let waiting = self.at_work.creation.take().map(|creation| creation.waiting);
        tracing::warn!(pod = %self.pod.id, problem, "an interrupted creation could not be undone");
        self.broken(problem);
        self.start = None;
        for reply in waiting.unwrap_or_default() {
            self.join(reply);
        }
        if let Some(stops) = self.at_work.stop.take() {
            self.begin_stop(stops);
        }
    }

    /// A request to end a container while there is no shim to do it.
    pub(super) fn without_shim(&mut self, call: Call) {
        if self.silent {
            refuse(call, &Arc::new(super::no_shim(&self.pod.id)));
        } else if self.pod.state == PodState::Broken {
            // What may have outlived the shim is ended first.
            self.clean_up();
            self.call(call);
        } else {
            self.settle_containers("its shim is gone");
            self.call(call);
        }
    }

    /// Nobody watches what the shim started: it is ended, then recorded as ended.
    pub(super) fn shim_died(&mut self) {
        self.shim = None;
        self.silent = false;
        self.publish();
        self.clean_up();
    }

    fn clean_up(&mut self) {
        if self.at_work.cleanup.is_none() {
            self.at_work.cleanup = Some(Vec::new());
            let (node, pod) = (self.node.clone(), self.pod.clone());
            self.begin(async move { Done::CleanedUp(recover::clean_up(&node, &pod).await) });
        }
    }

    pub(super) fn cleaned_up(&mut self, result: Result<()>) {
        let waiting = self.at_work.cleanup.take().unwrap_or_default();
        self.start = None;
        match result {
            Ok(()) => {
                self.failed_cleanups = 0;
                self.settle_containers("its shim died");
                self.finish_containers();
                for call in waiting {
                    self.call(call);
                }
            }
            Err(error) => {
                let pause = Duration::from_secs(1 << self.failed_cleanups.min(8)).min(CLEAN_AGAIN);
                self.failed_cleanups += 1;
                let problem = chain(&error);
                tracing::warn!(pod = %self.pod.id, problem, "what a dead shim left could not be ended; trying on");
                let error = Arc::new(error);
                for call in waiting {
                    match call {
                        Call::StopContainer(..) | Call::RemoveContainer(..) => refuse(call, &error),
                        // The pod's teardown does it once more and collects what fails.
                        call => self.call(call),
                    }
                }
                self.begin(async move {
                    tokio::time::sleep(pause).await;
                    Done::CleanUpAgain
                });
            }
        }
    }

    pub(super) fn clean_up_again(&mut self) {
        if self.pod.state == PodState::Broken && self.shim.is_none() && !self.silent {
            self.clean_up();
        }
    }

    /// The end of a container that the shim left, or none that is known.
    pub(super) fn left_exit(&self, id: &Id, message: &str) -> Exit {
        let bundle = self.node.dirs.container(&self.pod.id, id);
        watch::recorded(&bundle).unwrap_or_else(|| Exit::unknown(message, now_ns()))
    }
}

fn refuse(call: Call, error: &Arc<Error>) {
    match call {
        Call::StopContainer(_, _, reply) | Call::RemoveContainer(_, reply) => {
            answer(vec![reply], &Err(error.clone()));
        }
        // Only these two need the shim to go on.
        _ => {}
    }
}
