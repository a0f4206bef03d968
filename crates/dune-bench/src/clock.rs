//! What is counted: instructions where the machine counts them, nanoseconds elsewhere.
//!
//! The time-stamp counter is read on both sides, because reading it is the same instruction
//! natively, in Dune mode and in ring 3, and never exits. What a tick of it means is found
//! out at the start of a run:
//!
//! * In the lab with `--icount` the emulator advances every clock by one nanosecond for
//!   each guest instruction, at 1 GHz: a tick is an instruction. Two loops of known length
//!   must show that, one of cheap instructions and one full of divisions: no CPU executes
//!   both at one tick an instruction.
//! * Anywhere else a tick is a fixed part of a second, measured against the kernel's clock.
#![expect(
    unsafe_code,
    reason = "reads the time-stamp counter, runs counted loops"
)]

use core::arch::asm;
use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::fmt;
use std::time::{Duration, Instant};

/// The time-stamp counter, after everything before it has been executed.
#[inline(always)]
pub(crate) fn ticks() -> u64 {
    // SAFETY: no effect but ordering.
    unsafe { _mm_lfence() };
    // SAFETY: reads a counter; CR4.TSD is clear natively and in Dune mode.
    unsafe { _rdtsc() }
}

/// What a figure is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Instructions of the machine, the kernel's and the hypervisor's included.
    Instructions,
    /// Wall-clock time.
    Nanoseconds,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Instructions => "instructions",
            Self::Nanoseconds => "nanoseconds",
        })
    }
}

/// A loop whose length in instructions is known.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Slope {
    name: &'static str,
    /// Ticks for each instruction.
    ticks: f64,
}

/// The time-stamp counter, and what its ticks mean.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    unit: Unit,
    /// Units for each tick.
    scale: f64,
    cheap: Slope,
    dear: Slope,
    /// Ticks for each nanosecond of the kernel's clock.
    per_nanosecond: f64,
}

/// How far a slope may be from one tick an instruction. The emulator's is exact; the margin
/// is for the two readings of the counter.
const TOLERANCE: f64 = 0.001;

impl Clock {
    /// Finds out what a tick is. Takes about 60 ms.
    pub(crate) fn calibrate() -> Self {
        let cheap = Slope {
            name: "dec, jnz",
            ticks: slope(cheap_loop, CHEAP_LENGTH),
        };
        let dear = Slope {
            name: "div chain",
            ticks: slope(dear_loop, DEAR_LENGTH),
        };
        let per_nanosecond = frequency();
        let counted = (cheap.ticks - 1.0).abs() < TOLERANCE && (dear.ticks - 1.0).abs() < TOLERANCE;
        let (unit, scale) = if counted {
            (Unit::Instructions, 1.0)
        } else {
            (Unit::Nanoseconds, 1.0 / per_nanosecond)
        };
        Self {
            unit,
            scale,
            cheap,
            dear,
            per_nanosecond,
        }
    }

    pub(crate) fn unit(&self) -> Unit {
        self.unit
    }

    /// A number of ticks, spread over a number of operations, in this clock's unit.
    pub(crate) fn per_operation(&self, ticks: u64, operations: u32) -> f64 {
        ticks as f64 * self.scale / f64::from(operations)
    }

    /// What the calibration found.
    pub(crate) fn calibration(&self) -> Calibration {
        Calibration {
            ticks_per_instruction_cheap: round(self.cheap.ticks),
            ticks_per_instruction_dear: round(self.dear.ticks),
            ticks_per_nanosecond: round(self.per_nanosecond),
        }
    }
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Slope { name, ticks } = self.cheap;
        write!(f, "ticks per instruction: {ticks:.4} ({name}), ")?;
        let Slope { name, ticks } = self.dear;
        write!(f, "{ticks:.4} ({name}); ")?;
        match self.unit {
            Unit::Instructions => f.write_str("a tick is an instruction"),
            Unit::Nanoseconds => write!(
                f,
                "ticks are not instructions; {:.4} of them are a nanosecond",
                self.per_nanosecond
            ),
        }
    }
}

/// The figures behind the choice of a unit.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Calibration {
    ticks_per_instruction_cheap: f64,
    ticks_per_instruction_dear: f64,
    ticks_per_nanosecond: f64,
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Ticks for each instruction of a loop: the difference between a short and a long run of
/// it, so that what surrounds the loop does not count. The best of several, so that
/// interrupts do not either.
fn slope(run: fn(u64), length: u64) -> f64 {
    const SHORT: u64 = 10_000;
    const LONG: u64 = 110_000;
    const ATTEMPTS: usize = 15;
    let best = |iterations| {
        let timed = || {
            let start = ticks();
            run(iterations);
            ticks() - start
        };
        (0..ATTEMPTS).map(|_| timed()).min().unwrap_or(0)
    };
    let ticks = best(LONG).saturating_sub(best(SHORT));
    ticks as f64 / ((LONG - SHORT) * length) as f64
}

const CHEAP_LENGTH: u64 = 2;
const DEAR_LENGTH: u64 = 6;

#[inline(never)]
fn cheap_loop(iterations: u64) {
    // SAFETY: two instructions an iteration, registers only.
    unsafe {
        asm!("2: dec {0}", "jnz 2b", inout(reg) iterations => _, options(nomem, nostack));
    }
}

#[inline(never)]
fn dear_loop(iterations: u64) {
    // SAFETY: six instructions an iteration, registers only; the divisor is not zero and
    // the quotient fits, as rdx is smaller than the divisor.
    unsafe {
        asm!(
            "2: xor edx, edx",
            "div {divisor}",
            "xor edx, edx",
            "div {divisor}",
            "dec {count}",
            "jnz 2b",
            divisor = in(reg) 3_u64,
            count = inout(reg) iterations => _,
            inout("rax") u64::MAX => _,
            out("rdx") _,
            options(nomem, nostack)
        );
    }
}

/// Ticks for each nanosecond of the kernel's monotonic clock.
fn frequency() -> f64 {
    const LONG_ENOUGH: Duration = Duration::from_millis(50);
    let (start, started) = (ticks(), Instant::now());
    loop {
        let elapsed = started.elapsed();
        if elapsed >= LONG_ENOUGH {
            return (ticks() - start) as f64 / elapsed.as_nanos() as f64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_cpu_does_not_count_instructions() {
        let clock = Clock::calibrate();
        // True on any CPU that is not counted: a division takes longer than a tick.
        if clock.unit() == Unit::Instructions {
            assert!((clock.dear.ticks - 1.0).abs() < TOLERANCE);
        } else {
            assert!(clock.per_operation(1_000_000, 1) > 0.0);
        }
        assert!(clock.cheap.ticks > 0.0, "{clock}");
    }
}
