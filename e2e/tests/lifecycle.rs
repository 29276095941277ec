//! Every verb that crictl has for pods, containers and images, under both handlers.

use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::{Handler, Suite};
use serde_json::json;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("run_list_inspect_stop_remove_a_pod", pods)
        .both("create_start_list_inspect_stop_remove_a_container", containers)
        .both("logs_have_both_streams_in_cri_format", logs)
        .both("exec_runs_in_the_container", exec)
        .both("exec_ends_at_its_time_limit", exec_timeout)
        .both("exec_without_a_limit_ends_with_its_client", exec_client)
        .both("stop_signals_waits_and_kills", stop)
        .both("several_containers_in_a_pod", several)
        .both("stats_grow_with_use", stats)
        .both("every_verb_may_be_repeated", repeated)
        .both("removing_a_running_pod_by_force", force)
        .both("logs_are_reopened_after_rotation", rotation)
        .both("the_kernel_is_the_handlers", kernel)
        .both("resources_are_updated", update)
        .one(Handler::Runc, "info_and_version", info)
        .one(Handler::Runc, "images_are_pulled_listed_and_removed", images)
        .main()
}

fn pods(t: &Case<'_>) -> Result<()> {
    let crictl = &t.node.crictl;
    let request = t
        .pod_request()
        .set("/labels/tier", json!("x"))
        .set("/annotations/note", json!("kept"));
    let pod = t.run_pod(&request)?;
    let listed = crictl.json(&["pods", "--id", &pod.id])?;
    let item = &listed["items"][0];
    ensure!(
        item["id"] == pod.id.as_str() && item["state"] == "SANDBOX_READY",
        "{listed}"
    );
    ensure!(
        item["metadata"]["name"] == request.name() && item["metadata"]["namespace"] == "e2e",
        "{item}"
    );
    ensure!(item["annotations"]["note"] == "kept", "{item}");
    // containerd leaves the handler out of ListPodSandbox where it is the default.
    ensure!(item["runtimeHandler"] == t.handler.name(), "{item}");
    for (filter, expected) in [
        (vec!["--label", "tier=x"], true),
        (vec!["--label", "tier=y"], false),
        (vec!["--state", "ready"], true),
        (vec!["--state", "notready"], false),
        (vec!["--name", request.name()], true),
        (vec!["--namespace", "e2e"], true),
    ] {
        let ids = crictl.ok(&[&["pods", "-q", "--no-trunc"], filter.as_slice()].concat())?;
        ensure!(ids.contains(&pod.id) == expected, "pods {filter:?} gives {ids}");
    }
    let status = t.pod_status(&pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_READY", "{status}");
    ensure!(status["status"]["labels"]["tier"] == "x", "{status}");
    ensure!(
        status["status"]["metadata"]["uid"]
            .as_str()
            .is_some_and(|u| u.starts_with("uid-")),
        "{status}"
    );
    crictl.ok(&["stopp", &pod.id])?;
    let status = t.pod_status(&pod.id)?;
    ensure!(status["status"]["state"] == "SANDBOX_NOTREADY", "{status}");
    crictl.ok(&["rmp", &pod.id])?;
    let gone = crictl.fails(&["inspectp", &pod.id])?;
    ensure!(gone.contains("NotFound") || gone.contains("not found"), "{gone}");
    ensure!(
        !crictl.ok(&["pods", "-q", "--no-trunc"])?.contains(&pod.id),
        "a removed pod is still listed"
    );
    Ok(())
}

fn containers(t: &Case<'_>) -> Result<()> {
    let crictl = &t.node.crictl;
    let pod = t.pod()?;
    let request = t
        .idle("main")
        .set("/labels/part", json!("a"))
        .set("/annotations/note", json!("kept"));
    let id = t.node.create(&pod, &request)?;
    ensure!(t.status(&id)?["state"] == "CONTAINER_CREATED");
    crictl.ok(&["start", &id])?;
    let status = t.status(&id)?;
    ensure!(status["state"] == "CONTAINER_RUNNING", "{status}");
    ensure!(
        status["metadata"]["name"] == "main" && status["annotations"]["note"] == "kept",
        "{status}"
    );
    ensure!(
        status["image"]["image"].as_str().is_some_and(|i| !i.is_empty()),
        "{status}"
    );
    let log = status["logPath"].as_str().unwrap_or_default();
    ensure!(
        log.ends_with("/main.log") && std::path::Path::new(log).exists(),
        "log path {log:?}"
    );
    let listed = crictl.json(&["ps", "--id", &id])?;
    let item = &listed["containers"][0];
    ensure!(
        item["id"] == id.as_str() && item["podSandboxId"] == pod.id.as_str(),
        "{listed}"
    );
    ensure!(item["state"] == "CONTAINER_RUNNING", "{item}");
    for (filter, expected) in [
        (vec!["--pod", &pod.id], true),
        (vec!["--label", "part=a"], true),
        (vec!["--label", "part=b"], false),
        (vec!["--state", "Running"], true),
        (vec!["--state", "Exited"], false),
    ] {
        let ids = crictl.ok(&[&["ps", "-a", "-q", "--no-trunc"], filter.as_slice()].concat())?;
        ensure!(ids.contains(&id) == expected, "ps {filter:?} gives {ids}");
    }
    t.wait_for_trap(&id)?;
    crictl.ok(&["stop", "-t", "10", &id])?;
    let status = t.status(&id)?;
    ensure!(status["state"] == "CONTAINER_EXITED", "{status}");
    ensure!(
        status["exitCode"].as_i64().unwrap_or(0) == 0 && status["reason"] == "Completed",
        "{status}"
    );
    for time in ["createdAt", "startedAt", "finishedAt"] {
        let text = status[time].as_str().unwrap_or_default();
        ensure!(text.starts_with("20"), "{time} is {text:?}");
    }
    let again = crictl.fails(&["start", &id])?;
    ensure!(
        again.to_lowercase().contains("exited"),
        "starting an exited container: {again}"
    );
    crictl.ok(&["rm", &id])?;
    let gone = crictl.fails(&["inspect", &id])?;
    ensure!(gone.contains("NotFound") || gone.contains("not found"), "{gone}");
    Ok(())
}

fn logs(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let script = "echo to-stdout; echo to-stderr >&2; printf without-newline; \
                  head -c 40000 /dev/zero | tr '\\0' x; echo; exit 0";
    let ended = t.run(&pod, &t.script("main", script))?;
    let path = ended.status["logPath"].as_str().context("no log path")?;
    let raw = std::fs::read_to_string(path)?;
    let mut long = 0;
    for line in raw.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        ensure!(words.len() == 4, "{line:?} is no CRI log line");
        ensure!(
            words[0].starts_with("20") && words[0].contains('T'),
            "{line:?} has no time"
        );
        ensure!(
            matches!(words[1], "stdout" | "stderr") && matches!(words[2], "P" | "F"),
            "{line:?}"
        );
        ensure!(words[3].len() <= 16 * 1024, "a line of {} bytes", words[3].len());
        long += words[3].bytes().filter(|b| *b == b'x').count();
    }
    ensure!(
        raw.contains(" stdout F to-stdout\n") && raw.contains(" stderr F to-stderr\n"),
        "{raw:.400}"
    );
    ensure!(
        raw.contains(" P "),
        "a long line is split into partial lines: {raw:.400}"
    );
    ensure!(
        long == 40000,
        "{long} of 40000 bytes of a long line are in the log"
    );
    let output = t.node.crictl.run(&["logs", &ended.id])?;
    ensure!(
        output.stdout.starts_with("to-stdout\n") && output.stderr == "to-stderr\n",
        "{:.400}",
        output.stdout
    );
    Ok(())
}

fn exec(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(
        &pod,
        &t.idle("main")
            .set("/envs", json!([{"key": "MINE", "value": "a b"}])),
    )?;
    ensure!(
        t.shell(&id, "echo $MINE; cat /proc/1/cmdline | tr '\\0' ' '")?
            .starts_with("a b\nsh -c")
    );
    let output = t.exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 7"])?;
    // crictl does not print the output of a command that failed, and ends with its own code.
    ensure!(
        output.code != 0 && output.stderr.contains("exited with 7: err"),
        "{output:?}"
    );
    let both = t.exec(&id, &["sh", "-c", "echo out; echo err >&2"])?;
    ensure!(both.stdout == "out\n\nerr\n\n", "{both:?}");
    let missing = t.exec(&id, &["/no/such/program"])?;
    ensure!(missing.code != 0, "{missing:?}");
    let big = t.exec(&id, &["sh", "-c", "head -c 1500000 /dev/zero | tr '\\0' y"])?;
    let bytes = big.stdout.trim_end().len();
    ensure!(bytes == 1_500_000, "{bytes} of 1500000 bytes");
    t.node.crictl.ok(&["stop", "-t", "5", &id])?;
    let stopped = t.exec(&id, &["true"])?;
    ensure!(stopped.code != 0, "exec in a stopped container: {stopped:?}");
    Ok(())
}

/// The daemon keeps its connection to the shim; the client's is what ends.
fn exec_client(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let mut command = t.node.crictl.command(&["exec", "-s", &id, "sleep", "4322"]);
    let mut client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let processes = || t.shell(&id, "ps | grep '[s]leep 4322' || true");
    let begun = t.eventually(Duration::from_secs(20), || {
        ensure!(!processes()?.is_empty(), "the command does not run");
        Ok(())
    });
    client.kill()?;
    client.wait()?;
    begun?;
    t.eventually(Duration::from_secs(10), || {
        let left = processes()?;
        ensure!(left.is_empty(), "the command still runs: {left}");
        Ok(())
    })
}

fn exec_timeout(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let begun = Instant::now();
    let output = t
        .node
        .crictl
        .run(&["exec", "-s", "--timeout", "1", &id, "sleep", "4321"])?;
    ensure!(
        output.code != 0 && begun.elapsed() < Duration::from_secs(20),
        "{output:?}"
    );
    let text = output.stderr.to_lowercase();
    ensure!(
        text.contains("deadlineexceeded") || text.contains("timed out") || text.contains("timeout"),
        "{text}"
    );
    t.eventually(Duration::from_secs(5), || {
        let left = t.shell(&id, "ps | grep '[s]leep 4321' || true")?;
        ensure!(left.is_empty(), "the command still runs: {left}");
        Ok(())
    })
}

fn stop(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let polite = t.script(
        "polite",
        "trap 'echo got-term; exit 5' TERM; while :; do sleep 1000 & wait $!; done",
    );
    let id = t.start(&pod, &polite)?;
    t.wait_for_trap(&id)?;
    t.node.crictl.ok(&["stop", "-t", "20", &id])?;
    let ended = t.wait_exited(&id)?;
    ensure!(ended.code() == 5 && ended.reason() == "Error", "{}", ended.status);
    ensure!(ended.logs.contains("got-term"), "{}", ended.logs);
    let stubborn = t.script("stubborn", "trap '' TERM; while :; do sleep 1; done");
    let id = t.start(&pod, &stubborn)?;
    std::thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    t.node.crictl.ok(&["stop", "-t", "1", &id])?;
    let took = begun.elapsed();
    ensure!(
        took >= Duration::from_millis(900) && took < Duration::from_secs(15),
        "took {took:?}"
    );
    let ended = t.wait_exited(&id)?;
    ensure!(ended.code() == 137, "{}", ended.status);
    Ok(())
}

fn several(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let server = t.script(
        "server",
        "echo from-server > /tmp/index.html; exec httpd -f -p 127.0.0.1:8080 -h /tmp",
    );
    let first = t.start(&pod, &server)?;
    let second = t.start(&pod, &t.idle("client"))?;
    // The network is the pod's; file systems and processes are each container's.
    let page = t.eventually(Duration::from_secs(10), || {
        t.fetch_inside(&second, "127.0.0.1", 8080)
    })?;
    ensure!(page == "from-server", "{page}");
    ensure!(t.shell(&second, "ls /tmp")?.is_empty());
    ensure!(
        t.shell(&second, "ps")?.matches("httpd").count() == 0,
        "a container sees the other's processes"
    );
    ensure!(t.shell(&first, "hostname")? == t.shell(&second, "hostname")?);
    t.node.crictl.ok(&["stop", "-t", "0", &first])?;
    ensure!(t.status(&second)?["state"] == "CONTAINER_RUNNING");
    Ok(())
}

fn stats(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let busy = t.script(
        "busy",
        "x=$(head -c 8000000 /dev/zero | tr '\\0' y); while :; do :; done",
    );
    let id = t.start(&pod, &busy)?;
    let (first, last) = t.eventually(Duration::from_secs(20), || {
        let read = || -> Result<(u64, u64)> {
            let stats = t.node.crictl.json(&["stats", &id])?;
            let item = &stats["stats"][0];
            let number = |v: &serde_json::Value| v["value"].as_str().and_then(|n| n.parse().ok());
            let cpu = number(&item["cpu"]["usageCoreNanoSeconds"]).with_context(|| stats.to_string())?;
            let memory = number(&item["memory"]["workingSetBytes"]).with_context(|| stats.to_string())?;
            Ok((cpu, memory))
        };
        let first = read()?;
        std::thread::sleep(Duration::from_millis(500));
        let last = read()?;
        ensure!(last.0 > first.0, "cpu use does not grow: {first:?} {last:?}");
        ensure!(last.1 > 1_000_000, "working set {}", last.1);
        Ok((first, last))
    })?;
    ensure!(last.0 - first.0 < 20_000_000_000, "{first:?} {last:?}");
    // The rate of late: less than all of a few processors, more than nothing.
    let rate = t.eventually(Duration::from_secs(10), || {
        std::thread::sleep(Duration::from_millis(600));
        let stats = t.node.crictl.json(&["stats", &id])?;
        let rate = stats["stats"][0]["cpu"]["usageNanoCores"]["value"].as_str();
        let rate: u64 = rate
            .and_then(|n| n.parse().ok())
            .with_context(|| stats.to_string())?;
        ensure!(rate > 0, "{stats}");
        Ok(rate)
    })?;
    ensure!(rate < 1_000_000_000_000, "{rate}");
    let pods = t.node.crictl.json(&["statsp", "--id", &pod.id])?;
    ensure!(pods["stats"][0]["attributes"]["id"] == pod.id.as_str(), "{pods}");
    Ok(())
}

fn repeated(t: &Case<'_>) -> Result<()> {
    let crictl = &t.node.crictl;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    crictl.ok(&["stop", "-t", "5", &id])?;
    crictl.ok(&["stop", "-t", "5", &id])?;
    crictl.ok(&["rm", &id])?;
    crictl.ok(&["stopp", &pod.id])?;
    crictl.ok(&["stopp", &pod.id])?;
    crictl.ok(&["rmp", &pod.id])?;
    // The CRI lets the stopping and removing verbs succeed for what is not there; crictl looks ids up first
    // and may say itself that it finds none.
    let again = crictl.run(&["rmp", &pod.id])?;
    ensure!(
        again.code == 0 || again.stderr.to_lowercase().contains("not"),
        "{again:?}"
    );
    // The name is free again.
    let next = t.run_pod(&pod.request)?;
    ensure!(next.id != pod.id);
    // A pod of that name is already there.
    let twice = t.node.run_pod_fails(t.handler.name(), &pod.request);
    match twice {
        Ok(message) => ensure!(message.contains(pod.request.name()), "{message}"),
        // Joining the attempt in flight, a server may also answer with the pod that it made.
        Err(error) => ensure!(error.to_string().contains(&next.id), "{error}"),
    }
    Ok(())
}

fn force(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(
        &pod,
        &t.script("stubborn", "trap '' TERM; while :; do sleep 1; done"),
    )?;
    t.node.crictl.ok(&["rmp", "-f", &pod.id])?;
    ensure!(!t.node.crictl.ok(&["ps", "-a", "-q", "--no-trunc"])?.contains(&id));
    Ok(())
}

fn rotation(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let script = "i=0; until [ -e /stop ]; do echo line-$i; i=$((i+1)); sleep 0.01; done";
    let id = t.start(&pod, &t.script("main", script))?;
    let path = t.status(&id)?["logPath"]
        .as_str()
        .context("no log path")?
        .to_owned();
    let rotated = format!("{path}.1");
    let lines = |file: &str| -> Result<Vec<String>> {
        let text = std::fs::read_to_string(file)?;
        let words = text.lines().filter_map(|line| line.rsplit(' ').next());
        Ok(words.map(str::to_owned).collect())
    };
    let counts_in = |file: &str| {
        t.eventually(Duration::from_secs(20), || {
            let count = lines(file)?.len();
            ensure!(count > 20, "{count} lines are in {file}");
            Ok(())
        })
    };
    counts_in(&path)?;
    std::fs::rename(&path, &rotated)?;
    t.node
        .crictl
        .ok(&["logs", "-r", &id])
        .or_else(|_| t.node.crictl.ok(&["logs", "--reopen", &id]))?;
    counts_in(&path)?;
    t.shell(&id, "touch /stop")?;
    t.wait_exited(&id)?;
    let all = [lines(&rotated)?, lines(&path)?].concat();
    let expected: Vec<String> = (0..all.len()).map(|i| format!("line-{i}")).collect();
    let differs = all.iter().zip(&expected).find(|(told, wanted)| told != wanted);
    ensure!(differs.is_none(), "of {} lines: {differs:?}", all.len());
    Ok(())
}

fn kernel(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let inside = t.run_script(&pod, "main", "uname -r")?;
    let host = nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned();
    match t.handler {
        Handler::Runc => ensure!(inside.trim() == host, "runc: {inside} on {host}"),
        Handler::Runv => {
            ensure!(
                inside.trim() != host && !inside.trim().is_empty(),
                "runv: {inside} on {host}"
            );
            let status = t.pod_status(&pod.id)?.to_string();
            ensure!(
                status.contains(inside.trim()),
                "the pod's status names its kernel: {status}"
            );
        }
    }
    Ok(())
}

fn update(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let request = t
        .idle("main")
        .set("/linux/resources/memory_limit_in_bytes", json!(64 << 20));
    let id = t.start(&pod, &request)?;
    let limit =
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    ensure!(t.shell(&id, limit)? == (64u64 << 20).to_string());
    t.node
        .crictl
        .ok(&["update", "--memory", &(96u64 << 20).to_string(), &id])?;
    ensure!(t.shell(&id, limit)? == (96u64 << 20).to_string());
    Ok(())
}

fn info(t: &Case<'_>) -> Result<()> {
    let version = t.node.crictl.ok(&["version"])?;
    ensure!(version.contains("RuntimeApiVersion:  v1"), "{version}");
    let info = t.node.crictl.json(&["info"])?;
    let conditions = info["status"]["conditions"].as_array().context("no conditions")?;
    for kind in ["RuntimeReady", "NetworkReady"] {
        let found = conditions
            .iter()
            .find(|c| c["type"] == kind)
            .with_context(|| format!("no {kind}"))?;
        ensure!(found["status"] == true, "{found}");
    }
    if t.ours() {
        let text = info.to_string();
        ensure!(
            text.contains("tcg") || text.contains("kvm"),
            "the acceleration verdict is reported: {text}"
        );
        let handlers = info["runtimeHandlers"]
            .as_array()
            .context("no runtime handlers")?;
        for handler in ["runc", "runv"] {
            ensure!(
                handlers.iter().any(|h| h["name"] == handler),
                "{handler} is not in {handlers:?}"
            );
        }
    }
    Ok(())
}

fn images(t: &Case<'_>) -> Result<()> {
    use catamaran_e2e::image::{Format, Layer, Packing, build, host_architecture};
    let crictl = &t.node.crictl;
    let layer = Layer::new().file("only-here", 0o644, (0, 0), b"x")?;
    let image = build(
        vec![(layer, Packing::Gzip)],
        &json!({"User": "7:8"}),
        Format::Oci,
        host_architecture(),
    )?;
    let reference = t.node.registry.push("mine:1", &image)?;
    let pulled = crictl.ok(&["pull", &reference])?;
    ensure!(pulled.contains("up to date"), "{pulled}");
    let listed = crictl.json(&["images"])?;
    let all = listed["images"].as_array().context("no images")?;
    let mine = all
        .iter()
        .find(|i| i["repoTags"][0] == reference.as_str())
        .with_context(|| listed.to_string())?;
    ensure!(mine["id"] == image.id.as_str(), "{mine}");
    let by_digest = t
        .node
        .registry
        .reference(&format!("mine@{}", image.manifest.digest));
    ensure!(mine["repoDigests"][0] == by_digest.as_str(), "{mine}");
    let status = crictl.json(&["inspecti", &reference])?;
    ensure!(status["status"]["uid"]["value"] == "7", "{status}");
    for name in [image.id.as_str(), &by_digest, &image.id["sha256:".len()..][..12]] {
        let found = crictl.json(&["inspecti", name])?;
        ensure!(found["status"]["id"] == image.id.as_str(), "{name}: {found}");
    }
    let usage = crictl.ok(&["imagefsinfo"])?;
    ensure!(usage.contains("usedBytes"), "{usage}");
    crictl.ok(&["rmi", &reference])?;
    ensure!(
        !crictl.ok(&["images"])?.contains("/mine "),
        "a removed image is still listed"
    );
    ensure!(crictl.run(&["inspecti", &reference])?.code != 0);
    // By digest alone, without a tag.
    crictl.ok(&["pull", &by_digest])?;
    crictl.ok(&["rmi", &by_digest])?;
    Ok(())
}
