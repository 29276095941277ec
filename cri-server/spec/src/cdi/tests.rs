use super::*;
use crate::error::SpecErrorKind;
use oci_spec::runtime::{LinuxDeviceType, Process};
use proptest::prelude::*;

const GPU: &str = r#"
cdiVersion: "0.6.0"
kind: vendor.com/gpu
annotations: {origin: test}
containerEdits:
  env: [COMMON=1]
devices:
  - name: "0"
    containerEdits:
      env: ["GPU=zero", "PATH=/gpu"]
      deviceNodes:
        - {path: /dev/gpu0, hostPath: /dev/null, permissions: rw, fileMode: 438}
      mounts:
        - {hostPath: /usr/lib, containerPath: /gpu/lib, options: [ro, nosuid]}
      hooks:
        - {hookName: createContainer, path: /bin/hook, args: [hook, a], env: [X=y], timeout: 3}
      additionalGids: [44, 0, 44]
  - name: "1"
    containerEdits:
      deviceNodes:
        - {path: /dev/gpu1, type: c, major: 195, minor: 1}
  - name: rdt
    containerEdits: {intelRdt: {closID: x}}
  - name: gone
    containerEdits: {deviceNodes: [{path: /dev/there-is-no-such-device}]}
  - name: wrong
    containerEdits: {deviceNodes: [{path: /dev/null, type: b}]}
"#;

fn spec() -> Spec {
    let mut process = Process::default();
    process.set_env(Some(vec!["PATH=/bin".into(), "PATHS=kept".into()]));
    let mut spec = Spec::default();
    spec.set_process(Some(process));
    spec
}

fn directories(files: &[(usize, &str, &str)]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let paths = vec![dir.path().join("etc"), dir.path().join("run")];
    for (index, name, text) in files {
        fs::create_dir_all(&paths[*index]).unwrap();
        fs::write(paths[*index].join(name), text).unwrap();
    }
    (dir, paths)
}

#[test]
fn every_edit_is_applied_and_the_files_own_once() {
    let (_dir, paths) = directories(&[(0, "gpu.yaml", GPU)]);
    let mut spec = spec();
    let names = ["vendor.com/gpu=0", "vendor.com/gpu=1", "vendor.com/gpu=0"];
    inject_cdi_devices(&mut spec, &names, &paths).unwrap();
    let process = spec.process().as_ref().unwrap();
    assert_eq!(
        process.env().as_ref().unwrap(),
        &["PATHS=kept", "COMMON=1", "GPU=zero", "PATH=/gpu"]
    );
    assert_eq!(process.user().additional_gids().as_ref().unwrap(), &[44]);
    let linux = spec.linux().as_ref().unwrap();
    let device = |path: &str| {
        let mut found = linux.devices().as_ref().unwrap().iter();
        found.find(|d| d.path() == Path::new(path)).unwrap().clone()
    };
    let looked_up = device("/dev/gpu0");
    assert_eq!(
        (
            looked_up.typ(),
            looked_up.major(),
            looked_up.minor(),
            looked_up.file_mode()
        ),
        (LinuxDeviceType::C, 1, 3, Some(0o666))
    );
    assert_eq!(
        (device("/dev/gpu1").major(), device("/dev/gpu1").minor()),
        (195, 1)
    );
    let rules: Vec<_> = linux
        .resources()
        .as_ref()
        .unwrap()
        .devices()
        .as_ref()
        .unwrap()
        .iter()
        .map(|rule| {
            (
                rule.major().unwrap(),
                rule.minor().unwrap(),
                rule.access().clone().unwrap(),
            )
        })
        .collect();
    assert_eq!(rules, [(1, 3, "rw".to_owned()), (195, 1, "rwm".to_owned())]);
    let mounts = spec.mounts().as_ref().unwrap();
    let mount = mounts
        .iter()
        .find(|m| m.destination() == Path::new("/gpu/lib"))
        .unwrap();
    assert_eq!(mount.options().as_ref().unwrap(), &["ro", "nosuid", "rbind"]);
    let hooks = spec
        .hooks()
        .as_ref()
        .unwrap()
        .create_container()
        .as_ref()
        .unwrap();
    assert_eq!((hooks.len(), hooks[0].timeout()), (1, Some(3)));
}

#[test]
fn a_later_directory_overrides_and_one_directorys_files_conflict() {
    let file = |value: &str| {
        format!(
            r#"{{"cdiVersion":"1.0.0","kind":"v.io/c","devices":[{{"name":"d","containerEdits":{{"env":["D={value}"]}}}}]}}"#
        )
    };
    let (etc, run) = (file("etc"), file("run"));
    let (_dir, paths) = directories(&[(0, "a.json", &etc), (0, "b.json", &etc), (1, "a.json", &run)]);
    let mut made = spec();
    inject_cdi_devices(&mut made, &["v.io/c=d"], &paths).unwrap();
    assert!(
        made.process()
            .as_ref()
            .unwrap()
            .env()
            .as_ref()
            .unwrap()
            .contains(&"D=run".to_owned())
    );

    let error = inject_cdi_devices(&mut spec(), &["v.io/c=d"], &paths[..1]).unwrap_err();
    assert_eq!(error.kind, SpecErrorKind::FailedPrecondition);
    assert!(
        error.reason.contains("a.json") && error.reason.contains("b.json"),
        "{error}"
    );
}

#[test]
fn what_cannot_be_given_is_named() {
    let (_dir, paths) = directories(&[
        (0, "gpu.yaml", GPU),
        (
            0,
            "bad.yaml",
            "cdiVersion: 0.6.0\nkind: x.com/y\nnew: 1\ndevices: []\n",
        ),
        (0, "ignored.txt", "not looked at"),
    ]);
    let refused = |name: &str| inject_cdi_devices(&mut spec(), &[name], &paths).unwrap_err();
    for name in [
        "gpu0",
        "vendor.com=0",
        "vendor.com/gpu=",
        "/gpu=0",
        "vendor.com/gpu=a b",
    ] {
        assert_eq!(refused(name).kind, SpecErrorKind::InvalidArgument, "{name}");
    }
    let unknown = refused("vendor.com/gpu=7");
    assert_eq!(unknown.kind, SpecErrorKind::NotFound);
    for part in ["vendor.com/gpu=7", "/etc", "/run", "bad.yaml"] {
        assert!(unknown.reason.contains(part), "{unknown}");
    }
    for (name, part) in [
        ("rdt", "intelRdt"),
        ("gone", "/dev/there-is-no"),
        ("wrong", "type"),
    ] {
        let error = refused(&format!("vendor.com/gpu={name}"));
        assert_eq!(error.kind, SpecErrorKind::FailedPrecondition);
        assert!(error.reason.contains(part), "{error}");
    }
}

#[test]
fn wrong_files_are_refused() {
    let file = |version: &str, kind: &str, edits: &str| {
        format!("cdiVersion: \"{version}\"\nkind: {kind}\ndevices: [{{name: d, containerEdits: {edits}}}]\n")
    };
    assert!(document::parse(file("0.3.0", "v/c", "{}").as_bytes(), false).is_ok());
    for text in [
        file("9.0.0", "v/c", "{}"),
        file("1.0.0", "v", "{}"),
        file("1.0.0", "v/c", "{env: [NOVALUE]}"),
        file("1.0.0", "v/c", "{env: [\"=x\"]}"),
        file("1.0.0", "v/c", "{deviceNodes: [{path: dev/x}]}"),
        file("1.0.0", "v/c", "{deviceNodes: [{path: /dev/x, permissions: rx}]}"),
        file("1.0.0", "v/c", "{deviceNodes: [{path: /dev/x, type: d}]}"),
        file("1.0.0", "v/c", "{mounts: [{hostPath: /a, containerPath: b}]}"),
        file("1.0.0", "v/c", "{hooks: [{hookName: never, path: /a}]}"),
        file(
            "1.0.0",
            "v/c",
            "{hooks: [{hookName: poststop, path: /a, timeout: 0}]}",
        ),
        file("1.0.0", "v/c", "{netDevices: []}"),
        "cdiVersion: 1.0.0\nkind: v/c\ndevices: []\n".to_owned(),
    ] {
        assert!(document::parse(text.as_bytes(), false).is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn strangers_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), json: bool) {
        drop(document::parse(&bytes, json));
    }

    #[test]
    fn what_is_qualified_has_three_parts(name in "[ -~]{0,40}") {
        if is_qualified(&name) {
            let (kind, device) = name.split_once('=').unwrap();
            prop_assert!(kind.matches('/').count() == 1 && !device.contains('/'));
        }
    }

    #[test]
    fn devices_are_found_under_their_own_name(device in "[a-z0-9][a-z0-9_.:-]{0,8}[a-z0-9]", value in "[a-z]{1,8}") {
        let text = format!(
            "cdiVersion: 1.0.0\nkind: v.io/c\ndevices: [{{name: \"{device}\", containerEdits: {{env: [\"V={value}\"]}}}}]\n"
        );
        let document = document::parse(text.as_bytes(), false).unwrap();
        let mut registry = CdiRegistry::default();
        registry.add(0, Path::new("/f"), document);
        let mut made = spec();
        registry.inject(&mut made, &[format!("v.io/c={device}")]).unwrap();
        let expected = format!("V={value}");
        prop_assert!(made.process().as_ref().unwrap().env().as_ref().unwrap().contains(&expected));
        let other = format!("v.io/c={device}x");
        prop_assert!(registry.inject(&mut made, &[other]).is_err());
    }
}
