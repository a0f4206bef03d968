//! What programs do all day, over and over, with the ticks that it took: the one program that
//! every contender of `dune-bench sandbox` runs. It knows nothing of Dune.
//!
//! ```text
//!   dune-operations measure SAMPLES NAME...   samples of operations, a line each:
//!       begin NAME
//!       sample NAME OPERATIONS TICKS          SAMPLES times
//!       end NAME                              or: fail NAME REASON
//!   dune-operations run COMMAND...            the command, then: run TICKS PEAK_KIB
//!   dune-operations nothing                   ends at once
//! ```
//!
//! An operation whose result is not what it should be fails: a contender that refuses a call
//! quickly must not look fast.

mod calls;
mod meter;
mod processes;

use std::process::ExitCode;

use meter::Meter;

/// Measures one operation.
type Operation = fn(&Meter) -> Result<(), String>;

const OPERATIONS: &[(&str, Operation)] = &[
    ("null-call", calls::null),
    ("getppid", calls::getppid),
    ("getpid", calls::getpid),
    ("clock", calls::clock),
    ("read-1", calls::read_byte),
    ("write-1", calls::write_byte),
    ("read-64k", calls::read_much),
    ("write-64k", calls::write_much),
    ("open-close", calls::open_close),
    ("map-touch-unmap", calls::map_touch_unmap),
    ("page-fault", calls::page_fault),
    ("signal", calls::signal),
    ("thread", processes::thread),
    ("context-switch", processes::context_switch),
    ("fork-wait", processes::fork_wait),
    ("fork-exec-wait", processes::fork_exec_wait),
    ("pipe-ping-pong", processes::ping_pong),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["nothing"] => ExitCode::SUCCESS,
        ["run", command @ ..] => processes::run(command),
        ["measure", samples, names @ ..] => match samples.parse() {
            Ok(samples) => measure(samples, names),
            Err(_) => usage(),
        },
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: dune-operations measure SAMPLES NAME... | run COMMAND... | nothing");
    ExitCode::from(2)
}

fn measure(samples: usize, names: &[&str]) -> ExitCode {
    for name in names {
        let Some((name, operation)) = OPERATIONS.iter().find(|(known, _)| known == name) else {
            eprintln!("dune-operations: there is no operation {name}");
            return ExitCode::from(2);
        };
        println!("begin {name}");
        match operation(&Meter::new(name, samples)) {
            Ok(()) => println!("end {name}"),
            Err(reason) => println!("fail {name} {reason}"),
        }
    }
    ExitCode::SUCCESS
}
