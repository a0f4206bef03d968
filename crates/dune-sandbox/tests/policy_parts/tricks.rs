//! What a program does that knows how the guard decides: this binary, in the sandbox. Each
//! attempt is one line, `NAME ok` or `NAME errno`.

#![expect(unsafe_code, reason = "calls that no library makes")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "small calls on descriptors and plain values side by side"
)]

use std::mem::size_of_val;
use std::os::fd::{AsRawFd, RawFd};

/// Runs the tricks of that name, in the sandbox.
pub(crate) fn play(name: &str, words: &[String]) -> bool {
    let number = |index: usize| words.get(index).and_then(|word| word.parse().ok());
    match (name, number(0), number(1)) {
        ("tricks-of-net", ..) => net(),
        ("tricks-of-files", ..) => files(words),
        ("tricks-of-signals", Some(victim), Some(descriptor)) => signals(victim, descriptor),
        _ => return false,
    }
    true
}

/// A descriptor that stands for a process, and stays over `execve`.
pub(crate) fn descriptor_of(process: u32) -> RawFd {
    // SAFETY: numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) } as RawFd;
    // SAFETY: numbers.
    let kept = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    assert!(fd >= 0 && kept == 0);
    fd
}

fn attempt(name: &str, result: libc::c_long) {
    if result < 0 {
        let errno = std::io::Error::last_os_error();
        println!("{name} {}", errno.raw_os_error().unwrap_or(0));
    } else {
        println!("{name} ok");
    }
}

fn inet(family: i32, ip: [u8; 4], port: u16) -> [u8; 16] {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    address[4..8].copy_from_slice(&ip);
    address
}

fn send(fd: RawFd, to: &[u8; 16]) -> libc::c_long {
    // SAFETY: the message and the address are as long as is said.
    unsafe { libc::sendto(fd, c"x".as_ptr().cast(), 1, 0, to.as_ptr().cast(), 16) as libc::c_long }
}

fn set(fd: RawFd, level: i32, name: i32, value: &[u8]) -> libc::c_long {
    let (at, len) = (value.as_ptr().cast(), value.len() as u32);
    // SAFETY: the value is as long as is said.
    unsafe { libc::setsockopt(fd, level, name, at, len).into() }
}

/// A message with one control message.
fn send_directed(fd: RawFd, mut to: [u8; 16], level: i32, kind: i32, data: &[u8]) -> libc::c_long {
    let mut control = [0_u64; 8];
    control[0] = 16 + data.len() as u64;
    control[1] = level as u64 | (kind as u64) << 32;
    for (word, bytes) in control[2..].iter_mut().zip(data.chunks(8)) {
        let mut all = [0; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(all);
    }
    let mut vector = libc::iovec {
        iov_base: c"x".as_ptr().cast_mut().cast(),
        iov_len: 1,
    };
    // SAFETY: all zeros is a value of it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = to.as_mut_ptr().cast();
    message.msg_namelen = size_of_val(&to) as u32;
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = (16 + data.len()).next_multiple_of(8);
    // SAFETY: everything that it points at lives.
    unsafe { libc::sendmsg(fd, &raw const message, 0) as libc::c_long }
}

fn net() {
    let socket = |family, kind| {
        // SAFETY: takes no memory.
        let fd = unsafe { libc::socket(family, kind, 0) };
        assert!(fd >= 0);
        fd
    };
    let (v4, v6) = (libc::AF_INET, libc::AF_INET6);
    let near = inet(v4, [127, 0, 0, 1], 9);
    let udp = socket(v4, libc::SOCK_DGRAM);
    // Whoever has no family is IPv4 to the kernel.
    attempt("no-family-send", send(udp, &inet(0, [192, 0, 2, 1], 9)));
    let any = inet(0, [0; 4], 0);
    // SAFETY: an address of that length.
    let bound = unsafe { libc::bind(udp, any.as_ptr().cast(), 16) };
    attempt("no-family-bind", bound.into());
    // Routes in the packet.
    let lsrr = [131, 7, 4, 192, 0, 2, 1, 0];
    attempt("route-option", set(udp, libc::SOL_IP, 4, &lsrr));
    attempt(
        "device-option",
        set(udp, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo"),
    );
    attempt(
        "route-message",
        send_directed(udp, near, libc::SOL_IP, 7, &lsrr),
    );
    attempt(
        "source-message",
        send_directed(udp, near, libc::SOL_IP, 8, &[0; 12]),
    );
    attempt(
        "plain-message",
        send_directed(udp, near, libc::SOL_IP, 2, &[64, 0, 0, 0]),
    );
    let tcp6 = socket(v6, libc::SOCK_STREAM);
    attempt("segments", set(tcp6, libc::SOL_IPV6, 57, &[0; 24]));
    // An address that a socket keeps although there is no way to its peer.
    let broadcast = inet(v4, [127, 255, 255, 255], 9);
    let fresh = socket(v4, libc::SOCK_DGRAM);
    // SAFETY: an address of that length.
    let _ = unsafe { libc::connect(fresh, broadcast.as_ptr().cast(), 16) };
    println!("after-connect {}", own_address(fresh));
    // A socket of IPv6 that sends to IPv4.
    let both = socket(v6, libc::SOCK_DGRAM);
    attempt("other-family", send(both, &near));
    println!("after-send {}", own_address(both));
    replaced();
}

/// Whether what a socket is bound to is the loopback's, or nothing yet.
fn own_address(fd: RawFd) -> String {
    let mut bytes = [0_u8; 28];
    let mut len = 28_u32;
    // SAFETY: as long as is said.
    unsafe { libc::getsockname(fd, bytes.as_mut_ptr().cast(), &raw mut len) };
    let ip = if len == 16 {
        &bytes[4..8]
    } else {
        &bytes[8..24]
    };
    let is_loopback = ip == [127, 255, 255, 255] || ip.ends_with(&[127, 0, 0, 1]);
    let text = if is_loopback {
        "loopback"
    } else {
        "everywhere"
    };
    text.to_owned()
}

/// Another thread puts a socket without an address in the place of one that may be listened
/// on.
fn replaced() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let good = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    // SAFETY: takes no memory.
    let bad = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
    // SAFETY: descriptors of this program.
    let place = unsafe { libc::dup(good.as_raw_fd()) };
    let stop = AtomicBool::new(false);
    let listens = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: descriptors of this program.
                unsafe { libc::dup2(bad, place) };
                // SAFETY: the same.
                unsafe { libc::dup2(good.as_raw_fd(), place) };
            }
        });
        let mut listens = 0;
        for _ in 0..3000 {
            // SAFETY: takes no memory.
            unsafe { libc::listen(place, 1) };
            let (mut state, mut len) = (0_i32, 4_u32);
            // SAFETY: one number.
            unsafe {
                libc::getsockopt(
                    bad,
                    libc::SOL_SOCKET,
                    libc::SO_ACCEPTCONN,
                    (&raw mut state).cast(),
                    &raw mut len,
                )
            };
            listens += state;
        }
        stop.store(true, Ordering::Relaxed);
        listens
    });
    println!("replaced {listens}");
}

/// Another thread puts a file that may only be read in the place of every descriptor that
/// appears, while one that may be written is opened.
fn files(words: &[String]) {
    use std::os::unix::fs::MetadataExt as _;
    use std::sync::atomic::{AtomicBool, Ordering};
    /// Far from the numbers that appear.
    const AWAY: RawFd = 100;
    let [read_only, writable] = words else { return };
    let file = std::fs::File::open(read_only).expect("it may be read");
    let inode = file.metadata().expect("an open file").ino();
    // SAFETY: numbers.
    let away = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD, AWAY) };
    drop(file);
    let path = std::ffi::CString::new(writable.as_str()).expect("a path");
    let stop = AtomicBool::new(false);
    let (wins, opened) = std::thread::scope(|scope| {
        let replace = || {
            while !stop.load(Ordering::Relaxed) {
                for fd in 3..8 {
                    // SAFETY: descriptors of this program.
                    unsafe {
                        libc::dup2(away, fd);
                        libc::close(fd);
                    }
                }
            }
        };
        scope.spawn(replace);
        scope.spawn(replace);
        let (mut wins, mut opened) = (0, 0);
        for _ in 0..20_000 {
            // SAFETY: a path, and one structure. In this order: what is put in the place of the
            // file cannot be written to.
            let (fd, is_it, mode) = unsafe {
                let fd = libc::open(path.as_ptr(), libc::O_RDWR);
                let mut stat: libc::stat = std::mem::zeroed();
                libc::fstat(fd, &raw mut stat);
                (fd, stat.st_ino == inode, libc::fcntl(fd, libc::F_GETFL))
            };
            opened += u32::from(fd >= 0);
            wins += u32::from(is_it && mode >= 0 && mode & libc::O_ACCMODE == libc::O_RDWR);
            // SAFETY: a descriptor of this program.
            unsafe { libc::close(fd) };
        }
        stop.store(true, Ordering::Relaxed);
        (wins, opened)
    });
    println!("wins {wins}, some opened {}", opened > 0);
}

fn signals(victim: i32, descriptor: RawFd) {
    // SAFETY: numbers; a null `siginfo`.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, descriptor, 9, 0, 0) };
    attempt("by-descriptor", sent);
    // Nobody can look who the victim is any more.
    // SAFETY: one structure.
    let sent = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = 0;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        libc::kill(victim, 9)
    };
    attempt("blind", sent.into());
}
