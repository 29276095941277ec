//! CheckpointContainer: the runtime writes the process images of a container that goes on running, and an archive
//! is made of them in the layout that checkpointctl, CRI-O and containerd share: `config.dump`, `spec.dump`,
//! `checkpoint/` (criu's images), `rootfs-diff.tar` (the writable layer as an OCI layer), `container.log`.
//!
//! The images are written below the container's snapshot, so a crash leaves them where the container's removal
//! takes them; the archive appears at its place only when it is whole. The whole path can be run only where criu
//! works; elsewhere the end-to-end test stands in a runtime that writes the images, and what is real there is all
//! the rest.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use catamaran_sandbox::id::Id;
use serde_json::json;

use super::record::{ContainerRecord, PodView};
use super::state::ContainerState;
use super::{handler_kind, teardown};
use crate::config::HandlerType;
use crate::error::{Error, Result, chain};
use crate::node::{Node, now_ns};
use crate::shim::{ShimError, find_in_path};

/// Time for a checkpoint whose request sets none; the shim gives the runtime no more.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);
/// Time of `criu check`, asked for the reason of a failure.
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// Writes the archive to `location`. `limit` 0 is the default.
///
/// # Errors
/// [`Error::InvalidArgument`] for a location that is not an absolute path to a file to be made;
/// [`Error::FailedPrecondition`] for a container that does not run, and naming criu where that is what is missing;
/// [`Error::Spec`] (unimplemented) for a VM; [`Error::DeadlineExceeded`].
pub(super) async fn run(
    node: Arc<Node>,
    view: Arc<PodView>,
    container: Arc<ContainerRecord>,
    location: &str,
    limit: Duration,
) -> Result<()> {
    let location = verify(location)?;
    if handler_kind(&view.pod) == HandlerType::Vm {
        return Err(catamaran_spec::SpecError::unimplemented(
            "container_id",
            "a container in a virtual machine cannot be checkpointed: criu is not in the guest",
        )
        .into());
    }
    if container.state != ContainerState::Running {
        return Err(Error::FailedPrecondition(format!(
            "container {} is not running",
            container.id
        )));
    }
    // Unique: two checkpoints at once do not meet.
    let token = Id::random().map_err(Error::io("read", "/dev/urandom"))?;
    let images = node
        .dirs
        .snapshots()
        .join(container.id.as_str())
        .join(format!("checkpoint-{}", token.short()));
    let partial = partial(&location, token.short());
    let limit = if limit.is_zero() { DEFAULT_LIMIT } else { limit };
    let work = attempt(&node, &view, &container, &images, (&partial, &location), limit);
    let result = match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::DeadlineExceeded(format!(
            "the checkpoint was not complete after {} s",
            limit.as_secs()
        ))),
    };
    let cleared = {
        teardown::blocking(move || {
            absent(std::fs::remove_dir_all(&images)).map_err(Error::io("remove", &images))?;
            absent(std::fs::remove_file(&partial)).map_err(Error::io("remove", &partial))
        })
        .await
    };
    if let Err(error) = cleared {
        tracing::warn!(container = %container.id, error = %chain(&error), "what a checkpoint left");
    }
    result
}

fn verify(location: &str) -> Result<PathBuf> {
    let path = Path::new(location);
    let named = path.is_absolute() && !location.ends_with('/') && path.file_name().is_some();
    if !named || path.is_dir() {
        return Err(Error::invalid(
            "location",
            format!("{location:?} is not an absolute path of a file to be made"),
        ));
    }
    match path.parent() {
        Some(parent) if parent.is_dir() => Ok(path.to_owned()),
        _ => Err(Error::invalid(
            "location",
            format!("the directory of {location:?} does not exist"),
        )),
    }
}

async fn attempt(
    node: &Arc<Node>,
    view: &PodView,
    container: &Arc<ContainerRecord>,
    images: &Path,
    (partial, location): (&Path, &Path),
    limit: Duration,
) -> Result<()> {
    let shim = view
        .shim
        .as_ref()
        .ok_or_else(|| Error::Unavailable(format!("the shim of container {} is gone", container.id)))?;
    let fresh = images.to_owned();
    teardown::blocking(move || std::fs::create_dir(&fresh).map_err(Error::io("create", &fresh))).await?;
    if let Err(error) = shim.checkpoint(container.id.as_str(), images, limit).await {
        return Err(reason(error).await);
    }
    let sources = Sources {
        images: images.to_owned(),
        bundle: node.dirs.container(&container.pod, &container.id),
        upper: node.dirs.snapshots().join(container.id.as_str()).join("upper"),
        log: container.log_path.clone(),
        config: config_dump(view, container),
    };
    let (partial, location) = (partial.to_owned(), location.to_owned());
    teardown::blocking(move || archive(&sources, &partial, &location)).await
}

/// Why a checkpoint failed: most often criu is missing, or does not know the kernel.
async fn reason(error: ShimError) -> Error {
    if !matches!(&error, ShimError::Refused { code, .. } if *code == ttrpc::Code::INTERNAL || *code == ttrpc::Code::UNKNOWN)
    {
        return error.into();
    }
    let Some(criu) = find_in_path("criu") else {
        return Error::FailedPrecondition(format!("criu is not installed on this node ({error})"));
    };
    let mut check = tokio::process::Command::new(criu);
    check
        .arg("check")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    match tokio::time::timeout(CHECK_LIMIT, check.output()).await {
        Ok(Ok(output)) if output.status.success() => error.into(),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let last = said
                .lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .unwrap_or_default();
            Error::FailedPrecondition(format!(
                "criu does not work on this node's kernel: {} ({error})",
                last.trim()
            ))
        }
        Ok(Err(problem)) => Error::FailedPrecondition(format!("criu cannot be run: {problem} ({error})")),
        Err(_) => Error::FailedPrecondition(format!(
            "criu check has not ended after {} s ({error})",
            CHECK_LIMIT.as_secs()
        )),
    }
}

/// What checkpointctl prints; the names are those of its metadata.
fn config_dump(view: &PodView, container: &ContainerRecord) -> serde_json::Value {
    let name = container
        .config
        .metadata
        .as_ref()
        .map(|m| m.name.clone())
        .unwrap_or_default();
    let image = container
        .config
        .image
        .as_ref()
        .map(|i| i.image.clone())
        .unwrap_or_default();
    json!({
        "id": container.id,
        "name": name,
        "rootfsImage": image,
        "rootfsImageRef": container.image_ref,
        "rootfsImageName": image,
        "runtime": view.pod.handler,
        "createdTime": time(container.created_at_ns),
        "checkpointedTime": time(now_ns()),
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": false,
    })
}

/// RFC 3339 in UTC, to the second.
fn time(ns: i64) -> String {
    let seconds = ns.div_euclid(1_000_000_000);
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Civil date of a day number: years begin in March, eras have 400 years.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = year + year_of_era + era * 400;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

struct Sources {
    images: PathBuf,
    bundle: PathBuf,
    upper: PathBuf,
    /// Empty: the container has none.
    log: String,
    config: serde_json::Value,
}

fn partial(location: &Path, token: &str) -> PathBuf {
    let mut name = location.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{token}.partial"));
    location.with_file_name(name)
}

/// Memory is in it: nobody but root may read it.
fn private_file(path: &Path) -> io::Result<File> {
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

fn archive(sources: &Sources, partial: &Path, location: &Path) -> Result<()> {
    write_archive(sources, partial).map_err(Error::io("write", partial))?;
    std::fs::rename(partial, location).map_err(Error::io("rename to", location))
}

fn write_archive(sources: &Sources, partial: &Path) -> io::Result<()> {
    // The difference has a place beside the images until its size is known.
    let diff = sources.images.with_extension("diff");
    let made = write_diff(&sources.upper, &diff).and_then(|()| {
        let mut tar = tar::Builder::new(BufWriter::new(private_file(partial)?));
        tar.follow_symlinks(false);
        let config = serde_json::to_vec(&sources.config)?;
        append_bytes(&mut tar, "config.dump", &config)?;
        append_bytes(
            &mut tar,
            "spec.dump",
            &std::fs::read(sources.bundle.join("config.json"))?,
        )?;
        tar.append_path_with_name(&diff, "rootfs-diff.tar")?;
        tar.append_dir_all("checkpoint", &sources.images)?;
        for name in ["dump.log", "stats-dump"] {
            let file = sources.images.join(name);
            if file.is_file() {
                tar.append_path_with_name(&file, name)?;
            }
        }
        if !sources.log.is_empty() && Path::new(&sources.log).is_file() {
            // It grows while it is read: as much as it had.
            let mut log = File::open(&sources.log)?;
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut io::Read::take(&mut log, LOG_LIMIT), &mut bytes)?;
            append_bytes(&mut tar, "container.log", &bytes)?;
        }
        tar.into_inner()?
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()
    });
    made.and(absent(std::fs::remove_file(&diff)))
}

/// The kubelet rotates logs long before.
const LOG_LIMIT: u64 = 256 << 20;

fn append_bytes<W: Write>(tar: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o600);
    tar.append_data(&mut header, name, bytes)
}

/// The overlay's writable layer as an OCI layer: whiteouts and opaque directories by their names (image-spec,
/// layer.md).
fn write_diff(upper: &Path, to: &Path) -> io::Result<()> {
    let mut tar = tar::Builder::new(BufWriter::new(private_file(to)?));
    tar.follow_symlinks(false);
    diff_directory(&mut tar, upper, Path::new(""))?;
    tar.into_inner()?.flush()
}

fn diff_directory<W: Write>(tar: &mut tar::Builder<W>, directory: &Path, inside: &Path) -> io::Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(directory)?.collect::<io::Result<_>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), inside.join(entry.file_name()));
        // The container goes on and may have removed it.
        let metadata = match std::fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let kind = metadata.file_type();
        if kind.is_char_device() && metadata.rdev() == 0 {
            let mut whiteout = std::ffi::OsString::from(".wh.");
            whiteout.push(entry.file_name());
            append_bytes(tar, &inside.join(whiteout).to_string_lossy(), &[])?;
        } else if kind.is_dir() {
            tar.append_dir(&name, &path)?;
            if is_opaque(&path) {
                append_bytes(tar, &name.join(".wh..wh..opq").to_string_lossy(), &[])?;
            }
            diff_directory(tar, &path, &name)?;
        } else if !kind.is_socket() {
            // Sockets have no content, and tar no form for them.
            tar.append_path_with_name(&path, &name)?;
        }
    }
    Ok(())
}

fn is_opaque(directory: &Path) -> bool {
    let mut value = [0_u8; 8];
    rustix::fs::lgetxattr(directory, "trusted.overlay.opaque", &mut value[..])
        .is_ok_and(|n| n == 1 && value[0] == b'y')
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_782_399_000_000_000), "2000-02-28T23:59:59Z");
        assert_eq!(time(951_782_400_000_000_000), "2000-02-29T00:00:00Z");
        assert_eq!(time(1_798_761_599_000_000_000), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn locations_are_files_to_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let inside = |name: &str| dir.path().join(name).display().to_string();
        assert!(verify(&inside("a.tar")).is_ok());
        for bad in [
            "",
            "a.tar",
            "/",
            &inside(""),
            &inside("none/a.tar"),
            &dir.path().display().to_string(),
        ] {
            assert!(verify(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_archive_has_what_readers_look_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["images", "bundle", "upper/sub", "upper/opaque"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        std::fs::write(path("images/pages-1.img"), "memory").unwrap();
        std::fs::write(path("images/dump.log"), "said").unwrap();
        std::fs::write(path("bundle/config.json"), "{}").unwrap();
        std::fs::write(path("log"), "line").unwrap();
        std::fs::write(path("upper/sub/new"), "written").unwrap();
        std::os::unix::fs::symlink("new", path("upper/sub/link")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("upper/gone"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::empty(),
            0,
        )
        .unwrap();
        rustix::fs::lsetxattr(
            path("upper/opaque"),
            "trusted.overlay.opaque",
            b"y",
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
        let sources = Sources {
            images: path("images"),
            bundle: path("bundle"),
            upper: path("upper"),
            log: path("log").display().to_string(),
            config: json!({"id": "x"}),
        };
        let location = path("out.tar");
        let partial = partial(&location, "x");
        archive(&sources, &partial, &location).unwrap();
        assert!(!partial.exists() && !path("images.diff").exists());
        assert_eq!(std::fs::metadata(&location).unwrap().mode() & 0o777, 0o600);
        let files = contents(&std::fs::read(&location).unwrap());
        for (name, content) in [
            ("config.dump", "{\"id\":\"x\"}"),
            ("spec.dump", "{}"),
            ("checkpoint/pages-1.img", "memory"),
            ("dump.log", "said"),
            ("container.log", "line"),
        ] {
            assert_eq!(files[name], content.as_bytes(), "{name}");
        }
        let diff = contents(&files["rootfs-diff.tar"]);
        assert_eq!(diff["sub/new"], b"written");
        for name in [".wh.gone", "opaque/.wh..wh..opq", "sub/link"] {
            assert!(diff.contains_key(name), "{name}: {:?}", diff.keys());
        }
    }

    fn contents(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut tar = tar::Archive::new(bytes);
        tar.entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let name = entry.path().unwrap().display().to_string();
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).unwrap();
                (name.trim_end_matches('/').to_owned(), bytes)
            })
            .collect()
    }
}
