//! The part of the address space that belongs to the sandboxed program.
//!
//! ```text
//! 0x0000_0000_0001_0000  USER_LO   (the host's vm.mmap_min_addr)
//!          |               the program: its image, heap, mappings, stack
//! 0x0000_3fff_ffff_0000  USER_TOP  last address that can ever be mapped
//!          |               a hole: a string that starts below it ends here
//! 0x0000_4000_0000_0000  USER_HI
//!          |               the guard: its binary, heap, stacks, libraries
//! 0x0000_7fff_ffff_ffff
//! ```
//!
//! A program's address is the same address in the host process, so the one
//! check that keeps the host kernel away from the guard's memory is
//! [`UserRange::new`]: nothing outside the program's part can be expressed.

use core::fmt;

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;

/// First address the program may use.
pub const USER_LO: u64 = 0x1_0000;

/// First address past the program's part of the address space (64 TiB).
pub const USER_HI: u64 = 0x4000_0000_0000;

/// First address that can never be mapped for the program. What lies between
/// here and [`USER_HI`] is a hole, so that the host kernel, walking a string
/// or a vector that starts in user memory, meets a fault before it meets the
/// guard.
pub const USER_TOP: u64 = USER_HI - 0x1_0000;

/// Bytes of user address space, in `USER_LO..USER_HI` by construction.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct UserRange {
    start: u64,
    end: u64,
}

impl UserRange {
    /// The `len` bytes from `start`, or `None` if any of them lies outside the
    /// user's part or the sum wraps. Zero bytes are a range too, if `start`
    /// itself is the user's.
    #[must_use]
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        let Some(end) = start.checked_add(len) else {
            return None;
        };
        if start < USER_LO || end > USER_HI || start >= USER_HI {
            return None;
        }
        Some(Self { start, end })
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First address past the end.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether there are no bytes in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }
}

impl fmt::Debug for UserRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// Whole pages of user address space, at least one, all below [`USER_TOP`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// The pages of `len` bytes from `start`. Both must be multiples of
    /// [`PAGE_SIZE`], `len` not zero, and all of it mappable.
    #[must_use]
    pub const fn new(start: u64, len: u64) -> Option<Self> {
        let Some(end) = start.checked_add(len) else {
            return None;
        };
        if !start.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) || len == 0 {
            return None;
        }
        if start < USER_LO || end > USER_TOP {
            return None;
        }
        Some(Self { start, end })
    }

    /// The pages that hold any byte of `range`, or `None` if it is empty or
    /// reaches into the hole under [`USER_HI`].
    #[must_use]
    pub const fn covering(range: UserRange) -> Option<Self> {
        if range.is_empty() {
            return None;
        }
        let start = range.start & !(PAGE_SIZE - 1);
        let end = range.end.next_multiple_of(PAGE_SIZE);
        Self::new(start, end - start)
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First address past the end.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes, a multiple of [`PAGE_SIZE`].
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Always `false`: a page range holds at least one page.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Whether `addr` lies in it.
    #[must_use]
    pub const fn contains(self, addr: u64) -> bool {
        self.start <= addr && addr < self.end
    }

    /// The pages in both, if any.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_user_addresses_make_a_range() {
        assert!(UserRange::new(USER_LO, 16).is_some());
        assert!(UserRange::new(USER_LO - 1, 16).is_none());
        assert!(UserRange::new(USER_HI - 16, 16).is_some());
        assert!(UserRange::new(USER_HI - 16, 17).is_none());
        assert!(UserRange::new(USER_HI, 0).is_none());
        assert!(UserRange::new(u64::MAX - 4, 8).is_none());
        assert!(UserRange::new(USER_LO, u64::MAX).is_none());
        assert!(UserRange::new(0, 0).is_none());
    }

    #[test]
    fn page_ranges_are_aligned_and_mappable() {
        assert!(PageRange::new(USER_LO, PAGE_SIZE).is_some());
        assert!(PageRange::new(USER_LO + 1, PAGE_SIZE).is_none());
        assert!(PageRange::new(USER_LO, 0).is_none());
        assert!(PageRange::new(USER_TOP - PAGE_SIZE, PAGE_SIZE).is_some());
        assert!(PageRange::new(USER_TOP - PAGE_SIZE, 2 * PAGE_SIZE).is_none());
        let bytes = UserRange::new(USER_LO + 5, PAGE_SIZE).unwrap();
        assert_eq!(PageRange::covering(bytes).unwrap().len(), 2 * PAGE_SIZE);
        let hole = UserRange::new(USER_TOP - 1, 2).unwrap();
        assert!(PageRange::covering(hole).is_none());
    }
}
