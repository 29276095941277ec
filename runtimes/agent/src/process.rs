//! A process's standard streams on the agent's side. Output stays in the kernel's pipe or terminal until the
//! shim reads it: what nobody reads costs no memory of the agent and holds up its writer, and nothing is lost.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use catamaran_guest_protocol::MAX_CHUNK_BYTES;
use catamaran_guest_protocol::v1::OutputChunk;
use nix::fcntl::OFlag;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, mpsc, watch};
use tonic::Status;

use crate::error::{Context, Error, Result};
use crate::runtime::parent::ChildStdio;

/// Capacity of an output pipe; what a process may write ahead of its reader.
const PIPE_BYTES: i32 = 256 << 10;
/// Stream numbers of the protocol.
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) at_ns: i64,
    pub(crate) oom_killed: bool,
}

/// A container's first process or one started by exec.
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) stdio: Stdio,
    pub(crate) ended: watch::Receiver<Option<Ended>>,
}

impl Process {
    /// How it ended, if it did.
    pub(crate) fn state(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Result<Ended> {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| *ended);
        ended
            .ok()
            .flatten()
            .ok_or_else(|| Error::State("the guest is going down".into()))
    }
}

enum Source {
    Pipe(pipe::Receiver),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

enum Sink {
    Pipe(pipe::Sender),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

/// The agent's ends.
pub(crate) struct Stdio {
    stdin: Mutex<Option<Sink>>,
    stdout: Mutex<Option<Source>>,
    stderr: Mutex<Option<Source>>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

impl Stdio {
    /// Pipes; without `stdin` the process reads /dev/null. The pipes belong to the process's user, so that it
    /// can open /dev/stdout again.
    pub(crate) fn pipes(stdin: bool, uid: u32, gid: u32) -> Result<(Self, ChildStdio)> {
        let (out_read, out_write) = pipe()?;
        let (err_read, err_write) = pipe()?;
        for end in [&out_write, &err_write] {
            own(end, uid, gid)?;
        }
        let (sink, stdin) = if stdin {
            let (read, write) = pipe()?;
            own(&read, uid, gid)?;
            (
                Some(Sink::Pipe(
                    pipe::Sender::from_owned_fd(write).context(|| "cannot poll a pipe".into())?,
                )),
                read,
            )
        } else {
            (None, null()?)
        };
        let source = |fd| {
            pipe::Receiver::from_owned_fd(fd)
                .map(Source::Pipe)
                .context(|| "cannot poll a pipe".into())
        };
        let stdio = Self {
            stdin: Mutex::new(sink),
            stdout: Mutex::new(Some(source(out_read)?)),
            stderr: Mutex::new(Some(source(err_read)?)),
            terminal: None,
        };
        Ok((
            stdio,
            ChildStdio {
                stdin,
                stdout: out_write,
                stderr: err_write,
            },
        ))
    }

    /// For a process with a terminal, until its master comes.
    pub(crate) fn null_child() -> Result<ChildStdio> {
        Ok(ChildStdio {
            stdin: null()?,
            stdout: null()?,
            stderr: null()?,
        })
    }

    /// A terminal's master. The slave is given to the process's user.
    pub(crate) fn terminal(master: OwnedFd, uid: u32, gid: u32, size: Option<(u16, u16)>) -> Result<Self> {
        let open = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, open) };
        if slave >= 0 {
            // SAFETY: the kernel returned a new descriptor that nothing else owns.
            let slave = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(slave) };
            own(&slave, uid, gid)?;
        }
        if let Some((rows, columns)) = size {
            set_size(&master, rows, columns)?;
        }
        let flags = OFlag::O_NONBLOCK | OFlag::O_RDWR;
        nix::fcntl::fcntl(&master, nix::fcntl::FcntlArg::F_SETFL(flags))
            .context(|| "cannot set up the terminal".into())?;
        // SAFETY: an OwnedFd keeps its descriptor as long as it lives, here as long as the registration.
        let master = unsafe { AsyncFd::register(master) }
            .map_err(std::io::Error::from)
            .context(|| "cannot poll the terminal".into())?;
        let master = Arc::new(master);
        Ok(Self {
            stdin: Mutex::new(Some(Sink::Terminal(Arc::clone(&master)))),
            stdout: Mutex::new(Some(Source::Terminal(Arc::clone(&master)))),
            stderr: Mutex::new(None),
            terminal: Some(master),
        })
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        match &self.terminal {
            Some(terminal) => set_size(terminal.get_ref(), rows, columns),
            None => Err(Error::State("the process has no terminal".into())),
        }
    }

    /// Writes to stdin, waiting while the process does not read. What comes after its end or after the end of
    /// its stdin is dropped, as a terminal or shell would.
    pub(crate) async fn write(&self, data: &[u8], ended: &watch::Receiver<Option<Ended>>) -> Result<()> {
        let mut stdin = self.stdin.lock().await;
        let mut ended = ended.clone();
        let written = match &mut *stdin {
            None => return Err(Error::State("stdin is closed".into())),
            Some(sink) => {
                tokio::select! {
                    written = write_all(sink, data) => written,
                    _ = ended.wait_for(Option::is_some) => Ok(()),
                }
            }
        };
        match written {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EIO)) => {
                *stdin = None;
                Ok(())
            }
            Err(error) => Err(error).context(|| "cannot write to stdin".into()),
        }
    }

    /// Closes stdin. A terminal stays open: it is one file with the output.
    pub(crate) async fn close_stdin(&self) {
        let mut stdin = self.stdin.lock().await;
        if let Some(Sink::Pipe(_)) = &*stdin {
            *stdin = None;
        }
    }
}

/// Streams a process's output from where the last reader ended. A second reader waits for the first to go.
pub(crate) fn output(process: &Arc<Process>) -> mpsc::Receiver<std::result::Result<OutputChunk, Status>> {
    let (sender, receiver) = mpsc::channel(2);
    for stream in [STDOUT, STDERR] {
        let (process, sender) = (Arc::clone(process), sender.clone());
        tokio::spawn(async move {
            let source = if stream == STDOUT {
                &process.stdio.stdout
            } else {
                &process.stdio.stderr
            };
            let mut source = tokio::select! {
                source = source.lock() => source,
                () = sender.closed() => return,
            };
            let ended = loop {
                let Some(open) = &mut *source else { break true };
                // Room first: bytes that were read can be sent.
                let Ok(permit) = sender.reserve().await else {
                    break false;
                };
                let mut buffer = vec![0; MAX_CHUNK_BYTES];
                let read = tokio::select! {
                    biased;
                    () = sender.closed() => break false,
                    read = read(open, &mut buffer) => read,
                };
                match read {
                    Ok(0) => break true,
                    Ok(length) => {
                        buffer.truncate(length);
                        permit.send(Ok(OutputChunk { stream, data: buffer }));
                    }
                    Err(error) => {
                        permit.send(Err(Status::internal(format!(
                            "cannot read the process's output: {error}"
                        ))));
                        break true;
                    }
                }
            };
            if ended {
                *source = None;
            }
        });
    }
    receiver
}

async fn read(source: &mut Source, buffer: &mut [u8]) -> io::Result<usize> {
    match source {
        Source::Pipe(pipe) => pipe.read(buffer).await,
        Source::Terminal(master) => loop {
            let mut ready = master.readable().await?;
            let result = ready.try_io(|fd| nix::unistd::read(fd.get_ref(), buffer).map_err(io::Error::from));
            match result {
                // The last process has closed the terminal.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(0),
                Ok(result) => return result,
                Err(_) => {}
            }
        },
    }
}

async fn write_all(sink: &mut Sink, mut data: &[u8]) -> io::Result<()> {
    match sink {
        Sink::Pipe(pipe) => pipe.write_all(data).await,
        Sink::Terminal(master) => {
            while !data.is_empty() {
                let mut ready = master.writable().await?;
                if let Ok(written) =
                    ready.try_io(|fd| nix::unistd::write(fd.get_ref(), data).map_err(io::Error::from))
                {
                    data = &data[written?..];
                }
            }
            Ok(())
        }
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context(|| "cannot make a pipe".into())?;
    // Smaller is only slower.
    let _ = nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    Ok((read, write))
}

fn null() -> Result<OwnedFd> {
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null");
    null.map(OwnedFd::from).context(|| "cannot open /dev/null".into())
}

fn own(fd: &OwnedFd, uid: u32, gid: u32) -> Result<()> {
    nix::unistd::fchown(fd, Some(uid.into()), Some(gid.into()))
        .context(|| "cannot hand stdio to the user".into())
}

fn set_size(master: &OwnedFd, rows: u16, columns: u16) -> Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize.
    let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    nix::errno::Errno::result(result)
        .map(drop)
        .context(|| "cannot resize the terminal".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    fn process() -> (Arc<Process>, ChildStdio, watch::Sender<Option<Ended>>) {
        let own = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let (stdio, child) = Stdio::pipes(true, own.0, own.1).unwrap();
        let (sender, ended) = watch::channel(None);
        (Arc::new(Process { pid: 0, stdio, ended }), child, sender)
    }

    #[tokio::test]
    async fn output_is_kept_until_read_and_ends_with_both_streams() {
        let (process, child, _ended) = process();
        std::fs::File::from(child.stdout).write_all(b"out").unwrap();
        std::fs::File::from(child.stderr).write_all(b"err").unwrap();
        let mut reader = output(&process);
        let mut chunks = Vec::new();
        while let Some(chunk) = reader.recv().await {
            let chunk = chunk.unwrap();
            chunks.push((chunk.stream, chunk.data));
        }
        chunks.sort();
        assert_eq!(chunks, [(1, b"out".to_vec()), (2, b"err".to_vec())]);
    }

    #[tokio::test]
    async fn a_second_reader_goes_on_where_the_first_left() {
        let (process, child, _ended) = process();
        let mut stdout = std::fs::File::from(child.stdout);
        drop(child.stderr);
        let mut first = output(&process);
        stdout.write_all(b"one").unwrap();
        assert_eq!(first.recv().await.unwrap().unwrap().data, b"one");
        drop(first);
        tokio::time::sleep(Duration::from_millis(50)).await;
        stdout.write_all(b"two").unwrap();
        drop(stdout);
        let mut second = output(&process);
        assert_eq!(second.recv().await.unwrap().unwrap().data, b"two");
        assert!(second.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_flood_that_nobody_reads_stops_at_the_pipe() {
        let (process, child, _ended) = process();
        let stdout = child.stdout;
        nix::fcntl::fcntl(&stdout, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let _reader = output(&process);
        let mut total = 0;
        // The reader's task runs between writes and takes at most its channel and one buffer.
        for _ in 0..1000 {
            match nix::unistd::write(&stdout, &[0; 4096]) {
                Ok(written) => total += written,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        assert!(total < 1 << 20, "{total}");
    }

    #[tokio::test]
    async fn input_to_a_process_that_does_not_read_ends_with_it() {
        let (process, child, ended) = process();
        let big = vec![0; 1 << 20];
        let writing = {
            let process = Arc::clone(&process);
            tokio::spawn(async move { process.stdio.write(&big, &process.ended).await })
        };
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!writing.is_finished());
        ended.send_replace(Some(Ended {
            code: 0,
            at_ns: 1,
            oom_killed: false,
        }));
        writing.await.unwrap().unwrap();
        process.stdio.close_stdin().await;
        assert!(process.stdio.write(b"x", &process.ended).await.is_err());
        drop(child);
    }
}
