//! A container by an OCI runtime: made, started, signalled, removed; its execs.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use catamaran_sandbox::bootstrap::Context;
use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::shim_server::ShimError;
use catamaran_sandbox::shim_server::backend::{
    ContainerBackend, CreateContainer, ExecProcess, Process, Reader, Writer,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use tokio::net::unix::pipe;

use crate::cgroup::{Cgroup, hasten_move};
use crate::cleanup;
use crate::console::{ConsoleSocket, Terminal};
use crate::mounts;
use crate::oci_runtime::{CommandStdio, OciRuntime, Temporary, memory_file};
use crate::process::{HostProcess, SignalByRuntime, kill_cgroup};
use crate::reaper::{Reaper, is_child};

/// What the containers of a pod have in common.
pub(crate) struct Shared {
    pub(crate) context: Context,
    pub(crate) runtime: OciRuntime,
    pub(crate) reaper: Arc<Reaper>,
    /// The pod's user namespace, through whose mappings layers are mounted.
    pub(crate) user: Option<OwnedFd>,
    pub(crate) next_console: AtomicU64,
}

impl Shared {
    /// A socket's path for the next terminal. A number, as ids are too long for `sockaddr_un`.
    fn console(&self) -> PathBuf {
        let number = self.next_console.fetch_add(1, Ordering::Relaxed);
        self.context.socket_named(&format!("tty-{number}"))
    }
}

/// See the module.
pub(crate) struct OciContainer {
    shared: Arc<Shared>,
    id: String,
    bundle: PathBuf,
    cgroup: Cgroup,
    init: Arc<HostProcess>,
}

/// Near and far ends of a process's stdio.
struct Wiring {
    stdin: Option<Writer>,
    stdout: Option<Reader>,
    stderr: Option<Reader>,
    console: Option<ConsoleSocket>,
    far: CommandStdio,
}

fn failed(doing: &str, bundle: &Path) -> impl FnOnce(std::io::Error) -> ShimError {
    let text = format!("{doing} of {}", bundle.display());
    move |error| ShimError::internal(text, &error)
}

impl Wiring {
    fn new(terminal: bool, stdin: bool, console: PathBuf) -> std::io::Result<Self> {
        let mut wiring = Self {
            stdin: None,
            stdout: None,
            stderr: None,
            console: None,
            far: CommandStdio::default(),
        };
        if terminal {
            wiring.console = Some(ConsoleSocket::bind(console)?);
            return Ok(wiring);
        }
        if stdin {
            let (far, near) = pipe2(OFlag::O_CLOEXEC)?;
            wiring.stdin = Some(Box::new(pipe::Sender::from_owned_fd(near)?));
            wiring.far.stdin = Some(far);
        }
        let output = || -> std::io::Result<(Reader, _)> {
            let (near, far) = pipe2(OFlag::O_CLOEXEC)?;
            Ok((Box::new(pipe::Receiver::from_owned_fd(near)?), far))
        };
        let (stdout, far) = output()?;
        (wiring.stdout, wiring.far.stdout) = (Some(stdout), Some(far));
        let (stderr, far) = output()?;
        (wiring.stderr, wiring.far.stderr) = (Some(stderr), Some(far));
        Ok(wiring)
    }

    /// Runtime's arguments for the terminal.
    fn arguments(&self) -> Vec<OsString> {
        match &self.console {
            Some(console) => vec!["--console-socket".into(), console.path().into()],
            None => Vec::new(),
        }
    }

    /// After the runtime has made the process.
    async fn terminal(&mut self) -> std::io::Result<Option<Terminal>> {
        let Some(console) = self.console.take() else {
            return Ok(None);
        };
        let terminal = console.receive().await?;
        self.stdin = Some(Box::new(terminal.clone()));
        self.stdout = Some(Box::new(terminal.clone()));
        Ok(Some(terminal))
    }
}

fn read_pid(path: &Path) -> std::io::Result<i32> {
    let text = std::fs::read_to_string(path)?;
    match text.trim().parse::<i32>() {
        Ok(pid) if pid > 1 => Ok(pid),
        _ => Err(std::io::Error::other(format!(
            "{} has no pid in it: {text:?}",
            path.display()
        ))),
    }
}

impl OciContainer {
    /// Mounts the root file system and has the runtime make the container. Nothing is left on failure.
    pub(crate) async fn create(
        shared: Arc<Shared>,
        request: CreateContainer,
    ) -> Result<(Arc<dyn ContainerBackend>, Process), ShimError> {
        // Before any side effect: what `delete` goes by, should this shim die.
        cleanup::remember(&shared.context.bundle, &request.id, &request.bundle)
            .map_err(failed("note the container", &request.bundle))?;
        match Self::make(&shared, &request).await {
            Ok(made) => Ok(made),
            Err(error) => {
                let undone = match end_cgroup(&request.bundle).await {
                    Ok(()) => remove(&shared, &request.id, &request.bundle).await,
                    failed => failed,
                };
                if let Err(undo) = undone {
                    return Err(ShimError::Internal(format!(
                        "{error}; and undoing it failed: {undo}"
                    )));
                }
                Err(error)
            }
        }
    }

    async fn make(
        shared: &Arc<Shared>,
        request: &CreateContainer,
    ) -> Result<(Arc<dyn ContainerBackend>, Process), ShimError> {
        let bundle = &request.bundle;
        hasten_move();
        let user = shared.user.as_ref().map(AsFd::as_fd);
        mounts::mount_rootfs(&request.rootfs, &bundle.join("rootfs"), user)
            .map_err(|error| ShimError::internal("make the root file system", &error))?;
        let mut wiring = Wiring::new(request.terminal, request.stdin, shared.console())
            .map_err(failed("make stdio", bundle))?;
        let pid_file = bundle.join("init.pid");
        let mut arguments: Vec<OsString> = vec!["create".into(), "--bundle".into(), bundle.into()];
        arguments.extend(["--pid-file".into(), pid_file.clone().into()]);
        arguments.extend(wiring.arguments());
        arguments.push(request.id.clone().into());

        let _expected = shared.reaper.expect();
        let far = std::mem::take(&mut wiring.far);
        shared.runtime.run(bundle, arguments, far).await?;
        let pid = read_pid(&pid_file).map_err(failed("read the pid", bundle))?;
        let exit = shared.reaper.watch(pid);
        let terminal = wiring
            .terminal()
            .await
            .map_err(failed("take the terminal", bundle))?;
        let cgroup = Cgroup::of_container(pid.unsigned_abs()).map_err(failed("find the cgroup", bundle))?;
        let by_runtime = (!shared.runtime.is_native()).then(|| -> Box<dyn SignalByRuntime> {
            Box::new(RuntimeKill {
                shared: shared.clone(),
                id: request.id.clone(),
                bundle: bundle.clone(),
            })
        });
        let init = Arc::new(HostProcess::new(pid, terminal, cgroup.clone(), by_runtime));
        let watched = cgroup.clone();
        let process = Process {
            pid: pid.unsigned_abs(),
            stdin: wiring.stdin,
            stdout: wiring.stdout,
            stderr: wiring.stderr,
            control: init.clone(),
            exit: Box::pin(async move {
                let exit = exit.await;
                // Before the cgroup is deleted. The kernel counts before it kills.
                let oom_killed = watched.oom_kills() > 0;
                // Where the PID namespace is not the container's own, its other processes live on.
                kill_cgroup(&watched);
                match exit {
                    Ok(exit) => ExitRecord {
                        exit_code: exit.code,
                        exited_at_ns: exit.at_ns,
                        oom_killed,
                    },
                    Err(_) => ExitRecord {
                        exit_code: 255,
                        exited_at_ns: crate::reaper::now_ns(),
                        oom_killed,
                    },
                }
            }),
        };
        let container = Self {
            shared: shared.clone(),
            id: request.id.clone(),
            bundle: bundle.clone(),
            cgroup,
            init,
        };
        Ok((Arc::new(container), process))
    }

    async fn run(&self, arguments: &[&str]) -> Result<(), ShimError> {
        Ok(self
            .shared
            .runtime
            .run(&self.bundle, arguments, CommandStdio::default())
            .await?)
    }

    async fn start_exec(
        &self,
        request: &ExecProcess,
        wiring: &mut Wiring,
        pid_file: &Path,
    ) -> Result<(), ShimError> {
        let process_file = Temporary(pid_file.with_extension("json"));
        std::fs::write(&process_file.0, &request.process)
            .map_err(failed("write the process", &self.bundle))?;
        let mut arguments: Vec<OsString> = vec!["exec".into(), "--detach".into()];
        arguments.extend(["--process".into(), process_file.0.clone().into()]);
        arguments.extend(["--pid-file".into(), pid_file.into()]);
        arguments.extend(wiring.arguments());
        arguments.push(self.id.clone().into());
        let far = std::mem::take(&mut wiring.far);
        let runtime = &self.shared.runtime;
        Ok(runtime
            .run_in(self.cgroup.clone(), &self.bundle, arguments, far)
            .await?)
    }
}

/// An exec whose runtime is at work; dropping it kills the process, if there is one already.
struct Starting<'a> {
    container: &'a OciContainer,
    pid_file: Temporary,
    taken: bool,
}

impl Starting<'_> {
    /// The process's id; it is the caller's from now on.
    fn take(mut self) -> std::io::Result<i32> {
        let pid = read_pid(&self.pid_file.0)?;
        self.taken = true;
        Ok(pid)
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        // One that was reaped since is no child any more, whoever has its number now.
        if !self.taken
            && let Ok(pid) = read_pid(&self.pid_file.0)
            && is_child(pid)
        {
            HostProcess::new(pid, None, self.container.cgroup.clone(), None).kill_tree_now();
        }
    }
}

/// What the runtime leaves where it was killed while it made the container.
async fn end_cgroup(bundle: &Path) -> Result<(), ShimError> {
    let path = bundle.to_owned();
    match tokio::task::spawn_blocking(move || cleanup::end_cgroup(&path)).await {
        Ok(result) => result.map_err(failed("remove the cgroup", bundle)),
        Err(error) => Err(ShimError::internal("remove the cgroup", &error)),
    }
}

/// Removes a container that has ended or was not made; idempotent.
async fn remove(shared: &Shared, id: &str, bundle: &Path) -> Result<(), ShimError> {
    // `--force` makes a container that the runtime does not know no error.
    shared
        .runtime
        .run(bundle, ["delete", "--force", id], CommandStdio::default())
        .await?;
    mounts::unmount_rootfs(&bundle.join("rootfs"))
        .map_err(|error| ShimError::internal("remove the root file system", &error))?;
    cleanup::forget(&shared.context.bundle, id).map_err(failed("forget the container", bundle))
}

struct RuntimeKill {
    shared: Arc<Shared>,
    id: String,
    bundle: PathBuf,
}

#[async_trait]
impl SignalByRuntime for RuntimeKill {
    async fn signal(&self, signal: i32) -> Result<(), ShimError> {
        let signal = signal.to_string();
        let arguments = ["kill", self.id.as_str(), signal.as_str()];
        Ok(self
            .shared
            .runtime
            .run(&self.bundle, arguments, CommandStdio::default())
            .await?)
    }
}

#[async_trait]
impl ContainerBackend for OciContainer {
    async fn start(&self) -> Result<(), ShimError> {
        self.run(&["start", &self.id]).await
    }

    async fn exec(&self, request: ExecProcess) -> Result<Process, ShimError> {
        hasten_move();
        let mut wiring = Wiring::new(request.terminal, request.stdin, self.shared.console())
            .map_err(failed("make stdio of an exec", &self.bundle))?;
        let expected = self.shared.reaper.expect();
        let starting = Starting {
            container: self,
            pid_file: Temporary(self.bundle.join(format!("exec-{}.pid", request.exec_id))),
            taken: false,
        };
        self.start_exec(&request, &mut wiring, &starting.pid_file.0)
            .await?;
        let pid = starting.take().map_err(failed("read the pid", &self.bundle))?;
        let exit = self.shared.reaper.watch(pid);
        drop(expected);
        let terminal = match wiring.terminal().await {
            Ok(terminal) => terminal,
            Err(error) => {
                use catamaran_sandbox::shim_server::backend::ProcessControl;
                HostProcess::new(pid, None, self.cgroup.clone(), None)
                    .kill_tree()
                    .await;
                return Err(failed("take the terminal of an exec", &self.bundle)(error));
            }
        };
        let control = Arc::new(HostProcess::new(pid, terminal, self.cgroup.clone(), None));
        Ok(Process {
            pid: pid.unsigned_abs(),
            stdin: wiring.stdin,
            stdout: wiring.stdout,
            stderr: wiring.stderr,
            control,
            exit: Box::pin(async move {
                let (exit_code, exited_at_ns) = match exit.await {
                    Ok(exit) => (exit.code, exit.at_ns),
                    Err(_) => (255, crate::reaper::now_ns()),
                };
                ExitRecord {
                    exit_code,
                    exited_at_ns,
                    oom_killed: false,
                }
            }),
        })
    }

    async fn signal_all(&self, signal: i32) -> Result<(), ShimError> {
        use catamaran_sandbox::shim_server::backend::ProcessControl;
        if !self.shared.runtime.is_native() {
            return self.init.signal(signal).await;
        }
        if signal == libc::SIGKILL {
            kill_cgroup(&self.cgroup);
            // In its own PID namespace this ends what escaped to another cgroup, too.
            return match self.init.signal(signal).await {
                Err(ShimError::NotFound(_)) => Ok(()),
                result => result,
            };
        }
        for pid in self.cgroup.processes() {
            // One that ended meanwhile has had its signal.
            // SAFETY: kill(2) takes plain numbers; nix has no real-time signals.
            unsafe { libc::kill(pid, signal) };
        }
        Ok(())
    }

    async fn delete(&self) -> Result<(), ShimError> {
        remove(&self.shared, &self.id, &self.bundle).await
    }

    async fn update(&self, resources: &[u8]) -> Result<(), ShimError> {
        use std::io::{Seek, Write};
        let mut file = memory_file().map_err(failed("write resources", &self.bundle))?;
        file.write_all(resources)
            .and_then(|()| file.rewind())
            .map_err(failed("write resources", &self.bundle))?;
        let stdio = CommandStdio {
            stdin: Some(file.into()),
            ..CommandStdio::default()
        };
        Ok(self
            .shared
            .runtime
            .run(&self.bundle, ["update", "--resources", "-", &self.id], stdio)
            .await?)
    }

    async fn stats(&self) -> Result<Any, ShimError> {
        crate::stats::read(&self.cgroup)
    }

    async fn pids(&self) -> Result<Vec<u32>, ShimError> {
        Ok(self
            .cgroup
            .processes()
            .into_iter()
            .map(i32::unsigned_abs)
            .collect())
    }

    async fn checkpoint(&self, images: &Path) -> Result<(), ShimError> {
        let images = images.as_os_str();
        let arguments: [&OsStr; 7] = [
            "checkpoint".as_ref(),
            "--leave-running".as_ref(),
            "--image-path".as_ref(),
            images,
            // Where criu's log goes.
            "--work-path".as_ref(),
            images,
            self.id.as_ref(),
        ];
        let runtime = &self.shared.runtime;
        Ok(runtime
            .run(&self.bundle, arguments, CommandStdio::default())
            .await?)
    }

    async fn freeze(&self, frozen: bool) -> Result<(), ShimError> {
        self.run(&[if frozen { "pause" } else { "resume" }, &self.id])
            .await
    }
}
