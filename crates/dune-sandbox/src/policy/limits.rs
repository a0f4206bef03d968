//! How much of the machine the program may use, and how such amounts are
//! written.

use std::time::Duration;

/// Limits; `None` is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory that a process of the program may have mapped writable.
    /// What is mapped and never touched counts, as with `ulimit -d`.
    pub memory: Option<u64>,
    /// CPU time of each process of the program, to whole seconds (rounded up).
    /// It gets `SIGXCPU` then, and `SIGKILL` a second later.
    pub cpu_time: Option<Duration>,
    /// Processes and threads of the program at one time.
    pub processes: Option<u32>,
    /// Time until all of the program is ended, by the clock.
    pub timeout: Option<Duration>,
}

/// Why an amount cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// Not a number with a unit.
    #[error("{text:?} is not {expected}")]
    Syntax {
        /// What was given.
        text: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Zero, or more than can be counted.
    #[error("{text:?} is {problem}; give {expected}")]
    Range {
        /// What was given.
        text: String,
        /// `zero` or `too much`.
        problem: &'static str,
        /// What it should be.
        expected: &'static str,
    },
}

const SIZE: &str = "a number of bytes such as 65536, 512K, 64M or 1.5G";
const TIME: &str = "a time such as 10 (seconds), 500ms, 1.5s, 2m or 1h";

/// Reads a size in bytes: `65536`, `512K`, `64M`, `1.5G`, `1T`, in powers of
/// 1024; a final `B` or `iB` changes nothing.
///
/// # Errors
///
/// If it is none, is zero, or does not fit 63 bits.
pub fn parse_size(text: &str) -> Result<u64, AmountError> {
    let (number, unit) = split(text, SIZE)?;
    let unit = unit.strip_suffix("iB").unwrap_or(unit);
    let unit = match unit.len() {
        0 | 1 => unit,
        _ => unit.strip_suffix('B').unwrap_or(unit),
    };
    let factor: u64 = match unit {
        "" | "B" => 1,
        "K" | "k" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(syntax(text, SIZE)),
    };
    let bytes = number * factor as f64;
    if bytes < 1.0 {
        return Err(range(text, "zero", SIZE));
    }
    if bytes >= (1_u64 << 62) as f64 {
        return Err(range(text, "too much", SIZE));
    }
    Ok(bytes as u64)
}

/// Reads a time: `10` (seconds), `500ms`, `1.5s`, `2m`, `1h`, `1d`.
///
/// # Errors
///
/// If it is none, is zero, or longer than a thousand years.
pub fn parse_duration(text: &str) -> Result<Duration, AmountError> {
    let (number, unit) = split(text, TIME)?;
    let factor = match unit {
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(syntax(text, TIME)),
    };
    let seconds = number * factor;
    if seconds > 1000.0 * 366.0 * 86400.0 {
        return Err(range(text, "too much", TIME));
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) | Err(_) => Err(range(text, "zero", TIME)),
        Ok(time) => Ok(time),
    }
}

/// The number and what follows it.
fn split<'a>(text: &'a str, expected: &'static str) -> Result<(f64, &'a str), AmountError> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    // `.` alone and `1.2.3` are no numbers to the parser either.
    let number: f64 = number.parse().map_err(|_| syntax(text, expected))?;
    Ok((number, unit.trim_start()))
}

fn syntax(text: &str, expected: &'static str) -> AmountError {
    AmountError::Syntax {
        text: text.to_owned(),
        expected,
    }
}

fn range(text: &str, problem: &'static str, expected: &'static str) -> AmountError {
    AmountError::Range {
        text: text.to_owned(),
        problem,
        expected,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_in_powers_of_1024() {
        for (text, bytes) in [
            ("65536", 65536),
            ("1B", 1),
            ("512K", 512 << 10),
            ("512k", 512 << 10),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("64MB", 64 << 20),
            ("1.5G", 3 << 29),
            ("2 G", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "M", "1X", "-1", "1.2.3", ".", "0", "0.1", "9999999T", "1e3", "1MM",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        for (text, ms) in [
            ("10", 10_000),
            ("500ms", 500),
            ("1.5s", 1500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for text in ["", "s", "1y", "-1", "0", "0ms", "1.2.3s", "99999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,12}") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }
    }
}
