//! The task that owns one pod: the only one that changes the states of the pod and its containers. It admits
//! requests (state.rs), begins their work beside itself and gets the completion as a message, so it never
//! waits and a stop overtakes a start that hangs. Every change goes to the store, in order, and to the
//! snapshot that readers see.

mod completions;
mod found;
mod records;
mod update_pod;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::id::Id;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::create_container::Plan;
use super::record::{ContainerKey, ContainerRecord, Exit, PodRecord, PodView};
use super::recover::{Found, Start, Told};
use super::run_sandbox::{Failed, Started};
use super::state::{Admission, ContainerState, PodState, Request, admit};
use super::update_container::{Turn, Updated};
use super::update_sandbox::PodResources;
use super::{
    Pods, create_container, remove_container, remove_sandbox, run_sandbox, start_container, stop_container,
    stop_sandbox, update_container,
};
use crate::cri::api::LinuxContainerResources;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::shim::Shim;
use crate::store::Table;

/// Where a request's result goes; several callers may share one.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Arc<Error>>>;

/// What the owner is told.
pub(super) enum Message {
    /// A caller asks.
    Call(Call),
    /// Work that the owner began has ended.
    Done(Done),
    /// A container's first process has ended.
    Exited { container: Id, exit: Exit },
    /// The shim lives, on a new connection.
    Reconnected(Shim),
    /// The connection to the shim broke; it lives and cannot be reached.
    Disconnected,
    /// The sandbox has ended without being asked to.
    SandboxEnded { problem: String, shim_died: bool },
}

/// What callers ask.
pub(super) enum Call {
    /// A repeated RunPodSandbox of the same name.
    Join(Reply<Id>),
    StopPod(Reply<()>),
    RemovePod(Reply<()>),
    CreateContainer(Box<Plan>, Reply<Id>),
    StartContainer(Id, Reply<()>),
    StopContainer(Id, Duration, Reply<()>),
    RemoveContainer(Id, Reply<()>),
    UpdateContainer(Id, Box<LinuxContainerResources>, Asker, Reply<()>),
    UpdatePod(Box<PodResources>, Reply<()>),
}

/// Who wants an update: plugins are not asked about what a plugin wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    Cri,
    Plugin,
}

/// Work that has ended.
pub(super) enum Done {
    Created(Box<Result<Started, Failed>>),
    Stopped(Result<()>),
    Removed(Result<()>),
    /// With the limits as plugins have adjusted them.
    ContainerCreated(Id, Result<LinuxContainerResources, Failed>),
    ContainerStarted(Id, Result<u32>),
    ContainerStopped(Id, Result<()>),
    ContainerRemoved(Id, Result<()>),
    ContainerUpdated(Id, Result<Updated>, Reply<()>),
    PodUpdated(Result<Box<PodResources>>, Reply<()>),
    /// The creation that a former daemon had begun is undone, or why not.
    Undone(Result<(), String>),
    /// As [`Done::Undone`], of a container.
    ContainerUndone(Id, Result<(), String>),
    /// What the daemon's start found of the shim.
    Found(Found),
    /// What the shim says of containers whose states are in doubt.
    Told(Vec<Told>),
    /// An exit that came before the answer to the start has been held back long enough.
    ExitHeld(Id),
    /// What outlived a dead shim was ended.
    CleanedUp(Result<()>),
    /// It is time to try that again.
    CleanUpAgain,
}

/// A creation at work, with those who wait for it.
struct Creation<T> {
    cancel: CancellationToken,
    waiting: Vec<Reply<T>>,
}

/// A stop at work.
struct Stopping {
    deadline: watch::Sender<Instant>,
    waiting: Vec<Reply<()>>,
}

/// What is at work.
#[derive(Default)]
struct AtWork {
    creation: Option<Creation<Id>>,
    stop: Option<Vec<Reply<()>>>,
    removal: Option<Vec<Reply<()>>>,
    /// Removals that wait until nothing else is at work.
    removal_wanted: Vec<Reply<()>>,
    creating: HashMap<Id, Creation<Id>>,
    starting: HashMap<Id, Vec<Reply<()>>>,
    stopping: HashMap<Id, Stopping>,
    removing: HashMap<Id, Vec<Reply<()>>>,
    /// Containers whose interrupted creation is being undone, with requests for the same name.
    undoing: HashMap<Id, Vec<(Plan, Reply<Id>)>>,
    /// The daemon's start looks for the shim; requests that wait for what it finds.
    look: Option<Vec<Call>>,
    /// What outlived a dead shim is being ended; requests that wait for that.
    cleanup: Option<Vec<Call>>,
}

/// See the module.
pub(super) struct Owner {
    node: Arc<Node>,
    pods: Pods,
    pod: Arc<PodRecord>,
    containers: BTreeMap<Id, Arc<ContainerRecord>>,
    shim: Option<Shim>,
    /// The shim lives and cannot be reached; a task of its own reaches for it.
    silent: bool,
    view: watch::Sender<Arc<PodView>>,
    me: mpsc::WeakUnboundedSender<Message>,
    at_work: AtWork,
    /// Until the pod that was found at the daemon's start is in order.
    start: Option<Start>,
    /// Ends seen before the answer to the start.
    early_exits: HashMap<Id, Exit>,
    /// Failed attempts to end what outlived a dead shim.
    failed_cleanups: u32,
    /// One update of a container at a time.
    updates: HashMap<Id, Arc<tokio::sync::Mutex<()>>>,
    /// Created, and those who asked had gone: the next who asks the same is given it.
    unclaimed: Vec<Id>,
}

/// What others hold of an owner.
#[derive(Debug, Clone)]
pub(super) struct Handle {
    pub(super) inbox: mpsc::UnboundedSender<Message>,
    pub(super) view: watch::Receiver<Arc<PodView>>,
}

impl Owner {
    /// Starts the task of a pod that is being created.
    pub(super) fn create(node: Arc<Node>, pods: Pods, pod: PodRecord, reply: Reply<Id>) -> Handle {
        let announced = node.store.put(Table::Pods, pod.id.as_str(), &pod);
        let (mut owner, handle, inbox) = Self::new(node, pods, pod, BTreeMap::new());
        let cancel = CancellationToken::new();
        owner.at_work.creation = Some(Creation {
            cancel: cancel.clone(),
            waiting: vec![reply],
        });
        let (node, pod) = (owner.node.clone(), owner.pod.clone());
        owner.begin(
            async move { Done::Created(Box::new(run_sandbox::run(node, pod, announced, cancel).await)) },
        );
        tokio::spawn(owner.run(inbox));
        handle
    }

    fn new(
        node: Arc<Node>,
        pods: Pods,
        pod: PodRecord,
        containers: BTreeMap<Id, Arc<ContainerRecord>>,
    ) -> (Self, Handle, mpsc::UnboundedReceiver<Message>) {
        let (sender, inbox) = mpsc::unbounded_channel();
        let pod = Arc::new(pod);
        let first = PodView {
            pod: pod.clone(),
            containers: containers.clone(),
            shim: None,
        };
        let (view, seen) = watch::channel(Arc::new(first));
        let me = sender.downgrade();
        let handle = Handle {
            inbox: sender,
            view: seen,
        };
        let at_work = AtWork::default();
        (
            Self {
                node,
                pods,
                pod,
                containers,
                shim: None,
                silent: false,
                view,
                me,
                at_work,
                start: None,
                early_exits: HashMap::new(),
                failed_cleanups: 0,
                updates: HashMap::new(),
                unclaimed: Vec::new(),
            },
            handle,
            inbox,
        )
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        while let Some(message) = inbox.recv().await {
            match message {
                Message::Call(call) => self.call(call),
                Message::Done(Done::Removed(Ok(()))) => {
                    self.gone().await;
                    return;
                }
                Message::Done(Done::Created(result)) => {
                    if let Some((waiting, error)) = self.created(*result) {
                        self.forget(waiting, error).await;
                        return;
                    }
                }
                Message::Done(Done::Undone(Ok(()))) => {
                    self.undone().await;
                    return;
                }
                Message::Done(done) => self.done(done),
                Message::Exited { container, exit } => self.exited(&container, exit),
                Message::Reconnected(shim) => self.reconnected(shim),
                Message::Disconnected => self.disconnected(),
                Message::SandboxEnded { problem, shim_died } => self.sandbox_ended(problem, shim_died),
            }
        }
    }

    fn begin(&self, work: impl Future<Output = Done> + Send + 'static) {
        let me = self.me.upgrade();
        tokio::spawn(async move {
            let done = work.await;
            if let Some(me) = me {
                let _ = me.send(Message::Done(done));
            }
        });
    }

    // --- requests ---

    fn call(&mut self, call: Call) {
        let Some(call) = self.wait_for_order(call) else {
            return;
        };
        match call {
            Call::Join(reply) => self.join(reply),
            Call::StopPod(reply) => self.stop_pod(reply),
            Call::RemovePod(reply) => self.remove_pod(reply),
            Call::CreateContainer(plan, reply) => self.create_container(*plan, reply),
            Call::StartContainer(id, reply) => self.start_container(id, reply),
            Call::StopContainer(id, grace, reply) => self.stop_container(id, grace, reply),
            Call::RemoveContainer(id, reply) => self.remove_container(id, reply),
            Call::UpdateContainer(id, wanted, asker, reply) => {
                self.update_container(&id, *wanted, asker, reply)
            }
            Call::UpdatePod(wanted, reply) => self.update_pod(wanted, reply),
        }
    }

    fn admit(&self, container: Option<&Id>, request: Request) -> Result<Admission, Arc<Error>> {
        let state = container
            .and_then(|id| self.containers.get(id))
            .map(|container| container.state);
        admit(self.pod.state, state, request).map_err(|denial| {
            let (what, id) = match (container, denial) {
                (Some(id), super::state::Denial::ContainerState(_) | super::state::Denial::NotRunning(_)) => {
                    ("container", id)
                }
                (Some(id), super::state::Denial::NoContainer) => ("container", id),
                _ => ("pod sandbox", &self.pod.id),
            };
            Arc::new(Error::Denied {
                what,
                id: id.to_string(),
                denial,
            })
        })
    }

    fn join(&mut self, reply: Reply<Id>) {
        if let Some(creation) = &mut self.at_work.creation {
            creation.waiting.push(reply);
            return;
        }
        let id = self.pod.id.clone();
        if let Some(at) = self.unclaimed.iter().position(|unclaimed| *unclaimed == id) {
            self.unclaimed.swap_remove(at);
            answer(vec![reply], &Ok(id));
            return;
        }
        let name = self.pod.key().to_string();
        let error = Error::AlreadyExists {
            what: "pod sandbox",
            name,
            id: id.to_string(),
        };
        answer(vec![reply], &Err(Arc::new(error)));
    }

    fn stop_pod(&mut self, reply: Reply<()>) {
        match self.admit(None, Request::StopPod) {
            Ok(Admission::Begin) => match &self.at_work.creation {
                Some(creation) => {
                    creation.cancel.cancel();
                    // Answered when the creation has been undone, or its result stopped.
                    self.at_work.stop.get_or_insert_default().push(reply);
                }
                None => self.begin_stop(vec![reply]),
            },
            Ok(Admission::Join) => self.at_work.stop.get_or_insert_default().push(reply),
            Ok(Admission::Done) => answer(vec![reply], &Ok(())),
            Err(error) => answer(vec![reply], &Err(error)),
        }
    }

    fn begin_stop(&mut self, replies: Vec<Reply<()>>) {
        self.at_work.stop.get_or_insert_default().extend(replies);
        for creation in self.at_work.creating.values() {
            creation.cancel.cancel();
        }
        self.let_exits_go();
        let announced = self.change_pod(|pod| pod.state = PodState::Stopping);
        let (node, shim, view) = (self.node.clone(), self.shim.clone(), self.view.subscribe());
        self.begin(async move { Done::Stopped(stop_sandbox::run(node, shim, view, announced).await) });
    }

    fn remove_pod(&mut self, reply: Reply<()>) {
        match self.admit(None, Request::RemovePod) {
            Ok(Admission::Begin) => {
                if let Some(creation) = &self.at_work.creation {
                    creation.cancel.cancel();
                }
                self.at_work.removal_wanted.push(reply);
                self.begin_wanted_removal();
            }
            Ok(Admission::Join) => self.at_work.removal.get_or_insert_default().push(reply),
            Ok(Admission::Done) => answer(vec![reply], &Ok(())),
            Err(error) => answer(vec![reply], &Err(error)),
        }
    }

    /// Begins the removal that was asked for once neither a stop nor a container's creation is at work.
    fn begin_wanted_removal(&mut self) {
        let busy = self.at_work.creation.is_some()
            || self.at_work.stop.is_some()
            || self.at_work.removal.is_some()
            || !self.at_work.creating.is_empty()
            || !self.at_work.undoing.is_empty()
            || !self.at_work.removing.is_empty();
        if self.at_work.removal_wanted.is_empty() {
            return;
        }
        if busy {
            for creation in self.at_work.creating.values() {
                creation.cancel.cancel();
            }
            return;
        }
        self.at_work.removal = Some(std::mem::take(&mut self.at_work.removal_wanted));
        let was = self.pod.state;
        let announced = self.change_pod(|pod| pod.state = PodState::Removing);
        let (node, shim, view) = (self.node.clone(), self.shim.clone(), self.view.subscribe());
        self.begin(async move { Done::Removed(remove_sandbox::run(node, was, shim, view, announced).await) });
    }

    fn create_container(&mut self, plan: Plan, reply: Reply<Id>) {
        let key = plan.record.key();
        if let Some(existing) = self.container_named(&key) {
            if let Some(creation) = self.at_work.creating.get_mut(&existing) {
                creation.waiting.push(reply);
            } else if let Some(waiting) = self.at_work.undoing.get_mut(&existing) {
                waiting.push((plan, reply));
            } else if let Some(at) = self.unclaimed.iter().position(|id| *id == existing) {
                self.unclaimed.swap_remove(at);
                answer(vec![reply], &Ok(existing));
            } else {
                let error = Error::AlreadyExists {
                    what: "container",
                    name: key.to_string(),
                    id: existing.to_string(),
                };
                answer(vec![reply], &Err(Arc::new(error)));
            }
            return;
        }
        let shim = match (self.admit(None, Request::CreateContainer), &self.shim) {
            (Ok(_), Some(shim)) => shim.clone(),
            (Ok(_), None) => return answer(vec![reply], &Err(Arc::new(no_shim(&self.pod.id)))),
            (Err(error), _) => return answer(vec![reply], &Err(error)),
        };
        let id = plan.record.id.clone();
        let cancel = CancellationToken::new();
        self.containers.insert(id.clone(), Arc::new(plan.record.clone()));
        let announced = self.publish_container(&id);
        let creation = Creation {
            cancel: cancel.clone(),
            waiting: vec![reply],
        };
        self.at_work.creating.insert(id.clone(), creation);
        let (node, pod) = (self.node.clone(), self.pod.clone());
        self.begin(async move {
            Done::ContainerCreated(
                id,
                create_container::run(node, pod, shim, plan, announced, cancel).await,
            )
        });
    }

    fn container_named(&self, key: &ContainerKey) -> Option<Id> {
        self.containers
            .values()
            .find(|container| container.key() == *key)
            .map(|container| container.id.clone())
    }

    fn start_container(&mut self, id: Id, reply: Reply<()>) {
        match self.admit(Some(&id), Request::StartContainer) {
            Ok(Admission::Begin | Admission::Join) => match self.at_work.starting.get_mut(&id) {
                Some(waiting) => waiting.push(reply),
                // Nobody is at it where an attempt lost its shim's connection; the shim takes it once.
                None => self.begin_start(id, vec![reply]),
            },
            Ok(Admission::Done) => answer(vec![reply], &Ok(())),
            Err(error) => answer(vec![reply], &Err(error)),
        }
    }

    fn begin_start(&mut self, id: Id, replies: Vec<Reply<()>>) {
        let Some(shim) = self.shim.clone() else {
            return answer(replies, &Err(Arc::new(no_shim(&self.pod.id))));
        };
        let announced = self.change_container(&id, |c| c.state = ContainerState::Starting);
        let Some(container) = self.containers.get(&id).cloned() else {
            return answer(replies, &Ok(()));
        };
        self.at_work.starting.insert(id.clone(), replies);
        let (node, pod) = (self.node.clone(), self.pod.clone());
        self.begin(async move {
            let started = start_container::run(node, pod, container, shim, announced).await;
            Done::ContainerStarted(id, started)
        });
    }

    fn stop_container(&mut self, id: Id, grace: Duration, reply: Reply<()>) {
        let deadline = Instant::now() + grace.min(Duration::from_secs(u32::MAX.into()));
        self.let_exit_go(&id);
        match self.admit(Some(&id), Request::StopContainer) {
            Ok(Admission::Begin) => {
                let Some(shim) = self.shim.clone() else {
                    return self.without_shim(Call::StopContainer(id, grace, reply));
                };
                let signal = self
                    .containers
                    .get(&id)
                    .map_or(15, |container| container.stop_signal);
                let announced = self.change_container(&id, |c| c.state = ContainerState::Stopping);
                let (sender, receiver) = watch::channel(deadline);
                self.at_work.stopping.insert(
                    id.clone(),
                    Stopping {
                        deadline: sender,
                        waiting: vec![reply],
                    },
                );
                let view = self.view.subscribe();
                self.begin(async move {
                    let stop = stop_container::Stop {
                        shim,
                        container: id.clone(),
                        signal,
                        view,
                        deadline: receiver,
                    };
                    Done::ContainerStopped(id, stop_container::run(stop, announced).await)
                });
            }
            Ok(Admission::Join) => match self.at_work.stopping.get_mut(&id) {
                Some(stopping) => {
                    stopping.deadline.send_if_modified(|until| {
                        let sooner = deadline < *until;
                        *until = deadline.min(*until);
                        sooner
                    });
                    stopping.waiting.push(reply);
                }
                // The state says so, yet nobody is at it (a stop that failed): it begins again.
                None => {
                    self.not_stopped(&id);
                    self.stop_container(id, grace, reply);
                }
            },
            Ok(Admission::Done) => answer(vec![reply], &Ok(())),
            Err(error) => answer(vec![reply], &Err(error)),
        }
    }

    /// A stop that has not ended the container.
    fn not_stopped(&mut self, id: &Id) {
        let starting = self.at_work.starting.contains_key(id);
        self.change_container(id, |c| {
            c.state = match c.started_at_ns {
                _ if c.state != ContainerState::Stopping => c.state,
                0 if starting => ContainerState::Starting,
                0 => ContainerState::Created,
                _ => ContainerState::Running,
            }
        })
        .queued();
    }

    fn remove_container(&mut self, id: Id, reply: Reply<()>) {
        let over = self.containers.get(&id).is_none_or(|c| c.exit.is_some());
        if self.shim.is_none()
            && (self.silent || !over)
            && self.admit(Some(&id), Request::RemoveContainer).is_ok()
        {
            return self.without_shim(Call::RemoveContainer(id, reply));
        }
        match self.admit(Some(&id), Request::RemoveContainer) {
            Ok(Admission::Begin) => self.begin_container_removal(id, vec![reply]),
            Ok(Admission::Join) => match self.at_work.removing.get_mut(&id) {
                Some(waiting) => waiting.push(reply),
                None => self.begin_container_removal(id, vec![reply]),
            },
            Ok(Admission::Done) => answer(vec![reply], &Ok(())),
            Err(error) => answer(vec![reply], &Err(error)),
        }
    }

    fn begin_container_removal(&mut self, id: Id, replies: Vec<Reply<()>>) {
        let announced = self.change_container(&id, |c| c.state = ContainerState::Removing);
        let Some(container) = self.containers.get(&id).cloned() else {
            return answer(replies, &Ok(()));
        };
        self.at_work.removing.insert(id.clone(), replies);
        let (node, shim, view) = (self.node.clone(), self.shim.clone(), self.view.subscribe());
        self.begin(async move {
            Done::ContainerRemoved(
                id,
                remove_container::run(node, shim, container, view, announced).await,
            )
        });
    }

    fn update_container(&mut self, id: &Id, wanted: LinuxContainerResources, asker: Asker, reply: Reply<()>) {
        let (container, shim) = match (self.admit(Some(id), Request::UpdateContainer), &self.shim) {
            (Ok(_), Some(shim)) => match self.containers.get(id) {
                Some(container) => (container.clone(), shim.clone()),
                None => return answer(vec![reply], &Ok(())),
            },
            (Ok(_), None) => return answer(vec![reply], &Err(Arc::new(no_shim(&self.pod.id)))),
            (Err(error), _) => return answer(vec![reply], &Err(error)),
        };
        let turn = Turn {
            lock: self.updates.entry(id.clone()).or_default().clone(),
            view: self.view.subscribe(),
        };
        let (node, id) = (self.node.clone(), id.clone());
        let pod = self.pod.clone();
        self.begin(async move {
            let result = match asker {
                Asker::Cri => update_container::with_plugins(node, shim, pod, container, wanted, turn).await,
                Asker::Plugin => {
                    update_container::in_turn(&node, &shim, &pod, &container, &wanted, turn).await
                }
            };
            Done::ContainerUpdated(id, result, reply)
        });
    }
}

fn no_shim(pod: &Id) -> Error {
    Error::Unavailable(format!("the shim of pod sandbox {pod} cannot be reached"))
}

/// Gives all the same result. A caller that has gone needs none.
fn answer<T: Clone>(replies: Vec<Reply<T>>, result: &Result<T, Arc<Error>>) {
    for reply in replies {
        let _ = reply.send(result.clone());
    }
}
