//! Windows: which GiB of host virtual space is which GiB of guest physical space.
//!
//! Linux gives a process 47 bits of virtual addresses; a CPU may have as few as 36 bits of
//! physical ones, and the second-level tables translate *physical* addresses. So guest
//! physical cannot be host virtual. Instead, each 1 GiB-aligned piece of host virtual space
//! that is in use (a *chunk*) is given a free GiB of guest physical space (a *frame* here)
//! and one memory slot of the same number:
//!
//! ```text
//!   host virtual (47 bits)                    guest physical (36 to 52 bits)
//!   chunk 0x15555  [0x5555_4000_0000 ..)  ->  frame 1  [0x4000_0000 ..)
//!   chunk 0x1fffd  [0x7fff_4000_0000 ..)  ->  frame 2  [0x8000_0000 ..)
//!   chunk 0x1fff7  [0x7ffd_c000_0000 ..)  ->  frame 4  [0x1_0000_0000 ..)
//! ```
//!
//! Frame 0 is never given out, so that guest physical address 0 stays nothing at all, nor is
//! frame 3, in which a PC has its interrupt controllers and in which KVM on VT-x keeps
//! pages of its own.
//!
//! The table is two arrays indexed by chunk and by frame, so that a translation either way
//! is one load. State of a chunk, which changes by compare-and-swap only, so that no thread
//! ever waits on a lock held by one that was interrupted or did not survive a `fork`:
//!
//! ```text
//!   FREE --claim--> CLAIMED --publish--> frame number --begin_release--> CLAIMED --release--> FREE
//! ```

#![expect(
    unsafe_code,
    reason = "zeroed arrays of atomics, untouched until they are used"
)]

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering};

/// Size of a window: 1 GiB.
pub const WINDOW_SIZE: u64 = 1 << WINDOW_SHIFT;
/// Binary logarithm of [`WINDOW_SIZE`].
pub const WINDOW_SHIFT: u32 = 30;

const CHUNKS: usize = 1 << (47 - WINDOW_SHIFT);
/// KVM offers 32,764 slots to user space, and a frame number must fit a `u16` below
/// [`CLAIMED`].
const MAX_FRAMES: u32 = 32_700;
const FREE: u16 = 0;
const CLAIMED: u16 = u16::MAX;
const RESERVED_FRAMES: [u32; 2] = [0, 3];
/// A frame's owner is stored as chunk + 1, so that zero means none.
const UNUSED: u32 = 0;

/// What [`Windows::claim`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The chunk has this frame already.
    Present(u16),
    /// The chunk is the caller's to set up with this frame, and then to
    /// [`publish`](Windows::publish) or to [`abandon`](Windows::abandon).
    Mine(u16),
    /// Another thread is setting the chunk up at this moment: try again.
    Busy,
    /// No guest physical address space is left: release some window first.
    Full,
}

/// The table of windows.
#[derive(Debug)]
pub struct Windows {
    frame_of_chunk: Box<[AtomicU16]>,
    chunk_of_frame: Box<[AtomicU32]>,
}

impl Windows {
    /// A table for a CPU with `physical_bits` bits of guest physical address.
    ///
    /// # Panics
    /// If `physical_bits` is below 36 or above 52, which no x86-64 CPU has.
    #[must_use]
    pub fn new(physical_bits: u32) -> Self {
        assert!(
            (36..=52).contains(&physical_bits),
            "{physical_bits} physical address bits"
        );
        let frames = (1_u64 << (physical_bits - WINDOW_SHIFT)).min(u64::from(MAX_FRAMES)) as usize;
        // Zeroed memory comes straight from the kernel and costs nothing until it is used.
        let frame_of_chunk = Box::new_zeroed_slice(CHUNKS);
        let chunk_of_frame = Box::new_zeroed_slice(frames);
        // SAFETY: all-zero bytes are a valid atomic integer, FREE.
        let frame_of_chunk = unsafe { frame_of_chunk.assume_init() };
        // SAFETY: all-zero bytes are a valid atomic integer, UNUSED.
        let chunk_of_frame = unsafe { chunk_of_frame.assume_init() };
        Self {
            frame_of_chunk,
            chunk_of_frame,
        }
    }

    /// How many windows there can be at once.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.chunk_of_frame.len() - RESERVED_FRAMES.len()
    }

    /// How many windows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chunk_of_frame
            .iter()
            .filter(|c| c.load(Ordering::Relaxed) != UNUSED)
            .count()
    }

    /// Whether there is no window yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Guest physical address of a host virtual address, if a window covers it.
    #[inline]
    #[must_use]
    pub fn to_guest(&self, host: u64) -> Option<u64> {
        let chunk = (host >> WINDOW_SHIFT) as usize;
        match self.frame_of_chunk.get(chunk)?.load(Ordering::Acquire) {
            FREE | CLAIMED => None,
            frame => Some((u64::from(frame) << WINDOW_SHIFT) | (host & (WINDOW_SIZE - 1))),
        }
    }

    /// Host virtual address of a guest physical address, if it lies in a window.
    #[inline]
    #[must_use]
    pub fn to_host(&self, guest: u64) -> Option<u64> {
        let frame = (guest >> WINDOW_SHIFT) as usize;
        match self.chunk_of_frame.get(frame)?.load(Ordering::Acquire) {
            UNUSED => None,
            owner => Some((u64::from(owner - 1) << WINDOW_SHIFT) | (guest & (WINDOW_SIZE - 1))),
        }
    }

    /// Asks for a window over the chunk that holds `host`. An address outside the 47 bits
    /// of user space is answered with [`Claim::Full`].
    #[must_use]
    pub fn claim(&self, host: u64) -> Claim {
        let chunk = (host >> WINDOW_SHIFT) as usize;
        let Some(entry) = self.frame_of_chunk.get(chunk) else {
            return Claim::Full;
        };
        match entry.compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Acquire) {
            Err(CLAIMED) => return Claim::Busy,
            Err(frame) => return Claim::Present(frame),
            Ok(_) => {}
        }
        for (frame, owner) in self.chunk_of_frame.iter().enumerate() {
            if RESERVED_FRAMES.contains(&(frame as u32)) || owner.load(Ordering::Relaxed) != UNUSED
            {
                continue;
            }
            if owner
                .compare_exchange(
                    UNUSED,
                    chunk as u32 + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                )
                .is_ok()
            {
                return Claim::Mine(frame as u16);
            }
        }
        entry.store(FREE, Ordering::Release);
        Claim::Full
    }

    /// Makes a claimed window visible to translations.
    pub fn publish(&self, host: u64, frame: u16) {
        if let Some(entry) = self.frame_of_chunk.get((host >> WINDOW_SHIFT) as usize) {
            entry.store(frame, Ordering::Release);
        }
    }

    /// Gives back a window that was claimed and could not be set up.
    pub fn abandon(&self, host: u64, frame: u16) {
        if let Some(owner) = self.chunk_of_frame.get(usize::from(frame)) {
            owner.store(UNUSED, Ordering::Release);
        }
        if let Some(entry) = self.frame_of_chunk.get((host >> WINDOW_SHIFT) as usize) {
            entry.store(FREE, Ordering::Release);
        }
    }

    /// Hides a window from translations so that it can be taken apart; `true` if it is now
    /// the caller's. Finish with [`abandon`](Self::abandon).
    #[must_use]
    pub fn begin_release(&self, host: u64, frame: u16) -> bool {
        self.frame_of_chunk
            .get((host >> WINDOW_SHIFT) as usize)
            .is_some_and(|entry| {
                entry
                    .compare_exchange(frame, CLAIMED, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            })
    }

    /// All windows, as pairs of host virtual start and frame number.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u16)> + '_ {
        self.chunk_of_frame
            .iter()
            .enumerate()
            .filter_map(|(frame, owner)| {
                let chunk = owner.load(Ordering::Acquire).checked_sub(1)?;
                let entry = self.frame_of_chunk.get(chunk as usize)?;
                let published = entry.load(Ordering::Acquire) == frame as u16;
                published.then_some((u64::from(chunk) << WINDOW_SHIFT, frame as u16))
            })
    }

    /// Drops the claims of threads that did not survive a `fork`, and names each chunk that
    /// was being set up or taken apart. Only for the one thread of a new process.
    pub fn drop_stale_claims(&self, mut dropped: impl FnMut(u64)) {
        for (frame, owner) in self.chunk_of_frame.iter().enumerate() {
            let Some(chunk) = owner.load(Ordering::Relaxed).checked_sub(1) else {
                continue;
            };
            if let Some(entry) = self.frame_of_chunk.get(chunk as usize) {
                if entry.load(Ordering::Relaxed) == CLAIMED {
                    entry.store(FREE, Ordering::Relaxed);
                    dropped(u64::from(chunk) << WINDOW_SHIFT);
                }
                if entry.load(Ordering::Relaxed) != frame as u16 {
                    owner.store(UNUSED, Ordering::Relaxed);
                }
            }
        }
        for entry in &self.frame_of_chunk {
            if entry.load(Ordering::Relaxed) == CLAIMED {
                entry.store(FREE, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn add(windows: &Windows, host: u64) -> Option<u16> {
        match windows.claim(host) {
            Claim::Mine(frame) => {
                windows.publish(host, frame);
                Some(frame)
            }
            Claim::Present(frame) => Some(frame),
            Claim::Busy | Claim::Full => None,
        }
    }

    #[test]
    fn every_width_is_used_to_the_last_frame_and_not_beyond() {
        for bits in 36..=52 {
            let windows = Windows::new(bits);
            let expected = (1_u64 << (bits - 30)).min(u64::from(MAX_FRAMES)) as usize - 2;
            assert_eq!(windows.capacity(), expected);
            for n in 0..expected as u64 {
                let frame = add(&windows, (n + 7) << 30).unwrap();
                assert!(!RESERVED_FRAMES.contains(&u32::from(frame)));
                assert!(u64::from(frame) < 1 << (bits - 30));
            }
            assert_eq!(windows.claim(0), Claim::Full);
            assert_eq!(windows.len(), expected);
        }
    }

    #[test]
    fn a_released_window_is_used_again() {
        let windows = Windows::new(36);
        let frame = add(&windows, 5 << 30).unwrap();
        assert!(windows.begin_release(5 << 30, frame));
        assert_eq!(windows.to_guest(5 << 30), None);
        windows.abandon(5 << 30, frame);
        assert_eq!(add(&windows, 9 << 30), Some(frame));
        assert_eq!(windows.to_host(u64::from(frame) << 30), Some(9 << 30));
    }

    #[test]
    fn addresses_outside_user_space_get_no_window() {
        let windows = Windows::new(40);
        assert_eq!(windows.claim(1 << 47), Claim::Full);
        assert_eq!(windows.claim(u64::MAX), Claim::Full);
        assert_eq!(windows.to_guest(u64::MAX), None);
        assert_eq!(windows.to_host(u64::MAX), None);
    }

    #[test]
    fn claims_of_vanished_threads_are_dropped() {
        let windows = Windows::new(36);
        let kept = add(&windows, 1 << 30).unwrap();
        assert!(matches!(windows.claim(2 << 30), Claim::Mine(_)));
        assert_eq!(windows.claim(2 << 30), Claim::Busy);
        let mut dropped = Vec::new();
        windows.drop_stale_claims(|host| dropped.push(host));
        assert_eq!(dropped, [2 << 30]);
        assert_eq!(windows.len(), 1);
        assert_eq!(windows.to_guest(1 << 30), Some(u64::from(kept) << 30));
        assert!(matches!(windows.claim(2 << 30), Claim::Mine(_)));
    }

    proptest! {
        #[test]
        fn both_directions_agree_with_a_model(
            steps in proptest::collection::vec((0_u64..40, any::<bool>()), 1..200)
        ) {
            let windows = Windows::new(36);
            let mut model = HashMap::new();
            for (chunk, insert) in steps {
                let host = chunk << 30;
                if insert {
                    if let Some(frame) = add(&windows, host) {
                        prop_assert_eq!(*model.entry(chunk).or_insert(frame), frame);
                    } else {
                        prop_assert_eq!(model.len(), windows.capacity());
                    }
                } else if let Some(frame) = model.remove(&chunk) {
                    prop_assert!(windows.begin_release(host, frame));
                    windows.abandon(host, frame);
                }
                prop_assert_eq!(windows.len(), model.len());
                for (chunk, frame) in &model {
                    let (host, guest) = ((chunk << 30) + 12345, (u64::from(*frame) << 30) + 12345);
                    prop_assert_eq!(windows.to_guest(host), Some(guest));
                    prop_assert_eq!(windows.to_host(guest), Some(host));
                }
            }
        }
    }
}
