//! A QEMU of the benchmark's own, with the very command line of a pod's VM but no shim, network or containers:
//! the floor under a VM pod's cold start.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use catamaran_e2e::leaks;
use catamaran_e2e::node::Node;

/// How a bare machine is started.
pub(crate) struct Machine {
    program: String,
    words: Vec<String>,
    directory: tempfile::TempDir,
}

/// Takes the command line from a pod's VM that is started and removed for this.
pub(crate) fn like_a_pods(node: &Node) -> Result<Machine> {
    let pod = node.run_pod("runv", &node.pod_request("bench-command-line"))?;
    let vm = leaks::find_processes(&node.layout, &node.subnet)?
        .into_iter()
        .map(|(pid, _)| pid)
        .find_map(|pid| {
            let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let words: Vec<String> = text
                .split('\0')
                .filter(|w| !w.is_empty())
                .map(str::to_owned)
                .collect();
            words
                .first()
                .is_some_and(|w| w.contains("qemu"))
                .then_some((pid, words))
        });
    let (pid, words) = vm.context("no QEMU process of the pod is found")?;
    // Kernel and initramfs are named by descriptors of the process.
    let resolve = |word: &str| -> Result<String> {
        let path = word.replace("/proc/self/", &format!("/proc/{pid}/"));
        Ok(std::fs::canonicalize(&path)
            .with_context(|| path)?
            .display()
            .to_string())
    };
    let directory = tempfile::tempdir()?;
    let mut kept = Vec::new();
    let mut all = words.iter().skip(1).peekable();
    while let Some(word) = all.next() {
        // Every option but a few flags takes one value.
        let value = if all.peek().is_some_and(|next| !next.starts_with('-')) {
            all.next()
        } else {
            None
        };
        let value = match (word.as_str(), value.map(String::as_str)) {
            ("-sandbox" | "-name" | "-mon" | "-runas", _) => continue,
            ("-chardev", Some(v)) if v.contains("id=qmp") => continue,
            ("-chardev", Some(v)) if v.contains("id=console") => Some("null,id=console".to_owned()),
            ("-chardev", Some(v)) if v.contains("id=agent") => Some(format!(
                "socket,id=agent,path={},server=on,wait=off",
                directory.path().join("agent").display()
            )),
            ("-kernel" | "-initrd", Some(v)) => Some(resolve(v)?),
            (_, v) => v.map(str::to_owned),
        };
        kept.push(word.clone());
        kept.extend(value);
    }
    node.remove_pod(&pod.id)?;
    Ok(Machine {
        program: words[0].clone(),
        words: kept,
        directory,
    })
}

impl Machine {
    /// Boots once and returns the time from the start of QEMU to the agent's answer.
    pub(crate) fn boot(&self) -> Result<Duration> {
        let begun = Instant::now();
        let mut child = Command::new(&self.program)
            .args(&self.words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| self.program.clone())?;
        let answered = self.handshake(begun);
        child.kill()?;
        let output = child.wait_with_output()?;
        answered.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The agent's handshake: a greeting with a nonce, again and again, until it is answered.
    fn handshake(&self, begun: Instant) -> Result<Duration> {
        let limit = Duration::from_secs(120);
        let path = self.directory.path().join("agent");
        let mut stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > limit => return Err(error).context("QEMU opens no socket"),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_read_timeout(Some(Duration::from_millis(10)))?;
        let nonce = "0123456789abcdef0123456789abcdef";
        let (mut seen, mut buffer) = (Vec::new(), [0u8; 4096]);
        while begun.elapsed() < limit {
            stream.write_all(format!("CATAMARAN {nonce}\n").as_bytes())?;
            match stream.read(&mut buffer) {
                Ok(0) => bail!("QEMU ended"),
                Ok(count) => seen.extend_from_slice(&buffer[..count]),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(error) => return Err(error.into()),
            }
            let answer = format!("CATAMARAN-OK {nonce}");
            if seen
                .windows(answer.len())
                .any(|window| window == answer.as_bytes())
            {
                return Ok(begun.elapsed());
            }
        }
        bail!("the agent does not answer within {limit:?}")
    }
}
