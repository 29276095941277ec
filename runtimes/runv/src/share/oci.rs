//! Rewrites a container's config.json for the guest: the root and every bind mount's source become guest paths
//! below the share; what does not concern the host passes as it is.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Share, ShareError};

/// The pod's `/dev/shm` in the guest, made by the agent: a bind source that is the guest's already.
pub const GUEST_SHM: &str = "/run/catamaran/shm";

/// How a host path is bound into the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// With what is mounted below it.
    pub recursive: bool,
    /// Not even the VMM's side may write.
    pub read_only: bool,
    /// What the host mounts below later is to appear (HostToContainer).
    pub follows_host: bool,
}

/// One bind mount of the container.
#[derive(Debug, PartialEq, Eq)]
struct Bind {
    /// Index in the spec's mounts.
    index: usize,
    source: PathBuf,
    binding: Binding,
}

/// Rewrites `spec` and makes what it names visible in the share.
///
/// # Errors
/// [`ShareError`]; what was mounted is for [`Share::remove_container`].
pub fn rewrite(spec: &mut Value, share: &Share, container: &str, guest_root: &str) -> Result<(), ShareError> {
    refuse_hooks(spec)?;
    let root = spec.get_mut("root").and_then(Value::as_object_mut);
    let root = root.ok_or_else(|| ShareError::Refused("config.json has no root".to_owned()))?;
    root.insert("path".to_owned(), Value::String(guest_root.to_owned()));
    if let Some(resources) = spec.pointer_mut("/linux/resources") {
        drop_cpusets(container, resources);
    }
    for bind in binds(spec)? {
        let guest = share.bind(container, bind.index, &bind.source, &bind.binding)?;
        spec["mounts"][bind.index]["source"] = Value::String(guest);
    }
    Ok(())
}

/// Takes the host's CPUs and memory nodes out of OCI LinuxResources: the guest numbers its own from 0 and has fewer.
pub fn drop_cpusets(container: &str, resources: &mut Value) {
    let mut dropped = Vec::new();
    for (part, named) in [("cpu", &["cpus", "mems"][..]), ("unified", &[])] {
        let Some(fields) = resources.get_mut(part).and_then(Value::as_object_mut) else {
            continue;
        };
        fields.retain(|name, value| {
            let of_host = named.contains(&name.as_str()) || name.starts_with("cpuset.");
            let set = value.as_str().is_some_and(|value| !value.is_empty());
            if of_host && set {
                dropped.push(format!("{part}.{name} {value}"));
            }
            !of_host
        });
    }
    if !dropped.is_empty() {
        let dropped = dropped.join(", ");
        tracing::info!(
            container,
            dropped,
            "the host's CPUs and memory nodes mean nothing in a VM: its virtual CPUs run on any CPU of the node"
        );
    }
}

/// Hooks are programs of the host: in the guest they would not exist, and on the host they would see no container.
fn refuse_hooks(spec: &Value) -> Result<(), ShareError> {
    let hooks = spec.get("hooks").and_then(Value::as_object);
    let set = hooks.is_some_and(|hooks| {
        hooks
            .values()
            .any(|list| list.as_array().is_some_and(|l| !l.is_empty()))
    });
    if set {
        return Err(ShareError::Refused(
            "config.json has hooks: a container in a VM cannot have any".to_owned(),
        ));
    }
    Ok(())
}

fn binds(spec: &Value) -> Result<Vec<Bind>, ShareError> {
    let mounts = spec
        .get("mounts")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let mut binds = Vec::new();
    for (index, mount) in mounts.iter().enumerate() {
        let options: Vec<&str> = mount
            .get("options")
            .and_then(Value::as_array)
            .map(|options| options.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default();
        let kind = mount.get("type").and_then(Value::as_str).unwrap_or_default();
        let is_bind = kind == "bind" || options.iter().any(|option| matches!(*option, "bind" | "rbind"));
        if !is_bind {
            continue;
        }
        let source = mount.get("source").and_then(Value::as_str).unwrap_or_default();
        if source == GUEST_SHM {
            continue;
        }
        let destination = mount
            .get("destination")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let path = Path::new(source);
        if !path.is_absolute() {
            return Err(ShareError::Refused(format!(
                "the source {source:?} of the mount at {destination} is no absolute path"
            )));
        }
        if options
            .iter()
            .any(|option| matches!(*option, "shared" | "rshared"))
        {
            return Err(ShareError::Refused(format!(
                "the mount at {destination} has bidirectional propagation: what is mounted in a VM cannot appear \
                 on the host"
            )));
        }
        binds.push(Bind {
            index,
            source: path.to_owned(),
            binding: Binding {
                recursive: !options.contains(&"bind"),
                read_only: options.contains(&"ro"),
                follows_host: options.iter().any(|option| matches!(*option, "slave" | "rslave")),
            },
        });
    }
    Ok(binds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn spec(mounts: Value) -> Value {
        json!({ "ociVersion": "1.1.0", "root": { "path": "/host/rootfs" }, "mounts": mounts })
    }

    #[test]
    fn binds_are_found_and_the_rest_is_left() {
        let spec = spec(json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev/shm", "type": "bind", "source": GUEST_SHM, "options": ["rbind", "rw"] },
            { "destination": "/data", "type": "bind", "source": "/host/data", "options": ["rbind", "rslave", "ro"] },
            { "destination": "/f", "source": "/host/f", "options": ["bind"] },
        ]));
        let found = binds(&spec).unwrap();
        assert_eq!(
            found,
            [
                Bind {
                    index: 2,
                    source: "/host/data".into(),
                    binding: Binding {
                        recursive: true,
                        read_only: true,
                        follows_host: true
                    },
                },
                Bind {
                    index: 3,
                    source: "/host/f".into(),
                    binding: Binding {
                        recursive: false,
                        read_only: false,
                        follows_host: false
                    },
                },
            ]
        );
    }

    #[test]
    fn what_a_vm_cannot_give_is_refused() {
        let shared = spec(json!([{ "destination": "/d", "source": "/d", "options": ["rbind", "rshared"] }]));
        assert!(binds(&shared).unwrap_err().to_string().contains("bidirectional"));
        let relative = spec(json!([{ "destination": "/d", "type": "bind", "source": "d" }]));
        assert!(binds(&relative).unwrap_err().to_string().contains("absolute"));
        let mut hooked = spec(json!([]));
        hooked["hooks"] = json!({ "prestart": [{ "path": "/bin/true" }] });
        assert!(refuse_hooks(&hooked).is_err());
        hooked["hooks"] = json!({ "prestart": [] });
        assert!(refuse_hooks(&hooked).is_ok());
    }

    #[test]
    fn cpusets_of_the_host_stay_on_the_host() {
        let mut resources = json!({
            "cpu": { "cpus": "1,3", "mems": "1", "shares": 512 },
            "unified": { "cpuset.cpus": "1", "memory.high": "1000" },
        });
        drop_cpusets("c1", &mut resources);
        assert_eq!(
            resources,
            json!({ "cpu": { "shares": 512 }, "unified": { "memory.high": "1000" } })
        );
        drop_cpusets("c1", &mut Value::Null);
    }

    #[test]
    fn the_view_is_read_only_but_for_what_is_mounted_there() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: the_view_is_read_only_but_for_what_is_mounted_there: needs root");
            return;
        }
        let bundle = tempfile::tempdir().unwrap();
        let data = tempfile::tempdir().unwrap();
        let share = Share::create(bundle.path()).unwrap();
        let root = [catamaran_sandbox::shim_server::backend::RootfsMount {
            fs_type: "bind".into(),
            source: data.path().display().to_string(),
            target: String::new(),
            options: vec!["rbind".into(), "nosuid".into()],
        }];
        share.mount_rootfs("c1", &root).unwrap();
        let view = share.view();
        std::fs::write(view.join("c1/rootfs/written"), "x").unwrap();
        assert!(data.path().join("written").exists());
        for path in ["foreign", "c1/foreign", "c1/rootfs/../foreign"] {
            let error = std::fs::write(view.join(path), "x").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{path}");
        }
        // Also what came there otherwise is no reason to keep the pod.
        std::fs::write(share.directory().join("c1/foreign"), "x").unwrap();
        std::fs::write(share.directory().join("foreign"), "x").unwrap();
        share.remove_container("c1").unwrap();
        assert!(!share.directory().join("c1").exists() && !view.join("c1").exists());
        Share::remove(bundle.path()).unwrap();
        assert!(!bundle.path().join("share").exists());
        assert!(data.path().join("written").exists());
    }

    #[test]
    fn sources_become_guest_paths_and_mounts() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: sources_become_guest_paths_and_mounts: needs root");
            return;
        }
        let bundle = tempfile::tempdir().unwrap();
        let data = tempfile::tempdir().unwrap();
        std::fs::write(data.path().join("file"), "content").unwrap();
        let share = Share::create(bundle.path()).unwrap();
        Share::create(bundle.path()).unwrap();
        let mut spec = spec(json!([
            { "destination": "/data", "type": "bind", "source": data.path(), "options": ["rbind", "ro"] },
            { "destination": "/f", "type": "bind", "source": data.path().join("file"), "options": ["rbind"] },
        ]));
        rewrite(&mut spec, &share, "c1", "/guest/root").unwrap();
        assert_eq!(spec["root"]["path"], "/guest/root");
        assert_eq!(spec["mounts"][0]["source"], "/run/catamaran/share/c1/mounts/0");
        let mounts = share.directory().join("c1/mounts");
        assert_eq!(std::fs::read_to_string(mounts.join("0/file")).unwrap(), "content");
        assert!(std::fs::write(mounts.join("0/file"), "x").is_err());
        std::fs::write(mounts.join("1"), "changed").unwrap();
        assert_eq!(
            std::fs::read_to_string(data.path().join("file")).unwrap(),
            "changed"
        );
        share.remove_container("c1").unwrap();
        share.remove_container("c1").unwrap();
        Share::remove(bundle.path()).unwrap();
        assert!(super::super::mounts::below(bundle.path()).is_empty());
        assert_eq!(
            std::fs::read_to_string(data.path().join("file")).unwrap(),
            "changed"
        );
        assert!(!bundle.path().join("share").exists());
    }

    proptest! {
        #[test]
        fn any_mounts_are_read_or_refused(
            mounts in proptest::collection::vec(("[a-z/]{0,6}", "[a-z/.]{0,8}", "(ro|rw|bind|rbind|shared|x)?"), 0..6)
        ) {
            let list: Vec<Value> = mounts
                .iter()
                .map(|(kind, source, option)| json!({"type": kind, "source": source, "options": [option]}))
                .collect();
            if let Ok(found) = binds(&spec(Value::Array(list))) {
                prop_assert!(found.iter().all(|bind| bind.source.is_absolute()));
            }
        }
    }
}
