//! The server as its clients see it, with a backend that answers by itself.

pub(crate) mod backend;
mod go_client;
mod http;
mod spdy;
mod websocket;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{AttachRequest, Config, ExecRequest, PortForwardRequest, Server};
use backend::TestBackend;

/// A server with its backend, to be changed by `change` before it listens.
async fn start(change: impl FnOnce(&mut Config)) -> (Server, Arc<TestBackend>) {
    let backend = Arc::new(TestBackend::default());
    let mut config = Config::default();
    change(&mut config);
    let server = Server::bind(config, Arc::clone(&backend) as _)
        .await
        .expect("listens");
    (server, backend)
}

/// An exec with the streams that letters name: i, o, e and t for a terminal.
fn exec(server: &Server, command: &[&str], streams: &str) -> String {
    let request = ExecRequest {
        container_id: "c1".into(),
        command: command.iter().map(ToString::to_string).collect(),
        tty: streams.contains('t'),
        stdin: streams.contains('i'),
        stdout: streams.contains('o'),
        stderr: streams.contains('e'),
    };
    server.exec(request).expect("a URL")
}

fn attach(server: &Server) -> String {
    let request = AttachRequest {
        container_id: "c1".into(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    server.attach(request).expect("a URL")
}

fn port_forward(server: &Server, ports: &[u16]) -> String {
    let request = PortForwardRequest {
        sandbox_id: "s1".into(),
        ports: ports.to_vec(),
    };
    server.port_forward(request).expect("a URL")
}

/// Path of a URL of this server.
fn path_of<'a>(server: &Server, url: &'a str) -> &'a str {
    url.strip_prefix(&format!("http://{}", server.local_addr()))
        .expect("a URL of the server")
}

/// Sends a request's head; the connection and the answer's head.
async fn request(server: &Server, url: &str, method: &str, headers: &str) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(server.local_addr()).await.expect("connects");
    let head = format!(
        "{method} {} HTTP/1.1\r\nHost: x\r\n{headers}\r\n",
        path_of(server, url)
    );
    stream.write_all(head.as_bytes()).await.expect("writes");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(_) => break,
        }
    }
    (stream, String::from_utf8(answer).expect("text"))
}

const SPDY: &str = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("in time")
}

/// Waits until a condition holds.
async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not in time: {what}");
}
