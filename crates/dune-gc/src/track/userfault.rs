//! `userfaultfd` with write protection: another thread reads the faults and gives the right
//! back.
//!
//! A page that has no memory yet must be protected too (a large object may have some that were
//! never touched). Kernels from 6.4 on do that if asked; before, such a page is given memory
//! first, by reading it.
#![expect(unsafe_code, reason = "userfaultfd's ioctls")]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::protected::{Pages, Rights, open};
use crate::space::Space;

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const REGISTER_MODE_WP: u64 = 2;
const MODE_WP: u64 = 1;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
/// Bytes of `struct uffd_msg`, and where it says what it is and the address of a fault.
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;
const ADDRESS: core::ops::Range<usize> = 16..24;

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Userfault {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
    generation: u32,
}

#[derive(Debug)]
struct Inner {
    file: File,
    /// Written to when the thread is to end.
    end: File,
    /// The kernel protects pages without memory, too.
    protects_unpopulated: AtomicBool,
    pages: Pages,
}

impl Userfault {
    pub(crate) fn new(space: &Space) -> Result<Self, String> {
        let (file, protects_unpopulated) = connect()?;
        let end = event().map_err(|error| error.to_string())?;
        let pages = Pages::new(space).map_err(|error| error.to_string())?;
        let inner = Arc::new(Inner {
            file,
            end,
            protects_unpopulated: AtomicBool::new(protects_unpopulated),
            pages,
        });
        let thread = start(&inner)?;
        Ok(Self {
            inner,
            thread: Mutex::new(Some(thread)),
            generation: crate::fork::generation(),
        })
    }
}

/// A descriptor that can protect, and whether it also protects what has no memory.
fn connect() -> Result<(File, bool), String> {
    let file = create()?;
    let without = |error| format!("this kernel's userfaultfd has no write protection ({error})");
    // A descriptor is asked once: this one says what there is.
    let mut features = [UFFD_API, 0, 0];
    request(&file, UFFDIO_API, &mut features).map_err(without)?;
    let [_, has, _] = features;
    let wanted = FEATURE_PAGEFAULT_FLAG_WP | (has & FEATURE_WP_UNPOPULATED);
    let file = create()?;
    request(&file, UFFDIO_API, &mut [UFFD_API, wanted, 0]).map_err(without)?;
    Ok((file, wanted & FEATURE_WP_UNPOPULATED != 0))
}

fn create() -> Result<File, String> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: opens a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(fd as libc::c_int).map_err(|error| {
        format!(
            "userfaultfd is refused ({error}); it needs a kernel with CONFIG_USERFAULTFD \
             from 5.11 on, and no seccomp filter against it"
        )
    })
}

fn event() -> io::Result<File> {
    // SAFETY: opens a descriptor.
    owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })
}

fn start(inner: &Arc<Inner>) -> Result<JoinHandle<()>, String> {
    let inner = Arc::clone(inner);
    // The program's signals are for the program's threads.
    crate::signals::with_all_blocked(|| {
        std::thread::Builder::new()
            .name("dune-gc-faults".to_owned())
            .spawn(move || resolve(&inner))
            .map_err(|error| error.to_string())
    })
}

fn owned(fd: libc::c_int) -> io::Result<File> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Answers faults until the other descriptor becomes readable.
fn resolve(inner: &Inner) {
    let poll = |file: &File| libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut files = [poll(&inner.file), poll(&inner.end)];
    loop {
        // SAFETY: two entries.
        let count = unsafe { libc::poll(files.as_mut_ptr(), 2, -1) };
        if count < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            crate::heap::fatal("cannot wait for userfaultfd's messages");
        }
        if files[1].revents != 0 {
            return;
        }
        let mut message = [0; MESSAGE];
        while (&inner.file)
            .read(&mut message)
            .is_ok_and(|read| read == MESSAGE)
        {
            let [event, ..] = message;
            let address = message.get(ADDRESS).and_then(|bytes| bytes.try_into().ok());
            let (EVENT_PAGEFAULT, Some(address)) = (event, address) else {
                continue;
            };
            let address = u64::from_ne_bytes(address) as usize;
            if let Some(page) = inner.pages.page_of(address) {
                inner.pages.traps.fetch_add(1, Ordering::Relaxed);
                if !open(inner, page..page + 1) {
                    // The thread that wrote would wait for ever.
                    crate::heap::fatal("userfaultfd does not give a page back");
                }
            }
        }
    }
}

impl Inner {
    /// Gives memory to pages that have none; reading them is enough.
    fn populate(&self, start: usize, bytes: usize) {
        const MADV_POPULATE_READ: libc::c_int = 22;
        // SAFETY: pages of a heap; it changes no byte.
        if unsafe { libc::madvise(start as *mut _, bytes, MADV_POPULATE_READ) } == 0 {
            return;
        }
        for page in (start..start + bytes).step_by(crate::layout::PAGE) {
            // SAFETY: a readable byte of the heap; as an atomic, as others may write to it.
            let byte = unsafe { core::sync::atomic::AtomicU8::from_ptr(page as *mut u8) };
            core::hint::black_box(byte.load(Ordering::Relaxed));
        }
    }
}

impl Rights for Inner {
    fn pages(&self) -> &Pages {
        &self.pages
    }

    fn close(&self, start: usize, bytes: usize) -> bool {
        if !self.protects_unpopulated.load(Ordering::Relaxed) {
            self.populate(start, bytes);
        }
        let mut argument = [start as u64, bytes as u64, MODE_WP];
        request(&self.file, UFFDIO_WRITEPROTECT, &mut argument).is_ok()
    }

    fn open(&self, start: usize, bytes: usize) -> bool {
        let mut argument = [start as u64, bytes as u64, 0];
        request(&self.file, UFFDIO_WRITEPROTECT, &mut argument).is_ok()
    }

    fn cover(&self, start: usize, end: usize) -> Result<(), String> {
        let mut argument = [start as u64, (end - start) as u64, REGISTER_MODE_WP, 0];
        request(&self.file, UFFDIO_REGISTER, &mut argument)
            .map_err(|error| format!("userfaultfd refuses a part of the heap ({error})"))
    }

    /// The parent's descriptors speak of the parent's memory: others take their numbers.
    fn renew(&self, start: usize, bytes: usize) -> Result<(), String> {
        let (file, protects_unpopulated) = connect()?;
        let end = event().map_err(|error| error.to_string())?;
        for (new, old) in [(&file, &self.file), (&end, &self.end)] {
            // SAFETY: closes and replaces a descriptor that is this object's.
            let result = unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) };
            if result < 0 {
                return Err(io::Error::last_os_error().to_string());
            }
        }
        (self.protects_unpopulated).store(protects_unpopulated, Ordering::Relaxed);
        if bytes == 0 {
            return Ok(());
        }
        self.cover(start, start + bytes)
    }
}

impl Rights for Userfault {
    fn pages(&self) -> &Pages {
        &self.inner.pages
    }

    fn close(&self, start: usize, bytes: usize) -> bool {
        self.inner.close(start, bytes)
    }

    fn open(&self, start: usize, bytes: usize) -> bool {
        self.inner.open(start, bytes)
    }

    fn cover(&self, start: usize, end: usize) -> Result<(), String> {
        self.inner.cover(start, end)
    }

    fn renew(&self, start: usize, bytes: usize) -> Result<(), String> {
        self.inner.renew(start, bytes)?;
        let thread = self::start(&self.inner)?;
        let mut place = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // The parent's: there is no such thread here.
        core::mem::forget(place.replace(thread));
        Ok(())
    }
}

fn request(file: &File, number: libc::c_ulong, argument: &mut [u64]) -> io::Result<()> {
    loop {
        // SAFETY: the argument is as long as the request says.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), number, argument.as_mut_ptr()) };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // The map of the process changes at this moment.
        if error.raw_os_error() != Some(libc::EAGAIN) {
            return Err(error);
        }
    }
}

impl Drop for Userfault {
    fn drop(&mut self) {
        if self.generation != crate::fork::generation() {
            // In a child that did not renew it: the descriptors are shared with the parent's
            // thread, which must not end.
            return;
        }
        let _ = (&self.inner.end).write_all(&1_u64.to_ne_bytes());
        let mut place = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = place.take() {
            let _ = thread.join();
        }
    }
}
