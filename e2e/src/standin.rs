//! Stand-ins for the images that critest pulls from public registries, served by the node's own registry under
//! the public names through `hosts.toml` mirrors. They hold what the specs call: a busybox with its default
//! applets as hard links, Debian's nginx, and a setuid program that prints its effective user.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::binaries;
use crate::image::{self, Format, Image, Layer, Packing};
use crate::process;
use crate::registry::Registry;

/// The registries whose names critest's references carry.
pub const PUBLIC_REGISTRIES: &[&str] = &["registry.k8s.io", "k8s.gcr.io", "gcr.io"];

/// The digest by which critest pins its image test-image-digest. Its manifest is not to be had offline.
pub const PINNED_DIGEST: &str = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf";

/// Pushes every stand-in, and has the daemon look for the public registries at the node's own. Returns the digest
/// of the stand-in for the image that critest pins by [`PINNED_DIGEST`].
///
/// # Errors
/// A tool or package is missing, or the registry refuses an image.
pub fn serve(registry: &Registry, hosts: &Path) -> Result<String> {
    let busybox = busybox(json!({}))?;
    registry.push("e2e-test-images/busybox:1.29-2", &busybox)?;
    let pause = image::pause()?;
    registry.push("pause:3.9", &pause)?;
    let nginx = nginx(80)?;
    registry.push("e2e-test-images/nginx:1.14-2", &nginx)?;
    registry.push("e2e-test-images/httpd:2.4.39-4", &httpd()?)?;
    // The name that critest asks for ends in Go's name of the architecture.
    let own = format!(
        "k8s-staging-cri-tools/hostnet-nginx-{}:latest",
        image::host_architecture()
    );
    registry.push(&own, &self::nginx(12003)?)?;
    registry.push("e2e-test-images/nonewprivs:1.3", &effective_user()?)?;
    for (name, user) in [
        ("uid", "1002"),
        ("username", "www-data"),
        ("uid-group", "1003:users"),
        ("username-group", "www-data:100"),
    ] {
        let image = self::busybox(json!({"User": user}))?;
        registry.push(
            &format!("k8s-staging-cri-tools/test-image-user-{name}:latest"),
            &image,
        )?;
    }
    registry.push(
        "k8s-staging-cri-tools/test-image-predefined-group:latest",
        &predefined_group()?,
    )?;
    for name in [
        "latest:latest",
        "tag:test",
        "tag:all",
        "1:latest",
        "2:latest",
        "3:latest",
    ] {
        registry.push(
            &format!("k8s-staging-cri-tools/test-image-{name}"),
            &labelled(name)?,
        )?;
    }
    let tags = labelled("tags")?;
    for tag in 1..=3 {
        registry.push(&format!("k8s-staging-cri-tools/test-image-tags:{tag}"), &tags)?;
    }
    let pinned = labelled("digest")?;
    registry.push("k8s-staging-cri-tools/test-image-digest:latest", &pinned)?;
    for public in PUBLIC_REGISTRIES {
        let directory = hosts.join(public);
        std::fs::create_dir_all(&directory)?;
        let url = format!("http://{}", registry.address());
        // The mirror is the server as well: nothing is asked of the public one.
        let text =
            format!("server = \"{url}\"\n\n[host.\"{url}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        std::fs::write(directory.join("hosts.toml"), text)?;
    }
    Ok(pinned.manifest.digest)
}

fn base() -> Result<Layer> {
    let path = binaries::tool("busybox")?;
    let binary = std::fs::read(&path)?;
    let listed = process::succeed(Command::new(&path).arg("--list"), Duration::from_secs(10))?;
    let mut layer = Layer::new();
    for name in ["bin", "etc", "home", "root", "usr", "usr/bin", "var", "var/log"] {
        layer = layer.directory(name, 0o755)?;
    }
    layer = layer
        .directory("tmp", 0o1777)?
        .directory("run", 0o755)?
        .symlink("var/run", "/run")?;
    layer = layer.file("bin/busybox", 0o755, (0, 0), &binary)?;
    // Hard links: a spec masks /bin/ls and expects the shell beside it to go on.
    for applet in listed.lines().filter(|name| *name != "busybox") {
        layer = layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
    }
    layer.file("usr/share/nginx/html/index.html", 0o644, (0, 0), b"stand-in\n")
}

fn accounts(layer: Layer, passwd: &str, group: &str) -> Result<Layer> {
    let passwd = format!(
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n{passwd}"
    );
    let group = format!("root:x:0:\nwww-data:x:33:\nusers:x:100:\nnogroup:x:65534:\n{group}");
    layer.file("etc/passwd", 0o644, (0, 0), passwd.as_bytes())?.file(
        "etc/group",
        0o644,
        (0, 0),
        group.as_bytes(),
    )
}

fn finish(layer: Layer, config: Value) -> Result<Image> {
    let mut full =
        json!({"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]});
    if let (Some(full), Some(given)) = (full.as_object_mut(), config.as_object()) {
        full.extend(given.clone());
    }
    image::build(
        vec![(layer, Packing::Gzip)],
        &full,
        Format::Docker,
        image::host_architecture(),
    )
}

fn busybox(config: Value) -> Result<Image> {
    finish(accounts(base()?, "", "")?, config)
}

fn labelled(label: &str) -> Result<Image> {
    busybox(json!({"Labels": {"stand-in": label}}))
}

/// User 1000 is a member of a group that only the image knows.
fn predefined_group() -> Result<Image> {
    let passwd = "default-user:x:1000:1000::/home/default-user:/bin/sh\n";
    let group = "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n";
    finish(accounts(base()?, passwd, group)?, json!({"User": "1000"}))
}

/// A setuid program of root's that prints its effective user.
fn effective_user() -> Result<Image> {
    let directory = tempfile::tempdir()?;
    let (source, program) = (directory.path().join("nnp.c"), directory.path().join("nnp"));
    std::fs::write(
        &source,
        "#include <stdio.h>\n#include <unistd.h>\nint main(void) { printf(\"Effective uid: %d\\n\", (int)geteuid()); }\n",
    )?;
    process::succeed(
        Command::new("cc")
            .args(["-static", "-O1", "-o"])
            .arg(&program)
            .arg(&source),
        Duration::from_secs(60),
    )
    .context("compiling a program for the image nonewprivs")?;
    let layer = base()?.file("usr/bin/nnp", 0o4755, (0, 0), &std::fs::read(&program)?)?;
    finish(
        accounts(layer, "app:x:1000:1000::/home:/bin/sh\n", "")?,
        json!({"Entrypoint": ["/usr/bin/nnp"], "Cmd": null}),
    )
}

/// A web server that logs its command line when it starts, as the suite expects of Apache's.
fn httpd() -> Result<Image> {
    let script = b"#!/bin/sh\necho \"Command line: 'httpd -D FOREGROUND'\"\nexec httpd -f -p 80 -h /usr/share/nginx/html\n";
    let layer = base()?.file("usr/bin/httpd-foreground", 0o755, (0, 0), script)?;
    finish(accounts(layer, "", "")?, json!({"Cmd": ["httpd-foreground"]}))
}

/// Debian's nginx with the libraries it is linked to, serving one page.
fn nginx(port: u16) -> Result<Image> {
    let binary = binaries::system("nginx")?;
    let listed = process::succeed(Command::new("ldd").arg(&binary), Duration::from_secs(10))?;
    let mut layer = base()?.directory("usr/sbin", 0o755)?.file(
        "usr/sbin/nginx",
        0o755,
        (0, 0),
        &std::fs::read(&binary)?,
    )?;
    // `name => /path (address)`, and the loader as `/path (address)`.
    for word in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        let bytes = std::fs::read(word).with_context(|| format!("library {word} of nginx"))?;
        layer = layer.file(word.trim_start_matches('/'), 0o755, (0, 0), &bytes)?;
    }
    let config = format!(
        "worker_processes 1;\npid /run/nginx.pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n  access_log off;\n  \
         client_body_temp_path /tmp/a;\n  proxy_temp_path /tmp/b;\n  fastcgi_temp_path /tmp/c;\n  \
         uwsgi_temp_path /tmp/d;\n  scgi_temp_path /tmp/e;\n  \
         server {{\n    listen {port};\n    root /usr/share/nginx/html;\n  }}\n}}\n"
    );
    let layer = layer.file("etc/nginx.conf", 0o644, (0, 0), config.as_bytes())?;
    let command = json!(["nginx", "-c", "/etc/nginx.conf", "-g", "daemon off;"]);
    finish(accounts(layer, "", "")?, json!({"Cmd": command}))
}
