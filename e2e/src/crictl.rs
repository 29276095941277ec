//! The real crictl, built from e2e/tools/cri, as a caller of the daemon under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::{self, Output};

/// crictl with its endpoint.
#[derive(Debug, Clone)]
pub struct Crictl {
    binary: PathBuf,
    config: PathBuf,
    endpoint: String,
}

/// What one request may take at most: a cold VM start under emulation is about 10 s on a loaded machine.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);

impl Crictl {
    /// A crictl for a daemon's socket; `directory` is for its (empty) configuration file, so that the
    /// machine's own is not read.
    ///
    /// # Errors
    /// crictl was not built, or the file cannot be written.
    pub fn new(socket: &Path, directory: &Path) -> Result<Self> {
        let binary = crate::binaries::tool("crictl")?;
        let config = directory.join("crictl.yaml");
        std::fs::write(&config, "")?;
        Ok(Self {
            binary,
            config,
            endpoint: format!("unix://{}", socket.display()),
        })
    }

    /// The command, to be run in other ways than [`Self::run`].
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--config").arg(&self.config);
        command.args([
            "--runtime-endpoint",
            &self.endpoint,
            "--image-endpoint",
            &self.endpoint,
        ]);
        command
            .arg(format!("--timeout={}s", REQUEST_LIMIT.as_secs()))
            .args(args);
        command
    }

    /// Runs crictl, however it ends.
    ///
    /// # Errors
    /// It cannot be started or does not end.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        process::run(&mut self.command(args), REQUEST_LIMIT + Duration::from_secs(10))
    }

    /// Runs crictl and returns its trimmed standard output.
    ///
    /// # Errors
    /// Any exit code but 0.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.run(args)?;
        if output.code != 0 {
            bail!(
                "crictl {} ended with {}: {}",
                args.join(" "),
                output.code,
                output.stderr.trim()
            );
        }
        Ok(output.stdout.trim().to_owned())
    }

    /// Runs crictl, which must fail, and returns its standard error.
    ///
    /// # Errors
    /// It succeeded.
    pub fn fails(&self, args: &[&str]) -> Result<String> {
        let output = self.run(args)?;
        if output.code == 0 {
            bail!(
                "crictl {} succeeded but had to fail: {}",
                args.join(" "),
                output.stdout.trim()
            );
        }
        Ok(output.stderr)
    }

    /// Runs a crictl subcommand (the first word) with `-o json` and parses its output.
    ///
    /// # Errors
    /// Any exit code but 0, or output that is not JSON.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let (verb, rest) = args.split_first().context("no subcommand")?;
        // Options end at crictl's first positional argument.
        let args = [&[verb, "-o", "json"], rest].concat();
        let text = self.ok(&args)?;
        serde_json::from_str(&text)
            .with_context(|| format!("crictl {} printed no JSON: {text}", args.join(" ")))
    }
}
