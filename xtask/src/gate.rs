//! All tests: of every crate, of the agent as it is built for the guest, end to end, and the lints.

use std::process::{Command, Stdio};

use crate::compile::{AGENT_FLAGS, AGENT_TARGET, WORKSPACE};
use crate::report::Report;
use crate::step::{Failure, Step, root};
use crate::{compile, setup};

/// Runs everything and prints the totals; a failure of the build ends it at once.
pub(crate) fn run() -> Result<(), Failure> {
    setup::run(setup::Scope::All)?;
    compile::run()?;
    let mut report = Report::default();
    // The release profile throughout and the selection of the build: what is tested is what is shipped, and the
    // dependencies are compiled once.
    let all = ["cargo", "test", "--release", "--locked", "--no-fail-fast"];
    let all = [all.as_slice(), WORKSPACE, OUTPUT].concat();
    tests(&mut report, Step::new("tests of the crates and end to end", &all))?;
    let agent = [
        "cargo",
        "test",
        "--release",
        "--locked",
        "--no-fail-fast",
        "--target",
        AGENT_TARGET,
    ];
    let agent = [agent.as_slice(), &["-p", "catamaran-agent"], OUTPUT].concat();
    // Booted with the guest that was just built: its initramfs brings the modules of a distribution's kernel.
    let guest = |name: &str| {
        root()
            .join("target/guest/default")
            .join(name)
            .display()
            .to_string()
    };
    let agent = Step::new("tests of the agent", &agent)
        .env("RUSTFLAGS", AGENT_FLAGS)
        .env("CATAMARAN_TEST_KERNEL", &guest("vmlinux"))
        .env("CATAMARAN_TEST_INITRAMFS", &guest("initramfs"));
    tests(&mut report, agent)?;
    lints(&mut report)?;
    report.print();
    match report.failures() {
        0 => Ok(()),
        // The totals stay the last line: the failure is already printed.
        _ => Err(String::new()),
    }
}

/// libtest hides what a passing test prints, and with it why a test was skipped.
const OUTPUT: &[&str] = &["--", "--show-output"];

fn tests(report: &mut Report, step: Step<'_>) -> Result<(), Failure> {
    let before = report.failures();
    let (code, log) = step.watch(|line| report.line(line))?;
    if code != 0 && report.failures() == before {
        // A crate that does not compile, or a test binary that crashed, has no failed test to show for it.
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        report.check(&format!("{} ended with {code}", log.display()), false);
    }
    Ok(())
}

fn lints(report: &mut Report) -> Result<(), Failure> {
    let fmt = ["cargo", "fmt", "--all", "--check"];
    let clippy = [
        "cargo",
        "clippy",
        "--release",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    for (name, words) in [("cargo fmt", fmt.as_slice()), ("cargo clippy", clippy.as_slice())] {
        if component_missing(words[1]) {
            let remedy = "the component is not installed; rustup component add rustfmt clippy";
            if std::env::var_os("CI").is_some() {
                println!("   FAILED {name}: {remedy}");
                report.check(name, false);
            } else {
                report.skip(name, remedy);
            }
            continue;
        }
        let (code, log) = Step::new(name, words).watch(|_| {})?;
        if code != 0 {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            println!("{}", complaints(&text));
        }
        report.check(name, code == 0);
    }
    Ok(())
}

/// What a lint complains of: cargo's own progress would push it out of sight.
fn complaints(log: &str) -> String {
    let progress = [
        "Checking ",
        "Compiling ",
        "Downloaded ",
        "Downloading ",
        "Blocking ",
    ];
    let told = log
        .lines()
        .filter(|line| !progress.iter().any(|word| line.trim_start().starts_with(word)));
    told.take(120).collect::<Vec<_>>().join("\n")
}

fn component_missing(name: &str) -> bool {
    let mut version = Command::new("cargo");
    version
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    version.status().map_or(true, |status| !status.success())
}
