//! A temporary node for one pod: state directory, network namespace with a veth to the host, guest artefacts, the
//! real shim binary and its three ttrpc services. What a test leaves behind is taken away when the rig is dropped.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use catamaran_runv::guest;
use catamaran_sandbox::guest_image::GuestImage;
use catamaran_sandbox::id::Id;
use catamaran_sandbox::pod_spec::{
    Acceleration, POD_SPEC_VERSION, PidNamespace, PodNamespaces, PodSpec, RuntimeSpec, VmSpec,
};
use catamaran_sandbox::protocol::stream::{ExecSyncRequest, ExecSyncResponse};
use catamaran_sandbox::protocol::stream_ttrpc::StreamClient;
use catamaran_sandbox::protocol::{CRI_LOG_SCHEME, POD_SPEC_TYPE};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::context::Context;
use serde_json::{Value, json};

/// Every call that boots, plugs or stops under emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) fn call() -> Context {
    ttrpc::context::with_timeout(i64::try_from(PATIENCE.as_nanos()).unwrap())
}

/// The agent that goes into the guest: `CATAMARAN_TEST_AGENT`, or the one that the workspace built.
fn agent() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../target/x86_64-unknown-linux-gnu/release/catamaran-agent");
    std::env::var_os("CATAMARAN_TEST_AGENT")
        .map(PathBuf::from)
        .or(Some(built))
        .filter(|path| path.is_file())
}

/// The quickest kernel that is there: `CATAMARAN_TEST_KERNEL`, the minimal one, or an installed one.
fn kernel() -> Option<PathBuf> {
    let named = std::env::var_os("CATAMARAN_TEST_KERNEL").map(PathBuf::from);
    let minimal = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest-kernel/vmlinux");
    named
        .into_iter()
        .chain([minimal])
        .find(|path| path.is_file())
        .or_else(|| installed_kernels().pop())
}

pub(crate) fn installed_kernels() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/boot").into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().contains("/vmlinuz-"))
        .collect()
}

/// What this machine lacks for a VM; a test that cannot run says so.
pub(crate) fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return Some("needs qemu-system-x86_64");
    }
    if !Path::new("/usr/lib/qemu/virtiofsd").exists() {
        return Some("needs /usr/lib/qemu/virtiofsd");
    }
    if !Path::new("/bin/busybox").exists() {
        return Some("needs busybox-static");
    }
    if agent().is_none() {
        return Some("needs the static agent (or CATAMARAN_TEST_AGENT)");
    }
    if kernel().is_none() {
        return Some("needs a guest kernel (or CATAMARAN_TEST_KERNEL)");
    }
    None
}

/// Builds the guest of `kernel` once in this process, where the run before has built it.
pub(crate) fn guest_of(kernel: &Path) -> PathBuf {
    static BUILT: Mutex<BTreeMap<PathBuf, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap();
    if let Some(release) = built.get(kernel) {
        return release.clone();
    }
    let options = guest::Options {
        kernel: Some(kernel.to_owned()),
        agent: agent(),
        output: Some(Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm-pod-guest")),
        ..Default::default()
    };
    let release =
        guest::build(&options).unwrap_or_else(|error| panic!("{}", catamaran_runv::boot::chain(&error)));
    built.insert(kernel.to_owned(), release.clone());
    release
}

/// One pod's node.
pub(crate) struct Rig {
    pub(crate) id: Id,
    pub(crate) state: tempfile::TempDir,
    pub(crate) bundle: PathBuf,
    pub(crate) netns: PathBuf,
    pub(crate) cgroup_parent: String,
    pub(crate) release: PathBuf,
    pub(crate) pod_address: String,
    pub(crate) host_address: String,
    host_interface: String,
    name: String,
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with_kernel(&kernel().unwrap())
    }

    pub(crate) fn with_kernel(kernel: &Path) -> Self {
        Self::with_guest(guest_of(kernel))
    }

    /// A rig with a release directory of its own making.
    pub(crate) fn with_guest(release: PathBuf) -> Self {
        let id = Id::random().unwrap();
        let state = tempfile::Builder::new()
            .prefix("catamaran-runv-")
            .tempdir_in("/run")
            .unwrap();
        let bundle = state.path().join("pods").join(id.as_str());
        std::fs::create_dir_all(bundle.join("containers")).unwrap();
        let name = format!("catrv{}", &id.as_str()[..8]);
        let octets = u16::from_str_radix(&id.as_str()[..4], 16).unwrap();
        let subnet = format!("10.{}.{}", 200 + (octets >> 8) % 50, octets & 0xff);
        let host_interface = format!("cv{}", &id.as_str()[..8]);
        run("ip", &["netns", "add", &name]);
        run("ip", &["-n", &name, "link", "set", "lo", "up"]);
        run(
            "ip",
            &[
                "link",
                "add",
                &host_interface,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &name,
            ],
        );
        run(
            "ip",
            &["addr", "add", &format!("{subnet}.1/24"), "dev", &host_interface],
        );
        run("ip", &["link", "set", &host_interface, "up"]);
        run(
            "ip",
            &[
                "-n",
                &name,
                "addr",
                "add",
                &format!("{subnet}.2/24"),
                "dev",
                "eth0",
            ],
        );
        run("ip", &["-n", &name, "link", "set", "eth0", "mtu", "1400", "up"]);
        run(
            "ip",
            &[
                "-n",
                &name,
                "route",
                "add",
                "default",
                "via",
                &format!("{subnet}.1"),
            ],
        );
        Self {
            cgroup_parent: format!("/catamaran-test-{}", &id.as_str()[..12]),
            netns: PathBuf::from("/run/netns").join(&name),
            pod_address: format!("{subnet}.2"),
            host_address: format!("{subnet}.1"),
            id,
            state,
            bundle,
            release,
            host_interface,
            name,
        }
    }

    pub(crate) fn spec(&self) -> PodSpec {
        let image = GuestImage::read(&self.release).unwrap();
        let (kernel, initramfs) = image.paths(&self.release);
        PodSpec {
            version: POD_SPEC_VERSION,
            id: self.id.clone(),
            namespace: "default".into(),
            name: "pod".into(),
            uid: "uid".into(),
            hostname: "pod-host".into(),
            annotations: BTreeMap::new(),
            namespaces: PodNamespaces {
                network: Some(self.netns.clone()),
                host_ipc: false,
                pid: PidNamespace::Container,
                user: None,
            },
            sysctls: BTreeMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "80".into())]),
            cgroup_parent: self.cgroup_parent.clone(),
            systemd_cgroup: false,
            shm_bytes: 8 << 20,
            privileged: false,
            runtime: RuntimeSpec::Vm(VmSpec {
                vmm: "/usr/bin/qemu-system-x86_64".into(),
                virtiofsd: "/usr/lib/qemu/virtiofsd".into(),
                kernel,
                initramfs,
                kernel_args: String::new(),
                cpus: 1,
                memory_mib: 256,
                acceleration: Acceleration::Tcg,
                boot_timeout_ms: 90_000,
            }),
        }
    }

    /// Runs the shim's subcommand in the bundle.
    pub(crate) fn shim(&self, command: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_containerd-shim-catamaran-runv-v2"))
            .args([
                "-namespace",
                "k8s.io",
                "-id",
                self.id.as_str(),
                "-address",
                "",
                command,
            ])
            .current_dir(&self.bundle)
            .output()
            .unwrap()
    }

    /// Starts the shim and connects.
    pub(crate) async fn start(&self) -> Shim {
        let output = self.shim("start");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let line: Value = serde_json::from_slice(&output.stdout).unwrap();
        let client = Client::connect(line["address"].as_str().unwrap()).await.unwrap();
        Shim {
            sandbox: SandboxClient::new(client.clone()),
            task: TaskClient::new(client.clone()),
            stream: StreamClient::new(client),
            id: self.id.to_string(),
        }
    }

    /// Starts the shim and the pod's VM.
    pub(crate) async fn pod(&self) -> Shim {
        let shim = self.start().await;
        if let Err(error) = shim.create(&self.bundle, &self.spec()).await {
            panic!("{error}\n{}", self.log());
        }
        if let Err(error) = shim.start_sandbox().await {
            panic!("{error}\n{}", self.log());
        }
        shim
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.bundle.join("shim.log")).unwrap_or_default()
    }

    pub(crate) fn shim_pid(&self) -> i32 {
        std::fs::read_to_string(self.bundle.join("shim.pid"))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    /// A container bundle with busybox on an overlay; returns the bundle and the root's mount.
    pub(crate) fn container(
        &self,
        name: &str,
        arguments: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Request {
        let bundle = self.bundle.join("containers").join(name);
        let layers = self.state.path().join("layers").join(name);
        let lower = layers.join("lower");
        for directory in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            std::fs::create_dir_all(lower.join(directory)).unwrap();
        }
        for directory in ["upper", "work"] {
            std::fs::create_dir_all(layers.join(directory)).unwrap();
        }
        std::fs::copy("/bin/busybox", lower.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "sleep", "cat", "uname", "id", "ip", "hostname", "ps", "stat", "dd", "nc", "ping",
        ] {
            std::os::unix::fs::symlink("busybox", lower.join("bin").join(applet)).unwrap();
        }
        std::fs::create_dir_all(&bundle).unwrap();
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "process": {
                "terminal": false,
                "user": { "uid": 0, "gid": 0 },
                "args": arguments,
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {
                    "bounding": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"],
                    "effective": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"],
                    "permitted": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"],
                },
            },
            "root": { "path": "rootfs", "readonly": false },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/shm", "type": "bind", "source": "/run/catamaran/shm", "options": ["rbind", "rw"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
            ],
            "linux": {
                "cgroupsPath": format!("/{name}"),
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }],
                "resources": {},
            },
        });
        change(&mut spec);
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let mut rootfs = api::Mount::new();
        rootfs.type_ = "overlay".into();
        rootfs.source = "overlay".into();
        rootfs.options = vec![
            format!("lowerdir={}", lower.display()),
            format!("upperdir={}", layers.join("upper").display()),
            format!("workdir={}", layers.join("work").display()),
        ];
        let log = bundle.join("log");
        let mut request = api::CreateTaskRequest::new();
        request.id = name.to_owned();
        request.bundle = bundle.display().to_string();
        request.rootfs = vec![rootfs];
        request.stdout = format!("{CRI_LOG_SCHEME}{}", log.display());
        Request {
            create: request,
            log,
            bundle,
            upper: layers.join("upper"),
        }
    }

    /// Nothing of the pod is left on the host but what the test made itself.
    pub(crate) fn assert_clean(&self) {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let bundle = self.bundle.display().to_string();
        let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&bundle)).collect();
        assert!(left.is_empty(), "mounts left: {left:#?}");
        let id = self.id.as_str();
        let processes: Vec<String> = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .filter(|line| {
                line.contains(id) && line.contains("qemu") || line.contains("virtiofsd") && line.contains(id)
            })
            .collect();
        assert!(processes.is_empty(), "processes left: {processes:#?}");
        assert!(!self.bundle.join("share").exists());
        let taps = run("ip", &["-n", &self.name, "-o", "link"]);
        assert!(
            !String::from_utf8_lossy(&taps.stdout).contains("cattap"),
            "a tap is left"
        );
        for hierarchy in ["", "memory", "cpu", "pids", "blkio", "unified"] {
            let cgroup = format!("/sys/fs/cgroup/{hierarchy}{}/{id}", self.cgroup_parent);
            assert!(!Path::new(&cgroup).exists(), "{cgroup} is left");
        }
        let users = std::fs::read_dir(self.state.path().join("vm-users"))
            .map(Iterator::count)
            .unwrap_or(0);
        assert_eq!(users, 0, "a user is still claimed");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("shim.log:\n{}", self.log());
        }
        // Also after a failed test; what cannot be undone shows in the next run's checks.
        let _ = self.shim("delete");
        let _ = Command::new("ip")
            .args(["link", "del", &self.host_interface])
            .output();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
        for hierarchy in ["", "memory", "cpu", "cpuacct", "pids", "blkio"] {
            let _ = std::fs::remove_dir(format!("/sys/fs/cgroup/{hierarchy}{}", self.cgroup_parent));
        }
    }
}

/// A container to create, and where its log goes.
pub(crate) struct Request {
    pub(crate) create: api::CreateTaskRequest,
    pub(crate) log: PathBuf,
    pub(crate) bundle: PathBuf,
    pub(crate) upper: PathBuf,
}

/// The services of a running shim.
pub(crate) struct Shim {
    pub(crate) sandbox: SandboxClient,
    pub(crate) task: TaskClient,
    pub(crate) stream: StreamClient,
    id: String,
}

impl Shim {
    pub(crate) async fn create(&self, bundle: &Path, spec: &PodSpec) -> ttrpc::Result<()> {
        let mut request = sandbox_api::CreateSandboxRequest::new();
        request.sandbox_id = self.id.clone();
        request.bundle_path = bundle.display().to_string();
        request.options = Some(Any {
            type_url: POD_SPEC_TYPE.into(),
            value: serde_json::to_vec(spec).unwrap(),
            ..Default::default()
        })
        .into();
        self.sandbox.create_sandbox(call(), &request).await.map(drop)
    }

    pub(crate) async fn start_sandbox(&self) -> ttrpc::Result<u32> {
        let mut request = sandbox_api::StartSandboxRequest::new();
        request.sandbox_id = self.id.clone();
        Ok(self.sandbox.start_sandbox(call(), &request).await?.pid)
    }

    pub(crate) async fn status(&self) -> (String, HashMap<String, String>) {
        let mut request = sandbox_api::SandboxStatusRequest::new();
        request.sandbox_id = self.id.clone();
        request.verbose = true;
        let status = self.sandbox.sandbox_status(call(), &request).await.unwrap();
        (status.state, status.info)
    }

    pub(crate) async fn stop(&self) {
        let mut request = sandbox_api::StopSandboxRequest::new();
        request.sandbox_id = self.id.clone();
        request.timeout_secs = 20;
        self.sandbox.stop_sandbox(call(), &request).await.unwrap();
        let mut request = sandbox_api::ShutdownSandboxRequest::new();
        request.sandbox_id = self.id.clone();
        self.sandbox.shutdown_sandbox(call(), &request).await.unwrap();
    }

    pub(crate) async fn run(&self, request: &Request) -> ttrpc::Result<()> {
        self.task.create(call(), &request.create).await?;
        let mut start = api::StartRequest::new();
        start.id = request.create.id.clone();
        self.task.start(call(), &start).await.map(drop)
    }

    pub(crate) async fn wait(&self, id: &str) -> u32 {
        let mut request = api::WaitRequest::new();
        request.id = id.to_owned();
        self.task.wait(call(), &request).await.unwrap().exit_status
    }

    pub(crate) async fn kill(&self, id: &str, signal: i32) -> ttrpc::Result<()> {
        let mut request = api::KillRequest::new();
        request.id = id.to_owned();
        request.signal = u32::try_from(signal).unwrap();
        self.task.kill(call(), &request).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &str) -> u32 {
        let mut request = api::DeleteRequest::new();
        request.id = id.to_owned();
        self.task.delete(call(), &request).await.unwrap().exit_status
    }

    pub(crate) async fn exec(&self, id: &str, arguments: &[&str]) -> ExecSyncResponse {
        self.exec_limited(id, arguments, 0).await
    }

    pub(crate) async fn exec_limited(
        &self,
        id: &str,
        arguments: &[&str],
        timeout_ms: i64,
    ) -> ExecSyncResponse {
        let process = json!({
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": arguments,
            "env": ["PATH=/bin"],
            "cwd": "/",
        });
        let mut request = ExecSyncRequest::new();
        request.container_id = id.to_owned();
        request.process = process.to_string().into_bytes();
        request.timeout_ms = timeout_ms;
        request.max_output = 1 << 20;
        self.stream.exec_sync(call(), &request).await.unwrap()
    }
}

/// Texts of a CRI log's lines of one stream.
pub(crate) fn log_lines(path: &Path, stream: &str) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let fields = text.lines().map(|line| line.splitn(4, ' ').collect::<Vec<_>>());
    fields
        .filter(|fields| fields.get(1) == Some(&stream))
        .map(|fields| fields[3].to_owned())
        .collect()
}

/// Polls until `done` answers something.
pub(crate) async fn eventually<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
