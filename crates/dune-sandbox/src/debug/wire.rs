//! The connection, and the words that `gdbstub` does not have.
//!
//! ```text
//!   gdb ---bytes---> Wire::read --packet--> answered here, or to gdbstub
//!       <--bytes---- Wire::flush <-packet-- gdbstub, perhaps with words added
//! ```
//!
//! Answered here: what is known of the signal that a thread stopped for
//! (`qXfer:siginfo:read`). Added: that this is known (`qSupported`), and that a
//! thread has stopped at a new program (`exec`). See gdb's manual, "Remote
//! Protocol".

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use gdbstub::conn::Connection;

/// No answer is longer, in bytes.
const MOST: usize = 16 << 20;
/// No packet from gdb is longer; it is told so.
pub(crate) const MOST_PACKET: usize = 64 << 10;
/// Who does not read for so long is gone.
const PATIENCE: Duration = Duration::from_secs(3);

/// A client of either kind.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Moves its descriptor out of the program's way.
    ///
    /// # Errors
    ///
    /// If there is no descriptor left.
    pub(crate) fn move_high(self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => {
                // Packets are short, and each waits for the other.
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Self::Tcp(crate::host::move_fd_high(OwnedFd::from(stream))?.into())
            }
            Self::Unix(stream) => {
                stream.set_write_timeout(Some(PATIENCE))?;
                Self::Unix(crate::host::move_fd_high(OwnedFd::from(stream))?.into())
            }
        })
    }

    pub(crate) fn fd(&self) -> RawFd {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => { stream }.read(buffer),
            Self::Unix(stream) => { stream }.read(buffer),
        }
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => { stream }.write_all(bytes),
            Self::Unix(stream) => { stream }.write_all(bytes),
        }
    }

    /// Says that nothing more will come, and gives the other side a moment to
    /// take what has: closing with unread bytes would discard it.
    pub(crate) fn finish(&self) {
        const MOMENT: Duration = Duration::from_millis(500);
        let both = |closed: io::Result<()>, timeout: io::Result<()>| closed.and(timeout);
        let ready = match self {
            Self::Tcp(stream) => both(
                stream.shutdown(std::net::Shutdown::Write),
                stream.set_read_timeout(Some(MOMENT)),
            ),
            Self::Unix(stream) => both(
                stream.shutdown(std::net::Shutdown::Write),
                stream.set_read_timeout(Some(MOMENT)),
            ),
        };
        if ready.is_ok() {
            let mut left = 64;
            while left > 0 && matches!(self.read(&mut [0; 4096]), Ok(count) if count > 0) {
                left -= 1;
            }
        }
    }
}

/// A packet from gdb that is for this module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// What is known of the signal of this thread (the one that gdb looks at):
    /// so many bytes from this offset.
    SignalInfo { offset: usize, len: usize },
}

/// What has come in, for somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    ForStub(Vec<u8>),
    Question(Question),
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: Arc<Stream>,
    /// What has come in and is not a whole packet yet.
    pending: Vec<u8>,
    out: Vec<u8>,
    /// Goes into the next packet, at its end.
    addition: Option<Vec<u8>>,
    /// The thread that gdb looks at; 0 for any.
    looks_at: u32,
    /// Whether gdb understands that a program was replaced.
    knows_exec: bool,
    acknowledges: bool,
}

impl Wire {
    pub(crate) fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            pending: Vec::new(),
            out: Vec::new(),
            addition: None,
            looks_at: 0,
            knows_exec: false,
            acknowledges: true,
        }
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Reads what there is.
    ///
    /// # Errors
    ///
    /// If the client is gone, or sends more than a packet can hold.
    pub(crate) fn read(&mut self) -> io::Result<Vec<Incoming>> {
        let mut buffer = [0; 4096];
        let count = match self.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        self.take(&buffer[..count])
    }

    /// Takes bytes apart into packets.
    fn take(&mut self, bytes: &[u8]) -> io::Result<Vec<Incoming>> {
        self.pending.extend_from_slice(bytes);
        let mut incoming = Vec::new();
        while let Some(&first) = self.pending.first() {
            if first != b'$' {
                // An acknowledgement or an interruption.
                incoming.push(Incoming::ForStub(vec![first]));
                self.pending.remove(0);
                continue;
            }
            /// `#` and two digits.
            const TRAILER: usize = 3;
            let end = self.pending.iter().position(|&byte| byte == b'#');
            match end.map(|end| end + TRAILER) {
                Some(len) if len <= self.pending.len() => {
                    let packet: Vec<u8> = self.pending.drain(..len).collect();
                    incoming.push(self.look_at(packet));
                }
                _ if self.pending.len() > MOST_PACKET => {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                _ => break,
            }
        }
        Ok(incoming)
    }

    fn look_at(&mut self, packet: Vec<u8>) -> Incoming {
        let payload = &packet[1..packet.len() - 3];
        if let Some(features) = payload.strip_prefix(b"qSupported") {
            let mut features = features.split(|&byte| byte == b':' || byte == b';');
            self.knows_exec = features.any(|feature| feature == b"exec-events+");
            let mut addition = b";qXfer:siginfo:read+".to_vec();
            if self.knows_exec {
                addition.extend_from_slice(b";exec-events+");
            }
            self.addition = Some(addition);
        } else if let Some(thread) = payload.strip_prefix(b"Hg") {
            self.looks_at = thread_of(thread);
        } else if payload == b"QStartNoAckMode" {
            // The answer itself is acknowledged still, and so is this.
            self.acknowledges = false;
        } else if let Some(question) = signal_info(payload)
            && is_intact(&packet)
        {
            return Incoming::Question(question);
        }
        Incoming::ForStub(packet)
    }

    /// The thread that gdb looks at.
    pub(crate) fn looks_at(&self) -> u32 {
        self.looks_at
    }

    /// gdb is about to be told that `tid` stopped.
    pub(crate) fn will_look_at(&mut self, tid: u32) {
        self.looks_at = tid;
    }

    /// The next packet tells that the program was replaced by the one at
    /// `path`, if gdb understands that.
    pub(crate) fn add_exec(&mut self, path: &[u8]) {
        if self.knows_exec {
            let mut addition = b"exec:".to_vec();
            addition.extend(hex(path));
            addition.push(b';');
            self.addition = Some(addition);
        }
    }

    /// Answers a question: the part of `bytes` that was asked for, or an error
    /// if there is nothing.
    ///
    /// # Errors
    ///
    /// If the client is gone.
    pub(crate) fn answer(&mut self, question: &Question, bytes: Option<&[u8]>) -> io::Result<()> {
        let Question::SignalInfo { offset, len } = *question;
        let payload = match bytes {
            None => b"E01".to_vec(),
            Some(bytes) => {
                let rest = bytes.get(offset..).unwrap_or_default();
                let part = &rest[..len.min(rest.len())];
                let mut payload = vec![if part.len() < rest.len() { b'm' } else { b'l' }];
                payload.extend(escaped(part));
                payload
            }
        };
        if self.acknowledges {
            self.out.push(b'+');
        }
        self.out.extend(framed(&payload));
        self.flush()
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        if self.out.len() >= MOST {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.out.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut out = core::mem::take(&mut self.out);
        // Whatever comes before the packet are acknowledgements.
        if let Some(start) = out.iter().position(|&byte| byte == b'$')
            && let Some(addition) = self.addition.take()
        {
            let mut payload = out.split_off(start);
            payload.truncate(payload.len().saturating_sub(3));
            payload.remove(0);
            payload.extend(addition);
            out.extend(framed(&payload));
        }
        self.stream.write_all(&out)
    }
}

/// Whether the checksum is right.
fn is_intact(packet: &[u8]) -> bool {
    let (body, sum) = packet.split_at(packet.len() - 2);
    let expected = checksum(&body[1..body.len() - 1]);
    core::str::from_utf8(sum)
        .ok()
        .and_then(|digits| u8::from_str_radix(digits, 16).ok())
        == Some(expected)
}

fn checksum(payload: &[u8]) -> u8 {
    payload.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

fn framed(payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![b'$'];
    packet.extend_from_slice(payload);
    packet.extend_from_slice(format!("#{:02x}", checksum(payload)).as_bytes());
    packet
}

/// Bytes that mean something in a packet, each behind a `}`.
fn escaped(bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    bytes.iter().flat_map(|&byte| match byte {
        b'#' | b'$' | b'}' | b'*' => vec![b'}', byte ^ 0x20],
        byte => vec![byte],
    })
}

fn hex(bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    bytes
        .iter()
        .flat_map(|byte| format!("{byte:02x}").into_bytes())
}

/// The thread of `pPID.TID` or `TID`, in hexadecimal; 0 for any or all.
fn thread_of(text: &[u8]) -> u32 {
    let text = core::str::from_utf8(text).unwrap_or_default();
    let thread = text.rsplit('.').next().unwrap_or_default();
    u32::from_str_radix(thread, 16).unwrap_or(0)
}

/// `qXfer:siginfo:read::OFFSET,LENGTH`, in hexadecimal.
fn signal_info(payload: &[u8]) -> Option<Question> {
    let text = core::str::from_utf8(payload).ok()?;
    let (offset, len) = text.strip_prefix("qXfer:siginfo:read::")?.split_once(',')?;
    Some(Question::SignalInfo {
        offset: usize::from_str_radix(offset, 16).ok()?,
        len: usize::from_str_radix(len, 16).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> (Wire, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        (Wire::new(Arc::new(Stream::Unix(here))), there)
    }

    fn received(there: &mut UnixStream) -> Vec<u8> {
        let mut buffer = [0; 4096];
        let count = there.read(&mut buffer).unwrap();
        buffer[..count].to_vec()
    }

    #[test]
    fn packets_are_put_together_from_pieces() {
        let (mut wire, _there) = wire();
        let packet = framed(b"g");
        assert_eq!(wire.take(b"+$").unwrap(), [Incoming::ForStub(vec![b'+'])]);
        assert_eq!(wire.take(&packet[1..3]).unwrap(), []);
        let rest = [&packet[3..], b"\x03"].concat();
        let expected = [Incoming::ForStub(packet), Incoming::ForStub(vec![3])];
        assert_eq!(wire.take(&rest).unwrap(), expected);
    }

    #[test]
    fn packets_without_end_are_refused() {
        let (mut wire, _there) = wire();
        let mut result = Ok(Vec::new());
        for _ in 0..MOST_PACKET {
            result = wire.take(b"$aa");
            if result.is_err() {
                break;
            }
        }
        assert!(result.is_err());
    }

    #[test]
    fn questions_are_answered_in_parts() {
        let (mut wire, mut there) = wire();
        let asked = wire
            .take(&framed(b"qXfer:siginfo:read::2,3"))
            .unwrap()
            .remove(0);
        let Incoming::Question(question) = asked else {
            panic!("{asked:?}")
        };
        wire.answer(&question, Some(b"ab#d}fgh")).unwrap();
        assert_eq!(
            received(&mut there),
            [b"+".as_slice(), &framed(b"m}\x03d}]")].concat()
        );
        wire.answer(&question, Some(b"ab#d}")).unwrap();
        assert_eq!(
            received(&mut there),
            [b"+".as_slice(), &framed(b"l}\x03d}]")].concat()
        );
        wire.answer(&question, None).unwrap();
        assert_eq!(
            received(&mut there),
            [b"+".as_slice(), &framed(b"E01")].concat()
        );
        let broken = b"$qXfer:siginfo:read::2,3#00".to_vec();
        assert_eq!(wire.take(&broken).unwrap(), [Incoming::ForStub(broken)]);
    }

    #[test]
    fn what_gdb_understands_is_added() {
        let (mut wire, mut there) = wire();
        wire.take(&framed(b"qSupported:multiprocess+;exec-events+"))
            .unwrap();
        wire.write_all(b"+").unwrap();
        wire.write_all(&framed(b"PacketSize=1000")).unwrap();
        wire.flush().unwrap();
        let expected = b"PacketSize=1000;qXfer:siginfo:read+;exec-events+";
        assert_eq!(
            received(&mut there),
            [b"+".as_slice(), &framed(expected)].concat()
        );
        wire.add_exec(b"/a");
        wire.write_all(&framed(b"T05thread:1;")).unwrap();
        wire.flush().unwrap();
        assert_eq!(received(&mut there), framed(b"T05thread:1;exec:2f61;"));
    }

    #[test]
    fn the_thread_that_gdb_looks_at_is_known() {
        let (mut wire, _there) = wire();
        for (text, thread) in [("Hg1f", 0x1f), ("Hgp12.2a", 0x2a), ("Hg0", 0), ("Hg-1", 0)] {
            wire.take(&framed(text.as_bytes())).unwrap();
            assert_eq!(wire.looks_at(), thread, "{text}");
        }
    }
}
