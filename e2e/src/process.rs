//! Processes that the harness starts: commands with a time limit, services with a log file. Each is in its
//! own process group, so that what it starts ends with it, and none outlives its owner.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// What a command left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + signal number where a signal ended it.
    pub code: i32,
    /// Standard output, lossily as text.
    pub stdout: String,
    /// Standard error, lossily as text.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or runs longer than `limit` (then its process group is killed).
pub fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    run_with_input(command.stdin(Stdio::null()), None, limit)
}

/// Runs a command with these bytes as its standard input, closed after them, to its end.
///
/// # Errors
/// As [`run`]. An input that the command does not read to its end is no error.
pub fn feed(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output> {
    run_with_input(command.stdin(Stdio::piped()), Some(input.to_owned()), limit)
}

fn run_with_input(command: &mut Command, input: Option<Vec<u8>>, limit: Duration) -> Result<Output> {
    let name = describe(command);
    let start = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    if let (Some(mut pipe), Some(input)) = (child.stdin.take(), input) {
        // Not joined: where nobody reads, it ends with the command.
        std::thread::spawn(move || drop(pipe.write_all(&input)));
    }
    let reader = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                // What was read before an error is still worth showing.
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = reader(child.stdout.take().map(|p| Box::new(p) as Box<dyn Read + Send>));
    let stderr = reader(child.stderr.take().map(|p| Box::new(p) as Box<dyn Read + Send>));
    let status = wait(&mut child, limit)?;
    if status.is_none() {
        let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
        child.wait()?;
    }
    let text = |thread: std::thread::JoinHandle<String>| {
        thread
            .join()
            .unwrap_or_else(|_| "(the reader of this output panicked)".to_owned())
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    let Some(status) = status else {
        bail!("{name} ran longer than {limit:?} and was killed\nstdout: {stdout}\nstderr: {stderr}");
    };
    Ok(Output {
        code: code(status),
        stdout,
        stderr,
        took: start.elapsed(),
    })
}

/// Runs a command and returns its standard output.
///
/// # Errors
/// As [`run`], and any exit code but 0, with both outputs in the message.
pub fn succeed(command: &mut Command, limit: Duration) -> Result<String> {
    let name = describe(command);
    let output = run(command, limit)?;
    if output.code != 0 {
        bail!(
            "{name} ended with {}\nstdout: {}\nstderr: {}",
            output.code,
            output.stdout,
            output.stderr
        );
    }
    Ok(output.stdout)
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// A process that runs until it is stopped; its output goes to a file.
#[derive(Debug)]
pub struct Service {
    child: Child,
    name: String,
    log: PathBuf,
    ended: bool,
}

impl Service {
    /// Starts it. The log file is appended to, so that restarts are seen in one place.
    ///
    /// # Errors
    /// The log file cannot be opened or the program not started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let name = describe(command);
        let file = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            child,
            name,
            log: log.to_owned(),
            ended: false,
        })
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` holds.
    ///
    /// # Errors
    /// The process ended first or the time is over; the log's end is in the message.
    pub fn wait_until(&mut self, what: &str, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let end = Instant::now() + limit;
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                self.ended = true;
                bail!(
                    "{} ended with {} before {what}\n{}",
                    self.name,
                    code(status),
                    self.log_tail()
                );
            }
            if Instant::now() >= end {
                bail!("{}: no {what} within {limit:?}\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn log_tail(&self) -> String {
        tail(&self.log, 40)
    }

    /// Sends a signal to the process alone.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)?;
        Ok(())
    }

    /// Ends it with a signal and waits.
    ///
    /// # Errors
    /// It did not end within `limit` (it is killed then).
    pub fn stop(&mut self, signal: Signal, limit: Duration) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        self.signal(signal)?;
        let ended = wait(&mut self.child, limit)?;
        self.ended = true;
        if ended.is_none() {
            self.child.kill()?;
            self.child.wait()?;
            bail!(
                "{} did not end within {limit:?} of {signal}\n{}",
                self.name,
                self.log_tail()
            );
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The last lines of a text file, or why it cannot be read.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({}: {error})", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_over_its_limit_is_killed_with_what_it_started() {
        let limit = Duration::from_millis(200);
        let start = Instant::now();
        let error = run(
            Command::new("sh").args(["-c", "echo begun; sleep 30 & wait"]),
            limit,
        )
        .unwrap_err();
        assert!(error.to_string().contains("begun"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn exit_codes_and_signals_are_told_apart() {
        let limit = Duration::from_secs(10);
        assert_eq!(
            run(Command::new("sh").args(["-c", "exit 3"]), limit)
                .unwrap()
                .code,
            3
        );
        assert_eq!(
            run(Command::new("sh").args(["-c", "kill -9 $$"]), limit)
                .unwrap()
                .code,
            137
        );
    }
}
