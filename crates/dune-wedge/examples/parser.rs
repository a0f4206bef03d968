//! A parser with a bug, in a compartment: hostile input ends the compartment and nothing else.
//!
//! `cargo build -p dune-wedge --examples`, then
//! `cargo dune lab -- target/debug/examples/parser`

use dune_wedge::{Compartment, CompartmentError, Gate};

/// What the parser may ask of its parent.
static LOG: Gate<u32, ()> = Gate::new("log");

/// Numbers with commas between them, at most eight. That there may be more, it forgot.
fn parse(input: &[u8]) -> Vec<u8> {
    let mut numbers = [0_u8; 8];
    let text = String::from_utf8_lossy(input);
    for (index, number) in text.split(',').enumerate() {
        LOG.call(index as u32);
        numbers[index] = number.trim().parse().unwrap_or(0);
    }
    numbers.to_vec()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune_wedge::start()?;
    dune::enter()?;
    let mut seen = 0;
    let mut compartment = Compartment::builder()
        .memory(256 << 10)
        .gate(&LOG, |index: u32| seen = seen.max(index))
        .build()?;
    for input in ["1, 2, 3", "1,2,3,4,5,6,7,8,9", "4, 5, 6"] {
        match compartment.run_bytes(parse, input.as_bytes(), 8) {
            Ok(numbers) => println!("{input:?}: {numbers:?}"),
            Err(CompartmentError::Panicked { message }) => println!("{input:?}: {message}"),
            Err(error) => println!("{input:?}: {error}"),
        }
    }
    drop(compartment);
    println!("the highest index that was reported: {seen}");
    Ok(())
}
