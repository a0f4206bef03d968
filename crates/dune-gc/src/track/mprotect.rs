//! `mprotect` and `SIGSEGV`.
#![expect(unsafe_code, reason = "changes rights, handles a signal")]

use core::cell::UnsafeCell;
use core::mem::{self, MaybeUninit};
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};
use std::sync::Once;

use super::protected::{Pages, Rights, open};
use crate::space::Space;

/// Heaps that can be protected at the same time.
const MOST: usize = 64;

/// The heaps, for the handler. An entry is never reused for another heap while the handler
/// may look at the old one: it stays allocated.
static HEAPS: [AtomicPtr<Pages>; MOST] = [const { AtomicPtr::new(ptr::null_mut()) }; MOST];

/// What was to happen at a `SIGSEGV` before.
static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::uninit()));

struct Before(UnsafeCell<MaybeUninit<libc::sigaction>>);
// SAFETY: written once, before the handler that reads it is installed.
unsafe impl Sync for Before {}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Mprotect {
    /// Never freed: a handler may look at it.
    pages: &'static Pages,
    entry: &'static AtomicPtr<Pages>,
}

impl Mprotect {
    pub(crate) fn new(space: &Space) -> Result<Self, String> {
        install_handler();
        let pages = Pages::new(space).map_err(|error| error.to_string())?;
        let pages: &'static Pages = Box::leak(Box::new(pages));
        for entry in &HEAPS {
            let new = ptr::from_ref(pages).cast_mut();
            let free = ptr::null_mut();
            if (entry.compare_exchange(free, new, Ordering::SeqCst, Ordering::SeqCst)).is_ok() {
                return Ok(Self { pages, entry });
            }
        }
        Err(format!("{MOST} heaps are protected already"))
    }
}

impl Drop for Mprotect {
    fn drop(&mut self) {
        self.entry.store(ptr::null_mut(), Ordering::SeqCst);
    }
}

impl Rights for Mprotect {
    fn pages(&self) -> &Pages {
        self.pages
    }

    fn close(&self, start: usize, bytes: usize) -> bool {
        protect(start, bytes, libc::PROT_READ)
    }

    fn open(&self, start: usize, bytes: usize) -> bool {
        protect(start, bytes, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn renew(&self, start: usize, bytes: usize) -> Result<(), String> {
        if bytes == 0 || self.open(start, bytes) {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error().to_string())
        }
    }
}

/// As [`Mprotect`], for the handler, which has no other.
#[derive(Debug)]
struct InHandler(&'static Pages);

impl Rights for InHandler {
    fn pages(&self) -> &Pages {
        self.0
    }

    fn close(&self, _: usize, _: usize) -> bool {
        false
    }

    fn open(&self, start: usize, bytes: usize) -> bool {
        protect(start, bytes, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn renew(&self, _: usize, _: usize) -> Result<(), String> {
        Ok(())
    }
}

fn protect(start: usize, bytes: usize, rights: libc::c_int) -> bool {
    // SAFETY: pages of a heap, whose loss of rights the handler makes good.
    unsafe { libc::mprotect(start as *mut _, bytes, rights) == 0 }
}

fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: zero is a value of the structure.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        // Nothing may stop the thread on the alternate stack, where its registers would not
        // be found: every signal waits until the handler is done.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: fills the set of the local structure.
        unsafe { libc::sigfillset(&raw mut action.sa_mask) };
        let before = BEFORE.0.get().cast();
        // SAFETY: valid pointers; the handler does not run before this has returned, unless
        // for a fault that ends the process anyway.
        unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, before) };
    });
}

unsafe extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    const SEGV_ACCERR: libc::c_int = 2;
    /// Of the error code of a page fault: it was a write.
    const WRITE: libc::greg_t = 2;
    // SAFETY: what the kernel gave the handler.
    let reason = unsafe { (*info).si_code };
    // SAFETY: as above.
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let error_code = registers.get(libc::REG_ERR as usize).copied().unwrap_or(0);
    if reason == SEGV_ACCERR && error_code & WRITE != 0 {
        // SAFETY: as above.
        let info = unsafe { &*info };
        // SAFETY: of a page fault, which has an address.
        let address = unsafe { info.si_addr() } as usize;
        // SAFETY: the thread's own.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let before = unsafe { *errno };
        let is_opened = open_page(address);
        // SAFETY: as above.
        unsafe { *errno = before };
        if is_opened {
            return;
        }
    }
    let before = BEFORE.0.get().cast::<libc::sigaction>();
    // SAFETY: written before the handler was installed.
    let before = unsafe { &*before };
    pass_on(before, signal, info, context);
}

/// Opens the page of a heap that holds the address; whether it is one.
fn open_page(address: usize) -> bool {
    for entry in &HEAPS {
        // SAFETY: null, or a description that is never freed.
        let Some(pages) = (unsafe { entry.load(Ordering::SeqCst).as_ref() }) else {
            continue;
        };
        let Some(page) = pages.page_of(address) else {
            continue;
        };
        pages.traps.fetch_add(1, Ordering::Relaxed);
        // Also where another thread has opened it meanwhile: it does no harm.
        return open(&InHandler(pages), page..page + 1);
    }
    false
}

fn pass_on(
    before: &libc::sigaction,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let handler = before.sa_sigaction;
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // The instruction faults again, and the process ends as it would have.
        // SAFETY: the default action of the signal.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else if before.sa_flags & libc::SA_SIGINFO != 0 {
        type Handler = unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: installed with SA_SIGINFO, so it has this type.
        let handler = unsafe { mem::transmute::<usize, Handler>(handler) };
        // SAFETY: what the kernel would have given it.
        unsafe { handler(signal, info, context) };
    } else {
        // SAFETY: installed without SA_SIGINFO, so it has this type.
        let handler =
            unsafe { mem::transmute::<usize, unsafe extern "C" fn(libc::c_int)>(handler) };
        // SAFETY: what the kernel would have given it.
        unsafe { handler(signal) };
    }
}
