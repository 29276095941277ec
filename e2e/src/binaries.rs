//! Where the programs under test and the tools are: beside this test's own executable, and in target/tools.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Cargo's target directory, found from the running executable.
///
/// # Errors
/// The executable is not in one.
pub fn target_directory() -> Result<PathBuf> {
    let profile = profile_directory()?;
    profile
        .parent()
        .map(Path::to_path_buf)
        .context("the profile's directory has no parent")
}

fn profile_directory() -> Result<PathBuf> {
    let executable = std::env::current_exe()?;
    let directory = executable.parent().context("the executable has no directory")?;
    // Tests are in <target>/<profile>/deps, binaries in <target>/<profile>.
    let directory = if directory.ends_with("deps") {
        directory.parent()
    } else {
        Some(directory)
    };
    directory
        .map(Path::to_path_buf)
        .context("the deps directory has no parent")
}

/// A binary of this workspace, of the same profile as the test itself.
///
/// # Errors
/// It was not built.
pub fn ours(name: &str) -> Result<PathBuf> {
    require(profile_directory()?.join(name), "cargo xtask build")
}

/// A tool that `cargo xtask setup` builds from a Go tools module.
///
/// # Errors
/// It was not built.
pub fn tool(name: &str) -> Result<PathBuf> {
    require(target_directory()?.join("tools").join(name), "cargo xtask setup")
}

/// The guest's boot artefacts, as `cargo xtask build` leaves them.
///
/// # Errors
/// They were not built.
pub fn guest_directory() -> Result<PathBuf> {
    require(target_directory()?.join("guest"), "cargo xtask build")
}

/// A program of the machine, found in PATH and in the directories where Debian puts it.
///
/// # Errors
/// It is not installed.
pub fn system(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("{name} is not installed: cargo xtask setup"))
}

fn require(path: PathBuf, remedy: &str) -> Result<PathBuf> {
    if path.exists() {
        return Ok(path);
    }
    bail!("{} is missing: run {remedy}", path.display())
}
