//! Signal masks.
#![expect(unsafe_code, reason = "pthread_sigmask")]

use core::mem::MaybeUninit;
use core::ptr;

/// Runs something with every signal blocked: a thread that it makes starts so, and leaves the
/// program's signals to the program's threads.
pub(crate) fn with_all_blocked<R>(body: impl FnOnce() -> R) -> R {
    if cfg!(miri) {
        return body();
    }
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: initialises the set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: one set is valid, the other is filled.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    let result = body();
    // SAFETY: what was in force before.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    result
}
