//! CDI devices, image volumes and the volumes that images declare, asked for by crictl as a kubelet does.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::image::{Format, Layer, Packing, build, host_architecture};
use catamaran_e2e::node::Options;
use catamaran_e2e::requests::Request;
use catamaran_e2e::suite::{Handler, Suite};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::new(options)
        .one(Handler::Runc, "cdi_devices_are_injected", cdi)
        .one(Handler::Runc, "cdi_devices_that_cannot_be_given", cdi_refused)
        .one(Handler::Runv, "cdi_devices_are_refused", cdi_in_guest)
        .both("image_volumes_and_their_parts", image_volumes)
        .both("image_volumes_that_cannot_be_given", image_volumes_refused)
        .both("an_image_in_use_as_a_volume_stays_readable", image_removed)
        .both("volumes_that_an_image_declares", declared_volumes)
        .main()
}

/// The suite's own CDI directories, the second of which overrides the first.
fn cdi_directories() -> [std::path::PathBuf; 2] {
    let base = std::env::temp_dir().join(format!("cte-cdi-{}", std::process::id()));
    [base.join("etc"), base.join("run")]
}

fn options() -> Result<Options> {
    Ok(Options {
        overrides: vec![("cdi_spec_dirs".to_owned(), json!(cdi_directories()))],
        ..Options::default()
    })
}

struct Removed(std::path::PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        // Empty ones only: another case may still need them.
        let _ = self.0.parent().map(std::fs::remove_dir);
        let _ = self
            .0
            .parent()
            .and_then(std::path::Path::parent)
            .map(std::fs::remove_dir);
    }
}

fn write(directory: usize, name: &str, text: &str) -> Result<Removed> {
    let directory = &cdi_directories()[directory];
    std::fs::create_dir_all(directory)?;
    let file = directory.join(name);
    std::fs::write(&file, text)?;
    Ok(Removed(file))
}

fn cdi(t: &Case<'_>) -> Result<()> {
    let shared = t.directory()?.join("shared");
    std::fs::create_dir_all(&shared)?;
    std::fs::write(shared.join("library"), "of the vendor")?;
    let hooked = t.directory()?.join("hooked");
    let spec = json!({
        "cdiVersion": "0.7.0", "kind": "e2e.example/thing",
        "containerEdits": {
            "env": ["THING=all"],
            "hooks": [{"hookName": "createRuntime", "path": "/bin/touch", "args": ["touch", hooked]}],
        },
        "devices": [{"name": "one", "containerEdits": {
            "env": ["THING_ONE=1"],
            "deviceNodes": [{"path": "/dev/thing1", "hostPath": "/dev/fuse", "permissions": "r"}],
            "mounts": [{"hostPath": shared, "containerPath": "/vendor", "options": ["ro"]}],
            "additionalGids": [4242],
        }}],
    });
    let _first = write(0, "thing.json", &spec.to_string())?;
    // The same file overridden for another device of its own kind, in YAML.
    let overriding = "cdiVersion: 1.0.0\nkind: e2e.example/other\ndevices:\n- name: two\n  containerEdits: {env: [TWO=run]}\n";
    let _low = write(0, "other.yaml", &overriding.replace("TWO=run", "TWO=etc"))?;
    let _high = write(1, "other.yaml", overriding)?;
    let pod = t.pod()?;
    let script = "echo $THING $THING_ONE $TWO; (exec 3</dev/thing1) && echo opened; \
                  (exec 3>>/dev/thing1) 2>/dev/null || echo no write; cat /vendor/library; echo; \
                  (echo x > /vendor/new) 2>/dev/null || echo read-only; id -G";
    let request = t.script("main", script).set(
        "/CDI_devices",
        json!([{"name": "e2e.example/thing=one"}, {"name": "e2e.example/other=two"}]),
    );
    let ended = t.run(&pod, &request)?;
    ensure!(
        ended
            .logs
            .starts_with("all 1 run\nopened\nno write\nof the vendor\nread-only\n")
            && ended.logs.trim_end().ends_with(" 4242"),
        "{}",
        ended.logs
    );
    ensure!(hooked.exists(), "the hook did not run");
    Ok(())
}

fn cdi_refused(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let [etc, run] = cdi_directories().map(|directory| directory.display().to_string());
    for (name, parts) in [
        (
            "e2e.example/none=x",
            vec!["e2e.example/none=x", "CDI_devices", &etc, &run],
        ),
        (
            "unqualified",
            vec!["unqualified", "CDI_devices", "vendor/class=name"],
        ),
    ] {
        let error = t
            .node
            .create_fails(&pod, &t.idle("main").set("/CDI_devices", json!([{"name": name}])))?;
        ensure!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    // Nothing of the failed attempts is in the way.
    t.run_script(&pod, "main", "true")?;
    Ok(())
}

fn cdi_in_guest(t: &Case<'_>) -> Result<()> {
    let pod = t.pod()?;
    let request = t
        .idle("main")
        .set("/CDI_devices", json!([{"name": "e2e.example/thing=one"}]));
    let error = t.node.create_fails(&pod, &request)?;
    ensure!(
        error.contains("FailedPrecondition")
            && error.contains("CDI_devices")
            && error.contains("virtual machine"),
        "{error}"
    );
    Ok(())
}

/// An image of two layers with a link that leads out of it.
fn volume_image(t: &Case<'_>, name: &str) -> Result<String> {
    let lower = Layer::new()
        .directory("data", 0o755)?
        .file("data/lower", 0o644, (0, 0), b"lower")?
        .file("data/both", 0o644, (0, 0), b"of the lower")?;
    let upper = Layer::new()
        .file("data/both", 0o644, (0, 0), b"of the upper")?
        .file("data/tool", 0o755, (0, 0), b"#!/bin/sh\necho ran\n")?
        .symlink("data/out", "/../../../../etc")?
        .symlink("away", "/data")?
        // Another image for each case: removing one removes it under all its names.
        .file(name, 0o644, (0, 0), t.handler.name().as_bytes())?;
    let layers = vec![(lower, Packing::Gzip), (upper, Packing::Zstd)];
    let image = build(layers, &json!({}), Format::Oci, host_architecture())?;
    let reference = t
        .node
        .registry
        .push(&format!("volume-{name}-{}:1", t.handler.name()), &image)?;
    t.node.crictl.ok(&["pull", &reference])?;
    Ok(reference)
}

fn with_image(request: Request, image: &str, inside: &str, more: Value) -> Request {
    let mut extra = json!({"readonly": true, "image": {"image": image}});
    if let (Some(extra), Value::Object(more)) = (extra.as_object_mut(), more) {
        extra.extend(more);
    }
    request.mount(std::path::Path::new(""), inside, extra)
}

fn image_volumes(t: &Case<'_>) -> Result<()> {
    let image = volume_image(t, "parts")?;
    let pod = t.pod()?;
    let script = "cat /all/data/lower /all/data/both /part/both /file; echo; \
                  ls /linked; (echo x > /all/new) 2>/dev/null || echo read-only; \
                  /part/tool; sleep 1000 & wait";
    let mut request = t.script("main", script);
    request = with_image(request, &image, "/all", json!({}));
    request = with_image(request, &image, "/part", json!({"image_sub_path": "data"}));
    request = with_image(request, &image, "/file", json!({"image_sub_path": "data/lower"}));
    request = with_image(request, &image, "/linked", json!({"image_sub_path": "away"}));
    let id = t.start(&pod, &request)?;
    let expected = "lowerof the upperof the upperlower\nboth\nlower\nout\ntool\nread-only\nran\n";
    t.eventually(Duration::from_secs(20), || {
        let logs = t.logs(&id)?;
        ensure!(logs == expected, "{logs:?}");
        Ok(())
    })?;
    let status = t.status(&id)?;
    // By what PullImage called it, as the kubelet compares the two.
    let pulled = t.node.crictl.json(&["inspecti", &image])?["status"]["id"].clone();
    ensure!(
        status["mounts"][0]["image"]["imageRef"] == pulled,
        "{pulled} is not what the status names: {status}"
    );
    t.node.crictl.ok(&["rm", "-f", &id])?;
    // The mounts went with the container: the image can go too.
    t.node.crictl.ok(&["rmi", &image])?;
    Ok(())
}

fn image_volumes_refused(t: &Case<'_>) -> Result<()> {
    let image = volume_image(t, "refused")?;
    let pod = t.pod()?;
    let missing = "127.0.0.1:1/none:1";
    for (image, more, parts) in [
        (missing, json!({}), vec!["NotFound", missing]),
        (
            image.as_str(),
            json!({"image_sub_path": "gone"}),
            vec![
                "FailedPrecondition",
                "mounts[0].image_sub_path",
                "does not exist",
                "ImageVolumeMountFailed",
            ],
        ),
        (
            &image,
            json!({"image_sub_path": "data/out/passwd"}),
            vec!["FailedPrecondition", "mounts[0].image_sub_path", "does not exist"],
        ),
        (
            &image,
            json!({"image_sub_path": "../etc"}),
            vec!["InvalidArgument", "mounts[0].image_sub_path"],
        ),
        (
            &image,
            json!({"readonly": false}),
            vec!["InvalidArgument", "mounts[0].readonly"],
        ),
    ] {
        let error = t
            .node
            .create_fails(&pod, &with_image(t.idle("main"), image, "/v", more))?;
        ensure!(
            parts.iter().all(|part| error.contains(part)),
            "{parts:?}: {error}"
        );
    }
    t.run_script(&pod, "main", "true")?;
    Ok(())
}

fn image_removed(t: &Case<'_>) -> Result<()> {
    let image = volume_image(t, "removed")?;
    let pod = t.pod()?;
    let id = t.start(&pod, &with_image(t.idle("main"), &image, "/v", json!({})))?;
    t.node.crictl.ok(&["rmi", &image])?;
    ensure!(t.shell(&id, "cat /v/data/lower")? == "lower");
    Ok(())
}

fn declared_volumes(t: &Case<'_>) -> Result<()> {
    let layer = Layer::new()
        .busybox()?
        .directory("real", 0o755)?
        .directory("real/data", 0o711)?
        .file("real/data/seed", 0o640, (70, 71), b"of the image")?
        .symlink("data", "/real/data")?
        .file("declared", 0o644, (0, 0), t.handler.name().as_bytes())?;
    let config = json!({
        "Env": ["PATH=/bin"], "Cmd": ["sh"], "Volumes": {"/data": {}, "/cache": {}, "/given/": {}},
    });
    let image = build(
        vec![(layer, Packing::Gzip)],
        &config,
        Format::Oci,
        host_architecture(),
    )?;
    let name = format!("declared-{}:1", t.handler.name());
    let image = t.node.registry.push(&name, &image)?;
    t.node.crictl.ok(&["pull", &image])?;
    let given = t.directory()?.join("given");
    std::fs::create_dir_all(&given)?;
    std::fs::write(given.join("file"), "of the pod")?;
    let pod = t.pod()?;
    let script = "cat /data/seed /given/file; echo; stat -c '%u:%g %a' /data/seed; stat -Lc %a /data; ls /cache; \
                  echo x > /data/new && echo x > /cache/new && echo wrote; (echo x > /new) 2>/dev/null || echo no; \
                  echo ready; sleep 1000 & wait";
    let request = Request::script("main", &image, script)
        .set("/linux/security_context/readonly_rootfs", json!(true))
        .mount(&given, "/given", json!({}));
    let expected = "of the imageof the pod\n70:71 640\n711\nwrote\nno\nready\n";
    let mut volumes = Vec::new();
    // Each container has its own.
    for name in ["first", "second"] {
        let request = request.clone().set("/metadata/name", json!(name));
        let id = t.start(&pod, &request.set("/log_path", json!(format!("{name}.log"))))?;
        t.eventually(Duration::from_secs(20), || {
            let logs = t.logs(&id)?;
            ensure!(logs == expected, "{logs:?}");
            Ok(())
        })?;
        let mounts = t.status(&id)?["mounts"].as_array().map_or(0, Vec::len);
        ensure!(mounts == 1, "the status has the CRI's mounts: {mounts}");
        let directory = t.node.layout.root.join("snapshots").join(&id).join("volumes");
        ensure!(directory.join("1/new").exists(), "{}", directory.display());
        volumes.push((id, directory));
    }
    for (id, directory) in volumes {
        t.node.crictl.ok(&["rm", "-f", &id])?;
        ensure!(!directory.exists(), "they go with their container");
    }
    t.node.crictl.ok(&["rmi", &image])?;
    Ok(())
}
