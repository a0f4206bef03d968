//! What the host and the agent in the guest say to each other.
//!
//! One byte stream in each direction (a virtio port under QEMU, a file and the
//! parallel port under Bochs), cut into frames:
//!
//! ```text
//!   0      1            5               5 + length
//!   +------+------------+---------------+
//!   | kind | length LE  | payload ...   |
//!   +------+------------+---------------+
//! ```
//!
//! This file is compiled twice: into the library, and by the build script into
//! the agent, which is linked statically and knows nothing but `std`.
#![allow(dead_code, reason = "each side encodes what the other decodes")]

use std::io::{self, Read, Write};

/// Version of this protocol and of what the agent does: part of the key of
/// saved states, and compared when the agent says hello.
pub(crate) const VERSION: u32 = 1;

/// The name of the virtio port that carries the frames.
pub(crate) const PORT_NAME: &str = "dune.lab";

/// The word on the kernel's command line that makes the agent write to the
/// parallel port and read from [`GIVEN_FRAMES`].
pub(crate) const PARALLEL_PORT_OPTION: &str = "dune_lab.port=parallel";

/// The file of the initial RAM file system with the host's frames.
pub(crate) const GIVEN_FRAMES: &str = "frames";

/// Frames longer than this are a broken stream, not a message.
pub(crate) const MAX_PAYLOAD: usize = 16 << 20;

/// How much standard input may be under way and not yet taken by the command.
/// Without this credit a command that does not read would block the frames
/// behind it, signals included.
pub(crate) const STDIN_CREDIT: usize = 256 << 10;

/// The meaning of a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Guest to host: the agent is ready; payload: [`VERSION`] as `u32`.
    Hello = 1,
    /// Host to guest: run a command; payload: [`Request`].
    Exec = 2,
    /// Host to guest: bytes of standard input; empty means end of file.
    Stdin = 3,
    /// Guest to host: bytes of standard output.
    Stdout = 4,
    /// Guest to host: bytes of standard error.
    Stderr = 5,
    /// Guest to host: bytes that the command wrote to its terminal.
    Terminal = 6,
    /// Guest to host: so many bytes of standard input were taken (`u32`).
    StdinTaken = 7,
    /// Host to guest: the terminal has a new size; payload: rows, columns (`u16` each).
    Resize = 8,
    /// Host to guest: send this signal (`u32`) to the command's process group.
    Signal = 9,
    /// Guest to host: the command ended; payload: the exit code a shell would
    /// show (`u32`), 128 + n for signal n.
    Exit = 10,
    /// Guest to host: the agent itself failed; payload: a sentence.
    Failure = 11,
    /// Host to guest: send the kernel's messages.
    KernelLog = 12,
    /// Guest to host: the kernel's messages, as text.
    KernelLogText = 13,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Hello,
            2 => Kind::Exec,
            3 => Kind::Stdin,
            4 => Kind::Stdout,
            5 => Kind::Stderr,
            6 => Kind::Terminal,
            7 => Kind::StdinTaken,
            8 => Kind::Resize,
            9 => Kind::Signal,
            10 => Kind::Exit,
            11 => Kind::Failure,
            12 => Kind::KernelLog,
            13 => Kind::KernelLogText,
            _ => return None,
        })
    }
}

/// Writes one frame in a single `write` where the stream takes it whole.
pub(crate) fn send(stream: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame)?;
    stream.flush()
}

/// Reads one frame; `None` at the end of the stream between two frames.
pub(crate) fn receive(stream: &mut impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut header = [0; 5];
    let mut filled = 0;
    while filled < header.len() {
        match stream.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let [kind, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    let Some(kind) = Kind::from_byte(kind).filter(|_| length <= MAX_PAYLOAD) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("not a frame of the lab: {header:02x?}"),
        ));
    };
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

/// Where the command's file system comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Root {
    /// The initial RAM file system itself.
    Initramfs,
    /// The host's root through 9p, under a tmpfs that takes the writes.
    #[default]
    Host,
}

/// A folder of the host that the guest may write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Share {
    /// The 9p mount tag.
    pub(crate) tag: Vec<u8>,
    /// Its absolute path, the same on both sides.
    pub(crate) path: Vec<u8>,
}

/// Everything the agent needs to run one command.
///
/// Strings are bytes: arguments, environment and paths of Linux need not be
/// UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) argv: Vec<Vec<u8>>,
    pub(crate) env: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) cwd: Vec<u8>,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// Soft and hard limit on open files.
    pub(crate) nofile: (u64, u64),
    pub(crate) umask: u32,
    /// Bit n: stream n of the command (0 to 2) is the terminal.
    pub(crate) terminal_streams: u8,
    pub(crate) rows: u16,
    pub(crate) columns: u16,
    pub(crate) root: Root,
    pub(crate) shares: Vec<Share>,
    pub(crate) hostname: Vec<u8>,
    /// The host's clock, for a guest that wakes up from a saved state.
    pub(crate) clock_seconds: i64,
    pub(crate) clock_nanoseconds: u32,
    /// Seed for the guest's random number generator: every guest resumed from
    /// one saved state would otherwise draw the same numbers.
    pub(crate) entropy: Vec<u8>,
}

impl Request {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder(Vec::new());
        out.list(&self.argv, |out, arg| out.bytes(arg));
        out.list(&self.env, |out, (name, value)| {
            out.bytes(name);
            out.bytes(value);
        });
        out.bytes(&self.cwd);
        out.u32(self.uid);
        out.u32(self.gid);
        out.list(&self.groups, |out, gid| out.u32(*gid));
        out.u64(self.nofile.0);
        out.u64(self.nofile.1);
        out.u32(self.umask);
        out.u32(u32::from(self.terminal_streams));
        out.u32(u32::from(self.rows));
        out.u32(u32::from(self.columns));
        out.u32(match self.root {
            Root::Initramfs => 0,
            Root::Host => 1,
        });
        out.list(&self.shares, |out, share| {
            out.bytes(&share.tag);
            out.bytes(&share.path);
        });
        out.bytes(&self.hostname);
        out.u64(self.clock_seconds.cast_unsigned());
        out.u32(self.clock_nanoseconds);
        out.bytes(&self.entropy);
        out.0
    }

    /// `None` when the payload is not a request of this [`VERSION`].
    pub(crate) fn decode(payload: &[u8]) -> Option<Request> {
        let mut input = Decoder(payload);
        let request = Request {
            argv: input.list(|input| input.bytes())?,
            env: input.list(|input| Some((input.bytes()?, input.bytes()?)))?,
            cwd: input.bytes()?,
            uid: input.u32()?,
            gid: input.u32()?,
            groups: input.list(|input| input.u32())?,
            nofile: (input.u64()?, input.u64()?),
            umask: input.u32()?,
            terminal_streams: u8::try_from(input.u32()?).ok()?,
            rows: u16::try_from(input.u32()?).ok()?,
            columns: u16::try_from(input.u32()?).ok()?,
            root: match input.u32()? {
                0 => Root::Initramfs,
                1 => Root::Host,
                _ => return None,
            },
            shares: input.list(|input| {
                Some(Share {
                    tag: input.bytes()?,
                    path: input.bytes()?,
                })
            })?,
            hostname: input.bytes()?,
            clock_seconds: input.u64()?.cast_signed(),
            clock_nanoseconds: input.u32()?,
            entropy: input.bytes()?,
        };
        input.0.is_empty().then_some(request)
    }
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.u64(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn list<T>(&mut self, items: &[T], mut each: impl FnMut(&mut Self, &T)) {
        self.u64(items.len() as u64);
        for item in items {
            each(self, item);
        }
    }
}

struct Decoder<'a>(&'a [u8]);

impl Decoder<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let length = usize::try_from(self.u64()?).ok()?;
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head.to_vec())
    }

    fn list<T>(&mut self, mut each: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u64()?;
        // No reservation: the count is not to be trusted before the items are there.
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(each(self)?);
        }
        Some(items)
    }
}
