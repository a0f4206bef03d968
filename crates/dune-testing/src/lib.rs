//! The test harness: each test a process of its own, in the lab where it must
//! be.
//!
//! Code at ring 0 can end its process in ways that no `catch_unwind` sees, and
//! it needs a KVM that many machines do not have. So each test of a target
//! that uses this harness runs in a child process, with a time limit, and its
//! output is captured; and tests marked `ring0` run here where KVM is backed
//! by hardware, and otherwise in labs that share them.
//!
//! # A test target
//!
//! In `Cargo.toml`:
//!
//! ```toml
//! [[test]]
//! name = "crossings"
//! harness = false
//! ```
//!
//! In `tests/crossings.rs`:
//!
//! ```no_run
//! fn enters_and_leaves() {
//!     assert_eq!(1 + 1, 2);
//! }
//!
//! fn reads_a_file() -> std::io::Result<()> {
//!     std::fs::read("/etc/passwd").map(drop)
//! }
//!
//! dune_testing::tests! {
//!     ring0 enters_and_leaves,
//!     smoke enters_and_leaves as "enters_and_leaves_on_intel_too",
//!     ring0 enters_and_leaves as "enters_slowly", timeout 300,
//!     plain reads_a_file,
//! }
//! ```
//!
//! | mark | where the test runs |
//! |---|---|
//! | `plain` | on this machine |
//! | `ring0` | on this machine if its KVM is backed by hardware, else in the lab |
//! | `smoke` | as `ring0`, and in the Intel lab too (`cargo xtask test --all`) |
//!
//! The command line is that of Rust's own tests (a filter, `--exact`,
//! `--nocapture`, `--list`, ...).
//!
//! # Variables
//!
//! | variable | meaning |
//! |---|---|
//! | `DUNE_REQUIRE_RING0=1` | a ring 0 test that cannot run fails; else it is ignored, loudly |
//! | `DUNE_TEST_RING0=lab` | use the lab although the machine's KVM would do |
//! | `DUNE_TEST_RING0=intel` | use the Intel lab, for the smoke tests; no others run |
//! | `DUNE_TEST_LABS=N` | how many labs share the tests (default: one a core) |
//! | `DUNE_TEST_CPUS=N` | virtual CPUs of a lab (default 2) |
//! | `DUNE_TEST_MEMORY=MIB` | memory of a lab (default 2048) |
//! | `DUNE_TEST_TIMEOUT_SCALE=F` | multiplies all time limits |
//!
//! # The way of a ring 0 test
//!
//! ```text
//!   main -> ring0::Pool (labs) -> batch::run (this binary, in the guest)
//!        -> child::run (this binary again, one test) -> back as an Event
//! ```

mod batch;
mod child;
mod event;
mod ring0;
mod test;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::event::Verdict;
use crate::ring0::{Place, Pool};
pub use crate::test::{Needs, Outcome, Test};

/// First arguments by which this binary calls itself.
mod role {
    /// `RUN NAME`: be the child that runs one test.
    pub(crate) const RUN: &str = "--dune-test-run";
    /// `BATCH FACTOR NAME...`: run these tests one after the other, with their
    /// time limits multiplied, reporting events.
    pub(crate) const BATCH: &str = "--dune-test-batch";
}

/// Exit code of a child whose test cannot run here; its reason is the last
/// line that it wrote to standard error.
const IGNORED_CODE: u8 = 77;

/// The entry point of a test target; [`tests!`] writes the call.
#[must_use]
pub fn main(tests: &'static [Test]) -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next().unwrap_or_default();
    match first.as_str() {
        role::RUN => child::be(tests, &arguments.next().unwrap_or_default()),
        role::BATCH => batch::run(tests, &arguments.collect::<Vec<_>>()),
        _ => run_all(tests),
    }
}

fn run_all(tests: &'static [Test]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    let show = arguments.nocapture || arguments.show_output;
    let place = Place::from_environment();
    let tests: Vec<&'static Test> = tests
        .iter()
        .filter(|test| place != Place::Intel || test.is_smoke())
        .collect();
    let wanted: Vec<&Test> = tests
        .iter()
        .copied()
        .filter(|test| is_wanted(&arguments, test.name()))
        .collect();
    let pool = Arc::new(Pool::new(
        place,
        wanted
            .iter()
            .copied()
            .filter(|test| test.needs() == Needs::Ring0)
            .copied()
            .collect(),
    ));
    // Tests that wait for the lab need no processor: they must not keep the
    // others waiting.
    let waiting = wanted.len().min(64);
    arguments.test_threads.get_or_insert(waiting.max(1));
    let trials = tests
        .into_iter()
        .map(|test| {
            let pool = Arc::clone(&pool);
            Trial::ignorable_test(test.name(), move || {
                let verdict = match test.needs() {
                    Needs::Nothing => pool.run_here(test),
                    Needs::Ring0 => pool.verdict(test),
                };
                conclude(test, verdict, show)
            })
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn conclude(test: &Test, verdict: Verdict, show: bool) -> Result<Completion, Failed> {
    if show && !verdict.output.is_empty() {
        eprintln!("---- {} ----\n{}", test.name(), verdict.output.trim_end());
    }
    match verdict.outcome {
        Outcome::Passed => Ok(Completion::Completed),
        Outcome::Ignored => Ok(Completion::ignored_with(verdict.message)),
        Outcome::Failed if verdict.output.trim().is_empty() => Err(verdict.message.into()),
        Outcome::Failed => Err(format!(
            "{}\n--- its output ---\n{}",
            verdict.message,
            verdict.output.trim_end()
        )
        .into()),
    }
}

/// The same choice that `libtest_mimic` makes.
fn is_wanted(arguments: &Arguments, name: &str) -> bool {
    let matches = |pattern: &String| {
        if arguments.exact {
            name == pattern
        } else {
            name.contains(pattern.as_str())
        }
    };
    !arguments.list
        && arguments.filter.as_ref().is_none_or(matches)
        && !arguments.skip.iter().any(matches)
}

/// Ends the calling test as *ignored*: what it tests is not there.
///
/// Call it on the test's own thread, before anything that would have to be
/// cleaned up.
pub fn ignore(reason: impl std::fmt::Display) -> ! {
    eprintln!("{reason}");
    std::process::exit(i32::from(IGNORED_CODE))
}

/// Writes the `main` of a test target from the list of its tests.
///
/// Each entry is a mark (`plain`, `ring0` or `smoke`), the path of a function
/// without arguments, and, each optional, `as "name"` and `, timeout SECONDS`.
/// The function returns nothing, or a `Result` whose error can be printed.
#[macro_export]
macro_rules! tests {
    ($($list:tt)*) => {
        fn main() -> ::std::process::ExitCode {
            const TESTS: &[$crate::Test] = $crate::list!($($list)*);
            $crate::main(TESTS)
        }
    };
}

/// The list of [`tests!`] without the `main`, for a target that writes its
/// own: a `&'static [Test]`.
#[macro_export]
macro_rules! list {
    ($($list:tt)*) => { &$crate::__list!([] $($list)*) };
}

/// Reads the entries of [`tests!`] one by one.
#[doc(hidden)]
#[macro_export]
macro_rules! __list {
    ([$($done:expr,)*]) => { [$($done),*] };
    ([$($done:expr,)*] $mark:ident $function:path as $name:literal, timeout $seconds:literal $(, $($rest:tt)*)?) => {
        $crate::__list!([$($done,)* $crate::__test!($mark, $name, $function).timeout_seconds($seconds),] $($($rest)*)?)
    };
    ([$($done:expr,)*] $mark:ident $function:path as $name:literal $(, $($rest:tt)*)?) => {
        $crate::__list!([$($done,)* $crate::__test!($mark, $name, $function),] $($($rest)*)?)
    };
    ([$($done:expr,)*] $mark:ident $function:path, timeout $seconds:literal $(, $($rest:tt)*)?) => {
        $crate::__list!([$($done,)* $crate::__test!($mark, stringify!($function), $function).timeout_seconds($seconds),] $($($rest)*)?)
    };
    ([$($done:expr,)*] $mark:ident $function:path $(, $($rest:tt)*)?) => {
        $crate::__list!([$($done,)* $crate::__test!($mark, stringify!($function), $function),] $($($rest)*)?)
    };
}

/// One entry of [`tests!`].
#[doc(hidden)]
#[macro_export]
macro_rules! __test {
    (plain, $name:expr, $function:path) => {
        $crate::Test::new($name, || $crate::__finish($function()))
    };
    (ring0, $name:expr, $function:path) => {
        $crate::__test!(plain, $name, $function).ring0()
    };
    (smoke, $name:expr, $function:path) => {
        $crate::__test!(plain, $name, $function).ring0().smoke()
    };
}

/// What a test function may return.
#[doc(hidden)]
pub trait TestResult {
    /// Panics when the test failed.
    fn finish(self);
}

impl TestResult for () {
    fn finish(self) {}
}

impl<E: std::fmt::Debug> TestResult for Result<(), E> {
    #[track_caller]
    fn finish(self) {
        if let Err(error) = self {
            panic!("the test returned an error: {error:?}");
        }
    }
}

#[doc(hidden)]
pub fn __finish(result: impl TestResult) {
    result.finish();
}
