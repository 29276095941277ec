//! Which modules a kernel needs for a VM pod, and in which order: names are looked up in the kernel's own
//! modules.dep and modules.builtin (depmod(8)), so any distribution's kernel works.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Modules that a pod's guest uses. One that the kernel has neither built in nor as a file is left out, unless
/// it is in [`REQUIRED`].
const WANTED: &[&str] = &[
    // Devices of the machine.
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "acpiphp",
    "pciehp",
    "vmw_vsock_virtio_transport",
    // File systems of roots and volumes.
    "virtiofs",
    "9p",
    "9pnet_virtio",
    "overlay",
    "erofs",
    "ext4",
    // What programs in containers expect to be there.
    "af_packet",
    "unix",
];

/// Without these no pod runs.
const REQUIRED: &[&str] = &["virtio_pci", "virtio_console", "virtio_net", "virtiofs"];

/// A module directory that is no use, and why.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A needed module is neither built in nor there as a file.
    #[error("the kernel has no {0}, neither built in nor in {1}")]
    Missing(&'static str, PathBuf),
}

/// One module to load.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Path below the module directory, without compression's suffix: `kernel/fs/fuse/fuse.ko`.
    pub path: String,
    /// The uncompressed ELF object.
    pub content: Vec<u8>,
}

/// The wanted modules below `directory` (`/lib/modules/RELEASE`) with what they depend on, in the order to
/// load them.
///
/// # Errors
/// [`ModulesError`].
pub(super) fn collect(directory: &Path) -> Result<Vec<Module>, ModulesError> {
    let text = |name: &str| {
        let path = directory.join(name);
        std::fs::read_to_string(&path).map_err(|source| ModulesError::Read { path, source })
    };
    let (dependencies, builtin) = (text("modules.dep")?, text("modules.builtin")?);
    let index = Index::parse(&dependencies, &builtin);
    for name in REQUIRED {
        if !index.builtin.contains(*name) && !index.files.contains_key(*name) {
            return Err(ModulesError::Missing(name, directory.to_owned()));
        }
    }
    index
        .order(WANTED)
        .into_iter()
        .map(|path| load(directory, path))
        .collect()
}

fn load(directory: &Path, path: &str) -> Result<Module, ModulesError> {
    let file = directory.join(path);
    let content = std::fs::read(&file)
        .and_then(|content| decompress(path, content))
        .map_err(|source| ModulesError::Read { path: file, source })?;
    Ok(Module {
        path: uncompressed_path(path).to_owned(),
        content,
    })
}

fn uncompressed_path(path: &str) -> &str {
    path.find(".ko.").map_or(path, |at| &path[..at + 3])
}

fn decompress(path: &str, content: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    match path.rsplit('.').next() {
        Some("ko") => return Ok(content),
        Some("xz") => liblzma::read::XzDecoder::new(&content[..]).read_to_end(&mut plain)?,
        Some("zst") => zstd::stream::read::Decoder::new(&content[..])?.read_to_end(&mut plain)?,
        Some("gz") => flate2::read::GzDecoder::new(&content[..]).read_to_end(&mut plain)?,
        _ => return Err(std::io::Error::other("its compression is none of xz, zst and gz")),
    };
    Ok(plain)
}

/// modules.dep and modules.builtin, by module name.
struct Index<'a> {
    /// Name to (path, paths it depends on).
    files: BTreeMap<String, (&'a str, Vec<&'a str>)>,
    builtin: BTreeSet<String>,
}

/// The kernel treats `-` and `_` in module names alike.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

impl<'a> Index<'a> {
    fn parse(dependencies: &'a str, builtin: &str) -> Self {
        let files = dependencies.lines().filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            Some((name_of(path), (path, needs.split_whitespace().collect())))
        });
        Self {
            files: files.collect(),
            builtin: builtin.lines().map(name_of).collect(),
        }
    }

    /// Paths of `wanted` and their dependencies, each after what it depends on.
    fn order(&self, wanted: &[&str]) -> Vec<&'a str> {
        let mut done = BTreeSet::new();
        let mut order = Vec::new();
        for name in wanted {
            if !self.builtin.contains(*name) {
                self.visit(name, &mut done, &mut order);
            }
        }
        order
    }

    fn visit(&self, name: &str, done: &mut BTreeSet<String>, order: &mut Vec<&'a str>) {
        let Some((path, needs)) = self.files.get(name) else {
            return;
        };
        if !done.insert(name.to_owned()) {
            return;
        }
        // depmod lists the closure with the deepest dependency last.
        for need in needs.iter().rev() {
            self.visit(&name_of(need), done, order);
        }
        order.push(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEP: &str = "kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
        kernel/fs/fuse/fuse.ko.xz:\n\
        kernel/drivers/virtio/virtio.ko.xz:\n\
        kernel/drivers/char/virtio-console.ko: kernel/drivers/virtio/virtio.ko.xz\n\
        kernel/other.ko:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        let index = Index::parse(DEP, "kernel/drivers/virtio/virtio_pci.ko\n");
        let order = index.order(&["virtiofs", "virtio_console", "virtio_pci", "absent"]);
        assert_eq!(
            order,
            [
                "kernel/drivers/virtio/virtio.ko.xz",
                "kernel/fs/fuse/fuse.ko.xz",
                "kernel/fs/fuse/virtiofs.ko.xz",
                "kernel/drivers/char/virtio-console.ko",
            ]
        );
    }

    #[test]
    fn a_kernel_without_virtio_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("modules.dep"), DEP).unwrap();
        std::fs::write(directory.path().join("modules.builtin"), "").unwrap();
        let error = collect(directory.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "the kernel has no virtio_pci, neither built in nor in {}",
                directory.path().display()
            )
        );
    }

    #[test]
    fn the_installed_kernels_modules_are_collected() {
        let mut seen = 0;
        for entry in std::fs::read_dir("/lib/modules").into_iter().flatten().flatten() {
            if !entry.path().join("modules.dep").exists() {
                continue;
            }
            let modules = collect(&entry.path()).unwrap();
            assert!(
                modules
                    .iter()
                    .all(|module| module.content.starts_with(b"\x7fELF"))
            );
            assert!(modules.iter().all(|module| module.path.ends_with(".ko")));
            seen += 1;
        }
        if seen == 0 {
            println!("skipped: the_installed_kernels_modules_are_collected: no /lib/modules/*/modules.dep");
        }
    }

    proptest! {
        /// Any dependency list, even one with circles, ends and keeps the order where there is one.
        #[test]
        fn order_ends_and_is_right(edges in proptest::collection::vec((0u8..8, 0u8..8), 0..20)) {
            let mut text = String::new();
            for module in 0u8..8 {
                let needs: Vec<String> = edges
                    .iter()
                    .filter(|(from, to)| *from == module && to < from)
                    .map(|(_, to)| format!("k/m{to}.ko"))
                    .collect();
                text.push_str(&format!("k/m{module}.ko: {}\n", needs.join(" ")));
            }
            let index = Index::parse(&text, "");
            let order = index.order(&["m7", "m6", "m5", "m4", "m3", "m2", "m1", "m0"]);
            prop_assert_eq!(order.len(), 8);
            let place = |name: &str| order.iter().position(|path| *path == name).unwrap();
            for (from, to) in edges.iter().filter(|(from, to)| to < from) {
                let (need, user) = (place(&format!("k/m{to}.ko")), place(&format!("k/m{from}.ko")));
                prop_assert!(need < user);
            }
        }
    }
}
