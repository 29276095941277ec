//! The manifest that `guest build` leaves beside a guest's boot artefacts, so that the daemon can list what it
//! has without opening a kernel. Layout: `<directory>/<kernel release>/{vmlinux,initramfs,guest.json}`, and
//! `<directory>/default`, a symbolic link to the release that is used where none is named.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of [`GuestImage`]; a reader refuses another.
pub const GUEST_IMAGE_VERSION: u32 = 1;
/// File name of the manifest in a release's directory.
pub const MANIFEST: &str = "guest.json";
/// Symbolic link to the release that is used where none is named.
pub const DEFAULT_LINK: &str = "default";

/// A guest's boot artefacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestImage {
    /// [`GUEST_IMAGE_VERSION`].
    pub version: u32,
    /// utsname.release of the guest kernel.
    pub kernel_release: String,
    /// File name of the uncompressed kernel with a PVH entry.
    pub kernel: String,
    /// File name of the initramfs.
    pub initramfs: String,
    /// sha256 of the file the kernel was made from, in hex.
    pub kernel_source_sha256: String,
    /// sha256 of the agent in the initramfs, in hex.
    pub agent_sha256: String,
    /// Modules in the initramfs, in loading order.
    pub modules: Vec<String>,
}

impl GuestImage {
    /// Reads the manifest of the release `directory`.
    ///
    /// # Errors
    /// Any I/O error, and `InvalidData` for a manifest of another version or shape.
    pub fn read(directory: &Path) -> std::io::Result<Self> {
        let image: Self = serde_json::from_slice(&std::fs::read(directory.join(MANIFEST))?)?;
        if image.version != GUEST_IMAGE_VERSION {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                format!(
                    "the manifest has version {}, not {GUEST_IMAGE_VERSION}: build the guest again",
                    image.version
                ),
            ));
        }
        Ok(image)
    }

    /// Paths of kernel and initramfs below the release `directory`.
    #[must_use]
    pub fn paths(&self, directory: &Path) -> (PathBuf, PathBuf) {
        (directory.join(&self.kernel), directory.join(&self.initramfs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut image = GuestImage {
            version: GUEST_IMAGE_VERSION,
            kernel_release: "6.1.0".into(),
            kernel: "vmlinux".into(),
            initramfs: "initramfs".into(),
            kernel_source_sha256: String::new(),
            agent_sha256: String::new(),
            modules: Vec::new(),
        };
        let write = |image: &GuestImage| {
            std::fs::write(
                directory.path().join(MANIFEST),
                serde_json::to_vec(image).unwrap(),
            )
            .unwrap();
        };
        write(&image);
        assert_eq!(GuestImage::read(directory.path()).unwrap(), image);
        image.version += 1;
        write(&image);
        assert_eq!(
            GuestImage::read(directory.path()).unwrap_err().kind(),
            std::io::ErrorKind::InvalidData
        );
    }
}
