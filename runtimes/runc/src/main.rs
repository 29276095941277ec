//! The namespace shim: one process per pod, containers by an OCI runtime (runc, crun, youki, runsc). Services,
//! states, logs and sessions are the sandbox crate's `shim_server`; here is what is particular to namespaces,
//! cgroups and the runtime's command line.
//!
//! One thread, one tokio runtime; short-lived threads only where a namespace must be entered or the kernel makes
//! a write to a cgroup wait.

mod cgroup;
mod cleanup;
mod confine;
mod console;
mod container;
mod idmap;
mod mounts;
mod namespaces;
mod oci_runtime;
mod port;
mod process;
mod reaper;
mod sandbox;
mod stats;
mod sysctl;

use std::process::ExitCode;
use std::sync::Arc;

use catamaran_sandbox::bootstrap::{self, BoxError, Started};
use catamaran_sandbox::shim_server;

/// Name of the executable, as containerd derives it from `io.containerd.catamaran-runc.v2`.
const NAME: &str = "containerd-shim-catamaran-runc-v2";

/// `idmap-probe DIRECTORY`: can layers in there be id-mapped for user namespaces? 0, or 1 and why not on stderr.
const IDMAP_PROBE: &str = "idmap-probe";

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).take(3).collect();
    if let [command, directory] = words.as_slice()
        && command == IDMAP_PROBE
    {
        return match idmap::probe(directory.as_ref()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    bootstrap::run(NAME, env!("CARGO_PKG_VERSION"), serve, cleanup::delete)
}

fn serve(started: Started) -> Result<(), BoxError> {
    shim_server::block_on(async {
        let reaper = reaper::Reaper::start()?;
        let sandbox = sandbox::NamespaceSandbox::new(started.context.clone(), reaper);
        shim_server::serve(started, Arc::new(sandbox)).await?;
        Ok(())
    })?
}
