//! Registries that are slow or stop: they stop no other pull, a transfer goes on where it stopped, and what nobody
//! waits for ends.

mod fixture;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use catamaran_images::{Error, ImageStore};
use fixture::fake::{Fake, Reply, Shelf};
use fixture::{Packing, Place, TestImage, digest, layer};

/// Two layers, the second of some length.
fn sample() -> TestImage {
    let big: String = (0..200_000u64)
        .map(|n| char::from(b' ' + (n.wrapping_mul(n + 7919) % 90) as u8))
        .collect();
    TestImage::oci(
        &[layer(&[("base", "1")]), layer(&[("big", &big)])],
        Packing::Plain,
    )
}

fn shelf(image: &TestImage) -> Shelf {
    let mut shelf = Shelf::default();
    shelf.image("app", "1", image);
    shelf
}

/// Serves `image`, the answers for its second layer as `change` makes them.
async fn serving(image: &TestImage, change: impl Fn(&mut Reply) + Send + Sync + 'static) -> Fake {
    let (content, big) = (shelf(image), digest(&image.blobs[1]));
    Fake::start(move |request| {
        let mut reply = content.answer(request);
        if request.path.contains(&big) {
            change(&mut reply);
        }
        reply
    })
    .await
}

async fn store(place: &Place, timeout: Duration) -> ImageStore {
    let mut config = place.config();
    config.progress_timeout = timeout;
    ImageStore::open(config).await.unwrap()
}

async fn eventually(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < within, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_registry_does_not_stop_the_pulls_from_others() {
    let mut slow = Shelf::default();
    for tag in 0..12 {
        let layers: Vec<Vec<u8>> = (0..4).map(|n| layer(&[(&format!("f{tag}-{n}"), "x")])).collect();
        slow.image("app", &tag.to_string(), &TestImage::oci(&layers, Packing::Gzip));
    }
    let fake = Fake::start(move |request| {
        let mut reply = slow.answer(request);
        // The configuration is JSON and starts with a brace; layers hang.
        if request.path.contains("/blobs/") && reply.body.first() != Some(&b'{') {
            reply.hang = Some(20);
        }
        reply
    })
    .await;
    let place = Place::new();
    let store = store(&place, Duration::from_secs(120)).await;
    let stuck: Vec<_> = (0..12)
        .map(|tag| {
            let (store, name) = (store.clone(), fake.name(&format!("app:{tag}")));
            tokio::spawn(async move { store.pull(&name, None).await })
        })
        .collect();
    // One transfer of each pull at least, then as many as the node allows: 12 common places (4 times 3).
    let transfers = || {
        let configurations = 12;
        fake.seen("/blobs/").len() - configurations.min(fake.seen("/blobs/").len())
    };
    eventually("all places are taken", Duration::from_secs(20), || {
        transfers() >= 24
    })
    .await;
    let good = TestImage::oci(&[layer(&[("good", "1")]), layer(&[("more", "2")])], Packing::Gzip);
    let fine = Fake::serving(shelf(&good)).await;
    let pulled = tokio::time::timeout(Duration::from_secs(10), store.pull(&fine.name("app:1"), None)).await;
    pulled.expect("stopped by pulls from another registry").unwrap();
    assert!(transfers() <= 24, "{} transfers at once", transfers());
    assert!(stuck.iter().all(|pull| !pull.is_finished()));
    for pull in stuck {
        pull.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_now_and_then_is_no_progress() {
    let image = sample();
    let fake = serving(&image, |reply| {
        reply.hang = Some(1000.min(reply.body.len()));
        reply.drip = Some(Duration::from_millis(100));
    })
    .await;
    let place = Place::new();
    let store = store(&place, Duration::from_millis(1200)).await;
    let started = Instant::now();
    let error = store.pull(&fake.name("app:1"), None).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
    assert!(store.list().is_empty());
    let mut paths = std::collections::BTreeSet::new();
    fixture::walk(&place.config().root.join("tmp"), &mut paths);
    assert!(paths.is_empty(), "{paths:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_stalls_once_is_resumed_from_the_only_registry() {
    let image = sample();
    let asked = AtomicUsize::new(0);
    let fake = serving(&image, move |reply| {
        if asked.fetch_add(1, Ordering::Relaxed) == 0 {
            reply.hang = Some(150_000);
        }
    })
    .await;
    let place = Place::new();
    let store = store(&place, Duration::from_millis(700)).await;
    let pulled = store.pull(&fake.name("app:1"), None).await.unwrap();
    assert_eq!(pulled.id, image.id());
    let requests = fake.seen(&digest(&image.blobs[1]));
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[1].headers["range"], "bytes=150000-");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_goes_on_from_the_layers_that_were_complete() {
    let image = sample();
    let mended = Arc::new(AtomicBool::new(false));
    let state = mended.clone();
    let fake = serving(&image, move |reply| {
        if !state.load(Ordering::Relaxed) {
            reply.hang = Some(0);
        }
    })
    .await;
    let place = Place::new();
    let store = store(&place, Duration::from_millis(500)).await;
    let name = fake.name("app:1");
    let error = store.pull(&name, None).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    let layers = place.config().root.join("layers");
    assert_eq!(std::fs::read_dir(&layers).unwrap().count(), 1);
    mended.store(true, Ordering::Relaxed);
    store.pull(&name, None).await.unwrap();
    assert_eq!(fake.seen(&digest(&image.blobs[0])).len(), 1);
    store.remove(&name).await.unwrap();
    assert_eq!(std::fs::read_dir(&layers).unwrap().count(), 0);
    // After a restart nobody would go on: what a broken pull kept is gone.
    mended.store(false, Ordering::Relaxed);
    store.pull(&name, None).await.unwrap_err();
    assert_eq!(std::fs::read_dir(&layers).unwrap().count(), 1);
    drop(store);
    drop(ImageStore::open(place.config()).await.unwrap());
    assert_eq!(std::fs::read_dir(&layers).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_nobody_waits_for_is_stopped() {
    let image = sample();
    let fake = serving(&image, |reply| reply.hang = Some(1000)).await;
    let place = Place::new();
    let store = store(&place, Duration::from_secs(300)).await;
    let name = fake.name("app:1");
    let waiter = tokio::spawn({
        let (store, name) = (store.clone(), name.clone());
        async move { store.pull(&name, None).await }
    });
    let tmp = place.config().root.join("tmp");
    let unpacking = || std::fs::read_dir(&tmp).unwrap().count();
    eventually("the transfer begins", Duration::from_secs(10), || {
        unpacking() == 1
    })
    .await;
    waiter.abort();
    // Who comes back soon finds the attempt still there.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let again = tokio::time::timeout(Duration::from_secs(1), store.pull(&name, None)).await;
    assert!(again.is_err(), "{again:?}");
    assert_eq!(fake.seen("manifests/1").len(), 1);
    eventually("the attempt ends", Duration::from_secs(90), || unpacking() == 0).await;
}
