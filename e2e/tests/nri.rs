//! NRI plugins, real ones on the stub of NRI 0.12: what they are told, in which order, what they may change, and
//! that one which hangs, dies or talks nonsense is nobody else's trouble. The cases follow critest's NRI specs.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::binaries;
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::{Handler::Runc, Suite};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let code = run();
    let _ = std::fs::remove_dir_all(installed());
    code
}

fn run() -> ExitCode {
    Suite::new(options)
        .serial()
        .one(Runc, "a_pre_installed_plugin_is_launched", launched)
        .both("a_pods_and_a_containers_life_in_order", life)
        .one(Runc, "a_container_that_ends_by_itself_is_stopped", ends_by_itself)
        .one(Runc, "a_pod_is_not_seen_while_plugins_are_asked", run_blocks)
        .one(
            Runc,
            "a_refused_pod_leaves_nothing_and_can_be_tried_again",
            run_refused,
        )
        .one(
            Runc,
            "containers_are_over_before_their_pods_stop_is_told",
            stop_blocks,
        )
        .one(
            Runc,
            "a_stop_is_told_once_and_the_pod_is_never_used_again",
            stop_once,
        )
        .one(
            Runc,
            "a_container_is_not_seen_while_plugins_are_asked",
            create_blocks,
        )
        .one(
            Runc,
            "a_refused_container_leaves_nothing_and_can_be_tried_again",
            create_refused,
        )
        .one(Runc, "requests_that_are_invalid_are_told_to_nobody", invalid)
        .one(
            Runc,
            "plugins_are_called_by_index_and_see_each_others_changes",
            ordering,
        )
        .one(Runc, "a_conflict_names_the_field_and_both", conflict)
        .one(Runc, "a_new_plugin_is_told_what_is_there", synchronized)
        .one(
            Runc,
            "what_is_made_during_a_synchronization_is_not_lost",
            during_synchronization,
        )
        .one(Runc, "adjustments_reach_the_container", adjustments)
        .one(Runc, "an_adjustment_that_cannot_be_made_is_an_error", unsupported)
        .one(Runc, "updates_in_answers_and_on_a_plugins_own", updates)
        .one(Runc, "a_validating_plugin_may_veto", veto)
        .one(Runc, "a_plugin_that_hangs_is_left_behind", hangs)
        .one(Runc, "a_plugin_that_hangs_in_synchronize", hangs_in_synchronize)
        .one(Runc, "a_plugin_that_dies_in_a_request", dies)
        .one(Runc, "garbage_on_the_socket", garbage)
        .one(Runc, "a_daemon_that_starts_again_synchronizes_its_pods", restart)
        .main()
}

/// Pre-installed plugins and their configurations; one suite runs at a time in a process.
fn installed() -> PathBuf {
    std::env::temp_dir().join(format!("catamaran-e2e-nri-{}", std::process::id()))
}

fn options() -> Result<Options> {
    let directory = installed();
    let plugins = directory.join("plugins");
    std::fs::create_dir_all(&plugins)?;
    let plugin = plugins.join("05-installed");
    if !plugin.exists() {
        std::os::unix::fs::symlink(binaries::tool("nri-plugin")?, &plugin)?;
    }
    let config = format!("{}\n{{}}", directory.join("log").display());
    std::fs::write(directory.join("installed.conf"), config)?;
    let nri = json!({"plugin_path": plugins, "plugin_config_path": directory});
    Ok(Options {
        overrides: vec![("nri".into(), nri)],
        ..Options::default()
    })
}

fn launched(t: &Case<'_>) -> Result<()> {
    let events = |pod: &str| {
        let text = std::fs::read_to_string(installed().join("log")).unwrap_or_default();
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let about = lines.filter(|event| event["pod"]["id"] == pod || event["event"] == "Configure");
        let names = about.map(|event| event["event"].as_str().unwrap_or_default().to_owned());
        names.collect::<Vec<_>>()
    };
    let pod = t.pod()?;
    in_order(&events(&pod.id), &["Configure", "RunPodSandbox"])
}

/// A plugin that runs, and the log of what it was told.
struct Plugin {
    child: Child,
    log: PathBuf,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Plugin {
    /// Starts one and waits until it is synchronized.
    fn start(t: &Case<'_>, index: &str, name: &str, actions: &Value) -> Result<Self> {
        let plugin = Self::begin(t, index, name, actions, &[])?;
        plugin.wait(t, "Synchronized", |_| true)?;
        // The list is changed when the answer has arrived.
        std::thread::sleep(Duration::from_millis(100));
        Ok(plugin)
    }

    fn begin(t: &Case<'_>, index: &str, name: &str, actions: &Value, more: &[&str]) -> Result<Self> {
        let log = t.directory()?.join(format!("{name}.jsonl"));
        let child = Command::new(binaries::tool("nri-plugin")?)
            .args(["-index", index, "-name", name, "-do", &actions.to_string()])
            .arg("-log")
            .arg(&log)
            .arg("-socket")
            .arg(socket(t))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { child, log })
    }

    fn events(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Names of the events about this pod or container.
    fn about(&self, id: &str) -> Vec<String> {
        let events = self.events();
        let about = events.iter().filter(|event| {
            let of = event.get("container").unwrap_or(&event["pod"]);
            of["id"] == id
        });
        about
            .map(|event| event["event"].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    fn wait(&self, t: &Case<'_>, name: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        t.eventually(SOON, || {
            let events = self.events();
            let found = events
                .iter()
                .find(|event| event["event"] == name && wanted(event));
            found
                .cloned()
                .with_context(|| format!("no {name} among {} events", events.len()))
        })
    }

    fn ended(&mut self) -> Result<()> {
        let child = &mut self.child;
        let end = Instant::now() + SOON;
        while child.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "the plugin's connection was not closed");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

fn socket(t: &Case<'_>) -> PathBuf {
    t.node.layout.state.join("nri.sock")
}

fn nothing() -> Value {
    json!({})
}

/// Does it beside; a case goes on meanwhile.
fn beside<T: Send>(
    work: impl FnOnce() -> Result<T> + Send,
    meanwhile: impl FnOnce() -> Result<()>,
    release: impl FnOnce() -> Result<()>,
) -> Result<T> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        let seen = meanwhile();
        release()?;
        let result = worker
            .join()
            .map_err(|_| anyhow::anyhow!("the request panicked"))?;
        seen?;
        result
    })
}

fn in_order(events: &[String], wanted: &[&str]) -> Result<()> {
    let mut rest = events.iter();
    for name in wanted {
        ensure!(
            rest.any(|event| event == name),
            "{name} is not in its place: {events:?}"
        );
    }
    Ok(())
}

fn life(t: &Case<'_>) -> Result<()> {
    let plugin = Plugin::start(t, "00", "life", &nothing())?;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    t.wait_for_trap(&id)?;
    t.node.crictl.ok(&["stop", &id])?;
    t.node.crictl.ok(&["rm", &id])?;
    t.node.remove_pod(&pod.id)?;
    let whole = [
        "CreateContainer",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
        "RemoveContainer",
    ];
    ensure!(plugin.about(&id) == whole, "{:?}", plugin.about(&id));
    let whole = ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"];
    ensure!(plugin.about(&pod.id) == whole, "{:?}", plugin.about(&pod.id));
    let run = plugin.wait(t, "RunPodSandbox", |_| true)?;
    ensure!(
        run["pod"]["name"] == pod.request.name() && run["pod"]["namespace"] == "e2e",
        "{run}"
    );
    ensure!(
        run["pod"]["ips"][0].is_string() && run["pod"]["runtime_handler"] == t.handler.name(),
        "{run}"
    );
    let create = plugin.wait(t, "CreateContainer", |_| true)?;
    ensure!(
        create["container"]["name"] == "main" && create["container"]["args"][0] == "sh",
        "{create}"
    );
    Ok(())
}

fn ends_by_itself(t: &Case<'_>) -> Result<()> {
    let plugin = Plugin::start(t, "00", "itself", &nothing())?;
    let pod = t.pod()?;
    let ended = t.run(&pod, &t.script("fails", "exit 1"))?;
    plugin.wait(t, "StopContainer", |event| {
        event["container"]["id"] == ended.id.as_str()
    })?;
    ensure!(!plugin.about(&ended.id).contains(&"RemoveContainer".to_owned()));
    t.node.crictl.ok(&["rm", &ended.id])?;
    let events = plugin.about(&ended.id);
    in_order(
        &events,
        &[
            "CreateContainer",
            "StartContainer",
            "PostStartContainer",
            "StopContainer",
            "RemoveContainer",
        ],
    )?;
    ensure!(
        events.iter().filter(|event| *event == "StopContainer").count() == 1,
        "{events:?}"
    );
    Ok(())
}

fn run_blocks(t: &Case<'_>) -> Result<()> {
    let gate = t.directory()?.join("gate");
    let plugin = Plugin::start(
        t,
        "00",
        "block-run",
        &json!({"RunPodSandbox": {"until": gate, "times": 1}}),
    )?;
    let request = t.pod_request();
    let pod = beside(
        || t.run_pod(&request),
        || {
            let run = plugin.wait(t, "RunPodSandbox", |_| true)?;
            let id = run["pod"]["id"].as_str().unwrap_or_default();
            ensure!(
                !t.node.crictl.ok(&["pods", "-q", "--no-trunc"])?.contains(id),
                "it is listed"
            );
            let early = catamaran_e2e::node::Pod {
                id: id.to_owned(),
                request: request.clone(),
            };
            t.node.create_fails(&early, &t.idle("early"))?;
            Ok(())
        },
        || Ok(std::fs::write(&gate, "")?),
    )?;
    ensure!(t.pod_status(&pod.id)?["status"]["state"] == "SANDBOX_READY");
    t.node.create(&pod, &t.idle("late")).map(drop)
}

fn run_refused(t: &Case<'_>) -> Result<()> {
    let plugin = Plugin::start(
        t,
        "00",
        "refuse-run",
        &json!({"RunPodSandbox": {"fail": "not today", "times": 1}}),
    )?;
    let request = t.pod_request();
    let message = t.node.run_pod_fails(t.handler.name(), &request)?;
    ensure!(
        message.contains("00-refuse-run") && message.contains("not today"),
        "{message}"
    );
    let run = plugin.wait(t, "RunPodSandbox", |_| true)?;
    let id = run["pod"]["id"].as_str().unwrap_or_default().to_owned();
    ensure!(
        !t.node.crictl.ok(&["pods", "-q", "--no-trunc"])?.contains(&id),
        "it was left"
    );
    in_order(
        &plugin.about(&id),
        &["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"],
    )?;
    t.run_pod(&request).map(drop)
}

fn stop_blocks(t: &Case<'_>) -> Result<()> {
    let gate = t.directory()?.join("gate");
    let plugin = Plugin::start(
        t,
        "00",
        "block-stop",
        &json!({"StopPodSandbox": {"until": gate, "times": 1}}),
    )?;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    t.wait_for_trap(&id)?;
    beside(
        || t.node.crictl.ok(&["stopp", &pod.id]).map(drop),
        || {
            plugin.wait(t, "StopPodSandbox", |_| true)?;
            ensure!(t.status(&id)?["state"] == "CONTAINER_EXITED");
            ensure!(t.pod_status(&pod.id)?["status"]["id"] == pod.id.as_str());
            let netns = t.node.layout.state.join("netns").join(&pod.id);
            ensure!(netns.exists(), "the network is gone already");
            Ok(())
        },
        || Ok(std::fs::write(&gate, "")?),
    )?;
    in_order(&plugin.about(&id), &["StartContainer", "StopContainer"])
}

fn stop_once(t: &Case<'_>) -> Result<()> {
    let plugin = Plugin::start(t, "00", "once", &nothing())?;
    let pod = t.pod()?;
    t.node.crictl.ok(&["stopp", &pod.id])?;
    t.node.crictl.ok(&["stopp", &pod.id])?;
    t.node.create_fails(&pod, &t.idle("late"))?;
    let whole = ["RunPodSandbox", "StopPodSandbox"];
    ensure!(plugin.about(&pod.id) == whole, "{:?}", plugin.about(&pod.id));
    ensure!(
        plugin
            .events()
            .iter()
            .all(|event| event["event"] != "CreateContainer")
    );
    Ok(())
}

fn create_blocks(t: &Case<'_>) -> Result<()> {
    let gate = t.directory()?.join("gate");
    let plugin = Plugin::start(
        t,
        "00",
        "block-create",
        &json!({"CreateContainer": {"until": gate, "times": 1}}),
    )?;
    let pod = t.pod()?;
    let id = beside(
        || t.node.create(&pod, &t.idle("main")),
        || {
            let create = plugin.wait(t, "CreateContainer", |_| true)?;
            let id = create["container"]["id"].as_str().unwrap_or_default().to_owned();
            let listed = t.node.crictl.ok(&["ps", "-a", "-q", "--no-trunc"])?;
            ensure!(!id.is_empty() && !listed.contains(&id), "it is listed");
            t.node.crictl.fails(&["inspect", &id]).map(drop)
        },
        || Ok(std::fs::write(&gate, "")?),
    )?;
    ensure!(t.status(&id)?["state"] == "CONTAINER_CREATED");
    Ok(())
}

fn create_refused(t: &Case<'_>) -> Result<()> {
    let plugin = Plugin::start(
        t,
        "00",
        "refuse-create",
        &json!({"CreateContainer": {"fail": "no room", "times": 1}}),
    )?;
    let pod = t.pod()?;
    let message = t.node.create_fails(&pod, &t.idle("main"))?;
    ensure!(
        message.contains("00-refuse-create") && message.contains("no room"),
        "{message}"
    );
    ensure!(
        t.node
            .crictl
            .ok(&["ps", "-a", "-q", "--pod", &pod.id])?
            .is_empty()
    );
    ensure!(
        plugin
            .events()
            .iter()
            .all(|event| event["event"] != "StartContainer")
    );
    t.start(&pod, &t.idle("main")).map(drop)
}

fn invalid(t: &Case<'_>) -> Result<()> {
    let plugin = Plugin::start(t, "00", "invalid", &nothing())?;
    let pod = t.pod()?;
    t.node.run_pod_fails("no-such-handler", &t.pod_request())?;
    t.node
        .create_fails(&pod, &t.idle("x").set("/image/image", json!("")))?;
    t.node.crictl.fails(&["start", "0123456789abcdef"])?;
    // Answered with success: nothing is there any more.
    t.node.crictl.run(&["stopp", "0123456789abcdef"])?;
    let told = plugin.events().iter().filter(|e| e.get("pod").is_some()).count();
    ensure!(told == 1, "{told} events for one valid request");
    Ok(())
}

fn env(name: &str, value: &str) -> Value {
    json!({"env": [{"key": name, "value": value}]})
}

fn ordering(t: &Case<'_>) -> Result<()> {
    let late = Plugin::start(
        t,
        "90",
        "late",
        &json!({"CreateContainer": {"adjust": env("LATE", "2")}}),
    )?;
    let early = Plugin::start(
        t,
        "10",
        "early",
        &json!({"CreateContainer": {"adjust": env("EARLY", "1")}}),
    )?;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    ensure!(t.shell(&id, "echo $EARLY$LATE")? == "12");
    let of = |plugin: &Plugin| plugin.wait(t, "CreateContainer", |_| true);
    let (first, second) = (of(&early)?, of(&late)?);
    ensure!(first["at"].as_i64() < second["at"].as_i64());
    let has = |event: &Value| {
        event["container"]["env"]
            .as_array()
            .is_some_and(|env| env.contains(&json!("EARLY=1")))
    };
    ensure!(
        !has(&first) && has(&second),
        "the second does not see what the first did"
    );
    Ok(())
}

fn conflict(t: &Case<'_>) -> Result<()> {
    let one = Plugin::start(
        t,
        "10",
        "one",
        &json!({"CreateContainer": {"adjust": env("SAME", "1")}}),
    )?;
    let _two = Plugin::start(
        t,
        "20",
        "two",
        &json!({"CreateContainer": {"adjust": env("SAME", "2")}}),
    )?;
    let pod = t.pod()?;
    let message = t.node.create_fails(&pod, &t.idle("main"))?;
    for word in ["10-one", "20-two", "SAME"] {
        ensure!(message.contains(word), "{message}");
    }
    let create = one.wait(t, "CreateContainer", |_| true)?;
    let id = create["container"]["id"].as_str().unwrap_or_default();
    in_order(
        &one.about(id),
        &["CreateContainer", "StopContainer", "RemoveContainer"],
    )
}

fn synchronized(t: &Case<'_>) -> Result<()> {
    let _first = Plugin::start(t, "00", "first", &nothing())?;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let second = Plugin::start(t, "10", "second", &nothing())?;
    let state = second.wait(t, "Synchronize", |_| true)?;
    let has = |key: &str, id: &str| {
        state[key]
            .as_array()
            .is_some_and(|list| list.contains(&json!(id)))
    };
    ensure!(has("pods", &pod.id) && has("containers", &id), "{state}");
    ensure!(state["states"][&id] == "CONTAINER_RUNNING", "{state}");
    let next = t.start(&pod, &t.idle("next"))?;
    ensure!(second.about(&next).contains(&"CreateContainer".to_owned()));
    ensure!(!second.about(&id).contains(&"CreateContainer".to_owned()));
    Ok(())
}

fn during_synchronization(t: &Case<'_>) -> Result<()> {
    let gate = t.directory()?.join("gate");
    let pod = t.pod()?;
    let before = t.start(&pod, &t.idle("before"))?;
    let plugin = Plugin::begin(
        t,
        "10",
        "slow",
        &json!({"Synchronize": {"until": gate, "times": 1}}),
        &[],
    )?;
    plugin.wait(t, "Synchronize", |_| true)?;
    let (during, other) = beside(
        || {
            let during = t.node.create(&pod, &t.idle("during"))?;
            Ok((during, t.pod()?))
        },
        || {
            std::thread::sleep(Duration::from_millis(700));
            Ok(())
        },
        || Ok(std::fs::write(&gate, "")?),
    )?;
    let state = plugin.wait(t, "Synchronize", |_| true)?;
    let synced = |key: &str, id: &str| {
        state[key]
            .as_array()
            .is_some_and(|list| list.contains(&json!(id)))
    };
    ensure!(synced("containers", &before));
    for (key, id, event) in [
        ("containers", &during, "CreateContainer"),
        ("pods", &other.id, "RunPodSandbox"),
    ] {
        let told = plugin.about(id).iter().filter(|name| *name == event).count();
        ensure!(
            told + usize::from(synced(key, id)) == 1,
            "{id}: told {told} times: {state}"
        );
    }
    Ok(())
}

fn adjustments(t: &Case<'_>) -> Result<()> {
    let directory = t.directory()?;
    std::fs::write(directory.join("file"), "from the plugin")?;
    let marks = directory.join("hook-ran");
    let adjust = json!({
        "env": [{"key": "ADDED", "value": "yes"}, {"key": "-OLD"}],
        "mounts": [{"destination": "/plugin", "type": "bind", "source": directory, "options": ["rbind", "ro"]}],
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 77, "soft": 66}],
        "annotations": {"plugin.example/key": "value"},
        "hooks": {"create_runtime": [{"path": "/usr/bin/touch", "args": ["touch", marks]}]},
        "linux": {
            "resources": {"memory": {"limit": {"value": 50 << 20}}, "pids": {"limit": 50}},
            "oom_score_adj": {"value": 500},
            "devices": [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "file_mode": {"value": 0o666}}],
        },
    });
    let _plugin = Plugin::start(t, "00", "adjust", &json!({"CreateContainer": {"adjust": adjust}}))?;
    let pod = t.pod()?;
    let request = t.idle("main").set(
        "/envs",
        json!([{"key": "OLD", "value": "1"}, {"key": "KEPT", "value": "2"}]),
    );
    let id = t.start(&pod, &request)?;
    ensure!(t.shell(&id, "echo $ADDED,$OLD,$KEPT")? == "yes,,2");
    ensure!(t.shell(&id, "cat /plugin/file")? == "from the plugin");
    ensure!(t.shell(&id, "grep 'open files' /proc/1/limits | awk '{print $4, $5}'")? == "66 77");
    ensure!(t.shell(&id, "cat /proc/1/oom_score_adj")? == "500");
    ensure!(t.shell(&id, "test -c /dev/mine && echo x > /dev/mine && echo ok")? == "ok");
    ensure!(marks.exists(), "the hook has not run");
    let status = t.status(&id)?;
    let limit = &status["resources"]["linux"]["memoryLimitInBytes"];
    ensure!(limit.as_str() == Some("52428800"), "{limit}");
    let spec = t
        .node
        .layout
        .state
        .join("pods")
        .join(&pod.id)
        .join("containers")
        .join(&id)
        .join("config.json");
    let spec: Value = serde_json::from_slice(&std::fs::read(spec)?)?;
    ensure!(spec["annotations"]["plugin.example/key"] == "value");
    ensure!(spec["linux"]["resources"]["pids"]["limit"] == 50);
    Ok(())
}

fn unsupported(t: &Case<'_>) -> Result<()> {
    let adjust = json!({"linux": {"scheduler": {"policy": 1}}});
    let _plugin = Plugin::start(
        t,
        "00",
        "scheduler",
        &json!({"CreateContainer": {"adjust": adjust}}),
    )?;
    let pod = t.pod()?;
    let message = t.node.create_fails(&pod, &t.idle("main"))?;
    ensure!(message.contains("linux.scheduler"), "{message}");
    ensure!(
        t.node
            .crictl
            .ok(&["ps", "-a", "-q", "--pod", &pod.id])?
            .is_empty()
    );
    Ok(())
}

fn updates(t: &Case<'_>) -> Result<()> {
    let memory = |t: &Case<'_>, id: &str| -> Result<String> {
        let status = t.status(id)?;
        let limit = &status["resources"]["linux"]["memoryLimitInBytes"];
        Ok(limit.as_str().unwrap_or_default().to_owned())
    };
    let actions = json!({
        "CreateContainer": {"name": "second", "limit": {"first": 64 << 20}},
        "PostStartContainer": {"name": "second", "limit": {"first": 48 << 20}, "unsolicited": true},
        "UpdateContainer": {"limit": {"second": 40 << 20}},
    });
    let plugin = Plugin::start(t, "00", "update", &actions)?;
    let pod = t.pod()?;
    let first = t.start(&pod, &t.idle("first"))?;
    let second = t.node.create(&pod, &t.idle("second"))?;
    ensure!(memory(t, &first)? == (64 << 20).to_string());
    t.node.crictl.ok(&["start", &second])?;
    let done = plugin.wait(t, "Unsolicited", |_| true)?;
    ensure!(done["text"] == "failed 0, error <nil>", "{done}");
    ensure!(memory(t, &first)? == (48 << 20).to_string());
    // The plugin wants another limit than the caller.
    t.node
        .crictl
        .ok(&["update", "--memory", &(96 << 20).to_string(), &second])?;
    ensure!(memory(t, &second)? == (40 << 20).to_string());
    let asked = plugin.wait(t, "UpdateContainer", |_| true)?;
    ensure!(
        asked["resources"]["memory"]["limit"]["value"] == 96 << 20,
        "{asked}"
    );
    in_order(
        &plugin.about(&second),
        &["UpdateContainer", "PostUpdateContainer"],
    )
}

fn veto(t: &Case<'_>) -> Result<()> {
    let _adjuster = Plugin::start(
        t,
        "00",
        "adjuster",
        &json!({"CreateContainer": {"adjust": env("SECRET", "1")}}),
    )?;
    let actions = json!({"ValidateContainerAdjustment": {"fail": "no secrets here", "times": 1}});
    let judge = Plugin::begin(t, "50", "judge", &actions, &["-validate"])?;
    judge.wait(t, "Synchronized", |_| true)?;
    std::thread::sleep(Duration::from_millis(100));
    let pod = t.pod()?;
    let message = t.node.create_fails(&pod, &t.idle("main"))?;
    ensure!(
        message.contains("50-judge") && message.contains("no secrets here"),
        "{message}"
    );
    let asked = judge.wait(t, "ValidateContainerAdjustment", |_| true)?;
    ensure!(asked["text"] == "SECRET=00-adjuster", "{asked}");
    t.start(&pod, &t.idle("main")).map(drop)
}

fn hangs(t: &Case<'_>) -> Result<()> {
    let mut plugin = Plugin::start(t, "00", "hang", &json!({"CreateContainer": {"sleep": 60_000}}))?;
    let witness = Plugin::start(t, "10", "witness", &nothing())?;
    let pod = t.pod()?;
    let begun = Instant::now();
    let id = t.start(&pod, &t.idle("main"))?;
    ensure!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    plugin.ended()?;
    in_order(&witness.about(&id), &["CreateContainer", "PostStartContainer"])?;
    let begun = Instant::now();
    t.start(&pod, &t.idle("next"))?;
    ensure!(
        begun.elapsed() < Duration::from_millis(1900),
        "it is still waited for: {:?}",
        begun.elapsed()
    );
    Ok(())
}

fn hangs_in_synchronize(t: &Case<'_>) -> Result<()> {
    let mut plugin = Plugin::begin(
        t,
        "00",
        "hang-sync",
        &json!({"Synchronize": {"sleep": 60_000}}),
        &[],
    )?;
    plugin.wait(t, "Synchronize", |_| true)?;
    let begun = Instant::now();
    let pod = t.pod()?;
    ensure!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    plugin.ended()?;
    ensure!(plugin.about(&pod.id).is_empty(), "it was told all the same");
    Ok(())
}

fn dies(t: &Case<'_>) -> Result<()> {
    let mut plugin = Plugin::start(t, "00", "die", &json!({"CreateContainer": {"die": true}}))?;
    let witness = Plugin::start(t, "10", "survivor", &nothing())?;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    plugin.ended()?;
    in_order(&witness.about(&id), &["CreateContainer", "PostStartContainer"])
}

fn garbage(t: &Case<'_>) -> Result<()> {
    let witness = Plugin::start(t, "10", "beside-garbage", &nothing())?;
    let mut frame = vec![0, 0, 0, 2, 0, 0, 0, 10];
    frame.extend([0xff; 10]);
    for bytes in [vec![0xff; 64], frame, b"GET / HTTP/1.0\r\n\r\n".to_vec()] {
        let mut stream = UnixStream::connect(socket(t))?;
        stream.write_all(&bytes)?;
        stream.set_read_timeout(Some(SOON))?;
        // Closed by the daemon, at the latest when it has not registered in time.
        let closed = std::io::Read::read(&mut stream, &mut [0; 16]);
        ensure!(!matches!(&closed, Ok(n) if *n > 0), "it answers: {closed:?}");
        ensure!(
            !matches!(&closed, Err(e) if e.kind() == std::io::ErrorKind::WouldBlock),
            "it is left open"
        );
    }
    // Those that never say a word hold up nobody.
    let silent: Vec<UnixStream> = (0..100)
        .filter_map(|_| UnixStream::connect(socket(t)).ok())
        .collect();
    let begun = Instant::now();
    let pod = t.pod()?;
    ensure!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    drop(silent);
    ensure!(witness.about(&pod.id) == ["RunPodSandbox"]);
    Ok(())
}

fn restart(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let plugin = Plugin::begin(t, "00", "again", &nothing(), &["-again"])?;
    plugin.wait(t, "Synchronized", |_| true)?;
    t.node.kill_daemon()?;
    t.node.start_daemon()?;
    t.eventually(SOON, || {
        let states = plugin
            .events()
            .into_iter()
            .filter(|event| event["event"] == "Synchronize");
        let states: Vec<Value> = states.collect();
        let last = states
            .last()
            .filter(|_| states.len() == 2)
            .context("not synchronized again")?;
        ensure!(last["states"][&id] == "CONTAINER_RUNNING", "{last}");
        Ok(())
    })?;
    t.node.crictl.ok(&["rm", "-f", &id])?;
    in_order(&plugin.about(&id), &["StopContainer", "RemoveContainer"])
}
