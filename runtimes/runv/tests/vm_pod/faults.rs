//! Guests that mean harm, and helpers that end: what the host keeps, and what it says.

use std::path::Path;

use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::pod_spec::info;
use catamaran_sandbox::protocol::OCI_RESOURCES_TYPE;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::json;

use crate::rig::{self, Rig, Shim, call};
use crate::text;

/// Processes of the pod's virtiofsd, by their command line.
fn virtiofsd(rig: &Rig) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let ours = line.contains("virtiofsd") && line.contains(rig.id.as_str());
            ours.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
        })
        .collect()
}

fn oom_score_adj(pid: i32) -> i32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    text.trim().parse().unwrap()
}

async fn becomes_not_ready(shim: &Shim) {
    for _ in 0..500 {
        if shim.status().await.0 == "SANDBOX_NOTREADY" {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the sandbox is still {}", shim.status().await.0);
}

#[tokio::test]
async fn a_guest_that_mounts_the_whole_share_harms_only_itself() {
    if let Some(reason) = rig::missing() {
        println!("skipped: a_guest_that_mounts_the_whole_share_harms_only_itself: {reason}");
        return;
    }
    let rig = Rig::new();
    let shim = rig.pod().await;
    let container = rig.container("c1", &["sleep", "1000"], |spec| {
        for kind in ["bounding", "effective", "permitted"] {
            let capabilities = spec["process"]["capabilities"][kind].as_array_mut().unwrap();
            capabilities.push("CAP_SYS_ADMIN".into());
        }
    });
    shim.run(&container).await.unwrap();
    let script = "busybox mkdir /share && busybox mount -t virtiofs catamaran /share && cd /share || exit 1; \
                  echo x > foreign; echo x > c1/foreign; busybox mkdir c1/mounts c2; busybox ln -s / c3; \
                  busybox mv c1 c4; echo mine > c1/rootfs/tmp/mine; busybox find . -maxdepth 2";
    let answer = shim.exec("c1", &["sh", "-c", script]).await;
    assert_eq!(
        text(&answer.stdout),
        ".\n./c1\n./c1/rootfs",
        "{}",
        text(&answer.stderr)
    );
    assert_eq!(
        text(&answer.stderr).matches("Read-only file system").count(),
        6,
        "{}",
        text(&answer.stderr)
    );
    assert!(container.upper.join("tmp/mine").exists());
    // However it came there, a foreign file does not keep container or pod.
    let tree = rig.bundle.join("share/tree");
    std::fs::write(tree.join("c1/foreign"), "x").unwrap();
    std::os::unix::fs::symlink("/", tree.join("link")).unwrap();
    shim.kill("c1", 9).await.unwrap();
    assert_eq!(shim.wait("c1").await, 137);
    shim.delete("c1").await;
    assert!(!tree.join("c1").exists());
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn an_exec_out_of_time_goes_with_its_children() {
    if let Some(reason) = rig::missing() {
        println!("skipped: an_exec_out_of_time_goes_with_its_children: {reason}");
        return;
    }
    let rig = Rig::new();
    let shim = rig.pod().await;
    // CPUs of the host that the guest does not have.
    let container = rig.container("c1", &["sleep", "1000"], |spec| {
        spec["linux"]["resources"] = json!({ "cpu": { "cpus": "1", "mems": "1", "shares": 512 } });
    });
    shim.run(&container).await.unwrap();
    let script = "sleep 2001 & busybox setsid sleep 2002 & (sleep 2003 & wait) & wait";
    let answer = shim.exec_limited("c1", &["sh", "-c", script], 2000).await;
    assert!(answer.timed_out);
    let mut left = String::new();
    for _ in 0..50 {
        left = text(&shim.exec("c1", &["ps", "-o", "args"]).await.stdout);
        if !left.contains("sleep 200") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(!left.contains("sleep 200"), "{left}");
    assert!(left.contains("sleep 1000"), "{left}");
    let mut update = api::UpdateTaskRequest::new();
    update.id = "c1".into();
    update.resources = Some(Any {
        type_url: OCI_RESOURCES_TYPE.into(),
        value: json!({ "cpu": { "cpus": "1", "shares": 256 } })
            .to_string()
            .into_bytes(),
        ..Default::default()
    })
    .into();
    shim.task.update(call(), &update).await.unwrap();
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn a_pod_that_lost_its_virtiofsd_ends() {
    if let Some(reason) = rig::missing() {
        println!("skipped: a_pod_that_lost_its_virtiofsd_ends: {reason}");
        return;
    }
    let rig = Rig::new();
    let shim = rig.start().await;
    // As the daemon's unit has it, but upwards, which needs no privilege: nothing of it is the VM's.
    let of_shim = format!("/proc/{}/oom_score_adj", rig.shim_pid());
    std::fs::write(of_shim, "300").unwrap();
    shim.create(&rig.bundle, &rig.spec()).await.unwrap();
    shim.start_sandbox().await.unwrap();
    let vmm: i32 = shim.status().await.1[info::VMM_PID].parse().unwrap();
    assert_eq!(oom_score_adj(vmm), 0);
    for (name, wanted) in [("c1", 700), ("c2", 500), ("c3", 900)] {
        let container = rig.container(name, &["sleep", "1000"], |spec| {
            spec["process"]["oomScoreAdj"] = wanted.into();
        });
        shim.run(&container).await.unwrap();
    }
    let daemons = virtiofsd(&rig);
    assert!(!daemons.is_empty());
    let own = format!("{}/{}", rig.cgroup_parent, rig.id);
    for pid in &daemons {
        assert_eq!(oom_score_adj(*pid), 500);
        let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        for line in cgroups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next().unwrap(), fields.next().unwrap());
            let counted = |name| ["memory", "cpu", "cpuacct", "pids", "blkio"].contains(&name);
            if unified || controllers.split(',').any(counted) {
                assert_eq!(path, own, "process {pid}: {line}");
            }
        }
    }
    assert_eq!(oom_score_adj(vmm), 500);

    let last = *daemons.iter().max().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(last), nix::sys::signal::SIGKILL).unwrap();
    assert_eq!(shim.wait("c1").await, 137);
    becomes_not_ready(&shim).await;
    let ended = shim.status().await.1.remove(info::ENDED).unwrap_or_default();
    assert!(ended.contains("virtiofsd"), "{ended}");
    shim.stop().await;
    rig.assert_clean();
}

#[tokio::test]
async fn a_vm_that_is_killed_for_memory_says_so() {
    if let Some(reason) = rig::missing() {
        println!("skipped: a_vm_that_is_killed_for_memory_says_so: {reason}");
        return;
    }
    let rig = Rig::new();
    let shim = rig.pod().await;
    let container = rig.container("c1", &["sleep", "1000"], |_| {});
    shim.run(&container).await.unwrap();
    let below = format!("{}/{}", rig.cgroup_parent, rig.id);
    let (current, limit) = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let directory = format!("/sys/fs/cgroup{below}");
        (
            format!("{directory}/memory.current"),
            format!("{directory}/memory.max"),
        )
    } else {
        let directory = format!("/sys/fs/cgroup/memory{below}");
        (
            format!("{directory}/memory.usage_in_bytes"),
            format!("{directory}/memory.limit_in_bytes"),
        )
    };
    let used: u64 = std::fs::read_to_string(&current).unwrap().trim().parse().unwrap();
    std::fs::write(&limit, (used + (4 << 20)).to_string()).unwrap();
    let fill = ["busybox", "tail", "/dev/zero"];
    let filling = shim.exec("c1", &fill);
    let end = async {
        assert_eq!(shim.wait("c1").await, 137);
        becomes_not_ready(&shim).await;
    };
    tokio::select! {
        () = end => {}
        () = async { filling.await; std::future::pending().await } => {}
    }
    let ended = shim.status().await.1.remove(info::ENDED).unwrap_or_default();
    assert!(ended.contains("killed for memory"), "{ended}");
    let record = ExitRecord::read(&container.bundle).unwrap().unwrap();
    assert!(record.oom_killed, "{record:?}");
    shim.stop().await;
    rig.assert_clean();
}
