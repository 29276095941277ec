//! What the agent says to the VM's console, and the end of the VM when the agent cannot go on.

use nix::sys::reboot::{RebootMode, reboot};

/// Writes a line to the console (standard error of pid 1).
pub(crate) fn say(message: &str) {
    eprintln!("catamaran-agent: {message}");
}

/// A panic of pid 1 would be a kernel panic without words: says where it was and powers off instead.
pub(crate) fn power_off_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("panic: {panic}"));
        power_off();
    }));
}

/// Powers the VM off, or resets it where it cannot be powered off.
pub(crate) fn power_off() -> ! {
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    say(&format!("power off failed: {error}; resetting"));
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    say(&format!("reset failed: {error}"));
    loop {
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
}
