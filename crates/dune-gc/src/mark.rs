//! Marking: from words to objects, and through the objects' words.
#![expect(unsafe_code, reason = "reads the heap and the roots as words")]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::block::{Bitmap, Kind};
use crate::layout::{BLOCK_PAGES, BLOCK_SHIFT, PAGE, PAGE_SHIFT, cell_at};
use crate::memory::Table;
use crate::space::{Cell, Space};
use crate::typed;

const WORD: usize = size_of::<usize>();
/// Bytes of a conservative object that are looked at before what they led to: bounds the
/// stack's growth by one object.
const PIECE: usize = 2048;

/// What is still to be looked at: pairs of an address and an end, or 0 for a typed object.
#[derive(Debug)]
pub(crate) struct MarkStack {
    entries: Table<AtomicU64>,
    len: usize,
    /// Something did not fit: marked objects whose words were not looked at.
    overflowed: bool,
}

impl MarkStack {
    pub(crate) fn new(entries: usize) -> std::io::Result<Self> {
        Ok(Self {
            entries: Table::new(entries * 2)?,
            len: 0,
            overflowed: false,
        })
    }

    #[inline]
    fn push(&mut self, start: usize, end: usize) {
        match self.entries.get(self.len..self.len + 2) {
            Some([first, second]) => {
                first.store(start as u64, Ordering::Relaxed);
                second.store(end as u64, Ordering::Relaxed);
                self.len += 2;
            }
            _ => self.overflowed = true,
        }
    }

    #[inline]
    fn pop(&mut self) -> Option<(usize, usize)> {
        let from = self.len.checked_sub(2)?;
        let Some([first, second]) = self.entries.get(from..self.len) else {
            return None;
        };
        self.len = from;
        let (start, end) = (
            first.load(Ordering::Relaxed),
            second.load(Ordering::Relaxed),
        );
        Some((start as usize, end as usize))
    }
}

/// Marks in one set of bitmaps. There is one marker at a time.
#[derive(Debug)]
pub(crate) struct Marker<'a> {
    space: &'a Space,
    stack: &'a mut MarkStack,
    /// The set of bitmaps that it marks in.
    set: usize,
    /// Pages that were looked at because they were dirty.
    pub(crate) pages_scanned: u64,
}

impl<'a> Marker<'a> {
    pub(crate) fn new(space: &'a Space, stack: &'a mut MarkStack, set: usize) -> Self {
        Self {
            space,
            stack,
            set,
            pages_scanned: 0,
        }
    }

    /// Marks the object that an address lies in, if it lies in one, and remembers to look
    /// through it.
    #[inline]
    pub(crate) fn mark_word(&mut self, word: usize) {
        let space = self.space;
        let offset = word.wrapping_sub(space.start());
        if offset >= space.used() {
            return;
        }
        let number = (offset >> BLOCK_SHIFT) as u32;
        let block = space.block(number);
        let kind = block.kind();
        if matches!(kind, Kind::Free | Kind::Tail) || block.is_large() {
            return self.mark_large(word);
        }
        let cell = cell_at(
            offset & ((1 << BLOCK_SHIFT) - 1),
            block.reciprocal.load(Ordering::Relaxed),
        );
        let bitmap = space.bitmap(self.set, number);
        if bitmap.get(cell) || cell >= block.cells.load(Ordering::Relaxed) {
            return;
        }
        let at = Cell {
            block: number,
            cell,
        };
        if !space.is_allocated(at) {
            return;
        }
        bitmap.set(cell);
        let bytes = block.cell_bytes.load(Ordering::Relaxed) as usize;
        let start = space.address_of(number) + cell as usize * bytes;
        match kind {
            Kind::Conservative => self.stack.push(start, start + bytes),
            Kind::Typed => self.stack.push(start, 0),
            _ => {}
        }
    }

    #[cold]
    fn mark_large(&mut self, word: usize) {
        let Some(at) = self.space.cell_of(word) else {
            return;
        };
        if self.space.is_allocated(at) && self.space.bitmap(self.set, at.block).set(at.cell) {
            self.push_object(at);
        }
    }

    /// Keeps an object without what it points to.
    pub(crate) fn keep(&mut self, object: usize) {
        if let Some(at) = self.space.cell_of(object) {
            self.bitmap(at.block).set(at.cell);
        }
    }

    /// Remembers to look through an object.
    fn push_object(&mut self, at: Cell) {
        let start = self.space.cell_address(at);
        match self.space.block(at.block).kind() {
            Kind::Conservative => {
                let bytes = self.space.cell_bytes(at) & !(WORD - 1);
                self.stack.push(start, start + bytes);
            }
            Kind::Typed => self.stack.push(start, 0),
            _ => {}
        }
    }

    /// The marks of a block.
    pub(crate) fn bitmap(&self, block: u32) -> Bitmap<'a> {
        self.space.bitmap(self.set, block)
    }

    /// Whether an object is marked.
    pub(crate) fn is_marked(&self, at: Cell) -> bool {
        self.space.bitmap(self.set, at.block).get(at.cell)
    }

    /// Marks what any word of these addresses may point to. Unaligned ends are cut off.
    ///
    /// # Safety
    /// The memory is readable; others may write to it meanwhile.
    #[inline]
    pub(crate) unsafe fn scan(&mut self, start: usize, end: usize) {
        let mut at = start.next_multiple_of(WORD);
        while at + WORD <= end {
            // SAFETY: readable, by the caller's word, and aligned. An atomic, because the
            // program may write to it at the same time.
            let word = unsafe { AtomicUsize::from_ptr(at as *mut usize) }.load(Ordering::Relaxed);
            self.mark_word(word);
            at += WORD;
        }
    }

    /// Looks through all that was marked and not looked at.
    pub(crate) fn drain(&mut self) {
        loop {
            while let Some((start, end)) = self.stack.pop() {
                self.look_through(start, end);
            }
            if !core::mem::take(&mut self.stack.overflowed) {
                return;
            }
            self.recover();
        }
    }

    #[inline]
    fn look_through(&mut self, start: usize, end: usize) {
        if end == 0 {
            // SAFETY: an allocated cell of a block of typed objects.
            unsafe { typed::trace(start, self) };
            return;
        }
        let mut end = end;
        if end - start > PIECE {
            self.stack.push(start + PIECE, end);
            end = start + PIECE;
        }
        // SAFETY: the words of an object in the heap.
        unsafe { self.scan(start, end) };
    }

    /// After an overflow: looks through every marked object again.
    #[cold]
    fn recover(&mut self) {
        for number in 0..self.space.used_blocks() {
            let block = self.space.block(number);
            if !matches!(block.kind(), Kind::Conservative | Kind::Typed) {
                continue;
            }
            let cells = block.cells.load(Ordering::Relaxed);
            let bitmap = self.space.bitmap(self.set, number);
            let mut cell = bitmap.next_set(0, cells);
            while cell < cells {
                self.push_object(Cell {
                    block: number,
                    cell,
                });
                while let Some((start, end)) = self.stack.pop() {
                    self.look_through(start, end);
                }
                cell = bitmap.next_set(cell + 1, cells);
            }
        }
    }

    /// Looks through the marked objects of every dirty page, and takes the pages out of the
    /// set.
    pub(crate) fn scan_dirty(&mut self) {
        let space = self.space;
        for (index, word) in space.dirty_words().iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut left = word.swap(0, Ordering::Relaxed);
            while left != 0 {
                let page = index * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                self.scan_page(page);
            }
        }
    }

    fn scan_page(&mut self, page: usize) {
        let space = self.space;
        let number = (page / BLOCK_PAGES) as u32;
        let block = space.block(number);
        let start = space.start() + (page << PAGE_SHIFT);
        match block.kind() {
            Kind::Free | Kind::Atomic => return,
            Kind::Conservative | Kind::Typed | Kind::Tail => {}
        }
        self.pages_scanned += 1;
        if block.kind() == Kind::Tail || block.is_large() {
            let Some(at) = space.cell_of(start) else {
                return;
            };
            if !self.is_marked(at) {
                return;
            }
            let object = space.cell_address(at);
            let end = object + space.cell_bytes(at);
            self.scan_part(at, object, start, (start + PAGE).min(end));
            return;
        }
        let cells = block.cells.load(Ordering::Relaxed);
        let bytes = block.cell_bytes.load(Ordering::Relaxed) as usize;
        let reciprocal = block.reciprocal.load(Ordering::Relaxed);
        let offset = (page % BLOCK_PAGES) * PAGE;
        let last = cell_at(offset + PAGE - 1, reciprocal).min(cells.saturating_sub(1));
        let bitmap = space.bitmap(self.set, number);
        let mut cell = bitmap.next_set(cell_at(offset, reciprocal), last + 1);
        while cell <= last {
            let object = space.address_of(number) + cell as usize * bytes;
            let at = Cell {
                block: number,
                cell,
            };
            self.scan_part(
                at,
                object,
                object.max(start),
                (object + bytes).min(start + PAGE),
            );
            cell = bitmap.next_set(cell + 1, last + 1);
        }
    }

    /// Looks at the part of a marked object that lies in a page.
    fn scan_part(&mut self, at: Cell, object: usize, start: usize, end: usize) {
        match self.space.block(at.block).kind() {
            // SAFETY: words of an object in the heap.
            Kind::Conservative => unsafe { self.scan(start, end) },
            // SAFETY: an allocated cell of a block of typed objects.
            Kind::Typed => unsafe { typed::trace_part(object, start, end, self) },
            _ => {}
        }
        // Before the next object, so that the stack stays short.
        self.drain_stack();
    }

    fn drain_stack(&mut self) {
        while let Some((start, end)) = self.stack.pop() {
            self.look_through(start, end);
        }
    }
}
