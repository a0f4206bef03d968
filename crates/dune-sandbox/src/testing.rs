//! Helpers of this crate's unit tests: real memory in the user's part of the
//! address space.

#![expect(unsafe_code, reason = "tests map user memory by hand")]

use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};

use linux_raw_sys::general;

use crate::engine::Access;
use crate::host::syscall;
use crate::program::Memory;
use crate::range::{PAGE_SIZE, PageRange};
use crate::vma::{Areas, Attributes, Backing, Sharing};

/// Where the next test maps: tests run in parallel in one process.
static NEXT: AtomicU64 = AtomicU64::new(0x1000_0000_0000);

/// Mapped pages and the areas that describe them; unmapped when dropped.
pub(crate) struct UserPages {
    pub(crate) memory: RwLock<Memory>,
    range: PageRange,
}

impl UserPages {
    /// `count` anonymous pages that can be read and written.
    pub(crate) fn anonymous(count: u64) -> Self {
        Self::map(count, None)
    }

    /// `count` pages, shared, of a file that has only `in_file` of them.
    pub(crate) fn file(count: u64, in_file: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(in_file * PAGE_SIZE).unwrap();
        Self::map(count, Some(&file))
    }

    pub(crate) fn start(&self) -> u64 {
        self.range.start()
    }

    fn map(count: u64, file: Option<&std::fs::File>) -> Self {
        use std::os::fd::AsRawFd;
        let start = NEXT.fetch_add(1 << 30, Ordering::SeqCst);
        let range = PageRange::new(start, count * PAGE_SIZE).unwrap();
        let (kind, fd) = match file {
            None => (general::MAP_PRIVATE | general::MAP_ANONYMOUS, u64::MAX),
            Some(file) => (general::MAP_SHARED, file.as_raw_fd() as u64),
        };
        let flags = u64::from(kind | general::MAP_FIXED_NOREPLACE);
        let prot = u64::from(general::PROT_READ | general::PROT_WRITE);
        // SAFETY: a new mapping where there is none.
        unsafe { syscall(general::__NR_mmap, [start, range.len(), prot, flags, fd, 0]) }.unwrap();
        let mut areas = Areas::new();
        areas.map(
            range,
            Attributes {
                access: Access::READ | Access::WRITE,
                sharing: if file.is_some() {
                    Sharing::Shared
                } else {
                    Sharing::Private
                },
                backing: if file.is_some() {
                    Backing::File
                } else {
                    Backing::Anonymous
                },
            },
        );
        Self {
            memory: RwLock::new(Memory::new(areas)),
            range,
        }
    }
}

impl Drop for UserPages {
    fn drop(&mut self) {
        let args = [self.range.start(), self.range.len(), 0, 0, 0, 0];
        // SAFETY: the pages mapped above, which nothing refers to any more.
        let _ = unsafe { syscall(general::__NR_munmap, args) };
    }
}

/// A guard over the mock engine, without a program.
pub(crate) fn guard() -> crate::guard::Guard {
    crate::guard::Guard::new(
        Box::new(crate::engine::mock::MockEngine::new()),
        crate::signal::Dispositions::new(),
        crate::signal::ThreadSignals::default(),
    )
}
