//! An OCI runtime that is runc, until the test says otherwise. Its first argument is `--control=DIRECTORY` (see
//! [`catamaran_e2e::failpoint`]); without it, every call is runc's.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use catamaran_e2e::binaries;
use catamaran_e2e::failpoint::{self, Action};
use serde_json::json;

const VERBS: &[&str] = &[
    "create",
    "start",
    "run",
    "kill",
    "delete",
    "exec",
    "state",
    "update",
    "pause",
    "resume",
    "events",
    "features",
    "checkpoint",
];

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fault-runtime: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let control = words
        .first()
        .and_then(|w| w.strip_prefix("--control="))
        .map(str::to_owned);
    if control.is_some() {
        words.remove(0);
    }
    let verb = words
        .iter()
        .find(|word| VERBS.contains(&word.as_str()))
        .cloned()
        .unwrap_or_default();
    let action = match control {
        Some(control) => failpoint::next(Path::new(&control), &verb)?,
        None => Action::Pass,
    };
    let mut runc = Command::new(binaries::system("runc")?);
    runc.args(&words);
    match action {
        Action::Pass => return Err(runc.exec().into()),
        Action::Slow => {
            std::thread::sleep(failpoint::SLOW);
            return Err(runc.exec().into());
        }
        Action::Hang => failpoint::hang(),
        Action::Garbage => println!("this is no JSON"),
        Action::Fail => {}
        // What a criu that works would have left.
        Action::Stand if verb == "checkpoint" => {
            let images = words.iter().skip_while(|word| *word != "--image-path").nth(1);
            let images = Path::new(images.context("checkpoint without --image-path")?);
            ensure!(
                words.iter().any(|word| word == "--leave-running"),
                "the container would end"
            );
            std::fs::write(images.join("pages-1.img"), "memory")?;
            std::fs::write(images.join("dump.log"), "said")?;
            return Ok(ExitCode::SUCCESS);
        }
        Action::Stand => bail!("nothing stands in for {verb}"),
        Action::FailAfter => {
            runc.status()?;
        }
    }
    if action == Action::Garbage {
        return Ok(ExitCode::SUCCESS);
    }
    let message = format!("scripted fault in {verb}");
    // As runc does: to the file of `--log`, in JSON, and to standard error.
    if let Some(log) = words.iter().skip_while(|word| *word != "--log").nth(1) {
        let line = json!({"level": "error", "msg": message, "time": "2026-01-01T00:00:00Z"});
        let mut file = std::fs::File::options().create(true).append(true).open(log)?;
        writeln!(file, "{line}")?;
    }
    eprintln!("{message}");
    Ok(ExitCode::FAILURE)
}
