//! The debt that an edit leaves behind: TLB entries that must be invalidated.
//!
//! Every edit that takes a right away or changes a translation returns a
//! [`Flush`]. Until it is applied, any CPU may go on using the old
//! translation, and memory that was unmapped must not be given to anyone else.

#![forbid(unsafe_code)]

use crate::addr::{GuestVirt, PageSize, VirtRange};

/// Invalidates translations on every CPU on which the edited page table, or
/// one that borrows from it, is or may be loaded.
///
/// When a method returns, no such CPU uses a translation of the addresses that
/// was read before the call. All of them must invalidate global translations
/// (G) and the paging-structure caches of the addresses too; `INVLPG` does both
/// (SDM vol. 3A section 4.10.4.1, APM vol. 2 section 5.5.2).
pub trait FlushTlb {
    /// Invalidates the translation of the page that holds `va`, whatever its
    /// size.
    fn flush_page(&self, va: GuestVirt);

    /// Invalidates the translations of `range`, whose pages are of size
    /// `stride` or larger: one `INVLPG` for each `stride` bytes is enough.
    fn flush_range(&self, range: VirtRange, stride: PageSize);

    /// Invalidates all translations, global ones and paging-structure caches
    /// included.
    fn flush_all(&self);
}

impl<T: FlushTlb + ?Sized> FlushTlb for &T {
    fn flush_page(&self, va: GuestVirt) {
        (**self).flush_page(va);
    }

    fn flush_range(&self, range: VirtRange, stride: PageSize) {
        (**self).flush_range(range, stride);
    }

    fn flush_all(&self) {
        (**self).flush_all();
    }
}

/// What has to be invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushScope {
    /// Nothing: the edit only added rights.
    Nothing,
    /// The page that holds the address.
    Page(GuestVirt),
    /// A range, and the smallest size of page in it.
    Range(VirtRange, PageSize),
    /// All translations of the page table.
    Everything,
}

/// Why a flush may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoFlush {
    /// The page table is not loaded on any CPU, and was not since its PCID was
    /// last flushed.
    NotLoaded,
    /// The caller invalidates a larger scope that covers this one before
    /// anything depends on it.
    CoveredByLargerFlush,
    /// A stale translation does no harm: nothing is concluded from its being
    /// gone. (For example accessed bits cleared for statistics.)
    StaleIsHarmless,
}

/// Translations that must be invalidated before the edit that returned this
/// takes effect everywhere.
#[must_use = "until a flush is applied, CPUs may go on using the old translation"]
#[derive(Debug, PartialEq, Eq)]
pub struct Flush {
    scope: FlushScope,
}

impl Flush {
    /// No debt.
    #[inline]
    pub const fn nothing() -> Self {
        Self {
            scope: FlushScope::Nothing,
        }
    }

    /// The page that holds `va`.
    #[inline]
    pub const fn page(va: GuestVirt) -> Self {
        Self {
            scope: FlushScope::Page(va),
        }
    }

    /// The pages in `range`, none of which is smaller than `stride`.
    #[inline]
    pub const fn range(range: VirtRange, stride: PageSize) -> Self {
        Self {
            scope: FlushScope::Range(range, stride),
        }
    }

    /// Every translation.
    #[inline]
    pub const fn everything() -> Self {
        Self {
            scope: FlushScope::Everything,
        }
    }

    /// What has to be invalidated.
    #[inline]
    pub const fn scope(&self) -> FlushScope {
        self.scope
    }

    /// Whether nothing has to be invalidated.
    #[inline]
    pub const fn is_nothing(&self) -> bool {
        matches!(self.scope, FlushScope::Nothing)
    }

    /// Pays the debt.
    #[inline]
    pub fn apply(self, tlb: &(impl FlushTlb + ?Sized)) {
        match self.scope {
            FlushScope::Nothing => {}
            FlushScope::Page(va) => tlb.flush_page(va),
            FlushScope::Range(range, stride) => tlb.flush_range(range, stride),
            FlushScope::Everything => tlb.flush_all(),
        }
    }

    /// Leaves the flush out, for a reason that the caller vouches for.
    #[inline]
    pub fn ignore(self, _reason: NoFlush) {}

    /// One debt in place of two. It may cover more than both.
    pub fn and(self, other: Self) -> Self {
        let scope = match (self.scope, other.scope) {
            (FlushScope::Nothing, scope) | (scope, FlushScope::Nothing) => scope,
            (FlushScope::Everything, _) | (_, FlushScope::Everything) => FlushScope::Everything,
            (a, b) => {
                let (a, a_stride) = Self::as_range(a);
                let (b, b_stride) = Self::as_range(b);
                match hull(a, b) {
                    Some(range) => FlushScope::Range(range, a_stride.min(b_stride)),
                    // They lie in different halves of the address space.
                    None => FlushScope::Everything,
                }
            }
        };
        Self { scope }
    }

    fn as_range(scope: FlushScope) -> (VirtRange, PageSize) {
        match scope {
            FlushScope::Page(va) => (VirtRange::page(va, PageSize::Size4KiB), PageSize::Size4KiB),
            FlushScope::Range(range, stride) => (range, stride),
            FlushScope::Nothing | FlushScope::Everything => {
                (VirtRange::empty_at(GuestVirt::ZERO), PageSize::Size1GiB)
            }
        }
    }
}

/// The smallest range that covers both, if they are in the same half.
fn hull(a: VirtRange, b: VirtRange) -> Option<VirtRange> {
    let (Some(a_last), Some(b_last)) = (a.last(), b.last()) else {
        return Some(if a.is_empty() { b } else { a });
    };
    let start = a.start().min(b.start());
    let bytes = a_last.max(b_last).distance_from(start)?.checked_add(1)?;
    VirtRange::try_new(start, bytes).ok()
}

/// Collects what an edit of many leaves has to flush.
#[derive(Debug, Default)]
pub(crate) struct Gather {
    first: Option<GuestVirt>,
    bytes: u64,
    stride: Option<PageSize>,
    pages: u64,
}

impl Gather {
    /// Adds one page; pages come in ascending order, from one half.
    #[inline]
    pub(crate) fn add(&mut self, va: GuestVirt, size: PageSize) {
        let first = *self.first.get_or_insert(va);
        self.bytes = va
            .as_u64()
            .wrapping_sub(first.as_u64())
            .wrapping_add(size.bytes());
        self.stride = Some(self.stride.map_or(size, |stride| stride.min(size)));
        self.pages += 1;
    }

    pub(crate) fn finish(self) -> Flush {
        match (self.first, self.stride) {
            (Some(va), Some(_)) if self.pages == 1 => Flush::page(va),
            (Some(first), Some(stride)) => match VirtRange::try_new(first, self.bytes) {
                Ok(range) => Flush::range(range, stride),
                Err(_) => Flush::everything(),
            },
            _ => Flush::nothing(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    #[derive(Default)]
    struct Seen(Cell<Option<FlushScope>>);

    impl FlushTlb for Seen {
        fn flush_page(&self, va: GuestVirt) {
            self.0.set(Some(FlushScope::Page(va)));
        }
        fn flush_range(&self, range: VirtRange, stride: PageSize) {
            self.0.set(Some(FlushScope::Range(range, stride)));
        }
        fn flush_all(&self) {
            self.0.set(Some(FlushScope::Everything));
        }
    }

    fn seen(flush: Flush) -> Option<FlushScope> {
        let tlb = Seen::default();
        flush.apply(&tlb);
        tlb.0.get()
    }

    #[test]
    fn each_scope_reaches_its_method() {
        let va = GuestVirt::new(0x5000);
        let range = VirtRange::page(va, PageSize::Size4KiB);
        assert_eq!(seen(Flush::nothing()), None);
        assert_eq!(seen(Flush::page(va)), Some(FlushScope::Page(va)));
        assert_eq!(
            seen(Flush::range(range, PageSize::Size4KiB)),
            Some(FlushScope::Range(range, PageSize::Size4KiB))
        );
        assert_eq!(seen(Flush::everything()), Some(FlushScope::Everything));
    }

    #[test]
    fn joined_debts_cover_both() {
        let low = Flush::page(GuestVirt::new(0x5000));
        let high = Flush::page(GuestVirt::new(0x9000));
        let both = VirtRange::try_new(GuestVirt::new(0x5000), 0x5000).unwrap();
        assert_eq!(
            high.and(low).scope(),
            FlushScope::Range(both, PageSize::Size4KiB)
        );

        let low = Flush::page(GuestVirt::new(0x5000));
        let upper_half = Flush::page(GuestVirt::new(u64::MAX));
        assert_eq!(low.and(upper_half).scope(), FlushScope::Everything);

        let low = Flush::page(GuestVirt::new(0x5000));
        assert_eq!(
            Flush::nothing().and(low).scope(),
            FlushScope::Page(GuestVirt::new(0x5000))
        );
    }

    #[test]
    fn gathered_pages_make_one_range() {
        let mut gather = Gather::default();
        gather.add(GuestVirt::new(0x20_0000), PageSize::Size2MiB);
        gather.add(GuestVirt::new(0x40_0000), PageSize::Size4KiB);
        let range = VirtRange::try_new(GuestVirt::new(0x20_0000), 0x20_1000).unwrap();
        assert_eq!(
            gather.finish().scope(),
            FlushScope::Range(range, PageSize::Size4KiB)
        );
        assert!(Gather::default().finish().is_nothing());
    }
}
