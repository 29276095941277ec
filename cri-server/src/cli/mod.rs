//! The operator's commands.

mod check;
mod guest;
mod ps;
mod pull;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigError};
use crate::error::chain;

/// A Kubernetes CRI server: namespace pods (handler runc) and VM pods (handler runv).
#[derive(Debug, Parser)]
#[command(name = "catamaran", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the CRI.
    Serve(Options),
    /// Say what this node can do, and what is missing.
    Check(Options),
    /// List pods and containers with their runtime and kernel.
    Ps(Options),
    /// Pull an image through the server.
    Pull {
        #[command(flatten)]
        options: Options,
        /// The image's reference.
        reference: String,
    },
    /// Work with guest kernels; see `catamaran guest build --help`.
    #[command(disable_help_flag = true)]
    Guest {
        /// Passed on to the vm shim.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// The configuration.
    Config {
        #[command(subcommand)]
        action: ConfigAction,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Print the defaults.
    Default,
}

/// Where the daemon is.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Configuration file (YAML); by default /etc/catamaran/catamaran.yaml where that exists.
    #[arg(long)]
    config: Option<PathBuf>,
    /// What outlives a reboot.
    #[arg(long)]
    root: Option<PathBuf>,
    /// What a reboot may lose.
    #[arg(long)]
    state: Option<PathBuf>,
    /// The CRI socket.
    #[arg(long)]
    listen: Option<PathBuf>,
}

/// The configuration that is used when none is named and it exists.
const DEFAULT_FILE: &str = "/etc/catamaran/catamaran.yaml";

impl Options {
    fn load(&self) -> Result<Config, ConfigError> {
        let default = PathBuf::from(DEFAULT_FILE);
        let file = self
            .config
            .clone()
            .or_else(|| default.exists().then_some(default));
        let mut config = Config::load(file.as_deref())?;
        if let Some(root) = &self.root {
            config.root.clone_from(root);
        }
        if let Some(state) = &self.state {
            config.state.clone_from(state);
        }
        if let Some(listen) = &self.listen {
            config.listen = Some(listen.clone());
        }
        config.verify()?;
        Ok(config)
    }
}

/// What a command ends with.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("catamaran: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Serve(options) => serve::run(options.load()?),
        Command::Check(options) => check::run(&options.load()?),
        Command::Ps(options) => ps::run(&options.load()?),
        Command::Pull { options, reference } => pull::run(&options.load()?, &reference),
        Command::Guest { args } => guest::run(&args),
        Command::Config {
            action: ConfigAction::Default,
        } => {
            print!("{}", serde_yaml::to_string(&Config::default())?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Runs a client command on a small runtime.
fn block_on<T>(work: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work))
}

/// A channel to the server's socket.
async fn connect(config: &Config) -> Result<tonic::transport::Channel, Box<dyn std::error::Error>> {
    let path = config.listen();
    if !path.exists() {
        return Err(format!("{} does not exist: is `catamaran serve` running?", path.display()).into());
    }
    // The URI is only a name; the connector knows the path.
    let endpoint = tonic::transport::Endpoint::from_static("http://catamaran");
    let connector = tower::service_fn(move |_: http::Uri| {
        let path = path.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Ok(endpoint.connect_with_connector(connector).await?)
}
