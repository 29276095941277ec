//! ExecSync: one process in a running container, its output and its exit code, in one call to the shim.

use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;

use super::record::{ContainerRecord, PodView};
use super::teardown::blocking;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::shim::{ExecOutput, Shim};

/// Bytes of each stream that are returned; both fit into one ttrpc message (4 MiB). The rest is discarded.
const MAX_OUTPUT: u64 = 2_000_000;

/// Runs the command with the container's user, environment, capabilities and working directory.
pub(super) async fn run(
    node: &Arc<Node>,
    shim: &Shim,
    view: &PodView,
    container: &ContainerRecord,
    command: &[String],
    timeout: Duration,
) -> Result<ExecOutput> {
    let process = process(node, view, container, command, false).await?;
    let output = shim
        .exec_sync(container.id.as_str(), process, timeout, MAX_OUTPUT)
        .await?;
    if output.timed_out {
        return Err(Error::DeadlineExceeded(format!(
            "command {command:?} in container {} timed out after {} s and was killed",
            container.id,
            timeout.as_secs()
        )));
    }
    Ok(output)
}

/// The OCI process of a command in a container, JSON.
pub(super) async fn process(
    node: &Node,
    view: &PodView,
    container: &ContainerRecord,
    command: &[String],
    tty: bool,
) -> Result<Vec<u8>> {
    let spec = container_spec(node, view, container).await?;
    let process = catamaran_spec::exec_process(&spec, command, tty)?;
    serde_json::to_vec(&process).map_err(|e| Error::Internal(e.to_string()))
}

/// The OCI spec that the container was made with.
async fn container_spec(node: &Node, view: &PodView, container: &ContainerRecord) -> Result<Spec> {
    let path = node
        .dirs
        .container(&view.pod.id, &container.id)
        .join("config.json");
    blocking(move || {
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|e| Error::Internal(format!("{}: {e}", path.display())))
    })
    .await
}
