//! The RuntimeDefault seccomp profile: what containers may call, everything else fails with EPERM.
//!
//! The list is the one that Docker and containerd have settled on over the years, so that an image that runs
//! there runs here. Left out on purpose: io_uring (its kernel attack surface), AF_VSOCK sockets (they reach the
//! hypervisor, past every network policy), kernel keyrings, userfaultfd. A call of a capability's own is
//! allowed with the capability. Names that a kernel or architecture lacks are skipped by the OCI runtimes.

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};

/// Allowed for everyone.
const ALLOWED: &str = "
    accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32
    clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
    clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
    eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate
    fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr
    flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate
    ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat getcpu getcwd
    getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid
    getresuid32 getrlimit get_robust_list getrusage getsid getsockname getsockopt get_thread_area gettid
    gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1
    inotify_rm_watch io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64 ioprio_get
    ioprio_set io_setup io_submit ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self
    lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr _llseek
    lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret
    mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal
    msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat
    _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free
    pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6
    pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom
    recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_getaffinity sched_getattr
    sched_getparam sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield
    seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg
    sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid
    setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit
    set_robust_list setsid setsockopt set_thread_area set_tid_address setuid setuid32 setxattr setxattrat
    shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall
    socketpair splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range
    syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64
    timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime
    timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime
    utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev";

#[cfg(target_arch = "x86_64")]
const OF_ARCHITECTURE: (&str, &[Arch]) = (
    "arch_prctl modify_ldt",
    &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
);
#[cfg(target_arch = "aarch64")]
const OF_ARCHITECTURE: (&str, &[Arch]) = (
    "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
    &[Arch::ScmpArchAarch64, Arch::ScmpArchArm],
);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OF_ARCHITECTURE: (&str, &[Arch]) = ("", &[]);

/// Allowed with a capability in the bounding set.
const WITH_CAPABILITY: [(Capability, &str); 15] = [
    (Capability::DacReadSearch, "open_by_handle_at"),
    (
        Capability::SysAdmin,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
         lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree open_tree_attr \
         perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (Capability::SysModule, "delete_module finit_module init_module"),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (Capability::SysPacct, "acct"),
    (
        Capability::SysPtrace,
        "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev",
    ),
    (Capability::SysRawio, "ioperm iopl"),
    (
        Capability::SysTime,
        "clock_settime clock_settime64 settimeofday stime",
    ),
    (Capability::SysTtyConfig, "vhangup"),
    (Capability::Syslog, "syslog"),
    (Capability::Bpf, "bpf"),
    (Capability::Perfmon, "perf_event_open"),
    (Capability::CheckpointRestore, "kcmp"),
];

/// personality(2): read it, Linux, Linux with 32-bit uname, and both with UNAME26.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Flags of clone(2) that make namespaces: cgroup, UTS, IPC, user, PID, network and mount.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

const AF_VSOCK: u64 = 40;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The profile of a container with this bounding set.
pub(crate) fn default_profile(bounding: &Capabilities) -> LinuxSeccomp {
    let mut rules = vec![allow(ALLOWED), allow(OF_ARCHITECTURE.0)];
    rules.extend(
        PERSONALITIES.map(|value| allow_if("personality", LinuxSeccompOperator::ScmpCmpEq, value, None)),
    );
    rules.push(allow_if(
        "socket",
        LinuxSeccompOperator::ScmpCmpNe,
        AF_VSOCK,
        None,
    ));
    for (capability, names) in WITH_CAPABILITY {
        if bounding.contains(&capability) {
            rules.push(allow(names));
        }
    }
    if !bounding.contains(&Capability::SysAdmin) {
        rules.push(allow_if(
            "clone",
            LinuxSeccompOperator::ScmpCmpMaskedEq,
            CLONE_NAMESPACES,
            Some(0),
        ));
        // Its flags are behind a pointer, which a filter cannot follow; with ENOSYS libc uses clone.
        let mut clone3 = allow("clone3");
        clone3
            .set_action(LinuxSeccompAction::ScmpActErrno)
            .set_errno_ret(Some(ENOSYS));
        rules.push(clone3);
    }
    rules.retain(|rule| !rule.names().is_empty());

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(OF_ARCHITECTURE.1.to_vec()))
        .set_syscalls(Some(rules));
    profile
}

fn allow(names: &str) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.split_whitespace().map(str::to_owned).collect());
    rule.set_action(LinuxSeccompAction::ScmpActAllow);
    rule
}

fn allow_if(name: &str, op: LinuxSeccompOperator, value: u64, value_two: Option<u64>) -> LinuxSyscall {
    let mut argument = LinuxSeccompArgBuilder::default()
        .index(0usize)
        .op(op)
        .value(value);
    if let Some(second) = value_two {
        argument = argument.value_two(second);
    }
    let argument = argument.build().expect("no field of the builder is required");
    let mut rule = allow(name);
    rule.set_args(Some(vec![argument]));
    rule
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn rules_of<'a>(profile: &'a LinuxSeccomp, name: &str) -> Vec<&'a LinuxSyscall> {
        let rules = profile.syscalls().as_ref().expect("rules").iter();
        rules
            .filter(|rule| rule.names().iter().any(|known| known == name))
            .collect()
    }

    #[test]
    fn each_call_once() {
        let names: Vec<&str> = ALLOWED.split_whitespace().collect();
        let unique: HashSet<&str> = names.iter().copied().collect();
        assert_eq!(names.len(), unique.len());
    }

    #[test]
    fn what_stays_shut() {
        let profile = default_profile(&Capabilities::new());
        for name in [
            "io_uring_setup",
            "io_uring_enter",
            "keyctl",
            "add_key",
            "request_key",
            "userfaultfd",
            "mount",
            "bpf",
            "unshare",
            "setns",
            "reboot",
            "kexec_load",
            "init_module",
            "open_by_handle_at",
            "swapon",
            "perf_event_open",
            "process_vm_readv",
            "settimeofday",
            "pivot_root",
            "chroot",
        ] {
            assert!(rules_of(&profile, name).is_empty(), "{name}");
        }
    }

    #[test]
    fn clone_depends_on_sys_admin() {
        let plain = default_profile(&Capabilities::new());
        let clone = rules_of(&plain, "clone");
        let argument = clone[0].args().as_ref().expect("args")[0];
        assert_eq!(
            (argument.value(), argument.value_two()),
            (CLONE_NAMESPACES, Some(0))
        );
        let clone3 = rules_of(&plain, "clone3");
        assert_eq!(
            (clone3[0].action(), clone3[0].errno_ret()),
            (LinuxSeccompAction::ScmpActErrno, Some(ENOSYS))
        );

        let admin = default_profile(&[Capability::SysAdmin].into_iter().collect());
        for name in ["clone", "clone3", "mount", "unshare"] {
            let rules = rules_of(&admin, name);
            assert_eq!(rules.len(), 1, "{name}");
            assert_eq!(
                (rules[0].action(), rules[0].args()),
                (LinuxSeccompAction::ScmpActAllow, &None),
                "{name}"
            );
        }
    }

    #[test]
    fn spelled_as_the_runtimes_read_it() {
        let json = serde_json::to_value(default_profile(&Capabilities::new())).expect("json");
        assert_eq!(json["defaultAction"], "SCMP_ACT_ERRNO");
        #[cfg(target_arch = "x86_64")]
        assert_eq!(
            json["architectures"],
            serde_json::json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
        );
        let text = json.to_string();
        for word in ["SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE", "SCMP_ACT_ALLOW"] {
            assert!(text.contains(word), "{word}");
        }
    }
}
