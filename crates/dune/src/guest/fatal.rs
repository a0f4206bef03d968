//! The end of a process that cannot go on: registers and a backtrace, never silence.
#![expect(unsafe_code, reason = "a raw system call")]

use core::fmt::Write;
use core::sync::atomic::{AtomicBool, Ordering};
use std::backtrace::Backtrace;

use dune_kvm::sys;
use dune_x86::trap::TrapFrame;

use crate::guest::call;
use crate::guest::signals::signal_of;

/// Reports the trap and ends the process by the signal that Linux would have sent.
///
/// What traps while the report is written ends the process with one more line.
pub(crate) fn report(frame: &TrapFrame, why: &str) -> ! {
    call::interrupts_off();
    static REPORTING: AtomicBool = AtomicBool::new(false);
    let signal = signal_of(frame.vector as u8).0;
    let mut text = Text::default();
    if REPORTING.swap(true, Ordering::Relaxed) {
        let _ = writeln!(
            text,
            "dune: and while that was reported, {why}: vector {} rip {:#x} rsp {:#x} cr2 {:#x}",
            frame.vector, frame.rip, frame.rsp, frame.cr2
        );
        text.flush();
        call::die(signal);
    }
    let _ = writeln!(text, "dune: {why}");
    registers(&mut text, frame);
    text.flush();
    // Whatever holds a lock that the backtrace needs must not keep the process alive. Reading
    // the debug information takes a while on a busy machine.
    // SAFETY: takes no pointer.
    let _ = unsafe { sys::raw(ALARM, [60, 0, 0, 0, 0, 0]) };
    // Code that trapped in the middle of a prologue may not be described well enough for the
    // unwinder: then this line is the last but one.
    let _ = writeln!(text, "backtrace:");
    text.flush();
    let _ = writeln!(text, "{}", Backtrace::force_capture());
    text.flush();
    call::die(signal);
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
