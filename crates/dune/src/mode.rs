//! Entering and leaving Dune mode.
#![expect(unsafe_code, reason = "the thread continues on another CPU")]

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::Ordering;

use dune_kvm::sys::{self, nr};

use crate::arch::{self, RING0_FLAGS};
use crate::error::EnterError;
use crate::host::base;
use crate::machine::Machine;
use crate::options::Options;
use crate::signals::{AltStack, MASK_SET, SS_ONSTACK};
use crate::thread::ThreadArea;

thread_local! {
    /// The area of a thread that has left, kept for its next entry; given back when the
    /// thread ends.
    static OWN: Own = const { Own(Cell::new((ptr::null_mut(), 0))) };
}

/// An area, and the process in which it is the thread's: a natively forked child finds a
/// copy of its parent's variable here.
struct Own(Cell<(*mut ThreadArea, i32)>);

impl Own {
    fn get(&self) -> Option<*mut ThreadArea> {
        let (area, process) = self.0.get();
        (!area.is_null() && process == sys::getpid()).then_some(area)
    }

    fn set(&self, area: *mut ThreadArea) {
        self.0.set((area, sys::getpid()));
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // In Dune mode the end of the thread does it.
        if !is_inside()
            && let Some(area) = self.get()
        {
            ThreadArea::release(area);
        }
    }
}

/// Whether the calling thread is in Dune mode. Two instructions, no exit.
#[inline]
#[must_use]
pub fn is_inside() -> bool {
    arch::ring() == 0
}

/// Enters Dune mode: when this returns, the calling thread runs at ring 0 of a virtual CPU,
/// on the same stack, in the same address space, and everything that it did before it can
/// still do. Threads that it spawns and processes that it forks are in Dune mode too. Does
/// nothing in a thread that is in Dune mode already.
///
/// Costs one entry, and the first time in a process the creation of a VM, the first time in
/// a thread that of a vCPU.
///
/// # Errors
/// [`EnterError`], which names cause and remedy; the thread then goes on as it was.
pub fn enter() -> Result<(), EnterError> {
    enter_with(&Options::new())
}

/// As [`enter`], with choices that hold for the process from its first entry on.
///
/// # Errors
/// As [`enter`].
pub fn enter_with(options: &Options) -> Result<(), EnterError> {
    if is_inside() {
        return Ok(());
    }
    if native_alternate_stack().flags & SS_ONSTACK != 0 {
        return Err(EnterError::OnAlternateStack);
    }
    let machine = Machine::get_or_create(options)?;
    machine.make_ours()?;
    let area = own_area(machine)?;
    // SAFETY: the area is this thread's; nothing else looks at it.
    let this = unsafe { &mut *area };
    before_entry(this);
    // SAFETY: the vCPU waits at dune_guest_resume, for the stack that this call parks.
    unsafe { arch::dune_enter(area) };
    debug_assert!(is_inside());
    crate::vdso::settle(machine, options).inspect_err(|_| leave())
}

fn own_area(machine: &Machine) -> Result<*mut ThreadArea, EnterError> {
    // A thread that is ending, and has destroyed the variable, gets an area for one passage.
    if let Ok(Some(area)) = OWN.try_with(Own::get) {
        // SAFETY: the area is this thread's.
        unsafe { &mut *area }.stand_behind_wall()?;
        return Ok(area);
    }
    let (area, _) = ThreadArea::acquire(machine)?;
    // SAFETY: the area is this thread's from here on.
    let this = unsafe { &mut *area.as_ptr() };
    let registers = kvm_bindings::kvm_regs {
        rip: arch::address(arch::dune_guest_resume),
        rflags: RING0_FLAGS & !dune_x86::descriptors::RFLAGS_IF,
        ..Default::default()
    };
    this.fs_base = fs_base();
    this.restart_at(machine, &registers)
        .inspect_err(|_| ThreadArea::release(area.as_ptr()))?;
    this.pid = sys::getpid() as u32;
    this.tid = sys::gettid() as u32;
    this.pending.store(0, Ordering::Relaxed);
    this.freed_by_parent = false;
    this.depth = 0;
    this.refused = (0, 0);
    this.signals = &raw const crate::signals::PROCESS_SIGNALS;
    Ok(area.as_ptr())
}

/// Leaves Dune mode: when this returns, the thread runs natively again. Its vCPU waits for
/// the next [`enter`]. Does nothing outside Dune mode. Costs one exit.
pub fn leave() {
    if !is_inside() {
        return;
    }
    let area = ThreadArea::current();
    // Not kept where the thread's variables are destroyed already: see below.
    let is_kept = OWN.try_with(|own| own.set(area)).is_ok();
    // SAFETY: ring 0, so the host side of this thread waits for it.
    unsafe { arch::dune_leave() };
    // A signal that was captured on the way is the kernel's again.
    // SAFETY: the area is this thread's.
    let this = unsafe { &mut *area };
    if this.pending.swap(0, Ordering::Relaxed) != 0 {
        crate::host::signals::raise_again(this.signal, &this.siginfo);
        crate::signals::change_mask(MASK_SET, this.signal_mask);
    }
    if !is_kept {
        ThreadArea::release(area);
    }
}

/// Runs a closure in Dune mode and leaves again, also when the closure panics. In a thread
/// that is in Dune mode already, just runs it.
///
/// # Errors
/// As [`enter`]; then the closure was not run.
pub fn run<T>(body: impl FnOnce() -> T) -> Result<T, EnterError> {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            leave();
        }
    }
    if is_inside() {
        return Ok(body());
    }
    enter()?;
    let _leave = Leave;
    Ok(body())
}

/// What the host kernel must not do while the thread is in Dune mode: run handlers on the
/// program's alternate stack, and watch a restartable sequence that it cannot see.
fn before_entry(this: &mut ThreadArea) {
    this.fs_base = fs_base();
    this.altstack = native_alternate_stack();
    let disabled = AltStack::DISABLED;
    // SAFETY: the kernel reads 24 bytes.
    let _ = unsafe {
        sys::raw(
            nr::SIGALTSTACK,
            [&raw const disabled as usize, 0, 0, 0, 0, 0],
        )
    };
    this.rseq = crate::rseq::unregister();
    base::set(this.this as u64);
}

/// The alternate signal stack that the kernel has for the thread, and whether it is on it.
fn native_alternate_stack() -> AltStack {
    let mut stack = AltStack::DISABLED;
    // SAFETY: the kernel writes 24 bytes.
    let _ = unsafe { sys::raw(nr::SIGALTSTACK, [0, &raw mut stack as usize, 0, 0, 0, 0]) };
    stack
}

/// The counterpart, on the host stack, before the thread runs natively again. If a captured
/// signal waits, everything is blocked; `leave` sees to it.
pub(crate) fn before_return(this: &mut ThreadArea) {
    let stack = AltStack {
        flags: this.altstack.flags & !SS_ONSTACK,
        ..this.altstack
    };
    // SAFETY: the kernel reads 24 bytes.
    let _ = unsafe { sys::raw(nr::SIGALTSTACK, [&raw const stack as usize, 0, 0, 0, 0, 0]) };
    crate::rseq::register(this.rseq);
    // Until here a signal is captured, and `leave` gives it back to the kernel.
    base::set(0);
}

/// The thread's TLS.
fn fs_base() -> u64 {
    const ARCH_GET_FS: usize = 0x1003;
    let mut value = 0_u64;
    // SAFETY: the kernel writes 8 bytes.
    let _ = unsafe {
        sys::raw(
            nr::ARCH_PRCTL,
            [ARCH_GET_FS, &raw mut value as usize, 0, 0, 0, 0],
        )
    };
    value
}
