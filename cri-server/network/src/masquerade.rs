//! Masquerading for the embedded default network: one rule for the whole subnet, made once, instead of the
//! bridge plugin's chain for each pod. That saves two thirds of ADD's and DEL's time, and the plugin's chain
//! stays behind when the pod's namespace is gone before DEL.
//!
//! The rule stays, as the bridge does; [`crate::Network::remove_default`] takes both away. It is looked for
//! again from time to time, since firewall managers flush what they do not know.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;
use tokio::sync::Mutex;

use crate::NetworkConfig;
use crate::default_network::{is_v6, subnets};
use crate::error::{NetworkError, Result};
use crate::plugin::{excerpt, search_path};

/// How long a look is good for.
const FRESH: Duration = Duration::from_secs(30);

/// When the rules were last seen. The lock also keeps two attachments from adding them twice.
#[derive(Debug, Default)]
pub(crate) struct Masquerade(Mutex<Option<Instant>>);

impl Masquerade {
    /// Makes sure of the rules of every subnet.
    pub(crate) async fn ensure(&self, config: &NetworkConfig) -> Result<()> {
        let mut seen = self.0.lock().await;
        if seen.is_some_and(|seen| seen.elapsed() < FRESH) {
            return Ok(());
        }
        for subnet in subnets(&config.default_subnet) {
            if !iptables(config, subnet, "-C").await? && !iptables(config, subnet, "-A").await? {
                return Err(failure(subnet, "the rule is refused"));
            }
        }
        *seen = Some(Instant::now());
        Ok(())
    }

    /// Removes the rules. Idempotent.
    pub(crate) async fn remove(&self, config: &NetworkConfig) -> Result<()> {
        let mut seen = self.0.lock().await;
        *seen = None;
        for subnet in subnets(&config.default_subnet) {
            while iptables(config, subnet, "-C").await? {
                if !iptables(config, subnet, "-D").await? {
                    return Err(failure(subnet, "the rule cannot be removed"));
                }
            }
        }
        Ok(())
    }
}

/// Whether the rule is there (`-C`), was added (`-A`) or removed (`-D`).
async fn iptables(config: &NetworkConfig, subnet: &str, action: &str) -> Result<bool> {
    let program = if is_v6(subnet) == Some(true) {
        "ip6tables"
    } else {
        "iptables"
    };
    let comment = format!("catamaran default network {}", config.default_bridge);
    let child = Command::new(program)
        .args(["-w", "10", "-t", "nat", action, "POSTROUTING", "-s", subnet])
        .args([
            "!",
            "-o",
            &config.default_bridge,
            "-m",
            "comment",
            "--comment",
            &comment,
            "-j",
            "MASQUERADE",
        ])
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(config.plugin_timeout, child)
        .await
        .map_err(|_| failure(subnet, &format!("{program} did not end in time and was killed")))?
        .map_err(NetworkError::io("start", program))?;
    match output.status.code() {
        Some(0) => Ok(true),
        // iptables says so where a rule, or the chain it is looked for in, does not exist.
        Some(1) if action == "-C" => Ok(false),
        _ => Err(failure(
            subnet,
            &format!("{program}: {}: {}", output.status, excerpt(&output.stderr)),
        )),
    }
}

fn failure(subnet: &str, reason: &str) -> NetworkError {
    NetworkError::Masquerade {
        subnet: subnet.to_owned(),
        reason: reason.to_owned(),
    }
}
