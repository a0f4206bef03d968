//! What is known of a block, beside the block: marking writes here, and never to the heap.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::layout::{BITMAP_WORDS, BLOCK, CELL_BYTES, reciprocal};

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// Nothing.
    Free = 0,
    /// Objects any word of which may be a pointer.
    Conservative = 1,
    /// Objects without pointers.
    Atomic = 2,
    /// Objects that begin with the address of a description of their type.
    Typed = 3,
    /// A part of a large object other than its first block.
    Tail = 4,
}

/// The kinds that can be allocated.
pub(crate) const KINDS: usize = 3;

impl Kind {
    #[inline]
    fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Conservative,
            2 => Self::Atomic,
            3 => Self::Typed,
            4 => Self::Tail,
            _ => Self::Free,
        }
    }

    /// Index among the kinds that can be allocated.
    #[inline]
    pub(crate) fn index(self) -> usize {
        (self as usize).wrapping_sub(1).min(KINDS - 1)
    }
}

/// In the kind of a large object's first block: so that a marker need not look at the class.
const OF_LARGE: u32 = 1 << 8;

/// The class of a block that one large object fills.
pub(crate) const LARGE: u32 = 255;
/// No block.
pub(crate) const NONE: u32 = u32::MAX;

/// The descriptor of a block. Zero is a free block.
///
/// Written by whoever owns the block (see `owned`), otherwise under the heap's lock or while
/// the world is stopped; read by the marker at any time. `kind` is written last, with release.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// The number of its kind; of the first block of a large object with [`OF_LARGE`].
    kind: AtomicU32,
    class: AtomicU32,
    pub(crate) cell_bytes: AtomicU32,
    pub(crate) reciprocal: AtomicU32,
    pub(crate) cells: AtomicU32,
    /// Cells below are allocated, be they marked or not; of those from here on only the
    /// marked ones are.
    pub(crate) cursor: AtomicU32,
    /// The next block in the list that this one is in.
    pub(crate) next: AtomicU32,
    /// 1 while it is in a list, of touched ones or of those with room.
    pub(crate) listed: AtomicU32,
    /// 1 while a thread allocates from it.
    pub(crate) owned: AtomicU32,
    /// 1 while no cell was ever used: the memory is zero.
    pub(crate) pristine: AtomicU32,
    /// Of a tail: how many blocks the head is before it.
    pub(crate) back: AtomicU32,
    /// Cells that were marked when the lists were made last.
    pub(crate) marked: AtomicU32,
    /// Bytes of a large object.
    pub(crate) large_bytes: AtomicU64,
}

const _: () = assert!(size_of::<Block>() == 64);

impl Block {
    #[inline]
    pub(crate) fn kind(&self) -> Kind {
        let number = self.kind.load(core::sync::atomic::Ordering::Acquire);
        Kind::from_number(number & !OF_LARGE)
    }

    /// The kind of a block of cells; `None` for one that is free or of a large object.
    #[inline]
    pub(crate) fn kind_of_cells(&self) -> Option<Kind> {
        let number = self.kind.load(core::sync::atomic::Ordering::Acquire);
        (number.wrapping_sub(1) < KINDS as u32).then(|| Kind::from_number(number))
    }

    #[inline]
    pub(crate) fn class(&self) -> u32 {
        self.class.load(Relaxed)
    }

    #[inline]
    pub(crate) fn is_large(&self) -> bool {
        self.class() == LARGE
    }

    pub(crate) fn is_owned(&self) -> bool {
        self.owned.load(Relaxed) != 0
    }

    fn set_kind(&self, kind: Kind) {
        (self.kind).store(kind as u32, core::sync::atomic::Ordering::Release);
    }

    /// Divides it into cells of a class.
    pub(crate) fn make_small(&self, kind: Kind, class: usize) {
        let bytes = CELL_BYTES.get(class).copied().unwrap_or(BLOCK as u32);
        self.class.store(class as u32, Relaxed);
        self.cell_bytes.store(bytes, Relaxed);
        self.reciprocal.store(reciprocal(bytes), Relaxed);
        self.cells.store(BLOCK as u32 / bytes, Relaxed);
        self.cursor.store(0, Relaxed);
        self.marked.store(0, Relaxed);
        self.set_kind(kind);
    }

    /// Makes it the first block of a large object, which is not allocated yet.
    pub(crate) fn make_large(&self, kind: Kind, bytes: usize) {
        self.class.store(LARGE, Relaxed);
        // Every offset is in cell 0.
        self.cell_bytes.store(BLOCK as u32, Relaxed);
        self.reciprocal.store(reciprocal(BLOCK as u32), Relaxed);
        self.cells.store(1, Relaxed);
        self.cursor.store(0, Relaxed);
        self.marked.store(0, Relaxed);
        self.large_bytes.store(bytes as u64, Relaxed);
        self.kind.store(
            kind as u32 | OF_LARGE,
            core::sync::atomic::Ordering::Release,
        );
    }

    /// The memory of its large object is zero: from here on the object is looked through.
    pub(crate) fn allocate_large(&self) {
        self.cursor.store(1, core::sync::atomic::Ordering::Release);
    }

    /// Makes it a later block of a large object.
    pub(crate) fn make_tail(&self, back: u32) {
        self.back.store(back, Relaxed);
        self.set_kind(Kind::Tail);
    }

    /// Nothing is in it any more.
    pub(crate) fn make_free(&self) {
        self.set_kind(Kind::Free);
        self.cursor.store(0, Relaxed);
    }

    /// Blocks of a large object.
    pub(crate) fn extent(&self) -> u32 {
        (self.large_bytes.load(Relaxed) as usize)
            .div_ceil(BLOCK)
            .max(1) as u32
    }
}

/// The mark bits of one block, one for each cell.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bitmap<'a>(pub(crate) &'a [AtomicU64; BITMAP_WORDS]);

impl Bitmap<'_> {
    #[inline]
    pub(crate) fn get(self, cell: u32) -> bool {
        self.word(cell).load(Relaxed) >> (cell % 64) & 1 != 0
    }

    /// Sets a bit; whether it was clear. Only one thread at a time sets bits.
    #[inline]
    pub(crate) fn set(self, cell: u32) -> bool {
        let word = self.word(cell);
        let (old, bit) = (word.load(Relaxed), 1 << (cell % 64));
        if old & bit == 0 {
            word.store(old | bit, Relaxed);
        }
        old & bit == 0
    }

    /// Clears a bit, with the world stopped.
    pub(crate) fn clear(self, cell: u32) {
        self.word(cell).fetch_and(!(1 << (cell % 64)), Relaxed);
    }

    pub(crate) fn clear_all(self) {
        for word in self.0 {
            word.store(0, Relaxed);
        }
    }

    pub(crate) fn count(self, cells: u32) -> u32 {
        let words = self.0.iter().take(cells.div_ceil(64) as usize);
        words.map(|word| word.load(Relaxed).count_ones()).sum()
    }

    /// The first cell from `from` on, below `end`, whose bit is clear; `end` if there is none.
    pub(crate) fn next_clear(self, from: u32, end: u32) -> u32 {
        self.next(from, end, |word| !word)
    }

    /// The first cell from `from` on, below `end`, whose bit is set; `end` if there is none.
    pub(crate) fn next_set(self, from: u32, end: u32) -> u32 {
        self.next(from, end, |word| word)
    }

    #[inline]
    fn next(self, from: u32, end: u32, of: impl Fn(u64) -> u64) -> u32 {
        let mut cell = from;
        while cell < end {
            let rest = of(self.word(cell).load(Relaxed)) >> (cell % 64);
            if rest != 0 {
                return (cell + rest.trailing_zeros()).min(end);
            }
            cell = (cell / 64 + 1) * 64;
        }
        end
    }

    #[inline]
    fn word(&self, cell: u32) -> &AtomicU64 {
        // In range for every cell that a block can have; the mask spares the check.
        &self.0[cell as usize / 64 % BITMAP_WORDS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> [AtomicU64; BITMAP_WORDS] {
        [const { AtomicU64::new(0) }; BITMAP_WORDS]
    }

    #[test]
    fn runs_of_clear_bits_are_found_across_words() {
        let words = words();
        let bits = Bitmap(&words);
        for cell in 0..100 {
            assert!(bits.set(cell));
            assert!(!bits.set(cell));
        }
        bits.set(130);
        assert_eq!(bits.next_clear(0, 4096), 100);
        assert_eq!(bits.next_set(100, 4096), 130);
        assert_eq!(bits.next_set(131, 4096), 4096);
        assert_eq!(bits.next_clear(0, 50), 50);
        assert_eq!(bits.count(4096), 101);
        bits.clear_all();
        assert_eq!(bits.next_clear(0, 4096), 0);
    }
}
