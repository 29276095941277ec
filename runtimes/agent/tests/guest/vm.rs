//! A QEMU guest with the agent, for one test.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catamaran_guest_protocol::v1::agent_client::AgentClient;
use catamaran_guest_protocol::v1::{
    ConfigureSandboxRequest, ContainerRequest, CreateContainerRequest, HelloRequest, HelloResponse,
    OutputChunk, ProcessRequest, WaitResponse,
};
use catamaran_guest_protocol::{PORT_NAME, connect};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::initramfs::Initramfs;

/// Bound of a boot; emulated, on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// A running guest. Dropping it ends QEMU.
pub(crate) struct Vm {
    qemu: Child,
    pub(crate) agent: AgentClient<Channel>,
    pub(crate) hello: HelloResponse,
    pub(crate) boot: Duration,
    directory: tempfile::TempDir,
}

/// What a test needs that this machine may not have: the reason to skip.
pub(crate) fn missing() -> Option<String> {
    let kernel = kernel();
    if !kernel.is_file() {
        return Some(format!(
            "no guest kernel at {} (CATAMARAN_TEST_KERNEL)",
            kernel.display()
        ));
    }
    ["/usr/bin/qemu-system-x86_64", "/bin/busybox"]
        .iter()
        .find(|path| !Path::new(path).is_file())
        .map(|path| format!("{path} is missing"))
        .or_else(|| {
            let agent = agent();
            (!agent.is_file())
                .then(|| format!("no static agent at {} (CATAMARAN_TEST_AGENT)", agent.display()))
        })
}

fn kernel() -> PathBuf {
    std::env::var_os("CATAMARAN_TEST_KERNEL").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest-kernel/vmlinux"),
        PathBuf::from,
    )
}

fn agent() -> PathBuf {
    std::env::var_os("CATAMARAN_TEST_AGENT").map_or_else(
        || {
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../../target/x86_64-unknown-linux-gnu/release/catamaran-agent")
        },
        PathBuf::from,
    )
}

impl Vm {
    /// Boots a guest and says hello.
    pub(crate) async fn boot(command_line: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let initramfs = directory.path().join("initramfs");
        write_initramfs(&initramfs);
        let socket = directory.path().join("agent.sock");
        let console = directory.path().join("console");
        let started = Instant::now();
        let qemu = Command::new("/usr/bin/qemu-system-x86_64")
            .args([
                "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "256",
            ])
            .args([
                "-bios",
                "qboot.rom",
                "-nodefaults",
                "-no-user-config",
                "-nographic",
                "-no-reboot",
            ])
            .arg("-kernel")
            .arg(kernel())
            .arg("-initrd")
            .arg(&initramfs)
            .args([
                "-append",
                &format!("console=ttyS0 quiet panic=-1 audit=0 {command_line}"),
            ])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-device", "virtio-serial-pci"])
            .args([
                "-chardev",
                &format!("socket,id=agent,path={},server=on,wait=off", socket.display()),
            ])
            .args([
                "-device",
                &format!("virtserialport,chardev=agent,name={PORT_NAME}"),
            ])
            .stdin(Stdio::null())
            .spawn()
            .expect("start QEMU");
        // From here on a panic must end QEMU.
        let mut guard = Guard(Some(qemu));
        let connected = tokio::time::timeout(BOOT_LIMIT, async {
            let stream = loop {
                match UnixStream::connect(&socket).await {
                    Ok(stream) => break stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            };
            connect(stream, &nonce()).await.expect("connect to the agent")
        })
        .await;
        let mut agent = connected.unwrap_or_else(|_| {
            panic!(
                "the guest did not boot:\n{}",
                std::fs::read_to_string(&console).unwrap_or_default()
            )
        });
        let clock = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a clock")
            .as_nanos();
        let hello = HelloRequest {
            clock_ns: i64::try_from(clock).expect("a date"),
            entropy: vec![7; 32],
        };
        let hello = agent.hello(hello).await.expect("hello").into_inner();
        let qemu = guard.0.take().expect("QEMU");
        Self {
            qemu,
            agent,
            hello,
            boot: started.elapsed(),
            directory,
        }
    }

    /// What the guest said on its console.
    pub(crate) fn console(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("console")).unwrap_or_default()
    }

    /// A second connection after the first was dropped.
    pub(crate) async fn reconnect(&mut self) {
        // QEMU serves one connection at a time: the old one goes first.
        self.agent = AgentClient::new(Endpoint::from_static("http://gone.invalid").connect_lazy());
        let stream = UnixStream::connect(self.directory.path().join("agent.sock"))
            .await
            .expect("connect");
        self.agent = tokio::time::timeout(BOOT_LIMIT, connect(stream, &nonce()))
            .await
            .expect("the agent answers again")
            .expect("connect to the agent again");
    }

    pub(crate) async fn sandbox(&mut self, shared_pid: bool) {
        let request = ConfigureSandboxRequest {
            hostname: "test-pod".into(),
            sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
            shared_pid,
            shm_bytes: 1 << 20,
        };
        // Twice: it is idempotent.
        self.agent
            .configure_sandbox(request.clone())
            .await
            .expect("configure the sandbox");
        self.agent
            .configure_sandbox(request)
            .await
            .expect("configure the sandbox again");
    }

    pub(crate) async fn create(&mut self, id: &str, spec: &Value, stdin: bool) -> Result<u32, tonic::Status> {
        let spec = serde_json::to_vec(spec).expect("JSON");
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec,
            stdin,
        };
        self.agent
            .create_container(request)
            .await
            .map(|answer| answer.into_inner().pid)
    }

    pub(crate) async fn start(&mut self, id: &str) {
        self.agent
            .start_container(ContainerRequest {
                container_id: id.into(),
            })
            .await
            .expect("start");
    }

    /// Creates, starts and waits for a container; returns its end and its output.
    pub(crate) async fn run(&mut self, id: &str, spec: &Value) -> (WaitResponse, String, String) {
        if let Err(error) = self.create(id, spec, false).await {
            panic!("create {id}: {error}\nconsole:\n{}", self.console());
        }
        self.start(id).await;
        let (out, err) = self.output(id, "").await;
        (self.wait(id, "").await, out, err)
    }

    pub(crate) async fn wait(&mut self, id: &str, exec_id: &str) -> WaitResponse {
        self.agent
            .wait(process(id, exec_id))
            .await
            .expect("wait")
            .into_inner()
    }

    /// All output until its end.
    pub(crate) async fn output(&mut self, id: &str, exec_id: &str) -> (String, String) {
        let mut stream = self
            .agent
            .read_output(process(id, exec_id))
            .await
            .expect("output")
            .into_inner();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while let Some(OutputChunk { stream, data }) = stream.message().await.expect("output") {
            if stream == 1 { &mut out } else { &mut err }.extend(data);
        }
        (
            String::from_utf8_lossy(&out).into_owned(),
            String::from_utf8_lossy(&err).into_owned(),
        )
    }

    pub(crate) async fn delete(&mut self, id: &str) {
        self.agent.delete(process(id, "")).await.expect("delete");
    }

    /// Waits until QEMU has ended by itself.
    pub(crate) async fn powered_off(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if self.qemu.try_wait().expect("wait for QEMU").is_some() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }
}

pub(crate) fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
    }
}

struct Guard(Option<Child>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(qemu) = &mut self.0 {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("console of the guest:\n{}", self.console());
        }
    }
}

fn nonce() -> String {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("random bytes");
    hex::encode(bytes)
}

fn write_initramfs(path: &Path) {
    let agent = std::fs::read(agent()).expect("the agent");
    let busybox = std::fs::read("/bin/busybox").expect("busybox");
    assert_ne!(
        std::fs::metadata("/bin/busybox")
            .expect("busybox")
            .permissions()
            .mode()
            & 0o111,
        0
    );
    let mut archive = Initramfs::new();
    archive
        .directory("dev")
        .device("dev/console", 0o600, 5, 1)
        .device("dev/null", 0o666, 1, 3)
        .file("init", 0o755, &agent)
        .directory("testroot");
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "run"] {
        archive.directory(&format!("testroot/{directory}"));
    }
    archive.file("testroot/bin/busybox", 0o755, &busybox);
    for applet in [
        "sh", "cat", "echo", "id", "sleep", "ps", "uname", "hostname", "yes", "head", "kill", "ls", "mkdir",
        "nc", "dd", "stty", "tty", "mknod", "env", "pwd", "test", "true", "touch", "chmod", "grep", "awk",
        "stat", "tail",
    ] {
        archive.link(&format!("testroot/bin/{applet}"), "busybox");
    }
    archive
        .file(
            "testroot/etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .file("testroot/etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")
        .finish();
    // The kernel unpacks one archive after the other: a distribution kernel's modules come first.
    let mut bytes = std::env::var_os("CATAMARAN_TEST_INITRAMFS")
        .map(|base| std::fs::read(base).expect("CATAMARAN_TEST_INITRAMFS"))
        .unwrap_or_default();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend_from_slice(archive.bytes());
    std::fs::write(path, bytes).expect("write the initramfs");
}

/// An ordinary container's spec that runs a shell script in the guest's `/testroot`.
pub(crate) fn shell(script: &str) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_NET_BIND_SERVICE",
        "CAP_KILL",
        "CAP_SYS_CHROOT"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": false,
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
        },
        "root": {"path": "/testroot", "readonly": false},
        "hostname": "test-pod",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/catamaran/shm", "options": ["rbind", "rw"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
            "cgroupsPath": "/elsewhere",
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"]
        }
    })
}
