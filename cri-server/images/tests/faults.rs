//! Registries that hang, lie, break off, redirect and refuse; full disks and hostile layers. After each failure the
//! store holds what it held before.

mod fixture;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use catamaran_images::{Auth, Error, ImageStore, ImagesConfig};
use fixture::fake::{Fake, Reply, Request, Shelf};
use fixture::{Packing, Place, TestImage, digest, layer, tell};

/// Incompressible text of about `size` bytes.
fn noise(size: usize) -> String {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let next = |state: &mut u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        char::from(b' ' + (*state % 90) as u8)
    };
    (0..size).map(|_| next(&mut state)).collect()
}

fn sample() -> TestImage {
    TestImage::oci(
        &[layer(&[("base", "1")]), layer(&[("big", &noise(600_000))])],
        Packing::Gzip,
    )
}

fn shelf(image: &TestImage) -> Shelf {
    let mut shelf = Shelf::default();
    shelf.image("app", "1", image);
    shelf
}

fn is_big_blob(image: &TestImage, request: &Request) -> bool {
    request.path.contains(&digest(&image.blobs[1]))
}

async fn store_with(place: &Place, change: impl FnOnce(&mut ImagesConfig)) -> ImageStore {
    let mut config = place.config();
    change(&mut config);
    ImageStore::open(config).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_never_answers_times_out() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let place = Place::new();
    let store = store_with(&place, |config| {
        config.progress_timeout = Duration::from_millis(1200)
    })
    .await;
    let before = place.listing();
    let started = Instant::now();
    let name = format!("127.0.0.1:{}/app:1", silent.local_addr().unwrap().port());
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { seconds: 1, .. }), "{error:?}");
    assert!((Duration::from_secs(1)..Duration::from_secs(5)).contains(&started.elapsed()));
    assert_eq!(place.listing(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_is_never_visible() {
    let image = sample();
    let other = TestImage::oci(&[layer(&[("other", "x")])], Packing::Gzip);
    for lie in ["manifest", "config", "blob", "same size", "longer", "shorter"] {
        let mut content = shelf(&image);
        let blob = format!("/v2/app/blobs/{}", digest(&image.blobs[1]));
        let config = format!("/v2/app/blobs/{}", digest(&image.config));
        let octets = "application/octet-stream";
        match lie {
            "manifest" => {
                let path = format!("/v2/app/manifests/{}", image.digest());
                content.put(&path, &other.manifest_type, &other.manifest);
            }
            "config" => content.put(&config, octets, &other.config),
            "blob" => content.put(&blob, octets, &other.blobs[0]),
            "longer" => content.put(&blob, octets, &[image.blobs[1].clone(), vec![0; 100]].concat()),
            "shorter" => content.put(&blob, octets, &image.blobs[1][..image.blobs[1].len() - 8]),
            _ => {
                let mut damaged = image.blobs[1].clone();
                damaged[300_000] ^= 1;
                content.put(&blob, octets, &damaged);
            }
        }
        let fake = Fake::serving(content).await;
        let place = Place::new();
        let store = place.open().await;
        let before = place.listing();
        let error = store
            .pull(&fake.name(&format!("app@{}", image.digest())), None)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::DigestMismatch { .. }), "{lie}: {error:?}");
        assert_eq!(place.listing(), before, "{lie}");
        assert!(store.list().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_transfer_is_resumed() {
    let image = sample();
    for ranges in [true, false] {
        let (content, cut) = (shelf(&image), image.clone());
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let fake = Fake::start(move |request| {
            let mut plain = request.clone();
            if !ranges {
                plain.headers.remove("range");
            }
            let mut reply = content.answer(&plain);
            if is_big_blob(&cut, request) && count.fetch_add(1, Ordering::Relaxed) < 2 {
                reply.cut = Some(if ranges {
                    150_000
                } else {
                    150_000 + 100_000 * asked_before(&count)
                });
            }
            reply
        })
        .await;
        let place = Place::new();
        let store = place.open().await;
        let pulled = store.pull(&fake.name("app:1"), None).await.unwrap();
        assert_eq!(pulled.id, image.id());
        assert_eq!(asked.load(Ordering::Relaxed), 3);
        let requests = fake.seen(&digest(&image.blobs[1]));
        assert!(!requests[0].headers.contains_key("range"));
        assert!(
            requests[1].headers["range"].starts_with("bytes=1"),
            "{:?}",
            requests[1].headers
        );
        let big = store.read_file(&pulled.id, "big", 1_000_000).unwrap().unwrap();
        assert_eq!(big.len(), 600_000);
    }
}

fn asked_before(count: &AtomicUsize) -> usize {
    count.load(Ordering::Relaxed) - 1
}

#[tokio::test(flavor = "multi_thread")]
async fn passing_failures_are_tried_again_and_lasting_ones_are_not() {
    let image = sample();
    for (status, tries) in [(503, 2), (429, 2), (500, 2)] {
        let content = shelf(&image);
        let count = AtomicUsize::new(0);
        let fake = Fake::start(move |request| {
            if request.path.contains("/manifests/") && count.fetch_add(1, Ordering::Relaxed) == 0 {
                return Reply::new(status, "busy");
            }
            content.answer(request)
        })
        .await;
        let place = Place::new();
        place.open().await.pull(&fake.name("app:1"), None).await.unwrap();
        assert_eq!(fake.seen("/manifests/").len(), tries);
    }
    let fake = Fake::start(|_| Reply::new(418, "")).await;
    let error = Place::new()
        .open()
        .await
        .pull(&fake.name("app:1"), None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert_eq!(fake.seen("").len(), 1);
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let error = Place::new()
        .open()
        .await
        .pull(&format!("127.0.0.1:{closed}/x"), None)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Unavailable { reason, .. } if reason.contains("refused")),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bearer_tokens_are_fetched_for_every_kind_of_credential() {
    let image = sample();
    let content = shelf(&image);
    let fake = Fake::start(move |request| {
        let given = request.headers.get("authorization").cloned().unwrap_or_default();
        let port = &request.headers["host"];
        if request.path.starts_with("/token") {
            let refresh = request.method == "POST"
                && request.body.contains("grant_type=refresh_token")
                && request.body.contains("refresh_token=refresh%2Fme");
            // user:secret
            if given == "Basic dXNlcjpzZWNyZXQ=" || refresh {
                assert!(
                    request.path.contains("scope=repository%3Aapp%3Apull") || refresh,
                    "{}",
                    request.path
                );
                return Reply::new(
                    200,
                    if refresh {
                        r#"{"access_token":"good"}"#
                    } else {
                        r#"{"token":"good"}"#
                    },
                );
            }
            return Reply::new(401, "{}");
        }
        if given == "Bearer good" {
            return content.answer(request);
        }
        let challenge =
            format!("Bearer realm=\"http://{port}/token\",service=\"test\",scope=\"repository:app:pull\"");
        Reply::new(401, "{}").header("WWW-Authenticate", &challenge)
    })
    .await;
    let name = fake.name("app:1");
    let basic = |password: &str| {
        Some(Auth::Basic {
            username: "user".into(),
            password: password.into(),
        })
    };
    for auth in [
        basic("secret"),
        Some(Auth::IdentityToken("refresh/me".into())),
        Some(Auth::RegistryToken("good".into())),
    ] {
        let place = Place::new();
        place.open().await.pull(&name, auth).await.unwrap();
    }
    let tokens = fake.seen("/token").len();
    assert_eq!(tokens, 2, "one token serves a whole pull");
    for auth in [
        None,
        basic("wrong"),
        Some(Auth::IdentityToken("x".into())),
        Some(Auth::RegistryToken("bad".into())),
    ] {
        let place = Place::new();
        let store = place.open().await;
        let before = place.listing();
        let error = store.pull(&name, auth).await.unwrap_err();
        assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
        assert_eq!(place.listing(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_are_tried_in_order_with_their_prefix_headers_and_ns() {
    let image = sample();
    let content = shelf(&image);
    let mirror = Fake::start(move |request| {
        let mut inner = request.clone();
        let Some(rest) = request.path.strip_prefix("/cache/v9") else {
            return Reply::new(404, "");
        };
        inner.path = format!("/v2{rest}");
        content.answer(&inner)
    })
    .await;
    let broken = Fake::start(|_| Reply::new(404, "")).await;
    let place = Place::new();
    place.hosts(
        "upstream.invalid",
        &format!(
            "server = \"http://127.0.0.1:1\"\n[host.\"http://127.0.0.1:{}\"]\n[host.\"http://127.0.0.1:{}/cache/v9\"]\n\
             override_path = true\ncapabilities = [\"pull\", \"resolve\"]\n\
             header = {{ x-node = \"n1\" }}\n",
            broken.port, mirror.port
        ),
    );
    let store = place.open().await;
    let pulled = store.pull("upstream.invalid/app:1", None).await.unwrap();
    assert_eq!(pulled.repo_tags, ["upstream.invalid/app:1"]);
    for request in mirror.seen("") {
        assert!(request.path.ends_with("?ns=upstream.invalid"), "{}", request.path);
        assert_eq!(request.headers["x-node"], "n1");
    }
    assert!(broken.seen("manifests/1").len() == 1 && !broken.seen("blobs").is_empty());
    // A host that may only pull is not asked for tags.
    let place = Place::new();
    place.hosts(
        "upstream.invalid",
        &format!(
            "server = \"http://127.0.0.1:1\"\n[host.\"http://127.0.0.1:{}\"]\ncapabilities = [\"pull\"]\n",
            broken.port
        ),
    );
    let error = place
        .open()
        .await
        .pull("upstream.invalid/other:1", None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(broken.seen("other").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_only_spoken_where_configured() {
    let image = sample();
    let fake = Fake::serving(shelf(&image)).await;
    let place = Place::new();
    let store = place.open().await;
    place.hosts(
        "secure.invalid",
        &format!("server = \"https://127.0.0.1:{}\"", fake.port),
    );
    let error = store.pull("secure.invalid/app:1", None).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    assert!(fake.log.lock().unwrap().is_empty(), "no plain request was sent");
    place.hosts(
        "plain.invalid",
        &format!("server = \"http://127.0.0.1:{}\"", fake.port),
    );
    store.pull("plain.invalid/app:1", None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_are_joined_and_share_layers() {
    let (base, big) = (
        layer(&[("base", &noise(300_000))]),
        layer(&[("big", &noise(400_000))]),
    );
    let one = TestImage::oci(&[base.clone(), big], Packing::Gzip);
    let two = TestImage::oci(&[base, layer(&[("two", "2")])], Packing::Gzip);
    let mut content = shelf(&one);
    content.image("app", "2", &two);
    let fake = Fake::serving(content).await;
    let place = Place::new();
    let store = place.open().await;
    let pulls = (0..10).map(|n| {
        let (store, name) = (
            store.clone(),
            fake.name(if n % 2 == 0 { "app:1" } else { "app:2" }),
        );
        tokio::spawn(async move { store.pull(&name, None).await.unwrap() })
    });
    for pull in pulls.collect::<Vec<_>>() {
        pull.await.unwrap();
    }
    assert_eq!(store.list().len(), 2);
    for blob in one.blobs.iter().chain(&two.blobs) {
        assert_eq!(fake.seen(&digest(blob)).len(), 1, "each layer is fetched once");
    }
    assert_eq!(fake.seen("manifests/1").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_when_another_that_fetched_its_layer_fails() {
    let base = layer(&[("base", &noise(500_000))]);
    let good = TestImage::oci(std::slice::from_ref(&base), Packing::Gzip);
    let bad = TestImage::oci(&[base, layer(&[("gone", "x")])], Packing::Gzip);
    let mut content = shelf(&good);
    content.image("app", "bad", &bad);
    let missing = digest(&bad.blobs[1]);
    let fake = Fake::start(move |request| {
        if request.path.contains(&missing) {
            Reply::new(404, "")
        } else {
            content.answer(request)
        }
    })
    .await;
    for _ in 0..5 {
        let place = Place::new();
        let store = place.open().await;
        let before = place.listing();
        let (failing, fine) = (fake.name("app:bad"), fake.name("app:1"));
        let (failed, pulled) = tokio::join!(store.pull(&failing, None), store.pull(&fine, None));
        assert!(matches!(failed, Err(Error::NotFound(_))), "{failed:?}");
        assert_eq!(pulled.unwrap().id, good.id());
        assert_eq!(
            std::fs::read_dir(place.config().root.join("layers"))
                .unwrap()
                .count(),
            1
        );
        store.remove(&fine).await.unwrap();
        assert_eq!(place.listing(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_and_odd_images_leave_nothing() {
    let escape = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.as_old_mut().name[..16].copy_from_slice(b"../../../escaped");
        header.set_cksum();
        builder.append(&header, &b"x"[..]).unwrap();
        builder.into_inner().unwrap()
    };
    let good = layer(&[("a", &noise(100_000))]);
    let hostile = TestImage::oci(&[good.clone(), escape], Packing::Gzip);
    let mut uneven = TestImage::oci(&[good.clone(), good.clone()], Packing::Gzip);
    let text = String::from_utf8(uneven.manifest.clone()).unwrap();
    let cut = text.rfind(",{").unwrap();
    uneven.manifest = format!("{}]}}", &text[..cut]).into_bytes();
    let mut garbage = TestImage::oci(
        &[b"this is no archive at all, and long enough".repeat(100)],
        Packing::Gzip,
    );
    garbage.manifest_type.clone_from(&hostile.manifest_type);
    for (image, reason) in [(hostile, "\"..\""), (uneven, "layers"), (garbage, "header")] {
        let fake = Fake::serving(shelf(&image)).await;
        let place = Place::new();
        let store = place.open().await;
        let before = place.listing();
        let error = store.pull(&fake.name("app:1"), None).await.unwrap_err();
        assert!(
            matches!(error, Error::Hostile(_)) && tell(&error).contains(reason),
            "{error:?}"
        );
        assert_eq!(place.listing(), before);
        assert!(!place.dir.path().join("escaped").exists());
    }
    let endless = Fake::start(|_| Reply::new(200, vec![b' '; 9 << 20])).await;
    let error = Place::new()
        .open()
        .await
        .pull(&endless.name("app:1"), None)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Hostile(_)), "{error:?}");
}
