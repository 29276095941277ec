//! The vm shim: one process per pod that runs the pod in a virtual machine and speaks the shim v2 protocol. The
//! protocol's half is `catamaran_sandbox::shim_server`; this crate is what it asks of a runtime.
//!
//! Entry points: [`sandbox::VmSandbox`] (the pod), [`guest::build`] (boot artefacts), [`probe::probe`] (KVM).
//!
//! Architecture invariant: nothing outside `vmm/` knows which VMM runs, and nothing that comes from the guest is
//! believed, unbounded or shown unfiltered.

pub mod boot;
pub mod cgroup;
pub mod confinement;
mod container;
pub mod guest;
pub mod guest_client;
mod life;
pub mod network;
mod oom;
pub mod probe;
mod process;
pub mod record;
pub mod sandbox;
pub mod share;
mod stats;
pub mod vmm;
