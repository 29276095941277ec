//! `containerd-shim-catamaran-runv-v2`: the vm shim (`start`, `delete`), the vCPU probe (`probe`) and the builder
//! of boot artefacts (`guest build`).

use std::process::ExitCode;
use std::sync::Arc;

use catamaran_runv::boot::chain;
use catamaran_runv::guest;
use catamaran_runv::record;
use catamaran_runv::sandbox::VmSandbox;
use catamaran_sandbox::bootstrap::{self, BoxError, Context, Deleted, Started};
use catamaran_sandbox::shim_server;

const NAME: &str = "containerd-shim-catamaran-runv-v2";
/// 128 + SIGKILL: the VM died with its shim.
const KILLED: u32 = 137;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["probe"] => probe(),
        ["guest", "build", ..] => guest_build(&arguments[2..]),
        _ => bootstrap::run(NAME, env!("CARGO_PKG_VERSION"), serve, delete),
    }
}

/// Prints the verdict as one line of JSON.
fn probe() -> ExitCode {
    let verdict = catamaran_runv::probe::probe();
    println!(
        "{}",
        serde_json::json!({ "usable": verdict.usable, "reason": verdict.reason })
    );
    ExitCode::SUCCESS
}

fn guest_build(arguments: &[String]) -> ExitCode {
    match guest::Options::parse(arguments).and_then(|options| guest::build(&options)) {
        Ok(directory) => {
            println!("{}", directory.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("guest build: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(started: Started) -> Result<(), BoxError> {
    shim_server::block_on(async {
        let sandbox = Arc::new(VmSandbox::new(&started.context));
        shim_server::serve(started, sandbox).await
    })??;
    Ok(())
}

/// The shim is dead, and its VM with it; what they left on the host goes.
fn delete(context: &Context) -> Result<Deleted, BoxError> {
    record::clean_up(&context.bundle)?;
    Ok(Deleted { exit_status: KILLED })
}
