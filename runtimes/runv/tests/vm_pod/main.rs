//! The real shim with a real QEMU, kernel and agent, driven by a ttrpc client as the daemon does.

mod faults;
mod rig;
mod sessions;

use std::path::Path;
use std::process::Command;

use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::pod_spec::{PidNamespace, RuntimeSpec, info};
use containerd_shim_protos::api;
use rig::{Rig, call, eventually, log_lines};
use serde_json::json;

/// Leaves the test by name where the machine cannot run it.
macro_rules! need_vm {
    ($name:literal) => {
        if let Some(reason) = rig::missing() {
            println!("skipped: {}: {reason}", $name);
            return;
        }
    };
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[tokio::test]
async fn a_pod_lives_and_leaves_nothing() {
    need_vm!("a_pod_lives_and_leaves_nothing");
    let rig = Rig::new();
    let clock = std::cell::Cell::new(std::time::Instant::now());
    let lap = |what: &str| {
        println!(
            "{what}: {} ms",
            clock.replace(std::time::Instant::now()).elapsed().as_millis()
        )
    };
    let shim = rig.pod().await;
    lap("shim and sandbox started");
    let (state, map) = shim.status().await;
    assert_eq!(state, "SANDBOX_READY");
    assert_eq!(map[info::ACCELERATION], "tcg");
    println!("boot: {} ms, kernel {}", map[info::BOOT_MS], map[info::KERNEL]);
    let host = nix::sys::utsname::uname()
        .unwrap()
        .release()
        .to_string_lossy()
        .into_owned();
    assert_ne!(map[info::KERNEL], host);

    let script = "echo out; echo err >&2; uname -r; hostname; id -u; echo x > /written; exit 7";
    let container = rig.container("c1", &["sh", "-c", script], |_| {});
    clock.set(std::time::Instant::now());
    shim.run(&container).await.unwrap();
    lap("first container created and started");
    assert_eq!(shim.wait("c1").await, 7);
    lap("first container ended");
    assert_eq!(
        log_lines(&container.log, "stdout"),
        ["out", &map[info::KERNEL], "pod-host", "0"]
    );
    assert_eq!(log_lines(&container.log, "stderr"), ["err"]);
    let record = ExitRecord::read(&container.bundle).unwrap().unwrap();
    assert_eq!((record.exit_code, record.oom_killed), (7, false));
    assert_eq!(
        std::fs::read_to_string(container.upper.join("written")).unwrap(),
        "x\n"
    );
    assert_eq!(shim.delete("c1").await, 7);

    // A second one in the same VM, with exec, signals and statistics.
    let container = rig.container("c2", &["sleep", "1000"], |_| {});
    shim.run(&container).await.unwrap();
    let answer = shim
        .exec("c2", &["sh", "-c", "echo hi; echo no >&2; exit 3"])
        .await;
    assert_eq!(
        (text(&answer.stdout), text(&answer.stderr), answer.exit_code),
        ("hi".into(), "no".into(), 3)
    );
    let answer = shim.exec(
        "c2",
        &[
            "sh",
            "-c",
            "cat /proc/1/cmdline; cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        ],
    );
    assert_eq!(text(&answer.await.stdout), "sleep\u{0}1000\u{0}80");
    let answer = shim.exec_limited("c2", &["sleep", "1000"], 500).await;
    assert!(answer.timed_out);
    let mut stats = api::StatsRequest::new();
    stats.id = "c2".into();
    let stats = shim.task.stats(call(), &stats).await.unwrap();
    assert!(!stats.stats.value.is_empty());
    shim.kill("c2", 9).await.unwrap();
    assert_eq!(shim.wait("c2").await, 137);
    clock.set(std::time::Instant::now());
    assert_eq!(shim.delete("c2").await, 137);
    lap("container deleted");
    shim.stop().await;
    lap("sandbox stopped");
    eventually("the shim ends", || {
        (!Path::new("/proc").join(rig.shim_pid().to_string()).exists()).then_some(())
    })
    .await;
    rig.assert_clean();
}

#[tokio::test]
async fn the_cni_address_answers_and_reaches_the_host() {
    need_vm!("the_cni_address_answers_and_reaches_the_host");
    let rig = Rig::new();
    let shim = rig.pod().await;
    let ping = Command::new("ping")
        .args(["-c", "3", "-W", "5", &rig.pod_address])
        .output();
    if let Ok(output) = ping {
        assert!(output.status.success(), "{}", text(&output.stdout));
    } else {
        println!(
            "skipped: ping from the host in the_cni_address_answers_and_reaches_the_host: needs iputils-ping"
        );
    }
    let script = "ip -o -4 addr show eth0; ip route; cat /sys/class/net/eth0/mtu; nc -l -p 8080 -e cat";
    let container = rig.container("c1", &["sh", "-c", script], |_| {});
    shim.run(&container).await.unwrap();
    let lines = eventually("the interface is listed", || {
        let lines = log_lines(&container.log, "stdout");
        lines.iter().any(|line| line == "1400").then_some(lines)
    })
    .await;
    assert!(lines[0].contains(&format!("{}/24", rig.pod_address)), "{lines:?}");
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with(&format!("default via {}", rig.host_address))),
        "{lines:?}"
    );
    // 1 MiB there and back: checksums and segmentation are left to the other side on both ways.
    let address = format!("{}:8080", rig.pod_address);
    let echoed = tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        let connect = || std::net::TcpStream::connect(&address);
        let begun = std::time::Instant::now();
        let mut stream = loop {
            match connect() {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed().as_secs() > 30 => panic!("{error}"),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(100)),
            }
        };
        let data: Vec<u8> = (0..1 << 20).map(|number: u32| number as u8).collect();
        let mut writer = stream.try_clone().unwrap();
        let sent = data.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut back = vec![0; data.len()];
        stream.read_exact(&mut back).unwrap();
        writing.join().unwrap();
        back == data
    });
    assert!(echoed.await.unwrap());
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn volumes_are_live_and_keep_their_limits() {
    need_vm!("volumes_are_live_and_keep_their_limits");
    let rig = Rig::new();
    let shim = rig.pod().await;
    let volume = tempfile::tempdir().unwrap();
    std::fs::write(volume.path().join("config"), "one").unwrap();
    std::fs::write(volume.path().join("single"), "file").unwrap();
    let later = volume.path().join("later");
    std::fs::create_dir(&later).unwrap();
    let container = rig.container("c1", &["sleep", "1000"], |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        let path = volume.path();
        for (destination, source, options) in [
            ("/ro", path.to_owned(), vec!["rbind", "rprivate", "ro"]),
            ("/rw", path.to_owned(), vec!["rbind", "rprivate", "rw"]),
            ("/etc/single", path.join("single"), vec!["rbind", "rw"]),
            ("/slave", path.to_owned(), vec!["rbind", "rslave"]),
        ] {
            mounts.push(json!({
                "destination": destination, "type": "bind", "source": source, "options": options,
            }));
        }
    });
    shim.run(&container).await.unwrap();
    let answer = shim
        .exec(
            "c1",
            &[
                "sh",
                "-c",
                "cat /ro/config /etc/single; echo new > /rw/from-guest",
            ],
        )
        .await;
    assert_eq!(text(&answer.stdout), "onefile", "{}", text(&answer.stderr));
    assert_eq!(
        std::fs::read_to_string(volume.path().join("from-guest")).unwrap(),
        "new\n"
    );
    let answer = shim.exec("c1", &["sh", "-c", "echo x > /ro/config"]).await;
    assert_ne!(answer.exit_code, 0);
    // As the kubelet updates a configMap: another file under the same name.
    std::fs::write(volume.path().join("config.new"), "two").unwrap();
    std::fs::rename(volume.path().join("config.new"), volume.path().join("config")).unwrap();
    for round in 0.. {
        let answer = shim.exec("c1", &["cat", "/ro/config"]).await;
        if text(&answer.stdout) == "two" {
            break;
        }
        assert!(round < 40, "the guest still sees {}", text(&answer.stdout));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let answer = shim
        .exec(
            "c1",
            &["sh", "-c", "echo shared > /dev/shm/x && stat -f -c %S /dev/shm"],
        )
        .await;
    assert_eq!(answer.exit_code, 0, "{}", text(&answer.stderr));
    shim.stop().await;
    assert_eq!(
        std::fs::read_to_string(volume.path().join("config")).unwrap(),
        "two"
    );
    rig.assert_clean();
}

#[tokio::test]
async fn what_the_host_mounts_later_appears_where_asked() {
    need_vm!("what_the_host_mounts_later_appears_where_asked");
    let rig = Rig::new();
    let shim = rig.pod().await;
    // A volume on a mount with shared propagation, as the kubelet's directories are.
    let volume = rig.state.path().join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    let mount =
        |arguments: &[&str]| assert!(Command::new("mount").args(arguments).status().unwrap().success());
    let path = volume.to_str().unwrap();
    mount(&["-t", "tmpfs", "none", path]);
    mount(&["--make-shared", path]);
    for directory in ["followed", "private"] {
        std::fs::create_dir(volume.join(directory)).unwrap();
    }
    let container = rig.container("c1", &["sleep", "1000"], |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (destination, option) in [("/slave", "rslave"), ("/private", "rprivate")] {
            mounts.push(json!({
                "destination": destination, "type": "bind", "source": volume, "options": ["rbind", option],
            }));
        }
    });
    shim.run(&container).await.unwrap();
    let later = volume.join("followed");
    mount(&["-t", "tmpfs", "none", later.to_str().unwrap()]);
    std::fs::write(later.join("file"), "later").unwrap();
    let answer = shim.exec("c1", &["cat", "/slave/followed/file"]).await;
    let private = shim.exec("c1", &["cat", "/private/followed/file"]).await;
    // virtiofsd keeps what the guest has looked up: the host cannot unmount it but lazily while the pod runs.
    assert!(
        Command::new("umount")
            .args(["-l", "-R", path])
            .status()
            .unwrap()
            .success()
    );
    shim.stop().await;
    assert_eq!(text(&answer.stdout), "later", "{}", text(&answer.stderr));
    assert_ne!(private.exit_code, 0);
    rig.assert_clean();
}

#[tokio::test]
async fn stop_overtakes_a_boot() {
    need_vm!("stop_overtakes_a_boot");
    let rig = Rig::new();
    let shim = rig.start().await;
    shim.create(&rig.bundle, &rig.spec()).await.unwrap();
    let begun = std::time::Instant::now();
    let (started, ()) = tokio::join!(shim.start_sandbox(), async {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        shim.stop().await;
    });
    assert!(started.is_err());
    assert!(begun.elapsed().as_secs() < 10);
    rig.assert_clean();
}

#[tokio::test]
async fn a_flood_of_output_is_kept_and_holds_up_nobody() {
    need_vm!("a_flood_of_output_is_kept_and_holds_up_nobody");
    let rig = Rig::new();
    let shim = rig.pod().await;
    let script =
        "i=0; while [ $i -lt 20000 ]; do echo line $i of a container that says a lot; i=$((i+1)); done";
    let flood = rig.container("c1", &["sh", "-c", script], |_| {});
    let quiet = rig.container("c2", &["sleep", "1000"], |_| {});
    shim.run(&quiet).await.unwrap();
    shim.run(&flood).await.unwrap();
    assert_eq!(text(&shim.exec("c2", &["id", "-u"]).await.stdout), "0");
    assert_eq!(shim.wait("c1").await, 0);
    let lines = log_lines(&flood.log, "stdout");
    assert_eq!(lines.len(), 20_000);
    assert!(
        lines
            .iter()
            .enumerate()
            .all(|(number, line)| line.starts_with(&format!("line {number} ")))
    );
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn a_killed_vmm_ends_its_containers() {
    need_vm!("a_killed_vmm_ends_its_containers");
    let rig = Rig::new();
    let shim = rig.pod().await;
    let container = rig.container("c1", &["sleep", "1000"], |_| {});
    shim.run(&container).await.unwrap();
    let (_, map) = shim.status().await;
    let pid: i32 = map[info::VMM_PID].parse().unwrap();
    // The VMM is confined: not root, no capability, nothing to gain.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_ne!(field("Uid:").split_whitespace().next().unwrap(), "0");
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    assert_eq!(shim.wait("c1").await, 137);
    assert_eq!(
        ExitRecord::read(&container.bundle).unwrap().unwrap().exit_code,
        137
    );
    for _ in 0..100 {
        if shim.status().await.0 == "SANDBOX_NOTREADY" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(shim.status().await.0, "SANDBOX_NOTREADY");
    assert_eq!(shim.delete("c1").await, 137);
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn delete_cleans_up_after_a_killed_shim() {
    need_vm!("delete_cleans_up_after_a_killed_shim");
    let rig = Rig::new();
    let shim = rig.pod().await;
    let container = rig.container("c1", &["sleep", "1000"], |_| {});
    shim.run(&container).await.unwrap();
    let (_, map) = shim.status().await;
    let vmm = Path::new("/proc").join(&map[info::VMM_PID]);
    assert!(vmm.exists());
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(rig.shim_pid()),
        nix::sys::signal::SIGKILL,
    )
    .unwrap();
    let output = rig.shim("delete");
    assert!(output.status.success(), "{}", text(&output.stderr));
    rig.assert_clean();
    let again = rig.shim("delete");
    assert!(again.status.success(), "{}", text(&again.stderr));
}

#[tokio::test]
async fn containers_share_pids_where_asked_and_are_limited() {
    need_vm!("containers_share_pids_where_asked_and_are_limited");
    let rig = Rig::new();
    let shim = rig.start().await;
    let mut spec = rig.spec();
    spec.namespaces.pid = PidNamespace::Pod;
    shim.create(&rig.bundle, &spec).await.unwrap();
    shim.start_sandbox().await.unwrap();
    let first = rig.container("c1", &["sleep", "1234"], |_| {});
    shim.run(&first).await.unwrap();
    let second = rig.container("c2", &["sleep", "1000"], |_| {});
    shim.run(&second).await.unwrap();
    let answer = shim.exec("c2", &["ps", "-o", "args"]).await;
    assert!(
        text(&answer.stdout).contains("sleep 1234"),
        "{}",
        text(&answer.stdout)
    );
    // More memory than its limit: killed by the guest's kernel, the others live.
    let hog = rig.container(
        "c3",
        &["sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=5"],
        |spec| {
            spec["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
        },
    );
    shim.run(&hog).await.unwrap();
    let status = shim.wait("c3").await;
    assert_ne!(status, 0);
    assert!(
        ExitRecord::read(&hog.bundle).unwrap().unwrap().oom_killed,
        "exit {status}"
    );
    assert_eq!(shim.exec("c1", &["id", "-u"]).await.exit_code, 0);
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn a_kernel_that_does_not_boot_is_named() {
    need_vm!("a_kernel_that_does_not_boot_is_named");
    let rig = Rig::new();
    for (what, stage) in [("garbage", "kernel"), ("elf", "kernel"), ("no agent", "agent")] {
        let rig = Rig::with_guest(rig.release.clone());
        let mut spec = rig.spec();
        let RuntimeSpec::Vm(vm) = &mut spec.runtime else {
            unreachable!()
        };
        let file = rig.state.path().join("file");
        match what {
            "garbage" => {
                std::fs::write(&file, "not a kernel").unwrap();
                vm.kernel.clone_from(&file);
            }
            // An executable that is no kernel: QEMU refuses it for its missing PVH note.
            "elf" => vm.kernel = "/bin/busybox".into(),
            _ => {
                std::fs::write(&file, []).unwrap();
                vm.initramfs.clone_from(&file);
            }
        }
        let shim = rig.start().await;
        let error = match shim.create(&rig.bundle, &spec).await {
            Err(error) => error,
            Ok(()) => shim.start_sandbox().await.unwrap_err(),
        };
        let text = error.to_string();
        assert!(text.contains(&format!("stage {stage}")), "{what}: {text}");
        shim.stop().await;
        rig.assert_clean();
    }
}

#[tokio::test]
async fn what_a_vm_cannot_be_is_refused() {
    need_vm!("what_a_vm_cannot_be_is_refused");
    let rig = Rig::new();
    let shim = rig.start().await;
    let refused = async |change: &dyn Fn(&mut catamaran_sandbox::pod_spec::PodSpec), word: &str| {
        let mut spec = rig.spec();
        change(&mut spec);
        let error = shim.create(&rig.bundle, &spec).await.unwrap_err();
        let containerd_shim_protos::ttrpc::Error::RpcStatus(status) = &error else {
            panic!("{error}")
        };
        assert_eq!(
            status.code(),
            containerd_shim_protos::ttrpc::Code::INVALID_ARGUMENT,
            "{error}"
        );
        assert!(status.message().contains(word), "{error}");
    };
    refused(&|spec| spec.namespaces.host_ipc = true, "host_ipc").await;
    refused(&|spec| spec.namespaces.pid = PidNamespace::Host, "pid").await;
    refused(&|spec| spec.namespaces.network = None, "network").await;
    rig.assert_clean();
}

#[tokio::test]
async fn every_installed_kernel_runs_a_pod() {
    need_vm!("every_installed_kernel_runs_a_pod");
    let kernels = rig::installed_kernels();
    if kernels.is_empty() {
        println!("skipped: every_installed_kernel_runs_a_pod: no /boot/vmlinuz-*");
    }
    for kernel in kernels {
        let rig = Rig::with_kernel(&kernel);
        let shim = rig.pod().await;
        let (_, map) = shim.status().await;
        println!("{}: boot {} ms", map[info::KERNEL], map[info::BOOT_MS]);
        let container = rig.container("c1", &["sh", "-c", "uname -r; cat /proc/1/cgroup"], |_| {});
        shim.run(&container).await.unwrap();
        assert_eq!(shim.wait("c1").await, 0);
        assert_eq!(log_lines(&container.log, "stdout")[0], map[info::KERNEL]);
        shim.stop().await;
        rig.assert_clean();
    }
}
