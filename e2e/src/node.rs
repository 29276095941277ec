//! One node under test: a daemon in a temporary root with its own bridge, subnet and cgroup parent, and a
//! registry on loopback. Several live side by side. `finish` fails where anything is left behind.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::binaries;
use crate::crictl::Crictl;
use crate::daemon::{self, Flavour, Layout, Settings};
use crate::image;
use crate::leaks;
use crate::process::{Service, tail};
use crate::registry::Registry;
use crate::requests::Request;
use crate::subnet::Subnet;

/// What differs from the usual node.
#[derive(Debug, Default)]
pub struct Options {
    /// Entries of Catamaran's `handlers`.
    pub handlers: Vec<(String, Value)>,
    /// Further top-level keys of Catamaran's configuration.
    pub overrides: Vec<(String, Value)>,
    /// A CNI plugin put behind the usual ones, and its binary.
    pub last_plugin: Option<(Value, PathBuf)>,
    /// No conflist is installed: the daemon's embedded default network is used.
    pub no_conflist: bool,
    /// Guest artefacts in place of those that were built.
    pub guest: Option<PathBuf>,
    /// The daemon's root is a tmpfs of this many MiB.
    pub root_mib: Option<u32>,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its sandbox id.
    pub id: String,
    /// What it was made of; CreateContainer wants it again.
    pub request: Request,
}

/// The node.
#[derive(Debug)]
pub struct Node {
    /// Which daemon.
    pub flavour: Flavour,
    /// Where its things are.
    pub layout: Layout,
    /// Its network.
    pub subnet: Subnet,
    /// Its registry.
    pub registry: Registry,
    /// The caller.
    pub crictl: Crictl,
    /// Reference of the busybox image, already pulled.
    pub busybox: String,
    settings: Settings,
    daemon: Mutex<Option<Service>>,
    mounted_root: bool,
    // Last, so that the directory goes when everything that uses it is gone.
    base: tempfile::TempDir,
}

/// How long a daemon may take until its socket answers: an adopting start included.
const START_LIMIT: Duration = Duration::from_secs(30);

impl Node {
    /// Starts registry and daemon and pulls the busybox image.
    ///
    /// # Errors
    /// Something is not installed or not built, or the daemon does not come up; its log is in the message.
    pub fn start(flavour: Flavour, options: Options) -> Result<Self> {
        let base = tempfile::Builder::new().prefix("cte-").tempdir_in("/tmp")?;
        // As /run and /var/lib are: the root of a pod's user namespace is nobody here and must find its files.
        let searchable = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(base.path(), searchable)?;
        let mut layout = Layout::create(base.path())?;
        let subnet = Subnet::claim()?;
        leaks::remove_rules(&subnet)?;
        let registry = Registry::start(&base.path().join("registry"))?;
        let busybox = registry.push("busybox:1", &image::busybox()?)?;
        let mut settings = Settings {
            handlers: options.handlers.into_iter().collect(),
            overrides: options.overrides.into_iter().collect(),
            pause_image: None,
            cgroup_parent: format!("/{}", subnet.name()),
        };
        if flavour == Flavour::Containerd {
            settings.pause_image = Some(registry.push("pause:1", &image::pause()?)?);
        }
        if let Some(mib) = options.root_mib {
            let size = format!("size={mib}m");
            mount(
                Some("tmpfs"),
                &layout.root,
                Some("tmpfs"),
                MsFlags::empty(),
                Some(size.as_str()),
            )
            .context("mounting a tmpfs as the daemon's root")?;
        }
        if flavour == Flavour::Catamaran {
            let guest = options.guest.map_or_else(binaries::guest_directory, Ok)?;
            std::os::unix::fs::symlink(guest, layout.root.join("guest"))?;
        }
        let last = match options.last_plugin {
            Some((plugin, binary)) => {
                // One directory for all: containerd 1.6 knows no second.
                let directory = base.path().join("cni-bin");
                link_plugins(&layout.cni_bins, &binary, &directory)?;
                layout.cni_bins = vec![directory];
                Some(plugin)
            }
            None => None,
        };
        if options.no_conflist {
            let network = json!({
                "conf_dir": layout.cni, "bin_dirs": layout.cni_bins, "plugin_timeout_seconds": 20,
                "default_bridge": subnet.name(), "default_subnet": subnet.cidr(),
                "default_ipam_dir": layout.leases,
            });
            settings.overrides.insert("network".to_owned(), network);
        } else {
            let conflist = subnet.conflist(&layout.leases, last);
            std::fs::write(
                layout.cni.join("10-e2e.conflist"),
                serde_json::to_vec_pretty(&conflist)?,
            )?;
        }
        let crictl = Crictl::new(&layout.socket, base.path())?;
        let node = Self {
            flavour,
            layout,
            subnet,
            registry,
            crictl,
            busybox,
            settings,
            daemon: Mutex::new(None),
            mounted_root: options.root_mib.is_some(),
            base,
        };
        node.start_daemon()?;
        node.crictl.ok(&["pull", &node.busybox])?;
        Ok(node)
    }

    /// Starts the daemon (again) and waits until it serves.
    ///
    /// # Errors
    /// It ends or does not answer; its log is in the message.
    pub fn start_daemon(&self) -> Result<()> {
        let mut command = daemon::prepare(self.flavour, &self.layout, &self.settings)?;
        let mut service = Service::start(&mut command, &self.layout.log)?;
        let socket = self.layout.socket.clone();
        service.wait_until("answer on its socket", START_LIMIT, || {
            UnixStream::connect(&socket).is_ok()
        })?;
        *self.daemon() = Some(service);
        // A socket may be bound before it is served.
        let end = Instant::now() + START_LIMIT;
        loop {
            match self.crictl.ok(&["version"]) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn daemon(&self) -> std::sync::MutexGuard<'_, Option<Service>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the daemon where a case that failed has left it dead.
    ///
    /// # Errors
    /// As [`Self::start_daemon`].
    pub fn ensure_daemon(&self) -> Result<()> {
        let running = self.daemon().is_some() && UnixStream::connect(&self.layout.socket).is_ok();
        if running {
            return Ok(());
        }
        drop(self.daemon().take());
        self.start_daemon()
    }

    /// Ends the daemon at once, as a crash would.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill_daemon(&self) -> Result<()> {
        self.end_daemon(Signal::SIGKILL)
    }

    /// Ends the daemon as a service manager would.
    ///
    /// # Errors
    /// It does not run, or does not end within 20 s.
    pub fn stop_daemon(&self) -> Result<()> {
        self.end_daemon(Signal::SIGTERM)
    }

    fn end_daemon(&self, signal: Signal) -> Result<()> {
        let service = self.daemon().take();
        service
            .context("the daemon does not run")?
            .stop(signal, Duration::from_secs(20))
    }

    /// Process id of the daemon.
    ///
    /// # Errors
    /// It does not run.
    pub fn daemon_pid(&self) -> Result<u32> {
        self.daemon()
            .as_ref()
            .map(Service::pid)
            .context("the daemon does not run")
    }

    /// What the daemon's open descriptors are of, sorted.
    ///
    /// # Errors
    /// It does not run.
    pub fn daemon_descriptors(&self) -> Result<Vec<String>> {
        let directory = format!("/proc/{}/fd", self.daemon_pid()?);
        let entries = std::fs::read_dir(&directory).context(directory)?;
        // One may be closed while it is looked at.
        let targets = entries
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let mut open: Vec<String> = targets.map(|target| target.display().to_string()).collect();
        open.sort();
        Ok(open)
    }

    /// A directory of this node for a test's files.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.base.path().join("files").join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// A pod request with a log directory and a cgroup of its own.
    #[must_use]
    pub fn pod_request(&self, name: &str) -> Request {
        let logs = self.layout.logs.join(name);
        Request::pod(
            name,
            &logs.display().to_string(),
            &format!("{}/{name}", self.settings.cgroup_parent),
        )
    }

    /// Writes a request where crictl reads it from.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&self, kind: &str, request: &Request) -> Result<String> {
        let file = self
            .directory("requests")?
            .join(format!("{kind}-{}.json", request.name()));
        std::fs::write(&file, serde_json::to_vec_pretty(request.json())?)?;
        Ok(file.display().to_string())
    }

    /// `crictl runp`.
    ///
    /// # Errors
    /// It was refused or failed.
    pub fn run_pod(&self, handler: &str, request: &Request) -> Result<Pod> {
        let file = self.write("pod", request)?;
        let id = self.crictl.ok(&["runp", "--runtime", handler, &file])?;
        Ok(Pod {
            id,
            request: request.clone(),
        })
    }

    /// `crictl runp` that must fail; returns its message.
    ///
    /// # Errors
    /// It succeeded.
    pub fn run_pod_fails(&self, handler: &str, request: &Request) -> Result<String> {
        let file = self.write("pod", request)?;
        self.crictl.fails(&["runp", "--runtime", handler, &file])
    }

    /// `crictl create`.
    ///
    /// # Errors
    /// It was refused or failed.
    pub fn create(&self, pod: &Pod, container: &Request) -> Result<String> {
        self.crictl.ok(&self
            .create_args(pod, container)?
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>())
    }

    /// `crictl create` that must fail; returns its message.
    ///
    /// # Errors
    /// It succeeded.
    pub fn create_fails(&self, pod: &Pod, container: &Request) -> Result<String> {
        self.crictl.fails(
            &self
                .create_args(pod, container)?
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>(),
        )
    }

    fn create_args(&self, pod: &Pod, container: &Request) -> Result<Vec<String>> {
        let pod_file = self.write("pod", &pod.request)?;
        let unique = format!("container-{}", pod.request.name());
        let file = self.write(&unique, container)?;
        Ok(vec!["create".to_owned(), pod.id.clone(), file, pod_file])
    }

    /// `crictl stopp` and `crictl rmp`.
    ///
    /// # Errors
    /// Either failed.
    pub fn remove_pod(&self, id: &str) -> Result<()> {
        self.crictl.ok(&["stopp", id])?;
        self.crictl.ok(&["rmp", id])?;
        Ok(())
    }

    /// Daemon and shim logs and consoles, for a failure's message.
    #[must_use]
    pub fn diagnostics(&self) -> String {
        let mut text = format!(
            "--- {} ---\n{}\n",
            self.layout.log.display(),
            tail(&self.layout.log, 80)
        );
        for file in log_files(&self.layout.state.join("pods")) {
            text.push_str(&format!("--- {} ---\n{}\n", file.display(), tail(&file, 30)));
        }
        text
    }

    /// Removes every pod, stops the daemon and says what is left of it on the machine.
    ///
    /// # Errors
    /// Something leaked, or the daemon did not stop.
    pub fn finish(self) -> Result<()> {
        let pods = self.crictl.ok(&["pods", "-q"])?;
        for id in pods.lines() {
            self.remove_pod(id)?;
        }
        let mut left = self.wait_for_no_leaks(Duration::from_secs(20))?;
        self.stop_daemon()?;
        left.extend(leaks::processes(&self.layout, &self.subnet, &[])?);
        let rules = leaks::rules(&self.subnet)?;
        left.extend(rules.into_iter().map(|rule| format!("packet filter rule {rule}")));
        if left.is_empty() {
            return Ok(());
        }
        left.sort();
        left.dedup();
        bail!(
            "left behind on the machine:\n  {}\n{}",
            left.join("\n  "),
            self.diagnostics()
        )
    }

    /// What is left of removed pods while the daemon still runs; teardown beside the answer gets `limit`.
    ///
    /// # Errors
    /// /proc or the node's directories cannot be read.
    pub fn wait_for_no_leaks(&self, limit: Duration) -> Result<Vec<String>> {
        let end = Instant::now() + limit;
        loop {
            let mut left = leaks::of_pods(self.flavour, &self.layout, &self.subnet)?;
            let daemon = self.daemon().as_ref().map(Service::pid);
            left.extend(leaks::processes(&self.layout, &self.subnet, daemon.as_slice())?);
            if left.is_empty() || Instant::now() >= end {
                return Ok(left);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // After a failure there may be anything; the machine is left clean for the next test all the same.
        drop(self.daemon().take());
        leaks::sweep(&self.layout, &self.subnet);
        if self.mounted_root {
            let _ = umount2(&self.layout.root, MntFlags::MNT_DETACH);
        }
        let _ = self.subnet.remove_bridge();
    }
}

fn link_plugins(from: &[PathBuf], further: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    let installed = from
        .iter()
        .flat_map(|directory| std::fs::read_dir(directory).into_iter().flatten().flatten());
    for plugin in installed.map(|entry| entry.path()).chain([further.to_owned()]) {
        let name = plugin.file_name().context("a plugin without a name")?;
        std::os::unix::fs::symlink(&plugin, to.join(name)).with_context(|| plugin.display().to_string())?;
    }
    Ok(())
}

fn log_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory && !matches!(name.as_str(), "rootfs" | "shm" | "share") {
                todo.push(path);
            } else if !is_directory && (name.ends_with(".log") || name.contains("console")) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
