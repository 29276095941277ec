//! Sets what a booted or restored guest cannot know: the time, and randomness that no other guest has.

use std::io;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::error::{Context, Error, Result};

/// Sets the wall clock, nanoseconds since the epoch.
pub(crate) fn set(clock_ns: i64) -> Result<()> {
    if clock_ns <= 0 {
        return Err(Error::Invalid("clock_ns must be positive".into()));
    }
    let time = TimeSpec::new(clock_ns / 1_000_000_000, clock_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time).context(|| "cannot set the clock".into())
}

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// Adds the host's random bytes to the kernel's pool and reseeds its generator: a guest restored from a
/// template would otherwise return the same bytes as every other.
pub(crate) fn add_entropy(bytes: &[u8]) -> Result<()> {
    if !(32..=512).contains(&bytes.len()) {
        return Err(Error::Invalid(format!(
            "entropy must be 32 to 512 bytes, not {}",
            bytes.len()
        )));
    }
    let random = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .context(|| "cannot open /dev/urandom".into())?;
    // struct rand_pool_info: entropy in bits, size in bytes, data.
    let mut request = Vec::with_capacity(8 + bytes.len());
    request.extend_from_slice(&i32::try_from(bytes.len() * 8).unwrap_or(0).to_ne_bytes());
    request.extend_from_slice(&i32::try_from(bytes.len()).unwrap_or(0).to_ne_bytes());
    request.extend_from_slice(bytes);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&random);
    // SAFETY: RNDADDENTROPY reads a rand_pool_info of the length that its second field says.
    let added = unsafe { libc::ioctl(fd, RNDADDENTROPY, request.as_ptr()) };
    if added < 0 {
        return Err(io::Error::last_os_error()).context(|| "cannot add entropy".into());
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    if unsafe { libc::ioctl(fd, RNDRESEEDCRNG) } < 0 {
        return Err(io::Error::last_os_error()).context(|| "cannot reseed the random generator".into());
    }
    Ok(())
}

// <linux/random.h>: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
