//! Containers under the real shim and the real runc: life, exit codes, logs, ExecSync, OOM, resources.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::fake_runtime::FakeRuntime;
use crate::harness::{Options, Pod, any, code_of, ctx, log_lines, process, task_exec};
use catamaran_sandbox::pod_spec::PidNamespace;
use catamaran_sandbox::protocol::OCI_RESOURCES_TYPE;
use catamaran_sandbox::protocol::stream::{CancelExecSyncRequest, ExecSyncRequest, ReopenLogRequest};
use containerd_shim_protos::api::{self, Status};
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;

#[tokio::test]
async fn a_container_lives_and_ends_and_every_verb_twice_is_answered() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sh", "-c", "echo out; echo err >&2; hostname; exit 7"]);
    pod.create(&one).await.unwrap();
    assert_eq!(pod.state(&one.id).await, Status::CREATED);
    assert_eq!(code_of(pod.create(&one).await), Code::ALREADY_EXISTS);
    assert_eq!(pod.record(&one.id), None);
    pod.start_container(&one.id).await.unwrap();
    assert_eq!(pod.wait(&one.id).await, 7);
    let record = pod.record(&one.id).expect("written before Wait answers");
    assert_eq!((record.exit_code, record.oom_killed), (7, false));
    assert_eq!(pod.state(&one.id).await, Status::STOPPED);
    assert_eq!(
        code_of(pod.start_container(&one.id).await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(code_of(pod.kill(&one.id, 15, false).await), Code::NOT_FOUND);
    assert_eq!(pod.wait(&one.id).await, 7);
    let lines = log_lines(&pod.log_of(&one.id), "stdout");
    assert_eq!(
        lines,
        [("F".into(), "out".into()), ("F".into(), "test-pod".to_string())]
    );
    assert_eq!(
        log_lines(&pod.log_of(&one.id), "stderr"),
        [("F".into(), "err".to_string())]
    );
    assert_eq!(pod.delete(&one.id).await.unwrap(), 7);
    assert_eq!(code_of(pod.delete(&one.id).await), Code::NOT_FOUND);
    assert_eq!(pod.record(&one.id).unwrap().exit_code, 7, "the record stays");
    assert!(
        !pod.leftovers().iter().any(|left| left.contains(&one.id)),
        "{:?}",
        pod.leftovers()
    );

    // Never started: deleted all the same. A name that is free again can be used again.
    let two = pod.container(&["true"]);
    pod.create(&two).await.unwrap();
    assert_eq!(pod.delete(&two.id).await.unwrap(), 137);
    pod.run(&two).await;
    assert_eq!(pod.wait(&two.id).await, 0);
}

#[tokio::test]
async fn a_container_that_cannot_be_made_leaves_nothing_and_says_why() {
    let pod = Pod::start(Options::default()).await;
    let missing = pod.container(&["/no/such/program"]);
    let error = pod.create(&missing).await.unwrap_err().to_string();
    assert!(
        error.contains("/no/such/program") && error.contains("no such file"),
        "{error}"
    );
    assert!(
        !pod.leftovers().iter().any(|left| left.contains("rootfs")),
        "{:?}",
        pod.leftovers()
    );
    assert_eq!(code_of(pod.delete(&missing.id).await), Code::NOT_FOUND);
    let mut wrong = pod.container(&["true"]);
    wrong.stdin = "nonsense";
    assert_eq!(code_of(pod.create(&wrong).await), Code::INVALID_ARGUMENT);
    wrong.stdin = "";
    wrong.id = "../escape".to_owned();
    assert_eq!(code_of(pod.create(&wrong).await), Code::INVALID_ARGUMENT);
    assert_eq!(code_of(pod.start_container("unknown").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn signals_reach_the_first_process_or_all() {
    let pod = Pod::start(Options::default()).await;
    let script = "trap 'echo term; exit 3' TERM; sleep 1000 & echo ready; wait";
    let one = pod.container(&["sh", "-c", script]);
    let pid = pod.run(&one).await;
    assert_eq!(
        pod.start_container(&one.id).await.unwrap(),
        pid,
        "starting twice is no error"
    );
    until(|| log_lines(&pod.log_of(&one.id), "stdout").len() == 1).await;
    assert_eq!(pod.pids(&one.id).await.len(), 2);
    assert_eq!(
        code_of(pod.kill(&one.id, 99, false).await),
        Code::INVALID_ARGUMENT
    );
    assert_eq!(code_of(pod.delete(&one.id).await), Code::FAILED_PRECONDITION);
    pod.kill(&one.id, libc::SIGTERM, false).await.unwrap();
    assert_eq!(pod.wait(&one.id).await, 3);

    let two = pod.container(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    pod.run(&two).await;
    let mut pause = api::PauseRequest::new();
    pause.id = two.id.clone();
    pod.task().pause(ctx(), &pause).await.unwrap();
    assert_eq!(pod.state(&two.id).await, Status::PAUSED);
    // A frozen container dies as well.
    pod.kill(&two.id, libc::SIGKILL, true).await.unwrap();
    assert_eq!(pod.wait(&two.id).await, 137);
    assert!(pod.pids(&two.id).await.is_empty());
}

#[tokio::test]
async fn logs_have_long_lines_in_parts_and_survive_rotation() {
    let pod = Pod::start(Options::default()).await;
    let long = pod.container(&[
        "sh",
        "-c",
        "head -c 20000 /dev/zero | busybox tr '\\0' x; echo; printf rest",
    ]);
    pod.run(&long).await;
    pod.wait(&long.id).await;
    let lines = log_lines(&pod.log_of(&long.id), "stdout");
    let shape: Vec<(&str, usize)> = lines
        .iter()
        .map(|(tag, text)| (tag.as_str(), text.len()))
        .collect();
    assert_eq!(shape, [("P", 16384), ("F", 3616), ("P", 4)]);

    let script =
        "i=0; while [ $i -lt 40 ]; do seq $((i*1000+1)) $((i*1000+1000)); i=$((i+1)); sleep 0.02; done";
    let chatty = pod.container(&["sh", "-c", script]);
    pod.run(&chatty).await;
    let mut request = ReopenLogRequest::new();
    request.container_id = chatty.id.clone();
    let path = pod.log_of(&chatty.id);
    let mut files = Vec::new();
    for turn in 0..5 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let old = path.with_extension(format!("log.{turn}"));
        std::fs::rename(&path, &old).unwrap();
        pod.stream().reopen_log(ctx(), &request).await.unwrap();
        files.push(old);
    }
    pod.wait(&chatty.id).await;
    files.push(path);
    let all: Vec<String> = files
        .iter()
        .flat_map(|file| log_lines(file, "stdout"))
        .map(|(_, text)| text)
        .collect();
    let expected: Vec<String> = (1..=40_000).map(|number| number.to_string()).collect();
    assert_eq!(all.len(), expected.len());
    assert!(all == expected, "a line is lost, doubled or out of order");
    assert_eq!(
        code_of(pod.stream().reopen_log(ctx(), &request).await),
        Code::FAILED_PRECONDITION
    );
}

#[tokio::test]
async fn exec_sync_returns_output_and_is_bounded_in_time_and_size() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.create(&one).await.unwrap();
    assert_eq!(
        code_of(pod.exec_sync(&one.id, &["true"], 0).await),
        Code::FAILED_PRECONDITION
    );
    pod.start_container(&one.id).await.unwrap();
    let done = pod
        .exec_sync(&one.id, &["sh", "-c", "echo out; echo err >&2; exit 5"], 0)
        .await
        .unwrap();
    assert_eq!(
        (&done.stdout[..], &done.stderr[..], done.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 5)
    );
    let killed = pod
        .exec_sync(&one.id, &["sh", "-c", "kill -9 $$"], 0)
        .await
        .unwrap();
    assert_eq!((killed.exit_code, killed.timed_out), (137, false));
    let real_time = pod
        .exec_sync(&one.id, &["sh", "-c", "kill -37 $$"], 10_000)
        .await
        .unwrap();
    assert_eq!((real_time.exit_code, real_time.timed_out), (165, false));
    let error = pod
        .exec_sync(&one.id, &["nonsense"], 0)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("nonsense"), "{error}");

    // The process and its children, one in a session of its own, are gone.
    let begun = Instant::now();
    let script = "busybox setsid sleep 987 & sleep 987 & echo begun; sleep 987";
    let timed = pod.exec_sync(&one.id, &["sh", "-c", script], 700).await.unwrap();
    assert!(
        timed.timed_out && begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(timed.stdout, b"begun\n");
    assert_eq!(pod.pids(&one.id).await.len(), 1);

    // Somebody keeps stdout open after the end.
    let begun = Instant::now();
    let left = pod
        .exec_sync(&one.id, &["sh", "-c", "sleep 3 & echo parent"], 20_000)
        .await
        .unwrap();
    assert_eq!((left.stdout.as_slice(), left.exit_code), (&b"parent\n"[..], 0));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());

    let much = pod
        .exec_sync(&one.id, &["sh", "-c", "yes | head -c 3000000"], 20_000)
        .await
        .unwrap();
    assert_eq!(
        (much.stdout.len(), much.truncated, much.exit_code),
        (1 << 20, true, 0)
    );
}

/// More than a message holds comes by a session, without a byte lost, and no more than the CRI's bound.
#[tokio::test]
async fn exec_sync_gives_up_to_16_mib_of_each_stream() {
    use catamaran_sandbox::stream_frames::{self, Exit, Frame, FrameReader};

    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    for (script, stdout, stderr, truncated) in [
        ("seq 1000000; seq 700000 >&2; exit 4", 6_888_896, 4_788_895, false),
        ("seq 3000000; exit 4", 16 << 20, 0, true),
    ] {
        let mut request = ExecSyncRequest::new();
        request.container_id = one.id.clone();
        request.process = serde_json::to_vec(&process(&["sh", "-c", script], false)).unwrap();
        request.max_output = u64::MAX;
        let answer = pod.stream().exec_sync(ctx(), &request).await.unwrap();
        assert_eq!((answer.exit_code, answer.truncated), (4, truncated));
        let mut streams = [answer.stdout, answer.stderr];
        let rest = answer.rest.into_option().expect("a session with the rest");
        let socket = stream_frames::connect(Path::new(&rest.address), &rest.token)
            .await
            .unwrap();
        let mut frames = FrameReader::new(socket);
        loop {
            match frames.next().await.unwrap() {
                Some(Frame::Stdout(bytes)) => streams[0].extend_from_slice(&bytes),
                Some(Frame::Stderr(bytes)) => streams[1].extend_from_slice(&bytes),
                Some(Frame::Exit(exit)) => break assert_eq!(exit, Exit::Code(4)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((streams[0].len(), streams[1].len()), (stdout, stderr));
        for text in &streams {
            let lines = std::str::from_utf8(text).unwrap().split_inclusive('\n');
            for (line, number) in lines.filter(|line| line.ends_with('\n')).zip(1..) {
                assert_eq!(line.trim_end(), number.to_string());
            }
        }
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_ends_its_exec_but_not_the_container() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let address = crate::harness::start_shim(&pod.id, &pod.bundle);
    assert!(
        address.ends_with(&format!("/s/{}.sock", pod.id.short())),
        "a second start finds the first"
    );
    let other = containerd_shim_protos::shim_async::Client::connect(&address)
        .await
        .unwrap();
    let stream = catamaran_sandbox::protocol::stream_ttrpc::StreamClient::new(other);
    let mut request = catamaran_sandbox::protocol::stream::ExecSyncRequest::new();
    request.container_id = one.id.clone();
    request.process = serde_json::to_vec(&crate::harness::process(&["sleep", "987"], false)).unwrap();
    let call = tokio::spawn(async move { stream.exec_sync(ctx(), &request).await.map(drop) });
    while pod.pids(&one.id).await.len() < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    call.abort();
    let begun = Instant::now();
    while pod.pids(&one.id).await.len() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(5), "the exec lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(pod.state(&one.id).await, Status::RUNNING);
}

#[tokio::test]
async fn an_exec_sync_is_cancelled_by_its_key() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let request = ExecSyncRequest {
        container_id: one.id.clone(),
        process: serde_json::to_vec(&process(&["sh", "-c", "sleep 987 & sleep 987"], false)).unwrap(),
        cancel_key: "k".to_owned(),
        ..Default::default()
    };
    let call = tokio::spawn({
        let (stream, request) = (pod.stream(), request.clone());
        async move { stream.exec_sync(ctx(), &request).await }
    });
    while pod.pids(&one.id).await.len() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(
        code_of(pod.stream().exec_sync(ctx(), &request).await),
        Code::ALREADY_EXISTS
    );
    let mut cancel = CancelExecSyncRequest::new();
    for key in ["unknown", "k", "k"] {
        cancel.cancel_key = key.to_owned();
        pod.stream().cancel_exec_sync(ctx(), &cancel).await.unwrap();
    }
    assert_eq!(code_of(call.await.unwrap()), Code::FAILED_PRECONDITION);
    // The runtime may not have been through with the start; then the end follows the answer.
    let begun = Instant::now();
    while pod.pids(&one.id).await.len() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(10), "the exec lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The time limit is the caller's, whatever the runtime takes; neither it nor what it started lives on.
#[tokio::test]
async fn exec_sync_does_not_wait_for_a_runtime_that_hangs() {
    let runtime = FakeRuntime::new(
        "case \" $* \" in *' exec '*) /usr/sbin/runc \"$@\"; echo $$ > $HERE/pid; exec sleep 986;; esac\n\
         exec /usr/sbin/runc \"$@\"",
    );
    let pod = Pod::start(runtime.options()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let begun = Instant::now();
    let answer = pod.exec_sync(&one.id, &["sleep", "987"], 1000).await.unwrap();
    assert!(answer.timed_out && begun.elapsed() < Duration::from_secs(3));
    let hanging = runtime.read("pid");
    until(|| !Path::new("/proc").join(hanging.trim()).exists()).await;
    let begun = Instant::now();
    while pod.pids(&one.id).await.len() > 1 {
        assert!(begun.elapsed() < Duration::from_secs(5), "the exec lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let left: Vec<_> = std::fs::read_dir(pod.bundle_of(&one.id))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name.starts_with("exec-") || name.starts_with("runtime-"))
        .collect();
    assert_eq!(left, Vec::<String>::new());
}

/// Whoever comes after a caller that died during Create finds all of the container or nothing.
#[tokio::test]
async fn delete_and_kill_await_a_creation() {
    let runtime = FakeRuntime::new(
        "case \" $* \" in *' create '*) sleep 1;; esac\n\
         exec /usr/sbin/runc \"$@\"",
    );
    let pod = Pod::start(runtime.options()).await;
    let (one, two) = (
        pod.container(&["sleep", "1000"]),
        pod.container(&["sleep", "1000"]),
    );
    let deleting = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(pod.delete(&one.id).await.unwrap(), 137);
        assert_eq!(code_of(pod.delete(&one.id).await), Code::NOT_FOUND);
        pod.kill(&two.id, libc::SIGKILL, true).await.unwrap();
        assert_eq!(pod.wait(&two.id).await, 137);
    };
    let (first, second, ()) = tokio::join!(pod.create(&one), pod.create(&two), deleting);
    assert!(first.unwrap() > 0 && second.unwrap() > 0);
    assert!(!pod.leftovers().iter().any(|left| left.contains(&one.id)));
}

/// runc writes its state late: one that is killed before knows nothing of its container afterwards.
#[tokio::test]
async fn a_creation_that_is_killed_leaves_no_cgroup() {
    let runtime = FakeRuntime::new(
        "case \" $* \" in *' create '*)\n\
           for id; do :; done; at=/sys/fs/cgroup; [ -d $at/pids ] && at=$at/pids\n\
           mkdir -p $at$(cat $HERE/parent)/$id; sleep 987 & echo $! > $at$(cat $HERE/parent)/$id/cgroup.procs\n\
           echo $! > $HERE/pid; exec sleep 986;; esac\n\
         exec /usr/sbin/runc \"$@\"",
    );
    let pod = Pod::start(runtime.options()).await;
    runtime.write("parent", &pod.spec.cgroup_parent);
    let one = pod.container(&["sleep", "1000"]);
    let stopping = async {
        until(|| !runtime.read("pid").is_empty()).await;
        assert!(pod.leftovers().iter().any(|left| left.contains("sys/fs/cgroup")));
        pod.stop().await.unwrap();
    };
    let (created, ()) = tokio::join!(pod.create(&one), stopping);
    assert_eq!(code_of(created), Code::FAILED_PRECONDITION);
    assert_eq!(pod.leftovers(), Vec::<String>::new());
    let orphan = runtime.read("pid");
    assert!(!Path::new("/proc").join(orphan.trim()).exists());
}

#[tokio::test]
async fn an_exec_by_the_task_service_has_its_own_states() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let fifo = pod.directory.path().join("stdout");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut reader = tokio::net::unix::pipe::OpenOptions::new()
        .open_receiver(&fifo)
        .unwrap();
    let mut exec = task_exec(&one.id, "e1", &["sh", "-c", "echo through; exit 4"]);
    exec.stdout = fifo.display().to_string();
    pod.task().exec(ctx(), &exec).await.unwrap();
    assert_eq!(code_of(pod.task().exec(ctx(), &exec).await), Code::ALREADY_EXISTS);
    let mut start = api::StartRequest::new();
    (start.id, start.exec_id) = (one.id.clone(), "e1".to_owned());
    assert!(pod.task().start(ctx(), &start).await.unwrap().pid > 1);
    assert_eq!(
        code_of(pod.task().start(ctx(), &start).await),
        Code::FAILED_PRECONDITION
    );
    let mut wait = api::WaitRequest::new();
    (wait.id, wait.exec_id) = (one.id.clone(), "e1".to_owned());
    assert_eq!(pod.task().wait(ctx(), &wait).await.unwrap().exit_status, 4);
    let mut bytes = [0; 64];
    let count = tokio::io::AsyncReadExt::read(&mut reader, &mut bytes)
        .await
        .unwrap();
    assert_eq!(&bytes[..count], b"through\n");
    let mut delete = api::DeleteRequest::new();
    (delete.id, delete.exec_id) = (one.id.clone(), "e1".to_owned());
    assert_eq!(pod.task().delete(ctx(), &delete).await.unwrap().exit_status, 4);
    assert_eq!(code_of(pod.task().delete(ctx(), &delete).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn out_of_memory_is_recorded_and_limits_can_be_changed() {
    let pod = Pod::start(Options::default()).await;
    let mut greedy = pod.container(&["tail", "/dev/zero"]);
    greedy.config["linux"]["resources"] = json!({"memory": {"limit": 32 << 20}});
    pod.run(&greedy).await;
    assert_eq!(pod.wait(&greedy.id).await, 137);
    assert!(pod.record(&greedy.id).unwrap().oom_killed);

    let mut modest = pod.container(&["sleep", "1000"]);
    modest.config["linux"]["resources"] = json!({"memory": {"limit": 32 << 20}, "pids": {"limit": 50}});
    pod.run(&modest).await;
    assert_eq!(limits(&pod, &modest.id).await, (32 << 20, 50));
    let mut update = api::UpdateTaskRequest::new();
    update.id = modest.id.clone();
    let resources = json!({"memory": {"limit": 64 << 20}}).to_string();
    update.resources = Some(any(OCI_RESOURCES_TYPE, resources.into_bytes())).into();
    pod.task().update(ctx(), &update).await.unwrap();
    assert_eq!(limits(&pod, &modest.id).await.0, 64 << 20);
    update.resources = Some(any("something/else", Vec::new())).into();
    assert_eq!(
        code_of(pod.task().update(ctx(), &update).await),
        Code::INVALID_ARGUMENT
    );
}

/// Memory and process limits as Task.Stats tells them, and that something is used.
async fn limits(pod: &Pod, id: &str) -> (u64, u64) {
    let mut request = api::StatsRequest::new();
    request.id = id.to_owned();
    let stats = pod.task().stats(ctx(), &request).await.unwrap().stats.unwrap();
    if stats.type_url == "io.containerd.cgroups.v1.Metrics" {
        let metrics = v1::Metrics::parse_from_bytes(&stats.value).unwrap();
        assert!(metrics.memory.usage.usage > 0 && metrics.cpu.usage.total > 0 && metrics.pids.current == 1);
        (metrics.memory.usage.limit, metrics.pids.limit)
    } else {
        let metrics = v2::Metrics::parse_from_bytes(&stats.value).unwrap();
        assert!(metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0 && metrics.pids.current == 1);
        (metrics.memory.usage_limit, metrics.pids.limit)
    }
}

#[tokio::test]
async fn containers_share_what_the_pod_shares() {
    let sysctls = [
        ("kernel.shm_rmid_forced", "1"),
        ("fs.mqueue.msg_max", "7"),
        ("net.ipv4.ip_default_ttl", "77"),
    ];
    let sysctls = sysctls
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let pod = Pod::start(Options {
        pid: PidNamespace::Pod,
        network: true,
        sysctls,
        ..Options::default()
    })
    .await;
    let one = pod.container(&["sh", "-c", "echo shared > /dev/shm/file; sleep 4321"]);
    let two = pod.container(&["sh", "-c", "sleep 1000 & exec sleep 1234"]);
    pod.run(&one).await;
    pod.run(&two).await;
    assert!(pod.output(&two.id, &["ps"]).await.contains("sleep 4321"));
    assert_eq!(pod.output(&two.id, &["cat", "/dev/shm/file"]).await, "shared\n");
    let read = [
        "cat",
        "/proc/sys/kernel/shm_rmid_forced",
        "/proc/sys/fs/mqueue/msg_max",
        "/proc/sys/net/ipv4/ip_default_ttl",
    ];
    assert_eq!(pod.output(&two.id, &read).await, "1\n7\n77\n");
    assert_ne!(
        std::fs::read_to_string(read[3]).unwrap(),
        "77\n",
        "not the host's"
    );
    // A first process that ends takes the rest of its container with it, and nobody else.
    pod.kill(&two.id, libc::SIGKILL, false).await.unwrap();
    assert_eq!(pod.wait(&two.id).await, 137);
    assert!(pod.pids(&two.id).await.is_empty());
    assert!(!pod.output(&one.id, &["ps"]).await.contains("sleep 1000"));
}

async fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(10), "waited too long");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
