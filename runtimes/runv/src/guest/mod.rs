//! `guest build`: makes a VM pod's boot artefacts from an installed kernel and the agent. The same inputs give
//! the same bytes, and a release's directory appears complete or not at all.

mod cpio;
mod kernel;
mod modules;

use std::io::Write;
use std::path::{Path, PathBuf};

use catamaran_sandbox::guest_image::{DEFAULT_LINK, GUEST_IMAGE_VERSION, GuestImage, MANIFEST};
use sha2::{Digest, Sha256};

pub use kernel::{Kernel, KernelError};
pub use modules::{Module, ModulesError};

/// Where artefacts go unless told otherwise.
pub const DEFAULT_OUTPUT: &str = "/var/lib/catamaran/guest";
/// List in the initramfs of the modules to load, one path a line, each after what it depends on.
pub const LOAD_ORDER: &str = "modules/load.order";
/// The agent's file name, looked for beside this executable and then in the installed directory.
const AGENT: &str = "catamaran-agent";
const INSTALLED: &str = "/usr/lib/catamaran";

/// What to build from; `None` takes the default.
#[derive(Debug, Default, Clone)]
pub struct Options {
    /// A bzImage or an uncompressed kernel; the newest `/boot/vmlinuz-*`.
    pub kernel: Option<PathBuf>,
    /// The kernel's module directory; `/lib/modules/RELEASE`. A kernel that has no such directory is taken to
    /// have everything built in.
    pub modules: Option<PathBuf>,
    /// The static agent.
    pub agent: Option<PathBuf>,
    /// [`DEFAULT_OUTPUT`].
    pub output: Option<PathBuf>,
    /// Leave the link to the default release as it is.
    pub keep_default: bool,
}

/// A guest that could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A word of the command line.
    #[error("{0}")]
    Usage(String),
    /// A file cannot be read or written.
    #[error("cannot {action} {path}")]
    Io {
        /// "read", "write", …
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No kernel is installed.
    #[error("no /boot/vmlinuz-* is installed: install a kernel package or name one with --kernel")]
    NoKernel,
    /// The agent is nowhere.
    #[error("no {AGENT} beside this program or in {INSTALLED}: name it with --agent")]
    NoAgent,
    /// The agent would not run as a guest's first process.
    #[error("the agent {0} is no static x86-64 executable")]
    Agent(PathBuf),
    /// The kernel is no use.
    #[error("the kernel {path} cannot be used")]
    Kernel {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: KernelError,
    },
    /// The modules are no use.
    #[error("the kernel's modules cannot be used")]
    Modules(#[from] ModulesError),
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BuildError + use<> {
    let path = path.to_owned();
    move |source| BuildError::Io { action, path, source }
}

impl Options {
    /// Reads `[--kernel FILE] [--modules DIR] [--agent FILE] [--output DIR] [--keep-default]`.
    ///
    /// # Errors
    /// [`BuildError::Usage`] naming the word that does not fit.
    pub fn parse(arguments: &[String]) -> Result<Self, BuildError> {
        let mut options = Self::default();
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let target = match word.as_str() {
                "--kernel" => &mut options.kernel,
                "--modules" => &mut options.modules,
                "--agent" => &mut options.agent,
                "--output" => &mut options.output,
                "--keep-default" => {
                    options.keep_default = true;
                    continue;
                }
                _ => {
                    return Err(BuildError::Usage(format!(
                        "unknown argument {word:?}; usage: guest build [--kernel FILE] [--modules DIR] \
                         [--agent FILE] [--output DIR] [--keep-default]"
                    )));
                }
            };
            let value = words
                .next()
                .ok_or_else(|| BuildError::Usage(format!("{word} needs a value")))?;
            *target = Some(PathBuf::from(value));
        }
        Ok(options)
    }
}

/// Builds and returns the release's directory.
///
/// # Errors
/// [`BuildError`]; the output directory is then as it was.
pub fn build(options: &Options) -> Result<PathBuf, BuildError> {
    let kernel_path = options.kernel.clone().map_or_else(newest_kernel, Ok)?;
    let source = std::fs::read(&kernel_path).map_err(io("read", &kernel_path))?;
    let kernel_source_sha256 = hex::encode(Sha256::digest(&source));
    let kernel = Kernel::read(source).map_err(|source| BuildError::Kernel {
        path: kernel_path,
        source,
    })?;
    let agent_path = options.agent.clone().map_or_else(find_agent, Ok)?;
    let agent = std::fs::read(&agent_path).map_err(io("read", &agent_path))?;
    if !is_static_executable(&agent) {
        return Err(BuildError::Agent(agent_path));
    }
    let modules = match &options.modules {
        Some(directory) => modules::collect(directory)?,
        None => {
            let directory = Path::new("/lib/modules").join(&kernel.release);
            if directory.exists() {
                modules::collect(&directory)?
            } else {
                Vec::new()
            }
        }
    };
    let manifest = GuestImage {
        version: GUEST_IMAGE_VERSION,
        kernel_release: kernel.release,
        kernel: "vmlinux".to_owned(),
        initramfs: "initramfs".to_owned(),
        kernel_source_sha256,
        agent_sha256: hex::encode(Sha256::digest(&agent)),
        modules: modules.iter().map(|module| module.path.clone()).collect(),
    };
    let output = options
        .output
        .clone()
        .unwrap_or_else(|| PathBuf::from(DEFAULT_OUTPUT));
    std::fs::create_dir_all(&output).map_err(io("make", &output))?;
    publish(
        &output,
        &manifest,
        &kernel.elf,
        &initramfs(&agent, &modules),
        options.keep_default,
    )
}

/// The initramfs: uncompressed, since under emulation the guest unpacks more slowly than the VMM copies.
fn initramfs(agent: &[u8], modules: &[Module]) -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    for directory in ["dev", "proc", "sys", "run", "modules"] {
        archive.directory(directory, 0o755);
    }
    // The kernel opens it for the first process before any file system is mounted.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, agent);
    let mut order = String::new();
    for module in modules {
        let name = module.path.rsplit('/').next().unwrap_or(&module.path);
        let path = format!("modules/{name}");
        archive.file(&path, 0o644, &module.content);
        order.push_str(&format!("/{path}\n"));
    }
    archive.file(LOAD_ORDER, 0o644, order.as_bytes());
    archive.finish()
}

/// A release that is being written, beside its place.
const FRESH: &str = ".new-";
/// The link to the default release, before it has its name.
const FRESH_LINK: &str = ".default-new";

/// Removes what builds left that were killed. The caller has the output directory's lock, so none is at work.
fn sweep(output: &Path) -> Result<(), BuildError> {
    for entry in std::fs::read_dir(output).map_err(io("list", output))? {
        let entry = entry.map_err(io("list", output))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let path = entry.path();
        if name.starts_with(FRESH) {
            std::fs::remove_dir_all(&path).map_err(io("remove", &path))?;
        } else if name.starts_with(".default-") {
            std::fs::remove_file(&path).map_err(io("remove", &path))?;
        }
    }
    Ok(())
}

/// Writes the release's directory beside its place and swaps it in.
fn publish(
    output: &Path,
    manifest: &GuestImage,
    kernel: &[u8],
    initramfs: &[u8],
    keep_default: bool,
) -> Result<PathBuf, BuildError> {
    let release = output.join(&manifest.kernel_release);
    // One build publishes at a time, another waits.
    let lock = std::fs::File::open(output).map_err(io("open", output))?;
    lock.lock().map_err(io("lock", output))?;
    sweep(output)?;
    let fresh = tempfile::Builder::new()
        .prefix(FRESH)
        .tempdir_in(output)
        .map_err(io("make a directory in", output))?;
    let text = serde_json::to_vec_pretty(manifest).expect("a manifest of strings is always JSON");
    for (name, content) in [
        (&manifest.kernel[..], kernel),
        (&manifest.initramfs, initramfs),
        (MANIFEST, &text),
    ] {
        let path = fresh.path().join(name);
        let write = || {
            let mut file = std::fs::File::create(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(io("write", &path))?;
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(fresh.path(), mode).map_err(io("set the mode of", fresh.path()))?;
    if release.exists() {
        // Both names stay valid at every moment; what was there before goes with the temporary directory.
        let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
        nix::fcntl::renameat2(
            nix::fcntl::AT_FDCWD,
            fresh.path(),
            nix::fcntl::AT_FDCWD,
            &release,
            exchange,
        )
        .map_err(|errno| io("replace", &release)(errno.into()))?;
    } else {
        std::fs::rename(fresh.path(), &release).map_err(io("rename to", &release))?;
        // It has another name by now.
        let _ = fresh.keep();
    }
    let link = output.join(DEFAULT_LINK);
    if !keep_default || !link.exists() {
        let fresh = output.join(FRESH_LINK);
        std::os::unix::fs::symlink(&manifest.kernel_release, &fresh)
            .and_then(|()| std::fs::rename(&fresh, &link))
            .map_err(io("link", &link))?;
    }
    lock.sync_all().map_err(io("sync", output))?;
    Ok(release)
}

/// The newest of `/boot/vmlinuz-*` by version, as `sort -V` has it.
fn newest_kernel() -> Result<PathBuf, BuildError> {
    let boot = Path::new("/boot");
    let entries = std::fs::read_dir(boot).map_err(io("list", boot))?;
    entries
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("vmlinuz-")
                .map(str::to_owned)
        })
        .max_by_key(|release| version_key(release))
        .map(|release| boot.join(format!("vmlinuz-{release}")))
        .ok_or(BuildError::NoKernel)
}

/// Numbers compare as numbers, everything else as text.
fn version_key(release: &str) -> Vec<(u64, String)> {
    release
        .split(['.', '-', '+', '~', '_'])
        .map(|part| (part.parse().unwrap_or(0), part.to_owned()))
        .collect()
}

fn find_agent() -> Result<PathBuf, BuildError> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|path| Some(path.parent()?.join(AGENT)));
    let places = beside.into_iter().chain([Path::new(INSTALLED).join(AGENT)]);
    places
        .into_iter()
        .find(|path| path.is_file())
        .ok_or(BuildError::NoAgent)
}

/// An x86-64 ELF executable without an interpreter (PT_INTERP).
fn is_static_executable(file: &[u8]) -> bool {
    let u16_at = |at: usize| Some(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?));
    let header = || {
        (file.get(..6)? == b"\x7fELF\x02\x01" && u16_at(18)? == 62).then_some(())?;
        let table = usize::try_from(u64::from_le_bytes(file.get(32..40)?.try_into().ok()?)).ok()?;
        let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
        (0..count)
            .map(|index| u16_at(table.checked_add(index * size)?))
            .collect::<Option<Vec<_>>>()
    };
    header().is_some_and(|kinds| !kinds.contains(&3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(release: &str) -> GuestImage {
        GuestImage {
            version: GUEST_IMAGE_VERSION,
            kernel_release: release.to_owned(),
            kernel: "vmlinux".into(),
            initramfs: "initramfs".into(),
            kernel_source_sha256: "00".into(),
            agent_sha256: "00".into(),
            modules: Vec::new(),
        }
    }

    #[test]
    fn versions_sort_as_numbers() {
        let mut releases = [
            "6.12.117+deb12-cloud-amd64",
            "6.1.0-56-cloud-amd64",
            "6.1.0-9-cloud-amd64",
        ];
        releases.sort_by_key(|release| version_key(release));
        assert_eq!(
            releases,
            [
                "6.1.0-9-cloud-amd64",
                "6.1.0-56-cloud-amd64",
                "6.12.117+deb12-cloud-amd64"
            ]
        );
    }

    #[test]
    fn releases_coexist_and_are_replaced_whole() {
        let output = tempfile::tempdir().unwrap();
        // As builds leave them that are killed.
        std::fs::create_dir(output.path().join(".new-Ab1")).unwrap();
        std::fs::write(output.path().join(".new-Ab1/vmlinux"), "half").unwrap();
        std::os::unix::fs::symlink("6.1", output.path().join(".default-77")).unwrap();
        publish(output.path(), &image("6.1"), b"old", b"i", false).unwrap();
        publish(output.path(), &image("6.12"), b"k", b"i", true).unwrap();
        let release = publish(output.path(), &image("6.1"), b"new", b"i", true).unwrap();
        assert_eq!(std::fs::read(release.join("vmlinux")).unwrap(), b"new");
        assert_eq!(
            std::fs::read_link(output.path().join(DEFAULT_LINK)).unwrap(),
            Path::new("6.1")
        );
        let mut names: Vec<_> = std::fs::read_dir(output.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["6.1", "6.12", "default"]);
        assert_eq!(GuestImage::read(&release).unwrap().kernel_release, "6.1");
    }

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        let modules = [Module {
            path: "kernel/a.ko".into(),
            content: vec![1, 2],
        }];
        assert_eq!(initramfs(b"agent", &modules), initramfs(b"agent", &modules));
    }

    #[test]
    fn unknown_arguments_are_named() {
        let error = Options::parse(&["--kernle".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("--kernle"));
        let error = Options::parse(&["--agent".to_owned()]).unwrap_err();
        assert_eq!(error.to_string(), "--agent needs a value");
    }

    #[test]
    fn a_dynamic_agent_is_refused() {
        assert!(!is_static_executable(&std::fs::read("/bin/sh").unwrap()));
        assert!(!is_static_executable(b"#!/bin/sh"));
    }
}
