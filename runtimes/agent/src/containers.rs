//! The pod's containers and their processes.
//!
//! ```text
//! (creating) ──▶ created ──start──▶ running ──its first process ends──▶ ended ──delete──▶ (gone)
//!                   └───────────────────kill───────────────────────────▶
//! ```
//! An id is taken from the beginning of its creation. A creation goes on when its caller goes away, so that
//! nothing is left half made.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catamaran_guest_protocol::v1::ConfigureSandboxRequest;
use oci_spec::runtime::{LinuxResources, Process as SpecProcess};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::boot;
use crate::cgroup::{self, Version};
use crate::device_filter;
use crate::error::{Context, Error, Result};
use crate::process::{Ended, Process, Stdio};
use crate::process_tree;
use crate::reaper::{self, ExitWatch, Reaper};
use crate::runtime::parent::{self, Console, Started};
use crate::runtime::{self, Request};
use crate::sandbox;
use crate::spec;

/// Longest container or exec id.
const ID_MAX: usize = 128;
/// Most processes that execs may leave undeleted in a container.
const EXECS_MAX: usize = 4096;

/// A container whose first process exists.
struct Container {
    id: String,
    first: Arc<Process>,
    started: Mutex<bool>,
    execs: Mutex<HashMap<String, Slot<Process>>>,
}

/// Whom a signal reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The process.
    Process,
    /// The process and what it started, of the container's.
    Tree,
    /// Every process of the container.
    Container,
}

enum Slot<T> {
    Creating,
    Ready(Arc<T>),
}

/// All of them.
pub(crate) struct Containers {
    version: Version,
    reaper: Arc<Reaper>,
    containers: Mutex<HashMap<String, Slot<Container>>>,
    /// Init of the shared PID namespace.
    pause: Mutex<Option<i32>>,
}

impl Containers {
    pub(crate) fn new(version: Version, reaper: Arc<Reaper>) -> Self {
        Self {
            version,
            reaper,
            containers: Mutex::default(),
            pause: Mutex::default(),
        }
    }

    /// Applies the pod's settings.
    pub(crate) fn configure_sandbox(&self, request: &ConfigureSandboxRequest) -> Result<()> {
        let mut pause = lock(&self.pause);
        *pause = sandbox::configure(request, *pause)?;
        Ok(())
    }

    /// Makes a container; its first process waits for [`Self::start`]. Returns its pid.
    pub(crate) async fn create(self: &Arc<Self>, id: String, json: Vec<u8>, stdin: bool) -> Result<i32> {
        check_id("container_id", &id)?;
        reserve(&mut lock(&self.containers), &id, || format!("container {id}"))?;
        let this = Arc::clone(self);
        finish(tokio::spawn(async move {
            let made = this.make(&id, &json, stdin).await;
            let mut containers = lock(&this.containers);
            match made {
                Ok(container) => {
                    let pid = container.first.pid;
                    containers.insert(id, Slot::Ready(Arc::new(container)));
                    Ok(pid)
                }
                Err(error) => {
                    drop(containers);
                    this.discard(&id).await;
                    lock(&this.containers).remove(&id);
                    Err(error)
                }
            }
        }))
        .await
    }

    async fn make(&self, id: &str, json: &[u8], stdin: bool) -> Result<Container> {
        let pause = *lock(&self.pause);
        let prepared = spec::prepare(json, id, pause)?;
        for (name, value) in &prepared.sysctls {
            sandbox::set_sysctl(name, value)?;
        }
        crate::working_directory::make(&prepared.spec)?;
        let bundle = bundle(id);
        fs::create_dir_all(&bundle).context(|| format!("cannot make {}", bundle.display()))?;
        let config = serde_json::to_vec(&prepared.spec).context(|| "cannot write the spec".into())?;
        fs::write(bundle.join("config.json"), config).context(|| "cannot write the spec".into())?;
        let console = prepared.terminal.then(Console::new).transpose()?;
        let (pipes, child) = if prepared.terminal {
            (None, Stdio::null_child()?)
        } else {
            let (stdio, child) = Stdio::pipes(stdin, prepared.owner.uid, prepared.owner.gid)?;
            (Some(stdio), child)
        };
        let request = Request::Create {
            id: id.to_owned(),
            bundle,
            console: console.as_ref().map(|console| console.path.clone()),
        };
        let started = parent::run(&self.reaper, &request, child, console.as_ref()).await?;
        if self.version == Version::V2 {
            for directory in cgroup::directories(self.version, &cgroup::container_path(id)) {
                device_filter::attach(&directory, &prepared.devices)?;
            }
        }
        let first = self.process(started, pipes, &prepared.owner, Some(id.to_owned()))?;
        Ok(Container {
            id: id.to_owned(),
            first,
            started: Mutex::new(false),
            execs: Mutex::default(),
        })
    }

    /// Ties a process to its streams and its end. `container` is the id where it is the first process.
    fn process(
        &self,
        started: Started,
        pipes: Option<Stdio>,
        owner: &spec::Owner,
        container: Option<String>,
    ) -> Result<Arc<Process>> {
        let Started { pid, exit, console } = started;
        let stdio = match (pipes, console) {
            (Some(stdio), _) => stdio,
            (None, Some(master)) => Stdio::terminal(master, owner.uid, owner.gid, owner.console_size)?,
            (None, None) => return Err(Error::State("the process's terminal did not come".into())),
        };
        let (sender, ended) = watch::channel(None);
        tokio::spawn(record_end(self.version, exit, container, sender));
        Ok(Arc::new(Process { pid, stdio, ended }))
    }

    /// Lets the first process of a created container run.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        {
            let mut started = lock(&container.started);
            if *started || container.first.state().is_some() {
                return Err(Error::State(format!(
                    "container {id} was started already or has ended"
                )));
            }
            *started = true;
        }
        let told = notify(id).await;
        if told.is_err() {
            *lock(&container.started) = false;
        }
        told.context(|| format!("cannot start container {id}"))
    }

    /// Starts a further process in a running container and returns its pid.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        id: String,
        exec_id: String,
        json: Vec<u8>,
        stdin: bool,
    ) -> Result<i32> {
        check_id("exec_id", &exec_id)?;
        let process: SpecProcess =
            serde_json::from_slice(&json).map_err(|error| Error::Invalid(format!("process: {error}")))?;
        let container = self.container(&id)?;
        if !*lock(&container.started) || container.first.state().is_some() {
            return Err(Error::State(format!("container {id} is not running")));
        }
        {
            let mut execs = lock(&container.execs);
            if execs.len() >= EXECS_MAX {
                return Err(Error::State(format!(
                    "container {id} has {EXECS_MAX} execs that were not deleted"
                )));
            }
            reserve(&mut execs, &exec_id, || {
                format!("exec {exec_id} of container {id}")
            })?;
        }
        let this = Arc::clone(self);
        finish(tokio::spawn(async move {
            let made = this.make_exec(&container, process, stdin).await;
            let mut execs = lock(&container.execs);
            match made {
                Ok(process) => {
                    let pid = process.pid;
                    execs.insert(exec_id, Slot::Ready(process));
                    Ok(pid)
                }
                Err(error) => {
                    execs.remove(&exec_id);
                    Err(error)
                }
            }
        }))
        .await
    }

    async fn make_exec(
        &self,
        container: &Container,
        process: SpecProcess,
        stdin: bool,
    ) -> Result<Arc<Process>> {
        let owner = spec::Owner::of(&process);
        let terminal = process.terminal().unwrap_or(false);
        let console = terminal.then(Console::new).transpose()?;
        let (pipes, child) = if terminal {
            (None, Stdio::null_child()?)
        } else {
            let (stdio, child) = Stdio::pipes(stdin, owner.uid, owner.gid)?;
            (Some(stdio), child)
        };
        let request = Request::Exec {
            bundle: bundle(&container.id),
            init: container.first.pid,
            process: Box::new(process),
            cgroup: cgroup::container_path(&container.id),
            cgroup_v2: self.version == Version::V2,
            console: console.as_ref().map(|console| console.path.clone()),
        };
        let started = parent::run(&self.reaper, &request, child, console.as_ref()).await?;
        self.process(started, pipes, &owner, None)
    }

    /// A process by its ids; an empty exec id is the container's first process.
    pub(crate) fn find(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(Arc::clone(&container.first));
        }
        match lock(&container.execs).get(exec_id) {
            Some(Slot::Ready(process)) => Ok(Arc::clone(process)),
            Some(Slot::Creating) => Err(Error::State(format!(
                "exec {exec_id} of container {id} is being made"
            ))),
            None => Err(Error::NotFound(format!("exec {exec_id} of container {id}"))),
        }
    }

    /// Sends a signal as far as `reach` says.
    pub(crate) fn signal(&self, id: &str, exec_id: &str, signal: u32, reach: Reach) -> Result<()> {
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (1..=64).contains(number))
            .ok_or_else(|| Error::Invalid(format!("signal {signal} is none of 1 to 64")))?;
        let process = self.find(id, exec_id)?;
        let path = cgroup::container_path(id);
        if reach == Reach::Tree && number != libc::SIGKILL {
            return Err(Error::Invalid(format!(
                "tree: only SIGKILL is sent to a process with all that it started, not {number}"
            )));
        }
        // The container's first process started everything in it, but for the execs, which go with it.
        if reach == Reach::Container || (reach == Reach::Tree && exec_id.is_empty()) {
            cgroup::signal_all(self.version, &path, number);
            return Ok(());
        }
        if process.state().is_some() {
            return Err(Error::NotFound(format!(
                "a running process {exec_id:?} of container {id}"
            )));
        }
        if reach == Reach::Tree {
            process_tree::kill(process.pid, || cgroup::pids(self.version, &path));
            return Ok(());
        }
        // SAFETY: kill has no memory effects; the process is our child and not reaped yet, so the pid is its.
        let result = unsafe { libc::kill(process.pid, number) };
        nix::errno::Errno::result(result)
            .map(drop)
            .context(|| format!("cannot signal container {id}"))
    }

    /// Forgets an ended process; the container with its cgroup and state for an empty exec id.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<()> {
        let process = self.find(id, exec_id)?;
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            if process.state().is_none() {
                return Err(Error::State(format!(
                    "exec {exec_id} of container {id} is still running"
                )));
            }
            lock(&container.execs).remove(exec_id);
            return Ok(());
        }
        if process.state().is_none() {
            if *lock(&container.started) {
                return Err(Error::State(format!("container {id} is still running")));
            }
            self.signal(id, "", libc::SIGKILL.cast_unsigned(), Reach::Process)?;
            process.wait().await?;
        }
        let (this, id) = (Arc::clone(self), id.to_owned());
        finish(tokio::spawn(async move {
            cgroup::remove(this.version, &cgroup::container_path(&id)).await?;
            this.discard(&id).await;
            lock(&this.containers).remove(&id);
            Ok(())
        }))
        .await
    }

    /// Changes a container's limits.
    pub(crate) fn update(&self, id: &str, json: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let mut resources: LinuxResources =
            serde_json::from_slice(json).map_err(|error| Error::Invalid(format!("resources: {error}")))?;
        if container.first.state().is_some() {
            return Err(Error::State(format!("container {id} has ended")));
        }
        // Device rules are made once, with the container; the caller sends what it had.
        resources.set_devices(None);
        cgroup::update(id, &resources)
    }

    /// cgroup path of a container, or of the whole pod for an empty id.
    pub(crate) fn cgroup_of(&self, id: &str) -> Result<String> {
        if id.is_empty() {
            return Ok(cgroup::POD.into());
        }
        self.container(id)
            .map(|container| cgroup::container_path(&container.id))
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        match lock(&self.containers).get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating) => Err(Error::State(format!("container {id} is being made"))),
            None => Err(Error::NotFound(format!("container {id}"))),
        }
    }

    /// Removes what a container may have left; what fails is said on the console and does not stop the rest.
    async fn discard(&self, id: &str) {
        if let Err(error) = cgroup::remove(self.version, &cgroup::container_path(id)).await {
            crate::console::say(&crate::error::chain(&error));
        }
        for directory in [bundle(id), PathBuf::from(runtime::STATE).join(id)] {
            match fs::remove_dir_all(&directory) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    crate::console::say(&format!("cannot remove {}: {error}", directory.display()));
                }
                _ => {}
            }
        }
    }
}

/// Waits for a process's end and tells it. With a container's first process the rest of the container ends,
/// also where a shared PID namespace would keep it.
async fn record_end(
    version: Version,
    exit: ExitWatch,
    container: Option<String>,
    sender: watch::Sender<Option<Ended>>,
) {
    let exit = reaper::ended(exit).await;
    let oom_killed = container.is_some_and(|id| {
        let path = cgroup::container_path(&id);
        cgroup::signal_all(version, &path, libc::SIGKILL);
        cgroup::oom_kills(version, &path) > 0
    });
    sender.send_replace(Some(Ended {
        code: exit.code,
        at_ns: exit.at_ns,
        oom_killed,
    }));
}

/// Tells libcontainer's waiting init to go on.
async fn notify(id: &str) -> std::io::Result<()> {
    let path = PathBuf::from(runtime::STATE).join(id).join("notify.sock");
    // A socket path has 108 bytes; through a descriptor of its directory it always fits.
    let directory = fs::File::open(path.parent().unwrap_or(&path))?;
    let short = format!(
        "/proc/self/fd/{}/notify.sock",
        std::os::fd::AsRawFd::as_raw_fd(&directory)
    );
    let mut socket = UnixStream::connect(short).await?;
    socket.write_all(b"start container").await?;
    socket.shutdown().await
}

fn bundle(id: &str) -> PathBuf {
    PathBuf::from(boot::STATE).join("containers").join(id)
}

fn check_id(field: &str, id: &str) -> Result<()> {
    let good = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-');
    if (1..=ID_MAX).contains(&id.len())
        && id.chars().all(good)
        && id.starts_with(|letter: char| letter.is_ascii_alphanumeric())
    {
        Ok(())
    } else {
        Err(Error::Invalid(format!(
            "{field} must be 1 to {ID_MAX} of [A-Za-z0-9._-], the first no sign"
        )))
    }
}

fn reserve<T>(slots: &mut HashMap<String, Slot<T>>, id: &str, name: impl Fn() -> String) -> Result<()> {
    if slots.contains_key(id) {
        return Err(Error::Exists(name()));
    }
    slots.insert(id.to_owned(), Slot::Creating);
    Ok(())
}

/// Waits for work that goes on without its caller.
async fn finish<T>(work: tokio::task::JoinHandle<Result<T>>) -> Result<T> {
    work.await.context(|| "the request was lost".into())?
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> Arc<Containers> {
        Arc::new(Containers::new(Version::V2, Arc::new(Reaper::default())))
    }

    #[test]
    fn ids_are_single_path_components() {
        assert!(check_id("container_id", &"a".repeat(64)).is_ok());
        for id in ["", ".", "..", "a/b", "-x", &"a".repeat(129)] {
            assert!(check_id("container_id", id).is_err(), "{id}");
        }
    }

    #[tokio::test]
    async fn unknown_ids_are_not_found() {
        let containers = containers();
        let not_found = |result: Result<()>| matches!(result, Err(Error::NotFound(_)));
        assert!(not_found(containers.start("x").await));
        assert!(not_found(containers.signal("x", "", 9, Reach::Process)));
        assert!(not_found(containers.delete("x", "").await));
        assert!(not_found(containers.find("x", "y").map(drop)));
        assert!(not_found(containers.update("x", b"{}")));
        assert_eq!(containers.cgroup_of("").unwrap(), "/pod");
    }

    #[tokio::test]
    async fn a_wrong_spec_leaves_no_id_taken() {
        let containers = containers();
        for _ in 0..2 {
            let made = containers
                .create("unit-test-wrong-spec".into(), b"{".to_vec(), false)
                .await;
            assert!(matches!(made, Err(Error::Invalid(_))), "{made:?}");
        }
    }

    #[test]
    fn a_signal_is_1_to_64() {
        for signal in [0, 65, u32::MAX] {
            assert!(matches!(
                containers().signal("x", "", signal, Reach::Container),
                Err(Error::Invalid(_))
            ));
        }
    }
}
