//! To ring 0 and back: an ordinary program enters Dune mode, catches its own divide by zero
//! with an exception handler of its own, and leaves again.
//!
//! `cargo run -p dune --example hello`; where KVM cannot run ring 0,
//! `cargo build -p dune --example hello && cargo dune lab -- target/debug/examples/hello`.
#![expect(unsafe_code, reason = "a division that the compiler does not check")]

use std::arch::asm;
use std::process::ExitCode;

use dune::exceptions::{self, Outcome};
use dune::vector;

fn main() -> ExitCode {
    match there_and_back() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello: {error}");
            ExitCode::FAILURE
        }
    }
}

fn there_and_back() -> Result<(), dune::EnterError> {
    println!("before: in Dune mode? {}", dune::is_inside());

    dune::enter()?;
    println!("inside: in Dune mode? {}", dune::is_inside());

    exceptions::set_handler(vector::DIVIDE, |frame| {
        println!("divide error at {:#x}: skipped", frame.rip);
        frame.rip += 2; // the length of `div ecx`
        frame.rax = 0;
        Outcome::Resume
    });
    let quotient: u64;
    // SAFETY: the handler skips the instruction and sets rax.
    unsafe { asm!("div ecx", inout("rax") 1_u64 => quotient, in("ecx") 0, inout("edx") 0 => _) };
    println!("1 / 0 = {quotient}, says the handler");

    dune::leave();
    println!("after:  in Dune mode? {}", dune::is_inside());
    Ok(())
}
