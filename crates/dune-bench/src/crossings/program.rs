//! Whole programs, natively and under `dune run`.
#![expect(unsafe_code, reason = "getrusage")]

use core::mem;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

use crate::clock::{self, Clock, Unit};
use crate::meter::Figure;

/// Most samples of a program that takes a good part of a second.
const MOST_SAMPLES: usize = 5;

/// A program, its arguments, and what its output must be.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    pub(crate) path: &'a Path,
    pub(crate) arguments: &'a [&'a str],
    pub(crate) most_samples: usize,
}

/// How a program is run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Under<'a> {
    /// As it is.
    Nothing,
    /// By `dune run`, in the placement that it chooses by itself.
    Dune(&'a Path),
    /// By `dune run`, in a placement by its name.
    DunePlaced(&'a Path, &'a str),
}

/// What a program costs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// From its start to its end.
    pub(crate) total: Figure,
    /// The CPU time in that; other programs on the machine disturb it less.
    pub(crate) cpu: Figure,
    /// What `inner` found in the output.
    pub(crate) inner: Option<Figure>,
}

impl Program<'_> {
    fn command(&self, under: Under<'_>) -> Command {
        let mut command = match under {
            Under::Nothing => Command::new(self.path),
            Under::Dune(dune) | Under::DunePlaced(dune, _) => {
                let mut command = Command::new(dune);
                command.args([OsStr::new("run"), OsStr::new("--"), self.path.as_os_str()]);
                command
            }
        };
        if let Under::DunePlaced(_, placement) = under {
            command.env(dune_kvm::probe::PLACEMENT_VARIABLE, placement);
        }
        command.args(self.arguments);
        command
    }

    /// Runs the program several times. `inner` looks for a number of ticks in its output.
    ///
    /// # Errors
    /// In a sentence: it does not start, fails, or prints what `inner` refuses.
    pub(crate) fn measure(
        &self,
        under: Under<'_>,
        clock: &Clock,
        samples: usize,
        inner: impl Fn(&str) -> Result<Option<u64>, String>,
    ) -> Result<Cost, String> {
        let (mut totals, mut cpus, mut inners) = (Vec::new(), Vec::new(), Vec::new());
        // The first one warms up.
        for sample in 0..=samples.min(self.most_samples) {
            let meter = Total::start(clock);
            let output = self.command(under).output();
            let (total, cpu) = meter.end();
            let output = output.map_err(|error| format!("the program does not start: {error}"))?;
            if !output.status.success() {
                return Err(failure(&output));
            }
            let found = inner(&String::from_utf8_lossy(&output.stdout))?;
            if sample > 0 {
                totals.push(total);
                cpus.push(cpu);
                inners.extend(found.map(|ticks| clock.per_operation(ticks, 1)));
            }
        }
        Ok(Cost {
            total: Figure::of(totals),
            cpu: Figure::of(cpus),
            inner: (!inners.is_empty()).then(|| Figure::of(inners)),
        })
    }
}

impl Default for Program<'_> {
    fn default() -> Self {
        Self {
            path: Path::new("/bin/true"),
            arguments: &[],
            most_samples: MOST_SAMPLES,
        }
    }
}

fn failure(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().last().unwrap_or("it says nothing");
    format!("the program ended with {}: {said}", output.status)
}

/// Meters a command from start to end. Where time is counted, that is the wall clock. Where
/// instructions are, it is the CPU time of the command and its children (the kernel accounts
/// it by the same clock, so a microsecond is a thousand instructions): the wall clock there
/// also jumps over the time in which the CPU idles.
struct Total<'a> {
    clock: &'a Clock,
    start: u64,
    used: f64,
}

impl<'a> Total<'a> {
    fn start(clock: &'a Clock) -> Self {
        Self {
            clock,
            used: children_nanoseconds(),
            start: clock::ticks(),
        }
    }

    /// The total, and the CPU time.
    fn end(self) -> (f64, f64) {
        let wall = clock::ticks() - self.start;
        let cpu = children_nanoseconds() - self.used;
        match self.clock.unit() {
            Unit::Nanoseconds => (self.clock.per_operation(wall, 1), cpu),
            Unit::Instructions => (cpu, cpu),
        }
    }
}

/// CPU time that children which have ended used, theirs included.
fn children_nanoseconds() -> f64 {
    // SAFETY: all zeros are a value.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes the structure.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    let nanoseconds = |time: libc::timeval| time.tv_sec as f64 * 1e9 + time.tv_usec as f64 * 1e3;
    nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime)
}
