//! Installs what building and testing need: Debian packages, and the Go tools that the tests drive the daemon
//! with. Does nothing where everything is there.

use std::path::Path;
use std::process::Command;

use crate::packages;
use crate::step::{Failure, Step, root};

/// A Go tool: file name, module directory below e2e/tools, and the words of `go`.
struct Tool {
    name: &'static str,
    module: &'static str,
    build: &'static [&'static str],
}

const TOOLS: &[Tool] = &[
    Tool {
        name: "crictl",
        module: "cri",
        build: &[
            "build",
            "-trimpath",
            "-ldflags=-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=v1.36.0",
            "-o",
            "OUTPUT",
            "sigs.k8s.io/cri-tools/cmd/crictl",
        ],
    },
    Tool {
        name: "critest",
        module: "cri",
        build: &[
            "test",
            "-c",
            "-trimpath",
            "-ldflags=-s -w",
            "-o",
            "OUTPUT",
            "sigs.k8s.io/cri-tools/cmd/critest",
        ],
    },
    Tool {
        name: "nri-plugin",
        module: "nri",
        build: &["build", "-trimpath", "-ldflags=-s -w", "-o", "OUTPUT", "."],
    },
    Tool {
        name: "runc-1.5",
        module: "runc",
        build: &[
            "build",
            "-trimpath",
            "-tags=seccomp",
            "-ldflags=-s -w -X main.version=1.5.2",
            "-o",
            "OUTPUT",
            "github.com/opencontainers/runc",
        ],
    },
];

/// Everything that `cargo xtask build` and `test` need.
pub(crate) fn run() -> Result<(), Failure> {
    install(packages::NEEDED)?;
    for tool in TOOLS {
        build(tool)?;
    }
    busybox()
}

/// Installs those of the packages that are missing.
pub(crate) fn install(list: &[(&str, &str)]) -> Result<(), Failure> {
    let missing: Vec<&str> = list
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !installed(name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("packages to install: {}", missing.join(" "));
    let quiet = ("DEBIAN_FRONTEND", "noninteractive");
    Step::new("apt-get update", &["apt-get", "update"])
        .env(quiet.0, quiet.1)
        .run()?;
    let words = [
        &["apt-get", "install", "-y", "--no-install-recommends"],
        missing.as_slice(),
    ]
    .concat();
    Step::new("apt-get install", &words).env(quiet.0, quiet.1).run()
}

fn installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .output();
    query.is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// Builds a tool unless the one that is there was built from the same module files.
fn build(tool: &Tool) -> Result<(), Failure> {
    let module = root().join("e2e/tools").join(tool.module);
    let directory = root().join("target/tools");
    let (output, stamp) = (
        directory.join(tool.name),
        directory.join(format!("{}.stamp", tool.name)),
    );
    let wanted = stamp_of(tool, &module)?;
    if output.exists() && std::fs::read_to_string(&stamp).is_ok_and(|text| text == wanted) {
        return Ok(());
    }
    std::fs::create_dir_all(&directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    let output = output.display().to_string();
    let mut words = vec!["go"];
    words.extend(
        tool.build
            .iter()
            .map(|word| if *word == "OUTPUT" { output.as_str() } else { word }),
    );
    Step::new(&format!("go {}", tool.name), &words)
        .directory(&module)
        .env("GOFLAGS", "-mod=readonly")
        .run()?;
    std::fs::write(&stamp, wanted).map_err(|e| format!("{}: {e}", stamp.display()))
}

/// The busybox of the conformance suite's images, from Debian's source.
fn busybox() -> Result<(), Failure> {
    let script = root().join("e2e/tools/busybox/build");
    let directory = root().join("target/tools");
    let (output, stamp) = (directory.join("busybox"), directory.join("busybox.stamp"));
    let wanted = std::fs::read_to_string(&script).map_err(|e| format!("{}: {e}", script.display()))?;
    if output.exists() && std::fs::read_to_string(&stamp).is_ok_and(|text| text == wanted) {
        return Ok(());
    }
    let (script, output) = (script.display().to_string(), output.display().to_string());
    Step::new("busybox", &[&script, &output]).run()?;
    std::fs::write(&stamp, wanted).map_err(|e| format!("{}: {e}", stamp.display()))
}

/// What a tool is made of: its command and the files that pin every module it is built from.
fn stamp_of(tool: &Tool, module: &Path) -> Result<String, Failure> {
    let mut text = tool.build.join(" ");
    for name in ["go.mod", "go.sum", "tools.go", "main.go"] {
        // A module has the one or the other: tools of others, or its own.
        if name.ends_with(".go") && !module.join(name).exists() {
            continue;
        }
        let file = module.join(name);
        let content = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        text.push_str(&format!("\n{name}\n{content}"));
    }
    Ok(text)
}
