//! A real shim process with real runc, driven over ttrpc as the daemon does it, in a directory of its own.
//! Dropping a [`Pod`] cleans up with the shim's own `delete`, whatever the test did.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::{
    POD_SPEC_VERSION, PidNamespace, PodNamespaces, PodSpec, RuntimeSpec, UserNamespace, info,
};
use catamaran_sandbox::protocol::stream::{ExecSyncRequest, ExecSyncResponse, OpenRequest};
use catamaran_sandbox::protocol::stream_ttrpc::StreamClient;
use catamaran_sandbox::protocol::{OCI_PROCESS_TYPE, POD_SPEC_TYPE};
use catamaran_sandbox::stream_frames::{self, Frame, FrameReader, write_frame};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::{self, context};
use serde_json::{Value, json};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-catamaran-runc-v2");
/// No call of a test takes longer.
const LIMIT: i64 = 60_000_000_000;

pub(crate) struct Options {
    pub(crate) pid: PidNamespace,
    pub(crate) network: bool,
    pub(crate) user: Option<UserNamespace>,
    pub(crate) sysctls: BTreeMap<String, String>,
    pub(crate) binary: PathBuf,
    pub(crate) args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pid: PidNamespace::Container,
            network: false,
            user: None,
            sysctls: BTreeMap::new(),
            binary: "/usr/sbin/runc".into(),
            args: Vec::new(),
        }
    }
}

pub(crate) struct Pod {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) id: Id,
    pub(crate) bundle: PathBuf,
    pub(crate) client: Client,
    pub(crate) spec: PodSpec,
    pub(crate) info: BTreeMap<String, String>,
    containers: std::cell::Cell<u32>,
}

/// A container before it is created.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) stdin: &'static str,
    pub(crate) terminal: bool,
    pub(crate) log: bool,
    pub(crate) config: Value,
}

pub(crate) fn ctx() -> context::Context {
    context::with_timeout(LIMIT)
}

pub(crate) fn code_of<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> ttrpc::Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("not a status: {other:?}"),
    }
}

pub(crate) fn any(type_url: &str, value: Vec<u8>) -> Any {
    let mut any = Any::new();
    any.type_url = type_url.to_owned();
    any.value = value;
    any
}

/// `shim start` as the daemon runs it; the printed address.
pub(crate) fn start_shim(id: &Id, bundle: &Path) -> String {
    let output = Command::new(SHIM)
        .args([
            "-namespace",
            "k8s.io",
            "-id",
            id.as_str(),
            "-address",
            "",
            "start",
        ])
        .current_dir(bundle)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&answer["version"], &answer["protocol"]),
        (&json!(3), &json!("ttrpc"))
    );
    answer["address"].as_str().unwrap().to_owned()
}

/// `shim delete`.
pub(crate) fn delete_shim(id: &Id, bundle: &Path) -> std::process::Output {
    Command::new(SHIM)
        .args([
            "-namespace",
            "k8s.io",
            "-address",
            "",
            "-id",
            id.as_str(),
            "-bundle",
        ])
        .arg(bundle)
        .arg("delete")
        .current_dir(bundle)
        .output()
        .unwrap()
}

impl Pod {
    pub(crate) async fn start(options: Options) -> Self {
        let directory = tempfile::Builder::new().prefix("cat").tempdir().unwrap();
        let id = Id::random().unwrap();
        let bundle = directory.path().join("pods").join(id.as_str());
        std::fs::create_dir_all(&bundle).unwrap();
        make_image(&directory.path().join("image"));
        let network = options
            .network
            .then(|| make_netns(&directory.path().join("netns")));
        let spec = PodSpec {
            version: POD_SPEC_VERSION,
            id: id.clone(),
            namespace: "default".to_owned(),
            name: "pod".to_owned(),
            uid: "uid".to_owned(),
            hostname: "test-pod".to_owned(),
            annotations: BTreeMap::new(),
            namespaces: PodNamespaces {
                network,
                host_ipc: false,
                pid: options.pid,
                user: options.user,
            },
            sysctls: options.sysctls,
            cgroup_parent: format!("/catamaran-test-{}", id.short()),
            systemd_cgroup: false,
            shm_bytes: 8 << 20,
            privileged: false,
            runtime: RuntimeSpec::Oci {
                binary: options.binary,
                args: options.args,
                root: directory.path().join("runtime"),
            },
        };
        let address = start_shim(&id, &bundle);
        let client = Client::connect(&address).await.unwrap();
        let containers = std::cell::Cell::new(0);
        let info = BTreeMap::new();
        let mut pod = Self {
            directory,
            id,
            bundle,
            client,
            spec,
            info,
            containers,
        };
        let mut request = sandbox_api::CreateSandboxRequest::new();
        request.sandbox_id = pod.id.to_string();
        request.bundle_path = pod.bundle.display().to_string();
        request.options = Some(any(POD_SPEC_TYPE, serde_json::to_vec(&pod.spec).unwrap())).into();
        pod.sandbox().create_sandbox(ctx(), &request).await.unwrap();
        pod.sandbox()
            .create_sandbox(ctx(), &request)
            .await
            .expect("creating twice is no error");
        let mut request = sandbox_api::StartSandboxRequest::new();
        request.sandbox_id = pod.id.to_string();
        let first = pod.sandbox().start_sandbox(ctx(), &request).await.unwrap();
        let again = pod.sandbox().start_sandbox(ctx(), &request).await.unwrap();
        assert_eq!((first.pid, first.created_at), (again.pid, again.created_at));
        let status = pod.status().await;
        assert_eq!(status.state, "SANDBOX_READY");
        pod.info = status.info.into_iter().collect();
        pod
    }

    pub(crate) fn sandbox(&self) -> SandboxClient {
        SandboxClient::new(self.client.clone())
    }

    pub(crate) fn task(&self) -> TaskClient {
        TaskClient::new(self.client.clone())
    }

    pub(crate) fn stream(&self) -> StreamClient {
        StreamClient::new(self.client.clone())
    }

    pub(crate) fn shim_pid(&self) -> i32 {
        std::fs::read_to_string(self.bundle.join("shim.pid"))
            .unwrap()
            .parse()
            .unwrap()
    }

    pub(crate) async fn status(&self) -> sandbox_api::SandboxStatusResponse {
        let mut request = sandbox_api::SandboxStatusRequest::new();
        request.sandbox_id = self.id.to_string();
        request.verbose = true;
        self.sandbox().sandbox_status(ctx(), &request).await.unwrap()
    }

    /// A container that runs a command of busybox, in the pod's namespaces.
    pub(crate) fn container(&self, args: &[&str]) -> Container {
        let number = self.containers.get();
        self.containers.set(number + 1);
        let id = format!("c{number}-{}", self.id.short());
        let mut namespaces = vec![
            json!({"type": "mount"}),
            json!({"type": "ipc", "path": self.info[info::IPC_NAMESPACE]}),
            json!({"type": "uts", "path": self.info[info::UTS_NAMESPACE]}),
        ];
        namespaces.push(match self.info.get(info::PID_NAMESPACE) {
            Some(path) => json!({"type": "pid", "path": path}),
            None => json!({"type": "pid"}),
        });
        if let Some(path) = &self.spec.namespaces.network {
            namespaces.push(json!({"type": "network", "path": path}));
        }
        let config = json!({
            "ociVersion": "1.0.2",
            "process": process(args, false),
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/dev/shm", "type": "bind", "source": self.info[info::SHM],
                 "options": ["rbind"]},
            ],
            "linux": {
                "cgroupsPath": format!("{}/{id}", self.spec.cgroup_parent),
                "namespaces": namespaces,
                "resources": {},
            },
        });
        Container {
            id,
            stdin: "",
            terminal: false,
            log: true,
            config,
        }
    }

    pub(crate) fn bundle_of(&self, id: &str) -> PathBuf {
        self.bundle.join("containers").join(id)
    }

    pub(crate) fn log_of(&self, id: &str) -> PathBuf {
        self.directory.path().join(format!("logs/{id}.log"))
    }

    pub(crate) async fn create(&self, container: &Container) -> ttrpc::Result<u32> {
        let bundle = self.bundle_of(&container.id);
        std::fs::create_dir_all(&bundle).unwrap();
        let mut config = container.config.clone();
        config["process"]["terminal"] = json!(container.terminal);
        std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        let layer = |what: &str| {
            let path = self
                .directory
                .path()
                .join("snapshots")
                .join(&container.id)
                .join(what);
            std::fs::create_dir_all(&path).unwrap();
            path.display().to_string()
        };
        let mut mount = api::Mount::new();
        mount.type_ = "overlay".to_owned();
        mount.source = "overlay".to_owned();
        mount.options = vec![
            format!("lowerdir={}", self.directory.path().join("image").display()),
            format!("upperdir={}", layer("upper")),
            format!("workdir={}", layer("work")),
        ];
        let mut request = api::CreateTaskRequest::new();
        request.id = container.id.clone();
        request.bundle = bundle.display().to_string();
        request.rootfs = vec![mount];
        request.stdin = container.stdin.to_owned();
        request.terminal = container.terminal;
        request.stdout = match container.log {
            true => format!("cri-log://{}", self.log_of(&container.id).display()),
            false => "discard:".to_owned(),
        };
        self.task()
            .create(ctx(), &request)
            .await
            .map(|response| response.pid)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<u32> {
        let mut request = api::StartRequest::new();
        request.id = id.to_owned();
        self.task()
            .start(ctx(), &request)
            .await
            .map(|response| response.pid)
    }

    pub(crate) async fn run(&self, container: &Container) -> u32 {
        self.create(container).await.unwrap();
        self.start_container(&container.id).await.unwrap()
    }

    pub(crate) async fn wait(&self, id: &str) -> u32 {
        let mut request = api::WaitRequest::new();
        request.id = id.to_owned();
        self.task().wait(ctx(), &request).await.unwrap().exit_status
    }

    pub(crate) async fn kill(&self, id: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let mut request = api::KillRequest::new();
        request.id = id.to_owned();
        request.signal = signal.cast_unsigned();
        request.all = all;
        self.task().kill(ctx(), &request).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<u32> {
        let mut request = api::DeleteRequest::new();
        request.id = id.to_owned();
        self.task()
            .delete(ctx(), &request)
            .await
            .map(|response| response.exit_status)
    }

    pub(crate) async fn state(&self, id: &str) -> api::Status {
        let mut request = api::StateRequest::new();
        request.id = id.to_owned();
        self.task().state(ctx(), &request).await.unwrap().status.unwrap()
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let mut request = api::PidsRequest::new();
        request.id = id.to_owned();
        let response = self.task().pids(ctx(), &request).await.unwrap();
        response.processes.iter().map(|process| process.pid).collect()
    }

    pub(crate) async fn stop(&self) -> ttrpc::Result<()> {
        let mut request = sandbox_api::StopSandboxRequest::new();
        request.sandbox_id = self.id.to_string();
        request.timeout_secs = 10;
        self.sandbox().stop_sandbox(ctx(), &request).await.map(drop)
    }

    pub(crate) async fn exec_sync(
        &self,
        id: &str,
        args: &[&str],
        timeout_ms: i64,
    ) -> ttrpc::Result<ExecSyncResponse> {
        let mut request = ExecSyncRequest::new();
        request.container_id = id.to_owned();
        request.process = serde_json::to_vec(&process(args, false)).unwrap();
        request.timeout_ms = timeout_ms;
        request.max_output = 1 << 20;
        self.stream().exec_sync(ctx(), &request).await
    }

    /// stdout of a command that must succeed.
    pub(crate) async fn output(&self, id: &str, args: &[&str]) -> String {
        let response = self.exec_sync(id, args, 30_000).await.unwrap();
        let text = String::from_utf8(response.stdout).unwrap();
        let errors = String::from_utf8_lossy(&response.stderr).into_owned();
        assert_eq!(response.exit_code, 0, "{args:?}: {text} {errors}");
        text
    }

    pub(crate) fn record(&self, id: &str) -> Option<ExitRecord> {
        ExitRecord::read(&self.bundle_of(id)).unwrap()
    }

    pub(crate) async fn open(&self, request: OpenRequest) -> Session {
        let response = self.stream().open(ctx(), &request).await.unwrap();
        let stream = stream_frames::connect(Path::new(&response.address), &response.token)
            .await
            .unwrap();
        let (reader, writer) = stream.into_split();
        Session {
            reader: FrameReader::new(reader),
            writer,
        }
    }

    /// Mounts, processes in cgroups and cgroups that are left of this pod.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.directory.path().display().to_string();
        let netns = format!("{here}/netns");
        let mut left: Vec<String> = mounts
            .lines()
            .filter(|line| line.contains(&here) && !line.contains(&netns))
            .map(str::to_owned)
            .collect();
        for cgroup in cgroups(&self.spec.cgroup_parent) {
            for entry in std::fs::read_dir(&cgroup).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    left.push(entry.path().display().to_string());
                }
            }
        }
        left
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let output = delete_shim(&self.id, &self.bundle);
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.bundle.join("shim.log")).unwrap_or_default();
            eprintln!("shim.log:\n{log}\ndelete: {output:?}");
        } else {
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        for cgroup in cgroups(&self.spec.cgroup_parent) {
            let _ = std::fs::remove_dir(cgroup);
        }
        if let Some(network) = &self.spec.namespaces.network {
            let _ = nix::mount::umount2(network, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn cgroups(path: &str) -> Vec<PathBuf> {
    let roots = std::fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let with_own = roots.chain([PathBuf::from("/sys/fs/cgroup")]);
    with_own
        .map(|root| root.join(path.trim_start_matches('/')))
        .filter(|path| path.is_dir())
        .collect()
}

pub(crate) fn process(args: &[&str], terminal: bool) -> Value {
    json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
    })
}

/// A root file system of Debian's static busybox.
fn make_image(image: &Path) {
    for directory in ["bin", "proc", "dev", "tmp"] {
        std::fs::create_dir_all(image.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", image.join("bin/busybox")).expect("these tests need busybox-static");
    for name in [
        "sh", "cat", "sleep", "echo", "hostname", "seq", "tail", "stty", "ps", "dd", "true", "yes", "head",
    ] {
        std::os::unix::fs::symlink("busybox", image.join("bin").join(name)).unwrap();
    }
}

/// A network namespace with its loopback up, pinned at `path`.
fn make_netns(path: &Path) -> PathBuf {
    std::fs::write(path, "").unwrap();
    let target = path.to_owned();
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        loopback_up();
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(
            Some("/proc/thread-self/ns/net"),
            &target,
            None::<&str>,
            flags,
            None::<&str>,
        )
        .unwrap();
    })
    .join()
    .unwrap();
    path.to_owned()
}

fn loopback_up() {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0");
    // Binding works on a loopback that is down; the descriptor is what matters.
    let socket = socket.unwrap_or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
    // SAFETY: an ifreq is plain data, and its name is terminated.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// One connection of Stream.Open.
pub(crate) struct Session {
    pub(crate) reader: FrameReader<OwnedReadHalf>,
    pub(crate) writer: OwnedWriteHalf,
}

impl Session {
    pub(crate) async fn send(&mut self, frame: Frame) {
        write_frame(&mut self.writer, &frame).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> Option<Frame> {
        tokio::time::timeout(Duration::from_secs(30), self.reader.next())
            .await
            .unwrap()
            .unwrap()
    }

    /// Output until it contains `text`.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.next().await {
                Some(Frame::Stdout(data)) => seen.push_str(&String::from_utf8_lossy(&data)),
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        seen
    }

    /// stdout, stderr and all other frames, to the end.
    pub(crate) async fn rest(&mut self) -> (Vec<u8>, Vec<u8>, Vec<Frame>) {
        let (mut stdout, mut stderr, mut others) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(frame) = self.next().await {
            match frame {
                Frame::Stdout(data) => stdout.extend_from_slice(&data),
                Frame::Stderr(data) => stderr.extend_from_slice(&data),
                other => others.push(other),
            }
        }
        (stdout, stderr, others)
    }
}

/// (tag, text) of the log's lines of one stream.
pub(crate) fn log_lines(path: &Path, stream: &str) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .filter_map(|line| {
            let mut parts = line.splitn(4, ' ').skip(1);
            let (from, tag) = (parts.next().unwrap(), parts.next().unwrap());
            (from == stream).then(|| (tag.to_owned(), parts.next().unwrap().to_owned()))
        })
        .collect()
}

/// Task.Exec of a process whose output goes to `stdout`.
pub(crate) fn task_exec(id: &str, exec_id: &str, args: &[&str]) -> api::ExecProcessRequest {
    let mut request = api::ExecProcessRequest::new();
    request.id = id.to_owned();
    request.exec_id = exec_id.to_owned();
    let process = serde_json::to_vec(&process(args, false)).unwrap();
    request.spec = Some(any(OCI_PROCESS_TYPE, process)).into();
    request
}
