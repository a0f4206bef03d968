//! Model-specific register numbers that the platform sets.

/// Extended feature enable register.
pub const MSR_EFER: u32 = 0xc000_0080;
/// Segment selectors of `SYSCALL` and `SYSRET`.
pub const MSR_STAR: u32 = 0xc000_0081;
/// Target of `SYSCALL` in 64-bit mode.
pub const MSR_LSTAR: u32 = 0xc000_0082;
/// Target of `SYSCALL` in compatibility mode.
pub const MSR_CSTAR: u32 = 0xc000_0083;
/// Flags that `SYSCALL` clears.
pub const MSR_FMASK: u32 = 0xc000_0084;
/// The GS base that `SWAPGS` exchanges.
pub const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Value returned by `RDPID` and `RDTSCP`.
pub const MSR_TSC_AUX: u32 = 0xc000_0103;
/// Page attribute table.
pub const MSR_PAT: u32 = 0x277;
/// The page attribute table that Linux programs, so that memory types agree on both sides.
pub const PAT_LINUX: u64 = 0x0407_0106_0007_0106;
