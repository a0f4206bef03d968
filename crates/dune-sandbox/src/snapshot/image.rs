//! A saved program, as bytes.
//!
//! ```text
//!  0   "DUNESNAP"
//!  8   version
//!  16  bytes of the header that follows
//!  24  the header: see `Image`, field by field; numbers are 8 bytes, little-endian
//!      zeros up to a multiple of 4,096
//!      the pages of the header's runs, one after the other
//! ```
//!
//! The file may come from anybody: reading the header is a pure function, checks
//! every number, and takes no memory but for what is there.

use std::io;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::engine::{Access, UserRegs, UserState};
use crate::range::{PAGE_SIZE, PageRange, USER_HI};
use crate::signal::{Action, AltStack, SIGNALS, SigSet};
use crate::vma::{Area, Areas, Attributes, Backing, Sharing};

const MAGIC: &[u8; 8] = b"DUNESNAP";
/// Of the format. Another one is refused.
const VERSION: u64 = 1;
const PREFIX: usize = 24;
/// No header is longer.
const MOST_HEADER: u64 = 64 << 20;
/// No text in it is longer, and no extended state.
const MOST_BYTES: u64 = 1 << 20;
const MOST_XSTATE: u64 = 64 << 10;

/// Why a file is no saved program that can be resumed here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// It could not be read.
    #[error("cannot read the saved program: {0}")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error("this is no program that `dune snap --save` has saved")]
    Magic,
    /// It was saved by another Dune.
    #[error("the program was saved in format {0}, and this Dune reads {VERSION}; save it again")]
    Version(u64),
    /// It ends too early.
    #[error("the file is too short for what it says of itself; it was not copied whole")]
    Short,
    /// Something in it cannot be.
    #[error("the saved program is damaged: {0}")]
    Damaged(&'static str),
    /// It was saved on another machine, or under another kernel.
    #[error(
        "the program was saved with {what} {saved:?}, and here it is {here:?}; resume it where it \
         was saved, or save it again here"
    )]
    Machine {
        /// What differs.
        what: &'static str,
        /// As it was.
        saved: String,
        /// As it is.
        here: String,
    },
    /// A file that it has open is not what it was.
    #[error("{path} {what}; the program had it open when it was saved: put it back, or save again")]
    File {
        /// Its path.
        path: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Files cannot be opened under this policy.
    #[error(
        "the program had files open or is in another folder, and the policy restricts files; \
         resume it without --strict, --ro and --rw"
    )]
    Policy,
    /// The host kernel refused something.
    #[error("cannot put back {what}: {errno}")]
    Host {
        /// What it was.
        what: &'static str,
        /// What it said.
        errno: crate::host::Errno,
    },
}

/// A file that the program has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OpenFile {
    pub(super) fd: u32,
    /// Of the descriptor.
    pub(super) close_on_exec: bool,
    /// `O_*`.
    pub(super) status: u32,
    pub(super) offset: u64,
    pub(super) path: Vec<u8>,
    pub(super) device: u64,
    pub(super) inode: u64,
    /// Size and time of the last change, of regular files.
    pub(super) contents: Option<(u64, u64)>,
}

/// All but the memory.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(super) kernel: Vec<u8>,
    pub(super) cpu: Vec<u8>,
    pub(super) xcr0: u64,
    pub(super) user: UserState,
    pub(super) xstate: Vec<u8>,
    pub(super) mask: SigSet,
    pub(super) altstack: AltStack,
    /// From signal 1 on.
    pub(super) actions: Vec<Action>,
    pub(super) tid: u32,
    pub(super) clear_child_tid: u64,
    pub(super) robust_list: u64,
    pub(super) exe: Vec<u8>,
    pub(super) arguments: (u64, u64),
    pub(super) environment: (u64, u64),
    pub(super) name: [u8; 16],
    pub(super) directory: Vec<u8>,
    pub(super) umask: u32,
    /// Heap's start and end, and where mappings grow from.
    pub(super) space: [u64; 3],
    pub(super) files: Vec<OpenFile>,
    pub(super) areas: Vec<Area>,
    /// What of them is in the file, in its order.
    pub(super) runs: Vec<PageRange>,
}

impl Image {
    /// The header with everything before the pages.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::new());
        out.bytes(&self.kernel);
        out.bytes(&self.cpu);
        out.number(self.xcr0);
        out.number(self.user.fs_base);
        out.number(self.user.gs_base);
        out.bytes(registers(&self.user.regs).as_bytes());
        out.bytes(&self.xstate);
        out.number(self.mask);
        out.bytes(self.altstack.as_bytes());
        out.number(self.actions.len() as u64);
        for action in &self.actions {
            out.bytes(action.as_bytes());
        }
        out.number(self.tid.into());
        out.number(self.clear_child_tid);
        out.number(self.robust_list);
        out.bytes(&self.exe);
        for (start, end) in [self.arguments, self.environment] {
            out.number(start);
            out.number(end);
        }
        out.bytes(&self.name);
        out.bytes(&self.directory);
        out.number(self.umask.into());
        self.space.iter().for_each(|&value| out.number(value));
        out.number(self.files.len() as u64);
        for file in &self.files {
            out.number(file.fd.into());
            out.number(file.close_on_exec.into());
            out.number(file.status.into());
            out.number(file.offset);
            out.bytes(&file.path);
            out.number(file.device);
            out.number(file.inode);
            let (size, changed) = file.contents.unwrap_or_default();
            out.number(file.contents.is_some().into());
            out.number(size);
            out.number(changed);
        }
        out.number(self.areas.len() as u64);
        for area in &self.areas {
            out.number(area.range.start());
            out.number(area.range.len());
            out.number(area.attributes.access.bits().into());
            out.number(match area.attributes.backing {
                // A program that is served has no clock (`Program::shows_clock`).
                Backing::Anonymous | Backing::File | Backing::Clock => 0,
                Backing::Heap => 1,
                Backing::Stack => 2,
            });
        }
        out.number(self.runs.len() as u64);
        for run in &self.runs {
            out.number(run.start());
            out.number(run.len());
        }
        let header = out.0;
        let mut all = Vec::new();
        all.extend_from_slice(MAGIC);
        all.extend_from_slice(&VERSION.to_le_bytes());
        all.extend_from_slice(&(header.len() as u64).to_le_bytes());
        all.extend_from_slice(&header);
        all.resize(all.len().next_multiple_of(PAGE_SIZE as usize), 0);
        all
    }

    /// Bytes of the header, by the beginning of a file.
    pub(super) fn header_len(prefix: &[u8]) -> Result<u64, ResumeError> {
        let mut reader = Reader(prefix);
        if reader.take(MAGIC.len()).ok_or(ResumeError::Magic)? != MAGIC {
            return Err(ResumeError::Magic);
        }
        match reader.number()? {
            VERSION => {}
            other => return Err(ResumeError::Version(other)),
        }
        match reader.number()? {
            len if len <= MOST_HEADER => Ok(len),
            _ => Err(ResumeError::Damaged("its header is too long")),
        }
    }

    /// Reads a file of `len` bytes whose beginning is `bytes`: at least all
    /// before the pages. Also where the pages begin.
    ///
    /// # Errors
    ///
    /// [`ResumeError`], for anything that cannot be.
    pub(super) fn decode(bytes: &[u8], len: u64) -> Result<(Self, u64), ResumeError> {
        let header = Self::header_len(bytes)?;
        let pages_at = (PREFIX as u64 + header).next_multiple_of(PAGE_SIZE);
        let header = bytes
            .get(PREFIX..PREFIX + header as usize)
            .ok_or(ResumeError::Short)?;
        let image = Self::read(&mut Reader(header))?;
        let pages = image.runs.iter().map(|run| run.len());
        let pages = pages.fold(0_u64, u64::saturating_add);
        if len < pages_at.saturating_add(pages) {
            return Err(ResumeError::Short);
        }
        Ok((image, pages_at))
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, ResumeError> {
        let kernel = from.bytes(MOST_BYTES)?.to_vec();
        let cpu = from.bytes(MOST_BYTES)?.to_vec();
        let xcr0 = from.number()?;
        let (fs_base, gs_base) = (from.number()?, from.number()?);
        let regs = user_registers(&from.value::<[u64; 18]>()?);
        let user = UserState {
            regs,
            fs_base,
            gs_base,
        };
        if [regs.rip, fs_base, gs_base].iter().any(|&at| at >= 1 << 47) {
            return Err(ResumeError::Damaged("its registers"));
        }
        let xstate = from.bytes(MOST_XSTATE)?.to_vec();
        let mask = from.number()?;
        let altstack = from.value()?;
        let actions = from.list(u64::from(SIGNALS), Reader::value)?;
        if actions.len() != SIGNALS as usize {
            return Err(ResumeError::Damaged("its signal handlers"));
        }
        let tid = from.small()?;
        let (clear_child_tid, robust_list) = (from.number()?, from.number()?);
        let exe = from.bytes(MOST_BYTES)?.to_vec();
        let mut block = || Ok::<_, ResumeError>((from.number()?, from.number()?));
        let (arguments, environment) = (block()?, block()?);
        for (start, end) in [arguments, environment] {
            if start > end || end > USER_HI {
                return Err(ResumeError::Damaged("its arguments"));
            }
        }
        let name = from.value()?;
        let directory = from.bytes(MOST_BYTES)?.to_vec();
        let umask = from.small()? & 0o777;
        let space = [from.number()?, from.number()?, from.number()?];
        if space[0] > space[1] || space.iter().any(|&at| at >= USER_HI) {
            return Err(ResumeError::Damaged("its heap"));
        }
        let files = from.list(u64::from(u32::MAX), Self::read_file)?;
        let areas = from.list(u64::from(u32::MAX), Self::read_area)?;
        let mut table = Areas::new();
        for area in &areas {
            if !table.is_free(area.range) {
                return Err(ResumeError::Damaged("its areas lie on each other"));
            }
            table.map(area.range, area.attributes);
        }
        let runs = from.list(u64::from(u32::MAX), |from| {
            PageRange::new(from.number()?, from.number()?)
                .filter(|run| table.is_mapped(*run))
                .ok_or(ResumeError::Damaged("its pages"))
        })?;
        Ok(Self {
            kernel,
            cpu,
            xcr0,
            user,
            xstate,
            mask,
            altstack,
            actions,
            tid,
            clear_child_tid,
            robust_list,
            exe,
            arguments,
            environment,
            name,
            directory,
            umask,
            space,
            files,
            areas,
            runs,
        })
    }

    fn read_file(from: &mut Reader<'_>) -> Result<OpenFile, ResumeError> {
        let (fd, close_on_exec, status) = (from.small()?, from.number()? != 0, from.small()?);
        let offset = from.number()?;
        let path = from.bytes(MOST_BYTES)?.to_vec();
        if i32::try_from(fd).is_err() || i64::try_from(offset).is_err() || path.contains(&0) {
            return Err(ResumeError::Damaged("its open files"));
        }
        let (device, inode) = (from.number()?, from.number()?);
        let is_regular = from.number()? != 0;
        let contents = (from.number()?, from.number()?);
        Ok(OpenFile {
            fd,
            close_on_exec,
            status,
            offset,
            path,
            device,
            inode,
            contents: is_regular.then_some(contents),
        })
    }

    fn read_area(from: &mut Reader<'_>) -> Result<Area, ResumeError> {
        let damaged = ResumeError::Damaged("its areas");
        let Some(range) = PageRange::new(from.number()?, from.number()?) else {
            return Err(damaged);
        };
        let access = u8::try_from(from.number()?)
            .ok()
            .and_then(Access::from_bits);
        let backing = match from.number()? {
            0 => Backing::Anonymous,
            1 => Backing::Heap,
            2 => Backing::Stack,
            _ => return Err(damaged),
        };
        let attributes = Attributes {
            access: access.ok_or(damaged)?,
            sharing: Sharing::Private,
            backing,
        };
        Ok(Area { range, attributes })
    }
}

/// The header of a file that [`super::Stopped::save`] has written, read and checked: all of a
/// saved program but its memory.
///
/// To look at a file before it is resumed. Nothing of this machine is asked: whether the program
/// can be resumed here, [`crate::Command::resume`] finds out.
#[derive(Clone, Debug)]
pub struct Header {
    image: Image,
    pages_at: u64,
}

impl Header {
    /// Reads the header of a file of `len` bytes from its beginning, which holds at least all of
    /// the header. Takes memory in proportion to `bytes`, whatever they say.
    ///
    /// # Errors
    ///
    /// [`ResumeError`], for anything that cannot be.
    pub fn read(bytes: &[u8], len: u64) -> Result<Self, ResumeError> {
        let (image, pages_at) = Image::decode(bytes, len)?;
        Ok(Self { image, pages_at })
    }

    /// What the program has mapped; no two lie on each other.
    #[must_use]
    pub fn areas(&self) -> &[Area] {
        &self.image.areas
    }

    /// The pages of them that the file holds, in its order; the others are zero.
    #[must_use]
    pub fn stored(&self) -> &[PageRange] {
        &self.image.runs
    }

    /// Where in the file the first of them is, in bytes.
    #[must_use]
    pub fn pages_at(&self) -> u64 {
        self.pages_at
    }

    /// The registers that it goes on with.
    #[must_use]
    pub fn registers(&self) -> UserState {
        self.image.user
    }

    /// The header as a file has it, with everything before the pages.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.image.encode()
    }
}

/// In the order of [`UserRegs`].
fn registers(regs: &UserRegs) -> [u64; 18] {
    [
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rsp,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags,
    ]
}

fn user_registers(values: &[u64; 18]) -> UserRegs {
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    ] = *values;
    UserRegs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags: rflags & UserState::RFLAGS_USER,
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Result<u64, ResumeError> {
        let bytes = self.take(8).ok_or(ResumeError::Short)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    }

    fn small(&mut self) -> Result<u32, ResumeError> {
        let number = self.number()?;
        u32::try_from(number).map_err(|_| ResumeError::Damaged("a number is too large"))
    }

    fn bytes(&mut self, most: u64) -> Result<&'a [u8], ResumeError> {
        let len = self.number()?;
        if len > most {
            return Err(ResumeError::Damaged("a text is too long"));
        }
        self.take(len as usize).ok_or(ResumeError::Short)
    }

    fn value<T: FromBytes + IntoBytes + Immutable>(&mut self) -> Result<T, ResumeError> {
        let bytes = self.bytes(MOST_BYTES)?;
        T::read_from_bytes(bytes).map_err(|_| ResumeError::Damaged("a structure has another size"))
    }

    /// Takes memory for what was read, whatever the count says.
    fn list<T>(
        &mut self,
        most: u64,
        mut each: impl FnMut(&mut Self) -> Result<T, ResumeError>,
    ) -> Result<Vec<T>, ResumeError> {
        let count = self.number()?;
        if count > most {
            return Err(ResumeError::Damaged("a list is too long"));
        }
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(each(self)?);
        }
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(super) fn image() -> Image {
        let range = |start, pages| PageRange::new(start, pages * PAGE_SIZE).unwrap();
        let area = |start, pages, backing| Area {
            range: range(start, pages),
            attributes: Attributes {
                access: Access::READ | Access::WRITE,
                sharing: Sharing::Private,
                backing,
            },
        };
        let mut user = UserState::default();
        user.regs.rip = 0x40_1000;
        user.regs.r15 = u64::MAX;
        Image {
            kernel: b"6.1.0".to_vec(),
            cpu: b"a CPU".to_vec(),
            xcr0: 7,
            user,
            xstate: vec![3; 832],
            mask: 1 << 9,
            altstack: AltStack::default(),
            actions: vec![Action::default(); SIGNALS as usize],
            tid: 77,
            clear_child_tid: 0x5000,
            robust_list: 0,
            exe: b"/bin/sh".to_vec(),
            arguments: (0x10, 0x20),
            environment: (0x20, 0x30),
            name: *b"sh\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            directory: b"/tmp".to_vec(),
            umask: 0o22,
            space: [0x50_0000, 0x51_0000, 0x2000_0000_0000],
            files: vec![OpenFile {
                fd: 3,
                close_on_exec: true,
                status: 2,
                offset: 10,
                path: b"/etc/passwd".to_vec(),
                device: 1,
                inode: 2,
                contents: Some((100, 5)),
            }],
            areas: vec![
                area(0x40_0000, 4, Backing::Anonymous),
                area(0x50_0000, 16, Backing::Heap),
                area(0x3000_0000_0000, 16, Backing::Stack),
            ],
            runs: vec![range(0x40_1000, 2), range(0x3000_0000_8000, 3)],
        }
    }

    fn file(image: &Image) -> Vec<u8> {
        let mut bytes = image.encode();
        let pages: u64 = image.runs.iter().map(|run| run.len()).sum();
        bytes.resize(bytes.len() + pages as usize, 1);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<(Image, u64), ResumeError> {
        Image::decode(bytes, bytes.len() as u64)
    }

    #[test]
    fn what_is_written_is_read() {
        let image = image();
        let bytes = file(&image);
        let (read, pages_at) = decode(&bytes).unwrap();
        assert_eq!(pages_at % PAGE_SIZE, 0);
        assert_eq!(pages_at as usize, image.encode().len());
        assert_eq!(read.encode(), image.encode());
        assert_eq!(
            (read.user, read.areas, read.files),
            (image.user, image.areas, image.files)
        );
    }

    #[test]
    fn the_fuzz_target_s_seed_is_in_this_format() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/saved/small");
        let mut small = image();
        small.xstate.truncate(8);
        let bytes = small.encode();
        if std::env::var_os("DUNE_WRITE_SEEDS").is_some() {
            std::fs::write(path, &bytes).unwrap();
        }
        assert!(
            std::fs::read(path).unwrap() == bytes,
            "the format has changed: run this test with DUNE_WRITE_SEEDS=1"
        );
    }

    #[test]
    fn every_beginning_of_a_file_is_refused() {
        let bytes = file(&image());
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn another_format_is_said() {
        let mut bytes = file(&image());
        bytes[8] = 9;
        assert!(matches!(decode(&bytes), Err(ResumeError::Version(9))));
        bytes[0] = b'X';
        assert!(matches!(decode(&bytes), Err(ResumeError::Magic)));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |change: &dyn Fn(&mut Image)| {
            let mut image = image();
            change(&mut image);
            assert!(decode(&file(&image)).is_err());
        };
        refused(&|image| image.user.regs.rip = 1 << 47);
        refused(&|image| image.user.fs_base = u64::MAX);
        refused(&|image| image.areas.push(image.areas[0]));
        refused(&|image| {
            image
                .runs
                .push(PageRange::new(0x60_0000, PAGE_SIZE).unwrap())
        });
        refused(&|image| image.space[1] = USER_HI);
        refused(&|image| image.arguments = (5, 4));
        refused(&|image| image.actions.truncate(3));
        refused(&|image| image.files[0].path.push(0));
        refused(&|image| image.files[0].fd = u32::MAX);
    }

    proptest! {
        /// Whatever the bytes, what is read holds what the rest relies on.
        #[test]
        fn damage_is_refused_or_harmless(
            changes in prop::collection::vec((0_usize..4000, any::<u8>()), 1..8),
        ) {
            let mut bytes = file(&image());
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            if let Ok((image, _)) = decode(&bytes) {
                prop_assert!(image.user.regs.rip < 1 << 47 && image.user.fs_base < 1 << 47);
                prop_assert_eq!(image.user.regs.rflags & !UserState::RFLAGS_USER, 0);
                let mut table = Areas::new();
                for area in &image.areas {
                    prop_assert!(table.is_free(area.range));
                    table.map(area.range, area.attributes);
                }
                for run in &image.runs {
                    prop_assert!(table.is_mapped(*run));
                }
            }
        }

        #[test]
        fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(decode(&bytes).is_err());
            let mut with_magic = MAGIC.to_vec();
            with_magic.extend_from_slice(&VERSION.to_le_bytes());
            with_magic.extend_from_slice(&1500_u64.to_le_bytes());
            with_magic.extend_from_slice(&bytes);
            let _ = decode(&with_magic);
        }
    }
}
