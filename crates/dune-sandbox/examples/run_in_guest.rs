//! Runs a program in the sandbox, in the placement "in guest":
//! `run_in_guest PROGRAM [ARGUMENT...]`.

use dune_sandbox::Command;
use dune_sandbox::engine::in_guest::InGuest;

fn main() {
    let mut words = std::env::args_os().skip(1);
    let Some(program) = words.next() else {
        eprintln!("usage: run PROGRAM [ARGUMENT...]");
        std::process::exit(2)
    };
    let engine = match InGuest::new() {
        Ok(engine) => engine,
        Err(error) => {
            eprintln!("run: {error}");
            std::process::exit(125)
        }
    };
    match Command::new(program).args(words).run(Box::new(engine)) {
        Ok(outcome) => {
            for call in &outcome.missing {
                let name = call.name.unwrap_or("unknown");
                eprintln!(
                    "run: system call {} ({name}) is missing, {} times",
                    call.nr, call.count
                );
            }
            outcome.end.leave()
        }
        Err(error) => {
            eprintln!("run: {error}");
            std::process::exit(error.exit_code().into())
        }
    }
}
