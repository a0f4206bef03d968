//! The heap's blocks: which are free, which have room, what lies where.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::{Bitmap, Block, KINDS, Kind, NONE};
use crate::layout::{BITMAP_WORDS, BLOCK, BLOCK_PAGES, BLOCK_SHIFT, CLASSES, PAGE_SHIFT, cell_at};
use crate::memory::{Reservation, Table};

/// The smallest reservation that is worth a heap.
const SMALLEST: usize = if cfg!(miri) { 1 << 20 } else { 64 << 20 };
/// Blocks of the first segment, and the unit of all others.
const SEGMENT_BLOCKS: u32 = if cfg!(miri) {
    2
} else {
    (16 << 20 >> BLOCK_SHIFT) as u32
};

/// A cell of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) block: u32,
    pub(crate) cell: u32,
}

/// See the module documentation. The bitmaps come in two sets, `current` (what was live after
/// the last collection: *old* objects) and the other, in which a full collection marks.
#[derive(Debug)]
pub(crate) struct Space {
    reservation: Reservation,
    blocks: Table<Block>,
    marks: [Table<[AtomicU64; BITMAP_WORDS]>; 2],
    /// Which of the two is current.
    current: AtomicUsize,
    /// Bytes from the start that ever held an object, in whole blocks.
    used: AtomicUsize,
    /// A bit for each page: to be looked at again, because an old object in it may have got a
    /// pointer to one that is not marked.
    dirty: Table<AtomicU64>,
    lists: Mutex<Lists>,
}

/// Under the lock of the space.
#[derive(Debug)]
pub(crate) struct Lists {
    /// A bit for each free block below `committed`.
    free: Table<AtomicU64>,
    pub(crate) free_blocks: u32,
    /// No block below is free.
    first_free: u32,
    /// Blocks that are readable and writable.
    pub(crate) committed: u32,
    /// Heads of the lists of blocks with room, by kind and class.
    room: [[u32; CLASSES]; KINDS],
    /// Head of the list of blocks that were allocated from since the last collection.
    pub(crate) touched: u32,
}

/// A part of the heap that became usable, in bytes from its start.
pub(crate) type Segment = Range<usize>;

impl Space {
    /// Reserves `bytes` of addresses, or as many as the process's limits allow.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let mut bytes = bytes.next_multiple_of(BLOCK).max(SMALLEST);
        loop {
            match Self::with_reservation(bytes) {
                Ok(space) => return Ok(space),
                Err(error) if bytes / 2 < SMALLEST => return Err(error),
                Err(_) => bytes = (bytes / 2).next_multiple_of(BLOCK),
            }
        }
    }

    fn with_reservation(bytes: usize) -> io::Result<Self> {
        let blocks = bytes / BLOCK;
        Ok(Self {
            reservation: Reservation::new(bytes)?,
            blocks: Table::new(blocks)?,
            marks: [Table::new(blocks)?, Table::new(blocks)?],
            current: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
            dirty: Table::new((blocks * BLOCK_PAGES).div_ceil(64))?,
            lists: Mutex::new(Lists {
                free: Table::new(blocks.div_ceil(64))?,
                free_blocks: 0,
                first_free: 0,
                committed: 0,
                room: [[NONE; CLASSES]; KINDS],
                touched: NONE,
            }),
        })
    }

    pub(crate) fn lists(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first address of the heap.
    #[inline]
    pub(crate) fn start(&self) -> usize {
        self.reservation.start()
    }

    /// Bytes that can ever be used.
    pub(crate) fn capacity(&self) -> usize {
        self.reservation.bytes()
    }

    /// Bytes from the start that may hold objects.
    #[inline]
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Blocks that may hold objects.
    pub(crate) fn used_blocks(&self) -> u32 {
        (self.used() >> BLOCK_SHIFT) as u32
    }

    #[inline]
    pub(crate) fn block(&self, number: u32) -> &Block {
        &self.blocks[number as usize]
    }

    /// All blocks, of which [`used_blocks`](Self::used_blocks) are in use.
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The bitmaps of a set, by block.
    pub(crate) fn bitmaps(&self, set: usize) -> &[[AtomicU64; BITMAP_WORDS]] {
        &self.marks[set & 1]
    }

    #[inline]
    pub(crate) fn address_of(&self, block: u32) -> usize {
        self.start() + ((block as usize) << BLOCK_SHIFT)
    }

    /// The address of a cell.
    #[inline]
    pub(crate) fn cell_address(&self, at: Cell) -> usize {
        let bytes = self.block(at.block).cell_bytes.load(Ordering::Relaxed);
        self.address_of(at.block) + (at.cell * bytes) as usize
    }

    /// Bytes of the object in a cell, including what is lost at its end.
    pub(crate) fn cell_bytes(&self, at: Cell) -> usize {
        let block = self.block(at.block);
        if block.is_large() {
            block.large_bytes.load(Ordering::Relaxed) as usize
        } else {
            block.cell_bytes.load(Ordering::Relaxed) as usize
        }
    }

    /// Which set of bitmaps is current.
    #[inline]
    pub(crate) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// What was marked in the other set is what is live from here on.
    pub(crate) fn exchange_bitmaps(&self) {
        self.current.fetch_xor(1, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn bitmap(&self, set: usize, block: u32) -> Bitmap<'_> {
        Bitmap(&self.marks[set & 1][block as usize])
    }

    /// Forgets the marks of the set that is not current.
    pub(crate) fn clear_other_bitmaps(&self) {
        let other = self.current() ^ 1;
        for number in 0..self.used_blocks() {
            if self.block(number).kind() != Kind::Free {
                self.bitmap(other, number).clear_all();
            }
        }
    }

    /// The cell that holds the byte at an address, be it allocated or not.
    #[inline]
    pub(crate) fn cell_of(&self, address: usize) -> Option<Cell> {
        let offset = address.wrapping_sub(self.start());
        if offset >= self.used() {
            return None;
        }
        let mut number = (offset >> BLOCK_SHIFT) as u32;
        let mut block = self.block(number);
        match block.kind() {
            Kind::Free => return None,
            Kind::Tail => {
                number -= block.back.load(Ordering::Relaxed);
                block = self.block(number);
                // The tail may have been freed and used again between the two looks.
                if !block.is_large() || block.kind() == Kind::Free {
                    return None;
                }
            }
            _ => {}
        }
        let reciprocal = block.reciprocal.load(Ordering::Relaxed);
        let cell = if block.is_large() {
            0
        } else {
            cell_at(offset & (BLOCK - 1), reciprocal)
        };
        (cell < block.cells.load(Ordering::Relaxed)).then_some(Cell {
            block: number,
            cell,
        })
    }

    /// Whether a cell holds an object, as of the last collection or allocated since.
    #[inline]
    pub(crate) fn is_allocated(&self, at: Cell) -> bool {
        at.cell < self.block(at.block).cursor.load(Ordering::Acquire)
            || self.bitmap(self.current(), at.block).get(at.cell)
    }

    /// Remembers that pages, counted from the start of the heap, have to be looked at.
    pub(crate) fn mark_dirty(&self, pages: Range<usize>) {
        let mut page = pages.start;
        while page < pages.end {
            let end = pages.end.min((page / 64 + 1) * 64);
            let bits = (u64::MAX >> (64 - (end - page))) << (page % 64);
            if let Some(word) = self.dirty.get(page / 64) {
                word.fetch_or(bits, Ordering::Relaxed);
            }
            page = end;
        }
    }

    /// The dirty pages of the used part, 64 a word.
    pub(crate) fn dirty_words(&self) -> &[AtomicU64] {
        let words = (self.used() >> PAGE_SHIFT).div_ceil(64);
        self.dirty.get(..words).unwrap_or(&self.dirty)
    }

    /// Forgets all dirty pages.
    pub(crate) fn clear_dirty(&self) {
        for word in self.dirty_words() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Makes more of the reservation usable: half as much again as there is, and at least
    /// `blocks`. `None` where the reservation is used up.
    pub(crate) fn grow(&self, lists: &mut Lists, blocks: u32) -> Option<io::Result<Segment>> {
        let all = (self.capacity() >> BLOCK_SHIFT) as u32;
        let left = all - lists.committed;
        if left < blocks {
            return None;
        }
        let wanted = blocks.max(lists.committed / 2);
        let blocks = wanted.next_multiple_of(SEGMENT_BLOCKS).min(left);
        let first = lists.committed;
        let start = (first as usize) << BLOCK_SHIFT;
        let bytes = (blocks as usize) << BLOCK_SHIFT;
        if let Err(error) = self.reservation.commit(start, bytes) {
            return Some(Err(error));
        }
        for number in first..first + blocks {
            self.block(number).pristine.store(1, Ordering::Relaxed);
            lists.set_free(number);
        }
        lists.committed += blocks;
        Some(Ok(start..start + bytes))
    }

    /// Takes a block with room for a kind and class out of the lists: one that nobody has
    /// used yet, or else one with some room left. It is in the list of touched ones then.
    pub(crate) fn take_small(&self, lists: &mut Lists, kind: Kind, class: usize) -> Option<u32> {
        let with_room = lists.room[kind.index()][class];
        let number = if with_room != NONE {
            lists.room[kind.index()][class] = self.block(with_room).next.load(Ordering::Relaxed);
            with_room
        } else {
            let number = lists.take_free(1)?;
            // Before its kind says that it is in use: a marker beside the program must not take
            // the marks of its last life for objects.
            self.clear_bitmaps(number);
            self.block(number).make_small(kind, class);
            self.note_used(number, 1);
            number
        };
        self.block(number).owned.store(1, Ordering::Relaxed);
        self.touch(lists, number);
        Some(number)
    }

    /// Takes blocks for a large object. It is allocated once its memory is zero:
    /// [`Block::allocate_large`].
    pub(crate) fn take_large(&self, lists: &mut Lists, kind: Kind, bytes: usize) -> Option<u32> {
        let blocks = u32::try_from(bytes.div_ceil(BLOCK)).ok()?.max(1);
        let first = lists.take_free(blocks)?;
        self.clear_bitmaps(first);
        for back in 1..blocks {
            self.block(first + back).make_tail(back);
        }
        self.block(first).make_large(kind, bytes);
        self.note_used(first, blocks);
        self.touch(lists, first);
        Some(first)
    }

    fn clear_bitmaps(&self, block: u32) {
        self.bitmap(0, block).clear_all();
        self.bitmap(1, block).clear_all();
    }

    fn note_used(&self, first: u32, blocks: u32) {
        let end = ((first + blocks) as usize) << BLOCK_SHIFT;
        self.used.fetch_max(end, Ordering::Relaxed);
    }

    pub(crate) fn touch(&self, lists: &mut Lists, number: u32) {
        self.block(number).listed.store(1, Ordering::Relaxed);
        (self.block(number).next).store(lists.touched, Ordering::Relaxed);
        lists.touched = number;
    }

    /// Puts a block into the list of those with room.
    pub(crate) fn give_room(&self, lists: &mut Lists, number: u32) {
        let block = self.block(number);
        let class = block.class() as usize;
        block.listed.store(1, Ordering::Relaxed);
        let head = &mut lists.room[block.kind().index()][class];
        block.next.store(*head, Ordering::Relaxed);
        *head = number;
    }

    /// Frees a block that holds no object, with its tails if it was a large one's.
    pub(crate) fn free(&self, lists: &mut Lists, number: u32) {
        let block = self.block(number);
        let extent = if block.is_large() { block.extent() } else { 1 };
        let bytes = (extent as usize) << BLOCK_SHIFT;
        // Small ones are used again at once; of large ones the memory is given back.
        let is_zero =
            extent > 1 && (self.reservation).discard((number as usize) << BLOCK_SHIFT, bytes);
        for part in number..number + extent {
            let block = self.block(part);
            block.make_free();
            block.owned.store(0, Ordering::Relaxed);
            block.pristine.store(u32::from(is_zero), Ordering::Relaxed);
            lists.set_free(part);
        }
    }
}

impl Lists {
    fn set_free(&mut self, number: u32) {
        let word = &self.free[number as usize / 64];
        word.fetch_or(1 << (number % 64), Ordering::Relaxed);
        self.free_blocks += 1;
        self.first_free = self.first_free.min(number);
    }

    /// Empties all lists of blocks with room, and that of touched ones.
    pub(crate) fn forget(&mut self) {
        self.room = [[NONE; CLASSES]; KINDS];
        self.touched = NONE;
    }

    fn is_free(&self, number: u32) -> bool {
        let word = &self.free[number as usize / 64];
        word.load(Ordering::Relaxed) >> (number % 64) & 1 != 0
    }

    /// Takes the first run of so many free blocks.
    fn take_free(&mut self, blocks: u32) -> Option<u32> {
        let mut first = self.next_free(self.first_free)?;
        self.first_free = first;
        loop {
            let taken = (first..self.committed.min(first.checked_add(blocks)?))
                .find(|number| !self.is_free(*number));
            match taken {
                None if self.committed - first < blocks => return None,
                None => break,
                Some(taken) => first = self.next_free(taken + 1)?,
            }
        }
        for number in first..first + blocks {
            let word = &self.free[number as usize / 64];
            word.fetch_and(!(1 << (number % 64)), Ordering::Relaxed);
        }
        self.free_blocks -= blocks;
        Some(first)
    }

    fn next_free(&self, from: u32) -> Option<u32> {
        let mut number = from;
        while number < self.committed {
            let rest = self.free[number as usize / 64].load(Ordering::Relaxed) >> (number % 64);
            if rest != 0 {
                return Some(number + rest.trailing_zeros());
            }
            number = (number / 64 + 1) * 64;
        }
        None
    }
}
