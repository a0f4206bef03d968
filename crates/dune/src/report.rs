//! Last words of the host side: what happened, in one line, without allocating.
#![expect(unsafe_code, reason = "the registers of a stopped vCPU")]

use core::fmt::Write;

use dune_kvm::sys;

use crate::error::EnterError;
use crate::host::signals::die_by_signal;
use crate::thread::ThreadArea;

const SIGABRT: u32 = 6;
const SIGSEGV: u32 = 11;

/// Text in a fixed buffer; what does not fit is cut off.
struct Line {
    bytes: [u8; 512],
    used: usize,
}

impl Line {
    fn new() -> Self {
        let mut line = Self {
            bytes: [0; 512],
            used: 0,
        };
        let _ = line.write_str("dune: ");
        line
    }

    fn finish(mut self) {
        let _ = self.write_str("\n");
        if let Some(bytes) = self.bytes.get(..self.used) {
            sys::last_words(bytes);
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.used) {
                *place = byte;
                self.used += 1;
            }
        }
        Ok(())
    }
}

/// Ends the process with a message.
pub(crate) fn die(message: &[u8]) -> ! {
    let mut line = Line::new();
    let _ = line.write_str(core::str::from_utf8(message).unwrap_or("internal error"));
    line.finish();
    die_by_signal(SIGABRT)
}

/// The same with a number at its end.
pub(crate) fn die_with_number(message: &[u8], number: u64) -> ! {
    let mut line = Line::new();
    let _ = write!(
        line,
        "{}{number:#x}",
        core::str::from_utf8(message).unwrap_or("")
    );
    line.finish();
    die_by_signal(SIGABRT)
}

/// The vCPU stopped for a reason that has no remedy, such as a triple fault.
pub(crate) fn die_of_exit(area: &ThreadArea, reason: u32) -> ! {
    let mut line = Line::new();
    let name = match reason {
        kvm_bindings::KVM_EXIT_SHUTDOWN => " (triple fault)",
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => " (internal error of KVM)",
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => " (the CPU refused the vCPU's state)",
        kvm_bindings::KVM_EXIT_HLT => " (HLT)",
        _ => "",
    };
    let _ = write!(line, "the vCPU stopped with KVM exit {reason}{name}");
    if let Some(vcpu) = &area.vcpu {
        // SAFETY: the vCPU is stopped.
        if let Ok(r) = unsafe { vcpu.registers() } {
            let _ = write!(
                line,
                "; rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rdi {:#x}",
                r.rip, r.rsp, r.rflags, r.rax, r.rdi
            );
        }
        // SAFETY: as above.
        if let Ok(s) = unsafe { vcpu.special_registers() } {
            let _ = write!(
                line,
                " cr2 {:#x} cr3 {:#x} cs {:#x}",
                s.cr2, s.cr3, s.cs.selector
            );
        }
    }
    line.finish();
    die_by_signal(SIGSEGV)
}

/// The host side itself faulted: a bug of this crate.
pub(crate) fn die_of_host_fault(signal: u32, rip: u64, address: u64) -> ! {
    let mut line = Line::new();
    let _ = write!(
        line,
        "signal {signal} in the host side at rip {rip:#x}, address {address:#x}: a bug in dune"
    );
    line.finish();
    die_by_signal(signal)
}

/// The child of a `fork` could not be given a VM.
pub(crate) fn die_of_fork(error: &EnterError) -> ! {
    let mut line = Line::new();
    let _ = write!(line, "a forked child cannot continue in Dune mode: {error}");
    line.finish();
    die_by_signal(SIGABRT)
}
