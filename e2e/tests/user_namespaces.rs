//! Pods with a user namespace: their root is nobody on the node, while images and volumes keep their owners.
//! The handler `runc` has runc 1.5 here; Debian's, which has no id-mapped mounts, is the handler `old`.

use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::binaries;
use catamaran_e2e::case::Case;
use catamaran_e2e::node::{Options, Pod};
use catamaran_e2e::requests::Request;
use catamaran_e2e::suite::{Handler::Runc, Suite};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// First id of the pods on the node.
const HOST: u32 = 1_000_000;
const OPTIONS: &str = "/linux/security_context/namespace_options";

fn main() -> ExitCode {
    Suite::new(options)
        .serial()
        .one(Runc, "root_is_nobody_on_the_node", ids)
        .one(Runc, "the_pods_own_namespaces_belong_to_it", owned)
        .one(Runc, "volumes_keep_their_owners", volumes)
        .one(Runc, "a_shared_pid_namespace", shared_pids)
        .one(Runc, "terminals_statistics_and_updates", terminals)
        .one(Runc, "a_killed_daemon_finds_its_pod_again", adopted)
        .one(Runc, "a_killed_shim_leaves_nothing", shim_killed)
        .one(Runc, "a_create_that_fails_leaves_nothing", create_failed)
        .one(Runc, "what_cannot_be_is_refused", refused)
        .one(Runc, "handlers_say_what_they_can", reported)
        .main()
}

fn options() -> Result<Options> {
    let runc15 = json!({"type": "oci", "binary": binaries::tool("runc-1.5")?});
    let old = json!({"type": "oci", "binary": binaries::system("runc")?});
    Ok(Options {
        handlers: vec![("runc".into(), runc15), ("old".into(), old)],
        ..Options::default()
    })
}

fn mapping() -> Value {
    json!([{"host_id": HOST, "container_id": 0, "length": 65536}])
}

fn in_user_namespace(request: Request) -> Request {
    let user = json!({"mode": 0, "uids": mapping(), "gids": mapping()});
    request.set(&format!("{OPTIONS}/userns_options"), user)
}

fn pod(t: &Case<'_>) -> Result<Pod> {
    t.run_pod(&in_user_namespace(t.pod_request()))
}

/// Real, effective, saved and file system uid on the node of a container's first process.
fn host_uids(t: &Case<'_>, id: &str) -> Result<Vec<u32>> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", host_pid(t, id)?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let words = line.context("no uids")?.split_whitespace();
    Ok(words.map(str::parse).collect::<std::result::Result<_, _>>()?)
}

fn host_pid(t: &Case<'_>, id: &str) -> Result<i64> {
    let info = t.node.crictl.json(&["inspect", id])?;
    info["info"]["pid"]
        .as_i64()
        .with_context(|| format!("no pid in {info}"))
}

fn ids(t: &Case<'_>) -> Result<()> {
    let pod = pod(t)?;
    let id = t.start(&pod, &t.idle("main"))?;
    ensure!(host_uids(t, &id)? == [HOST; 4], "{:?}", host_uids(t, &id)?);
    let map = t.shell(&id, "cat /proc/self/uid_map /proc/self/gid_map")?;
    let words: Vec<&str> = map.split_whitespace().collect();
    ensure!(
        words == ["0", "1000000", "65536", "0", "1000000", "65536"],
        "{map}"
    );
    // The image's files are root's, and root may change them.
    ensure!(t.shell(&id, "id -u; stat -c %u:%g / /bin/busybox | sort -u")? == "0\n0:0");
    t.shell(&id, "touch /new && chown 12:34 /new && chmod u+s /new")?;
    ensure!(t.shell(&id, "stat -c %u:%g /new")? == "12:34");
    // The pod's files and its shared memory.
    t.shell(&id, "cat /etc/resolv.conf /etc/hosts /etc/hostname > /dev/null")?;
    ensure!(t.shell(&id, "stat -c %u:%g /etc/hosts /dev/shm | sort -u")? == "0:0");
    t.shell(
        &id,
        "echo x > /dev/shm/file && echo x > /dev/null && head -c 1 /dev/urandom > /dev/null",
    )?;
    let user = t
        .script(
            "user",
            "trap 'exit 0' TERM; echo mine > /tmp/file || exit 3; while :; do sleep 0.2; done",
        )
        .set("/linux/security_context/run_as_user", json!({"value": 1000}));
    let user = t.start(&pod, &user)?;
    ensure!(
        host_uids(t, &user)? == [HOST + 1000; 4],
        "{:?}",
        host_uids(t, &user)?
    );
    let layer = t
        .node
        .layout
        .root
        .join("snapshots")
        .join(full_id(t, &id)?)
        .join("upper");
    let new = std::fs::metadata(layer.join("new"))?;
    ensure!(
        (new.uid(), new.gid()) == (HOST + 12, HOST + 34),
        "{}:{}",
        new.uid(),
        new.gid()
    );
    Ok(())
}

fn full_id(t: &Case<'_>, id: &str) -> Result<String> {
    let status = t.status(id)?;
    Ok(status["id"].as_str().context("no id")?.to_owned())
}

fn owned(t: &Case<'_>) -> Result<()> {
    let sysctls = json!({"net.ipv4.ping_group_range": "0 65535", "kernel.shm_rmid_forced": "1"});
    let request = in_user_namespace(t.pod_request()).set("/linux/sysctls", sysctls);
    let pod = t.run_pod(&request)?;
    let admin = t.idle("main").set(
        "/linux/security_context/capabilities",
        json!({"add_capabilities": ["NET_ADMIN", "SYS_ADMIN"]}),
    );
    let id = t.start(&pod, &admin)?;
    let address = t.address(&pod)?;
    ensure!(t.shell(&id, "ip addr show eth0")?.contains(&address));
    ensure!(t.shell(&id, "ip addr show lo")?.contains("127.0.0.1/8"));
    ensure!(t.shell(&id, "cat /proc/sys/net/ipv4/ping_group_range")? == "0\t65535");
    ensure!(t.shell(&id, "cat /proc/sys/kernel/shm_rmid_forced")? == "1");
    // Only the owner of a network namespace may, and only the owner of the UTS namespace.
    t.shell(
        &id,
        "ip link set eth0 mtu 1400 && ip link add dummy0 type bridge && ip link del dummy0",
    )?;
    t.shell(&id, "hostname other && [ $(hostname) = other ]")?;
    t.shell(
        &id,
        "nc -l -p 4000 -e echo hello & sleep 0.3; [ \"$(nc -w 3 127.0.0.1 4000)\" = hello ]",
    )?;
    // What the node alone may: a default capability makes device nodes elsewhere.
    let device = t.exec(&id, &["mknod", "/zero", "c", "1", "5"])?;
    ensure!(
        device.code != 0 && device.stderr.contains("not permitted"),
        "{device:?}"
    );
    Ok(())
}

fn volumes(t: &Case<'_>) -> Result<()> {
    let directory = t.directory()?;
    let (mapped, plain) = (directory.join("mapped"), directory.join("plain"));
    for volume in [&mapped, &plain] {
        std::fs::create_dir_all(volume)?;
        std::fs::write(volume.join("roots"), "of root")?;
        std::fs::set_permissions(
            volume.join("roots"),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )?;
    }
    let maps = json!({"uidMappings": mapping(), "gidMappings": mapping()});
    let container = t
        .idle("main")
        .mount(&mapped, "/mapped", maps.clone())
        .mount(
            &mapped,
            "/read-only",
            json!({"uidMappings": mapping(), "gidMappings": mapping(), "readonly": true}),
        )
        .mount(&plain, "/plain", json!({}));
    let pod = pod(t)?;
    let id = t.start(&pod, &container)?;
    ensure!(t.shell(&id, "cat /mapped/roots && stat -c %u:%g /mapped /mapped/roots")? == "of root0:0\n0:0");
    t.shell(
        &id,
        "echo new > /mapped/written && touch /mapped/given && chown 5:6 /mapped/given",
    )?;
    ensure!(
        t.shell(
            &id,
            "! touch /read-only/x 2>/dev/null && stat -c %u /read-only/written"
        )? == "0"
    );
    for (name, owner) in [("written", (0, 0)), ("given", (5, 6))] {
        let meta = std::fs::metadata(mapped.join(name))?;
        ensure!(
            (meta.uid(), meta.gid()) == owner,
            "{name}: {}:{}",
            meta.uid(),
            meta.gid()
        );
    }
    // What the kubelet does not map stays the node's.
    ensure!(t.shell(&id, "stat -c %u:%g /plain/roots")? == "65534:65534");
    let denied = t.exec(&id, &["sh", "-c", "cat /plain/roots || touch /plain/x"])?;
    ensure!(
        denied.code != 0 && !denied.stdout.contains("of root"),
        "{denied:?}"
    );
    Ok(())
}

fn shared_pids(t: &Case<'_>) -> Result<()> {
    let request = in_user_namespace(t.pod_request()).set(&format!("{OPTIONS}/pid"), json!(0));
    let pod = t.run_pod(&request)?;
    let shared = |name: &str| t.idle(name).set(&format!("{OPTIONS}/pid"), json!(0));
    let one = t.start(&pod, &shared("one"))?;
    let two = t.start(&pod, &shared("two"))?;
    ensure!(host_uids(t, &one)? == [HOST; 4]);
    let processes = t.shell(&two, "ps -o args")?;
    let idle = processes
        .lines()
        .filter(|line| line.contains("sleep 1000 & wait"))
        .count();
    ensure!(idle == 2, "{processes}");
    Ok(())
}

fn terminals(t: &Case<'_>) -> Result<()> {
    let pod = pod(t)?;
    let tty = t
        .script("tty", "tty && stat -c %u:%g $(tty) && echo typed > /dev/console")
        .set("/tty", json!(true));
    let ended = t.run(&pod, &tty)?;
    ensure!(
        ended.code() == 0 && ended.logs.contains("typed"),
        "{}",
        ended.logs
    );
    ensure!(
        ended.logs.contains("0:"),
        "the terminal is the user's: {}",
        ended.logs
    );
    let id = t.start(&pod, &t.idle("main"))?;
    let stats = t.node.crictl.json(&["stats", "-a", "-o", "json"])?;
    let full = full_id(t, &id)?;
    let listed = stats["stats"].as_array().into_iter().flatten();
    let found = listed
        .filter(|one| one["attributes"]["id"] == full.as_str())
        .count();
    ensure!(found == 1, "{stats}");
    t.node.crictl.ok(&["update", "--memory", "67108864", &id])?;
    let end = t.run(&pod, &t.script("end", "exit 7"))?;
    ensure!(end.code() == 7, "{}", end.status);
    t.wait_for_trap(&id)?;
    t.node.crictl.ok(&["stop", "-t", "10", &id])?;
    ensure!(t.wait_exited(&id)?.code() == 0);
    Ok(())
}

fn adopted(t: &Case<'_>) -> Result<()> {
    let pod = pod(t)?;
    let id = t.start(&pod, &t.idle("before"))?;
    let pid = host_pid(t, &id)?;
    t.node.kill_daemon()?;
    t.node.start_daemon()?;
    ensure!(host_pid(t, &id)? == pid && host_uids(t, &id)? == [HOST; 4]);
    ensure!(t.shell(&id, "id -u")? == "0");
    let later = t.start(&pod, &t.idle("after"))?;
    ensure!(host_uids(t, &later)? == [HOST; 4]);
    ensure!(t.shell(&later, "stat -c %u /bin/busybox")? == "0");
    t.node.remove_pod(&pod.id)?;
    let left = t.node.wait_for_no_leaks(Duration::from_secs(20))?;
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

fn shim_killed(t: &Case<'_>) -> Result<()> {
    let pod = pod(t)?;
    let id = t.start(&pod, &t.idle("main"))?;
    let container = host_pid(t, &id)?;
    let status = std::fs::read_to_string(format!("/proc/{container}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let shim: i32 = parent.context("no parent")?.trim().parse()?;
    ensure!(shim > 1, "the container's parent is the shim");
    kill(Pid::from_raw(shim), Signal::SIGKILL)?;
    t.eventually(Duration::from_secs(20), || {
        let state = t.pod_status(&pod.id)?["status"]["state"].clone();
        ensure!(state == "SANDBOX_NOTREADY", "{state}");
        Ok(())
    })?;
    t.node.remove_pod(&pod.id)?;
    let left = t.node.wait_for_no_leaks(Duration::from_secs(20))?;
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

fn create_failed(t: &Case<'_>) -> Result<()> {
    let pod = pod(t)?;
    let broken = Request::container("broken", &t.node.busybox, &["/no/such/program"]);
    let id = t.node.create(&pod, &broken);
    if let Ok(id) = id {
        t.node.crictl.fails(&["start", &id])?;
        t.node.crictl.ok(&["rm", &id])?;
    }
    // The pod is none the worse.
    ensure!(t.run_script(&pod, "good", "id -u")? == "0\n");
    t.node.remove_pod(&pod.id)?;
    let left = t.node.wait_for_no_leaks(Duration::from_secs(20))?;
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

fn refused(t: &Case<'_>) -> Result<()> {
    let good = in_user_namespace(t.pod_request());
    let message = t.node.run_pod_fails("old", &good)?;
    ensure!(
        message.contains("FailedPrecondition")
            && message.contains("userns_options")
            && message.contains("id-mapped"),
        "{message}"
    );
    let message = t.node.run_pod_fails("runv", &good)?;
    ensure!(message.contains("userns_options"), "{message}");
    let user = |what: &str, value: Value| good.clone().set(&format!("{OPTIONS}/{what}"), value);
    let range =
        |host: u32, container: u32| json!({"host_id": host, "container_id": container, "length": 1000});
    let both = |list: Value| json!({"mode": 0, "uids": list, "gids": list});
    for (what, request) in [
        (
            "two mappings",
            user(
                "userns_options",
                both(json!([range(HOST, 0), range(HOST + 1000, 1000)])),
            ),
        ),
        ("no mapping", user("userns_options", both(json!([])))),
        ("no root", user("userns_options", both(json!([range(HOST, 1)])))),
        (
            "no length",
            user(
                "userns_options",
                both(json!([{"host_id": HOST, "container_id": 0, "length": 0}])),
            ),
        ),
        (
            "unlike uids and gids",
            user(
                "userns_options",
                json!({"mode": 0, "uids": [range(HOST, 0)], "gids": [range(HOST + 1, 0)]}),
            ),
        ),
        ("mode CONTAINER", user("userns_options/mode", json!(1))),
        ("mode TARGET", user("userns_options/mode", json!(3))),
        ("mode NODE with mappings", user("userns_options/mode", json!(2))),
        ("the node's network", user("network", json!(2))),
        ("the node's processes", user("pid", json!(2))),
        ("the node's IPC", user("ipc", json!(2))),
    ] {
        let message = t.node.run_pod_fails("runc", &request)?;
        ensure!(
            message.contains("InvalidArgument") && message.contains("userns_options"),
            "{what}: {message}"
        );
    }
    // A container is in its pod's user namespace, or is not made.
    let pod = pod(t)?;
    let other = t.idle("other").set(
        &format!("{OPTIONS}/userns_options"),
        json!({"mode": 0, "uids": [range(5000, 0)], "gids": [range(5000, 0)]}),
    );
    let message = t.node.create_fails(&pod, &other)?;
    ensure!(message.contains("userns_options"), "{message}");
    let plain = t.pod()?;
    let message = t.node.create_fails(&plain, &in_user_namespace(t.idle("alone")))?;
    ensure!(message.contains("userns_options"), "{message}");
    Ok(())
}

fn reported(t: &Case<'_>) -> Result<()> {
    let info = t.node.crictl.json(&["info"])?;
    let handlers = info["runtimeHandlers"]
        .as_array()
        .context("no runtime handlers")?;
    for (name, has) in [("runc", true), ("old", false), ("runv", false)] {
        let handler = handlers.iter().find(|handler| handler["name"] == name);
        let features = &handler.with_context(|| format!("no {name} in {handlers:?}"))?["features"];
        ensure!(
            features["user_namespaces"].as_bool().unwrap_or_default() == has,
            "{name}: {features}"
        );
    }
    Ok(())
}
