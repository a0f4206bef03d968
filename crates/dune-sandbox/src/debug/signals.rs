//! Signals as gdb numbers them (its `include/gdb/signals.def`), which is not as
//! Linux does.

use linux_raw_sys::general::*;

/// Linux's number and gdb's, where they are one signal.
const NUMBERS: &[(u32, u8)] = &[
    (SIGHUP, 1),
    (SIGINT, 2),
    (SIGQUIT, 3),
    (SIGILL, 4),
    (SIGTRAP, 5),
    (SIGABRT, 6),
    (SIGFPE, 8),
    (SIGKILL, 9),
    (SIGBUS, 10),
    (SIGSEGV, 11),
    (SIGSYS, 12),
    (SIGPIPE, 13),
    (SIGALRM, 14),
    (SIGTERM, 15),
    (SIGURG, 16),
    (SIGSTOP, 17),
    (SIGTSTP, 18),
    (SIGCONT, 19),
    (SIGCHLD, 20),
    (SIGTTIN, 21),
    (SIGTTOU, 22),
    (SIGIO, 23),
    (SIGXCPU, 24),
    (SIGXFSZ, 25),
    (SIGVTALRM, 26),
    (SIGPROF, 27),
    (SIGWINCH, 28),
    (SIGUSR1, 30),
    (SIGUSR2, 31),
    (SIGPWR, 32),
    // The first real-time signal and the last came later than the others.
    (32, 77),
    (64, 78),
];

/// Real-time signals 33 to 63.
const REAL_TIME: core::ops::RangeInclusive<u32> = 33..=63;
const FIRST_REAL_TIME: u8 = 45;

/// What gdb calls one that it has no number for.
const UNKNOWN: u8 = 143;

/// gdb's number of `signal`.
pub(crate) fn to_gdb(signal: u32) -> u8 {
    if REAL_TIME.contains(&signal) {
        return FIRST_REAL_TIME + (signal - REAL_TIME.start()) as u8;
    }
    NUMBERS
        .iter()
        .find(|(linux, _)| *linux == signal)
        .map_or(UNKNOWN, |(_, gdb)| *gdb)
}

/// The signal that gdb numbers so; `None` for 0 and for what Linux has not.
pub(crate) fn from_gdb(number: u8) -> Option<u32> {
    let real_time = FIRST_REAL_TIME..=FIRST_REAL_TIME + (REAL_TIME.end() - REAL_TIME.start()) as u8;
    if real_time.contains(&number) {
        return Some(REAL_TIME.start() + u32::from(number - FIRST_REAL_TIME));
    }
    NUMBERS
        .iter()
        .find(|(_, gdb)| *gdb == number)
        .map(|(linux, _)| *linux)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signal::SIGNALS;

    #[test]
    fn numbers_go_there_and_back() {
        for signal in 1..=SIGNALS {
            let number = to_gdb(signal);
            // gdb has no name for this one.
            if signal == SIGSTKFLT {
                assert_eq!(number, UNKNOWN);
            } else {
                assert_eq!(from_gdb(number), Some(signal), "{signal}");
            }
        }
        assert_eq!((from_gdb(0), from_gdb(UNKNOWN)), (None, None));
        assert_eq!((to_gdb(SIGUSR1), to_gdb(34), to_gdb(63)), (30, 46, 75));
    }
}
