//! Pulls from Debian's docker-registry.

mod fixture;

use std::collections::BTreeSet;

use catamaran_images::{Auth, Error};
use fixture::real::RealRegistry;
use fixture::{Packing, Place, TestImage, digest, layer};

#[tokio::test(flavor = "multi_thread")]
async fn images_of_all_kinds_are_pulled_listed_and_removed() {
    let registry = RealRegistry::start(None).await;
    let place = Place::new();
    let store = place.open().await;
    let empty = place.listing();
    let (base, top) = (
        layer(&[("etc/", ""), ("etc/passwd", "root")]),
        layer(&[("etc/group", "wheel")]),
    );
    for (tag, image) in [
        (
            "gzip",
            TestImage::oci(&[base.clone(), top.clone()], Packing::Gzip),
        ),
        (
            "zstd",
            TestImage::oci(&[base.clone(), layer(&[("z", "z")])], Packing::Zstd),
        ),
        ("plain", TestImage::oci(&[layer(&[("p", "p")])], Packing::Plain)),
        ("docker", TestImage::docker(&[base.clone(), top.clone()])),
    ] {
        registry.push("team/app", tag, &image).await;
        let name = registry.name(&format!("team/app:{tag}"));
        let pulled = store.pull(&name, None).await.unwrap();
        assert_eq!(pulled.id, image.id());
        assert_eq!(pulled.repo_tags, [name.as_str()]);
        let by_digest = registry.name(&format!("team/app@{}", image.digest()));
        assert_eq!(pulled.repo_digests, [by_digest.as_str()]);
        assert!(pulled.size > 0 && pulled.layers.len() == image.blobs.len());
        assert_eq!(pulled.created_ns, Some(1_577_934_245_000_000_000));
        for key in [
            &name,
            &by_digest,
            &pulled.id,
            &pulled.id[7..].to_owned(),
            &pulled.id[..19].to_owned(),
        ] {
            assert_eq!(
                store.get(key).map(|found| found.id.clone()),
                Some(pulled.id.clone()),
                "{key}"
            );
        }
    }
    assert_eq!(store.list().len(), 4);
    let gzip = store.get(&registry.name("team/app:gzip")).unwrap();
    let inner = gzip.config.config().as_ref().unwrap();
    assert_eq!(inner.user().as_deref(), Some("7:8"));
    assert_eq!(
        store.read_file(&gzip.id, "/etc/group", 100).unwrap().as_deref(),
        Some(&b"wheel"[..])
    );
    assert_eq!(
        store.read_file(&gzip.id, "/etc/passwd", 100).unwrap().as_deref(),
        Some(&b"root"[..])
    );
    // The shared base lies there once.
    let layers: BTreeSet<String> = store
        .list()
        .iter()
        .flat_map(|image| image.layers.clone())
        .collect();
    assert_eq!(
        std::fs::read_dir(place.config().root.join("layers"))
            .unwrap()
            .count(),
        layers.len()
    );
    let usage = store.usage().unwrap();
    assert!(usage.used_bytes > 0 && usage.inodes_used > layers.len() as u64);
    // All of it is there after a restart.
    drop(store);
    let store = place.open().await;
    assert_eq!(store.list().len(), 4);
    assert_eq!(
        store.read_file(&gzip.id, "/etc/group", 100).unwrap().as_deref(),
        Some(&b"wheel"[..])
    );
    for image in store.list() {
        store.remove(&image.id).await.unwrap();
        store.remove(&image.id).await.unwrap();
    }
    assert_eq!(place.listing(), empty, "nothing is left of removed images");
    assert!(store.get(&gzip.id).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platform_is_chosen_and_both_references_work() {
    let registry = RealRegistry::start(None).await;
    let place = Place::new();
    let store = place.open().await;
    let ours = TestImage::oci(&[layer(&[("a", "amd64")])], Packing::Gzip);
    let theirs = TestImage::oci(&[layer(&[("a", "arm64")])], Packing::Gzip);
    for docker in [false, true] {
        let repository = if docker { "list" } else { "index" };
        registry.push(repository, "one", &theirs).await;
        registry.push(repository, "two", &ours).await;
        let (index, media_type) = TestImage::index(&[(&theirs, "arm64"), (&ours, "amd64")], docker);
        registry.manifest(repository, "multi", &media_type, &index).await;
        let by_digest = registry.name(&format!("{repository}@{}", digest(&index)));
        for name in [registry.name(&format!("{repository}:multi")), by_digest.clone()] {
            let pulled = store.pull(&name, None).await.unwrap();
            assert_eq!(pulled.id, ours.id());
            assert!(
                pulled.repo_digests.contains(&by_digest),
                "the digest of what the tag names"
            );
        }
        let (foreign, media_type) = TestImage::index(&[(&theirs, "arm64")], docker);
        registry
            .manifest(repository, "foreign", &media_type, &foreign)
            .await;
        let error = store
            .pull(&registry.name(&format!("{repository}:foreign")), None)
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::NotFound(what) if what.contains("arm64")),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves_and_missing_things_are_named() {
    let registry = RealRegistry::start(None).await;
    let place = Place::new();
    let store = place.open().await;
    let (old, new) = (
        TestImage::oci(&[layer(&[("v", "1")])], Packing::Gzip),
        TestImage::oci(&[layer(&[("v", "2")])], Packing::Gzip),
    );
    registry.push("app", "latest", &old).await;
    let name = registry.name("app");
    store.pull(&name, None).await.unwrap();
    registry.push("app", "latest", &new).await;
    store.pull(&name, None).await.unwrap();
    assert_eq!(store.get(&name).unwrap().id, new.id());
    let left = store.get(&old.id()).unwrap();
    assert!(left.repo_tags.is_empty() && left.repo_digests.len() == 1);
    let before = place.listing();
    for missing in ["app:nope", "nope:latest", &format!("app@{}", digest(b"nope"))] {
        let error = store.pull(&registry.name(missing), None).await.unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{missing}: {error:?}");
        assert!(error.to_string().contains(&registry.port.to_string()), "{error}");
    }
    assert_eq!(place.listing(), before);
    // Removing the image takes all its names.
    store.remove(&name).await.unwrap();
    assert!(store.get(&new.id()).is_none() && store.get(&old.id()).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_authentication_by_request_and_by_file() {
    let registry = RealRegistry::start(Some(("user", "secret"))).await;
    let image = TestImage::oci(&[layer(&[("a", "b")])], Packing::Gzip);
    registry.push("private", "1", &image).await;
    let place = Place::new();
    let store = place.open().await;
    let empty = place.listing();
    let name = registry.name("private:1");
    let auth = |password: &str| {
        Some(Auth::Basic {
            username: "user".into(),
            password: password.into(),
        })
    };
    for wrong in [None, auth("wrong"), Some(Auth::RegistryToken("x".into()))] {
        let error = store.pull(&name, wrong).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
        assert!(!error.to_string().contains("wrong"));
    }
    assert_eq!(place.listing(), empty);
    assert_eq!(store.pull(&name, auth("secret")).await.unwrap().id, image.id());
    store.remove(&name).await.unwrap();
    drop(store);
    let file = place.dir.path().join("config.json");
    std::fs::write(
        &file,
        format!(
            r#"{{"auths":{{"127.0.0.1:{}":{{"auth":"dXNlcjpzZWNyZXQ="}}}}}}"#,
            registry.port
        ),
    )
    .unwrap();
    let config = catamaran_images::ImagesConfig {
        docker_config: Some(file),
        pinned: vec![name.clone()],
        ..place.config()
    };
    let store = catamaran_images::ImageStore::open(config).await.unwrap();
    let pulled = store.pull(&name, None).await.unwrap();
    assert!(pulled.id == image.id() && pulled.pinned);
}

/// Runs openssl in a directory.
fn openssl(dir: &std::path::Path, arguments: &str) {
    let output = std::process::Command::new("openssl")
        .args(arguments.split(' '))
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_own_authority_and_client_certificates() {
    let certificates = tempfile::tempdir().unwrap();
    let dir = certificates.path();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    openssl(
        dir,
        &format!("req -x509 {key} -keyout ca.key -out ca.crt -subj /CN=test-ca"),
    );
    for (name, extension) in [
        ("server", "subjectAltName=IP:127.0.0.1"),
        ("client", "extendedKeyUsage=clientAuth"),
    ] {
        std::fs::write(dir.join("ext"), extension).unwrap();
        openssl(
            dir,
            &format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}").replace(" -days 2", ""),
        );
        openssl(
            dir,
            &format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out {name}.crt"
            ),
        );
    }
    let file = |name: &str| dir.join(name).display().to_string();
    let tls = |more: &str| {
        format!(
            ", tls: {{certificate: {}, key: {}{more}}}",
            file("server.crt"),
            file("server.key")
        )
    };
    let open = RealRegistry::start_with(None, &tls("")).await;
    let strict = RealRegistry::start_with(None, &tls(&format!(", clientcas: [{}]", file("ca.crt")))).await;
    let place = Place::new();
    let store = place.open().await;
    // The registries are empty: an answer at all, "not found", shows that TLS was set up.
    let attempt = |port: u16, settings: String| {
        place.hosts(
            "tls.test",
            &format!("server = \"https://127.0.0.1:{port}\"\n{settings}"),
        );
        let store = store.clone();
        async move { store.pull("tls.test/app:1", None).await.unwrap_err() }
    };
    let ca = format!("ca = {:?}\n", file("ca.crt"));
    let client = format!(
        "client = [[{:?}, {:?}]]\n",
        file("client.crt"),
        file("client.key")
    );
    let error = attempt(open.port, String::new()).await;
    assert!(
        matches!(&error, Error::Unavailable { reason, .. } if reason.contains("ertificate")),
        "{error:?}"
    );
    for (port, settings) in [
        (open.port, ca.clone()),
        (open.port, "skip_verify = true\n".to_owned()),
        (strict.port, format!("{ca}{client}")),
    ] {
        let error = attempt(port, settings.clone()).await;
        assert!(matches!(error, Error::NotFound(_)), "{settings}: {error:?}");
    }
    let error = attempt(strict.port, ca).await;
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    let error = attempt(open.port, "ca = \"/nonexistent.crt\"\n".to_owned()).await;
    assert!(
        matches!(&error, Error::Config { path, .. } if path == "/nonexistent.crt"),
        "{error:?}"
    );
}
