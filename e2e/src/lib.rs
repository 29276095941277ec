//! The end-to-end harness: the real daemon in a temporary root, the real crictl, a registry on loopback with
//! images made here, plugins and runtimes that fail on demand, and a search for what is left behind.
//!
//! Entry points: [`suite::Suite`] runs cases against a [`node::Node`]; [`case::Case`] is what a case sees.

pub mod binaries;
pub mod case;
pub mod crictl;
pub mod daemon;
pub mod failpoint;
pub mod fake_registry;
pub mod http;
pub mod image;
pub mod leaks;
pub mod node;
pub mod process;
pub mod registry;
pub mod requests;
pub mod standin;
pub mod subnet;
pub mod suite;
