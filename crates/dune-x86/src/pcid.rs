//! Process-context identifiers: which address space a TLB entry belongs to
//! (SDM vol. 3A section 4.10.1, APM vol. 2 section 5.5.1).
//!
//! There are 4,096 of them and any number of address spaces, so they are handed
//! out in generations. Each vCPU has an allocator of its own, because each has
//! a TLB of its own; an address space keeps one [`PcidTag`] for each vCPU it
//! ran on. When the identifiers run out, the vCPU flushes its TLB and a new
//! generation begins, in which all tags handed out before are void.
//!
//! ```text
//!  space's tag      allocator of this vCPU             CR3 to load
//!  (gen 7, 12)  --> gen 7: still valid             --> 12, keep its entries
//!  (gen 6, 90)  --> void: hand out the next, 13    --> 13, nothing to flush
//!  none         --> all 4,095 used: gen 8 begins   --> 1, flush everything first
//! ```
//!
//! Giving up a tag ([`PcidTag::NONE`]) is a way to flush, too: an address space
//! that changed while it was not loaded here need only drop its tag, and gets
//! an identifier with no entries when it is next loaded.

#![forbid(unsafe_code)]

/// A process-context identifier, 0 to 4095.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pcid(u16);

impl Pcid {
    /// The identifier that is used while CR4.PCIDE is clear, and that no
    /// allocator hands out: for the address space that is always there.
    pub const ZERO: Self = Self(0);

    /// The number of identifiers.
    pub const COUNT: u16 = 1 << 12;

    /// The identifier `number`, or `None` when it has more than 12 bits.
    pub const fn new(number: u16) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number.
    #[inline]
    pub const fn number(self) -> u16 {
        self.0
    }
}

/// An address space's claim to an identifier on one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PcidTag {
    /// 0 is never a current generation.
    generation: u64,
    pcid: Pcid,
}

impl PcidTag {
    /// No claim: the next [`PcidAllocator::assign`] hands out a fresh
    /// identifier.
    pub const NONE: Self = Self {
        generation: 0,
        pcid: Pcid::ZERO,
    };
}

impl Default for PcidTag {
    fn default() -> Self {
        Self::NONE
    }
}

/// What is to be done about the TLB when an identifier is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum TlbAction {
    /// The TLB may hold the space's translations: keep them (set
    /// [`crate::cpu::Cr3::NO_FLUSH`]).
    Keep,
    /// The TLB holds nothing under this identifier: no flush is needed.
    Fresh,
    /// Identifiers are used anew: flush all of them on this vCPU, global
    /// translations included, before the load.
    FlushAll,
}

/// Hands out the identifiers of one vCPU. Not to be used by two threads at
/// once: it belongs to the vCPU's own thread.
#[derive(Debug)]
pub struct PcidAllocator {
    generation: u64,
    next: u16,
}

impl PcidAllocator {
    /// An allocator for a vCPU whose TLB holds nothing but entries of
    /// [`Pcid::ZERO`].
    pub const fn new() -> Self {
        Self {
            generation: 1,
            next: 1,
        }
    }

    /// The identifier to load an address space under, given the tag that it
    /// got here last; the tag is brought up to date.
    #[inline]
    pub const fn assign(&mut self, tag: &mut PcidTag) -> (Pcid, TlbAction) {
        if tag.generation == self.generation {
            return (tag.pcid, TlbAction::Keep);
        }
        let mut action = TlbAction::Fresh;
        if self.next == Pcid::COUNT {
            // 2^64 generations of 4,095 spaces each never pass.
            self.generation = self.generation.wrapping_add(1);
            self.next = 1;
            action = TlbAction::FlushAll;
        }
        *tag = PcidTag {
            generation: self.generation,
            pcid: Pcid(self.next),
        };
        self.next += 1;
        (tag.pcid, action)
    }

    /// Voids all tags, because the vCPU's TLB was flushed or lost (after
    /// `fork`, say).
    pub const fn reset(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.next = 1;
    }
}

impl Default for PcidAllocator {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::vec;

    #[test]
    fn a_tag_keeps_its_identifier() {
        let mut allocator = PcidAllocator::new();
        let (mut a, mut b) = (PcidTag::NONE, PcidTag::NONE);
        let (first, action) = allocator.assign(&mut a);
        assert_eq!(action, TlbAction::Fresh);
        assert_ne!(first, Pcid::ZERO);
        let (second, _) = allocator.assign(&mut b);
        assert_ne!(first, second);
        assert_eq!(allocator.assign(&mut a), (first, TlbAction::Keep));
        a = PcidTag::NONE;
        let (third, action) = allocator.assign(&mut a);
        assert_eq!(action, TlbAction::Fresh);
        assert!(third != first && third != second);
        allocator.reset();
        assert_eq!(allocator.assign(&mut b).1, TlbAction::Fresh);
    }

    #[test]
    fn no_identifier_is_kept_or_fresh_with_anothers_entries() {
        // Which space's entries a TLB may hold under each identifier.
        let mut tlb: HashMap<u16, usize> = HashMap::new();
        let mut allocator = PcidAllocator::new();
        let mut tags = vec![PcidTag::NONE; 6000];
        let mut flushes = 0;
        for round in 0..5 {
            for space in 0..tags.len() {
                // Some spaces run more often than others.
                for space in [space, space % 7, (space * 31 + round) % 1000] {
                    let (pcid, action) = allocator.assign(&mut tags[space]);
                    match action {
                        TlbAction::Keep => {
                            assert!(tlb.get(&pcid.number()).is_none_or(|&owner| owner == space));
                        }
                        TlbAction::Fresh => assert!(!tlb.contains_key(&pcid.number())),
                        TlbAction::FlushAll => {
                            flushes += 1;
                            tlb.clear();
                        }
                    }
                    tlb.insert(pcid.number(), space);
                }
            }
        }
        assert!(flushes > 5);
    }

    #[test]
    fn identifiers_have_12_bits() {
        assert!(Pcid::new(4095).is_some());
        assert!(Pcid::new(4096).is_none());
    }
}
