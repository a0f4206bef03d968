//! `userfaultfd` with write protection: a second thread reads the faults, remembers the pages
//! and gives the right back.
#![expect(unsafe_code, reason = "userfaultfd's ioctls")]

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::Way;
use super::region::{PAGE, Region};

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
pub(super) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const MODE_WP: u64 = 1;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
pub(super) const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const MESSAGE: usize = 32;
/// Where `struct uffd_msg` has the address of a page fault.
const ADDRESS: core::ops::Range<usize> = 16..24;

/// See the module documentation.
pub(super) struct Uffd {
    file: Arc<File>,
    start: u64,
    bytes: u64,
    found: Arc<Mutex<Vec<u64>>>,
    thread: Option<JoinHandle<()>>,
    /// A page outside the range that ends the thread by a fault.
    last: Region,
}

impl Uffd {
    pub(super) fn new(region: &Region) -> Result<Self, String> {
        let file = Arc::new(open(FEATURE_PAGEFAULT_FLAG_WP)?);
        let last = Region::new(PAGE);
        for range in [region, &last] {
            register(&file, range)?;
        }
        let found = Arc::new(Mutex::new(Vec::with_capacity(region.pages())));
        let thread = {
            let (file, found) = (Arc::clone(&file), Arc::clone(&found));
            let last = last.start() as u64;
            std::thread::spawn(move || resolve(&file, &found, last))
        };
        Ok(Self {
            file,
            start: region.start() as u64,
            bytes: region.bytes() as u64,
            found,
            thread: Some(thread),
            last,
        })
    }
}

/// A new userfaultfd with these features.
pub(super) fn open(features: u64) -> Result<File, String> {
    // SAFETY: opens a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return Err(format!("userfaultfd: {error}"));
    }
    // SAFETY: a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd as libc::c_int) };
    request(&file, UFFDIO_API, &mut [UFFD_API, features, 0])?;
    Ok(file)
}

/// Makes the region's pages known, so that they can be protected.
pub(super) fn register(file: &File, region: &Region) -> Result<(), String> {
    let (start, bytes) = (region.start() as u64, region.bytes() as u64);
    let mut argument = [start, bytes, REGISTER_MODE_WP, 0];
    request(file, UFFDIO_REGISTER, &mut argument)
}

/// Until the page `last` was written.
fn resolve(file: &File, found: &Mutex<Vec<u64>>, last: u64) {
    let mut message = [0; MESSAGE];
    let mut reader = file;
    while reader.read(&mut message).is_ok_and(|n| n == MESSAGE) {
        let Some(address) = message.get(ADDRESS).and_then(|bytes| bytes.try_into().ok()) else {
            return;
        };
        let page = u64::from_ne_bytes(address) & !(PAGE as u64 - 1);
        if let Ok(mut found) = found.lock() {
            found.push(page);
        }
        let _ = request(file, UFFDIO_WRITEPROTECT, &mut [page, PAGE as u64, 0]);
        if page == last {
            return;
        }
    }
}

pub(super) fn request(
    file: &File,
    number: libc::c_ulong,
    argument: &mut [u64],
) -> Result<(), String> {
    // SAFETY: the argument is as long as the request says.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, argument.as_mut_ptr()) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(format!("userfaultfd's request {number:#x}: {error}"));
    }
    Ok(())
}

impl Way for Uffd {
    fn arm(&mut self) {
        let mut argument = [self.start, self.bytes, MODE_WP];
        let _ = request(&self.file, UFFDIO_WRITEPROTECT, &mut argument);
    }

    fn collect(&mut self) -> usize {
        let Ok(mut found) = self.found.lock() else {
            return 0;
        };
        let mut bitmap = vec![0_u64; (self.bytes as usize).div_ceil(PAGE * 64)];
        for page in found.drain(..) {
            let number = (page - self.start) as usize / PAGE;
            bitmap[number / 64] |= 1 << (number % 64);
        }
        bitmap.iter().map(|word| word.count_ones() as usize).sum()
    }
}

impl Drop for Uffd {
    fn drop(&mut self) {
        // One more fault, which is the thread's last.
        let last = self.last.start() as u64;
        let _ = request(
            &self.file,
            UFFDIO_WRITEPROTECT,
            &mut [last, PAGE as u64, MODE_WP],
        );
        self.last.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = request(&self.file, UFFDIO_UNREGISTER, &mut [self.start, self.bytes]);
    }
}
