//! The vm shim: one process per pod that runs the pod in a virtual machine and speaks the shim v2 protocol.

pub mod cgroup;
pub mod confinement;
pub mod guest;
pub mod guest_client;
pub mod network;
pub mod probe;
pub mod share;
pub mod vmm;
