//! The frame on the program's stack while a handler runs.
//!
//! The layout is the kernel's `struct rt_sigframe` for x86-64, which libc,
//! unwinders and `siglongjmp` know (Linux, arch/x86/include/asm/sigframe.h and
//! uapi/asm/sigcontext.h):
//!
//! ```text
//!  higher   interrupted rsp - 128 (red zone), or top of the alternate stack
//!           extended state: XSAVE area, then FP_XSTATE_MAGIC2     64-aligned
//!     +312  siginfo                      128 bytes
//!     +8    ucontext                     304 bytes
//!     +0    return address (restorer)    16n + 8, as after a call
//!  lower    rsp of the handler
//! ```

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::engine::{UserRegs, UserState};
use crate::signal::{AltStack, SigInfo, SigSet};

/// `ucontext` flags: extended state present, `ss` saved and to be restored.
const UC_FLAGS: u64 = 1 | 2 | 4;

/// Ring 3 selectors as Linux programs see them.
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// `FP_XSTATE_MAGIC1`, in the software part of the FXSAVE area.
const MAGIC1: u32 = 0x4650_5853;
/// `FP_XSTATE_MAGIC2`, behind the XSAVE area.
pub(crate) const MAGIC2: u32 = 0x4650_5845;
/// Offset of the software part (`struct _fpx_sw_bytes`).
const SW_BYTES: usize = 464;
/// Bytes of the legacy FXSAVE area.
const FXSAVE_LEN: usize = 512;
/// Bytes of the legacy area and the XSAVE header.
const XSAVE_MIN_LEN: usize = 576;
/// Below the stack pointer of an interrupted leaf function (psABI 3.2.2).
const RED_ZONE: u64 = 128;

/// `struct sigcontext`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
pub(crate) struct SigContext {
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
    err: u64,
    trapno: u64,
    oldmask: u64,
    cr2: u64,
    pub(crate) fpstate: u64,
    reserved: [u64; 8],
}

/// `struct rt_sigframe`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
pub(crate) struct Frame {
    restorer: u64,
    flags: u64,
    link: u64,
    pub(crate) altstack: AltStack,
    pub(crate) context: SigContext,
    pub(crate) mask: SigSet,
    pub(crate) info: SigInfo,
}

const _: () = assert!(size_of::<SigContext>() == 256);
const _: () = assert!(core::mem::offset_of!(Frame, context) == 8 + 40);
const _: () = assert!(core::mem::offset_of!(Frame, mask) == 8 + 296);
const _: () = assert!(core::mem::offset_of!(Frame, info) == 312);
const _: () = assert!(size_of::<Frame>() == 440);

/// What the hardware said about a fault; zero for other signals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FaultContext {
    pub(crate) error: u64,
    pub(crate) vector: u64,
    pub(crate) cr2: u64,
}

/// Where the parts of a frame go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Address of the frame; the handler's `rsp`.
    pub(crate) frame: u64,
    /// Address of the extended state.
    pub(crate) fpstate: u64,
}

/// Bytes of the extended state in a frame, the closing magic included.
pub(crate) const fn fpstate_len(xstate_len: usize) -> u64 {
    xstate_len as u64 + 4
}

impl Placement {
    /// Below `rsp` (with the red zone), or below `stack_top` if the handler
    /// has a stack of its own. `None` if that wraps below zero.
    pub(crate) fn new(rsp: u64, stack_top: Option<u64>, xstate_len: usize) -> Option<Self> {
        let top = match stack_top {
            Some(top) => top,
            None => rsp.checked_sub(RED_ZONE)?,
        };
        let fpstate = top.checked_sub(fpstate_len(xstate_len))? & !63;
        let frame = (fpstate.checked_sub(size_of::<Frame>() as u64)? & !15).checked_sub(8)?;
        Some(Self { frame, fpstate })
    }
}

/// Builds the frame of a signal for the state `user`.
pub(crate) fn build(
    user: &UserState,
    info: SigInfo,
    fault: FaultContext,
    mask: SigSet,
    altstack: AltStack,
    restorer: u64,
    at: Placement,
) -> Frame {
    let regs = &user.regs;
    Frame {
        restorer,
        flags: UC_FLAGS,
        link: 0,
        altstack,
        context: SigContext {
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rdi: regs.rdi,
            rsi: regs.rsi,
            rbp: regs.rbp,
            rbx: regs.rbx,
            rdx: regs.rdx,
            rax: regs.rax,
            rcx: regs.rcx,
            rsp: regs.rsp,
            rip: regs.rip,
            rflags: regs.rflags,
            cs: USER_CS,
            gs: 0,
            fs: 0,
            ss: USER_SS,
            err: fault.error,
            trapno: fault.vector,
            oldmask: mask,
            cr2: fault.cr2,
            fpstate: at.fpstate,
            reserved: [0; 8],
        },
        mask,
        info,
    }
}

impl SigContext {
    /// The registers that it holds. The caller checks `rip`; of the flags only
    /// those that ring 3 may choose are taken.
    pub(crate) fn registers(&self) -> UserRegs {
        UserRegs {
            rax: self.rax,
            rbx: self.rbx,
            rcx: self.rcx,
            rdx: self.rdx,
            rsi: self.rsi,
            rdi: self.rdi,
            rsp: self.rsp,
            rbp: self.rbp,
            r8: self.r8,
            r9: self.r9,
            r10: self.r10,
            r11: self.r11,
            r12: self.r12,
            r13: self.r13,
            r14: self.r14,
            r15: self.r15,
            rip: self.rip,
            rflags: self.rflags & UserState::RFLAGS_USER,
        }
    }
}

/// Marks `area`, an XSAVE area and four bytes more, as the kernel marks the
/// extended state in a frame.
pub(crate) fn seal_xstate(area: &mut [u8], xcr0: u64) {
    let xstate_len = area.len() - 4;
    let put = |area: &mut [u8], at: usize, bytes: &[u8]| {
        area[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(area, SW_BYTES, &[0; 48]);
    put(area, SW_BYTES, &MAGIC1.to_le_bytes());
    put(area, SW_BYTES + 4, &(area.len() as u32).to_le_bytes());
    put(area, SW_BYTES + 8, &xcr0.to_le_bytes());
    put(area, SW_BYTES + 16, &(xstate_len as u32).to_le_bytes());
    put(area, xstate_len, &MAGIC2.to_le_bytes());
}

/// Whether a frame's extended state has the marks of [`seal_xstate`]; without
/// them only its FXSAVE part counts (as in the kernel).
pub(crate) fn is_sealed(area: &[u8]) -> bool {
    let word = |at: usize| {
        area.get(at..at + 4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
    };
    let Some(xstate_len) = area
        .len()
        .checked_sub(4)
        .filter(|&len| len >= XSAVE_MIN_LEN)
    else {
        return false;
    };
    word(SW_BYTES) == Some(MAGIC1)
        && word(SW_BYTES + 4) == Some(area.len() as u32)
        && word(SW_BYTES + 16) == Some(xstate_len as u32)
        && word(xstate_len) == Some(MAGIC2)
}

/// Makes hostile extended state safe to load: only components of `xcr0`,
/// standard format, reserved bits of the header and of MXCSR zero. `area` has
/// the length of the engine's extended state.
pub(crate) fn sanitise_xstate(area: &mut [u8], xcr0: u64, mxcsr_mask: u32) {
    let mut features = [0; 8];
    features.copy_from_slice(&area[FXSAVE_LEN..FXSAVE_LEN + 8]);
    let features = u64::from_le_bytes(features) & xcr0;
    area[FXSAVE_LEN..XSAVE_MIN_LEN].fill(0);
    area[FXSAVE_LEN..FXSAVE_LEN + 8].copy_from_slice(&features.to_le_bytes());
    let mut mxcsr = [0; 4];
    mxcsr.copy_from_slice(&area[24..28]);
    let mxcsr = u32::from_le_bytes(mxcsr) & mxcsr_mask;
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
}

/// The bits of MXCSR that this CPU has, from an area that it stored.
pub(crate) fn mxcsr_mask(area: &[u8]) -> u32 {
    let mut mask = [0; 4];
    mask.copy_from_slice(&area[28..32]);
    match u32::from_le_bytes(mask) {
        0 => 0xffbf,
        mask => mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_lie_as_the_kernel_lays_them() {
        let at = Placement::new(0x7000_1234, None, 832).unwrap();
        assert_eq!(at.fpstate % 64, 0);
        assert!(at.fpstate + 836 <= 0x7000_1234 - 128);
        assert_eq!(
            at.frame % 16,
            8,
            "the stack at a handler's entry, as after a call"
        );
        assert!(at.frame + size_of::<Frame>() as u64 <= at.fpstate);
        assert!(Placement::new(100, None, 832).is_none());
        assert!(Placement::new(0x7000_1234, Some(10), 832).is_none());
    }

    #[test]
    fn hostile_extended_state_is_made_loadable() {
        let mut area = vec![0xff; 832];
        sanitise_xstate(&mut area, 7, 0xffff);
        assert_eq!(area[512..520], 7_u64.to_le_bytes());
        assert!(area[520..576].iter().all(|&byte| byte == 0));
        assert_eq!(area[24..28], 0xffff_u32.to_le_bytes());
    }

    #[test]
    fn seals_are_recognised() {
        let mut area = vec![0; 836];
        assert!(!is_sealed(&area));
        seal_xstate(&mut area, 7);
        assert!(is_sealed(&area));
        area[832] ^= 1;
        assert!(!is_sealed(&area));
        assert!(!is_sealed(&[0; 100]));
    }

    #[test]
    fn only_user_flags_come_back() {
        let mut user = UserState::default();
        user.regs.rflags = u64::MAX;
        let at = Placement {
            frame: 0,
            fpstate: 0,
        };
        let none = FaultContext::default();
        let frame = build(&user, SigInfo::ZERO, none, 0, AltStack::default(), 0, at);
        assert_eq!(frame.context.registers().rflags, UserState::RFLAGS_USER);
    }
}
