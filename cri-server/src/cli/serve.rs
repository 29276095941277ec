//! `catamaran serve`.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::Outcome;
use crate::config::Config;

/// Two threads serve the CRI of a full node; more only cost memory.
const WORKERS: usize = 2;
const BLOCKING: usize = 64;

pub(super) fn run(config: Config) -> Outcome {
    let filter: Targets = config
        .log
        .parse()
        .map_err(|e| format!("configuration key log: {:?}: {e}", config.log))?;
    let format = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false);
    tracing_subscriber::registry().with(filter).with(format).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .thread_name("catamaran")
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        Ok::<_, std::io::Error>(crate::cri::serve(config, stop).await)
    })?;
    // Work that waits for a hung plugin must not hold the process.
    runtime.shutdown_background();
    ended?;
    Ok(ExitCode::SUCCESS)
}
