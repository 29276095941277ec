//! Runtime handlers: from the name that a RuntimeClass gives to the shim that serves it, what its runtime can
//! do, and what the shim is told about it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use catamaran_sandbox::pod_spec::{Acceleration, RuntimeSpec};
use catamaran_spec::{RuntimeFeatures, Side};
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::OnceCell;

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

/// All handlers of the node.
#[derive(Debug)]
pub struct Handlers {
    by_name: BTreeMap<String, Handler>,
    acceleration: OnceCell<Verdict>,
    verdict_file: PathBuf,
    vm_shim: Result<PathBuf, String>,
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
    shim: Result<PathBuf, String>,
    binary: Result<PathBuf, String>,
    root: PathBuf,
    /// Where containers' writable layers are.
    snapshots: PathBuf,
    features: OnceCell<Features>,
}

/// What a handler can do, and why not the rest.
#[derive(Debug, Default)]
struct Features {
    runtime: RuntimeFeatures,
    no_user_namespaces: String,
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
        let shim_of = |kind, entry: &HandlerConfig| match &entry.shim {
            Some(path) if path.is_file() => Ok(path.clone()),
            Some(path) => Err(format!("{} does not exist", path.display())),
            None => {
                let name = if kind == HandlerType::Vm {
                    RUNV_SHIM
                } else {
                    RUNC_SHIM
                };
                find_shim(name, config.shim_dir.as_deref())
            }
        };
        let by_name: BTreeMap<String, Handler> = config
            .all_handlers()
            .into_iter()
            .map(|(name, entry)| {
                let kind = entry.kind(&name);
                let program = match kind {
                    HandlerType::Oci => entry.binary.clone().unwrap_or_else(|| PathBuf::from(&name)),
                    HandlerType::Vm => entry.vmm.clone().unwrap_or_else(|| "qemu-system-x86_64".into()),
                };
                let handler = Handler {
                    shim: shim_of(kind, &entry),
                    binary: find_program(&program),
                    root: dirs.runtime_root(&name),
                    snapshots: dirs.snapshots(),
                    kind,
                    config: entry,
                    features: OnceCell::new(),
                    name: name.clone(),
                };
                (name, handler)
            })
            .collect();
        let vm_shim = by_name
            .values()
            .find(|handler| handler.kind == HandlerType::Vm)
            .map_or_else(
                || Err("no handler of type vm is configured".to_owned()),
                |vm| vm.shim.clone(),
            );
        Self {
            by_name,
            acceleration: OnceCell::new(),
            verdict_file: dirs.acceleration(),
            vm_shim,
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

    /// How VMs run on this node. The probe runs once and its verdict is kept until a reboot.
    pub async fn verdict(&self) -> &Verdict {
        self.acceleration
            .get_or_init(|| async {
                if let Ok(bytes) = std::fs::read(&self.verdict_file)
                    && let Ok(verdict) = serde_json::from_slice(&bytes)
                {
                    return verdict;
                }
                match self.probe().await {
                    Ok(verdict) => {
                        self.keep(&verdict);
                        verdict
                    }
                    Err(reason) => Verdict {
                        usable: false,
                        reason,
                    },
                }
            })
            .await
    }

    async fn probe(&self) -> Result<Verdict, String> {
        let shim = self.vm_shim.clone()?;
        let answer = ask(&shim, &["probe".as_ref()]).await?;
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
    /// Its shim.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] when it is not installed.
    pub fn shim(&self) -> Result<&Path> {
        self.shim.as_deref().map_err(|problem| self.unusable(problem))
    }

    /// The OCI runtime or the VMM.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] when it is not installed.
    pub fn program(&self) -> Result<&Path> {
        self.binary.as_deref().map_err(|problem| self.unusable(problem))
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
            binary: self.program()?.to_owned(),
            args: self.config.args.clone().unwrap_or_default(),
            root: self.root.clone(),
        })
    }

    /// What its OCI runtime can do, by `<runtime> features`, asked once. A runtime without that subcommand, and
    /// one that cannot be run, can do nothing beyond the basics.
    pub async fn features(&self) -> RuntimeFeatures {
        self.all_features().await.runtime
    }

    /// Why [`Self::features`] has no user namespaces; empty where it has.
    pub async fn no_user_namespaces(&self) -> &str {
        &self.all_features().await.no_user_namespaces
    }

    async fn all_features(&self) -> &Features {
        self.features.get_or_init(|| self.find_features()).await
    }

    async fn find_features(&self) -> Features {
        let without = |reason: String| Features {
            no_user_namespaces: reason,
            ..Features::default()
        };
        if self.kind == HandlerType::Vm {
            return without("its pods are virtual machines, whose root is not the node's anyway".to_owned());
        }
        let binary = match &self.binary {
            Ok(binary) => binary,
            Err(problem) => return without(problem.clone()),
        };
        let mut runtime = match ask(binary, &["features".as_ref()]).await {
            Ok(json) => RuntimeFeatures::from_features_json(&json).unwrap_or_default(),
            Err(problem) => {
                tracing::debug!(
                    handler = self.name,
                    problem,
                    "the runtime has no features command"
                );
                RuntimeFeatures::default()
            }
        };
        let mut no_user_namespaces = String::new();
        if !runtime.user_namespaces {
            no_user_namespaces = format!(
                "{} does not say that it has id-mapped mounts (runc has them from 1.2 on)",
                binary.display()
            );
        } else if let Err(problem) = self.id_mapped_layers().await {
            tracing::info!(handler = self.name, problem, "no user namespaces");
            runtime.user_namespaces = false;
            no_user_namespaces = format!("the images' layers cannot be id-mapped: {problem}");
        }
        Features {
            runtime,
            no_user_namespaces,
        }
    }

    /// Whether the kernel takes id-mapped layers where ours are. A process of one thread has to try it.
    async fn id_mapped_layers(&self) -> Result<(), String> {
        let shim = self.shim.as_ref().map_err(Clone::clone)?;
        ask(shim, &["idmap-probe".as_ref(), self.snapshots.as_os_str()])
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
async fn ask(program: &Path, args: &[&OsStr]) -> Result<Vec<u8>, String> {
    let run = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let words: Vec<_> = args.iter().map(|word| word.to_string_lossy()).collect();
    let what = format!("{} {}", program.display(), words.join(" "));
    let output = tokio::time::timeout(ASK_LIMIT, run)
        .await
        .map_err(|_| format!("{what} did not answer within {} s", ASK_LIMIT.as_secs()))?
        .map_err(|e| format!("{what}: {e}"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!(
            "{what} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
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
}
