//! `userfaultfd` with write protection: another thread reads the faults and gives the right
//! back.
#![expect(unsafe_code, reason = "userfaultfd's ioctls")]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use super::protected::{Pages, Rights, open};
use crate::space::Space;

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
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
    /// Written to when the thread is to end.
    end: File,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    pages: Pages,
}

impl Userfault {
    pub(crate) fn new(space: &Space) -> Result<Self, String> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: opens a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let file = owned(fd as libc::c_int).map_err(|error| {
            format!(
                "userfaultfd is refused ({error}); it needs a kernel with CONFIG_USERFAULTFD \
                 from 5.11 on, and no seccomp filter against it"
            )
        })?;
        request(
            &file,
            UFFDIO_API,
            &mut [UFFD_API, FEATURE_PAGEFAULT_FLAG_WP, 0],
        )
        .map_err(|error| format!("this kernel's userfaultfd has no write protection ({error})"))?;
        // SAFETY: opens a descriptor.
        let end = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })
            .map_err(|error| error.to_string())?;
        let pages = Pages::new(space).map_err(|error| error.to_string())?;
        let inner = Arc::new(Inner { file, pages });
        let thread = {
            let inner = Arc::clone(&inner);
            let end = end.try_clone().map_err(|error| error.to_string())?;
            std::thread::Builder::new()
                .name("dune-gc-faults".to_owned())
                .spawn(move || resolve(&inner, &end))
                .map_err(|error| error.to_string())?
        };
        Ok(Self {
            inner,
            end,
            thread: Some(thread),
        })
    }
}

fn owned(fd: libc::c_int) -> io::Result<File> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Answers faults until the other descriptor becomes readable.
fn resolve(inner: &Inner, end: &File) {
    let poll = |file: &File| libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut files = [poll(&inner.file), poll(end)];
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
                open(inner, page..page + 1);
            }
        }
    }
}

impl Rights for Inner {
    fn pages(&self) -> &Pages {
        &self.pages
    }

    fn close(&self, start: usize, bytes: usize) -> bool {
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
        use std::io::Write as _;
        let _ = (&self.end).write_all(&1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
