//! Watchers: one task per container and one per sandbox, each waiting in the shim and telling the pod's owner
//! how it ended; and the one that reaches for a shim that lives and does not answer.

use std::path::Path;
use std::time::Duration;

use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::info;
use tokio::sync::mpsc::WeakUnboundedSender;

use super::owner::Message;
use super::record::Exit;
use crate::node::{Dirs, now_ns};
use crate::shim::{Shim, ShimError, lives};

/// Longest pause before a shim that could not be reached, or did not tell, is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// The first such pause: a shim that dies is gone a moment after its connection.
const AGAIN_SOON: Duration = Duration::from_millis(20);

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
        let exit = loop {
            match shim.wait(container.as_str()).await {
                Ok((status, at_ns)) => {
                    break recorded(&bundle).unwrap_or_else(|| {
                        let exit_code = i32::try_from(status).unwrap_or(255);
                        let exited_at_ns = if at_ns > 0 { at_ns } else { now_ns() };
                        Exit::from_record(&ExitRecord {
                            exit_code,
                            exited_at_ns,
                            oom_killed: false,
                        })
                    });
                }
                Err(error) if error.is_gone() => return,
                Err(error) if error.is_not_found() => {
                    tracing::warn!(%container, %error, "the shim does not know a container's end");
                    break recorded(&bundle)
                        .unwrap_or_else(|| Exit::unknown("its shim does not know it", now_ns()));
                }
                Err(error) => {
                    tracing::warn!(%container, %error, "the shim does not tell a container's end; asking again");
                    tokio::time::sleep(AGAIN).await;
                    if owner.strong_count() == 0 {
                        return;
                    }
                }
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
    let (pod, dirs) = (pod.clone(), dirs.clone());
    tokio::spawn(async move {
        let message = match shim.wait_sandbox().await {
            Ok(()) => Message::SandboxEnded {
                problem: why(&shim).await,
                shim_died: false,
            },
            Err(error @ ShimError::Gone { .. }) => match connect(&pod, &dirs.socket(&pod)).await {
                Ok(shim) => {
                    tracing::warn!(%pod, %error, "the connection to a shim broke and was made again");
                    Message::Reconnected(shim)
                }
                Err(failed) if is_there(&failed, &dirs.pod(&pod)) => {
                    if let Some(owner) = owner.upgrade() {
                        let _ = owner.send(Message::Disconnected);
                    }
                    return shim_that_is_silent(&dirs, &pod, owner);
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

/// What a shim of ours says of its sandbox's end.
async fn why(shim: &Shim) -> String {
    let said = shim.sandbox_status().await.ok();
    said.and_then(|mut status| status.info.remove(info::ENDED))
        .unwrap_or_else(|| "the sandbox ended".to_owned())
}

/// Reaches for a shim that lives and does not answer, until it does or is dead; then the owner is told.
pub(super) fn shim_that_is_silent(dirs: &Dirs, pod: &Id, owner: WeakUnboundedSender<Message>) {
    let (pod, socket, bundle) = (pod.clone(), dirs.socket(pod), dirs.pod(pod));
    tokio::spawn(async move {
        let mut pause = AGAIN_SOON;
        let message = loop {
            tokio::time::sleep(pause).await;
            pause = AGAIN.min(pause * 2);
            if owner.strong_count() == 0 {
                return;
            }
            match connect(&pod, &socket).await {
                Ok(shim) => {
                    tracing::info!(%pod, "a shim that was silent answers");
                    break Message::Reconnected(shim);
                }
                Err(error) if is_there(&error, &bundle) => {}
                Err(error) => {
                    break Message::SandboxEnded {
                        problem: format!("the shim died: {error}"),
                        shim_died: true,
                    };
                }
            }
        };
        if let Some(owner) = owner.upgrade() {
            let _ = owner.send(message);
        }
    });
}

/// Connects to a shim that answers.
///
/// # Errors
/// [`ShimError`]; [`is_there`] says what it means.
pub(super) async fn connect(pod: &Id, socket: &Path) -> Result<Shim, ShimError> {
    let shim = Shim::connect(pod.as_str(), socket).await?;
    shim.ping().await?;
    Ok(shim)
}

/// Whether a shim that could not be reached lives all the same: stopped, starved, its host out of memory.
pub(super) fn is_there(error: &ShimError, bundle: &Path) -> bool {
    // Someone has taken the connection: a shim of a third party, which locks no file.
    matches!(error, ShimError::Timeout { .. }) || lives(bundle)
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
