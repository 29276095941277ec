//! Scripted faults for the programs that a daemon calls (CNI plugins, OCI runtimes): a file in a control
//! directory says what the n-th call of a verb does. No file: everything passes.

use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// What a slow call takes longer.
pub const SLOW: Duration = Duration::from_secs(5);

/// What a call does in place of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The real work.
    Pass,
    /// Ends with an error in the program's own form.
    Fail,
    /// Never ends.
    Hang,
    /// Ends well and prints what nobody can parse.
    Garbage,
    /// Does the real work, then ends with an error.
    FailAfter,
    /// Does the real work after [`SLOW`].
    Slow,
    /// Leaves what the real work would leave where that cannot be done on this host.
    Stand,
}

/// Makes the n-th call (from 1; 0: every call) of `verb` do something; other calls pass. Counting starts anew.
///
/// # Errors
/// The control directory cannot be written.
pub fn set(control: &Path, verb: &str, call: u32, action: Action) -> Result<()> {
    let word = match action {
        Action::Pass => "pass",
        Action::Fail => "fail",
        Action::Hang => "hang",
        Action::Garbage => "garbage",
        Action::FailAfter => "fail-after",
        Action::Slow => "slow",
        Action::Stand => "stand",
    };
    std::fs::create_dir_all(control)?;
    std::fs::write(control.join(verb), format!("{call} {word} 0"))?;
    Ok(())
}

/// Ends every fault.
///
/// # Errors
/// The control directory cannot be changed.
pub fn clear(control: &Path) -> Result<()> {
    match std::fs::remove_dir_all(control) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Counts this call and says what it does. Called by the fault programs.
///
/// # Errors
/// The control file is not of this module's making.
pub fn next(control: &Path, verb: &str) -> Result<Action> {
    let path = control.join(verb);
    let Ok(file) = std::fs::File::options().read(true).write(true).open(&path) else {
        return Ok(Action::Pass);
    };
    let mut file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let [call, word, count] = words[..] else {
        bail!("{}: {text:?}", path.display())
    };
    let (call, count): (u32, u32) = (call.parse()?, count.parse::<u32>()? + 1);
    file.rewind()?;
    file.set_len(0)?;
    write!(file, "{call} {word} {count}")?;
    if call != 0 && call != count {
        return Ok(Action::Pass);
    }
    Ok(match word {
        "pass" => Action::Pass,
        "fail" => Action::Fail,
        "hang" => Action::Hang,
        "slow" => Action::Slow,
        "stand" => Action::Stand,
        "garbage" => Action::Garbage,
        "fail-after" => Action::FailAfter,
        _ => bail!("{}: unknown action {word:?}", path.display()),
    })
}

/// How often a verb was called since it was [`set`].
///
/// # Errors
/// Nothing was set for the verb.
pub fn calls(control: &Path, verb: &str) -> Result<u32> {
    let text = std::fs::read_to_string(control.join(verb))?;
    text.split_whitespace()
        .nth(2)
        .and_then(|n| n.parse().ok())
        .context("no count in the control file")
}

/// Waits for what ends a hanging program: a signal.
pub fn hang() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_call_fails() {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path();
        assert_eq!(next(control, "ADD").unwrap(), Action::Pass);
        set(control, "ADD", 2, Action::Fail).unwrap();
        let seen: Vec<Action> = (0..3).map(|_| next(control, "ADD").unwrap()).collect();
        assert_eq!(seen, [Action::Pass, Action::Fail, Action::Pass]);
        assert_eq!(calls(control, "ADD").unwrap(), 3);
        set(control, "ADD", 0, Action::Hang).unwrap();
        assert_eq!(next(control, "ADD").unwrap(), Action::Hang);
        assert_eq!(next(control, "DEL").unwrap(), Action::Pass);
    }
}
