//! Client of QEMU's machine protocol (docs/interop/qmp-spec in QEMU's source) over a connected socket: greeting,
//! capabilities, commands matched to answers by id, file descriptors passed along, events handed on. Lines are
//! bounded: QEMU is as trusted as the guest that may have taken it over.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

/// Longest line that is read; QEMU's largest answers (schemas) are not asked for.
const LONGEST_LINE: u64 = 256 * 1024;
/// Time for one answer. Plugging a device under emulation on a busy host is the slowest.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Events kept for a slow listener; more are dropped, so that a guest cannot fill memory.
const EVENTS_KEPT: usize = 64;

/// A command that failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU refused it.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command's name.
        command: String,
        /// QEMU's words.
        description: String,
    },
    /// No answer within the limit.
    #[error("QEMU did not answer {0} within {limit} s", limit = ANSWER_LIMIT.as_secs())]
    Late(String),
    /// The connection is gone, so QEMU most probably is.
    #[error("the connection to QEMU is closed")]
    Closed,
    /// What came is not the protocol.
    #[error("QEMU sent what is no QMP: {0}")]
    Protocol(String),
    /// Sending failed.
    #[error("cannot send to QEMU")]
    Send(#[from] io::Error),
}

/// Something that QEMU tells unasked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    /// Its name, for instance `SHUTDOWN`.
    pub(super) name: String,
    /// What goes with it.
    pub(super) data: Map<String, Value>,
}

/// One line from QEMU.
#[derive(Debug, PartialEq)]
enum Message {
    Greeting,
    Answer {
        id: u64,
        result: Result<Value, String>,
    },
    Event(Event),
    /// An answer without id: QEMU could not even parse a command.
    Confused(String),
}

impl Message {
    fn parse(line: &[u8]) -> Result<Self, QmpError> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(rename = "QMP")]
            greeting: Option<Value>,
            #[serde(rename = "return")]
            answer: Option<Value>,
            error: Option<Failure>,
            id: Option<u64>,
            event: Option<String>,
            #[serde(default)]
            data: Map<String, Value>,
        }
        #[derive(Deserialize)]
        struct Failure {
            #[serde(default)]
            desc: String,
        }
        let bad = || QmpError::Protocol(String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned());
        let raw: Raw = serde_json::from_slice(line).map_err(|_| bad())?;
        Ok(match raw {
            Raw {
                greeting: Some(_), ..
            } => Self::Greeting,
            Raw {
                event: Some(name),
                data,
                ..
            } => Self::Event(Event { name, data }),
            Raw {
                answer: Some(value),
                id: Some(id),
                ..
            } => Self::Answer {
                id,
                result: Ok(value),
            },
            Raw {
                error: Some(failure),
                id: Some(id),
                ..
            } => Self::Answer {
                id,
                result: Err(failure.desc),
            },
            Raw {
                error: Some(failure), ..
            } => Self::Confused(failure.desc),
            _ => return Err(bad()),
        })
    }
}

type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>>;

/// A connection in command mode.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: AsyncMutex<Writer>,
    /// `None` once the connection is closed.
    pending: Pending,
}

#[derive(Debug)]
struct Writer {
    half: OwnedWriteHalf,
    next_id: u64,
}

impl Qmp {
    /// Reads the greeting, negotiates, and hands on events from then on.
    ///
    /// # Errors
    /// [`QmpError`] when QEMU does not greet within the limit or speaks something else.
    pub(super) async fn connect(stream: UnixStream) -> Result<(Self, mpsc::Receiver<Event>), QmpError> {
        let (reader, half) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = tokio::time::timeout(ANSWER_LIMIT, read_line(&mut reader));
        let line = greeting
            .await
            .map_err(|_| QmpError::Late("the greeting".to_owned()))??;
        if Message::parse(&line)? != Message::Greeting {
            return Err(QmpError::Protocol("no greeting".to_owned()));
        }
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, receiver) = mpsc::channel(EVENTS_KEPT);
        tokio::spawn(read_messages(reader, Arc::clone(&pending), events));
        let qmp = Self {
            writer: AsyncMutex::new(Writer { half, next_id: 1 }),
            pending,
        };
        qmp.command("qmp_capabilities", json!({})).await?;
        Ok((qmp, receiver))
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(super) async fn command(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.send(name, arguments, None).await
    }

    /// Gives QEMU a descriptor under `name` (command `getfd`), for the next command that names it.
    ///
    /// # Errors
    /// [`QmpError`].
    pub(super) async fn pass_descriptor(
        &self,
        name: &str,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), QmpError> {
        self.send("getfd", json!({ "fdname": name }), Some(descriptor))
            .await
            .map(drop)
    }

    async fn send(
        &self,
        name: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut writer = self.writer.lock().await;
            let id = writer.next_id;
            writer.next_id += 1;
            lock(&self.pending)
                .as_mut()
                .ok_or(QmpError::Closed)?
                .insert(id, sender);
            let mut line = json!({ "execute": name, "arguments": arguments, "id": id }).to_string();
            line.push('\n');
            writer.write(line.as_bytes(), descriptor).await?;
            id
        };
        match tokio::time::timeout(ANSWER_LIMIT, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(description))) => Err(QmpError::Refused {
                command: name.to_owned(),
                description: bounded(&description),
            }),
            Ok(Err(_)) => Err(QmpError::Closed),
            Err(_) => {
                if let Some(pending) = lock(&self.pending).as_mut() {
                    pending.remove(&id);
                }
                Err(QmpError::Late(name.to_owned()))
            }
        }
    }
}

impl Writer {
    /// The descriptor goes with the first byte.
    async fn write(&mut self, mut bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if let Some(descriptor) = descriptor {
            let stream: &UnixStream = self.half.as_ref();
            let descriptors = [descriptor.as_raw_fd()];
            let sent = loop {
                stream.writable().await?;
                let result = stream.try_io(Interest::WRITABLE, || {
                    let rights = [ControlMessage::ScmRights(&descriptors)];
                    let bytes = [IoSlice::new(bytes)];
                    sendmsg::<()>(stream.as_raw_fd(), &bytes, &rights, MsgFlags::MSG_NOSIGNAL, None)
                        .map_err(io::Error::from)
                });
                match result {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => break other?,
                }
            };
            bytes = &bytes[sent..];
        }
        self.half.write_all(bytes).await
    }
}

async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Vec<u8>, QmpError> {
    let mut line = Vec::new();
    reader
        .take(LONGEST_LINE)
        .read_until(b'\n', &mut line)
        .await
        .map_err(|_| QmpError::Closed)?;
    match line.last() {
        None => Err(QmpError::Closed),
        Some(b'\n') => Ok(line),
        Some(_) if line.len() as u64 == LONGEST_LINE => Err(QmpError::Protocol("an endless line".to_owned())),
        Some(_) => Err(QmpError::Closed),
    }
}

async fn read_messages(mut reader: BufReader<OwnedReadHalf>, pending: Pending, events: mpsc::Sender<Event>) {
    loop {
        let message = match read_line(&mut reader)
            .await
            .and_then(|line| Message::parse(&line))
        {
            Ok(message) => message,
            Err(QmpError::Closed) => break,
            Err(error) => {
                tracing::warn!(%error, "leaving the QMP connection");
                break;
            }
        };
        match message {
            Message::Answer { id, result } => {
                let waiting = lock(&pending).as_mut().and_then(|pending| pending.remove(&id));
                if let Some(waiting) = waiting {
                    // The caller may have given up.
                    let _ = waiting.send(result);
                }
            }
            Message::Event(event) => {
                if let Err(mpsc::error::TrySendError::Full(event)) = events.try_send(event) {
                    tracing::debug!(name = event.name, "dropped a QMP event");
                }
            }
            Message::Confused(description) => tracing::warn!("QEMU: {}", bounded(&description)),
            Message::Greeting => {}
        }
    }
    // Everybody who waits learns that the connection is closed.
    *lock(&pending) = None;
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn bounded(text: &str) -> String {
    text.chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use nix::sys::socket::{ControlMessageOwned, recvmsg};
    use proptest::prelude::*;

    const GREETING: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

    fn pair() -> (UnixStream, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (UnixStream::from_std(ours).unwrap(), theirs)
    }

    fn line(stream: &mut std::os::unix::net::UnixStream) -> Value {
        let mut line = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        serde_json::from_slice(&line).unwrap()
    }

    fn answer(stream: &mut std::os::unix::net::UnixStream, request: &Value, field: &str, value: Value) {
        writeln!(stream, "{}", json!({ field: value, "id": request["id"] })).unwrap();
    }

    #[tokio::test]
    async fn answers_are_matched_and_events_handed_on() {
        let (ours, mut theirs) = pair();
        let peer = std::thread::spawn(move || {
            theirs.write_all(GREETING).unwrap();
            let request = line(&mut theirs);
            assert_eq!(request["execute"], "qmp_capabilities");
            answer(&mut theirs, &request, "return", json!({}));
            let (first, second) = (line(&mut theirs), line(&mut theirs));
            theirs
                .write_all(b"{\"event\": \"STOP\", \"data\": {\"a\": 1}}\r\n")
                .unwrap();
            answer(&mut theirs, &second, "return", second["execute"].clone());
            answer(
                &mut theirs,
                &first,
                "error",
                json!({"class": "GenericError", "desc": "no"}),
            );
        });
        let (qmp, mut events) = Qmp::connect(ours).await.unwrap();
        let (first, second) = tokio::join!(qmp.command("a", json!({})), qmp.command("b", json!({})));
        assert_eq!(first.unwrap_err().to_string(), "QEMU refused a: no");
        assert_eq!(second.unwrap(), "b");
        assert_eq!(events.recv().await.unwrap().name, "STOP");
        peer.join().unwrap();
        assert!(matches!(
            qmp.command("c", json!({})).await,
            Err(QmpError::Closed | QmpError::Send(_))
        ));
        assert!(events.recv().await.is_none());
    }

    #[tokio::test]
    async fn descriptors_go_with_the_command() {
        let (ours, mut theirs) = pair();
        let peer = std::thread::spawn(move || {
            theirs.write_all(GREETING).unwrap();
            let request = line(&mut theirs);
            answer(&mut theirs, &request, "return", json!({}));
            let mut bytes = [0; 4096];
            let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
            let received = {
                let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
                let message = recvmsg::<()>(
                    theirs.as_raw_fd(),
                    &mut parts,
                    Some(&mut space),
                    MsgFlags::empty(),
                )
                .unwrap();
                let rights = message.cmsgs().unwrap().next().unwrap();
                assert!(
                    matches!(rights, ControlMessageOwned::ScmRights(descriptors) if descriptors.len() == 1)
                );
                message.bytes
            };
            let request: Value = serde_json::from_slice(&bytes[..received]).unwrap();
            assert_eq!(request["arguments"]["fdname"], "tap");
            answer(&mut theirs, &request, "return", json!({}));
        });
        let (qmp, _events) = Qmp::connect(ours).await.unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        qmp.pass_descriptor("tap", file.as_fd()).await.unwrap();
        peer.join().unwrap();
    }

    #[tokio::test]
    async fn an_endless_line_ends_the_connection() {
        let (ours, mut theirs) = pair();
        let peer = std::thread::spawn(move || while theirs.write_all(&[b'x'; 8192]).is_ok() {});
        assert!(matches!(Qmp::connect(ours).await, Err(QmpError::Protocol(_))));
        peer.join().unwrap();
    }

    proptest! {
        #[test]
        fn any_line_is_parsed_or_refused(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::parse(&line);
        }

        #[test]
        fn answers_keep_their_id(id in any::<u64>(), text in ".{0,40}") {
            let line = json!({"return": text, "id": id}).to_string();
            prop_assert_eq!(
                Message::parse(line.as_bytes()).unwrap(),
                Message::Answer { id, result: Ok(Value::String(text)) }
            );
        }
    }
}
