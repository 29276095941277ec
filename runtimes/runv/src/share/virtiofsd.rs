//! Starts the vhost-user back end of the shared directory: the C virtiofsd that came with QEMU up to 7.2, or the
//! Rust one that followed it; their options differ.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use crate::cgroup::{self, Cgroup};
use crate::oom;
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
    kill: mpsc::Sender<()>,
    ended: watch::Receiver<Option<String>>,
    words: Tail,
}

impl Virtiofsd {
    /// Kills it and waits for its end.
    pub async fn stop(&self) {
        // Full: a kill is on its way. Closed: the process has ended.
        let _ = self.kill.try_send(());
        self.ended().await;
    }

    /// Answers when it has ended, with the way it ended and its last words.
    pub fn ended(&self) -> impl Future<Output = String> + Send + use<> {
        let mut ended = self.ended.clone();
        async move {
            match ended.wait_for(Option::is_some).await {
                Ok(how) => how.clone().unwrap_or_default(),
                Err(_) => "its supervisor is gone".to_owned(),
            }
        }
    }

    /// What it wrote last.
    #[must_use]
    pub fn last_words(&self) -> String {
        self.words.last_lines(3).join("; ")
    }
}

async fn supervise(
    mut child: Child,
    mut killed: mpsc::Receiver<()>,
    words: Tail,
    ended: watch::Sender<Option<String>>,
) {
    let status = tokio::select! {
        status = child.wait() => status,
        // Asked for, or the sender was dropped.
        _ = killed.recv() => {
            if let Err(error) = child.start_kill() {
                tracing::warn!(%error, "cannot end virtiofsd");
            }
            child.wait().await
        }
    };
    let mut how = match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("unknown end: {error}"),
    };
    if let Some(last) = words.last_lines(1).first() {
        how.push_str(&format!(": {last}"));
    }
    // Nobody may be listening any more.
    let _ = ended.send(Some(how));
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
    inherit(&mut command, listener.as_raw_fd(), cgroup.open_procs()?);
    let mut child = command.spawn()?;
    drop(listener);
    let words = child
        .stderr
        .take()
        .map(|stream| Tail::follow(stream).0)
        .unwrap_or_default();
    // Wrong arguments end it at once.
    if let Ok(status) = tokio::time::timeout(Duration::from_millis(15), child.wait()).await {
        return Err(io::Error::other(format!(
            "{}: {}",
            status?,
            words.last_lines(3).join("; ")
        )));
    }
    let (kill, killed) = mpsc::channel(1);
    let (sender, ended) = watch::channel(None);
    tokio::spawn(supervise(child, killed, words.clone(), sender));
    Ok((Virtiofsd { kill, ended, words }, connected))
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
/// one here), and the process dies with the shim. It joins the cgroup before it runs, as it forks at once and what it
/// has forked is not moved with it.
fn inherit(command: &mut Command, socket: i32, procs: Vec<File>) {
    let shim = nix::unistd::getpid();
    let child = move || {
        cgroup::join(&procs)?;
        oom::reset_own();
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
