//! Commands with progress: output goes to a log file, the terminal gets a line when one starts and ends, a
//! sign of life in between, and the log's end where it failed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Why a step ended early; already a sentence.
pub(crate) type Failure = String;

/// A sign of life comes this often.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A command that prints nothing for so long is taken for hung and killed.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// PATH and the directories of a system's programs: `su` without a dash leaves them out.
fn path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let given = std::env::split_paths(&path).filter(|directory| !directory.as_os_str().is_empty());
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    // They hold no colon.
    std::env::join_paths(given.chain(system)).unwrap_or(path)
}

/// A step: a command, what it is called, and what is done with its lines.
pub(crate) struct Step<'a> {
    name: &'a str,
    command: Command,
}

impl<'a> Step<'a> {
    /// A step that runs `words` in the workspace's root.
    pub(crate) fn new(name: &'a str, words: &[&str]) -> Self {
        // One pipe for both streams keeps their order.
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$@\" 2>&1", "sh"])
            .args(words)
            .env("PATH", path())
            // The build is looked for in the workspace.
            .env("CARGO_TARGET_DIR", root().join("target"))
            .current_dir(root());
        Self { name, command }
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs in a directory of the workspace.
    pub(crate) fn directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Runs it; any end but success is a failure with the log's end.
    pub(crate) fn run(self) -> Result<(), Failure> {
        let name = self.name.to_owned();
        let (code, log) = self.watch(|_| {})?;
        if code == 0 {
            return Ok(());
        }
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        Err(format!(
            "{name} ended with {code}; the end of {}:\n{end}",
            log.display()
        ))
    }

    /// Runs it and gives every line to `line`; returns the exit code and the log's path.
    pub(crate) fn watch(mut self, mut line: impl FnMut(&str)) -> Result<(i32, PathBuf), Failure> {
        let logs = root().join("target/logs");
        let wrong = |what: &str, error: std::io::Error| format!("{}: {what}: {error}", self.name);
        std::fs::create_dir_all(&logs).map_err(|e| wrong("making target/logs", e))?;
        let path = logs.join(format!("{}.log", self.name.replace([' ', '/'], "-")));
        let mut log = File::create(&path).map_err(|e| wrong("its log", e))?;
        println!("== {}", self.name);
        let begun = Instant::now();
        let mut child = self
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| format!("{}: cannot start: {e}", self.name))?;
        let (sender, lines) = channel();
        let pipe = child.stdout.take();
        std::thread::spawn(move || {
            for text in pipe
                .into_iter()
                .flat_map(|p| BufReader::new(p).split(b'\n'))
                .flatten()
            {
                if sender.send(String::from_utf8_lossy(&text).into_owned()).is_err() {
                    break;
                }
            }
        });
        let (mut last, mut heard, mut shown) = (String::new(), Instant::now(), Instant::now());
        loop {
            match lines.recv_timeout(Duration::from_secs(1)) {
                Ok(text) => {
                    // A full disk must not hide what the command says.
                    let _ = writeln!(log, "{text}");
                    line(&text);
                    if !text.trim().is_empty() {
                        last = text.trim().chars().take(90).collect();
                    }
                    heard = Instant::now();
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if heard.elapsed() > SILENCE => {
                    println!("   silent for {SILENCE:?}: killed");
                    kill_group(child.id());
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if shown.elapsed() > HEARTBEAT {
                println!("   {} s: {last}", begun.elapsed().as_secs());
                shown = Instant::now();
            }
        }
        let status = child.wait().map_err(|e| format!("{}: waiting: {e}", self.name))?;
        println!(
            "   {} in {:.1} s",
            if status.success() { "done" } else { "FAILED" },
            begun.elapsed().as_secs_f32()
        );
        Ok((status.code().unwrap_or(-1), path))
    }
}

fn kill_group(pid: u32) {
    // The negative id is the whole process group, which the step was started as.
    let _ = Command::new("kill")
        .args(["-KILL", "--", &format!("-{pid}")])
        .status();
}
