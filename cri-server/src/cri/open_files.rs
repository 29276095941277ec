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
    use super::*;

    #[test]
    fn a_childs_files_and_sockets_are_counted() {
        let (ours, its) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(its)))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let expected = OpenFiles {
            descriptors: 3,
            sockets: 1,
        };
        let mut found = OpenFiles::default();
        // While it is being loaded, it has its libraries open.
        for _ in 0..100 {
            found = of(&[child.id().cast_signed(), i32::MAX]);
            if found == expected {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        drop(ours);
        assert_eq!(found, expected);
    }
}
