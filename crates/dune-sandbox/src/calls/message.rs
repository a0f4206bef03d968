//! `sendmsg`, `recvmsg` and their many-at-once forms.
//!
//! ```text
//!  the program's msghdr          the guard's copy, which the kernel gets
//!  name -----> sockaddr          sending: copied      receiving: as it is
//!  iov  -----> iovec[] --> data  copied, each checked; the data is not
//!  control --> cmsghdr[]         sending: copied      receiving: as it is
//!              and looked through
//!  flags, lengths                after receiving, written back field by field
//! ```
//!
//! Of control messages only those are sent whose contents are plain data; a
//! descriptor of the guard among those of `SCM_RIGHTS` is none (`EBADF`).

use core::mem::offset_of;

use std::os::fd::RawFd;

use linux_raw_sys::general::{
    __NR_fcntl, __NR_poll, __NR_recvmmsg, __NR_recvmsg, __NR_sendmmsg, __NR_sendmsg, F_GETFL,
    O_NONBLOCK, POLLOUT,
};
use linux_raw_sys::net::{
    MSG_DONTWAIT, SCM_CREDENTIALS, SCM_RIGHTS, SCM_TXTIME, SO_MARK, SO_PRIORITY, SO_RCVTIMEO,
    SO_SNDTIMEO, SO_TIMESTAMPING_NEW, SO_TIMESTAMPING_OLD, SOL_IP, SOL_IPV6, SOL_SOCKET, SOL_UDP,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::bounce::Lent;
use crate::calls::net::{ADDRESS_MAX, Address, bounded};
use crate::calls::net_policy::Naming;
use crate::calls::{forward, forward_always};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::Args;

/// The kernel's `struct msghdr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
struct Header {
    name: u64,
    name_len: u32,
    pad: u32,
    vectors: u64,
    vector_count: u64,
    control: u64,
    control_len: u64,
    flags: u32,
    pad_end: u32,
}

const _: () = assert!(size_of::<Header>() == 56);

/// The kernel's `struct mmsghdr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
struct CountedHeader {
    header: Header,
    /// Bytes sent or received.
    len: u32,
    pad: u32,
}

const _: () = assert!(size_of::<CountedHeader>() == 64);

/// Most vectors of one message, and most messages of one call
/// (`UIO_MAXIOV`).
const MOST: u64 = 1024;

/// The guard's copies of what one header points at, and where the program's
/// own header lies.
struct Message {
    at: u64,
    name: Option<(Lent, u64)>,
    vectors: Lent,
    vector_count: usize,
    control: Option<(Lent, usize)>,
    /// The descriptors in `control`.
    rights: Vec<RawFd>,
    /// As read, with pointers made good for receiving.
    header: Header,
}

impl Message {
    /// Copies a message to be sent from the header at `at`.
    fn to_send(guard: &Guard, fd: u64, at: u64) -> Result<Self, Errno> {
        let mut message = Self::read(guard, at)?;
        let header = &message.header;
        if header.name != 0 && header.name_len != 0 {
            let len = name_len(header)?;
            let mut name = Address::read(guard, header.name, len)?;
            guard.may_name(Naming::Send(fd, "sendmsg"), &mut name)?;
            message.name = Some((name.lend(guard)?, name.len()));
        }
        if header.control_len != 0 {
            let control = read_control(guard, header)?;
            message.rights = rights(&control)?;
            guard.may_direct(&kinds(&control))?;
            message.control = Some((guard.lend(&control[..])?, control.len()));
        }
        Ok(message)
    }

    /// Checks a message to be received into what the header at `at` says.
    fn to_receive(guard: &Guard, _fd: u64, at: u64) -> Result<Self, Errno> {
        let mut message = Self::read(guard, at)?;
        let header = &mut message.header;
        if header.name != 0 {
            let len = name_len(header)?;
            header.name_len = len as u32;
            // Of no bytes the pointer stays: the kernel tells the length.
            header.name = guard.user_output(header.name, len.max(1))?;
        }
        header.control = guard.user_output(header.control, header.control_len)?;
        header.control_len = if header.control == 0 {
            0
        } else {
            header.control_len
        };
        Ok(message)
    }

    fn read(guard: &Guard, at: u64) -> Result<Self, Errno> {
        let header: Header = guard.memory().read_value(at)?;
        if header.vector_count > MOST {
            return Err(Errno::EMSGSIZE);
        }
        let vectors = guard
            .memory()
            .read_iovecs(header.vectors, header.vector_count)?;
        Ok(Self {
            at,
            name: None,
            vectors: guard.lend(&vectors[..])?,
            vector_count: vectors.len(),
            control: None,
            rights: Vec::new(),
            header,
        })
    }

    /// The header for sending, which points at the copies of `self`.
    fn outgoing(&self) -> Header {
        Header {
            name: self.name.as_ref().map_or(0, |(name, _)| name.pointer()),
            name_len: self.name.as_ref().map_or(0, |(_, len)| *len) as u32,
            control: self.control.as_ref().map_or(0, |(lent, _)| lent.pointer()),
            control_len: self.control.as_ref().map_or(0, |(_, len)| *len) as u64,
            ..self.incoming()
        }
    }

    /// The header for receiving: the copied vectors, and checked memory of the
    /// program.
    fn incoming(&self) -> Header {
        Header {
            vectors: self.vectors.pointer(),
            vector_count: self.vector_count as u64,
            pad: 0,
            pad_end: 0,
            ..self.header
        }
    }

    /// Tells the program what the kernel put into `received`.
    fn tell(&self, guard: &Guard, received: &Header) -> Result<(), Errno> {
        let memory = guard.memory();
        if self.header.name != 0 {
            let at = self.at + offset_of!(Header, name_len) as u64;
            memory.write_value(at, &received.name_len)?;
        }
        let at = self.at + offset_of!(Header, flags) as u64;
        memory.write_value(at, &received.flags)?;
        let at = self.at + offset_of!(Header, control_len) as u64;
        memory.write_value(at, &received.control_len)
    }
}

/// The length of a message's address as the kernel takes it: a longer one than
/// any is cut.
fn name_len(header: &Header) -> Result<u64, Errno> {
    if (header.name_len as i32) < 0 {
        Err(Errno::EINVAL)
    } else {
        Ok(u64::from(header.name_len).min(ADDRESS_MAX as u64))
    }
}

/// Copies control messages to be sent.
fn read_control(guard: &Guard, header: &Header) -> Result<Vec<u8>, Errno> {
    /// More than the largest `net.core.optmem_max` that a kernel comes with:
    /// it would be `ENOBUFS` there too.
    const MOST_BYTES: u64 = 1 << 17;
    if header.control_len > MOST_BYTES {
        return Err(Errno::ENOBUFS);
    }
    let mut control = vec![0; header.control_len as usize];
    guard.memory().read(header.control, &mut control)?;
    Ok(control)
}

/// Level and type of each control message, those that are whole.
fn kinds(control: &[u8]) -> Vec<(u32, u32)> {
    let messages = ControlMessages(control).map_while(Result::ok);
    messages
        .map(|message| (message.level, message.kind))
        .collect()
}

/// Looks through control messages to be sent, and returns the descriptors
/// among them.
fn rights(control: &[u8]) -> Result<Vec<RawFd>, Errno> {
    let mut fds = Vec::new();
    for message in ControlMessages(control) {
        let message = message?;
        if !may_be_sent(message.level, message.kind) {
            return Err(Errno::EINVAL);
        }
        if (message.level, message.kind) == (SOL_SOCKET, SCM_RIGHTS) {
            let numbers = message.data.as_chunks::<4>().0;
            fds.extend(numbers.iter().map(|&fd| RawFd::from_le_bytes(fd)));
        }
    }
    Ok(fds)
}

/// Makes the call, which is to copy the descriptors `rights`, of which none
/// may be the guard's at that moment. So the guard makes none meanwhile, and
/// the call does not wait while it must not: the waiting is done apart.
/// (The time limit `SO_SNDTIMEO` does not bind such a call.)
fn send<const FLAGS: usize>(guard: &Guard, nr: u32, args: Args, rights: &[RawFd]) -> SysResult {
    if rights.is_empty() {
        return forward(nr, args);
    }
    let dont_wait = u64::from(MSG_DONTWAIT);
    let mut at_once = args;
    at_once[FLAGS] |= dont_wait;
    loop {
        let hidden = guard.program.hidden_fds();
        if rights.iter().any(|fd| hidden.binary_search(fd).is_ok()) {
            return Err(Errno::EBADF);
        }
        let result = forward(nr, at_once);
        drop(hidden);
        let waits = result == Err(Errno::EAGAIN)
            && args[FLAGS] & dont_wait == 0
            && !is_nonblocking(args[0])?;
        if !waits {
            return result;
        }
        wait_until_writable(guard, args[0])?;
    }
}

fn is_nonblocking(fd: u64) -> Result<bool, Errno> {
    let flags = forward_always(__NR_fcntl, [fd, u64::from(F_GETFL), 0, 0, 0, 0])?;
    Ok(flags & u64::from(O_NONBLOCK) != 0)
}

fn wait_until_writable(guard: &Guard, fd: u64) -> SysResult {
    // `struct pollfd`: a descriptor, then two halves.
    let poll = guard.lend(&[fd as u32, u32::from(POLLOUT as u16)])?;
    forward(__NR_poll, [poll.pointer(), 1, u64::MAX, 0, 0, 0])
}

/// Whether control messages of this kind hold nothing but plain data and
/// descriptors.
fn may_be_sent(level: u32, kind: u32) -> bool {
    match level {
        SOL_SOCKET => matches!(
            kind,
            SCM_RIGHTS
                | SCM_CREDENTIALS
                | SCM_TXTIME
                | SO_MARK
                | SO_PRIORITY
                | SO_TIMESTAMPING_OLD
                | SO_TIMESTAMPING_NEW
        ),
        // Addresses, hop limits, traffic classes, extension headers.
        SOL_IP | SOL_IPV6 | SOL_UDP => true,
        _ => false,
    }
}

/// One control message.
struct ControlMessage<'a> {
    level: u32,
    kind: u32,
    data: &'a [u8],
}

/// The control messages in a buffer, found as the kernel finds them.
struct ControlMessages<'a>(&'a [u8]);

impl<'a> Iterator for ControlMessages<'a> {
    type Item = Result<ControlMessage<'a>, Errno>;

    fn next(&mut self) -> Option<Self::Item> {
        /// `struct cmsghdr`: a length of 64 bits, which includes the header,
        /// a level and a type.
        const HEADER: usize = 16;
        let (header, _) = self.0.split_first_chunk::<HEADER>()?;
        let (len, rest) = header.split_first_chunk::<8>()?;
        let (level, kind) = rest.split_first_chunk::<4>()?;
        let len = usize::try_from(u64::from_le_bytes(*len)).ok();
        let data = len.and_then(|len| self.0.get(HEADER..len));
        let (Some(len), Some(data), Ok(kind)) = (len, data, kind.try_into()) else {
            self.0 = &[];
            return Some(Err(Errno::EINVAL));
        };
        let message = ControlMessage {
            level: u32::from_le_bytes(*level),
            kind: u32::from_le_bytes(kind),
            data,
        };
        self.0 = self.0.get(len.next_multiple_of(8)..).unwrap_or_default();
        Some(Ok(message))
    }
}

pub(crate) fn sendmsg(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, at, flags, ..] = args;
    let socket = guard.hold_socket(fd)?;
    let message = Message::to_send(guard, socket.fd(), at)?;
    let header = guard.lend(&message.outgoing())?;
    let args = [socket.fd(), header.pointer(), flags, 0, 0, 0];
    let result = send::<2>(guard, __NR_sendmsg, args, &message.rights);
    bounded(guard, fd, SO_SNDTIMEO, result)
}

pub(crate) fn recvmsg(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, at, flags, ..] = args;
    let message = Message::to_receive(guard, fd, at)?;
    let mut header = message.incoming();
    let lent = guard.lend(&header)?;
    let args = [fd, lent.pointer(), flags, 0, 0, 0];
    let result = forward(__NR_recvmsg, args);
    let count = bounded(guard, fd, SO_RCVTIMEO, result)?;
    lent.read_into(&mut header);
    message.tell(guard, &header)?;
    Ok(count)
}

pub(crate) fn sendmmsg(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, at, count, flags, ..] = args;
    let socket = guard.hold_socket(fd)?;
    let messages = read_many(guard, socket.fd(), at, count, Message::to_send)?;
    let mut headers = counted(&messages, Message::outgoing);
    let lent = guard.lend(&headers[..])?;
    let many = [
        socket.fd(),
        lent.pointer(),
        headers.len() as u64,
        flags,
        0,
        0,
    ];
    let rights: Vec<RawFd> = messages
        .iter()
        .flat_map(|message| message.rights.iter().copied())
        .collect();
    let done = send::<3>(guard, __NR_sendmmsg, many, &rights)?;
    lent.read_into(&mut headers[..]);
    tell_lengths(guard, &messages, &headers, done)?;
    Ok(done)
}

pub(crate) fn recvmmsg(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, at, count, flags, timeout, _] = args;
    let messages = read_many(guard, fd, at, count, Message::to_receive)?;
    let mut headers = counted(&messages, Message::incoming);
    let lent = guard.lend(&headers[..])?;
    let many = [
        fd,
        lent.pointer(),
        headers.len() as u64,
        flags,
        // User memory, by the table.
        timeout,
        0,
    ];
    let done = forward(__NR_recvmmsg, many)?;
    lent.read_into(&mut headers[..]);
    for (message, counted) in messages.iter().zip(&headers).take(done as usize) {
        message.tell(guard, &counted.header)?;
    }
    tell_lengths(guard, &messages, &headers, done)?;
    Ok(done)
}

/// Copies the headers of a vector, up to the first that is wrong: as the
/// kernel, which has sent or received those before it by then. An error is
/// that of the very first.
fn read_many(
    guard: &Guard,
    fd: u64,
    at: u64,
    count: u64,
    read: fn(&Guard, u64, u64) -> Result<Message, Errno>,
) -> Result<Vec<Message>, Errno> {
    let count = u64::from(count as u32).min(MOST);
    let mut messages = Vec::new();
    for index in 0..count {
        let header = at
            .checked_add(index * size_of::<CountedHeader>() as u64)
            .ok_or(Errno::EFAULT);
        match header.and_then(|header| read(guard, fd, header)) {
            Ok(message) => messages.push(message),
            Err(errno) if messages.is_empty() => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(messages)
}

/// The vector for the kernel. The messages must not move while it is used.
fn counted(messages: &[Message], header: fn(&Message) -> Header) -> Vec<CountedHeader> {
    messages
        .iter()
        .map(|message| CountedHeader {
            header: header(message),
            ..CountedHeader::default()
        })
        .collect()
}

/// Tells the program the number of bytes of each of the first `done` messages.
fn tell_lengths(
    guard: &Guard,
    messages: &[Message],
    headers: &[CountedHeader],
    done: u64,
) -> Result<(), Errno> {
    for (message, counted) in messages.iter().zip(headers).take(done as usize) {
        let at = message.at + offset_of!(CountedHeader, len) as u64;
        guard.memory().write_value(at, &counted.len)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::own;
    use crate::testing::{UserPages, guard};
    use crate::user::IoVec;

    fn control(level: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + data.len() as u64).to_le_bytes().to_vec();
        bytes.extend(level.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn control_messages_are_found_as_the_kernel_finds_them() {
        let two = [control(1, 2, &[7; 5]), control(0, 8, &[])].concat();
        let found: Vec<_> = ControlMessages(&two)
            .map(|message| message.map(|message| (message.level, message.kind, message.data.len())))
            .collect();
        assert_eq!(found, [Ok((1, 2, 5)), Ok((0, 8, 0))]);
        // Less than a header is no message.
        assert!(ControlMessages(&two[..15]).next().is_none());
        for len in [0, 15, 25, u64::MAX, u64::MAX - 7] {
            let mut bad = control(1, 1, &[0; 8]);
            bad[..8].copy_from_slice(&len.to_le_bytes());
            let mut messages = ControlMessages(&bad);
            assert_eq!(
                messages.next().map(|message| message.map(|_| ())),
                Some(Err(Errno::EINVAL)),
                "{len:#x}"
            );
            assert!(messages.next().is_none());
        }
    }

    /// What a test does to a good header in the page at an address.
    type Change<'a> = &'a dyn Fn(&mut Header, u64);

    /// A guard with one page that holds a header, and the page's address.
    fn with_header(change: impl FnOnce(&mut Header, u64)) -> (Guard, UserPages) {
        let pages = UserPages::anonymous(1);
        let at = pages.start();
        let guard = guard();
        guard.program.memory_mut().areas = pages.memory.read().unwrap().areas.clone();
        let vector = IoVec {
            base: at + 1024,
            len: 64,
        };
        guard.memory().write_value(at + 512, &vector).unwrap();
        let mut header = Header {
            vectors: at + 512,
            vector_count: 1,
            ..Header::default()
        };
        change(&mut header, at);
        guard.memory().write_value(at, &header).unwrap();
        (guard, pages)
    }

    fn sent(change: Change<'_>) -> Result<(), Errno> {
        let (guard, pages) = with_header(change);
        Message::to_send(&guard, 3, pages.start()).map(drop)
    }

    fn received(change: Change<'_>) -> Result<(), Errno> {
        let (guard, pages) = with_header(change);
        Message::to_receive(&guard, 3, pages.start()).map(drop)
    }

    #[test]
    fn every_pointer_of_a_message_is_checked() {
        let mine = [0_u8; 64];
        let guards = own(&mine);
        let reads: [fn(Change<'_>) -> Result<(), Errno>; 2] = [sent, received];
        for read in reads {
            assert_eq!(read(&|_, _| {}), Ok(()));
            for bad in [guards, crate::range::USER_HI - 8, u64::MAX - 3] {
                assert_eq!(read(&|h, _| h.vectors = bad), Err(Errno::EFAULT));
                let name = read(&|h, _| (h.name, h.name_len) = (bad, 16));
                assert_eq!(name, Err(Errno::EFAULT));
                let control = read(&|h, _| (h.control, h.control_len) = (bad, 24));
                assert_eq!(control, Err(Errno::EFAULT));
            }
            assert_eq!(read(&|h, _| h.vector_count = 1025), Err(Errno::EMSGSIZE));
            let negative = read(&|h, at| (h.name, h.name_len) = (at, u32::MAX));
            assert_eq!(negative, Err(Errno::EINVAL));
        }
        let wrapping = |h: &mut Header, at| (h.control, h.control_len) = (at, u64::MAX - 8);
        assert_eq!(sent(&wrapping), Err(Errno::ENOBUFS));
        assert_eq!(received(&wrapping), Err(Errno::EFAULT));
    }

    #[test]
    fn only_plain_control_messages_are_sent() {
        const SOL_RDS: u32 = 276;
        const SOL_ALG: u32 = 279;
        for (level, kind, data, expected) in [
            (SOL_SOCKET, SCM_CREDENTIALS, [1, 2], Ok(())),
            (SOL_SOCKET, SCM_RIGHTS, [0, 1], Ok(())),
            (SOL_SOCKET, 0x7777, [0, 0], Err(Errno::EINVAL)),
            (SOL_RDS, 1, [0, 0], Err(Errno::EINVAL)),
            (SOL_ALG, 1, [0, 0], Err(Errno::EINVAL)),
        ] {
            let (guard, pages) = with_header(|header, at| {
                (header.control, header.control_len) = (at + 2048, 24);
            });
            let data: Vec<u8> = data.into_iter().flat_map(u32::to_le_bytes).collect();
            let at = pages.start() + 2048;
            guard
                .memory()
                .write(at, &control(level, kind, &data))
                .unwrap();
            let read = Message::to_send(&guard, 3, pages.start()).map(drop);
            assert_eq!(read, expected, "level {level} kind {kind}");
        }
    }

    #[test]
    fn a_vector_of_messages_ends_before_the_first_bad_one() {
        let (guard, pages) = with_header(|_, _| {});
        let at = pages.start();
        let count = |at, count| {
            read_many(&guard, 3, at, count, Message::to_send).map(|messages| messages.len())
        };
        assert_eq!(count(at, 1), Ok(1));
        let bad = Header {
            name: own(&guard),
            name_len: 16,
            ..Header::default()
        };
        let second = at + size_of::<CountedHeader>() as u64;
        guard.memory().write_value(second, &bad).unwrap();
        assert_eq!(count(at, 2), Ok(1));
        assert_eq!(count(second, 2), Err(Errno::EFAULT));
        assert_eq!(count(u64::MAX - 8, 1), Err(Errno::EFAULT));
        assert_eq!(count(at, 0), Ok(0));
    }
}
