//! The processes that hold a file open: plugins that outlived the daemon which started them keep the lock of their
//! attachment's record.

use std::fs::{self, File};
use std::io::Result;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::{self, Signal, killpg};
use nix::unistd::{Pid, getpgid, getpgrp};

/// Kills the process groups of all processes that have `file` open, but not this one's; their ids.
pub(crate) fn kill(file: &File) -> Result<Vec<i32>> {
    let wanted = file.metadata()?;
    let own = std::process::id();
    let mut killed = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(id) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // Processes come and go meanwhile.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{id}/fd")) else {
            continue;
        };
        let holds = descriptors.flatten().any(|descriptor| {
            let open = fs::metadata(descriptor.path());
            open.is_ok_and(|open| (open.dev(), open.ino()) == (wanted.dev(), wanted.ino()))
        });
        if !holds || u32::try_from(id) == Ok(own) {
            continue;
        }
        killed.push(id);
        let process = Pid::from_raw(id);
        // Both may have ended by themselves.
        if let Ok(group) = getpgid(Some(process))
            && group != getpgrp()
        {
            let _ = killpg(group, Signal::SIGKILL);
        }
        let _ = signal::kill(process, Signal::SIGKILL);
    }
    Ok(killed)
}
