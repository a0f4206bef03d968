//! Runs a program in the sandbox, in the placement "on host":
//! `run PROGRAM [ARGUMENT...]`.

use dune_sandbox::Command;
use dune_sandbox::engine::on_host::OnHost;

fn main() {
    let mut words = std::env::args_os().skip(1);
    let Some(program) = words.next() else {
        eprintln!("usage: run PROGRAM [ARGUMENT...]");
        std::process::exit(2)
    };
    let engine = match OnHost::new() {
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
