//! How a container's first process ended. The shim writes the record beside the bundle before it answers
//! Task.Wait, so that it survives the daemon and the shim.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// File name of the record in the container's bundle directory.
pub const EXIT_FILE: &str = "exit.json";

/// Exit of a container's first process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// 0 to 255; 128 + signal number for a process that a signal ended (CRI `exit_code`).
    pub exit_code: i32,
    /// Nanoseconds since the epoch.
    pub exited_at_ns: i64,
    /// The kernel's OOM killer ended a process of the container.
    pub oom_killed: bool,
}

impl ExitRecord {
    /// Writes the record durably against a crash of this process: temporary file, then rename.
    ///
    /// # Errors
    /// Any I/O error of the bundle's file system.
    pub fn write(&self, bundle: &Path) -> std::io::Result<()> {
        let temporary = bundle.join(".exit.json.new");
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        drop(file);
        std::fs::rename(temporary, bundle.join(EXIT_FILE))
    }

    /// Reads the record; `None` where the container has not ended.
    ///
    /// # Errors
    /// Any I/O error but absence, and a record that is not JSON.
    pub fn read(bundle: &Path) -> std::io::Result<Option<Self>> {
        match std::fs::read(bundle.join(EXIT_FILE)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(ExitRecord::read(bundle.path()).unwrap(), None);
        let record = ExitRecord {
            exit_code: 137,
            exited_at_ns: 5,
            oom_killed: true,
        };
        record.write(bundle.path()).unwrap();
        assert_eq!(ExitRecord::read(bundle.path()).unwrap(), Some(record));
    }
}
