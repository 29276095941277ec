//! From the VMM's start to the agent's answer, and what is said when that fails: which stage, why, and the
//! console's last lines.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use catamaran_sandbox::pod_spec::{Acceleration, VmSpec};
use catamaran_sandbox::shim_server::ShimError;

use crate::confinement::Confinement;
use crate::guest_client::{self, Connected};
use crate::vmm::console::Tail;
use crate::vmm::{Machine, Vmm, VmmError, qemu};

/// Where the console's tail goes in the sandbox bundle when the VM ends otherwise than by a stop.
pub const CONSOLE_FILE: &str = "console.log";
/// Console lines in an error's text.
const LINES_SHOWN: usize = 8;

/// Console output only, no self tests, no audit and security modules that nothing in the guest uses; a panic ends
/// the VM at once, and the VMM does not start it again. The timer's interrupt is not tried out: an emulated guest on a
/// busy host gets it too late for the kernel's counted loop, which then panics ("IO-APIC + timer doesn't work").
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t audit=0 selinux=0 apparmor=0 \
                            cryptomgr.notests random.trust_cpu=on no_timer_check";

/// How far a VM came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The VMM's own start.
    Vmm,
    /// From the firmware to the first process.
    Kernel,
    /// The agent's start and handshake.
    Agent,
    /// Joining the pod's network.
    Network,
    /// Showing a container's root file system to the guest.
    Rootfs,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Vmm => "VMM",
            Self::Kernel => "kernel",
            Self::Agent => "agent",
            Self::Network => "network",
            Self::Rootfs => "rootfs",
        })
    }
}

/// A failed stage as the shim reports it: what failed and why, then the console.
pub fn failure(stage: Stage, why: impl std::fmt::Display, console: Option<&Tail>) -> ShimError {
    let mut text = format!("VM failed at stage {stage}: {why}");
    let lines = console
        .map(|console| console.last_lines(LINES_SHOWN))
        .unwrap_or_default();
    if lines.is_empty() {
        if console.is_some() {
            text.push_str("; the console shows nothing");
        }
    } else {
        let panic = console.and_then(|console| console.line_with("Kernel panic"));
        let panic = panic
            .filter(|panic| !lines.contains(panic))
            .map(|panic| panic + " | … | ");
        text.push_str(&format!(
            "; console: {}{}",
            panic.unwrap_or_default(),
            lines.join(" | ")
        ));
    }
    ShimError::Internal(text)
}

/// An error with its sources on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

/// A guest that answered.
#[derive(Clone)]
pub struct Booted {
    /// The agent.
    pub guest: Connected,
    /// From the VMM's start to the answer.
    pub took: Duration,
}

/// A VMM that runs, and the guest's way to the agent.
pub struct Boot {
    /// Control of the VMM.
    pub vmm: Arc<dyn Vmm>,
    /// The serial console.
    pub console: Tail,
    /// The byte stream to the agent, until [`Self::wait`] takes it.
    stream: tokio::net::UnixStream,
    begun: Instant,
    limit: Duration,
}

/// Starts the VMM for a pod.
///
/// # Errors
/// The stage (VMM or kernel) with its reason.
pub async fn begin(name: String, spec: &VmSpec, confinement: &Confinement) -> Result<Boot, ShimError> {
    check_kernel(&spec.kernel).map_err(|why| failure(Stage::Kernel, why, None))?;
    let arguments = spec.kernel_args.trim();
    let machine = Machine {
        name,
        program: spec.vmm.clone(),
        kernel: spec.kernel.clone(),
        initramfs: spec.initramfs.clone(),
        command_line: format!("{COMMAND_LINE} {arguments}").trim_end().to_owned(),
        cpus: spec.cpus.max(1),
        memory_mib: spec.memory_mib,
        acceleration: spec.acceleration,
    };
    let begun = Instant::now();
    let started = qemu::start(&machine, confinement).await.map_err(|error| {
        // QEMU itself refuses a kernel that it cannot start.
        let of_kernel = matches!(&error, VmmError::Ended { stderr, .. } if stderr.contains("kernel"));
        failure(
            if of_kernel { Stage::Kernel } else { Stage::Vmm },
            chain(&error),
            None,
        )
    })?;
    Ok(Boot {
        vmm: Arc::new(started.vmm),
        console: started.console,
        stream: started.agent,
        begun,
        limit: Duration::from_millis(spec.boot_timeout_ms),
    })
}

impl Boot {
    /// Waits for the agent's answer.
    ///
    /// # Errors
    /// The stage (kernel or agent) with its reason and the console.
    pub async fn wait(self) -> Result<Booted, ShimError> {
        let Self {
            vmm,
            console,
            stream,
            begun,
            limit,
        } = self;
        let left = limit.saturating_sub(begun.elapsed());
        let why = tokio::select! {
            connected = guest_client::connect(stream) => match connected {
                Ok(guest) => return Ok(Booted { guest, took: begun.elapsed() }),
                Err(error) => {
                    // The stream breaks with the VMM: its end says more, if it comes soon.
                    let ended = tokio::time::timeout(Duration::from_secs(1), vmm.ended()).await;
                    ended.map_or_else(|_| chain(&error), |how| format!("the VM ended ({how})"))
                }
            },
            how = vmm.ended() => format!("the VM ended ({how})"),
            () = tokio::time::sleep(left) => format!("no answer within {} ms", limit.as_millis()),
        };
        // The console's last words may be a moment behind the VMM's end.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let stage = if vmm.agent_port_opened() {
            Stage::Agent
        } else {
            reached(&console)
        };
        Err(failure(stage, why, Some(&console)))
    }
}

/// How far a guest came that never opened the agent's port, by its console.
fn reached(console: &Tail) -> Stage {
    let of_agent = [
        "catamaran-agent:",
        "No working init found",
        "Attempted to kill init",
        // Without /init in the initramfs the kernel looks for a root device.
        "Unable to mount root fs",
    ];
    if of_agent.iter().any(|words| console.contains(words)) {
        Stage::Agent
    } else {
        Stage::Kernel
    }
}

fn check_kernel(kernel: &Path) -> Result<(), String> {
    let mut magic = [0; 4];
    let read = std::fs::File::open(kernel)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic))
        .map_err(|error| format!("cannot read {}: {error}", kernel.display()));
    match read {
        Ok(()) if magic == *b"\x7fELF" => Ok(()),
        Ok(()) => Err(format!(
            "{} is no uncompressed kernel: make one with guest build",
            kernel.display()
        )),
        Err(why) => Err(why),
    }
}

/// `kvm` or `tcg`, as the status has it.
#[must_use]
pub fn acceleration_name(acceleration: Acceleration) -> &'static str {
    match acceleration {
        Acceleration::Kvm => "kvm",
        Acceleration::Tcg => "tcg",
    }
}

/// Keeps the console's tail for whoever looks for the reason later.
pub fn save_console(bundle: &Path, console: &Tail) {
    let path: PathBuf = bundle.join(CONSOLE_FILE);
    if let Err(error) = std::fs::write(&path, console.text()) {
        tracing::warn!(%error, path = %path.display(), "the console cannot be kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failure_names_its_stage_and_shows_the_console() {
        let (console, task) =
            Tail::follow(&b"one\r\nKernel panic - not syncing: No working init found.\r\n"[..]);
        task.await.unwrap();
        assert_eq!(reached(&console), Stage::Agent);
        assert_eq!(
            failure(Stage::Kernel, "no answer within 5 ms", Some(&console)).to_string(),
            "VM failed at stage kernel: no answer within 5 ms; console: one | Kernel panic - not syncing: No \
             working init found."
        );
        assert!(
            failure(Stage::Agent, "x", Some(&Tail::default()))
                .to_string()
                .ends_with("shows nothing")
        );
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        assert!(check_kernel(Path::new("/bin/sh")).is_ok());
        assert!(
            check_kernel(Path::new("/etc/passwd"))
                .unwrap_err()
                .contains("/etc/passwd")
        );
        assert!(
            check_kernel(Path::new("/nowhere"))
                .unwrap_err()
                .contains("/nowhere")
        );
    }
}
