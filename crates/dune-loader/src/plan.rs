//! Where everything goes: from checked headers and chosen bases to mappings.
//!
//! A plan does nothing by itself. Who executes it maps each [`SegmentMap`]
//! into user memory, in this order:
//!
//! ```text
//!            vaddr          vaddr + file_len        vaddr + mem_len
//!              │                    │                      │
//!   pages      ├──────────┬─────────┼────┬──────────┬──────┴─────┤
//!              │ from the file, private  │ anonymous, zero       │
//!              │          │         ▒▒▒▒▒│          │            │
//!              ╰── file_pages() ─────────╯          │            │
//!                                   ╰─┬──╯          │            │
//!                               zero_tail()         │            │
//!                                        ╰─── anonymous_pages() ─╯
//! ```
//!
//! 1. map `file_pages()` privately from `file_offset` of the file;
//! 2. fill `zero_tail()` with zeros (the file has other bytes there), before
//!    taking write access away if `prot` has none;
//! 3. map `anonymous_pages()`, fresh and zero;
//! 4. leave `prot` on all of `pages()`, and nothing mapped between segments.
//!
//! A fixed program or a careless base may hit memory that the host process
//! uses itself: the plan guarantees only that all of it is inside
//! [`Layout::user_range`] and that its parts do not overlap each other.

use thiserror::Error;

use crate::addr::{PAGE_SIZE, Prot, UserAddr, UserRange};
use crate::elf::{Elf, ElfKind, Segment};

/// The bases that the caller chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Lowest address for a movable program, rounded up to its alignment;
    /// ignored for a fixed one.
    pub exe_base: UserAddr,
    /// Lowest address for the program's interpreter, likewise.
    pub interp_base: UserAddr,
    /// The memory that belongs to the program; nothing is planned outside.
    pub user_range: UserRange,
}

/// Which file a message speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImagePart {
    /// The program itself.
    Program,
    /// Its ELF interpreter, the dynamic linker.
    Interpreter,
}

impl std::fmt::Display for ImagePart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Program => "the program",
            Self::Interpreter => "its interpreter",
        })
    }
}

/// Why an image has no place at the bases given.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// A fixed image has addresses outside the user range.
    #[error(
        "{part} can only run at {start:#x}..{end:#x}, outside the memory for programs \
         ({user_range}); link it as a position-independent executable (-pie)"
    )]
    FixedOutsideRange {
        /// The image.
        part: ImagePart,
        /// Its first page.
        start: u64,
        /// The end of its last page.
        end: u64,
        /// The range given.
        user_range: UserRange,
    },
    /// From its base on, the image does not fit into the user range.
    #[error(
        "no room for {part}: {len:#x} bytes, aligned to {align:#x}, from {base} on leave the \
         memory for programs ({user_range})"
    )]
    NoRoom {
        /// The image.
        part: ImagePart,
        /// What it takes, in bytes.
        len: u64,
        /// Its alignment, in bytes.
        align: u64,
        /// The base given.
        base: UserAddr,
        /// The range given.
        user_range: UserRange,
    },
    /// The program and its interpreter were given the same memory.
    #[error("the program at {program} and its interpreter at {interpreter} overlap")]
    Overlap {
        /// The program's pages.
        program: UserRange,
        /// The interpreter's pages.
        interpreter: UserRange,
    },
}

/// One segment in its place. See the module's diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentMap {
    /// Its first page; page-aligned.
    pub vaddr: UserAddr,
    /// The byte of the file at `vaddr`; page-aligned.
    pub file_offset: u64,
    /// Bytes from `vaddr` on that come from the file; 0 for none.
    pub file_len: u64,
    /// Bytes from `vaddr` on that the program has; the file's included.
    pub mem_len: u64,
    /// Rights of all its pages.
    pub prot: Prot,
}

impl SegmentMap {
    /// All its pages.
    #[must_use]
    pub fn pages(&self) -> UserRange {
        self.range(0, page_ceil(self.mem_len))
    }

    /// The pages mapped from the file; `None` when there are none.
    #[must_use]
    pub fn file_pages(&self) -> Option<UserRange> {
        non_empty(self.range(0, page_ceil(self.file_len)))
    }

    /// The bytes after the file's to the end of its last page, which must be
    /// zero. `None` when the file's bytes end with a page, or when the segment
    /// ends with the file's bytes: then that page shows what follows in the
    /// file, as on Linux.
    #[must_use]
    pub fn zero_tail(&self) -> Option<UserRange> {
        (self.mem_len > self.file_len)
            .then(|| self.range(self.file_len, page_ceil(self.file_len)))
            .and_then(non_empty)
    }

    /// The pages after the file's, fresh and zero; `None` when there are none.
    #[must_use]
    pub fn anonymous_pages(&self) -> Option<UserRange> {
        non_empty(self.range(page_ceil(self.file_len), page_ceil(self.mem_len)))
    }

    /// `from..to` in bytes from `vaddr`. Planning has placed all of the
    /// segment's pages in user memory; should the fields have been changed
    /// since, the range is empty.
    fn range(&self, from: u64, to: u64) -> UserRange {
        self.vaddr
            .checked_add(from)
            .zip(self.vaddr.checked_add(to))
            .and_then(|(start, end)| UserRange::new(start, end))
            .unwrap_or(UserRange::EMPTY)
    }
}

/// The program's ELF interpreter in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterpreterPlan {
    /// Its segments, ascending.
    pub segments: Vec<SegmentMap>,
    /// What was added to the addresses in its file (`AT_BASE`), modulo 2^64.
    pub load_bias: u64,
    /// Its entry point, where the thread starts.
    pub entry: UserAddr,
    /// From its first page to the end of its last.
    pub span: UserRange,
}

/// A program in its place, ready to be mapped and started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadPlan {
    /// The program's segments, ascending.
    pub segments: Vec<SegmentMap>,
    /// What was added to the addresses in its file, modulo 2^64.
    pub load_bias: u64,
    /// The program's own entry point (`AT_ENTRY`); see [`LoadPlan::start`].
    pub entry: UserAddr,
    /// Where its program headers are (`AT_PHDR`), unless no segment holds them.
    pub headers: Option<UserAddr>,
    /// How many program headers there are (`AT_PHNUM`).
    pub header_count: u16,
    /// Its interpreter; `None` for a static program.
    pub interpreter: Option<InterpreterPlan>,
    /// Where the heap of `brk` starts: the page after the last segment. What
    /// is free above it is the caller's doing.
    pub brk_start: UserAddr,
    /// The rights the program wants on its stack.
    pub stack_prot: Prot,
    /// From the program's first page to the end of its last.
    pub span: UserRange,
}

impl LoadPlan {
    /// Places a program and, when it has one, its interpreter.
    ///
    /// # Errors
    ///
    /// [`PlanError`] when a part does not fit the layout, or both overlap.
    ///
    /// # Examples
    ///
    /// ```
    /// use dune_loader::{Elf, Layout, LoadPlan, UserAddr, UserRange};
    ///
    /// let file = std::fs::File::open("/proc/self/exe")?;
    /// let exe = Elf::parse(&file).expect("this test is a program");
    /// let at = |address| UserAddr::new(address).unwrap();
    /// let layout = Layout {
    ///     exe_base: at(0x10_0000_0000),
    ///     interp_base: at(0x20_0000_0000),
    ///     user_range: UserRange::new(at(0x1_0000), at(0x40_0000_0000)).unwrap(),
    /// };
    /// let plan = LoadPlan::new(&exe, None, &layout).expect("there is room");
    /// for segment in &plan.segments {
    ///     println!("{} {} from {:#x}", segment.pages(), segment.prot, segment.file_offset);
    /// }
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn new(exe: &Elf, interpreter: Option<&Elf>, layout: &Layout) -> Result<Self, PlanError> {
        let program = Placed::new(exe, ImagePart::Program, layout.exe_base, layout)?;
        let interpreter = interpreter
            .map(|elf| Placed::new(elf, ImagePart::Interpreter, layout.interp_base, layout))
            .transpose()?;
        if let Some(interpreter) = &interpreter
            && interpreter.span.overlaps(program.span)
        {
            let (program, interpreter) = (program.span, interpreter.span);
            return Err(PlanError::Overlap {
                program,
                interpreter,
            });
        }
        Ok(Self {
            entry: program.entry,
            headers: program.headers,
            header_count: exe.header_count(),
            brk_start: program.span.end(),
            stack_prot: exe.stack_prot(),
            span: program.span,
            load_bias: program.load_bias,
            segments: program.segments,
            interpreter: interpreter.map(|placed| InterpreterPlan {
                segments: placed.segments,
                load_bias: placed.load_bias,
                entry: placed.entry,
                span: placed.span,
            }),
        })
    }

    /// The first instruction to run: the interpreter's, or the program's own.
    #[must_use]
    pub fn start(&self) -> UserAddr {
        self.interpreter
            .as_ref()
            .map_or(self.entry, |interpreter| interpreter.entry)
    }
}

/// One ELF file, program or interpreter, in its place.
struct Placed {
    segments: Vec<SegmentMap>,
    load_bias: u64,
    entry: UserAddr,
    headers: Option<UserAddr>,
    span: UserRange,
}

impl Placed {
    fn new(elf: &Elf, part: ImagePart, base: UserAddr, layout: &Layout) -> Result<Self, PlanError> {
        let user_range = layout.user_range;
        let (load_bias, misfit) = match elf.kind() {
            ElfKind::Fixed => {
                let (start, end) = (elf.first_page(), elf.last_page_end());
                (
                    Some(0),
                    PlanError::FixedOutsideRange {
                        part,
                        start,
                        end,
                        user_range,
                    },
                )
            }
            ElfKind::Movable => {
                let (len, align) = (elf.span_len(), elf.align());
                let no_room = PlanError::NoRoom {
                    part,
                    len,
                    align,
                    base,
                    user_range,
                };
                (bias_for(elf, base), no_room)
            }
        };
        load_bias
            .and_then(|bias| Self::at_bias(elf, bias))
            .filter(|placed| user_range.contains_range(placed.span))
            .ok_or(misfit)
    }

    /// Adds the bias everywhere; `None` when something leaves user memory.
    fn at_bias(elf: &Elf, load_bias: u64) -> Option<Self> {
        let moved = |vaddr: u64| UserAddr::new(vaddr.wrapping_add(load_bias)).ok();
        let span = UserRange::new(moved(elf.first_page())?, moved(elf.last_page_end())?)?;
        let segments = elf
            .segments()
            .iter()
            .map(|segment| Some(map_segment(segment, moved(segment.page_start())?)))
            .collect::<Option<_>>()?;
        let headers = match elf.headers_vaddr() {
            Some(vaddr) => Some(moved(vaddr)?),
            None => None,
        };
        Some(Self {
            segments,
            load_bias,
            entry: moved(elf.entry())?,
            headers,
            span,
        })
    }
}

/// The multiple of the file's alignment that moves its first segment to `base`
/// or the next place above; `None` when that overflows. Modulo 2^64, as it is
/// negative when the file's own addresses lie above `base`.
fn bias_for(elf: &Elf, base: UserAddr) -> Option<u64> {
    let align = elf.align();
    let first = elf.first_page();
    let aligned_first = first & !(align - 1);
    // The first page lies `first - aligned_first` above an aligned address.
    let into = first - aligned_first;
    let place = base
        .page_ceil()
        .get()
        .saturating_sub(into)
        .checked_next_multiple_of(align)?;
    Some(place.wrapping_sub(aligned_first))
}

fn map_segment(segment: &Segment, vaddr: UserAddr) -> SegmentMap {
    // Bytes between the page's start and the segment's; the file's offset has
    // as many, since both agree modulo the page size.
    let slack = segment.vaddr - segment.page_start();
    let (file_offset, file_len) = match segment.file_len {
        0 => (0, 0),
        len => (segment.file_offset - slack, len + slack),
    };
    SegmentMap {
        vaddr,
        file_offset,
        file_len,
        mem_len: segment.mem_len + slack,
        prot: segment.prot,
    }
}

fn page_ceil(len: u64) -> u64 {
    len.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX)
}

fn non_empty(range: UserRange) -> Option<UserRange> {
    (!range.is_empty()).then_some(range)
}

#[cfg(test)]
mod tests;
