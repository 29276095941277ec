//! What an operator meets: the commands, the configuration file, the embedded default network.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use catamaran_e2e::binaries;
use catamaran_e2e::case::Case;
use catamaran_e2e::node::{Node, Options};
use catamaran_e2e::process::{Output, run, succeed};
use catamaran_e2e::suite::{Handler::Runc, Handler::Runv, Skip, Suite};

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .both("ps_shows_runtime_and_kernel", ps)
        .one(Runc, "check_gives_a_line_for_each_need", check)
        .one(Runc, "pull_shows_the_image", pull)
        .one(
            Runc,
            "a_wrong_configuration_is_refused_with_its_place",
            wrong_configuration,
        )
        .one(
            Runc,
            "the_shipped_configuration_is_the_defaults",
            shipped_configuration,
        )
        .one(Runc, "the_socket_is_for_root_and_its_group", socket_mode)
        .one(Runc, "a_node_without_a_conflist_has_a_network", default_network)
        .one(
            Runv,
            "a_guest_kernel_of_the_distribution_boots",
            distribution_kernel,
        )
        .main()
}

/// Runs `catamaran VERB` with the node's configuration and directories.
fn catamaran(t: &Case<'_>, verb: &str, more: &[&str]) -> Result<Output> {
    if !t.ours() {
        return Err(Skip("Catamaran's own commands".to_owned()).into());
    }
    let layout = &t.node.layout;
    let mut command = Command::new(binaries::ours("catamaran")?);
    command
        .arg(verb)
        .arg("--config")
        .arg(layout.base.join("catamaran.yaml"));
    command
        .arg("--root")
        .arg(&layout.root)
        .arg("--state")
        .arg(&layout.state)
        .arg("--listen")
        .arg(&layout.socket);
    run(command.args(more), Duration::from_secs(60))
}

fn ps(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("visible"))?;
    let kernel = t.shell(&id, "uname -r")?;
    let output = catamaran(t, "ps", &[])?;
    ensure!(output.code == 0, "{output:?}");
    let heading = output.stdout.lines().next().unwrap_or_default();
    for column in ["RUNTIME", "KERNEL", "STATE", "IP", "AGE"] {
        ensure!(heading.contains(column), "{column} is not in {heading:?}");
    }
    let row = output
        .stdout
        .lines()
        .find(|line| line.contains(pod.request.name()))
        .context("the pod has no row")?;
    for word in [t.handler.name(), kernel.as_str(), &t.address(&pod)?] {
        ensure!(row.contains(word), "{word} is not in {row:?}");
    }
    ensure!(output.stdout.contains("visible"), "{}", output.stdout);
    Ok(())
}

fn check(t: &Case<'_>) -> Result<()> {
    let output = catamaran(t, "check", &[])?;
    let text = &output.stdout;
    for word in ["cgroup", "KVM", "CNI", "guest", "runc"] {
        ensure!(
            text.to_lowercase().contains(&word.to_lowercase()),
            "{word} is not in {text}"
        );
    }
    let failures = text.lines().filter(|line| line.contains("FAIL")).count();
    ensure!(
        (output.code != 0) == (failures > 0),
        "{failures} failures and exit code {}: {text}",
        output.code
    );
    ensure!(failures == 0, "a node that runs pods fails its check: {text}");
    Ok(())
}

fn pull(t: &Case<'_>) -> Result<()> {
    let output = catamaran(t, "pull", &[&t.node.busybox])?;
    ensure!(
        output.code == 0 && output.stdout.contains("sha256:"),
        "{output:?}"
    );
    let output = catamaran(t, "pull", &[&t.node.registry.reference("absent:1")])?;
    ensure!(
        output.code != 0 && output.stderr.contains("absent:1"),
        "{output:?}"
    );
    Ok(())
}

fn wrong_configuration(t: &Case<'_>) -> Result<()> {
    let file = t.directory()?.join("wrong.yaml");
    std::fs::write(&file, "log: info\nnetwork:\n  default_bridge: x0\n  bridge: x1\n")?;
    let mut command = Command::new(binaries::ours("catamaran")?);
    let output = run(
        command.args(["serve", "--config"]).arg(&file),
        Duration::from_secs(20),
    )?;
    ensure!(output.code != 0, "an unknown key is accepted");
    for word in ["wrong.yaml", "bridge", "line 4"] {
        ensure!(output.stderr.contains(word), "{word} is not in {}", output.stderr);
    }
    Ok(())
}

fn shipped_configuration(_: &Case<'_>) -> Result<()> {
    let mut command = Command::new(binaries::ours("catamaran")?);
    let defaults = succeed(command.args(["config", "default"]), Duration::from_secs(20))?;
    let shipped = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/catamaran.yaml"))?;
    let read = |text: &str| -> Result<serde_yaml::Value> {
        let mut value: serde_yaml::Value = serde_yaml::from_str(text)?;
        forget_unset(&mut value);
        Ok(value)
    };
    let (defaults, shipped) = (read(&defaults)?, read(&shipped)?);
    ensure!(
        defaults == shipped,
        "defaults {defaults:#?}\ndeploy/catamaran.yaml {shipped:#?}"
    );
    Ok(())
}

/// Drops keys without a value, and sections of such: the shipped file has those as comments.
fn forget_unset(value: &mut serde_yaml::Value) {
    if let serde_yaml::Value::Mapping(mapping) = value {
        mapping.values_mut().for_each(forget_unset);
        mapping.retain(|_, value| !value.is_null() && !value.as_mapping().is_some_and(|m| m.is_empty()));
    }
}

fn socket_mode(t: &Case<'_>) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let metadata = std::fs::metadata(&t.node.layout.socket)?;
    ensure!(
        metadata.permissions().mode() & 0o777 == 0o660 && metadata.uid() == 0,
        "{metadata:?}"
    );
    Ok(())
}

fn default_network(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(Skip("containerd has no default network".to_owned()).into());
    }
    let node = Node::start(
        t.node.flavour,
        Options {
            no_conflist: true,
            ..Options::default()
        },
    )?;
    for handler in ["runc", "runv"] {
        let pod = node.run_pod(handler, &node.pod_request(&format!("default-network-{handler}")))?;
        let status = node.crictl.json(&["inspectp", &pod.id])?;
        let ip = status["status"]["network"]["ip"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(ip.starts_with(&node.subnet.prefix()), "{handler}: {ip:?}");
        node.remove_pod(&pod.id)?;
    }
    node.finish()
}

fn distribution_kernel(t: &Case<'_>) -> Result<()> {
    let built = binaries::guest_directory()?;
    let kernels = std::fs::read_dir(&built)?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    // Beside it there may be the minimal one.
    let boots = |name: &String| Path::new("/boot").join(format!("vmlinuz-{name}")).exists();
    let of_distribution: Vec<String> = kernels.filter(boots).collect();
    ensure!(
        !of_distribution.is_empty(),
        "no kernel of the distribution was built into {}",
        built.display()
    );
    for kernel in of_distribution {
        let handlers = vec![(
            "runv".to_owned(),
            serde_json::json!({"type": "vm", "kernel": kernel}),
        )];
        let node = Node::start(
            t.node.flavour,
            Options {
                handlers,
                ..Options::default()
            },
        )?;
        let pod = node.run_pod("runv", &node.pod_request("distribution-kernel"))?;
        let status = node.crictl.json(&["inspectp", &pod.id])?.to_string();
        ensure!(status.contains(&kernel), "{kernel} is not in {status}");
        node.remove_pod(&pod.id)?;
        node.finish()?;
    }
    Ok(())
}
