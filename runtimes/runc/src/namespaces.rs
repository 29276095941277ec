//! The pod's namespaces without a pause process: a short-lived child is born into new ones, the shim opens
//! them and keeps the descriptors, so that they end with the shim and nothing can leak. Runtimes join them by
//! `/proc/<shim>/fd/<n>`. Only where the pod shares its PID namespace the child stays, as that namespace's
//! init, and dies with the shim.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catamaran_sandbox::pod_spec::{IdMapping, PidNamespace, PodSpec};
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, signal, sigprocmask};
use nix::unistd::{Gid, Pid, Uid, pipe2, setgroups, setresgid, setresuid};
use tokio::sync::oneshot;

use crate::confine::{self, confine};
use crate::mounts;
use crate::reaper::{Exit, Reaper, open_pidfd};
use crate::sysctl::{self, Scope, SysctlError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespaceError {
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("sysctl {0} would change the node: the pod is in the host's namespace")]
    HostSysctl(String),
    #[error("{0}")]
    Child(String),
    #[error("{doing}")]
    Io { doing: String, source: std::io::Error },
}

fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> NamespaceError {
    let doing = doing.into();
    move |source| NamespaceError::Io { doing, source }
}

/// See the module. Dropping it releases the namespaces; the init must be ended by [`Self::end_init`].
pub(crate) struct PinnedNamespaces {
    pub(crate) ipc: Option<OwnedFd>,
    pub(crate) uts: Option<OwnedFd>,
    pub(crate) user: Option<OwnedFd>,
    pub(crate) pid: Option<OwnedFd>,
    init: Option<Init>,
}

/// The init of a shared PID namespace.
struct Init {
    pid: Pid,
    /// Its number may be another's once the reaper has seen its end.
    pidfd: OwnedFd,
}

/// What the child has to do.
struct Plan {
    flags: CloneFlags,
    hostname: String,
    /// Written by the child, in the new IPC namespace, and in the new network namespace if there is one.
    sysctls: Vec<(PathBuf, String)>,
    stays: bool,
}

impl PinnedNamespaces {
    /// Makes the namespaces of `spec`, sets hostname and sysctls. The second value resolves when the init of a
    /// shared PID namespace has ended.
    pub(crate) fn create(
        spec: &PodSpec,
        reaper: &Arc<Reaper>,
    ) -> Result<(Self, Option<oneshot::Receiver<Exit>>), NamespaceError> {
        let (network_sysctls, mut sysctls) = sort_sysctls(spec)?;
        let user = spec.namespaces.user.is_some();
        if user {
            // By the pod's root: ids in them (ping_group_range) are read in the writer's user namespace.
            sysctls.extend(network_sysctls);
        } else if let Some(network) = &spec.namespaces.network
            && !network_sysctls.is_empty()
        {
            in_network_namespace(network, move || {
                network_sysctls
                    .iter()
                    .try_for_each(|(path, value)| write(path, value))
            })?;
        }
        let stays = spec.namespaces.pid == PidNamespace::Pod;
        let mut flags = CloneFlags::empty();
        flags.set(CloneFlags::CLONE_NEWIPC, !spec.namespaces.host_ipc);
        flags.set(CloneFlags::CLONE_NEWUTS, !spec.hostname.is_empty());
        flags.set(CloneFlags::CLONE_NEWPID, stays);
        flags.set(CloneFlags::CLONE_NEWUSER, user);
        // In a user namespace its own network is made: one that the node's owns would be closed to its root.
        flags.set(
            CloneFlags::CLONE_NEWNET,
            user && spec.namespaces.network.is_some(),
        );
        let mut pinned = Self {
            ipc: None,
            uts: None,
            user: None,
            pid: None,
            init: None,
        };
        if flags.is_empty() {
            return Ok((pinned, None));
        }
        let plan = Plan {
            flags,
            hostname: spec.hostname.clone(),
            sysctls,
            stays,
        };
        let _expected = reaper.expect();
        let mut child = Child::spawn(&plan)?;
        let adopted = pinned.adopt(&mut child, spec, flags);
        if let Err(error) = adopted {
            child.kill();
            return Err(error);
        }
        if !stays {
            // The child sees the pipe close and exits; the reaper takes it.
            return Ok((pinned, None));
        }
        child.go.write_all(b"s").map_err(io("keep the pod's init"))?;
        // Dead or alive it is there: this thread reaps.
        let pidfd = open_pidfd(child.pid.as_raw())
            .ok_or_else(|| NamespaceError::Child("the pod's init cannot be followed".to_owned()))?;
        pinned.init = Some(Init {
            pid: child.pid,
            pidfd,
        });
        Ok((pinned, Some(reaper.watch(child.pid.as_raw()))))
    }

    fn adopt(&mut self, child: &mut Child, spec: &PodSpec, flags: CloneFlags) -> Result<(), NamespaceError> {
        let proc = PathBuf::from(format!("/proc/{}", child.pid));
        if let Some(user) = &spec.namespaces.user {
            write_map(&proc.join("uid_map"), &user.uids)?;
            write_map(&proc.join("gid_map"), &user.gids)?;
        }
        child
            .go
            .write_all(b"m")
            .map_err(io("start the namespace child"))?;
        child.wait_ready()?;
        let open = |flag: CloneFlags, name: &str| {
            if !flags.contains(flag) {
                return Ok(None);
            }
            let path = proc.join("ns").join(name);
            File::open(&path)
                .map(|file| Some(OwnedFd::from(file)))
                .map_err(io(format!("open {}", path.display())))
        };
        self.ipc = open(CloneFlags::CLONE_NEWIPC, "ipc")?;
        self.uts = open(CloneFlags::CLONE_NEWUTS, "uts")?;
        self.user = open(CloneFlags::CLONE_NEWUSER, "user")?;
        self.pid = open(CloneFlags::CLONE_NEWPID, "pid")?;
        if let Some(network) = &spec.namespaces.network
            && flags.contains(CloneFlags::CLONE_NEWNET)
        {
            pin(&proc.join("ns/net"), network)?;
            in_network_namespace(network, raise_loopback)?;
        }
        Ok(())
    }

    /// The init of a shared PID namespace.
    pub(crate) fn init(&self) -> Option<u32> {
        self.init.as_ref().map(|init| init.pid.as_raw().unsigned_abs())
    }

    /// Kills the init of a shared PID namespace, and with it everything in there.
    pub(crate) fn end_init(&mut self) {
        if let Some(init) = self.init.take()
            && let Err(error) = rustix::process::pidfd_send_signal(&init.pidfd, rustix::process::Signal::KILL)
        {
            tracing::debug!(%error, "the pod's init");
        }
    }
}

/// Mounts a namespace on a file, which is made. The pin is the daemon's to remove, as every pod's is.
fn pin(namespace: &Path, path: &Path) -> Result<(), NamespaceError> {
    let what = || format!("pin the network namespace at {}", path.display());
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io(what()))?;
    // A first attempt may have failed after this.
    mounts::unmount_all(path).map_err(|error| io(what())(std::io::Error::other(error)))?;
    let bind = MsFlags::MS_BIND;
    mount(Some(namespace), path, None::<&str>, bind, None::<&str>).map_err(|errno| io(what())(errno.into()))
}

/// netdevice(7), in the thread's network namespace.
fn raise_loopback() -> std::io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request lives longer than the call and has the size that the command takes.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// A user namespace with these mappings, which lives as long as its descriptor. For a process with one thread.
pub(crate) fn new_user_namespace(uids: &[IdMapping], gids: &[IdMapping]) -> Result<OwnedFd, NamespaceError> {
    let plan = Plan {
        flags: CloneFlags::CLONE_NEWUSER,
        hostname: String::new(),
        sysctls: Vec::new(),
        stays: false,
    };
    let child = Child::spawn(&plan)?;
    let proc = PathBuf::from(format!("/proc/{}", child.pid));
    let opened = write_map(&proc.join("uid_map"), uids)
        .and_then(|()| write_map(&proc.join("gid_map"), gids))
        .and_then(|()| File::open(proc.join("ns/user")).map_err(io("open the new user namespace")));
    child.kill();
    // The shim's reaper may have been quicker.
    let _ = nix::sys::wait::waitpid(child.pid, None);
    Ok(opened?.into())
}

/// By which others join a namespace that this process holds. The dot keeps runc from 1.2 on from taking a path
/// that begins with `/proc/<pid>/` for that process's own user namespace, whose maps it then reads and misses ours.
pub(crate) fn path_of(fd: &OwnedFd) -> String {
    format!("/proc/./{}/fd/{}", std::process::id(), fd.as_raw_fd())
}

type Files = Vec<(PathBuf, String)>;

fn sort_sysctls(spec: &PodSpec) -> Result<(Files, Files), NamespaceError> {
    let (mut network, mut ipc) = (Files::new(), Files::new());
    for (name, value) in &spec.sysctls {
        let (scope, path) = sysctl::locate(name)?;
        let (list, hosts) = match scope {
            Scope::Network => (&mut network, spec.namespaces.network.is_none()),
            Scope::Ipc => (&mut ipc, spec.namespaces.host_ipc),
        };
        if hosts {
            return Err(NamespaceError::HostSysctl(name.clone()));
        }
        list.push((path, value.clone()));
    }
    Ok((network, ipc))
}

fn write(path: &Path, value: &str) -> std::io::Result<()> {
    std::fs::write(path, value).map_err(|error| {
        std::io::Error::new(
            error.kind(),
            format!("write {value:?} to {}: {error}", path.display()),
        )
    })
}

fn write_map(path: &Path, ranges: &[IdMapping]) -> Result<(), NamespaceError> {
    let line = |range: &IdMapping| format!("{} {} {}\n", range.container_id, range.host_id, range.length);
    let text: String = ranges.iter().map(line).collect();
    std::fs::write(path, text).map_err(io(format!("write {}", path.display())))
}

/// Runs `work` in a network namespace, on a thread of its own that ends with it.
pub(crate) fn in_network_namespace<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, NamespaceError> {
    let namespace = File::open(path).map_err(io(format!("open network namespace {}", path.display())))?;
    let thread = std::thread::Builder::new()
        .stack_size(128 * 1024)
        .spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        })
        .map_err(io("start a thread"))?;
    match thread.join() {
        Ok(result) => result.map_err(io("work in the network namespace")),
        Err(_) => Err(NamespaceError::Child(
            "the thread in the network namespace panicked".to_owned(),
        )),
    }
}

/// The shim's end of the child.
struct Child {
    pid: Pid,
    /// "m": the maps are written; "s": stay; closing it: exit.
    go: File,
    /// "r", or what went wrong.
    ready: File,
}

impl Child {
    fn spawn(plan: &Plan) -> Result<Self, NamespaceError> {
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|error| io("make a pipe")(error.into()));
        let (go_read, go_write) = pipe()?;
        let (ready_read, ready_write) = pipe()?;
        let flags = libc::c_long::from(plan.flags.bits() | libc::SIGCHLD);
        // SAFETY: without CLONE_VM and a stack this is fork: the child runs on a copy of this memory. The
        // process has one thread, so no lock is held by a thread that the child lacks.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid < 0 {
            let error = std::io::Error::last_os_error();
            return Err(io(format!("make namespaces ({:?})", plan.flags))(error));
        }
        if pid == 0 {
            drop((go_write, ready_read));
            let run = std::panic::AssertUnwindSafe(|| child_main(plan, go_read.into(), ready_write.into()));
            let code = std::panic::catch_unwind(run).unwrap_or(101);
            // SAFETY: ends the child here; the shim's code must not go on in it, nor its destructors.
            unsafe { libc::_exit(code) };
        }
        let pid = i32::try_from(pid).map_err(|error| NamespaceError::Child(error.to_string()))?;
        Ok(Self {
            pid: Pid::from_raw(pid),
            go: go_write.into(),
            ready: ready_read.into(),
        })
    }

    fn wait_ready(&mut self) -> Result<(), NamespaceError> {
        let mut said = String::new();
        let mut byte = [0];
        if self
            .ready
            .read(&mut byte)
            .map_err(io("hear from the namespace child"))?
            == 1
            && byte == *b"r"
        {
            return Ok(());
        }
        said.extend(
            byte.iter()
                .filter(|byte| **byte != 0)
                .map(|byte| char::from(*byte)),
        );
        self.ready
            .read_to_string(&mut said)
            .map_err(io("hear from the namespace child"))?;
        Err(NamespaceError::Child(if said.is_empty() {
            "the namespace child died".to_owned()
        } else {
            said
        }))
    }

    fn kill(&self) {
        if let Err(error) = kill(self.pid, Signal::SIGKILL) {
            tracing::debug!(%error, "the namespace child");
        }
    }
}

/// All that the child does. Returns its exit code.
fn child_main(plan: &Plan, mut go: File, mut ready: File) -> i32 {
    let mut byte = [0];
    if go.read(&mut byte).ok() != Some(1) {
        return 1;
    }
    if let Err(error) = set_up(plan, [go.as_raw_fd(), ready.as_raw_fd()]) {
        // Where the shim is gone there is nobody to tell.
        let _ = ready.write_all(error.to_string().as_bytes());
        return 1;
    }
    if ready.write_all(b"r").is_err() {
        return 1;
    }
    // Told to stay, or the shim has what it needs, or is gone.
    if go.read(&mut byte).ok() != Some(1) || !plan.stays {
        return 0;
    }
    drop((go, ready));
    confine::wait()
}

/// `pipes` are those to the shim.
fn set_up(plan: &Plan, pipes: [RawFd; 2]) -> std::io::Result<()> {
    // The shim's handlers write to pipes that it shares with this process.
    for number in Signal::iterator() {
        if !matches!(number, Signal::SIGKILL | Signal::SIGSTOP) {
            // SAFETY: default and ignore are no functions of this process.
            unsafe { signal(number, SigHandler::SigDfl) }?;
        }
    }
    // SAFETY: as above. Ignoring it lets the kernel reap what reparents to the init.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    if plan.flags.contains(CloneFlags::CLONE_NEWUSER) {
        setgroups(&[])?;
        setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
        setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
    }
    if plan.stays {
        // After the change of user, which would clear it. A shim that died before closes `go`.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        nix::sys::prctl::set_name(c"catamaran-init")?;
    }
    if plan.flags.contains(CloneFlags::CLONE_NEWUTS) {
        nix::unistd::sethostname(&plan.hostname)?;
    }
    plan.sysctls
        .iter()
        .try_for_each(|(path, value)| write(path, value))?;
    if plan.stays {
        // Before the shim goes on: no container sees it otherwise.
        let failed =
            |(doing, error)| std::io::Error::other(format!("confine the pod's init: {doing}: {error}"));
        confine(pipes).map_err(failed)?;
    }
    Ok(())
}
