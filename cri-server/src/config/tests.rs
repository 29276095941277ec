//! What configurations are taken, and that the shipped one documents every key.

use super::*;

fn parse(text: &str) -> Result<Config, String> {
    let config = Config::parse(text, Path::new("test.yaml")).map_err(|e| {
        let source = std::error::Error::source(&e)
            .map(ToString::to_string)
            .unwrap_or_default();
        format!("{e}: {source}")
    })?;
    config.verify().map_err(|e| e.to_string())?;
    Ok(config)
}

#[test]
fn every_key_is_optional() {
    assert_eq!(parse("").unwrap(), Config::default());
    assert_eq!(parse("# only a comment\n").unwrap(), Config::default());
    assert_eq!(
        parse("network:\n  default_bridge: x0\n")
            .unwrap()
            .network
            .plugin_timeout_seconds,
        60
    );
}

#[test]
fn the_defaults_survive_a_round_trip() {
    let text = serde_yaml::to_string(&Config::default()).unwrap();
    assert_eq!(parse(&text).unwrap(), Config::default());
}

#[test]
fn an_unknown_key_is_refused_with_line_and_column() {
    let error = parse("root: /a\nnetwork:\n  bridge: x\n").unwrap_err();
    assert!(
        error.contains("bridge") && error.contains("line 3 column 3"),
        "{error}"
    );
    let error = parse("handlers:\n  runsc:\n    binary: /usr/bin/runsc\n    arg: []\n").unwrap_err();
    assert!(
        error.contains("arg") && error.contains("line 4 column 5"),
        "{error}"
    );
}

const SHIPPED: &str = include_str!("../../../deploy/catamaran.yaml");

/// The shipped file with the examples that are comments made part of it.
fn every_key() -> serde_yaml::Value {
    let mut text = String::new();
    for line in SHIPPED.lines() {
        // Prose begins with "# " and no key; an example is "# key: value" or, of a handler, "#  key: value".
        let indent = line.len() - line.trim_start().len();
        let bare = match line.trim_start().strip_prefix('#') {
            Some(bare) if bare.starts_with("  ") => format!("{}{bare}", " ".repeat(indent)),
            Some(bare) => format!("{}{}", " ".repeat(indent), bare.trim_start()),
            None => line.to_owned(),
        };
        let word = bare.trim_start().split(':').next().unwrap_or_default();
        let key = bare.contains(':')
            && !word.is_empty()
            && word
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if key {
            text.push_str(bare.trim_end_matches("{}"));
            text.push('\n');
        }
    }
    serde_yaml::from_str(&text).unwrap_or_else(|e| panic!("{e}:\n{text}"))
}

#[test]
fn the_shipped_file_is_the_defaults_and_names_every_key() {
    assert_eq!(parse(SHIPPED).unwrap(), Config::default());
    let handler = HandlerConfig {
        kind: Some(HandlerType::Vm),
        binary: Some("x".into()),
        args: Some(Vec::new()),
        shim: Some("x".into()),
        vmm: Some("x".into()),
        virtiofsd: Some("x".into()),
        kernel: Some("x".into()),
        allowed_kernels: Some(Vec::new()),
        kernel_args: Some("x".into()),
        cpus: Some(1),
        memory_mib: Some(1),
        boot_timeout_seconds: Some(1),
    };
    let config = Config {
        streaming: StreamingSection {
            tls_certificate: Some("x".into()),
            tls_key: Some("x".into()),
            ..StreamingSection::default()
        },
        ..Config::default()
    };
    let keys = |value: &serde_yaml::Value| -> Vec<String> {
        let mapping = value.as_mapping().unwrap();
        mapping
            .keys()
            .map(|key| key.as_str().unwrap().to_owned())
            .collect()
    };
    let all = serde_yaml::to_value(&config).unwrap();
    let shipped = every_key();
    for key in keys(&all) {
        assert!(
            shipped.get(&key).is_some(),
            "{key} is not in deploy/catamaran.yaml"
        );
        if !all[&key].is_mapping() || key == "handlers" {
            continue;
        }
        for inner in keys(&all[&key]) {
            assert!(
                shipped[&key].get(&inner).is_some(),
                "{key}.{inner} is not in deploy/catamaran.yaml"
            );
        }
    }
    let of_handlers: Vec<String> = shipped["handlers"]
        .as_mapping()
        .unwrap()
        .values()
        .flat_map(&keys)
        .collect();
    for key in keys(&serde_yaml::to_value(handler).unwrap()) {
        assert!(
            of_handlers.contains(&key),
            "handlers.*.{key} is not in deploy/catamaran.yaml"
        );
    }
}

#[test]
fn handlers_are_merged_over_the_built_in_ones() {
    let config = parse("handlers:\n  runsc:\n    args: [--platform=ptrace]\n").unwrap();
    let all = config.all_handlers();
    assert_eq!(all.keys().collect::<Vec<_>>(), ["runc", "runsc", "runv"]);
    assert_eq!(all["runv"].kind("runv"), HandlerType::Vm);
    assert_eq!(all["runsc"].kind("runsc"), HandlerType::Oci);
}

#[test]
fn values_that_cannot_be_meant_are_refused_by_key() {
    for (text, key) in [
        ("root: relative\n", "root"),
        ("state: /".to_owned().as_str(), ""),
        ("cgroup_parent: a/b\n", "cgroup_parent"),
        ("cgroup_parent: /a/../b\n", "cgroup_parent"),
        ("handlers: {runv: {binary: /x}}\n", "handlers.runv.binary"),
        ("handlers: {runc: {cpus: 2}}\n", "handlers.runc.cpus"),
        ("handlers: {Bad_Name: {}}\n", "handlers.Bad_Name"),
        ("handlers: {runv: {cpus: 0}}\n", "handlers.runv.cpus"),
        (
            "network: {plugin_timeout_seconds: 0}\n",
            "network.plugin_timeout_seconds",
        ),
    ] {
        match (key, parse(text)) {
            ("", result) => assert!(result.is_ok(), "{text}: {result:?}"),
            (key, result) => {
                let error = result.unwrap_err();
                assert!(error.contains(&format!("key {key}:")), "{text}: {error}");
            }
        }
    }
    let long = format!("state: /{}\n", "x".repeat(80));
    assert!(parse(&long).unwrap_err().contains("key state:"));
}
