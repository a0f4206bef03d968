//! Where page tables live: frames of an arena of this process, and how the walker reaches
//! them.
#![expect(unsafe_code, reason = "page tables are raw memory shared with the CPU")]

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use dune_kvm::sys;
use dune_kvm::vm::Vm;
use dune_x86::addr::{GuestPhys, PageSize};
use dune_x86::frame::FramePool;
use dune_x86::paging::{ENTRIES, Entry, FrameAllocator, TableMemory};

use crate::error::EnterError;
use crate::machine::Machine;
use crate::memory::identity::IdentityTables;

/// 512 MiB of page tables map a terabyte in 4 KiB pages at the very least. It is address
/// space only: a frame costs memory from its first use on.
const FRAMES: usize = 128 << 10;
const FRAME: usize = 4096;
/// Size of the arena.
pub(crate) const ARENA_BYTES: u64 = (FRAMES * FRAME) as u64;

/// The memory that page tables are kept in, and who has how many references to which frame.
#[derive(Debug)]
pub(crate) struct FrameArena {
    pool: FramePool<'static>,
}

impl FrameArena {
    pub(crate) fn new(vm: &Vm, identity: &IdentityTables) -> Result<Self, EnterError> {
        let base = identity.arena();
        identity.cover(vm, base, ARENA_BYTES)?;
        let words = sys::map_anonymous(FRAMES * size_of::<AtomicU32>())
            .map_err(EnterError::Memory)?
            .cast::<AtomicU32>();
        sys::avoid_huge_pages(words.cast(), FRAMES * size_of::<AtomicU32>());
        identity.cover(vm, words as u64, (FRAMES * size_of::<AtomicU32>()) as u64)?;
        // SAFETY: zeroed memory of that many words, never unmapped.
        let words = unsafe { core::slice::from_raw_parts(words, FRAMES) };
        let guest = vm.windows().to_guest(base).unwrap_or(0);
        FramePool::new(GuestPhys::new(guest), PageSize::Size4KiB, words)
            .map(|pool| Self { pool })
            .map_err(|_| EnterError::Memory(sys::Errno::ENOMEM))
    }
}

/// A run of tables that is contiguous in guest physical and in host virtual memory, so that
/// reaching one of them is an addition. Set once, before there is a vCPU.
struct Run {
    guest: AtomicU64,
    bytes: AtomicU64,
    host: AtomicU64,
}

impl Run {
    const fn new() -> Self {
        Self {
            guest: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            host: AtomicU64::new(0),
        }
    }

    fn set(&self, guest: u64, bytes: u64, host: u64) {
        self.guest.store(guest, Ordering::Relaxed);
        self.host.store(host, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Release);
    }

    #[inline(always)]
    fn read(&self) -> RunNow {
        RunNow {
            guest: self.guest.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            host: self.host.load(Ordering::Relaxed),
        }
    }
}

/// A [`Run`] as plain numbers, which the compiler may keep in registers during a walk.
#[derive(Clone, Copy, Debug, Default)]
struct RunNow {
    guest: u64,
    bytes: u64,
    host: u64,
}

impl RunNow {
    #[inline(always)]
    fn host(self, table: u64) -> Option<u64> {
        let offset = table.wrapping_sub(self.guest);
        (offset < self.bytes).then(|| self.host.wrapping_add(offset))
    }
}

/// The upper levels of the process's own tables, and behind them the arena of frames.
static TABLES: Run = Run::new();

/// Says where they are.
pub(crate) fn set_run(guest: u64, bytes: u64, host: u64) {
    TABLES.set(guest, bytes, host);
}

/// The process's page tables as memory: by guest physical address.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    run: RunNow,
}

impl Tables {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self { run: TABLES.read() }
    }

    #[inline(always)]
    fn entry(self, table: GuestPhys, index: usize) -> Option<&'static AtomicU64> {
        let table = table.as_u64();
        let host = match self.run.host(table) {
            Some(host) => host,
            None => Self::elsewhere(table)?,
        };
        // SAFETY: only tables are ever asked for: frames of the arena or of the identity
        // tables, which are never unmapped, and have 512 entries.
        Some(unsafe { &*(host as *const AtomicU64).wrapping_add(index & (ENTRIES - 1)) })
    }
}

impl Tables {
    /// All entries of a table.
    #[inline]
    pub(crate) fn whole(&self, table: GuestPhys) -> Option<&'static [AtomicU64; ENTRIES]> {
        let first = self.entry(table, 0)? as *const AtomicU64;
        // SAFETY: as in `entry`: a table has 512 entries.
        Some(unsafe { &*first.cast() })
    }

    /// Zeroes a table that is linked nowhere yet.
    fn clear(self, table: GuestPhys) {
        let Some(first) = self.entry(table, 0) else {
            return;
        };
        let first = core::ptr::from_ref(first).cast_mut();
        // By hand, because the compiler would call `memset`, and that may count every byte.
        // SAFETY: the frame, which is aligned to its size and nobody else's yet.
        unsafe {
            asm!(
                "pxor {zero}, {zero}",
                "2:",
                "movaps [{at}], {zero}",
                "movaps [{at} + 16], {zero}",
                "movaps [{at} + 32], {zero}",
                "movaps [{at} + 48], {zero}",
                "movaps [{at} + 64], {zero}",
                "movaps [{at} + 80], {zero}",
                "movaps [{at} + 96], {zero}",
                "movaps [{at} + 112], {zero}",
                "add {at}, 128",
                "cmp {at}, {end}",
                "jne 2b",
                zero = out(xmm_reg) _,
                at = inout(reg) first => _,
                end = in(reg) first as usize + FRAME,
                options(nostack),
            );
        }
    }

    /// Copies entries of one table to the same places of another, which is linked nowhere
    /// yet, with more bits.
    pub(super) fn copy_entries(
        self,
        from: GuestPhys,
        to: GuestPhys,
        indices: core::ops::Range<usize>,
        bits: u64,
    ) {
        let (Some(from), Some(to)) = (
            self.entry(from, indices.start),
            self.entry(to, indices.start),
        ) else {
            return;
        };
        let from: *const AtomicU64 = from;
        let to = core::ptr::from_ref(to).cast_mut().cast::<u64>();
        for index in 0..indices.len().min(ENTRIES) {
            // SAFETY: within the table, as its caller knows its indices.
            let entry = unsafe { &*from.wrapping_add(index) }.load(Ordering::Relaxed);
            // SAFETY: as above; nobody else writes to a table that is linked nowhere.
            unsafe { to.wrapping_add(index).write(entry | bits) };
        }
    }

    /// Page directories of windows, on a CPU without pages of 1 GiB.
    #[cold]
    fn elsewhere(table: u64) -> Option<u64> {
        Machine::get()?.vm().windows().to_host(table)
    }
}

impl TableMemory for Tables {
    #[inline(always)]
    fn read(&self, table: GuestPhys, index: usize) -> u64 {
        self.entry(table, index)
            .map_or(0, |entry| entry.load(Ordering::Relaxed))
    }

    #[inline(always)]
    fn write(&self, table: GuestPhys, index: usize, value: u64) {
        if let Some(entry) = self.entry(table, index) {
            entry.store(value, Ordering::Relaxed);
        }
    }

    fn next_owned(&self, table: GuestPhys, from: usize) -> Option<usize> {
        const AT_ONCE: usize = 8;
        let entries = self.whole(table)?;
        let mut index = from;
        while let Some(entry) = entries.get(index) {
            if index.is_multiple_of(AT_ONCE)
                && let Some(eight) = entries
                    .get(index..)
                    .and_then(|rest| rest.first_chunk::<AT_ONCE>())
            {
                let (any, all) = eight
                    .each_ref()
                    .map(|entry| entry.load(Ordering::Relaxed))
                    .iter()
                    .fold((0, u64::MAX), |(any, all), entry| {
                        (any | entry, all & entry)
                    });
                if any == 0 || all & Entry::BORROWED != 0 {
                    index += AT_ONCE;
                    continue;
                }
            }
            let entry = Entry(entry.load(Ordering::Relaxed));
            if !entry.is_empty() && !entry.is_borrowed() {
                return Some(index);
            }
            index += 1;
        }
        None
    }

    #[inline(always)]
    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        match self.entry(table, index) {
            Some(entry) => entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed),
            None => Err(0),
        }
    }
}

/// Frames for page tables, from the arena. Lock-free; costs no exit but at a frame's first
/// touch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frames(());

impl Frames {
    pub(crate) const fn new() -> Self {
        Self(())
    }

    /// How many frames are in use.
    #[must_use]
    pub fn in_use() -> u32 {
        Machine::get().map_or(0, |machine| machine.frames().pool.in_use())
    }

    /// How many there are to be had.
    pub(crate) fn left() -> u32 {
        (FRAMES as u32).saturating_sub(Self::in_use())
    }
}

impl FrameAllocator for Frames {
    fn allocate_table(&self) -> Option<GuestPhys> {
        let frame = Machine::get()?.frames().pool.allocate()?;
        Tables::new().clear(frame);
        Some(frame)
    }

    fn free_table(&self, table: GuestPhys) {
        if let Some(machine) = Machine::get() {
            // Not one of ours, or free already: a mistake that must do no more damage.
            let _ = machine.frames().pool.release(table);
        }
    }
}
