//! Kubernetes' own conformance suite for CRI servers, critest, against the real daemon and offline: once over SPDY,
//! what streams once more over WebSocket, and user namespaces with a runc that has them. A spec counts as passed
//! where one of the runs passes it and none fails it. Every spec that no run passes stands in
//! `critest-skips.txt` with its reason: another skip fails, and so does a line of that file that is not true.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::daemon::Flavour;
use catamaran_e2e::node::{Node, Options};
use catamaran_e2e::{binaries, process, standin};
use serde_json::{Value, json};

/// Specs that are skipped, and why.
const SKIPS: &str = include_str!("../critest-skips.txt");
/// Specs of the suite, benchmarks aside: a suite of another size is another suite, whose marks are set anew.
const SPECS: usize = 137;
/// How many of them have to pass on a kernel without AppArmor.
const MINIMUM: usize = 128;
/// One run takes two minutes on two cores. Nothing is printed meanwhile, and `cargo xtask` takes a quarter of an
/// hour's silence for a hang.
const LIMIT: Duration = Duration::from_secs(13 * 60);
/// What the second run repeats over WebSocket.
const STREAMING: &str = "Streaming|attach|portforward";
/// What a further run repeats with a runtime that has id-mapped mounts, which Debian's runc has not.
const USER_NAMESPACES: &str = "UserNamespaces";

struct Spec {
    name: String,
    /// `spdy`, `websocket` or `runc15`.
    run: &'static str,
    outcome: Outcome,
}

impl Spec {
    fn failed(&self) -> bool {
        matches!(self.outcome, Outcome::Failed(_))
    }
}

enum Outcome {
    Passed,
    Failed(String),
    /// With the spec's own reason; empty where the run left it out by its focus.
    Skipped(String),
}

/// A line of `critest-skips.txt`.
struct Skip {
    name: &'static str,
    reason: &'static str,
    /// Whether it holds on this host.
    holds: bool,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let focus = words.iter().find(|word| !word.starts_with('-'));
    if words.iter().any(|word| word == "--list") {
        println!("critest: test");
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    println!("\nrunning critest");
    let result = skips().and_then(|skips| {
        let specs = run(focus.map(String::as_str))?;
        Ok(report(&specs, &skips, focus.is_none(), start.elapsed()))
    });
    result.unwrap_or_else(|error| {
        println!(
            "test critest ... FAILED\n\n{error:#}\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored"
        );
        ExitCode::FAILURE
    })
}

fn run(focus: Option<&str>) -> Result<Vec<Spec>> {
    let flavour = Flavour::from_environment()?;
    let mut specs = Vec::new();
    with_node(flavour, options(), |node, suite| {
        specs.extend(critest(node, suite, focus, "spdy", &[])?);
        let websocket = ["-websocket-exec", "-websocket-attach", "-websocket-portforward"];
        if focus.is_none() {
            specs.extend(critest(node, suite, Some(STREAMING), "websocket", &websocket)?);
        }
        Ok(!specs.iter().any(Spec::failed))
    })?;
    if flavour == Flavour::Catamaran && focus.is_none_or(|focus| focus == USER_NAMESPACES) {
        let runc15 = json!({"type": "oci", "binary": binaries::tool("runc-1.5")?});
        let options = Options {
            handlers: vec![("runc".into(), runc15)],
            ..options()
        };
        with_node(flavour, options, |node, suite| {
            let repeated = critest(node, suite, Some(USER_NAMESPACES), "runc15", &[])?;
            let good = !repeated.iter().any(Spec::failed);
            specs.extend(repeated);
            Ok(good)
        })?;
    }
    Ok(specs)
}

fn options() -> Options {
    // A spec has its plugin hold Synchronize open for 2 s, which is the default limit.
    let nri = json!({"plugin_request_timeout_ms": 20_000});
    Options {
        overrides: vec![("nri".into(), nri)],
        ..Options::default()
    }
}

/// Runs `body`, which says whether all is well, on a node with the stand-in images and the suite that asks for
/// them; critest leaves images behind, and pods where a spec failed.
fn with_node(
    flavour: Flavour,
    options: Options,
    body: impl FnOnce(&Node, &Path) -> Result<bool>,
) -> Result<()> {
    let node = Node::start(flavour, options)?;
    let pinned = standin::serve(&node.registry, &node.layout.certs)?;
    let suite = suite(&node, &pinned)?;
    if !body(&node, &suite)? {
        println!("{}", node.diagnostics());
    }
    node.finish()
}

/// critest pins one image by the digest of a manifest that is not to be had offline. A copy of the suite asks for
/// the stand-in's digest in its place, which has the same length; nothing else of the suite is touched.
fn suite(node: &Node, pinned: &str) -> Result<PathBuf> {
    let mut bytes = std::fs::read(binaries::tool("critest")?)?;
    let (original, pinned) = (standin::PINNED_DIGEST.as_bytes(), pinned.as_bytes());
    ensure!(
        original.len() == pinned.len(),
        "the stand-in's digest is no sha256"
    );
    let places = bytes
        .windows(original.len())
        .enumerate()
        .filter(|(_, text)| *text == original);
    let places: Vec<usize> = places.map(|(place, _)| place).collect();
    ensure!(
        !places.is_empty(),
        "critest no longer asks for the digest in standin::PINNED_DIGEST"
    );
    for place in places {
        bytes[place..place + pinned.len()].copy_from_slice(pinned);
    }
    let path = node.directory("suite")?.join("critest");
    std::fs::write(&path, bytes)?;
    let runnable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&path, runnable)?;
    Ok(path)
}

fn critest(
    node: &Node,
    suite: &Path,
    focus: Option<&str>,
    run: &'static str,
    flags: &[&str],
) -> Result<Vec<Spec>> {
    let directory = node.directory(&format!("critest-{run}"))?;
    let file = directory.join("report.json");
    let endpoint = format!("unix://{}", node.layout.socket.display());
    let mut command = Command::new(suite);
    command
        .current_dir(&directory)
        .args([
            format!("-runtime-endpoint={endpoint}"),
            format!("-image-endpoint={endpoint}"),
        ])
        .args(["-config=/nonexistent", "-ginkgo.no-color", "-ginkgo.timeout=12m"])
        .arg(format!("-ginkgo.json-report={}", file.display()))
        .args(flags);
    if node.flavour == Flavour::Catamaran {
        let nri = node.layout.state.join("nri.sock");
        command
            .arg("-runtime-handler=runc")
            .arg(format!("-nri-socket={}", nri.display()));
    }
    if let Some(focus) = focus {
        command.arg(format!("-ginkgo.focus={focus}"));
    }
    let output = process::run(&mut command, LIMIT)?;
    println!("critest ({run}) took {:.0} s", output.took.as_secs_f32());
    let said = || {
        format!(
            "critest ({run}) ended with {}\n{}\n{}",
            output.code,
            tail(&output.stdout),
            tail(&output.stderr)
        )
    };
    ensure!(file.exists(), "{}\nand wrote no report", said());
    let specs = read(&file, run)?;
    ensure!(
        (output.code == 0) != specs.iter().any(Spec::failed),
        "{}\nwhich its report contradicts",
        said()
    );
    ensure!(
        specs
            .iter()
            .any(|spec| !matches!(&spec.outcome, Outcome::Skipped(why) if why.is_empty())),
        "critest ({run}) has no spec in its focus {focus:?}"
    );
    Ok(specs)
}

/// Lines `name | reason`; `?apparmor` before the name: only where the kernel has no AppArmor, or has it switched
/// off. critest itself asks the same file.
fn skips() -> Result<Vec<Skip>> {
    let apparmor = std::fs::read("/sys/module/apparmor/parameters/enabled");
    let apparmor = apparmor.is_ok_and(|text| text.starts_with(b"Y"));
    let lines = SKIPS
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let skips = lines.map(|line| {
        let (name, reason) = line
            .split_once(" | ")
            .with_context(|| format!("critest-skips.txt: {line:?} is not `name | reason`"))?;
        let (name, holds) = match name.split_once(' ') {
            Some(("?apparmor", name)) => (name, !apparmor),
            Some((word, _)) if word.starts_with('?') => {
                anyhow::bail!("critest-skips.txt: {word} is no condition: ?apparmor is one")
            }
            _ => (name, true),
        };
        Ok(Skip { name, reason, holds })
    });
    skips.collect()
}

fn read(file: &Path, run: &'static str) -> Result<Vec<Spec>> {
    let report: Value = serde_json::from_slice(&std::fs::read(file)?).context("critest's report")?;
    let mut specs = Vec::new();
    for spec in report[0]["SpecReports"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (name, state) = (spec_name(spec), text(&spec["State"]));
        let kind = text(&spec["LeafNodeType"]);
        let failure = &spec["Failure"];
        let message = text(&failure["Message"]);
        let failed = || {
            let location = &failure["Location"];
            let (file, line) = (text(&location["FileName"]), &location["LineNumber"]);
            Outcome::Failed(format!("{message}\n{file}:{line}"))
        };
        if kind != "It" {
            // A BeforeSuite that fails takes every spec with it.
            if state != "passed" {
                let outcome = failed();
                specs.push(Spec {
                    name: kind,
                    run,
                    outcome,
                });
            }
            continue;
        }
        if name.contains("benchmark") {
            continue;
        }
        let outcome = match state.as_str() {
            "passed" => Outcome::Passed,
            "skipped" | "pending" => Outcome::Skipped(message),
            _ => failed(),
        };
        specs.push(Spec { name, run, outcome });
    }
    Ok(specs)
}

fn spec_name(spec: &Value) -> String {
    let containers = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
    let words = containers
        .chain([&spec["LeafNodeText"]])
        .filter_map(Value::as_str);
    words.collect::<Vec<_>>().join(" ").replace("[k8s.io] ", "")
}

/// Prints as libtest does: each spec of each run, and what is wrong with the whole as a test of its own.
fn report(specs: &[Spec], skips: &[Skip], whole: bool, took: Duration) -> ExitCode {
    let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let passing: BTreeSet<&str> = specs
        .iter()
        .filter(|spec| matches!(spec.outcome, Outcome::Passed))
        .map(|spec| spec.name.as_str())
        .collect();
    let allowed: BTreeMap<&str, &str> = skips
        .iter()
        .filter(|skip| skip.holds)
        .map(|skip| (skip.name, skip.reason))
        .collect();
    let mut failures = Vec::new();
    let mut fail = |name: &str, text: String| {
        println!("test critest::{name} ... FAILED");
        failures.push(format!("---- critest::{name} ----\n{text}"));
    };
    let (mut passed, mut ignored) = (0, 0);
    for spec in specs {
        let name = match spec.run {
            "spdy" => spec.name.clone(),
            run => format!("[{run}] {}", spec.name),
        };
        match (&spec.outcome, allowed.get(spec.name.as_str())) {
            (Outcome::Passed, None) => {
                passed += 1;
                println!("test critest::{name} ... ok");
            }
            (Outcome::Passed, Some(_)) => {
                fail(
                    &name,
                    "passes, but critest-skips.txt says that it is skipped".to_owned(),
                );
            }
            (Outcome::Failed(message), _) => fail(&name, message.clone()),
            // Left out by the focus, or passed in the run that is for it.
            (Outcome::Skipped(message), _) if message.is_empty() => {}
            (Outcome::Skipped(_), _) if passing.contains(spec.name.as_str()) => {}
            (Outcome::Skipped(_), Some(reason)) => {
                ignored += 1;
                println!("test critest::{name} ... ignored, {reason}");
            }
            (Outcome::Skipped(message), None) => {
                fail(
                    &name,
                    format!("is skipped and not in critest-skips.txt: {message}"),
                );
            }
        }
    }
    for skip in skips.iter().filter(|skip| !names.contains(skip.name)) {
        fail(
            skip.name,
            "stands in critest-skips.txt and is no spec of the suite".to_owned(),
        );
    }
    if whole {
        println!("{} of the suite's {} specs pass", passing.len(), names.len());
        let least = if skips.iter().all(|skip| skip.holds) {
            MINIMUM
        } else {
            SPECS
        };
        if names.len() != SPECS || passing.len() < least {
            let text = format!(
                "{} of {} specs pass, at least {least} of {SPECS} are expected",
                passing.len(),
                names.len()
            );
            fail("the_mark", text);
        }
    }
    if !failures.is_empty() {
        println!("\nfailures:\n\n{}", failures.join("\n\n"));
    }
    println!(
        "\ntest result: {}. {passed} passed; {} failed; {ignored} ignored; 0 measured; 0 filtered out; finished in {:.2}s\n",
        if failures.is_empty() { "ok" } else { "FAILED" },
        failures.len(),
        took.as_secs_f32()
    );
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
