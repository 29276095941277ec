//! Watchers: one task per container and one per sandbox, each waiting in the shim and telling the pod's owner
//! how it ended.

use std::path::Path;

use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::id::Id;
use tokio::sync::mpsc::WeakUnboundedSender;

use super::owner::Message;
use super::record::Exit;
use crate::node::{Dirs, now_ns};
use crate::shim::{Shim, ShimError};

/// Tells the owner when the container's first process has ended. When the shim dies, the sandbox's watcher
/// tells what became of its containers.
pub(super) fn container(
    dirs: &Dirs,
    shim: Shim,
    pod: &Id,
    container: Id,
    owner: WeakUnboundedSender<Message>,
) {
    let bundle = dirs.container(pod, &container);
    tokio::spawn(async move {
        let exit = match shim.wait(container.as_str()).await {
            Ok((status, at_ns)) => recorded(&bundle).unwrap_or_else(|| {
                let exit_code = i32::try_from(status).unwrap_or(255);
                let exited_at_ns = if at_ns > 0 { at_ns } else { now_ns() };
                Exit::from_record(&ExitRecord {
                    exit_code,
                    exited_at_ns,
                    oom_killed: false,
                })
            }),
            Err(error) if error.is_gone() => return,
            Err(error) => {
                tracing::warn!(%container, %error, "the shim does not tell a container's end");
                recorded(&bundle).unwrap_or_else(|| Exit::unknown("its shim does not know it", now_ns()))
            }
        };
        if let Some(owner) = owner.upgrade() {
            // An owner that has gone has removed the container.
            let _ = owner.send(Message::Exited { container, exit });
        }
    });
}

/// Tells the owner when the sandbox has ended, by itself or with its shim, or that a broken connection was made
/// again: then all watchers begin anew.
pub(super) fn sandbox(dirs: &Dirs, shim: Shim, pod: &Id, owner: WeakUnboundedSender<Message>) {
    let (pod, socket) = (pod.clone(), dirs.socket(pod));
    tokio::spawn(async move {
        let message = match shim.wait_sandbox().await {
            Ok(()) => Message::SandboxEnded {
                problem: "the sandbox ended".to_owned(),
                shim_died: false,
            },
            Err(error @ ShimError::Gone { .. }) => match reconnect(&pod, &socket).await {
                Ok(shim) => {
                    tracing::warn!(%pod, %error, "the connection to a shim broke and was made again");
                    Message::Reconnected(shim)
                }
                Err(_) => Message::SandboxEnded {
                    problem: format!("the shim died: {error}"),
                    shim_died: true,
                },
            },
            Err(error) => Message::SandboxEnded {
                problem: error.to_string(),
                shim_died: false,
            },
        };
        if let Some(owner) = owner.upgrade() {
            // An owner that has gone has removed the pod.
            let _ = owner.send(message);
        }
    });
}

async fn reconnect(pod: &Id, socket: &Path) -> Result<Shim, ShimError> {
    let shim = Shim::connect(pod.as_str(), socket).await?;
    shim.ping().await?;
    Ok(shim)
}

/// The end that the shim recorded beside the bundle.
pub(super) fn recorded(bundle: &Path) -> Option<Exit> {
    match ExitRecord::read(bundle) {
        Ok(record) => record.map(|record| Exit::from_record(&record)),
        Err(error) => {
            tracing::warn!(bundle = %bundle.display(), %error, "an exit record cannot be read");
            None
        }
    }
}
