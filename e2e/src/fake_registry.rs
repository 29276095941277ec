//! A registry that misbehaves as a test asks: hangs, sends other bytes than the digest says, breaks off, wants
//! credentials. Read-only; the images are in memory. docker-registry serves everything that is not about faults.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;

use crate::image::Image;

/// How it misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Not at all.
    None,
    /// Takes the connection and never answers.
    Silent,
    /// Sends a part of each blob, then nothing.
    Stalls,
    /// Changes a byte of each blob.
    WrongBytes,
    /// Closes the connection in the middle of each blob.
    BreaksOff,
}

struct Content {
    kind: String,
    bytes: Vec<u8>,
    blob: bool,
}

struct Shared {
    content: BTreeMap<String, Content>,
    fault: Fault,
    /// The value of the Authorization header that is wanted.
    authorization: Option<String>,
    requests: Mutex<Vec<String>>,
    stopped: AtomicBool,
}

/// The running server.
pub struct FakeRegistry {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl FakeRegistry {
    /// Serves images by `repository:tag`. `authorization` is the header's value that every request must carry.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(images: &[(&str, &Image)], fault: Fault, authorization: Option<&str>) -> Result<Self> {
        let mut content = BTreeMap::new();
        for (name, image) in images {
            let (repository, tag) = name.split_once(':').unwrap_or((name, "latest"));
            for blob in &image.blobs {
                let path = format!("/v2/{repository}/blobs/{}", blob.digest);
                let kind = "application/octet-stream".to_owned();
                content.insert(
                    path,
                    Content {
                        kind,
                        bytes: blob.bytes.clone(),
                        blob: true,
                    },
                );
            }
            for name in [tag, &image.manifest.digest] {
                let (kind, bytes) = (image.manifest.media_type.clone(), image.manifest.bytes.clone());
                content.insert(
                    format!("/v2/{repository}/manifests/{name}"),
                    Content {
                        kind,
                        bytes,
                        blob: false,
                    },
                );
            }
        }
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            content,
            fault,
            authorization: authorization.map(str::to_owned),
            requests: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let server = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if server.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let server = server.clone();
                // A client that goes away ends its thread with an error that concerns nobody.
                std::thread::spawn(move || drop(serve(&server, stream)));
            }
        });
        Ok(Self { address, shared })
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The full reference of a name.
    #[must_use]
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Method and path of each request so far.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.shared
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        drop(TcpStream::connect(self.address));
    }
}

fn serve(shared: &Shared, mut stream: TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line.trim_end().is_empty() {
                break;
            }
            head.push(line.trim_end().to_owned());
        }
        let request = head.first().cloned().unwrap_or_default();
        let mut words = request.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        shared
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(format!("{method} {target}"));
        if shared.fault == Fault::Silent {
            return wait_for_end(shared, &stream);
        }
        let given = head.iter().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("authorization")
                .then(|| value.trim().to_owned())
        });
        if shared.authorization.is_some() && given != shared.authorization {
            let challenge = "www-authenticate: Basic realm=\"e2e\"\r\n";
            answer(
                &mut stream,
                method,
                "401 Unauthorized",
                "application/json",
                challenge,
                b"{\"errors\":[]}",
            )?;
            continue;
        }
        let path = target.split('?').next().unwrap_or_default();
        match shared.content.get(path) {
            _ if path == "/v2/" => answer(&mut stream, method, "200 OK", "application/json", "", b"{}")?,
            None => {
                let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
                answer(&mut stream, method, "404 Not Found", "application/json", "", body)?;
            }
            Some(content) => {
                let mut bytes = content.bytes.clone();
                let extra = format!(
                    "docker-content-digest: {}\r\n",
                    crate::image::digest(&content.bytes)
                );
                match shared.fault {
                    Fault::WrongBytes if content.blob => {
                        if let Some(byte) = bytes.last_mut() {
                            *byte ^= 1;
                        }
                    }
                    Fault::Stalls | Fault::BreaksOff if content.blob && method == "GET" => {
                        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", bytes.len());
                        stream.write_all(head.as_bytes())?;
                        stream.write_all(&bytes[..bytes.len() / 2])?;
                        stream.flush()?;
                        return match shared.fault {
                            Fault::Stalls => wait_for_end(shared, &stream),
                            _ => Ok(()),
                        };
                    }
                    _ => {}
                }
                answer(&mut stream, method, "200 OK", &content.kind, &extra, &bytes)?;
            }
        }
    }
}

fn answer(
    stream: &mut TcpStream,
    method: &str,
    status: &str,
    kind: &str,
    extra: &str,
    body: &[u8],
) -> Result<()> {
    let length = body.len();
    let head =
        format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n{extra}\r\n");
    stream.write_all(head.as_bytes())?;
    if method != "HEAD" {
        stream.write_all(body)?;
    }
    Ok(())
}

/// Holds the connection open and silent until the client closes it or the server is dropped.
fn wait_for_end(shared: &Shared, stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut reader = stream.try_clone()?;
    let mut byte = [0u8; 256];
    while !shared.stopped.load(Ordering::SeqCst) {
        match std::io::Read::read(&mut reader, &mut byte) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
