//! Segment descriptors, the task state segment and interrupt gates.
//!
//! The selectors are those of 64-bit Linux, so that a program which looks at its own
//! `%cs` and `%ss` in ring 3 sees what it would see natively, and so that `SYSCALL` and
//! `SYSRET` find their segments where `STAR` requires them (SDM vol. 3, 5.8.8; APM vol. 2,
//! 6.1.1):
//!
//! ```text
//!  selector  descriptor
//!  0x00      null
//!  0x10      ring 0 code, 64 bits      <- STAR[47:32]
//!  0x18      ring 0 data               <- STAR[47:32] + 8
//!  0x20      (ring 3 code, 32 bits)    <- STAR[63:48], left absent
//!  0x28      ring 3 data     (0x2b)    <- STAR[63:48] + 8
//!  0x30      ring 3 code     (0x33)    <- STAR[63:48] + 16
//!  0x40      TSS (two entries)
//!  0x78      CPU number for the vDSO's getcpu, a data segment whose limit is the number
//! ```

use core::mem::{offset_of, size_of};

/// Ring 0 code selector.
pub const KERNEL_CS: u16 = 0x10;
/// Ring 0 data (and stack) selector.
pub const KERNEL_SS: u16 = 0x18;
/// Ring 3 data (and stack) selector, requested privilege level 3.
pub const USER_SS: u16 = 0x2b;
/// Ring 3 code selector, requested privilege level 3.
pub const USER_CS: u16 = 0x33;
/// Selector of the task state segment.
pub const TSS_SELECTOR: u16 = 0x40;
/// Number of 8-byte entries in the table.
pub const GDT_ENTRIES: usize = 16;

/// Value of `MSR_STAR` that goes with the selectors above.
pub const STAR: u64 = (0x23 << 48) | ((KERNEL_CS as u64) << 32);

/// `SYSCALL` flag mask (`MSR_FMASK`): the flags cleared on entry. Everything that would
/// change how ring 0 runs is cleared: TF, IF, DF, NT, AC, RF. IOPL is left alone: it tells
/// the entry stub which ring the call came from (`dune`'s architecture notes, "Which ring").
pub const SYSCALL_FLAG_MASK: u64 =
    RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_NT | RFLAGS_AC | RFLAGS_RF;

/// Trap flag: single step.
pub const RFLAGS_TF: u64 = 1 << 8;
/// Interrupt flag.
pub const RFLAGS_IF: u64 = 1 << 9;
/// Direction flag.
pub const RFLAGS_DF: u64 = 1 << 10;
/// I/O privilege level, two bits.
pub const RFLAGS_IOPL: u64 = 3 << 12;
/// Nested task.
pub const RFLAGS_NT: u64 = 1 << 14;
/// Resume flag.
pub const RFLAGS_RF: u64 = 1 << 16;
/// Alignment check; with SMAP, the override for explicit supervisor accesses.
pub const RFLAGS_AC: u64 = 1 << 18;
/// Bit 1, always one.
pub const RFLAGS_FIXED: u64 = 1 << 1;
/// The flags that ring 3 may choose: CF, PF, AF, ZF, SF, TF, DF, OF, NT, RF, AC, ID.
pub const RFLAGS_USER: u64 = 0x0025_4dd5;

const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const DPL3: u64 = 3 << 45;
/// A byte-granular, expand-up, read-only data segment of DPL 3 whose limit is zero.
const CPU_NUMBER: u64 = 0x0040_f100_0000_0000;

/// A 64-bit task state segment without an I/O permission bitmap (SDM vol. 3, 8.7).
#[derive(Clone, Copy, Debug)]
#[repr(C, packed(4))]
pub struct TaskState {
    reserved0: u32,
    /// Stack pointers for entry into rings 0 to 2.
    pub rsp: [u64; 3],
    reserved1: u64,
    /// Interrupt stack table; entry `n` of a gate is `ist[n - 1]`.
    pub ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    /// Offset of the I/O permission bitmap; at or beyond the limit means "none".
    pub iomap_base: u16,
}

const _: () = assert!(size_of::<TaskState>() == 104);
const _: () = assert!(offset_of!(TaskState, ist) == 36);

impl TaskState {
    /// A task state in which ring 3 may use no I/O port.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            reserved0: 0,
            rsp: [0; 3],
            reserved1: 0,
            ist: [0; 7],
            reserved2: 0,
            reserved3: 0,
            iomap_base: size_of::<Self>() as u16,
        }
    }
}

impl Default for TaskState {
    fn default() -> Self {
        Self::new()
    }
}

/// The global descriptor table of one vCPU whose task state lies at `tss` (a guest virtual
/// address) and is `tss_limit + 1` bytes long.
#[must_use]
pub const fn global_descriptor_table(tss: u64, tss_limit: u32) -> [u64; GDT_ENTRIES] {
    let mut table = [0; GDT_ENTRIES];
    table[KERNEL_CS as usize / 8] = CODE64;
    table[KERNEL_SS as usize / 8] = DATA;
    table[USER_SS as usize / 8] = DATA | DPL3;
    table[USER_CS as usize / 8] = CODE64 | DPL3;
    let (low, high) = tss_descriptor(tss, tss_limit);
    table[TSS_SELECTOR as usize / 8] = low;
    table[TSS_SELECTOR as usize / 8 + 1] = high;
    table[15] = CPU_NUMBER;
    table
}

/// The two halves of a busy 64-bit TSS descriptor (SDM vol. 3, 8.2.3). Busy, because the
/// task register is loaded by the hypervisor and not by `LTR`.
const fn tss_descriptor(base: u64, limit: u32) -> (u64, u64) {
    let limit = limit as u64;
    let low = (limit & 0xffff)
        | ((base & 0x00ff_ffff) << 16)
        | (0x8b << 40)
        | (((limit >> 16) & 0xf) << 48)
        | (((base >> 24) & 0xff) << 56);
    (low, base >> 32)
}

/// A 64-bit interrupt gate (SDM vol. 3, 6.14.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Gate {
    low: u64,
    high: u64,
}

const _: () = assert!(size_of::<Gate>() == 16);

impl Gate {
    /// A gate to `handler` in ring 0 that clears IF, uses interrupt stack `ist` (1 to 7, or 0
    /// for none) and may be reached by `INT n` from ring `dpl` and inwards.
    #[must_use]
    pub const fn interrupt(handler: u64, ist: u8, dpl: u8) -> Self {
        let low = (handler & 0xffff)
            | ((KERNEL_CS as u64) << 16)
            | (((ist & 7) as u64) << 32)
            | (0x8e << 40)
            | (((dpl & 3) as u64) << 45)
            | (((handler >> 16) & 0xffff) << 48);
        Self {
            low,
            high: handler >> 32,
        }
    }

    /// The address that the gate leads to.
    #[must_use]
    pub const fn handler(self) -> u64 {
        (self.low & 0xffff) | ((self.low >> 48) << 16) | (self.high << 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_keeps_its_handler() {
        let gate = Gate::interrupt(0xffff_8123_4567_89ab, 1, 3);
        assert_eq!(gate.handler(), 0xffff_8123_4567_89ab);
        assert_eq!((gate.low >> 32) & 7, 1);
        assert_eq!((gate.low >> 40) & 0xff, 0xee);
    }

    #[test]
    fn selectors_are_where_syscall_and_sysret_look() {
        let table = global_descriptor_table(0xffff_8765_4321_0000, 103);
        assert_eq!((STAR >> 48) as u16 + 16, USER_CS);
        assert_eq!((STAR >> 48) as u16 + 8, USER_SS);
        assert_eq!((STAR >> 32) as u16, KERNEL_CS);
        assert_eq!((STAR >> 32) as u16 + 8, KERNEL_SS);
        assert_eq!(table[KERNEL_CS as usize / 8], CODE64);
        assert_eq!(table[USER_CS as usize / 8] >> 45 & 3, 3);
        assert_eq!(table[9], 0xffff_8765);
    }
}
