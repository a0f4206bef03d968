//! `getauxval`: what the kernel told the program lies on the first thread's stack, which
//! compartments do not have. They have this copy.

use core::sync::atomic::{AtomicU64, Ordering};

/// Types of values are small numbers (`AT_*`, `uapi/linux/auxvec.h`).
const TYPES: usize = 64;

static VALUES: [AtomicU64; TYPES] = [const { AtomicU64::new(0) }; TYPES];

/// Makes the copy. Before the image is taken.
#[expect(unsafe_code, reason = "asks libc")]
pub(crate) fn remember() {
    for (kind, value) in VALUES.iter().enumerate() {
        // SAFETY: a question.
        value.store(unsafe { libc::getauxval(kind as u64) }, Ordering::Relaxed);
    }
}

pub(super) extern "C" fn getauxval(kind: u64) -> u64 {
    let index = usize::try_from(kind).unwrap_or(TYPES);
    VALUES
        .get(index)
        .map_or(0, |value| value.load(Ordering::Relaxed))
}
