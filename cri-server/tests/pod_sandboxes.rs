//! Pod sandboxes on a real daemon: failures at each step leave nothing behind, a daemon that was killed takes
//! over what lives and undoes what was half made, and a repeated request joins the first.

mod daemon;

use std::time::{Duration, Instant};

use catamaran::cri::api::{
    CheckpointContainerRequest, ListPodSandboxRequest, PodSandboxState, PodSandboxStatusRequest,
    RemovePodSandboxRequest, StopPodSandboxRequest,
};
use daemon::{Daemon, pod, real_shim, write_script};
use tonic::Code;

fn status_of(id: &str) -> PodSandboxStatusRequest {
    PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: false,
    }
}

async fn remove(daemon: &Daemon, id: &str) {
    let mut client = daemon.client().await;
    client
        .stop_pod_sandbox(StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        })
        .await
        .unwrap();
    client
        .remove_pod_sandbox(RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        })
        .await
        .unwrap();
}

async fn run(daemon: &Daemon, name: &str) -> String {
    let mut client = daemon.client().await;
    client
        .run_pod_sandbox(pod(name))
        .await
        .unwrap()
        .into_inner()
        .pod_sandbox_id
}

async fn states(daemon: &Daemon) -> Vec<(String, PodSandboxState)> {
    let mut client = daemon.client().await;
    let items = client
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await
        .unwrap()
        .into_inner()
        .items;
    items
        .into_iter()
        .map(|pod| (pod.id.clone(), pod.state()))
        .collect()
}

#[tokio::test]
async fn a_pod_comes_and_goes_without_a_rest() {
    real_shim();
    let daemon = Daemon::start("").await;
    let mut client = daemon.client().await;
    let id = run(&daemon, "a").await;
    let status = client
        .pod_sandbox_status(status_of(&id))
        .await
        .unwrap()
        .into_inner()
        .status
        .unwrap();
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.network.unwrap().ip, "10.9.8.7");
    let again = client.run_pod_sandbox(pod("a")).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: id.clone(),
    };
    client.stop_pod_sandbox(stop.clone()).await.unwrap();
    client.stop_pod_sandbox(stop.clone()).await.unwrap();
    assert_eq!(
        states(&daemon).await,
        [(id.clone(), PodSandboxState::SandboxNotready)]
    );
    assert!(daemon.shims_ended().await, "the shim ends with its sandbox");
    remove(&daemon, &id).await;
    client
        .stop_pod_sandbox(stop)
        .await
        .expect("an unknown pod is stopped");
    assert_eq!(
        client
            .pod_sandbox_status(status_of(&id))
            .await
            .unwrap_err()
            .code(),
        Code::NotFound
    );
    assert_eq!(daemon.left().await, Vec::<String>::new());
    assert_eq!(daemon.cni_calls(), ["ADD", "DEL"]);
}

#[tokio::test]
async fn a_plugin_that_fails_is_told_and_everything_is_undone() {
    real_shim();
    let daemon = Daemon::start("").await;
    let mut client = daemon.client().await;
    daemon.plugin("fail", true);
    let error = client.run_pod_sandbox(pod("a")).await.unwrap_err();
    assert!(error.message().contains("out of addresses"), "{error}");
    assert_eq!(daemon.left().await, Vec::<String>::new());
    assert!(daemon.cni_calls().contains(&"DEL".to_owned()));
    assert_eq!(states(&daemon).await, []);
    daemon.plugin("fail", false);
    let id = run(&daemon, "a").await;
    remove(&daemon, &id).await;
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_shim_that_does_not_start_is_told_and_everything_is_undone() {
    let dir = tempfile::tempdir().unwrap();
    let shim = dir.path().join("shim");
    write_script(
        &shim,
        "#!/bin/sh\nfor last; do :; done\n[ \"$last\" = start ] || exit 0\necho 'out of luck' >&2\nexit 3\n",
    );
    let daemon = Daemon::start(&format!("handlers: {{runc: {{shim: {}}}}}\n", shim.display())).await;
    let error = daemon.client().await.run_pod_sandbox(pod("a")).await.unwrap_err();
    assert!(error.message().contains("out of luck"), "{error}");
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_rest_that_cannot_be_undone_stays_on_record_and_can_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let shim = dir.path().join("shim");
    // Fails whatever it is asked, until `mended` exists; then only `start`.
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\nif [ \"$last\" = delete ] && [ -e {}/mended ]; then exit 0; fi\necho \"no $last\" >&2\nexit 3\n",
        dir.path().display()
    );
    write_script(&shim, &script);
    let daemon = Daemon::start(&format!("handlers: {{runc: {{shim: {}}}}}\n", shim.display())).await;
    let error = daemon.client().await.run_pod_sandbox(pod("a")).await.unwrap_err();
    assert!(
        error.message().contains("no start") && error.message().contains("undoing sandbox failed"),
        "{error}"
    );
    let left = states(&daemon).await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].1, PodSandboxState::SandboxNotready);
    std::fs::write(dir.path().join("mended"), "").unwrap();
    remove(&daemon, &left[0].0).await;
    assert_eq!(states(&daemon).await, []);
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_repeated_request_joins_the_first() {
    real_shim();
    let daemon = Daemon::start("").await;
    daemon.plugin("hang", true);
    let (mut one, mut two) = (daemon.client().await, daemon.client().await);
    let first = tokio::spawn(async move { one.run_pod_sandbox(pod("a")).await });
    daemon.wait_for_cni("ADD").await;
    let second = tokio::spawn(async move { two.run_pod_sandbox(pod("a")).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        states(&daemon).await,
        [],
        "a pod that is being created is not listed"
    );
    daemon.plugin("hang", false);
    let first = first.await.unwrap().unwrap().into_inner().pod_sandbox_id;
    let second = second.await.unwrap().unwrap().into_inner().pod_sandbox_id;
    assert_eq!(first, second);
    assert_eq!(daemon.cni_calls(), ["ADD"]);
    remove(&daemon, &first).await;
}

#[tokio::test]
async fn an_attempt_whose_caller_went_away_is_given_to_the_next() {
    real_shim();
    let daemon = Daemon::start("").await;
    daemon.plugin("hang", true);
    let mut client = daemon.client().await;
    let caller = tokio::spawn(async move { client.run_pod_sandbox(pod("a")).await });
    daemon.wait_for_cni("ADD").await;
    caller.abort();
    let _ = caller.await;
    daemon.plugin("hang", false);
    let made = loop {
        match states(&daemon).await.as_slice() {
            [] => tokio::time::sleep(Duration::from_millis(20)).await,
            [(id, _)] => break id.clone(),
            more => panic!("{more:?}"),
        }
    };
    assert_eq!(run(&daemon, "a").await, made);
    remove(&daemon, &made).await;
}

#[tokio::test]
async fn a_daemon_killed_while_it_created_a_pod_undoes_it_at_its_next_start() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    daemon.plugin("hang", true);
    let mut client = daemon.client().await;
    let caller = tokio::spawn(async move { client.run_pod_sandbox(pod("a")).await });
    daemon.wait_for_cni("ADD").await;
    daemon.kill();
    assert!(caller.await.unwrap().is_err());
    assert_ne!(
        daemon.left().await,
        Vec::<String>::new(),
        "the test needs something to undo"
    );
    daemon.plugin("hang", false);
    daemon.spawn().await;
    assert_eq!(states(&daemon).await, []);
    assert_eq!(daemon.left().await, Vec::<String>::new());
    let id = run(&daemon, "a").await;
    remove(&daemon, &id).await;
}

#[tokio::test]
async fn an_undo_that_hangs_does_not_hold_the_start_and_a_retry_waits_for_it() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let other = run(&daemon, "other").await;
    daemon.plugin("hang", true);
    let mut client = daemon.client().await;
    let caller = tokio::spawn(async move { client.run_pod_sandbox(pod("a")).await });
    while daemon.cni_calls() != ["ADD", "ADD"] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.kill();
    assert!(caller.await.unwrap().is_err());
    daemon.plugin("hang-del", true);
    daemon.plugin("hang", false);
    let begun = Instant::now();
    daemon.spawn().await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // What is being undone is not listed; what lives is served.
    assert_eq!(
        states(&daemon).await,
        [(other.clone(), PodSandboxState::SandboxReady)]
    );
    let mut client = daemon.client().await;
    let retry = tokio::spawn(async move { client.run_pod_sandbox(pod("a")).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        !retry.is_finished(),
        "the name is in use until the undo has ended"
    );
    daemon.plugin("hang-del", false);
    let id = retry.await.unwrap().unwrap().into_inner().pod_sandbox_id;
    for id in [&id, &other] {
        remove(&daemon, id).await;
    }
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

fn signal(name: &str, pid: i32) {
    let status = std::process::Command::new("kill")
        .args([name, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn a_shim_that_is_slow_while_the_daemon_starts_is_adopted() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let id = run(&daemon, "a").await;
    let shim = daemon.shim_of(&id);
    signal("-STOP", shim);
    daemon.kill();
    daemon.spawn().await;
    assert_eq!(
        states(&daemon).await,
        [(id.clone(), PodSandboxState::SandboxReady)]
    );
    tokio::time::sleep(Duration::from_secs(3)).await;
    signal("-CONT", shim);
    for _ in 0..100 {
        let mut client = daemon.client().await;
        let request = PodSandboxStatusRequest {
            verbose: true,
            ..status_of(&id)
        };
        let info = client
            .pod_sandbox_status(request)
            .await
            .unwrap()
            .into_inner()
            .info;
        if info["info"].contains(r#""shimAlive":true"#) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(
        states(&daemon).await,
        [(id.clone(), PodSandboxState::SandboxReady)]
    );
    assert_eq!(daemon.shim_of(&id), shim);
    remove(&daemon, &id).await;
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_pod_whose_shim_hangs_can_be_stopped() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let id = run(&daemon, "a").await;
    signal("-STOP", daemon.shim_of(&id));
    daemon.kill();
    daemon.spawn().await;
    remove(&daemon, &id).await;
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn what_no_record_names_is_removed() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let (dead, alive) = (run(&daemon, "dead").await, run(&daemon, "alive").await);
    let shim = daemon.shim_of(&dead);
    daemon.kill();
    signal("-KILL", shim);
    // The kernel takes a moment to end what is killed.
    for _ in 0..100 {
        if daemon.shims() == [daemon.shim_of(&alive)] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(
        daemon.shims(),
        [daemon.shim_of(&alive)],
        "the shim of {alive} lives"
    );
    std::fs::remove_file(daemon.path("root/state.redb")).unwrap();
    daemon.spawn().await;
    assert_eq!(states(&daemon).await, []);
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_daemon_that_was_killed_takes_its_pods_over() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let (a, b) = (run(&daemon, "a").await, run(&daemon, "b").await);
    daemon.kill();
    daemon.spawn().await;
    let mut found = states(&daemon).await;
    found.sort();
    let mut wanted = vec![
        (a.clone(), PodSandboxState::SandboxReady),
        (b.clone(), PodSandboxState::SandboxReady),
    ];
    wanted.sort();
    assert_eq!(found, wanted);
    assert_eq!(
        daemon
            .client()
            .await
            .run_pod_sandbox(pod("a"))
            .await
            .unwrap_err()
            .code(),
        Code::AlreadyExists
    );
    for id in [&a, &b] {
        remove(&daemon, id).await;
    }
    assert_eq!(daemon.left().await, Vec::<String>::new());
    assert_eq!(daemon.cni_calls(), ["ADD", "ADD", "DEL", "DEL"]);
}

#[tokio::test]
async fn a_pod_whose_shim_died_is_not_ready_and_can_be_removed() {
    real_shim();
    let mut daemon = Daemon::start("").await;
    let (seen, unseen) = (run(&daemon, "seen").await, run(&daemon, "unseen").await);
    signal("-KILL", daemon.shim_of(&seen));
    for _ in 0..200 {
        if states(&daemon)
            .await
            .contains(&(seen.clone(), PodSandboxState::SandboxNotready))
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        states(&daemon)
            .await
            .contains(&(seen.clone(), PodSandboxState::SandboxNotready))
    );
    let other = daemon.shim_of(&unseen);
    daemon.kill();
    signal("-KILL", other);
    daemon.spawn().await;
    assert!(
        states(&daemon)
            .await
            .iter()
            .all(|(_, state)| *state == PodSandboxState::SandboxNotready)
    );
    for id in [&seen, &unseen] {
        remove(&daemon, id).await;
    }
    assert_eq!(daemon.left().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_second_daemon_on_the_same_directories_is_refused() {
    let daemon = Daemon::start("").await;
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_catamaran"))
        .arg("serve")
        .arg("--config")
        .arg(daemon.path("config.yaml"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("another catamaran runs on"), "{said}");
}

#[tokio::test]
async fn what_is_not_served_or_not_meant_is_refused_by_name() {
    let daemon = Daemon::start("").await;
    let mut client = daemon.client().await;
    for (container_id, timeout, code) in [
        ("", 0, Code::InvalidArgument),
        ("gone", -1, Code::InvalidArgument),
        ("gone", 0, Code::NotFound),
    ] {
        let request = CheckpointContainerRequest {
            container_id: container_id.to_owned(),
            location: "/x.tar".to_owned(),
            timeout,
        };
        let error = client.checkpoint_container(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    let mut unknown = pod("a");
    unknown.runtime_handler = "kata".to_owned();
    let error = client.run_pod_sandbox(unknown).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("known are runc, runv"), "{error}");
    let mut nameless = pod("a");
    nameless
        .config
        .as_mut()
        .unwrap()
        .metadata
        .as_mut()
        .unwrap()
        .name
        .clear();
    let error = client.run_pod_sandbox(nameless).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("config.metadata.name"), "{error}");
    assert_eq!(daemon.left().await, Vec::<String>::new());
}
