//! Pages that lose the right to be written to, and get it back at the first write.
//!
//! A page is *open* (writable) or closed. An open page counts as written. It is closed when
//! that is collected, if an object in it was marked, so that a write to it would matter.
//!
//! ```text
//!        collect, something in it is marked
//!  open ------------------------------------> closed
//!    ^                                          |
//!    +------ first write, or `will_write` ------+
//! ```

use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::WriteTracker;
use crate::block::Kind;
use crate::layout::{BLOCK, BLOCK_PAGES, PAGE, PAGE_SHIFT, cell_at};
use crate::memory::Table;
use crate::space::Space;

/// The rights of pages, which are counted from the start of the heap.
#[derive(Debug)]
pub(crate) struct Pages {
    /// The first address of the heap.
    start: usize,
    /// Bytes from the start that are readable and writable as far as the heap is concerned.
    usable: AtomicUsize,
    /// A bit for each closed page.
    closed: Table<AtomicU64>,
    /// Held while a bit and the right that it stands for are changed: they must not come apart.
    changing: AtomicBool,
    pub(crate) traps: AtomicU64,
}

impl Pages {
    pub(crate) fn new(space: &Space) -> std::io::Result<Self> {
        Ok(Self {
            start: space.start(),
            usable: AtomicUsize::new(0),
            changing: AtomicBool::new(false),
            closed: Table::new((space.capacity() >> PAGE_SHIFT).div_ceil(64))?,
            traps: AtomicU64::new(0),
        })
    }

    /// A segment became usable, from the end of the last to this address.
    fn cover(&self, end: usize) {
        (self.usable).fetch_max(end - self.start, Ordering::SeqCst);
    }

    /// Spins rather than sleeps: it runs in a signal handler too. Whoever holds it is never
    /// stopped meanwhile (he is critical, the collector, or a handler that blocks signals).
    fn while_changing<R>(&self, body: impl FnOnce() -> R) -> R {
        while self.changing.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
        let result = body();
        self.changing.store(false, Ordering::Release);
        result
    }

    /// In the child of a `fork`, whose other threads are gone: all pages are open, whatever they
    /// were. The rights follow.
    fn open_all(&self) -> (usize, usize) {
        self.changing.store(false, Ordering::Release);
        let usable = self.usable.load(Ordering::SeqCst);
        for word in self.closed.iter().take((usable >> PAGE_SHIFT).div_ceil(64)) {
            word.store(0, Ordering::SeqCst);
        }
        (self.start, usable)
    }

    /// The page of an address that the heap may use.
    pub(crate) fn page_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.start);
        (offset < self.usable.load(Ordering::SeqCst)).then_some(offset >> PAGE_SHIFT)
    }

    pub(crate) fn is_closed(&self, page: usize) -> bool {
        let word = self.closed.get(page / 64);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % 64) & 1 != 0)
    }

    fn set_closed(&self, page: usize) {
        if let Some(word) = self.closed.get(page / 64) {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    fn set_open(&self, page: usize) {
        if let Some(word) = self.closed.get(page / 64) {
            word.fetch_and(!(1 << (page % 64)), Ordering::SeqCst);
        }
    }

    /// First address and length of a run of pages.
    fn span(&self, pages: &Range<usize>) -> (usize, usize) {
        (
            self.start + (pages.start << PAGE_SHIFT),
            pages.len() << PAGE_SHIFT,
        )
    }
}

/// Takes and gives the right to write.
pub(crate) trait Rights: Send + Sync + core::fmt::Debug {
    fn pages(&self) -> &Pages;

    /// Both may be called in a signal handler: no lock, no allocation. `false` where the
    /// kernel refuses, for want of memory for its own tables.
    fn close(&self, start: usize, bytes: usize) -> bool;
    fn open(&self, start: usize, bytes: usize) -> bool;

    /// A segment became usable.
    fn cover(&self, _start: usize, _end: usize) -> Result<(), String> {
        Ok(())
    }

    /// In the child of a `fork`: this much is to be followed, from no page closed on.
    fn renew(&self, start: usize, bytes: usize) -> Result<(), String>;
}

/// Opens a run of pages, or as many around it as the kernel insists on: where it has no room
/// for another border between rights, a larger piece needs none.
pub(crate) fn open(rights: &dyn Rights, run: Range<usize>) -> bool {
    let pages = rights.pages();
    let end = pages.usable.load(Ordering::SeqCst) >> PAGE_SHIFT;
    pages.while_changing(|| {
        let mut unit = 1;
        while unit <= 1 << 20 {
            let first = run.start / unit * unit;
            let run = first..run.end.next_multiple_of(unit).min(end);
            run.clone().for_each(|page| pages.set_open(page));
            let (start, bytes) = pages.span(&run);
            if rights.open(start, bytes) {
                return true;
            }
            unit *= BLOCK_PAGES;
        }
        false
    })
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Protected<R: Rights>(pub(crate) R);

impl<R: Rights> Protected<R> {
    fn close(&self, run: Range<usize>) {
        if run.is_empty() {
            return;
        }
        let pages = self.0.pages();
        let (start, bytes) = pages.span(&run);
        pages.while_changing(|| {
            run.clone().for_each(|page| pages.set_closed(page));
            if !self.0.close(start, bytes) {
                // They stay open, and count as written. A part may be closed already; what
                // cannot be opened again now is when it is written to.
                let _ = self.0.open(start, bytes);
                run.for_each(|page| pages.set_open(page));
            }
        });
    }
}

impl<R: Rights> WriteTracker for Protected<R> {
    fn cover(&self, start: usize, end: usize) -> Result<(), String> {
        self.0.cover(start, end)?;
        self.0.pages().cover(end);
        Ok(())
    }

    fn will_write(&self, address: usize, bytes: usize) {
        let pages = self.0.pages();
        let (Some(first), Some(last)) = (
            pages.page_of(address),
            pages.page_of(address + bytes.max(1) - 1),
        ) else {
            return;
        };
        if (first..=last).all(|page| !pages.is_closed(page)) {
            return;
        }
        // The rest of the block will be filled next: one call for all of it.
        let end = (first / BLOCK_PAGES + 1) * BLOCK_PAGES;
        open(&self.0, first..end.max(last + 1));
    }

    fn collect(&self, space: &Space) {
        let pages = self.0.pages();
        let end = space.used() >> PAGE_SHIFT;
        let mut run = 0..0;
        for (index, word) in pages.closed.iter().take(end.div_ceil(64)).enumerate() {
            let mut open = !word.load(Ordering::SeqCst);
            while open != 0 {
                let page = index * 64 + open.trailing_zeros() as usize;
                open &= open - 1;
                if page >= end || !has_pointers(space, page) {
                    continue;
                }
                space.mark_dirty(page..page + 1);
                if !holds_marked(space, page) {
                    continue;
                }
                if run.end != page {
                    self.close(core::mem::replace(&mut run, page..page));
                }
                run.end = page + 1;
            }
        }
        self.close(run);
    }

    fn after_fork(&self, _: &Space) -> Result<(), String> {
        let (start, bytes) = self.0.pages().open_all();
        self.0.renew(start, bytes)
    }

    fn traps(&self) -> u64 {
        self.0.pages().traps.load(Ordering::Relaxed)
    }
}

fn has_pointers(space: &Space, page: usize) -> bool {
    let kind = space.block((page / BLOCK_PAGES) as u32).kind();
    matches!(kind, Kind::Conservative | Kind::Typed | Kind::Tail)
}

/// Whether a marked object has a part in a page. A page of a large object counts as one that
/// does: nothing else will ever be allocated in it.
fn holds_marked(space: &Space, page: usize) -> bool {
    let number = (page / BLOCK_PAGES) as u32;
    let block = space.block(number);
    if block.kind() == Kind::Tail || block.is_large() {
        return true;
    }
    let reciprocal = block.reciprocal.load(Ordering::Relaxed);
    let cells = block.cells.load(Ordering::Relaxed);
    let offset = page * PAGE % BLOCK;
    let first = cell_at(offset, reciprocal);
    let end = (cell_at(offset + PAGE - 1, reciprocal) + 1).min(cells);
    let marked = |set| space.bitmap(set, number).next_set(first, end) < end;
    marked(0) || marked(1)
}
