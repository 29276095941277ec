//! What a daemon and its pods may leave behind, looked for in the kernel's own lists: processes, mounts,
//! network namespaces, cgroups, links, leases, packet filter rules, sockets, bundles.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::daemon::{Flavour, Layout};
use crate::process;
use crate::subnet::{Subnet, leases};

/// Everything that removed pods must not leave, apart from processes.
///
/// # Errors
/// One of the lists cannot be read.
pub fn of_pods(flavour: Flavour, layout: &Layout, subnet: &Subnet) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for path in mounts_below(&layout.base)? {
        // The root may be a tmpfs of the harness's, and the netns directory a mount of the daemon's.
        if path != layout.root && path != layout.netns() {
            left.push(format!("mount {}", path.display()));
        }
    }
    left.extend(
        children(&layout.netns())?
            .into_iter()
            .map(|p| format!("netns {}", p.display())),
    );
    left.extend(
        cgroups(subnet)?
            .into_iter()
            .map(|p| format!("cgroup {}", p.display())),
    );
    left.extend(links(subnet)?.into_iter().map(|name| format!("link {name}")));
    left.extend(
        leases(&layout.leases)?
            .into_iter()
            .map(|p| format!("lease {}", p.display())),
    );
    left.extend(
        rules(subnet)?
            .into_iter()
            // The embedded network's own rule is the node's, and goes with the daemon.
            .filter(|rule| !rule.contains("catamaran default network"))
            .map(|rule| format!("packet filter rule {rule}")),
    );
    if flavour == Flavour::Catamaran {
        for (what, directory) in [
            ("shim socket", layout.state.join("s")),
            ("pod bundle", layout.state.join("pods")),
            ("snapshot", layout.root.join("snapshots")),
        ] {
            left.extend(
                children(&directory)?
                    .into_iter()
                    .map(|p| format!("{what} {}", p.display())),
            );
        }
    }
    Ok(left)
}

/// Processes that work below the node's directory or in its cgroups, but for those in `expected`, and zombies that
/// one of all these does not reap (others are pid 1's, which reaps them when it gets to it).
///
/// # Errors
/// /proc cannot be read.
pub fn processes(layout: &Layout, subnet: &Subnet, expected: &[u32]) -> Result<Vec<String>> {
    let found = find_processes(layout, subnet)?;
    let parents: Vec<u32> = found
        .iter()
        .map(|(pid, _)| *pid)
        .chain(expected.iter().copied())
        .collect();
    let mut left: Vec<String> = found
        .into_iter()
        .filter(|(pid, _)| !expected.contains(pid))
        .map(|(pid, words)| format!("process {pid} {words}"))
        .collect();
    left.extend(zombies_of(&parents)?);
    Ok(left)
}

/// Ended children of these that they have not waited for. proc_pid_stat(5).
fn zombies_of(parents: &[u32]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").context("/proc")? {
        let stat = std::fs::read_to_string(entry?.path().join("stat")).unwrap_or_default();
        // The name may have spaces and parentheses; what follows its last one has not.
        let Some((name, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let mut fields = rest.split_whitespace();
        let (state, parent) = (
            fields.next(),
            fields.next().and_then(|parent| parent.parse::<u32>().ok()),
        );
        if let (Some("Z"), Some(parent)) = (state, parent)
            && parents.contains(&parent)
        {
            found.push(format!("zombie {name}) of {parent}"));
        }
    }
    Ok(found)
}

/// Process ids and command lines of everything that works below the node's directory or in its cgroups.
///
/// # Errors
/// /proc cannot be read.
pub fn find_processes(layout: &Layout, subnet: &Subnet) -> Result<Vec<(u32, String)>> {
    let base = layout.base.to_string_lossy().into_owned();
    let group = format!("/{}/", subnet.name());
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").context("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // A process may end while it is looked at; what cannot be read any more is not left behind.
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let words = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let cwd = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        // A shim has nothing of the node in its command line; its log is its standard error.
        let log = std::fs::read_link(entry.path().join("fd/2")).unwrap_or_default();
        let in_cgroup = String::from_utf8_lossy(&read("cgroup"))
            .lines()
            .any(|line| line.contains(&group));
        let ours = pid == std::process::id()
            || words.contains("docker-registry")
            || words.contains("target/tools/crictl");
        let zombie = words.is_empty();
        if !ours
            && !zombie
            && (in_cgroup
                || words.contains(&base)
                || cwd.starts_with(&layout.base)
                || log.starts_with(layout.state.join("pods")))
        {
            found.push((pid, words));
        }
    }
    Ok(found)
}

fn mounts_below(base: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(base)).collect())
}

fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| directory.display().to_string()),
    }
}

/// The cgroups of the node in every hierarchy. A pod's parent cgroup is the kubelet's to remove, so only
/// what is below it, and what the daemon put straight under the node's, counts.
fn cgroups(subnet: &Subnet) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for hierarchy in hierarchies() {
        for pod in children(&hierarchy.join(subnet.name()))?
            .into_iter()
            .filter(|p| p.is_dir())
        {
            let name = pod.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
                found.push(pod.clone());
            }
            found.extend(children(&pod)?.into_iter().filter(|p| p.is_dir()));
        }
    }
    Ok(found)
}

fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut all: Vec<PathBuf> = children(root)
        .unwrap_or_default()
        .into_iter()
        .filter(|p| p.is_dir())
        .collect();
    all.push(root.to_owned());
    all
}

/// Ports of the node's bridge: a pod's host side.
fn links(subnet: &Subnet) -> Result<Vec<String>> {
    children(&Path::new("/sys/class/net").join(subnet.name()).join("brif")).map(|ports| {
        ports
            .iter()
            .map(|p| p.file_name().unwrap_or_default().to_string_lossy().into_owned())
            .collect()
    })
}

/// Rules and chains of iptables that name the network or an address of a pod of it.
pub(crate) fn rules(subnet: &Subnet) -> Result<Vec<String>> {
    let save = binary("iptables-save");
    let text = process::succeed(&mut Command::new(save), Duration::from_secs(10))?;
    let (quoted, prefix) = (format!("\"{}\"", subnet.name()), subnet.prefix());
    let named = |line: &&str| line.contains(&quoted.replace('"', "\\\"")) || line.contains(&prefix);
    Ok(text.lines().filter(named).map(ToOwned::to_owned).collect())
}

/// Removes the rules and chains of the network that a failed or killed test run left, so that they are not
/// taken for this one's.
///
/// # Errors
/// iptables cannot be run.
pub(crate) fn remove_rules(subnet: &Subnet) -> Result<()> {
    let left = rules(subnet)?;
    if left.is_empty() {
        return Ok(());
    }
    let (mut script, mut chains) = (String::from("*nat\n"), BTreeSet::new());
    for rule in left {
        let Some(rule) = rule.strip_prefix("-A ") else {
            continue;
        };
        // A chain made for one attachment is flushed as a whole; elsewhere only the rule goes.
        match rule.split(' ').next() {
            Some(chain) if chain.starts_with("CNI-") && !chain.contains("HOSTPORT") => {}
            _ => script.push_str(&format!("-D {rule}\n")),
        }
        chains.extend(
            rule.split(' ')
                .filter(|w| w.starts_with("CNI-") && !w.contains("HOSTPORT"))
                .map(str::to_owned),
        );
        chains.extend(
            rule.split(' ')
                .filter(|w| w.starts_with("CNI-DN-"))
                .map(str::to_owned),
        );
    }
    for step in ["-F", "-X"] {
        script.extend(chains.iter().map(|chain| format!("{step} {chain}\n")));
    }
    script.push_str("COMMIT\n");
    let file = std::env::temp_dir().join(format!("{}-rules-{}", subnet.name(), std::process::id()));
    std::fs::write(&file, script)?;
    let restore = process::succeed(
        Command::new(binary("iptables-restore"))
            .arg("--noflush")
            .arg(&file),
        Duration::from_secs(10),
    );
    std::fs::remove_file(&file)?;
    restore.map(drop)
}

fn binary(name: &str) -> PathBuf {
    crate::binaries::system(name).unwrap_or_else(|_| name.into())
}

/// Clears away what a failed test left: kills the node's processes, unmounts, removes cgroups. Best effort:
/// the failure itself was already reported.
pub(crate) fn sweep(layout: &Layout, subnet: &Subnet) {
    for _ in 0..20 {
        let left = find_processes(layout, subnet).unwrap_or_default();
        if left.is_empty() {
            break;
        }
        for (pid, _) in left {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut points = mounts_below(&layout.base).unwrap_or_default();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    for point in points {
        let _ = umount2(&point, MntFlags::MNT_DETACH);
    }
    for port in links(subnet).unwrap_or_default() {
        let _ = process::run(
            Command::new("ip").args(["link", "delete", &port]),
            Duration::from_secs(10),
        );
    }
    for hierarchy in hierarchies() {
        remove_cgroup(&hierarchy.join(subnet.name()));
    }
    if let Err(error) = remove_rules(subnet) {
        eprintln!("packet filter rules of {} stay: {error:#}", subnet.name());
    }
}

fn remove_cgroup(path: &Path) {
    for child in children(path).unwrap_or_default() {
        if child.is_dir() {
            remove_cgroup(&child);
        }
    }
    let _ = std::fs::remove_dir(path);
}
