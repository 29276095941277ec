//! The half of a shim that does not depend on where containers run: the ttrpc services (Task, Sandbox, Stream),
//! the table of containers and execs with their states, CRI logs, attachments, exec sessions, exit records.
//! A runtime implements the three traits of [`backend`] and calls [`serve`].
//!
//! Every verb that changes something runs as its own task: a caller that disconnects (the daemon was killed)
//! cancels its waiting, never the work.

pub mod backend;
mod container;
mod error;
mod exec_sync;
mod output;
mod pod;
mod sandbox_service;
mod serve;
mod session_run;
mod sessions;
mod stream_service;
mod task_service;

pub use error::ShimError;
pub use serve::{block_on, serve};
