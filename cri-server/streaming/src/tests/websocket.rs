//! Commands over WebSockets, by messages.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{exec, port_forward, soon, start, until};
use crate::Server;

type Socket = WebSocketStream<TcpStream>;

async fn connect(server: &Server, url: &str, protocol: &str) -> Result<Socket, Error> {
    let mut request = url.replace("http://", "ws://").into_client_request()?;
    request
        .headers_mut()
        .insert("sec-websocket-protocol", protocol.parse().expect("value"));
    let stream = TcpStream::connect(server.local_addr()).await.expect("connects");
    soon(tokio_tungstenite::client_async(request, stream))
        .await
        .map(|(socket, _)| socket)
}

async fn send(socket: &mut Socket, bytes: &[u8]) {
    soon(socket.send(Message::Binary(bytes.to_vec().into())))
        .await
        .expect("sends");
}

/// Everything by channel until the close, whose code is given too.
async fn rest(socket: &mut Socket) -> ([Vec<u8>; 4], Option<CloseCode>) {
    let mut channels: [Vec<u8>; 4] = Default::default();
    while let Some(next) = soon(socket.next()).await {
        match next.expect("a message") {
            Message::Binary(data) => channels[usize::from(data[0])].extend_from_slice(&data[1..]),
            Message::Close(frame) => return (channels, frame.map(|frame| frame.code)),
            _ => {}
        }
    }
    (channels, None)
}

#[tokio::test]
async fn channels() {
    let (server, _) = start(|_| {}).await;
    for protocol in ["v5.channel.k8s.io", "v4.channel.k8s.io"] {
        let mut socket = connect(&server, &exec(&server, &["both"], "oe"), protocol)
            .await
            .expect("connects");
        let (channels, code) = rest(&mut socket).await;
        assert_eq!((&channels[1][..], &channels[2][..]), (&b"out"[..], &b"err"[..]));
        assert!(String::from_utf8_lossy(&channels[3]).contains(r#""reason":"ExitCode","message":"7""#));
        assert_eq!(code, Some(CloseCode::Normal));
    }
}

#[tokio::test]
async fn closing_the_input() {
    let (server, _) = start(|_| {}).await;
    let mut socket = connect(&server, &exec(&server, &["cat"], "io"), "v5.channel.k8s.io")
        .await
        .expect("connects");
    send(&mut socket, b"\x00to ").await;
    send(&mut socket, b"").await;
    send(&mut socket, b"\x00").await;
    send(&mut socket, b"\x09unknown").await;
    send(&mut socket, b"\x00and fro").await;
    send(&mut socket, &[255, 0]).await;
    send(&mut socket, b"\x00too late").await;
    let (channels, _) = rest(&mut socket).await;
    assert_eq!(channels[1], b"to and fro");

    // Version 4 knows no such signal.
    let mut socket = connect(&server, &exec(&server, &["cat"], "io"), "v4.channel.k8s.io")
        .await
        .expect("connects");
    send(&mut socket, &[255, 0]).await;
    send(&mut socket, b"\x00more").await;
    let mut data = Vec::new();
    while data != b"\x01more" {
        data = soon(socket.next())
            .await
            .expect("a message")
            .expect("a message")
            .into_data()
            .to_vec();
    }
}

#[tokio::test]
async fn an_input_that_is_cut() {
    let (server, backend) = start(|_| {}).await;
    for protocol in ["v5.channel.k8s.io", "v4.channel.k8s.io"] {
        let mut socket = connect(&server, &exec(&server, &["cat"], "io"), protocol)
            .await
            .expect("connects");
        send(&mut socket, b"\x00half a file").await;
        until("the command runs", || backend.running.load(Ordering::SeqCst) == 1).await;
        drop(socket);
        until("the command ends", || backend.running.load(Ordering::SeqCst) == 0).await;
        assert_eq!(
            backend.whole_inputs.load(Ordering::SeqCst),
            0,
            "half an input must not look like a whole one"
        );
    }
}

#[tokio::test]
async fn sizes() {
    let (server, _) = start(|_| {}).await;
    let mut socket = connect(&server, &exec(&server, &["size"], "ot"), "v5.channel.k8s.io")
        .await
        .expect("connects");
    send(&mut socket, b"\x04{\"Width\":80,\"Height\":24}").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    send(&mut socket, b"\x04{\"Width\":1,\"Height\":1}").await;
    let (channels, _) = rest(&mut socket).await;
    assert_eq!(channels[1], b"80x24");
}

#[tokio::test]
async fn refused_and_broken_clients() {
    let (server, backend) = start(|config| config.ping_interval = Duration::from_millis(100)).await;
    let url = exec(&server, &["wait"], "io");
    let refused = connect(&server, &url, "base64.channel.k8s.io").await;
    assert!(matches!(refused, Err(Error::Http(answer)) if answer.status() == 400));

    // A text message ends it.
    let mut socket = connect(&server, &url, "v5.channel.k8s.io")
        .await
        .expect("the URL is still good");
    until("the command runs", || backend.running.load(Ordering::SeqCst) == 1).await;
    soon(socket.send(Message::Text("hello".into())))
        .await
        .expect("sends");
    until("the command is dropped", || {
        backend.running.load(Ordering::SeqCst) == 0
    })
    .await;

    // So does one that is too large.
    let mut socket = connect(&server, &exec(&server, &["wait"], "io"), "v5.channel.k8s.io")
        .await
        .expect("connects");
    until("the command runs", || backend.running.load(Ordering::SeqCst) == 1).await;
    let _ = soon(socket.send(Message::Binary(vec![0; 2 << 20].into()))).await;
    until("the command is dropped", || {
        backend.running.load(Ordering::SeqCst) == 0
    })
    .await;

    // And a client that vanishes.
    let socket = connect(&server, &exec(&server, &["wait"], "io"), "v5.channel.k8s.io")
        .await
        .expect("connects");
    until("the command runs", || backend.running.load(Ordering::SeqCst) == 1).await;
    drop(socket);
    until("the command is dropped", || {
        backend.running.load(Ordering::SeqCst) == 0
    })
    .await;
    soon(server.shutdown()).await;
}

#[tokio::test]
async fn pings_are_answered_and_sent() {
    let (server, _) = start(|config| config.ping_interval = Duration::from_millis(100)).await;
    let mut socket = connect(&server, &exec(&server, &["wait"], "o"), "v5.channel.k8s.io")
        .await
        .expect("connects");
    soon(socket.send(Message::Ping(b"mine".to_vec().into())))
        .await
        .expect("sends");
    let (mut ping, mut pong) = (false, false);
    while !(ping && pong) {
        match soon(socket.next()).await.expect("a message").expect("a message") {
            Message::Ping(_) => ping = true,
            Message::Pong(data) => pong = data.as_ref() == b"mine",
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_tunnel_with_text_in_it() {
    let (server, _) = start(|_| {}).await;
    let url = port_forward(&server, &[]);
    let mut socket = connect(&server, &url, "SPDY/3.1+portforward.k8s.io")
        .await
        .expect("connects");
    soon(socket.send(Message::Text("no".into())))
        .await
        .expect("sends");
    while let Some(Ok(message)) = soon(socket.next()).await {
        if message.is_close() {
            break;
        }
    }
}
