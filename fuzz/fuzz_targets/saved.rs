#![no_main]

#[path = "../../crates/dune-sandbox/tests/invariants/saved.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| invariants::check_saved(bytes));
