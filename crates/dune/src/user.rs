//! Ring 3: running code that is not trusted, in an address space of its own.
//!
//! ```text
//!   run():  save the callee-saved registers; load CR3, extended state, registers; IRETQ
//!             ring 3 ...
//!           trap or SYSCALL -> entry stub: everything into the context; process's CR3 back
//!   ... run() returns the trap
//! ```
#![expect(unsafe_code, reason = "the context is shared with the entry stub")]

use core::arch::asm;
use core::cell::Cell;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU8, Ordering};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use dune_x86::descriptors::{RFLAGS_FIXED, RFLAGS_IF, RFLAGS_USER, USER_CS, USER_SS};
use dune_x86::trap::{PageFaultError, TrapFrame, vector};

use crate::answers::Answers;
use crate::arch::{self, VECTOR_NOTIFY, VECTOR_SYSCALL};
use crate::guest::call::InterruptsOff;
use crate::machine::Machine;
use crate::memory::identity::high;
use crate::memory::{AddressSpace, SpaceError};
use crate::thread::ThreadArea;

/// Why ring 3 came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// A `SYSCALL` instruction: number in `rax`, arguments in `rdi`, `rsi`, `rdx`, `r10`,
    /// `r8`, `r9`; `rip` is behind it.
    Syscall,
    /// A page fault; `rip` is at the instruction.
    PageFault {
        /// The address.
        address: u64,
        /// Why.
        cause: PageFaultError,
    },
    /// Another exception.
    Exception {
        /// Which.
        vector: u8,
        /// The CPU's error code, or 0.
        error: u32,
    },
    /// A signal arrived for the thread; its handler has run. Ring 3 can just be run again.
    Interrupted,
}

/// What the entry stub knows: registers, segment bases, root, and behind it the extended
/// state.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct UserFrame {
    pub(crate) frame: TrapFrame,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) cr3: u64,
    /// High alias of the table of calls that the stub answers, or 0.
    pub(crate) answers: u64,
}

/// The registers of code in ring 3, general and extended.
///
/// Belongs to the thread that made it.
#[derive(Debug)]
pub struct UserContext {
    inner: *mut UserFrame,
    layout: Layout,
    xsave_size: usize,
    not_send: PhantomData<*mut ()>,
}

const XSTATE_MXCSR: usize = 24;
const DEFAULT_MXCSR: u32 = 0x1f80;
const XSTATE_FCW: usize = 0;
const DEFAULT_FCW: u16 = 0x37f;

impl UserContext {
    /// A context that starts at `rip` with the stack pointer `rsp`; all other registers zero,
    /// the extended state as after a reset.
    ///
    /// # Errors
    /// [`SpaceError::NotEntered`] before the first entry into Dune mode.
    pub fn new(rip: u64, rsp: u64) -> Result<Self, SpaceError> {
        let machine = Machine::get().ok_or(SpaceError::NotEntered)?;
        let xsave_size = machine.xsave_size() as usize;
        let layout = Layout::from_size_align(size_of::<UserFrame>() + xsave_size, 64)
            .map_err(|_| SpaceError::NotEntered)?;
        // SAFETY: the size is not zero.
        let inner = unsafe { alloc_zeroed(layout) }.cast::<UserFrame>();
        if inner.is_null() {
            handle_alloc_error(layout);
        }
        let mut context = Self {
            inner,
            layout,
            xsave_size,
            not_send: PhantomData,
        };
        // Under a trap there is nobody who could make a window.
        machine.cover(inner as u64, layout.size() as u64)?;
        context.reset(rip, rsp);
        Ok(context)
    }

    fn inner(&self) -> &UserFrame {
        // SAFETY: allocated by `new`; the stub writes only while `run` borrows mutably.
        unsafe { &*self.inner }
    }

    fn inner_mut(&mut self) -> &mut UserFrame {
        // SAFETY: as above.
        unsafe { &mut *self.inner }
    }

    fn xsave(&self) -> *mut u8 {
        self.inner.wrapping_add(1).cast()
    }

    /// The registers. `vector`, `error`, `cs`, `ss`, `cr2` and what follows are the last
    /// trap's and are not taken from here by [`run`](Self::run).
    #[must_use]
    pub fn registers(&self) -> &TrapFrame {
        &self.inner().frame
    }

    /// The registers, to be changed.
    pub fn registers_mut(&mut self) -> &mut TrapFrame {
        &mut self.inner_mut().frame
    }

    /// Base address of FS.
    #[must_use]
    pub fn fs_base(&self) -> u64 {
        self.inner().fs_base
    }

    /// Sets the base address of FS. [`run`](Self::run) refuses one that is not canonical.
    pub fn set_fs_base(&mut self, base: u64) {
        self.inner_mut().fs_base = base;
    }

    /// Base address of GS.
    #[must_use]
    pub fn gs_base(&self) -> u64 {
        self.inner().gs_base
    }

    /// Sets the base address of GS.
    pub fn set_gs_base(&mut self, base: u64) {
        self.inner_mut().gs_base = base;
    }

    /// The extended state in XSAVE's standard format (SDM vol. 1, 13.4).
    #[must_use]
    pub fn extended_state(&self) -> &[u8] {
        // SAFETY: allocated behind the frame; the CPU writes only while `run` borrows
        // mutably.
        unsafe { core::slice::from_raw_parts(self.xsave(), self.xsave_size) }
    }

    /// Makes the context as [`new`](Self::new) would: ring 3 starts at `rip` with the stack
    /// pointer `rsp` and learns nothing of who ran before. Some fifty instructions.
    pub fn reset(&mut self, rip: u64, rsp: u64) {
        const HEADER: usize = 512;
        let xsave = self.xsave();
        // No component is in use: XRSTOR then gives each its initial value, whatever is left
        // in the area (SDM vol. 1, 13.8), and MXCSR alone is taken from it.
        // SAFETY: every area has the legacy region and the header, 576 bytes.
        unsafe { xsave.wrapping_add(HEADER).cast::<[u64; 8]>().write([0; 8]) };
        // SAFETY: as above.
        unsafe {
            xsave
                .wrapping_add(XSTATE_MXCSR)
                .cast::<u32>()
                .write(DEFAULT_MXCSR)
        };
        // SAFETY: as above.
        unsafe {
            xsave
                .wrapping_add(XSTATE_FCW)
                .cast::<u16>()
                .write(DEFAULT_FCW)
        };
        let inner = self.inner_mut();
        inner.frame = TrapFrame::default();
        inner.frame.rip = rip;
        inner.frame.rsp = rsp;
        inner.frame.rflags = RFLAGS_FIXED | RFLAGS_IF;
        inner.fs_base = 0;
        inner.gs_base = 0;
    }

    /// Forgets all that ring 3 left in registers, general and extended. What runs next has to
    /// be [`reset`](Self::reset). Some hundred instructions, unless ring 3 has more extended
    /// state than AVX.
    pub fn wipe(&mut self) {
        const HEADER: usize = 512;
        /// x87, SSE, AVX, bounds; and the protection key register, which lies behind all and is
        /// no secret (SDM vol. 1, 13.4).
        const SMALL: u64 = 0x21f;
        const SMALL_END: usize = 1088;
        self.inner_mut().frame = TrapFrame::default();
        let header = self.xsave().wrapping_add(HEADER).cast::<u64>();
        // SAFETY: every area has a header, and `self` is borrowed mutably.
        let in_use = unsafe { header.read() };
        let bytes = if in_use & !SMALL == 0 {
            SMALL_END.min(self.xsave_size)
        } else {
            self.xsave_size
        };
        // SAFETY: as above, for so many bytes.
        unsafe { self.xsave().write_bytes(0, bytes) };
    }

    /// Puts the extended state back to what it is after a reset.
    pub fn reset_extended_state(&mut self) {
        let mut state = [0; 512];
        state[XSTATE_FCW..XSTATE_FCW + 2].copy_from_slice(&DEFAULT_FCW.to_le_bytes());
        state[XSTATE_MXCSR..XSTATE_MXCSR + 4].copy_from_slice(&DEFAULT_MXCSR.to_le_bytes());
        self.set_extended_state(&state);
    }

    /// Replaces the extended state. What the CPU would refuse (features that it does not
    /// have, reserved bits) is cleared; what is missing at the end is taken as zero.
    pub fn set_extended_state(&mut self, state: &[u8]) {
        const HEADER: usize = 512;
        const HEADER_END: usize = 576;
        const MXCSR_MASK: u32 = 0xffff;
        // SAFETY: as above, and `self` is borrowed mutably.
        let area = unsafe { core::slice::from_raw_parts_mut(self.xsave(), self.xsave_size) };
        area.fill(0);
        let length = state.len().min(area.len());
        area[..length].copy_from_slice(&state[..length]);
        let word = |area: &[u8], at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&area[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        let allowed = Machine::get().map_or(3, Machine::xcr0);
        let features =
            (u64::from(word(area, HEADER)) | u64::from(word(area, HEADER + 4)) << 32) & allowed;
        area[HEADER..HEADER_END].fill(0);
        area[HEADER..HEADER + 8].copy_from_slice(&features.to_le_bytes());
        let mxcsr = word(area, XSTATE_MXCSR) & MXCSR_MASK;
        area[XSTATE_MXCSR..XSTATE_MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
    }

    /// Lets the entry stub answer the system calls that are in `answers`: some twenty
    /// instructions each, no exit, and [`run`](Self::run) does not return for them. `None`, as
    /// from the beginning, to be asked for every call. Kept by [`reset`](Self::reset).
    ///
    /// # Errors
    /// [`SpaceError::NotEntered`] before the first entry into Dune mode; others if the table's
    /// memory cannot be shown to the guest.
    pub fn answer_at_entry(&mut self, answers: Option<&'static Answers>) -> Result<(), SpaceError> {
        self.inner_mut().answers = match answers {
            Some(table) => {
                let machine = Machine::get().ok_or(SpaceError::NotEntered)?;
                let address = core::ptr::from_ref(table) as u64;
                // Under a trap there is nobody who could make a window.
                machine.cover(address, size_of::<Answers>() as u64)?;
                high(address)
            }
            None => 0,
        };
        Ok(())
    }

    /// Runs ring 3 in `space` until it traps, and returns why. No exit.
    ///
    /// Flags that ring 3 may not have are cleared. An instruction pointer or segment base
    /// that is not canonical is returned as the exception that it would be, without running.
    ///
    /// # Errors
    /// [`SpaceError::NotEntered`] outside Dune mode.
    #[inline(always)]
    pub fn run(&mut self, space: &AddressSpace) -> Result<Trap, SpaceError> {
        static NEVER: AtomicU8 = AtomicU8::new(0);
        self.run_unless(space, &NEVER)
    }

    /// As [`run`](Self::run), but comes back with [`Trap::Interrupted`] at once if `stop` is
    /// not zero. A signal handler that sets `stop` is never missed: either it ran before
    /// the look, or it ends the run.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    #[inline(always)]
    pub fn run_unless(
        &mut self,
        space: &AddressSpace,
        stop: &AtomicU8,
    ) -> Result<Trap, SpaceError> {
        if !crate::is_inside() {
            return Err(SpaceError::NotEntered);
        }
        let size = size_of::<UserFrame>() as u64;
        let address = self.inner as u64;
        let inner = self.inner_mut();
        if !is_user(inner.frame.rip) || !is_canonical(inner.fs_base) || !is_canonical(inner.gs_base)
        {
            return Ok(Trap::Exception {
                vector: vector::GENERAL_PROTECTION,
                error: 0,
            });
        }
        inner.frame.cs = u64::from(USER_CS);
        inner.frame.ss = u64::from(USER_SS);
        inner.frame.rflags = (inner.frame.rflags & RFLAGS_USER) | RFLAGS_FIXED | RFLAGS_IF;
        {
            let _off = InterruptsOff::new();
            if stop.load(Ordering::SeqCst) != 0 {
                return Ok(Trap::Interrupted);
            }
            let loaded = Loaded::new(space);
            inner.cr3 = loaded.cr3();
            let area = ThreadArea::current();
            // SAFETY: the area is this thread's; interrupts are off, so no signal handler
            // can use it in between.
            unsafe { (*area).user = high(address) };
            // SAFETY: as above.
            unsafe { (*area).user_xsave = high(address + size) };
            // SAFETY: the context is complete and mapped.
            unsafe { arch::dune_run_user() };
        }
        let inner = self.inner();
        Ok(match inner.frame.vector {
            VECTOR_SYSCALL => Trap::Syscall,
            number if number == u64::from(VECTOR_NOTIFY) => {
                deliver_now();
                Trap::Interrupted
            }
            number if number == u64::from(vector::PAGE_FAULT) => Trap::PageFault {
                address: inner.frame.cr2,
                cause: PageFaultError::from_bits_truncate(inner.frame.error as u32),
            },
            number => Trap::Exception {
                vector: number as u8,
                error: inner.frame.error as u32,
            },
        })
    }
}

impl Drop for UserContext {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.inner.cast(), self.layout) };
    }
}

/// What `WRFSBASE` and `WRGSBASE` accept. Ring 3 may put either half there; what it can reach
/// is decided by the page tables.
fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// In the lower half: what ring 3 may have as an instruction pointer.
fn is_user(address: u64) -> bool {
    address >> 47 == 0
}

/// The interrupt that told of the signal was taken in ring 3: take it again here.
fn deliver_now() {
    // SAFETY: the gate leads to the stub that delivers what waits.
    unsafe { asm!("int {}", const VECTOR_NOTIFY) };
}

/// A claim to run an address space on this vCPU (see memory/tlb.rs).
pub(crate) struct Loaded {
    cr3: u64,
    keep: u64,
    before: Cell<u32>,
}

impl Loaded {
    #[inline(always)]
    pub(crate) fn new(space: &AddressSpace) -> Self {
        const NO_FLUSH: u64 = 1 << 63;
        let pcid = space.pcid();
        // SAFETY: in Dune mode the current area is this thread's.
        let area = unsafe { &*ThreadArea::current() };
        if pcid == 0 {
            // The load flushes. What the space leaves behind under the process's own
            // identifier has to go again on the way back.
            let before = area.running_pcid.swap(1, Ordering::SeqCst);
            set_way_back(area.cr3 & !NO_FLUSH);
            return Self {
                cr3: space.root(),
                keep: 0,
                before: Cell::new(before),
            };
        }
        let before = area
            .running_pcid
            .swap(u32::from(pcid) + 1, Ordering::SeqCst);
        let kept = if area.valid_pcids.set(pcid) {
            NO_FLUSH
        } else {
            0
        };
        Self {
            cr3: space.root() | u64::from(pcid) | kept,
            keep: NO_FLUSH,
            before: Cell::new(before),
        }
    }

    #[inline(always)]
    pub(crate) fn cr3(&self) -> u64 {
        self.cr3
    }

    /// Bit 63 for the load of the tables from before, whose entries may be kept.
    #[inline(always)]
    pub(crate) fn keep(&self) -> u64 {
        self.keep
    }
}

impl Drop for Loaded {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: in Dune mode the current area is this thread's.
        let area = unsafe { &*ThreadArea::current() };
        area.running_pcid
            .store(self.before.get(), Ordering::Release);
        if self.keep == 0
            && let Some(machine) = Machine::get()
        {
            set_way_back(machine.cr3());
        }
    }
}

/// Sets what the entry stub loads when ring 3 comes back on this vCPU.
fn set_way_back(cr3: u64) {
    // SAFETY: in Dune mode the current area is this thread's, and the stub is not running.
    unsafe { (*ThreadArea::current()).cr3 = cr3 };
}
