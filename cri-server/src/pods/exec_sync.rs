//! ExecSync: one process in a running container, its output and its exit code, in one call to the shim. What a
//! message of the shim cannot hold is read from a session afterwards.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::stream_frames::{self, Exit, Frame, FrameReader};
use oci_spec::runtime::Spec;
use tokio::io::AsyncRead;

use super::record::{ContainerRecord, PodView};
use super::teardown::blocking;
use crate::error::{Error, Result};
use crate::node::Node;
use crate::shim::{ExecOutput, Shim};

/// Bytes of each stream that are returned; the rest is discarded and the command goes on (CRI ExecSyncResponse).
const MAX_OUTPUT: usize = 16 << 20;
/// The shim has all of it already: each piece comes at once.
const PIECE: Duration = Duration::from_secs(30);

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
    let mut output = shim
        .exec_sync(container.id.as_str(), process, timeout, MAX_OUTPUT as u64)
        .await?;
    if output.timed_out {
        return Err(Error::DeadlineExceeded(format!(
            "command {command:?} in container {} timed out after {} s and was killed",
            container.id,
            timeout.as_secs()
        )));
    }
    if let Some(rest) = output.rest.take() {
        let address = Path::new(&rest.address);
        let socket = stream_frames::connect(address, &rest.token)
            .await
            .map_err(Error::io("connect to", address))?;
        read_rest(socket, &mut output).await?;
    }
    Ok(output)
}

/// Appends what the session has.
async fn read_rest(socket: impl AsyncRead + Unpin, output: &mut ExecOutput) -> Result<()> {
    let broken = |problem: &str| Error::Unavailable(format!("the rest of the command's output: {problem}"));
    let mut frames = FrameReader::new(socket);
    loop {
        let frame = tokio::time::timeout(PIECE, frames.next())
            .await
            .map_err(|_| broken("the shim does not send it"))?;
        let (kept, bytes) = match frame.map_err(|e| broken(&e.to_string()))? {
            Some(Frame::Stdout(bytes)) => (&mut output.stdout, bytes),
            Some(Frame::Stderr(bytes)) => (&mut output.stderr, bytes),
            Some(Frame::Exit(Exit::Code(_))) => return Ok(()),
            Some(Frame::Exit(Exit::Error(problem))) => return Err(broken(&problem)),
            Some(_) => return Err(broken("the shim sent a frame that no output has")),
            None => return Err(broken("the shim went away")),
        };
        let room = MAX_OUTPUT.saturating_sub(kept.len());
        kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
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

#[cfg(test)]
mod tests {
    use bytes::{Bytes, BytesMut};

    use super::*;

    fn output(stdout: usize) -> ExecOutput {
        ExecOutput {
            stdout: vec![b'a'; stdout],
            stderr: Vec::new(),
            exit_code: 3,
            timed_out: false,
            rest: None,
        }
    }

    fn wire(frames: &[Frame]) -> Vec<u8> {
        let mut bytes = BytesMut::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        bytes.to_vec()
    }

    #[tokio::test]
    async fn the_rest_is_appended_up_to_the_bound() {
        let session = wire(&[
            Frame::Stdout(Bytes::from_static(b"bc")),
            Frame::Stderr(Bytes::from_static(b"e")),
            Frame::Stdout(Bytes::from_static(b"d")),
            Frame::Exit(Exit::Code(3)),
        ]);
        let mut small = output(1);
        read_rest(&session[..], &mut small).await.unwrap();
        assert_eq!((&small.stdout[..], &small.stderr[..]), (&b"abcd"[..], &b"e"[..]));
        let mut full = output(MAX_OUTPUT - 1);
        read_rest(&session[..], &mut full).await.unwrap();
        assert_eq!(full.stdout.len(), MAX_OUTPUT);
        assert_eq!(full.stdout.last(), Some(&b'b'));
    }

    #[tokio::test]
    async fn output_that_breaks_off_is_an_error_not_a_short_answer() {
        let session = wire(&[Frame::Stdout(Bytes::from_static(b"b"))]);
        assert!(read_rest(&session[..], &mut output(1)).await.is_err());
        let session = wire(&[Frame::Exit(Exit::Error("no".into()))]);
        let error = read_rest(&session[..], &mut output(1)).await.unwrap_err();
        assert!(error.to_string().ends_with(": no"), "{error}");
    }
}
