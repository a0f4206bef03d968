//! What the CPU and the entry stub leave behind when something traps to ring 0.

use core::mem::{offset_of, size_of};

/// Exception and interrupt vectors (SDM vol. 3, table 6-1).
pub mod vector {
    /// `#DE`, divide error.
    pub const DIVIDE: u8 = 0;
    /// `#DB`, debug.
    pub const DEBUG: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// `#BP`, breakpoint.
    pub const BREAKPOINT: u8 = 3;
    /// `#OF`, overflow.
    pub const OVERFLOW: u8 = 4;
    /// `#BR`, bound range.
    pub const BOUND: u8 = 5;
    /// `#UD`, invalid opcode.
    pub const INVALID_OPCODE: u8 = 6;
    /// `#NM`, device not available.
    pub const DEVICE_NOT_AVAILABLE: u8 = 7;
    /// `#DF`, double fault.
    pub const DOUBLE_FAULT: u8 = 8;
    /// `#TS`, invalid TSS.
    pub const INVALID_TSS: u8 = 10;
    /// `#NP`, segment not present.
    pub const SEGMENT_NOT_PRESENT: u8 = 11;
    /// `#SS`, stack fault.
    pub const STACK: u8 = 12;
    /// `#GP`, general protection.
    pub const GENERAL_PROTECTION: u8 = 13;
    /// `#PF`, page fault.
    pub const PAGE_FAULT: u8 = 14;
    /// `#MF`, x87 floating-point error.
    pub const X87: u8 = 16;
    /// `#AC`, alignment check.
    pub const ALIGNMENT: u8 = 17;
    /// `#MC`, machine check.
    pub const MACHINE_CHECK: u8 = 18;
    /// `#XM`, SIMD floating-point error.
    pub const SIMD: u8 = 19;
    /// `#CP`, control protection.
    pub const CONTROL_PROTECTION: u8 = 21;
}

/// The vectors for which the CPU pushes an error code, as a bit set of vectors 0 to 31.
pub const ERROR_CODE_VECTORS: u32 = (1 << 8)
    | (1 << 10)
    | (1 << 11)
    | (1 << 12)
    | (1 << 13)
    | (1 << 14)
    | (1 << 17)
    | (1 << 21)
    | (1 << 29)
    | (1 << 30);

bitflags::bitflags! {
    /// Error code of a page fault (SDM vol. 3, 4.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct PageFaultError: u32 {
        /// The page was present: a right was missing.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was made in ring 3.
        const USER = 1 << 2;
        /// A reserved bit was set in a page table entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const INSTRUCTION = 1 << 4;
        /// A protection key forbade the access.
        const PROTECTION_KEY = 1 << 5;
        /// A shadow stack access.
        const SHADOW_STACK = 1 << 6;
    }
}

/// All the registers of the code that trapped, as the entry stub saved them. Changing a
/// field changes the register when the trap returns.
///
/// ```text
///  lower addresses
///    0 r15 .. 112 rax     pushed by the stub
///  120 vector             the number of the exception
///  128 error              the CPU's error code, or 0
///  136 rip cs rflags rsp ss   pushed by the CPU (SDM vol. 3, figure 6-9)
///  176 cr2                the faulting address of a page fault
///  184 xsave              the extended state, XSAVE's standard format
///  192 depth              how many traps this thread is handling, 1 for the first
///  higher addresses
/// ```
#[derive(Clone, Debug, Default)]
#[repr(C)]
#[allow(missing_docs, reason = "registers are named by the architecture")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
    pub xsave: u64,
    pub depth: u64,
    pub reserved: u64,
}

const _: () = assert!(size_of::<TrapFrame>() == 208);
const _: () = assert!(
    size_of::<TrapFrame>().is_multiple_of(16),
    "keeps the stack aligned (psABI 3.2.2)"
);
const _: () = assert!(offset_of!(TrapFrame, vector) == 120);
const _: () = assert!(offset_of!(TrapFrame, rip) == 136);

impl TrapFrame {
    /// The address whose access faulted; only meaningful for a page fault.
    #[must_use]
    pub const fn fault_address(&self) -> u64 {
        self.cr2
    }

    /// Why a page fault was raised; only meaningful for a page fault.
    #[must_use]
    pub const fn fault_cause(&self) -> PageFaultError {
        PageFaultError::from_bits_truncate(self.error as u32)
    }

    /// Whether the trapped code ran in ring 3.
    #[must_use]
    pub const fn from_ring3(&self) -> bool {
        self.cs & 3 == 3
    }
}
