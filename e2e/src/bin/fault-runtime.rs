//! An OCI runtime that is runc, until the test says otherwise. Its first argument is `--control=DIRECTORY` (see
//! [`catamaran_e2e::failpoint`]); without it, every call is runc's.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Result;
use catamaran_e2e::binaries;
use catamaran_e2e::failpoint::{self, Action};

const VERBS: &[&str] = &[
    "create", "start", "run", "kill", "delete", "exec", "state", "update", "pause", "resume", "events",
    "features",
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
        Action::Hang => failpoint::hang(),
        Action::Garbage => println!("this is no JSON"),
        Action::Fail => {}
        Action::FailAfter => {
            runc.status()?;
        }
    }
    if action == Action::Garbage {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("scripted fault in {verb}");
    Ok(ExitCode::FAILURE)
}
