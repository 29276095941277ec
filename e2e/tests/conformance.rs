//! Kubernetes' own conformance suite for CRI servers, critest, against the real daemon and offline. Every spec
//! that is skipped stands in `critest-skips.txt` with its reason: another skip fails the run, and so does a
//! line of that file that is no longer true.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::daemon::Flavour;
use catamaran_e2e::node::{Node, Options};
use catamaran_e2e::{binaries, process, standin};
use serde_json::{Value, json};

/// Specs that are skipped, and why.
const SKIPS: &str = include_str!("../critest-skips.txt");
/// The whole suite on two cores takes a few minutes.
const LIMIT: Duration = Duration::from_secs(1800);
/// What the second run repeats over WebSocket.
const STREAMING: &str = "Streaming|attach|portforward";
/// What a further run repeats with a runtime that has id-mapped mounts, which Debian's runc has not.
const USER_NAMESPACES: &str = "UserNamespaces";

struct Spec {
    name: String,
    outcome: Outcome,
}

enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
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
    match run(focus.map(String::as_str)) {
        Ok(specs) => report(&specs, focus.is_none(), start.elapsed()),
        Err(error) => {
            println!(
                "test critest ... FAILED\n\n{error:#}\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored"
            );
            ExitCode::FAILURE
        }
    }
}

fn run(focus: Option<&str>) -> Result<Vec<Spec>> {
    let flavour = Flavour::from_environment()?;
    let node = Node::start(flavour, Options::default())?;
    standin::serve(&node.registry, &node.layout.certs)?;
    let mut specs = critest(&node, focus, "spdy", &[])?;
    let websocket = ["-websocket-exec", "-websocket-attach", "-websocket-portforward"];
    if focus.is_none() {
        specs.extend(critest(&node, Some(STREAMING), "websocket", &websocket)?);
    }
    if specs
        .iter()
        .any(|spec| matches!(spec.outcome, Outcome::Failed(_)))
    {
        println!("{}", node.diagnostics());
    }
    // critest leaves images behind, and pods where a spec failed.
    node.finish()?;
    if flavour == Flavour::Catamaran && focus.is_none_or(|focus| focus == USER_NAMESPACES) {
        // Those that skip themselves under Debian's runc; a failure stays one.
        let repeated =
            |spec: &Spec| spec.name.contains(USER_NAMESPACES) && matches!(spec.outcome, Outcome::Skipped(_));
        specs.retain(|spec| !repeated(spec));
        specs.extend(user_namespaces(flavour)?);
    }
    Ok(specs)
}

/// The specs of user namespaces, on a node whose handler has runc 1.5. Nothing but the focus may skip there.
fn user_namespaces(flavour: Flavour) -> Result<Vec<Spec>> {
    let runc15 = json!({"type": "oci", "binary": binaries::tool("runc-1.5")?});
    let options = Options {
        handlers: vec![("runc".into(), runc15)],
        ..Options::default()
    };
    let node = Node::start(flavour, options)?;
    standin::serve(&node.registry, &node.layout.certs)?;
    let mut specs = critest(&node, Some(USER_NAMESPACES), "runc15", &[])?;
    specs.retain(|spec| spec.name.contains(USER_NAMESPACES));
    ensure!(
        !specs.is_empty(),
        "critest has no spec whose name has {USER_NAMESPACES} in it"
    );
    if specs
        .iter()
        .any(|spec| matches!(spec.outcome, Outcome::Failed(_)))
    {
        println!("{}", node.diagnostics());
    }
    node.finish()?;
    Ok(specs)
}

fn critest(node: &Node, focus: Option<&str>, protocol: &str, flags: &[&str]) -> Result<Vec<Spec>> {
    let directory = node.directory(&format!("critest-{protocol}"))?;
    let file = directory.join("report.json");
    let endpoint = format!("unix://{}", node.layout.socket.display());
    let mut command = Command::new(binaries::tool("critest")?);
    command
        .current_dir(&directory)
        .args([
            format!("-runtime-endpoint={endpoint}"),
            format!("-image-endpoint={endpoint}"),
        ])
        .args(["-config=/nonexistent", "-ginkgo.no-color", "-ginkgo.timeout=30m"])
        .arg(format!("-ginkgo.json-report={}", file.display()))
        .args(flags);
    if node.flavour == Flavour::Catamaran {
        command.arg("-runtime-handler=runc");
    }
    if let Some(focus) = focus {
        command.arg(format!("-ginkgo.focus={focus}"));
    }
    let skipped = listed_pattern();
    if !skipped.is_empty() {
        command.arg(format!("-ginkgo.skip={skipped}"));
    }
    let output = process::run(&mut command, LIMIT)?;
    ensure!(
        file.exists(),
        "critest ended with {} and wrote no report\n{}\n{}",
        output.code,
        tail(&output.stdout),
        tail(&output.stderr)
    );
    read(&file, protocol)
}

/// Lines `name | reason`; a name that starts with `!` is a spec that must not be run at all here, because it
/// would fail for want of something outside the daemon.
fn listed() -> impl Iterator<Item = (&'static str, &'static str)> {
    SKIPS
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter_map(|line| line.split_once(" | "))
}

fn listed_pattern() -> String {
    let names: Vec<String> = listed()
        .filter_map(|(name, _)| name.strip_prefix('!'))
        .map(escape)
        .collect();
    names.join("|")
}

/// Quotes what a Go regular expression would take for more than text.
fn escape(text: &str) -> String {
    let special = |c: char| "\\.+*?()|[]{}^$".contains(c);
    text.chars()
        .flat_map(|c| special(c).then_some('\\').into_iter().chain([c]))
        .collect()
}

fn read(file: &Path, protocol: &str) -> Result<Vec<Spec>> {
    let report: Value = serde_json::from_slice(&std::fs::read(file)?).context("critest's report")?;
    let mut specs = Vec::new();
    for spec in report[0]["SpecReports"].as_array().into_iter().flatten() {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (mut name, state) = (spec_name(spec), text(&spec["State"]));
        let kind = text(&spec["LeafNodeType"]);
        let failure = &spec["Failure"];
        let message = format!(
            "{}\n{}:{}",
            text(&failure["Message"]),
            text(&failure["Location"]["FileName"]),
            failure["Location"]["LineNumber"]
        );
        if kind != "It" {
            // A BeforeSuite that fails takes every spec with it.
            if state != "passed" {
                specs.push(Spec {
                    name: kind,
                    outcome: Outcome::Failed(message),
                });
            }
            continue;
        }
        if name.contains("benchmark")
            || (protocol != "spdy" && state == "skipped" && message.starts_with('\n'))
        {
            continue;
        }
        if protocol != "spdy" {
            name = format!("[{protocol}] {name}");
        }
        let outcome = match state.as_str() {
            "passed" => Outcome::Passed,
            "skipped" | "pending" => Outcome::Skipped(text(&failure["Message"])),
            _ => Outcome::Failed(message),
        };
        specs.push(Spec { name, outcome });
    }
    ensure!(!specs.is_empty(), "critest ran no spec");
    Ok(specs)
}

fn spec_name(spec: &Value) -> String {
    let containers = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
    let words = containers
        .chain([&spec["LeafNodeText"]])
        .filter_map(Value::as_str);
    words.collect::<Vec<_>>().join(" ").replace("[k8s.io] ", "")
}

fn report(specs: &[Spec], whole: bool, took: Duration) -> ExitCode {
    let allowed: BTreeMap<&str, &str> = listed()
        .map(|(name, reason)| (name.strip_prefix('!').unwrap_or(name), reason))
        .collect();
    let mut failures = Vec::new();
    let (mut passed, mut ignored) = (0, 0);
    for spec in specs {
        let bare = ["[websocket] ", "[runc15] "]
            .iter()
            .find_map(|prefix| spec.name.strip_prefix(prefix))
            .unwrap_or(&spec.name);
        let reason = allowed.get(bare);
        match (&spec.outcome, reason) {
            (Outcome::Passed, None) => {
                passed += 1;
                println!("test critest::{} ... ok", spec.name);
            }
            (Outcome::Skipped(_), Some(reason)) => {
                ignored += 1;
                println!("test critest::{} ... ignored, {reason}", spec.name);
            }
            // Left out by the focus of this run.
            (Outcome::Skipped(message), None) if !whole && message.is_empty() => {}
            (outcome, _) => {
                let text = match outcome {
                    Outcome::Passed => "passes, but critest-skips.txt says that it is skipped".to_owned(),
                    Outcome::Skipped(message) => {
                        format!("is skipped and not in critest-skips.txt: {message}")
                    }
                    Outcome::Failed(message) => message.clone(),
                };
                println!("test critest::{} ... FAILED", spec.name);
                failures.push(format!("---- critest::{} ----\n{text}", spec.name));
            }
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
