//! What the processes of a container have open, as cAdvisor counts it: entries of `/proc/PID/fd`, see proc_pid_fd(5).

use std::path::Path;

/// Open files of some processes together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct OpenFiles {
    /// File descriptors.
    pub(super) descriptors: u64,
    /// Those of them that are sockets.
    pub(super) sockets: u64,
}

/// Of these processes. One that has ended meanwhile has nothing open.
pub(super) fn of(pids: &[i32]) -> OpenFiles {
    let mut found = OpenFiles::default();
    for pid in pids {
        let directory = Path::new("/proc").join(pid.to_string()).join("fd");
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            found.descriptors += 1;
            let target = std::fs::read_link(entry.path());
            if target.is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:")) {
                found.sockets += 1;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn sleeping(stdin: Stdio) -> Child {
        let mut command = Command::new("sleep");
        let command = command.arg("60").stdin(stdin);
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    #[test]
    fn a_childs_files_and_sockets_are_counted() {
        let (ours, its) = std::os::unix::net::UnixStream::pair().unwrap();
        // The one is like the other but for a socket; both may have inherited more than the three.
        let mut children = [sleeping(Stdio::null()), sleeping(Stdio::from(OwnedFd::from(its)))];
        let pids = children.each_ref().map(|child| child.id().cast_signed());
        let mut found = (OpenFiles::default(), OpenFiles::default());
        let expected = |plain: &OpenFiles| OpenFiles {
            descriptors: plain.descriptors,
            sockets: plain.sockets + 1,
        };
        // While they are being loaded, they have their libraries open.
        for _ in 0..100 {
            found = (of(&pids[..1]), of(&[pids[1], i32::MAX]));
            if found.0.descriptors >= 3 && found.1 == expected(&found.0) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        drop(ours);
        assert!(found.0.descriptors >= 3, "{found:?}");
        assert_eq!(found.1, expected(&found.0));
    }
}
