//! How the arguments of each call are printed, beyond what its row in
//! [`crate::table`] says of them.

use std::sync::OnceLock;

use linux_raw_sys::general::*;

use crate::table::{self, Arg, Call, Shape};
use crate::trace::names::{self, Names};

/// How one argument is printed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum As {
    /// A signed 32-bit number.
    Int,
    /// A signed 64-bit number.
    Long,
    /// An unsigned number.
    Count,
    /// An address in hexadecimal; `NULL` for none.
    Hex,
    /// A number in hexadecimal; `0` for none.
    HexNumber,
    /// Permissions, in octal.
    Mode,
    /// A descriptor, `AT_FDCWD` by its name.
    Fd,
    /// A string.
    Text,
    /// As many bytes as the row says; of those that the kernel wrote, as many
    /// as the call returned.
    Data,
    /// A vector of strings.
    Strings,
    /// A vector of strings, of which only the number is printed.
    Variables,
    /// Flags.
    Flags(Names),
    /// One of several numbers.
    OneOf(Names),
    /// One of several numbers in the bits of a mask, and flags.
    Beside(Names, u64, Names),
    /// The name of a socket option, whose level is the argument before.
    SocketOption,
    /// A protocol, whose family is two arguments before.
    Protocol,
    /// The argument of `fcntl`, whose command is the argument before.
    Fcntl,
    /// The fourth argument of `futex`: a time or a number.
    FutexTime,
    /// The flags of `clone` with a signal in the low byte.
    CloneFlags,
    /// A signal's number.
    Signal,
    /// A structure.
    Is(Struct),
}

/// Structures that are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Struct {
    /// `int`, in brackets.
    Int,
    /// `int[2]`.
    Pair,
    /// `loff_t`, in brackets.
    Offset,
    /// `struct stat`.
    Stat,
    /// `struct statx`.
    Statx,
    /// `struct timespec`.
    Time,
    /// `struct timespec[2]`.
    Times,
    /// `struct timeval`.
    Timeval,
    /// `struct itimerspec`.
    TimerSpec,
    /// `struct itimerval`.
    TimerVal,
    /// `struct rlimit64`.
    Limit,
    /// `struct sigaction`.
    Action,
    /// `stack_t`.
    Stack,
    /// A signal set.
    Signals,
    /// `siginfo_t`.
    SigInfo,
    /// `struct utsname`.
    Uname,
    /// As many `struct pollfd` as another argument says.
    Polls(u8),
    /// `fd_set`, of as many bits as another argument says.
    FdSet(u8),
    /// `struct epoll_event`.
    Event,
    /// As many `struct epoll_event` as the call returned.
    Events,
    /// As many `struct iovec` as another argument says.
    Vectors(u8),
    /// A socket address of as many bytes as another argument says.
    Address(u8),
    /// A socket address whose length another argument points at.
    AddressAt(u8),
    /// `struct msghdr`.
    Message,
    /// `int`, as `getsockopt` gives it and `setsockopt` takes it.
    OptionValue(u8),
    /// What `wait4` tells of a child.
    Status,
    /// Entries of a folder: their number.
    Entries,
    /// `struct open_how`.
    How,
}

use As::{
    Beside, CloneFlags, Count, Data, Fcntl, Fd, Flags, FutexTime, Hex, HexNumber, Int, Is, Long,
    Mode, OneOf, Protocol, Signal, SocketOption, Strings, Text, Variables,
};
use Struct::{
    Action, Address, AddressAt, Entries, Event, Events, FdSet, How, Limit, Message, Offset,
    OptionValue, Pair, Polls, SigInfo, Signals, Stack, Stat, Status, Time, TimerSpec, TimerVal,
    Times, Timeval, Uname, Vectors,
};

const OPEN: As = Beside(names::ACCESS_MODES, 3, names::OPEN);
const SOCKET: As = Beside(names::SOCKETS, 0xf, names::SOCKET_FLAGS);
const SOCKET_FLAGS: As = Flags(names::SOCKET_FLAGS);
const FAMILY: As = OneOf(names::FAMILIES);
const LEVEL: As = OneOf(names::LEVELS);
const MSG: As = Flags(names::MSG);
const PROT: As = Flags(names::PROT);
const CLOCK: As = OneOf(names::CLOCKS);
const AT: As = Flags(names::AT);

/// Calls of which the row does not say enough.
const SIGNATURES: &[(u32, &[As])] = &[
    (__NR_read, &[Fd, Data, Count]),
    (__NR_write, &[Fd, Data, Count]),
    (__NR_pread64, &[Fd, Data, Count, Long]),
    (__NR_pwrite64, &[Fd, Data, Count, Long]),
    (__NR_readv, &[Fd, Is(Vectors(2)), Int]),
    (__NR_writev, &[Fd, Is(Vectors(2)), Int]),
    (__NR_preadv, &[Fd, Is(Vectors(2)), Int, Long]),
    (__NR_pwritev, &[Fd, Is(Vectors(2)), Int, Long]),
    (__NR_open, &[Text, OPEN, Mode]),
    (__NR_openat, &[Fd, Text, OPEN, Mode]),
    (__NR_openat2, &[Fd, Text, Is(How), Count]),
    (__NR_creat, &[Text, Mode]),
    (__NR_stat, &[Text, Is(Stat)]),
    (__NR_lstat, &[Text, Is(Stat)]),
    (__NR_fstat, &[Fd, Is(Stat)]),
    (__NR_newfstatat, &[Fd, Text, Is(Stat), AT]),
    (
        __NR_statx,
        &[
            Fd,
            Text,
            Flags(names::AT_STATX),
            Flags(names::STATX),
            Is(Struct::Statx),
        ],
    ),
    (__NR_access, &[Text, Flags(names::ACCESS)]),
    (__NR_faccessat, &[Fd, Text, Flags(names::ACCESS)]),
    (
        __NR_faccessat2,
        &[Fd, Text, Flags(names::ACCESS), Flags(names::AT_ACCESS)],
    ),
    (__NR_lseek, &[Fd, Long, OneOf(names::SEEK)]),
    (
        __NR_mmap,
        &[
            Hex,
            Count,
            PROT,
            Beside(names::MAP_TYPES, 0xf, names::MAP),
            Fd,
            HexNumber,
        ],
    ),
    (__NR_mprotect, &[Hex, Count, PROT]),
    (__NR_pkey_mprotect, &[Hex, Count, PROT, Int]),
    (__NR_munmap, &[Hex, Count]),
    (__NR_brk, &[Hex]),
    (__NR_mremap, &[Hex, Count, Count, Flags(names::MREMAP), Hex]),
    (__NR_msync, &[Hex, Count, Flags(names::MSYNC)]),
    (__NR_mincore, &[Hex, Count, Hex]),
    (__NR_madvise, &[Hex, Count, OneOf(names::MADV)]),
    (__NR_mlock, &[Hex, Count]),
    (__NR_munlock, &[Hex, Count]),
    (__NR_rt_sigaction, &[Signal, Is(Action), Is(Action), Count]),
    (
        __NR_rt_sigprocmask,
        &[OneOf(names::MASKS), Is(Signals), Is(Signals), Count],
    ),
    (__NR_rt_sigpending, &[Is(Signals), Count]),
    (__NR_rt_sigsuspend, &[Is(Signals), Count]),
    (
        __NR_rt_sigtimedwait,
        &[Is(Signals), Is(SigInfo), Is(Time), Count],
    ),
    (__NR_rt_sigqueueinfo, &[Int, Signal, Is(SigInfo)]),
    (__NR_rt_tgsigqueueinfo, &[Int, Int, Signal, Is(SigInfo)]),
    (__NR_sigaltstack, &[Is(Stack), Is(Stack)]),
    (__NR_kill, &[Int, Signal]),
    (__NR_tkill, &[Int, Signal]),
    (__NR_tgkill, &[Int, Int, Signal]),
    (__NR_pidfd_send_signal, &[Fd, Signal, Is(SigInfo), Count]),
    (__NR_signalfd4, &[Fd, Is(Signals), Count, Flags(names::SFD)]),
    (__NR_ioctl, &[Fd, OneOf(names::IOCTL), Hex]),
    (__NR_fcntl, &[Fd, OneOf(names::FCNTL), Fcntl]),
    (__NR_flock, &[Fd, Flags(names::FLOCK)]),
    (__NR_pipe, &[Is(Pair)]),
    (__NR_pipe2, &[Is(Pair), Flags(names::OPEN)]),
    (__NR_dup3, &[Fd, Fd, Flags(names::OPEN)]),
    (__NR_close_range, &[Count, Count, Flags(names::CLOSE_RANGE)]),
    (
        __NR_select,
        &[Int, Is(FdSet(0)), Is(FdSet(0)), Is(FdSet(0)), Is(Timeval)],
    ),
    (
        __NR_pselect6,
        &[Int, Is(FdSet(0)), Is(FdSet(0)), Is(FdSet(0)), Is(Time), Hex],
    ),
    (__NR_poll, &[Is(Polls(1)), Count, Int]),
    (
        __NR_ppoll,
        &[Is(Polls(1)), Count, Is(Time), Is(Signals), Count],
    ),
    (__NR_epoll_create1, &[Flags(names::EPOLL_CREATE)]),
    (
        __NR_epoll_ctl,
        &[Fd, OneOf(names::EPOLL_OPS), Fd, Is(Event)],
    ),
    (__NR_epoll_wait, &[Fd, Is(Events), Int, Int]),
    (
        __NR_epoll_pwait,
        &[Fd, Is(Events), Int, Int, Is(Signals), Count],
    ),
    (
        __NR_epoll_pwait2,
        &[Fd, Is(Events), Int, Is(Time), Is(Signals), Count],
    ),
    (__NR_nanosleep, &[Is(Time), Is(Time)]),
    (
        __NR_clock_nanosleep,
        &[CLOCK, Flags(names::TIMER), Is(Time), Is(Time)],
    ),
    (__NR_clock_gettime, &[CLOCK, Is(Time)]),
    (__NR_clock_getres, &[CLOCK, Is(Time)]),
    (__NR_gettimeofday, &[Is(Timeval), Hex]),
    (__NR_getitimer, &[OneOf(names::ITIMERS), Is(TimerVal)]),
    (
        __NR_setitimer,
        &[OneOf(names::ITIMERS), Is(TimerVal), Is(TimerVal)],
    ),
    (__NR_timer_create, &[CLOCK, Hex, Is(Struct::Int)]),
    (
        __NR_timer_settime,
        &[Int, Flags(names::TIMER), Is(TimerSpec), Is(TimerSpec)],
    ),
    (__NR_timer_gettime, &[Int, Is(TimerSpec)]),
    (__NR_timerfd_create, &[CLOCK, Flags(names::TFD)]),
    (
        __NR_timerfd_settime,
        &[Fd, Flags(names::TFD_SET), Is(TimerSpec), Is(TimerSpec)],
    ),
    (__NR_timerfd_gettime, &[Fd, Is(TimerSpec)]),
    (__NR_eventfd2, &[Count, Flags(names::EFD)]),
    (__NR_inotify_init1, &[Flags(names::INOTIFY_INIT)]),
    (__NR_inotify_add_watch, &[Fd, Text, Flags(names::INOTIFY)]),
    (__NR_sendfile, &[Fd, Fd, Is(Offset), Count]),
    (
        __NR_splice,
        &[Fd, Is(Offset), Fd, Is(Offset), Count, Flags(names::SPLICE)],
    ),
    (__NR_tee, &[Fd, Fd, Count, Flags(names::SPLICE)]),
    (
        __NR_copy_file_range,
        &[Fd, Is(Offset), Fd, Is(Offset), Count, HexNumber],
    ),
    (__NR_socket, &[FAMILY, SOCKET, Protocol]),
    (__NR_socketpair, &[FAMILY, SOCKET, Protocol, Is(Pair)]),
    (__NR_bind, &[Fd, Is(Address(2)), Count]),
    (__NR_connect, &[Fd, Is(Address(2)), Count]),
    (__NR_listen, &[Fd, Int]),
    (__NR_accept, &[Fd, Is(AddressAt(2)), Is(Struct::Int)]),
    (
        __NR_accept4,
        &[Fd, Is(AddressAt(2)), Is(Struct::Int), SOCKET_FLAGS],
    ),
    (__NR_getsockname, &[Fd, Is(AddressAt(2)), Is(Struct::Int)]),
    (__NR_getpeername, &[Fd, Is(AddressAt(2)), Is(Struct::Int)]),
    (__NR_sendto, &[Fd, Data, Count, MSG, Is(Address(5)), Count]),
    (
        __NR_recvfrom,
        &[Fd, Data, Count, MSG, Is(AddressAt(5)), Is(Struct::Int)],
    ),
    (__NR_sendmsg, &[Fd, Is(Message), MSG]),
    (__NR_recvmsg, &[Fd, Is(Message), MSG]),
    (__NR_sendmmsg, &[Fd, Hex, Count, MSG]),
    (__NR_recvmmsg, &[Fd, Hex, Count, MSG, Is(Time)]),
    (__NR_shutdown, &[Fd, OneOf(names::SHUTDOWN)]),
    (
        __NR_setsockopt,
        &[Fd, LEVEL, SocketOption, Is(OptionValue(4)), Count],
    ),
    (
        __NR_getsockopt,
        &[Fd, LEVEL, SocketOption, Is(Struct::Int), Is(Struct::Int)],
    ),
    (__NR_clone, &[CloneFlags, Hex, Hex, Hex, Hex]),
    (__NR_clone3, &[Hex, Count]),
    (__NR_execve, &[Text, Strings, Variables]),
    (__NR_execveat, &[Fd, Text, Strings, Variables, AT]),
    (__NR_exit, &[Int]),
    (__NR_exit_group, &[Int]),
    (__NR_wait4, &[Int, Is(Status), Flags(names::WAIT), Hex]),
    (
        __NR_waitid,
        &[
            OneOf(names::WAIT_IDS),
            Int,
            Is(SigInfo),
            Flags(names::WAIT),
            Hex,
        ],
    ),
    (__NR_uname, &[Is(Uname)]),
    (__NR_ftruncate, &[Fd, Long]),
    (__NR_truncate, &[Text, Long]),
    (__NR_fallocate, &[Fd, Flags(names::FALLOC), Long, Long]),
    (__NR_fadvise64, &[Fd, Long, Long, OneOf(names::FADV)]),
    (
        __NR_sync_file_range,
        &[Fd, Long, Long, Flags(names::SYNC_FILE)],
    ),
    (__NR_getdents, &[Fd, Is(Entries), Count]),
    (__NR_getdents64, &[Fd, Is(Entries), Count]),
    (__NR_getcwd, &[Data, Count]),
    (__NR_readlink, &[Text, Data, Count]),
    (__NR_readlinkat, &[Fd, Text, Data, Count]),
    (__NR_mkdir, &[Text, Mode]),
    (__NR_mkdirat, &[Fd, Text, Mode]),
    (__NR_chmod, &[Text, Mode]),
    (__NR_fchmod, &[Fd, Mode]),
    (__NR_fchmodat, &[Fd, Text, Mode]),
    (__NR_umask, &[Mode]),
    (__NR_mknod, &[Text, Mode, Hex]),
    (__NR_mknodat, &[Fd, Text, Mode, Hex]),
    (__NR_unlinkat, &[Fd, Text, AT]),
    (__NR_linkat, &[Fd, Text, Fd, Text, AT]),
    (__NR_fchownat, &[Fd, Text, Int, Int, AT]),
    (__NR_renameat2, &[Fd, Text, Fd, Text, Flags(names::RENAME)]),
    (__NR_utimensat, &[Fd, Text, Is(Times), AT]),
    (
        __NR_setxattr,
        &[Text, Text, Data, Count, Flags(names::XATTR)],
    ),
    (
        __NR_fsetxattr,
        &[Fd, Text, Data, Count, Flags(names::XATTR)],
    ),
    (__NR_getrlimit, &[OneOf(names::RLIMITS), Is(Limit)]),
    (__NR_setrlimit, &[OneOf(names::RLIMITS), Is(Limit)]),
    (
        __NR_prlimit64,
        &[Int, OneOf(names::RLIMITS), Is(Limit), Is(Limit)],
    ),
    (__NR_getrusage, &[OneOf(names::RUSAGE), Hex]),
    (__NR_getpriority, &[OneOf(names::PRIO), Int]),
    (__NR_setpriority, &[OneOf(names::PRIO), Int, Int]),
    (
        __NR_sched_setscheduler,
        &[Int, OneOf(names::SCHED), Is(Struct::Int)],
    ),
    (
        __NR_prctl,
        &[
            OneOf(names::PRCTL),
            HexNumber,
            HexNumber,
            HexNumber,
            HexNumber,
        ],
    ),
    (__NR_arch_prctl, &[OneOf(names::ARCH), Hex]),
    (__NR_personality, &[HexNumber]),
    (
        __NR_futex,
        &[
            Hex,
            Beside(names::FUTEX, 0xff, names::FUTEX_FLAGS),
            Count,
            FutexTime,
            Hex,
            HexNumber,
        ],
    ),
    (__NR_set_tid_address, &[Hex]),
    (__NR_set_robust_list, &[Hex, Count]),
    (__NR_rseq, &[Hex, Count, HexNumber, HexNumber]),
    (__NR_getrandom, &[Data, Count, Flags(names::GRND)]),
    (__NR_memfd_create, &[Text, Flags(names::MFD)]),
    (__NR_unshare, &[Flags(names::CLONE)]),
    (__NR_setns, &[Fd, Flags(names::CLONE)]),
    (__NR_ptrace, &[Hex, Int, Hex, Hex]),
    (__NR_chroot, &[Text]),
    (__NR_pivot_root, &[Text, Text]),
    (__NR_mount, &[Text, Text, Text, Hex, Hex]),
    (__NR_umount2, &[Text, HexNumber]),
    (__NR_io_uring_setup, &[Count, Hex]),
    (__NR_userfaultfd, &[HexNumber]),
    (__NR_bpf, &[Int, Hex, Count]),
    (__NR_perf_event_open, &[Hex, Int, Int, Fd, HexNumber]),
    (__NR_seccomp, &[Int, Hex, Hex]),
    (__NR_membarrier, &[Int, Hex]),
    (
        __NR_process_vm_readv,
        &[Int, Hex, Count, Hex, Count, HexNumber],
    ),
    (
        __NR_process_vm_writev,
        &[Int, Hex, Count, Hex, Count, HexNumber],
    ),
    (__NR_vmsplice, &[Fd, Hex, Count, HexNumber]),
    (__NR_shmget, &[Hex, Count, HexNumber]),
    (__NR_shmat, &[Int, Hex, HexNumber]),
    (__NR_semget, &[Hex, Int, HexNumber]),
];

/// How the arguments of the call `nr` are printed, if there is such a call.
pub(crate) fn signature(nr: u32) -> Option<&'static [As]> {
    static ALL: OnceLock<Vec<Option<&'static [As]>>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let mut all: Vec<Option<&'static [As]>> = vec![None; table::END];
        for call in table::calls() {
            let by_row: Vec<As> = call.args.iter().map(by_row).collect();
            all[call.nr as usize] = Some(Vec::leak(by_row));
        }
        for &(nr, signature) in SIGNATURES {
            all[nr as usize] = Some(signature);
        }
        all
    });
    all.get(nr as usize).copied().flatten()
}

/// What the row alone says.
fn by_row(arg: &Arg) -> As {
    match arg {
        Arg::Value => Int,
        Arg::Fd => Fd,
        Arg::Path | Arg::Text | Arg::Copied(Shape::Path) => Text,
        Arg::In(table::Size::Arg(_) | table::Size::Arg32(_))
        | Arg::Out(table::Size::Arg(_) | table::Size::Arg32(_)) => Data,
        _ => Hex,
    }
}

/// Whether an argument can be printed only when the call is over: the kernel
/// writes it, or may change it.
pub(crate) fn is_told_after(call: &Call, index: usize, how: As) -> bool {
    match call.args.get(index) {
        Some(Arg::Out(_)) => true,
        Some(Arg::InOut(_)) => !matches!(how, Is(Offset | Time | Timeval)),
        Some(Arg::Copied(
            Shape::Message(table::Flow::Out) | Shape::Vectors(_, table::Flow::Out),
        )) => true,
        Some(Arg::Copied(Shape::LengthOf(_))) => true,
        // `getsockopt` is the one whose value goes that way.
        Some(Arg::Checked) => matches!(how, Is(_)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_fit_their_rows() {
        for &(nr, signature) in SIGNATURES {
            let call = table::find(nr).unwrap();
            let name = call.name;
            if call.args.is_empty() {
                continue; // Refused, or told by the signature alone.
            }
            assert!(signature.len() <= 6, "{name}");
            for (index, how) in signature.iter().enumerate() {
                let arg = call.args.get(index);
                match how {
                    Text => assert!(
                        matches!(arg, Some(Arg::Path | Arg::Text | Arg::Copied(Shape::Path))),
                        "{name} {index}"
                    ),
                    Data => assert!(
                        matches!(arg, Some(Arg::In(_) | Arg::Out(_))),
                        "{name} {index}"
                    ),
                    Strings | Variables => {
                        assert_eq!(arg, Some(&Arg::Copied(Shape::Strings)), "{name} {index}");
                    }
                    Is(_) => assert!(
                        !matches!(arg, Some(Arg::Value | Arg::Fd) | None),
                        "{name} {index}"
                    ),
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn every_call_has_a_signature() {
        for call in table::calls() {
            let signature = signature(call.nr).unwrap();
            assert!(signature.len() >= call.args.len().min(1), "{}", call.name);
        }
        assert!(signature(u32::MAX).is_none());
    }
}
