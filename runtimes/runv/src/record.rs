//! What a pod's VM made on the host, written to the sandbox bundle before it is made, so that a shim that was
//! killed can be cleaned up after: cgroup with all its processes, the VM's user, mounts, sockets. Taps go with
//! the VMM that holds them.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::confinement::VmUser;
use crate::share::Share;

/// File name in the sandbox bundle.
const FILE: &str = "vm.json";
/// A VMM that was killed has so long to leave its cgroup.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Sandbox id, the last part of the cgroup's path.
    pub id: String,
    /// As in the pod's specification.
    pub cgroup_parent: String,
    /// As in the pod's specification.
    pub systemd_cgroup: bool,
}

/// A step of cleaning up that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct CleanupError {
    action: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Where claims of VM users are: beside the pods' directories, one for the node.
#[must_use]
pub fn users_directory(bundle: &Path) -> PathBuf {
    bundle
        .ancestors()
        .nth(2)
        .unwrap_or(Path::new("/"))
        .join("vm-users")
}

impl Record {
    /// Writes the record: temporary file, then rename.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        let temporary = bundle.join(".vm.json.new");
        std::fs::write(&temporary, serde_json::to_vec(self)?)?;
        std::fs::rename(temporary, bundle.join(FILE))
    }

    /// Reads it; `None` where no VM was made in this bundle.
    ///
    /// # Errors
    /// Any I/O error but absence, and a record that is not JSON.
    pub fn read(bundle: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(bundle.join(FILE)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The VM's cgroup.
    ///
    /// # Errors
    /// See [`Cgroup::new`].
    pub fn cgroup(&self) -> io::Result<Cgroup> {
        Cgroup::new(&self.cgroup_parent, self.systemd_cgroup, &self.id)
    }
}

/// Undoes all that a pod's VM made on the host: kills what runs, unmounts, removes. Idempotent; every step is
/// tried. Blocks until killed processes have left, for some seconds at most.
///
/// # Errors
/// The first step that failed.
pub fn clean_up(bundle: &Path) -> Result<(), CleanupError> {
    let mut first = Ok(());
    let mut step = |action: &str, result: Result<(), Box<dyn std::error::Error + Send + Sync>>| {
        if let Err(source) = result {
            tracing::warn!(action, error = %source, "clean-up failed");
            if first.is_ok() {
                first = Err(CleanupError {
                    action: action.to_owned(),
                    source,
                });
            }
        }
    };
    let record = match Record::read(bundle) {
        Ok(record) => record,
        Err(error) => {
            step("read the VM's record", Err(error.into()));
            None
        }
    };
    if let Some(record) = &record {
        let removed = record.cgroup().and_then(|cgroup| cgroup.remove(REMOVE_LIMIT));
        step("remove the VM's cgroup", removed.map_err(Into::into));
    }
    step(
        "remove the shared directory",
        Share::remove(bundle).map_err(Into::into),
    );
    if let Some(record) = &record {
        let released = VmUser::release(&users_directory(bundle), &record.id);
        step("release the VM's user", released.map_err(Into::into));
    }
    if first.is_ok() {
        match std::fs::remove_file(bundle.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(CleanupError {
                    action: "remove the VM's record".to_owned(),
                    source: error.into(),
                });
            }
            _ => {}
        }
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_without_a_vm_is_clean() {
        let state = tempfile::tempdir().unwrap();
        let bundle = state.path().join("pods/x");
        std::fs::create_dir_all(&bundle).unwrap();
        clean_up(&bundle).unwrap();
        let record = Record {
            id: "x".into(),
            cgroup_parent: "/p".into(),
            systemd_cgroup: false,
        };
        record.write(&bundle).unwrap();
        assert_eq!(Record::read(&bundle).unwrap(), Some(record));
    }
}
