//! Requests that cannot be honoured: each is refused with the right code and a sentence that names the field,
//! and leaves nothing behind.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::{Handler::Runc, Suite};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("pods_that_cannot_be", pods)
        .both("containers_that_cannot_be", containers)
        .one(Runc, "an_unknown_handler_lists_the_known", handler)
        .one(Runc, "ids_that_are_not_there", unknown_ids)
        .one(Runc, "containers_in_pods_that_do_not_run", stopped_pod)
        .both("streams_that_cannot_be", streaming)
        .main()
}

/// JSON pointer, value, gRPC code, a word of the message.
type Row = (&'static str, Value, &'static str, &'static str);

fn check(message: &str, row: &Row) -> Result<()> {
    let (pointer, value, code, word) = row;
    let place = format!("{pointer} = {value}");
    ensure!(message.contains(&format!("code = {code}")), "{place}: {message}");
    ensure!(
        message.to_lowercase().contains(&word.to_lowercase()),
        "{place} is not named ({word}): {message}"
    );
    Ok(())
}

fn pods(t: &Case<'_>) -> Result<()> {
    // crictl itself wants a name and a namespace; no CRI server wants a uid.
    let rows: [Row; 5] = [
        ("/hostname", json!("a/b"), "InvalidArgument", "hostname"),
        (
            "/log_directory",
            json!("relative/path"),
            "InvalidArgument",
            "log_directory",
        ),
        (
            "/port_mappings",
            json!([{"protocol": 0, "container_port": 70000, "host_port": 8080}]),
            "InvalidArgument",
            "port",
        ),
        (
            "/linux/sysctls",
            json!({"kernel.not_a_sysctl/../x": "1"}),
            "InvalidArgument",
            "sysctl",
        ),
        (
            "/linux/cgroup_parent",
            json!("../../up"),
            "InvalidArgument",
            "cgroup_parent",
        ),
    ];
    for row in rows {
        let request = t.pod_request().set(row.0, row.1.clone());
        let place = || format!("{} = {}", row.0, row.1);
        let message = t
            .node
            .run_pod_fails(t.handler.name(), &request)
            .with_context(place)?;
        check(&message, &row)?;
    }
    Ok(())
}

fn containers(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let security = |key: &str| -> &'static str {
        // The table wants static pointers; there are few of them.
        Box::leak(format!("/linux/security_context/{key}").into_boxed_str())
    };
    let rows: Vec<Row> = vec![
        (
            "/image/image",
            json!("127.0.0.1:1/not-pulled:1"),
            "NotFound",
            "not-pulled",
        ),
        (
            "/working_dir",
            json!("relative"),
            "InvalidArgument",
            "working_dir",
        ),
        (
            "/log_path",
            json!("../../escape.log"),
            "InvalidArgument",
            "log_path",
        ),
        (
            security("capabilities"),
            json!({"add_capabilities": ["NOT_A_CAP"]}),
            "InvalidArgument",
            "NOT_A_CAP",
        ),
        (
            security("run_as_group"),
            json!({"value": 5}),
            "InvalidArgument",
            "run_as_group",
        ),
        (
            security("run_as_user"),
            json!({"value": -1}),
            "InvalidArgument",
            "run_as_user",
        ),
        (
            security("seccomp"),
            json!({"profile_type": 2, "localhost_ref": "/no/such.json"}),
            "",
            "no/such.json",
        ),
        (
            "/linux/resources/cpuset_cpus",
            json!("abc"),
            "InvalidArgument",
            "cpuset",
        ),
        (
            "/linux/resources/memory_limit_in_bytes",
            json!(-5),
            "InvalidArgument",
            "memory_limit",
        ),
        (
            "/mounts",
            json!([{"host_path": "/tmp", "container_path": ""}]),
            "InvalidArgument",
            "container_path",
        ),
        (
            "/mounts",
            json!([{"host_path": "relative", "container_path": "/x"}]),
            "InvalidArgument",
            "host_path",
        ),
        (
            "/devices",
            json!([{"host_path": "/dev/no-such", "container_path": "/dev/x", "permissions": "r"}]),
            "",
            "devices",
        ),
    ];
    for row in rows {
        let request = t.script("bad", "true").set(row.0, row.1.clone());
        let message = t
            .node
            .create_fails(&pod, &request)
            .with_context(|| format!("{} = {}", row.0, row.1))?;
        if row.2.is_empty() {
            ensure!(
                message.contains(row.3),
                "{} is not named ({}): {message}",
                row.0,
                row.3
            );
        } else {
            check(&message, &row)?;
        }
    }
    ensure!(
        t.node
            .crictl
            .ok(&["ps", "-a", "-q", "--pod", &pod.id])?
            .is_empty(),
        "a refused container is listed"
    );
    // A name is not reserved by a refused request, and is by an accepted one.
    t.start(&pod, &t.idle("bad"))?;
    let twice = t
        .node
        .create_fails(&pod, &t.idle("bad").set("/labels/other", json!("x")))?;
    ensure!(twice.contains("bad"), "{twice}");
    Ok(())
}

fn handler(t: &Case<'_>) -> Result<()> {
    let message = t.node.run_pod_fails("no-such-handler", &t.pod_request())?;
    ensure!(message.contains("no-such-handler"), "{message}");
    ensure!(
        !t.ours() || (message.contains("runc") && message.contains("runv")),
        "{message}"
    );
    Ok(())
}

fn unknown_ids(t: &Case<'_>) -> Result<()> {
    let id = "0".repeat(64);
    for verb in [
        &["inspect"][..],
        &["inspectp"],
        &["start"],
        &["exec", "-s"],
        &["logs", "-r"],
    ] {
        let mut words = [verb, &[id.as_str()]].concat();
        if verb[0] == "exec" {
            words.push("true");
        }
        let message = t.node.crictl.fails(&words)?;
        let text = message.to_lowercase();
        ensure!(
            text.contains("notfound") || text.contains("not found") || text.contains("no such"),
            "{words:?}: {message}"
        );
    }
    // The CRI: stopping what is not there is no error.
    t.node.crictl.ok(&["stop", &id])?;
    Ok(())
}

fn stopped_pod(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.node.create(&pod, &t.idle("main"))?;
    t.node.crictl.ok(&["stopp", &pod.id])?;
    let message = t.node.crictl.fails(&["start", &id])?;
    ensure!(!message.is_empty());
    let message = t.node.create_fails(&pod, &t.idle("late"))?;
    let text = message.to_lowercase();
    ensure!(
        text.contains("not ready") || text.contains("not running") || !t.ours(),
        "{message}"
    );
    Ok(())
}

fn streaming(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main"))?;
    let created = t.node.create(&pod, &t.idle("created"))?;
    let unknown = "0".repeat(64);
    for (words, code, parts) in [
        (
            ["exec", &unknown, "true"].as_slice(),
            "NotFound",
            vec![unknown.as_str()],
        ),
        (&["attach", &unknown], "NotFound", vec![&unknown]),
        (&["port-forward", &unknown, "8080"], "NotFound", vec![&unknown]),
        (&["exec", &created, "true"], "FailedPrecondition", vec![&created]),
        (&["attach", &created], "FailedPrecondition", vec![&created]),
        (&["exec", &id, "/no/such/program"], "", vec!["/no/such/program"]),
    ] {
        let message = t.node.crictl.fails(words)?;
        let refused = code.is_empty() || message.contains(&format!("code = {code}"));
        let named = parts.iter().all(|part| message.contains(part));
        ensure!((refused && named) || !t.ours(), "{words:?}: {message}");
    }
    Ok(())
}
