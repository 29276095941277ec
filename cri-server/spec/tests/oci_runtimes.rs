//! Generated specs run by the OCI runtimes of this machine; what the process finds is what was asked for.
//! Needs root, runc and busybox (static): a missing one is a failure, not a skip.

mod fixture;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use catamaran_cri_api::v1::{
    Capability, Device, Int64Value, LinuxContainerResources, Mount, SecurityProfile,
    security_profile::ProfileType,
};
use catamaran_spec::{CgroupVersion, HostFeatures, HostInputs, ImageUsers, RuntimeFeatures, Side};
use fixture::Fixture;

/// crun 1.8 refuses a node with controllers on cgroup v1 and a v2 hierarchy beside them.
const RUNTIMES: [&str; 1] = ["runc"];

/// A bundle with a busybox root, namespaces to join and a cgroup of its own; all gone when dropped.
struct Bundle {
    dir: tempfile::TempDir,
    id: String,
    pinned: Child,
    runtime: &'static str,
}

impl Bundle {
    fn new(runtime: &'static str) -> Bundle {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!(
            "catamaran-spec-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = tempfile::tempdir().expect("temp dir");
        let root = dir.path().join("rootfs");
        for name in ["bin", "proc", "dev", "sys", "etc", "tmp", "data"] {
            fs::create_dir_all(root.join(name)).expect("directory");
        }
        // Users of the container walk through it.
        for path in [dir.path(), &root] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("mode");
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("package busybox-static");
        for name in ["resolv.conf", "hosts", "hostname"] {
            fs::write(dir.path().join(name), format!("this is {name}\n")).expect("pod file");
        }
        fs::create_dir(dir.path().join("shm")).expect("shm");
        let pinned = Command::new("unshare")
            .args(["--net", "--ipc", "--uts", "sleep", "120"])
            .spawn()
            .expect("unshare");
        // It has left our namespaces once it is sleep.
        let comm = format!("/proc/{}/comm", pinned.id());
        for _ in 0..500 {
            if fs::read_to_string(&comm).is_ok_and(|name| name.trim() == "sleep") {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Bundle {
            dir,
            id,
            pinned,
            runtime,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn namespace(&self, kind: &str) -> PathBuf {
        format!("/proc/{}/ns/{kind}", self.pinned.id()).into()
    }

    /// The fixture of this machine and this bundle.
    fn fixture(&self, change: impl FnOnce(&mut Fixture)) -> Fixture {
        let mut fixture = Fixture::default();
        let namespaces = fixture.namespaces.as_mut().expect("host");
        namespaces.network = Some(self.namespace("net"));
        namespaces.ipc = Some(self.namespace("ipc"));
        namespaces.uts = Some(self.namespace("uts"));
        fixture.host = HostFeatures::detect();
        fixture.runtime = RuntimeFeatures::default();
        fixture.cgroup_parent = format!("/{}", self.id);
        fixture.files.resolv_conf = self.path("resolv.conf");
        fixture.files.hosts = self.path("hosts");
        fixture.files.hostname = self.path("hostname");
        fixture.files.shm = self.path("shm");
        fixture.users = ImageUsers {
            passwd: Some(b"root:x:0:0::/:/bin/sh\nweb:x:1000:1001::/:/bin/sh\n".to_vec()),
            group: Some(b"root:x:0:\nweb:x:1001:\nlogs:x:1002:web\n".to_vec()),
        };
        change(&mut fixture);
        fixture.inputs = HostInputs::gather(&fixture.container, Side::Host).expect("gathers");
        fixture
    }

    fn run(&self, fixture: &Fixture) -> Output {
        let spec = fixture.spec().expect("spec");
        fs::write(self.path("config.json"), serde_json::to_vec(&spec).expect("json")).expect("config.json");
        Command::new(self.runtime)
            .arg("--root")
            .arg(self.path("runtime"))
            .args(["run", "--bundle"])
            .arg(self.dir.path())
            .arg(&self.id)
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", self.runtime))
    }

    /// Runs a script of busybox' shell; its standard output.
    fn shell(&self, script: &str, change: impl FnOnce(&mut Fixture)) -> String {
        let fixture = self.fixture(|fixture| {
            let script = format!("busybox mkdir -p /tmp 2>/dev/null; {script}");
            fixture.container.command = ["/bin/busybox", "sh", "-c", &script].map(str::to_owned).to_vec();
            change(fixture);
        });
        let output = self.run(&fixture);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{} {}: {stderr}",
            self.runtime,
            output.status
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let root = self.path("runtime");
        let delete = Command::new(self.runtime)
            .arg("--root")
            .arg(root)
            .args(["delete", "--force", &self.id])
            .output();
        drop(delete);
        drop(self.pinned.kill());
        drop(self.pinned.wait());
        let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        for parent in hierarchies
            .map(|entry| entry.path())
            .chain([PathBuf::from("/sys/fs/cgroup")])
        {
            let cgroup = parent.join(&self.id);
            drop(fs::remove_dir(cgroup.join("c1")));
            drop(fs::remove_dir(&cgroup));
        }
    }
}

fn line<'a>(text: &'a str, key: &str) -> &'a str {
    let found = text.lines().find_map(|line| line.strip_prefix(key));
    found.unwrap_or_else(|| panic!("no {key} in:\n{text}")).trim()
}

#[test]
fn a_restricted_container() {
    for runtime in RUNTIMES {
        let bundle = Bundle::new(runtime);
        let script = "busybox cat /proc/self/status; echo ENV; busybox env; echo IDS; busybox id -u; busybox id -g; \
             busybox id -G; busybox pwd; busybox cat /etc/hosts; busybox readlink /proc/self/ns/net; \
             busybox touch /x 2>/dev/null || echo read-only; busybox ls /proc/1/exe >/dev/null && echo pid1=$$";
        let out = bundle.shell(script, |f| {
            let security = f.security();
            security.run_as_username = "web".into();
            security.supplemental_groups = vec![5000];
            security.no_new_privs = true;
            security.readonly_rootfs = true;
            security.seccomp = Some(SecurityProfile::default());
            security.capabilities = Some(Capability {
                drop_capabilities: vec!["ALL".into()],
                add_ambient_capabilities: vec!["NET_BIND_SERVICE".into()],
                ..Default::default()
            });
            f.container.working_dir = "/data".into();
            f.container.envs = vec![catamaran_cri_api::v1::KeyValue {
                key: "GREETING".into(),
                value: "hello world".into(),
            }];
        });
        for set in ["CapBnd:", "CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
            assert_eq!(line(&out, set), "0000000000000400", "{runtime} {set}");
        }
        assert_eq!(
            (line(&out, "Seccomp:"), line(&out, "NoNewPrivs:")),
            ("2", "1"),
            "{runtime}"
        );
        assert_eq!(line(&out, "GREETING="), "hello world");
        assert_eq!(line(&out, "HOSTNAME="), "pod");
        let after = out.split("IDS\n").nth(1).expect("ids");
        let lines: Vec<&str> = after.lines().collect();
        assert_eq!(lines[..2], ["1000", "1001"], "{runtime}");
        let mut groups: Vec<&str> = lines[2].split(' ').collect();
        groups.sort_unstable();
        assert_eq!(groups, ["1001", "1002", "5000"], "{runtime}");
        assert_eq!(lines[3..5], ["/data", "this is hosts"], "{runtime}");
        let joined = fs::read_link(bundle.namespace("net")).expect("link");
        assert_eq!(Path::new(lines[5]), joined, "{runtime}");
        assert_eq!(lines[6..], ["read-only", "pid1=1"], "{runtime}");
    }
}

#[test]
fn default_capabilities_and_limits() {
    let host = HostFeatures::detect();
    for runtime in RUNTIMES {
        let bundle = Bundle::new(runtime);
        let script = "busybox cat /proc/self/status; busybox cat /proc/self/oom_score_adj; \
             busybox cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; \
             busybox cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null; \
             echo x 2>/dev/null >/proc/sys/kernel/domainname || echo proc-sys-read-only; \
             busybox unshare -U busybox true 2>/dev/null || echo no-unshare; \
             busybox cat /proc/kcore 2>/dev/null | busybox wc -c";
        let out = bundle.shell(script, |f| {
            f.security().seccomp = Some(SecurityProfile::default());
            f.security().masked_paths = vec!["/proc/kcore".into()];
            f.security().readonly_paths = vec!["/proc/sys".into()];
            f.container.linux.as_mut().expect("linux").resources = Some(LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 512,
                oom_score_adj: -500,
                ..Default::default()
            });
        });
        assert_eq!(line(&out, "CapBnd:"), "00000000a80425fb", "{runtime}");
        assert_eq!(line(&out, "CapEff:"), "00000000a80425fb", "{runtime}");
        assert_eq!(
            (line(&out, "CapInh:"), line(&out, "Seccomp:")),
            ("0000000000000000", "2"),
            "{runtime}"
        );
        let rest: Vec<&str> = out
            .lines()
            .skip_while(|line| !line.starts_with("nonvoluntary"))
            .skip(1)
            .collect();
        let oom = host
            .min_oom_score_adj
            .map_or(-500, |lowest| lowest.max(-500))
            .to_string();
        let mut expected = vec![oom.as_str(), "67108864"];
        if host.cgroup == CgroupVersion::V1 {
            expected.push("50000");
        }
        expected.extend(["proc-sys-read-only", "no-unshare", "0"]);
        assert_eq!(rest, expected, "{runtime}");
    }
}

#[test]
fn a_privileged_container() {
    for runtime in RUNTIMES {
        let bundle = Bundle::new(runtime);
        let script = "busybox cat /proc/self/status; busybox test -c /dev/kmsg && echo kmsg; \
             busybox grep ' /sys sysfs rw' /proc/mounts >/dev/null && echo sys-rw";
        let out = bundle.shell(script, Fixture::privileged);
        let own = fs::read_to_string("/proc/self/status").expect("status");
        assert_eq!(line(&out, "CapEff:"), line(&own, "CapBnd:"), "{runtime}");
        assert_eq!(line(&out, "Seccomp:"), "0", "{runtime}");
        assert!(out.ends_with("kmsg\nsys-rw\n"), "{runtime}: {out}");
    }
}

#[test]
fn mounts_devices_and_a_profile_of_the_node() {
    for runtime in RUNTIMES {
        let bundle = Bundle::new(runtime);
        fs::create_dir(bundle.path("volume")).expect("volume");
        fs::write(bundle.path("volume/file"), "content\n").expect("file");
        let profile = bundle.path("profile.json");
        let no_mkdir = br#"{"defaultAction":"SCMP_ACT_ALLOW",
            "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#;
        fs::write(&profile, no_mkdir).expect("profile");
        let script = "busybox cat /m/ro/file; busybox touch /m/ro/x 2>/dev/null || echo ro; busybox touch /m/rw/made; \
             busybox mkdir /m/rw/dir 2>/dev/null || echo no-mkdir; (exec 3</dev/device) && echo readable; \
             (exec 3>/dev/device) 2>/dev/null || echo no-write; busybox id -u; busybox id -g";
        let out = bundle.shell(script, |f| {
            let volume = bundle.path("volume").to_str().expect("utf-8").to_owned();
            let mount = |inside: &str, readonly| Mount {
                container_path: inside.into(),
                host_path: volume.clone(),
                readonly,
                ..Default::default()
            };
            f.container.mounts = vec![mount("/m/ro", true), mount("/m/rw", false)];
            f.container.devices = vec![Device {
                container_path: "/dev/device".into(),
                host_path: "/dev/fuse".into(),
                permissions: "rm".into(),
            }];
            f.security().run_as_user = Some(Int64Value { value: 0 });
            f.security().run_as_group = Some(Int64Value { value: 77 });
            f.security().seccomp = Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: profile.to_str().expect("utf-8").into(),
            });
        });
        assert_eq!(
            out, "content\nro\nno-mkdir\nreadable\nno-write\n0\n77\n",
            "{runtime}"
        );
        assert!(bundle.path("volume/made").exists());
    }
}
