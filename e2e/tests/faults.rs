//! What the daemon calls fails, hangs or talks nonsense: a CNI plugin, an OCI runtime, a guest kernel. Each gives
//! a clear error, leaves nothing behind, and the next pod works.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::binaries;
use catamaran_e2e::case::Case;
use catamaran_e2e::failpoint::{self, Action};
use catamaran_e2e::node::{Node, Options};
use catamaran_e2e::suite::{Handler::Runc, Handler::Runv, Suite};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new(options)
        .serial()
        .both("a_cni_plugin_that_fails", cni_fails)
        .both("a_cni_plugin_that_hangs", cni_hangs)
        .one(Runc, "a_cni_plugin_that_prints_garbage", cni_garbage)
        .one(Runc, "a_cni_plugin_whose_del_fails_once", cni_del_fails)
        .one(Runc, "a_cni_plugin_that_is_not_installed", cni_missing)
        .one(Runc, "a_runtime_that_fails", runtime_fails)
        .one(Runc, "a_runtime_that_hangs_in_create", runtime_hangs)
        .one(Runc, "a_runtime_that_is_not_installed", runtime_missing)
        .one(Runc, "updates_at_once_are_all_in_force", updates_at_once)
        .one(Runc, "what_fails_is_told_as_an_event", failures_are_told)
        .one(Runc, "a_start_that_outlives_the_daemon", start_outlives)
        .one(Runc, "a_create_that_outlives_the_daemon", create_outlives)
        .one(Runc, "a_full_disk", full_disk)
        .one(Runc, "a_checkpoint_is_an_archive", checkpoint_archive)
        .one(Runc, "a_checkpoint_that_fails", checkpoint_fails)
        .one(Runv, "a_checkpoint_of_a_vm", checkpoint_of_vm)
        .one(Runv, "a_kernel_that_is_none", garbage_kernel)
        .one(Runv, "a_kernel_without_an_agent", no_agent)
        .one(Runv, "a_guest_that_was_never_built", no_guest)
        .one(Runv, "a_vm_that_is_killed", vm_killed)
        .one(Runc, "a_shim_that_is_killed", shim_killed)
        .one(Runv, "a_vm_shim_that_is_killed", shim_killed)
        .both(
            "a_shim_that_is_killed_while_the_daemon_is_down",
            shim_killed_unseen,
        )
        .main()
}

/// criu works on few of the kernels that these tests meet, so the runtime only stands in for it; the rest is real.
fn checkpoint_archive(t: &Case<'_>) -> Result<()> {
    let pod = t.run_pod_under("fault", &t.pod_request())?;
    let id = t.start(&pod, &t.idle("main"))?;
    t.shell(&id, "echo written > /new && rm /bin/ls")?;
    let location = t.directory()?.join("checkpoint.tar");
    {
        let _faults = Faults::set("runtime", "checkpoint", 0, Action::Stand)?;
        t.node
            .crictl
            .ok(&["checkpoint", "--export", &location.display().to_string(), &id])?;
    }
    let files = archived(&std::fs::read(&location)?)?;
    for name in [
        "config.dump",
        "spec.dump",
        "checkpoint/pages-1.img",
        "dump.log",
        "container.log",
    ] {
        ensure!(files.contains_key(name), "{name} is not in {:?}", files.keys());
    }
    let config: Value = serde_json::from_slice(&files["config.dump"])?;
    ensure!(config["id"] == id && config["name"] == "main", "{config}");
    let diff = archived(&files["rootfs-diff.tar"])?;
    ensure!(
        diff.get("new").is_some_and(|bytes| bytes == b"written\n"),
        "{:?}",
        diff.keys()
    );
    ensure!(diff.contains_key("bin/.wh.ls"), "{:?}", diff.keys());
    // It goes on running.
    t.shell(&id, "true")?;
    Ok(())
}

fn archived(bytes: &[u8]) -> Result<std::collections::BTreeMap<String, Vec<u8>>> {
    let mut files = std::collections::BTreeMap::new();
    for entry in tar::Archive::new(bytes).entries()? {
        let mut entry = entry?;
        let name = entry.path()?.display().to_string();
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content)?;
        files.insert(name.trim_end_matches('/').to_owned(), content);
    }
    Ok(files)
}

fn checkpoint_fails(t: &Case<'_>) -> Result<()> {
    let pod = t.run_pod_under("fault", &t.pod_request())?;
    let id = t.start(&pod, &t.idle("main"))?;
    let directory = t.directory()?;
    let location = directory.join("checkpoint.tar").display().to_string();
    let fails = |location: &str| {
        let arguments = ["--timeout", "30s", "checkpoint", "--export", location, &id];
        t.node.crictl.fails(&arguments)
    };
    {
        let _faults = Faults::set("runtime", "checkpoint", 0, Action::Fail)?;
        let error = fails(&location)?;
        // Which of the two depends on the node: where criu works the runtime's own error is told.
        ensure!(
            error.contains("scripted fault in checkpoint"),
            "the runtime's error is told: {error}"
        );
        ensure!(
            criu_works() || (error.contains("FailedPrecondition") && error.contains("criu")),
            "{error}"
        );
    }
    let error = fails("relative.tar")?;
    ensure!(
        error.contains("InvalidArgument") && error.contains("location"),
        "{error}"
    );
    let left: Vec<_> = std::fs::read_dir(&directory)?.collect::<std::io::Result<_>>()?;
    ensure!(left.is_empty(), "{left:?}");
    t.shell(&id, "true")?;
    Ok(())
}

fn criu_works() -> bool {
    std::process::Command::new("criu")
        .arg("check")
        .output()
        .is_ok_and(|output| output.status.success())
}

fn checkpoint_of_vm(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let location = t.directory()?.join("checkpoint.tar");
    let error = t
        .node
        .crictl
        .fails(&["checkpoint", "--export", &location.display().to_string(), &id])?;
    ensure!(
        error.contains("Unimplemented") && error.contains("virtual machine") && !location.exists(),
        "{error}"
    );
    Ok(())
}

/// Where the fault programs of this run look for what to do; one suite runs at a time in a process.
fn control(kind: &str) -> PathBuf {
    std::env::temp_dir().join(format!("catamaran-e2e-faults-{}-{kind}", std::process::id()))
}

fn options() -> Result<Options> {
    let plugin = binaries::ours("fault-cni")?;
    let runtime = json!({
        "type": "oci", "binary": binaries::ours("fault-runtime")?,
        "args": [format!("--control={}", control("runtime").display())],
    });
    Ok(Options {
        last_plugin: Some((json!({"type": "fault-cni", "control": control("cni")}), plugin)),
        handlers: vec![
            ("fault".into(), runtime),
            (
                "absent".into(),
                json!({"type": "oci", "binary": "/no/such/runtime"}),
            ),
        ],
        ..Options::default()
    })
}

/// Ends the faults also where a case fails.
struct Faults(PathBuf);

impl Faults {
    fn set(kind: &str, verb: &str, call: u32, action: Action) -> Result<Self> {
        let control = control(kind);
        failpoint::set(&control, verb, call, action)?;
        Ok(Self(control))
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        let _ = failpoint::clear(&self.0);
    }
}

/// A failed pod left nothing, its name is free, and the same request works now.
fn works_again(t: &Case<'_>, handler: &str, request: &catamaran_e2e::requests::Request) -> Result<()> {
    let left = t.node.wait_for_no_leaks(Duration::from_secs(20))?;
    ensure!(left.is_empty(), "left behind: {left:#?}");
    let pod = t.run_pod_under(handler, request)?;
    let logs = t.run_script(&pod, "after", "echo works")?;
    ensure!(logs == "works\n", "{logs}");
    t.node.remove_pod(&pod.id)
}

fn cni_fails(t: &Case<'_>) -> Result<()> {
    let request = t.pod_request();
    let faults = Faults::set("cni", "ADD", 1, Action::Fail)?;
    let message = t.node.run_pod_fails(t.handler.name(), &request)?;
    for word in ["fault-cni", "scripted fault"] {
        ensure!(message.contains(word), "{word} is not in {message}");
    }
    drop(faults);
    works_again(t, t.handler.name(), &request)
}

fn cni_hangs(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip("containerd has no limit on plugins".to_owned()).into());
    }
    let request = t.pod_request();
    let faults = Faults::set("cni", "ADD", 1, Action::Hang)?;
    let begun = Instant::now();
    let message = t.node.run_pod_fails(t.handler.name(), &request)?;
    // plugin_timeout_seconds is 20 here.
    ensure!(
        begun.elapsed() < Duration::from_secs(60),
        "took {:?}",
        begun.elapsed()
    );
    ensure!(message.contains("fault-cni"), "{message}");
    drop(faults);
    works_again(t, t.handler.name(), &request)
}

fn cni_garbage(t: &Case<'_>) -> Result<()> {
    let request = t.pod_request();
    let faults = Faults::set("cni", "ADD", 1, Action::Garbage)?;
    let message = t.node.run_pod_fails("runc", &request)?;
    ensure!(message.contains("fault-cni") || !t.ours(), "{message}");
    drop(faults);
    works_again(t, "runc", &request)
}

fn cni_del_fails(t: &Case<'_>) -> Result<()> {
    let request = t.pod_request();
    let pod = t.run_pod(&request)?;
    let faults = Faults::set("cni", "DEL", 1, Action::Fail)?;
    // The failure is either reported, and the next try does it, or is put right beside the answer.
    let stopped = t.node.crictl.run(&["stopp", &pod.id])?;
    if stopped.code != 0 {
        ensure!(stopped.stderr.contains("scripted fault"), "{}", stopped.stderr);
        t.node.crictl.ok(&["stopp", &pod.id])?;
    }
    t.node.crictl.ok(&["rmp", &pod.id])?;
    drop(faults);
    works_again(t, "runc", &request)
}

fn cni_missing(t: &Case<'_>) -> Result<()> {
    let file = t.node.layout.cni.join("10-e2e.conflist");
    let good = std::fs::read_to_string(&file)?;
    let mut broken: Value = serde_json::from_str(&good)?;
    broken["plugins"][0]["type"] = json!("no-such-plugin");
    std::fs::write(&file, broken.to_string())?;
    let request = t.pod_request();
    let message = t.eventually(Duration::from_secs(10), || {
        let message = t.node.run_pod_fails("runc", &request)?;
        ensure!(message.contains("no-such-plugin"), "{message}");
        Ok(message)
    });
    std::fs::write(&file, good)?;
    message?;
    t.eventually(Duration::from_secs(10), || works_again(t, "runc", &request))
}

fn runtime_fails(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip(
            "containerd is not configured with the fault runtime".to_owned(),
        )
        .into());
    }
    let request = t.pod_request();
    let pod = t.run_pod_under("fault", &request)?;
    let faults = Faults::set("runtime", "create", 1, Action::Fail)?;
    // Whether the runtime's create runs at CreateContainer or at StartContainer is the daemon's choice.
    let message = match t.node.create(&pod, &t.idle("main")) {
        Err(error) => error.to_string(),
        Ok(id) => {
            let message = t.node.crictl.fails(&["start", &id])?;
            t.node.crictl.ok(&["rm", &id])?;
            message
        }
    };
    ensure!(message.contains("scripted fault"), "{message}");
    drop(faults);
    // Started by runc, but the runtime says it failed: the process must not stay.
    let faults = Faults::set("runtime", "start", 1, Action::FailAfter)?;
    let id = t.node.create(&pod, &t.script("half", "exec sleep 8642"))?;
    let message = t.node.crictl.fails(&["start", &id])?;
    ensure!(message.contains("scripted fault"), "{message}");
    drop(faults);
    t.node.crictl.ok(&["rm", "-f", &id])?;
    t.eventually(Duration::from_secs(10), || {
        let left = catamaran_e2e::leaks::processes(&t.node.layout, &t.node.subnet, &[t.node.daemon_pid()?])?;
        ensure!(!left.iter().any(|p| p.contains("sleep 8642")), "{left:?}");
        Ok(())
    })?;
    let faults = Faults::set("runtime", "delete", 1, Action::Fail)?;
    let id = t.start(&pod, &t.idle("deleted"))?;
    t.node.crictl.ok(&["stop", "-t", "5", &id])?;
    t.eventually(Duration::from_secs(10), || t.node.crictl.ok(&["rm", &id]))?;
    drop(faults);
    t.node.remove_pod(&pod.id)?;
    works_again(t, "fault", &request)
}

fn runtime_hangs(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip(
            "containerd is not configured with the fault runtime".to_owned(),
        )
        .into());
    }
    let request = t.pod_request();
    let pod = t.run_pod_under("fault", &request)?;
    let faults = Faults::set("runtime", "create", 1, Action::Hang)?;
    // A stop of the pod overtakes the hanging request.
    let node = t.node;
    std::thread::scope(|scope| -> Result<()> {
        let hanging = scope.spawn(|| match node.create(&pod, &t.idle("main")) {
            Err(error) => Ok(error.to_string()),
            Ok(id) => node.crictl.fails(&["start", &id]),
        });
        std::thread::sleep(Duration::from_secs(2));
        let begun = Instant::now();
        node.crictl.ok(&["stopp", &pod.id])?;
        ensure!(
            begun.elapsed() < Duration::from_secs(30),
            "StopPodSandbox took {:?}",
            begun.elapsed()
        );
        let message = hanging
            .join()
            .map_err(|_| anyhow::anyhow!("the hanging request panicked"))??;
        ensure!(!message.is_empty());
        Ok(())
    })?;
    drop(faults);
    t.node.crictl.ok(&["rmp", &pod.id])?;
    works_again(t, "fault", &request)
}

fn updates_at_once(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(
            catamaran_e2e::suite::Skip("containerd is not configured with this handler".to_owned()).into(),
        );
    }
    let pod = t.run_pod_under("fault", &t.pod_request())?;
    let id = t.start(&pod, &t.idle("main"))?;
    let _faults = Faults::set("runtime", "update", 1, Action::Slow)?;
    std::thread::scope(|scope| -> Result<()> {
        let slow = scope.spawn(|| t.node.crictl.ok(&["update", "--cpu-share", "512", &id]));
        t.eventually(Duration::from_secs(20), || {
            ensure!(
                failpoint::calls(&control("runtime"), "update")? == 1,
                "no update yet"
            );
            Ok(())
        })?;
        t.node
            .crictl
            .ok(&["update", "--cpu-period", "100000", "--cpu-quota", "50000", &id])?;
        slow.join().map_err(|_| anyhow::anyhow!("crictl panicked"))??;
        Ok(())
    })?;
    let linux = t.status(&id)?["resources"]["linux"].clone();
    for (key, value) in [("cpuShares", "512"), ("cpuQuota", "50000")] {
        ensure!(linux[key] == value, "{key}: {linux}");
    }
    t.node.remove_pod(&pod.id)
}

/// A start that fails ends the container, and a pod's removal removes its containers.
fn failures_are_told(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(
            catamaran_e2e::suite::Skip("containerd is not configured with this handler".to_owned()).into(),
        );
    }
    let output = t.directory()?.join("events");
    let mut events = t.node.crictl.command(&["events"]);
    let mut events = events
        .stdout(std::fs::File::create(&output)?)
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let told = (|| {
        let of = |id: &str| -> Result<Vec<String>> {
            let text = std::fs::read_to_string(&output)?;
            let all = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
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
        };
        let pod = t.eventually(Duration::from_secs(20), || {
            let pod = t.run_pod_under("fault", &t.pod_request())?;
            std::thread::sleep(Duration::from_millis(200));
            ensure!(!of(&pod.id)?.is_empty(), "crictl events tells of no pod");
            Ok(pod)
        })?;
        let (id, short) = (
            t.node.create(&pod, &t.idle("main"))?,
            t.node.create(&pod, &t.script("short", "true"))?,
        );
        {
            let _faults = Faults::set("runtime", "start", 1, Action::Fail)?;
            t.node.crictl.fails(&["start", &id])?;
        }
        t.node.crictl.ok(&["start", &short])?;
        t.wait_exited(&short)?;
        t.node.remove_pod(&pod.id)?;
        let event = |name: &str| format!("CONTAINER_{name}_EVENT");
        t.eventually(Duration::from_secs(10), || {
            let (failed, short) = (of(&id)?, of(&short)?);
            ensure!(
                failed == ["CREATED", "STOPPED", "DELETED"].map(event),
                "{failed:?}"
            );
            ensure!(
                short == ["CREATED", "STARTED", "STOPPED", "DELETED"].map(event),
                "{short:?}"
            );
            Ok(())
        })
    })();
    events.kill()?;
    events.wait()?;
    told
}

/// Kills the daemon while the runtime is at a slow verb that a crictl command asked for, and starts it again.
fn killed_during(t: &Case<'_>, verb: &str, arguments: &[&str]) -> Result<()> {
    let _faults = Faults::set("runtime", verb, 1, Action::Slow)?;
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| t.node.crictl.run(arguments));
        t.eventually(Duration::from_secs(20), || {
            ensure!(failpoint::calls(&control("runtime"), verb)? == 1, "no {verb} yet");
            Ok(())
        })?;
        t.node.kill_daemon()
    })?;
    t.node.start_daemon()
}

fn start_outlives(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(
            catamaran_e2e::suite::Skip("containerd is not configured with this handler".to_owned()).into(),
        );
    }
    let request = t.pod_request();
    let pod = t.run_pod_under("fault", &request)?;
    let id = t.node.create(&pod, &t.idle("main"))?;
    killed_during(t, "start", &["start", &id])?;
    // Whatever its caller heard, a container that runs is said to run.
    t.eventually(Duration::from_secs(20), || {
        let status = t.status(&id)?;
        ensure!(status["state"] == "CONTAINER_RUNNING", "{status}");
        t.shell(&id, "true")
    })?;
    t.node.crictl.ok(&["start", &id])?;
    t.node.crictl.ok(&["rm", "-f", &id])?;
    t.node.remove_pod(&pod.id)?;
    works_again(t, "fault", &request)
}

fn create_outlives(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(
            catamaran_e2e::suite::Skip("containerd is not configured with this handler".to_owned()).into(),
        );
    }
    let request = t.pod_request();
    let pod = t.run_pod_under("fault", &request)?;
    let main = t.idle("main");
    let (pod_file, file) = (t.node.write("pod", &request)?, t.node.write("main", &main)?);
    killed_during(t, "create", &["create", &pod.id, &file, &pod_file])?;
    ensure!(t.node.crictl.ok(&["ps", "-a", "-q"])?.is_empty());
    // The name is free once the first attempt is undone, which waits for the runtime.
    let id = t.start(&pod, &main)?;
    t.shell(&id, "true")?;
    let snapshots = std::fs::read_dir(t.node.layout.root.join("snapshots"))?.count();
    ensure!(snapshots == 1, "{snapshots} snapshots of one container");
    t.node.remove_pod(&pod.id)?;
    works_again(t, "fault", &request)
}

/// What cannot be recorded is refused, what is there can be torn down, and once there is room all works.
fn full_disk(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip("containerd's store has its own ways".to_owned()).into());
    }
    let node = Node::start(
        t.node.flavour,
        Options {
            root_mib: Some(64),
            ..Options::default()
        },
    )?;
    let kept = node.run_pod("runc", &node.pod_request("kept"))?;
    let gone = node.run_pod("runc", &node.pod_request("gone"))?;
    let filler = node.layout.root.join("filler");
    {
        use std::io::Write as _;
        let mut file = std::fs::File::create(&filler)?;
        for chunk in [vec![0u8; 1 << 16], vec![0u8; 1]] {
            while file.write_all(&chunk).is_ok() {}
        }
    }
    let large = node
        .pod_request("large")
        .set("/annotations/large", json!("x".repeat(100_000)))
        .set("/annotations/larger", json!("y".repeat(2_000_000)));
    let message = node.run_pod_fails("runc", &large)?;
    ensure!(message.contains("cannot write to the store"), "{message}");
    node.remove_pod(&gone.id)?;
    let pods = node.crictl.ok(&["pods", "-q", "--no-trunc"])?;
    ensure!(pods == kept.id, "{pods}");
    std::fs::remove_file(&filler)?;
    t.eventually(Duration::from_secs(10), || {
        let info = node.crictl.json(&["info"])?;
        let conditions = info["status"]["conditions"].as_array().context("no conditions")?;
        let ready = conditions
            .iter()
            .find(|condition| condition["type"] == "RuntimeReady");
        ensure!(ready.is_some_and(|ready| ready["status"] == true), "{info}");
        Ok(())
    })?;
    let large = node.run_pod("runc", &large)?;
    // What was only queued meanwhile is on record too.
    node.kill_daemon()?;
    node.start_daemon()?;
    let pods = node.crictl.ok(&["pods", "-q", "--no-trunc"])?;
    ensure!(
        pods.lines().count() == 2 && pods.contains(&kept.id) && pods.contains(&large.id),
        "{pods}"
    );
    node.finish()
}

fn runtime_missing(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(
            catamaran_e2e::suite::Skip("containerd is not configured with this handler".to_owned()).into(),
        );
    }
    let message = t.node.run_pod_fails("absent", &t.pod_request())?;
    ensure!(
        message.contains("/no/such/runtime") && message.contains("absent"),
        "{message}"
    );
    Ok(())
}

/// The built guest with another file in place of one of its own.
fn changed_guest(to: &Path, name: &str, content: &[u8]) -> Result<PathBuf> {
    let built = binaries::guest_directory()?;
    let release = std::fs::read_link(built.join("default")).context("the guest has no default kernel")?;
    let (from, copy) = (built.join(&release), to.join(&release));
    std::fs::create_dir_all(&copy)?;
    for entry in std::fs::read_dir(&from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), copy.join(entry.file_name()))?;
    }
    ensure!(copy.join(name).exists(), "{} has no {name}", copy.display());
    std::fs::write(copy.join(name), content)?;
    symlink(&release, to.join("default"))?;
    Ok(to.to_owned())
}

/// RunPodSandbox under `runv` with this guest fails, naming one of the stages, and leaves nothing.
fn boot_fails(t: &Case<'_>, guest: PathBuf, limit: u64, stages: &[&str]) -> Result<String> {
    let handlers = vec![(
        "runv".to_owned(),
        json!({"type": "vm", "boot_timeout_seconds": limit}),
    )];
    let node = Node::start(
        t.node.flavour,
        Options {
            guest: Some(guest),
            handlers,
            ..Options::default()
        },
    )?;
    let begun = Instant::now();
    let message = node.run_pod_fails("runv", &node.pod_request("no-boot"))?;
    let took = begun.elapsed();
    ensure!(
        took < Duration::from_secs(limit + 30),
        "the failure took {took:?}"
    );
    let text = message.to_lowercase();
    ensure!(
        stages.iter().any(|stage| text.contains(stage)),
        "none of {stages:?} is named: {message}"
    );
    let left = node.wait_for_no_leaks(Duration::from_secs(20))?;
    ensure!(left.is_empty(), "left behind: {left:#?}");
    // The other handler is not concerned.
    let pod = node.run_pod("runc", &node.pod_request("still-works"))?;
    node.remove_pod(&pod.id)?;
    node.finish()?;
    Ok(message)
}

fn garbage_kernel(t: &Case<'_>) -> Result<()> {
    let guest = changed_guest(&t.directory()?, "vmlinux", &[0x42; 100_000])?;
    boot_fails(t, guest, 20, &["vmm", "kernel"])?;
    Ok(())
}

fn no_agent(t: &Case<'_>) -> Result<()> {
    // An archive with nothing in it: the kernel finds no first process.
    let mut empty = b"070701".to_vec();
    for field in [0u32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0] {
        empty.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    empty.extend_from_slice(b"TRAILER!!!\0\0\0\0");
    let guest = changed_guest(&t.directory()?, "initramfs", &empty)?;
    let message = boot_fails(t, guest, 40, &["kernel", "agent"])?;
    // The console's last lines are shown.
    ensure!(message.to_lowercase().contains("panic"), "{message}");
    Ok(())
}

fn no_guest(t: &Case<'_>) -> Result<()> {
    let message = boot_fails(t, t.directory()?, 20, &["guest"])?;
    ensure!(
        message.contains("catamaran guest build"),
        "the remedy is named: {message}"
    );
    ensure!(message.contains("FailedPrecondition"), "{message}");
    Ok(())
}

/// Process ids below the node's directory whose command line has a word.
fn processes_with(t: &Case<'_>, word: &str) -> Result<Vec<i32>> {
    let all = catamaran_e2e::leaks::processes(&t.node.layout, &t.node.subnet, &[t.node.daemon_pid()?])?;
    let found = all.iter().filter(|line| line.contains(word));
    Ok(found
        .filter_map(|line| line.split(' ').nth(1)?.parse().ok())
        .collect())
}

fn kill(pids: &[i32]) -> Result<()> {
    for pid in pids {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(*pid),
            nix::sys::signal::Signal::SIGKILL,
        )?;
    }
    Ok(())
}

fn vm_killed(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let vms = processes_with(t, "qemu-system")?;
    ensure!(!vms.is_empty(), "no QEMU process is found");
    kill(&vms)?;
    let ended = t.wait_exited(&id)?;
    ensure!(ended.code() != 0, "{}", ended.status);
    t.eventually(Duration::from_secs(10), || {
        let status = t.pod_status(&pod.id)?;
        ensure!(status["status"]["state"] == "SANDBOX_NOTREADY", "{status}");
        Ok(())
    })?;
    t.node.remove_pod(&pod.id)?;
    works_again(t, "runv", &pod.request)
}

fn shim_killed(t: &Case<'_>) -> Result<()> {
    shim_dies(t, true)
}

fn shim_killed_unseen(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip("containerd's shims have other names".to_owned()).into());
    }
    shim_dies(t, false)
}

/// The same comes of it whether the daemon sees it or finds it at its next start.
fn shim_dies(t: &Case<'_>, seen: bool) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let never = t.node.create(&pod, &t.idle("never"))?;
    let shims = processes_with(t, "containerd-shim-catamaran")?;
    ensure!(!shims.is_empty() || !t.ours(), "no shim process is found");
    if seen {
        kill(&shims)?;
    } else {
        t.node.kill_daemon()?;
        kill(&shims)?;
        t.node.start_daemon()?;
    }
    if t.ours() {
        // The namespace shim's clean-up kills the processes and says so; those of a VM have gone with it.
        let (code, reason) = match t.handler {
            Runc => (137, "Error"),
            Runv => (255, "ContainerStatusUnknown"),
        };
        t.eventually(Duration::from_secs(20), || {
            for id in [&id, &never] {
                // With UNKNOWN the kubelet would report an exit of its own making.
                let status = t.status(id)?;
                ensure!(status["state"] == "CONTAINER_EXITED", "{status}");
                ensure!(status["exitCode"] == code, "{status}");
                ensure!(status["reason"] == reason, "{status}");
            }
            Ok(())
        })?;
        t.node.crictl.ok(&["rm", &never])?;
    }
    t.node.remove_pod(&pod.id)?;
    works_again(t, t.handler.name(), &pod.request)
}
