//! A store whose file system is full: what cannot be done says so, and what needs no room works.

mod fixture;

use catamaran_images::{Error, ImageStore};
use fixture::fake::{Fake, Shelf};
use fixture::{Packing, Place, TestImage, layer};

/// A small file system of its own, unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount(
            "tmpfs",
            dir.path(),
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(&*options),
        )
        .unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_says_so_and_leaves_nothing() {
    let files: Vec<String> = (0..400).map(|n| format!("f{n}")).collect();
    let many: Vec<(&str, &str)> = files.iter().map(|name| (name.as_str(), "")).collect();
    for (options, image) in [
        (
            "size=6m",
            TestImage::oci(&[layer(&[("huge", &"x".repeat(20 << 20))])], Packing::Gzip),
        ),
        (
            "size=64m,nr_inodes=200",
            TestImage::oci(&[layer(&many)], Packing::Gzip),
        ),
    ] {
        let small = TestImage::oci(&[layer(&[("small", "x")])], Packing::Gzip);
        let mut content = Shelf::default();
        content.image("app", "1", &image);
        content.image("app", "small", &small);
        let fake = Fake::serving(content).await;
        let disk = SmallDisk::new(options);
        let place = Place::new();
        let store = open_on(&disk, &place).await;
        let listing = || {
            let mut paths = std::collections::BTreeSet::new();
            fixture::walk(disk.0.path(), &mut paths);
            paths
        };
        let before = listing();
        let error = store.pull(&fake.name("app:1"), None).await.unwrap_err();
        assert!(matches!(error, Error::NoSpace { .. }), "{options}: {error:?}");
        assert_eq!(listing(), before);
        store.pull(&fake.name("app:small"), None).await.unwrap();
        drop(store);
    }
}

async fn open_on(disk: &SmallDisk, place: &Place) -> ImageStore {
    let mut config = place.config();
    config.root = disk.0.path().join("images");
    ImageStore::open(config).await.unwrap()
}

/// Writes until nothing more fits.
fn fill(disk: &SmallDisk) {
    use std::io::Write;
    let mut file = std::fs::File::create(disk.0.path().join("fill")).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    let error = std::fs::write(disk.0.path().join("more"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
}

/// Both after an orderly end and after a kill, which leaves the database open.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_on_a_full_disk_opens() {
    for killed in [false, true] {
        let image = TestImage::oci(&[layer(&[("small", "x")])], Packing::Gzip);
        let mut content = Shelf::default();
        content.image("app", "1", &image);
        let fake = Fake::serving(content).await;
        let (disk, place) = (SmallDisk::new("size=8m"), Place::new());
        let store = open_on(&disk, &place).await;
        store.pull(&fake.name("app:1"), None).await.unwrap();
        let database = disk.0.path().join("images/metadata.redb");
        let as_killed = std::fs::read(&database).unwrap();
        drop(store);
        if killed {
            std::fs::write(&database, as_killed).unwrap();
        }
        fill(&disk);
        let store = open_on(&disk, &place).await;
        assert_eq!(store.list().len(), 1, "killed: {killed}");
        assert!(store.get(&fake.name("app:1")).is_some());
        drop(store);
    }
}
