//! A backend whose commands are small functions.

use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{AttachRequest, Backend, BackendError, Duplex, ExecRequest, Streams};

#[derive(Default)]
pub(crate) struct TestBackend {
    /// Calls that are running.
    pub(crate) running: AtomicUsize,
    /// Inputs of `cat` that came to their end.
    pub(crate) whole_inputs: AtomicUsize,
}

/// Counts a call while it runs.
struct Running<'a>(&'a AtomicUsize);

impl<'a> Running<'a> {
    fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::SeqCst);
        Running(counter)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn failed(error: std::io::Error) -> BackendError {
    BackendError::new(error)
}

/// What `big` writes: no two neighbouring chunks are equal, so lost and swapped ones are seen.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n % 251) as u8).collect()
}

#[async_trait]
impl Backend for TestBackend {
    async fn exec(&self, request: &ExecRequest, mut streams: Streams) -> Result<i32, BackendError> {
        let _running = Running::new(&self.running);
        let argument = request.command.get(1).map_or("", String::as_str);
        let number = || argument.parse::<usize>().expect("a number");
        match request.command[0].as_str() {
            "cat" => {
                let (stdin, stdout) = (streams.stdin.as_mut(), streams.stdout.as_mut());
                let (stdin, stdout) = (stdin.expect("stdin"), stdout.expect("stdout"));
                tokio::io::copy(stdin, stdout).await.map_err(failed)?;
                self.whole_inputs.fetch_add(1, Ordering::SeqCst);
                Ok(0)
            }
            "count" => {
                let mut input = Vec::new();
                streams
                    .stdin
                    .as_mut()
                    .expect("stdin")
                    .read_to_end(&mut input)
                    .await
                    .map_err(failed)?;
                let text = input.len().to_string();
                streams
                    .stdout
                    .as_mut()
                    .expect("stdout")
                    .write_all(text.as_bytes())
                    .await
                    .map_err(failed)?;
                Ok(0)
            }
            "exit" => Ok(number() as i32),
            "fail" => Err(BackendError::new("there is no such thing")),
            "big" => {
                let stdout = streams.stdout.as_mut().expect("stdout");
                stdout.write_all(&pattern(number())).await.map_err(failed)?;
                Ok(0)
            }
            "both" => {
                streams
                    .stdout
                    .as_mut()
                    .expect("stdout")
                    .write_all(b"out")
                    .await
                    .map_err(failed)?;
                if let Some(stderr) = &mut streams.stderr {
                    stderr.write_all(b"err").await.map_err(failed)?;
                }
                Ok(7)
            }
            // Ends at the size 1x1 and prints the last before it.
            "size" => {
                let mut text = String::new();
                while streams.resize.changed().await.is_ok() {
                    let size = streams.resize.borrow_and_update().expect("a size");
                    if (size.width, size.height) == (1, 1) {
                        break;
                    }
                    text = format!("{}x{}", size.width, size.height);
                }
                streams
                    .stdout
                    .as_mut()
                    .expect("stdout")
                    .write_all(text.as_bytes())
                    .await
                    .map_err(failed)?;
                Ok(0)
            }
            "flood" => {
                let stdout = streams.stdout.as_mut().expect("stdout");
                loop {
                    stdout.write_all(&[7; 4096]).await.map_err(failed)?;
                }
            }
            "wait" => {
                streams
                    .stdout
                    .as_mut()
                    .expect("stdout")
                    .write_all(b"waiting")
                    .await
                    .map_err(failed)?;
                std::future::pending().await
            }
            other => Err(BackendError::new(format_args!("unknown command {other}"))),
        }
    }

    async fn attach(&self, _: &AttachRequest, mut streams: Streams) -> Result<(), BackendError> {
        let _running = Running::new(&self.running);
        let (stdin, stdout) = (streams.stdin.as_mut(), streams.stdout.as_mut());
        let copied = tokio::io::copy(stdin.expect("stdin"), stdout.expect("stdout")).await;
        copied.map(drop).map_err(failed)
    }

    async fn port_forward(&self, _: &str, port: u16, mut data: Box<dyn Duplex>) -> Result<(), BackendError> {
        let _running = Running::new(&self.running);
        let mut target = TcpStream::connect(("127.0.0.1", port)).await.map_err(failed)?;
        tokio::io::copy_bidirectional(&mut data, &mut target)
            .await
            .map(drop)
            .map_err(failed)
    }
}
