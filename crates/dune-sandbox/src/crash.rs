//! Where a program died: registers, and the functions that were being
//! executed.
//!
//! The stack is unwound by the images' own tables (`.eh_frame`), with frame
//! pointers where there are none, and the addresses get their names from
//! symbol tables and debugging information, as far as the files have them. All
//! of it is the program's and may be wrong: unwinding reads its memory through
//! the guard's checked copies and ends at the first thing that makes no sense.

use core::fmt;
use core::ops::Range;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use addr2line::Loader;
use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{Module, ModuleSectionInfo, Unwinder};
use linux_raw_sys::general::{O_NOCTTY, O_NONBLOCK};
use object::{Object, ObjectSection, ObjectSegment};

use crate::engine::{UserRegs, UserState};
use crate::range::USER_HI;
use crate::user::UserMemory;

/// What is shown of a stack at most.
const MOST_FRAMES: usize = 64;
/// More is not read of all files for their tables.
const MOST_OF_IMAGES: u64 = 1 << 30;

/// A program's death by a signal. Its text is several lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// The signal.
    pub signal: u32,
    /// The address that a fault was about.
    pub address: Option<u64>,
    /// The registers.
    pub regs: UserRegs,
    /// The functions that were being executed, the innermost first.
    pub frames: Vec<Frame>,
}

/// One function in execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The instruction: of callers, the one after the call.
    pub address: u64,
    /// The function, if the image has its name.
    pub function: Option<String>,
    /// `file:line`, if the image has debugging information.
    pub place: Option<String>,
    /// The image, and the address in it as its own tables count.
    pub image: Option<(PathBuf, u64)>,
}

impl Crash {
    /// Looks at a program that is dying. Opens files, and reads them: to be called where the
    /// program's other threads do not reach the caller's descriptors.
    pub(crate) fn of(
        signal: u32,
        address: Option<u64>,
        user: &UserState,
        memory: UserMemory<'_>,
    ) -> Self {
        let images = Images::of_this_process();
        Self {
            frames: images.unwind(&user.regs, memory),
            ..Self::without_frames(signal, address, user)
        }
    }

    /// What is known without a look at memory and files.
    pub(crate) fn without_frames(signal: u32, address: Option<u64>, user: &UserState) -> Self {
        Self {
            signal,
            address,
            regs: user.regs,
            frames: Vec::new(),
        }
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the program died of {}", signal_name(self.signal))?;
        if let Some(address) = self.address {
            write!(f, " at address {address:#x}")?;
        }
        let r = &self.regs;
        let rows = [
            [
                ("rip", r.rip),
                ("rsp", r.rsp),
                ("rbp", r.rbp),
                ("flags", r.rflags),
            ],
            [
                ("rax", r.rax),
                ("rbx", r.rbx),
                ("rcx", r.rcx),
                ("rdx", r.rdx),
            ],
            [("rsi", r.rsi), ("rdi", r.rdi), ("r8", r.r8), ("r9", r.r9)],
            [
                ("r10", r.r10),
                ("r11", r.r11),
                ("r12", r.r12),
                ("r13", r.r13),
            ],
        ];
        for row in rows {
            f.write_str("\n ")?;
            for (name, value) in row {
                write!(f, " {name:>5} {value:016x}")?;
            }
        }
        write!(f, "\n    r14 {:016x}   r15 {:016x}", r.r14, r.r15)?;
        for (number, frame) in self.frames.iter().enumerate() {
            write!(f, "\n  #{number:<2} {frame}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.address)?;
        // Names come from the program's files: nothing in them may look like
        // more than a name.
        let plain = |text: &str| text.escape_debug().to_string();
        write!(
            f,
            " {}",
            self.function
                .as_deref()
                .map_or_else(|| "?".to_owned(), plain)
        )?;
        if let Some(place) = &self.place {
            write!(f, " at {}", plain(place))?;
        }
        if let Some((path, offset)) = &self.image {
            write!(f, " ({}+{offset:#x})", plain(&path.to_string_lossy()))?;
        }
        Ok(())
    }
}

/// The ELF files that are mapped in the program's part.
struct Images(Vec<Image>);

struct Image {
    path: PathBuf,
    /// That very file: another may have its name by now.
    file: File,
    /// From the first mapping to the last.
    range: Range<u64>,
    /// What is added to the file's own addresses.
    bias: u64,
    bytes: Vec<u8>,
}

impl Images {
    fn of_this_process() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let mut ranges: BTreeMap<PathBuf, Range<u64>> = BTreeMap::new();
        for (range, path) in maps.lines().filter_map(mapping) {
            if range.end > USER_HI {
                continue;
            }
            let whole = ranges.entry(path).or_insert_with(|| range.clone());
            *whole = whole.start.min(range.start)..whole.end.max(range.end);
        }
        let mut left = MOST_OF_IMAGES;
        let images = ranges
            .into_iter()
            .filter_map(|(path, range)| Image::open(path, range, &mut left));
        Self(images.collect())
    }

    fn unwind(&self, regs: &UserRegs, memory: UserMemory<'_>) -> Vec<Frame> {
        let mut unwinder = UnwinderX86_64::new();
        for image in &self.0 {
            if let Some(module) = image.module() {
                unwinder.add_module(module);
            }
        }
        let mut read = |address: u64| memory.read_value::<u64>(address).map_err(drop);
        let mut cache = CacheX86_64::<_>::new();
        let start = UnwindRegsX86_64::new(regs.rip, regs.rsp, regs.rbp);
        let mut frames = Vec::new();
        let mut walk = unwinder.iter_frames(regs.rip, start, &mut cache, &mut read);
        while frames.len() < MOST_FRAMES
            && let Ok(Some(frame)) = walk.next()
        {
            frames.push((frame.address(), frame.address_for_lookup()));
        }
        let mut names = Names::default();
        frames
            .into_iter()
            .map(|(address, lookup)| self.name(address, lookup, &mut names))
            .collect()
    }

    fn name(&self, address: u64, lookup: u64, names: &mut Names) -> Frame {
        let mut frame = Frame {
            address,
            function: None,
            place: None,
            image: None,
        };
        if let Some(image) = self.0.iter().find(|image| image.range.contains(&lookup)) {
            let inside = lookup.wrapping_sub(image.bias);
            (frame.function, frame.place) = names.find(image, inside);
            frame.image = Some((image.path.clone(), address.wrapping_sub(image.bias)));
        }
        frame
    }
}

/// Symbol tables and debugging information, read once.
#[derive(Default)]
struct Names(BTreeMap<PathBuf, Option<Loader>>);

impl Names {
    fn find(&mut self, image: &Image, address: u64) -> (Option<String>, Option<String>) {
        // The descriptors are this thread's own.
        let open = || Loader::new(format!("/proc/thread-self/fd/{}", image.file.as_raw_fd()));
        let loader = self
            .0
            .entry(image.path.clone())
            .or_insert_with(|| open().ok());
        let Some(loader) = loader else {
            return (None, None);
        };
        let inlined = || {
            let frame = loader.find_frames(address).ok()?.next().ok()??;
            let name = frame.function?;
            name.demangle().ok().map(|name| name.into_owned())
        };
        let function = inlined().or_else(|| {
            let name = loader.find_symbol(address)?;
            Some(addr2line::demangle_auto(name.into(), None).into_owned())
        });
        let place = loader.find_location(address).ok().flatten();
        let place = place.and_then(|place| Some(format!("{}:{}", place.file?, place.line?)));
        (function, place)
    }
}

impl Image {
    /// Opens and reads the file that is mapped there, if it is a regular one and no larger than
    /// what is `left`. The path is the program's.
    fn open(path: PathBuf, range: Range<u64>, left: &mut u64) -> Option<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags((O_NONBLOCK | O_NOCTTY) as i32)
            .open(&path)
            .ok()?;
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        // It may grow meanwhile.
        let len = file.by_ref().take(*left).read_to_end(&mut bytes).ok()?;
        *left -= len as u64;
        let first = {
            let file = object::File::parse(&*bytes).ok()?;
            file.segments().map(|segment| segment.address()).min()?
        };
        const PAGE: u64 = 4096;
        let bias = range.start.wrapping_sub(first & !(PAGE - 1));
        Some(Self {
            path,
            file,
            range,
            bias,
            bytes,
        })
    }

    fn module(&self) -> Option<Module<Vec<u8>>> {
        let file = object::File::parse(&*self.bytes).ok()?;
        let name = self.path.to_string_lossy().into_owned();
        // The file's addresses are counted from zero here.
        Some(Module::new(
            name,
            self.range.clone(),
            self.bias,
            Sections(file),
        ))
    }
}

struct Sections<'a>(object::File<'a>);

impl ModuleSectionInfo<Vec<u8>> for Sections<'_> {
    fn base_svma(&self) -> u64 {
        0
    }

    fn section_svma_range(&mut self, name: &[u8]) -> Option<Range<u64>> {
        let section = self.0.section_by_name_bytes(name)?;
        Some(section.address()..section.address().checked_add(section.size())?)
    }

    fn section_data(&mut self, name: &[u8]) -> Option<Vec<u8>> {
        let section = self.0.section_by_name_bytes(name)?;
        section.data().ok().map(<[u8]>::to_vec)
    }
}

/// Range and file of a line of `/proc/self/maps`.
fn mapping(line: &str) -> Option<(Range<u64>, PathBuf)> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let path = rest.get(rest.find('/')?..)?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?..number(end)?, PathBuf::from(path)))
}

fn signal_name(signal: u32) -> String {
    const NAMES: [(u32, &str); 14] = [
        (1, "SIGHUP"),
        (2, "SIGINT"),
        (3, "SIGQUIT"),
        (4, "SIGILL"),
        (5, "SIGTRAP"),
        (6, "SIGABRT"),
        (7, "SIGBUS"),
        (8, "SIGFPE"),
        (9, "SIGKILL"),
        (11, "SIGSEGV"),
        (13, "SIGPIPE"),
        (15, "SIGTERM"),
        (24, "SIGXCPU"),
        (31, "SIGSYS"),
    ];
    match NAMES.iter().find(|(number, _)| *number == signal) {
        Some((number, name)) => format!("{name} (signal {number})"),
        None => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn lines_of_maps_are_read() {
        let line = "555000-556000 r-xp 00001000 08:01 99   /usr/bin/a b";
        let (range, path) = mapping(line).unwrap();
        assert_eq!((range.start, range.end), (0x55_5000, 0x55_6000));
        assert_eq!(path, Path::new("/usr/bin/a b"));
        assert!(mapping("7f00-7f01 rw-p 0 00:00 0").is_none());
    }

    #[test]
    fn a_crash_is_readable() {
        let crash = Crash {
            signal: 11,
            address: Some(0),
            regs: UserRegs::default(),
            frames: vec![Frame {
                address: 0x1139,
                function: Some("main".to_owned()),
                place: Some("crash.c:3".to_owned()),
                image: Some(("/tmp/crash".into(), 0x1139)),
            }],
        };
        let text = crash.to_string();
        assert!(text.starts_with("the program died of SIGSEGV (signal 11) at address 0x0\n"));
        assert!(
            text.ends_with("#0  0000000000001139 main at crash.c:3 (/tmp/crash+0x1139)"),
            "{text}"
        );
    }
}
