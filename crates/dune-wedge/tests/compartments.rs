//! What a compartment computes, and how it ends.

use dune_wedge::{Compartment, CompartmentError};

fn a_function_runs_and_returns() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
    let mut compartment = Compartment::builder().build().unwrap();
    for n in 0..10_u64 {
        assert_eq!(compartment.run(|n: u64| n * n + 1, n).unwrap(), n * n + 1);
    }
    let r = compartment.run(
        |n: u64| {
            assert!(n != 3, "three: {n}");
            n
        },
        3,
    );
    println!("{r:?}");
    assert!(matches!(r, Err(CompartmentError::Panicked { .. })));
    let r = compartment.run_bytes(
        |input| format!("{:?}", String::from_utf8_lossy(input)).into_bytes(),
        b"hello",
        100,
    );
    println!("{r:?}");
    assert_eq!(r.unwrap(), b"\"hello\"");
}

dune_testing::tests! {
    ring0 a_function_runs_and_returns,
}
