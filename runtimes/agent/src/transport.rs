//! The byte stream to the shim: the virtio-serial port with our name, or a vsock connection.
//!
//! A port is one stream for the guest's life; whether the host end is connected shows in reads: 0 bytes
//! means that nobody is there. The readiness of a descriptor that has hung up once stays set, so every
//! connection gets a registration of its own.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::{Duration, Instant};

use catamaran_guest_protocol::{PORT_NAME, VSOCK_CMDLINE, VSOCK_PORT};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::error::{Context, Error, Result};

const PORTS: &str = "/sys/class/virtio-ports";
/// How long the device may take to appear after boot.
const APPEARS_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// How often a port without a host end is looked at.
const RECONNECT_EVERY: Duration = Duration::from_millis(5);

/// Where connections come from.
pub(crate) enum Transport {
    /// A virtio-serial port.
    Port(Arc<OwnedFd>),
    /// A listening vsock socket.
    Vsock(AsyncFd<OwnedFd>),
}

impl Transport {
    /// Finds and opens the transport that the command line asks for.
    pub(crate) async fn open(command_line: &str) -> Result<Self> {
        if command_line
            .split_ascii_whitespace()
            .any(|word| word == VSOCK_CMDLINE)
        {
            let listener = listen_vsock().context(|| format!("cannot listen on vsock port {VSOCK_PORT}"))?;
            return Ok(Self::Vsock(
                register(listener).context(|| "cannot poll the vsock socket".into())?,
            ));
        }
        let deadline = Instant::now() + APPEARS_WITHIN;
        loop {
            if let Some(device) = find_port(Path::new(PORTS)) {
                // The node appears a moment after the entry in sysfs.
                match open_port(&device) {
                    Ok(port) => return Ok(Self::Port(Arc::new(port))),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error).context(|| format!("cannot open {}", device.display())),
                }
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout(format!(
                    "no virtio-serial port named {PORT_NAME} appeared"
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits for the host end.
    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Port(port) => {
                while !host_connected(port)? {
                    tokio::time::sleep(RECONNECT_EVERY).await;
                }
                Ok(Stream(register(Arc::clone(port))?))
            }
            Self::Vsock(listener) => loop {
                let mut ready = listener.readable().await?;
                let accepted = ready.try_io(|listener| {
                    // SAFETY: null address pointers are allowed.
                    let fd = unsafe {
                        libc::accept4(
                            listener.as_raw_fd(),
                            std::ptr::null_mut(),
                            std::ptr::null_mut(),
                            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                        )
                    };
                    if fd < 0 {
                        return Err(io::Error::last_os_error());
                    }
                    // SAFETY: the kernel returned a new descriptor that nothing else owns.
                    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
                });
                if let Ok(accepted) = accepted {
                    return Ok(Stream(register(Arc::new(accepted?))?));
                }
            },
        }
    }
}

/// Registers a descriptor that its owner neither closes nor replaces while registered.
fn register<T: AsRawFd + OwnsDescriptor>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: OwnsDescriptor's promise.
    Ok(unsafe { AsyncFd::register(owner) }?)
}

/// Types whose descriptor lives and stays the same as long as they do.
trait OwnsDescriptor {}
impl OwnsDescriptor for OwnedFd {}
impl OwnsDescriptor for Arc<OwnedFd> {}

fn find_port(ports: &Path) -> Option<PathBuf> {
    std::fs::read_dir(ports).ok()?.flatten().find_map(|entry| {
        let name = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == PORT_NAME).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

fn open_port(device: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(device)?;
    Ok(file.into())
}

/// Whether the host end of a port is connected: the driver reports a hang-up otherwise.
fn host_connected(port: &OwnedFd) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: port.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, and no waiting.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(poll.revents & libc::POLLHUP == 0)
}

fn listen_vsock() -> io::Result<OwnedFd> {
    // SAFETY: socket takes three integers.
    let fd = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a new descriptor that nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeros is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = VSOCK_PORT;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let length = std::mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_vm of the length told.
    unsafe {
        nix::errno::Errno::result(libc::bind(fd, (&raw const address).cast(), length))?;
        nix::errno::Errno::result(libc::listen(fd, 4))?;
    }
    Ok(socket)
}

/// One connection.
pub(crate) struct Stream(AsyncFd<Arc<OwnedFd>>);

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            let result = ready.try_io(|fd| {
                // SAFETY: the buffer is valid for its length.
                let read =
                    unsafe { libc::read(fd.as_raw_fd(), unfilled.as_mut_ptr().cast(), unfilled.len()) };
                usize::try_from(read).map_err(|_| io::Error::last_os_error())
            });
            match result {
                Ok(Ok(read)) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(context))?;
            let result = ready.try_io(|fd| {
                // SAFETY: the buffer is valid for its length.
                let written = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
                usize::try_from(written).map_err(|_| io::Error::last_os_error())
            });
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_its_name() {
        let ports = tempfile::tempdir().unwrap();
        for (port, name) in [("vport1p1", "other\n"), ("vport2p1", "catamaran.agent\n")] {
            std::fs::create_dir(ports.path().join(port)).unwrap();
            std::fs::write(ports.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find_port(ports.path()), Some(PathBuf::from("/dev/vport2p1")));
        assert_eq!(find_port(Path::new("/nonexistent")), None);
    }
}
