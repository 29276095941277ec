//! Pre-installed plugins: executables `NN-name` in a directory, launched with a connected socket as file
//! descriptor 3. Their configuration is `NN-name.conf` or `name.conf` in another directory.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::Inner;
use crate::connection::chain;
use crate::plugin::{Installed, Plugin, verify_index, verify_name};

const SOCKET: i32 = 3;

/// Launches every plugin and synchronizes those that register. One that does not is left out, and said.
pub(crate) async fn all(inner: &Arc<Inner>) {
    let mut registering = JoinSet::new();
    for (path, installed) in discover(&inner.config.plugin_dir, &inner.config.config_dir) {
        let Some(runtime) = inner.runtime.get().cloned() else {
            return;
        };
        let limits = inner.limits();
        match launch(&path, &installed) {
            Ok((stream, child)) => {
                registering.spawn(async move {
                    (
                        path,
                        Plugin::register(stream, Some((installed, child)), limits, runtime).await,
                    )
                });
            }
            Err(error) => tracing::warn!(plugin = %path.display(), %error, "cannot launch an NRI plugin"),
        }
    }
    while let Some(registered) = registering.join_next().await {
        match registered {
            Ok((_, Ok(plugin))) => inner.join(plugin).await,
            Ok((path, Err(refusal))) => {
                tracing::warn!(plugin = %path.display(), why = chain(&refusal), "an NRI plugin was not taken");
            }
            Err(error) => tracing::warn!(%error, "an NRI plugin's registration ended"),
        }
    }
}

fn discover(plugins: &Path, configs: &Path) -> Vec<(PathBuf, Installed)> {
    let entries = match std::fs::read_dir(plugins) {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(directory = %plugins.display(), %error, "cannot look for NRI plugins");
            }
            return Vec::new();
        }
    };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        // Followed: plugins may be links.
        let executable = std::fs::metadata(&path)
            .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
        if !executable {
            continue;
        }
        match installed(&path, configs) {
            Ok(installed) => found.push((path, installed)),
            Err(problem) => tracing::warn!(plugin = %path.display(), problem, "an NRI plugin is passed over"),
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn installed(path: &Path, configs: &Path) -> Result<Installed, String> {
    let file = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let (index, name) = file.split_once('-').ok_or("its file is not named NN-name")?;
    verify_index(index)?;
    verify_name(name)?;
    for candidate in [format!("{file}.conf"), format!("{name}.conf")] {
        let path = configs.join(candidate);
        match std::fs::read_to_string(&path) {
            Ok(config) => {
                return Ok(Installed {
                    index: index.to_owned(),
                    name: name.to_owned(),
                    config,
                });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
        }
    }
    Ok(Installed {
        index: index.to_owned(),
        name: name.to_owned(),
        config: String::new(),
    })
}

fn launch(path: &Path, installed: &Installed) -> std::io::Result<(UnixStream, Child)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let theirs = OwnedFd::from(theirs);
    let inherited = theirs.as_raw_fd();
    let mut command = Command::new(path);
    command
        .env_clear()
        .env("NRI_PLUGIN_NAME", &installed.name)
        .env("NRI_PLUGIN_IDX", &installed.index)
        .env("NRI_PLUGIN_SOCKET", SOCKET.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    let daemon = std::process::id();
    // SAFETY: between fork and exec, prctl, getppid, dup2 and fcntl only, which are async-signal-safe; `inherited` is
    // open until the child has been made.
    unsafe {
        command.pre_exec(move || {
            // A daemon that is killed cannot end its plugins, and the next one launches its own. The kernel takes the
            // thread that forked for the parent: here one of the runtime, which lives as long as the daemon.
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            if u32::try_from(libc::getppid()) != Ok(daemon) {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            let done = if inherited == SOCKET {
                libc::fcntl(SOCKET, libc::F_SETFD, 0)
            } else {
                libc::dup2(inherited, SOCKET)
            };
            if done < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    let child = command.spawn()?;
    drop(theirs);
    Ok((UnixStream::from_std(ours)?, child))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugins_are_found_by_name_with_their_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let (plugins, configs) = (directory.path().join("p"), directory.path().join("c"));
        std::fs::create_dir_all(&plugins).unwrap();
        std::fs::create_dir_all(&configs).unwrap();
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a", 0o755),
            ("15-off", 0o644),
            ("nonsense", 0o755),
        ] {
            std::fs::write(plugins.join(name), "").unwrap();
            std::fs::set_permissions(plugins.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        }
        std::fs::write(configs.join("a.conf"), "general").unwrap();
        std::fs::write(configs.join("20-b.conf"), "special").unwrap();
        std::fs::write(configs.join("b.conf"), "general").unwrap();
        let found: Vec<(String, String)> = discover(&plugins, &configs)
            .into_iter()
            .map(|(_, i)| (i.name, i.config))
            .collect();
        assert_eq!(
            found,
            [("a".into(), "general".into()), ("b".into(), "special".into())]
        );
        assert!(discover(&directory.path().join("none"), &configs).is_empty());
    }

    const AS_DAEMON: &str = "CATAMARAN_TEST_PLUGIN";

    /// Not a test of its own: the daemon of the one below, which it kills.
    #[tokio::test]
    async fn as_a_daemon() {
        let Some(plugin) = std::env::var_os(AS_DAEMON) else {
            return;
        };
        let installed = Installed {
            index: "10".into(),
            name: "a".into(),
            config: String::new(),
        };
        let _launched = launch(Path::new(&plugin), &installed).unwrap();
        std::future::pending::<()>().await;
    }

    #[test]
    fn plugins_do_not_outlive_a_daemon_that_is_killed() {
        use std::time::{Duration, Instant};
        let directory = tempfile::tempdir().unwrap();
        let (plugin, pid) = (directory.path().join("10-a"), directory.path().join("pid"));
        // Its socket's end does not end it.
        let text = format!(
            "#!/bin/sh\necho $$ >{0}.new\nmv {0}.new {0}\nexec sleep 60\n",
            pid.display()
        );
        std::fs::write(&plugin, text).unwrap();
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "launch::tests::as_a_daemon", "--nocapture"])
            .env(AS_DAEMON, &plugin)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let within = Instant::now() + Duration::from_secs(20);
        let wait = |until: &dyn Fn() -> bool| {
            while !until() && Instant::now() < within {
                std::thread::sleep(Duration::from_millis(10));
            }
            until()
        };
        let launched = wait(&|| pid.exists());
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        assert!(launched);
        let pid = std::fs::read_to_string(&pid).unwrap();
        let status = format!("/proc/{}/status", pid.trim());
        let gone = || std::fs::read_to_string(&status).is_ok_and(|text| text.contains("State:\tZ"));
        assert!(wait(&|| !Path::new(&status).exists() || gone()));
    }
}
