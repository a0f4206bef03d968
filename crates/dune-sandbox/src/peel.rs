//! What tests take away of the guard's protection, to see that the rest of it
//! holds. Without the feature `testing` there is nothing here that could be
//! taken away: the answers are constants.

#[cfg(feature = "testing")]
mod switches {
    use core::sync::atomic::{AtomicBool, Ordering};

    static NO_POINTER_CHECKS: AtomicBool = AtomicBool::new(false);
    static NO_WALL: AtomicBool = AtomicBool::new(false);

    pub(crate) fn skip_pointer_checks() {
        NO_POINTER_CHECKS.store(true, Ordering::Relaxed);
    }

    pub(crate) fn skip_wall() {
        NO_WALL.store(true, Ordering::Relaxed);
    }

    pub(crate) fn checks_pointers() -> bool {
        !NO_POINTER_CHECKS.load(Ordering::Relaxed)
    }

    pub(crate) fn has_wall() -> bool {
        !NO_WALL.load(Ordering::Relaxed)
    }
}

#[cfg(not(feature = "testing"))]
mod switches {
    /// Whether pointers of forwarded calls are checked.
    pub(crate) const fn checks_pointers() -> bool {
        true
    }

    /// Whether the wall of protection keys is used where the machine has them.
    pub(crate) const fn has_wall() -> bool {
        true
    }
}

pub(crate) use switches::{checks_pointers, has_wall};
#[cfg(feature = "testing")]
pub(crate) use switches::{skip_pointer_checks, skip_wall};
