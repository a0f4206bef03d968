//! A signal handler for as long as it is needed.
#![expect(unsafe_code, reason = "signal handlers are C functions")]

use core::mem;
use core::ptr;

/// A handler with `SA_SIGINFO`.
pub(crate) type Handler =
    unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// An installed handler; the one before comes back when this is dropped.
pub(crate) struct Installed {
    signal: libc::c_int,
    before: libc::sigaction,
}

impl Installed {
    /// Installs a handler.
    ///
    /// # Panics
    /// When the kernel refuses it, which it does only for signals that have no handlers.
    pub(crate) fn new(signal: libc::c_int, handler: Handler) -> Self {
        // SAFETY: all zeros is a valid sigaction: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: both structures are valid; the handler keeps to what handlers may do.
        let result = unsafe { libc::sigaction(signal, &raw const action, &raw mut before) };
        assert_eq!(result, 0, "the kernel refused a handler of signal {signal}");
        Self { signal, before }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // SAFETY: what was installed before.
        unsafe { libc::sigaction(self.signal, &raw const self.before, ptr::null_mut()) };
    }
}

/// Moves the instruction pointer that a handler returns to.
///
/// # Safety
/// `context` is what the kernel gave a handler with `SA_SIGINFO`, and the code at the new
/// place must be where the program can go on.
pub(crate) unsafe fn skip(context: *mut libc::c_void, bytes: i64) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the caller's promise.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RIP as usize] += bytes };
}
