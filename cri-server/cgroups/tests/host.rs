//! The host's own cgroups, with real processes. Needs root and writable cgroups.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use catamaran_cgroups::{self as cgroups, CgroupError, CgroupVersion, Resources};

/// A cgroup of this test's own that goes with it, processes included.
struct Scratch(String);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/catamaran-cgroups-test-{}-{count}", std::process::id());
        cgroups::create(&path).expect("root and writable cgroups are needed");
        Self(path)
    }

    fn dirs(&self) -> Vec<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let points = mounts.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (point, kind) = (words.next()?, words.next()?);
            kind.starts_with("cgroup")
                .then(|| PathBuf::from(format!("{point}{}", self.0)))
        });
        points.filter(|dir| dir.is_dir()).collect()
    }

    /// Starts a shell in the cgroup.
    fn run(&self, script: &str) -> Child {
        let enter: String = self
            .dirs()
            .iter()
            .map(|dir| format!("echo $$ > {}/cgroup.procs; ", dir.display()))
            .collect();
        Command::new("sh")
            .args(["-c", &format!("{enter}{script}")])
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn read(&self, file: &str) -> String {
        let found = self
            .dirs()
            .into_iter()
            .map(|dir| dir.join(file))
            .find(|path| path.exists());
        std::fs::read_to_string(found.unwrap_or_else(|| panic!("no {file}")))
            .unwrap()
            .trim()
            .to_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = cgroups::kill_all(&self.0);
        let _ = cgroups::remove(&self.0);
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Reaps in the background: a killed process leaves the cgroup's list only then.
fn reaped(mut child: Child) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || drop(child.wait()))
}

#[test]
fn children_are_listed_by_name() {
    let scratch = Scratch::new();
    assert!(cgroups::children(&scratch.0).unwrap().is_empty());
    cgroups::create(&format!("{}/one/below", scratch.0)).unwrap();
    cgroups::create(&format!("{}/two", scratch.0)).unwrap();
    let names: Vec<String> = cgroups::children(&scratch.0).unwrap().into_iter().collect();
    assert_eq!(names, ["one", "two"]);
    assert!(cgroups::children("/no-such-cgroup").unwrap().is_empty());
}

#[test]
fn a_cgroup_is_made_and_removed_idempotently() {
    let scratch = Scratch::new();
    let child = format!("{}/a/b", scratch.0);
    cgroups::create(&child).unwrap();
    cgroups::create(&child).unwrap();
    assert!(cgroups::exists(&child).unwrap());
    assert!(cgroups::pids(&child).unwrap().is_empty());
    cgroups::remove(&scratch.0).unwrap();
    cgroups::remove(&scratch.0).unwrap();
    assert!(!cgroups::exists(&scratch.0).unwrap() && scratch.dirs().is_empty());
    assert!(matches!(
        cgroups::container_stats(&scratch.0),
        Err(CgroupError::NotFound(_))
    ));
    assert!(cgroups::pids(&scratch.0).unwrap().is_empty());
    cgroups::kill_all(&scratch.0).unwrap();
}

#[test]
fn a_used_cgroup_is_not_removed_and_keeps_its_processes() {
    let scratch = Scratch::new();
    let mut child = scratch.run("exec sleep 1000");
    until("the process", || !cgroups::pids(&scratch.0).unwrap().is_empty());
    let error = cgroups::remove(&scratch.0).unwrap_err();
    assert!(matches!(error, CgroupError::Busy { processes: 1, .. }), "{error}");
    assert!(child.try_wait().unwrap().is_none(), "removal kills nothing");
    let reaper = reaped(child);
    cgroups::kill_all(&scratch.0).unwrap();
    reaper.join().unwrap();
    cgroups::remove(&scratch.0).unwrap();
}

#[test]
fn forking_and_frozen_processes_are_killed() {
    let scratch = Scratch::new();
    let limits = Resources {
        pids: Some(200),
        ..Resources::default()
    };
    cgroups::set(&scratch.0, &limits).unwrap();
    let forker = reaped(scratch.run("while :; do (sleep 0.05 &); done 2>/dev/null"));
    until("a crowd", || cgroups::pids(&scratch.0).unwrap().len() > 10);
    cgroups::kill_all(&scratch.0).unwrap();
    forker.join().unwrap();
    assert!(cgroups::pids(&scratch.0).unwrap().is_empty());

    let sleeper = reaped(scratch.run("exec sleep 1000"));
    until("the sleeper", || !cgroups::pids(&scratch.0).unwrap().is_empty());
    for dir in scratch.dirs() {
        for (file, value) in [("freezer.state", "FROZEN"), ("cgroup.freeze", "1")] {
            if dir.join(file).exists() {
                std::fs::write(dir.join(file), value).unwrap();
            }
        }
    }
    cgroups::kill_all(&scratch.0).unwrap();
    sleeper.join().unwrap();
}

#[test]
fn limits_are_set_up_and_down() {
    let scratch = Scratch::new();
    let mut limits = Resources {
        memory_bytes: Some(64 << 20),
        memory_swap_bytes: Some(64 << 20),
        cpu_shares: Some(512),
        cpu_quota_us: Some(20_000),
        cpu_period_us: Some(100_000),
        pids: Some(77),
        ..Resources::default()
    };
    cgroups::set(&scratch.0, &limits).unwrap();
    let stats = cgroups::pod_stats(&scratch.0).unwrap();
    assert_eq!(stats.memory.unwrap().limit, Some(64 << 20));
    assert_eq!(stats.pids.unwrap().limit, Some(77));
    match cgroups::detect().unwrap() {
        CgroupVersion::V1 => {
            assert_eq!(scratch.read("cpu.shares"), "512");
            assert_eq!(scratch.read("cpu.cfs_quota_us"), "20000");
        }
        CgroupVersion::V2 => assert_eq!(scratch.read("cpu.max"), "20000 100000"),
    }
    // Up, down, away: on version 1 memory and memory+swap must be written in the right order each time.
    for bytes in [128 << 20, 32 << 20, -1] {
        (limits.memory_bytes, limits.memory_swap_bytes) = (Some(bytes), Some(bytes));
        cgroups::set(&scratch.0, &limits).unwrap_or_else(|error| panic!("{bytes}: {error:?}"));
        let limit = cgroups::pod_stats(&scratch.0).unwrap().memory.unwrap().limit;
        assert_eq!(limit, u64::try_from(bytes).ok());
    }
    limits.memory_bytes = Some(16 << 20);
    limits.memory_swap_bytes = None;
    cgroups::set(&scratch.0, &limits).unwrap();
    limits.memory_bytes = Some(-1);
    cgroups::set(&scratch.0, &limits).unwrap();
    let refused = Resources {
        cpu_quota_us: Some(1),
        ..Resources::default()
    };
    let error = cgroups::set(&scratch.0, &refused).unwrap_err();
    assert!(matches!(error, CgroupError::Write { .. }), "{error}");
}

#[test]
fn use_and_oom_kills_are_counted() {
    let scratch = Scratch::new();
    let limits = Resources {
        memory_bytes: Some(24 << 20),
        memory_swap_bytes: Some(24 << 20),
        ..Resources::default()
    };
    cgroups::set(&scratch.0, &limits).unwrap();
    // The shell's children: one is killed for want of memory, one computes, one waits.
    let child = scratch.run(
        "tail -c 200000000 /dev/zero | tail >/dev/null; \
         i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; sleep 1000 & wait",
    );
    until("an OOM kill", || {
        cgroups::full_stats(&scratch.0).unwrap().memory.unwrap().oom_kills > 0
    });
    until("the sleeper", || {
        cgroups::full_stats(&scratch.0).unwrap().pids.unwrap().processes == 2
    });
    let stats = cgroups::full_stats(&scratch.0).unwrap();
    let cpu = stats.cpu.unwrap();
    assert!(cpu.usage_ns > 1_000_000, "{cpu:?}");
    let memory = stats.memory.unwrap();
    assert!(
        memory.usage > 0 && memory.working_set <= memory.usage && memory.page_faults > 0,
        "{memory:?}"
    );
    assert!(memory.available.unwrap() <= 24 << 20);
    assert!(memory.max_usage.is_none_or(|max| max >= memory.usage));
    assert_eq!(stats.pids.unwrap().threads, 2);
    let reaper = reaped(child);
    cgroups::kill_all(&scratch.0).unwrap();
    reaper.join().unwrap();
}

/// The mark is for a release build on a quiet host: a few milliseconds. This bound only catches a change of
/// kind, such as a process started for each container.
#[test]
fn a_hundred_cgroups_are_read_quickly() {
    let scratch = Scratch::new();
    let paths: Vec<String> = (0..100).map(|index| format!("{}/c{index}", scratch.0)).collect();
    for path in &paths {
        cgroups::create(path).unwrap();
    }
    let times = (0..5).map(|_| {
        let start = Instant::now();
        for path in &paths {
            assert!(cgroups::container_stats(path).unwrap().memory.is_some());
        }
        start.elapsed()
    });
    let best = times.min().unwrap();
    println!("statistics of 100 cgroups: {best:?}");
    assert!(best < Duration::from_millis(150), "{best:?}");
}
