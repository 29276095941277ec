//! Starts the vhost-user back end of the shared directory: the C virtiofsd that came with QEMU up to 7.2, or the
//! Rust one that followed it; their options differ.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};

use crate::cgroup::Cgroup;
use crate::vmm::console::Tail;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    C,
    Rust,
}

/// A running virtiofsd; it ends when the VMM closes its side, and is killed when dropped.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    words: Tail,
}

impl Virtiofsd {
    /// Kills it and waits for its end.
    pub async fn stop(&mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::warn!(%error, "cannot end virtiofsd");
        }
    }

    /// What it wrote last.
    #[must_use]
    pub fn last_words(&self) -> String {
        self.words.last_lines(3).join("; ")
    }
}

async fn flavour(program: &Path) -> io::Result<Flavour> {
    let output = Command::new(program)
        .arg("--help")
        .stdin(Stdio::null())
        .output()
        .await?;
    let text = [output.stdout, output.stderr].concat();
    let has = |needle: &str| {
        text.windows(needle.len())
            .any(|window| window == needle.as_bytes())
    };
    if has("--shared-dir") {
        Ok(Flavour::Rust)
    } else if has("source=PATH") {
        Ok(Flavour::C)
    } else {
        Err(io::Error::other(
            "its --help is neither that of QEMU's virtiofsd nor that of the Rust one",
        ))
    }
}

/// Starts it on `directory` and connects.
pub(super) async fn start(
    program: &Path,
    directory: &Path,
    cgroup: &Cgroup,
) -> io::Result<(Virtiofsd, OwnedFd)> {
    let flavour = flavour(program).await?;
    // A name in the file system only until both ends have it.
    let path = directory.with_file_name("virtiofs.sock");
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (listener, connected) = socket_pair_by_name(&path)?;
    let mut command = Command::new(program);
    command.args(arguments(flavour, directory, listener.as_raw_fd()));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    inherit(&mut command, listener.as_raw_fd());
    let mut child = command.spawn()?;
    drop(listener);
    if let Some(pid) = child.id() {
        if let Some(procs) = cgroup.first_procs() {
            std::fs::write(procs, pid.to_string())?;
        }
        cgroup.adopt(pid)?;
    }
    let words = child
        .stderr
        .take()
        .map(|stream| Tail::follow(stream).0)
        .unwrap_or_default();
    // Wrong arguments end it at once; a later end shows at the VMM.
    if let Ok(status) = tokio::time::timeout(Duration::from_millis(15), child.wait()).await {
        return Err(io::Error::other(format!(
            "{}: {}",
            status?,
            words.last_lines(3).join("; ")
        )));
    }
    Ok((Virtiofsd { child, words }, connected))
}

/// A listening socket, and a connection that waits in its backlog; the name is gone again.
fn socket_pair_by_name(path: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
    // The path may be longer than a socket address: bind and connect by way of the open directory.
    let directory = std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd")
        .join(directory.as_raw_fd().to_string())
        .join(name);
    let listener = std::os::unix::net::UnixListener::bind(&short)?;
    let connected = std::os::unix::net::UnixStream::connect(&short);
    std::fs::remove_file(path)?;
    Ok((listener.into(), connected?.into()))
}

fn arguments(flavour: Flavour, directory: &Path, socket: i32) -> Vec<std::ffi::OsString> {
    let mut words: Vec<std::ffi::OsString> = vec![format!("--fd={socket}").into()];
    match flavour {
        Flavour::C => {
            let mut source = std::ffi::OsString::from("source=");
            source.push(directory);
            // Sub-mounts are not announced unless asked for: a container's volumes must look like plain directories.
            let options = "cache=auto,sandbox=namespace,xattr,log_level=warn";
            words.extend(["-f".into(), "--rlimit-nofile=0".into(), "-o".into(), source]);
            words.extend(["-o".into(), options.into()]);
        }
        Flavour::Rust => {
            words.extend(["--shared-dir".into(), directory.into(), "--cache=auto".into()]);
            words.extend(["--sandbox=namespace", "--xattr", "--rlimit-nofile=0"].map(Into::into));
            words.extend(["--no-announce-submounts", "--inode-file-handles=never"].map(Into::into));
            words.extend(["--log-level=warn"].map(Into::into));
        }
    }
    words
}

/// The socket is inherited, the limit of open files is raised as far as allowed (each file that the guest uses is
/// one here), and the process dies with the shim.
fn inherit(command: &mut Command, socket: i32) {
    let shim = nix::unistd::getpid();
    let child = move || {
        // SAFETY: only system calls with memory of this frame.
        unsafe {
            let mut limit = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
                limit.rlim_cur = limit.rlim_max;
                libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0
                || libc::fcntl(socket, libc::F_SETFD, 0) < 0
            {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() != shim.as_raw() {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Ok(())
    };
    // SAFETY: the closure is async-signal-safe: it makes system calls and allocates nothing.
    unsafe { command.pre_exec(child) };
}
