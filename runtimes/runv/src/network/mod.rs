//! The pod's network, handed to the guest. CNI has configured the pod's network namespace as for any pod; each
//! interface there gets a tap beside it, joined by tc redirects both ways, and the guest gets what the interface
//! had: hardware address, MTU, addresses, routes and permanent neighbours.

mod interface;
mod tap;

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

pub use interface::{Interface, Neighbour, Route};

/// A step of joining the guest to the pod's network that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace {path}")]
    Enter {
        /// Which namespace.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel refused a request.
    #[error("cannot {action} {interface}")]
    Netlink {
        /// "list", "redirect", …
        action: &'static str,
        /// Which interface.
        interface: String,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// A tap could not be made.
    #[error("cannot make tap {name}")]
    Tap {
        /// Its name.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// Something of the interface that a guest cannot have.
    #[error("interface {name} cannot be given to a VM: {reason}")]
    Unsupported {
        /// Its name.
        name: String,
        /// Why.
        reason: &'static str,
    },
}

/// An interface of the pod with the tap that stands in for it.
#[derive(Debug)]
pub struct Attached {
    /// What the guest is to have.
    pub interface: Interface,
    /// The tap's queue; the tap goes when the last holder closes it.
    pub tap: OwnedFd,
}

/// Joins every interface but loopback in the namespace to a new tap.
///
/// # Errors
/// [`NetworkError`]; taps that were made are gone then.
pub async fn attach(netns: &Path) -> Result<Vec<Attached>, NetworkError> {
    within(netns, || async {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetworkError::Netlink {
                action: "open netlink in",
                interface: "the network namespace".to_owned(),
                source: rtnetlink::Error::NamespaceError(source.to_string()),
            })?;
        let connection = tokio::spawn(connection);
        let attached = attach_all(&handle).await;
        connection.abort();
        attached
    })
    .await
}

async fn attach_all(handle: &rtnetlink::Handle) -> Result<Vec<Attached>, NetworkError> {
    let mut attached = Vec::new();
    for interface in interface::list(handle).await? {
        let tap = tap::join(handle, &interface).await?;
        attached.push(Attached { interface, tap });
    }
    Ok(attached)
}

/// Runs a future on a thread of its own inside a network namespace; the thread ends with it.
async fn within<T, F, M>(netns: &Path, make: M) -> Result<T, NetworkError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
    M: FnOnce() -> F + Send + 'static,
{
    let path = netns.to_owned();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let failed = {
        let path = path.clone();
        move |source| NetworkError::Enter { path, source }
    };
    let work = {
        let failed = failed.clone();
        move || {
            let namespace = File::open(&path).map_err(failed.clone())?;
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|errno| failed.clone()(errno.into()))?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(failed)?;
            runtime.block_on(make())
        }
    };
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            // The caller may have given up.
            let _ = sender.send(work());
        })
        .map_err(failed.clone())?;
    match receiver.await {
        Ok(result) => result,
        Err(_) => Err(failed(std::io::Error::other("the thread in it ended early"))),
    }
}

/// `address/length`, as CIDR has it.
fn cidr(address: IpAddr, length: u8) -> String {
    format!("{address}/{length}")
}
