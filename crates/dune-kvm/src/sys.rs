//! Raw system calls: no libc, no `errno`, no lock, no allocation.
//!
//! The host side of a thread shares the thread's TLS with the code that runs in the guest,
//! so a libc wrapper called between an exit and the next entry would change `errno` between
//! two instructions of the guest. Everything here goes straight to the kernel, and returns
//! what the kernel returned.
//!
//! Executed at ring 0 inside the guest, the same functions are forwarded like any other
//! system call, so code written against this module runs on both sides.
#![expect(unsafe_code, reason = "the system call instruction itself")]

use core::arch::asm;

/// An error number as the kernel returned it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// The operation was interrupted by a signal.
    pub const EINTR: Self = Self(4);
    /// Input or output error; for KVM: the VM belongs to another address space.
    pub const EIO: Self = Self(5);
    /// Try again.
    pub const EAGAIN: Self = Self(11);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Permission denied.
    pub const EACCES: Self = Self(13);
    /// Bad address.
    pub const EFAULT: Self = Self(14);
    /// Already exists.
    pub const EEXIST: Self = Self(17);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// Bad file descriptor.
    pub const EBADF: Self = Self(9);
    /// No such system call.
    pub const ENOSYS: Self = Self(38);

    /// The same error as the standard library's type.
    #[must_use]
    pub fn to_io(self) -> std::io::Error {
        std::io::Error::from_raw_os_error(self.0)
    }
}

impl core::fmt::Debug for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Errno({}: {})", self.0, self.to_io())
    }
}

impl core::fmt::Display for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.to_io())
    }
}

impl std::error::Error for Errno {}

/// System call numbers (Linux, x86-64) used by the host side.
pub mod nr {
    #![allow(missing_docs, reason = "the kernel's own names")]
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MPROTECT: usize = 10;
    pub const MUNMAP: usize = 11;
    pub const RT_SIGACTION: usize = 13;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const RT_SIGRETURN: usize = 15;
    pub const IOCTL: usize = 16;
    pub const SCHED_YIELD: usize = 24;
    pub const MINCORE: usize = 27;
    pub const MADVISE: usize = 28;
    pub const DUP2: usize = 33;
    pub const GETPID: usize = 39;
    pub const CLONE: usize = 56;
    pub const FORK: usize = 57;
    pub const VFORK: usize = 58;
    pub const EXIT: usize = 60;
    pub const FCNTL: usize = 72;
    pub const SIGALTSTACK: usize = 131;
    pub const ARCH_PRCTL: usize = 158;
    pub const GETTID: usize = 186;
    pub const EXIT_GROUP: usize = 231;
    pub const TGKILL: usize = 234;
    pub const OPENAT: usize = 257;
    pub const DUP3: usize = 292;
    pub const RT_TGSIGQUEUEINFO: usize = 297;
    pub const PROCESS_VM_READV: usize = 310;
    pub const PROCESS_VM_WRITEV: usize = 311;
    pub const GETRANDOM: usize = 318;
    pub const PKEY_MPROTECT: usize = 329;
    pub const PKEY_ALLOC: usize = 330;
    pub const RSEQ: usize = 334;
    pub const CLONE3: usize = 435;
    pub const CLOSE_RANGE: usize = 436;
}

/// Makes a system call and returns the register as the kernel left it: a value from
/// -4095 to -1 is an error.
///
/// # Safety
/// As for the system call itself: every pointer and length must be what the call expects.
#[inline(always)]
pub unsafe fn raw(number: usize, arguments: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the caller vouches for the call; the kernel clobbers rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Turns a raw result into a value or an error.
#[inline(always)]
pub const fn check(result: isize) -> Result<usize, Errno> {
    if result < 0 && result >= -4095 {
        Err(Errno(-result as i32))
    } else {
        Ok(result as usize)
    }
}

/// A system call whose result is checked.
///
/// # Safety
/// As for [`raw`].
#[inline(always)]
pub unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: forwarded to the caller.
    check(unsafe { raw(number, arguments) })
}

/// `ioctl` with a pointer or value argument.
///
/// # Safety
/// `argument` must be what `request` expects of it.
#[inline(always)]
pub unsafe fn ioctl(fd: i32, request: u64, argument: usize) -> Result<usize, Errno> {
    // SAFETY: forwarded to the caller.
    unsafe {
        call(
            nr::IOCTL,
            [fd as usize, request as usize, argument, 0, 0, 0],
        )
    }
}

/// As [`ioctl`], made again when a signal interrupts it: making a VM or a vCPU waits for locks
/// and gives up when a signal is pending.
///
/// # Safety
/// As [`ioctl`].
pub unsafe fn ioctl_uninterrupted(fd: i32, request: u64, argument: usize) -> Result<usize, Errno> {
    loop {
        // SAFETY: forwarded to the caller.
        match unsafe { ioctl(fd, request, argument) } {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Maps `length` bytes of private anonymous memory that is not reserved in advance.
///
/// # Errors
/// As `mmap(2)`.
pub fn map_anonymous(length: usize) -> Result<*mut u8, Errno> {
    const PROT_READ_WRITE: usize = 3;
    const MAP_PRIVATE_ANONYMOUS_NORESERVE: usize = 0x02 | 0x20 | 0x4000;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing of ours.
    let address = unsafe {
        call(
            nr::MMAP,
            [
                0,
                length,
                PROT_READ_WRITE,
                MAP_PRIVATE_ANONYMOUS_NORESERVE,
                usize::MAX,
                0,
            ],
        )
    }?;
    Ok(address as *mut u8)
}

/// Asks that a mapping never be backed by huge pages: for memory of which little is touched,
/// where clearing 2 MiB for the first byte would cost more than all the rest.
pub fn avoid_huge_pages(address: *mut u8, length: usize) {
    const MADV_NOHUGEPAGE: usize = 15;
    // SAFETY: advice changes no contents. Kernels without huge pages refuse it, rightly.
    let _ = unsafe {
        raw(
            nr::MADVISE,
            [address as usize, length, MADV_NOHUGEPAGE, 0, 0, 0],
        )
    };
}

/// Forbids all access to a range of memory: a guard page.
///
/// # Safety
/// Nothing may use the range any more.
pub unsafe fn forbid(address: *mut u8, length: usize) -> Result<(), Errno> {
    // SAFETY: forwarded to the caller.
    unsafe { call(nr::MPROTECT, [address as usize, length, 0, 0, 0, 0]) }.map(drop)
}

/// Unmaps memory.
///
/// # Safety
/// Nothing may use the range any more.
pub unsafe fn unmap(address: *mut u8, length: usize) -> Result<(), Errno> {
    // SAFETY: forwarded to the caller.
    unsafe { call(nr::MUNMAP, [address as usize, length, 0, 0, 0, 0]) }.map(drop)
}

/// Closes a descriptor; there is nothing sensible to do with an error.
pub fn close(fd: i32) {
    // SAFETY: closing a descriptor touches no memory. Whoever calls owns the descriptor.
    let _ = unsafe { raw(nr::CLOSE, [fd as usize, 0, 0, 0, 0, 0]) };
}

/// The process, from the kernel.
#[must_use]
pub fn getpid() -> i32 {
    // SAFETY: takes no argument and cannot fail.
    unsafe { raw(nr::GETPID, [0; 6]) as i32 }
}

/// The thread, from the kernel.
#[must_use]
pub fn gettid() -> i32 {
    // SAFETY: takes no argument and cannot fail.
    unsafe { raw(nr::GETTID, [0; 6]) as i32 }
}

/// Lets another thread run.
pub fn sched_yield() {
    // SAFETY: takes no argument.
    let _ = unsafe { raw(nr::SCHED_YIELD, [0; 6]) };
}

/// Whether the page that holds `address` is mapped in this process at all.
#[must_use]
pub fn is_mapped(address: u64) -> bool {
    let page = address & !0xfff;
    let mut residency = 0_u8;
    // SAFETY: mincore writes one byte for one page, and ENOMEM says "unmapped".
    unsafe {
        raw(
            nr::MINCORE,
            [page as usize, 4096, &raw mut residency as usize, 0, 0, 0],
        ) == 0
    }
}

/// Writes to standard error, for the last words of a process that cannot go on.
pub fn last_words(bytes: &[u8]) {
    // SAFETY: the slice is readable memory of the length given.
    let _ = unsafe {
        raw(
            nr::WRITE,
            [2, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0],
        )
    };
}

/// Reads memory of this process that may not be mapped.
///
/// # Errors
/// `EFAULT` where any byte cannot be read; then `into` may have been written in part.
pub fn read_memory(address: u64, into: &mut [u8]) -> Result<(), Errno> {
    transfer(nr::PROCESS_VM_READV, address, into.as_mut_ptr(), into.len())
}

/// Writes memory of this process that may not be mapped or writable.
///
/// # Errors
/// `EFAULT` where any byte cannot be written; then some may have been.
pub fn write_memory(address: u64, from: &[u8]) -> Result<(), Errno> {
    transfer(
        nr::PROCESS_VM_WRITEV,
        address,
        from.as_ptr().cast_mut(),
        from.len(),
    )
}

fn transfer(number: usize, address: u64, local: *mut u8, length: usize) -> Result<(), Errno> {
    let local = [local as usize, length];
    let remote = [address as usize, length];
    // SAFETY: the kernel checks the remote side and the local side is the caller's slice.
    let moved = unsafe {
        call(
            number,
            [
                getpid() as usize,
                local.as_ptr() as usize,
                1,
                remote.as_ptr() as usize,
                1,
                0,
            ],
        )
    }?;
    if moved == length {
        Ok(())
    } else {
        Err(Errno::EFAULT)
    }
}
