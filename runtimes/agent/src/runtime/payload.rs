//! The last step of a container's or exec's process: find the executable, set the environment, reset what
//! the agent's own process has changed, exec. The same for libcontainer's init and for [`super::exec`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::unistd::{AccessFlags, access};
use oci_spec::runtime::{Process, Spec};

/// Begins a message that is the caller's mistake; libcontainer wraps messages in its own.
pub(super) const MARK: &str = "payload: ";
/// Where the process has no PATH, as runc and shells have it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// libcontainer's executor. It does not demand a PATH and hands the environment to execve in the spec's
/// order instead of through the process's own.
#[derive(Debug, Clone, Default)]
pub(super) struct Payload {
    /// HOME, which libcontainer looks up in the container's passwd.
    home: RefCell<Option<String>>,
}

impl Executor for Payload {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let home = self.home.borrow().clone();
        Err(ExecutorError::Other(exec(process, home.as_deref())))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| ExecutorValidationError::ArgValidationError("the spec has no process".into()))?;
        find(process)
            .map(drop)
            .map_err(|message| ExecutorValidationError::ArgValidationError(format!("{MARK}{message}")))
    }

    fn setup_envs(&self, environment: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        self.home.replace(environment.get("HOME").cloned());
        Ok(())
    }
}

/// Finds the executable as the calling process sees it.
pub(super) fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process
        .args()
        .as_ref()
        .and_then(|arguments| arguments.first())
        .filter(|name| !name.is_empty())
        .ok_or("process.args is empty")?;
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match usable(&path) {
            Ok(()) => Ok(path),
            Err(why) => Err(format!("exec {name:?}: {why}")),
        };
    }
    let path = process
        .env()
        .iter()
        .flatten()
        .find_map(|variable| variable.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for directory in path.split(':').filter(|directory| !directory.is_empty()) {
        let candidate = Path::new(directory).join(name);
        match usable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(why) => denied |= why == "permission denied",
        }
    }
    let why = if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(format!("exec {name:?}: {why}"))
}

fn usable(path: &Path) -> Result<(), &'static str> {
    match std::fs::metadata(path) {
        Ok(file) if file.is_dir() => Err("is a directory"),
        Ok(_) => access(path, AccessFlags::X_OK).map_err(|_| "permission denied"),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Err("permission denied"),
        Err(_) => Err("no such file or directory"),
    }
}

/// Becomes the process. Returns only with the reason why not.
pub(super) fn exec(process: &Process, home: Option<&str>) -> String {
    match try_exec(process, home) {
        Ok(never) => match never {},
        Err(message) => message,
    }
}

fn try_exec(process: &Process, home: Option<&str>) -> Result<std::convert::Infallible, String> {
    let path = find(process)?;
    let strings = |words: &[String], what: &str| {
        words
            .iter()
            .map(|word| CString::new(word.as_str()).map_err(|_| format!("{what} has a NUL byte")))
            .collect::<Result<Vec<_>, _>>()
    };
    let arguments = strings(process.args().as_deref().unwrap_or_default(), "process.args")?;
    let mut environment = process.env().clone().unwrap_or_default();
    if let Some(home) = home
        && !environment.iter().any(|variable| variable.starts_with("HOME="))
    {
        environment.push(format!("HOME={home}"));
    }
    let environment = strings(&environment, "process.env")?;
    let executable = CString::new(path.as_os_str().as_bytes()).map_err(|_| "process.args has a NUL byte")?;
    reset_signals();
    nix::unistd::execve(&executable, &arguments, &environment)
        .map_err(|error| format!("exec {:?}: {}", path.display(), error.desc().to_lowercase()))
}

/// Ignored signals and the mask survive exec, and Rust's runtime ignores SIGPIPE.
fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: sets default dispositions; numbers that cannot be set are refused and have nothing to reset.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let empty = nix::sys::signal::SigSet::empty();
    // Cannot fail with a valid `how`.
    let _ = empty.thread_set_mask();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(arguments: &[&str], environment: &[&str]) -> Process {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let mut process = Process::default();
        process
            .set_args(Some(words(arguments)))
            .set_env(Some(words(environment)));
        process
    }

    #[test]
    fn executables_are_found_with_and_without_a_path() {
        assert_eq!(
            find(&process(&["/bin/sh"], &[])).unwrap(),
            PathBuf::from("/bin/sh")
        );
        assert!(find(&process(&["sh"], &[])).unwrap().ends_with("sh"));
        assert!(
            find(&process(&["sh"], &["PATH=/bin"]))
                .unwrap()
                .starts_with("/bin")
        );
    }

    #[test]
    fn the_reason_is_told() {
        let why =
            |arguments: &[&str], environment: &[&str]| find(&process(arguments, environment)).unwrap_err();
        assert_eq!(
            why(&["sh"], &["PATH=/nowhere"]),
            "exec \"sh\": executable file not found in $PATH"
        );
        assert_eq!(
            why(&["/nowhere/x"], &[]),
            "exec \"/nowhere/x\": no such file or directory"
        );
        assert_eq!(why(&["/etc"], &[]), "exec \"/etc\": is a directory");
        assert_eq!(
            why(&["/etc/passwd"], &[]),
            "exec \"/etc/passwd\": permission denied"
        );
        assert_eq!(why(&[], &[]), "process.args is empty");
    }
}
