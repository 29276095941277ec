//! QEMU as the VMM. The machine is `q35` with qboot and the kernel's PVH entry, devices that are needed from the
//! start (virtio-serial for the agent, a random source), and empty root ports for what is plugged later. Nothing
//! in the machine as it starts blocks saving and restoring it.
//!
//! QEMU runs as the pod's own user in the pod's own cgroup and network namespace, without capabilities, behind
//! its system call filter; every file and socket it works with is opened here and inherited. It dies with the
//! thread that started it, which is the shim's only one.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use catamaran_guest_protocol::PORT_NAME;
use catamaran_sandbox::pod_spec::Acceleration;
use serde_json::json;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use super::console::Tail;
use super::qmp::{Event, Qmp};
use super::{Machine, Nic, SharedFs, Vmm, VmmError};
use crate::confinement::Confinement;

/// Root ports, each for one device: a network card or two, the shared file system, disks.
pub const PORTS: usize = 8;

/// A QEMU process under control.
pub struct Qemu {
    pid: u32,
    qmp: Qmp,
    ports: Mutex<BTreeSet<usize>>,
    ended: watch::Receiver<Option<String>>,
    kill: mpsc::Sender<()>,
    port_opened: Arc<AtomicBool>,
}

/// What [`start`] hands out beside the control.
pub struct Started {
    /// Control.
    pub vmm: Qemu,
    /// Byte stream to the agent's port.
    pub agent: UnixStream,
    /// The serial console's last output.
    pub console: Tail,
}

/// Starts the machine; returns when QEMU answers, long before the guest does.
///
/// # Errors
/// [`VmmError`]; nothing of the process is left then.
pub async fn start(machine: &Machine, confinement: &Confinement) -> Result<Started, VmmError> {
    let failed = |source| VmmError::Start {
        program: machine.program.clone(),
        source,
    };
    let (qmp, qmp_theirs) = stream_pair().map_err(failed)?;
    let (agent, agent_theirs) = stream_pair().map_err(failed)?;
    let (console, console_theirs) = stream_pair().map_err(failed)?;
    let open = |path: &Path| {
        std::fs::File::open(path)
            .map(OwnedFd::from)
            .map_err(|error| io::Error::new(error.kind(), format!("open {}: {error}", path.display())))
    };
    let inherited = Inherited {
        qmp: qmp_theirs,
        agent: agent_theirs,
        console: console_theirs,
        kernel: open(&machine.kernel).map_err(failed)?,
        initramfs: open(&machine.initramfs).map_err(failed)?,
    };
    let mut command = Command::new(&machine.program);
    command
        .args(arguments(machine, &inherited))
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let descriptors = inherited.all().map(|descriptor| descriptor.as_raw_fd());
    confinement
        .apply(&mut command, descriptors.to_vec())
        .map_err(failed)?;
    let mut child = command.spawn().map_err(failed)?;
    drop(inherited);
    let pid = child.id().unwrap_or_default();
    let words = child
        .stderr
        .take()
        .map(|stream| Tail::follow(stream).0)
        .unwrap_or_default();
    confinement.adopt(pid).map_err(failed)?;
    let (console, _) = Tail::follow(console);
    let connected = tokio::select! {
        connected = Qmp::connect(qmp) => connected.map_err(VmmError::from),
        status = child.wait() => Err(ended(status, &words).await),
    };
    let (qmp, events) = match connected {
        Ok(connected) => connected,
        // A broken connection is most often a QEMU that did not like its arguments: its words say more.
        Err(VmmError::Control(error)) => {
            match tokio::time::timeout(Duration::from_millis(500), child.wait()).await {
                Ok(status) => return Err(ended(status, &words).await),
                Err(_) => return Err(error.into()),
            }
        }
        Err(error) => return Err(error),
    };
    let (sender, ended) = watch::channel(None);
    let (kill, killed) = mpsc::channel(1);
    let port_opened = Arc::new(AtomicBool::new(false));
    tokio::spawn(supervise(
        child,
        killed,
        events,
        words,
        sender,
        Arc::clone(&port_opened),
    ));
    let vmm = Qemu {
        pid,
        qmp,
        ports: Mutex::new((0..PORTS).collect()),
        ended,
        kill,
        port_opened,
    };
    Ok(Started { vmm, agent, console })
}

/// Our ends of the descriptors that QEMU gets.
struct Inherited {
    qmp: OwnedFd,
    agent: OwnedFd,
    console: OwnedFd,
    kernel: OwnedFd,
    initramfs: OwnedFd,
}

impl Inherited {
    fn all(&self) -> [BorrowedFd<'_>; 5] {
        [
            &self.qmp,
            &self.agent,
            &self.console,
            &self.kernel,
            &self.initramfs,
        ]
        .map(AsFd::as_fd)
    }
}

/// A connected pair: our end for tokio, theirs blocking.
fn stream_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// QEMU's option syntax ends a value at a comma; a doubled one stands for itself.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

fn arguments(machine: &Machine, inherited: &Inherited) -> Vec<OsString> {
    let (accelerator, cpu) = match machine.acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        // Five-level page tables only cost under emulation. Translated code would grow to 1 GiB and is charged to the
        // pod; a boot fills 35 MiB of it.
        Acceleration::Tcg => ("tcg,tb-size=64", "max,la57=off"),
    };
    let memory = machine.memory_mib;
    let socket = |id: &str, descriptor: &OwnedFd| format!("socket,id={id},fd={}", descriptor.as_raw_fd());
    // The kernel may lie where the pod's user cannot reach; the open descriptor it can.
    let file = |descriptor: &OwnedFd| format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let mut words: Vec<String> = [
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-bios",
        "qboot.rom",
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]
    .map(str::to_owned)
    .to_vec();
    let mut put = |option: &str, value: String| words.extend([option.to_owned(), value]);
    put("-name", format!("guest={}", escaped(&machine.name)));
    put(
        "-machine",
        "q35,memory-backend=ram,sata=off,smbus=off,vmport=off,usb=off,graphics=off".to_owned(),
    );
    put("-accel", accelerator.to_owned());
    put("-cpu", cpu.to_owned());
    put("-smp", machine.cpus.to_string());
    put("-m", format!("{memory}M"));
    // Shared, so that the back end of a shared file system can reach it.
    put(
        "-object",
        format!("memory-backend-memfd,id=ram,size={memory}M,share=on"),
    );
    put("-chardev", socket("qmp", &inherited.qmp));
    put("-mon", "chardev=qmp,mode=control".to_owned());
    put("-chardev", socket("console", &inherited.console));
    put("-serial", "chardev:console".to_owned());
    put("-chardev", socket("agent", &inherited.agent));
    put("-device", "virtio-serial-pci,id=serial,max_ports=2".to_owned());
    put(
        "-device",
        format!("virtserialport,bus=serial.0,chardev=agent,name={PORT_NAME}"),
    );
    put("-device", "virtio-rng-pci".to_owned());
    for port in 0..PORTS {
        let number = port + 1;
        put(
            "-device",
            format!("pcie-root-port,id=port{port},chassis={number},slot={number}"),
        );
    }
    put("-kernel", file(&inherited.kernel));
    put("-initrd", file(&inherited.initramfs));
    put("-append", machine.command_line.clone());
    words.into_iter().map(OsString::from).collect()
}

/// Waits for the process, kills it when asked, and notes what QEMU tells meanwhile.
async fn supervise(
    mut child: Child,
    mut killed: mpsc::Receiver<()>,
    mut events: mpsc::Receiver<Event>,
    words: Tail,
    ended: watch::Sender<Option<String>>,
    port_opened: Arc<AtomicBool>,
) {
    let mut why = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(()) = killed.recv() => {
                if let Err(error) = child.start_kill() {
                    tracing::warn!(%error, "cannot kill the VMM");
                }
            }
            Some(event) = events.recv() => {
                tracing::debug!(name = event.name, "VMM event");
                let reason = event.data.get("reason").and_then(|reason| reason.as_str());
                match event.name.as_str() {
                    "SHUTDOWN" => why = reason.map(str::to_owned),
                    // The machine has one port that a guest can open.
                    "VSERPORT_CHANGE" => port_opened.store(true, Ordering::Relaxed),
                    _ => {}
                }
            }
        }
    };
    let mut text = describe(status);
    if let Some(why) = why {
        text.push_str(&format!(", {why}"));
    }
    if let Some(last) = words.last_lines(1).first() {
        text.push_str(&format!(": {last}"));
    }
    // Nobody may be listening any more.
    let _ = ended.send(Some(text));
}

fn describe(status: io::Result<ExitStatus>) -> String {
    match status.map(|status| (status.code(), status.signal())) {
        Ok((Some(code), _)) => format!("exit code {code}"),
        Ok((_, Some(signal))) => format!("signal {signal}"),
        Ok(_) => "unknown end".to_owned(),
        Err(error) => format!("unknown end: {error}"),
    }
}

async fn ended(status: io::Result<ExitStatus>, words: &Tail) -> VmmError {
    // The last words may still be in the pipe.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let lines = words.last_lines(3);
    let stderr = if lines.is_empty() {
        String::new()
    } else {
        format!(": {}", lines.join("; "))
    };
    VmmError::Ended {
        status: describe(status),
        stderr,
    }
}

/// A root port that goes back when the device could not be plugged.
struct Port<'a> {
    free: &'a Mutex<BTreeSet<usize>>,
    number: usize,
    used: bool,
}

impl Drop for Port<'_> {
    fn drop(&mut self) {
        if !self.used {
            self.free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(self.number);
        }
    }
}

impl Qemu {
    fn take_port(&self) -> Result<Port<'_>, VmmError> {
        let mut free = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let number = free.pop_first().ok_or(VmmError::NoPort(PORTS))?;
        Ok(Port {
            free: &self.ports,
            number,
            used: false,
        })
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn agent_port_opened(&self) -> bool {
        self.port_opened.load(Ordering::Relaxed)
    }

    async fn plug_nic(&self, nic: Nic) -> Result<(), VmmError> {
        let mut port = self.take_port()?;
        let back_end = format!("net-{}", nic.id);
        self.qmp.pass_descriptor(&back_end, nic.tap.as_fd()).await?;
        let tap = json!({ "type": "tap", "id": back_end, "fd": back_end, "vhost": false });
        self.qmp.command("netdev_add", tap).await?;
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        let device = json!({
            "driver": "virtio-net-pci", "id": nic.id, "netdev": back_end, "mac": mac,
            "bus": format!("port{}", port.number), "romfile": "",
        });
        if let Err(error) = self.qmp.command("device_add", device).await {
            // The first error tells; this only gives the tap back.
            let _ = self.qmp.command("netdev_del", json!({ "id": back_end })).await;
            return Err(error.into());
        }
        port.used = true;
        Ok(())
    }

    async fn plug_shared_fs(&self, fs: SharedFs) -> Result<(), VmmError> {
        let mut port = self.take_port()?;
        let chardev = format!("fs-{}", fs.tag);
        self.qmp.pass_descriptor(&chardev, fs.back_end.as_fd()).await?;
        let address = json!({ "type": "fd", "data": { "str": chardev } });
        let back_end = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        self.qmp
            .command("chardev-add", json!({ "id": chardev, "backend": back_end }))
            .await?;
        let device = json!({
            "driver": "vhost-user-fs-pci", "id": fs.tag, "chardev": chardev, "tag": fs.tag,
            "bus": format!("port{}", port.number), "queue-size": 1024,
        });
        if let Err(error) = self.qmp.command("device_add", device).await {
            // As above.
            let _ = self.qmp.command("chardev-remove", json!({ "id": chardev })).await;
            return Err(error.into());
        }
        port.used = true;
        Ok(())
    }

    async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "its supervisor is gone".to_owned(),
        }
    }

    fn kill(&self) {
        // Full: a kill is on its way. Closed: the process has ended.
        let _ = self.kill.try_send(());
    }
}
