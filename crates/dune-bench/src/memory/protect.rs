//! `mprotect` and `SIGSEGV`: the handler remembers the page and gives the right back.
#![expect(unsafe_code, reason = "protects the region, handles the signal")]

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::Way;
use super::region::{PAGE, Region};
use crate::crossings::signal::Installed;

/// The region, for the handler: its start and length.
static START: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
/// A bit for each page, as many as the largest region has.
static WRITTEN: [AtomicU64; 1 << 14] = [const { AtomicU64::new(0) }; 1 << 14];

unsafe extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _: *mut libc::c_void,
) {
    // SAFETY: what the kernel gave the handler.
    let info = unsafe { &*info };
    // SAFETY: of a page fault, which has an address.
    let address = unsafe { info.si_addr() } as usize;
    let offset = address.wrapping_sub(START.load(Ordering::Relaxed));
    if offset >= BYTES.load(Ordering::Relaxed) {
        // SAFETY: somebody else's fault ends the program as it would have.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    let page = offset / PAGE;
    if let Some(word) = WRITTEN.get(page / 64) {
        word.fetch_or(1 << (page % 64), Ordering::Relaxed);
    }
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a page of the region.
    unsafe { libc::mprotect((address & !(PAGE - 1)) as *mut _, PAGE, rights) };
}

/// See the module documentation.
pub(super) struct Protect {
    _handler: Installed,
}

impl Protect {
    pub(super) fn new(region: &Region) -> Result<Self, String> {
        if region.pages() > WRITTEN.len() * 64 {
            return Err("the range is too large for this benchmark".to_owned());
        }
        START.store(region.start() as usize, Ordering::Relaxed);
        BYTES.store(region.bytes(), Ordering::Relaxed);
        Ok(Self {
            _handler: Installed::new(libc::SIGSEGV, on_fault),
        })
    }
}

fn protect_all(rights: libc::c_int) {
    let start = START.load(Ordering::Relaxed) as *mut _;
    // SAFETY: the region, whose faults are handled.
    unsafe { libc::mprotect(start, BYTES.load(Ordering::Relaxed), rights) };
}

impl Way for Protect {
    fn arm(&mut self) {
        protect_all(libc::PROT_READ);
    }

    fn collect(&mut self) -> usize {
        let words = BYTES.load(Ordering::Relaxed).div_ceil(PAGE * 64);
        let taken = WRITTEN.iter().take(words);
        taken
            .map(|word| word.swap(0, Ordering::Relaxed).count_ones() as usize)
            .sum()
    }
}

impl Drop for Protect {
    fn drop(&mut self) {
        protect_all(libc::PROT_READ | libc::PROT_WRITE);
    }
}
