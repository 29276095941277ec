//! The namespace shim as the daemon sees it: the real executable, real runc, real namespaces and cgroups.

mod containers;
mod fake_runtime;
mod harness;
mod sandbox;
mod sessions;
