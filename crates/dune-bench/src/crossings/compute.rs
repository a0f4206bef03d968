//! A CPU-bound program, natively and under `dune run`: this same program, called with
//! `compute-kernel`.

use core::hint::black_box;

use dune_kvm::probe::Placement;

use super::Bench;
use super::program::{Cost, Program, Under};
use crate::clock::{self, Unit};
use crate::host;
use crate::report::{DUNE, LINUX, Row};

const IN_INSTRUCTIONS: f64 = 1.01;
const IN_TIME: f64 = 1.05;

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    row.note(
        "counted in the program, around its work, on memory that it has touched; \
         total: the whole command, from start to end",
    );
    match measure(bench, Under::Nothing) {
        Ok(cost) => {
            row.add("linux-total", cost.total);
            if let Some(kernel) = cost.inner {
                row.add(LINUX, kernel);
                row.set_aim(
                    kernel.median
                        * match bench.meter.clock().unit() {
                            Unit::Instructions => IN_INSTRUCTIONS,
                            Unit::Nanoseconds => IN_TIME,
                        },
                );
            }
        }
        Err(error) => row.set_missing(error),
    }
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    let dune = match bench.dune_command() {
        Ok(dune) => dune,
        Err(reason) => return row.set_missing(reason),
    };
    match measure(bench, Under::Dune(dune)) {
        Ok(cost) => {
            row.add("dune-total", cost.total);
            if let Some(kernel) = cost.inner {
                row.add(DUNE, kernel);
            }
        }
        Err(error) => return row.set_missing(error),
    }
    if host::placement() == Placement::InGuest {
        match measure(bench, Under::DunePlaced(dune, Placement::OnHost.name())) {
            Ok(cost) => {
                row.add("dune-on-host-total", cost.total);
                if let Some(kernel) = cost.inner {
                    row.add("dune-on-host", kernel);
                }
            }
            Err(error) => row.note(format!("no figure for the placement on the host: {error}")),
        }
    }
}

fn measure(bench: &Bench, under: Under<'_>) -> Result<Cost, String> {
    let path = std::env::current_exe().map_err(|error| error.to_string())?;
    let program = Program {
        path: &path,
        arguments: &["compute-kernel"],
        ..Program::default()
    };
    let ticks = |output: &str| match parse(output) {
        Some(ticks) => Ok(Some(ticks)),
        None => Err(format!("the program computed something else: {output}")),
    };
    program.measure(under, bench.meter.clock(), bench.meter.samples(), ticks)
}

/// The ticks that the program printed, if its result is the right one.
pub(crate) fn parse(text: &str) -> Option<u64> {
    let (result, ticks) = text.trim().split_once(' ')?;
    (result == RESULT).then(|| ticks.parse().ok())?
}

/// What the work gives, on every CPU.
const RESULT: &str = "2a70014e41f6db95";

/// The program: does the work twice, so that its memory is touched, and prints the result
/// and the ticks of the second time.
pub(crate) fn main() {
    let mut numbers = vec![0_u8; SIEVE];
    work(&mut numbers);
    let start = clock::ticks();
    let result = work(&mut numbers);
    let ticks = clock::ticks() - start;
    println!("{result:016x} {ticks}");
}

const SIEVE: usize = 2_000_000;
const STEPS: usize = 400_000;

/// Primes, an orbit and a hash: integers and memory, floating point, multiplication.
#[inline(never)]
fn work(numbers: &mut [u8]) -> u64 {
    let primes = sieve(black_box(numbers));
    let orbit = orbit(black_box(STEPS));
    hash(numbers) ^ primes.rotate_left(40) ^ orbit.to_bits()
}

/// How many primes there are below the number of bytes; leaves a one at each other number.
fn sieve(numbers: &mut [u8]) -> u64 {
    numbers.fill(0);
    let mut primes = 0;
    for candidate in 2..numbers.len() {
        if numbers[candidate] != 0 {
            continue;
        }
        primes += 1;
        let mut multiple = candidate * candidate;
        while multiple < numbers.len() {
            numbers[multiple] = 1;
            multiple += candidate;
        }
    }
    primes
}

/// Where a body is after so many steps around a heavier one. Only operations that IEEE 754
/// defines to the last bit.
fn orbit(steps: usize) -> f64 {
    const STEP: f64 = 1e-3;
    let (mut x, mut y, mut vx, mut vy) = (1.0_f64, 0.0_f64, 0.0_f64, 1.0_f64);
    for _ in 0..steps {
        let squared = x * x + y * y;
        let pull = STEP / (squared * squared.sqrt());
        vx -= x * pull;
        vy -= y * pull;
        x += vx * STEP;
        y += vy * STEP;
    }
    x + y
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_gives_what_it_should() {
        let mut numbers = vec![0; SIEVE];
        // The number of primes below two million.
        assert_eq!(sieve(&mut numbers), 148_933);
        let result = work(&mut numbers);
        assert_eq!(format!("{result:016x}"), RESULT);
        assert_eq!(work(&mut numbers), result);
    }

    #[test]
    fn output_is_checked() {
        assert_eq!(parse(&format!("{RESULT} 123\n")), Some(123));
        assert_eq!(parse("0000000000000000 123\n"), None);
        assert_eq!(parse(""), None);
    }
}
