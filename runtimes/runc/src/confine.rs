//! What the init of a shared PID namespace gives up, as it is a process of the node among a pod's: a container
//! that may trace (`SYS_PTRACE`) reaches whatever it reaches, by `/proc/1/root` and by making it run the
//! container's code. So it has nothing: an empty root, no descriptors, no capabilities, and only the system calls
//! to wait with. Its executable stays readable, as `/proc/1/exe`.
//!
//! Runs in a child after fork and before its parent goes on: it allocates nothing.

use std::io::Error;
use std::os::fd::RawFd;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

/// A step that failed.
pub(crate) type Failed = (&'static str, Error);

/// All of it, for good. `keep` are the descriptors by which the shim is told, pipes.
pub(crate) fn confine(keep: [RawFd; 2]) -> Result<(), Failed> {
    close_all_but(keep).map_err(|error| ("close descriptors", error))?;
    leave_root().map_err(|error| ("leave the node's root for an empty one", error))?;
    drop_capabilities().map_err(|error| ("drop capabilities", error))?;
    filter_calls().map_err(|error| ("filter system calls", error))
}

/// Waits until it is killed. Children are reaped by the kernel where SIGCHLD is ignored.
pub(crate) fn wait() -> ! {
    loop {
        // SAFETY: no descriptors, no time limit, no signal mask: returns when a signal was handled, so never.
        unsafe { libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0) };
    }
}

fn checked(result: libc::c_long) -> Result<(), Error> {
    if result == 0 {
        Ok(())
    } else {
        Err(Error::last_os_error())
    }
}

fn close_all_but(mut keep: [RawFd; 2]) -> Result<(), Error> {
    keep.sort_unstable();
    let [low, high] = keep.map(RawFd::cast_unsigned);
    for (first, end) in [(0, low), (low + 1, high), (high + 1, u32::MAX)] {
        if first < end {
            // SAFETY: nothing in this process uses a descriptor but those that are kept.
            checked(unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) })?;
        }
    }
    Ok(())
}

/// In a mount namespace of its own whose only mount is an empty read-only tmpfs. pivot_root(2) has the order;
/// `/proc` serves as a directory that is there.
fn leave_root() -> Result<(), Error> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), "/proc", Some("tmpfs"), flags, Some("mode=0555"))?;
    chdir("/proc")?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(chdir("/")?)
}

/// Every set, also the bounding one, and what an execve could give.
fn drop_capabilities() -> Result<(), Error> {
    /// `_LINUX_CAPABILITY_VERSION_3`, capset(2).
    const VERSION: u32 = 0x2008_0522;
    for capability in 0..64 {
        // SAFETY: takes a number.
        match checked(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into()) {
            // The kernel has no more.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 => break,
            result => result?,
        }
    }
    // Of this process: the effective, permitted and inheritable sets, twice 32 bits each.
    let (header, none) = ([VERSION, 0], [0u32; 6]);
    // SAFETY: both have the layout of the structures that the call reads, and outlive it.
    checked(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) })?;
    // SAFETY: takes numbers.
    checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())
}

/// EPERM for what waiting, hearing from the shim and ending do not need. A tracer cannot get around it: the kernel
/// asks the filter after the tracer.
fn filter_calls() -> Result<(), Error> {
    /// `AUDIT_ARCH_*` of linux/audit.h.
    #[cfg(target_arch = "x86_64")]
    const ARCH: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const ARCH: u32 = 0xc000_00b7;
    const ALLOWED: [libc::c_long; 9] = [
        libc::SYS_ppoll,
        libc::SYS_restart_syscall,
        libc::SYS_rt_sigreturn,
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    /// Loads the architecture, compares it, loads the number, compares it with each, and has two answers.
    const LENGTH: usize = 3 + ALLOWED.len() + 2;
    let of = |code: u32, k: u32, jt: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf: 0,
        k,
    };
    let (load, equal) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
    );
    let answer = libc::BPF_RET | libc::BPF_K;
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    let mut program = [of(answer, refuse, 0); LENGTH];
    // Offsets in seccomp_data: the number is the first field, the architecture the second.
    program[0] = of(load, 4, 0);
    program[1] = of(equal, ARCH, 0);
    // Of another architecture: to the refusal.
    program[1].jf = (LENGTH - 2 - 2) as u8;
    program[2] = of(load, 0, 0);
    for (place, number) in ALLOWED.iter().enumerate() {
        // To the last instruction.
        program[3 + place] = of(equal, *number as u32, (LENGTH - 1 - (3 + place) - 1) as u8);
    }
    program[LENGTH - 1] = of(answer, libc::SECCOMP_RET_ALLOW, 0);
    let program = libc::sock_fprog {
        len: LENGTH as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program outlives the call, which copies it.
    checked(
        unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
        }
        .into(),
    )
}
