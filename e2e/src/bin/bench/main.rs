//! Times the CRI verbs and weighs the processes: Catamaran's two handlers and Debian's containerd, interleaved in
//! one run on one machine, with the same runc, CNI plugins and images; and a VM pod's cold start against a bare
//! QEMU boot of the same kernel and initramfs.
//! usage: bench [--quick] [--rounds N] [--vm-rounds N] [--json FILE] [--check]
//! --quick makes a smaller crowd, --check fails where a mark is missed

mod bare_vm;
mod client;
mod crowd;
mod report;
mod throughput;
mod weight;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use catamaran_e2e::daemon::Flavour;
use catamaran_e2e::node::{Node, Options};

use client::Client;
use report::Report;

/// What is compared: a column of the table.
struct Subject<'a> {
    name: &'static str,
    handler: &'static str,
    node: &'a Node,
    client: Client,
    rounds: usize,
}

struct Arguments {
    rounds: usize,
    vm_rounds: usize,
    json: Option<PathBuf>,
    quick: bool,
    check: bool,
}

fn main() -> ExitCode {
    let result = arguments().and_then(|arguments| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(run(&arguments))
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<Arguments> {
    let mut arguments = Arguments {
        rounds: 20,
        vm_rounds: 5,
        json: None,
        quick: false,
        check: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word} needs a value"));
        match word.as_str() {
            "--rounds" => arguments.rounds = value()?.parse()?,
            "--vm-rounds" => arguments.vm_rounds = value()?.parse()?,
            "--json" => arguments.json = Some(value()?.into()),
            "--quick" => arguments.quick = true,
            "--check" => arguments.check = true,
            _ => anyhow::bail!("unknown argument {word:?}; see the header of bench/main.rs"),
        }
    }
    Ok(arguments)
}

/// Whether every mark was met, or none was asked for.
async fn run(arguments: &Arguments) -> Result<bool> {
    if cfg!(debug_assertions) {
        println!("note: this is not the release profile; the figures mean little");
    }
    println!("starting catamaran and containerd");
    let ours = Node::start(Flavour::Catamaran, Options::default())?;
    let theirs = Node::start(Flavour::Containerd, Options::default())?;
    let mut report = Report::default();
    for (name, node) in [("catamaran", &ours), ("containerd", &theirs)] {
        report.weigh("idle daemon", name, weight::of(&[node.daemon_pid()?])?);
    }
    let mut subjects = Vec::new();
    for (name, handler, node, rounds) in [
        ("catamaran runc", "runc", &ours, arguments.rounds),
        ("containerd runc", "runc", &theirs, arguments.rounds),
        ("catamaran runv", "runv", &ours, arguments.vm_rounds),
    ] {
        let client = Client::connect(&node.layout.socket).await?;
        subjects.push(Subject {
            name,
            handler,
            node,
            client,
            rounds,
        });
    }
    let machine = bare_vm::like_a_pods(&ours)?;
    for round in 0..arguments.rounds.max(arguments.vm_rounds) {
        for subject in subjects.iter_mut().filter(|s| round < s.rounds) {
            settle();
            time_one(subject, round, &mut report)
                .await
                .with_context(|| subject.name)?;
        }
        if round < arguments.vm_rounds {
            settle();
            let took = machine.boot()?;
            report.time("bare QEMU boot to the agent's answer", "catamaran runv", took);
        }
        if round % 5 == 4 {
            println!("   {} rounds done", round + 1);
        }
    }
    for subject in &mut subjects {
        weigh_pods(subject, &mut report)
            .await
            .with_context(|| subject.name)?;
    }
    for subject in subjects.iter_mut().filter(|s| s.handler == "runc") {
        settle();
        println!("   bytes through {}", subject.name);
        let mib = if arguments.quick { 32 } else { 256 };
        throughput::measure(&mut subject.client, subject.node, subject.name, mib, &mut report)
            .await
            .with_context(|| subject.name)?;
    }
    many(&mut subjects, arguments, &mut report).await?;
    drop(subjects);
    ours.finish().context("catamaran")?;
    theirs.finish().context("containerd")?;
    let met = report.print();
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_vec_pretty(&report.json())?)?;
        println!("written to {}", file.display());
    }
    Ok(met || !arguments.check)
}

/// Eight callers, and the crowd.
async fn many(subjects: &mut [Subject<'_>], arguments: &Arguments, report: &mut Report) -> Result<()> {
    let size = if arguments.quick {
        crowd::Size::quick()
    } else {
        crowd::Size::full()
    };
    for round in 0..2 {
        for subject in subjects.iter().filter(|s| s.handler == "runc") {
            settle();
            println!("   pods by 8 workers, {}", subject.name);
            crowd::burst(&subject.client, subject.node, subject.name, &size, round, report)
                .await
                .with_context(|| subject.name)?;
        }
    }
    for subject in subjects.iter_mut().filter(|s| s.handler == "runc") {
        settle();
        println!("   a crowd of {} pods, {}", size.pods, subject.name);
        crowd::read(&mut subject.client, subject.node, subject.name, &size, report)
            .await
            .with_context(|| subject.name)?;
    }
    Ok(())
}

/// Lets what the one before has put off (the kernel's own teardown of namespaces too) end, so that nobody is
/// charged for another's work.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(300));
}

async fn time_one(subject: &mut Subject<'_>, round: usize, report: &mut Report) -> Result<()> {
    let request = subject
        .client
        .pod(subject.node, &format!("bench-{}-{round}", subject.handler));
    // The first round warms caches on both sides and is not counted.
    let mut note = |step: &str, took| {
        if round > 0 || subject.rounds == 1 {
            report.time(step, subject.name, took);
        }
    };
    let client = &mut subject.client;
    let (pod, took) = client.run_pod(&request, subject.handler).await?;
    note("RunPodSandbox", took);
    let (container, took) = client
        .create_and_start(&pod, &request, &subject.node.busybox, 0)
        .await?;
    note("CreateContainer + StartContainer", took);
    note("ExecSync", client.exec(&container).await?);
    note("StopPodSandbox + RemovePodSandbox", client.remove(&pod).await?);
    Ok(())
}

/// Five pods at once, first without a container, then with one each; the containers' own processes do not count.
async fn weigh_pods(subject: &mut Subject<'_>, report: &mut Report) -> Result<()> {
    const PODS: usize = 5;
    let daemon = subject.node.daemon_pid()?;
    let mut pods = Vec::new();
    for number in 0..PODS {
        let request = subject
            .client
            .pod(subject.node, &format!("weigh-{}-{number}", subject.handler));
        let (pod, _) = subject.client.run_pod(&request, subject.handler).await?;
        pods.push((pod, request));
    }
    let of_pods = |node: &Node| weight::of(&weight::pod_processes(node, daemon)?);
    report.weigh(
        "a pod without containers",
        subject.name,
        of_pods(subject.node)? / PODS as f64,
    );
    for (pod, request) in &pods {
        subject
            .client
            .create_and_start(pod, request, &subject.node.busybox, 0)
            .await?;
    }
    report.weigh(
        "a pod with a container",
        subject.name,
        of_pods(subject.node)? / PODS as f64,
    );
    for (pod, _) in &pods {
        subject.client.remove(pod).await?;
    }
    Ok(())
}
