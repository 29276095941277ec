//! Starts a process in a running container: its cgroup, its namespaces, then user, capabilities and seccomp
//! as for the container's first process. libcontainer's tenant builder drops the seccomp profile, so this is
//! our own; the pieces (capabilities, seccomp, terminal) are libcontainer's.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::{capabilities, seccomp, tty};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{ForkResult, Gid, Uid, fork, setsid};
use oci_spec::runtime::{LinuxSeccomp, Process, Spec};

use super::child::Failure;
use super::payload;
use crate::cgroup::{self, Version};
use crate::error::chain;

/// The request.
pub(super) struct Exec {
    pub(super) bundle: PathBuf,
    pub(super) init: i32,
    pub(super) process: Process,
    pub(super) cgroup: String,
    pub(super) cgroup_v2: bool,
    pub(super) console: Option<PathBuf>,
}

/// Namespaces that a container may have of its own, with their file names in `/proc/<pid>/ns`.
const NAMESPACES: [(&str, CloneFlags); 7] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Starts the process and returns its pid in this process's PID namespace, once it has execed.
pub(super) fn run(exec: &Exec) -> Result<i32, Failure> {
    let spec = Spec::load(exec.bundle.join("config.json")).map_err(|error| chain(&error))?;
    let filter = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let mut process = exec.process.clone();
    if process.capabilities().is_none() {
        // Never more than the container's own.
        process.set_capabilities(
            spec.process()
                .as_ref()
                .and_then(|first| first.capabilities().clone()),
        );
    }
    let init = open_pidfd(exec.init).map_err(|error| format!("the container's process is gone: {error}"))?;
    let flags = differing_namespaces(exec.init)
        .map_err(|error| format!("cannot read the container's namespaces: {error}"))?;
    let console = match &exec.console {
        Some(path) => Some(
            UnixStream::connect(path).map_err(|error| format!("cannot reach the console socket: {error}"))?,
        ),
        None => None,
    };
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|error| format!("cannot set oom_score_adj: {error}"))?;
    }
    // Processes of the container must not look into this one (CVE-2016-9962, CVE-2019-5736).
    // SAFETY: PR_SET_DUMPABLE takes one integer.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(format!("cannot become undumpable: {}", std::io::Error::last_os_error()).into());
    }
    let version = if exec.cgroup_v2 { Version::V2 } else { Version::V1 };
    cgroup::join(version, &exec.cgroup).map_err(|error| chain(&error))?;
    setns(&init, flags).map_err(|error| format!("cannot join the container's namespaces: {error}"))?;
    let (mut failure, report) = std::io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|error| format!("cannot fork in the container: {error}"))? {
        ForkResult::Child => {
            drop(failure);
            let message = become_process(&process, filter.as_ref(), console, flags);
            let mut report = report;
            // The parent waits for this or for the end of the pipe; nothing else can be told.
            let _ = report.write_all(message.as_bytes());
            // SAFETY: ends the forked child without running the parent's exit handlers.
            unsafe { libc::_exit(255) }
        }
        ForkResult::Parent { child } => {
            drop((report, console));
            let mut message = String::new();
            failure
                .read_to_string(&mut message)
                .map_err(|error| format!("cannot hear from the new process: {error}"))?;
            if message.is_empty() {
                return Ok(child.as_raw());
            }
            // Reaped here, since nobody was told of it.
            let _ = nix::sys::wait::waitpid(child, None);
            Err(match message.strip_prefix(payload::MARK) {
                Some(mistake) => Failure::Invalid(mistake.to_owned()),
                None => Failure::Failed(message),
            })
        }
    }
}

fn open_pidfd(pid: i32) -> std::io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes a pid and flags.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(std::io::Error::last_os_error)?;
    // SAFETY: the kernel returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Joining a namespace that one is in already is pointless, and an error for the user namespace.
fn differing_namespaces(pid: i32) -> std::io::Result<CloneFlags> {
    let mut flags = CloneFlags::empty();
    for (name, flag) in NAMESPACES {
        let own = match std::fs::read_link(format!("/proc/self/ns/{name}")) {
            // The kernel has no such namespaces.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            own => own?,
        };
        if own != std::fs::read_link(format!("/proc/{pid}/ns/{name}"))? {
            flags |= flag;
        }
    }
    Ok(flags)
}

/// Becomes the process; returns the reason where that fails.
fn become_process(
    process: &Process,
    filter: Option<&LinuxSeccomp>,
    console: Option<UnixStream>,
    joined: CloneFlags,
) -> String {
    match set_up(process, filter, console, joined) {
        Ok(()) => format!("{}{}", payload::MARK, payload::exec(process, None)),
        Err(message) => message,
    }
}

fn set_up(
    process: &Process,
    filter: Option<&LinuxSeccomp>,
    console: Option<UnixStream>,
    joined: CloneFlags,
) -> Result<(), String> {
    let syscall = create_syscall();
    setsid().map_err(|error| format!("cannot make a session: {error}"))?;
    if joined.contains(CloneFlags::CLONE_NEWUSER) {
        syscall
            .set_id(Uid::from_raw(0).as_raw().into(), Gid::from_raw(0).as_raw().into())
            .map_err(|error| format!("cannot become root of the user namespace: {}", chain(&error)))?;
    }
    if let Some(console) = console {
        tty::setup_console(
            &*SyscallType::default().create_syscall(),
            console.into_raw_fd(),
            false,
        )
        .map_err(|error| format!("cannot make a terminal: {}", chain(&error)))?;
    }
    for limit in process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .map_err(|error| format!("cannot set limit {:?}: {}", limit.typ(), chain(&error)))?;
    }
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, so it comes before the privileges go; with it, last.
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        // SAFETY: PR_SET_NO_NEW_PRIVS takes 1 and zeros.
        if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
            return Err(format!(
                "cannot set no_new_privs: {}",
                std::io::Error::last_os_error()
            ));
        }
    }
    if let Some(umask) = process.user().umask() {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    }
    let directory = process.cwd();
    // As root first: directories that the user may not search are still his working directory, as in runc.
    let entered = std::env::set_current_dir(directory);
    let groups: Vec<_> = process
        .user()
        .additional_gids()
        .iter()
        .flatten()
        .copied()
        .collect();
    set_groups(&groups)?;
    syscall
        .set_id(process.user().uid().into(), process.user().gid().into())
        .map_err(|error| {
            format!(
                "cannot become user {}:{}: {}",
                process.user().uid(),
                process.user().gid(),
                chain(&error)
            )
        })?;
    if let Some(filter) = filter.filter(|_| !no_new_privileges) {
        load_filter(filter)?;
    }
    capabilities::reset_effective(&*syscall)
        .map_err(|error| format!("cannot reset capabilities: {}", chain(&error)))?;
    if let Some(wanted) = process.capabilities() {
        capabilities::drop_privileges(wanted, &*syscall)
            .map_err(|error| format!("cannot set capabilities: {}", chain(&error)))?;
    }
    if let Err(error) = entered {
        std::env::set_current_dir(directory)
            .map_err(|_| format!("cannot enter {}: {error}", directory.display()))?;
    }
    close_on_exec()?;
    if let Some(filter) = filter.filter(|_| no_new_privileges) {
        load_filter(filter)?;
    }
    Ok(())
}

fn set_groups(groups: &[u32]) -> Result<(), String> {
    // SAFETY: a pointer to as many groups as are told.
    let result = unsafe { libc::setgroups(groups.len(), groups.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(format!("cannot set groups: {}", std::io::Error::last_os_error()))
    }
}

fn load_filter(filter: &LinuxSeccomp) -> Result<(), String> {
    if seccomp::is_notify(filter) {
        return Err("seccomp notification is not served in a guest".into());
    }
    seccomp::initialize_seccomp(filter)
        .map(drop)
        .map_err(|error| format!("cannot load the seccomp profile: {}", chain(&error)))
}

fn close_on_exec() -> Result<(), String> {
    // SAFETY: only marks descriptors.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        return Ok(());
    }
    // Before Linux 5.11: each of those that are open.
    let open = File::open("/proc/self/fd").map_err(|error| format!("cannot list descriptors: {error}"))?;
    let last = open.as_raw_fd().max(256);
    for fd in 3..=last {
        // SAFETY: a closed descriptor is refused with EBADF.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}
