//! Commands over SPDY with clients that the Go client cannot be: other versions, vanishing, slow.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::backend::pattern;
use super::{SPDY, exec, port_forward, request, soon, start, until};
use crate::Server;
use crate::spdy::{Connection, Headers, Limits, Stream};

const LIMITS: Limits = Limits {
    streams: 1000,
    unaccepted: 10,
    idle: Duration::from_secs(3600),
    ping: Duration::from_secs(3600),
};

async fn upgrade(server: &Server, url: &str, protocol: &str) -> TcpStream {
    let headers = format!("{SPDY}X-Stream-Protocol-Version: {protocol}\r\n");
    let (stream, head) = soon(request(server, url, "POST", &headers)).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(
        head.to_ascii_lowercase()
            .contains(&format!("x-stream-protocol-version: {protocol}\r\n")),
        "{head}"
    );
    stream
}

async fn connect(server: &Server, url: &str, protocol: &str) -> Connection {
    Connection::client(upgrade(server, url, protocol).await, LIMITS)
}

async fn open(connection: &mut Connection, kind: &str) -> Stream {
    soon(connection.open(Headers::from([("streamType", kind)])))
        .await
        .expect(kind)
}

async fn all(mut stream: Stream) -> String {
    let mut text = String::new();
    soon(stream.reader.read_to_string(&mut text))
        .await
        .expect("reads");
    text
}

#[tokio::test]
async fn outcomes_by_version() {
    let (server, _) = start(|_| {}).await;
    for (protocol, expected) in [
        ("channel.k8s.io", "command terminated with non-zero exit code: 3"),
        (
            "v2.channel.k8s.io",
            "command terminated with non-zero exit code: 3",
        ),
        (
            "v3.channel.k8s.io",
            "command terminated with non-zero exit code: 3",
        ),
        ("v4.channel.k8s.io", r#""message":"3""#),
    ] {
        let mut connection = connect(&server, &exec(&server, &["exit", "3"], "o"), protocol).await;
        let error = open(&mut connection, "error").await;
        let stdout = open(&mut connection, "stdout").await;
        let outcome = all(error).await;
        assert!(outcome.contains(expected), "{protocol}: {outcome}");
        assert_eq!(all(stdout).await, "");
    }
    // Before version 3 a terminal has no sizes.
    let mut connection = connect(&server, &exec(&server, &["exit", "0"], "ot"), "v2.channel.k8s.io").await;
    let error = open(&mut connection, "error").await;
    let _stdout = open(&mut connection, "stdout").await;
    assert_eq!(all(error).await, "");
}

#[tokio::test]
async fn streams_in_any_order_with_some_too_many() {
    let (server, _) = start(|_| {}).await;
    let mut connection = connect(&server, &exec(&server, &["cat"], "io"), "v4.channel.k8s.io").await;
    let _unknown = open(&mut connection, "nonsense").await;
    let mut stdin = open(&mut connection, "stdin").await;
    let _not_wanted = open(&mut connection, "stderr").await;
    let _second = open(&mut connection, "stdin").await;
    let error = open(&mut connection, "error").await;
    let stdout = open(&mut connection, "stdout").await;
    stdin.writer.write_all(b"hello").await.expect("writes");
    stdin.writer.shutdown().await.expect("ends");
    assert_eq!(all(stdout).await, "hello");
    assert!(all(error).await.contains("Success"));
}

#[tokio::test]
async fn a_client_that_vanishes() {
    let (server, backend) = start(|config| config.ping_interval = Duration::from_millis(100)).await;
    let mut connection = connect(&server, &exec(&server, &["wait"], "o"), "v4.channel.k8s.io").await;
    let _error = open(&mut connection, "error").await;
    let mut stdout = open(&mut connection, "stdout").await;
    let mut said = [0; 7];
    soon(stdout.reader.read_exact(&mut said)).await.expect("reads");
    assert_eq!(backend.running.load(Ordering::SeqCst), 1);
    drop(connection);
    until("the command is dropped", || {
        backend.running.load(Ordering::SeqCst) == 0
    })
    .await;

    // While its input is stuck, since the command does not read it.
    let mut connection = connect(&server, &exec(&server, &["wait"], "io"), "v4.channel.k8s.io").await;
    let _error = open(&mut connection, "error").await;
    let mut stdin = open(&mut connection, "stdin").await;
    let _stdout = open(&mut connection, "stdout").await;
    let stuck = tokio::spawn(async move {
        let _ = stdin.writer.write_all(&pattern(20_000_000)).await;
    });
    until("the command runs", || backend.running.load(Ordering::SeqCst) == 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!stuck.is_finished());
    drop(connection);
    until("the command is dropped", || {
        backend.running.load(Ordering::SeqCst) == 0
    })
    .await;
    soon(server.shutdown()).await;
}

#[tokio::test]
async fn a_client_that_vanishes_in_its_input() {
    let (server, backend) = start(|_| {}).await;
    let mut connection = connect(&server, &exec(&server, &["cat"], "io"), "v4.channel.k8s.io").await;
    let _error = open(&mut connection, "error").await;
    let mut stdin = open(&mut connection, "stdin").await;
    let _stdout = open(&mut connection, "stdout").await;
    stdin.writer.write_all(b"half a file").await.expect("writes");
    drop(connection);
    until("the command ends", || backend.running.load(Ordering::SeqCst) == 0).await;
    assert_eq!(
        backend.whole_inputs.load(Ordering::SeqCst),
        0,
        "half an input must not look like a whole one"
    );
}

#[tokio::test]
async fn the_idle_are_cut() {
    let (server, backend) = start(|config| {
        config.idle_timeout = Duration::from_millis(300);
        config.ping_interval = Duration::from_millis(100);
    })
    .await;
    let mut connection = connect(&server, &exec(&server, &["wait"], "o"), "v4.channel.k8s.io").await;
    let _error = open(&mut connection, "error").await;
    let _stdout = open(&mut connection, "stdout").await;
    soon(connection.closed()).await;
    until("the command is dropped", || {
        backend.running.load(Ordering::SeqCst) == 0
    })
    .await;
}

#[tokio::test]
async fn ports_that_cannot_be_forwarded() {
    let (server, _) = start(|_| {}).await;
    let mut connection = connect(&server, &port_forward(&server, &[1, 2]), "portforward.k8s.io").await;
    for (port, expected) in [
        ("0", "not a port"),
        ("x", "not a port"),
        ("3", "not asked for"),
        ("1", "refused"),
    ] {
        let headers = |kind| Headers::from([("streamType", kind), ("port", port), ("requestID", port)]);
        let error = soon(connection.open(headers("error"))).await.expect("opens");
        let data = soon(connection.open(headers("data"))).await.expect("opens");
        let message = all(error).await;
        assert!(message.contains(expected), "{port}: {message}");
        assert_eq!(all(data).await, "");
    }
    // The connection goes on.
    let _next = open(&mut connection, "data").await;
}

#[tokio::test]
async fn half_a_pair_is_given_up() {
    let (server, backend) = start(|config| config.stream_creation_timeout = Duration::from_millis(100)).await;
    let mut connection = connect(&server, &port_forward(&server, &[]), "portforward.k8s.io").await;
    let headers = || Headers::from([("streamType", "data"), ("port", "1"), ("requestID", "5")]);
    let mut lone = soon(connection.open(headers())).await.expect("opens");
    let mut rest = Vec::new();
    let _ = soon(lone.reader.read_to_end(&mut rest)).await;
    assert_eq!(backend.running.load(Ordering::SeqCst), 0);
    until("the stream is gone", || connection.open_streams() == 0).await;
}
