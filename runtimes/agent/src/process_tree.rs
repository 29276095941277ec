//! A process with all that it started: its descendants, and its session, which every exec leads.

use std::collections::HashSet;
use std::fs;

/// Looks for further members so often; each look is for what was forked before the others were stopped.
const ROUNDS: usize = 50;

/// What /proc/<pid>/stat tells, see proc_pid_stat(5).
struct Stat {
    parent: i32,
    session: i32,
}

/// `None` where the process is gone.
fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may have anything in it.
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    let parent = fields.nth(1)?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    Some(Stat { parent, session })
}

/// Kills `root`, a process that is not reaped, and what it started of those that `list` tells. They are stopped
/// before any is killed: so they fork no more, and no child loses the parent that it is known by.
pub(crate) fn kill(root: i32, list: impl Fn() -> Vec<i32>) {
    let mut known = HashSet::from([root]);
    send(&[root], libc::SIGSTOP);
    for _ in 0..ROUNDS {
        let new = further(root, &list(), &mut known);
        if new.is_empty() {
            break;
        }
        send(&new, libc::SIGSTOP);
    }
    send(&known.into_iter().collect::<Vec<_>>(), libc::SIGKILL);
}

/// Adds to `known` what of `pids` belongs to the tree, and returns that.
fn further(root: i32, pids: &[i32], known: &mut HashSet<i32>) -> Vec<i32> {
    let all: Vec<(i32, Stat)> = pids.iter().filter_map(|pid| Some((*pid, stat(*pid)?))).collect();
    let mut new = Vec::new();
    loop {
        let before = new.len();
        for (pid, stat) in &all {
            if !known.contains(pid) && (known.contains(&stat.parent) || stat.session == root) {
                known.insert(*pid);
                new.push(*pid);
            }
        }
        if new.len() == before {
            return new;
        }
    }
}

fn send(pids: &[i32], signal: i32) {
    for pid in pids {
        // SAFETY: kill has no memory effects; the pids were of the container's cgroup a moment ago.
        unsafe { libc::kill(*pid, signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    fn alive(pid: i32) -> bool {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        text.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with('Z'))
    }

    #[test]
    fn children_go_and_strangers_stay() {
        let script = "sleep 70 & echo $!; setsid sleep 71 & echo $!; \
                      sh -c 'sleep 72 & echo $!'; echo end; wait";
        let mut root = Command::new("setsid")
            .args(["sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stranger = Command::new("sleep").arg("73").spawn().unwrap();
        let lines = BufReader::new(root.stdout.take().unwrap()).lines();
        let children: Vec<i32> = lines
            .map(Result::unwrap)
            .take_while(|line| line != "end")
            .map(|line| line.parse().unwrap())
            .collect();
        assert_eq!(children.len(), 3);
        let mut all = children.clone();
        all.extend([root.id().cast_signed(), stranger.id().cast_signed()]);
        kill(root.id().cast_signed(), || all.clone());
        assert!(!root.wait().unwrap().success());
        let begun = Instant::now();
        while children.iter().any(|pid| alive(*pid)) && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let left: Vec<_> = children.iter().filter(|pid| alive(**pid)).collect();
        let stays = alive(stranger.id().cast_signed());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert!(left.is_empty() && stays, "left {left:?}, stranger {stays}");
    }
}
