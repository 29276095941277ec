//! As whom and where a pod's VMM runs: its own user from a documented range, the pod's cgroup and network
//! namespace, no privileges to gain, no core dump of guest memory, and death with the shim.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tokio::process::Command;

use crate::cgroup::Cgroup;

/// First of the user (and group) ids that VMMs run as; [`IDS`] follow. The range must belong to nobody else:
/// user and group databases, container user namespaces.
pub const FIRST_ID: u32 = 1_879_048_192;
/// How many there are.
pub const IDS: u32 = 1 << 20;

/// A user id that no other VM of this node has.
#[derive(Debug)]
pub struct VmUser {
    id: u32,
    claim: PathBuf,
}

impl VmUser {
    /// Claims one for a sandbox by a file below `directory`; claiming again gives the same one.
    ///
    /// # Errors
    /// Any I/O error, and when the whole range is claimed.
    pub fn claim(directory: &Path, sandbox: &str) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        // Spread by a hash, so that the first try is nearly always free (FNV-1a).
        let hash = sandbox.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        for step in 0..IDS {
            let id = FIRST_ID + (hash.wrapping_add(step)) % IDS;
            let claim = directory.join(id.to_string());
            match File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&claim)
            {
                Ok(mut file) => {
                    file.write_all(sandbox.as_bytes())?;
                    return Ok(Self { id, claim });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if std::fs::read_to_string(&claim).is_ok_and(|owner| owner == sandbox) {
                        return Ok(Self { id, claim });
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("every user id for VMs is in use"))
    }

    /// The claim on `id` as [`Self::claim`] made it, after a restart.
    #[must_use]
    pub fn claimed(directory: &Path, id: u32) -> Self {
        Self {
            id,
            claim: directory.join(id.to_string()),
        }
    }

    /// The user and group id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Gives the id back; fine when it was given back already.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn release(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.claim) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
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
        let first = VmUser::claim(directory.path(), "a").unwrap();
        let again = VmUser::claim(directory.path(), "a").unwrap();
        assert_eq!(first.id(), again.id());
        // Another sandbox that hashes to the same number gets the next.
        std::fs::write(directory.path().join(first.id().to_string()), "other").unwrap();
        let next = VmUser::claim(directory.path(), "a").unwrap();
        assert_ne!(next.id(), first.id());
        next.release().unwrap();
        next.release().unwrap();
        assert!((FIRST_ID..FIRST_ID + IDS).contains(&next.id()));
    }
}
