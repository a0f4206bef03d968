//! A pool of page frames with reference counts.
//!
//! The pool is bookkeeping only: it is told where a run of frames begins in
//! guest physical memory and is lent one word for each of them, and it never
//! touches the frames themselves. It is lock-free: any number of threads, trap
//! handlers included, may use it at once, and none waits for another. One pool
//! has frames of one size; make another for large pages.
//!
//! ```text
//!  word of a frame         meaning
//!  0                       never handed out (index at or above `fresh`)
//!  1 ..= MAX_REFERENCES    in use, so many references
//!  FREE | next + 1         free; `next` is the frame below it on the stack
//!  FREE                    free; the bottom of the stack
//!
//!           allocate (fresh += 1)                share, release
//!   never used ------------------> in use (1) <----------------> in use (n)
//!                                   ^     |
//!                        allocate   |     | release of the last reference
//!                        (pop)      |     v (push)
//!                                   free, on the stack
//! ```
//!
//! Frames that were never handed out are not on the stack, so words (and
//! frames) that are not needed are never touched: memory the pool does not use
//! costs nothing where it is mapped lazily.
//!
//! The head of the stack carries a 32-bit tag that every pop increments, so
//! that a thread which read the head, was held up, and finds the same frame on
//! top again does not take it for an unchanged stack. It would have to be held
//! up for exactly a multiple of 2^32 pops to be fooled.

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::addr::{GuestPhys, PageSize};
use crate::paging::{ENTRIES, FrameAllocator, TableMemory};

/// Set in the word of a free frame.
const FREE: u32 = 1 << 31;

/// The most references that one frame can have.
pub const MAX_REFERENCES: u32 = FREE - 1;

/// Why a pool cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The first frame is not aligned to the frame size.
    #[error("the pool's first frame {base} is not a multiple of {size}")]
    Unaligned {
        /// Where the pool should begin.
        base: GuestPhys,
        /// The size of its frames.
        size: PageSize,
    },
    /// There are more frames than the pool can number, or than fit below the
    /// end of physical memory.
    #[error("{frames} frames of {size} from {base} on are too many; make several pools")]
    TooLarge {
        /// Where the pool should begin.
        base: GuestPhys,
        /// The size of its frames.
        size: PageSize,
        /// The number of frames.
        frames: usize,
    },
}

/// A reference that cannot be taken or dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The address is not that of a frame of this pool.
    #[error("{frame} is not a frame of this pool")]
    Foreign {
        /// The address.
        frame: GuestPhys,
    },
    /// The frame is not in use: it was released once too often, or never
    /// allocated.
    #[error("frame {frame} is not in use")]
    NotInUse {
        /// The frame.
        frame: GuestPhys,
    },
    /// The frame has [`MAX_REFERENCES`] references; copy it instead.
    #[error("frame {frame} has as many references as can be counted; copy it instead")]
    TooManyReferences {
        /// The frame.
        frame: GuestPhys,
    },
}

/// What releasing a reference did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Released {
    /// The frame has so many references left.
    InUse(u32),
    /// That was the last reference; the frame may be handed out again at once.
    Freed,
}

/// A pool of page frames.
#[derive(Debug)]
pub struct FramePool<'a> {
    base: GuestPhys,
    size: PageSize,
    words: &'a [AtomicU32],
    /// The stack of free frames: tag in the high half, index + 1 of the top
    /// frame in the low half, 0 when there is none.
    top: AtomicU64,
    /// The first frame that was never handed out.
    fresh: AtomicU32,
    /// Frames in use, for reports.
    in_use: AtomicU32,
}

impl<'a> FramePool<'a> {
    /// A pool of the `words.len()` frames of `size` from `base` on.
    ///
    /// `words` must be all zero; it is the pool's alone from now on.
    ///
    /// # Errors
    ///
    /// [`PoolError`].
    pub fn new(base: GuestPhys, size: PageSize, words: &'a [AtomicU32]) -> Result<Self, PoolError> {
        if !base.is_aligned(size) {
            return Err(PoolError::Unaligned { base, size });
        }
        let frames = words.len();
        let fits = u64::try_from(frames)
            .ok()
            .filter(|&frames| frames < u64::from(FREE))
            .and_then(|frames| frames.checked_mul(size.bytes()))
            .and_then(|bytes| base.checked_add(bytes.saturating_sub(1)));
        if fits.is_none() {
            return Err(PoolError::TooLarge { base, size, frames });
        }
        Ok(Self {
            base,
            size,
            words,
            top: AtomicU64::new(0),
            fresh: AtomicU32::new(0),
            in_use: AtomicU32::new(0),
        })
    }

    /// The first frame.
    pub const fn base(&self) -> GuestPhys {
        self.base
    }

    /// The size of a frame.
    pub const fn frame_size(&self) -> PageSize {
        self.size
    }

    /// The number of frames, in use or not.
    pub const fn capacity(&self) -> usize {
        self.words.len()
    }

    /// The number of frames in use; of the past already when other threads use
    /// the pool.
    pub fn in_use(&self) -> u32 {
        self.in_use.load(Ordering::Relaxed)
    }

    /// The number of frames that were ever in use: what the pool has touched.
    pub fn touched(&self) -> u32 {
        self.fresh.load(Ordering::Relaxed)
    }

    /// Hands out a frame with one reference, or `None` when all are in use. Its
    /// contents are whatever they were.
    #[inline]
    pub fn allocate(&self) -> Option<GuestPhys> {
        let index = self.pop().or_else(|| self.take_fresh())?;
        // Relaxed: whoever is handed the address later is handed it by means
        // that order this store before.
        self.words.get(index)?.store(1, Ordering::Relaxed);
        self.in_use.fetch_add(1, Ordering::Relaxed);
        Some(self.frame(index))
    }

    /// Takes another reference to a frame that is in use; returns their number.
    ///
    /// # Errors
    ///
    /// [`FrameError`]; then nothing has changed.
    pub fn share(&self, frame: GuestPhys) -> Result<u32, FrameError> {
        let (_, word) = self.word(frame)?;
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            if seen == 0 || seen & FREE != 0 {
                return Err(FrameError::NotInUse { frame });
            }
            if seen == MAX_REFERENCES {
                return Err(FrameError::TooManyReferences { frame });
            }
            let more = seen + 1;
            match word.compare_exchange_weak(seen, more, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(more),
                Err(found) => seen = found,
            }
        }
    }

    /// Drops a reference to a frame; with the last one the frame is free.
    ///
    /// # Errors
    ///
    /// [`FrameError`]; then nothing has changed.
    pub fn release(&self, frame: GuestPhys) -> Result<Released, FrameError> {
        let (index, word) = self.word(frame)?;
        let mut seen = word.load(Ordering::Relaxed);
        loop {
            if seen == 0 || seen & FREE != 0 {
                return Err(FrameError::NotInUse { frame });
            }
            let less = if seen == 1 { FREE } else { seen - 1 };
            // Release, and acquire by the last: what the others did with the
            // frame happens before it is handed out again.
            match word.compare_exchange_weak(seen, less, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if less == FREE => break,
                Ok(_) => return Ok(Released::InUse(less)),
                Err(found) => seen = found,
            }
        }
        self.in_use.fetch_sub(1, Ordering::Relaxed);
        self.push(index, word);
        Ok(Released::Freed)
    }

    /// The number of references to a frame of the pool, 0 when it is not in
    /// use.
    ///
    /// A count of 1 seen by its holder stays 1 unless the holder shares it: the
    /// page may be written without a copy.
    ///
    /// # Errors
    ///
    /// [`FrameError::Foreign`].
    pub fn references(&self, frame: GuestPhys) -> Result<u32, FrameError> {
        let (_, word) = self.word(frame)?;
        let word = word.load(Ordering::Acquire);
        Ok(if word & FREE != 0 { 0 } else { word })
    }

    /// Whether the address lies in one of the pool's frames.
    pub fn contains(&self, address: GuestPhys) -> bool {
        self.word(address.align_down(self.size)).is_ok()
    }

    fn frame(&self, index: usize) -> GuestPhys {
        // `new` has checked that this stays within 52 bits.
        GuestPhys::new_truncate(self.base.as_u64() + ((index as u64) << self.size.shift()))
    }

    fn word(&self, frame: GuestPhys) -> Result<(usize, &AtomicU32), FrameError> {
        let foreign = FrameError::Foreign { frame };
        let offset = frame.distance_from(self.base).ok_or(foreign)?;
        if !frame.is_aligned(self.size) {
            return Err(foreign);
        }
        let index = usize::try_from(offset >> self.size.shift()).map_err(|_| foreign)?;
        self.words
            .get(index)
            .map(|word| (index, word))
            .ok_or(foreign)
    }

    fn take_fresh(&self) -> Option<usize> {
        let more = |fresh: u32| ((fresh as usize) < self.words.len()).then_some(fresh + 1);
        let index = self
            .fresh
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        Some(index as usize)
    }

    fn pop(&self) -> Option<usize> {
        let mut top = self.top.load(Ordering::Acquire);
        loop {
            let index = (top as u32).checked_sub(1)? as usize;
            // Another thread may have popped it: then this word means something
            // else, and the exchange below fails because of the tag.
            let below = self.words.get(index)?.load(Ordering::Relaxed) & !FREE;
            let tag = (top >> 32).wrapping_add(1) << 32;
            let next = tag | u64::from(below);
            match self
                .top
                .compare_exchange_weak(top, next, Ordering::Acquire, Ordering::Acquire)
            {
                Ok(_) => return Some(index),
                Err(found) => top = found,
            }
        }
    }

    fn push(&self, index: usize, word: &AtomicU32) {
        let mut top = self.top.load(Ordering::Relaxed);
        loop {
            word.store(FREE | top as u32, Ordering::Relaxed);
            // `new` has checked that indices have at most 31 bits.
            let next = (top >> 32 << 32) | (index as u64 + 1);
            match self
                .top
                .compare_exchange_weak(top, next, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(found) => top = found,
            }
        }
    }
}

/// Page tables from a pool of 4 KiB frames, zeroed through the memory they are
/// in.
#[derive(Clone, Copy, Debug)]
pub struct PooledTables<'a, M> {
    pool: &'a FramePool<'a>,
    memory: M,
}

impl<'a, M: TableMemory> PooledTables<'a, M> {
    /// Tables from `pool`, or `None` when its frames are not of 4 KiB.
    pub fn new(pool: &'a FramePool<'a>, memory: M) -> Option<Self> {
        (pool.frame_size() == PageSize::Size4KiB).then_some(Self { pool, memory })
    }
}

impl<M: TableMemory> FrameAllocator for PooledTables<'_, M> {
    fn allocate_table(&self) -> Option<GuestPhys> {
        let table = self.pool.allocate()?;
        for index in 0..ENTRIES {
            self.memory.write(table, index, 0);
        }
        Some(table)
    }

    fn free_table(&self, table: GuestPhys) {
        // A table that is not the pool's, or free already, is a mistake of the
        // caller's that must not do more damage: it is left alone.
        let released = self.pool.release(table);
        debug_assert!(
            released.is_ok(),
            "a table was freed that is not in use: {released:?}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    const BASE: GuestPhys = GuestPhys::new(0x4000_0000);

    fn words(count: usize) -> Vec<AtomicU32> {
        (0..count).map(|_| AtomicU32::new(0)).collect()
    }

    #[test]
    fn a_frame_lives_as_long_as_its_last_reference() {
        let words = words(2);
        let pool = FramePool::new(BASE, PageSize::Size4KiB, &words).unwrap();
        let a = pool.allocate().unwrap();
        let b = pool.allocate().unwrap();
        assert_ne!(a, b);
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.share(a), Ok(2));
        assert_eq!(pool.release(a), Ok(Released::InUse(1)));
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.release(a), Ok(Released::Freed));
        assert_eq!(pool.references(a), Ok(0));
        assert_eq!(pool.release(a), Err(FrameError::NotInUse { frame: a }));
        assert_eq!(pool.share(a), Err(FrameError::NotInUse { frame: a }));
        assert_eq!(pool.allocate(), Some(a));
        assert_eq!(pool.in_use(), 2);
    }

    #[test]
    fn foreign_frames_are_refused() {
        let words = words(4);
        let pool = FramePool::new(BASE, PageSize::Size4KiB, &words).unwrap();
        for frame in [0x3fff_f000, 0x4000_4000, 0x4000_0800] {
            let frame = GuestPhys::new(frame);
            assert_eq!(pool.share(frame), Err(FrameError::Foreign { frame }));
        }
        assert!(pool.contains(GuestPhys::new(0x4000_3fff)));
        assert!(!pool.contains(GuestPhys::new(0x4000_4000)));
        let never_used = GuestPhys::new(0x4000_3000);
        assert_eq!(
            pool.release(never_used),
            Err(FrameError::NotInUse { frame: never_used })
        );
    }

    #[test]
    fn pools_that_make_no_sense_are_refused() {
        let words = words(2);
        let odd = GuestPhys::new(0x1000);
        assert!(matches!(
            FramePool::new(odd, PageSize::Size2MiB, &words),
            Err(PoolError::Unaligned { .. })
        ));
        let top = GuestPhys::new((1 << 52) - 0x1000);
        assert!(matches!(
            FramePool::new(top, PageSize::Size4KiB, &words),
            Err(PoolError::TooLarge { frames: 2, .. })
        ));
        assert!(FramePool::new(top, PageSize::Size4KiB, &words[..1]).is_ok());
    }

    #[test]
    fn references_do_not_overflow() {
        let words = words(1);
        let pool = FramePool::new(BASE, PageSize::Size4KiB, &words).unwrap();
        let frame = pool.allocate().unwrap();
        words[0].store(MAX_REFERENCES, Ordering::Relaxed);
        assert_eq!(
            pool.share(frame),
            Err(FrameError::TooManyReferences { frame })
        );
    }

    #[test]
    fn threads_never_share_a_frame_by_accident() {
        const FRAMES: usize = 8;
        const ROUNDS: usize = if cfg!(miri) { 40 } else { 20_000 };
        let words = words(FRAMES);
        let owners = words_of_owners(FRAMES);
        let pool = FramePool::new(BASE, PageSize::Size4KiB, &words).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut held = Vec::new();
                    for round in 0..ROUNDS {
                        if round % 3 != 2 {
                            held.extend(pool.allocate().inspect(|&frame| {
                                let owners = &owners[index_of(frame)];
                                assert_eq!(owners.fetch_add(1, Ordering::Relaxed), 0);
                            }));
                        } else {
                            for frame in held.drain(..) {
                                owners[index_of(frame)].fetch_sub(1, Ordering::Relaxed);
                                assert_eq!(pool.release(frame), Ok(Released::Freed));
                            }
                        }
                    }
                    for frame in held {
                        owners[index_of(frame)].fetch_sub(1, Ordering::Relaxed);
                        assert_eq!(pool.release(frame), Ok(Released::Freed));
                    }
                });
            }
        });
        assert_eq!(pool.in_use(), 0);
        assert_eq!((0..).map_while(|_: u32| pool.allocate()).count(), FRAMES);
    }

    fn words_of_owners(count: usize) -> Vec<AtomicU32> {
        words(count)
    }

    fn index_of(frame: GuestPhys) -> usize {
        ((frame.as_u64() - BASE.as_u64()) / 4096) as usize
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 256 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn the_pool_counts_like_a_map(ops in prop::collection::vec((0..3_u8, 0..8_u64), 0..200)) {
            let words = words(6);
            let pool = FramePool::new(BASE, PageSize::Size2MiB, &words).unwrap();
            let mut model: BTreeMap<u64, u32> = BTreeMap::new();
            for (op, index) in ops {
                let frame = GuestPhys::new(BASE.as_u64() + index * PageSize::Size2MiB.bytes());
                match op {
                    0 => match pool.allocate() {
                        Some(frame) => prop_assert_eq!(model.insert(frame.as_u64(), 1), None),
                        None => prop_assert_eq!(model.len(), 6),
                    },
                    1 => match model.get_mut(&frame.as_u64()) {
                        Some(count) => {
                            *count += 1;
                            prop_assert_eq!(pool.share(frame), Ok(*count));
                        }
                        None => prop_assert!(pool.share(frame).is_err()),
                    },
                    _ => match model.remove(&frame.as_u64()) {
                        Some(1) => prop_assert_eq!(pool.release(frame), Ok(Released::Freed)),
                        Some(count) => {
                            model.insert(frame.as_u64(), count - 1);
                            prop_assert_eq!(pool.release(frame), Ok(Released::InUse(count - 1)));
                        }
                        None => prop_assert!(pool.release(frame).is_err()),
                    },
                }
                prop_assert_eq!(pool.in_use() as usize, model.len());
            }
        }
    }
}
