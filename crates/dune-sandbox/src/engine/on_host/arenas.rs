//! Guest physical memory: arenas that hold page tables and the guard's pages,
//! and windows over the program's memory.
//!
//! ```text
//!  guest physical GiB   slot      host memory
//!  0, 2, 3              -         nothing (3 holds KVM's own pages)
//!  1                    the last  the kernel's data for clocks, read-only
//!  4 to 15              0 to 11   arenas, each larger than the one before
//!  16 and up            12 and up windows: pieces of user space that are in use
//! ```
//!
//! A window is 64 MiB. KVM keeps two and a half megabytes of its own for each
//! GiB of a slot where it shadows page tables, and clears them when the slot is
//! made: 0.7 ms, while most programs use a few megabytes in two or three
//! places. The slots that KVM has are enough for 2 TiB of 64 MiB each; windows
//! over memory that the program has given up are taken back long before
//! ([`Memory::is_crowded`]).
//!
//! Of this process, the guest's physical memory holds the arenas and the part
//! below `USER_HI` ([`crate::range`]), and the kernel's data for clocks
//! ([`crate::clock`]), nothing else: whatever happens to
//! the page tables, the memory of the guard is not there to be reached.
#![expect(
    unsafe_code,
    reason = "page tables in memory that the vCPU reads and writes as well"
)]

use core::cell::{Cell, RefCell};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use std::os::fd::RawFd;
use std::rc::Rc;

use dune_kvm::ioctl;
use dune_kvm::sys::{self, Errno};
use dune_x86::addr::GuestPhys;
use dune_x86::paging::{FrameAllocator, TableMemory};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};

use crate::clock;
use crate::range::USER_HI;

const GIB_SHIFT: u32 = 30;
const GIB: u64 = 1 << GIB_SHIFT;
const PAGE: u64 = 4096;

/// The guest physical GiB of the first arena.
const FIRST_ARENA: u64 = 4;
const ARENAS: usize = 12;

const WINDOW_SHIFT: u32 = 26;
/// Bytes of a window.
pub(super) const WINDOW: u64 = 1 << WINDOW_SHIFT;
/// The guest physical address of the first window.
const WINDOWS_START: u64 = (FIRST_ARENA + ARENAS as u64) << GIB_SHIFT;
/// Slots of KVM that user space may use.
const SLOTS: u64 = 32_764;

/// The guest physical address and the slot of the kernel's data for clocks.
const CLOCK: u64 = GIB;
const CLOCK_SLOT: u64 = SLOTS - 1;

/// The first arena: tables for 256 MiB of the program's memory and more. Each
/// further one is four times as large, up to a GiB.
const FIRST_ARENA_BYTES: u64 = 1 << 20;

#[derive(Clone, Copy, Debug)]
struct Arena {
    host: NonNull<u8>,
    len: u64,
}

/// Why there is no more memory for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Short {
    /// Guest physical addresses or slots have run out.
    Addresses,
    /// The host said this.
    Host(Errno),
}

/// The guest's physical memory.
#[derive(Debug)]
pub(super) struct Memory {
    vm: RawFd,
    arenas: [Cell<Option<Arena>>; ARENAS],
    /// The arena that frames are taken from, and the bytes taken of it.
    current: Cell<usize>,
    used: Cell<u64>,
    /// Frames that were given back, as a list through their first words.
    free: Cell<Option<GuestPhys>>,
    /// What the last failure was: page tables only learn that there was one.
    short: Cell<Option<Short>>,
    /// For each piece of user space, its window's number and 1, or 0.
    window_of: RefCell<Box<[u16]>>,
    /// For each window, its piece of user space; [`UNUSED`] if it was given back.
    piece_of: RefCell<Box<[u32]>>,
    /// Windows that there have been at once: the rest of `piece_of` is fresh.
    windows: Cell<usize>,
    /// Whether the kernel's data for clocks have their slot.
    has_clock: Cell<bool>,
    /// Windows that were given back.
    unused: RefCell<Vec<u16>>,
    /// How many windows there may be before somebody should look for those that
    /// are of no use any more.
    crowd: Cell<usize>,
}

/// Of no piece.
const UNUSED: u32 = u32::MAX;

/// Windows that nobody looks through: 16 GiB of user space in use.
const SMALL_CROWD: usize = 256;

impl Memory {
    /// Memory for a guest with `physical_bits` bits of address. `vm` must stay
    /// open as long as this is used.
    pub(super) fn new(vm: RawFd, physical_bits: u32) -> Self {
        let addresses = 1_u64 << physical_bits.clamp(36, 52);
        let windows = (addresses - WINDOWS_START) >> WINDOW_SHIFT;
        let windows = windows.min(CLOCK_SLOT - ARENAS as u64) as usize;
        Self {
            vm,
            arenas: [const { Cell::new(None) }; ARENAS],
            current: Cell::new(0),
            used: Cell::new(0),
            free: Cell::new(None),
            short: Cell::new(None),
            // Zeroed memory comes from the kernel page by page as it is used.
            window_of: RefCell::new(vec![0; (USER_HI >> WINDOW_SHIFT) as usize].into()),
            piece_of: RefCell::new(vec![0; windows].into()),
            windows: Cell::new(0),
            has_clock: Cell::new(false),
            unused: RefCell::default(),
            crowd: Cell::new(SMALL_CROWD.min(windows)),
        }
    }

    /// What the last failure to get a frame was.
    pub(super) fn short(&self) -> Option<Short> {
        self.short.get()
    }

    /// The guest physical address of `host`, a user address: with a new
    /// window if there is none yet.
    pub(super) fn window(&self, host: u64) -> Result<u64, Short> {
        let piece = (host >> WINDOW_SHIFT) as usize;
        let mut window_of = self.window_of.borrow_mut();
        let entry = window_of.get_mut(piece).ok_or(Short::Addresses)?;
        let number = match usize::from(*entry).checked_sub(1) {
            Some(number) => number,
            None => {
                let mut unused = self.unused.borrow_mut();
                let fresh = self.windows.get();
                let number = unused.last().map_or(fresh, |&number| usize::from(number));
                let mut piece_of = self.piece_of.borrow_mut();
                let back = piece_of.get_mut(number).ok_or(Short::Addresses)?;
                let slot = (ARENAS + number) as u64;
                let base = (piece as u64) << WINDOW_SHIFT;
                self.set_slot(slot, window_address(number), base, WINDOW)
                    .map_err(Short::Host)?;
                *back = piece as u32;
                *entry = number as u16 + 1;
                if unused.pop().is_none() {
                    self.windows.set(fresh + 1);
                }
                number
            }
        };
        Ok(window_address(number) | host & (WINDOW - 1))
    }

    /// The guest physical address of the kernel's data for clocks.
    pub(super) fn clock(&self) -> Result<u64, Short> {
        let clock = clock::host().ok_or(Short::Addresses)?;
        if !self.has_clock.get() {
            let (host, len) = (clock.data, clock.data_len);
            self.set_slot_with(KVM_MEM_READONLY, CLOCK_SLOT, CLOCK, host, len)
                .map_err(Short::Host)?;
            self.has_clock.set(true);
        }
        Ok(CLOCK)
    }

    /// How many windows there are.
    pub(super) fn windows(&self) -> usize {
        self.windows.get() - self.unused.borrow().len()
    }

    /// Memory slots of KVM that are in use.
    pub(super) fn slots(&self) -> usize {
        let arenas = self.arenas.iter().filter(|arena| arena.get().is_some());
        self.windows() + arenas.count()
    }

    /// Whether it is time to look for windows that are of no use any more, by
    /// [`Memory::release_windows`].
    pub(super) fn is_crowded(&self) -> bool {
        self.windows() >= self.crowd.get()
    }

    /// Gives back every window in whose piece of user space, given by its start,
    /// nothing `is_used`. A piece that is needed again gets another window.
    ///
    /// The next look is at twice as many as are left, so that a program pays for
    /// it in proportion to the windows that it makes.
    ///
    /// # Errors
    ///
    /// If KVM refuses to take a slot back.
    pub(super) fn release_windows(&self, is_used: impl Fn(u64) -> bool) -> Result<(), Short> {
        let mut window_of = self.window_of.borrow_mut();
        let mut piece_of = self.piece_of.borrow_mut();
        let mut unused = self.unused.borrow_mut();
        for (number, piece) in piece_of[..self.windows.get()].iter_mut().enumerate() {
            let base = u64::from(*piece) << WINDOW_SHIFT;
            if *piece == UNUSED || is_used(base) {
                continue;
            }
            let slot = (ARENAS + number) as u64;
            self.set_slot(slot, window_address(number), base, 0)
                .map_err(Short::Host)?;
            window_of[*piece as usize] = 0;
            *piece = UNUSED;
            unused.push(number as u16);
        }
        let left = self.windows.get() - unused.len();
        let most = piece_of.len();
        self.crowd
            .set((2 * left).clamp(SMALL_CROWD.min(most), most));
        Ok(())
    }

    /// The user address of a guest physical one, if it lies in a window.
    pub(super) fn user_address(&self, gpa: u64) -> Option<u64> {
        let number = (gpa.checked_sub(WINDOWS_START)? >> WINDOW_SHIFT) as usize;
        let piece_of = self.piece_of.borrow();
        let piece = *piece_of
            .get(number)
            .filter(|&&piece| number < self.windows.get() && piece != UNUSED)?;
        Some(u64::from(piece) << WINDOW_SHIFT | gpa & (WINDOW - 1))
    }

    /// The host address of a frame of an arena.
    ///
    /// # Panics
    ///
    /// If `gpa` lies in no arena: frames come from
    /// [`FrameAllocator::allocate_table`] and nowhere else, and ring 3 cannot
    /// write to page tables.
    pub(super) fn frame(&self, gpa: GuestPhys) -> NonNull<u8> {
        let gpa = gpa.as_u64();
        let index = (gpa >> GIB_SHIFT).wrapping_sub(FIRST_ARENA) as usize;
        let offset = gpa & (GIB - 1);
        match self.arenas.get(index).and_then(Cell::get) {
            Some(arena) if offset < arena.len => {
                // SAFETY: the offset lies within the arena.
                unsafe { arena.host.add(offset as usize) }
            }
            _ => panic!("{gpa:#x} is in no arena of the guest"),
        }
    }

    fn entry(&self, table: GuestPhys, index: usize) -> &AtomicU64 {
        assert!(index < 512, "a table has 512 entries");
        // SAFETY: a frame has room for 512 entries.
        let entry = unsafe { self.frame(table).cast::<AtomicU64>().add(index) };
        // SAFETY: arenas are mapped for as long as this value lives and are
        // accessed as atomics only while they hold tables.
        unsafe { entry.as_ref() }
    }

    fn grow(&self) -> Result<usize, Short> {
        let index = match self.arenas[0].get() {
            None => 0,
            Some(_) => self.current.get() + 1,
        };
        if index >= ARENAS {
            return Err(Short::Addresses);
        }
        let len = (FIRST_ARENA_BYTES << (2 * index).min(20)).min(GIB);
        let host = sys::map_anonymous(len as usize).map_err(Short::Host)?;
        let gpa = (FIRST_ARENA + index as u64) << GIB_SHIFT;
        let Some(pointer) = NonNull::new(host) else {
            return Err(Short::Host(Errno::ENOMEM));
        };
        self.set_slot(index as u64, gpa, host as u64, len)
            .map_err(|errno| {
                // SAFETY: just mapped, and nothing knows it.
                let _ = unsafe { sys::unmap(host, len as usize) };
                Short::Host(errno)
            })?;
        self.arenas[index].set(Some(Arena { host: pointer, len }));
        self.current.set(index);
        self.used.set(0);
        Ok(index)
    }

    fn take(&self) -> Result<GuestPhys, Short> {
        if let Some(frame) = self.free.get() {
            let page = self.frame(frame).cast::<u64>();
            // SAFETY: a frame on the list holds the next one's address + 1.
            let next = unsafe { page.read() };
            self.free
                .set(next.checked_sub(1).map(GuestPhys::new_truncate));
            // SAFETY: the frame is 4 KiB and nobody's.
            unsafe { page.cast::<u8>().write_bytes(0, PAGE as usize) };
            return Ok(frame);
        }
        let mut index = self.current.get();
        let full = self.arenas[index]
            .get()
            .is_none_or(|a| self.used.get() + PAGE > a.len);
        if full {
            index = self.grow()?;
        }
        let offset = self.used.get();
        self.used.set(offset + PAGE);
        Ok(GuestPhys::new_truncate(
            (FIRST_ARENA + index as u64) << GIB_SHIFT | offset,
        ))
    }

    /// Unmaps the arenas; nothing may be asked of this value afterwards. For a
    /// child of `fork`, which has its copy of the parent's.
    pub(super) fn unmap_arenas(&self) {
        for arena in self.arenas.iter().filter_map(Cell::take) {
            // SAFETY: the caller has no VM that would reach them.
            let _ = unsafe { sys::unmap(arena.host.as_ptr(), arena.len as usize) };
        }
    }

    fn set_slot(&self, slot: u64, gpa: u64, host: u64, len: u64) -> Result<(), Errno> {
        self.set_slot_with(0, slot, gpa, host, len)
    }

    fn set_slot_with(
        &self,
        flags: u32,
        slot: u64,
        gpa: u64,
        host: u64,
        len: u64,
    ) -> Result<(), Errno> {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: host,
        };
        let request = ioctl::KVM_SET_USER_MEMORY_REGION;
        // SAFETY: arenas belong to this value, windows cover user space only,
        // which the guard treats as memory that anyone may change, and the
        // kernel's data can be read and nothing else.
        unsafe { sys::ioctl_uninterrupted(self.vm, request, &raw const region as usize) }.map(drop)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The engine closes the VM before it drops its memory.
        self.unmap_arenas();
    }
}

// Window numbers and 1 fit their table's entries.
const _: () = assert!(SLOTS < u16::MAX as u64);

const fn window_address(number: usize) -> u64 {
    WINDOWS_START + ((number as u64) << WINDOW_SHIFT)
}

/// A handle to the memory, as page tables want it.
#[derive(Clone, Debug)]
pub(super) struct Handle(pub(super) Rc<Memory>);

impl TableMemory for Handle {
    fn read(&self, table: GuestPhys, index: usize) -> u64 {
        self.0.entry(table, index).load(Ordering::Relaxed)
    }

    fn write(&self, table: GuestPhys, index: usize, value: u64) {
        self.0.entry(table, index).store(value, Ordering::Relaxed);
    }

    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.0
            .entry(table, index)
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
    }
}

impl FrameAllocator for Handle {
    fn allocate_table(&self) -> Option<GuestPhys> {
        match self.0.take() {
            Ok(frame) => Some(frame),
            Err(short) => {
                self.0.short.set(Some(short));
                None
            }
        }
    }

    fn free_table(&self, table: GuestPhys) {
        let next = self.0.free.get().map_or(0, |frame| frame.as_u64() + 1);
        // SAFETY: nothing walks the frame any more (the trait's contract).
        unsafe { self.0.frame(table).cast::<u64>().write(next) };
        self.0.free.set(Some(table));
    }
}
