//! Processes that make containers and execs: the agent starts itself once for each, hands over the work as
//! JSON on a socket (descriptor 3) and gets the new process's pid, or the reason of the failure, in one line.
//!
//! ```text
//! agent                         runtime process (root cgroup)         new process (container's cgroup)
//!   fork, exec, watch ─────────▶ reads the request to its end
//!                                forks, joins or makes namespaces ───▶ waits (create) or execs (exec)
//!   watches the pid ◀─────────── {"pid":…}
//!   one byte ──────────────────▶ exits: the new process becomes the agent's child
//! ```
//!
//! So libcontainer may fork and wait as it likes, the agent stays one thread, and no exit is lost: the new
//! process cannot become the agent's child before the agent watches it.

pub(crate) mod child;
mod exec;
mod log;
pub(crate) mod parent;
mod payload;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// First argument of the process.
pub(crate) const ROLE: &str = "catamaran-runtime";
/// Descriptor of the socket to the agent.
const SOCKET: i32 = 3;
/// libcontainer's state, one directory per container.
pub(crate) const STATE: &str = "/run/catamaran/runtime";

/// What a runtime process does.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Makes a container up to the point where it waits for its start.
    Create {
        /// Container id.
        id: String,
        /// Directory with `config.json`.
        bundle: PathBuf,
        /// Where the terminal's master goes.
        console: Option<PathBuf>,
    },
    /// Starts a further process in a container.
    Exec {
        /// Directory with `config.json` of the container.
        bundle: PathBuf,
        /// The container's first process.
        init: i32,
        /// OCI runtime-spec Process.
        process: Box<oci_spec::runtime::Process>,
        /// The container's cgroup.
        cgroup: String,
        /// `v1` or `v2`.
        cgroup_v2: bool,
        /// Where the terminal's master goes.
        console: Option<PathBuf>,
    },
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Process id in the guest's first PID namespace.
    Pid(i32),
    /// The request cannot be done: no executable, for instance.
    Invalid(String),
    /// It failed.
    Failed(String),
}
