//! How a shim process begins and how a dead one is cleaned up: the command line of containerd's shim v2
//! (`start` and `delete`).
//!
//! `start` binds the socket and forks before any thread exists; there is no second exec. The parent prints the
//! address and exits; the child serves. A connection made in between waits in the socket's backlog. The child
//! holds a lock on `<bundle>/shim.pid` for its life, so that a live shim can be told from a stale pid.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid};
use protobuf::Message;
use rustix::fs::{FlockOperation, flock};

use crate::id::Id;

/// The shim's own log in the sandbox bundle.
pub const LOG_FILE: &str = "shim.log";
/// The shim's process id in the sandbox bundle; locked by the shim as long as it lives.
pub const PID_FILE: &str = "shim.pid";

/// A shim that shall end is killed for so long.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// Whatever ends a shim's command with a failure.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Which pod a shim process is for.
#[derive(Debug, Clone)]
pub struct Context {
    /// Sandbox id.
    pub id: Id,
    /// containerd's namespace, `k8s.io`.
    pub namespace: String,
    /// Absolute path of the sandbox bundle.
    pub bundle: PathBuf,
    /// More in the log.
    pub debug: bool,
}

impl Context {
    /// The shim's socket: beside the pods' directories, as a path within a bundle would be too long for
    /// `sockaddr_un`.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket_named("")
    }

    /// A further socket of this shim.
    #[must_use]
    pub fn socket_named(&self, suffix: &str) -> PathBuf {
        let state = self.bundle.ancestors().nth(2).unwrap_or(Path::new("/"));
        let dash = if suffix.is_empty() { "" } else { "-" };
        state
            .join("s")
            .join(format!("{}{dash}{suffix}.sock", self.id.short()))
    }
}

/// The serving process after `start`: single-threaded still, its own session, child subreaper.
#[derive(Debug)]
pub struct Started {
    /// Which pod.
    pub context: Context,
    /// Bound and listening, non-blocking.
    pub listener: UnixListener,
    /// Keeps the pid file locked; lives as long as the process.
    pub lock: File,
}

/// Exit that `delete` reports for the sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Deleted {
    /// 128 + SIGKILL where nothing better is known.
    pub exit_status: u32,
}

/// A command line that is no shim's, or a step of `start` or `delete` that failed.
#[derive(Debug, thiserror::Error)]
enum BootstrapError {
    #[error("{0}")]
    Usage(String),
    #[error("{doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("fork")]
    Fork(#[source] Errno),
    #[error(
        "the shim of {} still runs after {} s of SIGKILL; its process id is {pid:?}",
        path.display(),
        KILL_LIMIT.as_secs()
    )]
    Unkillable { path: PathBuf, pid: String },
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BootstrapError {
    move |source| BootstrapError::Io {
        doing,
        path: path.to_owned(),
        source,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Action {
    Start,
    Delete,
    Version,
}

/// Runs a shim's `main`: reads the arguments, and calls `serve` in the serving process or `delete` after a dead
/// shim. Call it before anything else in the process.
pub fn run<S, D>(name: &str, version: &str, serve: S, delete: D) -> ExitCode
where
    S: FnOnce(Started) -> Result<(), BoxError>,
    D: FnOnce(&Context) -> Result<Deleted, BoxError>,
{
    let outcome = dispatch(name, version, serve, delete);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = format!("{name}: {error}");
            let mut source = error.source();
            while let Some(inner) = source {
                text.push_str(": ");
                text.push_str(&inner.to_string());
                source = inner.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch<S, D>(name: &str, version: &str, serve: S, delete: D) -> Result<(), BoxError>
where
    S: FnOnce(Started) -> Result<(), BoxError>,
    D: FnOnce(&Context) -> Result<Deleted, BoxError>,
{
    let (action, context) = parse(std::env::args_os().skip(1).collect())?;
    match (action, context) {
        (Action::Start, Some(context)) => match start(context)? {
            Some(started) => serve(started),
            None => Ok(()),
        },
        (Action::Delete, Some(context)) => {
            end_live_shim(&context)?;
            let deleted = delete(&context)?;
            remove_sockets(&context)?;
            let mut response = DeleteResponse::new();
            response.set_exit_status(deleted.exit_status);
            std::io::stdout().write_all(&response.write_to_bytes()?)?;
            Ok(())
        }
        _ => {
            println!("{name} {version}");
            Ok(())
        }
    }
}

/// Flags as Go's flag package reads them: `-id x`, `--id x`, `-id=x`. The bundle is the current directory
/// unless `-bundle` names it.
fn parse(arguments: Vec<OsString>) -> Result<(Action, Option<Context>), BootstrapError> {
    let usage = |text: String| BootstrapError::Usage(text);
    let (mut id, mut namespace, mut bundle, mut debug) = (None, String::new(), None, false);
    let mut action = None;
    let mut words = arguments.into_iter().map(|word| {
        word.into_string()
            .map_err(|word| BootstrapError::Usage(format!("argument {word:?} is not UTF-8")))
    });
    while let Some(word) = words.next() {
        let word = word?;
        let Some(flag) = word.strip_prefix('-') else {
            action = Some(match word.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                other => {
                    return Err(usage(format!(
                        "unknown command {other:?}: start or delete is expected"
                    )));
                }
            });
            continue;
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (flag, mut value) = match flag.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (flag, None),
        };
        if matches!(
            flag,
            "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket"
        ) && value.is_none()
        {
            value = Some(
                words
                    .next()
                    .ok_or_else(|| usage(format!("flag -{flag} needs a value")))??,
            );
        }
        let value = value.unwrap_or_default();
        match flag {
            "namespace" => namespace = value,
            "id" => id = Some(Id::parse(&value).map_err(|error| usage(format!("flag -id: {error}")))?),
            "bundle" => bundle = Some(PathBuf::from(value)),
            "debug" => debug = value != "false",
            "v" | "version" => return Ok((Action::Version, None)),
            // containerd's own address and event publisher: no events are sent there.
            "address" | "publish-binary" | "socket" => {}
            other => return Err(usage(format!("unknown flag -{other}"))),
        }
    }
    let action = action.ok_or_else(|| usage("a command is missing: start or delete".to_owned()))?;
    let id = id.ok_or_else(|| usage("flag -id is missing".to_owned()))?;
    let bundle = bundle.unwrap_or_else(|| PathBuf::from("."));
    let bundle = bundle.canonicalize().map_err(io("find bundle", &bundle))?;
    Ok((
        action,
        Some(Context {
            id,
            namespace,
            bundle,
            debug,
        }),
    ))
}

/// `start`. `None` in the parent, whose work is done.
fn start(context: Context) -> Result<Option<Started>, BootstrapError> {
    let socket = context.socket();
    // One start at a time for a bundle; released when both processes have closed it.
    let bundle = File::open(&context.bundle).map_err(io("open bundle", &context.bundle))?;
    flock(&bundle, FlockOperation::LockExclusive)
        .map_err(|error| io("lock bundle", &context.bundle)(error.into()))?;
    if UnixStream::connect(&socket).is_ok() {
        print_address(&socket)?;
        return Ok(None);
    }
    let directory = socket.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io("create directory", directory))?;
    remove_file(&socket)?;
    let listener = UnixListener::bind(&socket).map_err(io("bind", &socket))?;
    listener.set_nonblocking(true).map_err(io("set up", &socket))?;
    std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(io("protect", &socket))?;
    let log_path = context.bundle.join(LOG_FILE);
    let log = File::options()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(&log_path)
        .map_err(io("open", &log_path))?;

    let pid_path = context.bundle.join(PID_FILE);
    let lock = lock_pid_file(&pid_path)?;

    // SAFETY: this process has one thread: `run` is called first in main and nothing before made another.
    match unsafe { nix::unistd::fork() }.map_err(BootstrapError::Fork)? {
        ForkResult::Parent { child } => {
            // The child has the lock through the same open file, so it is held without a gap.
            write_pid(&lock, child.as_raw()).map_err(io("write", &pid_path))?;
            print_address(&socket)?;
            Ok(None)
        }
        ForkResult::Child => {
            drop(bundle);
            write_pid(&lock, std::process::id().cast_signed()).map_err(io("write", &pid_path))?;
            become_server(&context, &log)?;
            crate::shim_log::init(context.debug);
            Ok(Some(Started {
                context,
                listener,
                lock,
            }))
        }
    }
}

fn lock_pid_file(path: &Path) -> Result<File, BootstrapError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(io("open", path))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| io("lock, as another shim of this pod still ends,", path)(error.into()))?;
    file.set_len(0).map_err(io("empty", path))?;
    Ok(file)
}

/// By parent and child, the same bytes in the same place: either may be killed before it comes to it.
fn write_pid(file: &File, pid: i32) -> std::io::Result<()> {
    file.write_all_at(pid.to_string().as_bytes(), 0)
}

/// Detaches the serving process from the daemon that started it.
fn become_server(context: &Context, log: &File) -> Result<(), BootstrapError> {
    let name = Path::new(LOG_FILE);
    let null = File::open("/dev/null").map_err(io("open", Path::new("/dev/null")))?;
    let redirect =
        |result: rustix::io::Result<()>| result.map_err(|error| io("redirect stdio to", name)(error.into()));
    redirect(rustix::stdio::dup2_stdin(null.as_fd()))?;
    redirect(rustix::stdio::dup2_stdout(log.as_fd()))?;
    redirect(rustix::stdio::dup2_stderr(log.as_fd()))?;
    rustix::process::setsid().map_err(|error| io("leave the session of", name)(error.into()))?;
    rustix::process::set_child_subreaper(true.then(rustix::process::getpid))
        .map_err(|error| io("become subreaper for", &context.bundle)(error.into()))?;
    let score = Path::new("/proc/self/oom_score_adj");
    be_killed_before_daemon(score).map_err(io("set", score))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    // The bundle's file system shall not be busy because of the shim.
    std::env::set_current_dir("/").map_err(io("enter", Path::new("/")))
}

/// A daemon that is protected from the OOM killer protects its shims a little less than itself, as containerd
/// does: under -999, the unit's, they have -998. Their containers have scores of their own.
fn be_killed_before_daemon(score: &Path) -> std::io::Result<()> {
    match std::fs::read_to_string(score)?.trim().parse::<i32>() {
        Ok(inherited) if inherited < 0 => std::fs::write(score, (inherited + 1).to_string()),
        _ => Ok(()),
    }
}

fn print_address(socket: &Path) -> Result<(), BootstrapError> {
    let line = serde_json::json!({
        "version": 3,
        "address": format!("unix://{}", socket.display()),
        "protocol": "ttrpc",
    });
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .map_err(io("write address to", Path::new("stdout")))
}

/// Ends a shim that is still there when its pod is deleted: a hung one.
fn end_live_shim(context: &Context) -> Result<(), BootstrapError> {
    let path = context.bundle.join(PID_FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("open", &path)(error)),
    };
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(io("lock", &path)(error.into())),
        }
        // The lock is held, so the process that wrote the file lives and the number is its own.
        let text = std::fs::read_to_string(&path).map_err(io("read", &path))?;
        if let Ok(pid) = text.trim().parse::<i32>()
            && pid > 1
        {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(io("kill the shim of", &path)(error.into())),
            }
        }
        if begun.elapsed() > KILL_LIMIT {
            return Err(BootstrapError::Unkillable { path, pid: text });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Removes the sockets of a pod's shim, further ones too.
fn remove_sockets(context: &Context) -> Result<(), BootstrapError> {
    let socket = context.socket();
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("list", directory)(error)),
    };
    for entry in entries.flatten() {
        if let Some(name) = entry.file_name().to_str()
            && let Some(rest) = name.strip_prefix(context.id.short())
            && rest.ends_with(".sock")
            && matches!(rest.as_bytes().first(), Some(b'.' | b'-'))
        {
            remove_file(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), BootstrapError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_flags_of_containerd_are_read() {
        let bundle = tempfile::tempdir().unwrap();
        let line = format!(
            "-namespace k8s.io -id=abc -address /x.sock --publish-binary /bin/c -debug -bundle {} delete",
            bundle.path().display()
        );
        let (action, context) = parse(words(&line)).unwrap();
        let context = context.unwrap();
        assert_eq!((action, context.id.as_str()), (Action::Delete, "abc"));
        assert_eq!((context.namespace.as_str(), context.debug), ("k8s.io", true));
        assert_eq!(context.bundle, bundle.path().canonicalize().unwrap());
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for line in [
            "-id abc",
            "start",
            "-id ../x start",
            "-id abc fly",
            "-what start",
            "-id",
        ] {
            assert!(
                matches!(parse(words(line)), Err(BootstrapError::Usage(_))),
                "{line}"
            );
        }
    }

    /// The OOM killer's own scores go from -1000 to 1000.
    #[test]
    fn a_protected_daemon_protects_its_shims_a_little_less() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (daemon, shim) in [
            ("-999\n", "-998"),
            ("-1000\n", "-999"),
            ("0\n", "0\n"),
            ("500\n", "500\n"),
        ] {
            std::fs::write(file.path(), daemon).unwrap();
            be_killed_before_daemon(file.path()).unwrap();
            assert_eq!(std::fs::read_to_string(file.path()).unwrap(), shim);
        }
    }

    /// A `start` that was killed between lock and fork, or a child that was before it wrote.
    #[test]
    fn a_locked_pid_file_without_a_pid_is_given_up() {
        let bundle = tempfile::tempdir().unwrap();
        let _lock = lock_pid_file(&bundle.path().join(PID_FILE)).unwrap();
        let context = Context {
            id: Id::parse("abc").unwrap(),
            namespace: String::new(),
            bundle: bundle.path().to_owned(),
            debug: false,
        };
        let error = end_live_shim(&context).unwrap_err();
        assert!(error.to_string().contains("process id is \"\""), "{error}");
    }

    #[test]
    fn sockets_are_beside_the_pods() {
        let context = Context {
            id: Id::parse(&"ab".repeat(32)).unwrap(),
            namespace: String::new(),
            bundle: "/run/catamaran/pods/x".into(),
            debug: false,
        };
        let short = "ab".repeat(16);
        assert_eq!(
            context.socket(),
            PathBuf::from(format!("/run/catamaran/s/{short}.sock"))
        );
        assert_eq!(
            context.socket_named("qmp"),
            PathBuf::from(format!("/run/catamaran/s/{short}-qmp.sock"))
        );
    }
}
