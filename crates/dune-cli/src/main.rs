//! The dune command.
fn main() {}
