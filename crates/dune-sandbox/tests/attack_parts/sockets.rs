//! Sockets that work: what they are asked to do would succeed, were it not for
//! one bad pointer, option or descriptor.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dune_sandbox::host::Errno;
use linux_raw_sys::general::*;
use linux_raw_sys::net::*;

use super::{SUCCEEDED, Target, at, call, refused, stage, suspects, works};

/// Two connected sockets.
fn pair(kind: u32) -> [u64; 2] {
    let mut fds = [0_i32; 2];
    let out = (&raw mut fds).expose_provenance() as u64;
    let args = [u64::from(AF_UNIX), u64::from(kind), 0, out];
    works("socketpair", call(__NR_socketpair, &args));
    fds.map(|fd| fd as u64)
}

/// `struct msghdr`.
fn header(vectors: u64, count: u64, control: u64, control_len: u64) -> [u64; 8] {
    [0, 0, vectors, count, control, control_len, 0, 0]
}

/// One control message with descriptors.
fn rights(fds: [u32; 2]) -> [u64; 3] {
    let kind = u64::from(SOL_SOCKET) | u64::from(SCM_RIGHTS) << 32;
    [24, kind, u64::from(fds[0]) | u64::from(fds[1]) << 32]
}

/// A message to read, of which one is never enough to see twice.
fn put(fd: u64) {
    let text = [0x41_u8; 64];
    works("sendto", call(__NR_sendto, &[fd, at(&text), 64, 0, 0, 0]));
}

/// Takes what messages are left: the kernel takes one before it meets a bad
/// pointer, where it is the one to meet it.
fn drain(fd: u64) {
    let mut text = [0_u8; 64];
    let dont_wait = u64::from(MSG_DONTWAIT);
    let take = [fd, mutable(&mut text), 64, dont_wait, 0, 0];
    while call(__NR_recvfrom, &take).is_ok() {}
}

/// Fails the test if a message was received with a bad pointer. Where the
/// kernel itself meets the pointer, it does so only if there is something to
/// write there (these senders have no name): then the canary tells.
fn not_received(what: &str, result: dune_sandbox::host::SysResult) {
    if stage::checks_pointers() {
        refused(what, result);
    }
}

fn mutable<T: ?Sized>(value: &mut T) -> u64 {
    (&raw mut *value).cast::<u8>().expose_provenance() as u64
}

pub(crate) fn pointers(target: &Target) {
    let [left, right] = pair(SOCK_DGRAM);
    let unix = [u64::from(AF_UNIX), 0];
    for bad in target.addresses() {
        let fds = [u64::from(AF_UNIX), u64::from(SOCK_STREAM), 0, bad];
        refused("socketpair", call(__NR_socketpair, &fds));
        refused("bind", call(__NR_bind, &[left, bad, 16]));
        refused("connect", call(__NR_connect, &[left, bad, 16]));
        refused("sendto", call(__NR_sendto, &[left, bad, 8, 0, 0, 0]));
        let to = [left, at(&unix), 8, 0, bad, 16];
        refused("sendto", call(__NR_sendto, &to));
        let receive = |args: [u64; 6]| {
            put(left);
            not_received("recvfrom", call(__NR_recvfrom, &args));
            drain(right);
        };
        receive([right, bad, 64, 0, 0, 0]);
        let mut text = [0_u8; 64];
        let mut len = 16_u32;
        let text = mutable(&mut text);
        receive([right, text, 64, 0, bad, mutable(&mut len)]);
        receive([right, text, 64, 0, text, bad]);
        put(left);
        works("recvfrom", call(__NR_recvfrom, &[right, text, 64, 0, 0, 0]));
        for nr in [__NR_getsockname, __NR_getpeername] {
            not_received("a name", call(nr, &[left, bad, mutable(&mut len)]));
            refused("a name", call(nr, &[left, text, bad]));
        }
    }
    // Lengths that no address has.
    for len in [129, 4096, u64::from(u32::MAX), 1 << 31, u64::MAX] {
        refused("bind", call(__NR_bind, &[left, at(&unix), len]));
        refused("connect", call(__NR_connect, &[left, at(&unix), len]));
        let to = [left, at(&unix), 8, 0, at(&unix), len];
        refused("sendto", call(__NR_sendto, &to));
    }
    accepting(target);
}

/// A connection waits, and is accepted into the guard.
fn accepting(target: &Target) {
    let unix = u64::from(AF_UNIX);
    let stream = u64::from(SOCK_STREAM | O_NONBLOCK);
    let server = works("socket", call(__NR_socket, &[unix, stream, 0]));
    // The kernel chooses a name.
    works("bind", call(__NR_bind, &[server, at(&[AF_UNIX as u16]), 2]));
    works("listen", call(__NR_listen, &[server, 64]));
    let mut name = [0_u64; 16];
    let mut len = 128_u32;
    let named = [server, mutable(&mut name), mutable(&mut len)];
    works("getsockname", call(__NR_getsockname, &named));
    for bad in target.addresses() {
        let client = works("socket", call(__NR_socket, &[unix, stream, 0]));
        let to = [client, at(&name), u64::from(len)];
        works("connect", call(__NR_connect, &to));
        let mut out = 128_u32;
        for nr in [__NR_accept, __NR_accept4] {
            refused("accept", call(nr, &[server, bad, mutable(&mut out), 0]));
            refused("accept", call(nr, &[server, mutable(&mut name), bad, 0]));
        }
    }
}

pub(crate) fn messages(target: &Target) {
    let [left, right] = pair(SOCK_DGRAM);
    let mut text = [0_u8; 64];
    let good = [mutable(&mut text), 64];
    for bad in target.addresses() {
        let bad_vector = [bad, 64];
        let mut wrong_name = header(at(&good), 1, 0, 0);
        (wrong_name[0], wrong_name[1]) = (bad, 16);
        let wrong = [
            header(bad, 1, 0, 0),
            header(at(&bad_vector), 1, 0, 0),
            header(at(&good), 1, bad, 64),
            wrong_name,
        ];
        for header in &wrong {
            // In the first place of `struct mmsghdr` likewise.
            refused("sendmsg", call(__NR_sendmsg, &[left, at(header), 0]));
            refused("sendmmsg", call(__NR_sendmmsg, &[left, at(header), 1, 0]));
            put(left);
            not_received("recvmsg", call(__NR_recvmsg, &[right, at(header), 0]));
            drain(right);
            put(left);
            let many = [right, at(header), 1, 0, 0];
            not_received("recvmmsg", call(__NR_recvmmsg, &many));
            drain(right);
        }
        let fine = header(at(&good), 1, 0, 0);
        for nr in [__NR_sendmsg, __NR_recvmsg] {
            refused("a message", call(nr, &[left, bad, 0]));
        }
        for nr in [__NR_sendmmsg, __NR_recvmmsg] {
            refused("messages", call(nr, &[left, bad, 1, 0, 0]));
        }
        put(left);
        not_received(
            "recvmmsg",
            call(__NR_recvmmsg, &[right, at(&fine), 1, 0, bad]),
        );
        drain(right);
        put(left);
        works("recvmsg", call(__NR_recvmsg, &[right, at(&fine), 0]));
    }
    let too_many = header(at(&good), u64::MAX / 16, 0, 0);
    refused("sendmsg", call(__NR_sendmsg, &[left, at(&too_many), 0]));
    refused("recvmsg", call(__NR_recvmsg, &[right, at(&too_many), 0]));
}

pub(crate) fn options(target: &Target) {
    let tcp = [u64::from(AF_INET), u64::from(SOCK_STREAM), 0];
    let socket = works("socket", call(__NR_socket, &tcp));
    let level = u64::from(SOL_SOCKET);
    let mut value = [0_u64; 512];
    let filter = [1_u64, at(&[6_u64])];
    for bad in target.addresses() {
        let set = [socket, level, u64::from(SO_RCVTIMEO), bad, 16];
        refused("setsockopt", call(__NR_setsockopt, &set));
        let mut len = 4_u32;
        let get = [socket, level, u64::from(SO_TYPE), bad, mutable(&mut len)];
        refused("getsockopt", call(__NR_getsockopt, &get));
        let get = [socket, level, u64::from(SO_TYPE), mutable(&mut value), bad];
        refused("getsockopt", call(__NR_getsockopt, &get));
    }
    // Programs and tables, with pointers in them.
    for (level, name) in [
        (SOL_SOCKET, SO_ATTACH_FILTER),
        (SOL_SOCKET, SO_ATTACH_BPF),
        (SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF),
        (SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF),
        (SOL_IP, 64),
        (SOL_IP, 96),
        (SOL_IPV6, 64),
        (SOL_TCP, TCP_ZEROCOPY_RECEIVE),
    ] {
        let (level, name) = (u64::from(level), u64::from(name));
        let set = [socket, level, name, at(&filter), 16];
        assert_eq!(call(__NR_setsockopt, &set), Err(Errno::ENOPROTOOPT));
        let mut len = 4096_u32;
        let get = [socket, level, name, mutable(&mut value), mutable(&mut len)];
        assert_eq!(call(__NR_getsockopt, &get), Err(Errno::ENOPROTOOPT));
    }
    // The list of interfaces, into the guard.
    const SIOCGIFCONF: u64 = 0x8912;
    for bad in target.addresses() {
        let list = [400, bad];
        refused("ioctl", call(__NR_ioctl, &[socket, SIOCGIFCONF, at(&list)]));
        refused("ioctl", call(__NR_ioctl, &[socket, SIOCGIFCONF, bad]));
    }
    // Any option at all, with a length that wraps.
    for level in [0, 1, 6, 17, 41, 58, 136, 255, 270, 282] {
        for name in 0..128 {
            for len in [u64::from(u32::MAX), 1 << 31, 0x7fff_ffff] {
                let set = [socket, level, name, u64::MAX - 4095, len];
                refused("setsockopt", call(__NR_setsockopt, &set));
                let mut len = len as u32;
                let get = [socket, level, name, target.canary, mutable(&mut len)];
                let got = call(__NR_getsockopt, &get);
                // Some options are empty: nothing is written, as the canary says.
                if stage::checks_pointers() {
                    refused("getsockopt", got);
                }
            }
        }
    }
}

pub(crate) fn descriptors(_target: &Target) {
    let [left, right] = pair(SOCK_DGRAM);
    works(
        "close_range",
        call(__NR_close_range, &[right + 1, u64::from(u32::MAX), 0]),
    );
    let vector = [at(b"x"), 1];
    for fd in suspects().filter(|fd| ![left, right].contains(fd)) {
        for fds in [[fd as u32, fd as u32], [left as u32, fd as u32]] {
            let control = rights(fds);
            let message = header(at(&vector), 1, at(&control), 24);
            refused("sendmsg", call(__NR_sendmsg, &[left, at(&message), 0]));
            refused("sendmmsg", call(__NR_sendmmsg, &[left, at(&message), 1, 0]));
        }
        for (nr, args) in [
            (__NR_bind, [fd, at(&[AF_UNIX as u16]), 2, 0, 0]),
            (__NR_getsockopt, [fd, 1, 3, at(&[0_u32]), at(&[4_u32])]),
            (__NR_listen, [fd, 1, 0, 0, 0]),
            (__NR_accept, [fd, 0, 0, 0, 0]),
            (__NR_shutdown, [fd, 2, 0, 0, 0]),
        ] {
            refused("a socket of the guard", call(nr, &args));
        }
    }
}

pub(crate) fn kinds(_target: &Target) {
    for (family, kind) in (0..64)
        .filter(|family| ![AF_UNIX, AF_INET, AF_INET6, AF_NETLINK].contains(family))
        .flat_map(|family| (1..=10).map(move |kind| (family, kind)))
        .chain([(AF_INET, SOCK_RAW), (AF_INET6, SOCK_RAW), (AF_INET, 10)])
        .chain((1..32).map(|protocol| (AF_NETLINK, SOCK_RAW | protocol << 16)))
    {
        let (kind, protocol) = (kind & 0xffff, kind >> 16);
        let args = [family, kind, protocol].map(u64::from);
        refused("socket", call(__NR_socket, &args));
        let pair = [args[0], args[1], args[2], at(&[0_u64])];
        refused("socketpair", call(__NR_socketpair, &pair));
    }
}

/// A header that lies in the memory that the message is received into: what
/// the kernel does with it while it copies must not matter, nor what the guard
/// reads from it afterwards.
pub(crate) fn changing_message(target: &Target) {
    let [left, right] = pair(SOCK_DGRAM);
    for word in 0..8 {
        let shared: [AtomicU64; 8] = Default::default();
        let place = at(&shared);
        let vector = [place, 64];
        for (slot, value) in shared.iter().zip(header(at(&vector), 1, 0, 0)) {
            slot.store(value, Ordering::SeqCst);
        }
        let mut bytes = [0_u64; 8];
        bytes[word] = target.canary;
        works(
            "sendto",
            call(__NR_sendto, &[left, at(&bytes), 64, 0, 0, 0]),
        );
        let got = works("recvmsg", call(__NR_recvmsg, &[right, place, 0]));
        if got != 64 {
            println!("received {got} bytes");
            std::process::exit(SUCCEEDED);
        }
    }
}

/// Another thread changes the pointers in a header and its vector between the
/// guard's look and the kernel's: what was looked at is what must be used.
pub(crate) fn flipping_pointers(target: &Target) {
    const ROUNDS: usize = 3000;
    let [left, right] = pair(SOCK_DGRAM);
    let good = [0x41_u8; 64];
    let (good, bad) = (at(&good), target.canary);
    let vector = [AtomicU64::new(good), AtomicU64::new(8)];
    let mut room = [0_u64; 8];
    let room = mutable(&mut room);
    let message: [AtomicU64; 8] = header(at(&vector), 1, 0, 0).map(AtomicU64::new);
    let into = [AtomicU64::new(room), AtomicU64::new(8)];
    let place: [AtomicU64; 8] = header(at(&into), 1, room + 16, 24).map(AtomicU64::new);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (slot, kept) in [(&vector[0], good), (&into[0], room), (&place[4], room + 16)] {
                    slot.store(bad, Ordering::Relaxed);
                    slot.store(kept, Ordering::Relaxed);
                }
            }
        });
        let dont_wait = u64::from(MSG_DONTWAIT);
        let mut sent = 0;
        for _ in 0..ROUNDS {
            sent += usize::from(call(__NR_sendmsg, &[left, at(&message), dont_wait]).is_ok());
            let mut seen = [0_u64; 8];
            let receive = [right, mutable(&mut seen), 64, dont_wait, 0, 0];
            if call(__NR_recvfrom, &receive).is_ok() && seen[0] != 0x4141_4141_4141_4141 {
                println!("sent {:#x}", seen[0]);
                std::process::exit(SUCCEEDED);
            }
            // Into the guard: the canary says whether it worked.
            put(left);
            let _ = call(__NR_recvmsg, &[right, at(&place), dont_wait]);
            let _ = call(__NR_recvfrom, &receive);
        }
        done.store(true, Ordering::Relaxed);
        if sent == 0 {
            println!("nothing was ever sent");
            std::process::exit(SUCCEEDED);
        }
    });
}
