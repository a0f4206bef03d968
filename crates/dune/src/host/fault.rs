//! Memory that the guest's page tables show and the host side refuses: unmapped, protected,
//! or beyond the end of a file.
//!
//! KVM then ends `KVM_RUN` with `EFAULT` and, before Linux 6.8, does not say which address
//! it was. The instruction does: it is decoded, its addresses are computed from the
//! registers, and the one that this process cannot access becomes a page fault in the guest.
//!
//! Addresses in the instruction are the guest's, under whatever page tables it runs: each is
//! translated to the address in this process before anything is looked at.
#![expect(unsafe_code, reason = "the registers of a stopped vCPU")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a union of KVM's shared area"
)]

use core::ptr::addr_of;
use core::sync::atomic::Ordering;

use dune_kvm::sys;
use dune_kvm::vcpu::Vcpu;
use dune_x86::addr::{GuestPhys, GuestVirt};
use dune_x86::trap::PageFaultError;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings as kvm;

use crate::machine::Machine;
use crate::maps::{self, Rights};
use crate::memory::{Frames, PageTable, Tables};
use crate::report;
use crate::thread::ThreadArea;

const LONGEST_INSTRUCTION: usize = 15;
const PAGE: u64 = 4096;
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
            if count > PATIENCE && !user.is_empty() {
                // Whatever ring 3 does to itself, the process goes on.
                let error = PageFaultError::USER | PageFaultError::PRESENT;
                // SAFETY: the vCPU stopped at the refused instruction.
                let _ = unsafe { vcpu.inject_page_fault(registers.rip, error.bits()) };
                return;
            }
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

/// The page tables that the guest runs on.
struct Guest {
    tables: PageTable,
}

impl Guest {
    fn new(sregs: &kvm::kvm_sregs) -> Self {
        const ROOT: u64 = 0x000f_ffff_ffff_f000;
        let root = GuestPhys::new_truncate(sregs.cr3 & ROOT);
        Self {
            tables: PageTable::from_root(root, Tables::new(), Frames::new()),
        }
    }

    /// The address in this process of an address of the guest. `None` where the guest's own
    /// tables have nothing, so that the CPU itself raises the fault.
    fn host(&self, address: u64) -> Option<u64> {
        let physical = self.tables.translate(GuestVirt::try_new(address).ok()?)?;
        Machine::get()?.vm().windows().to_host(physical.as_u64())
    }
}

/// The first address that the instruction at `rip` cannot access, and how.
fn find(registers: &kvm::kvm_regs, sregs: &kvm::kvm_sregs) -> Option<(u64, PageFaultError)> {
    let guest = Guest::new(sregs);
    let mut bytes = [0; LONGEST_INSTRUCTION];
    let length = read_instruction(&guest, registers.rip, &mut bytes);
    if length == 0 {
        return Some(fetch_fault(&guest, registers.rip));
    }
    let code = bytes.get(..length).unwrap_or(&[]);
    let mut decoder = Decoder::with_ip(64, code, registers.rip, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    decoder.decode_out(&mut instruction);
    if instruction.code() == Code::INVALID {
        return Some(fetch_fault(
            &guest,
            registers.rip.wrapping_add(length as u64),
        ));
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
        if let Some(found) = refused(&guest, address, size, writes) {
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
        return refused(&guest, address, 8, writes);
    }
    None
}

/// The instruction's bytes, as many as can be read: 0 to 15.
fn read_instruction(guest: &Guest, rip: u64, into: &mut [u8; LONGEST_INSTRUCTION]) -> usize {
    let on_first_page = (PAGE - (rip & (PAGE - 1))).min(LONGEST_INSTRUCTION as u64) as usize;
    let mut read = 0;
    for (start, end) in [(0, on_first_page), (on_first_page, LONGEST_INSTRUCTION)] {
        let Some(part) = into.get_mut(start..end) else {
            break;
        };
        let Some(host) = guest.host(rip.wrapping_add(start as u64)) else {
            break;
        };
        if part.is_empty() || sys::read_memory(host, part).is_err() {
            break;
        }
        read = end;
    }
    read
}

fn fetch_fault(guest: &Guest, address: u64) -> (u64, PageFaultError) {
    let present = match guest.host(address).and_then(maps::rights) {
        Some(_) => PageFaultError::PRESENT,
        None => PageFaultError::empty(),
    };
    (address, PageFaultError::INSTRUCTION | present)
}

/// Whether this process cannot access what the guest has at `size` bytes from `address`, and
/// where.
fn refused(guest: &Guest, address: u64, size: u64, writes: bool) -> Option<(u64, PageFaultError)> {
    let write = if writes {
        PageFaultError::WRITE
    } else {
        PageFaultError::empty()
    };
    let last = address.wrapping_add(size - 1);
    let second = (address / PAGE != last / PAGE).then_some(last & !(PAGE - 1));
    for at in core::iter::once(address).chain(second) {
        let Some(host) = guest.host(at) else { continue };
        match maps::rights(host) {
            None => return Some((at, write)),
            Some(rights) if !rights.contains(Rights::READ) => {
                return Some((at, write | PageFaultError::PRESENT));
            }
            Some(rights) if writes && !rights.contains(Rights::WRITE) => {
                return Some((at, PageFaultError::WRITE | PageFaultError::PRESENT));
            }
            Some(_) => {
                // Within its rights, and still not there: beyond the end of a file.
                if sys::read_memory(host, &mut [0]).is_err() {
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
