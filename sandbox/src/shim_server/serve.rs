//! The ttrpc server of a shim process.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::Server;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use futures::stream;
use tokio::net::{UnixListener, UnixStream};

use super::backend::SandboxBackend;
use super::pod::Pod;
use super::sandbox_service::SandboxService;
use super::stream_service::StreamService;
use super::task_service::TaskService;
use crate::bootstrap::Started;
use crate::protocol::stream_ttrpc::create_stream;

/// Answers on their way when the process shall exit have so long to be written.
const FAREWELL: Duration = Duration::from_millis(50);

/// Runs a shim's future on the small runtime that shims use: one thread, which is the process's only one.
///
/// # Errors
/// When the runtime cannot be made.
pub fn block_on<F: Future>(future: F) -> std::io::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()?;
    Ok(runtime.block_on(future))
}

/// Serves a pod until ShutdownSandbox. Must run inside [`block_on`].
///
/// # Errors
/// When the server cannot start.
pub async fn serve(started: Started, backend: Arc<dyn SandboxBackend>) -> std::io::Result<()> {
    let Started {
        context,
        listener,
        lock: _lock,
    } = started;
    let sockets = [context.socket(), context.socket_named("stream")];
    let pod = Pod::new(context, backend);
    let listener = UnixListener::from_std(listener)?;
    let mut server = Server::new()
        .add_listener(accept_own_user(listener))
        .register_service(create_sandbox(Arc::new(SandboxService(pod.clone()))))
        .register_service(create_task(Arc::new(TaskService(pod.clone()))))
        .register_service(create_stream(Arc::new(StreamService(pod.clone()))));
    server.start().await.map_err(std::io::Error::other)?;
    tracing::info!(id = %pod.context.id, "serving");
    pod.shutdown.notified().await;
    tracing::info!("shutdown");
    server.stop_listen().await;
    for socket in sockets {
        // One that was never opened is not there; one that stays is removed by `delete`.
        let _ = std::fs::remove_file(socket);
    }
    tokio::time::sleep(FAREWELL).await;
    Ok(())
}

/// Connections of the user that the shim runs as; others are closed.
fn accept_own_user(listener: UnixListener) -> Listener {
    Listener::new(stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) if is_own_user(&connection) => return Some((Ok(connection), listener)),
                Ok(_) => tracing::warn!("connection of another user refused"),
                Err(error) => {
                    // Out of descriptors: some will be closed.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    return Some((Err(error), listener));
                }
            }
        }
    }))
}

/// Whether the peer runs as the same user (root), or as root.
pub(crate) fn is_own_user(connection: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    connection
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}
