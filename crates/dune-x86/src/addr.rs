//! Addresses as types, so that a guest virtual, a guest physical and a host
//! virtual address can never be mixed up.
//!
//! ```text
//!  GuestVirt --guest page tables--> GuestPhys --window (memory slot)--> HostVirt
//! ```
//!
//! Virtual addresses are *canonical*: all bits above the most significant
//! implemented one repeat it (SDM vol. 1 section 3.3.7.1, APM vol. 2 section
//! 1.1.3). The types here admit what is canonical under 57-bit (five-level)
//! addressing; whoever walks four-level tables asks for
//! [`VirtWidth::Bits48`] and refuses the rest. Guest physical addresses have at
//! most 52 bits (SDM vol. 3A section 4.1.4, MAXPHYADDR).

#![forbid(unsafe_code)]

use core::fmt;

/// How many bits of a virtual address the page tables translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VirtWidth {
    /// Four-level paging.
    Bits48,
    /// Five-level paging (CR4.LA57).
    Bits57,
}

impl VirtWidth {
    /// The number of bits.
    #[inline]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits48 => 48,
            Self::Bits57 => 57,
        }
    }

    /// Sign-extends the low bits of `address` to a canonical address.
    #[inline]
    pub const fn sign_extend(self, address: u64) -> u64 {
        let shift = 64 - self.bits();
        // An arithmetic right shift copies the sign bit.
        (((address << shift) as i64) >> shift) as u64
    }

    /// Whether `address` is canonical at this width.
    #[inline]
    pub const fn is_canonical(self, address: u64) -> bool {
        self.sign_extend(address) == address
    }
}

/// A number that is no virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{address:#x} is not a canonical {bits}-bit virtual address: bits {bits} and up must repeat bit {}",
    bits - 1
)]
pub struct NotCanonical {
    /// The number that was given.
    pub address: u64,
    /// The width it was checked against.
    pub bits: u32,
}

/// A number that is no guest physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{address:#x} is not a physical address: x86-64 has at most {} physical bits",
    GuestPhys::MAX_BITS
)]
pub struct NotPhysical {
    /// The number that was given.
    pub address: u64,
}

/// The size of a page that a leaf entry maps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, mapped by a page table entry.
    Size4KiB,
    /// 2 MiB, mapped by a page directory entry.
    Size2MiB,
    /// 1 GiB, mapped by a page directory pointer table entry; not every CPU
    /// has it (see [`crate::cpu::CpuFeatures`]).
    Size1GiB,
}

impl PageSize {
    /// All sizes, the smallest first.
    pub const ALL: [Self; 3] = [Self::Size4KiB, Self::Size2MiB, Self::Size1GiB];

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The base-two logarithm of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4KiB => 12,
            Self::Size2MiB => 21,
            Self::Size1GiB => 30,
        }
    }

    /// The bits of an address that select a byte within a page of this size.
    #[inline]
    pub const fn offset_mask(self) -> u64 {
        self.bytes() - 1
    }

    /// The next smaller size.
    #[inline]
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Size4KiB => None,
            Self::Size2MiB => Some(Self::Size4KiB),
            Self::Size1GiB => Some(Self::Size2MiB),
        }
    }

    /// The next larger size.
    #[inline]
    pub const fn larger(self) -> Option<Self> {
        match self {
            Self::Size4KiB => Some(Self::Size2MiB),
            Self::Size2MiB => Some(Self::Size1GiB),
            Self::Size1GiB => None,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4KiB => "4 KiB",
            Self::Size2MiB => "2 MiB",
            Self::Size1GiB => "1 GiB",
        })
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the three address types have in common.
macro_rules! address_common {
    ($name:ident) => {
        impl $name {
            /// The address 0.
            pub const ZERO: Self = Self(0);

            /// The address as a number.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// The start of the page of this size that holds the address.
            #[inline]
            pub const fn align_down(self, size: PageSize) -> Self {
                Self(self.0 & !size.offset_mask())
            }

            /// The start of the first page of this size at or above the
            /// address, or `None` where there is none below the end of the
            /// valid range.
            #[inline]
            pub const fn align_up(self, size: PageSize) -> Option<Self> {
                match self.0 & size.offset_mask() {
                    0 => Some(self),
                    offset => self.checked_add(size.bytes() - offset),
                }
            }

            /// Whether the address is the start of a page of this size.
            #[inline]
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.0 & size.offset_mask() == 0
            }

            /// The distance in bytes from the start of the page of this size
            /// that holds the address.
            #[inline]
            pub const fn page_offset(self, size: PageSize) -> u64 {
                self.0 & size.offset_mask()
            }

            /// The address `bytes` further up, or `None` where that is not a
            /// valid address.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => match Self::try_new(sum) {
                        Ok(address) => Some(address),
                        Err(_) => None,
                    },
                    None => None,
                }
            }

            /// The address `bytes` further down, or `None` where that is not
            /// a valid address.
            #[inline]
            pub const fn checked_sub(self, bytes: u64) -> Option<Self> {
                match self.0.checked_sub(bytes) {
                    Some(difference) => match Self::try_new(difference) {
                        Ok(address) => Some(address),
                        Err(_) => None,
                    },
                    None => None,
                }
            }

            /// The distance in bytes from `lower` up to this address, or
            /// `None` where `lower` is above it.
            #[inline]
            pub const fn distance_from(self, lower: Self) -> Option<u64> {
                self.0.checked_sub(lower.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl From<$name> for u64 {
            #[inline]
            fn from(address: $name) -> u64 {
                address.0
            }
        }
    };
}

/// Constructors of the two virtual address types.
macro_rules! virtual_address {
    ($name:ident) => {
        impl $name {
            /// The address `address`.
            ///
            /// # Panics
            ///
            /// When `address` is not canonical under 57-bit addressing. Meant
            /// for constants; use [`Self::try_new`] for numbers that come from
            /// elsewhere.
            #[inline]
            #[track_caller]
            pub const fn new(address: u64) -> Self {
                assert!(
                    VirtWidth::Bits57.is_canonical(address),
                    "the virtual address is not canonical"
                );
                Self(address)
            }

            /// The address `address`, if it is canonical under 57-bit
            /// addressing.
            ///
            /// # Errors
            ///
            /// [`NotCanonical`], with the number.
            #[inline]
            pub const fn try_new(address: u64) -> Result<Self, NotCanonical> {
                Self::try_new_with(address, VirtWidth::Bits57)
            }

            /// The address `address`, if it is canonical at `width`.
            ///
            /// # Errors
            ///
            /// [`NotCanonical`], with the number.
            #[inline]
            pub const fn try_new_with(
                address: u64,
                width: VirtWidth,
            ) -> Result<Self, NotCanonical> {
                if width.is_canonical(address) {
                    Ok(Self(address))
                } else {
                    Err(NotCanonical {
                        address,
                        bits: width.bits(),
                    })
                }
            }

            /// The canonical address with the low 57 bits of `address`. For
            /// numbers known to be canonical already (CR2, a pointer), where a
            /// check would be wasted.
            #[inline]
            pub const fn new_truncate(address: u64) -> Self {
                Self(VirtWidth::Bits57.sign_extend(address))
            }

            /// Whether the address is canonical at `width`.
            #[inline]
            pub const fn is_canonical(self, width: VirtWidth) -> bool {
                width.is_canonical(self.0)
            }
        }

        impl TryFrom<u64> for $name {
            type Error = NotCanonical;

            #[inline]
            fn try_from(address: u64) -> Result<Self, NotCanonical> {
                Self::try_new(address)
            }
        }
    };
}

/// An address as code inside the guest sees it; what its page tables
/// translate.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct GuestVirt(u64);

/// An address in the guest's physical address space; what KVM's memory slots
/// translate.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct GuestPhys(u64);

/// An address of the process as the host kernel sees it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct HostVirt(u64);

address_common!(GuestVirt);
address_common!(GuestPhys);
address_common!(HostVirt);
virtual_address!(GuestVirt);
virtual_address!(HostVirt);

impl GuestPhys {
    /// The most physical address bits that the architecture defines.
    pub const MAX_BITS: u32 = 52;

    /// The address `address`.
    ///
    /// # Panics
    ///
    /// When `address` needs more than [`Self::MAX_BITS`] bits. Meant for
    /// constants; use [`Self::try_new`] for numbers that come from elsewhere.
    #[inline]
    #[track_caller]
    pub const fn new(address: u64) -> Self {
        assert!(
            address >> Self::MAX_BITS == 0,
            "the physical address has more than 52 bits"
        );
        Self(address)
    }

    /// The address `address`, if it has at most [`Self::MAX_BITS`] bits.
    ///
    /// # Errors
    ///
    /// [`NotPhysical`], with the number.
    #[inline]
    pub const fn try_new(address: u64) -> Result<Self, NotPhysical> {
        if address >> Self::MAX_BITS == 0 {
            Ok(Self(address))
        } else {
            Err(NotPhysical { address })
        }
    }

    /// The address made of the low 52 bits of `address`.
    #[inline]
    pub const fn new_truncate(address: u64) -> Self {
        Self(address & ((1 << Self::MAX_BITS) - 1))
    }

    /// Whether the address fits in `bits` physical address bits.
    #[inline]
    pub const fn fits(self, bits: u32) -> bool {
        bits >= 64 || self.0 >> bits == 0
    }
}

impl TryFrom<u64> for GuestPhys {
    type Error = NotPhysical;

    #[inline]
    fn try_from(address: u64) -> Result<Self, NotPhysical> {
        Self::try_new(address)
    }
}

/// Bounds that make no range of virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRange {
    /// The end lies below the start.
    #[error("the range ends at {end}, below its start {start}")]
    EndBelowStart {
        /// The first address.
        start: GuestVirt,
        /// The address after the last.
        end: GuestVirt,
    },
    /// The range would cross the hole between the lower and the upper half of
    /// the address space, or the end of it.
    #[error("{bytes:#x} bytes from {start} on run out of the canonical half they start in")]
    LeavesHalf {
        /// The first address.
        start: GuestVirt,
        /// The length that was asked for.
        bytes: u64,
    },
}

/// A range of guest virtual addresses: a first address and a length in bytes.
///
/// It lies in one half of the address space and may reach its very end, which
/// is why the length is stored and not the (then unrepresentable) end.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VirtRange {
    start: GuestVirt,
    bytes: u64,
}

impl VirtRange {
    /// `bytes` bytes from `start` on.
    ///
    /// # Errors
    ///
    /// [`BadRange::LeavesHalf`], when the last byte is not in the same half of
    /// the address space as the first.
    #[inline]
    pub const fn try_new(start: GuestVirt, bytes: u64) -> Result<Self, BadRange> {
        if bytes == 0 {
            return Ok(Self { start, bytes });
        }
        match start.checked_add(bytes - 1) {
            // Bit 63 tells the halves apart.
            Some(last) if (last.0 ^ start.0) >> 63 == 0 => Ok(Self { start, bytes }),
            _ => Err(BadRange::LeavesHalf { start, bytes }),
        }
    }

    /// From `start` up to but not including `end`.
    ///
    /// # Errors
    ///
    /// [`BadRange`], when `end` is below `start` or in the other half.
    #[inline]
    pub const fn from_bounds(start: GuestVirt, end: GuestVirt) -> Result<Self, BadRange> {
        match end.distance_from(start) {
            Some(bytes) => Self::try_new(start, bytes),
            None => Err(BadRange::EndBelowStart { start, end }),
        }
    }

    /// The page of size `size` that holds `address`.
    #[inline]
    pub const fn page(address: GuestVirt, size: PageSize) -> Self {
        // A page never crosses the halves: its size divides 2^63.
        Self {
            start: address.align_down(size),
            bytes: size.bytes(),
        }
    }

    /// No addresses, at `start`.
    #[inline]
    pub const fn empty_at(start: GuestVirt) -> Self {
        Self { start, bytes: 0 }
    }

    /// The first address.
    #[inline]
    pub const fn start(self) -> GuestVirt {
        self.start
    }

    /// The length in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.bytes
    }

    /// Whether there is no address in it.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.bytes == 0
    }

    /// The last address, or `None` of an empty range.
    #[inline]
    pub const fn last(self) -> Option<GuestVirt> {
        if self.bytes == 0 {
            None
        } else {
            Some(GuestVirt(self.start.0 + (self.bytes - 1)))
        }
    }

    /// The address after the last, or `None` where that is not an address
    /// (the range reaches the end of its half).
    #[inline]
    pub const fn end(self) -> Option<GuestVirt> {
        self.start.checked_add(self.bytes)
    }

    /// Whether `address` is in the range.
    #[inline]
    pub const fn contains(self, address: GuestVirt) -> bool {
        address.0.wrapping_sub(self.start.0) < self.bytes
    }

    /// Whether all of `other` is in the range; an empty range is in every
    /// range.
    #[inline]
    pub const fn contains_range(self, other: Self) -> bool {
        match other.last() {
            Some(last) => self.contains(other.start) && self.contains(last),
            None => true,
        }
    }

    /// The addresses that are in both ranges.
    #[inline]
    pub const fn intersection(self, other: Self) -> Option<Self> {
        let (Some(a), Some(b)) = (self.last(), other.last()) else {
            return None;
        };
        let start = if self.start.0 > other.start.0 {
            self.start
        } else {
            other.start
        };
        let last = if a.0 < b.0 { a } else { b };
        match last.0.checked_sub(start.0) {
            Some(distance) => Some(Self {
                start,
                bytes: distance + 1,
            }),
            None => None,
        }
    }

    /// Whether start and length are multiples of the page size.
    #[inline]
    pub const fn is_aligned(self, size: PageSize) -> bool {
        self.start.is_aligned(size) && self.bytes & size.offset_mask() == 0
    }

    /// The smallest range of whole pages of this size that covers the range.
    #[inline]
    pub const fn align_out(self, size: PageSize) -> Self {
        let start = self.start.align_down(size);
        match self.last() {
            // Both ends stay in their half, because a page never leaves it.
            Some(last) => Self {
                start,
                bytes: (last.0 | size.offset_mask()) - start.0 + 1,
            },
            None => Self::empty_at(start),
        }
    }

    /// The addresses of the pages of this size that the range touches.
    #[inline]
    pub fn pages(self, size: PageSize) -> impl Iterator<Item = GuestVirt> {
        let whole = self.align_out(size);
        let count = whole.bytes >> size.shift();
        (0..count).map(move |n| GuestVirt(whole.start.0 + (n << size.shift())))
    }
}

impl fmt::Debug for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VirtRange({:#x} + {:#x})", self.start.0, self.bytes)
    }
}

impl fmt::Display for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.last() {
            Some(last) => write!(f, "{:#x}..={:#x}", self.start.0, last.0),
            None => write!(f, "nothing at {:#x}", self.start.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn canonical_checks_follow_the_width() {
        for (width, top) in [
            (VirtWidth::Bits48, 0x0000_7fff_ffff_ffff_u64),
            (VirtWidth::Bits57, 0x00ff_ffff_ffff_ffff),
        ] {
            assert!(width.is_canonical(0));
            assert!(width.is_canonical(top));
            assert!(!width.is_canonical(top + 1));
            assert!(!width.is_canonical(!top - 1));
            assert!(width.is_canonical(!top));
            assert!(width.is_canonical(u64::MAX));
        }
        assert_eq!(
            GuestVirt::try_new_with(0x8000_0000_0000, VirtWidth::Bits48),
            Err(NotCanonical {
                address: 0x8000_0000_0000,
                bits: 48
            })
        );
        assert!(GuestVirt::try_new(0x8000_0000_0000).is_ok());
        assert_eq!(
            format!("{}", GuestVirt::try_new(1 << 60).unwrap_err()),
            "0x1000000000000000 is not a canonical 57-bit virtual address: bits 57 and up must \
             repeat bit 56"
        );
    }

    #[test]
    fn physical_addresses_have_52_bits() {
        assert!(GuestPhys::try_new((1 << 52) - 1).is_ok());
        assert_eq!(
            GuestPhys::try_new(1 << 52),
            Err(NotPhysical { address: 1 << 52 })
        );
        assert!(GuestPhys::new(1 << 38).fits(39));
        assert!(!GuestPhys::new(1 << 39).fits(39));
    }

    #[test]
    fn alignment() {
        let address = GuestVirt::new(0x20_1234);
        assert_eq!(address.align_down(PageSize::Size4KiB).as_u64(), 0x20_1000);
        assert_eq!(
            address.align_up(PageSize::Size4KiB).unwrap().as_u64(),
            0x20_2000
        );
        assert_eq!(address.align_down(PageSize::Size2MiB).as_u64(), 0x20_0000);
        assert_eq!(address.page_offset(PageSize::Size2MiB), 0x1234);
        assert_eq!(GuestVirt::new(u64::MAX).align_up(PageSize::Size4KiB), None);
        assert_eq!(
            GuestPhys::new((1 << 52) - 1).align_up(PageSize::Size1GiB),
            None
        );
        assert_eq!(
            GuestVirt::new(0x4000_0000).align_up(PageSize::Size1GiB),
            Some(GuestVirt::new(0x4000_0000))
        );
    }

    #[test]
    fn ranges_stay_in_their_half() {
        let top = GuestVirt::new(0xffff_ffff_ffff_f000);
        let last_page = VirtRange::try_new(top, 0x1000).unwrap();
        assert_eq!(last_page.last(), Some(GuestVirt::new(u64::MAX)));
        assert_eq!(last_page.end(), None);
        assert!(last_page.contains(GuestVirt::new(u64::MAX)));
        assert!(VirtRange::try_new(top, 0x1001).is_err());
        assert!(VirtRange::try_new(GuestVirt::new(0x00ff_ffff_ffff_f000), 0x1001).is_err());
        assert!(VirtRange::try_new(GuestVirt::ZERO, u64::MAX).is_err());
    }

    #[test]
    fn range_arithmetic() {
        let range = |start, bytes| VirtRange::try_new(GuestVirt::new(start), bytes).unwrap();
        let a = range(0x1000, 0x3000);
        assert_eq!(
            a.intersection(range(0x2000, 0x8000)),
            Some(range(0x2000, 0x2000))
        );
        assert_eq!(a.intersection(range(0x4000, 0x1000)), None);
        assert!(a.contains_range(range(0x1000, 0x3000)));
        assert!(!a.contains_range(range(0x1000, 0x3001)));
        assert!(!a.contains(GuestVirt::new(0xfff)));
        assert_eq!(
            range(0x1fff, 2).align_out(PageSize::Size4KiB),
            range(0x1000, 0x2000)
        );
        assert_eq!(range(0x1fff, 2).pages(PageSize::Size4KiB).count(), 2);
        assert_eq!(range(0x1000, 0).pages(PageSize::Size4KiB).count(), 0);
        assert_eq!(format!("{a}"), "0x1000..=0x3fff");
    }
}
