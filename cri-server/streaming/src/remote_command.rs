//! Exec and attach over SPDY: Kubernetes' remote command protocol, versions 1 to 4 (`channel.k8s.io`,
//! `v2.channel.k8s.io`, …). The client opens a stream for each of error, stdin, stdout, stderr and (with a
//! terminal, from version 3 on) resize; the outcome goes to the error stream.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use crate::backend::{AttachRequest, Backend, BackendError, ExecRequest, Streams};
use crate::resize;
use crate::spdy::{Connection, Stream};
use crate::status::Outcome;

/// Exec or attach.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    Exec(ExecRequest),
    Attach(AttachRequest),
}

/// Which streams a command has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
    pub(crate) tty: bool,
}

impl Command {
    pub(crate) fn wanted(&self) -> Wanted {
        match self {
            Command::Exec(ExecRequest {
                stdin,
                stdout,
                stderr,
                tty,
                ..
            })
            | Command::Attach(AttachRequest {
                stdin,
                stdout,
                stderr,
                tty,
                ..
            }) => {
                // A terminal has one output.
                Wanted {
                    stdin: *stdin,
                    stdout: *stdout,
                    stderr: *stderr && !*tty,
                    tty: *tty,
                }
            }
        }
    }

    pub(crate) async fn run(&self, backend: &dyn Backend, streams: Streams) -> Outcome {
        let result = match self {
            Command::Exec(request) => backend.exec(request, streams).await,
            Command::Attach(request) => backend.attach(request, streams).await.map(|()| 0),
        };
        match result {
            Ok(code) => Outcome::Exited(code),
            Err(error) => Outcome::Failed(match self {
                Command::Exec(_) => {
                    BackendError::new(format_args!("error executing command in container: {error}"))
                }
                Command::Attach(_) => {
                    BackendError::new(format_args!("error attaching to container: {error}"))
                }
            }),
        }
    }
}

/// Protocols over SPDY with their versions, the server's choice first.
pub(crate) const PROTOCOLS: [(&str, u8); 4] = [
    ("v4.channel.k8s.io", 4),
    ("v3.channel.k8s.io", 3),
    ("v2.channel.k8s.io", 2),
    ("channel.k8s.io", 1),
];

/// For how long a client may read on after the command's end before the connection is closed.
const LINGER: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Opened {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

/// Serves one command to its end.
pub(crate) async fn serve(
    mut connection: Connection,
    version: u8,
    command: &Command,
    backend: &dyn Backend,
    creation_timeout: Duration,
) {
    let wanted = command.wanted();
    let opened = tokio::time::timeout(creation_timeout, open(&mut connection, version, wanted)).await;
    let Ok(Some(opened)) = opened else {
        tracing::debug!("a client did not open all streams of its command");
        return;
    };
    // Ending our direction of stdin tells the Go clients to stop sending, so it is held to the end.
    let (stdin, stdin_held) = opened.stdin.map(|stream| (stream.reader, stream.writer)).unzip();
    let (resized, resize_held) = opened.resize.map(|stream| (stream.reader, stream.writer)).unzip();
    let (sizes, resize) = watch::channel(None);
    let sizes = resized.map(|reader| tokio::spawn(resize::pump(reader, sizes)));
    let streams = Streams {
        stdin: stdin.map(|reader| Box::new(reader) as _),
        stdout: opened.stdout.map(|stream| Box::new(stream.writer) as _),
        stderr: opened.stderr.map(|stream| Box::new(stream.writer) as _),
        resize,
    };
    let outcome = tokio::select! {
        outcome = command.run(backend, streams) => Some(outcome),
        () = connection.closed() => None,
    };
    if let Some(sizes) = sizes {
        sizes.abort();
    }
    let (Some(outcome), Some(error)) = (outcome, opened.error) else {
        tracing::debug!("the client of a command has gone");
        return;
    };
    drop((stdin_held, resize_held));
    let mut writer = error.writer;
    let message = outcome.message(version >= 4);
    let sent = async {
        writer.write_all(&message).await?;
        writer.shutdown().await
    };
    match tokio::time::timeout(LINGER, sent).await {
        Ok(Ok(())) => connection.close(LINGER).await,
        _ => tracing::debug!("the client of a command does not take its outcome"),
    }
}

/// Waits for all streams; `None` where the connection ends before.
async fn open(connection: &mut Connection, version: u8, wanted: Wanted) -> Option<Opened> {
    let mut opened = Opened::default();
    loop {
        let complete = opened.error.is_some()
            && opened.stdin.is_some() == wanted.stdin
            && opened.stdout.is_some() == wanted.stdout
            && opened.stderr.is_some() == wanted.stderr
            && opened.resize.is_some() == (wanted.tty && version >= 3);
        if complete {
            return Some(opened);
        }
        let stream = connection.accept().await?;
        let kind = stream.headers.get("streamtype").unwrap_or("");
        let (place, expected) = match kind {
            "error" => (&mut opened.error, true),
            "stdin" => (&mut opened.stdin, wanted.stdin),
            "stdout" => (&mut opened.stdout, wanted.stdout),
            "stderr" => (&mut opened.stderr, wanted.stderr),
            "resize" => (&mut opened.resize, wanted.tty && version >= 3),
            _ => {
                tracing::debug!(kind, "a stream of unknown type");
                continue;
            }
        };
        // One that was not asked for, or a second of a kind, is given up by dropping it.
        if expected && place.is_none() {
            *place = Some(stream);
        }
    }
}
