//! Addresses of user memory.
//!
//! User memory lies at the same addresses in the program and in the host
//! process, so one type serves both. Virtual addresses *inside an ELF file*
//! are not user addresses yet (a load bias may still be added) and stay plain
//! integers in [`crate::elf`].

use std::fmt;

use thiserror::Error;

/// The size of a page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// One past the highest address a 64-bit x86 Linux program can map with
/// 4-level paging: the lower half less one guard page (`TASK_SIZE_MAX`).
pub const USER_END: u64 = (1 << 47) - PAGE_SIZE;

/// An address outside the half of the address space that programs may use.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("address {0:#x} is above the end of user memory ({USER_END:#x})")]
pub struct NotUserAddress(pub u64);

/// A user virtual address, `0..=USER_END`.
///
/// [`USER_END`] itself is allowed, so that the end of a range has a value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserAddr(u64);

impl UserAddr {
    /// Checks and wraps an address.
    ///
    /// # Errors
    ///
    /// [`NotUserAddress`] when `addr` is above [`USER_END`].
    pub const fn new(addr: u64) -> Result<Self, NotUserAddress> {
        if addr <= USER_END {
            Ok(Self(addr))
        } else {
            Err(NotUserAddress(addr))
        }
    }

    /// The address as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `bytes` further up, or `None` above [`USER_END`].
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0
            .checked_add(bytes)
            .and_then(|sum| Self::new(sum).ok())
    }

    /// The address `bytes` further down, or `None` below zero.
    #[must_use]
    pub fn checked_sub(self, bytes: u64) -> Option<Self> {
        self.0.checked_sub(bytes).map(Self)
    }

    /// The first byte of the page that holds this address.
    #[must_use]
    pub const fn page_floor(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The lowest page boundary that is not below this address.
    #[must_use]
    pub const fn page_ceil(self) -> Self {
        // USER_END is a page boundary, so the sum stays within it.
        Self((self.0 + (PAGE_SIZE - 1)) & !(PAGE_SIZE - 1))
    }

    /// Whether this is a page boundary.
    #[must_use]
    pub const fn is_page_aligned(self) -> bool {
        self.0 & (PAGE_SIZE - 1) == 0
    }
}

impl fmt::Debug for UserAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserAddr({:#x})", self.0)
    }
}

impl fmt::Display for UserAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for UserAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// User addresses from `start` up to, not including, `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UserRange {
    start: UserAddr,
    end: UserAddr,
}

impl UserRange {
    /// A range of no addresses.
    pub const EMPTY: Self = Self {
        start: UserAddr(0),
        end: UserAddr(0),
    };

    /// The range from `start` to `end`, or `None` when `end` is below `start`.
    #[must_use]
    pub fn new(start: UserAddr, end: UserAddr) -> Option<Self> {
        (start <= end).then_some(Self { start, end })
    }

    /// The range of `len` bytes at `start`, or `None` when it passes [`USER_END`].
    #[must_use]
    pub fn with_len(start: UserAddr, len: u64) -> Option<Self> {
        Some(Self {
            start,
            end: start.checked_add(len)?,
        })
    }

    /// The first address.
    #[must_use]
    pub const fn start(self) -> UserAddr {
        self.start
    }

    /// One past the last address.
    #[must_use]
    pub const fn end(self) -> UserAddr {
        self.end
    }

    /// The length in bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether the range holds no address.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start.0 == self.end.0
    }

    /// Whether `addr` is in the range.
    #[must_use]
    pub fn contains(self, addr: UserAddr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether all of `other` is in the range.
    #[must_use]
    pub fn contains_range(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether the two ranges share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start.max(other.start) < self.end.min(other.end)
    }
}

impl fmt::Display for UserRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

bitflags::bitflags! {
    /// Rights on a mapping; the bits are those of `mmap`'s `prot` argument.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Prot: u32 {
        /// The program may read it (`PROT_READ`).
        const READ = 1;
        /// The program may write it (`PROT_WRITE`).
        const WRITE = 2;
        /// The program may execute it (`PROT_EXEC`).
        const EXEC = 4;
    }
}

impl fmt::Display for Prot {
    /// As in `/proc/PID/maps`: `r-x`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = |bit, letter| if self.contains(bit) { letter } else { '-' };
        write!(
            f,
            "{}{}{}",
            mark(Self::READ, 'r'),
            mark(Self::WRITE, 'w'),
            mark(Self::EXEC, 'x')
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(value: u64) -> UserAddr {
        UserAddr::new(value).unwrap()
    }

    #[test]
    fn addresses_end_at_the_last_user_page() {
        assert_eq!(
            UserAddr::new(USER_END + 1),
            Err(NotUserAddress(USER_END + 1))
        );
        assert_eq!(addr(USER_END).page_ceil(), addr(USER_END));
        assert_eq!(addr(USER_END).checked_add(1), None);
        assert_eq!(addr(1).checked_add(u64::MAX), None);
        assert_eq!(addr(1).checked_sub(2), None);
    }

    #[test]
    fn rounding_goes_to_page_boundaries() {
        assert_eq!(addr(0x1fff).page_floor(), addr(0x1000));
        assert_eq!(addr(0x1001).page_ceil(), addr(0x2000));
        assert_eq!(addr(0x1000).page_ceil(), addr(0x1000));
    }

    #[test]
    fn touching_ranges_do_not_overlap() {
        let low = UserRange::new(addr(0x1000), addr(0x2000)).unwrap();
        let high = UserRange::new(addr(0x2000), addr(0x3000)).unwrap();
        assert!(!low.overlaps(high));
        assert!(low.overlaps(UserRange::with_len(addr(0x1fff), 2).unwrap()));
        assert_eq!(UserRange::new(addr(2), addr(1)), None);
    }

    #[test]
    fn rights_print_as_in_maps() {
        assert_eq!((Prot::READ | Prot::EXEC).to_string(), "r-x");
    }
}
