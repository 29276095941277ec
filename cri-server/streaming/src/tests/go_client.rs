//! The Go client of Kubernetes against the server: what kubectl and crictl are made of. Needs Go; without it
//! these tests fail.

use std::path::PathBuf;
use std::process::{Output, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::sync::OnceCell;

use super::backend::pattern;
use super::{attach, exec, port_forward, soon, start};

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// Builds the client once, beside the test's own binary.
async fn client() -> PathBuf {
    static BUILT: OnceCell<PathBuf> = OnceCell::const_new();
    let path = BUILT.get_or_init(|| async {
        let own = std::env::current_exe().expect("own path");
        let binary = own.with_file_name("streaming-go-client");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/go_client");
        let built = Command::new("go")
            .args(["build", "-o"])
            .arg(&binary)
            .arg(".")
            .current_dir(source)
            .output()
            .await;
        let built = built.expect("go is installed");
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        binary
    });
    path.await.clone()
}

async fn run(transport: &str, url: &str, flags: &[&str], input: Option<&[u8]>) -> Output {
    let mut child = Command::new(client().await)
        .args(["exec", transport, url])
        .args(flags)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("starts");
    let pipe = child.stdin.take();
    let send = async {
        if let (Some(mut pipe), Some(input)) = (pipe, input) {
            pipe.write_all(input).await.expect("writes");
        }
    };
    let (_, output) = tokio::join!(send, soon(child.wait_with_output()));
    output.expect("ends")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outputs_and_exit_codes() {
    let (server, _) = start(|_| {}).await;
    for transport in TRANSPORTS {
        let url = exec(&server, &["both"], "oe");
        let output = run(transport, &url, &["stdout", "stderr"], None).await;
        assert_eq!(
            (text(&output.stdout), text(&output.stderr)),
            ("out", "err"),
            "{transport}"
        );
        assert_eq!(output.status.code(), Some(7), "{transport}");

        let output = run(transport, &exec(&server, &["exit", "0"], "o"), &["stdout"], None).await;
        assert_eq!(
            (output.status.code(), text(&output.stderr)),
            (Some(0), ""),
            "{transport}"
        );

        let output = run(transport, &exec(&server, &["fail"], "o"), &["stdout"], None).await;
        assert_eq!(output.status.code(), Some(125), "{transport}");
        assert!(
            text(&output.stderr).contains("there is no such thing"),
            "{transport}: {}",
            text(&output.stderr)
        );

        // A URL is good once.
        let output = run(transport, &url, &["stdout", "stderr"], None).await;
        assert_eq!(output.status.code(), Some(125), "{transport}");
    }
    soon(server.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_data_and_its_end() {
    let (server, _) = start(|_| {}).await;
    let data = pattern(5_000_000);
    for transport in TRANSPORTS {
        let output = run(
            transport,
            &exec(&server, &["big", "5000000"], "o"),
            &["stdout"],
            None,
        )
        .await;
        assert!(
            output.stdout == data,
            "{transport}: {} bytes",
            output.stdout.len()
        );
        // The end of the input reaches the command, which then ends.
        let output = run(
            transport,
            &exec(&server, &["cat"], "io"),
            &["stdin", "stdout"],
            Some(&data),
        )
        .await;
        assert!(
            output.stdout == data,
            "{transport}: {} bytes; {}",
            output.stdout.len(),
            text(&output.stderr)
        );
        assert_eq!(output.status.code(), Some(0), "{transport}");
        let output = run(
            transport,
            &exec(&server, &["count"], "io"),
            &["stdin", "stdout"],
            Some(&data),
        )
        .await;
        assert_eq!(text(&output.stdout), "5000000", "{transport}");
        let output = run(
            transport,
            &attach(&server),
            &["stdin", "stdout"],
            Some(b"to and fro"),
        )
        .await;
        assert_eq!(text(&output.stdout), "to and fro", "{transport}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_sizes() {
    let (server, _) = start(|_| {}).await;
    let storm: Vec<String> = (2..400).map(|n| format!("size={n}x{}", n + 1)).collect();
    for transport in TRANSPORTS {
        let mut flags = vec!["tty", "stdout"];
        flags.extend(storm.iter().map(String::as_str));
        flags.push("size=1x1");
        let output = run(transport, &exec(&server, &["size"], "ot"), &flags, None).await;
        assert_eq!(
            output.status.code(),
            Some(0),
            "{transport}: {}",
            text(&output.stderr)
        );
        // Sizes in between may be skipped, never reordered: what was printed is one of them.
        let printed = text(&output.stdout);
        assert!(
            printed.is_empty() || storm.contains(&format!("size={printed}")),
            "{transport}: {printed}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forwarded_ports() {
    let (server, backend) = start(|_| {}).await;
    // Answers with the reversed request when that has ended: needs half-close.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let port = listener.local_addr().expect("address").port();
    let target = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = Vec::new();
                stream.read_to_end(&mut request).await.expect("reads");
                request.reverse();
                stream.write_all(&request).await.expect("writes");
            });
        }
    });
    for transport in TRANSPORTS {
        let mut child = Command::new(client().await)
            .args([
                "forward",
                transport,
                &port_forward(&server, &[]),
                &port.to_string(),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let line = soon(lines.next_line()).await.expect("reads").expect("a line");
        let local: u16 = line
            .strip_prefix("ready ")
            .and_then(|port| port.parse().ok())
            .expect(&line);
        let mut connections = tokio::task::JoinSet::new();
        for n in 0..50usize {
            connections.spawn(async move {
                let mut data = pattern(1000 * n);
                let mut stream = TcpStream::connect(("127.0.0.1", local)).await.expect("connects");
                let (mut read, mut write) = stream.split();
                let send = async {
                    write.write_all(&data).await.expect("writes");
                    write.shutdown().await.expect("ends");
                };
                let mut answer = Vec::new();
                let (_, read) = tokio::join!(send, read.read_to_end(&mut answer));
                read.expect("reads");
                data.reverse();
                assert!(answer == data, "{n}: {} bytes", answer.len());
            });
        }
        while let Some(result) = soon(connections.join_next()).await {
            result.expect(transport);
        }
        drop(child.stdin.take());
        assert!(soon(child.wait()).await.expect("ends").success(), "{transport}");
        super::until("all forwards have ended", || {
            backend.running.load(std::sync::atomic::Ordering::SeqCst) == 0
        })
        .await;
    }
    target.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls() {
    let dir = tempfile::tempdir().expect("temp dir");
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("certificate");
    let (certificate, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    std::fs::write(&certificate, made.cert.pem()).expect("writes");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("writes");
    let tls = crate::tls_from_files(&certificate, &key).expect("loads");
    assert!(crate::tls_from_files(&key, &key).is_err());

    let (server, _) = start(|config| config.tls = Some(tls)).await;
    for transport in TRANSPORTS {
        let url = exec(&server, &["cat"], "io");
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        let output = run(transport, &url, &["stdin", "stdout"], Some(b"secret")).await;
        assert_eq!(
            text(&output.stdout),
            "secret",
            "{transport}: {}",
            text(&output.stderr)
        );
    }
}
