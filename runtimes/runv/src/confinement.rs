//! As whom and where a pod's VMM runs: its own user from a documented range, the pod's cgroup and network
//! namespace, no privileges to gain, no core dump of guest memory, and death with the shim.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::cgroup::Cgroup;
use crate::oom;

/// First of the user (and group) ids that VMMs run as; [`IDS`] follow. The range must belong to nobody else:
/// user and group databases, container user namespaces.
pub const FIRST_ID: u32 = 1_879_048_192;
/// How many there are.
pub const IDS: u32 = 1 << 20;

/// A user id that no other VM of this node has.
#[derive(Debug)]
pub struct VmUser {
    id: u32,
}

impl VmUser {
    /// Claims one for a sandbox by a file below `directory` with its id; claiming again gives the same one.
    ///
    /// # Errors
    /// Any I/O error, and when the whole range is claimed.
    pub fn claim(directory: &Path, sandbox: &str) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let _one = lock(directory)?;
        if let Some(id) = claimed(directory, sandbox)?.first() {
            return Ok(Self { id: *id });
        }
        // Complete before it has its name: a claim without an owner would be nobody's to release.
        let fresh = directory.join(FRESH);
        std::fs::write(&fresh, sandbox)?;
        // Spread by a hash, so that the first try is nearly always free (FNV-1a).
        let hash = sandbox.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        let mut taken = Err(io::Error::other("every user id for VMs is in use"));
        for step in 0..IDS {
            let id = FIRST_ID + (hash.wrapping_add(step)) % IDS;
            match std::fs::hard_link(&fresh, directory.join(id.to_string())) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                linked => {
                    taken = linked.map(|()| Self { id });
                    break;
                }
            }
        }
        std::fs::remove_file(&fresh)?;
        taken
    }

    /// The user and group id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Gives back what a sandbox has claimed; fine when it was given back already.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn release(directory: &Path, sandbox: &str) -> io::Result<()> {
        // Two clean-ups may run beside each other: without the lock the slower one could remove the claim of the
        // next owner.
        let _one = match lock(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            locked => locked?,
        };
        for id in claimed(directory, sandbox)? {
            std::fs::remove_file(directory.join(id.to_string()))?;
        }
        Ok(())
    }
}

/// A claim that is being made.
const FRESH: &str = ".new";

/// One claim or release at a time.
fn lock(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    file.lock()?;
    Ok(file)
}

/// What a sandbox has claimed, found by its id in the files: which number it got depends on who was there before.
fn claimed(directory: &Path, sandbox: &str) -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if std::fs::read(entry.path())? == sandbox.as_bytes() {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// Where and as whom the VMM's process runs.
#[derive(Debug)]
pub struct Confinement {
    /// User and group.
    pub id: u32,
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// Its cgroup, already made.
    pub cgroup: Cgroup,
    /// The process must open /dev/kvm.
    pub kvm: bool,
}

impl Confinement {
    /// Arranges that `command` runs confined and with `descriptors` inherited.
    ///
    /// # Errors
    /// When the network namespace or /dev/kvm cannot be opened.
    pub fn apply(&self, command: &mut Command, descriptors: Vec<RawFd>) -> io::Result<()> {
        let netns = File::open(&self.netns).map_err(|error| {
            io::Error::new(error.kind(), format!("open {}: {error}", self.netns.display()))
        })?;
        let procs = self
            .cgroup
            .first_procs()
            .map(|path| File::options().write(true).open(path))
            .transpose()?;
        let mut groups: Vec<libc::gid_t> = Vec::new();
        if self.kvm {
            groups.push(std::fs::metadata("/dev/kvm")?.gid());
        }
        let id = self.id;
        let shim = nix::unistd::getpid();
        let child = move || {
            // Before the user changes: afterwards the file is root's.
            oom::reset_own();
            // SAFETY: only system calls with memory that this closure owns; the thread is the child's only one.
            unsafe {
                if let Some(procs) = &procs {
                    check(libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1))?;
                }
                check(libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) as isize)?;
                let none = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                check(libc::setrlimit(libc::RLIMIT_CORE, &none) as isize)?;
                check(libc::setgroups(groups.len(), groups.as_ptr()) as isize)?;
                check(libc::setresgid(id, id, id) as isize)?;
                check(libc::setresuid(id, id, id) as isize)?;
                check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) as isize)?;
                // Changing the user clears this, so it comes after; and the shim may be gone already.
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) as isize)?;
                if libc::getppid() != shim.as_raw() {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                for descriptor in &descriptors {
                    check(libc::fcntl(*descriptor, libc::F_SETFD, 0) as isize)?;
                }
            }
            Ok(())
        };
        // SAFETY: the closure is async-signal-safe: it makes system calls and allocates nothing.
        unsafe { command.pre_exec(child) };
        Ok(())
    }

    /// Puts the running process where it could not put itself.
    ///
    /// # Errors
    /// Any error of the cgroup file system.
    pub fn adopt(&self, pid: u32) -> io::Result<()> {
        self.cgroup.adopt(pid)
    }
}

fn check(result: isize) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_differ_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let first = VmUser::claim(directory, "a").unwrap();
        assert_eq!(VmUser::claim(directory, "a").unwrap().id(), first.id());
        assert!((FIRST_ID..FIRST_ID + IDS).contains(&first.id()));
        // Another sandbox has the number that this one hashes to, so it gets the next, and keeps it.
        let claim = directory.join(first.id().to_string());
        std::fs::write(&claim, "other").unwrap();
        let next = VmUser::claim(directory, "a").unwrap();
        assert_ne!(next.id(), first.id());
        VmUser::release(directory, "other").unwrap();
        assert!(!claim.exists());
        assert_eq!(VmUser::claim(directory, "a").unwrap().id(), next.id());
        VmUser::release(directory, "a").unwrap();
        VmUser::release(directory, "a").unwrap();
        assert_eq!(std::fs::read_dir(directory).unwrap().count(), 0);
    }

    #[test]
    fn a_claim_that_was_cut_short_is_nobodys() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(FRESH), "").unwrap();
        VmUser::claim(directory.path(), "a").unwrap();
        VmUser::release(directory.path(), "a").unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        VmUser::release(&directory.path().join("none"), "a").unwrap();
    }
}
