//! The disk that Bochs boots from: a boot sector, the kernel, what the kernel
//! is told, and its initial RAM file system.
//!
//! No boot loader is needed: the boot sector (`boot.S`) loads everything to its
//! place and enters the kernel by the PVH entry, in 32-bit protected mode with
//! the address of a `hvm_start_info` in ebx.
//!
//! ```text
//!   disk                        memory
//!   sector 0   boot sector      0x7c00
//!   sector 1   kernel segments  where its program headers say
//!              information      the next 2 MiB boundary:
//!                                 +0x000 hvm_start_info
//!                                 +0x100 module list (the RAM file system)
//!                                 +0x200 memory map
//!                                 +0x400 command line
//!              RAM file system  +0x10000
//! ```
#![expect(
    unsafe_code,
    reason = "the boot sector is a symbol made by the assembler"
)]

use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::error::{LabError, io_error};
use crate::kernel::{u16_at, u32_at, u64_at};
use crate::machine::memory_file;

std::arch::global_asm!(include_str!("boot.S"), options(att_syntax, raw));

const SECTOR: usize = 512;
/// The geometry the disk is described with; its size is a multiple of it.
pub(crate) const HEADS: usize = 16;
/// Sectors of a track.
pub(crate) const SECTORS_PER_TRACK: usize = 63;
/// Where the partition table would begin.
const BOOT_SECTOR_ROOM: usize = 446;

/// Where the RAM file system lies behind the information.
const INITRAMFS_OFFSET: u64 = 0x1_0000;
const MODULE_LIST_OFFSET: u64 = 0x100;
const MEMORY_MAP_OFFSET: u64 = 0x200;
const COMMAND_LINE_OFFSET: u64 = 0x400;
const INFORMATION_SIZE: usize = 0x1000;
/// The BIOS keeps its ACPI tables at the end of memory.
const ACPI_SIZE: u64 = 0x1_0000;
const MIB: u64 = 1 << 20;

/// The Xen ELF note that holds the PVH entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;

/// A disk, as a file without a name.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) file: File,
    pub(crate) cylinders: usize,
}

/// Lays the disk out.
///
/// # Errors
///
/// [`LabError::Kernel`] when the kernel has no PVH entry, [`LabError::Options`]
/// when kernel and files do not fit into the guest's memory.
pub(crate) fn build(
    kernel_path: &Path,
    command_line: &str,
    memory_mib: u32,
    initramfs: &[u8],
) -> Result<Disk, LabError> {
    let image =
        std::fs::read(kernel_path).map_err(io_error(format!("read {}", kernel_path.display())))?;
    let kernel = Kernel::parse(&image).ok_or_else(|| LabError::Kernel {
        path: kernel_path.to_owned(),
        reason: "it has no PVH entry (CONFIG_PVH), by which Bochs starts it; \
                 use Debian's kernel or leave --kernel out"
            .to_owned(),
    })?;
    let memory = u64::from(memory_mib) * MIB;
    let base = kernel.end.next_multiple_of(2 * MIB);
    let initramfs_at = base + INITRAMFS_OFFSET;
    // The kernel unpacks the archive beside itself before it frees it.
    let needed = initramfs_at + 2 * initramfs.len() as u64 + 64 * MIB;
    if needed > memory || memory > 3 << 30 {
        return Err(LabError::Options(format!(
            "--memory {memory_mib}: with --intel the kernel and the command's files \
             ({} MiB) need {} to 3072 MiB",
            initramfs.len() as u64 / MIB,
            needed.div_ceil(MIB)
        )));
    }
    let information = information(base, command_line, memory, initramfs_at, initramfs.len())?;

    let mut pieces = kernel.segments;
    pieces.push((base, &information));
    pieces.push((initramfs_at, initramfs));
    write_disk(&pieces, kernel.entry, base)
}

/// Writes boot sector and pieces.
fn write_disk(pieces: &[(u64, &[u8])], entry: u32, information: u64) -> Result<Disk, LabError> {
    let narrow = |value: u64| u32::try_from(value).expect("below 3 GiB, as checked before");
    let mut boot = boot_code().to_vec();
    let mut sector = 1;
    for (address, bytes) in pieces {
        let count = bytes.len().div_ceil(SECTOR);
        for word in [
            narrow(*address),
            narrow(sector as u64),
            narrow(count as u64),
        ] {
            boot.extend_from_slice(&word.to_le_bytes());
        }
        sector += count;
    }
    boot.extend_from_slice(&[0; 12]);
    boot.extend_from_slice(&entry.to_le_bytes());
    boot.extend_from_slice(&narrow(information).to_le_bytes());
    if boot.len() > BOOT_SECTOR_ROOM {
        return Err(LabError::Options(format!(
            "the kernel has {} segments, too many for the boot sector; leave --kernel out",
            pieces.len()
        )));
    }
    boot.resize(SECTOR, 0);
    boot[SECTOR - 2..].copy_from_slice(&[0x55, 0xaa]);

    let file = memory_file("disk")?;
    let mut writer = &file;
    let mut write = |bytes: &[u8]| writer.write_all(bytes).map_err(io_error("write the disk"));
    write(&boot)?;
    for (_, bytes) in pieces {
        write(bytes)?;
        write(&[0; SECTOR][..bytes.len().next_multiple_of(SECTOR) - bytes.len()])?;
    }
    let cylinders = sector.div_ceil(HEADS * SECTORS_PER_TRACK);
    file.set_len((cylinders * HEADS * SECTORS_PER_TRACK * SECTOR) as u64)
        .map_err(io_error("size the disk"))?;
    Ok(Disk { file, cylinders })
}

/// What the kernel is told: Xen's `hvm_start_info` and what it points to.
fn information(
    base: u64,
    command_line: &str,
    memory: u64,
    initramfs_at: u64,
    initramfs_size: usize,
) -> Result<Vec<u8>, LabError> {
    const USABLE: u32 = 1;
    const RESERVED: u32 = 2;
    const ACPI: u32 = 3;
    let map = [
        (0, 0x9_fc00, USABLE),
        (0x9_fc00, MIB, RESERVED),
        (MIB, memory - ACPI_SIZE, USABLE),
        (memory - ACPI_SIZE, memory, ACPI),
    ];
    let mut page = Page(vec![0; INFORMATION_SIZE]);
    // hvm_start_info, version 1.
    page.put(0, &START_MAGIC.to_le_bytes());
    page.put(4, &1_u32.to_le_bytes());
    page.put(12, &1_u32.to_le_bytes());
    page.put(16, &(base + MODULE_LIST_OFFSET).to_le_bytes());
    page.put(24, &(base + COMMAND_LINE_OFFSET).to_le_bytes());
    page.put(40, &(base + MEMORY_MAP_OFFSET).to_le_bytes());
    page.put(48, &(map.len() as u32).to_le_bytes());
    // hvm_modlist_entry: address, size, command line, reserved.
    page.put(MODULE_LIST_OFFSET, &initramfs_at.to_le_bytes());
    page.put(
        MODULE_LIST_OFFSET + 8,
        &(initramfs_size as u64).to_le_bytes(),
    );
    // hvm_memmap_table_entry: address, size, type, reserved.
    for (offset, (start, end, kind)) in (MEMORY_MAP_OFFSET..).step_by(24).zip(map) {
        page.put(offset, &start.to_le_bytes());
        page.put(offset + 8, &(end - start).to_le_bytes());
        page.put(offset + 16, &kind.to_le_bytes());
    }
    if command_line.len() >= INFORMATION_SIZE - COMMAND_LINE_OFFSET as usize {
        return Err(LabError::Options(
            "the kernel's command line is too long".to_owned(),
        ));
    }
    page.put(COMMAND_LINE_OFFSET, command_line.as_bytes());
    Ok(page.0)
}

struct Page(Vec<u8>);

impl Page {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset as usize;
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// The boot sector's code; its table follows it.
fn boot_code() -> &'static [u8] {
    unsafe extern "C" {
        static dune_lab_boot_start: u8;
        static dune_lab_boot_end: u8;
    }
    let start = &raw const dune_lab_boot_start;
    let end = &raw const dune_lab_boot_end;
    // SAFETY: both symbols delimit one read-only piece of this program's image,
    // made by `boot.S`.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// A kernel as an ELF file.
struct Kernel<'a> {
    /// Physical address and contents, without the zeros at the end.
    segments: Vec<(u64, &'a [u8])>,
    /// The PVH entry point, a physical address.
    entry: u32,
    /// The end of the kernel in memory, with its uninitialised data.
    end: u64,
}

impl<'a> Kernel<'a> {
    /// `None` when it is no 64-bit ELF file with a PVH entry below 2 GiB.
    fn parse(image: &'a [u8]) -> Option<Kernel<'a>> {
        const LOAD: u32 = 1;
        const NOTE: u32 = 4;
        if image.get(..5)? != b"\x7fELF\x02" {
            return None;
        }
        let table = usize::try_from(u64_at(image, 32)?).ok()?;
        let size = usize::from(u16_at(image, 54)?);
        let count = usize::from(u16_at(image, 56)?);
        let (mut segments, mut entry, mut end) = (Vec::new(), None, 0);
        for index in 0..count {
            let header = image.get(table.checked_add(index * size)?..)?;
            let kind = u32_at(header, 0)?;
            let offset = usize::try_from(u64_at(header, 8)?).ok()?;
            let physical = u64_at(header, 24)?;
            let length = usize::try_from(u64_at(header, 32)?).ok()?;
            let bytes = image.get(offset..offset.checked_add(length)?);
            match kind {
                LOAD => {
                    let bytes = bytes?;
                    let used = bytes
                        .iter()
                        .rposition(|byte| *byte != 0)
                        .map_or(0, |at| at + 1);
                    if used > 0 {
                        segments.push((physical, &bytes[..used]));
                    }
                    end = end.max(physical.checked_add(u64_at(header, 40)?)?);
                }
                NOTE => entry = entry.or_else(|| pvh_entry(bytes?)),
                _ => {}
            }
        }
        (end > 0 && end < 2 << 30).then_some(Kernel {
            segments,
            entry: entry?,
            end,
        })
    }
}

/// Looks for the PVH entry point among ELF notes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let name_size = u32_at(notes, 0)? as usize;
        let value_size = u32_at(notes, 4)? as usize;
        let kind = u32_at(notes, 8)?;
        let value_at = 12 + name_size.next_multiple_of(4);
        let name = notes.get(12..12 + name_size)?;
        if kind == NOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return u32_at(notes, value_at);
        }
        notes = notes.get(value_at + value_size.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    /// A kernel of one segment at 1 MiB and one note.
    fn small_kernel() -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[..5].copy_from_slice(b"\x7fELF\x02");
        image[32] = 64; // table of program headers
        image[54] = 56;
        image[56] = 2;
        let mut header =
            |at: usize, kind: u8, offset: u64, physical: u64, file: u64, memory: u64| {
                image[at] = kind;
                for (field, value) in [(8, offset), (24, physical), (32, file), (40, memory)] {
                    image[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
                }
            };
        header(64, 1, 0x200, MIB, 0x100, 0x3000);
        header(120, 4, 0x300, 0, 0x14, 0x14);
        image[0x200..0x205].copy_from_slice(b"hello");
        image[0x300] = 4;
        image[0x304] = 4;
        image[0x308] = 18;
        image[0x30c..0x310].copy_from_slice(b"Xen\0");
        image[0x310..0x314].copy_from_slice(&0x10_0040_u32.to_le_bytes());
        image
    }

    #[test]
    fn kernel_is_read() {
        let image = small_kernel();
        let kernel = Kernel::parse(&image).unwrap();
        assert_eq!(kernel.segments, [(MIB, &b"hello"[..])]);
        assert_eq!(kernel.entry, 0x10_0040);
        assert_eq!(kernel.end, MIB + 0x3000);
    }

    #[test]
    fn broken_kernels_are_refused_without_panic() {
        let image = small_kernel();
        for length in 0..image.len() {
            let _ = Kernel::parse(&image[..length]);
        }
        for at in 0..0x80 {
            let mut broken = image.clone();
            broken[at] = 0xff;
            let _ = Kernel::parse(&broken);
        }
        assert!(Kernel::parse(b"MZ").is_none());
    }

    #[test]
    fn boot_sector_leads_to_every_piece() {
        let pieces: [(u64, &[u8]); 2] = [(MIB, b"kernel"), (4 * MIB, &[7; 600])];
        let mut disk = write_disk(&pieces, 0x1234, 0x5678).unwrap();
        let mut bytes = Vec::new();
        disk.file.rewind().unwrap();
        disk.file.read_to_end(&mut bytes).unwrap();
        assert_eq!(
            bytes.len(),
            disk.cylinders * HEADS * SECTORS_PER_TRACK * SECTOR
        );
        assert_eq!(&bytes[510..512], &[0x55, 0xaa]);
        let table = boot_code().len();
        let word = |index: usize| u32_at(&bytes, table + 4 * index).unwrap();
        assert_eq!([word(0), word(1), word(2)], [1 << 20, 1, 1]);
        assert_eq!([word(3), word(4), word(5)], [4 << 20, 2, 2]);
        assert_eq!([word(6), word(7), word(8)], [0, 0, 0]);
        assert_eq!([word(9), word(10)], [0x1234, 0x5678]);
        assert_eq!(&bytes[SECTOR..SECTOR + 6], b"kernel");
        assert_eq!(&bytes[2 * SECTOR..2 * SECTOR + 600], &[7; 600]);
    }
}
