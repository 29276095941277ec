//! The daemon and the shims may be killed at any moment: what lives is adopted, what was half made is undone,
//! nothing leaks, and what is reported is so. Where moments are random, `E2E_SEED` repeats those of a failure.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::leaks;
use catamaran_e2e::node::{Options, Pod};
use catamaran_e2e::requests::Request;
use catamaran_e2e::suite::{Handler::Runc, Handler::Runv, Skip, Suite};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .serial()
        .both("a_killed_daemon_finds_its_pods_again", adopted)
        .both("a_stopped_daemon_leaves_pods_alone", stopped)
        .both("what_ended_meanwhile_is_known", ended_meanwhile)
        .both("a_shim_that_is_slow_is_adopted", silent_shim)
        .both("pods_stopped_half_way_are_finished", random_kills)
        .both("shims_are_killed_at_any_moment", random_shim_kills)
        .one(Runc, "no_descriptor_is_left_of_a_removed_pod", descriptors)
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

fn shims(t: &Case<'_>) -> Result<Vec<u32>> {
    let found = leaks::find_processes(&t.node.layout, &t.node.subnet)?;
    let shims = found
        .iter()
        .filter(|(_, words)| words.contains("containerd-shim-catamaran"));
    Ok(shims.map(|(pid, _)| *pid).collect())
}

fn signal(pids: &[u32], signal: Signal) -> Result<()> {
    for pid in pids {
        nix::sys::signal::kill(Pid::from_raw(pid.cast_signed()), signal)?;
    }
    Ok(())
}

/// A shim that does not answer while the daemon starts lives all the same, and so do its containers.
fn silent_shim(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(Skip("containerd gives its shims a time limit".to_owned()).into());
    }
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let (before, shim) = (t.node.crictl.json(&["inspect", &id])?, shims(t)?);
    ensure!(shim.len() == 1, "{shim:?}");
    signal(&shim, Signal::SIGSTOP)?;
    t.node.kill_daemon()?;
    let started = t.node.start_daemon();
    let seen = t
        .status(&id)
        .and_then(|status| Ok((status, t.pod_status(&pod.id)?)));
    std::thread::sleep(Duration::from_secs(5));
    signal(&shim, Signal::SIGCONT)?;
    started?;
    let (status, pod_status) = seen?;
    ensure!(status["state"] == "CONTAINER_RUNNING", "{status}");
    ensure!(pod_status["status"]["state"] == "SANDBOX_READY", "{pod_status}");
    t.eventually(Duration::from_secs(20), || t.shell(&id, "true"))?;
    let after = t.node.crictl.json(&["inspect", &id])?;
    for (before, after) in [
        (&before["info"]["pid"], &after["info"]["pid"]),
        (&before["status"]["startedAt"], &after["status"]["startedAt"]),
        (&before["status"]["state"], &after["status"]["state"]),
    ] {
        ensure!(before == after, "{before} before, {after} after");
    }
    ensure!(shims(t)? == shim, "another shim");
    t.node.crictl.ok(&["stop", "-t", "10", &id])?;
    ensure!(t.wait_exited(&id)?.code() == 0);
    t.node.remove_pod(&pod.id)
}

/// Moments of a run. A failure names the seed, `E2E_SEED` sets it.
struct Random(u64);

impl Random {
    fn new() -> Result<(Self, u64)> {
        let seed = match std::env::var("E2E_SEED") {
            Ok(seed) => seed.parse().context("E2E_SEED is no number")?,
            Err(_) => u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() & 0xffff_ffff)?,
        };
        Ok((Self(seed | 1), seed))
    }

    /// xorshift: any spread will do.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What a caller was at when the daemon went away.
#[derive(Debug, Clone)]
enum At {
    Run,
    Create(Pod),
    Start(String),
    Stop(String),
    Remove(String),
}

/// Makes and removes a pod of this request over and over, noting what is at work, until told to end.
fn churn(t: &Case<'_>, request: &Request, at: &Mutex<At>, over: &AtomicBool) {
    let note = |now: At| *at.lock().unwrap_or_else(PoisonError::into_inner) = now;
    let ok = |words: &[&str]| t.node.crictl.run(words).is_ok_and(|output| output.code == 0);
    while !over.load(Ordering::SeqCst) {
        note(At::Run);
        let Ok(pod) = t.node.run_pod(t.handler.name(), request) else {
            break;
        };
        note(At::Create(pod.clone()));
        let Ok(id) = t.node.create(&pod, &t.idle("main")) else {
            break;
        };
        note(At::Start(id.clone()));
        if !ok(&["start", &id]) {
            break;
        }
        note(At::Stop(id.clone()));
        if !ok(&["stop", "-t", "1", &id]) {
            break;
        }
        note(At::Remove(pod.id.clone()));
        if t.node.remove_pod(&pod.id).is_err() {
            break;
        }
    }
}

/// The caller asks again for what it had no answer to, as a kubelet does after it has looked at what is there.
fn repeat(t: &Case<'_>, request: &Request, at: &At) -> Result<()> {
    let listed = |what: &[&str]| -> Result<String> { t.node.crictl.ok(what) };
    match at {
        At::Run => {
            if listed(&["pods", "-q", "--no-trunc"])?.is_empty() {
                t.node.run_pod(t.handler.name(), request)?;
            }
        }
        At::Create(pod) => {
            if listed(&["ps", "-a", "-q", "--no-trunc"])?.is_empty() {
                t.node.create(pod, &t.idle("main"))?;
            }
        }
        At::Start(id) => {
            t.node.crictl.ok(&["start", id])?;
            let status = t.status(id)?;
            ensure!(status["state"] == "CONTAINER_RUNNING", "{status}");
        }
        At::Stop(id) => {
            t.node.crictl.ok(&["stop", "-t", "1", id])?;
            let status = t.status(id)?;
            ensure!(status["state"] == "CONTAINER_EXITED", "{status}");
        }
        At::Remove(pod) => {
            // crictl asks for the status of what it removes.
            if listed(&["pods", "-q", "--no-trunc"])?.contains(pod) {
                t.node.remove_pod(pod)?;
            }
            let left = listed(&["pods", "-q", "--no-trunc"])?;
            ensure!(!left.contains(pod), "{pod} is listed after its removal");
        }
    }
    Ok(())
}

/// What is reported of every container is so.
fn states_are_true(t: &Case<'_>) -> Result<()> {
    t.eventually(Duration::from_secs(15), || {
        for id in t.node.crictl.ok(&["ps", "-a", "-q", "--no-trunc"])?.lines() {
            let status = t.status(id)?;
            let state = status["state"].as_str().unwrap_or_default().to_owned();
            match t.handler {
                Runc => {
                    let living = living(id)?;
                    ensure!(
                        living.is_empty() == (state == "CONTAINER_EXITED"),
                        "{id} is {state} with the processes {living:?}"
                    );
                    // Between create and start the runtime's own process waits there.
                    let waits = living.iter().any(|(_, words)| words.contains("runc init"));
                    ensure!(
                        state != "CONTAINER_RUNNING" || !waits,
                        "{id} is {state} and was not started: {living:?}"
                    );
                    ensure!(
                        state != "CONTAINER_CREATED" || waits,
                        "{id} is {state} and runs: {living:?}"
                    );
                }
                Runv => ensure!(
                    (t.exec(id, &["true"])?.code == 0) == (state == "CONTAINER_RUNNING"),
                    "{id} is {state}, and exec says otherwise"
                ),
            }
        }
        Ok(())
    })
}

/// Processes in the cgroup of a container, with their command lines.
fn living(id: &str) -> Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let read = |name: &str| std::fs::read(path.join(name)).unwrap_or_default();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
            continue;
        };
        let words = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        if !words.is_empty() && String::from_utf8_lossy(&read("cgroup")).contains(id) {
            found.push((pid, words));
        }
    }
    Ok(found)
}

fn remove_all(t: &Case<'_>, request: &Request) -> Result<()> {
    for id in t.node.crictl.ok(&["pods", "-q", "--no-trunc"])?.lines() {
        t.node.remove_pod(id)?;
    }
    let left = t.node.wait_for_no_leaks(Duration::from_secs(30))?;
    ensure!(left.is_empty(), "left behind: {left:#?}");
    // No name stays reserved.
    let again = t.node.run_pod(t.handler.name(), request).context("the name")?;
    t.node.remove_pod(&again.id)
}

/// Kills the daemon at random moments while pods are made and removed, several times over.
fn random_kills(t: &Case<'_>) -> Result<()> {
    let (mut random, seed) = Random::new()?;
    println!("   random_kills under {}: E2E_SEED={seed}", t.handler.name());
    let (rounds, span) = match t.handler {
        Runc => (8, 1200),
        Runv => (4, 6000),
    };
    for round in 0..rounds {
        let (over, at) = (AtomicBool::new(false), Mutex::new(At::Run));
        let request = t.pod_request();
        let wait = Duration::from_millis(random.below(span));
        std::thread::scope(|scope| -> Result<()> {
            scope.spawn(|| churn(t, &request, &at, &over));
            std::thread::sleep(wait);
            over.store(true, Ordering::SeqCst);
            t.node.kill_daemon()
        })?;
        let at = at.into_inner().unwrap_or_else(PoisonError::into_inner);
        let checked = t.node.start_daemon().and_then(|()| {
            states_are_true(t).context("after the restart")?;
            repeat(t, &request, &at).context("the request again")?;
            states_are_true(t).context("after the request again")?;
            remove_all(t, &request)
        });
        checked.with_context(|| {
            format!("E2E_SEED={seed}, round {round}, killed after {wait:?} during {at:?}")
        })?;
    }
    Ok(())
}

/// Kills shims at random moments, with the daemon there to see it and without.
fn random_shim_kills(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(Skip("containerd's shims have other names".to_owned()).into());
    }
    let (mut random, seed) = Random::new()?;
    println!("   random_shim_kills under {}: E2E_SEED={seed}", t.handler.name());
    let (rounds, span) = match t.handler {
        Runc => (8, 900),
        Runv => (3, 4000),
    };
    for round in 0..rounds {
        let (over, at) = (AtomicBool::new(false), Mutex::new(At::Run));
        let request = t.pod_request();
        let wait = Duration::from_millis(random.below(span));
        let seen = round % 2 == 0;
        let checked = std::thread::scope(|scope| -> Result<()> {
            scope.spawn(|| churn(t, &request, &at, &over));
            std::thread::sleep(wait);
            over.store(true, Ordering::SeqCst);
            if seen {
                // One that has just ended needs no signal.
                let _ = signal(&shims(t)?, Signal::SIGKILL);
                return Ok(());
            }
            t.node.kill_daemon()?;
            let _ = signal(&shims(t)?, Signal::SIGKILL);
            t.node.start_daemon()
        });
        let checked = checked.and_then(|()| {
            no_shim_is_said_to_be_ready(t)?;
            states_are_true(t)?;
            remove_all(t, &request)
        });
        let at = at.into_inner().unwrap_or_else(PoisonError::into_inner);
        checked.with_context(|| {
            format!("E2E_SEED={seed}, round {round}, killed after {wait:?} during {at:?}, daemon up: {seen}")
        })?;
    }
    Ok(())
}

/// A pod whose shim is dead is not ready.
fn no_shim_is_said_to_be_ready(t: &Case<'_>) -> Result<()> {
    t.eventually(Duration::from_secs(20), || {
        let ready = t
            .node
            .crictl
            .ok(&["pods", "-q", "--no-trunc", "--state", "ready"])?;
        let (ready, shims) = (ready.lines().count(), shims(t)?.len());
        if ready > shims {
            bail!("{ready} pods are ready and {shims} shims live");
        }
        Ok(())
    })
}

/// What the daemon had open for pods is closed when they are gone.
fn descriptors(t: &Case<'_>) -> Result<()> {
    let churn = || -> Result<()> {
        let pod = t.pod()?;
        let id = t.start(&pod, &t.idle("main"))?;
        t.shell(&id, "true")?;
        t.node.remove_pod(&pod.id)
    };
    churn()?;
    let before = t.node.daemon_descriptors()?;
    for _ in 0..5 {
        churn()?;
    }
    t.eventually(Duration::from_secs(10), || {
        let after = t.node.daemon_descriptors()?;
        ensure!(
            after.len() <= before.len(),
            "before: {before:#?}\nafter five pods: {after:#?}"
        );
        Ok(())
    })
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
        return Err(Skip("containerd waits for its database's lock".to_owned()).into());
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
