//! What the shim asks of a virtual machine monitor, and the one that does it: QEMU. Another VMM is another
//! file beside `qemu.rs` and an answer to [`Vmm`].

pub mod console;
pub mod qemu;
mod qmp;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use catamaran_sandbox::pod_spec::Acceleration;

pub use qmp::QmpError;

/// The machine to start.
#[derive(Debug)]
pub struct Machine {
    /// Name shown in the process list.
    pub name: String,
    /// Absolute path of the VMM.
    pub program: PathBuf,
    /// Uncompressed kernel with a PVH entry.
    pub kernel: PathBuf,
    /// initramfs.
    pub initramfs: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// KVM or TCG.
    pub acceleration: Acceleration,
}

/// A network card to plug in.
#[derive(Debug)]
pub struct Nic {
    /// Unique among the machine's devices: letters and digits.
    pub id: String,
    /// The tap's queue.
    pub tap: OwnedFd,
    /// Hardware address that the guest sees.
    pub mac: [u8; 6],
}

/// A shared file system to plug in.
#[derive(Debug)]
pub struct SharedFs {
    /// Unique among the machine's devices: letters and digits; also the tag that the guest mounts.
    pub tag: String,
    /// Connected to the vhost-user back end.
    pub back_end: OwnedFd,
}

/// A machine that failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It could not be started.
    #[error("cannot start {program}")]
    Start {
        /// Which executable.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It ended before or while it was asked.
    #[error("the VMM ended ({status}){stderr}")]
    Ended {
        /// How.
        status: String,
        /// ": " and its last words, or nothing.
        stderr: String,
    },
    /// It refused or did not answer.
    #[error("the VMM cannot be controlled")]
    Control(#[from] QmpError),
    /// More devices than the machine has ports.
    #[error("all {0} ports for devices are in use")]
    NoPort(usize),
}

/// A running machine. Dropping it kills it.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// Process id of the VMM.
    fn pid(&self) -> u32;
    /// The guest has opened the agent's port: its agent runs.
    fn agent_port_opened(&self) -> bool;
    /// Plugs a network card; the guest sees it some time after the answer.
    async fn plug_nic(&self, nic: Nic) -> Result<(), VmmError>;
    /// Plugs a shared file system; the guest sees it some time after the answer.
    async fn plug_shared_fs(&self, fs: SharedFs) -> Result<(), VmmError>;
    /// Answers when the VMM's process has ended, with the way it ended.
    async fn ended(&self) -> String;
    /// Ends the VMM's process at once.
    fn kill(&self);
}
