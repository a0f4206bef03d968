//! Memory that the guest's page tables show and the host side refuses: unmapped, protected,
//! or beyond the end of a file.
//!
//! KVM then ends `KVM_RUN` with `EFAULT` and, before Linux 6.8, does not say which address
//! it was. The instruction does: it is decoded, its addresses are computed from the
//! registers, and the one that this process cannot access becomes a page fault in the guest.
#![expect(unsafe_code, reason = "the registers of a stopped vCPU")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a union of KVM's shared area"
)]

use core::ptr::addr_of;
use core::sync::atomic::Ordering;

use dune_kvm::sys;
use dune_kvm::vcpu::Vcpu;
use dune_x86::trap::PageFaultError;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings as kvm;

use crate::maps::{self, Rights};
use crate::report;
use crate::thread::ThreadArea;

const LONGEST_INSTRUCTION: usize = 15;
/// How often the same instruction may be refused without a reason that we can see, before it
/// is an error of ours: another thread may be changing the mapping at the same time.
const PATIENCE: u32 = 1000;

/// The decoder builds its tables at first use, which must not be under a trap.
pub(crate) fn prepare() {
    let mut decoder = Decoder::new(64, &[0x90], DecoderOptions::NONE);
    let _ = decoder.decode();
}

/// Turns a refused access into a page fault of the guest.
pub(crate) fn inject(vcpu: &Vcpu, run: *mut kvm::kvm_run) {
    // SAFETY: the vCPU is stopped.
    let (Ok(registers), Ok(sregs)) = (unsafe { vcpu.registers() }, unsafe {
        vcpu.special_registers()
    }) else {
        report::die(b"KVM does not give up the registers of a stopped vCPU");
    };
    let area = ThreadArea::current();
    let user = if sregs.cs.dpl == 3 {
        PageFaultError::USER
    } else {
        PageFaultError::empty()
    };
    match find(&registers, &sregs) {
        Some((address, error)) => {
            // SAFETY: the area is this thread's.
            unsafe { (*area).refused = (0, 0) };
            // SAFETY: as above.
            unsafe { (*area).injected.store(1, Ordering::Relaxed) };
            // SAFETY: the vCPU stopped at the refused instruction.
            if let Err(errno) = unsafe { vcpu.inject_page_fault(address, (error | user).bits()) } {
                report::die_with_number(b"KVM refused a page fault, errno ", errno.0 as u64);
            }
        }
        None => {
            // SAFETY: the area is this thread's.
            let (before, count) = unsafe { (*area).refused };
            let now = digest(&registers);
            let count = if before == now { count + 1 } else { 0 };
            // SAFETY: as above.
            unsafe { (*area).refused = (now, count) };
            if count > PATIENCE {
                // SAFETY: the area is shared with KVM, which is not running.
                let reason = unsafe { addr_of!((*run).exit_reason).read_volatile() };
                // SAFETY: the area is this thread's.
                report::die_of_exit(unsafe { &*area }, reason);
            }
        }
    }
}

/// All general registers as one number: the same again and again where a thread makes no
/// progress.
fn digest(r: &kvm::kvm_regs) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    [
        r.rip, r.rsp, r.rflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10,
        r.r11, r.r12, r.r13, r.r14, r.r15,
    ]
    .iter()
    .fold(0xcbf2_9ce4_8422_2325, |sum, value| {
        (sum ^ value).wrapping_mul(PRIME)
    })
}

/// The first address that the instruction at `rip` cannot access, and how.
fn find(registers: &kvm::kvm_regs, sregs: &kvm::kvm_sregs) -> Option<(u64, PageFaultError)> {
    let mut bytes = [0; LONGEST_INSTRUCTION];
    let length = read_instruction(registers.rip, &mut bytes);
    if length == 0 {
        return Some((
            registers.rip,
            PageFaultError::INSTRUCTION | present(registers.rip),
        ));
    }
    let mut decoder = Decoder::with_ip(64, &bytes[..length], registers.rip, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    decoder.decode_out(&mut instruction);
    if instruction.code() == Code::INVALID {
        let next = registers.rip + length as u64;
        return Some((next, PageFaultError::INSTRUCTION | present(next)));
    }
    let value = |register, _, _| register_value(register, registers, sregs);
    for operand in 0..instruction.op_count() {
        let size = match instruction.op_kind(operand) {
            OpKind::Memory
            | OpKind::MemorySegRSI
            | OpKind::MemorySegRDI
            | OpKind::MemoryESRDI
            | OpKind::MemorySegESI
            | OpKind::MemorySegEDI
            | OpKind::MemoryESEDI => instruction.memory_size().size().max(1) as u64,
            _ => continue,
        };
        if instruction.mnemonic() == Mnemonic::Lea {
            continue;
        }
        let Some(address) = instruction.virtual_address(operand, 0, value) else {
            continue;
        };
        let writes = operand == 0 && !only_reads(instruction.mnemonic());
        if let Some(found) = refused(address, size, writes) {
            return Some(found);
        }
    }
    if instruction.is_stack_instruction() {
        let change = instruction.stack_pointer_increment();
        let (address, writes) = if change < 0 {
            (registers.rsp.wrapping_add_signed(i64::from(change)), true)
        } else {
            (registers.rsp, false)
        };
        return refused(address, 8, writes);
    }
    None
}

fn read_instruction(rip: u64, into: &mut [u8; LONGEST_INSTRUCTION]) -> usize {
    if sys::read_memory(rip, into).is_ok() {
        return LONGEST_INSTRUCTION;
    }
    let left = (0x1000 - (rip & 0xfff) as usize).min(LONGEST_INSTRUCTION);
    if sys::read_memory(rip, &mut into[..left]).is_ok() {
        left
    } else {
        0
    }
}

fn present(address: u64) -> PageFaultError {
    match maps::rights(address) {
        Some(_) => PageFaultError::PRESENT,
        None => PageFaultError::empty(),
    }
}

/// Whether this process cannot access `size` bytes at `address`, and where.
fn refused(address: u64, size: u64, writes: bool) -> Option<(u64, PageFaultError)> {
    let write = if writes {
        PageFaultError::WRITE
    } else {
        PageFaultError::empty()
    };
    let last = address.wrapping_add(size - 1);
    let second = if address >> 12 == last >> 12 {
        None
    } else {
        Some(last & !0xfff)
    };
    for at in core::iter::once(address).chain(second) {
        match maps::rights(at) {
            None => return Some((at, write)),
            // Linux keeps such pages as not present.
            Some(rights) if !rights.contains(Rights::READ) => return Some((at, write)),
            Some(rights) if writes && !rights.contains(Rights::WRITE) => {
                return Some((at, PageFaultError::WRITE | PageFaultError::PRESENT));
            }
            Some(_) => {
                // Within its rights, and still not there: beyond the end of a file.
                if sys::read_memory(at, &mut [0]).is_err() {
                    return Some((at, write | PageFaultError::PRESENT));
                }
            }
        }
    }
    None
}

/// Instructions whose first operand is not written.
fn only_reads(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Cmp
            | Mnemonic::Test
            | Mnemonic::Bt
            | Mnemonic::Push
            | Mnemonic::Call
            | Mnemonic::Jmp
            | Mnemonic::Mul
            | Mnemonic::Imul
            | Mnemonic::Div
            | Mnemonic::Idiv
            | Mnemonic::Ldmxcsr
            | Mnemonic::Fld
            | Mnemonic::Fild
            | Mnemonic::Fbld
            | Mnemonic::Fadd
            | Mnemonic::Fmul
            | Mnemonic::Fcom
            | Mnemonic::Fcomp
            | Mnemonic::Fsub
            | Mnemonic::Fsubr
            | Mnemonic::Fdiv
            | Mnemonic::Fdivr
            | Mnemonic::Fiadd
            | Mnemonic::Fimul
            | Mnemonic::Ficom
            | Mnemonic::Ficomp
            | Mnemonic::Fisub
            | Mnemonic::Fisubr
            | Mnemonic::Fidiv
            | Mnemonic::Fidivr
            | Mnemonic::Fldenv
            | Mnemonic::Frstor
            | Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Fldcw
            | Mnemonic::Prefetcht0
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Comisd
            | Mnemonic::Ucomisd
            | Mnemonic::Ptest
            | Mnemonic::Cmpsb
            | Mnemonic::Scasb
            | Mnemonic::Outsb
    )
}

fn register_value(register: Register, r: &kvm::kvm_regs, s: &kvm::kvm_sregs) -> Option<u64> {
    let full = match register.full_register() {
        Register::RAX => r.rax,
        Register::RBX => r.rbx,
        Register::RCX => r.rcx,
        Register::RDX => r.rdx,
        Register::RSI => r.rsi,
        Register::RDI => r.rdi,
        Register::RSP => r.rsp,
        Register::RBP => r.rbp,
        Register::R8 => r.r8,
        Register::R9 => r.r9,
        Register::R10 => r.r10,
        Register::R11 => r.r11,
        Register::R12 => r.r12,
        Register::R13 => r.r13,
        Register::R14 => r.r14,
        Register::R15 => r.r15,
        Register::RIP => r.rip,
        Register::FS => return Some(s.fs.base),
        Register::GS => return Some(s.gs.base),
        Register::CS | Register::DS | Register::ES | Register::SS => return Some(0),
        _ => return None,
    };
    Some(if register.size() == 4 {
        full & u64::from(u32::MAX)
    } else {
        full
    })
}
