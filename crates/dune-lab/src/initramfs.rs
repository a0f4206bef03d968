//! The guest's first file system: the agent and the kernel's modules, as an
//! uncompressed cpio archive of the "newc" format.
//!
//! ```text
//!   header: "070701", then 13 numbers of 8 hexadecimal digits
//!   name, NUL, padding to 4 bytes
//!   contents, padding to 4 bytes
//!   ... last entry: "TRAILER!!!"
//! ```

use std::path::{Path, PathBuf};

use crate::error::{LabError, io_error};

/// The agent, compiled by the build script.
pub(crate) const AGENT: &[u8] = include_bytes!(env!("DUNE_LAB_AGENT"));

/// Writes the archive to a file.
pub(crate) fn write(modules: &[PathBuf], target: &Path) -> Result<(), LabError> {
    std::fs::write(target, build(modules)?).map_err(io_error(format!("write {}", target.display())))
}

fn build(modules: &[PathBuf]) -> Result<Vec<u8>, LabError> {
    base(modules, |_| {}).map(Archive::finish)
}

/// Begins an archive: agent, modules, and the folders the agent mounts on.
/// The image of each module goes through `prepare` first.
pub(crate) fn base(modules: &[PathBuf], prepare: impl Fn(&mut [u8])) -> Result<Archive, LabError> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "modules", "tmp", "root"] {
        archive.folder(folder);
    }
    // The kernel gives it to the first process as its standard streams.
    archive.entry("dev/console", 0o020_600, (5, 1), b"");
    archive.file("init", 0o755, AGENT);
    let mut list = String::new();
    for module in modules {
        let name = module_name(module);
        let mut image =
            std::fs::read(module).map_err(io_error(format!("read {}", module.display())))?;
        prepare(&mut image);
        archive.file(&format!("modules/{name}"), 0o644, &image);
        list.push_str(&name);
        list.push('\n');
    }
    archive.file("modules/list", 0o644, list.as_bytes());
    Ok(archive)
}

fn module_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// A cpio archive under construction.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder; its parent must have been added before.
    pub(crate) fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), b"");
    }

    /// Adds a regular file.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) {
        self.entry(name, 0o100_000 | permissions, (0, 0), contents);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(contents.len()).expect("cpio files are smaller than 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("cpio names are short");
        // inode, mode, uid, gid, links, time, size, device of the file,
        // device it is, length of the name, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_the_layout_of_newc() {
        let mut archive = Archive::default();
        archive.folder("a");
        archive.file("a/b", 0o644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ed", "mode of a folder");
        assert_eq!(&bytes[110..112], b"a\0");
        let second = 112;
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 54..second + 62], b"00000005", "size");
        assert_eq!(&bytes[second + 110..second + 114], b"a/b\0");
        assert_eq!(&bytes[second + 116..second + 121], b"hello");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }

    #[test]
    fn the_agent_is_a_static_program() {
        use crate::kernel::{u16_at, u32_at, u64_at};
        const PT_INTERP: u32 = 3;
        assert!(AGENT.starts_with(b"\x7fELF"));
        let table = usize::try_from(u64_at(AGENT, 32).unwrap()).unwrap();
        let size = usize::from(u16_at(AGENT, 54).unwrap());
        let count = usize::from(u16_at(AGENT, 56).unwrap());
        let kinds: Vec<u32> = (0..count)
            .map(|index| u32_at(AGENT, table + index * size).unwrap())
            .collect();
        assert!(!kinds.is_empty());
        assert!(!kinds.contains(&PT_INTERP), "it wants a dynamic linker");
    }
}
