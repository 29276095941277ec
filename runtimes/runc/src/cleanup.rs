//! What a shim notes in the sandbox bundle before each side effect, and `delete`, which goes by it after the
//! shim has died: ends processes, removes runtime state, cgroups and mounts, and says how containers ended.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use catamaran_sandbox::bootstrap::{BoxError, Context, Deleted};
use catamaran_sandbox::exit::ExitRecord;
use catamaran_sandbox::pod_spec::RuntimeSpec;

use crate::cgroup::Cgroup;
use crate::oci_runtime::global_arguments;
use crate::{mounts, process};

/// The pod's runtime, JSON.
const RUNTIME_FILE: &str = "runtime.json";
/// A directory with one file per container: its name the id, its content the bundle.
const CONTAINERS: &str = "made";
/// 128 + SIGKILL.
const KILLED: u32 = 137;

#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("; "))]
struct Failures(Vec<String>);

pub(crate) fn remember_runtime(sandbox: &Path, runtime: &RuntimeSpec) -> std::io::Result<()> {
    replace(
        sandbox,
        &sandbox.join(RUNTIME_FILE),
        &serde_json::to_vec(runtime)?,
    )
}

pub(crate) fn remember(sandbox: &Path, id: &str, bundle: &Path) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let directory = sandbox.join(CONTAINERS);
    std::fs::create_dir_all(&directory)?;
    replace(sandbox, &directory.join(id), bundle.as_os_str().as_bytes())
}

pub(crate) fn forget(sandbox: &Path, id: &str) -> std::io::Result<()> {
    match std::fs::remove_file(sandbox.join(CONTAINERS).join(id)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Whole or not at all, whenever this process dies. The temporary file is in the sandbox bundle, as every name
/// in the directory of containers is a container. Nothing awaits in here, so it is used by one at a time.
fn replace(sandbox: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = sandbox.join(".note.new");
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(temporary, path)
}

/// The shim's `delete`.
pub(crate) fn delete(context: &Context) -> Result<Deleted, BoxError> {
    use std::os::unix::ffi::OsStringExt;
    let runtime = match std::fs::read(context.bundle.join(RUNTIME_FILE)) {
        Ok(bytes) => Some(serde_json::from_slice::<RuntimeSpec>(&bytes)?),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let mut failures = Vec::new();
    let directory = context.bundle.join(CONTAINERS);
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>()?,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    for entry in entries {
        let id = entry.file_name().to_string_lossy().into_owned();
        let bundle = PathBuf::from(std::ffi::OsString::from_vec(std::fs::read(entry.path())?));
        match delete_container(runtime.as_ref(), &id, &bundle) {
            Ok(()) => forget(&context.bundle, &id)?,
            Err(error) => failures.push(format!("container {id}: {error}")),
        }
    }
    if let Err(error) = mounts::unmount_all(&context.bundle.join("shm")) {
        failures.push(format!("{error}"));
    }
    // Namespaces and the pod's init went with the shim.
    if failures.is_empty() {
        Ok(Deleted { exit_status: KILLED })
    } else {
        Err(Failures(failures).into())
    }
}

fn delete_container(runtime: Option<&RuntimeSpec>, id: &str, bundle: &Path) -> Result<(), BoxError> {
    if let Some(RuntimeSpec::Oci { binary, args, root }) = runtime {
        let output = Command::new(binary)
            .args(global_arguments(args, root, Path::new("/dev/null")))
            .args(["delete", "--force", id])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(format!("{} delete: {text}", binary.display()).into());
        }
    }
    end_cgroup(bundle)?;
    mounts::unmount_rootfs(&bundle.join("rootfs"))?;
    let gone = !bundle.exists();
    if !gone && ExitRecord::read(bundle)?.is_none() {
        let exited_at_ns = crate::reaper::now_ns();
        ExitRecord {
            exit_code: KILLED.cast_signed(),
            exited_at_ns,
            oom_killed: false,
        }
        .write(bundle)?;
    }
    Ok(())
}

/// Ends and removes what the runtime does not know of: it died before it wrote its state, or its state is lost.
pub(crate) fn end_cgroup(bundle: &Path) -> std::io::Result<()> {
    let Some(cgroup) = cgroup_of(bundle) else {
        return Ok(());
    };
    process::kill_cgroup(&cgroup);
    remove_cgroup(&cgroup)
}

/// Killed processes leave a cgroup a moment later.
fn remove_cgroup(cgroup: &Cgroup) -> std::io::Result<()> {
    let mut attempts = 0;
    loop {
        match cgroup.remove() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempts < 100 => {
                attempts += 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// The container's own cgroup by its configuration.
fn cgroup_of(bundle: &Path) -> Option<Cgroup> {
    let bytes = std::fs::read(bundle.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
    let path = config.get("linux")?.get("cgroupsPath")?.as_str()?;
    let scope = systemd_scope(path);
    let path = scope.as_deref().unwrap_or(path);
    let parts = path.trim_start_matches('/').split('/');
    let good = path.starts_with('/') && parts.clone().all(|part| !matches!(part, "" | "." | ".."));
    good.then(|| Cgroup::of_path(path).ok()).flatten()
}

/// The path of a `cgroupsPath` in systemd's spelling, `slice:prefix:name`: a scope, which systemd forgets once it
/// is empty, in a slice whose name has those above it, see systemd.slice(5).
fn systemd_scope(spelled: &str) -> Option<String> {
    let [slice, prefix, name] = spelled.split(':').collect::<Vec<_>>().try_into().ok()?;
    let mut path = String::new();
    let mut above = String::new();
    for part in slice.strip_suffix(".slice")?.split('-') {
        above.push_str(part);
        path.push_str(&format!("/{above}.slice"));
        above.push('-');
    }
    Some(format!("{path}/{prefix}-{name}.scope"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_come_and_go() {
        let sandbox = tempfile::tempdir().unwrap();
        remember(sandbox.path(), "abc", Path::new("/bundles/abc")).unwrap();
        remember(sandbox.path(), "abc", Path::new("/bundles/other")).unwrap();
        let note = sandbox.path().join(CONTAINERS).join("abc");
        assert_eq!(std::fs::read_to_string(&note).unwrap(), "/bundles/other");
        assert_eq!(
            std::fs::read_dir(sandbox.path().join(CONTAINERS))
                .unwrap()
                .count(),
            1
        );
        forget(sandbox.path(), "abc").unwrap();
        forget(sandbox.path(), "abc").unwrap();
        assert!(!note.exists());
    }

    #[test]
    fn only_a_path_that_names_one_cgroup_is_taken() {
        let bundle = tempfile::tempdir().unwrap();
        let taken = |path: &str| {
            let text = format!("{{\"linux\":{{\"cgroupsPath\":{path:?}}}}}");
            std::fs::write(bundle.path().join("config.json"), text).unwrap();
            cgroup_of(bundle.path()).is_some()
        };
        assert!(taken("/kubepods/pod1/c1"));
        assert!(taken("system.slice:cri:abc"));
        assert!(!taken("/") && !taken("/a/../b") && !taken("relative") && !taken("a.slice:../b:c"));
    }

    #[test]
    fn a_scope_is_found_below_all_its_slices() {
        let found = |spelled| systemd_scope(spelled);
        assert_eq!(
            found("kubepods-burstable-pod1_2.slice:catamaran:abc").as_deref(),
            Some(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/catamaran-abc.scope"
            )
        );
        assert_eq!(found("/kubepods/pod1/abc"), None);
        assert_eq!(found("nonsense:catamaran:abc"), None);
    }
}
