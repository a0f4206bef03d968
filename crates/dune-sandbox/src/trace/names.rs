//! The names of numbers: flags, requests, options, from the kernel's headers.

use core::fmt::Write;

use linux_raw_sys::general::*;
use linux_raw_sys::net::*;
use linux_raw_sys::{ioctl, prctl};

/// Numbers with their names, in the order in which flags are printed.
pub(crate) type Names = &'static [(&'static str, u64)];

macro_rules! names {
    ($($name:ident)*) => { &[$((stringify!($name), $name as u64)),*] };
}

/// As [`names`], with those that the headers here do not have.
macro_rules! own_names {
    ($($name:ident = $value:expr),* $(,)?) => { &[$((stringify!($name), $value)),*] };
}

macro_rules! names_of {
    ($module:ident: $($name:ident)*) => { &[$((stringify!($name), $module::$name as u64)),*] };
}

/// The one name of `value`, if it has one.
pub(crate) fn name_of(names: Names, value: u64) -> Option<&'static str> {
    names
        .iter()
        .find(|(_, number)| *number == value)
        .map(|(name, _)| *name)
}

/// The name of `value`, or the number.
pub(crate) fn one_of(out: &mut String, names: Names, value: u64) {
    match name_of(names, value) {
        Some(name) => out.push_str(name),
        None => {
            let _ = write!(out, "{value:#x}");
        }
    }
}

/// `value` as flags: `A|B|0x40`, `0` for none.
pub(crate) fn flags(out: &mut String, names: Names, value: u64) {
    let start = out.len();
    let mut left = value;
    for &(name, bits) in names {
        if bits != 0 && left & bits == bits {
            separate(out, start);
            out.push_str(name);
            left &= !bits;
        }
    }
    if left != 0 || out.len() == start {
        match name_of(names, left) {
            // The name of no flag at all (`PROT_NONE`).
            Some(name) if out.len() == start => out.push_str(name),
            _ => {
                separate(out, start);
                let _ = if left == 0 {
                    out.push('0');
                    Ok(())
                } else {
                    write!(out, "{left:#x}")
                };
            }
        }
    }
}

fn separate(out: &mut String, start: usize) {
    if out.len() > start {
        out.push('|');
    }
}

/// Flags beside a number in the low bits.
pub(crate) fn beside(out: &mut String, low: Names, mask: u64, names: Names, value: u64) {
    one_of(out, low, value & mask);
    if value & !mask != 0 {
        out.push('|');
        flags(out, names, value & !mask);
    }
}

pub(crate) const ACCESS_MODES: Names = names! { O_RDONLY O_WRONLY O_RDWR };
pub(crate) const OPEN: Names = &[
    ("O_CREAT", O_CREAT as u64),
    ("O_EXCL", O_EXCL as u64),
    ("O_NOCTTY", O_NOCTTY as u64),
    ("O_TRUNC", O_TRUNC as u64),
    ("O_APPEND", O_APPEND as u64),
    ("O_NONBLOCK", O_NONBLOCK as u64),
    ("O_SYNC", O_SYNC as u64),
    ("O_DSYNC", O_DSYNC as u64),
    ("O_ASYNC", 0o20_000),
    ("O_DIRECT", O_DIRECT as u64),
    ("O_LARGEFILE", O_LARGEFILE as u64),
    ("O_NOFOLLOW", O_NOFOLLOW as u64),
    ("O_NOATIME", O_NOATIME as u64),
    ("O_CLOEXEC", O_CLOEXEC as u64),
    ("O_PATH", O_PATH as u64),
    ("O_TMPFILE", O_TMPFILE as u64),
    ("O_DIRECTORY", O_DIRECTORY as u64),
];
pub(crate) const AT: Names = names! {
    AT_SYMLINK_NOFOLLOW AT_REMOVEDIR AT_SYMLINK_FOLLOW AT_NO_AUTOMOUNT AT_EMPTY_PATH
};
pub(crate) const AT_STATX: Names = names! {
    AT_STATX_FORCE_SYNC AT_STATX_DONT_SYNC AT_SYMLINK_NOFOLLOW AT_NO_AUTOMOUNT AT_EMPTY_PATH
};
pub(crate) const AT_ACCESS: Names = names! { AT_SYMLINK_NOFOLLOW AT_EACCESS AT_EMPTY_PATH };
pub(crate) const ACCESS: Names = own_names! { F_OK = 0, R_OK = 4, W_OK = 2, X_OK = 1 };
pub(crate) const SEEK: Names = names! { SEEK_SET SEEK_CUR SEEK_END SEEK_DATA SEEK_HOLE };
pub(crate) const PROT: Names =
    names! { PROT_NONE PROT_READ PROT_WRITE PROT_EXEC PROT_SEM PROT_GROWSDOWN PROT_GROWSUP };
pub(crate) const MAP_TYPES: Names = names! { MAP_SHARED MAP_PRIVATE MAP_SHARED_VALIDATE };
pub(crate) const MAP: Names = names! {
    MAP_FIXED MAP_ANONYMOUS MAP_32BIT MAP_GROWSDOWN MAP_DENYWRITE MAP_EXECUTABLE MAP_LOCKED
    MAP_NORESERVE MAP_POPULATE MAP_NONBLOCK MAP_STACK MAP_HUGETLB MAP_SYNC MAP_FIXED_NOREPLACE
};
pub(crate) const MREMAP: Names = names! { MREMAP_MAYMOVE MREMAP_FIXED MREMAP_DONTUNMAP };
pub(crate) const MSYNC: Names = names! { MS_ASYNC MS_INVALIDATE MS_SYNC };
pub(crate) const MADV: Names = names! {
    MADV_NORMAL MADV_RANDOM MADV_SEQUENTIAL MADV_WILLNEED MADV_DONTNEED MADV_FREE MADV_REMOVE
    MADV_DONTFORK MADV_DOFORK MADV_HWPOISON MADV_SOFT_OFFLINE MADV_MERGEABLE MADV_UNMERGEABLE
    MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_DONTDUMP MADV_DODUMP MADV_WIPEONFORK MADV_KEEPONFORK
    MADV_COLD MADV_PAGEOUT MADV_POPULATE_READ MADV_POPULATE_WRITE MADV_DONTNEED_LOCKED
    MADV_COLLAPSE
};
pub(crate) const CLONE: Names = names! {
    CLONE_VM CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_PIDFD CLONE_PTRACE CLONE_VFORK CLONE_PARENT
    CLONE_THREAD CLONE_NEWNS CLONE_SYSVSEM CLONE_SETTLS CLONE_PARENT_SETTID CLONE_CHILD_CLEARTID
    CLONE_UNTRACED CLONE_CHILD_SETTID CLONE_NEWCGROUP CLONE_NEWUTS CLONE_NEWIPC CLONE_NEWUSER
    CLONE_NEWPID CLONE_NEWNET CLONE_IO
};
pub(crate) const WAIT: Names =
    names! { WNOHANG WUNTRACED WEXITED WCONTINUED WNOWAIT __WNOTHREAD __WALL __WCLONE };
pub(crate) const WAIT_IDS: Names = names! { P_ALL P_PID P_PGID P_PIDFD };
pub(crate) const FCNTL: Names = names! {
    F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_GETLK F_SETLK F_SETLKW F_SETOWN F_GETOWN F_SETSIG
    F_GETSIG F_SETOWN_EX F_GETOWN_EX F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_SETLEASE F_GETLEASE
    F_NOTIFY F_DUPFD_QUERY F_DUPFD_CLOEXEC F_SETPIPE_SZ F_GETPIPE_SZ F_ADD_SEALS F_GET_SEALS
    F_GET_RW_HINT F_SET_RW_HINT F_GET_FILE_RW_HINT F_SET_FILE_RW_HINT
};
pub(crate) const FD: Names = own_names! { FD_CLOEXEC = 1 };
pub(crate) const LOCKS: Names = names! { F_RDLCK F_WRLCK F_UNLCK };
pub(crate) const FLOCK: Names = names! { LOCK_SH LOCK_EX LOCK_NB LOCK_UN };
pub(crate) const SIGNALS: Names = names! {
    SIGHUP SIGINT SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGKILL SIGUSR1 SIGSEGV SIGUSR2
    SIGPIPE SIGALRM SIGTERM SIGSTKFLT SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGURG
    SIGXCPU SIGXFSZ SIGVTALRM SIGPROF SIGWINCH SIGIO SIGPWR SIGSYS
};
pub(crate) const MASKS: Names = names! { SIG_BLOCK SIG_UNBLOCK SIG_SETMASK };
pub(crate) const SA: Names = names! {
    SA_RESTORER SA_NOCLDSTOP SA_NOCLDWAIT SA_SIGINFO SA_ONSTACK SA_RESTART SA_NODEFER SA_RESETHAND
};
pub(crate) const SS: Names = own_names! { SS_ONSTACK = 1, SS_DISABLE = 2, SS_AUTODISARM = 1 << 31 };
pub(crate) const FAMILIES: Names = names! {
    AF_UNSPEC AF_UNIX AF_INET AF_AX25 AF_IPX AF_APPLETALK AF_NETROM AF_BRIDGE AF_X25 AF_INET6
    AF_NETLINK AF_PACKET AF_RDS AF_PPPOX AF_LLC AF_CAN AF_TIPC AF_BLUETOOTH AF_ALG AF_NFC AF_VSOCK
    AF_KCM AF_SMC AF_XDP
};
pub(crate) const SOCKETS: Names = own_names! {
    SOCK_STREAM = 1, SOCK_DGRAM = 2, SOCK_RAW = 3, SOCK_RDM = 4, SOCK_SEQPACKET = 5,
    SOCK_DCCP = 6, SOCK_PACKET = 10,
};
pub(crate) const SOCKET_FLAGS: Names =
    own_names! { SOCK_CLOEXEC = 0o2_000_000, SOCK_NONBLOCK = 0o4_000 };
pub(crate) const PROTOCOLS: Names = own_names! {
    IPPROTO_IP = 0, IPPROTO_ICMP = 1, IPPROTO_TCP = 6, IPPROTO_UDP = 17, IPPROTO_IPV6 = 41,
    IPPROTO_ICMPV6 = 58, IPPROTO_SCTP = 132, IPPROTO_UDPLITE = 136, IPPROTO_RAW = 255,
    IPPROTO_MPTCP = 262,
};
pub(crate) const NETLINKS: Names = own_names! {
    NETLINK_ROUTE = 0, NETLINK_USERSOCK = 2, NETLINK_SOCK_DIAG = 4, NETLINK_XFRM = 6,
    NETLINK_AUDIT = 9, NETLINK_CONNECTOR = 11, NETLINK_NETFILTER = 12,
    NETLINK_KOBJECT_UEVENT = 15, NETLINK_GENERIC = 16,
};
pub(crate) const LEVELS: Names =
    names! { SOL_IP SOL_SOCKET SOL_TCP SOL_UDP SOL_IPV6 SOL_ICMPV6 SOL_SCTP SOL_UDPLITE SOL_RAW };
pub(crate) const SOL_SOCKET_OPTIONS: Names = names! {
    SO_DEBUG SO_REUSEADDR SO_TYPE SO_ERROR SO_DONTROUTE SO_BROADCAST SO_SNDBUF SO_RCVBUF
    SO_SNDBUFFORCE SO_RCVBUFFORCE SO_KEEPALIVE SO_OOBINLINE SO_NO_CHECK SO_PRIORITY SO_LINGER
    SO_REUSEPORT SO_PASSCRED SO_PEERCRED SO_RCVLOWAT SO_SNDLOWAT SO_RCVTIMEO SO_SNDTIMEO
    SO_BINDTODEVICE SO_ATTACH_FILTER SO_DETACH_FILTER SO_PEERNAME SO_TIMESTAMP SO_ACCEPTCONN
    SO_PEERSEC SO_PASSSEC SO_TIMESTAMPNS SO_MARK SO_TIMESTAMPING SO_PROTOCOL SO_DOMAIN SO_RXQ_OVFL
    SO_PEEK_OFF SO_BUSY_POLL SO_MAX_PACING_RATE SO_INCOMING_CPU SO_ATTACH_BPF
    SO_ATTACH_REUSEPORT_CBPF SO_ATTACH_REUSEPORT_EBPF SO_MEMINFO SO_COOKIE SO_PEERGROUPS
    SO_ZEROCOPY SO_TXTIME SO_BINDTOIFINDEX SO_PASSPIDFD SO_PEERPIDFD
};
pub(crate) const IP_OPTIONS_SET: Names = names! {
    IP_TOS IP_TTL IP_HDRINCL IP_OPTIONS IP_RECVOPTS IP_RETOPTS IP_PKTINFO IP_MTU_DISCOVER
    IP_RECVERR IP_RECVTTL IP_RECVTOS IP_MTU IP_FREEBIND IP_TRANSPARENT IP_MINTTL
    IP_BIND_ADDRESS_NO_PORT IP_MULTICAST_IF IP_MULTICAST_TTL IP_MULTICAST_LOOP IP_ADD_MEMBERSHIP
    IP_DROP_MEMBERSHIP IP_MULTICAST_ALL IP_UNICAST_IF
};
pub(crate) const IPV6_OPTIONS_SET: Names = names! {
    IPV6_ADDRFORM IPV6_CHECKSUM IPV6_UNICAST_HOPS IPV6_MULTICAST_IF IPV6_MULTICAST_HOPS
    IPV6_MULTICAST_LOOP IPV6_ADD_MEMBERSHIP IPV6_DROP_MEMBERSHIP IPV6_MTU_DISCOVER IPV6_MTU
    IPV6_RECVERR IPV6_V6ONLY IPV6_RECVPKTINFO IPV6_PKTINFO IPV6_RECVHOPLIMIT IPV6_HOPLIMIT
    IPV6_RECVTCLASS IPV6_TCLASS IPV6_DONTFRAG IPV6_TRANSPARENT IPV6_UNICAST_IF
};
pub(crate) const TCP_OPTIONS_SET: Names = names! {
    TCP_NODELAY TCP_MAXSEG TCP_CORK TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT TCP_SYNCNT TCP_LINGER2
    TCP_DEFER_ACCEPT TCP_WINDOW_CLAMP TCP_INFO TCP_QUICKACK TCP_CONGESTION TCP_MD5SIG
    TCP_USER_TIMEOUT TCP_FASTOPEN TCP_TIMESTAMP TCP_NOTSENT_LOWAT TCP_FASTOPEN_CONNECT TCP_ULP
    TCP_ZEROCOPY_RECEIVE
};
pub(crate) const MSG: Names = names! {
    MSG_OOB MSG_PEEK MSG_DONTROUTE MSG_CTRUNC MSG_TRUNC MSG_DONTWAIT MSG_EOR MSG_WAITALL MSG_CONFIRM
    MSG_ERRQUEUE MSG_NOSIGNAL MSG_MORE MSG_WAITFORONE MSG_FASTOPEN MSG_CMSG_CLOEXEC
};
/// Not all of them are in the headers here.
const MSG_WAITFORONE: u64 = 0x1_0000;
const MSG_FASTOPEN: u64 = 0x2000_0000;
pub(crate) const SHUTDOWN: Names = own_names! { SHUT_RD = 0, SHUT_WR = 1, SHUT_RDWR = 2 };
pub(crate) const EPOLL_OPS: Names = names! { EPOLL_CTL_ADD EPOLL_CTL_DEL EPOLL_CTL_MOD };
pub(crate) const EPOLL: Names = names! {
    EPOLLIN EPOLLPRI EPOLLOUT EPOLLRDNORM EPOLLRDBAND EPOLLWRNORM EPOLLWRBAND EPOLLMSG EPOLLERR
    EPOLLHUP EPOLLRDHUP EPOLLEXCLUSIVE EPOLLWAKEUP EPOLLONESHOT EPOLLET
};
pub(crate) const EPOLL_CREATE: Names = names! { EPOLL_CLOEXEC };
pub(crate) const POLL: Names = names! {
    POLLIN POLLPRI POLLOUT POLLRDNORM POLLRDBAND POLLWRNORM POLLWRBAND POLLMSG POLLERR POLLHUP
    POLLNVAL POLLRDHUP
};
pub(crate) const CLOCKS: Names = names! {
    CLOCK_REALTIME CLOCK_MONOTONIC CLOCK_PROCESS_CPUTIME_ID CLOCK_THREAD_CPUTIME_ID
    CLOCK_MONOTONIC_RAW CLOCK_REALTIME_COARSE CLOCK_MONOTONIC_COARSE CLOCK_BOOTTIME
    CLOCK_REALTIME_ALARM CLOCK_BOOTTIME_ALARM CLOCK_TAI
};
pub(crate) const TIMER: Names = own_names! { TIMER_ABSTIME = 1 };
pub(crate) const FUTEX: Names = names! {
    FUTEX_WAIT FUTEX_WAKE FUTEX_FD FUTEX_REQUEUE FUTEX_CMP_REQUEUE FUTEX_WAKE_OP FUTEX_LOCK_PI
    FUTEX_UNLOCK_PI FUTEX_TRYLOCK_PI FUTEX_WAIT_BITSET FUTEX_WAKE_BITSET FUTEX_WAIT_REQUEUE_PI
    FUTEX_CMP_REQUEUE_PI FUTEX_LOCK_PI2 FUTEX_WAIT_PRIVATE FUTEX_WAKE_PRIVATE
    FUTEX_REQUEUE_PRIVATE FUTEX_CMP_REQUEUE_PRIVATE FUTEX_WAKE_OP_PRIVATE FUTEX_LOCK_PI_PRIVATE
    FUTEX_LOCK_PI2_PRIVATE FUTEX_UNLOCK_PI_PRIVATE FUTEX_TRYLOCK_PI_PRIVATE
    FUTEX_WAIT_BITSET_PRIVATE FUTEX_WAKE_BITSET_PRIVATE FUTEX_WAIT_REQUEUE_PI_PRIVATE
    FUTEX_CMP_REQUEUE_PI_PRIVATE
};
pub(crate) const FUTEX_FLAGS: Names = names! { FUTEX_CLOCK_REALTIME };
pub(crate) const RLIMITS: Names = names! {
    RLIMIT_CPU RLIMIT_FSIZE RLIMIT_DATA RLIMIT_STACK RLIMIT_CORE RLIMIT_RSS RLIMIT_NPROC
    RLIMIT_NOFILE RLIMIT_MEMLOCK RLIMIT_AS RLIMIT_LOCKS RLIMIT_SIGPENDING RLIMIT_MSGQUEUE
    RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME
};
pub(crate) const FALLOC: Names = names! {
    FALLOC_FL_KEEP_SIZE FALLOC_FL_PUNCH_HOLE FALLOC_FL_NO_HIDE_STALE FALLOC_FL_COLLAPSE_RANGE
    FALLOC_FL_ZERO_RANGE FALLOC_FL_INSERT_RANGE FALLOC_FL_UNSHARE_RANGE
};
pub(crate) const GRND: Names = names! { GRND_NONBLOCK GRND_RANDOM GRND_INSECURE };
pub(crate) const MFD: Names =
    names! { MFD_CLOEXEC MFD_ALLOW_SEALING MFD_HUGETLB MFD_NOEXEC_SEAL MFD_EXEC };
pub(crate) const EFD: Names = names! { EFD_SEMAPHORE EFD_CLOEXEC EFD_NONBLOCK };
pub(crate) const TFD: Names = names! { TFD_CLOEXEC TFD_NONBLOCK };
pub(crate) const TFD_SET: Names = names! { TFD_TIMER_ABSTIME TFD_TIMER_CANCEL_ON_SET };
pub(crate) const SFD: Names = own_names! { SFD_CLOEXEC = 0o2_000_000, SFD_NONBLOCK = 0o4_000 };
pub(crate) const SPLICE: Names =
    names! { SPLICE_F_MOVE SPLICE_F_NONBLOCK SPLICE_F_MORE SPLICE_F_GIFT };
pub(crate) const STATX: Names = names! {
    STATX_ALL STATX_BASIC_STATS STATX_TYPE STATX_MODE STATX_NLINK STATX_UID STATX_GID STATX_ATIME
    STATX_MTIME STATX_CTIME STATX_INO STATX_SIZE STATX_BLOCKS STATX_BTIME STATX_MNT_ID
    STATX_DIOALIGN STATX_MNT_ID_UNIQUE STATX_SUBVOL
};
pub(crate) const RENAME: Names = names! { RENAME_NOREPLACE RENAME_EXCHANGE RENAME_WHITEOUT };
pub(crate) const SCHED: Names =
    names! { SCHED_NORMAL SCHED_FIFO SCHED_RR SCHED_BATCH SCHED_IDLE SCHED_DEADLINE };
pub(crate) const ITIMERS: Names = names! { ITIMER_REAL ITIMER_VIRTUAL ITIMER_PROF };
pub(crate) const PRIO: Names = names! { PRIO_PROCESS PRIO_PGRP PRIO_USER };
pub(crate) const INOTIFY: Names = names! {
    IN_ACCESS IN_MODIFY IN_ATTRIB IN_CLOSE_WRITE IN_CLOSE_NOWRITE IN_OPEN IN_MOVED_FROM IN_MOVED_TO
    IN_CREATE IN_DELETE IN_DELETE_SELF IN_MOVE_SELF IN_UNMOUNT IN_Q_OVERFLOW IN_IGNORED IN_ONLYDIR
    IN_DONT_FOLLOW IN_EXCL_UNLINK IN_MASK_CREATE IN_MASK_ADD IN_ISDIR IN_ONESHOT
};
pub(crate) const INOTIFY_INIT: Names = names! { IN_CLOEXEC IN_NONBLOCK };
pub(crate) const XATTR: Names = names! { XATTR_CREATE XATTR_REPLACE };
pub(crate) const CLOSE_RANGE: Names =
    own_names! { CLOSE_RANGE_UNSHARE = 2, CLOSE_RANGE_CLOEXEC = 4 };
pub(crate) const SYNC_FILE: Names = names! {
    SYNC_FILE_RANGE_WAIT_BEFORE SYNC_FILE_RANGE_WRITE SYNC_FILE_RANGE_WAIT_AFTER
};
pub(crate) const FADV: Names = names! {
    POSIX_FADV_NORMAL POSIX_FADV_RANDOM POSIX_FADV_SEQUENTIAL POSIX_FADV_WILLNEED
    POSIX_FADV_DONTNEED POSIX_FADV_NOREUSE
};
pub(crate) const RUSAGE: Names = own_names! {
    RUSAGE_SELF = 0, RUSAGE_THREAD = 1, RUSAGE_CHILDREN = 0xffff_ffff,
};
pub(crate) const FILE_TYPES: Names =
    names! { S_IFSOCK S_IFLNK S_IFREG S_IFBLK S_IFDIR S_IFCHR S_IFIFO };
pub(crate) const ARCH: Names = own_names! {
    ARCH_SET_GS = 0x1001, ARCH_SET_FS = 0x1002, ARCH_GET_FS = 0x1003, ARCH_GET_GS = 0x1004,
    ARCH_GET_CPUID = 0x1011, ARCH_SET_CPUID = 0x1012, ARCH_CET_STATUS = 0x3001,
};
pub(crate) const PRCTL: Names = names_of! { prctl:
    PR_SET_PDEATHSIG PR_GET_PDEATHSIG PR_GET_DUMPABLE PR_SET_DUMPABLE PR_GET_KEEPCAPS
    PR_SET_KEEPCAPS PR_SET_NAME PR_GET_NAME PR_GET_SECCOMP PR_SET_SECCOMP PR_CAPBSET_READ
    PR_CAPBSET_DROP PR_GET_SECUREBITS PR_SET_SECUREBITS PR_SET_TIMERSLACK PR_GET_TIMERSLACK
    PR_SET_MM PR_SET_PTRACER PR_SET_CHILD_SUBREAPER PR_GET_CHILD_SUBREAPER PR_SET_NO_NEW_PRIVS
    PR_GET_NO_NEW_PRIVS PR_GET_TID_ADDRESS PR_SET_THP_DISABLE PR_GET_THP_DISABLE PR_CAP_AMBIENT
    PR_GET_SPECULATION_CTRL PR_SET_SPECULATION_CTRL PR_SET_VMA
};
pub(crate) const IOCTL: Names = names_of! { ioctl:
    TCGETS TCSETS TCSETSW TCSETSF TCGETS2 TCSETS2 TCSBRK TCXONC TCFLSH TIOCEXCL TIOCNXCL TIOCSCTTY
    TIOCGPGRP TIOCSPGRP TIOCOUTQ TIOCSTI TIOCGWINSZ TIOCSWINSZ TIOCNOTTY TIOCGSID TIOCGPTN
    TIOCSPTLCK FIONREAD FIONBIO FIOASYNC FIOCLEX FIONCLEX FIGETBSZ BLKGETSIZE64 BLKSSZGET
    FS_IOC_GETFLAGS FS_IOC_SETFLAGS FICLONE SIOCGIFCONF SIOCGIFNAME SIOCGIFFLAGS SIOCGIFADDR
    SIOCGIFNETMASK SIOCGIFMTU SIOCGIFHWADDR SIOCGIFINDEX SIOCATMARK
};

/// The options of a level of `setsockopt`.
pub(crate) fn socket_options(level: u64) -> Names {
    match level as u32 {
        SOL_SOCKET => SOL_SOCKET_OPTIONS,
        SOL_IP => IP_OPTIONS_SET,
        SOL_IPV6 => IPV6_OPTIONS_SET,
        SOL_TCP => TCP_OPTIONS_SET,
        _ => &[],
    }
}

/// A signal by name: `SIGINT`, `SIGRT_3`.
pub(crate) fn signal(out: &mut String, number: u64) {
    const FIRST_REAL_TIME: u64 = 32;
    match name_of(SIGNALS, number) {
        Some(name) => out.push_str(name),
        None if (FIRST_REAL_TIME..=64).contains(&number) => {
            let _ = write!(out, "SIGRT_{}", number - FIRST_REAL_TIME);
        }
        None => {
            let _ = write!(out, "{}", number as i32);
        }
    }
}

/// A set of signals: `[INT USR1]`, `~[KILL]` if it holds most of them.
pub(crate) fn signal_set(out: &mut String, set: u64) {
    const MANY: u32 = 42;
    let inverted = set.count_ones() > MANY;
    out.push_str(if inverted { "~[" } else { "[" });
    let shown = if inverted { !set } else { set };
    let start = out.len();
    for number in (1..=64).filter(|number| shown & (1 << (number - 1)) != 0) {
        if out.len() > start {
            out.push(' ');
        }
        let mut name = String::new();
        signal(&mut name, number);
        out.push_str(name.strip_prefix("SIG").unwrap_or(&name));
    }
    out.push(']');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags_of(names: Names, value: u64) -> String {
        let mut out = String::new();
        flags(&mut out, names, value);
        out
    }

    #[test]
    fn flags_are_named_and_the_rest_is_a_number() {
        assert_eq!(flags_of(PROT, 3), "PROT_READ|PROT_WRITE");
        assert_eq!(flags_of(PROT, 0), "PROT_NONE");
        assert_eq!(flags_of(MFD, 0), "0");
        assert_eq!(flags_of(GRND, 0x11), "GRND_NONBLOCK|0x10");
        assert_eq!(flags_of(GRND, 0x100), "0x100");
        assert_eq!(flags_of(ACCESS, 6), "R_OK|W_OK");
        assert_eq!(flags_of(ACCESS, 0), "F_OK");
        assert_eq!(flags_of(OPEN, u64::from(O_SYNC)), "O_SYNC");
        assert_eq!(flags_of(OPEN, u64::from(O_TMPFILE)), "O_TMPFILE");
    }

    #[test]
    fn signals_and_sets_have_their_names() {
        let set = |set| {
            let mut out = String::new();
            signal_set(&mut out, set);
            out
        };
        assert_eq!(set(0), "[]");
        assert_eq!(set(1 << 1 | 1 << 9 | 1 << 33), "[INT USR1 RT_2]");
        assert_eq!(set(!0), "~[]");
        assert_eq!(set(!(1 << 8)), "~[KILL]");
    }
}
