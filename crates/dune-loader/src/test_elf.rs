//! Hand-made ELF files for the tests of this crate.

use object::LittleEndian as LE;
use object::elf::{self, FileHeader64, Ident, ProgramHeader64};
use object::endian::{U16, U32, U64};
use object::pod::bytes_of;

/// A program header in plain numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) p_type: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) vaddr: u64,
    pub(crate) file_len: u64,
    pub(crate) mem_len: u64,
    pub(crate) align: u64,
}

pub(crate) const CODE: Header = Header {
    p_type: elf::PT_LOAD,
    flags: elf::PF_R | elf::PF_X,
    offset: 0,
    vaddr: 0x40_0000,
    file_len: 0x1000,
    mem_len: 0x1000,
    align: 0x1000,
};

/// Starts and ends in the middle of pages; three pages of zeros at its end.
pub(crate) const DATA: Header = Header {
    p_type: elf::PT_LOAD,
    flags: elf::PF_R | elf::PF_W,
    offset: 0x1100,
    vaddr: 0x40_2100,
    file_len: 0x300,
    mem_len: 0x3000,
    align: 0x1000,
};

/// A file whose parts tests change before taking its bytes.
#[derive(Clone, Debug)]
pub(crate) struct TestElf {
    pub(crate) class: u8,
    pub(crate) data: u8,
    pub(crate) e_type: u16,
    pub(crate) machine: u16,
    pub(crate) entry: u64,
    pub(crate) phoff: u64,
    pub(crate) phentsize: u16,
    pub(crate) phnum: Option<u16>,
    pub(crate) headers: Vec<Header>,
    pub(crate) len: usize,
}

impl TestElf {
    /// A fixed program of [`CODE`] and [`DATA`].
    pub(crate) fn new() -> Self {
        Self {
            class: elf::ELFCLASS64,
            data: elf::ELFDATA2LSB,
            e_type: elf::ET_EXEC,
            machine: elf::EM_X86_64,
            entry: 0x40_0800,
            phoff: 64,
            phentsize: 56,
            phnum: None,
            headers: vec![CODE, DATA],
            len: 0x2000,
        }
    }

    pub(crate) fn with_headers(headers: &[Header]) -> Self {
        Self {
            headers: headers.to_vec(),
            ..Self::new()
        }
    }

    /// Adds a header before the others, where `PT_INTERP` and the like are.
    pub(crate) fn and(mut self, header: Header) -> Self {
        self.headers.insert(0, header);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let header = FileHeader64::<LE> {
            e_ident: Ident {
                magic: elf::ELFMAG,
                class: self.class,
                data: self.data,
                version: elf::EV_CURRENT,
                os_abi: 0,
                abi_version: 0,
                padding: [0; 7],
            },
            e_type: U16::new(LE, self.e_type),
            e_machine: U16::new(LE, self.machine),
            e_version: U32::new(LE, 1),
            e_entry: U64::new(LE, self.entry),
            e_phoff: U64::new(LE, self.phoff),
            e_shoff: U64::new(LE, 0),
            e_flags: U32::new(LE, 0),
            e_ehsize: U16::new(LE, 64),
            e_phentsize: U16::new(LE, self.phentsize),
            e_phnum: U16::new(LE, self.phnum.unwrap_or(self.headers.len() as u16)),
            e_shentsize: U16::new(LE, 0),
            e_shnum: U16::new(LE, 0),
            e_shstrndx: U16::new(LE, 0),
        };
        let mut bytes = bytes_of(&header).to_vec();
        for header in &self.headers {
            let header = ProgramHeader64::<LE> {
                p_type: U32::new(LE, header.p_type),
                p_flags: U32::new(LE, header.flags),
                p_offset: U64::new(LE, header.offset),
                p_vaddr: U64::new(LE, header.vaddr),
                p_paddr: U64::new(LE, 0),
                p_filesz: U64::new(LE, header.file_len),
                p_memsz: U64::new(LE, header.mem_len),
                p_align: U64::new(LE, header.align),
            };
            bytes.extend(bytes_of(&header));
        }
        bytes.resize(self.len, 0);
        bytes
    }
}
