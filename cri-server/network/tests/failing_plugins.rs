//! Plugins that fail in every way, as scripts: the error says which one and why, and DEL leaves nothing.
//! Needs root, the CNI plugins (package containernetworking-plugins) and iptables.

mod lab;

use std::time::{Duration, Instant};

use catamaran_network::{Network, NetworkConfig, NetworkError, PodNetwork};
use lab::{Lab, names};

/// Attaches with the bridge plugin followed by `script`, which must fail; gives the error after checking that
/// nothing is left.
async fn failing(lab: &Lab, script: &str) -> NetworkError {
    lab.script("faulty", script);
    lab.conflist("1.0.0", &format!(r#"{},{{"type":"faulty"}}"#, lab.bridge()));
    let pod = lab.pod("a").await;
    let error = lab.network.attach(&pod).await.unwrap_err();
    lab.network.remove_netns(&pod.id).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0], "{error}");
    assert!(names(&lab.config.netns_dir).is_empty());
    error
}

/// A script that does `body` for ADD and nothing for DEL.
fn on_add(body: &str) -> String {
    format!("cat >/dev/null; [ \"$CNI_COMMAND\" = ADD ] || exit 0\n{body}")
}

#[tokio::test]
async fn a_refusal_is_passed_on_in_the_plugins_words() {
    let lab = Lab::new();
    let body =
        r#"echo '{"cniVersion":"1.0.0","code":107,"msg":"no addresses left","details":"pool x"}'; exit 1"#;
    let error = failing(&lab, &on_add(body)).await.to_string();
    assert_eq!(
        error,
        "cni plugin faulty refused ADD: no addresses left: pool x (code 107)"
    );
}

#[tokio::test]
async fn a_plugin_that_breaks_the_protocol_is_named() {
    for (body, expected) in [
        ("echo garbage; exit 0", "its result is no JSON"),
        ("exit 0", "its result is no JSON"),
        ("echo '[]'; exit 0", "the result is not an object"),
        (
            r#"echo '{"ips":[{"address":"nowhere"}]}'"#,
            "not in CIDR notation",
        ),
        ("echo went wrong >&2; exit 3", "went wrong"),
        ("echo garbage; exit 1", "garbage"),
        ("kill -9 $$", "signal: 9"),
        ("head -c 3000000 /dev/zero; exit 0", "more than 1048576 bytes"),
        ("head -c 3000000 /dev/zero >&2; exit 3", "exit status: 3"),
        ("(sleep 4) & echo '{}'", "left its output open"),
    ] {
        let lab = Lab::new();
        let error = failing(&lab, &on_add(body)).await;
        assert!(
            matches!(&error, NetworkError::Protocol { plugin, verb: "ADD", .. } if plugin == "faulty"),
            "{error}"
        );
        assert!(error.to_string().contains(expected), "{body}: {error}");
        assert!(error.to_string().len() < 2000, "{body}");
    }
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_children() {
    let mut lab = Lab::new();
    lab.config.plugin_timeout = Duration::from_millis(1500);
    lab.network = Network::new(lab.config.clone());
    let pids = lab.dir.path().join("pids");
    let body = format!("sleep 1000 & echo $! $$ > {}; wait", pids.display());
    let start = Instant::now();
    let error = failing(&lab, &on_add(&body)).await;
    assert!(start.elapsed() < Duration::from_secs(15));
    assert_eq!(
        error.to_string(),
        "cni plugin faulty did not finish ADD within 1.5 s and was killed"
    );
    let pids = std::fs::read_to_string(pids).unwrap();
    for pid in pids.split_whitespace() {
        let stat = format!("/proc/{pid}/stat");
        let until = Instant::now() + Duration::from_secs(5);
        // Gone, or a zombie whose new parent has not looked yet.
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < until, "process {pid} survived");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[tokio::test]
async fn a_missing_plugin_is_found_out_before_anything_is_done() {
    let lab = Lab::new();
    lab.conflist("1.0.0", r#"{"type":"no-such-plugin"}"#);
    let pod = lab.pod("a").await;
    let error = lab.network.attach(&pod).await.unwrap_err().to_string();
    assert!(error.contains("\"no-such-plugin\" is not in"), "{error}");
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_failed_del_is_kept_for_another_try() {
    let lab = Lab::new();
    let broken = lab.dir.path().join("broken");
    std::fs::write(&broken, "").unwrap();
    let script = format!(
        "cat >/dev/null; [ -e {} ] || {{ echo '{{}}'; exit 0; }}\n\
                          echo '{{\"code\":11,\"msg\":\"busy '$CNI_COMMAND'\"}}'; exit 1",
        broken.display()
    );
    lab.script("faulty", &script);
    lab.conflist("1.0.0", &format!(r#"{{"type":"faulty"}},{}"#, lab.bridge()));
    let pod = lab.pod("a").await;
    let error = lab.network.attach(&pod).await.unwrap_err();
    assert!(matches!(error, NetworkError::Undo { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("busy ADD") && text.contains("busy DEL"), "{text}");
    assert_eq!(lab.network.attached().unwrap(), std::slice::from_ref(&pod.id));
    lab.network.detach(&pod).await.unwrap_err();
    std::fs::remove_file(&broken).unwrap();
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn del_goes_on_to_the_other_plugins_after_a_failure() {
    let lab = Lab::new();
    let broken = lab.dir.path().join("broken");
    let script = format!(
        "cat > {0}.$CNI_COMMAND; [ $CNI_COMMAND = DEL ] && [ -e {0} ] && exit 4; cat {0}.ADD.result 2>/dev/null || echo '{{}}'",
        broken.display()
    );
    lab.script("faulty", &script);
    lab.conflist("1.0.0", &format!(r#"{},{{"type":"faulty"}}"#, lab.bridge()));
    let pod = lab.pod("a").await;
    lab.network.attach(&pod).await.unwrap();
    std::fs::write(&broken, "").unwrap();
    lab.network.detach(&pod).await.unwrap_err();
    let left = lab.left_now();
    assert!(
        left.iter().all(|left| left.starts_with("record")),
        "the bridge's part is undone: {left:?}"
    );
    let stdin = std::fs::read_to_string(format!("{}.DEL", broken.display())).unwrap();
    let request: serde_json::Value = serde_json::from_str(&stdin).unwrap();
    assert_eq!(request["prevResult"]["cniVersion"], "1.0.0", "{stdin}");
    std::fs::remove_file(&broken).unwrap();
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_dropped_attach_is_undone_by_detach() {
    let lab = Lab::new();
    lab.script("faulty", &on_add("sleep 1000"));
    lab.conflist("1.0.0", &format!(r#"{},{{"type":"faulty"}}"#, lab.bridge()));
    let pod = lab.pod("a").await;
    let dropped = tokio::time::timeout(Duration::from_secs(2), lab.network.attach(&pod)).await;
    assert!(dropped.is_err());
    assert_eq!(lab.network.attached().unwrap(), std::slice::from_ref(&pod.id));
    assert!(lab.left_now().iter().any(|left| left.starts_with("lease")));
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn an_interrupted_attach_is_undone_by_the_next() {
    let lab = Lab::new();
    lab.script(
        "faulty",
        &on_add(&format!(
            "[ -e {0} ] || sleep 1000; cat {0}",
            lab.dir.path().join("ok").display()
        )),
    );
    lab.conflist("1.0.0", &format!(r#"{},{{"type":"faulty"}}"#, lab.bridge()));
    let pod = lab.pod("a").await;
    let _ = tokio::time::timeout(Duration::from_secs(2), lab.network.attach(&pod)).await;
    let result = r#"{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.0.0.9/24"}]}"#;
    std::fs::write(lab.dir.path().join("ok"), result).unwrap();
    let attachment = lab.network.attach(&pod).await.unwrap();
    assert_eq!(
        attachment.result["cniVersion"], "1.0.0",
        "brought to the list's version"
    );
    assert!(attachment.result["ips"][0].get("version").is_none());
    lab.network.detach(&pod).await.unwrap();
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_plugin_gets_what_the_spec_says() {
    let lab = Lab::new();
    let seen = lab.dir.path().join("seen");
    let script = format!(
        "env > {0}.$CNI_COMMAND.env; cat > {0}.$CNI_COMMAND.json; echo '{{\"cniVersion\":\"1.0.0\"}}'",
        seen.display()
    );
    lab.script("witness", &script);
    lab.conflist(
        "1.0.0",
        r#"{"type":"witness","capabilities":{"io.kubernetes.cri.pod-annotations":true,"cgroupPath":true,"dns":true}}"#,
    );
    let pod = PodNetwork {
        annotations: [("k".to_owned(), "v".to_owned())].into(),
        cgroup_path: "/kubepods/pod1".to_owned(),
        mac: Some("not declared".to_owned()),
        dns: catamaran_network::DnsConfig {
            servers: vec!["10.0.0.10".to_owned()],
            ..Default::default()
        },
        ..lab.pod("a").await
    };
    lab.network.attach(&pod).await.unwrap();
    lab.network.remove_netns(&pod.id).await.unwrap();
    lab.network.detach(&pod).await.unwrap();
    let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", seen.display())).unwrap();
    let request: serde_json::Value = serde_json::from_str(&read("ADD.json")).unwrap();
    assert_eq!(
        request["runtimeConfig"],
        serde_json::json!({
            "io.kubernetes.cri.pod-annotations": {"k": "v"},
            "cgroupPath": "/kubepods/pod1",
            "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []},
        })
    );
    let (add, del) = (read("ADD.env"), read("DEL.env"));
    let arguments = format!(
        "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=a;\
         K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID=uid-a",
        pod.id
    );
    for line in [
        arguments.as_str(),
        "CNI_IFNAME=eth0",
        &format!("CNI_CONTAINERID={}", pod.id),
        &format!("CNI_NETNS={}", pod.netns.display()),
    ] {
        assert!(add.lines().any(|have| have == line), "{line} in {add}");
    }
    assert!(
        del.lines().any(|have| have == "CNI_NETNS="),
        "the namespace is gone: {del}"
    );
    assert!(del.lines().any(|have| have == arguments));
}

#[tokio::test]
async fn status_asks_the_plugins_from_version_1_1_on() {
    let lab = Lab::new();
    lab.script(
        "moody",
        r#"cat >/dev/null; [ $CNI_COMMAND = STATUS ] && { echo '{"code":50,"msg":"agent is down"}'; exit 1; }; exit 0"#,
    );
    lab.conflist("1.1.0", r#"{"type":"moody"}"#);
    lab.network.status().expect("the configuration is good");
    assert_eq!(
        lab.network.ready().await.unwrap_err(),
        "cni plugin moody refused STATUS: agent is down (code 50)"
    );
    lab.conflist("1.0.0", r#"{"type":"moody"}"#);
    lab.network.ready().await.expect("1.0 has no STATUS");
}

/// The other process of the next test.
#[tokio::test]
#[ignore = "started by a_plugin_that_outlives_the_daemon_is_waited_for"]
async fn attach_until_killed() {
    let dir = std::path::PathBuf::from(std::env::var_os("CATAMARAN_NETWORK_DIR").unwrap());
    let config = NetworkConfig {
        conf_dir: dir.join("conf"),
        bin_dirs: vec![dir.join("bin")],
        netns_dir: dir.join("netns"),
        cache_dir: dir.join("cache"),
        default_bridge: String::new(),
        default_subnet: String::new(),
        default_ipam_dir: dir.join("ipam"),
        plugin_timeout: Duration::from_secs(60),
    };
    let pod = PodNetwork {
        id: "killed".to_owned(),
        netns: dir.join("netns/killed"),
        ..Default::default()
    };
    let _ = Network::new(config).attach(&pod).await;
}

/// An ADD of `lab`'s network whose daemon is killed once `begun` holds.
fn kill_the_daemon_in_add(lab: &Lab, begun: impl Fn() -> bool) {
    let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "attach_until_killed", "--ignored"])
        .env("CATAMARAN_NETWORK_DIR", lab.dir.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !begun() {
        assert!(Instant::now() < deadline, "ADD did not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert_eq!(lab.network.attached().unwrap(), ["killed"]);
}

#[tokio::test]
async fn a_plugin_that_outlives_the_daemon_is_waited_for() {
    let lab = Lab::new();
    let log = lab.dir.path().join("log");
    let body = format!(
        "cat >/dev/null; echo $CNI_COMMAND >> {0}; [ $CNI_COMMAND = DEL ] && exit 0\n\
                        sleep 2; echo end >> {0}; echo '{{}}'",
        log.display()
    );
    lab.script("slow", &body);
    lab.conflist("1.0.0", r#"{"type":"slow"}"#);
    let read = || std::fs::read_to_string(&log).unwrap_or_default();
    kill_the_daemon_in_add(&lab, || read().contains("ADD"));
    lab.network.detach_id("killed").await.unwrap();
    assert_eq!(read(), "ADD\nend\nDEL\n");
    assert_eq!(lab.leftovers(), [""; 0]);
}

#[tokio::test]
async fn a_plugin_that_hangs_beyond_the_daemon_is_killed_before_del() {
    let mut lab = Lab::new();
    lab.config.plugin_timeout = Duration::from_millis(700);
    lab.network = Network::new(lab.config.clone());
    let (log, pids) = (lab.dir.path().join("log"), lab.dir.path().join("pids"));
    let gone = "for p in $(cat PIDS); do kill -0 $p 2>/dev/null && ! grep -q ') Z ' /proc/$p/stat && echo alive $p >> LOG; done";
    let body = format!(
        "cat >/dev/null\nif [ $CNI_COMMAND = DEL ]; then {gone}; echo DEL >> LOG; exit 0; fi\n\
         sleep 1000 & echo $! $$ > PIDS; wait; echo late >> LOG; echo '{{}}'"
    );
    let body = body
        .replace("LOG", &log.display().to_string())
        .replace("PIDS", &pids.display().to_string());
    lab.script("hangs", &body);
    lab.conflist("1.0.0", r#"{"type":"hangs"}"#);
    kill_the_daemon_in_add(&lab, || {
        std::fs::read_to_string(&pids).is_ok_and(|pids| pids.ends_with('\n'))
    });
    let started = Instant::now();
    lab.network.detach_id("killed").await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(6),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "DEL\n");
    assert_eq!(lab.leftovers(), [""; 0]);
}
