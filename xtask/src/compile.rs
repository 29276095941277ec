//! Builds what is shipped: daemon and shims, the guest's static agent, and the guest's boot artefacts.

use std::path::PathBuf;

use crate::step::{Failure, Step, root};

/// The agent's target: static linking of glibc is asked for by target feature, so the host's build scripts and
/// procedural macros must not see the flag; naming the target keeps them apart.
pub(crate) const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";
/// Flags of the agent's target.
pub(crate) const AGENT_FLAGS: &str = "-C target-feature=+crt-static";

/// All crates but the agent, which has its own target. Builds and tests select the same crates: cargo joins the
/// features that the selected crates want of a dependency, and another selection compiles it again.
pub(crate) const WORKSPACE: &[&str] = &["--workspace", "--exclude", "catamaran-agent"];

/// Where `cargo xtask guest-kernel` leaves the minimal kernel.
pub(crate) fn minimal_kernel() -> PathBuf {
    root().join("target/guest-kernel/vmlinux")
}

/// Builds everything in the release profile, and the guest from the newest installed kernel and from the minimal
/// one where it was built.
pub(crate) fn run() -> Result<(), Failure> {
    Step::new(
        "cargo build agent",
        &[
            "cargo",
            "build",
            "--release",
            "--locked",
            "--target",
            AGENT_TARGET,
            "-p",
            "catamaran-agent",
        ],
    )
    .env("RUSTFLAGS", AGENT_FLAGS)
    .run()?;
    let build = ["cargo", "build", "--release", "--locked"];
    Step::new("cargo build", &[build.as_slice(), WORKSPACE].concat()).run()?;
    guest()
}

fn guest() -> Result<(), Failure> {
    let daemon = root().join("target/release/catamaran").display().to_string();
    let agent = root()
        .join("target")
        .join(AGENT_TARGET)
        .join("release/catamaran-agent")
        .display()
        .to_string();
    let output = root().join("target/guest").display().to_string();
    let words = [
        daemon.as_str(),
        "guest",
        "build",
        "--agent",
        &agent,
        "--output",
        &output,
    ];
    Step::new("guest from the installed kernel", &words).run()?;
    let minimal = minimal_kernel();
    if minimal.exists() {
        let kernel = minimal.display().to_string();
        let words = [words.as_slice(), &["--kernel", &kernel]].concat();
        Step::new("guest from the minimal kernel", &words).run()?;
    }
    Ok(())
}

/// Builds the minimal guest kernel.
pub(crate) fn guest_kernel() -> Result<(), Failure> {
    crate::setup::install(crate::packages::KERNEL)?;
    let script = root().join("deploy/guest/build-kernel").display().to_string();
    let output = minimal_kernel().display().to_string();
    Step::new("minimal guest kernel (about 20 CPU minutes)", &[&script, &output]).run()
}
