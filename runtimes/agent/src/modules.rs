//! Loads the kernel modules that the initramfs brings, in the order of `/modules/load.order`: one path per
//! line, dependencies first.

use std::fs::File;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::console;

const DIRECTORY: &str = "/modules";
/// The list, written by `guest build`.
pub(crate) const LOAD_ORDER: &str = "/modules/load.order";

/// Loads all modules of the list; without a list there is nothing to load. A module that fails is named on
/// the console and the rest is loaded: a guest may do without it, and the request that cannot will say so.
pub(crate) fn load() -> io::Result<()> {
    let list = match std::fs::read_to_string(LOAD_ORDER) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for path in paths(&list) {
        let path = Path::new(DIRECTORY).join(path);
        let loaded = File::open(&path)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
            .and_then(|file| finit_module(&file, c"", ModuleInitFlags::empty()));
        match loaded {
            // Built in, or loaded by an earlier line.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => console::say(&format!("module {} not loaded: {error}", path.display())),
        }
    }
    // The files are memory that containers can use.
    std::fs::remove_dir_all(DIRECTORY)
}

/// Paths of the list, relative to `/modules` or absolute.
fn paths(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_are_no_paths() {
        let list = "# built for 6.1\nkernel/drivers/virtio/virtio.ko\n\n  /modules/fuse.ko \n";
        assert_eq!(
            paths(list).collect::<Vec<_>>(),
            ["kernel/drivers/virtio/virtio.ko", "/modules/fuse.ko"]
        );
    }
}
