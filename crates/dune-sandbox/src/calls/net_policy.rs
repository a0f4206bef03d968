//! Sockets under a policy: which may be made, and whom they may reach.
//!
//! Decisions are made on the guard's copy of an address, which is what the
//! kernel gets. The kernel chooses an address by itself where the program
//! names none; under `--net loopback` it must not choose one that other
//! machines can reach, so the guard chooses first. What is decided about a socket holds for
//! the socket that is used then: see [`Guard::hold_socket`].

use std::net::IpAddr;

use linux_raw_sys::general::{__NR_bind, __NR_getsockname, __NR_getsockopt, __NR_listen};
use linux_raw_sys::net::*;

use crate::calls::fd::Held;
use crate::calls::net::{ADDRESS_MAX, Address};
use crate::calls::{forward_always, own, own_mut};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::policy::net::{Address as Named, Purpose, UnixName};
use crate::policy::uses::Last;
use crate::policy::{Need, Net, Remedy};

/// `AT_FDCWD` in a register.
const CWD: u64 = linux_raw_sys::general::AT_FDCWD as i64 as u64;

/// What an address is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Naming {
    /// To be the socket's own.
    Bind,
    /// To be the peer of this socket.
    Connect(u64),
    /// To get a message from this socket, by this call.
    Send(u64, &'static str),
}

impl Naming {
    fn purpose(self) -> Purpose {
        match self {
            Self::Bind => Purpose::Bind,
            Self::Connect(_) => Purpose::Connect,
            Self::Send(..) => Purpose::Send,
        }
    }

    fn call(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Connect(_) => "connect",
            Self::Send(_, call) => call,
        }
    }
}

impl Guard {
    /// Whether the policy has sockets of this kind.
    ///
    /// # Errors
    ///
    /// `EACCES`.
    pub(crate) fn may_make_socket(&self, family: u32, kind: u32) -> Result<(), Errno> {
        /// The type without `SOCK_NONBLOCK` and `SOCK_CLOEXEC`.
        const TYPE: u32 = 0xf;
        let decided = self
            .program
            .policy()
            .net()
            .decide_socket(family, kind & TYPE);
        decided.map_err(|remedy| self.refuse(format!("socket({})", family_name(family)), remedy))
    }

    /// Whether the policy lets the program use `address` so. The path of a
    /// pathname socket to be reached is replaced by one that leads to the file
    /// that was decided on.
    ///
    /// # Errors
    ///
    /// `EACCES`, or what the kernel says of a path.
    pub(crate) fn may_name(&self, naming: Naming, address: &mut Address) -> Result<(), Errno> {
        let policy = self.program.policy();
        if policy.net() == Net::Full && policy.files().is_none() {
            return Ok(());
        }
        let named = Named::parse(address.bytes());
        let call = naming.call();
        policy
            .net()
            .decide_address(naming.purpose(), &named)
            .map_err(|remedy| self.refuse(format!("{call}({named})"), remedy))?;
        match (&named, naming) {
            (Named::Unix(UnixName::Path(path)), Naming::Bind) => {
                // The name that others will be told must stay as it is; that
                // the folder is the one decided on, the second wall sees to.
                let request = |path: &str| format!("bind({path})");
                self.hold_path(CWD, path, Last::Entry, Need::Entries, &request)?;
            }
            (Named::Unix(UnixName::Path(path)), Naming::Connect(_) | Naming::Send(..)) => {
                let request = |path: &str| format!("{call}({path})");
                let held = self.hold_path(CWD, path, Last::Follow, Need::Write, &request)?;
                address.set_unix_path(&held)?;
            }
            (Named::Inet(to, _), Naming::Connect(fd) | Naming::Send(fd, _))
                if policy.net() == Net::Loopback =>
            {
                // Connecting, a stream gets an address of its peer's side. A datagram socket
                // gets every one at first, and keeps it if there is no way to the peer.
                let chooses_well = matches!(naming, Naming::Connect(_)) && !is_datagram(fd);
                if !chooses_well && !settle_on_loopback(fd, *to) {
                    let request = format!("{call}({named})");
                    return Err(self.refuse(request, Remedy::Net(Net::Full)));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The socket `fd` for a call whose decision depends on what the socket is. A copy of
    /// the descriptor, where other threads could replace the program's own meanwhile and it
    /// matters.
    ///
    /// # Errors
    ///
    /// `ENOBUFS` if there is no descriptor left, `EBADF`.
    pub(crate) fn hold_socket(&self, fd: u64) -> Result<Held, Errno> {
        let program = &self.program;
        if program.policy().net() != Net::Loopback || program.is_single() {
            return Ok(Held::as_it_is(fd));
        }
        Held::copy(program, fd).map_err(|errno| match errno {
            Errno::EMFILE => Errno::ENOBUFS,
            other => other,
        })
    }

    /// Whether the policy lets the program say how its packets are to travel: by these
    /// control messages they could reach other machines although their address is this one's.
    ///
    /// # Errors
    ///
    /// `EACCES`.
    pub(crate) fn may_direct(&self, messages: &[(u32, u32)]) -> Result<(), Errno> {
        if self.program.policy().net() == Net::Full {
            return Ok(());
        }
        let directs = |&&(level, kind): &&(u32, u32)| match level {
            SOL_IP => !matches!(kind, IP_TOS | IP_TTL),
            SOL_IPV6 => !matches!(kind, IPV6_TCLASS | IPV6_HOPLIMIT | IPV6_DONTFRAG),
            SOL_SOCKET => kind == SO_MARK,
            _ => false,
        };
        match messages.iter().find(directs) {
            None => Ok(()),
            Some((level, kind)) => {
                let request = format!("sendmsg(control message {kind} of level {level})");
                Err(self.refuse(request, Remedy::Net(Net::Full)))
            }
        }
    }

    /// As [`Guard::may_direct`], for an option that is to be set.
    ///
    /// # Errors
    ///
    /// `EACCES`.
    pub(crate) fn may_set_option(&self, level: u32, name: u32) -> Result<(), Errno> {
        let directs = match level {
            SOL_SOCKET => matches!(name, SO_BINDTODEVICE | SO_BINDTOIFINDEX | SO_MARK),
            SOL_IP => matches!(
                name,
                IP_OPTIONS
                    | IP_RETOPTS
                    | IP_UNICAST_IF
                    | IP_MULTICAST_IF
                    | IP_TRANSPARENT
                    | IP_FREEBIND
            ),
            SOL_IPV6 => matches!(
                name,
                IPV6_RTHDR
                    | IPV6_RTHDRDSTOPTS
                    | IPV6_HOPOPTS
                    | IPV6_DSTOPTS
                    | IPV6_PKTINFO
                    | IPV6_UNICAST_IF
                    | IPV6_MULTICAST_IF
                    | IPV6_TRANSPARENT
                    | IPV6_FREEBIND
            ),
            _ => false,
        };
        if !directs || self.program.policy().net() == Net::Full {
            return Ok(());
        }
        let request = format!("setsockopt(option {name} of level {level})");
        Err(self.refuse(request, Remedy::Net(Net::Full)))
    }

    /// Listens on a socket, if it may be: one without an address would get
    /// one that every machine can reach.
    ///
    /// # Errors
    ///
    /// `EACCES`, or what the kernel says.
    pub(crate) fn listen(&self, fd: u64, backlog: u64) -> SysResult {
        let held = self.hold_socket(fd)?;
        let net = self.program.policy().net();
        if net != Net::Full
            && let Some(named @ Named::Inet(..)) = own_name(held.fd())
        {
            net.decide_address(Purpose::Bind, &named)
                .map_err(|remedy| self.refuse(format!("listen({named})"), remedy))?;
        }
        // The kernel says what is wrong with any other.
        forward_always(__NR_listen, [held.fd(), backlog, 0, 0, 0, 0])
    }

    fn refuse(&self, request: String, remedy: Remedy) -> Errno {
        self.program.policy().refuse(request, remedy, Errno::EACCES)
    }
}

/// The socket's own address.
fn own_name(fd: u64) -> Option<Named> {
    let mut bytes = [0_u8; ADDRESS_MAX];
    let mut len = ADDRESS_MAX as u32;
    let args = [fd, own_mut(&mut bytes), own_mut(&mut len), 0, 0, 0];
    forward_always(__NR_getsockname, args).ok()?;
    Some(Named::parse(bytes.get(..len as usize)?))
}

fn is_datagram(fd: u64) -> bool {
    let mut kind = 0_u32;
    let mut len = size_of_val(&kind) as u32;
    let (level, name) = (u64::from(SOL_SOCKET), u64::from(SO_TYPE));
    let args = [fd, level, name, own_mut(&mut kind), own_mut(&mut len), 0];
    // Who knows: the stricter rule.
    forward_always(__NR_getsockopt, args).is_err() || kind == SOCK_DGRAM
}

/// Gives a socket without an address the loopback address that is to be reached (this machine
/// has it), on a port of the kernel's choice. Whether the socket has an address then.
fn settle_on_loopback(fd: u64, to: IpAddr) -> bool {
    let Some(Named::Inet(own_ip, 0)) = own_name(fd) else {
        // It has one, which was decided on; or it is none for this call, as the kernel says.
        return true;
    };
    // Family, port zero, then the address; in between, in IPv6, the flow.
    let mut name = [0_u8; 28];
    let (family, len) = match (own_ip, to.to_canonical()) {
        (IpAddr::V4(_), IpAddr::V4(ip)) => {
            name[4..8].copy_from_slice(&ip.octets());
            (AF_INET, 16)
        }
        (IpAddr::V6(_), IpAddr::V4(ip)) => {
            name[8..24].copy_from_slice(&ip.to_ipv6_mapped().octets());
            (AF_INET6, 28)
        }
        (_, IpAddr::V6(ip)) => {
            name[8..24].copy_from_slice(&ip.octets());
            (AF_INET6, 28)
        }
    };
    name[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    let bound = forward_always(__NR_bind, [fd, own(&name), len, 0, 0, 0]);
    // A stream socket that is being connected refuses: it gets the address of its peer's
    // side by that.
    bound.is_ok() || !matches!(own_name(fd), Some(Named::Inet(_, 0)))
}

fn family_name(family: u32) -> String {
    match family {
        AF_INET => "AF_INET".to_owned(),
        AF_INET6 => "AF_INET6".to_owned(),
        16 => "AF_NETLINK".to_owned(),
        other => format!("family {other}"),
    }
}
