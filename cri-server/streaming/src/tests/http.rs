//! Tokens, methods and clients that stop half-way.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{SPDY, exec, port_forward, request, soon, start, until};
use crate::spdy::{Control, Deflater, Headers};
use crate::{ExecRequest, RequestError};

#[tokio::test]
async fn what_is_not_found() {
    let (server, _) = start(|_| {}).await;
    let url = exec(&server, &["exit", "0"], "o");
    let upgrade = format!("{SPDY}X-Stream-Protocol-Version: v4.channel.k8s.io\r\n");
    let status = async |url: &str, method: &str, headers: &str| {
        let (_, head) = soon(request(&server, url, method, headers)).await;
        head.split(' ').nth(1).unwrap_or_default().to_owned()
    };
    let base = format!("http://{}", server.local_addr());
    assert_eq!(
        status(&format!("{base}/exec/nothing"), "POST", &upgrade).await,
        "404"
    );
    assert_eq!(status(&format!("{base}/"), "GET", "").await, "404");
    assert_eq!(status(&format!("{url}/more"), "POST", &upgrade).await, "404");
    assert_eq!(
        status(&url.replace("/exec/", "/attach/"), "POST", &upgrade).await,
        "404"
    );
    assert_eq!(status(&url, "PUT", &upgrade).await, "405");
    assert_eq!(status(&url, "POST", "").await, "400");
    let unknown = format!("{SPDY}X-Stream-Protocol-Version: v9.channel.k8s.io\r\n");
    assert_eq!(status(&url, "POST", &unknown).await, "403");
    // After all that the URL is still good, once.
    assert_eq!(status(&url, "POST", &upgrade).await, "101");
    assert_eq!(status(&url, "POST", &upgrade).await, "404");
    soon(server.shutdown()).await;
}

#[tokio::test]
async fn requests_that_make_no_sense() {
    let (server, _) = start(|_| {}).await;
    let good = ExecRequest {
        container_id: "c".into(),
        command: vec!["x".into()],
        tty: false,
        stdin: false,
        stdout: true,
        stderr: false,
    };
    assert!(server.exec(good.clone()).is_ok());
    for bad in [
        ExecRequest {
            command: vec![],
            ..good.clone()
        },
        ExecRequest {
            stdout: false,
            ..good.clone()
        },
        ExecRequest {
            tty: true,
            stderr: true,
            ..good.clone()
        },
    ] {
        assert!(matches!(server.exec(bad), Err(RequestError::Invalid(_))));
    }
}

#[tokio::test]
async fn requests_that_nobody_comes_for() {
    let (server, _) = start(|config| {
        config.max_tokens = 100;
        config.token_lifetime = Duration::from_secs(2);
    })
    .await;
    let request = ExecRequest {
        container_id: "c".into(),
        command: vec!["x".into()],
        tty: false,
        stdin: false,
        stdout: true,
        stderr: false,
    };
    let results: Vec<_> = (0..10_000).map(|_| server.exec(request.clone())).collect();
    assert!(results[..100].iter().all(Result::is_ok));
    assert_eq!(results[9_999], Err(RequestError::TooMany));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert!(server.exec(request).is_ok());
}

#[tokio::test]
async fn clients_that_stop_half_way() {
    let (server, backend) = start(|config| config.stream_creation_timeout = Duration::from_millis(200)).await;
    // Streams that never come.
    let url = exec(&server, &["wait"], "o");
    let upgrade = format!("{SPDY}X-Stream-Protocol-Version: v4.channel.k8s.io\r\n");
    let (mut stream, head) = soon(request(&server, &url, "POST", &upgrade)).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest))
        .await
        .expect("the server closes");
    assert_eq!(backend.running.load(Ordering::SeqCst), 0);

    // Not SPDY after the upgrade.
    let url = port_forward(&server, &[]);
    let upgrade = format!("{SPDY}X-Stream-Protocol-Version: portforward.k8s.io\r\n");
    let (mut stream, _) = soon(request(&server, &url, "POST", &upgrade)).await;
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("writes");
    soon(stream.read_to_end(&mut rest))
        .await
        .expect("the server closes");
}

/// A client that takes no more of an endless output holds its session for the idle time, not for ever.
#[tokio::test]
async fn clients_that_do_not_read() {
    let (server, backend) = start(|config| {
        config.idle_timeout = Duration::from_millis(600);
        config.ping_interval = Duration::from_millis(100);
    })
    .await;
    let running = || backend.running.load(Ordering::SeqCst);
    let socket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n";
    let url = exec(&server, &["flood"], "o");
    let (held, head) = soon(request(&server, &url, "GET", socket)).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    until("the command runs", || running() == 1).await;
    until("the command is given up", || running() == 0).await;
    drop(held);

    let url = exec(&server, &["flood"], "o");
    let upgrade = format!("{SPDY}X-Stream-Protocol-Version: v4.channel.k8s.io\r\n");
    let (mut held, _) = soon(request(&server, &url, "POST", &upgrade)).await;
    let mut frames = Vec::new();
    let mut deflater = Deflater::new();
    for (stream, kind) in [(1, "error"), (3, "stdout")] {
        let headers = Headers::from([("streamtype", kind)]);
        let open = Control::SynStream {
            stream,
            fin: false,
            headers,
        };
        open.encode(&mut deflater, &mut frames);
    }
    held.write_all(&frames).await.expect("writes");
    until("the command runs", || running() == 1).await;
    until("the command is given up", || running() == 0).await;
    drop(held);
    soon(server.shutdown()).await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let (server, _) = start(|config| config.max_connections = 2).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(TcpStream::connect(server.local_addr()).await.expect("connects"));
    }
    let mut third = TcpStream::connect(server.local_addr()).await.expect("connects");
    assert_eq!(soon(third.read(&mut [0; 1])).await.expect("closed"), 0);
    drop(held.pop());
    let url = exec(&server, &["exit", "0"], "o");
    let tried = std::sync::atomic::AtomicBool::new(false);
    // The slot is free again once the server has seen the end.
    for _ in 0..100 {
        let (_, head) = soon(request(&server, &url, "PUT", "")).await;
        if head.starts_with("HTTP/1.1 405 ") {
            tried.store(true, Ordering::SeqCst);
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    until("a slot is free again", || tried.load(Ordering::SeqCst)).await;
}
