//! Which `ioctl` and `fcntl` requests are forwarded, and what their argument
//! is. Everything else is refused: a request the guard does not know may take
//! pointers it does not check.

use linux_raw_sys::general::{
    F_ADD_SEALS, F_DUPFD, F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFD, F_GETFL, F_GETLEASE, F_GETLK,
    F_GETOWN, F_GETOWN_EX, F_GETPIPE_SZ, F_GETSIG, F_NOTIFY, F_OFD_GETLK, F_OFD_SETLK,
    F_OFD_SETLKW, F_SETFD, F_SETFL, F_SETLEASE, F_SETLK, F_SETLKW, F_SETOWN, F_SETOWN_EX,
    F_SETPIPE_SZ, F_SETSIG,
};
use linux_raw_sys::ioctl::{
    BLKGETSIZE64, BLKSSZGET, FIGETBSZ, FIOASYNC, FIOCLEX, FIONBIO, FIONCLEX, FIONREAD,
    FS_IOC_GETFLAGS, FS_IOC_GETVERSION, FS_IOC_SETFLAGS, SIOCATMARK, SIOCGIFADDR, SIOCGIFBRDADDR,
    SIOCGIFFLAGS, SIOCGIFHWADDR, SIOCGIFINDEX, SIOCGIFMETRIC, SIOCGIFMTU, SIOCGIFNAME,
    SIOCGIFNETMASK, SIOCGIFTXQLEN, TCFLSH, TCGETS, TCGETS2, TCSBRK, TCSBRKP, TCSETS, TCSETS2,
    TCSETSF, TCSETSF2, TCSETSW, TCSETSW2, TCXONC, TIOCEXCL, TIOCGPGRP, TIOCGPTN, TIOCGSID,
    TIOCGWINSZ, TIOCNOTTY, TIOCNXCL, TIOCOUTQ, TIOCSCTTY, TIOCSPGRP, TIOCSPTLCK, TIOCSWINSZ,
};

/// What a request's argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argument {
    /// Plain data, or none.
    Value,
    /// So many bytes, read or written.
    Bytes(u64),
}

/// The argument of an `ioctl` request, or `None` for one that is refused.
pub(crate) fn ioctl_argument(request: u32) -> Option<Argument> {
    /// `struct termios` and `struct termios2` of the kernel.
    const TERMIOS: u64 = 36;
    const TERMIOS2: u64 = 44;
    /// `struct ifreq`.
    const IFREQ: u64 = 40;
    Some(match request {
        TCGETS | TCSETS | TCSETSW | TCSETSF => Argument::Bytes(TERMIOS),
        TCGETS2 | TCSETS2 | TCSETSW2 | TCSETSF2 => Argument::Bytes(TERMIOS2),
        TIOCGWINSZ | TIOCSWINSZ => Argument::Bytes(8),
        TIOCGPGRP | TIOCSPGRP | TIOCGSID | TIOCOUTQ | TIOCGPTN | TIOCSPTLCK => Argument::Bytes(4),
        SIOCGIFNAME | SIOCGIFFLAGS | SIOCGIFADDR | SIOCGIFBRDADDR | SIOCGIFNETMASK
        | SIOCGIFMETRIC | SIOCGIFMTU | SIOCGIFHWADDR | SIOCGIFINDEX | SIOCGIFTXQLEN => {
            Argument::Bytes(IFREQ)
        }
        SIOCATMARK => Argument::Bytes(4),
        FIONREAD | FIONBIO | FIOASYNC | FIGETBSZ | BLKSSZGET => Argument::Bytes(4),
        FS_IOC_GETFLAGS | FS_IOC_SETFLAGS | FS_IOC_GETVERSION | BLKGETSIZE64 => Argument::Bytes(8),
        FIOCLEX | FIONCLEX | TCSBRK | TCSBRKP | TCXONC | TCFLSH | TIOCSCTTY | TIOCNOTTY
        | TIOCEXCL | TIOCNXCL => Argument::Value,
        _ => return None,
    })
}

/// The argument of an `fcntl` command, or `None` for one that is refused.
pub(crate) fn fcntl_argument(command: u32) -> Option<Argument> {
    /// `struct flock`.
    const FLOCK: u64 = 32;
    /// `F_GET_RW_HINT` to `F_SET_FILE_RW_HINT`: a 64-bit number.
    const RW_HINTS: core::ops::RangeInclusive<u32> = 1035..=1038;
    /// `F_DUPFD_QUERY`, whose argument is a descriptor, only compared.
    const F_DUPFD_QUERY: u32 = 1027;
    Some(match command {
        F_DUPFD | F_DUPFD_CLOEXEC | F_GETFD | F_SETFD | F_GETFL | F_SETFL | F_SETOWN | F_GETOWN
        | F_SETSIG | F_GETSIG | F_SETLEASE | F_GETLEASE | F_NOTIFY | F_SETPIPE_SZ
        | F_GETPIPE_SZ | F_ADD_SEALS | F_GET_SEALS | F_DUPFD_QUERY => Argument::Value,
        F_GETLK | F_SETLK | F_SETLKW | F_OFD_GETLK | F_OFD_SETLK | F_OFD_SETLKW => {
            Argument::Bytes(FLOCK)
        }
        F_GETOWN_EX | F_SETOWN_EX => Argument::Bytes(8),
        hint if RW_HINTS.contains(&hint) => Argument::Bytes(8),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dangerous_requests_are_not_known() {
        /// Pushes a character into the terminal of whoever runs the sandbox.
        const TIOCSTI: u32 = 0x5412;
        const KVM_CREATE_VM: u32 = 0xae01;
        const FICLONE: u32 = 0x4004_9409;
        for request in [TIOCSTI, KVM_CREATE_VM, FICLONE, 0, u32::MAX] {
            assert_eq!(ioctl_argument(request), None);
        }
        assert_eq!(ioctl_argument(TCGETS), Some(Argument::Bytes(36)));
    }
}
