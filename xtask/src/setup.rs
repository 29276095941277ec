//! Installs what building and testing need: Debian packages, and the Go tools that the tests drive the daemon
//! with. Does nothing where everything is there.

use std::path::Path;
use std::process::Command;

use crate::packages::{self, Package};
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
            "-ldflags=-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=v1.37.0",
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

/// What is installed and built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What `deploy/quickstart` needs.
    Quickstart,
    /// What every task needs.
    All,
}

/// The tool that quickstart needs.
const QUICKSTART_TOOL: &str = "crictl";

/// Installs and builds what is missing; says early where a toolchain is missing or too old.
pub(crate) fn run(scope: Scope) -> Result<(), Failure> {
    let tools = TOOLS
        .iter()
        .filter(|tool| scope == Scope::All || tool.name == QUICKSTART_TOOL);
    for tool in tools.clone() {
        go_is_new_enough(tool.module)?;
    }
    let mut list = packages::QUICKSTART.to_vec();
    if scope == Scope::All {
        list.extend(packages::TESTS);
        if std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y")) {
            list.extend(packages::APPARMOR);
        }
    }
    if !a_kernel_is_installed() {
        list.extend(packages::GUEST);
    }
    install(&list)?;
    for tool in tools {
        build(tool)?;
    }
    match scope {
        Scope::Quickstart => Ok(()),
        Scope::All => busybox(),
    }
}

fn a_kernel_is_installed() -> bool {
    std::fs::read_dir("/boot").is_ok_and(|entries| {
        let names = entries.flatten().map(|entry| entry.file_name());
        names
            .into_iter()
            .any(|name| name.to_string_lossy().starts_with("vmlinuz-"))
    })
}

/// Asks `go` in a tool's module, where it fetches the toolchain that the module wants if it may.
fn go_is_new_enough(module: &str) -> Result<(), Failure> {
    let directory = root().join("e2e/tools").join(module);
    let file = directory.join("go.mod");
    let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let wanted = text
        .lines()
        .find_map(|line| line.strip_prefix("go "))
        .ok_or_else(|| format!("{}: no line with Go's version", file.display()))?
        .trim();
    let remedy = format!(
        "install Go {wanted} or newer and put its bin directory into PATH (Debian 12's own is too old); an older one \
         from 1.21 on will do where it can fetch a toolchain"
    );
    let answer = Command::new("go").arg("version").current_dir(&directory).output();
    let answer = answer.map_err(|e| format!("go cannot be started: {e}: {remedy}"))?;
    let said = String::from_utf8_lossy(&answer.stdout);
    match version(&said) {
        Some(found) if answer.status.success() && Some(found) >= version(&format!("go{wanted}")) => Ok(()),
        _ => Err(format!(
            "go says {:?} {:?}: {remedy}",
            said.trim(),
            String::from_utf8_lossy(&answer.stderr).trim()
        )),
    }
}

/// The numbers of `go1.26.6` in what `go version` prints.
fn version(text: &str) -> Option<[u32; 3]> {
    let numbers = text.split_whitespace().find_map(|word| {
        let numbers = word.strip_prefix("go")?;
        numbers
            .starts_with(|c: char| c.is_ascii_digit())
            .then_some(numbers)
    })?;
    // `1.27rc1` counts as 1.27.
    let mut found = numbers.split('.').map(|number| {
        let digits = number
            .split(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap_or_default();
        digits.parse().unwrap_or_default()
    });
    Some(std::array::from_fn(|_| found.next().unwrap_or_default()))
}

/// Installs those of the packages that are missing; what they bring as a service is neither started now nor at
/// the next boot.
pub(crate) fn install(list: &[Package]) -> Result<(), Failure> {
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
    let policy = NoServices::new()?;
    Step::new("apt-get install", &words).env(quiet.0, quiet.1).run()?;
    drop(policy);
    let units = packages::UNITS
        .iter()
        .filter(|(package, _)| missing.contains(package));
    let units: Vec<&str> = units.map(|(_, unit)| *unit).collect();
    if units.is_empty() || !Path::new("/usr/bin/systemctl").exists() {
        return Ok(());
    }
    Step::new(
        "systemctl disable",
        &[&["systemctl", "disable"], units.as_slice()].concat(),
    )
    .run()
}

/// Debian's way to forbid that a package's installation starts services; a policy that is there stays.
struct NoServices(bool);

impl NoServices {
    const FILE: &str = "/usr/sbin/policy-rc.d";

    fn new() -> Result<Self, Failure> {
        let file = Path::new(Self::FILE);
        if file.exists() {
            return Ok(Self(false));
        }
        // Where this process is killed before it removes the file, the file removes itself.
        let text = format!(
            "#!/bin/sh\n# cargo xtask setup, while it installs\n[ -d /proc/{} ] || {{ rm -f \"$0\"; exit 0; }}\nexit 101\n",
            std::process::id()
        );
        let wrong = |e: std::io::Error| format!("{}: {e}", Self::FILE);
        std::fs::write(file, text).map_err(wrong)?;
        let runnable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(file, runnable).map_err(wrong)?;
        Ok(Self(true))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.0 {
            // Without its process it forbids nothing.
            let _ = std::fs::remove_file(Self::FILE);
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_go_are_compared_by_number() {
        assert_eq!(version("go version go1.26.8 linux/amd64"), Some([1, 26, 8]));
        assert_eq!(version("go version go1.27rc1 linux/amd64"), Some([1, 27, 0]));
        assert!(version("go version go1.19.8 linux/amd64") < version("go1.26.6"));
        assert!(version("go1.9.7") < version("go1.10"));
        assert_eq!(version("go: no such tool"), None);
    }

    #[test]
    fn quickstarts_tool_is_one_of_the_tools() {
        assert!(TOOLS.iter().any(|tool| tool.name == QUICKSTART_TOOL));
    }
}
