//! cri-server → sandbox ← runtimes: nothing depends the other way, and the shims never on the daemon.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Which packages of the workspace each may depend on. A package that is not listed fails the test: whoever
/// adds one says where it belongs.
const ALLOWED: &[(&str, &[&str])] = &[
    ("catamaran-sandbox", &[]),
    ("catamaran-guest-protocol", &[]),
    ("catamaran-cri-api", &[]),
    ("catamaran-cgroups", &[]),
    ("catamaran-images", &[]),
    ("catamaran-network", &[]),
    ("catamaran-nri", &[]),
    ("catamaran-streaming", &[]),
    ("catamaran-spec", &["catamaran-cri-api"]),
    (
        "catamaran",
        &[
            "catamaran-sandbox",
            "catamaran-cri-api",
            "catamaran-cgroups",
            "catamaran-images",
            "catamaran-network",
            "catamaran-nri",
            "catamaran-streaming",
            "catamaran-spec",
        ],
    ),
    ("catamaran-shim-runc", &["catamaran-sandbox"]),
    (
        "catamaran-shim-runv",
        &["catamaran-sandbox", "catamaran-guest-protocol"],
    ),
    ("catamaran-agent", &["catamaran-guest-protocol"]),
    // Only by the CRI, the command line and the file system: no crate of ours.
    ("catamaran-e2e", &[]),
    ("xtask", &[]),
];

#[test]
fn nothing_depends_the_other_way() {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version=1",
            "--manifest-path",
            manifest,
        ])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages: BTreeMap<&str, Vec<&str>> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap();
            // Dev-dependencies count too: a test of a lower crate must not need a higher one.
            let names = dependencies.iter().filter(|d| d["path"].is_string());
            (
                package["name"].as_str().unwrap(),
                names.map(|d| d["name"].as_str().unwrap()).collect(),
            )
        })
        .collect();
    let mut wrong = Vec::new();
    for (name, dependencies) in &packages {
        let Some((_, allowed)) = ALLOWED.iter().find(|(n, _)| n == name) else {
            wrong.push(format!("{name} is not in the list of this test"));
            continue;
        };
        for dependency in dependencies.iter().filter(|d| !allowed.contains(d)) {
            wrong.push(format!("{name} must not depend on {dependency}"));
        }
    }
    assert!(
        packages.len() >= 12,
        "cargo metadata lists only {:?}",
        packages.keys()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
