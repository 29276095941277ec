//! The socket that plugins connect to. Each connection registers on its own: one that never does holds up nobody.

use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

use crate::connection::chain;
use crate::plugin::Plugin;
use crate::{Inner, StartError};

pub(crate) async fn start(inner: &Arc<Inner>, path: &Path) -> Result<(), StartError> {
    let listener = bind(path).await?;
    tracing::info!(socket = %path.display(), "serving NRI plugins");
    let (inner, path) = (inner.clone(), path.to_owned());
    tokio::spawn(async move {
        tokio::select! {
            () = accept(&inner, &listener) => {}
            () = inner.stop.cancelled() => {}
        }
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(%error, "the NRI socket stays");
        }
    });
    Ok(())
}

async fn bind(path: &Path) -> Result<UnixListener, StartError> {
    let failed = |source: std::io::Error| StartError::Listen {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(StartError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(StartError::InUse(path.to_owned())),
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    if let Some(parent) = path.parent() {
        let mut directory = std::fs::DirBuilder::new();
        directory
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(failed)?;
    }
    // Bound under another name and closed to others before it can be found.
    let temporary = path.with_extension("new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary).map_err(failed)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)?;
    Ok(listener)
}

async fn accept(inner: &Arc<Inner>, listener: &UnixListener) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting an NRI plugin");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = inner.connections.clone().try_acquire_owned() else {
            tracing::warn!("too many NRI plugins; a connection is refused");
            continue;
        };
        let inner = inner.clone();
        tokio::spawn(async move {
            let Some(runtime) = inner.runtime.get().cloned() else {
                return;
            };
            match Plugin::register(stream, None, inner.limits(), runtime).await {
                Ok(plugin) => {
                    let ended = plugin.ended();
                    inner.join(plugin).await;
                    ended.await;
                }
                Err(refusal) => tracing::warn!(why = chain(&refusal), "an NRI plugin was not taken"),
            }
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_others_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nri/nri.sock");
        let listener = bind(&path).await.unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(bind(&path).await, Err(StartError::InUse(_))));
        drop(listener);
        drop(bind(&path).await.unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(bind(&path).await, Err(StartError::NotASocket(_))));
    }
}
