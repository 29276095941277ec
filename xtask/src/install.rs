//! Puts a build into the machine's places, as a package would.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::compile::AGENT_TARGET;
use crate::step::{Failure, root};

/// Source below the workspace, destination below the prefix, mode, and whether a file that is there stays.
const FILES: &[(&str, &str, u32, bool)] = &[
    (
        "target/release/catamaran",
        "usr/local/bin/catamaran",
        0o755,
        false,
    ),
    (
        "target/release/containerd-shim-catamaran-runc-v2",
        "usr/lib/catamaran/containerd-shim-catamaran-runc-v2",
        0o755,
        false,
    ),
    (
        "target/release/containerd-shim-catamaran-runv-v2",
        "usr/lib/catamaran/containerd-shim-catamaran-runv-v2",
        0o755,
        false,
    ),
    (
        "deploy/catamaran.service",
        "etc/systemd/system/catamaran.service",
        0o644,
        false,
    ),
    // The operator's own configuration is never overwritten.
    (
        "deploy/catamaran.yaml",
        "etc/catamaran/catamaran.yaml",
        0o644,
        true,
    ),
];

/// Installs below `destination` (`/`, or a package's root).
pub(crate) fn run(destination: &Path) -> Result<(), Failure> {
    let agent = format!("target/{AGENT_TARGET}/release/catamaran-agent");
    let agent = (agent.as_str(), "usr/lib/catamaran/catamaran-agent", 0o755, false);
    let built = root().join(FILES[0].0);
    if !built.exists() {
        return Err(format!("{} is missing: cargo xtask build", built.display()));
    }
    for (from, to, mode, keep) in FILES.iter().copied().chain([agent]) {
        let (from, to) = (root().join(from), destination.join(to));
        if keep && to.exists() {
            println!("kept {}", to.display());
            continue;
        }
        copy(&from, &to, mode)?;
    }
    let guest = root().join("target/guest");
    let entries =
        std::fs::read_dir(&guest).map_err(|e| format!("{}: {e}: cargo xtask build", guest.display()))?;
    copy_tree(entries, &destination.join("usr/lib/catamaran/guest"))
}

fn copy_tree(entries: std::fs::ReadDir, to: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(to).map_err(|e| format!("{}: {e}", to.display()))?;
    for entry in entries {
        let entry = entry.map_err(|e| format!("reading the guest directory: {e}"))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_symlink() {
            // The link to the default kernel.
            let target = std::fs::read_link(&from).map_err(|e| format!("{}: {e}", from.display()))?;
            let _ = std::fs::remove_file(&to);
            std::os::unix::fs::symlink(&target, &to).map_err(|e| format!("{}: {e}", to.display()))?;
        } else if from.is_dir() {
            let inner = std::fs::read_dir(&from).map_err(|e| format!("{}: {e}", from.display()))?;
            copy_tree(inner, &to)?;
        } else {
            copy(&from, &to, 0o644)?;
        }
    }
    Ok(())
}

/// Copies beside the destination and renames: a running binary keeps its file.
fn copy(from: &Path, to: &Path, mode: u32) -> Result<(), Failure> {
    let wrong = |e: std::io::Error| format!("installing {} as {}: {e}", from.display(), to.display());
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(wrong)?;
    }
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = to.with_file_name(name);
    std::fs::copy(from, &temporary).map_err(wrong)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode)).map_err(wrong)?;
    std::fs::rename(&temporary, to).map_err(wrong)?;
    println!("installed {}", to.display());
    Ok(())
}
