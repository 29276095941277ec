//! Ends an ExecSync in the shim where nobody awaits its answer any more: the CRI's client went away, and ttrpc
//! does not tell a server that one of a connection's calls is of no use.

use std::time::Duration;

use catamaran_sandbox::id::Id;
use catamaran_sandbox::protocol::stream::CancelExecSyncRequest;
use catamaran_sandbox::protocol::stream_ttrpc::StreamClient;

use super::{Result, ShimError, call};

/// Cancels the call of its key when dropped.
pub(super) struct ExecSyncGuard {
    stream: StreamClient,
    key: String,
    answered: bool,
}

impl ExecSyncGuard {
    pub(super) fn new(stream: &StreamClient) -> Result<Self> {
        let key = Id::random().map_err(|error| ShimError::Refused {
            verb: "ExecSync",
            code: ttrpc::Code::INTERNAL,
            message: format!("read /dev/urandom: {error}"),
        })?;
        Ok(Self {
            stream: stream.clone(),
            key: key.to_string(),
            answered: false,
        })
    }

    /// What ExecSyncRequest has in `cancel_key`.
    pub(super) fn key(&self) -> String {
        self.key.clone()
    }

    /// There is nothing left to cancel.
    pub(super) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for ExecSyncGuard {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let stream = self.stream.clone();
        let request = CancelExecSyncRequest {
            cancel_key: std::mem::take(&mut self.key),
            ..Default::default()
        };
        tokio::spawn(async move {
            let limit = Duration::from_secs(10);
            let cancelled = call("CancelExecSync", limit, |context| {
                stream.cancel_exec_sync(context, &request)
            });
            if let Err(error) = cancelled.await {
                tracing::warn!(%error, "a command whose client went away may run on");
            }
        });
    }
}
