//! Repeats an operation and prints what it took.
#![expect(unsafe_code, reason = "reads the time-stamp counter")]

use core::arch::x86_64::{_mm_lfence, _rdtsc};

/// The time-stamp counter, after everything before it has been executed. The same
/// instruction natively and in every sandbox; none of them makes an exit of it.
#[inline(always)]
pub(crate) fn ticks() -> u64 {
    // SAFETY: no effect but ordering.
    unsafe { _mm_lfence() };
    // SAFETY: reads a counter that Linux lets every program read.
    unsafe { _rdtsc() }
}

/// Ticks that a sample should take: long beside the two readings, short enough for an
/// emulated machine (2 ms there, less than one on a CPU of today).
const ENOUGH: u64 = 2_000_000;
/// Most operations in a sample.
const MOST: u32 = 1 << 14;

/// Measures one operation.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    name: &'a str,
    samples: usize,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(name: &'a str, samples: usize) -> Self {
        Self { name, samples }
    }

    /// Samples of an operation that can be repeated as it is.
    ///
    /// # Errors
    /// The operation's own.
    pub(crate) fn repeat(
        &self,
        mut operation: impl FnMut() -> Result<(), String>,
    ) -> Result<(), String> {
        self.batches(MOST, |operations| {
            let start = ticks();
            for _ in 0..operations {
                operation()?;
            }
            Ok(ticks() - start)
        })
    }

    /// Samples of operations that need preparation: `batch` prepares, makes as many as it is
    /// told (`most` at most), and returns the ticks that those took. The first batches find
    /// out how many are enough, and warm up.
    ///
    /// # Errors
    /// The operation's own.
    pub(crate) fn batches(
        &self,
        most: u32,
        mut batch: impl FnMut(u32) -> Result<u64, String>,
    ) -> Result<(), String> {
        let mut operations = 1;
        // The better of two: one interruption must not make the samples short.
        while batch(operations)?.min(batch(operations)?) < ENOUGH && operations < most {
            operations = (operations * 2).min(most);
        }
        for _ in 0..self.samples {
            let ticks = batch(operations)?;
            println!("sample {} {operations} {ticks}", self.name);
        }
        Ok(())
    }
}
