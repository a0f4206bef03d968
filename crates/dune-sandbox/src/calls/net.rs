//! Sockets: what is made, and the addresses that the program names.
//!
//! An address is copied into the guard before the kernel gets it, so that what
//! a policy decides on is what is used. [`crate::calls::message`] has the calls
//! with `struct msghdr`, [`crate::calls::sockopt`] the options.

use linux_raw_sys::general::{
    __NR_accept, __NR_accept4, __NR_bind, __NR_connect, __NR_getsockopt, __NR_ioctl, __NR_recvfrom,
    __NR_sendto, __NR_socket, __NR_socketpair,
};
use linux_raw_sys::ioctl::SIOCGIFCONF;
use linux_raw_sys::net::{
    AF_INET, AF_INET6, AF_NETLINK, AF_UNIX, SO_RCVTIMEO, SO_SNDTIMEO, SOCK_RAW, SOL_SOCKET,
};

use crate::bounce::Lent;
use crate::calls::net_policy::Naming;
use crate::calls::{forward, forward_always, own_mut};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::Args;

/// Bytes of `struct sockaddr_storage`: the kernel takes no longer address.
pub(crate) const ADDRESS_MAX: usize = 128;

/// The guard's copy of a socket address.
#[derive(Clone, Copy)]
pub(crate) struct Address {
    bytes: [u8; ADDRESS_MAX],
    len: usize,
}

impl Address {
    /// Copies `len` bytes, a signed 32-bit number, from `addr`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a length that no address has, `EFAULT`.
    pub(crate) fn read(guard: &Guard, addr: u64, len: u64) -> Result<Self, Errno> {
        let len = usize::try_from(len as i32).map_err(|_| Errno::EINVAL)?;
        let mut bytes = [0; ADDRESS_MAX];
        let place = bytes.get_mut(..len).ok_or(Errno::EINVAL)?;
        guard.memory().read(addr, place)?;
        Ok(Self { bytes, len })
    }

    /// A copy for the kernel.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn lend(&self, guard: &Guard) -> Result<Lent, Errno> {
        guard.lend(&self.bytes)
    }

    /// Its number of bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Makes it the name of a pathname socket.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the path is too long for one.
    pub(crate) fn set_unix_path(&mut self, path: &[u8]) -> Result<(), Errno> {
        /// `sun_path` with a final zero.
        const PATH_ROOM: usize = 108;
        const FAMILY: usize = 2;
        if path.len() >= PATH_ROOM {
            return Err(Errno::EINVAL);
        }
        self.bytes[FAMILY..].fill(0);
        self.bytes[FAMILY..FAMILY + path.len()].copy_from_slice(path);
        self.len = FAMILY + path.len() + 1;
        Ok(())
    }

    /// The address itself.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Refuses what an ordinary user of a kernel with few protocols does not get:
/// families whose options and messages the guard does not know, packets as
/// they are on the wire, and all of netlink but questions about interfaces,
/// addresses and routes (`getifaddrs`, `if_nameindex`).
fn check_kind(family: u64, kind: u64, protocol: u64) -> Result<(), Errno> {
    /// The type without `SOCK_NONBLOCK` and `SOCK_CLOEXEC`.
    const TYPE: u32 = 0xf;
    const NETLINK_ROUTE: u32 = 0;
    const SOCK_PACKET: u32 = 10;
    let kind = kind as u32 & TYPE;
    match family as u32 {
        AF_UNIX => Ok(()),
        AF_INET | AF_INET6 if matches!(kind, SOCK_RAW | SOCK_PACKET) => Err(Errno::EPERM),
        AF_INET | AF_INET6 => Ok(()),
        AF_NETLINK if protocol as u32 == NETLINK_ROUTE => Ok(()),
        AF_NETLINK => Err(Errno::EPROTONOSUPPORT),
        _ => Err(Errno::EAFNOSUPPORT),
    }
}

pub(crate) fn socket(guard: &mut Guard, args: Args) -> SysResult {
    let [family, kind, protocol, ..] = args;
    check_kind(family, kind, protocol)?;
    guard.may_make_socket(family as u32, kind as u32)?;
    forward(__NR_socket, args)
}

pub(crate) fn socketpair(_guard: &mut Guard, args: Args) -> SysResult {
    let [family, kind, protocol, ..] = args;
    check_kind(family, kind, protocol)?;
    forward(__NR_socketpair, args)
}

pub(crate) fn bind(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, addr, len, ..] = args;
    let mut address = Address::read(guard, addr, len)?;
    guard.may_name(Naming::Bind, &mut address)?;
    let lent = address.lend(guard)?;
    forward(__NR_bind, [fd, lent.pointer(), address.len(), 0, 0, 0])
}

pub(crate) fn connect(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, addr, len, ..] = args;
    let mut address = Address::read(guard, addr, len)?;
    let socket = guard.hold_socket(fd)?;
    guard.may_name(Naming::Connect(socket.fd()), &mut address)?;
    let lent = address.lend(guard)?;
    forward(
        __NR_connect,
        [socket.fd(), lent.pointer(), address.len(), 0, 0, 0],
    )
}

pub(crate) fn listen(guard: &mut Guard, args: Args) -> SysResult {
    guard.listen(args[0], args[1])
}

/// The data is the program's, checked by the table; without an address it is
/// `send`.
pub(crate) fn sendto(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, data, count, flags, addr, len] = args;
    let result = if addr == 0 {
        forward(__NR_sendto, [fd, data, count, flags, 0, 0])
    } else {
        let mut address = Address::read(guard, addr, len)?;
        let socket = guard.hold_socket(fd)?;
        let fd = socket.fd();
        guard.may_name(Naming::Send(fd, "sendto"), &mut address)?;
        let lent = address.lend(guard)?;
        let to = [fd, data, count, flags, lent.pointer(), address.len()];
        forward(__NR_sendto, to)
    };
    bounded(guard, fd, SO_SNDTIMEO, result)
}

/// All checked by the table.
pub(crate) fn recvfrom(guard: &mut Guard, args: Args) -> SysResult {
    let result = forward(__NR_recvfrom, args);
    bounded(guard, args[0], SO_RCVTIMEO, result)
}

/// All checked by the table.
pub(crate) fn accept(guard: &mut Guard, args: Args) -> SysResult {
    let result = forward(__NR_accept, args);
    bounded(guard, args[0], SO_RCVTIMEO, result)
}

/// All checked by the table.
pub(crate) fn accept4(guard: &mut Guard, args: Args) -> SysResult {
    let result = forward(__NR_accept4, args);
    bounded(guard, args[0], SO_RCVTIMEO, result)
}

/// The result of a call that may wait, on a socket that may have a time limit
/// for it (`SO_RCVTIMEO` or `SO_SNDTIMEO`): with one, a call that a signal
/// interrupted does not start again (signal(7)), or it could wait for ever.
pub(crate) fn bounded(guard: &mut Guard, fd: u64, limit: u32, result: SysResult) -> SysResult {
    if result == Err(Errno::EINTR) {
        let mut time = [0_u64; 2];
        let mut len = size_of_val(&time) as u32;
        let (level, name) = (u64::from(SOL_SOCKET), u64::from(limit));
        let args = [fd, level, name, own_mut(&mut time), own_mut(&mut len), 0];
        let got = forward_always(__NR_getsockopt, args);
        guard.never_restart = got.is_ok() && time != [0, 0];
    }
    result
}

/// `ioctl` with `SIOCGIFCONF`, whose argument points at the memory for the
/// list.
pub(crate) fn list_interfaces(guard: &mut Guard, fd: u64, argument: u64) -> SysResult {
    /// `struct ifconf`: a length, a hole, a pointer.
    const LEN: u64 = 0xffff_ffff;
    let [len, list]: [u64; 2] = guard.memory().read_value(argument)?;
    let len = len & LEN;
    let mut copy = [len, guard.user_output(list, len)?];
    let lent = guard.lend(&copy)?;
    let args = [fd, u64::from(SIOCGIFCONF), lent.pointer(), 0, 0, 0];
    let result = forward(__NR_ioctl, args)?;
    lent.read_into(&mut copy);
    guard.memory().write_value(argument, &(copy[0] as u32))?;
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::own;
    use crate::testing::{UserPages, guard};

    #[test]
    fn only_known_kinds_of_socket_are_made() {
        const AF_PACKET: u64 = 17;
        const AF_ALG: u64 = 38;
        const AF_VSOCK: u64 = 40;
        const NETLINK_AUDIT: u64 = 9;
        const CLOEXEC: u64 = 0o2_000_000;
        let check = |family: u32, kind, protocol| check_kind(u64::from(family), kind, protocol);
        for family in [AF_PACKET, AF_ALG, AF_VSOCK, 0, u64::MAX] {
            assert_eq!(check_kind(family, 1, 0), Err(Errno::EAFNOSUPPORT));
        }
        let raw = u64::from(SOCK_RAW);
        assert_eq!(check(AF_INET, raw | CLOEXEC, 1), Err(Errno::EPERM));
        assert_eq!(check(AF_INET6, raw, 58), Err(Errno::EPERM));
        assert_eq!(check(AF_INET, 1 | CLOEXEC, 6), Ok(()));
        assert_eq!(check(AF_NETLINK, raw, 0), Ok(()));
        assert_eq!(
            check(AF_NETLINK, raw, NETLINK_AUDIT),
            Err(Errno::EPROTONOSUPPORT)
        );
    }

    #[test]
    fn an_address_is_copied_once_and_whole() {
        let pages = UserPages::anonymous(1);
        let guard = guard();
        guard.program.memory_mut().areas = pages.memory.read().unwrap().areas.clone();
        guard
            .memory()
            .write(pages.start(), b"\x01\0/tmp/x")
            .unwrap();
        let address = Address::read(&guard, pages.start(), 8).unwrap();
        guard.memory().write(pages.start(), &[0xff; 8]).unwrap();
        assert_eq!(address.bytes(), b"\x01\0/tmp/x");
        for len in [129, u64::from(u32::MAX), 1 << 31] {
            let read = Address::read(&guard, pages.start(), len);
            assert_eq!(read.map(|_| ()), Err(Errno::EINVAL), "{len:#x}");
        }
        let guards = own(&address);
        for addr in [guards, 0, u64::MAX - 4, pages.start() + 4090] {
            let read = Address::read(&guard, addr, 16);
            assert_eq!(read.map(|_| ()), Err(Errno::EFAULT), "{addr:#x}");
        }
    }
}
