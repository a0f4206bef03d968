//! What the tests share.

use dune_wedge::{Access, CompartmentError};

/// Starts the runtime, with the thread in Dune mode.
pub(crate) fn start() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
}

/// The run was ended by just this access.
#[track_caller]
pub(crate) fn assert_fault<T: std::fmt::Debug>(
    result: Result<T, CompartmentError>,
    expected: u64,
    how: Access,
) {
    match result {
        Err(CompartmentError::Fault {
            address, access, ..
        }) => {
            assert_eq!((address, access), (expected, how), "at {expected:#x}");
        }
        other => panic!("{expected:#x} {how}: {other:?}"),
    }
}
