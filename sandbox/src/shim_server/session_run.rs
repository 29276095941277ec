//! Exec, attach and port-forward sessions: frames on a unix socket at one end, a process or a TCP connection at
//! the other. A client that goes away ends its exec, as nobody could see or stop it any more.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::ShimError;
use super::container::{Container, RunningProcess, State, Stdio};
use super::output::{Output, Stall, Subscription};
use super::pod::{Pod, detached};
use super::sessions::{Session, Wants};
use crate::stdio::{InputSource, OutputTarget};
use crate::stream_frames::{Exit, Frame, FrameReader, MAX_PAYLOAD, write_frame};

/// Runs a session to its end.
pub(crate) async fn run(pod: &Arc<Pod>, session: Session, stream: UnixStream) {
    let (reader, mut writer) = stream.into_split();
    let reader = FrameReader::new(reader);
    let ended = match session {
        Session::Exec {
            container,
            process,
            terminal,
            wants,
        } => exec(container, process, terminal, wants, reader, &mut writer).await,
        Session::Attach { container, wants } => attach(&container, wants, reader, &mut writer).await,
        Session::PortForward { port } => forward(pod, port, reader, &mut writer).await,
        Session::Rest {
            stdout,
            stderr,
            exit_code,
        } => rest(stdout, stderr, exit_code, &mut writer).await,
    };
    // Where the client is gone there is nobody to tell.
    if let Some(exit) = ended {
        let _ = write_frame(&mut writer, &Frame::Exit(exit)).await;
        let _ = writer.shutdown().await;
    }
}

/// Like the others, `None` where the client went away.
async fn exec(
    container: Arc<Container>,
    process: Vec<u8>,
    terminal: bool,
    wants: Wants,
    reader: FrameReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
) -> Option<Exit> {
    let started = detached(async move {
        let output = Output::new(None, Stall::Unbounded);
        let subscription = output.subscribe();
        let process = container.exec(process, terminal, wants.stdin).await?;
        let stdin = if wants.stdin {
            InputSource::Once
        } else {
            InputSource::Null
        };
        let (stdout, stderr) = (OutputTarget::Discard, OutputTarget::Discard);
        let stdio = Stdio {
            spelled: Default::default(),
            stdin,
            stdout,
            stderr,
            terminal,
        };
        Ok((
            RunningProcess::adopt_session(process, stdio, output),
            subscription,
        ))
    });
    let (process, subscription) = match started.await {
        Ok(started) => started,
        Err(error) => return Some(Exit::Error(error.to_string())),
    };
    let ended = tokio::select! {
        exit = send_output(&process, subscription, wants, writer) => exit,
        () = take_input(&process, reader, wants, true) => None,
    };
    // Whichever direction noticed that the client is gone.
    if ended.is_none() {
        process.close_stdin().await;
        process.control.kill_tree().await;
    }
    ended
}

async fn attach(
    container: &Arc<Container>,
    wants: Wants,
    reader: FrameReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
) -> Option<Exit> {
    let process = &container.init;
    let once = process.stdio.stdin == InputSource::Once;
    let ended = tokio::select! {
        exit = send_output(process, process.output.subscribe(), wants, writer) => exit,
        () = take_input(process, reader, wants, once) => None,
    };
    if once && wants.stdin {
        process.close_stdin().await;
    }
    ended
}

/// Sends output until it ends, then how the process ended.
async fn send_output(
    process: &RunningProcess,
    mut subscription: Subscription,
    wants: Wants,
    writer: &mut OwnedWriteHalf,
) -> Option<Exit> {
    let mut bytes = BytesMut::new();
    let mut send = async |frame: Frame| {
        let wanted = match frame {
            Frame::Stdout(_) => wants.stdout,
            Frame::Stderr(_) => wants.stderr,
            _ => true,
        };
        if !wanted {
            return true;
        }
        bytes.clear();
        frame.encode(&mut bytes);
        writer.write_all(&bytes).await.is_ok()
    };
    let record = loop {
        tokio::select! {
            // Output first: the process is Stopped only when all of it is queued.
            biased;
            frame = subscription.next() => match frame {
                Some(frame) => {
                    if !send(frame).await {
                        return None;
                    }
                }
                None if subscription.was_dropped() => {
                    let text = "the reader was too slow and was detached; the container's log has its output";
                    return Some(Exit::Error(text.to_owned()));
                }
                None => break process.wait().await,
            },
            record = process.wait() => break record,
        }
    };
    while let Some(frame) = subscription.queued() {
        if !send(frame).await {
            return None;
        }
    }
    if !send(Frame::OutputEnd).await {
        return None;
    }
    Some(Exit::Code(record.exit_code))
}

/// Takes the client's frames until it goes away, or breaks the protocol.
async fn take_input(
    process: &RunningProcess,
    mut reader: FrameReader<OwnedReadHalf>,
    wants: Wants,
    end_closes: bool,
) {
    loop {
        let frame = match reader.next().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "stream client");
                return;
            }
        };
        // A process that does not read its input must not hide its client's end, nor keep others from the input
        // for a client that is gone.
        let taken = tokio::select! {
            biased;
            taken = take_frame(process, frame, wants, end_closes) => taken,
            () = reader.closed() => false,
        };
        if !taken {
            return;
        }
    }
}

/// False for a frame that no client sends.
async fn take_frame(process: &RunningProcess, frame: Frame, wants: Wants, end_closes: bool) -> bool {
    match frame {
        Frame::Input(data) => {
            if wants.stdin {
                // Input that the process no longer takes is of no use, but its output still may be.
                let _ = process.write_stdin(&data).await;
            }
        }
        Frame::End => {
            if wants.stdin && end_closes {
                process.close_stdin().await;
            }
        }
        Frame::Resize(size) => {
            if let Err(error) = process.control.resize(size.width, size.height).await {
                tracing::debug!(%error, "resize");
            }
        }
        frame => {
            tracing::warn!(?frame, "stream client sent a frame that only a shim sends");
            return false;
        }
    }
    true
}

async fn forward(
    pod: &Arc<Pod>,
    port: u16,
    mut reader: FrameReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
) -> Option<Exit> {
    let connection = match pod.backend.connect(port).await {
        Ok(connection) => connection,
        Err(error) => return Some(Exit::Error(error.to_string())),
    };
    let (mut from_port, mut to_port) = tokio::io::split(connection);
    // Returns the reader when the client said that it has no more to send, `None` when it went away.
    let inward = async move {
        loop {
            match reader.next().await {
                // A port that takes no more may still send, and must not hide the client's end.
                Ok(Some(Frame::Input(data))) => tokio::select! {
                    biased;
                    _ = to_port.write_all(&data) => {}
                    () = reader.closed() => return None,
                },
                Ok(Some(Frame::End)) => {
                    let _ = to_port.shutdown().await;
                    return Some(reader);
                }
                _ => return None,
            }
        }
    };
    let outward = async {
        let mut buffer = BytesMut::new();
        let mut bytes = BytesMut::new();
        loop {
            buffer.clear();
            buffer.reserve(16 * 1024);
            let ended = !matches!(from_port.read_buf(&mut buffer).await, Ok(count) if count > 0);
            let frame = if ended {
                Frame::End
            } else {
                Frame::Stdout(buffer.split().freeze())
            };
            bytes.clear();
            frame.encode(&mut bytes);
            if writer.write_all(&bytes).await.is_err() {
                return false;
            }
            if ended {
                return true;
            }
        }
    };
    tokio::pin!(inward, outward);
    let both = tokio::select! {
        ended = &mut inward => match ended {
            Some(reader) => tokio::select! {
                ended = &mut outward => ended,
                () = reader.closed() => false,
            },
            None => false,
        },
        ended = &mut outward => ended && inward.await.is_some(),
    };
    both.then_some(Exit::Code(0))
}

/// `None` where the client went away.
async fn rest(stdout: Vec<u8>, stderr: Vec<u8>, exit_code: i32, writer: &mut OwnedWriteHalf) -> Option<Exit> {
    for (kept, frame) in [
        (stdout, Frame::Stdout as fn(Bytes) -> Frame),
        (stderr, Frame::Stderr),
    ] {
        let mut kept = Bytes::from(kept);
        while !kept.is_empty() {
            // A piece at a time, so that no second copy of all of it is made.
            let piece = kept.split_to(kept.len().min(MAX_PAYLOAD));
            write_frame(writer, &frame(piece)).await.ok()?;
        }
    }
    Some(Exit::Code(exit_code))
}

/// Whether a container can be attached to.
pub(crate) fn check_attach(container: &Container) -> Result<(), ShimError> {
    match container.init.state() {
        State::Stopped(_) => Err(ShimError::FailedPrecondition(format!(
            "container {} is stopped",
            container.id
        ))),
        _ => Ok(()),
    }
}
