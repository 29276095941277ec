//! The guest's pid 1: prepares the guest, answers the vm shim over virtio-serial and runs the pod's
//! containers.
//!
//! One binary, three roles. As pid 1 it is the agent ([`boot`], then [`serve`]). It starts itself as
//! `runtime` for every container or exec ([`runtime`]): that process forks, joins namespaces and waits for its
//! own children as it likes, so the agent stays one thread with one reaper. As `pause` it is the init of a
//! PID namespace that the pod's containers share ([`pause`]).
//!
//! The host is trusted, the containers are not: nothing that they do may block or kill the agent.

mod boot;
mod cgroup;
mod cgroup_stats;
mod console;
mod containers;
mod device_filter;
mod error;
mod guest_clock;
mod modules;
mod mounts;
mod network;
mod pause;
mod port_forward;
mod process;
mod process_tree;
mod reaper;
mod runtime;
mod sandbox;
mod serve;
mod service;
mod spec;
mod transport;
mod working_directory;

use std::process::ExitCode;

fn main() -> ExitCode {
    // The role decides before the pid: a pause process is pid 1 of its namespace. The kernel hands words of its
    // command line that it does not know to init, but nobody writes these there.
    match std::env::args().nth(1).as_deref() {
        Some(runtime::ROLE) => runtime::child::main(),
        Some(pause::ROLE) => pause::main(),
        _ if std::process::id() == 1 => {
            console::power_off_on_panic();
            let error = match boot::prepare().and_then(serve::run) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            console::say(&format!("stopping: {}", error::chain(&*error)));
            console::power_off();
        }
        _ => {
            eprintln!(
                "catamaran-agent {} is the init of a virtual machine; it does nothing elsewhere",
                env!("CARGO_PKG_VERSION")
            );
            ExitCode::FAILURE
        }
    }
}
