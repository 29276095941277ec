//! Writes the archive format of an initramfs: cpio "newc" (Documentation/driver-api/early-userspace/
//! buffer-format.rst in the kernel's source). Times and inode numbers are fixed, so the same input gives the
//! same bytes.

/// An archive under construction.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// A directory; its parents must have been added before.
    pub(super) fn directory(&mut self, path: &str, mode: u32) {
        self.entry(path, DIRECTORY | mode, (0, 0), &[]);
    }

    /// A regular file.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, REGULAR | mode, (0, 0), content);
    }

    /// A character device.
    pub(super) fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, CHARACTER | mode, (major, minor), &[]);
    }

    /// Ends the archive.
    #[must_use]
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, (0, 0), 0, 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode += 1;
        let inode = self.inode;
        let size =
            u32::try_from(content.len()).expect("the format holds files below 4 GiB, and so does ours");
        self.header(path.trim_start_matches('/'), mode, device, size, inode);
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn header(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), size: u32, inode: u32) {
        let name_size = u32::try_from(name.len() + 1).expect("paths are short");
        let links = 1;
        let fields = [
            inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    fn unpack(archive: &[u8]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new("cpio")
            .args(["-idm", "--quiet", "--no-absolute-filenames"])
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .spawn()
            .expect("cpio is installed");
        child.stdin.take().unwrap().write_all(archive).unwrap();
        assert!(child.wait().unwrap().success());
        directory
    }

    #[test]
    fn another_cpio_reads_it() {
        let mut archive = Archive::default();
        archive.directory("/dev", 0o755);
        archive.character_device("/dev/console", 0o600, 5, 1);
        archive.file("/init", 0o755, b"hello");
        archive.directory("modules", 0o755);
        archive.file("modules/a.ko", 0o644, &[7; 4097]);
        let root = unpack(&archive.finish());
        let init = root.path().join("init");
        assert_eq!(std::fs::read(&init).unwrap(), b"hello");
        assert_eq!(
            std::fs::metadata(&init).unwrap().permissions().mode() & 0o777,
            0o755
        );
        assert_eq!(
            std::fs::read(root.path().join("modules/a.ko")).unwrap(),
            [7; 4097]
        );
        let console = std::fs::metadata(root.path().join("dev/console")).unwrap();
        assert!(console.file_type().is_char_device());
        assert_eq!(console.rdev(), 0x501);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn any_content_survives(
            files in proptest::collection::btree_map(
                "[a-z0-9_.-]{1,40}x",
                proptest::collection::vec(any::<u8>(), 0..300),
                1..8,
            )
        ) {
            let mut archive = Archive::default();
            for (name, content) in &files {
                archive.file(name, 0o644, content);
            }
            let root = unpack(&archive.finish());
            for (name, content) in &files {
                prop_assert_eq!(&std::fs::read(root.path().join(name)).unwrap(), content);
            }
        }
    }
}
