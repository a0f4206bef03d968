//! What a compartment runs in: an address space with the program in it, and pages of its own.
//!
//! Pages come into being when they are touched. They stay for the next use: going back to
//! the beginning means putting back what the dirty bits say was written. Clearing a dirty bit
//! costs a flush, so a page that is written in every use keeps it, and is put back without
//! asking. The top of the stack is one from the beginning: the guard writes to it too, by
//! another way than the tables that have the bit.
#![expect(unsafe_code, reason = "maps pages of its own for ring 3")]

use dune::memory::{AddressSpace, Flush, PageEntry, PageSize, PteFlags, SpaceError, VirtRange};
use dune_x86::addr::GuestVirt;

use crate::frames::Frame;
use crate::layout::{
    HEAP_END, HEAP_START, INPUT_START, PAGE, STACK_BOTTOM, STACK_TOP, page_of, page_up,
};
use crate::runtime::Runtime;

/// Uses in a row in which a page was written, after which that is taken for granted.
const HABIT: u8 = 2;
/// Pages that are kept for the next use; the others go back.
const KEPT: usize = 64;

/// The size limits of a compartment, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) stack: u64,
    pub(crate) memory: u64,
}

/// Why a page was not given.
#[derive(Debug)]
pub(crate) enum Denied {
    /// It is not the compartment's to use so.
    NotGranted,
    StackOverflow,
    OutOfMemory,
    Space(SpaceError),
}

impl From<SpaceError> for Denied {
    fn from(error: SpaceError) -> Self {
        Self::Space(error)
    }
}

/// A page of the compartment's own.
#[derive(Debug)]
struct Private {
    at: u64,
    frame: Frame,
    entry: Option<PageEntry>,
    /// Where its first contents are; zeros if nowhere.
    original: Option<u64>,
    /// Uses in a row in which it was written.
    written: u8,
}

impl Private {
    fn fill(&self) {
        match self.original {
            // SAFETY: a page of the image or of a tag, which stays for as long as this; no Rust
            // reference leads there.
            Some(original) => unsafe { self.frame.copy_from(original) },
            None => self.frame.zero(),
        }
    }
}

/// A page that is shared until it is written: from a tag granted copy-on-write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyOnWrite {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

#[derive(Debug)]
pub(crate) struct Shell {
    pub(crate) space: AddressSpace,
    runtime: &'static Runtime,
    /// The first is the top of the stack.
    pages: Vec<Private>,
    copied: Vec<CopyOnWrite>,
}

impl Shell {
    pub(crate) fn new(runtime: &'static Runtime) -> Result<Self, SpaceError> {
        let mut space = AddressSpace::empty()?;
        runtime.image().lend_to(&mut space)?;
        if let Some((at, from, bytes)) = runtime.image().thread_pages() {
            // SAFETY: read-only, and never unmapped.
            unsafe { space.map_memory(range_of(at, at + bytes), from, PteFlags::R) }?;
        }
        let mut shell = Self {
            space,
            runtime,
            pages: Vec::with_capacity(8),
            copied: Vec::new(),
        };
        shell.add(STACK_TOP - PAGE, None)?;
        Ok(shell)
    }

    /// The page at the top of the stack.
    pub(crate) fn stack_top(&self) -> Option<&Frame> {
        self.pages.first().map(|page| &page.frame)
    }

    /// Gives the compartment a page of its own, in place of a shared one if there is one.
    fn add(&mut self, at: u64, original: Option<u64>) -> Result<(), SpaceError> {
        let frame = self.runtime.frames().take()?;
        let mut page = Private {
            at,
            frame,
            entry: None,
            original,
            written: if at == STACK_TOP - PAGE { HABIT } else { 0 },
        };
        page.fill();
        let result = self.map(&page);
        if let Err(error) = result {
            self.runtime.frames().give(page.frame);
            return Err(error);
        }
        page.entry = self.space.page_entry(GuestVirt::new_truncate(at));
        self.pages.push(page);
        Ok(())
    }

    fn map(&self, page: &Private) -> Result<(), SpaceError> {
        let range = page_range(page.at);
        if page.original.is_none() {
            // SAFETY: a frame is memory of this process for good, and nobody else's.
            return unsafe {
                self.space
                    .map_memory(range, page.frame.address(), PteFlags::RW)
            };
        }
        self.space.own_tables(range.start())?;
        // SAFETY: as above.
        unsafe {
            self.space
                .replace_memory(range, page.frame.address(), PteFlags::RW)
        }
    }

    /// Whether the compartment may write to a page already, as it may to all of its own.
    fn has(&self, page: u64) -> bool {
        let walk = self.space.walk(GuestVirt::new_truncate(page)).ok();
        walk.and_then(|walk| walk.permissions())
            .is_some_and(|rights| rights.user && rights.writable)
    }

    /// Gives the page at an address that ring 3 could not use, if it has a claim to it.
    pub(crate) fn resolve(
        &mut self,
        address: u64,
        is_write: bool,
        limits: Limits,
    ) -> Result<(), Denied> {
        let page = page_of(address);
        let stack = STACK_TOP - page_up(limits.stack);
        let original = match page {
            _ if (stack..STACK_TOP).contains(&page) => None,
            _ if (STACK_BOTTOM..stack).contains(&page) => return Err(Denied::StackOverflow),
            _ if (HEAP_START..HEAP_END).contains(&page) => None,
            _ if !is_write => return Err(Denied::NotGranted),
            _ => match self.runtime.image().original(page) {
                Some(original) => Some(original),
                None if self.is_copied(page) => Some(page),
                None => return Err(Denied::NotGranted),
            },
        };
        if self.has(page) {
            return Err(Denied::NotGranted);
        }
        self.claim(limits)?;
        self.add(page, original).map_err(Denied::Space)
    }

    fn is_copied(&self, page: u64) -> bool {
        self.copied
            .iter()
            .any(|range| (range.start..range.end).contains(&page))
    }

    fn claim(&self, limits: Limits) -> Result<(), Denied> {
        if (self.pages.len() as u64 + 1) * PAGE > limits.memory {
            return Err(Denied::OutOfMemory);
        }
        Ok(())
    }

    /// Makes sure that a range of the stack or of the input has pages.
    pub(crate) fn populate(
        &mut self,
        start: u64,
        bytes: u64,
        limits: Limits,
    ) -> Result<(), Denied> {
        let mut page = page_of(start);
        while page < start + bytes {
            if !self.has(page) {
                self.claim(limits)?;
                self.add(page, None)?;
            }
            page += PAGE;
        }
        Ok(())
    }

    /// Everything private as it was at the start.
    pub(crate) fn reset(&mut self) {
        let mut flush = Flush::nothing();
        for page in &mut self.pages {
            if page.written >= HABIT {
                page.fill();
                continue;
            }
            let Some(entry) = page.entry.filter(|entry| self.space.is_dirty(*entry)) else {
                page.written = 0;
                continue;
            };
            page.fill();
            page.written += 1;
            if page.written < HABIT
                && let Ok(more) = self.space.clear_dirty_bit(entry)
            {
                flush = flush.and(more);
            }
        }
        if self.pages.len() > KEPT {
            self.drop_pages(KEPT);
        }
        if !flush.is_nothing() {
            self.space.pay(flush);
        }
    }

    /// Gives all pages back but the first `keep`.
    fn drop_pages(&mut self, keep: usize) {
        for page in self.pages.drain(keep.min(self.pages.len())..) {
            let range = page_range(page.at);
            // What cannot be unmapped stays the compartment's: its frame is lost to the pool,
            // and to nobody else's harm.
            if self.space.unmap(range).is_err() {
                continue;
            }
            if let Some(original) = page.original {
                // SAFETY: what was mapped there before, read-only.
                let _ = unsafe { self.space.map_memory(range, original, PteFlags::R) };
            }
            self.runtime.frames().give(page.frame);
        }
    }

    /// Gives back what the compartment does not need to begin.
    pub(crate) fn trim(&mut self) {
        self.drop_pages(1);
    }

    /// Maps a part of a tag.
    ///
    /// # Safety
    /// The memory must stay the tag's until [`hide`](Self::hide).
    pub(crate) unsafe fn show(
        &mut self,
        start: u64,
        end: u64,
        rights: PteFlags,
        copied: bool,
    ) -> Result<(), SpaceError> {
        let range = range_of(start, end);
        // SAFETY: the caller's word; a tag's memory is never referred to.
        unsafe { self.space.map_memory(range, start, rights) }?;
        if copied {
            self.copied.push(CopyOnWrite { start, end });
        }
        Ok(())
    }

    /// Unmaps a part of a tag.
    pub(crate) fn hide(&mut self, start: u64, end: u64) -> Result<(), SpaceError> {
        self.copied.retain(|range| range.start != start);
        let mut index = 1;
        while index < self.pages.len() {
            if (start..end).contains(&self.pages[index].at) {
                let page = self.pages.swap_remove(index);
                self.space.unmap(page_range(page.at))?;
                page.frame.zero();
                self.runtime.frames().give(page.frame);
            } else {
                index += 1;
            }
        }
        self.space.unmap(range_of(start, end))
    }

    /// Shows a page of the process where it is. The shell is not used again.
    pub(crate) fn show_process(&mut self, address: u64, writable: bool) -> Result<(), SpaceError> {
        let page = page_of(address);
        let rights = if writable { PteFlags::RW } else { PteFlags::R };
        self.space.own_tables(GuestVirt::new_truncate(page))?;
        // SAFETY: whoever learns has promised that the function uses the process's memory as
        // it would in the process (`Builder::learn`), which has it mapped so.
        unsafe { self.space.replace_memory(page_range(page), page, rights) }
    }

    /// Pages of memory and of page tables that are this compartment's alone.
    pub(crate) fn private_pages(&self) -> usize {
        self.pages.len()
    }

    /// The compartment's input area starts here.
    pub(crate) const INPUT: u64 = INPUT_START;
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The address space goes next; no CPU runs it, and a CPU that remembers it is told to
        // forget when its identifier is used again.
        for page in self.pages.drain(..) {
            self.runtime.frames().give(page.frame);
        }
    }
}

fn page_range(at: u64) -> VirtRange {
    VirtRange::page(GuestVirt::new_truncate(at), PageSize::Size4KiB)
}

fn range_of(start: u64, end: u64) -> VirtRange {
    let at = GuestVirt::new_truncate(start);
    VirtRange::try_new(at, end - start).unwrap_or(VirtRange::empty_at(at))
}
