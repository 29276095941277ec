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

use crate::harness::{Options, Pod, Session, code_of, ctx, log_lines, process};

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

/// How many processes a container has, once it is so many.
async fn until_processes(pod: &Pod, id: &str, count: usize) {
    let begun = Instant::now();
    while pod.pids(id).await.len() != count {
        assert!(begun.elapsed() < Duration::from_secs(5), "not {count} processes");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_exec_dies_with_its_client_whatever_it_reads_and_writes() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;

    // Only the writing side sees that nobody reads.
    let mut session = pod.open(exec(&one.id, &["yes"], false, false)).await;
    session.until("y").await;
    let socket: &tokio::net::UnixStream = session.reader.get_ref().as_ref();
    rustix::net::shutdown(socket, rustix::net::Shutdown::Read).unwrap();
    until_processes(&pod, &one.id, 1).await;

    // Its input is full, and the client's end is behind it.
    let mut session = pod.open(exec(&one.id, &["sleep", "987"], false, true)).await;
    fill(&mut session).await;
    until_processes(&pod, &one.id, 2).await;
    drop(session);
    until_processes(&pod, &one.id, 1).await;
}

/// Sends input until nobody takes any more.
async fn fill(session: &mut Session) {
    let frame = input(vec![b'x'; 32 * 1024]);
    let limit = Duration::from_millis(500);
    while let Ok(sent) =
        tokio::time::timeout(limit, stream_frames::write_frame(&mut session.writer, &frame)).await
    {
        sent.unwrap();
    }
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_a_containers_input_to_others() {
    let pod = Pod::start(Options::default()).await;
    let mut one = pod.container(&["sh", "-c", "sleep 987; cat"]);
    one.stdin = STDIN_KEEP;
    pod.run(&one).await;
    let mut session = pod.open(attach(&one.id, true)).await;
    fill(&mut session).await;
    drop(session);
    let mut close = containerd_shim_protos::api::CloseIORequest::new();
    (close.id, close.stdin) = (one.id.clone(), true);
    let task = pod.task();
    tokio::time::timeout(Duration::from_secs(5), task.close_io(ctx(), &close))
        .await
        .expect("the input is held")
        .unwrap();
}

#[tokio::test]
async fn many_terminals_at_once_are_not_mixed_up() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    for _ in 0..10 {
        pod.output(&one.id, &["true"]).await;
    }
    let terminals = (0..20).map(|number| {
        let (pod, id) = (&pod, &one.id);
        async move {
            let text = format!("number {number};");
            let mut session = pod.open(exec(id, &["echo", &text], true, false)).await;
            let (stdout, _, others) = session.rest().await;
            assert_eq!(String::from_utf8(stdout).unwrap(), format!("{text}\r\n"));
            assert_eq!(others, [Frame::OutputEnd, Frame::Exit(Exit::Code(0))]);
        }
    });
    futures::future::join_all(terminals).await;
}

/// 1,024 bytes.
fn numbered(line: usize) -> String {
    format!("{line:012}{}\n", "x".repeat(1011))
}

#[tokio::test]
async fn a_slow_reader_of_100_mb_costs_neither_the_log_nor_others_a_byte() {
    const LINES: usize = 102_400;
    let pod = Pod::start(Options::default()).await;
    let write = format!(
        "busybox awk 'BEGIN {{ p = \"x\"; while (length(p) < 1011) p = p \"x\"; \
         for (i = 0; i < {LINES}; i++) printf \"%012d%s\\n\", i, p }}'"
    );
    let mut one = pod.container(&[
        "sh",
        "-c",
        &format!("echo first; read line; echo second; read line; {write}"),
    ]);
    one.stdin = STDIN_KEEP;
    pod.run(&one).await;
    let mut fast = pod.open(attach(&one.id, true)).await;
    let mut slow = pod.open(attach(&one.id, false)).await;
    // Both are attached when both have seen something.
    tokio::time::sleep(Duration::from_secs(1)).await;
    fast.send(input("one\n")).await;
    fast.until("second\n").await;
    slow.until("second\n").await;
    fast.send(input("two\n")).await;
    let (mut bytes, mut line, mut ends) = (Vec::new(), 0, Vec::new());
    while let Some(frame) = fast.next().await {
        let Frame::Stdout(data) = frame else {
            ends.push(frame);
            continue;
        };
        bytes.extend_from_slice(&data);
        let whole = bytes.len() / 1024 * 1024;
        for taken in bytes.drain(..whole).as_slice().chunks(1024) {
            assert!(taken == numbered(line).as_bytes(), "line {line}");
            line += 1;
        }
    }
    assert_eq!((line, bytes.len()), (LINES, 0));
    assert_eq!(ends, [Frame::OutputEnd, Frame::Exit(Exit::Code(0))]);
    assert_eq!(pod.wait(&one.id).await, 0);

    let log = std::fs::read_to_string(pod.log_of(&one.id)).unwrap();
    let mut logged = 0;
    for (text, number) in log.lines().skip(2).zip(0..) {
        assert!(
            text.split_once(" stdout F ").unwrap().1 == numbered(number).trim_end(),
            "line {number} of the log"
        );
        logged += 1;
    }
    assert_eq!(logged, LINES);

    // It gets what was queued for it, in order, and is told why there is no more.
    let (stdout, _, others) = slow.rest().await;
    assert!(stdout.len() < 4 << 20, "{} bytes were kept for it", stdout.len());
    for (taken, number) in stdout.chunks_exact(1024).zip(0..) {
        assert!(taken == numbered(number).as_bytes(), "line {number}");
    }
    assert!(
        matches!(&others[..], [Frame::Exit(Exit::Error(text))] if text.contains("too slow")),
        "{others:?}"
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", pod.shim_pid())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 16 << 10, "the shim took {peak} KiB");
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
    // A client that goes away is seen whether the port takes nothing or has all and says nothing.
    let (port, _held) = silent_port(&pod);
    let descriptors = || {
        std::fs::read_dir(format!("/proc/{}/fd", pod.shim_pid()))
            .unwrap()
            .count()
    };
    let before = descriptors();
    for unread in [true, false] {
        let mut session = pod.open(forward(port)).await;
        if unread {
            fill(&mut session).await;
        } else {
            session.send(Frame::End).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        assert!(descriptors() > before);
        drop(session);
        let begun = Instant::now();
        while descriptors() > before {
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "the connection stays, unread: {unread}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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

/// A port in the pod whose connections wait for ever to be accepted, as long as the second value lives.
fn silent_port(pod: &Pod) -> (u32, TcpListener) {
    let network = pod.spec.namespaces.network.clone().unwrap();
    let listener = std::thread::spawn(move || {
        let namespace = std::fs::File::open(&network).unwrap();
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        TcpListener::bind("127.0.0.1:0").unwrap()
    });
    let listener = listener.join().unwrap();
    (u32::from(listener.local_addr().unwrap().port()), listener)
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
