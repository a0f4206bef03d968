//! The C library calls that `std` does not wrap.
//!
//! The agent is compiled by the build script with nothing but `std`, so the
//! few calls it needs are declared here and wrapped in safe functions.
#![expect(unsafe_code, reason = "calls of the C library that std does not offer")]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

mod ffi {
    use super::{c_char, c_int, c_long, c_ulong, c_void};

    unsafe extern "C" {
        pub(super) fn mount(
            source: *const c_char,
            target: *const c_char,
            kind: *const c_char,
            flags: c_ulong,
            data: *const c_void,
        ) -> c_int;
        pub(super) fn syscall(number: c_long, ...) -> c_long;
        pub(super) fn chroot(path: *const c_char) -> c_int;
        pub(super) fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
        pub(super) fn setsid() -> c_int;
        pub(super) fn setgroups(count: usize, groups: *const u32) -> c_int;
        pub(super) fn setgid(gid: u32) -> c_int;
        pub(super) fn setuid(uid: u32) -> c_int;
        pub(super) fn umask(mask: u32) -> u32;
        pub(super) fn setrlimit(resource: c_int, limit: *const [u64; 2]) -> c_int;
        pub(super) fn clock_settime(clock: c_int, time: *const [i64; 2]) -> c_int;
        pub(super) fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
        pub(super) fn kill(pid: c_int, signal: c_int) -> c_int;
        pub(super) fn sync();
        pub(super) fn reboot(how: c_int) -> c_int;
        pub(super) fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
        pub(super) fn ioperm(from: c_ulong, count: c_ulong, on: c_int) -> c_int;
    }
}

/// Mount flags, from `linux/mount.h`.
pub(crate) const MS_RDONLY: u64 = 1;
pub(crate) const MS_NOSUID: u64 = 2;
pub(crate) const MS_MOVE: u64 = 8192;

const SYS_INIT_MODULE: c_long = 175;
const RLIMIT_NOFILE: c_int = 7;
const CLOCK_REALTIME: c_int = 0;
const LINUX_REBOOT_CMD_POWER_OFF: c_int = 0x4321_fedc;
const TIOCSCTTY: c_ulong = 0x540e;
const TIOCSWINSZ: c_ulong = 0x5414;
const TIOCGPTN: c_ulong = 0x8004_5430;
const TIOCSPTLCK: c_ulong = 0x4004_5431;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const RNDADDENTROPY: c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: c_ulong = 0x5207;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn c_string(bytes: impl Into<Vec<u8>>) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// `mount(2)`.
pub(crate) fn mount(
    source: &str,
    target: impl Into<Vec<u8>>,
    kind: &str,
    flags: u64,
    options: &str,
) -> io::Result<()> {
    let source = c_string(source)?;
    let target = c_string(target)?;
    let kind = c_string(kind)?;
    let options = c_string(options)?;
    // SAFETY: four strings ended by a NUL, alive during the call.
    let result = unsafe {
        ffi::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            options.as_ptr().cast(),
        )
    };
    check(result).map(drop)
}

/// `chroot(2)` into the current folder.
pub(crate) fn chroot_here() -> io::Result<()> {
    // SAFETY: a constant string ended by a NUL.
    check(unsafe { ffi::chroot(c".".as_ptr()) }).map(drop)
}

/// Loads a kernel module from its image.
pub(crate) fn init_module(image: &[u8], parameters: &CStr) -> io::Result<()> {
    // SAFETY: the image and its length belong together; the string ends with a NUL.
    let result = unsafe {
        ffi::syscall(
            SYS_INIT_MODULE,
            image.as_ptr(),
            image.len(),
            parameters.as_ptr(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    const AF_INET: c_int = 2;
    const SOCK_DGRAM_CLOEXEC: c_int = 2 | 0o2_000_000;
    const IFF_UP: u8 = 1;
    // SAFETY: no memory is passed.
    let fd = check(unsafe { ffi::socket(AF_INET, SOCK_DGRAM_CLOEXEC, 0) })?;
    // SAFETY: a new descriptor that nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // struct ifreq: 16 bytes of name, then the flags as a short.
    let mut request = [0_u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16] = IFF_UP;
    // SAFETY: SIOCSIFFLAGS reads one struct ifreq of 40 bytes.
    check(unsafe { ffi::ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, request.as_ptr()) }).map(drop)
}

/// Credits `seed` to the kernel's random number generator and reseeds it.
pub(crate) fn seed_random(urandom: &File, seed: &[u8]) -> io::Result<()> {
    // struct rand_pool_info: bits of entropy, bytes, then the bytes.
    let length = u32::try_from(seed.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut pool = Vec::with_capacity(8 + seed.len());
    pool.extend_from_slice(&(length * 8).to_ne_bytes());
    pool.extend_from_slice(&length.to_ne_bytes());
    pool.extend_from_slice(seed);
    // SAFETY: RNDADDENTROPY reads the header and as many bytes as it says.
    check(unsafe { ffi::ioctl(urandom.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) })?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    check(unsafe { ffi::ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// Sets the wall clock.
pub(crate) fn set_clock(seconds: i64, nanoseconds: u32) -> io::Result<()> {
    let time = [seconds, i64::from(nanoseconds)];
    // SAFETY: struct timespec is two longs on x86-64.
    check(unsafe { ffi::clock_settime(CLOCK_REALTIME, &raw const time) }).map(drop)
}

/// Unlocks the slave of a pseudo-terminal and returns its number.
pub(crate) fn unlock_pty(master: &File) -> io::Result<u32> {
    let unlocked: c_int = 0;
    let mut number: u32 = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    check(unsafe { ffi::ioctl(master.as_raw_fd(), TIOCSPTLCK, &raw const unlocked) })?;
    // SAFETY: TIOCGPTN writes one unsigned int.
    check(unsafe { ffi::ioctl(master.as_raw_fd(), TIOCGPTN, &raw mut number) })?;
    Ok(number)
}

/// Gives a terminal its size.
pub(crate) fn resize(terminal: &File, rows: u16, columns: u16) -> io::Result<()> {
    let size = [rows, columns, 0, 0];
    // SAFETY: TIOCSWINSZ reads struct winsize, four shorts.
    check(unsafe { ffi::ioctl(terminal.as_raw_fd(), TIOCSWINSZ, size.as_ptr()) }).map(drop)
}

/// The registers of the first parallel port, for the thread that acquired them.
pub(crate) struct ParallelRegisters {
    /// I/O permissions belong to a thread.
    _of_this_thread: PhantomData<*const ()>,
}

impl ParallelRegisters {
    /// Data; status follows, then control.
    const DATA: u16 = 0x378;
    /// The printer is selected and not being reset.
    const READY: u8 = 0x0c;
    const STROBE: u8 = 0x01;

    /// Asks the kernel for the permission to use them.
    pub(crate) fn acquire() -> io::Result<ParallelRegisters> {
        // SAFETY: no memory is passed.
        check(unsafe { ffi::ioperm(c_ulong::from(Self::DATA), 3, 1) })?;
        Ok(ParallelRegisters {
            _of_this_thread: PhantomData,
        })
    }

    /// Hands a byte to the emulated printer, which takes it at once.
    pub(crate) fn strobe(&self, byte: u8) {
        // SAFETY: this thread may write to the three ports (see `acquire`); a
        // printer reads no memory. The assembly touches nothing else.
        unsafe {
            std::arch::asm!(
                "out dx, al",
                "add edx, 2",
                "mov al, {on}",
                "out dx, al",
                "mov al, {off}",
                "out dx, al",
                on = const Self::READY | Self::STROBE,
                off = const Self::READY,
                inout("edx") u32::from(Self::DATA) => _,
                inout("al") byte => _,
                options(nomem, nostack),
            );
        }
    }
}

/// What the command becomes before its program starts.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) umask: u32,
    pub(crate) nofile: (u64, u64),
}

/// Makes `command` start in a session of its own, with `identity`, and with
/// the terminal that its stream `terminal` is as the controlling terminal.
pub(crate) fn prepare(command: &mut Command, identity: Identity, terminal: Option<RawFd>) {
    let setup = move || {
        // SAFETY: no memory is passed.
        check(unsafe { ffi::setsid() })?;
        if let Some(fd) = terminal {
            // SAFETY: TIOCSCTTY takes an integer.
            check(unsafe { ffi::ioctl(fd, TIOCSCTTY, 0) })?;
        }
        let limit = [identity.nofile.0, identity.nofile.1];
        // SAFETY: struct rlimit is two unsigned longs on x86-64.
        check(unsafe { ffi::setrlimit(RLIMIT_NOFILE, &raw const limit) })?;
        // SAFETY: no memory is passed.
        unsafe { ffi::umask(identity.umask) };
        // SAFETY: the pointer and the count describe one slice.
        check(unsafe { ffi::setgroups(identity.groups.len(), identity.groups.as_ptr()) })?;
        // SAFETY: no memory is passed.
        check(unsafe { ffi::setgid(identity.gid) })?;
        // SAFETY: no memory is passed.
        check(unsafe { ffi::setuid(identity.uid) }).map(drop)
    };
    // SAFETY: between fork and exec the closure only makes system calls: it
    // allocates nothing and takes no lock (`last_os_error` reads errno).
    unsafe { command.pre_exec(setup) };
}

/// Waits for any child; returns its pid and wait status.
pub(crate) fn wait_any() -> io::Result<(u32, i32)> {
    let mut status = 0;
    // SAFETY: the call writes one int.
    let pid = check(unsafe { ffi::waitpid(-1, &raw mut status, 0) })?;
    Ok((pid.cast_unsigned(), status))
}

/// Sends `signal` to the process group of `leader`.
pub(crate) fn signal_group(leader: u32, signal: i32) {
    if let Ok(leader) = c_int::try_from(leader) {
        // SAFETY: no memory is passed. A group that is gone already is no error.
        unsafe { ffi::kill(-leader, signal) };
    }
}

/// Writes dirty data of every file system back.
pub(crate) fn sync() {
    // SAFETY: no memory is passed.
    unsafe { ffi::sync() };
}

/// Ends the guest.
pub(crate) fn power_off() -> ! {
    sync();
    // SAFETY: no memory is passed.
    unsafe { ffi::reboot(LINUX_REBOOT_CMD_POWER_OFF) };
    // The kernel panics when the first process exits, which ends the guest too.
    std::process::exit(1)
}

/// Duplicates `fd` for a stream of the command.
pub(crate) fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}
