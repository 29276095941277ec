//! Property tests of the unpacker: whatever an archive says, nothing outside the layer changes.

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::tests::{Archive, Place};
use super::*;

/// Names that meet each other often, and try to leave.
fn any_name() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        8 => prop::sample::select(vec!["a", "b", "c"]).prop_map(str::to_owned),
        1 => prop::sample::select(vec!["..", ".", "", ".wh.a", ".wh..wh..opq", ".wh..", "outside", "outdir"])
            .prop_map(str::to_owned),
    ];
    prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
}

fn any_target() -> impl Strategy<Value = String> {
    prop_oneof![
        any_name(),
        any_name().prop_map(|name| format!("/{name}")),
        any_name().prop_map(|name| format!("../{name}")),
        Just("../outdir".to_owned()),
        Just("../../..".to_owned()),
        Just("/".to_owned()),
    ]
}

fn any_archive() -> impl Strategy<Value = Vec<(u8, String, String)>> {
    prop::collection::vec((0u8..6, any_name(), any_target()), 1..25)
}

fn build(entries: &[(u8, String, String)]) -> Vec<u8> {
    let mut archive = Archive::new();
    for (kind, name, target) in entries {
        archive = match kind {
            0 => archive.dir(name, 0o755),
            1 | 2 => archive.file(name, "written by the archive"),
            3 => archive.symlink(name, target),
            4 => archive.link(name, target),
            _ => archive.add(EntryType::Fifo, name, "", 0o600, b""),
        };
    }
    archive.bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn nothing_outside_ever_changes(entries in any_archive()) {
        let place = Place::new();
        let before = place.outside();
        let root = std::fs::metadata(place.dir.path()).unwrap().mode();
        let result = place.unpack(&build(&entries));
        prop_assert_eq!(place.outside(), before);
        prop_assert_eq!(std::fs::metadata(place.dir.path()).unwrap().mode(), root);
        prop_assert_eq!(std::fs::read_dir(place.dir.path().join("outdir")).unwrap().count(), 0);
        if let Err(error) = result {
            prop_assert!(matches!(error, Error::Hostile(_)), "{:?}", error);
        } else {
            // What was unpacked can be measured and read as a union.
            disk_usage(&place.layer()).unwrap();
            let merged = Merged::open([place.layer().as_path()]).unwrap();
            for (_, name, _) in &entries {
                let read = merged.read_file(name, 100).unwrap_or_default();
                prop_assert!(read.is_none_or(|bytes| bytes == b"written by the archive"));
            }
        }
    }

    #[test]
    fn mangled_bytes_are_refused_or_harmless(
        entries in any_archive(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        cut in prop::option::of(any::<prop::sample::Index>()),
        fix_checksums in any::<bool>(),
    ) {
        let mut bytes = build(&entries);
        for (index, byte) in damage {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if fix_checksums {
            // Otherwise nearly all damage ends at the checksum.
            for block in bytes.chunks_exact_mut(512) {
                let mut header = Header::from_byte_slice(block).clone();
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let place = Place::new();
        let before = place.outside();
        let limits = Limits { entries: 1000, bytes: 16 << 20 };
        let result = place.unpack_within(&bytes, limits);
        prop_assert_eq!(place.outside(), before);
        if let Err(error) = result {
            prop_assert!(matches!(error, Error::Hostile(_) | Error::Io { .. }), "{:?}", error);
        }
    }
}
