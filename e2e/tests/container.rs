//! What a container sees and may do: image rules, user, capabilities, file systems, limits, ends. The same
//! bodies under both handlers: a VM's container is to be the same container.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::image::{Format, Layer, Packing, build, host_architecture};
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::{Handler, Suite};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("exit_codes_and_reasons", exits)
        .both("out_of_memory_is_said", out_of_memory)
        .both("image_rules_for_command_args_env_and_directory", image_rules)
        .both("the_images_stop_signal_is_used", stop_signal)
        .both("users_and_groups", users)
        .both("capabilities", capabilities)
        .both("a_read_only_root", read_only_root)
        .both("a_writable_root_is_the_containers_own", writable_root)
        .both("seccomp_profiles", seccomp)
        .both("no_new_privileges", no_new_privileges)
        .both("privileged", privileged)
        .both("masked_and_read_only_paths", masked)
        .both("limits_are_visible_in_the_cgroup", limits)
        .both("mounts_read_write_read_only_and_files", mounts)
        .both("updates_of_a_config_map_are_seen", config_map)
        .both("mounts_from_the_host_propagate", propagation)
        .one(Handler::Runc, "mounts_propagate_to_the_host", propagation_to_host)
        .both("devices", devices)
        .both("a_program_that_is_not_there", missing_program)
        .main()
}

fn exits(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    for (script, code, reason) in [
        ("true", 0, "Completed"),
        ("exit 3", 3, "Error"),
        ("kill -9 $$; sleep 5", 137, "Error"),
    ] {
        // The first process of a PID namespace ignores signals from inside: its child gets it.
        let script = format!("sh -c '{script}'; exit $?");
        let ended = t.run(&pod, &t.script(&format!("exit-{code}"), &script))?;
        ensure!(
            (ended.code(), ended.reason()) == (code, reason),
            "{script}: {}",
            ended.status
        );
    }
    Ok(())
}

fn out_of_memory(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let hog = t
        .script("hog", "exec tail /dev/zero")
        .set("/linux/resources/memory_limit_in_bytes", json!(24 << 20))
        .set("/linux/resources/memory_swap_limit_in_bytes", json!(24 << 20));
    let ended = t.run(&pod, &hog)?;
    ensure!(
        (ended.code(), ended.reason()) == (137, "OOMKilled"),
        "{}",
        ended.status
    );
    // The pod lives on.
    t.run_script(&pod, "after", "true")?;
    Ok(())
}

fn image_rules(t: &Case<'_>) -> Result<()> {
    let config = json!({
        "Entrypoint": ["/bin/echo", "entry"], "Cmd": ["default", "args"], "WorkingDir": "/work/dir",
        "Env": ["PATH=/bin", "FROM_IMAGE=1", "BOTH=image"],
    });
    let layers = vec![(Layer::new().busybox()?, Packing::Zstd)];
    let image = build(layers, &config, Format::Oci, host_architecture())?;
    let reference = t
        .node
        .registry
        .push(&format!("rules-{}:1", t.handler.name()), &image)?;
    t.node.crictl.ok(&["pull", &reference])?;
    let pod = t.pod()?;
    let request = |name: &str| {
        let base = t.script(name, "").set("/image/image", json!(reference));
        base.set(
            "/envs",
            json!([{"key": "BOTH", "value": "container"}, {"key": "MINE", "value": "x=y z"}]),
        )
    };
    let none = json!([]);
    for (name, command, args, expected) in [
        ("image", none.clone(), none.clone(), "entry default args\n"),
        ("args", none.clone(), json!(["mine"]), "entry mine\n"),
        ("command", json!(["/bin/echo", "own"]), none.clone(), "own\n"),
        ("both", json!(["/bin/echo"]), json!(["a", "b"]), "a b\n"),
    ] {
        let ended = t.run(&pod, &request(name).set("/command", command).set("/args", args))?;
        ensure!(ended.logs == expected, "{name}: {:?}", ended.logs);
    }
    let shell = request("env")
        .set("/command", json!(["sh", "-c", "env; pwd"]))
        .set("/args", none.clone());
    let logs = t.run(&pod, &shell)?.logs;
    for line in ["FROM_IMAGE=1", "BOTH=container", "MINE=x=y z", "/work/dir"] {
        ensure!(logs.lines().any(|l| l == line), "{line} is not in {logs}");
    }
    let elsewhere = request("directory")
        .set("/command", json!(["pwd"]))
        .set("/args", none);
    let ended = t.run(&pod, &elsewhere.set("/working_dir", json!("/var/made/here")))?;
    ensure!(ended.logs == "/var/made/here\n", "{}", ended.logs);
    Ok(())
}

fn stop_signal(t: &Case<'_>) -> Result<()> {
    let config = json!({"Env": ["PATH=/bin"], "StopSignal": "SIGUSR1"});
    let layers = vec![(Layer::new().busybox()?, Packing::Gzip)];
    let image = build(layers, &config, Format::Oci, host_architecture())?;
    let reference = t
        .node
        .registry
        .push(&format!("signal-{}:1", t.handler.name()), &image)?;
    t.node.crictl.ok(&["pull", &reference])?;
    let pod = t.pod()?;
    let script =
        "trap 'echo usr1; exit 9' USR1; trap 'echo term; exit 8' TERM; echo set; while :; do sleep 0.1; done";
    let id = t.start(
        &pod,
        &t.script("main", script).set("/image/image", json!(reference)),
    )?;
    t.eventually(Duration::from_secs(10), || {
        ensure!(t.logs(&id)?.contains("set"));
        Ok(())
    })?;
    t.node.crictl.ok(&["stop", "-t", "10", &id])?;
    let ended = t.wait_exited(&id)?;
    ensure!(
        ended.code() == 9 && ended.logs.contains("usr1"),
        "{} {}",
        ended.status,
        ended.logs
    );
    Ok(())
}

fn users(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id_of = |name: &str, settings: &[(&str, serde_json::Value)]| -> Result<String> {
        let mut request = t.script(name, "id -u; id -g; id -G");
        for (key, value) in settings {
            request = request.set(&format!("/linux/security_context/{key}"), value.clone());
        }
        let ended = t.run(&pod, &request)?;
        ensure!(ended.code() == 0, "{name}: {} {}", ended.status, ended.logs);
        Ok(ended.logs.lines().collect::<Vec<_>>().join(" | "))
    };
    ensure!(id_of("image", &[])? == "0 | 0 | 0");
    ensure!(id_of("uid", &[("run_as_user", json!({"value": 77}))])?.starts_with("77 | 0 |"));
    let both = [
        ("run_as_user", json!({"value": 77})),
        ("run_as_group", json!({"value": 88})),
    ];
    ensure!(id_of("gid", &both)?.starts_with("77 | 88 |"));
    // The image's accounts: primary group and supplementary groups of `app`.
    let named = id_of("name", &[("run_as_username", json!("app"))])?;
    ensure!(
        named.starts_with("1234 | 2345 |") && named.contains("3456"),
        "{named}"
    );
    let groups = id_of("groups", &[("supplemental_groups", json!([4000, 4001]))])?;
    ensure!(groups.contains("4000") && groups.contains("4001"), "{groups}");
    let unknown = t
        .script("nobody", "id")
        .set("/linux/security_context/run_as_username", json!("no-such-user"));
    let error = t.node.create_fails(&pod, &unknown).or_else(|_| {
        // Refused at the start at the latest.
        let id = t.node.crictl.ok(&["ps", "-a", "-q", "--name", "nobody"])?;
        t.node.crictl.fails(&["start", &id])
    })?;
    // The peer only says that it found none.
    ensure!(error.contains("no-such-user") || !t.ours(), "{error}");
    Ok(())
}

/// CapEff of the container's shell, as the kernel prints it.
fn effective(
    t: &Case<'_>,
    pod: &catamaran_e2e::node::Pod,
    name: &str,
    context: serde_json::Value,
) -> Result<u64> {
    let mut request = t.script(name, "grep CapEff /proc/self/status");
    for (key, value) in context.as_object().into_iter().flatten() {
        request = request.set(&format!("/linux/security_context/{key}"), value.clone());
    }
    let ended = t.run(pod, &request)?;
    ensure!(ended.code() == 0, "{name}: {} {}", ended.status, ended.logs);
    Ok(u64::from_str_radix(
        ended.logs.trim().rsplit('\t').next().unwrap_or_default(),
        16,
    )?)
}

const NET_ADMIN: u64 = 1 << 12;
const CHOWN: u64 = 1;
const SYS_ADMIN: u64 = 1 << 21;

fn capabilities(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let usual = effective(t, &pod, "usual", json!({}))?;
    ensure!(
        usual & CHOWN != 0 && usual & (NET_ADMIN | SYS_ADMIN) == 0,
        "{usual:x}"
    );
    let none = effective(
        t,
        &pod,
        "none",
        json!({"capabilities": {"drop_capabilities": ["ALL"]}}),
    )?;
    ensure!(none == 0, "{none:x}");
    let change = json!({"capabilities": {"add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["CHOWN"]}});
    let changed = effective(t, &pod, "changed", change)?;
    ensure!(changed == (usual | NET_ADMIN) & !CHOWN, "{usual:x} {changed:x}");
    Ok(())
}

fn read_only_root(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let script = "touch /etc/x 2>&1; echo $?; echo ok > /dev/shm/y && cat /dev/shm/y";
    let request = t
        .script("main", script)
        .set("/linux/security_context/readonly_rootfs", json!(true));
    let logs = t.run(&pod, &request)?.logs;
    ensure!(
        logs.contains("Read-only file system") && logs.contains("\n1\n") && logs.ends_with("ok\n"),
        "{logs}"
    );
    Ok(())
}

fn writable_root(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    t.run_script(
        &pod,
        "first",
        "echo mine > /etc/passwd && rm /bin/vi && mkdir /new && [ ! -e /bin/vi ]",
    )?;
    let second = t.run_script(
        &pod,
        "second",
        "cat /etc/passwd; ls -d /bin/vi; ls -d /new 2>&1 || true",
    )?;
    ensure!(
        second.contains("root:x:0") && second.contains("/bin/vi\n"),
        "{second}"
    );
    ensure!(second.contains("No such file"), "{second}");
    Ok(())
}

fn seccomp(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    for (name, profile, mode) in [("default", 0, "2"), ("unconfined", 1, "0")] {
        let request = t
            .script(
                name,
                "grep '^Seccomp:' /proc/self/status; unshare -r true 2>&1; true",
            )
            .set(
                "/linux/security_context/seccomp",
                json!({"profile_type": profile}),
            );
        let logs = t.run(&pod, &request)?.logs;
        ensure!(logs.starts_with(&format!("Seccomp:\t{mode}\n")), "{name}: {logs}");
    }
    let directory = t.directory()?;
    let profile = directory.join("profile.json");
    let text = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
    });
    std::fs::write(&profile, serde_json::to_vec(&text)?)?;
    let request = t.script("local", "mkdir /tmp/d 2>&1; true").set(
        "/linux/security_context/seccomp",
        json!({"profile_type": 2, "localhost_ref": profile}),
    );
    let logs = t.run(&pod, &request)?.logs;
    ensure!(logs.contains("Function not implemented"), "{logs}");
    Ok(())
}

fn no_new_privileges(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    for (name, on, expected) in [("off", false, "0"), ("on", true, "1")] {
        let request = t
            .script(name, "grep NoNewPrivs /proc/self/status")
            .set("/linux/security_context/no_new_privs", json!(on));
        let logs = t.run(&pod, &request)?.logs;
        ensure!(logs.trim().ends_with(expected), "{name}: {logs}");
    }
    Ok(())
}

fn privileged(t: &Case<'_>) -> Result<()> {
    let pod = t.run_pod(
        &t.pod_request()
            .set("/linux/security_context/privileged", json!(true)),
    )?;
    let all = effective(t, &pod, "caps", json!({"privileged": true}))?;
    ensure!(all & (NET_ADMIN | SYS_ADMIN) == NET_ADMIN | SYS_ADMIN, "{all:x}");
    let script = "mkdir /m && mount -t tmpfs none /m && echo mounted; \
                  grep -E ' /sys [^ ]*' /proc/mounts";
    let request = t
        .script("mount", script)
        .set("/linux/security_context/privileged", json!(true));
    let logs = t.run(&pod, &request)?.logs;
    ensure!(logs.contains("mounted"), "{logs}");
    let writable = logs.lines().any(|l| l.contains(" /sys ") && l.contains("rw,"));
    ensure!(writable || !t.ours(), "sysfs is writable: {logs}");
    // A pod that is not privileged cannot have such a container.
    let plain = t.pod()?;
    let request = t
        .script("refused", "true")
        .set("/linux/security_context/privileged", json!(true));
    let refused = t.node.create_fails(&plain, &request)?;
    ensure!(refused.contains("privileged"), "{refused}");
    Ok(())
}

fn masked(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let context = "/linux/security_context";
    let request = t
        .script("main", "wc -c < /proc/version; touch /proc/sys/kernel/hostname 2>&1; echo x 2>&1 > /proc/sys/kernel/hostname")
        .set(&format!("{context}/masked_paths"), json!(["/proc/version"]))
        .set(&format!("{context}/readonly_paths"), json!(["/proc/sys"]));
    let logs = t.run(&pod, &request)?.logs;
    ensure!(
        logs.contains("0\n") && logs.contains("Read-only file system"),
        "{logs}"
    );
    Ok(())
}

fn limits(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let request = t
        .script(
            "main",
            "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2>/dev/null; \
             cat cpu.max cpu/cpu.cfs_quota_us 2>/dev/null; cat cpu.weight cpu/cpu.shares 2>/dev/null",
        )
        .set("/linux/resources/memory_limit_in_bytes", json!(48 << 20))
        .set("/linux/resources/cpu_quota", json!(50_000))
        .set("/linux/resources/cpu_period", json!(100_000))
        .set("/linux/resources/cpu_shares", json!(2048));
    let logs = t.run(&pod, &request)?.logs;
    let lines: Vec<&str> = logs.lines().collect();
    ensure!(lines.len() == 3, "{logs}");
    ensure!(lines[0] == (48u64 << 20).to_string(), "{logs}");
    ensure!(lines[1].starts_with("50000"), "{logs}");
    // 2048 shares are a weight of 79 by the old conversion, of 174 by the one of runc 1.4 and youki 0.7.
    ensure!(matches!(lines[2], "2048" | "79" | "174"), "{logs}");
    Ok(())
}

fn mounts(t: &Case<'_>) -> Result<()> {
    let directory = t.directory()?;
    let (shared, fixed) = (directory.join("rw"), directory.join("ro"));
    for path in [&shared, &fixed] {
        std::fs::create_dir_all(path)?;
        std::fs::write(path.join("seed"), "from-host")?;
    }
    let single = directory.join("single");
    std::fs::write(&single, "one file")?;
    let pod = t.pod()?;
    let request = t
        .idle("main")
        .mount(&shared, "/data/rw", json!({}))
        .mount(&fixed, "/data/ro", json!({"readonly": true}))
        .mount(&single, "/etc/single", json!({}));
    let id = t.start(&pod, &request)?;
    ensure!(
        t.shell(&id, "cat /data/rw/seed /data/ro/seed; cat /etc/single")? == "from-hostfrom-hostone file"
    );
    t.shell(&id, "echo back > /data/rw/written; mkdir /data/rw/d; ln -s written /data/rw/link; chown 5:6 /data/rw/written")?;
    ensure!(std::fs::read_to_string(shared.join("written"))? == "back\n");
    ensure!(std::fs::read_link(shared.join("link"))? == std::path::Path::new("written"));
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(shared.join("written"))?);
    ensure!(owner == 5, "the owner on the host is {owner}");
    let refused = t.exec(&id, &["touch", "/data/ro/x"])?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("Read-only"),
        "{refused:?}"
    );
    std::fs::write(shared.join("later"), "seen")?;
    t.eventually(Duration::from_secs(3), || {
        ensure!(t.shell(&id, "cat /data/rw/later")? == "seen");
        Ok(())
    })?;
    // Two containers of a pod share a volume at once.
    let other = t.start(&pod, &t.idle("other").mount(&shared, "/same", json!({})))?;
    t.shell(&other, "echo two > /same/two")?;
    t.eventually(Duration::from_secs(3), || {
        ensure!(t.shell(&id, "cat /data/rw/two")? == "two");
        Ok(())
    })
}

fn config_map(t: &Case<'_>) -> Result<()> {
    // The kubelet's way: files are links through `..data`, which is renamed over atomically.
    let directory = t.directory()?.join("map");
    std::fs::create_dir_all(directory.join("..1"))?;
    std::fs::write(directory.join("..1/key"), "old")?;
    std::os::unix::fs::symlink("..1", directory.join("..data"))?;
    std::os::unix::fs::symlink("..data/key", directory.join("key"))?;
    let pod = t.pod()?;
    let id = t.start(
        &pod,
        &t.idle("main")
            .mount(&directory, "/config", json!({"readonly": true})),
    )?;
    ensure!(t.shell(&id, "cat /config/key")? == "old");
    std::fs::create_dir_all(directory.join("..2"))?;
    std::fs::write(directory.join("..2/key"), "new")?;
    std::os::unix::fs::symlink("..2", directory.join("..data_tmp"))?;
    std::fs::rename(directory.join("..data_tmp"), directory.join("..data"))?;
    std::fs::remove_dir_all(directory.join("..1"))?;
    t.eventually(Duration::from_secs(5), || {
        let now = t.shell(&id, "cat /config/key")?;
        ensure!(now == "new", "{now}");
        Ok(())
    })
}

/// A directory that is a shared mount, unmounted when it is dropped.
struct Shared(std::path::PathBuf);

impl Shared {
    fn new(path: std::path::PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path)?;
        let none: Option<&str> = None;
        mount(Some(&path), &path, none, MsFlags::MS_BIND, none).context("binding a directory on itself")?;
        let shared = Self(path);
        mount(none, &shared.0, none, MsFlags::MS_SHARED, none).context("making it shared")?;
        Ok(shared)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("inner"), MntFlags::MNT_DETACH);
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn propagation(t: &Case<'_>) -> Result<()> {
    let shared = Shared::new(t.directory()?.join("shared"))?;
    let inner = shared.0.join("inner");
    std::fs::create_dir_all(&inner)?;
    let pod = t.pod()?;
    let follows = t
        .idle("follows")
        .mount(&shared.0, "/v", json!({"propagation": 1}));
    let private = t
        .idle("private")
        .mount(&shared.0, "/v", json!({"propagation": 0}));
    let (follows, private) = (t.start(&pod, &follows)?, t.start(&pod, &private)?);
    ensure!(t.shell(&follows, "ls /v/inner")?.is_empty());
    mount(
        Some("tmpfs"),
        &inner,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    std::fs::write(inner.join("new"), "x")?;
    t.eventually(Duration::from_secs(5), || {
        let seen = t.shell(&follows, "ls /v/inner")?;
        ensure!(seen == "new", "the mount made on the host is not seen: {seen:?}");
        Ok(())
    })?;
    ensure!(
        t.shell(&private, "ls /v/inner")?.is_empty(),
        "a private mount follows the host"
    );
    Ok(())
}

fn propagation_to_host(t: &Case<'_>) -> Result<()> {
    let shared = Shared::new(t.directory()?.join("shared"))?;
    std::fs::create_dir_all(shared.0.join("inner"))?;
    let pod = t.run_pod(
        &t.pod_request()
            .set("/linux/security_context/privileged", json!(true)),
    )?;
    let request = t
        .idle("main")
        .set("/linux/security_context/privileged", json!(true))
        .mount(&shared.0, "/v", json!({"propagation": 2}));
    let id = t.start(&pod, &request)?;
    t.shell(&id, "mount -t tmpfs none /v/inner && echo x > /v/inner/file")?;
    ensure!(std::fs::read_to_string(shared.0.join("inner/file"))? == "x\n");
    Ok(())
}

fn devices(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let script = "for d in null zero full random urandom tty; do [ -c /dev/$d ] || echo no $d; done; \
                  head -c 4 /dev/zero | wc -c; echo x > /dev/null; [ -e /dev/ptmx ] && df /dev/shm | tail -1; \
                  readlink /dev/fd; stat -f /dev/shm >/dev/null && echo fine";
    let logs = t.run_script(&pod, "main", script)?;
    ensure!(
        logs.starts_with("4\n") && logs.contains("/proc/self/fd") && logs.ends_with("fine\n"),
        "{logs}"
    );
    Ok(())
}

fn missing_program(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let request = t.script("main", "").set("/command", json!(["/no/such/program"]));
    let error = match t.node.create(&pod, &request) {
        Err(error) => error.to_string(),
        Ok(id) => {
            let error = t.node.crictl.fails(&["start", &id])?;
            let status = t.status(&id)?;
            ensure!(status["state"] == "CONTAINER_EXITED", "{status}");
            error
        }
    };
    ensure!(
        error.contains("/no/such/program"),
        "the error names the program: {error}"
    );
    Ok(())
}
