//! A network of a test's own: other directories, another bridge and another subnet than any other test that
//! runs at the same time, and everything removed at the end, also after a failure.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary has this module and uses a part of it"
)]

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use catamaran_network::{Network, NetworkConfig, PodNetwork};
use nix::sched::{CloneFlags, setns};

/// Debian's and upstream's directories of plugins.
const PLUGIN_DIRS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

pub struct Lab {
    pub config: NetworkConfig,
    pub network: Network,
    /// `10.x.y`: the subnet without its last part.
    pub prefix: String,
    pub dir: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        // Process ids of tests that run at once differ; tests of one process differ by the count.
        let pid = std::process::id();
        assert!(count < 64, "a process has 64 subnets");
        let prefix = format!("10.{}.{}", 192 + (pid >> 2) % 32, (pid % 4) * 64 + count);
        let dir = tempfile::Builder::new()
            .prefix("catamaran-network-")
            .tempdir()
            .unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["conf", "bin"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let config = NetworkConfig {
            conf_dir: at("conf"),
            bin_dirs: [at("bin")]
                .into_iter()
                .chain(PLUGIN_DIRS.map(PathBuf::from))
                .collect(),
            netns_dir: at("netns"),
            cache_dir: at("cache"),
            default_bridge: format!("cn{pid}x{count}"),
            default_subnet: format!("{prefix}.0/24"),
            default_ipam_dir: at("ipam"),
            plugin_timeout: Duration::from_secs(20),
        };
        Self {
            network: Network::new(config.clone()),
            config,
            prefix,
            dir,
        }
    }

    /// A namespace and a pod in it that is not attached yet.
    pub async fn pod(&self, name: &str) -> PodNetwork {
        let id = format!("{}-{name}", self.config.default_bridge);
        let netns = self.network.create_netns(&id).await.unwrap();
        PodNetwork {
            id,
            netns,
            namespace: "default".to_owned(),
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            ..PodNetwork::default()
        }
    }

    /// Installs a plugin that is a shell script. `$CNI_COMMAND` says what is asked.
    pub fn script(&self, name: &str, body: &str) {
        let path = self.dir.path().join("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Installs a conflist; `plugins` are JSON objects with commas between.
    pub fn conflist(&self, version: &str, plugins: &str) {
        let text = format!(r#"{{"cniVersion":"{version}","name":"lab","plugins":[{plugins}]}}"#);
        std::fs::write(self.config.conf_dir.join("10-lab.conflist"), text).unwrap();
    }

    /// The default's bridge plugin for a conflist.
    pub fn bridge(&self) -> String {
        format!(
            r#"{{"type":"bridge","bridge":"{}","isGateway":true,"ipMasq":true,
                 "ipam":{{"type":"host-local","dataDir":"{}","ranges":[[{{"subnet":"{}"}}]]}}}}"#,
            self.config.default_bridge,
            self.config.default_ipam_dir.display(),
            self.config.default_subnet
        )
    }

    /// What attachments have left on the host: leases, bridge ports, firewall rules, records. The kernel
    /// takes interfaces away a little after their namespace, so this waits for them.
    pub fn leftovers(&self) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let left = self.left_now();
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As [`Self::leftovers`], without waiting.
    pub fn left_now(&self) -> Vec<String> {
        let mut left = Vec::new();
        for network in ["lab", "catamaran"] {
            for name in names(&self.config.default_ipam_dir.join(network)) {
                if name.parse::<IpAddr>().is_ok() {
                    left.push(format!("lease {name}"));
                }
            }
        }
        let ports = Path::new("/sys/class/net")
            .join(&self.config.default_bridge)
            .join("brif");
        left.extend(names(&ports).into_iter().map(|port| format!("port {port}")));
        let rules = output("iptables", &["-w", "-t", "nat", "-S"]);
        // The rule for the whole network stays, as the bridge does.
        let of_pods = |rule: &&str| {
            rule.contains(&self.config.default_bridge) && !rule.contains("catamaran default network")
        };
        left.extend(rules.lines().filter(of_pods).map(str::to_owned));
        left.extend(
            names(&self.config.cache_dir)
                .into_iter()
                .map(|record| format!("record {record}")),
        );
        left
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let network = self.network.clone();
        // The test's runtime may be shutting down.
        let cleanup = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                for id in network.attached().unwrap_or_default() {
                    let _ = network.detach_id(&id).await;
                }
                for id in network.netns_list().unwrap_or_default() {
                    let _ = network.remove_netns(&id).await;
                }
                if let Err(error) = network.remove_default().await {
                    eprintln!("left behind: {error}");
                }
            });
        });
        let _ = cleanup.join();
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

pub fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `work` in a thread inside the pod's namespace.
pub fn inside<T: Send + 'static>(pod: &PodNetwork, work: impl FnOnce() -> T + Send + 'static) -> T {
    let pin = std::fs::File::open(&pod.netns).unwrap();
    let thread = std::thread::spawn(move || {
        setns(pin, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    thread.join().unwrap()
}

/// A TCP server in the pod that accepts for as long as the test runs.
pub fn serve(pod: &PodNetwork, port: u16) {
    let listener = inside(pod, move || TcpListener::bind(("0.0.0.0", port)).unwrap());
    std::thread::spawn(move || listener.incoming().for_each(drop));
}

pub fn connects(address: &str) -> Result<(), String> {
    let address: SocketAddr = address.parse().unwrap();
    let connection = TcpStream::connect_timeout(&address, Duration::from_secs(3));
    connection
        .map(drop)
        .map_err(|error| format!("{address}: {error}"))
}
