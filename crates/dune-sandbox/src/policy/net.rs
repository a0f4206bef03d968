//! Which network the program may have.
//!
//! Decisions are about addresses that the guard has copied; `None` and `Full`
//! need no address. Pathname sockets are files and follow the file rules.

use core::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use linux_raw_sys::net::{AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC};

use super::refusal::Remedy;

/// How much network there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Net {
    /// Sockets between the program's own processes only.
    None,
    /// TCP and UDP with this machine.
    Loopback,
    /// Everything that the user may.
    Full,
}

impl Net {
    /// All of them, the smallest first.
    pub const ALL: [Self; 3] = [Self::None, Self::Loopback, Self::Full];

    /// Its name in options and files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Loopback => "loopback",
            Self::Full => "full",
        }
    }

    /// From its name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|net| net.name() == name)
    }

    /// Whether a socket of this family and type (`SOCK_*`, flags taken off)
    /// may be made.
    ///
    /// # Errors
    ///
    /// With the rule that would allow it.
    pub fn decide_socket(self, family: u32, kind: u32) -> Result<(), Remedy> {
        const SOCK_STREAM: u32 = 1;
        const SOCK_DGRAM: u32 = 2;
        let plain = matches!(kind, SOCK_STREAM | SOCK_DGRAM);
        let needed = match family {
            AF_UNIX => Self::None,
            AF_INET | AF_INET6 if plain => Self::Loopback,
            _ => Self::Full,
        };
        self.at_least(needed)
    }

    /// Whether the program may use `address` so.
    ///
    /// # Errors
    ///
    /// With the rule that would allow it.
    pub fn decide_address(self, purpose: Purpose, address: &Address) -> Result<(), Remedy> {
        let needed = match address {
            Address::Missing => Self::None,
            // Connecting to none takes an address away. For everything else IPv4 sockets
            // read an address of their own family there.
            Address::Unspecified => match purpose {
                Purpose::Connect => Self::None,
                Purpose::Bind | Purpose::Send => Self::Full,
            },
            // An abstract name is everybody's on this machine.
            Address::Unix(UnixName::Abstract(_)) => Self::Loopback,
            Address::Unix(UnixName::Unnamed | UnixName::Path(_)) => Self::None,
            Address::Inet(ip, _) if is_loopback(*ip) => Self::Loopback,
            Address::Inet(..) | Address::Other(_) => Self::Full,
        };
        self.at_least(needed)
    }

    fn at_least(self, needed: Self) -> Result<(), Remedy> {
        if self >= needed {
            Ok(())
        } else {
            Err(Remedy::Net(needed))
        }
    }
}

/// What an address is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be the socket's own.
    Bind,
    /// To be the socket's peer.
    Connect,
    /// To get one message.
    Send,
}

/// What a `sockaddr` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Too short for a family: none.
    Missing,
    /// `AF_UNSPEC`.
    Unspecified,
    /// IPv4 or IPv6, and the port.
    Inet(IpAddr, u16),
    /// A socket of this machine.
    Unix(UnixName),
    /// Another family.
    Other(u16),
}

/// The name of an `AF_UNIX` socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnixName {
    /// None: to be chosen by the kernel.
    Unnamed,
    /// A path, without its zero.
    Path(Vec<u8>),
    /// An abstract name, without the zero it begins with.
    Abstract(Vec<u8>),
}

impl Address {
    /// Reads a `sockaddr` as the kernel does. What is too short for its family
    /// is [`Address::Other`]: the kernel refuses it, and so does every policy
    /// but `Full`.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let Some((family, rest)) = bytes.split_first_chunk::<2>() else {
            return Self::Missing;
        };
        let family = u16::from_ne_bytes(*family);
        let port = || {
            rest.first_chunk::<2>()
                .map(|port| u16::from_be_bytes(*port))
        };
        let other = Self::Other(family);
        match u32::from(family) {
            AF_UNSPEC => Self::Unspecified,
            AF_INET => match (port(), rest.get(2..6).and_then(<[u8]>::first_chunk::<4>)) {
                (Some(port), Some(ip)) => Self::Inet(Ipv4Addr::from(*ip).into(), port),
                _ => other,
            },
            // Port, flow, address.
            AF_INET6 => match (port(), rest.get(6..22).and_then(<[u8]>::first_chunk::<16>)) {
                (Some(port), Some(ip)) => Self::Inet(Ipv6Addr::from(*ip).into(), port),
                _ => other,
            },
            AF_UNIX => Self::Unix(match rest {
                [] => UnixName::Unnamed,
                [0, name @ ..] => UnixName::Abstract(name.to_vec()),
                path => {
                    let end = path.iter().position(|&byte| byte == 0);
                    UnixName::Path(path[..end.unwrap_or(path.len())].to_vec())
                }
            }),
            _ => other,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing | Self::Unspecified => f.write_str("no address"),
            Self::Inet(IpAddr::V4(ip), port) => write!(f, "{ip}:{port}"),
            Self::Inet(IpAddr::V6(ip), port) => write!(f, "[{ip}]:{port}"),
            Self::Unix(UnixName::Unnamed) => f.write_str("unix"),
            Self::Unix(UnixName::Path(path)) => {
                write!(f, "unix:{}", path.escape_ascii())
            }
            Self::Unix(UnixName::Abstract(name)) => write!(f, "unix:@{}", name.escape_ascii()),
            Self::Other(family) => write!(f, "family {family}"),
        }
    }
}

/// Whether the address is this machine's own and no other machine can reach
/// it. An IPv4 address in IPv6 clothes is what is inside.
fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inet(ip: [u8; 4], port: u16) -> Vec<u8> {
        let mut bytes = (AF_INET as u16).to_ne_bytes().to_vec();
        bytes.extend(port.to_be_bytes());
        bytes.extend(ip);
        bytes.extend([0; 8]);
        bytes
    }

    fn inet6(ip: Ipv6Addr, port: u16) -> Vec<u8> {
        let mut bytes = (AF_INET6 as u16).to_ne_bytes().to_vec();
        bytes.extend(port.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(ip.octets());
        bytes.extend([0; 4]);
        bytes
    }

    fn unix(name: &[u8]) -> Vec<u8> {
        let mut bytes = (AF_UNIX as u16).to_ne_bytes().to_vec();
        bytes.extend(name);
        bytes
    }

    #[test]
    fn addresses_need_what_they_reach() {
        let local = "::1".parse().unwrap();
        let mapped = "::ffff:127.0.0.1".parse().unwrap();
        let outside = "::ffff:10.0.0.1".parse().unwrap();
        for (bytes, needed) in [
            (inet([127, 0, 0, 1], 80), Net::Loopback),
            (inet([127, 9, 9, 9], 80), Net::Loopback),
            (inet([10, 0, 0, 1], 80), Net::Full),
            (inet([0, 0, 0, 0], 80), Net::Full),
            (inet6(local, 80), Net::Loopback),
            (inet6(mapped, 80), Net::Loopback),
            (inet6(outside, 80), Net::Full),
            (inet6(Ipv6Addr::UNSPECIFIED, 80), Net::Full),
            (unix(b"/run/x\0"), Net::None),
            (unix(b"\0name"), Net::Loopback),
            (vec![], Net::None),
            (vec![16, 0, 0, 0], Net::Full),
            (inet([127, 0, 0, 1], 80)[..5].to_vec(), Net::Full),
        ] {
            let address = Address::parse(&bytes);
            for purpose in [Purpose::Bind, Purpose::Connect, Purpose::Send] {
                check(purpose, &address, needed);
            }
        }
    }

    fn check(purpose: Purpose, address: &Address, needed: Net) {
        for net in Net::ALL {
            let expected = if net >= needed {
                Ok(())
            } else {
                Err(Remedy::Net(needed))
            };
            let decided = net.decide_address(purpose, address);
            assert_eq!(decided, expected, "{net:?} {purpose:?} {address}");
        }
    }

    #[test]
    fn an_address_without_a_family_is_none_for_connect_alone() {
        let mut hidden = inet([8, 8, 8, 8], 53);
        hidden[..2].fill(0);
        let address = Address::parse(&hidden);
        check(Purpose::Connect, &address, Net::None);
        check(Purpose::Send, &address, Net::Full);
        check(Purpose::Bind, &address, Net::Full);
    }

    #[test]
    fn sockets_need_their_family() {
        const AF_PACKET: u32 = 17;
        const SOCK_RAW: u32 = 3;
        assert_eq!(Net::None.decide_socket(AF_UNIX, 1), Ok(()));
        assert_eq!(
            Net::None.decide_socket(AF_INET, 1),
            Err(Remedy::Net(Net::Loopback))
        );
        assert_eq!(Net::Loopback.decide_socket(AF_INET6, 2), Ok(()));
        assert_eq!(
            Net::Loopback.decide_socket(AF_INET, SOCK_RAW),
            Err(Remedy::Net(Net::Full))
        );
        assert_eq!(
            Net::Loopback.decide_socket(AF_PACKET, 2),
            Err(Remedy::Net(Net::Full))
        );
        assert_eq!(Net::Full.decide_socket(AF_PACKET, SOCK_RAW), Ok(()));
    }

    #[test]
    fn names_of_unix_sockets_are_the_kernels() {
        let name = |bytes: &[u8]| match Address::parse(&unix(bytes)) {
            Address::Unix(name) => name,
            other => panic!("{other:?}"),
        };
        assert_eq!(name(b""), UnixName::Unnamed);
        assert_eq!(name(b"/a\0junk"), UnixName::Path(b"/a".to_vec()));
        assert_eq!(name(b"/a"), UnixName::Path(b"/a".to_vec()));
        assert_eq!(name(b"\0a\0b"), UnixName::Abstract(b"a\0b".to_vec()));
    }

    proptest! {
        #[test]
        fn loopback_lets_nothing_out(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let address = Address::parse(&bytes);
            if Net::Loopback.decide_address(Purpose::Send, &address).is_ok() {
                let inside = match &address {
                    Address::Inet(ip, _) => ip.to_canonical().is_loopback(),
                    Address::Missing | Address::Unix(_) => true,
                    Address::Unspecified | Address::Other(_) => false,
                };
                prop_assert!(inside, "{}", address);
            }
            prop_assert_eq!(Net::Full.decide_address(Purpose::Send, &address), Ok(()));
        }
    }
}
