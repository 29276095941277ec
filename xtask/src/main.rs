//! The workspace's tasks: `cargo xtask TASK`. Standard library only, so that it is there within seconds on a
//! fresh machine.

mod compile;
mod gate;
mod install;
mod packages;
mod report;
mod setup;
mod step;

use std::path::Path;
use std::process::ExitCode;

use setup::Scope;
use step::{Failure, Step, root};

const USAGE: &str = "usage: cargo xtask TASK
  setup              installs Debian packages and builds the tests' tools (crictl, critest, runc 1.5, …)
  setup quickstart   only what deploy/quickstart needs
  build              builds daemon, shims, agent and the guest's boot artefacts, release profile
  test               setup, build, then every test and the lints; the last line is the count
  bench [ARGS]       times both handlers and Debian's containerd in one run
  guest-kernel       builds the minimal guest kernel (about 20 CPU minutes), used by later builds
  install [PREFIX]   copies a build into the machine's places below PREFIX (default /)";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["setup"] => setup::run(Scope::All),
        ["setup", "quickstart"] => setup::run(Scope::Quickstart),
        ["build"] => compile::run(),
        ["test"] => gate::run(),
        ["bench", rest @ ..] => bench(rest),
        ["guest-kernel"] => compile::guest_kernel(),
        ["install"] => install::run(Path::new("/")),
        ["install", prefix] => install::run(Path::new(prefix)),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            if !message.is_empty() {
                eprintln!("{message}");
            }
            ExitCode::FAILURE
        }
    }
}

fn bench(rest: &[&str]) -> Result<(), Failure> {
    setup::run(Scope::All)?;
    compile::run()?;
    let bench = root().join("target/release/bench").display().to_string();
    let words = [&[bench.as_str()], rest].concat();
    let (code, log) = Step::new("bench", &words).watch(|line| println!("{line}"))?;
    if code == 0 {
        Ok(())
    } else {
        Err(format!("bench ended with {code}; see {}", log.display()))
    }
}
