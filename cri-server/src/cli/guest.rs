//! `catamaran guest …`: the vm shim knows what a guest needs, so it does the work.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;

use super::Outcome;
use crate::handlers::RUNV_SHIM;
use crate::shim::find_shim;

pub(super) fn run(args: &[OsString]) -> Outcome {
    let shim = find_shim(RUNV_SHIM, None)?;
    // Returns only where it fails.
    let error = std::process::Command::new(&shim).arg("guest").args(args).exec();
    Err(format!("cannot run {}: {error}", shim.display()).into())
}
