//! What a pod may take beyond its containers' limits, as `deploy/runtimeclass.yaml` tells Kubernetes: the kubelet
//! bounds a pod's cgroup by the limits and this overhead together, so a pod that takes more is killed.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::node::Options;
use catamaran_e2e::suite::Suite;
use serde_json::json;

const MIB: u64 = 1 << 20;
/// The pod's limit.
const LIMIT: u64 = 64 * MIB;
/// More than the guest's RAM.
const FILE: u64 = 400 * MIB;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("a_pod_fits_into_its_limits_and_its_overhead", fits)
        .main()
}

/// `overhead.podFixed.memory` of the RuntimeClass with this handler, in bytes.
fn overhead(handler: &str) -> Result<u64> {
    let text = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/runtimeclass.yaml"
    ))?;
    for document in text.split("\n---\n") {
        let class: serde_yaml::Value = serde_yaml::from_str(document)?;
        if class["handler"].as_str() == Some(handler) {
            let memory = class["overhead"]["podFixed"]["memory"]
                .as_str()
                .context("no overhead")?;
            let mib = memory
                .strip_suffix("Mi")
                .context("overhead in other units than Mi")?;
            return Ok(mib.parse::<u64>()? * MIB);
        }
    }
    anyhow::bail!("deploy/runtimeclass.yaml has no class with handler {handler}")
}

/// A pod's cgroup with a limit on memory, as the kubelet makes it before it asks for the pod.
struct PodCgroup(PathBuf);

impl PodCgroup {
    fn new(path: &str, limit: u64) -> Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let root = if v1.exists() {
            v1
        } else {
            Path::new("/sys/fs/cgroup")
        };
        let directory = root.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(&directory)?;
        let cgroup = Self(directory);
        if v1.exists() {
            std::fs::write(cgroup.0.join("memory.limit_in_bytes"), limit.to_string())?;
        } else {
            let above = cgroup
                .0
                .ancestors()
                .skip(1)
                .take_while(|above| above.starts_with(root));
            let above: Vec<&Path> = above.collect();
            for above in above.into_iter().rev() {
                std::fs::write(above.join("cgroup.subtree_control"), "+memory")?;
            }
            std::fs::write(cgroup.0.join("memory.max"), limit.to_string())?;
        }
        Ok(cgroup)
    }

    /// A file's `key value` lines.
    fn value(&self, files: [&str; 2], key: &str) -> Result<u64> {
        let text = files
            .iter()
            .find_map(|file| std::fs::read_to_string(self.0.join(file)).ok());
        let text = text.with_context(|| format!("none of {files:?} is in {}", self.0.display()))?;
        let mut values = text.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = values
            .find(|(name, _)| *name == key)
            .with_context(|| format!("{key} is not in {text}"))?;
        Ok(value.trim().parse()?)
    }

    /// Processes that were killed for want of memory, here and below.
    fn killed(&self) -> Result<u64> {
        self.value(["memory.events", "memory.oom_control"], "oom_kill")
    }

    /// What cannot be reclaimed: anonymous memory, guests' RAM, which is a memfd, and the kernel's for these
    /// processes.
    fn held(&self) -> Result<u64> {
        let stat = |key: &str| self.value(["memory.stat", "memory.stat"], key);
        match std::fs::read_to_string(self.0.join("memory.kmem.usage_in_bytes")) {
            Ok(kernel) => Ok(stat("total_rss")? + stat("total_shmem")? + kernel.trim().parse::<u64>()?),
            Err(_) => Ok(stat("anon")? + stat("shmem")? + stat("kernel")?),
        }
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // The daemon may have removed it with the pod.
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn fits(t: &Case<'_>) -> Result<()> {
    let overhead = overhead(t.handler.name())?;
    let directory = t.directory()?;
    let file = std::fs::File::create(directory.join("big"))?;
    file.set_len(FILE)?;
    let request = t
        .pod_request()
        .set("/linux/resources", json!({"memory_limit_in_bytes": LIMIT}));
    let parent = request.json()["linux"]["cgroup_parent"]
        .as_str()
        .context("no cgroup_parent")?;
    let cgroup = PodCgroup::new(parent, LIMIT + overhead)?;
    let pod = t.run_pod(&request)?;
    let booted = cgroup.held()?;
    // Without a limit of its own, as in a pod with limits at the pod's level: it may use all that the pod has.
    let id = t.start(&pod, &t.idle("main").mount(&directory, "/v", json!({})))?;
    // Every page of the guest becomes page cache, and programs of many kinds run.
    let script = "cat /v/big | tail -c 1; head -c 4000000 /v/big | gzip | md5sum; \
                  head -c 4000000 /v/big | bzip2 | sha512sum; \
                  for i in 1 2 3; do ls -lR /etc /proc/1 | sort | awk '{n += $5} END {print n}'; done";
    t.shell(&id, &format!("({script}) >/dev/null 2>&1"))?;
    let held = cgroup.held()?;
    println!(
        "{}: {} MiB of limits, {} MiB of overhead; held {} MiB when it had started, {} MiB at the end",
        t.handler.name(),
        LIMIT / MIB,
        overhead / MIB,
        booted / MIB,
        held / MIB
    );
    let killed = cgroup.killed()?;
    ensure!(
        killed == 0,
        "{killed} processes of the pod were killed for want of memory"
    );
    let state = t.status(&id)?["state"].clone();
    ensure!(state == "CONTAINER_RUNNING", "the container is {state}");
    ensure!(
        held <= LIMIT + overhead * 9 / 10,
        "the pod holds {} MiB: the overhead of {} MiB has no tenth to spare",
        held / MIB,
        overhead / MIB
    );
    t.node.remove_pod(&pod.id)?;
    Ok(())
}
