//! Marking: from words to objects, and through the objects' words.
#![expect(unsafe_code, reason = "reads the heap and the roots as words")]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::block::{Bitmap, Block, Kind};
use crate::layout::{BITMAP_WORDS, BLOCK_PAGES, BLOCK_SHIFT, PAGE, PAGE_SHIFT, cell_at};
use crate::memory::Table;
use crate::space::{Cell, Space};
use crate::typed;

const WORD: usize = size_of::<usize>();
/// Bytes of a conservative object or an array that are looked at before what they led to:
/// bounds the stack's growth by one object, and the work between two looks at the allowance.
const PIECE: usize = 2048;
/// In the second word of an entry that is a typed object: the rest is where to go on.
const TYPED: usize = 1;

/// What is still to be looked at: pairs of an address and an end, or of a typed object and
/// where to go on in it (with [`TYPED`]).
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

    /// Forgets what was to be looked at.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.overflowed = false;
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
    /// What every word needs of the space, without a detour.
    start: usize,
    blocks: &'a [Block],
    marks: &'a [[AtomicU64; BITMAP_WORDS]],
    /// How much more is to be looked at before [`work`](Self::work) returns, in words; each
    /// object counts as some more.
    allowance: usize,
    /// What was looked at because it was written to.
    pub(crate) written: Written,
}

/// How much was looked at because it was written to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Written {
    pub(crate) pages: u64,
    /// Bytes of marked objects in them.
    pub(crate) bytes: usize,
}

/// What finding and marking an object costs, beside its words.
const WORDS_OF_AN_OBJECT: usize = 6;

impl<'a> Marker<'a> {
    pub(crate) fn new(space: &'a Space, stack: &'a mut MarkStack, set: usize) -> Self {
        Self {
            space,
            stack,
            set,
            start: space.start(),
            blocks: space.blocks(),
            marks: space.bitmaps(set),
            allowance: usize::MAX,
            written: Written::default(),
        }
    }

    /// Lets [`work`](Self::work) look at so many words.
    pub(crate) fn allow(&mut self, words: usize) {
        self.allowance = words;
    }

    /// Takes from the allowance what so many words would.
    pub(crate) fn spend(&mut self, words: usize) {
        self.allowance = self.allowance.saturating_sub(words);
    }

    /// Looks through what was marked, and through the marked objects of written pages, until
    /// nothing is left or the allowance is used up. Whether nothing is left.
    pub(crate) fn work(&mut self) -> bool {
        self.drain_allowed() && self.scan_dirty() && self.drain_allowed()
    }

    /// Marks the object that an address lies in, if it lies in one, and remembers to look
    /// through it.
    #[inline]
    pub(crate) fn mark_word(&mut self, word: usize) {
        let offset = word.wrapping_sub(self.start);
        if offset < self.space.used() {
            self.mark_offset(offset);
        }
    }

    /// Marks the object that lies so many bytes from the start of the heap, if there is one.
    #[inline]
    fn mark_offset(&mut self, offset: usize) {
        let number = offset >> BLOCK_SHIFT;
        let (Some(block), Some(marks)) = (self.blocks.get(number), self.marks.get(number)) else {
            return;
        };
        let Some(kind) = block.kind_of_cells() else {
            return self.mark_large(offset);
        };
        let cell = cell_at(
            offset & ((1 << BLOCK_SHIFT) - 1),
            block.reciprocal.load(Ordering::Relaxed),
        );
        let bitmap = Bitmap(marks);
        // A cell beyond the last is not below the cursor, and never marked.
        if bitmap.get(cell)
            || (cell >= block.cursor.load(Ordering::Acquire)
                && !self
                    .space
                    .bitmap(self.space.current(), number as u32)
                    .get(cell))
        {
            return;
        }
        bitmap.set(cell);
        let bytes = block.cell_bytes.load(Ordering::Relaxed) as usize;
        let start = self.start + (number << BLOCK_SHIFT) + cell as usize * bytes;
        match kind {
            Kind::Conservative => self.stack.push(start, start + bytes),
            Kind::Typed => self.stack.push(start, start | TYPED),
            _ => {}
        }
    }

    #[cold]
    #[inline(never)]
    fn mark_large(&mut self, offset: usize) {
        let Some(at) = self.space.cell_of(self.start + offset) else {
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
            Kind::Typed => self.stack.push(start, start | TYPED),
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
    #[inline(always)]
    pub(crate) unsafe fn scan(&mut self, start: usize, end: usize) {
        // A pointer to what is put into use meanwhile is written after this was read: its page
        // is looked at once more.
        let (heap, used) = (self.start, self.space.used());
        let mut at = start.next_multiple_of(WORD);
        let end = end & !(WORD - 1);
        while at < end {
            // SAFETY: readable, by the caller's word, and aligned. An atomic, because the
            // program may write to it at the same time.
            let word = unsafe { AtomicUsize::from_ptr(at as *mut usize) }.load(Ordering::Relaxed);
            let offset = word.wrapping_sub(heap);
            if offset < used {
                self.mark_offset(offset);
            }
            at += WORD;
        }
    }

    /// Looks through all that was marked and not looked at.
    pub(crate) fn drain(&mut self) {
        self.allow(usize::MAX);
        self.drain_allowed();
    }

    /// As [`drain`](Self::drain), as far as is allowed. Whether nothing is left.
    fn drain_allowed(&mut self) -> bool {
        loop {
            if !self.drain_stack() {
                return false;
            }
            if !core::mem::take(&mut self.stack.overflowed) {
                return true;
            }
            // In one go: it could not be told how far it came.
            let allowance = core::mem::replace(&mut self.allowance, usize::MAX);
            self.recover();
            self.allowance = allowance;
        }
    }

    #[inline(always)]
    fn look_through(&mut self, start: usize, end: usize) {
        if end & TYPED != 0 {
            return self.look_through_typed(start, end & !TYPED);
        }
        let mut end = end;
        if end - start > PIECE {
            self.stack.push(start + PIECE, end);
            end = start + PIECE;
        }
        self.spend((end - start) / WORD + WORDS_OF_AN_OBJECT);
        // SAFETY: the words of an object in the heap.
        unsafe { self.scan(start, end) };
    }

    /// Looks through a typed object, or through a piece of an array.
    #[inline(always)]
    fn look_through_typed(&mut self, object: usize, from: usize) {
        // SAFETY: an allocated cell of a block of typed objects.
        let Some(info) = (unsafe { typed::info(object) }) else {
            return;
        };
        // SAFETY: its description.
        let end = unsafe { info.end_of_array(object) };
        let next = from + PIECE;
        if next < end {
            self.stack.push(object, next | TYPED);
        }
        let bytes = if info.is_array {
            next.min(end) - from
        } else {
            let block = self.blocks.get((object - self.start) >> BLOCK_SHIFT);
            block.map_or(0, |block| block.cell_bytes.load(Ordering::Relaxed)) as usize
        };
        self.spend(bytes / WORD + WORDS_OF_AN_OBJECT);
        // SAFETY: its description.
        unsafe { (info.trace)(object, from, next, self) };
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
                self.drain_stack();
                cell = bitmap.next_set(cell + 1, cells);
            }
        }
    }

    /// Looks through the marked objects of dirty pages, and takes the pages out of the set, as
    /// far as is allowed. Whether none is left.
    pub(crate) fn scan_dirty(&mut self) -> bool {
        let space = self.space;
        for (index, word) in space.dirty_words().iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut left = word.swap(0, Ordering::Relaxed);
            while left != 0 {
                if self.allowance == 0 {
                    word.fetch_or(left, Ordering::Relaxed);
                    return false;
                }
                let page = index * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                self.scan_page(page);
            }
        }
        true
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
        self.written.pages += 1;
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
        let is_typed = block.kind() == Kind::Typed;
        let mut cell = bitmap.next_set(cell_at(offset, reciprocal), last + 1);
        while cell <= last {
            // Words are words: neighbours are looked at together.
            let next = if is_typed {
                cell + 1
            } else {
                bitmap.next_clear(cell, last + 1)
            };
            let object = space.address_of(number) + cell as usize * bytes;
            let end = space.address_of(number) + next as usize * bytes;
            let at = Cell {
                block: number,
                cell,
            };
            self.scan_part(at, object, object.max(start), end.min(start + PAGE));
            cell = bitmap.next_set(next, last + 1);
        }
    }

    /// Looks at the part of a marked object, or of some beside each other without types, that
    /// lies in a page.
    fn scan_part(&mut self, at: Cell, object: usize, start: usize, end: usize) {
        let bytes = end.saturating_sub(start);
        self.written.bytes += bytes;
        self.spend(bytes / WORD);
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

    /// Whether the stack is empty, or else the allowance is used up.
    #[inline(never)]
    fn drain_stack(&mut self) -> bool {
        while self.allowance > 0 {
            let Some((start, end)) = self.stack.pop() else {
                return true;
            };
            self.look_through(start, end);
        }
        self.stack.len == 0
    }
}
