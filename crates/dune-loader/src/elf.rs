//! ELF64 x86-64 program headers, checked once so that later steps need not.
//!
//! Parsing reads the file header, the program header table and the
//! interpreter's path, never the segments' contents, so its cost does not
//! depend on the file's size. Every [`Elf`] that exists keeps these promises:
//!
//! - at least one segment; segments ascend and share no page;
//! - for each segment: `file_len <= mem_len`, all of `file_len` lies in the
//!   file, file offset and address agree modulo the page size, and its last
//!   page ends at or below [`USER_END`];
//! - the entry point lies in an executable segment;
//! - [`Elf::align`] is a power of two, a page at least.
//!
//! Where Linux is laxer (it takes overlapping segments, entry points in the
//! middle of nowhere, files that end too early, and lets the program die of
//! them), the file is refused here with the reason. Where a header is of no
//! concern to the kernel (sections, versions, the OS ABI byte), it is ignored
//! as Linux does. If there are several `PT_INTERP` headers, the first counts,
//! as on Linux.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use object::LittleEndian;
use object::elf;
use object::pod::{from_bytes, slice_from_all_bytes};
use thiserror::Error;

use crate::addr::{PAGE_SIZE, Prot, USER_END};

type FileHeader = elf::FileHeader64<LittleEndian>;
type ProgramHeader = elf::ProgramHeader64<LittleEndian>;

const LE: LittleEndian = LittleEndian;
const FILE_HEADER_LEN: usize = size_of::<FileHeader>();

/// The size of one program header, in bytes (`AT_PHENT`).
pub const PROGRAM_HEADER_LEN: u64 = size_of::<ProgramHeader>() as u64;

/// The largest program header table Linux reads, in bytes.
const PROGRAM_HEADERS_LIMIT: u64 = 65536;

/// The longest interpreter path with its NUL, in bytes (`PATH_MAX`).
const INTERPRETER_LIMIT: u64 = 4096;

/// A source of bytes addressed by offset: a file, or bytes in memory.
pub trait ReadAt {
    /// The source's length in bytes.
    ///
    /// # Errors
    ///
    /// Those of asking the operating system.
    fn byte_len(&self) -> io::Result<u64>;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the source ends too early, and those of reading.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|from| self.get(from..from.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// Why an ELF file cannot be run. `index` counts program headers from 0.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ElfError {
    /// The first four bytes are not `\x7fELF`.
    #[error("not an ELF file")]
    BadMagic,
    /// The file ends before something its headers speak of.
    #[error(
        "truncated: {what} ends at byte {needed}, the file at byte {len}; copy or build it again"
    )]
    Truncated {
        /// The part that is missing.
        what: &'static str,
        /// Where that part ends.
        needed: u64,
        /// Where the file ends.
        len: u64,
    },
    /// A program for 32-bit x86.
    #[error("a 32-bit x86 program; only 64-bit x86-64 programs run here: use a 64-bit build")]
    X86Bits32,
    /// A program of the x32 ABI (64-bit registers, 32-bit pointers).
    #[error("an x32 program; only the 64-bit x86-64 ABI runs here: build it with -m64")]
    X32,
    /// A program for another machine.
    #[error("built for {}, not for x86-64; use an x86-64 build", MachineName(*.machine))]
    OtherMachine {
        /// The header's `e_machine`, in the file's own byte order.
        machine: u16,
    },
    /// `EI_CLASS` is neither 32 nor 64 bits.
    #[error("corrupt: ELF class {class} does not exist")]
    BadClass {
        /// The header's `EI_CLASS`.
        class: u8,
    },
    /// Big-endian, which x86-64 is not, or no byte order at all.
    #[error("corrupt: byte order {data} for x86-64, which is little-endian (1)")]
    BadByteOrder {
        /// The header's `EI_DATA`.
        data: u8,
    },
    /// An object file, a core dump, or an unknown type.
    #[error("{} is not a program; link it, or name the program it came from", TypeName(*.e_type))]
    NotAProgram {
        /// The header's `e_type`.
        e_type: u16,
    },
    /// Program headers are not 56 bytes each.
    #[error("corrupt: program headers of {size} bytes, expected {PROGRAM_HEADER_LEN}")]
    BadHeaderSize {
        /// The header's `e_phentsize`.
        size: u16,
    },
    /// No program header.
    #[error("no program headers, so nothing to load; is it an object file?")]
    NoProgramHeaders,
    /// More program headers than Linux reads.
    #[error("{count} program headers, more than the {} that Linux accepts",
        PROGRAM_HEADERS_LIMIT / PROGRAM_HEADER_LEN)]
    TooManyHeaders {
        /// The header's `e_phnum`.
        count: u16,
    },
    /// No `PT_LOAD` that takes up memory.
    #[error("no loadable segment (PT_LOAD), so nothing to run")]
    NoLoadableSegment,
    /// `p_filesz` is above `p_memsz`.
    #[error("corrupt: segment {index} has {file_len} bytes in the file but {mem_len} in memory")]
    FileLargerThanMemory {
        /// The program header.
        index: usize,
        /// Its `p_filesz`.
        file_len: u64,
        /// Its `p_memsz`.
        mem_len: u64,
    },
    /// File offset and address differ modulo the page size.
    #[error(
        "segment {index}: file offset {file_offset:#x} and address {vaddr:#x} differ within the \
         {PAGE_SIZE}-byte page, so it cannot be mapped; link it without -n or -N"
    )]
    Misaligned {
        /// The program header.
        index: usize,
        /// Its `p_offset`.
        file_offset: u64,
        /// Its `p_vaddr`.
        vaddr: u64,
    },
    /// `p_align` is not a power of two.
    #[error("corrupt: program header {index} has alignment {align:#x}, not a power of two")]
    BadAlignment {
        /// The program header.
        index: usize,
        /// Its `p_align`.
        align: u64,
    },
    /// The segment leaves user memory, or its end overflows 64 bits.
    #[error(
        "segment {index}: {mem_len:#x} bytes at {vaddr:#x} end above user memory ({USER_END:#x})"
    )]
    OutsideUserMemory {
        /// The program header.
        index: usize,
        /// Its `p_vaddr`.
        vaddr: u64,
        /// Its `p_memsz`.
        mem_len: u64,
    },
    /// A segment lies below its predecessor.
    #[error("corrupt: segment {index} at {vaddr:#x} is out of order")]
    Unsorted {
        /// The program header.
        index: usize,
        /// Its `p_vaddr`.
        vaddr: u64,
    },
    /// Two segments share a page.
    #[error("segment {index} at {vaddr:#x} shares a page with the segment before it")]
    Overlapping {
        /// The program header.
        index: usize,
        /// Its `p_vaddr`.
        vaddr: u64,
    },
    /// The entry point is in no executable segment.
    #[error(
        "entry point {entry:#x} is in no executable segment; a shared library, or corrupt: name a \
         program"
    )]
    EntryNotExecutable {
        /// The header's `e_entry`.
        entry: u64,
    },
    /// The interpreter's path is empty or longer than `PATH_MAX`.
    #[error(
        "corrupt: interpreter path (PT_INTERP) of {len} bytes, expected 2 to {INTERPRETER_LIMIT}"
    )]
    BadInterpreterLength {
        /// Its `p_filesz`.
        len: u64,
    },
    /// The interpreter's path does not end in NUL.
    #[error("corrupt: interpreter path (PT_INTERP) without a NUL at its end")]
    InterpreterNotTerminated,
    /// `PT_TLS` has more bytes in the file than in memory.
    #[error(
        "corrupt: thread-local segment {index} has {file_len} bytes in the file but {mem_len} in memory"
    )]
    TlsFileLargerThanMemory {
        /// The program header.
        index: usize,
        /// Its `p_filesz`.
        file_len: u64,
        /// Its `p_memsz`.
        mem_len: u64,
    },
    /// Reading failed.
    #[error("cannot be read: {0}")]
    Io(io::Error),
}

struct MachineName(u16);

impl std::fmt::Display for MachineName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.0 {
            elf::EM_386 => "32-bit x86",
            elf::EM_X86_64 => "x86-64",
            elf::EM_ARM => "32-bit ARM",
            elf::EM_AARCH64 => "64-bit ARM (AArch64)",
            elf::EM_RISCV => "RISC-V",
            elf::EM_MIPS => "MIPS",
            elf::EM_PPC => "32-bit PowerPC",
            elf::EM_PPC64 => "64-bit PowerPC",
            elf::EM_S390 => "IBM S/390",
            elf::EM_SPARC => "32-bit SPARC",
            elf::EM_SPARCV9 => "64-bit SPARC",
            elf::EM_LOONGARCH => "LoongArch",
            elf::EM_IA_64 => "Itanium",
            elf::EM_ALPHA => "Alpha",
            elf::EM_BPF => "BPF",
            other => return write!(f, "machine {other}"),
        };
        f.write_str(name)
    }
}

struct TypeName(u16);

impl std::fmt::Display for TypeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            elf::ET_REL => f.write_str("an object file"),
            elf::ET_CORE => f.write_str("a core dump"),
            other => write!(f, "ELF type {other}"),
        }
    }
}

/// Whether a program has addresses of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfKind {
    /// `ET_EXEC`: it runs only at the addresses in the file.
    Fixed,
    /// `ET_DYN`: it runs at any multiple of [`Elf::align`].
    Movable,
}

/// One `PT_LOAD`: its numbers are those of the file, no load bias added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address of its first byte; not on a page boundary in general.
    pub vaddr: u64,
    /// Bytes of memory.
    pub mem_len: u64,
    /// Where its bytes begin in the file.
    pub file_offset: u64,
    /// Bytes that come from the file; the rest of `mem_len` is zero.
    pub file_len: u64,
    /// The rights its header asks for.
    pub prot: Prot,
}

impl Segment {
    /// The boundary at or below its first byte.
    #[must_use]
    pub const fn page_start(&self) -> u64 {
        self.vaddr & !(PAGE_SIZE - 1)
    }

    /// The boundary at or above its end.
    #[must_use]
    pub const fn page_end(&self) -> u64 {
        // Parsing has bounded the sum by USER_END.
        (self.vaddr + self.mem_len + (PAGE_SIZE - 1)) & !(PAGE_SIZE - 1)
    }

    const fn holds(&self, vaddr: u64) -> bool {
        vaddr >= self.vaddr && vaddr - self.vaddr < self.mem_len
    }
}

/// The checked headers of a program or of an ELF interpreter (the dynamic
/// linker).
///
/// # Examples
///
/// ```
/// use dune_loader::{Elf, ElfError};
///
/// let file = std::fs::File::open("/proc/self/exe")?;
/// let elf = Elf::parse(&file).expect("this test is a program");
/// println!("{:?}, {} segments", elf.kind(), elf.segments().len());
///
/// assert!(matches!(Elf::parse(&b"\x7fELF"[..]), Err(ElfError::Truncated { .. })));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    kind: ElfKind,
    entry: u64,
    segments: Vec<Segment>,
    align: u64,
    header_count: u16,
    headers_vaddr: Option<u64>,
    interpreter: Option<CString>,
    stack_prot: Prot,
}

impl Elf {
    /// Reads and checks the headers.
    ///
    /// # Errors
    ///
    /// [`ElfError`], with the first reason found.
    pub fn parse<S: ReadAt + ?Sized>(source: &S) -> Result<Self, ElfError> {
        let reader = Reader {
            source,
            len: source.byte_len().map_err(ElfError::Io)?,
        };
        let header_bytes = reader.identified_header()?;
        let (header, _) = from_bytes::<FileHeader>(&header_bytes)
            .map_err(|()| reader.truncated("the file header", FILE_HEADER_LEN as u64))?;
        let kind = match header.e_type.get(LE) {
            elf::ET_EXEC => ElfKind::Fixed,
            elf::ET_DYN => ElfKind::Movable,
            e_type => return Err(ElfError::NotAProgram { e_type }),
        };
        let table_offset = header.e_phoff.get(LE);
        let table_bytes = reader.program_headers(header)?;
        let table = slice_from_all_bytes::<ProgramHeader>(&table_bytes)
            .map_err(|()| ElfError::NoProgramHeaders)?;

        let mut parsed = Self {
            kind,
            entry: header.e_entry.get(LE),
            segments: Vec::new(),
            align: PAGE_SIZE,
            header_count: header.e_phnum.get(LE),
            headers_vaddr: None,
            interpreter: None,
            stack_prot: Prot::READ | Prot::WRITE,
        };
        for (index, header) in table.iter().enumerate() {
            parsed.take_program_header(index, header, &reader)?;
        }
        if parsed.segments.is_empty() {
            return Err(ElfError::NoLoadableSegment);
        }
        let entry = parsed.entry;
        if !parsed
            .segments
            .iter()
            .any(|s| s.prot.contains(Prot::EXEC) && s.holds(entry))
        {
            return Err(ElfError::EntryNotExecutable { entry });
        }
        parsed.headers_vaddr = parsed.vaddr_of_file(table_offset, table_bytes.len() as u64);
        Ok(parsed)
    }

    fn take_program_header<S: ReadAt + ?Sized>(
        &mut self,
        index: usize,
        header: &ProgramHeader,
        reader: &Reader<'_, S>,
    ) -> Result<(), ElfError> {
        match header.p_type.get(LE) {
            elf::PT_LOAD => self.take_load(index, header, reader),
            elf::PT_INTERP if self.interpreter.is_none() => {
                self.interpreter = Some(reader.interpreter(header)?);
                Ok(())
            }
            elf::PT_TLS => check_tls(index, header),
            elf::PT_GNU_STACK => {
                if header.p_flags.get(LE) & elf::PF_X != 0 {
                    self.stack_prot |= Prot::EXEC;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn take_load<S: ReadAt + ?Sized>(
        &mut self,
        index: usize,
        header: &ProgramHeader,
        reader: &Reader<'_, S>,
    ) -> Result<(), ElfError> {
        let segment = Segment {
            vaddr: header.p_vaddr.get(LE),
            mem_len: header.p_memsz.get(LE),
            file_offset: header.p_offset.get(LE),
            file_len: header.p_filesz.get(LE),
            prot: prot_of(header.p_flags.get(LE)),
        };
        let Segment {
            vaddr,
            mem_len,
            file_offset,
            file_len,
            ..
        } = segment;
        if file_len > mem_len {
            return Err(ElfError::FileLargerThanMemory {
                index,
                file_len,
                mem_len,
            });
        }
        if mem_len == 0 {
            return Ok(());
        }
        if vaddr.checked_add(mem_len).is_none_or(|end| end > USER_END) {
            return Err(ElfError::OutsideUserMemory {
                index,
                vaddr,
                mem_len,
            });
        }
        if file_len > 0 {
            if (file_offset ^ vaddr) & (PAGE_SIZE - 1) != 0 {
                return Err(ElfError::Misaligned {
                    index,
                    file_offset,
                    vaddr,
                });
            }
            reader.require("a segment", file_offset, file_len)?;
        }
        let align = header.p_align.get(LE);
        if align > 1 && !align.is_power_of_two() {
            return Err(ElfError::BadAlignment { index, align });
        }
        if let Some(last) = self.segments.last() {
            if vaddr < last.vaddr {
                return Err(ElfError::Unsorted { index, vaddr });
            }
            if segment.page_start() < last.page_end() {
                return Err(ElfError::Overlapping { index, vaddr });
            }
        }
        self.align = self.align.max(align);
        self.segments.push(segment);
        Ok(())
    }

    /// The address at which `len` bytes from `offset` of the file are loaded.
    fn vaddr_of_file(&self, offset: u64, len: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let into = offset.checked_sub(segment.file_offset)?;
            let fits = into.checked_add(len)? <= segment.file_len;
            fits.then(|| segment.vaddr + into)
        })
    }

    /// Whether it has addresses of its own.
    #[must_use]
    pub fn kind(&self) -> ElfKind {
        self.kind
    }

    /// The entry point, without load bias.
    #[must_use]
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The loadable segments, ascending, each with memory of its own.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// What a base must be a multiple of: the largest `p_align`, a page at
    /// least.
    #[must_use]
    pub fn align(&self) -> u64 {
        self.align
    }

    /// How many program headers there are (`AT_PHNUM`).
    #[must_use]
    pub fn header_count(&self) -> u16 {
        self.header_count
    }

    /// Where the program header table is loaded, without load bias; `None`
    /// when no segment holds it.
    #[must_use]
    pub fn headers_vaddr(&self) -> Option<u64> {
        self.headers_vaddr
    }

    /// The path of the program's dynamic linker; `None` for a static program.
    #[must_use]
    pub fn interpreter(&self) -> Option<&CString> {
        self.interpreter.as_ref()
    }

    /// The rights the program wants on its stack: read and write, and
    /// executable only when `PT_GNU_STACK` asks for it. As on x86-64 Linux, a
    /// missing header does not.
    #[must_use]
    pub fn stack_prot(&self) -> Prot {
        self.stack_prot
    }

    /// Bytes from the first segment's first page to the last one's end: what
    /// a caller that chooses a base must find room for, [`Elf::align`] apart.
    #[must_use]
    pub fn span_len(&self) -> u64 {
        self.last_page_end() - self.first_page()
    }

    /// The page of the lowest segment, without load bias.
    pub(crate) fn first_page(&self) -> u64 {
        self.segments.first().map_or(0, Segment::page_start)
    }

    /// Where the last page of the highest segment ends, without load bias.
    pub(crate) fn last_page_end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::page_end)
    }
}

fn prot_of(p_flags: u32) -> Prot {
    let mut prot = Prot::empty();
    prot.set(Prot::READ, p_flags & elf::PF_R != 0);
    prot.set(Prot::WRITE, p_flags & elf::PF_W != 0);
    prot.set(Prot::EXEC, p_flags & elf::PF_X != 0);
    prot
}

/// The dynamic linker or libc sets thread-local storage up; a corrupt header
/// is named here rather than left to crash it.
fn check_tls(index: usize, header: &ProgramHeader) -> Result<(), ElfError> {
    let (file_len, mem_len) = (header.p_filesz.get(LE), header.p_memsz.get(LE));
    let align = header.p_align.get(LE);
    if file_len > mem_len {
        return Err(ElfError::TlsFileLargerThanMemory {
            index,
            file_len,
            mem_len,
        });
    }
    if align > 1 && !align.is_power_of_two() {
        return Err(ElfError::BadAlignment { index, align });
    }
    Ok(())
}

/// A source together with its length, for errors that say what is missing.
struct Reader<'s, S: ?Sized> {
    source: &'s S,
    len: u64,
}

impl<S: ReadAt + ?Sized> Reader<'_, S> {
    fn truncated(&self, what: &'static str, needed: u64) -> ElfError {
        ElfError::Truncated {
            what,
            needed,
            len: self.len,
        }
    }

    /// Checks that `what` lies within the file.
    fn require(&self, what: &'static str, offset: u64, len: u64) -> Result<(), ElfError> {
        let end = offset.saturating_add(len);
        if end > self.len {
            Err(self.truncated(what, end))
        } else {
            Ok(())
        }
    }

    fn read(&self, what: &'static str, offset: u64, buffer: &mut [u8]) -> Result<(), ElfError> {
        let len = buffer.len() as u64;
        self.require(what, offset, len)?;
        self.source
            .read_exact_at(buffer, offset)
            .map_err(|error| match error.kind() {
                // It shrank since its length was asked for.
                io::ErrorKind::UnexpectedEof => self.truncated(what, offset + len),
                _ => ElfError::Io(error),
            })
    }

    /// The file header, known to be one of a 64-bit little-endian x86-64 file.
    fn identified_header(&self) -> Result<[u8; FILE_HEADER_LEN], ElfError> {
        // Enough of it to tell what the file is, even when it is a cut or a
        // 32-bit one: both classes agree up to `e_version`.
        const IDENTITY_LEN: usize = 20;
        let mut header = [0; FILE_HEADER_LEN];
        let magic = &mut header[..4.min(usize::try_from(self.len).unwrap_or(usize::MAX))];
        self.read("the magic number", 0, magic)?;
        if *magic != elf::ELFMAG {
            return Err(ElfError::BadMagic);
        }
        self.read("the file header", 0, &mut header[..IDENTITY_LEN])?;
        let (class, data) = (header[4], header[5]);
        let machine_bytes = [header[18], header[19]];
        let machine = match data {
            elf::ELFDATA2MSB => u16::from_be_bytes(machine_bytes),
            _ => u16::from_le_bytes(machine_bytes),
        };
        match (machine, class) {
            (elf::EM_X86_64, elf::ELFCLASS64) => {}
            (elf::EM_X86_64, elf::ELFCLASS32) => return Err(ElfError::X32),
            (elf::EM_386, elf::ELFCLASS32) => return Err(ElfError::X86Bits32),
            (elf::EM_X86_64, class) => return Err(ElfError::BadClass { class }),
            (machine, _) => return Err(ElfError::OtherMachine { machine }),
        }
        if data != elf::ELFDATA2LSB {
            return Err(ElfError::BadByteOrder { data });
        }
        self.read("the file header", 0, &mut header)?;
        Ok(header)
    }

    fn program_headers(&self, header: &FileHeader) -> Result<Vec<u8>, ElfError> {
        let (size, count) = (header.e_phentsize.get(LE), header.e_phnum.get(LE));
        if count == 0 {
            return Err(ElfError::NoProgramHeaders);
        }
        if u64::from(size) != PROGRAM_HEADER_LEN {
            return Err(ElfError::BadHeaderSize { size });
        }
        let len = u64::from(count) * PROGRAM_HEADER_LEN;
        if len > PROGRAM_HEADERS_LIMIT {
            return Err(ElfError::TooManyHeaders { count });
        }
        let mut table = vec![0; usize::from(count) * size_of::<ProgramHeader>()];
        self.read(
            "the program header table",
            header.e_phoff.get(LE),
            &mut table,
        )?;
        Ok(table)
    }

    fn interpreter(&self, header: &ProgramHeader) -> Result<CString, ElfError> {
        let len = header.p_filesz.get(LE);
        if !(2..=INTERPRETER_LIMIT).contains(&len) {
            return Err(ElfError::BadInterpreterLength { len });
        }
        let mut path = vec![0; len as usize];
        self.read(
            "the interpreter path (PT_INTERP)",
            header.p_offset.get(LE),
            &mut path,
        )?;
        if path.last() != Some(&0) {
            return Err(ElfError::InterpreterNotTerminated);
        }
        // Like the kernel, stop at the first NUL.
        path.truncate(path.iter().position(|&byte| byte == 0).unwrap_or(0));
        CString::new(path).map_err(|_| ElfError::InterpreterNotTerminated)
    }
}

#[cfg(test)]
mod tests;
