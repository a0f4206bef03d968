//! Copies between the guard and the program's memory.
//!
//! The program's memory is at the same addresses in the guard's process, and
//! hostile: no Rust reference ever points into it. Every copy first asks the
//! area table whether the program itself may make the access, then takes one
//! of two ways:
//!
//! - **Private anonymous areas** are copied directly. Once mapped, only the
//!   guard can take such memory away, and does not while the copy holds the
//!   memory's lock, so the copy cannot fault.
//! - **Everything else** (shared memory and file mappings, which somebody may
//!   truncate under the copy, and device memory) goes through `process_vm_readv` and
//!   `process_vm_writev` on the guard's own process: the kernel makes the copy
//!   and says EFAULT where a direct access would raise SIGBUS.
//!
//! A copy that fails half-way may have written a part, as with the kernel's
//! own `copy_to_user`.

#![expect(unsafe_code, reason = "copies to and from user memory")]

use core::arch::asm;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use linux_raw_sys::general::{__NR_process_vm_readv, __NR_process_vm_writev};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::engine::Access;
use crate::host::{Errno, syscall};
use crate::peel::checks_pointers;
use crate::program::Memory;
use crate::range::{PAGE_SIZE, PageRange, UserRange};
use crate::vma::{Backing, Sharing};

/// Longest path with its final zero (`PATH_MAX`), in bytes.
pub const PATH_MAX: usize = 4096;

/// One piece of memory, as `readv` and `process_vm_readv` take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct IoVec {
    /// Address of the first byte.
    pub base: u64,
    /// Number of bytes.
    pub len: u64,
}

/// The program's memory, as its areas allow it to be reached.
#[derive(Clone, Copy, Debug)]
pub struct UserMemory<'a> {
    memory: &'a RwLock<Memory>,
    pid: u32,
}

impl<'a> UserMemory<'a> {
    /// The memory described by `memory`, of this process, whose id is `pid`.
    #[must_use]
    pub fn new(memory: &'a RwLock<Memory>, pid: u32) -> Self {
        Self { memory, pid }
    }

    /// Fills `buffer` from `addr`.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the program could not read all of it.
    pub fn read(self, addr: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        if buffer.is_empty() {
            return Ok(());
        }
        let way = self.way(addr, buffer.len(), Access::READ)?;
        let to = buffer.as_mut_ptr();
        match way {
            // SAFETY: `way` says that the source is mapped, readable and cannot
            // vanish as long as the lock in it is held; the destination is an exclusive slice of the
            // same length.
            Way::Direct(_unchanging) => unsafe {
                copy_bytes(
                    to,
                    core::ptr::with_exposed_provenance(addr as usize),
                    buffer.len(),
                );
            },
            // SAFETY: the kernel writes `buffer`, which is ours, and only it.
            Way::ByKernel => unsafe {
                by_kernel(
                    __NR_process_vm_readv,
                    self.pid,
                    to.expose_provenance(),
                    addr,
                    buffer.len(),
                )?;
            },
        }
        Ok(())
    }

    /// Stores `bytes` at `addr`.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the program could not write all of it.
    pub fn write(self, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
        if bytes.is_empty() {
            return Ok(());
        }
        let way = self.way(addr, bytes.len(), Access::WRITE)?;
        let from = bytes.as_ptr();
        match way {
            // SAFETY: `way` says that the destination is user memory that is
            // mapped, writable and cannot vanish as long as the lock in it is
            // held; no Rust object lives there.
            Way::Direct(_unchanging) => unsafe {
                copy_bytes(
                    core::ptr::with_exposed_provenance_mut(addr as usize),
                    from,
                    bytes.len(),
                );
            },
            // SAFETY: the kernel reads `bytes` and writes user memory only,
            // which `way` has checked.
            Way::ByKernel => unsafe {
                by_kernel(
                    __NR_process_vm_writev,
                    self.pid,
                    from.expose_provenance(),
                    addr,
                    bytes.len(),
                )?;
            },
        }
        Ok(())
    }

    /// Reads a structure.
    ///
    /// # Errors
    ///
    /// As [`UserMemory::read`].
    pub fn read_value<T: FromBytes + IntoBytes>(self, addr: u64) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.read(addr, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Stores a structure.
    ///
    /// # Errors
    ///
    /// As [`UserMemory::write`].
    pub fn write_value<T: IntoBytes + Immutable>(self, addr: u64, value: &T) -> Result<(), Errno> {
        self.write(addr, value.as_bytes())
    }

    /// Reads a string up to its final zero, which the result includes, of at
    /// most `max` bytes.
    ///
    /// # Errors
    ///
    /// As [`UserMemory::read_cstr_into`].
    pub fn read_cstr(self, addr: u64, max: usize) -> Result<Vec<u8>, Errno> {
        let mut text = Vec::new();
        let mut len = 256.min(max);
        loop {
            text.resize(len, 0);
            match self.read_cstr_into(addr, &mut text) {
                Ok(len) => {
                    text.truncate(len);
                    return Ok(text);
                }
                Err(Errno::ENAMETOOLONG) if len < max => len = (len * 16).min(max),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Reads a string with its final zero into `buffer` and returns its length
    /// with the zero.
    ///
    /// # Errors
    ///
    /// `EFAULT` if it runs into memory that the program cannot read,
    /// `ENAMETOOLONG` if there is no zero among the bytes that fit.
    pub fn read_cstr_into(self, addr: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut len = 0;
        while len < buffer.len() {
            let at = addr.checked_add(len as u64).ok_or(Errno::EFAULT)?;
            // To the end of the page: the next one may not be there. Start
            // small, for most strings are short.
            let rest_of_page = (PAGE_SIZE - at % PAGE_SIZE) as usize;
            let most = if len == 0 { 128 } else { PAGE_SIZE as usize };
            let end = len + rest_of_page.min(most).min(buffer.len() - len);
            self.read(at, &mut buffer[len..end])?;
            if let Some(zero) = buffer[len..end].iter().position(|&byte| byte == 0) {
                return Ok(len + zero + 1);
            }
            len = end;
        }
        Err(Errno::ENAMETOOLONG)
    }

    /// Reads `count` I/O vectors and checks that each lies in user memory.
    /// Lengths are cut so that their sum stays below 2 GiB, as the kernel
    /// does.
    ///
    /// # Errors
    ///
    /// `EINVAL` for more than 1,024 or a length above 2^63, `EFAULT` for
    /// addresses that are not the program's.
    pub fn read_iovecs(self, addr: u64, count: u64) -> Result<Vec<IoVec>, Errno> {
        const MAX_IOVECS: u64 = 1024;
        /// The kernel's `MAX_RW_COUNT`.
        const MAX_BYTES: u64 = 0x7fff_f000;
        if count > MAX_IOVECS {
            return Err(Errno::EINVAL);
        }
        let mut vecs = vec![IoVec { base: 0, len: 0 }; count as usize];
        self.read(addr, vecs.as_mut_bytes())?;
        let mut left = MAX_BYTES;
        for vec in &mut vecs {
            if i64::try_from(vec.len).is_err() {
                return Err(Errno::EINVAL);
            }
            vec.len = vec.len.min(left);
            left -= vec.len;
            if vec.len == 0 {
                vec.base = 0;
            } else {
                match UserRange::new(vec.base, vec.len) {
                    // They may be for reading into.
                    Some(range) => self.lock().note_write(self.pid, range)?,
                    None if checks_pointers() => return Err(Errno::EFAULT),
                    None => {}
                }
            }
        }
        Ok(vecs)
    }

    fn lock(self) -> RwLockReadGuard<'a, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides how to reach `len` bytes at `addr`, which is not empty.
    fn way(self, addr: u64, len: usize, access: Access) -> Result<Way<'a>, Errno> {
        let range = UserRange::new(addr, len as u64).ok_or(Errno::EFAULT)?;
        let pages = PageRange::covering(range).ok_or(Errno::EFAULT)?;
        let memory = self.lock();
        let mut by_kernel = false;
        let allowed = memory.areas.all(pages, |attributes| {
            if attributes.backing == Backing::File || attributes.sharing == Sharing::Shared {
                by_kernel = true;
            }
            attributes.effective_access().contains(access)
        });
        if allowed && access.contains(Access::WRITE) {
            memory.note_write(self.pid, range)?;
        }
        match (allowed, by_kernel) {
            (false, _) => Err(Errno::EFAULT),
            (true, false) => Ok(Way::Direct(memory)),
            // The kernel looks for itself, at what is there by then: user
            // memory or nothing.
            (true, true) => Ok(Way::ByKernel),
        }
    }
}

/// Copies `buffer.len()` bytes of user memory at `addr`, of this process, whose
/// id is `pid`, by the kernel.
///
/// # Errors
///
/// `EFAULT` if not all of it can be read.
pub(crate) fn copy_by_kernel(pid: u32, addr: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    UserRange::new(addr, buffer.len() as u64).ok_or(Errno::EFAULT)?;
    let to = buffer.as_mut_ptr().expose_provenance();
    // SAFETY: the kernel writes `buffer`, which is ours, and only it.
    unsafe { by_kernel(__NR_process_vm_readv, pid, to, addr, buffer.len()) }
}

/// Has the kernel store `bytes` at `addr` in user memory of this process, whose
/// id is `pid`.
///
/// # Errors
///
/// `EFAULT` if not all of it can be written.
pub(crate) fn write_by_kernel(pid: u32, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    UserRange::new(addr, bytes.len() as u64).ok_or(Errno::EFAULT)?;
    let from = bytes.as_ptr().expose_provenance();
    // SAFETY: the kernel reads `bytes` and writes user memory only.
    unsafe { by_kernel(__NR_process_vm_writev, pid, from, addr, bytes.len()) }
}

/// The contents of a page.
pub(crate) type Page = [u8; PAGE_SIZE as usize];

/// Copies a page of any user memory away; as [`copy_by_kernel`].
pub(crate) fn copy_page_by_kernel(pid: u32, page: u64, to: &mut Page) -> Result<(), Errno> {
    copy_by_kernel(pid, page, to)
}

/// Panics unless `page` is that of a page that user memory may have.
fn check_page(page: u64) {
    assert!(
        PageRange::new(page, PAGE_SIZE).is_some(),
        "{page:#x} is no page of user memory"
    );
}

/// Copies a page away. The caller knows by the table of areas, whose lock it
/// holds, that it is private anonymous memory that can be read.
///
/// # Panics
///
/// If it is no page of user memory.
pub(crate) fn load_page(page: u64, to: &mut Page) {
    check_page(page);
    let from = core::ptr::with_exposed_provenance(page as usize);
    // SAFETY: user memory by the check, mapped and readable as the caller says.
    unsafe { copy_words(to.as_mut_ptr(), from) };
}

/// Fills a page. The caller knows by the table of areas, whose lock it holds,
/// that it is private anonymous memory that can be written.
///
/// # Panics
///
/// If it is no page of user memory.
pub(crate) fn store_page(page: u64, from: &Page) {
    check_page(page);
    let to = core::ptr::with_exposed_provenance_mut(page as usize);
    // SAFETY: user memory by the check, mapped and writable as the caller says;
    // no Rust object lives there.
    unsafe { copy_words(to, from.as_ptr()) };
}

/// Whether a page, of which the caller knows as for [`load_page`], holds
/// `expected`.
pub(crate) fn page_equals(page: u64, expected: &Page) -> bool {
    check_page(page);
    let differ: u64;
    // SAFETY: both are 4096 bytes that can be read, as above; the direction
    // flag is clear by the ABI.
    unsafe {
        asm!(
            "cmp rax, rax",
            "repe cmpsq",
            "setne al",
            "movzx eax, al",
            inout("rax") 0_u64 => differ,
            inout("rcx") PAGE_SIZE / 8 => _,
            inout("rsi") page => _,
            inout("rdi") expected.as_ptr() => _,
            options(nostack, readonly),
        );
    }
    differ == 0
}

/// Copies a page by words; as [`copy_bytes`], for less than a tenth of the
/// instructions where those are counted one by one.
///
/// # Safety
///
/// As for [`copy_bytes`], for 4096 bytes each.
unsafe fn copy_words(to: *mut u8, from: *const u8) {
    // SAFETY: as the caller says. The direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep movsq",
            inout("rcx") PAGE_SIZE / 8 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Has the kernel copy between `local` (the guard's) and `remote` (the
/// program's).
///
/// # Safety
///
/// `local` must be `len` bytes that the call `nr` may access: written for
/// `process_vm_readv`, read for `process_vm_writev`; `remote` must be user
/// memory.
unsafe fn by_kernel(nr: u32, pid: u32, local: usize, remote: u64, len: usize) -> Result<(), Errno> {
    let local = IoVec {
        base: local as u64,
        len: len as u64,
    };
    let remote = IoVec {
        base: remote,
        len: len as u64,
    };
    let args = [
        u64::from(pid),
        (&raw const local).expose_provenance() as u64,
        1,
        (&raw const remote).expose_provenance() as u64,
        1,
        0,
    ];
    // SAFETY: the caller's promise, and two vectors that live in this frame.
    let copied = unsafe { syscall(nr, args) }.map_err(|_| Errno::EFAULT)?;
    if copied == len as u64 {
        Ok(())
    } else {
        Err(Errno::EFAULT)
    }
}

enum Way<'a> {
    /// Nothing is unmapped while this is held.
    Direct(RwLockReadGuard<'a, Memory>),
    ByKernel,
}

/// Copies `len` bytes in one instruction that the compiler knows nothing
/// about: the program's side may change while it runs, and no assumption about
/// its contents may be made.
///
/// # Safety
///
/// Both ranges must be mapped with the rights needed, and the destination must
/// hold nothing that Rust code assumes constant.
unsafe fn copy_bytes(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: as the caller says. The direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::UserPages;

    #[test]
    fn copies_go_where_the_areas_allow() {
        let pages = UserPages::anonymous(2);
        let memory = UserMemory::new(&pages.memory, std::process::id());
        memory.write(pages.start() + 4090, b"hello, page").unwrap();
        let mut back = [0; 11];
        memory.read(pages.start() + 4090, &mut back).unwrap();
        assert_eq!(&back, b"hello, page");
        let past = pages.start() + 2 * PAGE_SIZE - 3;
        assert_eq!(memory.write(past, b"abcd"), Err(Errno::EFAULT));
        assert_eq!(memory.read(past, &mut [0; 4]), Err(Errno::EFAULT));
    }

    #[test]
    fn the_guards_own_memory_is_not_user_memory() {
        let areas = RwLock::default();
        let memory = UserMemory::new(&areas, std::process::id());
        let mine = 7_u64;
        let addr = (&raw const mine).expose_provenance() as u64;
        assert_eq!(memory.read_value::<u64>(addr), Err(Errno::EFAULT));
        assert_eq!(memory.write_value(addr, &1_u64), Err(Errno::EFAULT));
        assert_eq!(memory.read_cstr(addr, 10), Err(Errno::EFAULT));
    }

    #[test]
    fn a_truncated_file_is_a_fault_not_a_signal() {
        let pages = UserPages::file(2, 1);
        let memory = UserMemory::new(&pages.memory, std::process::id());
        assert!(memory.read(pages.start(), &mut [0; 8]).is_ok());
        assert_eq!(
            memory.read(pages.start() + PAGE_SIZE, &mut [0; 8]),
            Err(Errno::EFAULT)
        );
        assert_eq!(
            memory.write(pages.start() + PAGE_SIZE, &[0; 8]),
            Err(Errno::EFAULT)
        );
    }

    #[test]
    fn strings_end_at_their_zero_or_at_a_fault() {
        let pages = UserPages::anonymous(1);
        let memory = UserMemory::new(&pages.memory, std::process::id());
        let end = pages.start() + PAGE_SIZE;
        memory.write(end - 4, b"abc\0").unwrap();
        assert_eq!(memory.read_cstr(end - 4, 4096).unwrap(), b"abc\0");
        memory.write(end - 1, b"d").unwrap();
        assert_eq!(memory.read_cstr(end - 4, 4096), Err(Errno::EFAULT));
        assert_eq!(memory.read_cstr(end - 4, 4), Err(Errno::ENAMETOOLONG));
        memory.write(pages.start(), &[b'x'; 300]).unwrap();
        assert_eq!(memory.read_cstr(pages.start(), 4096).unwrap().len(), 301);
    }

    #[test]
    fn vectors_are_copied_and_each_is_checked() {
        let pages = UserPages::anonymous(1);
        let memory = UserMemory::new(&pages.memory, std::process::id());
        let mine = 0_u64;
        let guard = (&raw const mine).expose_provenance() as u64;
        let put = |vecs: &[IoVec]| memory.write(pages.start(), vecs.as_bytes()).unwrap();
        put(&[
            IoVec {
                base: pages.start(),
                len: 8,
            },
            IoVec {
                base: guard,
                len: 8,
            },
        ]);
        assert_eq!(memory.read_iovecs(pages.start(), 2), Err(Errno::EFAULT));
        assert_eq!(memory.read_iovecs(pages.start(), 1).unwrap().len(), 1);
        put(&[
            IoVec {
                base: guard,
                len: 0,
            },
            IoVec {
                base: pages.start(),
                len: u64::MAX,
            },
        ]);
        assert_eq!(memory.read_iovecs(pages.start(), 2), Err(Errno::EINVAL));
        put(&[
            IoVec {
                base: guard,
                len: 0,
            },
            IoVec {
                base: pages.start(),
                len: 1 << 40,
            },
        ]);
        let vecs = memory.read_iovecs(pages.start(), 2).unwrap();
        assert_eq!((vecs[0].base, vecs[1].len), (0, 0x7fff_f000));
        assert_eq!(memory.read_iovecs(pages.start(), 1025), Err(Errno::EINVAL));
    }
}
