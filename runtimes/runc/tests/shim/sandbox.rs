//! The pod as a whole: stop, shutdown, a shim that dies, other runtimes.

use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::{IdMapping, PidNamespace, UserNamespace, info};
use catamaran_sandbox::protocol::POD_SPEC_TYPE;
use containerd_shim_protos::sandbox_api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::ttrpc::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Options, Pod, any, code_of, ctx, delete_shim, start_shim};

fn exists(pid: i32) -> bool {
    // A zombie that a slow pid 1 has not reaped runs no more.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

async fn gone(pid: i32) {
    let begun = Instant::now();
    while exists(pid) {
        assert!(begun.elapsed() < Duration::from_secs(5), "process {pid} lives on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn stopping_ends_everything_and_shutdown_the_shim() {
    let pod = Pod::start(Options {
        pid: PidNamespace::Pod,
        ..Options::default()
    })
    .await;
    let one = pod.container(&["sleep", "1000"]);
    let two = pod.container(&["sleep", "1000"]);
    let never = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    pod.run(&two).await;
    pod.create(&never).await.unwrap();
    let init = pod.status().await.pid.cast_signed();
    assert_ne!(init, pod.shim_pid(), "the init of the shared PID namespace");
    let mut shutdown = sandbox_api::ShutdownSandboxRequest::new();
    shutdown.sandbox_id = pod.id.to_string();
    let early = pod.sandbox().shutdown_sandbox(ctx(), &shutdown).await;
    assert_eq!(code_of(early), Code::FAILED_PRECONDITION);
    let waiting = tokio::spawn({
        let sandbox = pod.sandbox();
        let mut request = sandbox_api::WaitSandboxRequest::new();
        request.sandbox_id = pod.id.to_string();
        async move { sandbox.wait_sandbox(ctx(), &request).await.unwrap() }
    });
    pod.stop().await.unwrap();
    pod.stop().await.expect("stopping twice is no error");
    assert!(waiting.await.unwrap().exited_at.seconds > 0);
    assert_eq!(pod.wait(&one.id).await, 137);
    assert_eq!(pod.record(&two.id).unwrap().exit_code, 137);
    assert_eq!(pod.status().await.state, "SANDBOX_NOTREADY");
    gone(init).await;
    assert_eq!(
        code_of(pod.create(&pod.container(&["true"])).await),
        Code::FAILED_PRECONDITION
    );
    for id in [&one.id, &two.id, &never.id] {
        pod.delete(id).await.unwrap();
    }
    assert_eq!(pod.leftovers(), Vec::<String>::new());
    let shim = pod.shim_pid();
    pod.sandbox().shutdown_sandbox(ctx(), &shutdown).await.unwrap();
    gone(shim).await;
    let sockets = pod.directory.path().join("s");
    assert_eq!(std::fs::read_dir(sockets).unwrap().count(), 0);
}

#[tokio::test]
async fn what_a_killed_shim_leaves_is_removed_by_delete() {
    let pod = Pod::start(Options {
        pid: PidNamespace::Pod,
        ..Options::default()
    })
    .await;
    let shared = pod.container(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    let mut own = pod.container(&["sh", "-c", "sleep 1000 & sleep 1000"]);
    for namespace in own.config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "pid" {
            namespace.as_object_mut().unwrap().remove("path");
        }
    }
    let ended = pod.container(&["sh", "-c", "exit 4"]);
    for container in [&shared, &own, &ended] {
        pod.run(container).await;
    }
    pod.wait(&ended.id).await;
    let mut pids: Vec<i32> = Vec::new();
    for container in [&shared, &own] {
        pids.extend(pod.pids(&container.id).await.into_iter().map(u32::cast_signed));
    }
    assert_eq!(pids.len(), 4);
    kill(Pid::from_raw(pod.shim_pid()), Signal::SIGKILL).unwrap();
    let output = delete_shim(&pod.id, &pod.bundle);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // DeleteResponse.exit_status = 137, in protobuf.
    assert_eq!(output.stdout, [0x10, 0x89, 0x01]);
    for pid in pids {
        gone(pid).await;
    }
    assert_eq!(pod.leftovers(), Vec::<String>::new());
    assert_eq!(pod.record(&own.id).unwrap().exit_code, 137);
    assert_eq!(pod.record(&ended.id).unwrap().exit_code, 4);
    assert!(
        delete_shim(&pod.id, &pod.bundle).status.success(),
        "deleting twice is no error"
    );
    assert_eq!(
        std::fs::read_dir(pod.directory.path().join("s")).unwrap().count(),
        0
    );
}

#[tokio::test]
async fn a_live_shim_is_ended_by_delete_and_a_new_one_can_start() {
    let pod = Pod::start(Options::default()).await;
    let one = pod.container(&["sleep", "1000"]);
    pod.run(&one).await;
    let shim = pod.shim_pid();
    assert!(delete_shim(&pod.id, &pod.bundle).status.success());
    gone(shim).await;
    assert_eq!(pod.leftovers(), Vec::<String>::new());
    start_shim(&pod.id, &pod.bundle);
    assert_ne!(pod.shim_pid(), shim);
}

#[tokio::test]
async fn namespaces_end_with_the_shim() {
    let pod = Pod::start(Options {
        pid: PidNamespace::Pod,
        ..Options::default()
    })
    .await;
    let path = pod.info[info::IPC_NAMESPACE].clone();
    assert!(
        std::fs::read_link(&path)
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("ipc:[")
    );
    let init = pod.status().await.pid.cast_signed();
    kill(Pid::from_raw(pod.shim_pid()), Signal::SIGKILL).unwrap();
    gone(init).await;
    assert!(!Path::new(&path).exists());
}

/// A container that may trace reaches what pid 1 of its pod reaches.
#[tokio::test]
async fn the_init_of_a_shared_pid_namespace_has_nothing_of_the_node() {
    let map = vec![IdMapping {
        container_id: 0,
        host_id: 200_000,
        length: 65_536,
    }];
    let (uids, gids) = (map.clone(), map);
    for user in [None, Some(UserNamespace { uids, gids })] {
        let pod = Pod::start(Options {
            pid: PidNamespace::Pod,
            user,
            ..Options::default()
        })
        .await;
        let init = PathBuf::from(format!("/proc/{}", pod.status().await.pid));
        let read = |name: &str| std::fs::read_to_string(init.join(name)).unwrap();
        assert_eq!(read("comm"), "catamaran-init\n");
        assert_eq!(std::fs::read_dir(init.join("root")).unwrap().count(), 0);
        let mounts = read("mountinfo");
        assert!(
            mounts.lines().count() == 1 && mounts.contains(" / / ro,"),
            "{mounts}"
        );
        let status = read("status");
        for line in [
            "CapInh:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "CapAmb:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
        ] {
            assert!(status.lines().any(|is| is == line), "{line}: {status}");
        }
        let begun = Instant::now();
        while std::fs::read_dir(init.join("fd")).unwrap().count() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(5), "descriptors stay");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // It waits, without using the processor.
        assert!(read("wchan") != "0" || read("stat").contains(" S "));
    }
}

#[tokio::test]
async fn a_user_namespace_owns_the_others() {
    let map = vec![IdMapping {
        container_id: 0,
        host_id: 200_000,
        length: 65_536,
    }];
    let user = Some(UserNamespace {
        uids: map.clone(),
        gids: map,
    });
    let sysctls = [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into();
    let pod = Pod::start(Options {
        pid: PidNamespace::Pod,
        user,
        sysctls,
        ..Options::default()
    })
    .await;
    let init = pod.status().await.pid;
    let maps = std::fs::read_to_string(format!("/proc/{init}/uid_map")).unwrap();
    assert_eq!(
        maps.split_whitespace().collect::<Vec<_>>(),
        ["0", "200000", "65536"]
    );
    let user = &pod.info[info::USER_NAMESPACE];
    // runc from 1.2 on takes that for the process's own namespace.
    let of_a_process = user
        .strip_prefix("/proc/")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    assert!(!of_a_process, "{user}");
    let user = std::fs::metadata(user).unwrap().ino();
    for key in [info::IPC_NAMESPACE, info::UTS_NAMESPACE, info::PID_NAMESPACE] {
        let namespace = std::fs::File::open(&pod.info[key]).unwrap();
        // SAFETY: NS_GET_USERNS, see ioctl_nsfs(2), takes nothing and answers with a descriptor.
        let owner = unsafe {
            let fd = libc::ioctl(namespace.as_raw_fd(), 0xb701);
            assert!(fd >= 0, "{key}: {}", std::io::Error::last_os_error());
            std::fs::File::from_raw_fd(fd)
        };
        assert_eq!(owner.metadata().unwrap().ino(), user, "{key}");
    }
}

#[tokio::test]
async fn sysctls_of_the_node_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut pod = Pod::start(Options::default()).await.spec.clone();
    let id = Id::random().unwrap();
    let bundle = directory.path().join("pods").join(id.as_str());
    std::fs::create_dir_all(&bundle).unwrap();
    let client = Client::connect(&start_shim(&id, &bundle)).await.unwrap();
    let mut request = sandbox_api::CreateSandboxRequest::new();
    request.sandbox_id = id.to_string();
    pod.id = id.clone();
    for (name, network) in [("kernel.panic", true), ("net.ipv4.ip_forward", false)] {
        pod.sysctls = [(name.to_owned(), "1".to_owned())].into();
        pod.namespaces.network = network.then(|| "/proc/self/ns/net".into());
        request.options = Some(any(POD_SPEC_TYPE, serde_json::to_vec(&pod).unwrap())).into();
        let error = SandboxClient::new(client.clone())
            .create_sandbox(ctx(), &request)
            .await
            .unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(code_of::<()>(Err(error)), Code::INVALID_ARGUMENT);
    }
    assert!(delete_shim(&id, &bundle).status.success());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(directory.path().to_str().unwrap()));
}

#[tokio::test]
async fn requests_for_another_pod_or_of_another_shape_are_refused() {
    let pod = Pod::start(Options::default()).await;
    let mut request = sandbox_api::PingRequest::new();
    request.sandbox_id = "another".to_owned();
    assert_eq!(
        code_of(pod.sandbox().ping_sandbox(ctx(), &request).await),
        Code::NOT_FOUND
    );
    let mut create = sandbox_api::CreateSandboxRequest::new();
    create.sandbox_id = pod.id.to_string();
    assert_eq!(
        code_of(pod.sandbox().create_sandbox(ctx(), &create).await),
        Code::INVALID_ARGUMENT
    );
}

/// gVisor behind the same shim: its container's process is a kernel of its own.
#[tokio::test]
async fn runsc_runs_a_container() {
    let binary = Path::new("/usr/bin/runsc");
    if !binary.exists() {
        println!("skipped: runsc_runs_a_container: /usr/bin/runsc is not installed");
        return;
    }
    let args = ["--platform=ptrace", "--network=host", "--ignore-cgroups"]
        .map(str::to_owned)
        .to_vec();
    let pod = Pod::start(Options {
        binary: binary.to_owned(),
        args,
        ..Options::default()
    })
    .await;
    let one = pod.container(&["sh", "-c", "echo from gvisor; exit 7"]);
    pod.run(&one).await;
    assert_eq!(pod.wait(&one.id).await, 7);
    let log = std::fs::read_to_string(pod.log_of(&one.id)).unwrap();
    assert!(log.contains("stdout F from gvisor"), "{log}");
    assert_eq!(pod.delete(&one.id).await.unwrap(), 7);
    let two = pod.container(&["sleep", "1000"]);
    pod.run(&two).await;
    let done = pod
        .exec_sync(&two.id, &["sh", "-c", "echo inside; exit 3"], 30_000)
        .await
        .unwrap();
    assert_eq!((done.stdout.as_slice(), done.exit_code), (&b"inside\n"[..], 3));
    pod.kill(&two.id, libc::SIGKILL, true).await.unwrap();
    assert_eq!(pod.wait(&two.id).await, 137);
}
