//! Turns an installed kernel into what the VMM starts: an uncompressed ELF with a PVH entry note
//! (xen/include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY). A bzImage carries it compressed
//! (Documentation/arch/x86/boot.rst, fields payload_offset and payload_length).

use std::io::Read;

/// A kernel that is no use, and why.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Neither a bzImage nor an ELF executable.
    #[error("the kernel is neither a bzImage nor an x86-64 ELF file")]
    Format,
    /// A bzImage whose fields contradict the file.
    #[error("the bzImage is damaged: {0}")]
    Damaged(&'static str),
    /// The payload's compression is none that this can read.
    #[error(
        "the bzImage's payload starts with {0}, no known compression (gzip, xz, zstd, lz4, lzma and bzip2 are)"
    )]
    Compression(String),
    /// The payload does not decompress.
    #[error("the bzImage's {format} payload does not decompress")]
    Decompress {
        /// Name of the compression.
        format: &'static str,
        /// What the decompressor said.
        source: std::io::Error,
    },
    /// No PVH note.
    #[error("the kernel has no PVH entry: it must be built with CONFIG_PVH=y")]
    NoPvh,
    /// No release string.
    #[error("the kernel does not tell its release")]
    NoRelease,
}

/// An uncompressed kernel.
#[derive(Debug)]
pub struct Kernel {
    /// The ELF file.
    pub elf: Vec<u8>,
    /// utsname.release.
    pub release: String,
}

/// No kernel of any distribution comes near; the bound keeps a damaged payload from filling memory.
const LARGEST: u64 = 1 << 30;
const PVH_NOTE: u32 = 18;

impl Kernel {
    /// Reads a bzImage or an uncompressed ELF kernel.
    ///
    /// # Errors
    /// [`KernelError`]; a kernel without PVH entry is refused.
    pub fn read(file: Vec<u8>) -> Result<Self, KernelError> {
        let kernel = if file.starts_with(b"\x7fELF") {
            let release = release_in_banner(&file).ok_or(KernelError::NoRelease)?;
            Self { elf: file, release }
        } else {
            let elf = decompress(payload(&file)?)?;
            let release = release_in_header(&file)
                .or_else(|| release_in_banner(&elf))
                .ok_or(KernelError::NoRelease)?;
            Self { elf, release }
        };
        if has_pvh_note(&kernel.elf)? {
            Ok(kernel)
        } else {
            Err(KernelError::NoPvh)
        }
    }
}

fn number<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    number(file, at).map(u16::from_le_bytes)
}

fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    number(file, at).map(u32::from_le_bytes)
}

fn u64_at(file: &[u8], at: usize) -> Option<u64> {
    number(file, at).map(u64::from_le_bytes)
}

/// Start of the protected-mode part: after the boot sector and the setup sectors.
fn setup_size(file: &[u8]) -> Option<usize> {
    let sectors = *file.get(0x1f1)?;
    Some((usize::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512)
}

fn payload(file: &[u8]) -> Result<&[u8], KernelError> {
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(KernelError::Format);
    }
    if u16_at(file, 0x206).unwrap_or(0) < 0x208 {
        return Err(KernelError::Damaged(
            "its boot protocol is older than 2.08 and names no payload",
        ));
    }
    let outside = KernelError::Damaged("its payload is outside the file");
    let range = || {
        let start = setup_size(file)?.checked_add(u32_at(file, 0x248)? as usize)?;
        file.get(start..start.checked_add(u32_at(file, 0x24c)? as usize)?)
    };
    range().ok_or(outside)
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, KernelError> {
    // The payload ends with the size of what it holds; decoders that would trip over it get the rest.
    let bare = &payload[..payload.len().saturating_sub(4)];
    let (format, result) = match payload {
        [0x1f, 0x8b, ..] => ("gzip", read_bounded(flate2::read::GzDecoder::new(payload))),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("xz", read_bounded(liblzma::read::XzDecoder::new(payload))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => (
            "zstd",
            zstd::stream::read::Decoder::with_buffer(bare).and_then(|mut decoder| {
                decoder.window_log_max(31)?;
                read_bounded(decoder.single_frame())
            }),
        ),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", lz4_legacy(bare)),
        [0x5d, 0, 0, ..] => (
            "lzma",
            liblzma::stream::Stream::new_lzma_decoder(u64::MAX)
                .map_err(std::io::Error::from)
                .and_then(|stream| read_bounded(liblzma::read::XzDecoder::new_stream(payload, stream))),
        ),
        [b'B', b'Z', b'h', ..] => ("bzip2", read_bounded(bzip2::read::BzDecoder::new(payload))),
        [0x7f, b'E', b'L', b'F', ..] => return Ok(payload.to_vec()),
        _ => {
            return Err(KernelError::Compression(hex::encode(
                &payload[..payload.len().min(6)],
            )));
        }
    };
    result.map_err(|source| KernelError::Decompress { format, source })
}

fn read_bounded(reader: impl Read) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    if reader.take(LARGEST).read_to_end(&mut content)? as u64 == LARGEST {
        return Err(std::io::Error::other("it is larger than a GiB"));
    }
    Ok(content)
}

/// lz4's legacy frame, which the kernel's build uses: blocks of at most 8 MiB, each after its size.
fn lz4_legacy(payload: &[u8]) -> std::io::Result<Vec<u8>> {
    const BLOCK: usize = 8 << 20;
    let cut = || std::io::Error::other("a block ends early");
    let mut content = Vec::new();
    let mut at = 4;
    while let Some(size) = u32_at(payload, at) {
        at += 4;
        if size == 0 {
            break;
        }
        let block = payload.get(at..at + size as usize).ok_or_else(cut)?;
        let mut plain = vec![0; BLOCK];
        let length = lz4_flex::block::decompress_into(block, &mut plain).map_err(std::io::Error::other)?;
        content.extend_from_slice(&plain[..length]);
        if content.len() as u64 > LARGEST {
            return Err(std::io::Error::other("it is larger than a GiB"));
        }
        at += size as usize;
    }
    Ok(content)
}

/// The setup header points at "release (builder) version".
fn release_in_header(file: &[u8]) -> Option<String> {
    let at = usize::from(u16_at(file, 0x20e)?);
    (at != 0).then_some(())?;
    release_word(file.get(at + 0x200..)?)
}

/// The kernel's own banner: "Linux version release (builder) …".
fn release_in_banner(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    elf.windows(BANNER.len())
        .enumerate()
        .filter(|(_, window)| *window == BANNER)
        .find_map(|(at, _)| release_word(&elf[at + BANNER.len()..]))
}

/// The first word, when it looks like a release; it becomes a directory's name.
fn release_word(text: &[u8]) -> Option<String> {
    let word: Vec<u8> = text
        .iter()
        .copied()
        .take(65)
        .take_while(|c| !matches!(c, b' ' | 0))
        .collect();
    let good = |c: &u8| c.is_ascii_alphanumeric() || b"._+-~".contains(c);
    let ok = word.len() <= 64 && word.first().is_some_and(u8::is_ascii_digit) && word.iter().all(good);
    ok.then(|| String::from_utf8_lossy(&word).into_owned())
}

/// Looks for the note in the ELF's PT_NOTE segments.
fn has_pvh_note(elf: &[u8]) -> Result<bool, KernelError> {
    const CLASS_64_LITTLE: [u8; 2] = [2, 1];
    const MACHINE_X86_64: u16 = 62;
    const SEGMENT_NOTE: u32 = 4;
    if elf.get(4..6) != Some(&CLASS_64_LITTLE[..]) || u16_at(elf, 18) != Some(MACHINE_X86_64) {
        return Err(KernelError::Format);
    }
    let (Some(table), Some(size), Some(count)) = (u64_at(elf, 32), u16_at(elf, 54), u16_at(elf, 56)) else {
        return Err(KernelError::Format);
    };
    let segments = (0..u64::from(count)).filter_map(|index| {
        let at = usize::try_from(table.checked_add(index * u64::from(size))?).ok()?;
        (u32_at(elf, at)? == SEGMENT_NOTE).then_some(())?;
        let start = usize::try_from(u64_at(elf, at + 8)?).ok()?;
        elf.get(start..start.checked_add(usize::try_from(u64_at(elf, at + 32)?).ok()?)?)
    });
    Ok(segments.into_iter().any(notes_hold_pvh))
}

fn notes_hold_pvh(notes: &[u8]) -> bool {
    let mut at = 0;
    while let (Some(name), Some(content), Some(kind)) =
        (u32_at(notes, at), u32_at(notes, at + 4), u32_at(notes, at + 8))
    {
        if kind == PVH_NOTE && notes.get(at + 12..at + 16) == Some(b"Xen\0") {
            return true;
        }
        let padded = |size: u32| (size as usize).next_multiple_of(4);
        at += 12 + padded(name) + padded(content);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;

    /// A small ELF with or without the note.
    fn elf(note: u32) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 4;
        file[72] = 120;
        file[96] = 40;
        for word in [6u32, 3, 1] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(b"Linux\0\0\0abc\0");
        for word in [4u32, 0, note] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(b"Xen\0");
        file.extend_from_slice(b"Linux version %s junk Linux version 6.1.0-test (me) #1\0");
        file
    }

    /// A bzImage around a compressed payload, as the kernel's build lays it out.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        file.extend_from_slice(&[0x90; 16]);
        file.extend_from_slice(payload);
        file.extend_from_slice(b"after the payload");
        file
    }

    fn compressed(command: &[&str], plain: &[u8]) -> Vec<u8> {
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} must be installed: {error}", command[0]));
        let mut input = child.stdin.take().unwrap();
        let plain = plain.to_vec();
        let feed = std::thread::spawn(move || input.write_all(&plain).unwrap());
        let output = child.wait_with_output().unwrap();
        feed.join().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    #[test]
    fn every_compression_of_the_kernels_build_is_read() {
        let plain = elf(18);
        let size = u32::try_from(plain.len()).unwrap().to_le_bytes();
        for command in [
            &["gzip", "-c"][..],
            &["xz", "--check=crc32", "-c"],
            &["lzma", "-c"],
            &["bzip2", "-c"],
            &["zstd", "-q", "-c", "--ultra", "-22"],
            &["lz4", "-l", "-c"],
        ] {
            let mut payload = compressed(command, &plain);
            // gzip's own trailer is the size; the others get it appended.
            if command[0] != "gzip" {
                payload.extend_from_slice(&size);
            }
            let kernel =
                Kernel::read(bzimage(&payload)).unwrap_or_else(|error| panic!("{command:?}: {error}"));
            assert_eq!(kernel.elf, plain, "{command:?}");
            assert_eq!(kernel.release, "6.1.0-test");
        }
    }

    #[test]
    fn a_kernel_without_pvh_is_refused() {
        assert!(matches!(Kernel::read(elf(17)), Err(KernelError::NoPvh)));
        assert!(Kernel::read(elf(18)).is_ok());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(matches!(
            Kernel::read(b"#!/bin/sh".to_vec()),
            Err(KernelError::Format)
        ));
        assert!(matches!(Kernel::read(Vec::new()), Err(KernelError::Format)));
        assert!(matches!(
            Kernel::read(bzimage(b"garbage!")),
            Err(KernelError::Compression(_))
        ));
        let cut = bzimage(&compressed(&["gzip", "-c"], &elf(18))[..40]);
        assert!(matches!(Kernel::read(cut), Err(KernelError::Decompress { .. })));
    }

    #[test]
    fn the_installed_kernels_are_read() {
        let mut seen = 0;
        for entry in std::fs::read_dir("/boot").unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let Some(release) = name.strip_prefix("vmlinuz-") else {
                continue;
            };
            let kernel = Kernel::read(std::fs::read(&path).unwrap()).unwrap();
            assert_eq!(kernel.release, release);
            assert!(kernel.elf.starts_with(b"\x7fELF"));
            seen += 1;
        }
        if seen == 0 {
            println!("skipped: the_installed_kernels_are_read: no /boot/vmlinuz-*");
        }
    }

    proptest! {
        #[test]
        fn damaged_images_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0x250..0x800),
            head in any::<bool>(),
        ) {
            if head {
                bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
                bytes[18..20].copy_from_slice(&[62, 0]);
            } else {
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
            }
            let _ = Kernel::read(bytes);
        }
    }
}
