//! Which socket options are passed on.
//!
//! An option is known here if its value is plain data, of which the kernel
//! reads or writes no more than the length that comes with it. Everything else
//! fails as if the kernel did not have it (`ENOPROTOOPT`): filters and firewall
//! tables, which hold pointers, and `TCP_ZEROCOPY_RECEIVE`, which changes
//! mappings.

use linux_raw_sys::general::{__NR_getsockopt, __NR_setsockopt};
use linux_raw_sys::net::*;

use crate::calls::forward;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::Args;

/// Not in the headers that we have by these names.
const SOL_NETLINK: u32 = 270;
const UDPLITE_SEND_CSCOV: u32 = 10;
const UDPLITE_RECV_CSCOV: u32 = 11;
const UDP_CORK: u32 = 1;
const UDP_NO_CHECK6_TX: u32 = 101;
const UDP_NO_CHECK6_RX: u32 = 102;
const UDP_SEGMENT: u32 = 103;
const UDP_GRO: u32 = 104;
/// `NETLINK_ADD_MEMBERSHIP` to `NETLINK_NO_ENOBUFS`, and those from
/// `NETLINK_LISTEN_ALL_NSID` on; between them are the mapped rings.
const NETLINK_PLAIN: [core::ops::RangeInclusive<u32>; 2] = [1..=5, 8..=12];

/// Whether the option may be read and set.
fn is_plain(level: u32, name: u32) -> bool {
    match level {
        SOL_SOCKET => is_plain_of_socket(name),
        SOL_IP => is_plain_of_ip(name),
        SOL_IPV6 => is_plain_of_ipv6(name),
        SOL_TCP => is_plain_of_tcp(name),
        SOL_UDP => matches!(
            name,
            UDP_CORK | UDP_NO_CHECK6_TX | UDP_NO_CHECK6_RX | UDP_SEGMENT | UDP_GRO
        ),
        SOL_UDPLITE => matches!(name, UDP_CORK | UDPLITE_SEND_CSCOV | UDPLITE_RECV_CSCOV),
        SOL_NETLINK => NETLINK_PLAIN.iter().any(|range| range.contains(&name)),
        _ => false,
    }
}

fn is_plain_of_socket(name: u32) -> bool {
    matches!(
        name,
        SO_DEBUG
            | SO_REUSEADDR
            | SO_TYPE
            | SO_ERROR
            | SO_DONTROUTE
            | SO_BROADCAST
            | SO_SNDBUF
            | SO_RCVBUF
            | SO_SNDBUFFORCE
            | SO_RCVBUFFORCE
            | SO_KEEPALIVE
            | SO_OOBINLINE
            | SO_NO_CHECK
            | SO_PRIORITY
            | SO_LINGER
            | SO_BSDCOMPAT
            | SO_REUSEPORT
            | SO_PASSCRED
            | SO_PEERCRED
            | SO_RCVLOWAT
            | SO_SNDLOWAT
            | SO_RCVTIMEO_OLD
            | SO_SNDTIMEO_OLD
            | SO_RCVTIMEO_NEW
            | SO_SNDTIMEO_NEW
            | SO_BINDTODEVICE
            | SO_DETACH_FILTER
            | SO_PEERNAME
            | SO_ACCEPTCONN
            | SO_PEERSEC
            | SO_PASSSEC
            | SO_MARK
            | SO_PROTOCOL
            | SO_DOMAIN
            | SO_RXQ_OVFL
            | SO_PEEK_OFF
            | SO_LOCK_FILTER
            | SO_SELECT_ERR_QUEUE
            | SO_BUSY_POLL
            | SO_MAX_PACING_RATE
            | SO_BPF_EXTENSIONS
            | SO_INCOMING_CPU
            | SO_MEMINFO
            | SO_INCOMING_NAPI_ID
            | SO_COOKIE
            | SO_PEERGROUPS
            | SO_TXTIME
            | SO_BINDTOIFINDEX
            | SO_TIMESTAMP_OLD
            | SO_TIMESTAMPNS_OLD
            | SO_TIMESTAMPING_OLD
            | SO_TIMESTAMP_NEW
            | SO_TIMESTAMPNS_NEW
            | SO_TIMESTAMPING_NEW
            | SO_PREFER_BUSY_POLL
            | SO_NETNS_COOKIE
            | SO_BUF_LOCK
            | SO_RESERVE_MEM
            | SO_TXREHASH
            | SO_RCVMARK
            | SO_PASSPIDFD
            | SO_PEERPIDFD
    )
}

fn is_plain_of_ip(name: u32) -> bool {
    matches!(
        name,
        IP_TOS
            | IP_TTL
            | IP_OPTIONS
            | IP_ROUTER_ALERT
            | IP_RECVOPTS
            | IP_RETOPTS
            | IP_PKTINFO
            | IP_MTU_DISCOVER
            | IP_RECVERR
            | IP_RECVTTL
            | IP_RECVTOS
            | IP_MTU
            | IP_FREEBIND
            | IP_PASSSEC
            | IP_TRANSPARENT
            | IP_ORIGDSTADDR
            | IP_MINTTL
            | IP_CHECKSUM
            | IP_BIND_ADDRESS_NO_PORT
            | IP_RECVFRAGSIZE
            | IP_RECVERR_RFC4884
            | IP_MULTICAST_IF
            | IP_MULTICAST_TTL
            | IP_MULTICAST_LOOP
            | IP_ADD_MEMBERSHIP
            | IP_DROP_MEMBERSHIP
            | IP_UNBLOCK_SOURCE
            | IP_BLOCK_SOURCE
            | IP_ADD_SOURCE_MEMBERSHIP
            | IP_DROP_SOURCE_MEMBERSHIP
            | MCAST_JOIN_GROUP
            | MCAST_BLOCK_SOURCE
            | MCAST_UNBLOCK_SOURCE
            | MCAST_LEAVE_GROUP
            | MCAST_JOIN_SOURCE_GROUP
            | MCAST_LEAVE_SOURCE_GROUP
            | IP_MULTICAST_ALL
            | IP_UNICAST_IF
            | IP_LOCAL_PORT_RANGE
            | IP_PROTOCOL
    )
}

fn is_plain_of_ipv6(name: u32) -> bool {
    matches!(
        name,
        IPV6_ADDRFORM
            | IPV6_CHECKSUM
            | IPV6_UNICAST_HOPS
            | IPV6_MULTICAST_IF
            | IPV6_MULTICAST_HOPS
            | IPV6_MULTICAST_LOOP
            | IPV6_ADD_MEMBERSHIP
            | IPV6_DROP_MEMBERSHIP
            | IPV6_ROUTER_ALERT
            | IPV6_MTU_DISCOVER
            | IPV6_MTU
            | IPV6_RECVERR
            | IPV6_V6ONLY
            | IPV6_JOIN_ANYCAST
            | IPV6_LEAVE_ANYCAST
            | IPV6_MULTICAST_ALL
            | IPV6_ROUTER_ALERT_ISOLATE
            | IPV6_RECVERR_RFC4884
            | IPV6_FLOWINFO_SEND
            | MCAST_JOIN_GROUP
            | MCAST_BLOCK_SOURCE
            | MCAST_UNBLOCK_SOURCE
            | MCAST_LEAVE_GROUP
            | MCAST_JOIN_SOURCE_GROUP
            | MCAST_LEAVE_SOURCE_GROUP
            | IPV6_RECVPKTINFO
            | IPV6_PKTINFO
            | IPV6_RECVHOPLIMIT
            | IPV6_HOPLIMIT
            | IPV6_RECVHOPOPTS
            | IPV6_HOPOPTS
            | IPV6_RTHDRDSTOPTS
            | IPV6_RECVRTHDR
            | IPV6_RTHDR
            | IPV6_RECVDSTOPTS
            | IPV6_DSTOPTS
            | IPV6_RECVPATHMTU
            | IPV6_PATHMTU
            | IPV6_DONTFRAG
            | IPV6_RECVTCLASS
            | IPV6_TCLASS
            | IPV6_AUTOFLOWLABEL
            | IPV6_ADDR_PREFERENCES
            | IPV6_MINHOPCOUNT
            | IPV6_ORIGDSTADDR
            | IPV6_TRANSPARENT
            | IPV6_UNICAST_IF
            | IPV6_RECVFRAGSIZE
            | IPV6_FREEBIND
    )
}

fn is_plain_of_tcp(name: u32) -> bool {
    matches!(
        name,
        TCP_NODELAY
            | TCP_MAXSEG
            | TCP_CORK
            | TCP_KEEPIDLE
            | TCP_KEEPINTVL
            | TCP_KEEPCNT
            | TCP_SYNCNT
            | TCP_LINGER2
            | TCP_DEFER_ACCEPT
            | TCP_WINDOW_CLAMP
            | TCP_INFO
            | TCP_QUICKACK
            | TCP_CONGESTION
            | TCP_MD5SIG
            | TCP_THIN_LINEAR_TIMEOUTS
            | TCP_THIN_DUPACK
            | TCP_USER_TIMEOUT
            | TCP_FASTOPEN
            | TCP_TIMESTAMP
            | TCP_NOTSENT_LOWAT
            | TCP_CC_INFO
            | TCP_SAVE_SYN
            | TCP_SAVED_SYN
            | TCP_FASTOPEN_CONNECT
            | TCP_FASTOPEN_KEY
            | TCP_FASTOPEN_NO_COOKIE
            | TCP_INQ
            | TCP_TX_DELAY
            | TCP_IS_MPTCP
    )
}

/// The value is the program's memory, checked by the table.
pub(crate) fn setsockopt(guard: &mut Guard, args: Args) -> SysResult {
    let [_, level, name, _, len, _] = args;
    if !is_plain(level as u32, name as u32) {
        return Err(Errno::ENOPROTOOPT);
    }
    guard.may_set_option(level as u32, name as u32)?;
    if (len as i32) < 0 {
        return Err(Errno::EINVAL);
    }
    forward(__NR_setsockopt, args)
}

/// The length is read and written by the guard, so that it is the one for
/// which the value's memory was checked.
pub(crate) fn getsockopt(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, level, name, value, len_at, _] = args;
    if !is_plain(level as u32, name as u32) {
        return Err(Errno::ENOPROTOOPT);
    }
    let mut len: i32 = guard.memory().read_value(len_at)?;
    let bytes = u64::try_from(len).map_err(|_| Errno::EINVAL)?;
    // With no bytes the kernel still tells whether it knows the option.
    let value = guard.user_output(value, bytes)?;
    let lent = guard.lend(&len)?;
    let result = forward(__NR_getsockopt, [fd, level, name, value, lent.pointer(), 0]);
    lent.read_into(&mut len);
    match result {
        Ok(result) => {
            guard.memory().write_value(len_at, &len)?;
            Ok(result)
        }
        // Too small: the kernel says how long it is.
        Err(Errno::ERANGE) => {
            guard.memory().write_value(len_at, &len)?;
            Err(Errno::ERANGE)
        }
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_with_pointers_are_not_known() {
        const IPT_SO_SET_REPLACE: u32 = 64;
        const ARPT_SO_SET_REPLACE: u32 = 96;
        const TLS_TX: u32 = 1;
        const SOL_TLS: u32 = 282;
        for (level, name) in [
            (SOL_SOCKET, SO_ATTACH_FILTER),
            (SOL_SOCKET, SO_ATTACH_BPF),
            (SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF),
            (SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF),
            (SOL_SOCKET, SO_DEVMEM_DONTNEED),
            (SOL_IP, IPT_SO_SET_REPLACE),
            (SOL_IP, ARPT_SO_SET_REPLACE),
            (SOL_IP, IP_MSFILTER),
            (SOL_IP, MCAST_MSFILTER),
            (SOL_IPV6, IP6T_SO_SET_REPLACE),
            (SOL_IPV6, IP6T_SO_GET_REVISION_MATCH),
            (SOL_TCP, TCP_ZEROCOPY_RECEIVE),
            (SOL_TCP, TCP_ULP),
            (SOL_TLS, TLS_TX),
            (SOL_NETLINK, 6),
            (SOL_NETLINK, 7),
            (SOL_RAW, 1),
            (u32::MAX, 1),
        ] {
            assert!(!is_plain(level, name), "level {level} name {name}");
        }
        assert!(is_plain(SOL_TCP, TCP_NODELAY));
        assert!(is_plain(SOL_IPV6, IPV6_V6ONLY));
    }
}
