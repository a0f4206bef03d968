//! Page table entries: the bits of a leaf as flags, and the entry itself.
//!
//! ```text
//!  63  62..59 58    57..52   51..............12   11..9 8 7   6 5 4   3   2  1  0
//! +---+------+-----+--------+--------------------+-----+-+---+-+-+---+---+--+--+--+
//! | NX| pkey | LEAF| ignored| physical address   | AVL |G|PAT|D|A|PCD|PWT|US|RW| P|  4 KiB leaf
//! +---+------+-----+--------+--------------+-----+-----+-+---+-+-+---+---+--+--+--+
//! | NX| pkey | LEAF| ignored| physical     |0 PAT| AVL |G|PS1|D|A|PCD|PWT|US|RW| P|  2 MiB, 1 GiB leaf
//! +---+------+-----+--------+--------------+-----+-----+-+---+-+-+---+---+--+--+--+
//! | NX| ignored, 53 LENT, 52  | physical address | AVL |-|PS0|-|A|PCD|PWT|US|RW| P|  link to a table
//! |   |             BORROWED  | of the table     |     | |   | | |   |   |  |  |  |
//! +---+-----------------------+------------------+-----+-+---+-+-+---+---+--+--+--+
//! ```
//!
//! (SDM vol. 3A section 4.5.4 and figure 4-11, APM vol. 2 section 5.3.) `LEAF`,
//! `BORROWED` and `LENT` are bits that the hardware ignores and that this
//! module keeps for itself; the three AVL bits are left to its user.

#![forbid(unsafe_code)]

use core::fmt;

use bitflags::bitflags;

use crate::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};

bitflags! {
    /// The attributes of a leaf entry, with the layout that they have in a
    /// 4 KiB leaf whatever the size of the page.
    ///
    /// Only [`PteFlags::PAT`] moves with the size: it is bit 7 of a 4 KiB leaf
    /// and bit 12 of larger ones, whose bit 7 (PS) says that they are leaves.
    /// [`Entry::leaf`] and [`Entry::flags`] convert, so PS never appears here.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
    #[repr(transparent)]
    pub struct PteFlags: u64 {
        /// P: the page may be accessed; without it every access faults and the
        /// hardware ignores all other bits (SDM vol. 3A 4.5, APM vol. 2 5.4.1
        /// "Present (P) Bit"). A leaf without it keeps its translation for
        /// later: it is *parked*.
        const PRESENT = 1 << 0;
        /// R/W: the page may be written (SDM vol. 3A 4.6.1, APM vol. 2 5.4.1
        /// "Read/Write (R/W) Bit").
        const WRITABLE = 1 << 1;
        /// U/S: ring 3 may access the page (SDM vol. 3A 4.6.1, APM vol. 2
        /// 5.4.1 "User/Supervisor (U/S) Bit").
        const USER = 1 << 2;
        /// PWT: bit 0 of the index into the PAT (SDM vol. 3A 4.9.2, APM vol. 2
        /// 7.8.3).
        const WRITE_THROUGH = 1 << 3;
        /// PCD: bit 1 of the index into the PAT (SDM vol. 3A 4.9.2, APM vol. 2
        /// 7.8.3).
        const CACHE_DISABLE = 1 << 4;
        /// A: set by the CPU when it uses the translation (SDM vol. 3A 4.8,
        /// APM vol. 2 5.4.2 "Accessed (A) Bit").
        const ACCESSED = 1 << 5;
        /// D: set by the CPU when it writes to the page (SDM vol. 3A 4.8, APM
        /// vol. 2 5.4.2 "Dirty (D) Bit").
        const DIRTY = 1 << 6;
        /// PAT: bit 2 of the index into the PAT (SDM vol. 3A 4.9.2, APM vol. 2
        /// 5.4.1 "Page-Attribute Table (PAT) Bit").
        const PAT = 1 << 7;
        /// G: the translation outlives a change of CR3 where CR4.PGE is set
        /// (SDM vol. 3A 4.10.2.4, APM vol. 2 5.5.1).
        const GLOBAL = 1 << 8;
        /// Software bit 0 (bit 9; AVL, ignored by the CPU: SDM vol. 3A table
        /// 4-20, APM vol. 2 5.4.1 "Available to Software (AVL) Bit").
        const AVL0 = 1 << 9;
        /// Software bit 1 (bit 10).
        const AVL1 = 1 << 10;
        /// Software bit 2 (bit 11; SDM table 4-20 gives it a meaning only
        /// under HLAT paging, which no guest of ours turns on).
        const AVL2 = 1 << 11;
        /// The four bits of the protection key (bits 59 to 62) as a mask: see
        /// [`PteFlags::pkey`] (SDM vol. 3A 4.6.2, APM vol. 2 5.6.7). Ignored
        /// by the CPU where CR4.PKE is clear.
        const PKEY = 0xf << 59;
        /// NX (XD): no instruction may be fetched from the page; needs
        /// EFER.NXE (SDM vol. 3A 4.6.1, APM vol. 2 5.6.1).
        const NO_EXECUTE = 1 << 63;

        /// Read by ring 0 alone.
        const R = Self::PRESENT.bits() | Self::NO_EXECUTE.bits();
        /// Read and written by ring 0 alone.
        const RW = Self::R.bits() | Self::WRITABLE.bits();
        /// Read and executed by ring 0 alone.
        const RX = Self::PRESENT.bits();
        /// Read, written and executed by ring 0 alone.
        const RWX = Self::PRESENT.bits() | Self::WRITABLE.bits();

        /// What `mprotect` decides: P, R/W, U/S and NX.
        const PROTECTION = Self::PRESENT.bits()
            | Self::WRITABLE.bits()
            | Self::USER.bits()
            | Self::NO_EXECUTE.bits();
    }
}

impl PteFlags {
    /// The protection key, 0 to 15.
    #[inline]
    pub const fn pkey(self) -> u8 {
        ((self.bits() & Self::PKEY.bits()) >> 59) as u8
    }

    /// The flags with another protection key; of `key` the low four bits
    /// count.
    #[inline]
    pub const fn with_pkey(self, key: u8) -> Self {
        Self::from_bits_retain((self.bits() & !Self::PKEY.bits()) | (((key & 0xf) as u64) << 59))
    }

    /// The index into the page attribute table: PAT, PCD, PWT (SDM vol. 3A
    /// table 4-19).
    #[inline]
    pub const fn pat_index(self) -> u8 {
        let low = (self.bits() >> 3) & 0b11;
        let high = (self.bits() >> 7) & 1;
        (low | (high << 2)) as u8
    }
}

impl fmt::Debug for PteFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        // The composite constants would say the same bits twice, so the bits
        // are spelt out.
        let named = [
            (Self::PRESENT, "P"),
            (Self::WRITABLE, "RW"),
            (Self::USER, "US"),
            (Self::WRITE_THROUGH, "PWT"),
            (Self::CACHE_DISABLE, "PCD"),
            (Self::ACCESSED, "A"),
            (Self::DIRTY, "D"),
            (Self::PAT, "PAT"),
            (Self::GLOBAL, "G"),
            (Self::AVL0, "AVL0"),
            (Self::AVL1, "AVL1"),
            (Self::AVL2, "AVL2"),
            (Self::NO_EXECUTE, "NX"),
        ];
        let mut separator = "";
        for (flag, name) in named {
            if self.contains(flag) {
                write!(f, "{separator}{name}")?;
                separator = "|";
            }
        }
        if self.pkey() != 0 {
            write!(f, "{separator}pkey {}", self.pkey())?;
        }
        Ok(())
    }
}

/// A level of the paging hierarchy, counted from the leaves as AMD does (the
/// name in brackets is Intel's).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// Page table (PT); its entries map 4 KiB.
    Pt = 1,
    /// Page directory (PD); its entries map 2 MiB or link to a page table.
    Pd = 2,
    /// Page directory pointer table (PDPT); its entries map 1 GiB or link.
    Pdpt = 3,
    /// Page map level 4 (PML4); its entries link.
    Pml4 = 4,
    /// Page map level 5 (PML5); its entries link.
    Pml5 = 5,
}

impl Level {
    /// The level whose tables the entries of this one link to.
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Pt => None,
            Self::Pd => Some(Self::Pt),
            Self::Pdpt => Some(Self::Pd),
            Self::Pml4 => Some(Self::Pdpt),
            Self::Pml5 => Some(Self::Pml4),
        }
    }

    /// The bytes that one entry at this level covers, as a power of two.
    #[inline]
    pub const fn shift(self) -> u32 {
        12 + 9 * (self as u32 - 1)
    }

    /// The bytes that one entry at this level covers.
    #[inline]
    pub const fn entry_bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The index into a table at this level that a virtual address selects.
    #[inline]
    pub const fn index(self, va: GuestVirt) -> usize {
        ((va.as_u64() >> self.shift()) & 0x1ff) as usize
    }

    /// The size of the page that a leaf at this level maps.
    #[inline]
    pub const fn page_size(self) -> Option<PageSize> {
        match self {
            Self::Pt => Some(PageSize::Size4KiB),
            Self::Pd => Some(PageSize::Size2MiB),
            Self::Pdpt => Some(PageSize::Size1GiB),
            Self::Pml4 | Self::Pml5 => None,
        }
    }

    /// The level at which a page of this size is a leaf.
    #[inline]
    pub const fn of(size: PageSize) -> Self {
        match size {
            PageSize::Size4KiB => Self::Pt,
            PageSize::Size2MiB => Self::Pd,
            PageSize::Size1GiB => Self::Pdpt,
        }
    }

    /// The root's level in a hierarchy of so many levels.
    #[inline]
    pub(crate) const fn root(levels: u8) -> Self {
        match levels {
            4 => Self::Pml4,
            5 => Self::Pml5,
            _ => panic!("x86-64 page tables have 4 or 5 levels"),
        }
    }
}

/// What an entry is, which depends on its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// All zero: nothing is mapped.
    Empty,
    /// A link to a table of the level below.
    Link,
    /// A leaf; present, or parked.
    Leaf(PageSize),
    /// Neither: the CPU would report a reserved bit, or the entry is not
    /// present and not one that this module writes.
    Malformed,
}

/// One entry of a page table, as the CPU reads it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Entry(pub u64);

impl Entry {
    /// An entry that maps nothing.
    pub const EMPTY: Self = Self(0);

    /// PS: in an entry above the lowest level, that it is a leaf (SDM vol. 3A
    /// 4.5.4, APM vol. 2 5.4.1 "Page Size (PS) Bit").
    pub const PAGE_SIZE: u64 = 1 << 7;
    /// PAT of a 2 MiB or 1 GiB leaf (SDM vol. 3A tables 4-16 and 4-18).
    pub const PAT_LARGE: u64 = 1 << 12;
    /// Where the physical address is (bits 12 to 51).
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// Software bit 58, set in each leaf that this module writes: it keeps a
    /// parked leaf of physical address 0 apart from an empty entry. Ignored by
    /// the CPU in leaves (SDM vol. 3A tables 4-16 to 4-20, APM vol. 2 figures
    /// 5-21 to 5-26).
    pub const LEAF: u64 = 1 << 58;
    /// Software bit 52 of a link: the table below belongs to another page
    /// table, and may be neither edited nor freed through this one.
    pub const BORROWED: u64 = 1 << 52;
    /// Software bit 53 of a link: another page table borrows the table below,
    /// so it must stay as long as this page table.
    pub const LENT: u64 = 1 << 53;

    /// A leaf that maps a page of `size` at `pa` with `flags`. Address bits
    /// below the page size are dropped.
    #[inline]
    pub const fn leaf(pa: GuestPhys, size: PageSize, flags: PteFlags) -> Self {
        let address = pa.align_down(size).as_u64();
        Self(address | encode(flags.bits(), size) | Self::marks(size))
    }

    /// A link to a table. It forbids nothing, so that the leaves decide.
    #[inline]
    pub const fn link(table: GuestPhys) -> Self {
        const LINK: u64 =
            PteFlags::PRESENT.bits() | PteFlags::WRITABLE.bits() | PteFlags::USER.bits();
        Self((table.as_u64() & Self::ADDRESS) | LINK)
    }

    /// The bits that every leaf of this size has.
    #[inline]
    const fn marks(size: PageSize) -> u64 {
        match size {
            PageSize::Size4KiB => Self::LEAF,
            PageSize::Size2MiB | PageSize::Size1GiB => Self::LEAF | Self::PAGE_SIZE,
        }
    }

    /// Whether nothing is mapped.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether P is set.
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & PteFlags::PRESENT.bits() != 0
    }

    /// Whether this link leads into another page table's tables.
    #[inline]
    pub const fn is_borrowed(self) -> bool {
        self.0 & Self::BORROWED != 0
    }

    /// What the entry is, found at `level`.
    #[inline]
    pub const fn kind(self, level: Level) -> EntryKind {
        if self.0 == 0 {
            return EntryKind::Empty;
        }
        match level {
            Level::Pt => EntryKind::Leaf(PageSize::Size4KiB),
            _ if self.0 & Self::PAGE_SIZE != 0 => match level.page_size() {
                Some(size) => EntryKind::Leaf(size),
                None => EntryKind::Malformed,
            },
            _ if self.is_present() => EntryKind::Link,
            _ => EntryKind::Malformed,
        }
    }

    /// The table that a link leads to.
    #[inline]
    pub const fn table(self) -> GuestPhys {
        GuestPhys::new_truncate(self.0 & Self::ADDRESS)
    }

    /// The physical address of the page that a leaf of `size` maps.
    #[inline]
    pub const fn page(self, size: PageSize) -> GuestPhys {
        GuestPhys::new_truncate(self.0 & Self::ADDRESS & !size.offset_mask())
    }

    /// The attributes of a leaf of `size`.
    #[inline]
    pub const fn flags(self, size: PageSize) -> PteFlags {
        PteFlags::from_bits_truncate(match size {
            PageSize::Size4KiB => self.0,
            PageSize::Size2MiB | PageSize::Size1GiB => {
                let pat = if self.0 & Self::PAT_LARGE != 0 {
                    PteFlags::PAT.bits()
                } else {
                    0
                };
                (self.0 & !PteFlags::PAT.bits()) | pat
            }
        })
    }

    /// The leaf for part `index` of the 512 parts that a leaf of size `size`
    /// consists of, or `None` of the smallest size.
    ///
    /// All attributes carry over, those that the module does not know
    /// included; PAT moves to where the smaller size has it.
    #[inline]
    pub const fn part(self, size: PageSize, index: usize) -> Option<Self> {
        let Some(smaller) = size.smaller() else {
            return None;
        };
        let other = self.0 & !Self::ADDRESS & !Self::PAGE_SIZE & !Self::PAT_LARGE;
        let pat = self.flags(size).bits() & PteFlags::PAT.bits();
        let address = self.page(size).as_u64() + ((index as u64 & 0x1ff) << smaller.shift());
        Some(Self(
            other | encode(pat, smaller) | Self::marks(smaller) | address,
        ))
    }
}

/// Moves PAT from bit 7 to where a leaf of `size` has it.
#[inline]
const fn encode(flags: u64, size: PageSize) -> u64 {
    match size {
        PageSize::Size4KiB => flags,
        PageSize::Size2MiB | PageSize::Size1GiB => {
            let pat = if flags & PteFlags::PAT.bits() != 0 {
                Entry::PAT_LARGE
            } else {
                0
            };
            (flags & !PteFlags::PAT.bits()) | pat
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({:#018x})", self.0)
    }
}

impl fmt::LowerHex for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A leaf entry and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The first address of the page.
    pub va: GuestVirt,
    /// The size of the page.
    pub size: PageSize,
    /// The entry, as it was when it was read.
    pub entry: Entry,
}

impl Leaf {
    /// The physical address of the page.
    #[inline]
    pub const fn page(&self) -> GuestPhys {
        self.entry.page(self.size)
    }

    /// The page's attributes.
    #[inline]
    pub const fn flags(&self) -> PteFlags {
        self.entry.flags(self.size)
    }

    /// Whether P is set; a leaf without it is parked.
    #[inline]
    pub const fn is_present(&self) -> bool {
        self.entry.is_present()
    }

    /// The addresses that the page covers.
    #[inline]
    pub const fn range(&self) -> VirtRange {
        VirtRange::page(self.va, self.size)
    }
}

/// Bits of a leaf to clear and to set. It never touches the address, PAT or
/// the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    clear: u64,
    set: u64,
}

impl Change {
    /// The bits that a change may touch: they are in the same place in leaves
    /// of every size.
    const ALLOWED: u64 = PteFlags::all().bits() & !PteFlags::PAT.bits();

    /// Clears the bits in `clear`, then sets the bits in `set`.
    /// [`PteFlags::PAT`] is left alone: to change it, unmap and map.
    #[inline]
    pub const fn new(clear: PteFlags, set: PteFlags) -> Self {
        Self {
            clear: clear.bits() & Self::ALLOWED,
            // Marked here, at no cost when it is applied, so that an entry
            // made elsewhere survives being parked.
            set: (set.bits() & Self::ALLOWED) | Entry::LEAF,
        }
    }

    /// Clears bits.
    #[inline]
    pub const fn clear(flags: PteFlags) -> Self {
        Self::new(flags, PteFlags::empty())
    }

    /// Sets bits.
    #[inline]
    pub const fn set(flags: PteFlags) -> Self {
        Self::new(PteFlags::empty(), flags)
    }

    /// Replaces the bits of [`PteFlags::PROTECTION`] by those in `flags`, as
    /// `mprotect` does; other bits in `flags` do not count.
    #[inline]
    pub const fn protection(flags: PteFlags) -> Self {
        Self::new(
            PteFlags::PROTECTION,
            PteFlags::from_bits_retain(flags.bits() & PteFlags::PROTECTION.bits()),
        )
    }

    /// Replaces the protection key.
    #[inline]
    pub const fn pkey(key: u8) -> Self {
        Self::new(PteFlags::PKEY, PteFlags::empty().with_pkey(key))
    }

    /// The entry after the change.
    #[inline]
    pub const fn apply(self, entry: Entry) -> Entry {
        Entry((entry.0 & !self.clear) | self.set)
    }
}

/// Whether a TLB that still holds `old` could allow or do what `new` does not,
/// so that it must be flushed.
///
/// Rights that were *added* need none: the fault that a stale entry raises
/// makes the CPU drop it (SDM vol. 3A 4.10.4.3, APM vol. 2 5.5.2), and an entry
/// that was not present was never cached.
#[inline]
pub(crate) const fn needs_flush(old: Entry, new: Entry) -> bool {
    // Bits whose change in either direction takes something away or changes
    // what the translation means; W, U and P only when they fall, NX only when
    // it rises, A and D only when they fall.
    const FALLING: u64 = PteFlags::PRESENT.bits()
        | PteFlags::WRITABLE.bits()
        | PteFlags::USER.bits()
        | PteFlags::ACCESSED.bits()
        | PteFlags::DIRTY.bits();
    const RISING: u64 = PteFlags::NO_EXECUTE.bits();
    const SOFTWARE: u64 =
        PteFlags::AVL0.bits() | PteFlags::AVL1.bits() | PteFlags::AVL2.bits() | (0x7f << 52);
    const EITHER: u64 = !(FALLING | RISING | SOFTWARE);

    let changed = old.0 ^ new.0;
    let taken = (changed & EITHER) | (old.0 & changed & FALLING) | (new.0 & changed & RISING);
    old.is_present() && taken != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    const PA: GuestPhys = GuestPhys::new(0x1_4000_0000);

    #[test]
    fn pat_bit_moves_with_the_size() {
        let flags = PteFlags::RW | PteFlags::PAT | PteFlags::DIRTY;
        let small = Entry::leaf(PA, PageSize::Size4KiB, flags);
        assert_ne!(small.0 & (1 << 7), 0);
        assert_eq!(small.0 & (1 << 12), 0);
        for size in [PageSize::Size2MiB, PageSize::Size1GiB] {
            let large = Entry::leaf(PA, size, flags);
            assert_ne!(large.0 & Entry::PAGE_SIZE, 0);
            assert_ne!(large.0 & Entry::PAT_LARGE, 0);
            assert_eq!(large.page(size), PA);
            assert_eq!(large.flags(size), flags);

            let plain = Entry::leaf(PA, size, PteFlags::RW);
            assert_eq!(plain.0 & Entry::PAT_LARGE, 0);
            assert_ne!(plain.0 & Entry::PAGE_SIZE, 0);
            assert!(!plain.flags(size).contains(PteFlags::PAT));
        }
    }

    #[test]
    fn parts_keep_every_attribute() {
        let flags = (PteFlags::RW | PteFlags::PAT | PteFlags::ACCESSED | PteFlags::DIRTY)
            .with_pkey(9)
            | PteFlags::AVL1
            | PteFlags::GLOBAL;
        let giant = Entry::leaf(PA, PageSize::Size1GiB, flags);
        let large = giant.part(PageSize::Size1GiB, 3).unwrap();
        assert_eq!(
            large,
            Entry::leaf(GuestPhys::new(0x1_4060_0000), PageSize::Size2MiB, flags)
        );
        let small = large.part(PageSize::Size2MiB, 511).unwrap();
        assert_eq!(
            small,
            Entry::leaf(GuestPhys::new(0x1_407f_f000), PageSize::Size4KiB, flags)
        );
        assert_eq!(small.part(PageSize::Size4KiB, 0), None);
    }

    #[test]
    fn pkey_is_bits_59_to_62() {
        let flags = PteFlags::RW.with_pkey(0b1010);
        assert_eq!(flags.bits() >> 59 & 0xf, 0b1010);
        assert_eq!(flags.pkey(), 10);
        assert!(flags.contains(PteFlags::NO_EXECUTE));
        assert_eq!(
            Change::pkey(3)
                .apply(Entry(flags.bits()))
                .flags(PageSize::Size4KiB)
                .pkey(),
            3
        );
    }

    #[test]
    fn pat_index_is_pat_pcd_pwt() {
        assert_eq!((PteFlags::PAT | PteFlags::WRITE_THROUGH).pat_index(), 5);
        assert_eq!(PteFlags::CACHE_DISABLE.pat_index(), 2);
    }

    #[test]
    fn kinds_depend_on_the_level() {
        let zero_parked = Entry::leaf(GuestPhys::ZERO, PageSize::Size4KiB, PteFlags::empty());
        assert_eq!(
            zero_parked.kind(Level::Pt),
            EntryKind::Leaf(PageSize::Size4KiB)
        );
        assert_eq!(Entry::EMPTY.kind(Level::Pd), EntryKind::Empty);
        assert_eq!(Entry::link(PA).kind(Level::Pd), EntryKind::Link);
        assert_eq!(Entry::link(PA).kind(Level::Pml5), EntryKind::Link);
        let large = Entry::leaf(PA, PageSize::Size2MiB, PteFlags::empty());
        assert_eq!(large.kind(Level::Pd), EntryKind::Leaf(PageSize::Size2MiB));
        assert_eq!(large.kind(Level::Pml4), EntryKind::Malformed);
        assert_eq!(Entry(PA.as_u64()).kind(Level::Pd), EntryKind::Malformed);
    }

    #[test]
    fn only_what_takes_away_needs_a_flush() {
        let entry = |flags| Entry::leaf(PA, PageSize::Size4KiB, flags);
        let rw = PteFlags::RWX | PteFlags::DIRTY | PteFlags::ACCESSED;
        assert!(needs_flush(entry(rw), entry(rw - PteFlags::WRITABLE)));
        assert!(!needs_flush(entry(rw - PteFlags::WRITABLE), entry(rw)));
        assert!(needs_flush(entry(rw), entry(rw | PteFlags::NO_EXECUTE)));
        assert!(!needs_flush(entry(rw | PteFlags::NO_EXECUTE), entry(rw)));
        assert!(needs_flush(entry(rw), entry(rw - PteFlags::DIRTY)));
        assert!(needs_flush(entry(rw), entry(rw.with_pkey(1))));
        assert!(needs_flush(entry(rw), entry(rw | PteFlags::CACHE_DISABLE)));
        assert!(!needs_flush(entry(rw), entry(rw | PteFlags::AVL2)));
        assert!(!needs_flush(Entry::EMPTY, entry(rw)));
        assert!(needs_flush(entry(rw), Entry::EMPTY));
        assert!(!needs_flush(entry(rw - PteFlags::PRESENT), Entry::EMPTY));
    }

    #[test]
    fn debug_spells_flags_out() {
        let flags = PteFlags::RW.with_pkey(2);
        assert_eq!(format!("{flags:?}"), "P|RW|NX|pkey 2");
        assert_eq!(format!("{:?}", PteFlags::empty()), "none");
    }
}
