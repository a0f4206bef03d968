//! How often each call was made, how long it took, how often it failed.
//!
//! The counters are in memory that all processes of the program share, so that
//! what children do is counted with the rest.

#![expect(unsafe_code, reason = "maps memory that survives fork")]

use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use linux_raw_sys::general::{
    __NR_mmap, __NR_munmap, MAP_ANONYMOUS, MAP_SHARED, PROT_READ, PROT_WRITE,
};

use crate::host::{Errno, syscall};
use crate::range::PAGE_SIZE;
use crate::table;

/// One for each number of the table, and one for all others.
const SLOTS: usize = table::END + 1;

#[repr(C)]
struct Slot {
    calls: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Summary {
    at: u64,
}

const LEN: u64 = (SLOTS * size_of::<Slot>()) as u64;

impl Summary {
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self, Errno> {
        let len = LEN.next_multiple_of(PAGE_SIZE);
        let prot = u64::from(PROT_READ | PROT_WRITE);
        let flags = u64::from(MAP_SHARED | MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever there is room.
        let at = unsafe { syscall(__NR_mmap, [0, len, prot, flags, u64::MAX, 0]) }?;
        Ok(Self { at })
    }

    fn slots(&self) -> &[Slot] {
        let slots = core::ptr::with_exposed_provenance::<Slot>(self.at as usize);
        // SAFETY: the mapping of `new` holds SLOTS slots, zeroed, which is a
        // valid state of atomics, and lives as long as `self`.
        unsafe { core::slice::from_raw_parts(slots, SLOTS) }
    }

    /// Counts a call.
    pub(crate) fn count(&self, nr: u32, failed: Failed, took: Duration) {
        let slot = &self.slots()[(nr as usize).min(SLOTS - 1)];
        slot.calls.fetch_add(1, Ordering::Relaxed);
        if failed == Failed::Yes {
            slot.errors.fetch_add(1, Ordering::Relaxed);
        }
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        slot.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// What was counted, the dearest first.
    pub(crate) fn counts(&self) -> Vec<Count> {
        let mut counts: Vec<Count> = self
            .slots()
            .iter()
            .enumerate()
            .map(|(nr, slot)| Count {
                name: table::find(nr as u32).map_or("(unknown)", |call| call.name),
                calls: slot.calls.load(Ordering::Relaxed),
                errors: slot.errors.load(Ordering::Relaxed),
                time: Duration::from_nanos(slot.nanoseconds.load(Ordering::Relaxed)),
            })
            .filter(|count| count.calls > 0)
            .collect();
        counts.sort_by(|a, b| b.time.cmp(&a.time).then(a.name.cmp(b.name)));
        counts
    }
}

impl Drop for Summary {
    fn drop(&mut self) {
        let len = LEN.next_multiple_of(PAGE_SIZE);
        // SAFETY: the mapping of `new`, to which nothing refers any more.
        let _ = unsafe { syscall(__NR_munmap, [self.at, len, 0, 0, 0, 0]) };
    }
}

/// Whether a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// It gave an error number.
    Yes,
    /// It did not.
    No,
}

/// One line of the summary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The call's name; `(unknown)` for numbers that no call has.
    pub name: &'static str,
    /// How often it was made.
    pub calls: u64,
    /// How often it failed.
    pub errors: u64,
    /// How long it took in all, from the trap to the answer.
    pub time: Duration,
}

/// The summary as a table for people.
#[must_use]
pub fn table_of(counts: &[Count]) -> String {
    let rule = "------ ----------- ----------- --------- --------- ----------------\n";
    let total = Count {
        name: "total",
        calls: counts.iter().map(|count| count.calls).sum(),
        errors: counts.iter().map(|count| count.errors).sum(),
        time: counts.iter().map(|count| count.time).sum(),
    };
    let mut text = String::from("% time     seconds  usecs/call     calls    errors syscall\n");
    text.push_str(rule);
    for count in counts {
        line(&mut text, count, total.time);
    }
    text.push_str(rule);
    line(&mut text, &total, total.time);
    text
}

fn line(text: &mut String, count: &Count, total: Duration) {
    let seconds = count.time.as_secs_f64();
    let share = if total.is_zero() {
        0.0
    } else {
        seconds / total.as_secs_f64() * 100.0
    };
    let each = count.time.as_micros() / u128::from(count.calls.max(1));
    let errors = if count.errors == 0 {
        String::new()
    } else {
        count.errors.to_string()
    };
    let Count { calls, name, .. } = count;
    let _ = writeln!(
        text,
        "{share:>6.2} {seconds:>11.6} {each:>11} {calls:>9} {errors:>9} {name}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up() {
        let summary = Summary::new().unwrap();
        let read = linux_raw_sys::general::__NR_read;
        for _ in 0..3 {
            summary.count(read, Failed::No, Duration::from_micros(10));
        }
        summary.count(read, Failed::Yes, Duration::from_micros(10));
        summary.count(1 << 20, Failed::Yes, Duration::from_micros(5));
        summary.count(u32::MAX, Failed::Yes, Duration::from_micros(5));
        let counts = summary.counts();
        assert_eq!(counts.len(), 2);
        assert_eq!(
            (counts[0].name, counts[0].calls, counts[0].errors),
            ("read", 4, 1)
        );
        assert_eq!((counts[1].name, counts[1].calls), ("(unknown)", 2));
        let table = table_of(&counts);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 6, "{table}");
        assert!(lines[2].ends_with(" read") && lines[2].trim_start().starts_with("80.00"));
        let total: Vec<&str> = lines[5].split_whitespace().collect();
        assert_eq!(
            total,
            ["100.00", "0.000050", "8", "6", "3", "total"],
            "{table}"
        );
    }

    #[test]
    fn an_empty_summary_is_a_table_too() {
        assert_eq!(table_of(&[]).lines().count(), 4);
    }
}
