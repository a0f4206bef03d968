//! x86-64: the entry stubs and the few instructions that Rust has no name for.
#![expect(unsafe_code, reason = "assembly")]

use core::arch::{asm, global_asm};
use core::mem::{offset_of, size_of};

use dune_kvm::sys::nr;
use dune_x86::descriptors::{KERNEL_CS, KERNEL_SS, RFLAGS_FIXED, RFLAGS_IF, RFLAGS_IOPL};
use dune_x86::trap::{ERROR_CODE_VECTORS, TrapFrame};

use crate::answers;
use crate::thread::{TRAP_STACK, ThreadArea};
use crate::user::UserFrame;

/// Port of a forwarded system call.
pub(crate) const PORT_SYSCALL: u16 = 0x70;
/// Port of leaving Dune mode.
pub(crate) const PORT_LEAVE: u16 = 0x71;
/// Port of the last message: the host side ends the process with the signal in `result`.
pub(crate) const PORT_DIE: u16 = 0x72;

/// Port of a change of the signal mask by the runtime itself (see guest/call.rs).
pub(crate) const PORT_MASK: u16 = 0x73;
/// Port of a system call of the runtime itself, which no signal interrupts.
pub(crate) const PORT_RUNTIME: u16 = 0x74;

/// Pseudo-vector of a system call that a signal interrupted, or of one from ring 3.
pub(crate) const VECTOR_SYSCALL: u64 = 0x100;
/// Pseudo-vector of `rt_sigreturn`.
pub(crate) const VECTOR_SIGRETURN: u64 = 0x101;
/// The interrupt by which the host side says that a signal waits.
pub(crate) const VECTOR_NOTIFY: u8 = 0xf0;
/// Result of a forwarded call that was not made, or was interrupted such that it is to be
/// made again. Linux's ERESTARTSYS, which never reaches a program.
pub(crate) const RESTART: isize = -512;
/// Depth of a trap for which there was no room on the trap stack.
pub(crate) const STACK_USED_UP: u32 = 1 << 30;
/// Flags of ring 0: interrupts on, and the privilege level that marks it (see entry.S).
pub(crate) const RING0_FLAGS: u64 = RFLAGS_FIXED | RFLAGS_IF | RFLAGS_IOPL;

#[expect(
    improper_ctypes,
    reason = "the stubs know the fields that they use by offset"
)]
unsafe extern "C" {
    pub(crate) fn dune_syscall_entry();
    pub(crate) fn dune_after_syscall();
    pub(crate) fn dune_vectors();
    pub(crate) fn dune_low_trap();
    pub(crate) fn dune_high_run();
    pub(crate) fn dune_run_user();
    pub(crate) fn dune_enter(area: *mut ThreadArea);
    pub(crate) fn dune_leave();
    pub(crate) fn dune_guest_resume();
    pub(crate) fn dune_host_return(area: *mut ThreadArea) -> !;
    pub(crate) fn dune_safe_syscall(area: *mut ThreadArea) -> isize;
    pub(crate) fn dune_safe_start();
    pub(crate) fn dune_safe_end();
    pub(crate) fn dune_safe_abort();
    pub(crate) fn dune_host_clone(
        number: usize,
        arguments: *const [usize; 5],
        child: *mut ThreadArea,
    ) -> isize;
    pub(crate) fn dune_host_exit(state: *const u32, free: u32, status: usize) -> !;
    pub(crate) fn dune_restorer();
    pub(crate) fn dune_copy(to: *mut u8, from: *const u8, length: usize) -> usize;
    pub(crate) fn dune_copy_start();
    pub(crate) fn dune_copy_end();
    pub(crate) fn dune_copy_failed();
}

/// Address of an entry point.
pub(crate) fn address(of: unsafe extern "C" fn()) -> u64 {
    of as usize as u64
}

global_asm!(
    include_str!("entry.S"),
    A_NUMBER = const offset_of!(ThreadArea, number),
    A_ARG0 = const offset_of!(ThreadArea, arguments),
    A_ARG1 = const offset_of!(ThreadArea, arguments) + 8,
    A_ARG2 = const offset_of!(ThreadArea, arguments) + 16,
    A_ARG3 = const offset_of!(ThreadArea, arguments) + 24,
    A_ARG4 = const offset_of!(ThreadArea, arguments) + 32,
    A_ARG5 = const offset_of!(ThreadArea, arguments) + 40,
    A_RESULT = const offset_of!(ThreadArea, result),
    A_CALL_RSP = const offset_of!(ThreadArea, call_rsp),
    A_PENDING = const offset_of!(ThreadArea, pending),
    A_DEPTH = const offset_of!(ThreadArea, depth),
    A_PID = const offset_of!(ThreadArea, pid),
    A_TID = const offset_of!(ThreadArea, tid),
    A_SCRATCH = const offset_of!(ThreadArea, scratch),
    A_IST = const offset_of!(ThreadArea, ist),
    A_TRAP_LOW = const offset_of!(ThreadArea, trap_low),
    A_TRAP_HIGH = const offset_of!(ThreadArea, trap_high),
    A_TRAP_LIMIT = const offset_of!(ThreadArea, trap_limit),
    A_XSAVE_SIZE = const offset_of!(ThreadArea, xsave_size),
    A_LOW_TRAP = const offset_of!(ThreadArea, low_trap),
    A_HIGH_RUN = const offset_of!(ThreadArea, high_run),
    A_USER = const offset_of!(ThreadArea, user),
    A_USER_XSAVE = const offset_of!(ThreadArea, user_xsave),
    A_RUN_RSP = const offset_of!(ThreadArea, run_rsp),
    A_CR3 = const offset_of!(ThreadArea, cr3),
    A_FS_BASE = const offset_of!(ThreadArea, fs_base),
    A_PARKED_RSP = const offset_of!(ThreadArea, parked_rsp),
    A_HOST_RSP = const offset_of!(ThreadArea, host_rsp),
    A_MXCSR = const offset_of!(ThreadArea, mxcsr),
    A_X87_CONTROL = const offset_of!(ThreadArea, x87_control),
    F_R15 = const offset_of!(TrapFrame, r15),
    F_R14 = const offset_of!(TrapFrame, r14),
    F_R13 = const offset_of!(TrapFrame, r13),
    F_R12 = const offset_of!(TrapFrame, r12),
    F_R11 = const offset_of!(TrapFrame, r11),
    F_R10 = const offset_of!(TrapFrame, r10),
    F_R9 = const offset_of!(TrapFrame, r9),
    F_R8 = const offset_of!(TrapFrame, r8),
    F_RBP = const offset_of!(TrapFrame, rbp),
    F_RDI = const offset_of!(TrapFrame, rdi),
    F_RSI = const offset_of!(TrapFrame, rsi),
    F_RDX = const offset_of!(TrapFrame, rdx),
    F_RCX = const offset_of!(TrapFrame, rcx),
    F_RBX = const offset_of!(TrapFrame, rbx),
    F_RAX = const offset_of!(TrapFrame, rax),
    F_VECTOR = const offset_of!(TrapFrame, vector),
    F_ERROR = const offset_of!(TrapFrame, error),
    F_RIP = const offset_of!(TrapFrame, rip),
    F_CS = const offset_of!(TrapFrame, cs),
    F_RFLAGS = const offset_of!(TrapFrame, rflags),
    F_RSP = const offset_of!(TrapFrame, rsp),
    F_SS = const offset_of!(TrapFrame, ss),
    F_CR2 = const offset_of!(TrapFrame, cr2),
    F_XSAVE = const offset_of!(TrapFrame, xsave),
    F_DEPTH = const offset_of!(TrapFrame, depth),
    F_SIZE = const size_of::<TrapFrame>(),
    U_FS_BASE = const offset_of!(UserFrame, fs_base),
    U_GS_BASE = const offset_of!(UserFrame, gs_base),
    U_CR3 = const offset_of!(UserFrame, cr3),
    U_ANSWERS = const offset_of!(UserFrame, answers),
    ANSWERED_CALLS = const answers::CALLS,
    THREAD_ID = const answers::THREAD_ID,
    TRAP_STACK_SIZE = const TRAP_STACK,
    ERROR_CODE_VECTORS = const ERROR_CODE_VECTORS,
    KERNEL_CS = const KERNEL_CS,
    KERNEL_SS = const KERNEL_SS,
    NR_GETPID = const nr::GETPID,
    NR_GETTID = const nr::GETTID,
    NR_SIGRETURN = const nr::RT_SIGRETURN,
    NR_EXIT = const nr::EXIT,
    PORT_SYSCALL = const PORT_SYSCALL,
    PORT_LEAVE = const PORT_LEAVE,
    PORT_RUNTIME = const PORT_RUNTIME,
    PORT_DIE = const PORT_DIE,
    SIGSEGV = const libc::SIGSEGV,
    STACK_USED_UP = const STACK_USED_UP,
    VECTOR_SYSCALL = const VECTOR_SYSCALL,
    VECTOR_SIGRETURN = const VECTOR_SIGRETURN,
    VECTOR_NOTIFY = const VECTOR_NOTIFY,
    RESTART = const RESTART,
    RING0_FLAGS = const RING0_FLAGS,
    trap = sym crate::guest::dispatch::trap,
    deliver = sym crate::guest::signals::deliver,
    host_loop = sym crate::host::run::host_loop,
    child_start = sym crate::host::clone::child_start,
    options(att_syntax),
);

/// The ring that the CPU is in.
#[inline]
pub(crate) fn ring() -> u16 {
    let cs: u16;
    // SAFETY: reading a selector has no effect.
    unsafe { asm!("mov {0:x}, cs", out(reg) cs, options(nomem, nostack, preserves_flags)) };
    cs & 3
}

/// Forgets what the TLB of this vCPU knows of the page at `address`. Ring 0 only.
#[inline]
pub(crate) fn invalidate_page(address: u64) {
    debug_assert_eq!(ring(), 0);
    // SAFETY: only ever makes the CPU walk the page tables again.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// Forgets everything that the TLB of this vCPU knows under the current PCID, by loading
/// CR3 anew. Ring 0 only.
#[inline]
pub(crate) fn invalidate_all() {
    // SAFETY: CR3 keeps its value; bit 63 reads as zero, so the TLB is flushed.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// The page table root in use. Ring 0 only.
#[inline]
pub(crate) fn cr3() -> u64 {
    let value;
    // SAFETY: reading has no effect.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Loads a page table root. Ring 0 only.
///
/// # Safety
/// The tables must map the code, stack and data that is used next, where it is used.
#[inline]
pub(crate) unsafe fn set_cr3(value: u64) {
    // SAFETY: forwarded to the caller.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// Reads and clears what the last debug exception was about (DR6, SDM vol. 3, 17.2.3). Ring
/// 0 only; KVM may exit for it.
pub(crate) fn take_debug_status() -> u64 {
    const NOTHING: u64 = 0xffff_0ff0;
    let value;
    // SAFETY: status bits only.
    unsafe {
        asm!("mov {0}, dr6", "mov dr6, {1}", out(reg) value, in(reg) NOTHING, options(nomem, nostack, preserves_flags));
    }
    value
}
