//! The guest side of signals: frames on the program's stack, and back.
//!
//! The layout is the kernel's `struct rt_sigframe` for x86-64, so that handlers, `siglongjmp`,
//! unwinders and the program's own `rt_sigreturn` trampoline see what they always see:
//!
//! ```text
//!   lower addresses
//!   frame +   0   return address: the program's restorer
//!         +   8   ucontext (304 bytes): flags, link, stack, registers, mask
//!         + 312   siginfo (128 bytes)
//!   fp    +   0   extended state, XSAVE's standard format, 64-byte aligned
//!         + 464     in its software-reserved bytes: magic 1, sizes, features
//!         + size    magic 2
//!   the red zone of the interrupted function, 128 bytes
//!   the interrupted stack, or the top of the alternate stack
//!   higher addresses
//! ```
#![expect(
    unsafe_code,
    reason = "the program's stack, and the frame's extended state"
)]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "fields of one raw structure"
)]

use core::mem::{offset_of, size_of};
use core::sync::atomic::Ordering;

use dune_kvm::sys;
use dune_x86::descriptors::{
    RFLAGS_DF, RFLAGS_IF, RFLAGS_IOPL, RFLAGS_RF, RFLAGS_TF, RFLAGS_USER, USER_CS, USER_SS,
};
use dune_x86::trap::{PageFaultError, TrapFrame, vector};

use crate::arch::{self, RING0_FLAGS};
use crate::guest::call;
use crate::machine::Machine;
use crate::maps::{self, Rights};
use crate::signals::{
    AltStack, KernelAction, MASK_BLOCK, MASK_SET, SA_NODEFER, SA_ONSTACK, SA_RESETHAND, SIG_DFL,
    SIG_IGN, SS_AUTODISARM, SS_DISABLE, SS_ONSTACK,
};
use crate::thread::ThreadArea;

const SIGILL: u32 = 4;
const SIGTRAP: u32 = 5;
const SIGBUS: u32 = 7;
const SIGFPE: u32 = 8;
const SIGSEGV: u32 = 11;
/// `si_code` of a signal that the kernel itself sends, without details.
const SI_KERNEL: i32 = 0x80;

/// `struct sigcontext` (x86-64, `uapi/asm/sigcontext.h`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Registers {
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    rflags: u64,
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error: u64,
    trap: u64,
    old_mask: u64,
    cr2: u64,
    fpstate: u64,
    reserved: [u64; 8],
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Context {
    flags: u64,
    link: u64,
    stack: AltStack,
    registers: Registers,
    mask: u64,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Frame {
    restorer: u64,
    context: Context,
    info: [u64; 16],
}

const _: () = assert!(size_of::<Registers>() == 256);
const _: () = assert!(size_of::<Context>() == 304);
const _: () = assert!(size_of::<Frame>() == 440);
const _: () = assert!(offset_of!(Registers, fpstate) == 184);
const _: () = assert!(offset_of!(Frame, info) == 312);

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// Where the kernel's `struct _fpx_sw_bytes` lies in the legacy area.
const SOFTWARE_BYTES: usize = 464;
const MXCSR_OFFSET: usize = 24;
const XSTATE_BV_OFFSET: usize = 512;
const HEADER_END: usize = 576;
const DEFAULT_MXCSR: u32 = 0x1f80;
const MXCSR_MASK: u32 = 0xffff;

/// What `build` and the functions that it calls use of the stack, at most.
const DELIVERY_STACK: u64 = 8 << 10;

/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const CONTEXT_FLAGS: u64 = 7;

/// Delivers the captured signal on top of what `frame` interrupted. Interrupts are off.
///
/// # Safety
/// Called by the entry stub with the frame that it is about to return through.
pub(crate) unsafe extern "C" fn deliver(frame: *mut TrapFrame) {
    // SAFETY: the frame and the area are this thread's.
    let (frame, area) = unsafe { (&mut *frame, &mut *ThreadArea::current()) };
    if area.pending.load(Ordering::Relaxed) == 0 {
        return;
    }
    let (signal, info, mask) = (area.signal, area.siginfo, area.signal_mask);
    // SAFETY: points to a static, or into an area.
    let action = unsafe { &*area.signals }.get(signal);
    // From here on the mask that the program believes to have is the kernel's own again.
    // Until it is set, everything is blocked.
    area.pending.store(0, Ordering::Relaxed);
    match action.handler {
        SIG_IGN => {
            call::change_mask(MASK_SET, mask);
        }
        // The program took its handler away meanwhile: the kernel's turn.
        SIG_DFL => {
            crate::host::signals::raise_again(signal, &info);
            call::change_mask(MASK_SET, mask);
        }
        _ => {
            let during = mask_during(&action, signal, mask);
            if !build(frame, area, signal, &info, &action, mask) {
                call::die(SIGSEGV);
            }
            call::change_mask(MASK_SET, during);
        }
    }
}

/// Delivers the signal that Linux sends for an exception; never returns where the program
/// has no handler for it. Interrupts are off.
pub(crate) fn raise_exception(number: u8, frame: &mut TrapFrame) {
    // SAFETY: the area is this thread's.
    let area = unsafe { &mut *ThreadArea::current() };
    let Some((signal, code, address)) = describe(number, frame) else {
        return;
    };
    let info = [
        u64::from(signal),
        u64::from(code as u32),
        address,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    // SAFETY: points to a static, or into an area.
    let action = unsafe { &*area.signals }.get(signal);
    let bit = 1_u64 << (signal - 1);
    let blocked = if action.flags & SA_NODEFER == 0 {
        action.mask | bit
    } else {
        action.mask
    };
    let mask = call::change_mask(MASK_BLOCK, blocked);
    if !action.is_handler() || mask & bit != 0 || !build(frame, area, signal, &info, &action, mask)
    {
        if std::env::var_os("DUNE_BACKTRACE").is_some() {
            crate::guest::fatal::report(frame, "an exception that nothing handles");
        }
        call::die(signal);
    }
}

fn mask_during(action: &KernelAction, signal: u32, mask: u64) -> u64 {
    let own = if action.flags & SA_NODEFER == 0 {
        1 << (signal - 1)
    } else {
        0
    };
    mask | action.mask | own
}

/// The signal and `si_code` that Linux sends for an exception
/// (`arch/x86/kernel/traps.c` and `mm/fault.c` by behaviour).
pub(crate) fn signal_of(number: u8) -> (u32, i32) {
    const ILL_ILLOPN: i32 = 2;
    const FPE_INTDIV: i32 = 1;
    const TRAP_TRACE: i32 = 2;
    const BUS_ADRALN: i32 = 1;
    match number {
        vector::DIVIDE => (SIGFPE, FPE_INTDIV),
        vector::DEBUG => (SIGTRAP, TRAP_TRACE),
        vector::BREAKPOINT => (SIGTRAP, SI_KERNEL),
        vector::INVALID_OPCODE => (SIGILL, ILL_ILLOPN),
        vector::X87 | vector::SIMD => (SIGFPE, 0),
        vector::ALIGNMENT => (SIGBUS, BUS_ADRALN),
        vector::SEGMENT_NOT_PRESENT | vector::STACK => (SIGBUS, SI_KERNEL),
        _ => (SIGSEGV, SI_KERNEL),
    }
}

/// Signal, `si_code` and address; `None` where the access is possible by now, because another
/// thread changed the mapping: it is made again.
fn describe(number: u8, frame: &TrapFrame) -> Option<(u32, i32, u64)> {
    const SEGV_MAPERR: i32 = 1;
    const SEGV_ACCERR: i32 = 2;
    const BUS_ADRERR: i32 = 2;
    let (signal, code) = signal_of(number);
    Some(match number {
        vector::PAGE_FAULT => {
            let cause = frame.fault_cause();
            let needed = if cause.contains(PageFaultError::INSTRUCTION) {
                Rights::EXECUTE
            } else if cause.contains(PageFaultError::WRITE) {
                Rights::WRITE
            } else {
                Rights::READ
            };
            let (signal, code) = match maps::rights(frame.cr2) {
                None => (SIGSEGV, SEGV_MAPERR),
                Some(rights)
                    if rights.contains(needed) && !crate::memory::forbids(frame.cr2, cause) =>
                {
                    if !is_beyond_end(frame.cr2, needed) {
                        return None;
                    }
                    (SIGBUS, BUS_ADRERR)
                }
                Some(_) => (SIGSEGV, SEGV_ACCERR),
            };
            (signal, code, frame.cr2)
        }
        vector::SIMD | vector::X87 => (signal, float_code(number, frame), frame.rip),
        vector::DIVIDE | vector::INVALID_OPCODE | vector::DEBUG => (signal, code, frame.rip),
        _ => (signal, code, 0),
    })
}

/// Whether memory within its rights is not there all the same. Looked at several times, for
/// another thread may be changing the rights back and forth.
fn is_beyond_end(address: u64, needed: Rights) -> bool {
    const LOOKS: usize = 8;
    (0..LOOKS).all(|_| {
        sys::read_memory(address, &mut [0]).is_err()
            && maps::rights(address).is_some_and(|rights| rights.contains(needed))
    })
}

/// Which floating-point error it was (`si_code` of `SIGFPE`).
fn float_code(number: u8, frame: &TrapFrame) -> i32 {
    let word = |offset: usize| {
        // SAFETY: the legacy area of the frame's extended state.
        unsafe {
            (frame.xsave as *const u8)
                .add(offset)
                .cast::<u32>()
                .read_unaligned()
        }
    };
    let raised = if number == vector::SIMD {
        let mxcsr = word(MXCSR_OFFSET);
        mxcsr & !(mxcsr >> 7) & 0x3f
    } else {
        let control = word(0);
        (control >> 16) & !control & 0x3f
    };
    const FPE: [(u32, i32); 5] = [(1, 7), (4, 3), (8, 4), (0x12, 5), (0x20, 6)];
    FPE.iter()
        .find(|(bits, _)| raised & bits != 0)
        .map_or(0, |(_, code)| *code)
}

/// Puts a signal frame on the program's stack and makes `frame` continue in the handler.
/// `false` where the stack cannot take it; then nothing has changed.
fn build(
    frame: &mut TrapFrame,
    area: &mut ThreadArea,
    signal: u32,
    info: &[u64; 16],
    action: &KernelAction,
    mask: u64,
) -> bool {
    const RED_ZONE: u64 = 128;
    let size = area.xsave_size;
    // A handler that interrupts a handler of an exception stays on its stack: the trap that
    // brings it back would otherwise start at the top of it, over what it interrupted.
    let on_trap_stack = (area.trap_low..area.trap_high).contains(&frame.rsp);
    let on_altstack = action.flags & SA_ONSTACK != 0
        && area.altstack.flags & SS_DISABLE == 0
        && !area.altstack.in_use(frame.rsp)
        && !on_trap_stack;
    let place = |top: u64| {
        let fp = top.wrapping_sub(size + 4) & !63;
        // As after a call: a multiple of 16 plus 8.
        let at = (fp.wrapping_sub(size_of::<Frame>() as u64) & !15).wrapping_sub(8);
        (fp, at)
    };
    let below_red_zone = place(frame.rsp.wrapping_sub(RED_ZONE));
    // Below an interrupted handler of an exception are this trap's own frame and the stack
    // that this function runs on. They are needed until the trap returns.
    let is_free = !on_trap_stack || below_red_zone.1 >= frame.xsave + size;
    let here = 0_u8;
    let (fp, at) = if on_altstack {
        place(area.altstack.base.wrapping_add(area.altstack.size))
    } else if is_free {
        below_red_zone
    } else {
        place((&raw const here as u64).wrapping_sub(DELIVERY_STACK))
    };
    if on_altstack && at < area.altstack.base || on_trap_stack && at < area.trap_limit {
        return false;
    }

    describe_extended_state(frame, size);
    let mut stack = area.altstack;
    if area.altstack.in_use(frame.rsp) {
        stack.flags |= SS_ONSTACK;
    }
    let image = Frame {
        restorer: action.restorer,
        context: Context {
            flags: CONTEXT_FLAGS,
            link: 0,
            stack,
            registers: Registers {
                r8: frame.r8,
                r9: frame.r9,
                r10: frame.r10,
                r11: frame.r11,
                r12: frame.r12,
                r13: frame.r13,
                r14: frame.r14,
                r15: frame.r15,
                rdi: frame.rdi,
                rsi: frame.rsi,
                rbp: frame.rbp,
                rbx: frame.rbx,
                rdx: frame.rdx,
                rax: frame.rax,
                rcx: frame.rcx,
                rsp: frame.rsp,
                rip: frame.rip,
                rflags: frame.rflags & !RFLAGS_IOPL,
                cs: USER_CS,
                gs: 0,
                fs: 0,
                ss: USER_SS,
                error: error_seen_by_handlers(frame),
                trap: frame.vector & 0xff,
                old_mask: mask,
                cr2: frame.cr2,
                fpstate: fp,
                reserved: [0; 8],
            },
            mask,
        },
        info: *info,
    };
    let magic2 = FP_XSTATE_MAGIC2;
    let wrote = copy_out(fp, frame.xsave as *const u8, size as usize)
        && copy_out(fp.wrapping_add(size), (&raw const magic2).cast(), 4)
        && copy_out(at, (&raw const image).cast(), size_of::<Frame>());
    if !wrote {
        return false;
    }
    if area.altstack.flags & SS_AUTODISARM != 0 && on_altstack {
        area.altstack = AltStack::DISABLED;
    }
    if action.flags & SA_RESETHAND != 0 {
        // SAFETY: points to a static, or into an area.
        unsafe { &*area.signals }.set(signal, KernelAction::default());
        let _ = crate::signals::install(signal, KernelAction::default());
    }
    frame.rip = action.handler;
    frame.rsp = at;
    frame.rdi = u64::from(signal);
    frame.rsi = at + offset_of!(Frame, info) as u64;
    frame.rdx = at + offset_of!(Frame, context) as u64;
    frame.rax = 0;
    frame.rflags &= !(RFLAGS_DF | RFLAGS_RF | RFLAGS_TF);
    initial_extended_state(frame);
    true
}

/// The error code of a page fault as a handler knows it, for whom all code is ring 3's.
fn error_seen_by_handlers(frame: &TrapFrame) -> u64 {
    if frame.vector == u64::from(vector::PAGE_FAULT) {
        frame.error | u64::from(PageFaultError::USER.bits())
    } else {
        frame.error
    }
}

/// Fills in the software-reserved bytes by which `sigreturn` recognises the format.
fn describe_extended_state(frame: &TrapFrame, size: u64) {
    let features = Machine::get().map_or(3, Machine::xcr0);
    let words: [u32; 5] = [
        FP_XSTATE_MAGIC1,
        size as u32 + 4,
        features as u32,
        (features >> 32) as u32,
        size as u32,
    ];
    for (index, word) in words.into_iter().enumerate() {
        // SAFETY: within the legacy area of the frame's extended state, in bytes that the
        // CPU leaves to software.
        unsafe {
            (frame.xsave as *mut u8)
                .add(SOFTWARE_BYTES + 4 * index)
                .cast::<u32>()
                .write(word);
        }
    }
}

/// A handler starts with the registers in their initial state.
fn initial_extended_state(frame: &TrapFrame) {
    let area = frame.xsave as *mut u8;
    // SAFETY: the frame's extended state.
    unsafe {
        area.add(XSTATE_BV_OFFSET).cast::<u64>().write(0);
        area.add(MXCSR_OFFSET).cast::<u32>().write(DEFAULT_MXCSR);
    }
}

/// Returns from a handler: the registers, mask and alternate stack in the frame that the
/// program's stack pointer shows. Interrupts are off.
pub(crate) fn sigreturn(frame: &mut TrapFrame) {
    // SAFETY: the area is this thread's.
    let area = unsafe { &mut *ThreadArea::current() };
    // The handler's return has popped the restorer.
    let at = frame.rsp;
    let mut context = core::mem::MaybeUninit::<Context>::uninit();
    if !copy_in(context.as_mut_ptr().cast(), at, size_of::<Context>()) {
        call::die(SIGSEGV);
    }
    // SAFETY: every byte was copied, and every bit pattern is a value.
    let context = unsafe { context.assume_init() };
    let saved = context.registers;
    if !restore_extended_state(frame, saved.fpstate, area.xsave_size) {
        call::die(SIGSEGV);
    }
    frame.r8 = saved.r8;
    frame.r9 = saved.r9;
    frame.r10 = saved.r10;
    frame.r11 = saved.r11;
    frame.r12 = saved.r12;
    frame.r13 = saved.r13;
    frame.r14 = saved.r14;
    frame.r15 = saved.r15;
    frame.rdi = saved.rdi;
    frame.rsi = saved.rsi;
    frame.rbp = saved.rbp;
    frame.rbx = saved.rbx;
    frame.rdx = saved.rdx;
    frame.rax = saved.rax;
    frame.rcx = saved.rcx;
    frame.rsp = saved.rsp;
    frame.rip = saved.rip;
    // A handler may have been run where interrupts were off only by mistake: the program's
    // own code always has them on.
    frame.rflags = (saved.rflags & RFLAGS_USER) | RING0_FLAGS | RFLAGS_IF;
    // No longer a system call that could be made again.
    frame.vector = u64::from(arch::VECTOR_NOTIFY);
    if context.stack.flags & SS_DISABLE != 0 {
        area.altstack = AltStack::DISABLED;
    } else if !area.altstack.in_use(frame.rsp) || area.altstack.flags & SS_DISABLE != 0 {
        area.altstack = AltStack {
            flags: context.stack.flags & SS_AUTODISARM,
            pad: 0,
            ..context.stack
        };
    }
    call::change_mask(MASK_SET, context.mask);
}

fn restore_extended_state(frame: &TrapFrame, from: u64, size: u64) -> bool {
    let to = frame.xsave as *mut u8;
    if from == 0 {
        initial_extended_state(frame);
        return true;
    }
    const LEGACY: usize = 512;
    if !copy_in(to, from, LEGACY) {
        return false;
    }
    let word = |offset: usize| {
        // SAFETY: within the legacy area that was just copied.
        unsafe { to.add(offset).cast::<u32>().read() }
    };
    let mut features = 3;
    if word(SOFTWARE_BYTES) == FP_XSTATE_MAGIC1 && u64::from(word(SOFTWARE_BYTES + 16)) == size {
        if !copy_in(
            to.wrapping_add(LEGACY),
            from + LEGACY as u64,
            size as usize - LEGACY,
        ) {
            return false;
        }
        // SAFETY: the header was just copied.
        features = unsafe { to.add(XSTATE_BV_OFFSET).cast::<u64>().read() };
    }
    // XRSTOR faults on a header that no XSAVE wrote.
    // SAFETY: within the frame's extended state.
    unsafe {
        core::ptr::write_bytes(to.add(XSTATE_BV_OFFSET), 0, HEADER_END - XSTATE_BV_OFFSET);
        let allowed = Machine::get().map_or(3, Machine::xcr0);
        to.add(XSTATE_BV_OFFSET)
            .cast::<u64>()
            .write(features & allowed);
        to.add(MXCSR_OFFSET)
            .cast::<u32>()
            .write(word(MXCSR_OFFSET) & MXCSR_MASK);
    }
    true
}

fn copy_out(to: u64, from: *const u8, length: usize) -> bool {
    // SAFETY: a fault on either side ends the copy.
    unsafe { arch::dune_copy(to as *mut u8, from, length) == 0 }
}

fn copy_in(to: *mut u8, from: u64, length: usize) -> bool {
    // SAFETY: as above; `to` has room.
    unsafe { arch::dune_copy(to, from as *const u8, length) == 0 }
}
