//! Runtime handlers: from the name that a RuntimeClass gives to the shim that serves it, what its runtime can
//! do, and what the shim is told about it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use catamaran_sandbox::pod_spec::{Acceleration, RuntimeSpec};
use catamaran_spec::{RuntimeFeatures, Side};
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::config::{Config, DEFAULT_HANDLER, HandlerConfig, HandlerType};
use crate::error::{Error, Result};
use crate::node::Dirs;
use crate::shim::find_shim;

/// The namespace shim.
pub const RUNC_SHIM: &str = "containerd-shim-catamaran-runc-v2";
/// The vm shim.
pub const RUNV_SHIM: &str = "containerd-shim-catamaran-runv-v2";
/// A child that only answers a question about itself.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// A probe that says no may have met a busy host, or one whose module was loaded later: it is asked again.
const PROBE_AGAIN: Duration = Duration::from_secs(600);

/// All handlers of the node.
#[derive(Debug)]
pub struct Handlers {
    by_name: BTreeMap<String, Handler>,
    /// The probe's last answer and when it was given.
    acceleration: Mutex<Option<(Verdict, Instant)>>,
    verdict_file: PathBuf,
}

/// One handler.
#[derive(Debug)]
pub struct Handler {
    /// As a RuntimeClass names it.
    pub name: String,
    /// Namespaces or VM.
    pub kind: HandlerType,
    /// Its entry of the configuration.
    pub config: HandlerConfig,
    shim_dir: Option<PathBuf>,
    root: PathBuf,
    /// Where containers' writable layers are.
    snapshots: PathBuf,
    /// What this build of the runtime said.
    features: Mutex<Option<(Build, Features)>>,
}

/// What a handler can do, and why not the rest.
#[derive(Debug, Clone, Default)]
struct Features {
    runtime: RuntimeFeatures,
    no_user_namespaces: String,
}

/// An executable as it is installed; an upgrade makes another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Build {
    path: PathBuf,
    inode: u64,
    modified: Option<SystemTime>,
}

impl Build {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            path: path.to_owned(),
            inode: std::os::unix::fs::MetadataExt::ino(&metadata),
            modified: metadata.modified().ok(),
        })
    }
}

/// Why a child did not answer.
#[derive(Debug)]
enum Unanswered {
    /// It ended with an error, and will again.
    No(String),
    /// It could not be started or did not end in time; that may pass.
    NotNow(String),
}

impl Unanswered {
    fn into_text(self) -> String {
        let (Self::No(text) | Self::NotNow(text)) = self;
        text
    }
}

/// What the vCPU probe of the vm shim says (`probe`, JSON).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Guests run on KVM.
    pub usable: bool,
    /// Why, or why not.
    pub reason: String,
}

impl Verdict {
    /// What it means for a VM.
    #[must_use]
    pub fn acceleration(&self) -> Acceleration {
        if self.usable {
            Acceleration::Kvm
        } else {
            Acceleration::Tcg
        }
    }
}

impl Handlers {
    /// From the configuration. What is missing on the node is reported when the handler is used or checked.
    #[must_use]
    pub fn new(config: &Config, dirs: &Dirs) -> Self {
        let by_name: BTreeMap<String, Handler> = config
            .all_handlers()
            .into_iter()
            .map(|(name, entry)| {
                let handler = Handler {
                    shim_dir: config.shim_dir.clone(),
                    root: dirs.runtime_root(&name),
                    snapshots: dirs.snapshots(),
                    kind: entry.kind(&name),
                    config: entry,
                    features: Mutex::default(),
                    name: name.clone(),
                };
                (name, handler)
            })
            .collect();
        Self {
            by_name,
            acceleration: Mutex::default(),
            verdict_file: dirs.acceleration(),
        }
    }

    /// The handler that a RunPodSandbox names; empty: the default.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] listing the known ones.
    pub fn resolve(&self, name: &str) -> Result<&Handler> {
        let name = if name.is_empty() { DEFAULT_HANDLER } else { name };
        self.by_name.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
            Error::invalid(
                "runtime_handler",
                format!(
                    "no runtime handler {name:?} is configured; known are {}",
                    known.join(", ")
                ),
            )
        })
    }

    /// Every handler, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Handler> {
        self.by_name.values()
    }

    /// How VMs run on this node. That KVM works holds until a reboot; that it does not is asked again after a
    /// while, and that the probe could not be run is not kept at all.
    pub async fn verdict(&self) -> Verdict {
        let mut known = self.acceleration.lock().await;
        if let Some((verdict, since)) = &*known
            && (verdict.usable || since.elapsed() < PROBE_AGAIN)
        {
            return verdict.clone();
        }
        if known.is_none()
            && let Some((verdict, since)) = self.kept()
        {
            *known = Some((verdict.clone(), since));
            return verdict;
        }
        match self.probe().await {
            Ok(verdict) => {
                self.keep(&verdict);
                *known = Some((verdict.clone(), Instant::now()));
                verdict
            }
            Err(reason) => Verdict {
                usable: false,
                reason,
            },
        }
    }

    /// What a former process found, where it still holds.
    fn kept(&self) -> Option<(Verdict, Instant)> {
        let verdict: Verdict = serde_json::from_slice(&std::fs::read(&self.verdict_file).ok()?).ok()?;
        let written = std::fs::metadata(&self.verdict_file).ok()?.modified().ok()?;
        let since = Instant::now().checked_sub(written.elapsed().ok()?);
        match since {
            Some(since) if verdict.usable || since.elapsed() < PROBE_AGAIN => Some((verdict, since)),
            None if verdict.usable => Some((verdict, Instant::now())),
            _ => None,
        }
    }

    async fn probe(&self) -> Result<Verdict, String> {
        let vm = self
            .by_name
            .values()
            .find(|handler| handler.kind == HandlerType::Vm)
            .ok_or("no handler of type vm is configured")?;
        let answer = ask(&vm.find_shim()?, &["probe".as_ref()])
            .await
            .map_err(Unanswered::into_text)?;
        serde_json::from_slice(&answer).map_err(|e| format!("the probe's answer is not JSON: {e}"))
    }

    fn keep(&self, verdict: &Verdict) {
        let kept = serde_json::to_vec(verdict)
            .map_err(std::io::Error::from)
            .and_then(|bytes| write_atomically(&self.verdict_file, &bytes));
        if let Err(error) = kept {
            tracing::warn!(%error, "the probe's verdict cannot be kept and will be asked for again");
        }
    }
}

impl Handler {
    /// Its shim, as it is installed now.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] when it is not installed.
    pub fn shim(&self) -> Result<PathBuf> {
        self.find_shim().map_err(|problem| self.unusable(&problem))
    }

    fn find_shim(&self) -> Result<PathBuf, String> {
        match &self.config.shim {
            Some(path) if path.is_file() => Ok(path.clone()),
            Some(path) => Err(format!("{} does not exist", path.display())),
            None => {
                let name = match self.kind {
                    HandlerType::Vm => RUNV_SHIM,
                    HandlerType::Oci => RUNC_SHIM,
                };
                find_shim(name, self.shim_dir.as_deref())
            }
        }
    }

    /// The OCI runtime or the VMM, as it is installed now.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] when it is not installed.
    pub fn program(&self) -> Result<PathBuf> {
        self.find_program().map_err(|problem| self.unusable(&problem))
    }

    fn find_program(&self) -> Result<PathBuf, String> {
        let (given, default) = match self.kind {
            HandlerType::Oci => (&self.config.binary, self.name.as_str()),
            HandlerType::Vm => (&self.config.vmm, "qemu-system-x86_64"),
        };
        find_program(given.as_deref().unwrap_or(Path::new(default)))
    }

    fn unusable(&self, problem: &str) -> Error {
        Error::FailedPrecondition(format!("runtime handler {} cannot be used: {problem}", self.name))
    }

    /// Which kernel runs its pods.
    #[must_use]
    pub fn side(&self) -> Side {
        match self.kind {
            HandlerType::Oci => Side::Host,
            HandlerType::Vm => Side::Guest,
        }
    }

    /// What the shim of an `oci` handler is told.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] when the runtime is not installed.
    pub fn oci_spec(&self) -> Result<RuntimeSpec> {
        Ok(RuntimeSpec::Oci {
            binary: self.program()?,
            args: self.config.args.clone().unwrap_or_default(),
            root: self.root.clone(),
        })
    }

    /// What its OCI runtime can do, by `<runtime> features`, asked once of each build of it. A runtime without that
    /// subcommand, and one that cannot be run, can do nothing beyond the basics.
    pub async fn features(&self) -> RuntimeFeatures {
        self.all_features().await.runtime
    }

    /// Why [`Self::features`] has no user namespaces; empty where it has.
    pub async fn no_user_namespaces(&self) -> String {
        self.all_features().await.no_user_namespaces
    }

    async fn all_features(&self) -> Features {
        let without = |reason: String| Features {
            no_user_namespaces: reason,
            ..Features::default()
        };
        if self.kind == HandlerType::Vm {
            return without("its pods are virtual machines, whose root is not the node's anyway".to_owned());
        }
        let binary = match self.find_program() {
            Ok(binary) => binary,
            Err(problem) => return without(problem),
        };
        let build = Build::of(&binary);
        let mut known = self.features.lock().await;
        if let Some((of, features)) = &*known
            && Some(of) == build.as_ref()
        {
            return features.clone();
        }
        match (self.find_features(&binary).await, build) {
            (Ok(features), Some(build)) => known.insert((build, features)).1.clone(),
            (Ok(features), None) => features,
            (Err(problem), _) => {
                tracing::warn!(
                    handler = self.name,
                    problem,
                    "the runtime's features are not known yet"
                );
                without(problem)
            }
        }
    }

    /// # Errors
    /// What kept the runtime or the shim from answering, where that may pass.
    async fn find_features(&self, binary: &Path) -> Result<Features, String> {
        let mut runtime = match ask(binary, &["features".as_ref()]).await {
            Ok(json) => RuntimeFeatures::from_features_json(&json).unwrap_or_default(),
            Err(Unanswered::No(problem)) => {
                tracing::debug!(
                    handler = self.name,
                    problem,
                    "the runtime has no features command"
                );
                RuntimeFeatures::default()
            }
            Err(Unanswered::NotNow(problem)) => return Err(problem),
        };
        let mut no_user_namespaces = String::new();
        if !runtime.user_namespaces {
            no_user_namespaces = format!(
                "{} does not say that it has id-mapped mounts (runc has them from 1.2 on)",
                binary.display()
            );
        } else if let Err(unanswered) = self.id_mapped_layers().await {
            let problem = match unanswered {
                Unanswered::No(problem) => problem,
                Unanswered::NotNow(problem) => return Err(problem),
            };
            tracing::info!(handler = self.name, problem, "no user namespaces");
            runtime.user_namespaces = false;
            no_user_namespaces = format!("the images' layers cannot be id-mapped: {problem}");
        }
        Ok(Features {
            runtime,
            no_user_namespaces,
        })
    }

    /// Whether the kernel takes id-mapped layers where ours are. A process of one thread has to try it.
    async fn id_mapped_layers(&self) -> Result<(), Unanswered> {
        let shim = self.find_shim().map_err(Unanswered::NotNow)?;
        ask(&shim, &["idmap-probe".as_ref(), self.snapshots.as_os_str()])
            .await
            .map(drop)
    }
}

/// An executable by absolute path or by name in `PATH`.
fn find_program(program: &Path) -> Result<PathBuf, String> {
    if program.is_absolute() {
        return if program.is_file() {
            Ok(program.to_owned())
        } else {
            Err(format!("{} does not exist", program.display()))
        };
    }
    let name = program.to_string_lossy();
    crate::shim::find_in_path(&name)
        .or_else(|| {
            // A service manager's PATH may lack the administrator's directories.
            ["/usr/sbin", "/sbin", "/usr/local/sbin"]
                .iter()
                .map(|dir| Path::new(dir).join(program))
                .find(|path| path.is_file())
        })
        .ok_or_else(|| format!("{name} is not in PATH; install it or give its path in the configuration"))
}

/// Runs a short command and gives its standard output.
async fn ask(program: &Path, args: &[&OsStr]) -> Result<Vec<u8>, Unanswered> {
    let run = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let words: Vec<_> = args.iter().map(|word| word.to_string_lossy()).collect();
    let what = format!("{} {}", program.display(), words.join(" "));
    let output = tokio::time::timeout(ASK_LIMIT, run)
        .await
        .map_err(|_| Unanswered::NotNow(format!("{what} did not answer within {} s", ASK_LIMIT.as_secs())))?
        .map_err(|e| Unanswered::NotNow(format!("{what}: {e}")))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = format!(
        "{what} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    // What a signal ended (out of memory, an operator) did not answer.
    Err(match output.status.code() {
        Some(_) => Unanswered::No(text),
        None => Unanswered::NotNow(text),
    })
}

/// Writes a file so that no reader sees a part of it.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handlers(text: &str) -> Handlers {
        let config: Config = serde_yaml::from_str(text).unwrap();
        Handlers::new(&config, &Dirs::new(Path::new("/r"), Path::new("/s")))
    }

    #[test]
    fn an_unknown_handler_is_refused_with_the_known_ones() {
        let handlers = handlers("handlers: {runsc: {binary: /usr/bin/runsc}}");
        assert_eq!(handlers.resolve("").unwrap().name, "runc");
        assert_eq!(handlers.resolve("runv").unwrap().kind, HandlerType::Vm);
        let error = handlers.resolve("kata").unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
        assert!(
            error
                .to_string()
                .ends_with("\"kata\" is configured; known are runc, runsc, runv"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_runtime_is_said_with_the_handler() {
        let handlers = handlers("handlers: {x: {binary: /nowhere/x, shim: /bin/true}}");
        let error = handlers.resolve("x").unwrap().oci_spec().unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert!(
            error.to_string().contains("handler x") && error.to_string().contains("/nowhere/x"),
            "{error}"
        );
    }

    fn script(path: &Path, text: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        // Renamed into place: a file that is open for writing cannot be run.
        let new = path.with_extension("new");
        std::fs::write(&new, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&new, path).unwrap();
    }

    #[tokio::test]
    async fn what_comes_later_is_seen_and_only_real_answers_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (state, shim, runtime) = (
            dir.path().join("s"),
            dir.path().join("shim"),
            dir.path().join("rt"),
        );
        std::fs::create_dir(&state).unwrap();
        let text = format!(
            "handlers: {{runv: {{shim: {0}}}, x: {{binary: {1}, shim: {0}}}}}",
            shim.display(),
            runtime.display()
        );
        let config: Config = serde_yaml::from_str(&text).unwrap();
        let handlers = Handlers::new(&config, &Dirs::new(dir.path(), &state));
        let x = handlers.resolve("x").unwrap();
        assert!(x.shim().is_err() && x.program().is_err());
        assert!(!handlers.verdict().await.usable && !x.features().await.recursive_read_only_mounts);
        // Ended by a signal: that is no answer.
        script(&shim, "kill -KILL $$");
        script(&runtime, "kill -KILL $$");
        assert!(!handlers.verdict().await.usable && !x.features().await.recursive_read_only_mounts);
        script(&shim, r#"echo '{"usable": true, "reason": "ran"}'"#);
        script(&runtime, r#"echo '{"mountOptions": ["rro"]}'"#);
        assert!(handlers.verdict().await.usable && x.features().await.recursive_read_only_mounts);
        assert!(x.shim().is_ok() && x.program().is_ok());
        std::fs::remove_file(&shim).unwrap();
        assert!(handlers.verdict().await.usable);
        // Another build may have lost what the first had.
        script(&runtime, "exit 1");
        assert!(!x.features().await.recursive_read_only_mounts);
        assert!(x.no_user_namespaces().await.contains("id-mapped mounts"));
    }

    #[tokio::test]
    async fn a_verdict_is_kept_for_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "handlers: {{runv: {{shim: {}}}}}",
            dir.path().join("none").display()
        );
        let config: Config = serde_yaml::from_str(&text).unwrap();
        let dirs = Dirs::new(dir.path(), dir.path());
        let verdict = |text: &'static str, age: u64| {
            std::fs::write(dirs.acceleration(), text).unwrap();
            let file = std::fs::File::options()
                .write(true)
                .open(dirs.acceleration())
                .unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age))
                .unwrap();
            let handlers = Handlers::new(&config, &dirs);
            async move { handlers.verdict().await.reason }
        };
        assert_eq!(
            verdict(r#"{"usable": true, "reason": "ran"}"#, 86_400).await,
            "ran"
        );
        assert_eq!(verdict(r#"{"usable": false, "reason": "slow"}"#, 5).await, "slow");
        let again = verdict(r#"{"usable": false, "reason": "slow"}"#, 86_400).await;
        assert!(again.contains("does not exist"), "{again}");
    }
}
