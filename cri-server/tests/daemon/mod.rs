//! A real daemon in a temporary root, with a scripted CNI plugin and, where a test wants it, a scripted shim.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use catamaran::cri::api::runtime_service_client::RuntimeServiceClient;
use catamaran::cri::api::{
    self, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata,
};
use tonic::transport::{Channel, Endpoint};

/// A daemon and its directories; all of it goes when dropped, also after a failure.
pub(crate) struct Daemon {
    child: Option<Child>,
    dir: tempfile::TempDir,
}

/// Answers ADD and DEL and logs them; ADD waits where `hang` exists and fails where `fail` exists, DEL waits where
/// `hang-del` exists.
const PLUGIN: &str = r#"#!/bin/sh
dir=$(dirname "$0")
cat > /dev/null
echo "$CNI_COMMAND $CNI_CONTAINERID" >> "$dir/calls"
case $CNI_COMMAND in
ADD)
    while [ -e "$dir/hang" ]; do sleep 0.05; done
    if [ -e "$dir/fail" ]; then echo '{"cniVersion":"1.0.0","code":11,"msg":"out of addresses"}'; exit 1; fi
    echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}],"ips":[{"address":"10.9.8.7/24","interface":0}]}'
    ;;
DEL) while [ -e "$dir/hang-del" ]; do sleep 0.05; done ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}' ;;
esac
"#;

impl Daemon {
    /// Starts one. `config` is added to the configuration.
    pub(crate) async fn start(config: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cat")
            .tempdir()
            .expect("a temporary directory");
        let at = dir.path();
        for sub in ["net.d", "bin"] {
            std::fs::create_dir(at.join(sub)).expect("a directory");
        }
        write_script(&at.join("bin/scripted"), PLUGIN);
        std::fs::write(
            at.join("net.d/10-scripted.conflist"),
            r#"{"cniVersion":"1.0.0","name":"scripted","plugins":[{"type":"scripted"}]}"#,
        )
        .expect("a conflist");
        let name = at.file_name().expect("a name").to_string_lossy().into_owned();
        let text = format!(
            "root: {0}/root\nstate: {0}/state\nlog: info\ncgroup_parent: /{name}\nnetwork:\n  conf_dir: {0}/net.d\n  bin_dirs: [{0}/bin]\n{config}",
            at.display()
        );
        std::fs::write(at.join("config.yaml"), text).expect("a configuration");
        let mut daemon = Self { child: None, dir };
        daemon.spawn().await;
        daemon
    }

    /// Starts the process and waits until it serves.
    pub(crate) async fn spawn(&mut self) {
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.path("log"))
            .expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_catamaran"))
            .arg("serve")
            .arg("--config")
            .arg(self.path("config.yaml"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon");
        self.child = Some(child);
        let until = Instant::now() + Duration::from_secs(20);
        while self.try_client().await.is_none() {
            assert!(
                Instant::now() < until,
                "the daemon does not serve:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// The CNI calls so far, without ids.
    pub(crate) fn cni_calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.path("bin/calls")).unwrap_or_default();
        calls
            .lines()
            .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
            .collect()
    }

    /// Makes the scripted plugin hang or fail, or no longer.
    pub(crate) fn plugin(&self, what: &str, on: bool) {
        let flag = self.path("bin").join(what);
        if on {
            std::fs::write(flag, "").expect("a flag");
        } else {
            std::fs::remove_file(flag).expect("a flag");
        }
    }

    pub(crate) async fn wait_for_cni(&self, call: &str) {
        let until = Instant::now() + Duration::from_secs(20);
        while !self.cni_calls().iter().any(|made| made == call) {
            assert!(Instant::now() < until, "no CNI {call}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn try_client(&self) -> Option<RuntimeServiceClient<Channel>> {
        let path = self.path("state/catamaran.sock");
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move {
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                    tokio::net::UnixStream::connect(path).await?,
                ))
            }
        });
        let channel = Endpoint::from_static("http://test")
            .connect_with_connector(connector)
            .await
            .ok()?;
        let mut client = RuntimeServiceClient::new(channel);
        client.version(api::VersionRequest::default()).await.ok()?;
        Some(client)
    }

    pub(crate) async fn client(&self) -> RuntimeServiceClient<Channel> {
        self.try_client()
            .await
            .unwrap_or_else(|| panic!("the daemon does not answer:\n{}", self.log()))
    }

    /// SIGKILL, as a crash.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// What pods have left, by name. Shims have a moment to end: they answer before they exit.
    pub(crate) async fn left(&self) -> Vec<String> {
        self.shims_ended().await;
        let mut left = Vec::new();
        for dir in [
            "state/pods",
            "state/netns",
            "state/s",
            "root/cni",
            "root/snapshots",
        ] {
            for entry in std::fs::read_dir(self.path(dir)).into_iter().flatten().flatten() {
                left.push(format!("{dir}/{}", entry.file_name().to_string_lossy()));
            }
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let below = format!(" {}/", self.dir.path().display());
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&below))
                .map(|line| format!("mount {line}")),
        );
        left.extend(self.shims().into_iter().map(|pid| format!("shim {pid}")));
        left.extend(
            self.cgroups()
                .into_iter()
                .map(|path| format!("cgroup {}", path.display())),
        );
        left
    }

    /// Shims of this daemon: processes whose log is in one of its bundles, also in one that was removed.
    pub(crate) fn shims(&self) -> Vec<i32> {
        self.logging_to(&self.path("state/pods"))
    }

    /// Waits a moment until no shim is left; whether that is so.
    pub(crate) async fn shims_ended(&self) -> bool {
        for _ in 0..150 {
            if self.shims().is_empty() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// The shim of one pod.
    pub(crate) fn shim_of(&self, pod: &str) -> i32 {
        let shims = self.logging_to(&self.path("state/pods").join(pod));
        *shims.first().unwrap_or_else(|| panic!("pod {pod} has no shim"))
    }

    fn logging_to(&self, dir: &Path) -> Vec<i32> {
        let pid = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
        let logs_there =
            |pid: &i32| std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log.starts_with(dir));
        std::fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter_map(pid)
            .filter(logs_there)
            .collect()
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let parent = self.dir.path().file_name().expect("a name").to_owned();
        let mut found = Vec::new();
        let roots = std::fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path());
        for root in roots.chain(["/sys/fs/cgroup".into()]) {
            for entry in std::fs::read_dir(root.join(&parent))
                .into_iter()
                .flatten()
                .flatten()
            {
                if entry.path().is_dir() {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the daemon:\n{}", self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for pid in self.shims() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points: Vec<&str> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| Path::new(point).starts_with(self.dir.path()))
            .collect();
        points.sort_by_key(|point| std::cmp::Reverse(point.len()));
        for point in points {
            let _ = Command::new("umount").args(["-l", point]).status();
        }
        let parent = self.dir.path().file_name().expect("a name").to_owned();
        for mut cgroup in self.cgroups() {
            let _ = std::fs::remove_dir(&cgroup);
            cgroup.pop();
            let _ = std::fs::remove_dir(&cgroup);
        }
        for root in std::fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = std::fs::remove_dir(root.path().join(&parent));
        }
    }
}

pub(crate) fn write_script(path: &Path, text: &str) {
    std::fs::write(path, text).expect("a script");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("permissions");
}

/// The namespace shim as this build has it.
pub(crate) fn real_shim() -> PathBuf {
    let daemon = PathBuf::from(env!("CARGO_BIN_EXE_catamaran"));
    let shim = daemon.with_file_name(catamaran::handlers::RUNC_SHIM);
    assert!(
        shim.exists(),
        "{} is missing: `cargo build -p catamaran-shim-runc` first",
        shim.display()
    );
    shim
}

/// RunPodSandbox of a pod with this name.
pub(crate) fn pod(name: &str) -> api::RunPodSandboxRequest {
    api::RunPodSandboxRequest {
        config: Some(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                namespace: "test".to_owned(),
                uid: format!("uid-{name}"),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        runtime_handler: String::new(),
    }
}
