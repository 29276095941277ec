//! The daemon may be killed at any moment: what lives is adopted, what was half made is undone, nothing leaks.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::{Handler::Runc, Suite};

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .serial()
        .both("a_killed_daemon_finds_its_pods_again", adopted)
        .both("a_stopped_daemon_leaves_pods_alone", stopped)
        .both("what_ended_meanwhile_is_known", ended_meanwhile)
        .both("pods_stopped_half_way_are_finished", random_kills)
        .one(Runc, "images_outlive_a_kill_during_a_pull", kill_during_pull)
        .one(Runc, "a_second_daemon_is_refused", second_daemon)
        .main()
}

/// Checks that a container's counting log has every number once, in order, and returns how many.
fn unbroken(raw: &str) -> Result<usize> {
    let mut next = 0usize;
    for line in raw.lines() {
        let number: usize = line
            .rsplit(' ')
            .next()
            .unwrap_or_default()
            .parse()
            .with_context(|| line.to_owned())?;
        ensure!(number == next, "line {number} follows {}", next.saturating_sub(1));
        next += 1;
    }
    Ok(next)
}

const COUNT: &str = "trap 'exit 0' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done";

fn restart(t: &Case<'_>, kill: bool) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.script("counter", COUNT))?;
    let path = t.status(&id)?["logPath"]
        .as_str()
        .context("no log path")?
        .to_owned();
    let before = (t.status(&id)?, t.pod_status(&pod.id)?["status"].clone());
    std::thread::sleep(Duration::from_millis(500));
    if kill {
        t.node.kill_daemon()?
    } else {
        t.node.stop_daemon()?
    }
    let at_end = unbroken(&std::fs::read_to_string(&path)?)?;
    std::thread::sleep(Duration::from_secs(1));
    let without = unbroken(&std::fs::read_to_string(&path)?)?;
    ensure!(
        without > at_end,
        "nothing is logged while the daemon is away: {at_end} lines"
    );
    t.node.start_daemon()?;
    let after = (t.status(&id)?, t.pod_status(&pod.id)?["status"].clone());
    for key in [
        "id",
        "createdAt",
        "startedAt",
        "state",
        "image",
        "metadata",
        "logPath",
    ] {
        ensure!(
            before.0[key] == after.0[key],
            "{key}: {} before, {} after",
            before.0[key],
            after.0[key]
        );
    }
    for key in [
        "id",
        "createdAt",
        "state",
        "network",
        "metadata",
        "runtimeHandler",
    ] {
        ensure!(
            before.1[key] == after.1[key],
            "{key}: {} before, {} after",
            before.1[key],
            after.1[key]
        );
    }
    ensure!(t.shell(&id, "echo alive")? == "alive");
    // More containers can be made in the adopted pod.
    ensure!(t.run_script(&pod, "more", "echo more")? == "more\n");
    t.node.crictl.ok(&["stop", "-t", "10", &id])?;
    let ended = t.wait_exited(&id)?;
    ensure!(ended.code() == 0, "{}", ended.status);
    let lines = unbroken(&std::fs::read_to_string(&path)?)?;
    ensure!(
        lines > without,
        "{lines} lines at the end, {without} at the restart"
    );
    t.node.remove_pod(&pod.id)
}

fn adopted(t: &Case<'_>) -> Result<()> {
    restart(t, true)
}

fn stopped(t: &Case<'_>) -> Result<()> {
    restart(t, false)
}

fn ended_meanwhile(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.script("short", "sleep 2; echo done; exit 42"))?;
    t.node.kill_daemon()?;
    std::thread::sleep(Duration::from_secs(3));
    t.node.start_daemon()?;
    let status = t.status(&id)?;
    ensure!(
        status["state"] == "CONTAINER_EXITED" && status["exitCode"] == 42,
        "{status}"
    );
    ensure!(
        status["reason"] == "Error" && status["finishedAt"].as_str().is_some_and(|f| f.starts_with("20")),
        "{status}"
    );
    ensure!(t.logs(&id)? == "done\n");
    Ok(())
}

/// Kills the daemon at random moments while pods are made and removed, several times over.
fn random_kills(t: &Case<'_>) -> Result<()> {
    let mut seed = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() & 0xffff_ffff)? | 1;
    println!("   random_kills under {}: seed {seed}", t.handler.name());
    let mut random = |below: u64| {
        // xorshift: any spread will do, and a failure names the seed.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let (rounds, span) = match t.handler {
        Runc => (8, 700),
        catamaran_e2e::suite::Handler::Runv => (4, 6000),
    };
    for round in 0..rounds {
        let over = AtomicBool::new(false);
        let request = t.pod_request();
        let wait = Duration::from_millis(random(span));
        std::thread::scope(|scope| -> Result<()> {
            scope.spawn(|| {
                // Requests fail when the daemon goes away: only the state afterwards counts.
                while !over.load(Ordering::SeqCst) {
                    let Ok(pod) = t.node.run_pod(t.handler.name(), &request) else {
                        break;
                    };
                    if let Ok(id) = t.node.create(&pod, &t.idle("main")) {
                        let _ = t.node.crictl.run(&["start", &id]);
                        let _ = t.node.crictl.run(&["stop", "-t", "1", &id]);
                    }
                    let _ = t.node.remove_pod(&pod.id);
                }
            });
            std::thread::sleep(wait);
            over.store(true, Ordering::SeqCst);
            t.node.kill_daemon()
        })?;
        t.node
            .start_daemon()
            .with_context(|| format!("round {round}, killed after {wait:?}"))?;
        let pods = t.node.crictl.ok(&["pods", "-q", "--no-trunc"])?;
        for id in pods.lines() {
            t.node
                .remove_pod(id)
                .with_context(|| format!("round {round}, killed after {wait:?}"))?;
        }
        let left = t.node.wait_for_no_leaks(Duration::from_secs(30))?;
        ensure!(
            left.is_empty(),
            "round {round}, killed after {wait:?}, left behind: {left:#?}"
        );
        // No name stays reserved.
        let again = t.node.run_pod(t.handler.name(), &request);
        let again = again.with_context(|| format!("round {round}, killed after {wait:?}: the name"))?;
        t.node.remove_pod(&again.id)?;
    }
    Ok(())
}

fn kill_during_pull(t: &Case<'_>) -> Result<()> {
    use catamaran_e2e::image::{Format, Layer, Packing, build, host_architecture};
    let bytes: Vec<u8> = (0..40_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let layer = Layer::new().file("big", 0o644, (0, 0), &bytes)?;
    let image = build(
        vec![(layer, Packing::Gzip)],
        &serde_json::json!({}),
        Format::Oci,
        host_architecture(),
    )?;
    let reference = t.node.registry.push("killed:1", &image)?;
    for wait in [50, 200, 500] {
        std::thread::scope(|scope| -> Result<()> {
            scope.spawn(|| t.node.crictl.run(&["pull", &reference]));
            std::thread::sleep(Duration::from_millis(wait));
            t.node.kill_daemon()
        })?;
        t.node.start_daemon()?;
        // What was pulled before is there.
        ensure!(
            t.node.crictl.run(&["inspecti", &t.node.busybox])?.code == 0,
            "an image is lost"
        );
    }
    t.node.crictl.ok(&["pull", &reference])?;
    let status = t.node.crictl.json(&["inspecti", &reference])?;
    ensure!(status["status"]["id"] == image.id.as_str(), "{status}");
    t.node.crictl.ok(&["rmi", &reference])?;
    Ok(())
}

fn second_daemon(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip("containerd waits for its database's lock".to_owned()).into());
    }
    let mut command = std::process::Command::new(catamaran_e2e::binaries::ours("catamaran")?);
    let layout = &t.node.layout;
    command
        .arg("serve")
        .arg("--config")
        .arg(layout.base.join("catamaran.yaml"));
    command
        .arg("--root")
        .arg(&layout.root)
        .arg("--state")
        .arg(&layout.state)
        .arg("--listen")
        .arg(&layout.socket);
    let output = catamaran_e2e::process::run(&mut command, Duration::from_secs(20))?;
    ensure!(output.code != 0, "a second daemon runs on the same root");
    ensure!(
        (output.stderr.clone() + &output.stdout).contains(&layout.root.display().to_string()),
        "{output:?}"
    );
    // The first is not disturbed.
    t.node.crictl.ok(&["version"])?;
    Ok(())
}
