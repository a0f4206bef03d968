//! The end of a process that cannot go on: registers and a backtrace, never silence.
#![expect(unsafe_code, reason = "called by the entry stub")]

use core::fmt::Write;
use std::backtrace::Backtrace;

use dune_kvm::sys;
use dune_x86::trap::TrapFrame;

use crate::guest::call;
use crate::guest::signals::signal_of;

/// No room is left on the trap stack. Runs on the part of it that is kept for this.
///
/// # Safety
/// Called by the entry stub.
pub(crate) unsafe extern "C" fn too_deep(frame: *const TrapFrame) -> ! {
    // SAFETY: the stub built the frame.
    report(
        unsafe { &*frame },
        "the trap stack is used up: traps nest, or a handler uses too much",
    );
}

/// Reports the trap and ends the process by the signal that Linux would have sent.
pub(crate) fn report(frame: &TrapFrame, why: &str) -> ! {
    let mut text = Text::default();
    let _ = writeln!(text, "dune: {why}");
    registers(&mut text, frame);
    text.flush();
    // Whatever holds a lock that the backtrace needs must not keep the process alive.
    // SAFETY: takes no pointer.
    let _ = unsafe { sys::raw(ALARM, [10, 0, 0, 0, 0, 0]) };
    let _ = writeln!(text, "backtrace:\n{}", Backtrace::force_capture());
    text.flush();
    call::die(signal_of(frame.vector as u8).0);
}

const ALARM: usize = 37;

fn registers(out: &mut impl Write, f: &TrapFrame) {
    let _ = writeln!(
        out,
        "vector {} error {:#x} depth {}\n\
         rip {:016x} rsp {:016x} rflags {:08x} cs {:x} cr2 {:016x}\n\
         rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n\
         rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}\n\
         r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}\n\
         r13 {:016x} r14 {:016x} r15 {:016x}",
        f.vector,
        f.error,
        f.depth,
        f.rip,
        f.rsp,
        f.rflags,
        f.cs,
        f.cr2,
        f.rax,
        f.rbx,
        f.rcx,
        f.rdx,
        f.rsi,
        f.rdi,
        f.rbp,
        f.r8,
        f.r9,
        f.r10,
        f.r11,
        f.r12,
        f.r13,
        f.r14,
        f.r15
    );
}

/// Collects text and writes it to standard error without the standard library's lock.
struct Text {
    buffer: [u8; 1024],
    used: usize,
}

impl Default for Text {
    fn default() -> Self {
        Self {
            buffer: [0; 1024],
            used: 0,
        }
    }
}

impl Text {
    fn flush(&mut self) {
        if let Some(bytes) = self.buffer.get(..self.used) {
            sys::last_words(bytes);
        }
        self.used = 0;
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            if self.used == self.buffer.len() {
                self.flush();
            }
            if let Some(place) = self.buffer.get_mut(self.used) {
                *place = byte;
                self.used += 1;
            }
        }
        Ok(())
    }
}
