//! A number that this node has to itself on the machine, and the bridge, subnet and cgroup named after it,
//! so that several test daemons run side by side.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};

/// A claimed number; the claim ends with the value or with the process.
#[derive(Debug)]
pub struct Subnet {
    number: u8,
    _claim: Flock<File>,
}

impl Subnet {
    /// Claims the first number that no other process holds.
    ///
    /// # Errors
    /// All 250 are taken, or the claims' directory cannot be written.
    pub fn claim() -> Result<Self> {
        let directory = Path::new("/tmp/catamaran-e2e-claims");
        std::fs::create_dir_all(directory)?;
        for number in 1..=250u8 {
            let file = File::create(directory.join(number.to_string()))?;
            if let Ok(claim) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                return Ok(Self {
                    number,
                    _claim: claim,
                });
            }
        }
        bail!("all 250 test networks are in use")
    }

    /// Name of the bridge, of the CNI network and of the cgroup that is the parent of every pod's.
    #[must_use]
    pub fn name(&self) -> String {
        format!("cte{}", self.number)
    }

    /// The pods' subnet.
    #[must_use]
    pub fn cidr(&self) -> String {
        format!("10.211.{}.0/24", self.number)
    }

    /// The start of every pod's address.
    #[must_use]
    pub fn prefix(&self) -> String {
        format!("10.211.{}.", self.number)
    }

    /// Removes the bridge, which the CNI plugin makes and nobody removes.
    ///
    /// # Errors
    /// `ip` is missing; a bridge that is not there is fine.
    pub fn remove_bridge(&self) -> Result<()> {
        let mut ip = std::process::Command::new("ip");
        ip.args(["link", "delete", &self.name()]);
        crate::process::run(&mut ip, std::time::Duration::from_secs(10)).context("ip link delete")?;
        Ok(())
    }

    /// The conflist that every daemon under test gets: bridge with masquerading, host-local leases below
    /// `leases`, port mappings. `first` is put before them (fault injection).
    #[must_use]
    pub fn conflist(&self, leases: &Path, first: Option<Value>) -> Value {
        let bridge = json!({
            "type": "bridge", "bridge": self.name(), "isGateway": true, "ipMasq": true, "hairpinMode": true,
            "ipam": {
                "type": "host-local", "dataDir": leases,
                "ranges": [[{"subnet": self.cidr()}]], "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true});
        let plugins: Vec<Value> = [bridge, portmap].into_iter().chain(first).collect();
        json!({"cniVersion": "1.0.0", "name": self.name(), "plugins": plugins})
    }
}

/// The leases that host-local has written for a network: one file for each address.
///
/// # Errors
/// The directory cannot be read; one that does not exist has no leases.
pub fn leases(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| directory.display().to_string()),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            } else if name.parse::<std::net::IpAddr>().is_ok() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}
