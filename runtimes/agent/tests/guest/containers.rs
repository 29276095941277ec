//! Containers of every kind in one guest, and several guests where a test would disturb others.

use std::time::{Duration, Instant};

use catamaran_guest_protocol::v1::{
    Empty, ExecRequest, InputChunk, MountRequest, PortChunk, ResizeRequest, SignalRequest, StatsRequest,
    UpdateRequest,
};
use serde_json::{Value, json};
use tonic::Code;

use super::vm::{Vm, missing, process, shell};

/// Skips by name where the machine lacks something.
macro_rules! vm {
    ($test:literal, $command_line:literal) => {{
        if let Some(reason) = missing() {
            println!("skipped: {}: {reason}", $test);
            return;
        }
        Vm::boot($command_line).await
    }};
}

impl Vm {
    async fn exec(&mut self, id: &str, exec_id: &str, process: &Value) -> Result<(), tonic::Status> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(process).expect("JSON"),
            stdin: false,
        };
        self.agent.exec(request).await.map(drop)
    }

    async fn signal(&mut self, id: &str, signal: i32, all: bool) -> Result<(), tonic::Status> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: String::new(),
            signal: signal.unsigned_abs(),
            all,
            tree: false,
        };
        self.agent.signal(request).await.map(drop)
    }
}

fn command(script: &str) -> Value {
    json!({"args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
}

#[tokio::test]
async fn the_life_of_a_container() {
    let mut vm = vm!("the_life_of_a_container", "");
    println!("boot to hello: {:?}", vm.boot);
    assert!(!vm.hello.kernel_release.is_empty());
    assert_eq!(vm.hello.cgroup_version, "v2");
    assert!(vm.hello.memory_bytes > 200 << 20);
    vm.sandbox(false).await;

    // Output, exit code, hostname, pid 1 of its own, masked and read-only paths.
    let started = Instant::now();
    let script = "hostname; echo $$; echo oops >&2; cat /proc/keys | head -c1; echo x > /proc/sys/kernel/msgmax || echo read-only; exit 7";
    let (ended, out, err) = vm.run("first", &shell(script)).await;
    println!("create to wait: {:?}", started.elapsed());
    assert_eq!(ended.exit_code, 7, "{out}{err}");
    assert!(!ended.oom_killed);
    assert_eq!(out, "test-pod\n1\nread-only\n", "{err}");
    assert!(err.contains("oops"));
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos();
    assert!(
        (now as i64 - ended.exited_at_ns).abs() < 60_000_000_000,
        "the clock was set"
    );
    let taken = vm.create("first", &shell("true"), false).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    vm.delete("first").await;
    let gone = vm.agent.wait(process("first", "")).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);

    // A user with few privileges; the pod's /dev/shm; SIGPIPE as a program expects it; /dev/stdout reopened.
    let mut spec = shell(
        "id -u; id -g; id -G; pwd; grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status; \
                          yes | head -n 1; echo shared > /dev/shm/file; echo again > /dev/stdout",
    );
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [7], "umask": 18});
    spec["process"]["noNewPrivileges"] = true.into();
    spec["process"]["capabilities"] = json!({});
    spec["process"]["cwd"] = "/tmp".into();
    let (ended, out, err) = vm.run("user", &spec).await;
    assert_eq!(ended.exit_code, 0, "{out}{err}");
    assert_eq!(
        out, "1000\n1000\n1000 7\n/tmp\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\ny\nagain\n",
        "{err}"
    );
    vm.delete("user").await;
    let (_, out, _) = vm
        .run("shm", &shell("cat /dev/shm/file; echo y > /tmp/y; ls /tmp"))
        .await;
    assert_eq!(out, "shared\ny\n");
    vm.delete("shm").await;

    // Devices: null works, another's disk or memory does not, though the node can be made.
    let script = "echo x > /dev/null && mknod /tmp/mem c 1 1 && cat /tmp/mem | head -c 1; mknod /tmp/kmsg c 1 11; head -n 1 /tmp/kmsg";
    let (_, out, err) = vm.run("devices", &shell(script)).await;
    assert_eq!(out, "");
    assert_eq!(err.matches("not permitted").count(), 2, "{err}");
    vm.delete("devices").await;

    // Mistakes.
    let mut missing = shell("");
    missing["process"]["args"] = json!(["nonexistent"]);
    let error = vm.create("missing", &missing, false).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(
        error.message().contains("executable file not found in $PATH"),
        "{error}"
    );
    let mut bad_root = shell("");
    bad_root["root"]["path"] = "/nowhere".into();
    let error = vm.create("missing", &bad_root, false).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    println!("a missing root says: {}", error.message());
    let mut no_pid = shell("");
    no_pid["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert_eq!(
        vm.create("missing", &no_pid, false).await.unwrap_err().code(),
        Code::InvalidArgument
    );

    // Created and never started, then deleted; and killed before its start.
    vm.create("unstarted", &shell("true"), false).await.unwrap();
    vm.delete("unstarted").await;
    vm.create("killed", &shell("true"), false).await.unwrap();
    vm.signal("killed", libc_sigkill(), false).await.unwrap();
    assert_eq!(vm.wait("killed", "").await.exit_code, 137);
    let start = catamaran_guest_protocol::v1::ContainerRequest {
        container_id: "killed".into(),
    };
    assert_eq!(
        vm.agent.start_container(start).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    vm.delete("killed").await;

    // Shutdown ends everything and powers off.
    vm.create("running", &shell("sleep 1000"), false).await.unwrap();
    vm.start("running").await;
    let _ = vm.agent.shutdown(Empty {}).await;
    assert!(vm.powered_off(Duration::from_secs(30)).await, "{}", vm.console());
    assert!(!vm.console().contains("panic"), "{}", vm.console());
}

fn libc_sigkill() -> i32 {
    9
}

#[tokio::test]
async fn processes_in_a_running_container() {
    let mut vm = vm!("processes_in_a_running_container", "");
    vm.sandbox(false).await;
    vm.create(
        "main",
        &shell("echo up; trap 'exit 3' TERM; while :; do sleep 0.1; done"),
        false,
    )
    .await
    .unwrap();
    assert_eq!(
        vm.exec("main", "early", &command("true"))
            .await
            .unwrap_err()
            .code(),
        Code::FailedPrecondition
    );
    vm.start("main").await;

    let started = Instant::now();
    vm.exec(
        "main",
        "e1",
        &command("echo out; echo err >&2; ps | grep -c sleep; cat /proc/self/cgroup; exit 5"),
    )
    .await
    .unwrap();
    let (out, err) = vm.output("main", "e1").await;
    assert_eq!(vm.wait("main", "e1").await.exit_code, 5);
    println!("exec: {:?}", started.elapsed());
    assert!(out.starts_with("out\n"), "{out}");
    assert!(
        out.ends_with("0::/\n"),
        "in the container's cgroup namespace: {out}"
    );
    assert_eq!(err, "err\n");
    assert_eq!(
        vm.exec("main", "e1", &command("true")).await.unwrap_err().code(),
        Code::AlreadyExists
    );
    vm.agent.delete(process("main", "e1")).await.unwrap();

    let mut user = command("id -u; grep CapEff /proc/self/status");
    user["user"] = json!({"uid": 1000, "gid": 1000});
    user["capabilities"] = json!({});
    vm.exec("main", "user", &user).await.unwrap();
    assert_eq!(
        vm.output("main", "user").await.0,
        "1000\nCapEff:\t0000000000000000\n"
    );

    let mut missing = command("");
    missing["args"] = json!(["nonexistent"]);
    let error = vm.exec("main", "missing", &missing).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(
        error.message().contains("executable file not found in $PATH"),
        "{error}"
    );

    // Input and its end.
    let request = ExecRequest {
        container_id: "main".into(),
        exec_id: "cat".into(),
        process: serde_json::to_vec(&command("cat; echo done")).unwrap(),
        stdin: true,
    };
    vm.agent.exec(request).await.unwrap();
    let chunk = |data: &[u8], eof| InputChunk {
        container_id: "main".into(),
        exec_id: "cat".into(),
        data: data.to_vec(),
        eof,
    };
    let big = vec![b'x'; 30_000];
    let mut chunks: Vec<_> = (0..40).map(|_| chunk(&big, false)).collect();
    chunks.push(chunk(b"\n", true));
    let mut writer = vm.agent.clone();
    let writing = tokio::spawn(async move { writer.write_input(tokio_stream::iter(chunks)).await });
    let (out, _) = vm.output("main", "cat").await;
    writing.await.unwrap().unwrap();
    assert_eq!(out.len(), 40 * 30_000 + 1 + 5);
    assert!(out.ends_with("x\ndone\n"));

    // A terminal, its size, and a resize.
    let mut terminal = command("tty; stty size; read line; stty size; echo got $line");
    terminal["terminal"] = true.into();
    terminal["consoleSize"] = json!({"height": 24, "width": 80});
    vm.exec("main", "tty", &terminal).await.unwrap();
    let resize = ResizeRequest {
        container_id: "main".into(),
        exec_id: "tty".into(),
        width: 132,
        height: 50,
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    vm.agent.resize_terminal(resize).await.unwrap();
    let line = InputChunk {
        container_id: "main".into(),
        exec_id: "tty".into(),
        data: b"hello\n".to_vec(),
        eof: false,
    };
    vm.agent.write_input(tokio_stream::iter([line])).await.unwrap();
    let (out, _) = vm.output("main", "tty").await;
    assert!(
        out.contains("/dev/pts/") && out.contains("24 80") && out.contains("50 132"),
        "{out}"
    );
    assert!(out.contains("got hello"), "{out}");
    assert_eq!(vm.wait("main", "tty").await.exit_code, 0);

    // Many at once: no exit is lost.
    for n in 0..20 {
        vm.exec("main", &format!("m{n}"), &command(&format!("exit {n}")))
            .await
            .unwrap();
    }
    for n in 0..20 {
        assert_eq!(vm.wait("main", &format!("m{n}")).await.exit_code, n);
    }

    vm.signal("main", 15, false).await.unwrap();
    assert_eq!(vm.wait("main", "").await.exit_code, 3);
    assert_eq!(
        vm.signal("main", 15, false).await.unwrap_err().code(),
        Code::NotFound
    );
    vm.delete("main").await;
}

#[tokio::test]
async fn limits_protect_the_agent() {
    let mut vm = vm!("limits_protect_the_agent", "");
    vm.sandbox(false).await;

    // Beyond its memory: killed, told as OOM, and only this container.
    let mut greedy = shell("tail /dev/zero");
    greedy["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    let (ended, _, _) = vm.run("greedy", &greedy).await;
    assert!(ended.oom_killed, "{ended:?}");
    assert_ne!(ended.exit_code, 0);
    vm.delete("greedy").await;

    // Without a limit of its own the pod's holds; the agent lives.
    let (ended, _, _) = vm.run("unlimited", &shell("tail /dev/zero")).await;
    assert!(ended.oom_killed, "{ended:?}");
    vm.delete("unlimited").await;

    // A flood of output that nobody reads holds up its writer and costs no memory; other calls go on.
    vm.create("flood", &shell("yes"), false).await.unwrap();
    vm.start("flood").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut unread = vm
        .agent
        .read_output(process("flood", ""))
        .await
        .unwrap()
        .into_inner();
    let limit = UpdateRequest {
        container_id: "flood".into(),
        resources: serde_json::to_vec(
            &json!({"memory": {"limit": 64 << 20, "swap": 64 << 20}, "pids": {"limit": 32}}),
        )
        .unwrap(),
    };
    vm.agent.update_resources(limit).await.unwrap();
    let stats = StatsRequest {
        container_id: "flood".into(),
    };
    let stats = vm.agent.stats(stats).await.unwrap().into_inner();
    assert_eq!((stats.memory_limit_bytes, stats.pids_limit), (64 << 20, 32));
    assert!(
        stats.cpu_usage_ns > 0 && stats.memory_usage_bytes > 0 && stats.pids >= 1,
        "{stats:?}"
    );
    let pod = vm
        .agent
        .stats(StatsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(
        pod.cpu_usage_ns >= stats.cpu_usage_ns && pod.memory_limit_bytes > 100 << 20,
        "{pod:?}"
    );
    let chunk = unread.message().await.unwrap().unwrap();
    assert!(chunk.data.starts_with(b"y\n"));
    drop(unread);
    vm.signal("flood", 9, true).await.unwrap();
    assert_eq!(vm.wait("flood", "").await.exit_code, 137);
    vm.delete("flood").await;

    // A fork bomb meets the limit of processes.
    let mut bomb = shell("f() { f | f & }; f; sleep 2; echo over");
    bomb["linux"]["resources"]["pids"] = json!({"limit": 40});
    vm.create("bomb", &bomb, false).await.unwrap();
    vm.start("bomb").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stats = vm
        .agent
        .stats(StatsRequest {
            container_id: "bomb".into(),
        })
        .await
        .unwrap()
        .into_inner();
    assert!(stats.pids <= 40, "{stats:?}");
    vm.signal("bomb", 9, true).await.unwrap();
    vm.wait("bomb", "").await;
    vm.delete("bomb").await;
}

#[tokio::test]
async fn seccomp_holds_for_container_and_exec() {
    let mut vm = vm!("seccomp_holds_for_container_and_exec", "");
    vm.sandbox(false).await;
    for no_new_privileges in [false, true] {
        let mut spec = shell("mkdir /tmp/a || echo refused; while :; do sleep 0.1; done");
        spec["process"]["noNewPrivileges"] = no_new_privileges.into();
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        });
        vm.create("filtered", &spec, false).await.unwrap();
        vm.start("filtered").await;
        for uid in [0, 1000] {
            let mut exec = command("mkdir /tmp/b || echo refused; grep Seccomp: /proc/self/status");
            exec["user"] = json!({"uid": uid, "gid": uid});
            exec["noNewPrivileges"] = no_new_privileges.into();
            let exec_id = format!("e{uid}");
            vm.exec("filtered", &exec_id, &exec).await.unwrap();
            assert_eq!(vm.output("filtered", &exec_id).await.0, "refused\nSeccomp:\t2\n");
        }
        vm.signal("filtered", 9, false).await.unwrap();
        vm.wait("filtered", "").await;
        assert_eq!(vm.output("filtered", "").await.0, "refused\n");
        vm.delete("filtered").await;
    }
}

#[tokio::test]
async fn a_shared_pid_namespace() {
    let mut vm = vm!("a_shared_pid_namespace", "");
    vm.sandbox(true).await;
    let mut spec = shell("sleep 1000 & while :; do sleep 0.1; done");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}]);
    vm.create("one", &spec, false).await.unwrap();
    vm.start("one").await;
    let mut other = shell("ps");
    other["linux"]["namespaces"] = json!([{"type": "mount"}]);
    let (_, out, err) = vm.run("two", &other).await;
    assert!(out.contains("pause") && out.contains("sleep 1000"), "{out}{err}");
    assert!(
        !out.contains("kthreadd") && !out.contains("init"),
        "the agent is not in it: {out}"
    );
    vm.delete("two").await;
    // The rest of a container ends with its first process.
    vm.signal("one", 9, false).await.unwrap();
    assert_eq!(vm.wait("one", "").await.exit_code, 137);
    vm.delete("one").await;
    let (_, out, _) = vm.run("three", &other).await;
    assert!(!out.contains("sleep 1000"), "{out}");
}

#[tokio::test]
async fn connections_mounts_and_ports() {
    let mut vm = vm!("connections_mounts_and_ports", "");
    vm.sandbox(false).await;

    let mount = |source: &str, target: &str| MountRequest {
        r#type: "tmpfs".into(),
        source: source.into(),
        target: target.into(),
        options: vec!["size=1m".into(), "nosuid".into()],
    };
    for _ in 0..2 {
        vm.agent
            .mount(mount("tmpfs", "/run/catamaran/m/one"))
            .await
            .unwrap();
    }
    let unknown = MountRequest {
        r#type: "nfs".into(),
        ..mount("x", "/run/x")
    };
    assert_eq!(
        vm.agent.mount(unknown).await.unwrap_err().code(),
        Code::Unimplemented
    );
    let dots = vm.agent.mount(mount("tmpfs", "/run/../etc")).await.unwrap_err();
    assert_eq!(dots.code(), Code::InvalidArgument);
    for _ in 0..2 {
        let target = "/run/catamaran/m/one".into();
        vm.agent
            .unmount(catamaran_guest_protocol::v1::UnmountRequest { target })
            .await
            .unwrap();
    }

    vm.create(
        "server",
        &shell("while :; do echo served | nc -l -p 8080; done"),
        false,
    )
    .await
    .unwrap();
    vm.start("server").await;
    let mut answer = Vec::new();
    for _ in 0..100 {
        let first = PortChunk {
            port: 8080,
            data: b"request\n".to_vec(),
            eof: true,
        };
        match vm.agent.port_forward(tokio_stream::iter([first])).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Some(chunk) = stream.message().await.unwrap() {
                    answer.extend(chunk.data);
                }
                break;
            }
            // Not listening yet.
            Err(error) => assert_eq!(error.code(), Code::FailedPrecondition, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(answer, b"served\n");
    let none = PortChunk {
        port: 9,
        data: Vec::new(),
        eof: false,
    };
    let refused = vm
        .agent
        .port_forward(tokio_stream::iter([none]))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");

    // The shim's connection breaks and comes back: containers and their output are still there.
    vm.create("survivor", &shell("echo kept; sleep 1; exit 4"), false)
        .await
        .unwrap();
    vm.start("survivor").await;
    for _ in 0..3 {
        vm.reconnect().await;
    }
    assert_eq!(vm.output("survivor", "").await.0, "kept\n");
    assert_eq!(vm.wait("survivor", "").await.exit_code, 4);
}

#[tokio::test]
async fn legacy_cgroups() {
    let mut vm = vm!("legacy_cgroups", "catamaran.cgroup=v1");
    assert_eq!(vm.hello.cgroup_version, "v1");
    vm.sandbox(false).await;
    let mut spec = shell("while :; do sleep 0.1; done");
    spec["linux"]["resources"]["pids"] = json!({"limit": 40});
    vm.create("old", &spec, false).await.unwrap();
    vm.start("old").await;
    let script = "cat /dev/null; mknod /tmp/mem c 1 1; cat /tmp/mem";
    vm.exec("old", "e", &command(script)).await.unwrap();
    let (_, err) = vm.output("old", "e").await;
    assert_eq!(
        err.matches("not permitted").count(),
        1,
        "the devices controller refuses: {err}"
    );
    let stats = StatsRequest {
        container_id: "old".into(),
    };
    let stats = vm.agent.stats(stats).await.unwrap().into_inner();
    assert_eq!(stats.pids_limit, 40, "{stats:?}");
    assert!(stats.cpu_usage_ns > 0, "{stats:?}");
    vm.signal("old", 9, true).await.unwrap();
    assert_eq!(vm.wait("old", "").await.exit_code, 137);
    vm.delete("old").await;
}
