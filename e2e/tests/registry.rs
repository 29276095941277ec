//! Pulling: what registries may offer, credentials, mirrors, and every way in which a pull fails.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use catamaran_e2e::case::Case;
use catamaran_e2e::fake_registry::{FakeRegistry, Fault};
use catamaran_e2e::image::{Format, Image, Layer, Packing, build, digest, host_architecture, index};
use catamaran_e2e::node::{Node, Options};
use catamaran_e2e::suite::{Handler::Runc, Handler::Runv, Suite};
use serde_json::json;

fn main() -> ExitCode {
    Suite::new(|| Ok(Options::default()))
        .one(Runc, "formats_and_packings", formats)
        .one(Runc, "an_index_gives_the_hosts_platform", platforms)
        .both("whiteouts_links_and_modes_of_layers", layers)
        .one(Runc, "credentials", credentials)
        .one(Runc, "a_mirror_by_hosts_toml", mirror)
        .one(Runc, "a_missing_tag_repository_and_registry", missing)
        .one(Runc, "other_bytes_than_the_digest_says", wrong_bytes)
        .one(Runc, "a_digest_that_is_not_there", wrong_digest)
        .one(Runc, "a_registry_that_hangs", hangs)
        .one(Runc, "a_registry_that_breaks_off", breaks_off)
        .one(Runc, "a_full_disk", full_disk)
        .one(Runc, "references_that_are_none", bad_references)
        .one(Runv, "an_image_in_use_can_be_removed", removed_in_use)
        .main()
}

/// A small image; `mark` makes its digest different from others'.
fn small(mark: &str) -> Result<Image> {
    let layer = Layer::new().file("mark", 0o644, (0, 0), mark.as_bytes())?;
    build(
        vec![(layer, Packing::Gzip)],
        &json!({"Cmd": ["/mark"]}),
        Format::Oci,
        host_architecture(),
    )
}

/// Nothing of a failed pull is visible, and nothing of it is kept.
fn nothing_of(t: &Case<'_>, reference: &str) -> Result<()> {
    ensure!(
        t.node.crictl.run(&["inspecti", reference])?.code != 0,
        "{reference} is there after a failed pull"
    );
    Ok(())
}

fn formats(t: &Case<'_>) -> Result<()> {
    for (name, format, packing) in [
        ("oci-gzip", Format::Oci, Packing::Gzip),
        ("oci-zstd", Format::Oci, Packing::Zstd),
        ("oci-plain", Format::Oci, Packing::Plain),
        ("docker-gzip", Format::Docker, Packing::Gzip),
    ] {
        let layer = Layer::new().file("f", 0o644, (0, 0), name.as_bytes())?;
        let image = build(
            vec![(layer, packing)],
            &json!({"Cmd": ["x"]}),
            format,
            host_architecture(),
        )?;
        let reference = t.node.registry.push(&format!("{name}:1"), &image)?;
        t.node.crictl.ok(&["pull", &reference]).with_context(|| name)?;
        let status = t.node.crictl.json(&["inspecti", &reference])?;
        ensure!(status["status"]["id"] == image.id.as_str(), "{name}: {status}");
    }
    Ok(())
}

fn platforms(t: &Case<'_>) -> Result<()> {
    let make = |architecture: &str| {
        let layer = Layer::new().file("arch", 0o644, (0, 0), architecture.as_bytes())?;
        build(
            vec![(layer, Packing::Gzip)],
            &json!({}),
            Format::Oci,
            architecture,
        )
    };
    let (ours, other) = (make(host_architecture())?, make("s390x")?);
    for (name, format) in [("index", Format::Oci), ("list", Format::Docker)] {
        let list = index(&[("s390x", &other), (host_architecture(), &ours)], format)?;
        let reference = t
            .node
            .registry
            .push_index(&format!("{name}:1"), &[&other, &ours], &list)?;
        t.node.crictl.ok(&["pull", &reference])?;
        let status = t.node.crictl.json(&["inspecti", &reference])?;
        ensure!(status["status"]["id"] == ours.id.as_str(), "{name}: {status}");
        let by_digest = t.node.registry.reference(&format!("{name}@{}", list.digest));
        let digests = status["status"]["repoDigests"].as_array().context("no digests")?;
        ensure!(digests.contains(&json!(by_digest)), "{name}: {status}");
    }
    let only_other = index(&[("s390x", &other)], Format::Oci)?;
    let reference = t.node.registry.push_index("foreign:1", &[&other], &only_other)?;
    let error = t.node.crictl.fails(&["pull", &reference])?;
    ensure!(
        error.contains("platform") || error.contains("no match") || error.contains("s390x"),
        "{error}"
    );
    nothing_of(t, &reference)
}

fn layers(t: &Case<'_>) -> Result<()> {
    let first = Layer::new()
        .busybox()?
        .directory("dir", 0o755)?
        .file("dir/gone", 0o644, (0, 0), b"1")?
        .file("dir/stays", 0o640, (11, 12), b"2")?
        .directory("opaque", 0o755)?
        .file("opaque/old", 0o644, (0, 0), b"3")?
        .file("setuid", 0o4755, (0, 0), b"4")?;
    let second = Layer::new()
        .file("dir/.wh.gone", 0o644, (0, 0), b"")?
        .directory("opaque", 0o700)?
        .file("opaque/.wh..wh..opq", 0o644, (0, 0), b"")?
        .file("opaque/new", 0o644, (0, 0), b"5")?
        .symlink("link", "dir/stays")?;
    let layers = vec![(first, Packing::Gzip), (second, Packing::Gzip)];
    let image = build(
        layers,
        &json!({"Env": ["PATH=/bin"]}),
        Format::Oci,
        host_architecture(),
    )?;
    let reference = t
        .node
        .registry
        .push(&format!("layers-{}:1", t.handler.name()), &image)?;
    t.node.crictl.ok(&["pull", &reference])?;
    let script = "ls /dir /opaque; stat -c '%a %u %g' /dir/stays /setuid /opaque; cat /link";
    let ended = t.run(
        &t.pod()?,
        &t.script("main", script).set("/image/image", json!(reference)),
    )?;
    let expected = "/dir:\nstays\n\n/opaque:\nnew\n640 11 12\n4755 0 0\n700 0 0\n2";
    ensure!(ended.logs == expected, "{}", ended.logs);
    Ok(())
}

fn credentials(t: &Case<'_>) -> Result<()> {
    let image = small("credentials")?;
    // user:secret in base64.
    let registry = FakeRegistry::start(
        &[("private:1", &image)],
        Fault::None,
        Some("Basic dXNlcjpzZWNyZXQ="),
    )?;
    let reference = registry.reference("private:1");
    let refused = t.node.crictl.fails(&["pull", &reference])?.to_lowercase();
    ensure!(
        ["401", "unauth", "authoriz"].iter().any(|w| refused.contains(w)),
        "{refused}"
    );
    let refused = t
        .node
        .crictl
        .fails(&["pull", "--creds", "user:wrong", &reference])?;
    ensure!(!refused.contains("wrong\""), "a password is shown: {refused}");
    nothing_of(t, &reference)?;
    t.node
        .crictl
        .ok(&["pull", "--creds", "user:secret", &reference])?;
    ensure!(t.node.crictl.json(&["inspecti", &reference])?["status"]["id"] == image.id.as_str());
    Ok(())
}

fn mirror(t: &Case<'_>) -> Result<()> {
    let image = small("mirror")?;
    let registry = FakeRegistry::start(&[("some/thing:1", &image)], Fault::None, None)?;
    let directory = t.node.layout.certs.join("upstream.invalid");
    std::fs::create_dir_all(&directory)?;
    let hosts = format!(
        "server = \"https://upstream.invalid\"\n\n[host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
        registry.address()
    );
    std::fs::write(directory.join("hosts.toml"), hosts)?;
    t.node.crictl.ok(&["pull", "upstream.invalid/some/thing:1"])?;
    let status = t
        .node
        .crictl
        .json(&["inspecti", "upstream.invalid/some/thing:1"])?;
    // The image keeps the name that was asked for.
    ensure!(
        status["status"]["repoTags"][0] == "upstream.invalid/some/thing:1",
        "{status}"
    );
    let requests = registry.requests();
    ensure!(
        requests.iter().any(|r| r.contains("ns=upstream.invalid")),
        "the mirror is told for whom: {requests:?}"
    );
    // The mirror lacks it, and upstream cannot be reached.
    let error = t.node.crictl.fails(&["pull", "upstream.invalid/other:1"])?;
    ensure!(error.contains("upstream.invalid"), "{error}");
    Ok(())
}

fn missing(t: &Case<'_>) -> Result<()> {
    let image = small("missing")?;
    t.node.registry.push("present:1", &image)?;
    for name in ["present:2", "absent:1"] {
        let reference = t.node.registry.reference(name);
        let error = t.node.crictl.fails(&["pull", &reference])?;
        ensure!(
            error.contains("not found") || error.contains("NotFound"),
            "{error}"
        );
        ensure!(
            error.contains(&reference),
            "the error names the reference: {error}"
        );
        ensure!(error.contains("code = NotFound"), "{error}");
    }
    let nobody = catamaran_e2e::registry::free_port()?;
    let error = t.node.crictl.fails(&["pull", &format!("{nobody}/x:1")])?;
    ensure!(error.contains("refused") || error.contains("connect"), "{error}");
    Ok(())
}

fn wrong_bytes(t: &Case<'_>) -> Result<()> {
    let image = small("wrong-bytes")?;
    let registry = FakeRegistry::start(&[("bad:1", &image)], Fault::WrongBytes, None)?;
    let reference = registry.reference("bad:1");
    let error = t.node.crictl.fails(&["pull", &reference])?.to_lowercase();
    ensure!(
        error.contains("digest") || error.contains("sha256") || error.contains("checksum"),
        "{error}"
    );
    nothing_of(t, &reference)?;
    // The right bytes from elsewhere are taken: the bad ones were not kept under the digest.
    let good = t.node.registry.push("good:1", &image)?;
    t.node.crictl.ok(&["pull", &good])?;
    Ok(())
}

fn wrong_digest(t: &Case<'_>) -> Result<()> {
    let image = small("wrong-digest")?;
    t.node.registry.push("digests:1", &image)?;
    let reference = t
        .node
        .registry
        .reference(&format!("digests@{}", digest(b"something else")));
    let error = t.node.crictl.fails(&["pull", &reference])?;
    ensure!(
        error.contains("not found") || error.contains("NotFound"),
        "{error}"
    );
    nothing_of(t, &reference)
}

fn hangs(t: &Case<'_>) -> Result<()> {
    if !t.ours() {
        return Err(catamaran_e2e::suite::Skip("containerd 1.6 waits five minutes here".to_owned()).into());
    }
    let image = small("hangs")?;
    for fault in [Fault::Silent, Fault::Stalls] {
        let registry = FakeRegistry::start(&[("slow:1", &image)], fault, None)?;
        let reference = registry.reference("slow:1");
        let begun = Instant::now();
        let error = t.node.crictl.fails(&["pull", &reference])?;
        // progress_timeout_seconds is 5 here; retries are bounded.
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "{fault:?} took {:?}",
            begun.elapsed()
        );
        let text = error.to_lowercase();
        ensure!(
            ["progress", "timed out", "timeout", "deadline"]
                .iter()
                .any(|w| text.contains(w)),
            "{fault:?}: {error}"
        );
        nothing_of(t, &reference)?;
    }
    Ok(())
}

fn breaks_off(t: &Case<'_>) -> Result<()> {
    let image = small("breaks-off")?;
    let registry = FakeRegistry::start(&[("torn:1", &image)], Fault::BreaksOff, None)?;
    let reference = registry.reference("torn:1");
    t.node.crictl.fails(&["pull", &reference])?;
    nothing_of(t, &reference)
}

fn full_disk(t: &Case<'_>) -> Result<()> {
    // A node of its own, with a root of 48 MiB.
    let node = Node::start(
        t.node.flavour,
        Options {
            root_mib: Some(48),
            ..Options::default()
        },
    )?;
    let layer = Layer::new().file("big", 0o644, (0, 0), &vec![7u8; 80 << 20])?;
    let image = build(
        vec![(layer, Packing::Gzip)],
        &json!({}),
        Format::Oci,
        host_architecture(),
    )?;
    let reference = node.registry.push("big:1", &image)?;
    let free = || -> Result<u64> {
        let stat = nix::sys::statvfs::statvfs(&node.layout.root)?;
        Ok(stat.blocks_free() * stat.fragment_size())
    };
    let before = free()?;
    let error = node.crictl.fails(&["pull", &reference])?.to_lowercase();
    ensure!(
        error.contains("no space") || error.contains("full") || error.contains("space left"),
        "{error}"
    );
    ensure!(node.crictl.run(&["inspecti", &reference])?.code != 0);
    let after = free()?;
    ensure!(
        before - after.min(before) < 1 << 20,
        "{before} bytes were free, {after} are after the failed pull"
    );
    // The node still works.
    let pod = node.run_pod("runc", &node.pod_request("after-full-disk"))?;
    node.remove_pod(&pod.id)?;
    node.finish()
}

fn bad_references(t: &Case<'_>) -> Result<()> {
    for reference in ["name/UPPER:1", "x:y:z", "name@sha256:12", "../etc", "a b"] {
        let error = t.node.crictl.fails(&["pull", reference])?;
        ensure!(
            error.contains("InvalidArgument") || !t.ours(),
            "{reference}: {error}"
        );
    }
    Ok(())
}

fn removed_in_use(t: &Case<'_>) -> Result<()> {
    let layers = vec![(
        Layer::new().busybox()?.file("own", 0o644, (0, 0), b"here")?,
        Packing::Gzip,
    )];
    let image = build(
        layers,
        &json!({"Env": ["PATH=/bin"]}),
        Format::Oci,
        host_architecture(),
    )?;
    let reference = t.node.registry.push("in-use:1", &image)?;
    t.node.crictl.ok(&["pull", &reference])?;
    let pod = t.pod()?;
    let id = t.start(&pod, &t.idle("main").set("/image/image", json!(reference)))?;
    t.node.crictl.ok(&["rmi", &reference])?;
    nothing_of(t, &reference)?;
    ensure!(
        t.shell(&id, "cat /own")? == "here",
        "the layers of a running container are kept"
    );
    Ok(())
}
