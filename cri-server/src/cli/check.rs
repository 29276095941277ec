//! `catamaran check`: what this node can do. Each line is OK, WARN or FAIL, with the remedy; FAIL means that
//! namespace pods cannot run, and the command then exits with 1.

use std::path::Path;
use std::process::ExitCode;

use catamaran_network::{Network, NetworkConfig};

use super::{Outcome, block_on};
use crate::apparmor::{self, Profile};
use crate::config::{Config, DEFAULT_HANDLER, HandlerType};
use crate::handlers::Handlers;
use crate::node::Dirs;
use crate::pods::vm;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ok,
    Warn,
    Fail,
}

struct Line {
    level: Level,
    subject: &'static str,
    text: String,
}

fn line(level: Level, subject: &'static str, text: impl Into<String>) -> Line {
    Line {
        level,
        subject,
        text: text.into(),
    }
}

pub(super) fn run(config: &Config) -> Outcome {
    let lines = block_on(check(config))?;
    for Line { level, subject, text } in &lines {
        let level = match level {
            Level::Ok => "OK  ",
            Level::Warn => "WARN",
            Level::Fail => "FAIL",
        };
        println!("{level}  {subject:<12}  {text}");
    }
    let failed = lines.iter().any(|line| line.level == Level::Fail);
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

async fn check(config: &Config) -> Vec<Line> {
    let dirs = Dirs::new(&config.root, &config.state);
    let handlers = Handlers::new(config, &dirs);
    let mut lines = vec![privileges(), cgroups(), favordynmods(config)];
    lines.extend(kernel());
    lines.extend(network(config, &dirs));
    lines.push(nri(config));
    for handler in handlers.iter() {
        let usable = handler.shim().and_then(|shim| Ok((shim, handler.program()?)));
        lines.push(match usable {
            Ok((shim, program)) => line(
                Level::Ok,
                "handler",
                format!("{}: {} with {}", handler.name, program.display(), shim.display()),
            ),
            Err(error) if handler.name == DEFAULT_HANDLER => line(Level::Fail, "handler", error.to_string()),
            Err(error) => line(Level::Warn, "handler", error.to_string()),
        });
        if handler.kind == HandlerType::Vm {
            lines.push(
                match vm::artefacts(&dirs.guests(), handler.config.kernel.as_deref()) {
                    Ok((kernel, _)) => line(
                        Level::Ok,
                        "guest",
                        format!("{}: {}", handler.name, kernel.display()),
                    ),
                    Err(error) => line(Level::Warn, "guest", format!("{}: {error}", handler.name)),
                },
            );
        }
    }
    let verdict = handlers.verdict().await;
    lines.push(if verdict.usable {
        line(Level::Ok, "kvm", "usable: VM pods run on hardware virtualization")
    } else {
        let text = format!(
            "not usable ({}): VM pods are emulated, which is slow and no promise of isolation strength",
            verdict.reason
        );
        line(Level::Warn, "kvm", text)
    });
    lines.push(device(
        "/dev/vhost-vsock",
        "guests are reached by virtio-serial; load vhost_vsock for vsock",
    ));
    lines.push(device("/dev/net/tun", "VM pods have no network; load tun"));
    lines
}

fn device(path: &'static str, without: &str) -> Line {
    if Path::new(path).exists() {
        line(Level::Ok, "device", path)
    } else {
        line(Level::Warn, "device", format!("{path} is missing: {without}"))
    }
}

fn privileges() -> Line {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        line(Level::Ok, "user", "root")
    } else {
        line(Level::Fail, "user", format!("uid {}: run as root", uid.as_raw()))
    }
}

fn cgroups() -> Line {
    use catamaran_cgroups::CgroupVersion;
    match catamaran_cgroups::detect() {
        Ok(CgroupVersion::V2) => line(Level::Ok, "cgroups", "version 2"),
        Ok(CgroupVersion::V1) => line(
            Level::Warn,
            "cgroups",
            "version 1: a kubelet from 1.35 on starts only with `failCgroupV1: false` in its configuration",
        ),
        Err(error) => line(Level::Fail, "cgroups", crate::error::chain(&error)),
    }
}

fn favordynmods(config: &Config) -> Line {
    let price = "each fork and exit on the host costs a little more, until the next reboot";
    if crate::favordynmods::is_set() {
        line(Level::Ok, "favordynmods", format!("set; {price}"))
    } else if config.favordynmods {
        line(
            Level::Ok,
            "favordynmods",
            format!("will be set when the server starts; {price}"),
        )
    } else {
        let text = format!(
            "not set: starting a container takes 5 to 20 ms longer; configuration key `favordynmods: true` sets it; {price}"
        );
        line(Level::Warn, "favordynmods", text)
    }
}

/// Whether the kernel has overlayfs, or will load it for the first mount.
fn overlay() -> Line {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    // Nothing is loaded here: the kernel itself asks modprobe when an unknown file system is mounted.
    let module = || {
        let modprobe = std::process::Command::new("modprobe")
            .args(["--dry-run", "--quiet", "overlay"])
            .output();
        modprobe.is_ok_and(|output| output.status.success())
    };
    overlay_line(&filesystems, module)
}

fn overlay_line(filesystems: &str, module: impl FnOnce() -> bool) -> Line {
    let built_in = filesystems
        .lines()
        .any(|line| line.split('\t').nth(1) == Some("overlay"));
    if built_in {
        line(Level::Ok, "kernel", "overlay file system")
    } else if module() {
        line(
            Level::Ok,
            "kernel",
            "overlay file system (a module, loaded by the first container)",
        )
    } else {
        line(
            Level::Fail,
            "kernel",
            "no overlay file system: neither in this kernel nor a module of it; another kernel, or its modules' \
             package, is needed",
        )
    }
}

fn apparmor() -> Line {
    let name = catamaran_spec::APPARMOR_DEFAULT_PROFILE;
    match apparmor::look() {
        Profile::NotNeeded => line(
            Level::Ok,
            "apparmor",
            "not enabled in the kernel: RuntimeDefault confines nothing here",
        ),
        Profile::Loaded => line(Level::Ok, "apparmor", format!("profile {name} is loaded")),
        Profile::Loadable(parser) => line(
            Level::Ok,
            "apparmor",
            format!(
                "profile {name} is loaded when the server starts, by {}",
                parser.display()
            ),
        ),
        Profile::Missing(problem) => line(
            Level::Warn,
            "apparmor",
            format!(
                "profile {name} is not loaded, and containers that ask for RuntimeDefault are refused: {problem}"
            ),
        ),
    }
}

fn selinux() -> Line {
    if Path::new("/sys/fs/selinux/enforce").exists() {
        line(
            Level::Warn,
            "selinux",
            "enabled: containers get the labels that their pods ask for and none otherwise, are not kept apart by \
             categories, and volumes are not relabelled",
        )
    } else {
        line(Level::Ok, "selinux", "not enabled in the kernel")
    }
}

fn kernel() -> Vec<Line> {
    let mut lines = vec![overlay(), apparmor(), selinux()];
    let missing: Vec<&str> = ["mnt", "net", "ipc", "uts", "pid", "cgroup", "user"]
        .into_iter()
        .filter(|name| !Path::new("/proc/self/ns").join(name).exists())
        .collect();
    lines.push(if missing.is_empty() {
        line(Level::Ok, "kernel", "namespaces")
    } else {
        line(
            Level::Fail,
            "kernel",
            format!(
                "no namespaces of type {}: another kernel is needed",
                missing.join(", ")
            ),
        )
    });
    lines.push(if Path::new("/proc/sys/kernel/seccomp/actions_avail").exists() {
        line(Level::Ok, "kernel", "seccomp")
    } else {
        line(
            Level::Warn,
            "kernel",
            "no seccomp: containers run unfiltered where that is allowed, else are refused",
        )
    });
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default();
    lines.push(if forwarding.trim() == "1" {
        line(Level::Ok, "kernel", "net.ipv4.ip_forward")
    } else {
        line(
            Level::Warn,
            "kernel",
            "net.ipv4.ip_forward is 0: pods reach only this node; `sysctl net.ipv4.ip_forward=1`",
        )
    });
    lines
}

fn nri(config: &Config) -> Line {
    let socket = config.nri_socket();
    let file_type = std::fs::symlink_metadata(&socket).map(|found| found.file_type());
    if config.nri.disabled {
        line(Level::Ok, "nri", "disabled by the configuration")
    } else if config.nri.disable_connections {
        let directory = config.nri.plugin_path.display();
        line(Level::Ok, "nri", format!("only plugins in {directory}"))
    } else if file_type.is_ok_and(|kind| !std::os::unix::fs::FileTypeExt::is_socket(&kind)) {
        let text = format!(
            "{} is not a socket: no plugin can connect; remove it, or set nri.socket_path",
            socket.display()
        );
        line(Level::Warn, "nri", text)
    } else {
        line(
            Level::Ok,
            "nri",
            format!("plugins connect to {}", socket.display()),
        )
    }
}

fn network(config: &Config, dirs: &Dirs) -> Vec<Line> {
    let network = Network::new(NetworkConfig {
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs: config.network.bin_dirs.clone(),
        netns_dir: dirs.netns(),
        cache_dir: dirs.cni(),
        default_bridge: config.network.default_bridge.clone(),
        default_subnet: config.network.default_subnet.clone(),
        default_ipam_dir: config
            .network
            .default_ipam_dir
            .clone()
            .unwrap_or_else(|| config.state.join("ipam")),
        plugin_timeout: config.plugin_timeout(),
    });
    match network.status() {
        Ok(summary) => {
            let mut lines = vec![line(
                Level::Ok,
                "network",
                format!(
                    "{} ({}): {:?}",
                    summary.name,
                    summary.plugins.join(", "),
                    summary.source
                ),
            )];
            lines.extend(
                summary
                    .skipped
                    .iter()
                    .map(|skipped| line(Level::Warn, "network", skipped.clone())),
            );
            lines
        }
        Err(problem) => vec![line(Level::Fail, "network", problem)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_may_be_a_module_that_is_not_loaded_yet() {
        let (has, has_not) = ("nodev\tproc\nnodev\toverlay\n", "nodev\tproc\n\text4\n");
        assert_eq!(overlay_line(has, || false).level, Level::Ok);
        let module = overlay_line(has_not, || true);
        assert_eq!(module.level, Level::Ok);
        assert!(module.text.contains("a module"), "{}", module.text);
        assert_eq!(overlay_line(has_not, || false).level, Level::Fail);
    }
}
