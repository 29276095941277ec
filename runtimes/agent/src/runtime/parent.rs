//! The agent's side of a runtime process.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{UnixListener, UnixStream};

use super::{Answer, ROLE, Request, SOCKET};
use crate::boot;
use crate::error::{Context, Error, Result};
use crate::reaper::{ExitWatch, Reaper};

/// Bound of one create or exec; generous, for emulated guests.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// Longest answer, bytes.
const ANSWER_MAX: u64 = 64 << 10;

/// Standard input, output and error of the new process.
pub(crate) struct ChildStdio {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// A process that was made.
pub(crate) struct Started {
    pub(crate) pid: i32,
    pub(crate) exit: ExitWatch,
    /// Master of its terminal.
    pub(crate) console: Option<OwnedFd>,
}

/// A socket at a path of its own, for the terminal's master; the path goes with the value.
pub(crate) struct Console {
    listener: UnixListener,
    pub(crate) path: PathBuf,
}

impl Console {
    pub(crate) fn new() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = PathBuf::from(format!(
            "{}/console-{}.sock",
            boot::STATE,
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        let listener = UnixListener::bind(&path).context(|| "cannot make the console socket".into())?;
        Ok(Self { listener, path })
    }

    async fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        stream
            .async_io(Interest::READABLE, || receive_descriptor(stream.as_raw_fd()))
            .await
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Nothing else can be done; the name is never used again.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn receive_descriptor(socket: RawFd) -> io::Result<OwnedFd> {
    let mut name = [0; 128];
    let mut slices = [io::IoSliceMut::new(&mut name)];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(
        socket,
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us and nothing else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*descriptor) });
        }
    }
    Err(io::Error::other("the console socket carried no terminal"))
}

/// Runs one request in a process of its own.
pub(crate) async fn run(
    reaper: &Reaper,
    request: &Request,
    stdio: ChildStdio,
    console: Option<&Console>,
) -> Result<Started> {
    let body = serde_json::to_vec(request).context(|| "cannot write the runtime's request".into())?;
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().context(|| "cannot make the runtime's socket".into())?;
    let helper = spawn(stdio, theirs.into()).context(|| "cannot start the runtime process".into())?;
    let helper_exit = reaper.watch(helper);
    let work = async {
        ours.set_nonblocking(true)?;
        let mut socket = UnixStream::from_std(ours)?;
        socket.write_all(&body).await?;
        let (read, mut write) = socket.split();
        write.shutdown().await?;
        let mut line = Vec::new();
        BufReader::new(read.take(ANSWER_MAX))
            .read_until(b'\n', &mut line)
            .await?;
        io::Result::Ok((line, socket))
    };
    // A copy of the socket may stay open in a half-made container, so the runtime process's end counts too.
    let mut gone = helper_exit.clone();
    let outcome = tokio::select! {
        biased;
        outcome = work => Ok(outcome),
        _ = gone.wait_for(Option::is_some) => Err("ended before it answered"),
        () = tokio::time::sleep(TIME_LIMIT) => Err("did not answer in time"),
    };
    let kill = || {
        // Once it has ended and was reaped, the pid may be anybody's.
        if helper_exit.borrow().is_none() {
            // SAFETY: kill has no memory effects, and the helper is our child that was not reaped.
            unsafe { libc::kill(helper, libc::SIGKILL) };
        }
    };
    let (line, socket) = match outcome {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            kill();
            return Err(error).context(|| "the runtime process cannot be talked to".into());
        }
        Err(what) => {
            let code = helper_exit
                .borrow()
                .map_or(String::new(), |exit| format!(", exit code {}", exit.code));
            kill();
            return Err(Error::State(format!(
                "the container's runtime process {what}{code}"
            )));
        }
    };
    let answer: Answer = match serde_json::from_slice(&line) {
        Ok(answer) => answer,
        Err(error) => {
            kill();
            let code = helper_exit
                .borrow()
                .map_or(String::new(), |exit| format!(" (exit code {})", exit.code));
            return Err(error).context(|| format!("the runtime process ended without an answer{code}"));
        }
    };
    let pid = match answer {
        Answer::Pid(pid) => pid,
        Answer::Invalid(message) => return Err(Error::Invalid(message)),
        Answer::Failed(message) => {
            return Err(Error::Failed {
                what: "the process cannot be made".into(),
                source: message.into(),
            });
        }
    };
    let exit = reaper.watch(pid);
    let console = match console {
        None => None,
        Some(console) => {
            let received = tokio::time::timeout(TIME_LIMIT, console.receive()).await;
            match received.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(master) => Some(master),
                Err(error) => {
                    release(&socket);
                    // SAFETY: as above; the process was made a moment ago and is watched.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                    return Err(error).context(|| "cannot receive the terminal".into());
                }
            }
        }
    };
    release(&socket);
    Ok(Started { pid, exit, console })
}

/// Lets the runtime process exit. Where it has gone already there is nobody to tell.
fn release(socket: &UnixStream) {
    let _ = socket.try_write(b"\n");
}

fn spawn(stdio: ChildStdio, socket: OwnedFd) -> io::Result<i32> {
    let mut command = Command::new(Path::new("/init"));
    command
        .arg(ROLE)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(stdio.stdin))
        .stdout(Stdio::from(stdio.stdout))
        .stderr(Stdio::from(stdio.stderr));
    let socket_fd = socket.as_raw_fd();
    // SAFETY: only dup2 and fcntl, which are async-signal-safe. std has moved the three stdio descriptors by
    // then, so 3 is free or the socket itself.
    unsafe {
        command.pre_exec(move || {
            if socket_fd == SOCKET {
                nix::errno::Errno::result(libc::fcntl(SOCKET, libc::F_SETFD, 0))?;
            } else {
                nix::errno::Errno::result(libc::dup2(socket_fd, SOCKET))?;
            }
            Ok(())
        });
    }
    // std would wait for the child only where its exec failed, before this returns.
    let child = command.spawn()?;
    drop(socket);
    i32::try_from(child.id()).map_err(io::Error::other)
}
