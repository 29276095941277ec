//! GetContainerEvents by `crictl events`: what happens is told once and in order, and a stream that is opened again
//! after a restart goes on where listing leaves off.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::Suite;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .serial()
        .both("a_life_is_told_in_order_and_once", life)
        .both("a_stream_is_opened_again_after_a_restart", restart)
        .main()
}

/// `crictl events` while it runs.
struct Events {
    child: Child,
    output: PathBuf,
}

impl Events {
    fn open(t: &Case<'_>, name: &str) -> Result<Self> {
        let output = t.directory()?.join(name);
        let mut command = t.node.crictl.command(&["events"]);
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(Stdio::null())
            .spawn()?;
        let events = Self { child, output };
        // It says nothing when it is subscribed: pods are made until one is told of.
        t.eventually(SOON, || {
            let probe = t.node.run_pod("runc", &t.pod_request())?;
            t.node.remove_pod(&probe.id)?;
            std::thread::sleep(Duration::from_millis(200));
            ensure!(!events.of(&probe.id)?.is_empty(), "crictl events tells of no pod");
            Ok(())
        })?;
        Ok(events)
    }

    /// Types of the events about a container or a pod, in order.
    fn of(&self, id: &str) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(&self.output)?;
        let all = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last may be half written.
        let about = all
            .map_while(Result::ok)
            .filter(|event| event["containerId"] == id);
        Ok(about
            .map(|event| {
                event["containerEventType"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect())
    }

    fn expect(&self, t: &Case<'_>, id: &str, expected: &[&str]) -> Result<()> {
        t.eventually(SOON, || {
            let told = self.of(id)?;
            ensure!(
                told.len() >= expected.len(),
                "told {told:?}, expected {expected:?}"
            );
            Ok(())
        })?;
        // What is told twice may come late.
        std::thread::sleep(Duration::from_millis(300));
        let told = self.of(id)?;
        ensure!(told == expected, "told {told:?}, expected {expected:?}");
        Ok(())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CREATED: &str = "CONTAINER_CREATED_EVENT";
const STARTED: &str = "CONTAINER_STARTED_EVENT";
const STOPPED: &str = "CONTAINER_STOPPED_EVENT";
const DELETED: &str = "CONTAINER_DELETED_EVENT";

fn life(t: &Case<'_>) -> Result<()> {
    let events = Events::open(t, "events")?;
    let pod = t.pod()?;
    let stopped = t.start(&pod, &t.idle("stopped"))?;
    t.wait_for_trap(&stopped)?;
    let ended = t.run(&pod, &t.script("ended", "exit 3"))?.id;
    events.expect(t, &ended, &[CREATED, STARTED, STOPPED])?;
    t.node.crictl.ok(&["stop", "-t", "10", &stopped])?;
    // Repeated, it changes nothing and is told to nobody.
    t.node.crictl.ok(&["stop", "-t", "10", &stopped])?;
    events.expect(t, &stopped, &[CREATED, STARTED, STOPPED])?;
    for id in [&stopped, &ended] {
        t.node.crictl.ok(&["rm", id])?;
        events.expect(t, id, &[CREATED, STARTED, STOPPED, DELETED])?;
    }
    t.node.remove_pod(&pod.id)?;
    events.expect(t, &pod.id, &[CREATED, STARTED, STOPPED, DELETED])
}

fn restart(t: &Case<'_>) -> Result<()> {
    let events = Events::open(t, "before")?;
    let pod = t.pod()?;
    let lives = t.start(&pod, &t.idle("lives"))?;
    t.wait_for_trap(&lives)?;
    let gate = t.directory()?.join("gate");
    std::fs::create_dir_all(&gate)?;
    let script = "until [ -e /gate/go ]; do sleep 0.1; done; exit 5";
    let ends = t
        .script("ends", script)
        .mount(&gate, "/gate", serde_json::json!({}));
    let ends = t.start(&pod, &ends)?;
    for id in [&lives, &ends] {
        events.expect(t, id, &[CREATED, STARTED])?;
    }
    t.node.kill_daemon()?;
    // While nobody listens, a container ends.
    std::fs::write(gate.join("go"), "")?;
    std::thread::sleep(Duration::from_secs(2));
    t.node.start_daemon()?;
    let ended = t.wait_exited(&ends)?;
    ensure!(ended.code() == 5, "{}", ended.status);
    let again = Events::open(t, "after")?;
    let state = t.status(&lives)?["state"].clone();
    ensure!(state == "CONTAINER_RUNNING", "{state}");
    let told = again.of(&lives)?;
    ensure!(
        told.is_empty(),
        "nothing has happened to it, yet it is told of: {told:?}"
    );
    t.node.crictl.ok(&["stop", "-t", "10", &lives])?;
    again.expect(t, &lives, &[STOPPED])?;
    t.node.crictl.ok(&["rm", &lives])?;
    again.expect(t, &lives, &[STOPPED, DELETED])?;
    t.node.crictl.ok(&["rm", &ends])?;
    let told = again.of(&ends)?;
    ensure!(told.last().is_some_and(|last| last == DELETED), "{told:?}");
    Ok(())
}
