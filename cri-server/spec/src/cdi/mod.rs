//! CDI devices: names like `vendor.com/class=device`, which vendors' files in the node's CDI directories turn into
//! edits of the container's spec. Directories are read anew for each container that asks for a device, as
//! vendors' tools rewrite them at any time. A later directory overrides an earlier one; a device that two files of
//! one directory define is nobody's (SPEC.md of the Container Device Interface, "CDI JSON Specification" and
//! "Kubernetes/CRI": names are fully qualified).
//!
//! Architecture invariant: this module and `gather.rs` are the only ones of the crate that touch the host.

mod document;
mod edits;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::Spec;

use self::document::Document;
use crate::error::{Result, SpecError};

/// The CRI field that errors name.
const FIELD: &str = "CDI_devices";
/// A file with more is not read: real ones have some ten KiB.
const FILE_LIMIT: u64 = 4 << 20;
/// More files than this in a directory are not looked at.
const FILES_LIMIT: usize = 1024;

/// What the directories held at one moment.
#[derive(Debug, Default)]
pub struct CdiRegistry {
    directories: Vec<PathBuf>,
    /// By qualified name.
    devices: BTreeMap<String, Entry>,
    /// Files that could not be used, and why.
    problems: Vec<String>,
}

#[derive(Debug)]
struct Entry {
    /// Index of the directory.
    priority: usize,
    document: Arc<Document>,
    index: usize,
    file: PathBuf,
    /// Another file of the same directory that has it too.
    conflict: Option<PathBuf>,
}

impl CdiRegistry {
    /// Reads the files `*.json` and `*.yaml` in `directories`, the later of which override the earlier. Blocking. A
    /// directory that is not there has none; a file that is wrong is remembered for errors.
    pub fn load(directories: &[PathBuf]) -> Self {
        let mut registry = CdiRegistry {
            directories: directories.to_vec(),
            ..CdiRegistry::default()
        };
        for (priority, directory) in directories.iter().enumerate() {
            let files = match spec_files(directory) {
                Ok(files) => files,
                Err(error) => {
                    registry
                        .problems
                        .push(format!("{}: {error}", directory.display()));
                    continue;
                }
            };
            for file in files {
                match read(&file) {
                    Ok(document) => registry.add(priority, &file, document),
                    Err(problem) => registry.problems.push(format!("{}: {problem}", file.display())),
                }
            }
        }
        registry
    }

    fn add(&mut self, priority: usize, file: &Path, document: Document) {
        let document = Arc::new(document);
        for (index, device) in document.devices.iter().enumerate() {
            let name = format!("{}={}", document.kind, device.name);
            match self.devices.get_mut(&name) {
                Some(known) if known.priority == priority => known.conflict = Some(file.to_owned()),
                _ => {
                    let entry = Entry {
                        priority,
                        document: document.clone(),
                        index,
                        file: file.to_owned(),
                        conflict: None,
                    };
                    self.devices.insert(name, entry);
                }
            }
        }
    }

    /// Applies the edits of the named devices to `spec`: each file's common edits once, before its first device's.
    /// On an error `spec` is partly edited and must not be used.
    ///
    /// # Errors
    /// A name that is not `vendor/class=device`; one that no file has, or two of equal priority have; an edit that
    /// this host cannot give.
    pub fn inject(&self, spec: &mut Spec, names: &[impl AsRef<str>]) -> Result<()> {
        let mut seen: Vec<&str> = Vec::new();
        let mut begun: Vec<&Path> = Vec::new();
        for name in names.iter().map(AsRef::as_ref) {
            if !is_qualified(name) {
                let reason = format!("{name:?} is not a qualified device name (vendor/class=name)");
                return Err(SpecError::invalid(FIELD, reason));
            }
            if seen.contains(&name) {
                continue;
            }
            seen.push(name);
            let entry = self.devices.get(name).ok_or_else(|| self.unknown(name))?;
            if let Some(other) = &entry.conflict {
                let reason = format!(
                    "device {name} is defined by both {} and {}",
                    entry.file.display(),
                    other.display()
                );
                return Err(SpecError::precondition(FIELD, reason));
            }
            let failed = |problem: String| {
                SpecError::precondition(
                    FIELD,
                    format!("device {name} of {}: {problem}", entry.file.display()),
                )
            };
            if !begun.contains(&entry.file.as_path()) {
                begun.push(&entry.file);
                edits::apply(spec, &entry.document.container_edits).map_err(failed)?;
            }
            edits::apply(spec, &entry.document.devices[entry.index].container_edits).map_err(failed)?;
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> SpecError {
        let directories: Vec<String> = self.directories.iter().map(|d| d.display().to_string()).collect();
        let mut reason = format!(
            "device {name} is not defined in the CDI directories ({})",
            directories.join(", ")
        );
        if !self.problems.is_empty() {
            // Not all of them: a message is one line.
            let some: Vec<&str> = self.problems.iter().take(3).map(String::as_str).collect();
            reason.push_str(&format!("; unusable there: {}", some.join("; ")));
        }
        SpecError::not_found(FIELD, reason)
    }
}

/// Reads the directories and applies the named devices' edits; nothing is read where none is named.
///
/// # Errors
/// As [`CdiRegistry::inject`].
pub fn inject_cdi_devices(spec: &mut Spec, names: &[impl AsRef<str>], directories: &[PathBuf]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    CdiRegistry::load(directories).inject(spec, names)
}

fn is_qualified(name: &str) -> bool {
    let Some((kind, device)) = name.split_once('=') else {
        return false;
    };
    let Some((vendor, class)) = kind.split_once('/') else {
        return false;
    };
    document::is_vendor(vendor) && document::is_class(class) && document::is_device(device)
}

/// In the order of their names, so that errors are the same each time. Directories in it are not searched.
fn spec_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut files = Vec::new();
    for entry in entries.take(FILES_LIMIT) {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "json" || e == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(file: &Path) -> std::result::Result<Document, String> {
    let metadata = fs::metadata(file).map_err(|e| e.to_string())?;
    if !metadata.is_file() || metadata.len() > FILE_LIMIT {
        return Err(format!("is not a file of at most {FILE_LIMIT} bytes"));
    }
    let bytes = fs::read(file).map_err(|e| e.to_string())?;
    document::parse(&bytes, file.extension().is_some_and(|e| e == "json"))
}
