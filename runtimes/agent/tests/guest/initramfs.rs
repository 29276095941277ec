//! Writes an initramfs (newc cpio, kernel Documentation "initramfs buffer format") for the tests: the agent
//! as `/init`, and busybox as a root file system in `/testroot`.

/// Archive under construction.
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    inode: u32,
}

impl Initramfs {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            inode: 1,
        }
    }

    pub(crate) fn directory(&mut self, path: &str) -> &mut Self {
        self.entry(path, 0o040_755, (0, 0), &[])
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Self {
        self.entry(path, 0o100_000 | mode, (0, 0), content)
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, 0o120_777, (0, 0), target.as_bytes())
    }

    pub(crate) fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.entry(path, 0o020_000 | mode, (major, minor), &[])
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> &mut Self {
        let inode = self.inode;
        self.inode += 1;
        let fields = [
            inode,
            mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len()).expect("a small file"),
            0,
            0,
            device.0,
            device.1,
            u32::try_from(path.len() + 1).expect("a short path"),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Ends the archive.
    pub(crate) fn finish(&mut self) {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
