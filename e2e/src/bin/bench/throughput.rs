//! Bytes through the streaming servers, both ways, with crictl as the client of both daemons: the stream's own
//! cost and the client's, who is the same.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::node::Node;

use crate::client::Client;
use crate::report::Report;

const MIB: u64 = 1 << 20;
/// Port in the pod from which zeros come.
const PORT: &str = "8000";

/// A crictl that is killed if it is still there.
struct Caller(Child);

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends `mib` MiB out of a container, into it, and through a forwarded port.
pub(crate) async fn measure(
    client: &mut Client,
    node: &Node,
    name: &str,
    mib: u64,
    report: &mut Report,
) -> Result<()> {
    let config = client.pod(node, "throughput");
    let (pod, _) = client.run_pod(&config, "runc").await?;
    let bytes = mib * MIB;
    let server = format!("while :; do nc -l -p {PORT} -e head -c {bytes} /dev/zero; done");
    let command = vec!["sh".to_owned(), "-c".to_owned(), server];
    let container = client.create(&pod, &config, &node.busybox, 0, &command).await?;
    client.start(&container).await?;
    let rate = |seconds: f64| mib as f64 / seconds;
    // The first of each warms caches on both sides and is not counted.
    for round in 0..3 {
        let mut note = |what, seconds| {
            if round > 0 {
                report.rate(what, name, rate(seconds));
            }
        };
        note("exec, output, MiB/s", out(node, &container, bytes)?);
        note("exec, input, MiB/s", into(node, &container, bytes)?);
        note("port-forward, MiB/s", forwarded(node, &pod, bytes)?);
    }
    client.remove(&pod).await?;
    Ok(())
}

fn read_all(mut from: impl Read) -> Result<u64> {
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(total),
            count => total += count as u64,
        }
    }
}

fn out(node: &Node, container: &str, bytes: u64) -> Result<f64> {
    let count = bytes.to_string();
    let begun = Instant::now();
    let mut caller = Caller(
        node.crictl
            .command(&["exec", container, "head", "-c", &count, "/dev/zero"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let got = read_all(caller.0.stdout.take().context("no output")?)?;
    ensure!(
        caller.0.wait()?.success() && got == bytes,
        "{got} bytes of {bytes} came out"
    );
    Ok(begun.elapsed().as_secs_f64())
}

fn into(node: &Node, container: &str, bytes: u64) -> Result<f64> {
    let begun = Instant::now();
    let mut caller = Caller(
        node.crictl
            .command(&["exec", "-i", container, "wc", "-c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let mut input = caller.0.stdin.take().context("no input")?;
    let zeros = vec![0; 1 << 16];
    for _ in 0..bytes / zeros.len() as u64 {
        input.write_all(&zeros)?;
    }
    drop(input);
    let mut said = String::new();
    caller
        .0
        .stdout
        .take()
        .context("no output")?
        .read_to_string(&mut said)?;
    ensure!(
        caller.0.wait()?.success() && said.trim() == bytes.to_string(),
        "{said:?} of {bytes} bytes went in"
    );
    Ok(begun.elapsed().as_secs_f64())
}

/// Only the transfer is timed: crictl is the same for both, and so is the time that it takes to listen.
fn forwarded(node: &Node, pod: &str, bytes: u64) -> Result<f64> {
    // Free a moment ago; who else takes it makes the transfer fail, not lie.
    let local = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let ports = format!("{}:{PORT}", local.port());
    let _caller = Caller(
        node.crictl
            .command(&["port-forward", pod, &ports])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    );
    let limit = Instant::now() + Duration::from_secs(20);
    let stream = loop {
        match TcpStream::connect(local) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() >= limit => {
                return Err(error).context("crictl port-forward does not listen");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let begun = Instant::now();
    let got = read_all(stream)?;
    ensure!(got == bytes, "{got} bytes of {bytes} came through the port");
    Ok(begun.elapsed().as_secs_f64())
}
