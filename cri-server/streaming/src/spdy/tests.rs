//! Connections against each other and against peers that break the rules.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::connection::{Connection, Limits};
use super::frame::{Control, HEAD, Head};
use super::headers::{Deflater, Headers, Inflater};
use super::stream::Stream;

const LIMITS: Limits = Limits {
    streams: 300,
    unaccepted: 200,
    idle: Duration::from_secs(3600),
    ping: Duration::from_secs(3600),
};

fn pair() -> (Connection, Connection) {
    let (a, b) = duplex(1 << 20);
    (Connection::server(a, LIMITS), Connection::client(b, LIMITS))
}

async fn stream_pair(server: &mut Connection, client: &mut Connection) -> (Stream, Stream) {
    let headers = Headers::from([("streamType", "data"), ("requestID", "7")]);
    let (ours, theirs) = tokio::join!(client.open(headers), server.accept());
    (theirs.expect("accepted"), ours.expect("opened"))
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

#[tokio::test]
async fn bytes_both_ways_with_half_close() {
    let (mut server, mut client) = pair();
    let (mut theirs, mut ours) = stream_pair(&mut server, &mut client).await;
    assert_eq!(theirs.headers.get("requestid"), Some("7"));

    let data = pattern(3_000_000);
    let sent = data.clone();
    let send = tokio::spawn(async move {
        ours.writer.write_all(&sent).await.expect("writes");
        ours.writer.shutdown().await.expect("ends");
        // Their direction is still open.
        let mut answer = String::new();
        ours.reader.read_to_string(&mut answer).await.expect("reads");
        answer
    });
    let mut received = Vec::new();
    theirs.reader.read_to_end(&mut received).await.expect("reads");
    assert!(received == data);
    theirs.writer.write_all(b"got it").await.expect("writes");
    theirs.writer.shutdown().await.expect("ends");
    assert_eq!(send.await.expect("task"), "got it");
    assert!(theirs.writer.write_all(b"x").await.is_err());
    assert_eq!((server.open_streams(), client.open_streams()), (0, 0));
}

#[tokio::test]
async fn a_hundred_streams() {
    let (mut server, mut client) = pair();
    let echo = tokio::spawn(async move {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let Stream {
                mut reader,
                mut writer,
                ..
            } = server.accept().await.expect("stream");
            tasks.spawn(async move {
                tokio::io::copy(&mut reader, &mut writer).await.expect("copies");
                writer.shutdown().await.expect("ends");
            });
        }
        while tasks.join_next().await.is_some() {}
        server
    });
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..100u8 {
        let Stream {
            mut reader,
            mut writer,
            ..
        } = client.open(Headers::default()).await.expect("opens");
        tasks.spawn(async move {
            let data = vec![n; 50_000];
            let send = async {
                writer.write_all(&data).await.expect("writes");
                writer.shutdown().await.expect("ends");
            };
            let mut back = Vec::new();
            let (_, read) = tokio::join!(send, reader.read_to_end(&mut back));
            read.expect("reads");
            assert!(back == vec![n; 50_000]);
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.expect("task");
    }
    let server = echo.await.expect("task");
    assert_eq!((server.open_streams(), client.open_streams()), (0, 0));
}

#[tokio::test]
async fn a_slow_reader_stops_its_sender_and_loses_nothing() {
    let (a, b) = duplex(64 << 10);
    let (mut server, mut client) = (Connection::server(a, LIMITS), Connection::client(b, LIMITS));
    let (mut theirs, mut ours) = stream_pair(&mut server, &mut client).await;
    let data = pattern(4 << 20);
    let sent = data.clone();
    let mut send = tokio::spawn(async move {
        ours.writer.write_all(&sent).await.expect("writes");
        ours.writer.shutdown().await.expect("ends");
        ours
    });
    // Nobody reads: what is on the way is bounded, so the sender cannot finish.
    assert!(
        tokio::time::timeout(Duration::from_millis(200), &mut send)
            .await
            .is_err()
    );
    let mut received = Vec::new();
    theirs.reader.read_to_end(&mut received).await.expect("reads");
    assert!(received == data);
    send.await.expect("task");
}

#[tokio::test]
async fn windows_of_a_peer_that_has_them() {
    let (a, b) = duplex(8 << 20);
    let mut server = Connection::server(a, LIMITS);
    let mut peer = RawPeer::new(b);
    peer.control(&Control::Settings {
        initial_window: Some(1000),
    })
    .await;
    peer.control(&Control::SynStream {
        stream: 1,
        fin: false,
        headers: Headers::default(),
    })
    .await;
    let mut stream = server.accept().await.expect("stream");
    assert!(matches!(
        peer.next().await,
        Frame::Control(Control::SynReply { stream: 1, .. })
    ));
    let mut write = tokio::spawn(async move {
        stream.writer.write_all(&[7; 3000]).await.expect("writes");
        stream
    });
    assert_eq!(peer.data(1, 1000).await, 1000);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), &mut write)
            .await
            .is_err()
    );
    peer.control(&Control::WindowUpdate {
        stream: 1,
        delta: 500,
    })
    .await;
    assert_eq!(peer.data(1, 500).await, 500);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), &mut write)
            .await
            .is_err()
    );
    peer.control(&Control::WindowUpdate {
        stream: 1,
        delta: 5000,
    })
    .await;
    assert_eq!(peer.data(1, 1500).await, 1500);
    write.await.expect("task");
}

#[tokio::test]
async fn the_connection_s_window() {
    let (a, b) = duplex(8 << 20);
    let mut server = Connection::server(a, LIMITS);
    let mut peer = RawPeer::new(b);
    // From 64 KiB down is not possible, so the window is used up first.
    peer.control(&Control::WindowUpdate { stream: 0, delta: 1 }).await;
    peer.control(&Control::SynStream {
        stream: 1,
        fin: false,
        headers: Headers::default(),
    })
    .await;
    let mut stream = server.accept().await.expect("stream");
    assert!(matches!(
        peer.next().await,
        Frame::Control(Control::SynReply { stream: 1, .. })
    ));
    let mut write = tokio::spawn(async move {
        stream.writer.write_all(&[7; 70_000]).await.expect("writes");
        stream
    });
    assert_eq!(peer.data(1, 65_537).await, 65_537);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), &mut write)
            .await
            .is_err()
    );
    peer.control(&Control::WindowUpdate {
        stream: 0,
        delta: 10_000,
    })
    .await;
    assert_eq!(peer.data(1, 4_463).await, 4_463);
    write.await.expect("task");
}

#[tokio::test]
async fn credit_is_given_for_what_is_read() {
    let (a, b) = duplex(8 << 20);
    let mut server = Connection::server(a, LIMITS);
    let mut peer = RawPeer::new(b);
    peer.control(&Control::SynStream {
        stream: 1,
        fin: false,
        headers: Headers::default(),
    })
    .await;
    let mut stream = server.accept().await.expect("stream");
    peer.raw(&[&[0, 0, 0, 1, 0, 0, 0x60, 0][..], &[1; 0x6000]].concat())
        .await;
    let mut read = vec![0; 0x6000];
    stream.reader.read_exact(&mut read).await.expect("reads");
    let mut credit = [0u32; 2];
    while credit.contains(&0) {
        if let Frame::Control(Control::WindowUpdate { stream, delta }) = peer.next().await {
            credit[stream as usize] += delta;
        }
    }
    assert!(credit[0] >= 0x4000 && credit[0] == credit[1]);
}

#[tokio::test]
async fn given_up_streams_are_forgotten() {
    let (mut server, mut client) = pair();
    // By the peer.
    let (mut theirs, ours) = stream_pair(&mut server, &mut client).await;
    drop(ours);
    let mut rest = Vec::new();
    // Its writer ended before the reset came.
    let _ = theirs.reader.read_to_end(&mut rest).await;
    drop(theirs);
    // By us, while the peer goes on writing.
    let (theirs, mut ours) = stream_pair(&mut server, &mut client).await;
    drop(theirs);
    let mut failed = false;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        failed = ours.writer.write_all(b"more").await.is_err();
        if failed {
            break;
        }
    }
    assert!(failed, "the peer must hear that nobody reads");
    drop(ours);
    assert_eq!((server.open_streams(), client.open_streams()), (0, 0));
}

#[tokio::test]
async fn too_many_streams_are_refused() {
    let (a, b) = duplex(1 << 20);
    let limits = Limits {
        streams: 2,
        unaccepted: 2,
        ..LIMITS
    };
    let mut server = Connection::server(a, limits);
    let mut peer = RawPeer::new(b);
    for stream in [1, 3, 5] {
        peer.control(&Control::SynStream {
            stream,
            fin: false,
            headers: Headers::default(),
        })
        .await;
    }
    assert!(matches!(
        peer.next().await,
        Frame::Control(Control::SynReply { stream: 1, .. })
    ));
    assert!(matches!(
        peer.next().await,
        Frame::Control(Control::SynReply { stream: 3, .. })
    ));
    assert_eq!(
        peer.next().await,
        Frame::Control(Control::Reset { stream: 5, status: 3 })
    );
    let first = server.accept().await.expect("stream");
    drop(first);
    // There is room again.
    assert!(matches!(
        peer.next().await,
        Frame::Data {
            stream: 1,
            fin: true,
            ..
        }
    ));
    assert!(matches!(
        peer.next().await,
        Frame::Control(Control::Reset { stream: 1, .. })
    ));
    peer.control(&Control::SynStream {
        stream: 7,
        fin: false,
        headers: Headers::default(),
    })
    .await;
    assert!(matches!(
        peer.next().await,
        Frame::Control(Control::SynReply { stream: 7, .. })
    ));
}

#[tokio::test]
async fn a_vanished_peer_is_an_error_and_a_finished_one_is_not() {
    let (a, b) = duplex(1 << 20);
    let mut server = Connection::server(a, LIMITS);
    let mut peer = RawPeer::new(b);
    for stream in [1, 3] {
        peer.control(&Control::SynStream {
            stream,
            fin: false,
            headers: Headers::default(),
        })
        .await;
    }
    let mut cut = server.accept().await.expect("stream");
    let mut finished = server.accept().await.expect("stream");
    peer.raw(&[0, 0, 0, 1, 0, 0, 0, 2, b'a', b'b']).await;
    peer.raw(&[0, 0, 0, 3, 1, 0, 0, 2, b'c', b'd']).await;
    drop(peer);
    server.closed().await;
    let mut text = String::new();
    assert!(cut.reader.read_to_string(&mut text).await.is_err());
    let mut text = String::new();
    finished
        .reader
        .read_to_string(&mut text)
        .await
        .expect("came to its end");
    assert_eq!(text, "cd");
    assert!(finished.writer.write_all(b"x").await.is_err());
    assert!(server.accept().await.is_none());
}

#[tokio::test]
async fn pings_are_answered_and_the_idle_are_closed() {
    let (a, b) = duplex(1 << 20);
    let limits = Limits {
        idle: Duration::from_millis(120),
        ping: Duration::from_millis(50),
        ..LIMITS
    };
    let server = Connection::server(a, limits);
    let mut peer = RawPeer::new(b);
    peer.control(&Control::Ping { id: 9 }).await;
    assert_eq!(peer.next().await, Frame::Control(Control::Ping { id: 9 }));
    assert_eq!(peer.next().await, Frame::Control(Control::Ping { id: 2 }));
    loop {
        match peer.next().await {
            Frame::Control(Control::Ping { id: 2 }) => {}
            other => {
                assert_eq!(
                    other,
                    Frame::Control(Control::GoAway {
                        last_stream: 0,
                        status: 0
                    })
                );
                break;
            }
        }
    }
    server.closed().await;
}

#[tokio::test]
async fn breaking_the_protocol_ends_the_connection() {
    let syn = |stream| {
        let mut bytes = Vec::new();
        let frame = Control::SynStream {
            stream,
            fin: false,
            headers: Headers::default(),
        };
        frame.encode(&mut Deflater::new(), &mut bytes);
        bytes
    };
    for (bytes, what) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "not SPDY"),
        (vec![0x80, 2, 0, 1, 0, 0, 0, 12], "version 2"),
        (
            vec![0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
            "control frame of 16 MiB",
        ),
        (vec![0, 0, 0, 1, 0, 0, 0, 1, b'x'], "data without a stream"),
        (
            vec![0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff],
            "window overflow",
        ),
        (syn(2), "even id"),
        (
            [
                syn(3),
                vec![0x80, 3, 0, 1, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            ]
            .concat(),
            "id going back",
        ),
        (
            vec![0x80, 3, 0, 8, 0, 0, 0, 8, 0, 0, 0, 1, 1, 2, 3, 4],
            "headers that are not zlib",
        ),
    ] {
        let (a, mut b) = duplex(1 << 20);
        let server = Connection::server(a, LIMITS);
        b.write_all(&bytes).await.expect("writes");
        let closed = tokio::time::timeout(Duration::from_secs(5), server.closed()).await;
        assert!(closed.is_ok(), "{what}");
        let mut said = Vec::new();
        b.read_to_end(&mut said).await.expect("the end");
        let goodbye = [0x80, 3, 0, 7, 0, 0, 0, 8];
        assert!(said.windows(8).any(|bytes| bytes == goodbye), "{what}: {said:?}");
    }
}

#[tokio::test]
async fn a_data_frame_of_16_mebibytes_is_not_held() {
    let (a, b) = duplex(64 << 10);
    let mut server = Connection::server(a, LIMITS);
    let mut peer = RawPeer::new(b);
    peer.control(&Control::SynStream {
        stream: 1,
        fin: false,
        headers: Headers::default(),
    })
    .await;
    let mut stream = server.accept().await.expect("stream");
    let mut write = tokio::spawn(async move {
        peer.raw(&[0, 0, 0, 1, 1, 0xff, 0xff, 0xff]).await;
        for _ in 0..255 {
            peer.raw(&[5; 65536]).await;
        }
        peer.raw(&[5; 65535]).await;
        peer
    });
    assert!(
        tokio::time::timeout(Duration::from_millis(100), &mut write)
            .await
            .is_err()
    );
    let mut total = 0;
    let mut buffer = vec![0; 100_000];
    while let Ok(length @ 1..) = stream.reader.read(&mut buffer).await {
        total += length;
    }
    assert_eq!(total, 0xff_ffff);
    write.await.expect("task");
}

#[derive(Debug, PartialEq)]
enum Frame {
    Control(Control),
    Data { stream: u32, fin: bool, bytes: Vec<u8> },
}

/// A peer that does what a test says, frame by frame.
struct RawPeer {
    io: DuplexStream,
    inflater: Inflater,
    deflater: Deflater,
}

impl RawPeer {
    fn new(io: DuplexStream) -> RawPeer {
        RawPeer {
            io,
            inflater: Inflater::new(),
            deflater: Deflater::new(),
        }
    }

    async fn raw(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.expect("writes");
    }

    async fn control(&mut self, control: &Control) {
        let mut bytes = Vec::new();
        control.encode(&mut self.deflater, &mut bytes);
        self.raw(&bytes).await;
    }

    async fn next(&mut self) -> Frame {
        let mut head = [0; HEAD];
        self.io.read_exact(&mut head).await.expect("a frame");
        match Head::parse(head).expect("a head") {
            Head::Data { stream, fin, length } => {
                let mut bytes = vec![0; length];
                self.io.read_exact(&mut bytes).await.expect("data");
                Frame::Data { stream, fin, bytes }
            }
            Head::Control { kind, flags, length } => {
                let mut payload = vec![0; length];
                self.io.read_exact(&mut payload).await.expect("payload");
                Frame::Control(Control::parse(kind, flags, &payload, &mut self.inflater).expect("control"))
            }
        }
    }

    /// Reads data frames until `wanted` bytes have come.
    async fn data(&mut self, id: u32, wanted: usize) -> usize {
        let mut total = 0;
        while total < wanted {
            match self.next().await {
                Frame::Data { stream, bytes, .. } if stream == id => total += bytes.len(),
                other => panic!("{other:?}"),
            }
        }
        total
    }
}

#[derive(Debug, Clone)]
enum Step {
    Bytes(Vec<u8>),
    Syn(u32, bool),
    Data(u32, bool, Vec<u8>),
    Reset(u32),
    Window(u32, u32),
    Settings(u32),
    Ping(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let id = || prop_oneof![5 => 0..8u32, 1 => any::<u32>()];
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Bytes),
        8 => (id(), any::<bool>()).prop_map(|(id, fin)| Step::Syn(id, fin)),
        8 => (id(), any::<bool>(), proptest::collection::vec(any::<u8>(), 0..50))
            .prop_map(|(id, fin, data)| Step::Data(id, fin, data)),
        2 => id().prop_map(Step::Reset),
        2 => (id(), 1..0x7fff_ffffu32).prop_map(|(id, delta)| Step::Window(id, delta)),
        1 => any::<u32>().prop_map(Step::Settings),
        1 => any::<u32>().prop_map(Step::Ping),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a peer sends, the connection ends when the peer does, nothing panics, nothing stays.
    #[test]
    fn hostile_peers(steps in proptest::collection::vec(step(), 0..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let (a, mut b) = duplex(1 << 20);
            let mut server = Connection::server(a, Limits { streams: 3, unaccepted: 2, ..LIMITS });
            let mut deflater = Deflater::new();
            let mut bytes = Vec::new();
            for step in steps {
                let control = match step {
                    Step::Bytes(raw) => { bytes.extend(raw); continue }
                    Step::Data(id, fin, data) => {
                        bytes.extend((id & 0x7fff_ffff).to_be_bytes());
                        bytes.extend([u8::from(fin), 0, 0, data.len() as u8]);
                        bytes.extend(data);
                        continue
                    }
                    Step::Syn(stream, fin) => Control::SynStream { stream, fin, headers: Headers::default() },
                    Step::Reset(stream) => Control::Reset { stream, status: 1 },
                    Step::Window(stream, delta) => Control::WindowUpdate { stream, delta },
                    Step::Settings(window) => Control::Settings { initial_window: Some(window) },
                    Step::Ping(id) => Control::Ping { id },
                };
                control.encode(&mut deflater, &mut bytes);
            }
            let _ = b.write_all(&bytes).await;
            let _ = b.shutdown().await;
            let serve = async {
                while let Some(mut stream) = server.accept().await {
                    tokio::spawn(async move {
                        let mut data = Vec::new();
                        let _ = stream.reader.read_to_end(&mut data).await;
                        let _ = stream.writer.write_all(&data).await;
                    });
                }
                server.closed().await;
            };
            tokio::time::timeout(Duration::from_secs(10), serve).await.expect("the connection ends");
            assert_eq!(server.open_streams(), 0);
        });
    }
}
