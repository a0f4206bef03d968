//! Raw system calls of the guard.
//!
//! Nothing here goes through libc or touches `errno`: on the host side the
//! guard shares its thread's TLS with other code, and in Dune mode the very
//! same `syscall` instruction is forwarded by the Dune runtime, so this module
//! is the whole of "forwarding" in both placements.

#![expect(unsafe_code, reason = "the syscall instruction")]

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::{errno, general};

/// An error number of the kernel, 1 to 4095.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u16);

macro_rules! errnos {
    ($($name:ident)*) => {
        #[expect(missing_docs, reason = "the kernel's names")]
        impl Errno {
            $(pub const $name: Self = Self(errno::$name as u16);)*

            /// The kernel's name for it, if it has one.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                $(if self == Self::$name { return Some(stringify!($name)); })*
                None
            }
        }
    };
}

errnos! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT
    ENOTBLK EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG
    ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM ERANGE EDEADLK ENAMETOOLONG ENOLCK ENOSYS ENOTEMPTY
    ELOOP ENOMSG EIDRM ECHRNG EL2NSYNC EL3HLT EL3RST ELNRNG EUNATCH ENOCSI EL2HLT EBADE EBADR
    EXFULL ENOANO EBADRQC EBADSLT EBFONT ENOSTR ENODATA ETIME ENOSR ENONET ENOPKG EREMOTE
    ENOLINK EADV ESRMNT ECOMM EPROTO EMULTIHOP EDOTDOT EBADMSG EOVERFLOW ENOTUNIQ EBADFD EREMCHG
    ELIBACC ELIBBAD ELIBSCN ELIBMAX ELIBEXEC EILSEQ ERESTART ESTRPIPE EUSERS ENOTSOCK
    EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT ESOCKTNOSUPPORT EOPNOTSUPP
    EPFNOSUPPORT EAFNOSUPPORT EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH ENETRESET
    ECONNABORTED ECONNRESET ENOBUFS EISCONN ENOTCONN ESHUTDOWN ETOOMANYREFS ETIMEDOUT
    ECONNREFUSED EHOSTDOWN EHOSTUNREACH EALREADY EINPROGRESS ESTALE EUCLEAN ENOTNAM ENAVAIL
    EISNAM EREMOTEIO EDQUOT ENOMEDIUM EMEDIUMTYPE ECANCELED ENOKEY EKEYEXPIRED EKEYREVOKED
    EKEYREJECTED EOWNERDEAD ENOTRECOVERABLE ERFKILL EHWPOISON
}

impl Errno {
    /// The kernel's internal answer for "interrupted, start again"; the guard
    /// uses it for calls that a signal prevented from beginning. Programs
    /// never see it.
    pub const ERESTARTSYS: Self = Self(512);

    /// From the kernel's number, or `None` outside 1 to 4095.
    #[must_use]
    pub const fn new(number: i32) -> Option<Self> {
        if 0 < number && number < 4096 {
            Some(Self(number as u16))
        } else {
            None
        }
    }

    /// The kernel's number.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0 as i32
    }

    /// What a failing system call leaves in `rax`.
    #[must_use]
    pub const fn as_rax(self) -> u64 {
        (self.0 as i64).wrapping_neg() as u64
    }

    /// The number that a `std` error carries, or `EIO` for one without.
    #[must_use]
    pub fn of(error: &std::io::Error) -> Self {
        error
            .raw_os_error()
            .and_then(Self::new)
            .unwrap_or(Self::EIO)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&std::io::Error::from_raw_os_error(self.number()), f)
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.number())
    }
}

/// The outcome of a system call: its value or its error number.
pub type SysResult = Result<u64, Errno>;

/// Reads the kernel's answer in `rax`.
pub(crate) const fn decode(rax: u64) -> SysResult {
    let signed = rax as i64;
    if -4096 < signed && signed < 0 {
        Err(Errno(signed.wrapping_neg() as u16))
    } else {
        Ok(rax)
    }
}

/// Makes the system call `nr`.
///
/// # Safety
///
/// The call with these arguments must not break memory safety of the guard:
/// memory that the kernel writes or unmaps is the guard's to give (a buffer it
/// owns exclusively, or user memory as told by [`crate::range::UserRange`]),
/// and no descriptor that somebody owns is closed.
pub unsafe fn syscall(nr: u32, args: [u64; 6]) -> SysResult {
    // SAFETY: as the caller says.
    decode(unsafe { raw_syscall(nr.into(), args) })
}

/// As [`syscall`], with the whole register: its upper half is for the Dune
/// runtime ([`dune::WALLED`]). Returns it as the kernel leaves it.
///
/// # Safety
///
/// As [`syscall`].
pub(crate) unsafe fn raw_syscall(nr: u64, args: [u64; 6]) -> u64 {
    let rax: u64;
    // SAFETY: the instruction itself clobbers rax, rcx and r11 only; what the
    // kernel does to memory is the caller's promise. `nostack` is left out on
    // purpose: in Dune mode the forwarding stub steps over the red zone.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => rax,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    rax
}

/// Closes a descriptor that is nobody's any more.
pub(crate) fn close(fd: RawFd) {
    // Nothing can be done about an error, and the descriptor is gone anyway.
    // SAFETY: the caller's descriptor, and no memory.
    let _ = unsafe { syscall(general::__NR_close, [fd as u64, 0, 0, 0, 0, 0]) };
}

/// How many descriptors the guard has at least, and at most: one for each
/// thread of the program.
const SPARE: u64 = 64;
const MOST_DESCRIPTORS: u64 = 8192;

/// Numbers below this are the program's, whatever its limit is.
static FLOOR: AtomicU64 = AtomicU64::new(0);

/// From now on no descriptor of the guard is put below `number`: those that the
/// program has there now are given back to it under the same numbers, whatever
/// it does to them and to its limit meanwhile.
pub(crate) fn keep_free_below(number: RawFd) {
    FLOOR.fetch_max(number.max(0) as u64, Ordering::Relaxed);
}

/// Where descriptors of the guard are put: at or above the program's limit on
/// open files, so that they neither take numbers that the program expects nor
/// can be reached by `dup2`. If the hard limit leaves no room there, the
/// highest free numbers below it are used. Never where the program has
/// descriptors that a snapshot gives back to it.
///
/// Returns the moved descriptor (close-on-exec); the old one is closed.
///
/// # Errors
///
/// If the process has no descriptor left.
pub fn move_fd_high(fd: OwnedFd) -> std::io::Result<OwnedFd> {
    let old = get_nofile()?;
    let floor = FLOOR.load(Ordering::Relaxed);
    let above = old.rlim_cur.max(floor);
    let room = old.rlim_max.saturating_sub(above).min(MOST_DESCRIPTORS);
    let roomy = room >= SPARE;
    let base = if roomy {
        above
    } else {
        let part = (old.rlim_cur / 4).clamp(SPARE, MOST_DESCRIPTORS);
        old.rlim_cur.saturating_sub(part).max(3).max(floor)
    };
    if base >= if roomy { old.rlim_max } else { old.rlim_cur } {
        return Err(Errno::EMFILE.into());
    }
    let make = || {
        let command = u64::from(general::F_DUPFD_CLOEXEC);
        // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor and touches no memory.
        unsafe {
            syscall(
                general::__NR_fcntl,
                [fd.as_raw_fd() as u64, command, base, 0, 0, 0],
            )
        }
    };
    let moved = if roomy {
        with_nofile(&old, above + room, make)?
    } else {
        make()
    };
    let number = moved.map_err(std::io::Error::from)? as RawFd;
    // SAFETY: the descriptor was made above and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes the descriptor `to`, which is nobody's or the program's to lose, a
/// duplicate of `fd`, also above the limit on open files. `flags` as for `dup3`.
///
/// # Errors
///
/// What the host kernel said.
pub(crate) fn duplicate_to(fd: RawFd, to: RawFd, flags: u64) -> SysResult {
    // SAFETY: no memory; what `to` was is the caller's to close.
    let make = || unsafe { syscall(general::__NR_dup3, [fd as u64, to as u64, flags, 0, 0, 0]) };
    let failed = |error: std::io::Error| Errno::of(&error);
    let limit = get_nofile().map_err(failed)?;
    let needed = to as u64 + 1;
    if needed <= limit.rlim_cur {
        make()
    } else {
        with_nofile(&limit, needed, make).map_err(failed)?
    }
}

/// The hard limit on open files: no number can be had from there on.
pub(crate) fn most_descriptors() -> u64 {
    get_nofile().map_or(0, |limit| limit.rlim_max)
}

/// Does something while the soft limit on open files is the hard one, or not at
/// all (`None`) if it is that already or cannot be changed. The limit is the
/// whole process's, so no other thread of the program may run.
pub(crate) fn with_hard_nofile<T>(body: impl FnOnce() -> T) -> Option<T> {
    let old = get_nofile().ok()?;
    if old.rlim_cur >= old.rlim_max {
        return None;
    }
    with_nofile(&old, old.rlim_max, body).ok()
}

/// Does something while the limit on open files, now `old`, is `soft`.
fn with_nofile<T>(
    old: &general::rlimit64,
    soft: u64,
    body: impl FnOnce() -> T,
) -> std::io::Result<T> {
    set_nofile(&general::rlimit64 {
        rlim_cur: soft,
        rlim_max: old.rlim_max,
    })?;
    let done = body();
    set_nofile(old)?;
    Ok(done)
}

fn get_nofile() -> std::io::Result<general::rlimit64> {
    let mut limit = general::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let resource = u64::from(general::RLIMIT_NOFILE);
    // SAFETY: the kernel writes one rlimit64 to `limit`, which is ours.
    unsafe {
        syscall(
            general::__NR_prlimit64,
            [
                0,
                resource,
                0,
                (&raw mut limit).expose_provenance() as u64,
                0,
                0,
            ],
        )
    }?;
    Ok(limit)
}

fn set_nofile(limit: &general::rlimit64) -> std::io::Result<()> {
    let resource = u64::from(general::RLIMIT_NOFILE);
    // SAFETY: the kernel reads one rlimit64.
    unsafe {
        syscall(
            general::__NR_prlimit64,
            [
                0,
                resource,
                (&raw const *limit).expose_provenance() as u64,
                0,
                0,
                0,
            ],
        )
    }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_errors() {
        assert_eq!(decode(5), Ok(5));
        assert_eq!(decode((-2_i64) as u64), Err(Errno::ENOENT));
        assert_eq!(decode((-4095_i64) as u64), Err(Errno(4095)));
        assert_eq!(decode((-4096_i64) as u64), Ok((-4096_i64) as u64));
        assert_eq!(Errno::ENOENT.as_rax() as i64, -2);
    }

    #[test]
    fn a_moved_descriptor_works_and_is_out_of_the_way() {
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        let limit = get_nofile().unwrap();
        let moved = move_fd_high(file.into()).unwrap();
        let room = limit.rlim_max - limit.rlim_cur >= SPARE;
        let least = if room {
            limit.rlim_cur
        } else {
            limit.rlim_cur - (limit.rlim_cur / 4).clamp(SPARE, MOST_DESCRIPTORS)
        };
        assert!(moved.as_raw_fd() as u64 >= least);
        assert_eq!(get_nofile().unwrap().rlim_cur, limit.rlim_cur);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(moved), &mut text).unwrap();
        assert!(!text.is_empty());
    }
}
