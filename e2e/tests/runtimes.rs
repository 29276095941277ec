//! RuntimeClass: further OCI runtimes behind a handler's name, by a configuration entry alone.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::binaries;
use catamaran_e2e::case::Case;
use catamaran_e2e::node::{Options, Pod};
use catamaran_e2e::suite::{Handler::Runc, Suite};
use serde_json::json;

fn main() -> ExitCode {
    Suite::new(options)
        .one(Runc, "runsc_runs_a_pod_with_its_own_kernel", runsc)
        .one(Runc, "a_newer_runc_beside_debians", runc15)
        .one(Runc, "the_handlers_are_reported", reported)
        .main()
}

fn options() -> Result<Options> {
    let runsc = json!({
        "type": "oci", "binary": binaries::system("runsc")?,
        "args": ["--platform=ptrace", "--network=host", "--ignore-cgroups"],
    });
    let runc15 = json!({"type": "oci", "binary": binaries::tool("runc-1.5")?});
    Ok(Options {
        handlers: vec![("runsc".into(), runsc), ("runc15".into(), runc15)],
        ..Options::default()
    })
}

fn lifecycle(t: &Case<'_>, handler: &str) -> Result<(Pod, String)> {
    let pod = t.run_pod_under(handler, &t.pod_request())?;
    let id = t.start(
        &pod,
        &t.script(
            "main",
            "echo started; uname -r; trap 'exit 4' TERM; while :; do sleep 0.2; done",
        ),
    )?;
    ensure!(t.shell(&id, "echo inside")? == "inside");
    let output = t.exec(&id, &["sh", "-c", "exit 6"])?;
    ensure!(output.code != 0 && output.stderr.contains('6'), "{output:?}");
    t.node.crictl.ok(&["stop", "-t", "10", &id])?;
    let ended = t.wait_exited(&id)?;
    ensure!(ended.code() == 4, "{} {}", ended.status, ended.logs);
    ensure!(ended.logs.starts_with("started\n"), "{}", ended.logs);
    Ok((pod, ended.logs))
}

fn runsc(t: &Case<'_>) -> Result<()> {
    let (_, logs) = lifecycle(t, "runsc")?;
    let host = nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned();
    let inside = logs.lines().nth(1).context("uname printed nothing")?;
    ensure!(inside != host, "gVisor has a kernel of its own, not {host}");
    Ok(())
}

fn runc15(t: &Case<'_>) -> Result<()> {
    lifecycle(t, "runc15")?;
    Ok(())
}

fn reported(t: &Case<'_>) -> Result<()> {
    let info = t.node.crictl.json(&["info"])?;
    let handlers = info["runtimeHandlers"]
        .as_array()
        .context("no runtime handlers")?;
    for name in ["runc", "runv", "runsc", "runc15"] {
        ensure!(
            handlers.iter().any(|h| h["name"] == name),
            "{name} is not in {handlers:?}"
        );
    }
    Ok(())
}
