//! Fuzzing of what clients send, in the process and for a bounded time: CATAMARAN_FUZZ_SECONDS (20), half of it for
//! each target. Inputs are made structurally ([`input`]), so that most get past zlib and the masks of WebSockets,
//! then damaged. Each has a seed; a failure names it, and CATAMARAN_FUZZ_SEED repeats that one input.
//!
//! The targets are functions over the bytes of a connection.

mod input;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::{TcpListener, TcpStream};

use crate::spdy::{CONTROL_MAX, Connection, Control, Deflater, HEAD, Head, Inflater, Limits};
use crate::tests::backend::TestBackend;
use crate::{AttachRequest, Config, ExecRequest, PortForwardRequest, Server};

/// Nothing that a client sends may take longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Panics of these tests' threads; those of spawned tasks would be lost otherwise.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current()
                .name()
                .is_some_and(|name| name.starts_with("fuzz::"))
            {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(info);
        }));
    });
}

/// Runs `target` on inputs made from seeds until the time is over.
fn fuzz<I, F: Future<Output = Result<(), String>>>(
    make: impl Fn(&mut StdRng) -> I,
    mut target: impl FnMut(I) -> F,
) -> impl Future<Output = ()> {
    count_panics();
    async move {
        let number = |name| {
            let text = std::env::var(name).ok();
            text.map(|text| {
                text.parse::<u64>()
                    .unwrap_or_else(|_| panic!("{name} is no number"))
            })
        };
        let only = number("CATAMARAN_FUZZ_SEED");
        let time = Duration::from_secs(number("CATAMARAN_FUZZ_SECONDS").unwrap_or(20)) / 2;
        let mut seed = only.unwrap_or_else(|| rand::rng().random());
        let (started, mut runs) = (Instant::now(), 0u64);
        while started.elapsed() < time {
            let input = make(&mut StdRng::seed_from_u64(seed));
            let before = PANICS.load(Ordering::SeqCst);
            let result = target(input).await;
            let panicked = PANICS.load(Ordering::SeqCst) != before;
            if panicked || result.is_err() {
                panic!("fails with CATAMARAN_FUZZ_SEED={seed}: panicked: {panicked}, {result:?}");
            }
            runs += 1;
            if only.is_some() {
                break;
            }
            seed = seed.wrapping_add(1);
        }
        eprintln!("{runs} inputs");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    // On the test's own thread, whose name the panic hook knows.
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().expect("runtime")
}

/// The parser alone: what it takes it also writes, and reads again as the same.
fn frames(mut bytes: &[u8]) -> Result<(), String> {
    let mut inflater = Inflater::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() {
        let Ok(head) = Head::parse(*head) else { break };
        let (Head::Data { length, .. } | Head::Control { length, .. }) = head;
        let Some((payload, rest)) = rest.split_at_checked(length) else {
            break;
        };
        bytes = rest;
        let Head::Control { kind, flags, length } = head else {
            continue;
        };
        if length > CONTROL_MAX {
            return Err(format!("a control frame of {length} bytes"));
        }
        let Ok(control) = Control::parse(kind, flags, payload, &mut inflater) else {
            break;
        };
        let mut again = Vec::new();
        control.encode(&mut Deflater::new(), &mut again);
        if control == Control::Unknown {
            continue;
        }
        let Some((head, payload)) = again.split_first_chunk::<HEAD>() else {
            return Err(format!("{control:?} is written as nothing"));
        };
        // A block of headers may pack worse than the client's, over the bound.
        let Ok(Head::Control { kind, flags, .. }) = Head::parse(*head) else {
            continue;
        };
        match Control::parse(kind, flags, payload, &mut Inflater::new()) {
            Ok(same) if same == control => {}
            other => return Err(format!("{control:?} is read again as {other:?}")),
        }
    }
    Ok(())
}

/// A SPDY connection with an echo behind each stream: it ends when the client does, and keeps nothing.
async fn connection(bytes: &[u8]) -> Result<(), String> {
    let limits = Limits {
        streams: 6,
        unaccepted: 3,
        idle: Duration::from_secs(3600),
        ping: Duration::from_secs(3600),
    };
    let (ours, theirs) = duplex(64 << 10);
    let mut server = Connection::server(ours, limits);
    let (mut read, mut write) = tokio::io::split(theirs);
    let client = async {
        let send = async {
            let _ = write.write_all(bytes).await;
            let _ = write.shutdown().await;
        };
        let mut answer = Vec::new();
        let _ = tokio::join!(send, read.read_to_end(&mut answer));
    };
    let serve = async {
        while let Some(mut stream) = server.accept().await {
            tokio::spawn(async move { tokio::io::copy(&mut stream.reader, &mut stream.writer).await });
        }
        server.closed().await;
    };
    let both = async { tokio::join!(client, serve) };
    if tokio::time::timeout(PATIENCE, both).await.is_err() {
        return Err("the connection does not end".into());
    }
    match server.open_streams() {
        0 => Ok(()),
        open => Err(format!("{open} streams stay")),
    }
}

/// A server with a port that echoes.
struct Target {
    server: Server,
    backend: Arc<TestBackend>,
    port: u16,
}

impl Target {
    async fn start() -> Target {
        let echo = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let port = echo.local_addr().expect("address").port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        let backend = Arc::new(TestBackend::default());
        let config = Config {
            stream_creation_timeout: Duration::from_millis(50),
            max_tokens: 1 << 20,
            token_lifetime: Duration::from_secs(5),
            ..Config::default()
        };
        let server = Server::bind(config, Arc::clone(&backend) as _)
            .await
            .expect("listens");
        Target {
            server,
            backend,
            port,
        }
    }

    fn url(&self, verb: input::Verb) -> String {
        let (container_id, command) = ("c".to_owned(), vec!["cat".to_owned()]);
        let url = match verb {
            input::Verb::Exec { tty } => self.server.exec(ExecRequest {
                container_id,
                command,
                tty,
                stdin: true,
                stdout: true,
                stderr: !tty,
            }),
            input::Verb::Attach => self.server.attach(AttachRequest {
                container_id,
                tty: false,
                stdin: true,
                stdout: true,
                stderr: false,
            }),
            input::Verb::PortForward => self.server.port_forward(PortForwardRequest {
                sandbox_id: "s".into(),
                ports: vec![self.port],
            }),
        };
        url.expect("a URL")
    }

    /// A whole connection, from its HTTP head on: it ends when the client does, and no call stays.
    async fn whole(&self, input: input::Session) -> Result<(), String> {
        let url = self.url(input.verb);
        let path = url.splitn(4, '/').nth(3).unwrap_or_default();
        let bytes = input.bytes(path);
        let mut stream = TcpStream::connect(self.server.local_addr())
            .await
            .map_err(|error| error.to_string())?;
        let (mut read, mut write) = stream.split();
        let send = async {
            let _ = write.write_all(&bytes).await;
            let _ = write.shutdown().await;
        };
        let mut answer = Vec::new();
        let both = async { tokio::join!(send, read.read_to_end(&mut answer)) };
        if tokio::time::timeout(PATIENCE, both).await.is_err() {
            return Err("the server does not close the connection".into());
        }
        let started = Instant::now();
        while self.backend.running.load(Ordering::SeqCst) != 0 {
            if started.elapsed() > PATIENCE {
                return Err("a call stays after its client".into());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}

#[test]
fn spdy_frames() {
    runtime().block_on(fuzz(
        |rng| input::spdy(rng, 1),
        |bytes| async move {
            frames(&bytes)?;
            connection(&bytes).await
        },
    ));
}

#[test]
fn connections_to_the_server() {
    runtime().block_on(async {
        let target = Target::start().await;
        fuzz(
            |rng| input::session(rng, target.port),
            |input| target.whole(input),
        )
        .await;
        target.server.shutdown().await;
    });
}
