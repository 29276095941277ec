//! Byte streams of the Stream service: exec, attach, port-forward.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use catamaran_sandbox::protocol::STDIN_KEEP;
use catamaran_sandbox::protocol::STDIN_ONCE;
use catamaran_sandbox::protocol::stream::{AttachSession, ExecSession, OpenRequest, PortForwardSession};
use catamaran_sandbox::stream_frames::{self, Exit, Frame, FrameReader, TerminalSize};
use containerd_shim_protos::ttrpc::Code;

use crate::harness::{Options, Pod, code_of, ctx, log_lines, process};

fn exec(id: &str, args: &[&str], terminal: bool, stdin: bool) -> OpenRequest {
    let mut session = ExecSession::new();
    session.container_id = id.to_owned();
    session.process = serde_json::to_vec(&process(args, terminal)).unwrap();
    (session.stdin, session.stdout, session.stderr) = (stdin, true, true);
    let mut request = OpenRequest::new();
    request.set_exec(session);
    request
}

fn attach(id: &str, stdin: bool) -> OpenRequest {
    let mut session = AttachSession::new();
    session.container_id = id.to_owned();
    (session.stdin, session.stdout, session.stderr) = (stdin, true, true);
    let mut request = OpenRequest::new();
    request.set_attach(session);
    request
}

fn forward(port: u32) -> OpenRequest {
    let mut session = PortForwardSession::new();
    session.port = port;
    let mut request = OpenRequest::new();
    request.set_port_forward(session);
    request
}

fn input(data: impl Into<Vec<u8>>) -> Frame {
    Frame::Input(Bytes::from(data.into()))
}

#[tokio::test]
async fn an_exec_session_carries_all_streams_and_the_exit_code() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let mut session = pod
        .open(exec(
            &one.id,
            &["sh", "-c", "cat; echo err >&2; exit 6"],
            false,
            true,
        ))
        .await;
    let sent = vec![b'z'; 300_000];
    let (mut reader, mut writer) = (session.reader, session.writer);
    let sending = tokio::spawn({
        let sent = sent.clone();
        async move {
            stream_frames::write_frame(&mut writer, &input(sent))
                .await
                .unwrap();
            stream_frames::write_frame(&mut writer, &Frame::End)
                .await
                .unwrap();
            writer
        }
    });
    let (mut stdout, mut stderr, mut others) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(frame) = reader.next().await.unwrap() {
        match frame {
            Frame::Stdout(data) => stdout.extend_from_slice(&data),
            Frame::Stderr(data) => stderr.extend_from_slice(&data),
            other => others.push(other),
        }
    }
    drop(sending.await.unwrap());
    assert!(stdout == sent, "{} bytes came back", stdout.len());
    assert_eq!(stderr, b"err\n");
    assert_eq!(others, [Frame::OutputEnd, Frame::Exit(Exit::Code(6))]);

    session = pod.open(exec(&one.id, &["nonsense"], false, false)).await;
    let (_, _, others) = session.rest().await;
    assert!(
        matches!(&others[..], [Frame::Exit(Exit::Error(text))] if text.contains("nonsense")),
        "{others:?}"
    );
}

#[tokio::test]
async fn an_exec_with_a_terminal_is_resized_and_dies_with_its_client() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let mut session = pod.open(exec(&one.id, &["sh"], true, true)).await;
    session
        .send(Frame::Resize(TerminalSize {
            width: 91,
            height: 37,
        }))
        .await;
    session.send(input("stty size\n")).await;
    assert!(
        session.until("37 91\r\n").await.contains("stty size"),
        "a terminal echoes"
    );
    session.send(input("exit 9\n")).await;
    let (_, _, others) = session.rest().await;
    assert_eq!(others, [Frame::OutputEnd, Frame::Exit(Exit::Code(9))]);

    let mut session = pod
        .open(exec(&one.id, &["sh", "-c", "echo up; sleep 987"], false, true))
        .await;
    session.until("up").await;
    assert!(pod.pids(&one.id).await.len() > 1);
    drop(session);
    let begun = Instant::now();
    while pod.pids(&one.id).await.len() > 1 {
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "the exec outlives its client"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn everybody_attached_sees_the_output_and_stdin_is_kept() {
    let pod = Pod::start(Options::default()).await;
    let mut one = pod.container(&["sh", "-c", "while read line; do echo got $line; done; echo end"]);
    one.stdin = STDIN_KEEP;
    pod.run(&one).await;
    let mut first = pod.open(attach(&one.id, true)).await;
    let mut second = pod.open(attach(&one.id, false)).await;
    // Both are attached when both have seen something.
    first.send(input("one\n")).await;
    first.until("got one").await;
    first.send(input("two\n")).await;
    second.until("got two").await;
    first.send(Frame::End).await;
    drop(first);
    let mut third = pod.open(attach(&one.id, true)).await;
    third.send(input("three\n")).await;
    third.until("got three").await;
    let mut close = containerd_shim_protos::api::CloseIORequest::new();
    (close.id, close.stdin) = (one.id.clone(), true);
    pod.task().close_io(ctx(), &close).await.unwrap();
    let (stdout, _, others) = third.rest().await;
    assert!(stdout.ends_with(b"end\n"));
    assert_eq!(others, [Frame::OutputEnd, Frame::Exit(Exit::Code(0))]);
    let lines = log_lines(&pod.log_of(&one.id), "stdout");
    let texts: Vec<&str> = lines.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!(texts, ["got one", "got two", "got three", "end"]);
    assert_eq!(
        code_of(pod.stream().open(ctx(), &attach(&one.id, false)).await),
        Code::FAILED_PRECONDITION
    );
}

#[tokio::test]
async fn stdin_once_ends_with_its_attachment() {
    let pod = Pod::start(Options::default()).await;
    let mut one = pod.container(&["sh", "-c", "cat > /tmp/in; cat /tmp/in; exit 2"]);
    one.stdin = STDIN_ONCE;
    pod.run(&one).await;
    let mut session = pod.open(attach(&one.id, true)).await;
    session.send(input("words")).await;
    session.send(Frame::End).await;
    let (stdout, _, others) = session.rest().await;
    assert_eq!(stdout, b"words");
    assert_eq!(others, [Frame::OutputEnd, Frame::Exit(Exit::Code(2))]);
}

#[tokio::test]
async fn a_container_with_a_terminal_is_attached_to() {
    let pod = Pod::start(Options::default()).await;
    let mut one = pod.container(&["sh"]);
    (one.terminal, one.stdin) = (true, STDIN_KEEP);
    pod.run(&one).await;
    let mut session = pod.open(attach(&one.id, true)).await;
    session
        .send(Frame::Resize(TerminalSize {
            width: 80,
            height: 25,
        }))
        .await;
    session.send(input("stty size; exit 3\n")).await;
    session.until("25 80\r\n").await;
    assert_eq!(pod.wait(&one.id).await, 3);
    assert!(
        log_lines(&pod.log_of(&one.id), "stdout")
            .iter()
            .any(|(_, text)| text == "25 80")
    );
}

#[tokio::test]
async fn ports_are_the_pods_own_in_both_address_families() {
    let pod = Pod::start(Options {
        network: true,
        ..Options::default()
    })
    .await;
    let network = pod.spec.namespaces.network.clone().unwrap();
    let listeners = std::thread::spawn(move || {
        let namespace = std::fs::File::open(&network).unwrap();
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let echo = |address: &str| {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                stream.write_all(&all).unwrap();
            });
            u32::from(port)
        };
        [echo("127.0.0.1:0"), echo("[::1]:0")]
    });
    for port in listeners.join().unwrap() {
        let mut session = pod.open(forward(port)).await;
        let sent = vec![b'p'; 200_000];
        session.send(input(sent.clone())).await;
        session.send(Frame::End).await;
        let (received, _, others) = session.rest().await;
        assert!(received == sent, "{} bytes came back", received.len());
        assert_eq!(others, [Frame::End, Frame::Exit(Exit::Code(0))]);
    }
    let mut closed = pod.open(forward(9)).await;
    assert!(
        matches!(&closed.rest().await.2[..], [Frame::Exit(Exit::Error(text))] if text.contains("refused"))
    );
    assert_eq!(
        code_of(pod.stream().open(ctx(), &forward(70_000)).await),
        Code::INVALID_ARGUMENT
    );
}

#[tokio::test]
async fn a_token_is_good_once_and_a_wrong_one_never() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let opened = pod
        .stream()
        .open(ctx(), &exec(&one.id, &["echo", "hi"], false, false))
        .await
        .unwrap();
    let address = Path::new(&opened.address);
    for (token, good) in [
        (&[7; 16][..], false),
        (&opened.token[..], true),
        (&opened.token[..], false),
    ] {
        let stream = stream_frames::connect(address, token).await.unwrap();
        let mut reader = FrameReader::new(stream);
        // A refused connection closes without a frame, or with a reset, as the token was not read to its end.
        let first = reader.next().await;
        assert_eq!(matches!(first, Ok(Some(_))), good, "{first:?}");
    }
    let mut refused = None;
    for _ in 0..300 {
        if let Err(error) = pod
            .stream()
            .open(ctx(), &exec(&one.id, &["true"], false, false))
            .await
        {
            refused = Some(error);
            break;
        }
    }
    assert_eq!(
        code_of::<()>(Err(refused.expect("bounded"))),
        Code::RESOURCE_EXHAUSTED
    );
}
