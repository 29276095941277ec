//! Snapshots mounted as a shim mounts them, leases, and what a crash leaves.

mod fixture;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use catamaran_images::{Error, Image, ImageStore, RootfsMount};
use fixture::fake::{Fake, Shelf};
use fixture::{Packing, Place, TestImage, layer};
use rustix::mount::{MountFlags, UnmountFlags};

/// A mount that goes with the test.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: &Path, mounts: &[RootfsMount]) -> Self {
        std::fs::create_dir_all(at).unwrap();
        assert_eq!(mounts.len(), 1);
        let mount = &mounts[0];
        if mount.fs_type == "bind" {
            rustix::mount::mount_bind(mount.source.as_str(), at).unwrap();
        } else {
            let read_only = mount.options.iter().any(|option| option == "ro");
            let options: Vec<&str> = mount
                .options
                .iter()
                .map(String::as_str)
                .filter(|option| *option != "ro")
                .collect();
            let options = std::ffi::CString::new(options.join(",")).unwrap();
            assert!(options.as_bytes_with_nul().len() <= 4096);
            let flags = if read_only {
                MountFlags::RDONLY
            } else {
                MountFlags::empty()
            };
            rustix::mount::mount(
                mount.source.as_str(),
                at,
                mount.fs_type.as_str(),
                flags,
                Some(&*options),
            )
            .unwrap();
        }
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

async fn pulled(store: &ImageStore, image: &TestImage) -> Image {
    let mut shelf = Shelf::default();
    shelf.image("app", "1", image);
    let fake = Fake::serving(shelf).await;
    store.pull(&fake.name("app:1"), None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_sees_the_layers_merged_and_writes_to_its_own() {
    let place = Place::new();
    let store = place.open().await;
    let image = TestImage::oci(
        &[
            layer(&[
                ("etc/", ""),
                ("etc/old", "1"),
                ("etc/kept", "1"),
                ("opt/", ""),
                ("opt/a", "1"),
            ]),
            layer(&[("etc/.wh.old", ""), ("opt/.wh..wh..opq", ""), ("opt/b", "2")]),
            layer(&[]),
        ],
        Packing::Gzip,
    );
    let image = pulled(&store, &image).await;
    let snapshot = store.prepare(&image.id, "c1", false).await.unwrap();
    let root = place.dir.path().join("rootfs");
    {
        let _mounted = Mounted::new(&root, &snapshot.mounts);
        assert!(!root.join("etc/old").exists() && root.join("etc/kept").exists());
        assert!(!root.join("opt/a").exists() && root.join("opt/b").exists());
        std::fs::write(root.join("etc/new"), "x".repeat(100_000)).unwrap();
    }
    assert!(snapshot.upper.join("etc/new").exists());
    let usage = store.snapshot_usage("c1").unwrap();
    assert!(usage.bytes >= 100_000 && usage.inodes >= 3, "{usage:?}");
    std::fs::write(snapshot.upper.join("more"), "x").unwrap();
    assert_eq!(
        store.snapshot_usage("c1").unwrap(),
        usage,
        "measured a moment ago"
    );
    assert_eq!(
        store.prepare(&image.id, "c1", false).await.unwrap(),
        snapshot,
        "asked again, answered the same"
    );
    assert_eq!(store.snapshots(), ["c1"]);
    store.release("c1").await.unwrap();
    store.release("c1").await.unwrap();
    assert!(store.snapshots().is_empty());
    assert_eq!(std::fs::read_dir(place.config().snapshots).unwrap().count(), 0);
    assert!(matches!(store.snapshot_usage("c1"), Err(Error::NotFound(_))));
    assert!(matches!(
        store.prepare("sha256:00", "c2", false).await,
        Err(Error::NotFound(_))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_directory_has_the_images_owner_and_mode() {
    let place = Place::new();
    let store = place.open().await;
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    header.set_mode(0o1710);
    header.set_uid(11);
    header.set_gid(12);
    header.set_mtime(0);
    builder.append_data(&mut header, "./", std::io::empty()).unwrap();
    let described = builder.into_inner().unwrap();
    // The upper layer does not describe the root: it keeps what is below.
    let image = TestImage::oci(&[described, layer(&[("f", "x")])], Packing::Zstd);
    let image = pulled(&store, &image).await;
    let snapshot = store.prepare(&image.id, "c", true).await.unwrap();
    let root = place.dir.path().join("rootfs");
    let _mounted = Mounted::new(&root, &snapshot.mounts);
    let data = std::fs::metadata(&root).unwrap();
    assert_eq!(
        (data.permissions().mode() & 0o7777, data.uid(), data.gid()),
        (0o1710, 11, 12)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_in_use_survive_their_image_and_a_restart() {
    let place = Place::new();
    let store = place.open().await;
    let empty = place.listing();
    let image = TestImage::oci(&[layer(&[("a", "1")]), layer(&[("b", "2")])], Packing::Gzip);
    let image = pulled(&store, &image).await;
    let snapshot = store.prepare(&image.id, "c1", false).await.unwrap();
    store.prepare_image_mount(&image.id, "volume").await.unwrap();
    store.remove(&image.id).await.unwrap();
    assert!(store.list().is_empty());
    drop(store);
    let store = place.open().await;
    assert_eq!(store.snapshots(), ["c1"]);
    let root = place.dir.path().join("rootfs");
    {
        let _mounted = Mounted::new(&root, &snapshot.mounts);
        assert_eq!(std::fs::read(root.join("b")).unwrap(), b"2");
    }
    store.release("c1").await.unwrap();
    assert_eq!(
        std::fs::read_dir(place.config().root.join("layers"))
            .unwrap()
            .count(),
        2,
        "the volume holds them"
    );
    store.release("volume").await.unwrap();
    assert_eq!(place.listing(), empty);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_keeps_to_one_image() {
    let place = Place::new();
    let store = place.open().await;
    let one = pulled(&store, &TestImage::oci(&[layer(&[("a", "1")])], Packing::Gzip)).await;
    let two = pulled(&store, &TestImage::oci(&[layer(&[("a", "2")])], Packing::Gzip)).await;
    store.prepare(&one.id, "c", false).await.unwrap();
    let error = store.prepare(&two.id, "c", false).await.unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error:?}");
    for bad in ["", "..", "a/b", ".hidden"] {
        assert!(store.prepare(&one.id, bad, false).await.is_err(), "{bad:?}");
    }
    assert_eq!(store.snapshots(), ["c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_layers_and_no_layers_can_be_mounted() {
    let place = Place::new();
    let store = place.open().await;
    let layers: Vec<Vec<u8>> = (0..127)
        .map(|n| layer(&[(&format!("f{n}"), "x"), ("last", &n.to_string())]))
        .collect();
    let image = pulled(&store, &TestImage::oci(&layers, Packing::Gzip)).await;
    let snapshot = store.prepare(&image.id, "many", false).await.unwrap();
    let root = place.dir.path().join("rootfs");
    {
        let _mounted = Mounted::new(&root, &snapshot.mounts);
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 128);
        assert_eq!(std::fs::read(root.join("last")).unwrap(), b"126");
    }
    let volume = store.prepare_image_mount(&image.id, "view").await.unwrap();
    {
        let _mounted = Mounted::new(&root, &volume);
        assert!(
            std::fs::write(root.join("new"), "x").is_err(),
            "a view is read-only"
        );
    }
    let scratch = pulled(&store, &TestImage::oci(&[], Packing::Gzip)).await;
    let snapshot = store.prepare(&scratch.id, "scratch", false).await.unwrap();
    let _mounted = Mounted::new(&root, &snapshot.mounts);
    std::fs::write(root.join("new"), "x").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_leaves_is_removed_at_the_next_start() {
    let place = Place::new();
    let store = place.open().await;
    let image = pulled(&store, &TestImage::oci(&[layer(&[("a", "1")])], Packing::Gzip)).await;
    store.prepare(&image.id, "c1", false).await.unwrap();
    let clean = place.listing();
    drop(store);
    let (root, snapshots) = (place.config().root, place.config().snapshots);
    for path in ["tmp/9/fs/half", "layers/zz/fs/unrecorded"] {
        std::fs::create_dir_all(root.join(path)).unwrap();
    }
    std::fs::write(
        root.join("content").join(format!("sha256-{}", "0".repeat(64))),
        "x",
    )
    .unwrap();
    for path in [".new-1-c2/upper", ".gone-2-c3/upper"] {
        std::fs::create_dir_all(snapshots.join(path)).unwrap();
    }
    let store = place.open().await;
    assert_eq!(place.listing(), clean);
    assert_eq!(store.list().len(), 1);
    drop(store);
    // An image whose layer or configuration is gone is not half there.
    let layers = root.join("layers");
    let name = std::fs::read_dir(&layers)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    std::fs::remove_dir_all(name).unwrap();
    let store = place.open().await;
    assert!(store.list().is_empty());
    assert_eq!(store.snapshots(), ["c1"]);
    store.release("c1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_store_at_a_time() {
    let place = Place::new();
    let _store = place.open().await;
    assert!(ImageStore::open(place.config()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_root_enters_the_store() {
    let place = Place::new();
    for directory in [place.config().root, place.config().snapshots] {
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let _store = place.open().await;
    for directory in [place.config().root, place.config().snapshots] {
        assert_eq!(
            std::fs::metadata(directory).unwrap().permissions().mode() & 0o7777,
            0o700
        );
    }
}
