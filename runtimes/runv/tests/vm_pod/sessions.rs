//! Byte streams into the guest: exec with and without a terminal, standard input, port-forward.

use catamaran_sandbox::protocol::stream::{ExecSession, OpenRequest, PortForwardSession};
use catamaran_sandbox::stream_frames::{self, Exit, Frame, FrameReader, TerminalSize, write_frame};
use serde_json::json;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::UnixStream;

use crate::rig::{self, Rig, Shim, call};

async fn open(
    shim: &Shim,
    request: &OpenRequest,
) -> (FrameReader<ReadHalf<UnixStream>>, WriteHalf<UnixStream>) {
    let opened = shim.stream.open(call(), request).await.unwrap();
    let stream = stream_frames::connect(opened.address.as_ref(), &opened.token)
        .await
        .unwrap();
    let (reader, writer) = tokio::io::split(stream);
    (FrameReader::new(reader), writer)
}

fn exec(id: &str, arguments: &[&str], terminal: bool) -> OpenRequest {
    let process = json!({
        "terminal": terminal, "user": { "uid": 0, "gid": 0 }, "args": arguments, "env": ["PATH=/bin"], "cwd": "/",
    });
    let mut session = ExecSession::new();
    session.container_id = id.to_owned();
    session.process = process.to_string().into_bytes();
    session.stdin = true;
    session.stdout = true;
    session.stderr = !terminal;
    let mut request = OpenRequest::new();
    request.set_exec(session);
    request
}

/// The next frame, which comes soon or never.
async fn next(reader: &mut FrameReader<ReadHalf<UnixStream>>, so_far: &[u8]) -> Option<Frame> {
    match tokio::time::timeout(std::time::Duration::from_secs(60), reader.next()).await {
        Ok(frame) => frame.unwrap(),
        Err(_) => panic!(
            "no frame after {} bytes: {}",
            so_far.len(),
            String::from_utf8_lossy(&so_far[..so_far.len().min(200)])
        ),
    }
}

/// Reads to the exit frame; what came on stdout and how it ended.
async fn finish(reader: &mut FrameReader<ReadHalf<UnixStream>>) -> (Vec<u8>, Option<Exit>) {
    let mut output = Vec::new();
    while let Some(frame) = next(reader, &output).await {
        match frame {
            Frame::Stdout(bytes) => output.extend_from_slice(&bytes),
            Frame::Exit(exit) => return (output, Some(exit)),
            _ => {}
        }
    }
    (output, None)
}

#[tokio::test]
async fn sessions_carry_input_terminals_and_ports() {
    if let Some(reason) = rig::missing() {
        println!("skipped: sessions_carry_input_terminals_and_ports: {reason}");
        return;
    }
    let rig = Rig::new();
    let shim = rig.pod().await;
    let container = rig.container(
        "c1",
        &["sh", "-c", "while :; do nc -l -p 7000 -e cat; done"],
        |_| {},
    );
    shim.run(&container).await.unwrap();

    // Half a megabyte in and out, ended by the end of the input.
    let (mut reader, mut writer) = open(&shim, &exec("c1", &["cat"], false)).await;
    let data: Vec<u8> = (0..512 * 1024_u32).map(|number| (number % 251) as u8).collect();
    let sent = data.clone();
    let sending = tokio::spawn(async move {
        for chunk in sent.chunks(16 * 1024) {
            write_frame(&mut writer, &Frame::Input(chunk.to_vec().into()))
                .await
                .unwrap();
        }
        write_frame(&mut writer, &Frame::End).await.unwrap();
        writer
    });
    let (output, exit) = finish(&mut reader).await;
    assert!(matches!(exit, Some(Exit::Code(0))), "{exit:?}");
    assert!(
        output == data,
        "{} of {} bytes came back",
        output.len(),
        data.len()
    );
    sending.await.unwrap();

    // A terminal of a size, with input.
    let (mut reader, mut writer) = open(&shim, &exec("c1", &["sh"], true)).await;
    write_frame(
        &mut writer,
        &Frame::Resize(TerminalSize {
            width: 100,
            height: 40,
        }),
    )
    .await
    .unwrap();
    // The size and the input take different ways.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    write_frame(&mut writer, &Frame::Input("busybox stty size; exit 5\n".into()))
        .await
        .unwrap();
    let (output, exit) = finish(&mut reader).await;
    let output = String::from_utf8_lossy(&output).into_owned();
    assert!(output.contains("40 100"), "{output}");
    assert!(matches!(exit, Some(Exit::Code(5))), "{exit:?} {output}");

    // A port on the guest's own localhost.
    let mut request = OpenRequest::new();
    let mut session = PortForwardSession::new();
    session.port = 7000;
    request.set_port_forward(session);
    let (mut reader, mut writer) = open(&shim, &request).await;
    write_frame(&mut writer, &Frame::Input("over the port".into()))
        .await
        .unwrap();
    let mut echoed = Vec::new();
    while echoed.len() < 13 {
        match next(&mut reader, &echoed).await {
            Some(Frame::Stdout(bytes)) => echoed.extend_from_slice(&bytes),
            other => panic!("{other:?} after {echoed:?}"),
        }
    }
    assert_eq!(echoed, b"over the port");
    drop((reader, writer));
    shim.stop().await;
    rig.assert_clean();
}
