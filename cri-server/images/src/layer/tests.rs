//! Tests of the unpacker against a real file system; they need root, as owners and whiteouts do.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::*;

/// An archive under construction; names go in unchecked.
pub(super) struct Archive(Builder<Vec<u8>>);

impl Archive {
    pub(super) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, size: u64, mode: u32) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000);
        header
    }

    fn name(header: &mut Header, path: &str, link: &str) {
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
    }

    pub(super) fn add(mut self, kind: EntryType, path: &str, link: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = Self::header(kind, data.len() as u64, mode);
        Self::name(&mut header, path, link);
        self.0.append(&header, data).unwrap();
        self
    }

    pub(super) fn dir(self, path: &str, mode: u32) -> Self {
        self.add(EntryType::Directory, path, "", mode, b"")
    }

    pub(super) fn file(self, path: &str, data: &str) -> Self {
        self.add(EntryType::Regular, path, "", 0o644, data.as_bytes())
    }

    pub(super) fn symlink(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Symlink, path, target, 0o777, b"")
    }

    pub(super) fn link(self, path: &str, target: &str) -> Self {
        self.add(EntryType::Link, path, target, 0o644, b"")
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn expected(blob: &[u8], plain: &[u8]) -> Expected {
    Expected {
        blob: Digest::sha256(blob),
        size: blob.len() as u64,
        diff_id: Digest::sha256(plain),
    }
}

/// A directory with the layer at `layer` and, beside it, something that must not change.
pub(super) struct Place {
    pub(super) dir: tempfile::TempDir,
}

impl Place {
    pub(super) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("outside"), "untouched").unwrap();
        std::fs::create_dir(dir.path().join("outdir")).unwrap();
        Self { dir }
    }

    pub(super) fn layer(&self) -> PathBuf {
        self.dir.path().join("layer")
    }

    pub(super) fn unpack(&self, archive: &[u8]) -> Result<Unpacked> {
        self.unpack_within(archive, Limits::default())
    }

    pub(super) fn unpack_within(&self, archive: &[u8], limits: Limits) -> Result<Unpacked> {
        unpack_blob(archive, &expected(archive, archive), &self.layer(), limits)
    }

    /// What lies outside the layer, with its times.
    pub(super) fn outside(&self) -> BTreeMap<PathBuf, (u64, i64, u32, Vec<u8>)> {
        let mut seen = BTreeMap::new();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let path = entry.unwrap().path();
            if path == self.layer() {
                continue;
            }
            let data = path.symlink_metadata().unwrap();
            let content = std::fs::read(&path).unwrap_or_default();
            seen.insert(path, (data.ino(), data.mtime(), data.mode(), content));
        }
        seen
    }
}

fn refusal(archive: &[u8]) -> String {
    let place = Place::new();
    let before = place.outside();
    let error = place.unpack(archive).unwrap_err();
    assert!(matches!(error, Error::Hostile(_)), "{error:?}");
    assert_eq!(place.outside(), before);
    error.to_string()
}

fn stat(path: impl AsRef<Path>) -> std::fs::Metadata {
    std::fs::symlink_metadata(path).unwrap()
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0u8; 8];
    rustix::fs::lgetxattr(path, rooted::OPAQUE, &mut value).is_ok_and(|length| &value[..length] == b"y")
}

fn is_hidden(path: &Path) -> bool {
    let data = stat(path);
    data.file_type().is_char_device() && data.rdev() == 0
}

#[test]
fn every_kind_of_entry_is_unpacked_as_it_is() {
    let place = Place::new();
    let mut archive = Archive::new().dir("./", 0o711).dir("bin", 0o755);
    let mut header = Archive::header(EntryType::Regular, 4, 0o4755);
    header.set_uid(1000);
    header.set_gid(2000);
    Archive::name(&mut header, "bin/su", "");
    archive.0.append(&header, &b"tool"[..]).unwrap();
    for (name, kind) in [("tty", EntryType::Char), ("disk", EntryType::Block)] {
        let mut header = Archive::header(kind, 0, 0o620);
        header.set_device_major(4).unwrap();
        header.set_device_minor(7).unwrap();
        Archive::name(&mut header, name, "");
        archive.0.append(&header, &b""[..]).unwrap();
    }
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let archive = archive
        .symlink("sh", "/bin/su")
        .link("bin/su2", "bin/su")
        .add(EntryType::Fifo, "pipe", "", 0o600, b"")
        .dir("tmp", 0o1777)
        .pax(&[
            ("SCHILY.xattr.security.capability", &capability),
            ("SCHILY.xattr.user.note", b"hello"),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("mtime", b"123.25"),
        ])
        .file("bin/ping", "ping");
    let unpacked = place.unpack(&archive.bytes()).unwrap();
    assert_eq!(
        unpacked,
        Unpacked {
            implied: vec![],
            opaque_root: false,
            empty: false
        }
    );
    let at = |name: &str| place.layer().join(name);
    assert_eq!(stat(at("")).mode() & 0o7777, 0o711);
    let su = stat(at("bin/su"));
    assert_eq!(
        (su.uid(), su.gid(), su.mode() & 0o7777, su.mtime()),
        (1000, 2000, 0o4755, 1_000_000)
    );
    assert_eq!(su.ino(), stat(at("bin/su2")).ino());
    assert_eq!(std::fs::read_link(at("sh")).unwrap(), Path::new("/bin/su"));
    assert_eq!(stat(at("sh")).mtime(), 1_000_000);
    assert!(stat(at("tty")).file_type().is_char_device() && stat(at("disk")).file_type().is_block_device());
    assert_eq!(stat(at("tty")).rdev(), rustix::fs::makedev(4, 7));
    assert!(stat(at("pipe")).file_type().is_fifo());
    assert_eq!(stat(at("tmp")).permissions().mode() & 0o7777, 0o1777);
    assert_eq!(
        stat(at("bin")).mtime(),
        1_000_000,
        "a directory's time survives its entries"
    );
    let ping = stat(at("bin/ping"));
    assert_eq!((ping.mtime(), ping.mtime_nsec()), (123, 250_000_000));
    let mut value = [0u8; 32];
    let length = rustix::fs::lgetxattr(at("bin/ping"), "security.capability", &mut value).unwrap();
    assert_eq!(value[..length], capability);
    let length = rustix::fs::lgetxattr(at("bin/ping"), "user.note", &mut value).unwrap();
    assert_eq!(&value[..length], b"hello");
    assert!(rustix::fs::lgetxattr(at("bin/ping"), "trusted.overlay.redirect", &mut value).is_err());
}

#[test]
fn whiteouts_become_what_overlayfs_understands() {
    let place = Place::new();
    let archive = Archive::new()
        .dir("a", 0o755)
        .file("a/.wh.gone", "")
        .dir("b", 0o750)
        .file("b/.wh..wh..opq", "")
        .file("b/kept", "x")
        .file("c/.wh.d", "")
        .file("c/d/new", "y")
        .file("e/new", "z")
        .file(".wh.e", "")
        .file(".wh..wh.plnk", "");
    let unpacked = place.unpack(&archive.bytes()).unwrap();
    let at = |name: &str| place.layer().join(name);
    assert!(is_hidden(&at("a/gone")));
    assert!(is_opaque(&at("b")) && at("b/kept").exists() && !at("b/.wh..wh..opq").exists());
    assert!(
        is_opaque(&at("c/d")) && at("c/d/new").exists(),
        "hidden below, made anew"
    );
    assert!(
        is_opaque(&at("e")) && at("e/new").exists(),
        "made first, hidden below after"
    );
    assert!(!is_opaque(&at("a")) && !at(".wh..wh.plnk").exists());
    let implied: Vec<String> = unpacked
        .implied
        .iter()
        .map(|p| String::from_utf8_lossy(p).into())
        .collect();
    assert_eq!(implied, ["", "c", "c/d", "e"]);
    let root = Place::new()
        .unpack(&Archive::new().file(".wh..wh..opq", "").bytes())
        .unwrap();
    assert!(root.opaque_root);
}

#[test]
fn names_count_from_the_layers_root_and_links_stay_inside() {
    let place = Place::new();
    let before = place.outside();
    let archive = Archive::new()
        .file("/etc/absolute", "1")
        .symlink("lib", "/usr/lib")
        .file("lib/through", "2")
        .symlink("rel/up", "../var")
        .file("rel/up/through", "3")
        .link("hard", "/etc/absolute");
    place.unpack(&archive.bytes()).unwrap();
    let read = |name: &str| std::fs::read_to_string(place.layer().join(name)).unwrap();
    assert_eq!(
        (read("etc/absolute"), read("usr/lib/through")),
        ("1".into(), "2".into())
    );
    assert_eq!((read("var/through"), read("hard")), ("3".into(), "1".into()));
    assert_eq!(place.outside(), before);
}

#[test]
fn the_last_entry_of_a_name_wins() {
    let place = Place::new();
    let archive = Archive::new()
        .dir("d", 0o755)
        .file("d/deep/file", "old")
        .symlink("d", "../outdir")
        .file("f", "old")
        .dir("f", 0o700)
        .file("f/x", "new")
        .file("g", "shared")
        .link("h", "g")
        .file("g", "own");
    place.unpack(&archive.bytes()).unwrap();
    assert!(stat(place.layer().join("d")).is_symlink());
    assert_eq!(std::fs::read(place.layer().join("f/x")).unwrap(), b"new");
    assert_eq!(
        std::fs::read(place.layer().join("h")).unwrap(),
        b"shared",
        "no write through a hard link"
    );
    assert_eq!(
        std::fs::read_dir(place.dir.path().join("outdir"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn hostile_archives_are_refused() {
    let file = || Archive::new();
    for (archive, reason) in [
        (file().file("../outside", "x"), "\"..\""),
        (file().file("a/../../outside", "x"), "\"..\""),
        (
            file().symlink("s", "../..").file("s/outside", "x"),
            "leaves the layer",
        ),
        (
            file().symlink("s", "../outdir").file("s/x", "x"),
            "leaves the layer",
        ),
        (
            file().symlink("a", "b").symlink("b", "a").file("a/x", "x"),
            "symbolic links in one path",
        ),
        (file().link("l", "../outside"), "\"..\""),
        (file().link("l", "missing"), "does not have"),
        (file().dir("d", 0o755).link("l", "d"), "no file"),
        (
            file().symlink("s", "../").link("l", "s/outside"),
            "leaves the layer",
        ),
        (file().file("f", "x").link("f", "f"), "to itself"),
        (file().file("f", "x").file("f/x", "x"), "used as a directory"),
        (file().file("a/.wh...", "x"), "whiteout"),
        (file().file(".wh.", "x"), "whiteout"),
        (file().symlink("s", ""), "target"),
        (file().file("./", "x"), ""),
        (file().pax(&[("path", &b"a\0b"[..])]).file("x", ""), "zero byte"),
        (
            file().pax(&[("path", "n".repeat(300).as_bytes())]).file("x", ""),
            "longer than 255",
        ),
        (
            file()
                .pax(&[("path", "d/".repeat(300).as_bytes())])
                .dir("x", 0o755),
            "deeper than 255",
        ),
        (
            file()
                .pax(&[("path", "dir/".repeat(2000).as_bytes())])
                .dir("x", 0o755),
            "longer than 4095",
        ),
        (
            file().pax(&[("size", &b"9223372036854775807"[..])]).file("x", ""),
            "63 bits",
        ),
        (
            file().pax(&[("uid", &b"4294967296"[..])]).file("x", ""),
            "32 bits",
        ),
    ] {
        let said = if reason.is_empty() {
            continue;
        } else {
            refusal(&archive.bytes())
        };
        assert!(said.contains(reason), "{reason}: {said}");
    }
}

#[test]
fn depth_through_links_is_bounded() {
    // Each link doubles the depth reached by a short name.
    let deep = vec!["d"; 200].join("/");
    let mut archive = Archive::new().pax(&[("path", deep.as_bytes())]).dir("x", 0o755);
    archive = archive.pax(&[("linkpath", deep.as_bytes())]).symlink("s", "x");
    let through = format!("s/{deep}");
    let archive = archive
        .pax(&[("path", through.as_bytes())])
        .dir("x", 0o755)
        .bytes();
    assert!(refusal(&archive).contains("too deep"));
}

#[test]
fn sizes_and_counts_are_bounded() {
    let limits = Limits {
        entries: 3,
        bytes: 1 << 20,
    };
    let many = (0..5)
        .fold(Archive::new(), |archive, n| archive.file(&format!("f{n}"), ""))
        .bytes();
    let said = Place::new().unpack_within(&many, limits).unwrap_err().to_string();
    assert!(said.contains("more than 3 entries"), "{said}");
    // A bomb: over a megabyte of zeros in a few bytes.
    let zeros = "\0".repeat(800 << 10);
    let plain = Archive::new().file("f", &zeros).file("g", &zeros).bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    let place = Place::new();
    let error = unpack_blob(&gzip[..], &expected(&gzip, &plain), &place.layer(), limits).unwrap_err();
    assert!(
        matches!(&error, Error::Hostile(what) if what.contains("larger than")),
        "{error:?}"
    );
    // A hole of a terabyte costs nothing and is refused all the same.
    let mut header = Archive::header(EntryType::GNUSparse, 0, 0o644);
    header.as_gnu_mut().unwrap().set_real_size(1 << 40);
    Archive::name(&mut header, "hole", "");
    let mut archive = Archive::new();
    archive.0.append(&header, &b""[..]).unwrap();
    let said = Place::new()
        .unpack_within(&archive.bytes(), limits)
        .unwrap_err()
        .to_string();
    assert!(said.contains("1099511627776"), "{said}");
}

#[test]
fn all_compressions_and_wrong_digests() {
    let plain = Archive::new().file("f", &"text ".repeat(10_000)).bytes();
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    // Two members, as pigz and estargz write.
    let split: Vec<u8> = [&plain[..700], &plain[700..]]
        .iter()
        .flat_map(|part| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(part).unwrap();
            encoder.finish().unwrap()
        })
        .collect();
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    for blob in [&plain, &gzip, &split, &zstd] {
        let place = Place::new();
        unpack_blob(
            &blob[..],
            &expected(blob, &plain),
            &place.layer(),
            Limits::default(),
        )
        .unwrap();
        assert_eq!(stat(place.layer().join("f")).len(), 50_000);
        for wrong in [expected(b"other", &plain), expected(blob, b"other")] {
            let wrong = Expected {
                size: blob.len() as u64,
                ..wrong
            };
            let error = unpack_blob(&blob[..], &wrong, &Place::new().layer(), Limits::default()).unwrap_err();
            assert!(matches!(error, Error::DigestMismatch { .. }), "{error:?}");
        }
        let short = &blob[..blob.len() / 2];
        let error = unpack_blob(
            short,
            &expected(blob, &plain),
            &Place::new().layer(),
            Limits::default(),
        );
        assert!(matches!(error, Err(Error::DigestMismatch { .. })), "{error:?}");
    }
}

#[test]
fn sparse_and_long_names_of_real_tar_are_read() {
    let source = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(150));
    std::fs::create_dir(source.path().join("d".repeat(120))).unwrap();
    std::fs::write(source.path().join(&long), "long").unwrap();
    std::os::unix::fs::symlink("t".repeat(200), source.path().join("link")).unwrap();
    {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(source.path().join("sparse")).unwrap();
        for index in 0..40u64 {
            file.write_all_at(b"data", index * 1_000_000 + 5).unwrap();
        }
        file.set_len(50_000_000).unwrap();
    }
    let content = std::fs::read(source.path().join("sparse")).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let output = std::process::Command::new("tar")
            .args(["-c", "--sparse"])
            .args(format)
            .arg("-C")
            .arg(source.path())
            .arg(".")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.stdout.len() < 5_000_000, "tar found the holes");
        let place = Place::new();
        place.unpack(&output.stdout).unwrap();
        assert!(
            std::fs::read(place.layer().join("sparse")).unwrap() == content,
            "{format:?}"
        );
        assert!(stat(place.layer().join("sparse")).blocks() * 512 < 5_000_000);
        assert_eq!(std::fs::read(place.layer().join(&long)).unwrap(), b"long");
        assert_eq!(
            std::fs::read_link(place.layer().join("link")).unwrap(),
            Path::new(&"t".repeat(200))
        );
    }
}

#[test]
fn undescribed_directories_are_those_of_the_layers_below() {
    let (lower, upper) = (Place::new(), Place::new());
    let archive = Archive::new()
        .dir("./", 0o711)
        .dir("tmp", 0o1777)
        .symlink("etc/mtab", "../tmp/x")
        .file("tmp/x", "1");
    lower.unpack(&archive.bytes()).unwrap();
    let unpacked = upper
        .unpack(&Archive::new().file("tmp/new", "2").file("own/new", "3").bytes())
        .unwrap();
    let below = Merged::open([lower.layer().as_path()]).unwrap();
    inherit(&upper.layer(), &unpacked.implied, &below).unwrap();
    let mode = |name: &str| stat(upper.layer().join(name)).mode() & 0o7777;
    assert_eq!((mode(""), mode("tmp"), mode("own")), (0o711, 0o1777, 0o755));
    assert_eq!(stat(upper.layer().join("tmp")).mtime(), 1_000_000);
    let merged = Merged::open([upper.layer().as_path(), lower.layer().as_path()]).unwrap();
    assert_eq!(
        merged.read_file("/etc/mtab", 10).unwrap().as_deref(),
        Some(&b"1"[..])
    );
    assert_eq!(
        merged.read_file("../../tmp/new", 10).unwrap().as_deref(),
        Some(&b"2"[..])
    );
    assert_eq!(merged.read_file("tmp", 10).unwrap(), None);
    assert_eq!(merged.read_file("tmp/x/y", 10).unwrap(), None);
    assert!(merged.read_file("own/new", 0).is_err());
}

#[test]
fn the_union_hides_what_is_whited_out_and_never_leaves_the_image() {
    let (lower, upper) = (Place::new(), Place::new());
    lower
        .unpack(
            &Archive::new()
                .file("gone", "x")
                .file("dir/old", "x")
                .symlink("evil", "/../../../../outside")
                .symlink("abs", "/dir/old")
                .bytes(),
        )
        .unwrap();
    upper
        .unpack(
            &Archive::new()
                .file(".wh.gone", "")
                .file("dir/.wh..wh..opq", "")
                .bytes(),
        )
        .unwrap();
    let merged = Merged::open([upper.layer().as_path(), lower.layer().as_path()]).unwrap();
    for path in ["gone", "dir/old", "abs", "evil"] {
        assert_eq!(merged.read_file(path, 10).unwrap(), None, "{path}");
    }
    let alone = Merged::open([lower.layer().as_path()]).unwrap();
    assert_eq!(alone.read_file("abs", 10).unwrap().as_deref(), Some(&b"x"[..]));
    assert_eq!(alone.read_file("evil", 10).unwrap(), None);
}
