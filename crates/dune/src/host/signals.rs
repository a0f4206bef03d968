//! The host side of signals: capturing them.
#![expect(unsafe_code, reason = "a signal handler")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "fields of one raw structure"
)]

use core::arch::asm;
use core::ptr::addr_of_mut;
use core::sync::atomic::Ordering;

use dune_kvm::sys::{self, nr};
use dune_kvm::wall;

use crate::arch;
use crate::host::base;
use crate::report;
use crate::signals::{
    KernelAction, MASK_SET, PROCESS_SIGNALS, SA_NODEFER, SA_RESETHAND, SIG_DFL, change_mask,
};
use crate::thread::ThreadArea;

/// The part of the kernel's `ucontext` that is needed here (x86-64, `uapi/asm/ucontext.h`).
#[repr(C)]
pub(crate) struct Context {
    flags: u64,
    link: u64,
    stack: [u64; 3],
    registers: [u64; 32],
    mask: u64,
}

/// Index of the instruction pointer in `Context::registers` (`struct sigcontext`).
const RIP: usize = 16;
const _: () = assert!(core::mem::offset_of!(Context, mask) == 296);

type Handler = unsafe extern "C" fn(u32, *mut [u64; 16], *mut Context);

/// The handler that the kernel knows. All signals are blocked while it runs.
pub(crate) unsafe extern "C" fn host_handler(
    signal: u32,
    info: *mut [u64; 16],
    context: *mut Context,
) {
    match host_area() {
        // SAFETY: the kernel's own pointers; the area is this thread's.
        Some(area) => unsafe { capture(area, signal, info, context) },
        // SAFETY: the kernel's own pointers.
        None => unsafe { run_outside(signal, info, context) },
    }
}

dune_kvm::wall_signal_handler! {
    /// [`host_handler`] where there is a wall.
    pub(crate) walled_host_handler => host_handler
}

/// The area of a thread whose host loop runs, from the host's GS base.
fn host_area() -> Option<*mut ThreadArea> {
    let base = base::get();
    (base != 0).then_some(base as *mut ThreadArea)
}

unsafe fn capture(area: *mut ThreadArea, signal: u32, info: *mut [u64; 16], context: *mut Context) {
    // SAFETY: the kernel's own pointers; the area is this thread's.
    unsafe {
        let rip = (*context).registers[RIP];
        let code = (*info)[1] as u32 as i32;
        const SYNCHRONOUS: [u32; 5] = [4, 5, 7, 8, 11];
        if code > 0 && code != 0x80 && SYNCHRONOUS.contains(&signal) {
            report::die_of_host_fault(signal, rip, (*info)[2]);
        }
        (*area).signal = signal;
        (*area).siginfo = *info;
        (*area).signal_mask = (*context).mask;
        // Nothing more until the guest has this one; the kernel keeps the rest in order.
        (*context).mask = u64::MAX;
        (*area).pending.store(1, Ordering::Relaxed);
        if let Some(vcpu) = &(*area).vcpu {
            addr_of_mut!((*vcpu.run_area()).immediate_exit).write_volatile(1);
        }
        let safe = arch::address(arch::dune_safe_start)..arch::address(arch::dune_safe_end);
        if safe.contains(&rip) {
            (*context).registers[RIP] = arch::address(arch::dune_safe_abort);
        }
        if let Some(way_out) = wall::gives_up_at(rip) {
            (*context).registers[RIP] = way_out;
        }
    }
}

/// Outside Dune mode the program's handler runs on the spot, with the mask that it asked for.
unsafe fn run_outside(signal: u32, info: *mut [u64; 16], context: *mut Context) {
    let action = PROCESS_SIGNALS.get(signal);
    if !action.is_handler() {
        // The program took the handler away while the signal was on its way.
        if action.handler == SIG_DFL {
            raise_again(signal, info);
        }
        return;
    }
    // SAFETY: the kernel's own pointer.
    let mut mask = unsafe { (*context).mask } | action.mask;
    if action.flags & SA_NODEFER == 0 {
        mask |= 1 << (signal - 1);
    }
    if action.flags & SA_RESETHAND != 0 {
        let default = KernelAction::default();
        PROCESS_SIGNALS.set(signal, default);
        let _ = crate::signals::install(signal, default);
    }
    change_mask(MASK_SET, mask);
    // SAFETY: the program registered this address as a handler.
    let handler: Handler = unsafe { core::mem::transmute(action.handler as usize) };
    // SAFETY: called as the kernel would have called it.
    unsafe { handler(signal, info, context) };
}

/// Sends the thread a signal again, with its siginfo; the kernel acts on it as soon as the
/// mask allows.
pub(crate) fn raise_again(signal: u32, info: *const [u64; 16]) {
    // SAFETY: the kernel reads 128 bytes of siginfo.
    let queued = unsafe {
        sys::raw(
            nr::RT_TGSIGQUEUEINFO,
            [
                sys::getpid() as usize,
                sys::gettid() as usize,
                signal as usize,
                info as usize,
                0,
                0,
            ],
        )
    };
    if queued < 0 {
        // A siginfo that only the kernel may make: the bare signal is what is left.
        // SAFETY: takes no pointer.
        let _ = unsafe {
            sys::raw(
                nr::TGKILL,
                [
                    sys::getpid() as usize,
                    sys::gettid() as usize,
                    signal as usize,
                    0,
                    0,
                    0,
                ],
            )
        };
    }
}

/// Changes the mask that the program believes to have, on behalf of the runtime in the
/// guest: `arguments` are the kernel's `how` and the set itself; returns the mask before.
///
/// While a captured signal waits, the kernel's mask is "everything" and the program's is the
/// one that was captured with it; a signal that the change blocks goes back to the kernel.
/// Everything is blocked first, so that no signal is captured
/// between the look and the change.
pub(crate) fn change_logical_mask(area: &mut ThreadArea) -> u64 {
    let [how, set, ..] = area.arguments;
    let kernel = change_mask(MASK_SET, u64::MAX);
    let pending = area.pending.load(Ordering::Relaxed) != 0;
    let before = if pending { area.signal_mask } else { kernel };
    let after = match how {
        0 => before | set as u64,
        1 => before & !(set as u64),
        _ => set as u64,
    };
    let bit = 1_u64 << (area.signal.wrapping_sub(1) & 63);
    if pending && after & !before & bit != 0 {
        // Newly blocked before it was delivered: it is the kernel's to keep again.
        raise_again(area.signal, &area.siginfo);
        area.pending.store(0, Ordering::Relaxed);
        change_mask(MASK_SET, after);
    } else if pending {
        area.signal_mask = after;
    } else {
        change_mask(MASK_SET, after);
    }
    before
}

/// Ends the process by a signal, as a parent sees it.
pub(crate) fn die_by_signal(signal: u32) -> ! {
    let _ = crate::signals::install(signal, KernelAction::default());
    let bit = 1_u64 << (signal.wrapping_sub(1) & 63);
    // SAFETY: takes no pointer.
    let _ = unsafe {
        sys::raw(
            nr::TGKILL,
            [
                sys::getpid() as usize,
                sys::gettid() as usize,
                signal as usize,
                0,
                0,
                0,
            ],
        )
    };
    change_mask(MASK_SET, !bit);
    // A signal whose default is not to end the process (or is held by a tracer).
    loop {
        // SAFETY: ends the process.
        let _ = unsafe { sys::raw(nr::EXIT_GROUP, [128 + signal as usize, 0, 0, 0, 0, 0]) };
        // SAFETY: a trap, should the kernel refuse even that.
        unsafe { asm!("ud2") };
    }
}
