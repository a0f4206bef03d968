//! Arguments as text: what the program passed, and what it got.
//!
//! Everything is read from the program's memory with the rights that the
//! program has, and printed only: nothing is decided by it.

use core::fmt::Write;
use core::net::{Ipv4Addr, Ipv6Addr};

use linux_raw_sys::general::{
    AT_FDCWD, F_DUPFD, F_DUPFD_CLOEXEC, F_GETFL, F_GETLK, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW,
    F_SETFD, F_SETFL, F_SETLK, F_SETLKW, FUTEX_WAIT, FUTEX_WAIT_BITSET, S_IFBLK, S_IFCHR, S_IFMT,
};
use linux_raw_sys::net::{AF_INET, AF_INET6, AF_NETLINK, AF_UNIX};

use crate::host::Errno;
use crate::signal::{Action, SigInfo};
use crate::table::{Arg, Args, Call, Size};
use crate::trace::names;
use crate::trace::signature::{As, Struct};
use crate::trace::text::{quote, quote_some};
use crate::user::{IoVec, PATH_MAX, UserMemory};

/// What is printed from.
#[derive(Clone, Copy)]
pub(crate) struct Values<'a> {
    pub(crate) memory: UserMemory<'a>,
    pub(crate) call: Option<&'static Call>,
    pub(crate) args: Args,
    /// What the call returned; `None` while it is not over or if it failed.
    pub(crate) result: Option<u64>,
    /// Most bytes of a string.
    pub(crate) limit: usize,
}

/// Most items of a vector that are printed.
const MOST_ITEMS: u64 = 32;

impl Values<'_> {
    /// Appends the argument `index` in the manner `how`.
    pub(crate) fn print(&self, out: &mut String, index: usize, how: As) {
        let value = self.args[index];
        let previous = |back: usize| index.checked_sub(back).map_or(0, |at| self.args[at]);
        let _ = match how {
            As::Int => write!(out, "{}", value as i32),
            As::Long => write!(out, "{}", value as i64),
            As::Count => write!(out, "{value}"),
            As::Hex => {
                pointer(out, value);
                Ok(())
            }
            As::HexNumber if value == 0 => {
                out.push('0');
                Ok(())
            }
            As::HexNumber => write!(out, "{value:#x}"),
            As::Mode => {
                octal(out, u64::from(value as u32));
                Ok(())
            }
            As::Fd if value as i32 == AT_FDCWD => {
                out.push_str("AT_FDCWD");
                Ok(())
            }
            As::Fd => write!(out, "{}", value as i32),
            As::Text => {
                self.text(out, value);
                Ok(())
            }
            As::Data => {
                self.data(out, index);
                Ok(())
            }
            As::Strings => {
                self.strings(out, value);
                Ok(())
            }
            As::Variables => {
                self.variables(out, value);
                Ok(())
            }
            As::Flags(set) => {
                names::flags(out, set, u64::from(value as u32));
                Ok(())
            }
            As::OneOf(set) => {
                names::one_of(out, set, u64::from(value as u32));
                Ok(())
            }
            As::Beside(low, mask, set) => {
                names::beside(out, low, mask, set, u64::from(value as u32));
                Ok(())
            }
            As::SocketOption => {
                names::one_of(out, names::socket_options(previous(1)), value);
                Ok(())
            }
            As::Protocol => {
                self.protocol(out, previous(2) as u32, value);
                Ok(())
            }
            As::Fcntl => {
                self.fcntl(out, previous(1) as u32, value);
                Ok(())
            }
            As::FutexTime => {
                const COMMAND: u32 = 0x7f;
                if matches!(previous(2) as u32 & COMMAND, FUTEX_WAIT | FUTEX_WAIT_BITSET) {
                    self.structure(out, index, Struct::Time);
                } else {
                    pointer(out, value);
                }
                Ok(())
            }
            As::CloneFlags => {
                const SIGNAL: u64 = 0xff;
                names::flags(out, names::CLONE, value & !SIGNAL);
                if value & SIGNAL != 0 {
                    out.push('|');
                    names::signal(out, value & SIGNAL);
                }
                Ok(())
            }
            As::Signal => {
                names::signal(out, u64::from(value as u32));
                Ok(())
            }
            As::Is(what) => {
                self.structure(out, index, what);
                Ok(())
            }
        };
    }

    /// Appends a string of the program, or its address if it has none there.
    fn text(&self, out: &mut String, addr: u64) {
        if addr == 0 {
            out.push_str("NULL");
            return;
        }
        match self.memory.read_cstr(addr, PATH_MAX) {
            // Paths and names are printed whole.
            Ok(text) => quote(out, text.strip_suffix(b"\0").unwrap_or(&text)),
            Err(Errno::ENAMETOOLONG) => out.push_str("\"...\"..."),
            Err(_) => pointer(out, addr),
        }
    }

    /// Appends bytes whose number the row says.
    fn data(&self, out: &mut String, index: usize) {
        let addr = self.args[index];
        let (size, is_out) = match self.call.and_then(|call| call.args.get(index)) {
            Some(Arg::In(size)) => (*size, false),
            Some(Arg::Out(size)) => (*size, true),
            _ => return pointer(out, addr),
        };
        let mut len = match size {
            Size::Bytes(bytes) => u64::from(bytes),
            Size::Arg(other) => self.args[usize::from(other)],
            Size::Arg32(other) => u64::from(self.args[usize::from(other)] as u32),
            _ => return pointer(out, addr),
        };
        if is_out {
            match self.result {
                Some(count) => len = len.min(count),
                None => return pointer(out, addr),
            }
        }
        self.bytes(out, addr, len);
    }

    /// Appends `len` bytes at `addr`, cut to the limit.
    fn bytes(&self, out: &mut String, addr: u64, len: u64) {
        let mut bytes = vec![0; len.min(self.limit as u64) as usize];
        if addr == 0 {
            out.push_str("NULL");
        } else if self.memory.read(addr, &mut bytes).is_ok() {
            quote_some(out, &bytes, self.limit, len);
        } else {
            pointer(out, addr);
        }
    }

    fn strings(&self, out: &mut String, addr: u64) {
        if addr == 0 {
            return out.push_str("NULL");
        }
        out.push('[');
        for index in 0..MOST_ITEMS {
            let at = addr.wrapping_add(8 * index);
            match self.memory.read_value::<u64>(at) {
                Ok(0) => return out.push(']'),
                Ok(string) => {
                    comma(out, index);
                    match self.memory.read_cstr(string, PATH_MAX) {
                        Ok(text) => {
                            let text = text.strip_suffix(b"\0").unwrap_or(&text);
                            quote_some(out, text, self.limit, text.len() as u64);
                        }
                        Err(_) => pointer(out, string),
                    }
                }
                Err(_) => break,
            }
        }
        out.push_str(", ...]");
    }

    fn variables(&self, out: &mut String, addr: u64) {
        const MOST: u64 = 1 << 16;
        pointer(out, addr);
        if addr != 0 {
            let count = (0..MOST)
                .take_while(|index| {
                    let at = addr.wrapping_add(8 * index);
                    matches!(self.memory.read_value::<u64>(at), Ok(string) if string != 0)
                })
                .count();
            let s = if count == 1 { "" } else { "s" };
            let _ = write!(out, " /* {count} var{s} */");
        }
    }

    fn protocol(&self, out: &mut String, family: u32, value: u64) {
        match family {
            AF_INET | AF_INET6 => names::one_of(out, names::PROTOCOLS, value),
            AF_NETLINK => names::one_of(out, names::NETLINKS, value),
            _ => {
                let _ = write!(out, "{}", value as i32);
            }
        }
    }

    fn fcntl(&self, out: &mut String, command: u32, value: u64) {
        match command {
            F_SETFD => names::flags(out, names::FD, value),
            F_SETFL | F_GETFL => names::beside(out, names::ACCESS_MODES, 3, names::OPEN, value),
            F_DUPFD | F_DUPFD_CLOEXEC => {
                let _ = write!(out, "{}", value as i32);
            }
            F_GETLK | F_SETLK | F_SETLKW | F_OFD_GETLK | F_OFD_SETLK | F_OFD_SETLKW => {
                self.lock(out, value);
            }
            _ => pointer(out, value),
        }
    }

    /// `struct flock`.
    fn lock(&self, out: &mut String, addr: u64) {
        let Ok([kinds, start, len, _]) = self.memory.read_value::<[u64; 4]>(addr) else {
            return pointer(out, addr);
        };
        out.push_str("{l_type=");
        names::one_of(out, names::LOCKS, kinds & 0xffff);
        out.push_str(", l_whence=");
        names::one_of(out, names::SEEK, (kinds >> 16) & 0xffff);
        let _ = write!(out, ", l_start={}, l_len={}}}", start as i64, len as i64);
    }

    /// Appends a structure, or its address if it is not there.
    fn structure(&self, out: &mut String, index: usize, what: Struct) {
        let addr = self.args[index];
        let start = out.len();
        // What the kernel has not written is not shown.
        let is_out = matches!(
            self.call.and_then(|call| call.args.get(index)),
            Some(Arg::Out(_))
        );
        if addr == 0 || (is_out && self.result.is_none()) {
            return pointer(out, addr);
        }
        if self.decode(out, addr, what).is_err() {
            out.truncate(start);
            pointer(out, addr);
        }
    }

    fn arg(&self, index: u8) -> u64 {
        self.args[usize::from(index)]
    }

    fn decode(&self, out: &mut String, addr: u64, what: Struct) -> Result<(), Errno> {
        let memory = self.memory;
        let _ = match what {
            Struct::Int => write!(out, "[{}]", memory.read_value::<i32>(addr)?),
            Struct::Offset => write!(out, "[{}]", memory.read_value::<i64>(addr)?),
            Struct::Pair => {
                let [first, second]: [i32; 2] = memory.read_value(addr)?;
                write!(out, "[{first}, {second}]")
            }
            Struct::OptionValue(len) => {
                return self.option_value(out, addr, self.arg(len));
            }
            Struct::Stat => {
                stat(out, memory.read_value(addr)?);
                Ok(())
            }
            Struct::Statx => {
                statx(out, memory.read_value(addr)?);
                Ok(())
            }
            Struct::Time => {
                time(out, memory.read_value(addr)?, "nsec");
                Ok(())
            }
            Struct::Timeval => {
                time(out, memory.read_value(addr)?, "usec");
                Ok(())
            }
            Struct::Times => {
                out.push('[');
                for index in 0..2 {
                    comma(out, index);
                    file_time(out, memory.read_value(addr.wrapping_add(16 * index))?);
                }
                out.push(']');
                Ok(())
            }
            Struct::TimerSpec | Struct::TimerVal => {
                let unit = if what == Struct::TimerSpec {
                    "nsec"
                } else {
                    "usec"
                };
                let [every, every_part, first, first_part]: [i64; 4] = memory.read_value(addr)?;
                out.push_str("{it_interval=");
                time(out, [every, every_part], unit);
                out.push_str(", it_value=");
                time(out, [first, first_part], unit);
                out.push('}');
                Ok(())
            }
            Struct::Limit => {
                let [soft, hard]: [u64; 2] = memory.read_value(addr)?;
                out.push_str("{rlim_cur=");
                limit(out, soft);
                out.push_str(", rlim_max=");
                limit(out, hard);
                out.push('}');
                Ok(())
            }
            Struct::Action => {
                action(out, &memory.read_value(addr)?);
                Ok(())
            }
            Struct::Stack => {
                let [sp, flags, size]: [u64; 3] = memory.read_value(addr)?;
                out.push_str("{ss_sp=");
                pointer(out, sp);
                out.push_str(", ss_flags=");
                names::flags(out, names::SS, flags & 0xffff_ffff);
                write!(out, ", ss_size={size}}}")
            }
            Struct::Signals => {
                names::signal_set(out, memory.read_value(addr)?);
                Ok(())
            }
            Struct::SigInfo => {
                signal_info(out, &memory.read_value(addr)?);
                Ok(())
            }
            Struct::Uname => {
                const FIELD: usize = 65;
                let mut bytes = [0; FIELD * 2];
                memory.read(addr, &mut bytes)?;
                out.push_str("{sysname=");
                quote(out, until_zero(&bytes[..FIELD]));
                out.push_str(", nodename=");
                quote(out, until_zero(&bytes[FIELD..]));
                out.push_str(", ...}");
                Ok(())
            }
            Struct::Polls(count) => return self.polls(out, addr, self.arg(count)),
            Struct::FdSet(bits) => return self.fd_set(out, addr, self.arg(bits) as i32),
            Struct::Event => return self.events(out, addr, 1, false),
            Struct::Events => return self.events(out, addr, self.result.unwrap_or(0), true),
            Struct::Vectors(count) => return self.vectors(out, addr, self.arg(count)),
            Struct::Address(len) => return self.address(out, addr, self.arg(len)),
            Struct::AddressAt(len) => {
                let len: u32 = memory.read_value(self.arg(len))?;
                return self.address(out, addr, u64::from(len));
            }
            Struct::Message => return self.message(out, addr),
            Struct::Status => {
                status(out, memory.read_value(addr)?);
                Ok(())
            }
            Struct::Entries => return self.entries(out, addr),
            Struct::How => {
                let [flags, mode, resolve]: [u64; 3] = memory.read_value(addr)?;
                out.push_str("{flags=");
                names::beside(out, names::ACCESS_MODES, 3, names::OPEN, flags);
                out.push_str(", mode=");
                octal(out, mode);
                write!(out, ", resolve={resolve:#x}}}")
            }
        };
        Ok(())
    }

    fn option_value(&self, out: &mut String, addr: u64, len: u64) -> Result<(), Errno> {
        if len == 4 {
            let value: i32 = self.memory.read_value(addr)?;
            let _ = write!(out, "[{value}]");
        } else {
            self.bytes(out, addr, len & 0xffff_ffff);
        }
        Ok(())
    }

    fn polls(&self, out: &mut String, addr: u64, count: u64) -> Result<(), Errno> {
        out.push('[');
        for index in 0..count.min(MOST_ITEMS) {
            let at = addr.wrapping_add(8 * index);
            let [low, high, events, revents]: [u16; 4] = self.memory.read_value(at)?;
            let fd = (u32::from(low) | u32::from(high) << 16) as i32;
            comma(out, index);
            let _ = write!(out, "{{fd={fd}, events=");
            names::flags(out, names::POLL, u64::from(events));
            if self.result.is_some_and(|ready| ready > 0) && revents != 0 {
                out.push_str(", revents=");
                names::flags(out, names::POLL, u64::from(revents));
            }
            out.push('}');
        }
        end(out, count);
        Ok(())
    }

    fn fd_set(&self, out: &mut String, addr: u64, bits: i32) -> Result<(), Errno> {
        const MOST_BITS: u64 = 65_536;
        out.push('[');
        let mut first = true;
        for word in 0..u64::try_from(bits).unwrap_or(0).min(MOST_BITS).div_ceil(64) {
            let set: u64 = self.memory.read_value(addr.wrapping_add(8 * word))?;
            for bit in (0..64).filter(|bit| set & (1 << bit) != 0) {
                if !first {
                    out.push(' ');
                }
                first = false;
                let _ = write!(out, "{}", word * 64 + bit);
            }
        }
        out.push(']');
        Ok(())
    }

    /// `struct epoll_event`, packed: events and data.
    fn events(
        &self,
        out: &mut String,
        addr: u64,
        count: u64,
        in_brackets: bool,
    ) -> Result<(), Errno> {
        const LEN: u64 = 12;
        if in_brackets {
            out.push('[');
        }
        for index in 0..count.min(MOST_ITEMS) {
            let at = addr.wrapping_add(LEN * index);
            let [events, low, high]: [u32; 3] = self.memory.read_value(at)?;
            comma(out, index);
            out.push_str("{events=");
            names::flags(out, names::EPOLL, u64::from(events));
            let _ = write!(
                out,
                ", data={:#x}}}",
                u64::from(high) << 32 | u64::from(low)
            );
        }
        if in_brackets {
            end(out, count);
        }
        Ok(())
    }

    fn vectors(&self, out: &mut String, addr: u64, count: u64) -> Result<(), Errno> {
        let mut left = self.result.unwrap_or(u64::MAX);
        out.push('[');
        for index in 0..count.min(MOST_ITEMS) {
            let vec: IoVec = self.memory.read_value(addr.wrapping_add(16 * index))?;
            comma(out, index);
            out.push_str("{iov_base=");
            let shown = vec.len.min(left);
            left -= shown;
            self.bytes(out, vec.base, shown);
            let _ = write!(out, ", iov_len={}}}", vec.len);
        }
        end(out, count);
        Ok(())
    }

    fn message(&self, out: &mut String, addr: u64) -> Result<(), Errno> {
        let [name, name_len, vecs, count, control, control_len, flags]: [u64; 7] =
            self.memory.read_value(addr)?;
        out.push_str("{msg_name=");
        if name == 0 || self.address(out, name, name_len & 0xffff_ffff).is_err() {
            pointer(out, name);
        }
        let _ = write!(out, ", msg_namelen={}, msg_iov=", name_len as u32);
        if self.vectors(out, vecs, count).is_err() {
            pointer(out, vecs);
        }
        let _ = write!(out, ", msg_iovlen={count}");
        if control != 0 {
            out.push_str(", msg_control=");
            pointer(out, control);
        }
        let _ = write!(out, ", msg_controllen={control_len}, msg_flags=");
        names::flags(out, names::MSG, flags & 0xffff_ffff);
        out.push('}');
        Ok(())
    }

    fn address(&self, out: &mut String, addr: u64, len: u64) -> Result<(), Errno> {
        const MOST: u64 = 128;
        let mut bytes = vec![0; len.min(MOST) as usize];
        self.memory.read(addr, &mut bytes)?;
        socket_address(out, &bytes);
        Ok(())
    }

    /// Counts the entries that were returned.
    fn entries(&self, out: &mut String, addr: u64) -> Result<(), Errno> {
        const RECORD_LEN: u64 = 16;
        let end = self.result.unwrap_or(0);
        let (mut at, mut count) = (0, 0_u64);
        while at < end {
            let record: u16 = self
                .memory
                .read_value(addr.wrapping_add(at).wrapping_add(RECORD_LEN))?;
            if record == 0 {
                break;
            }
            at += u64::from(record);
            count += 1;
        }
        pointer(out, addr);
        let y = if count == 1 { "y" } else { "ies" };
        let _ = write!(out, " /* {count} entr{y} */");
        Ok(())
    }
}

/// `NULL`, or the address in hexadecimal.
pub(crate) fn pointer(out: &mut String, addr: u64) {
    if addr == 0 {
        out.push_str("NULL");
    } else {
        let _ = write!(out, "{addr:#x}");
    }
}

/// As C has it, with three digits at least.
fn octal(out: &mut String, value: u64) {
    let _ = write!(out, "0{value:02o}");
}

fn comma(out: &mut String, index: u64) {
    if index > 0 {
        out.push_str(", ");
    }
}

fn end(out: &mut String, count: u64) {
    out.push_str(if count > MOST_ITEMS { ", ...]" } else { "]" });
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn time(out: &mut String, [seconds, part]: [i64; 2], unit: &str) {
    let _ = write!(out, "{{tv_sec={seconds}, tv_{unit}={part}}}");
}

fn file_time(out: &mut String, [seconds, part]: [i64; 2]) {
    const UTIME_NOW: i64 = (1 << 30) - 1;
    const UTIME_OMIT: i64 = (1 << 30) - 2;
    match part {
        UTIME_NOW => out.push_str("UTIME_NOW"),
        UTIME_OMIT => out.push_str("UTIME_OMIT"),
        _ => time(out, [seconds, part], "nsec"),
    }
}

fn limit(out: &mut String, value: u64) {
    const KIB: u64 = 1024;
    let _ = match value {
        u64::MAX => {
            out.push_str("RLIM64_INFINITY");
            Ok(())
        }
        value if value > KIB && value.is_multiple_of(KIB) => write!(out, "{}*1024", value / KIB),
        value => write!(out, "{value}"),
    };
}

fn mode(out: &mut String, mode: u32) {
    names::one_of(out, names::FILE_TYPES, u64::from(mode & S_IFMT));
    out.push('|');
    octal(out, u64::from(mode & !S_IFMT));
}

/// `struct stat` as words of 64 bits.
fn stat(out: &mut String, words: [u64; 18]) {
    let file_mode = words[3] as u32;
    out.push_str("{st_mode=");
    mode(out, file_mode);
    if matches!(file_mode & S_IFMT, S_IFCHR | S_IFBLK) {
        let device = words[5];
        let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
        let minor = (device & 0xff) | (device >> 12 & !0xff);
        let _ = write!(out, ", st_rdev=makedev({major:#x}, {minor:#x}), ...}}");
    } else {
        let _ = write!(out, ", st_size={}, ...}}", words[6] as i64);
    }
}

/// The beginning of `struct statx`.
fn statx(out: &mut String, words: [u64; 6]) {
    out.push_str("{stx_mask=");
    names::flags(out, names::STATX, words[0] & 0xffff_ffff);
    out.push_str(", stx_mode=");
    // After the group, in the upper half of a word.
    mode(out, (words[3] >> 32) as u32 & 0xffff);
    let _ = write!(out, ", stx_size={}, ...}}", words[5]);
}

fn action(out: &mut String, action: &Action) {
    out.push_str("{sa_handler=");
    match action.handler {
        0 => out.push_str("SIG_DFL"),
        1 => out.push_str("SIG_IGN"),
        handler => pointer(out, handler),
    }
    out.push_str(", sa_mask=");
    names::signal_set(out, action.mask);
    out.push_str(", sa_flags=");
    names::flags(out, names::SA, action.flags);
    out.push('}');
}

/// The fields of `siginfo` that every signal has, and those of a sender or a
/// fault.
pub(crate) fn signal_info(out: &mut String, info: &SigInfo) {
    out.push_str("{si_signo=");
    names::signal(out, u64::from(info.signal()));
    out.push_str(", si_code=");
    match info.code {
        0 => out.push_str("SI_USER"),
        -1 => out.push_str("SI_QUEUE"),
        -2 => out.push_str("SI_TIMER"),
        -6 => out.push_str("SI_TKILL"),
        crate::signal::SI_KERNEL => out.push_str("SI_KERNEL"),
        code => {
            let _ = write!(out, "{code}");
        }
    }
    let first = info.fields[0];
    if info.is_fault_of_the_thread() {
        out.push_str(", si_addr=");
        pointer(out, first);
    } else if info.code <= 0 || info.signal() == crate::signal::SIGCHLD {
        let _ = write!(out, ", si_pid={}, si_uid={}", first as i32, first >> 32);
    }
    out.push('}');
}

/// What `wait4` tells.
fn status(out: &mut String, status: u32) {
    const CORE: u32 = 0x80;
    let signal = status & 0x7f;
    out.push_str("[{");
    if status == 0xffff {
        out.push_str("WIFCONTINUED(s)");
    } else if signal == 0 {
        let code = status >> 8 & 0xff;
        let _ = write!(out, "WIFEXITED(s) && WEXITSTATUS(s) == {code}");
    } else if signal == 0x7f {
        out.push_str("WIFSTOPPED(s) && WSTOPSIG(s) == ");
        names::signal(out, u64::from(status >> 8 & 0xff));
    } else {
        out.push_str("WIFSIGNALED(s) && WTERMSIG(s) == ");
        names::signal(out, u64::from(signal));
        if status & CORE != 0 {
            out.push_str(" && WCOREDUMP(s)");
        }
    }
    out.push_str("}]");
}

/// A socket address.
pub(crate) fn socket_address(out: &mut String, bytes: &[u8]) {
    let Some((family, rest)) = bytes.split_first_chunk::<2>() else {
        return quote(out, bytes);
    };
    let family = u32::from(u16::from_le_bytes(*family));
    out.push_str("{sa_family=");
    names::one_of(out, names::FAMILIES, u64::from(family));
    let port = rest.first_chunk().map(|port| u16::from_be_bytes(*port));
    let ipv4 = rest.get(2..6).and_then(<[u8]>::first_chunk::<4>);
    let ipv6 = rest.get(6..22).and_then(<[u8]>::first_chunk::<16>);
    match (family, port, ipv4, ipv6) {
        (AF_UNIX, ..) => unix_path(out, rest),
        (AF_INET, Some(port), Some(ipv4), _) => {
            let ipv4 = Ipv4Addr::from(*ipv4);
            let _ = write!(
                out,
                ", sin_port=htons({port}), sin_addr=inet_addr(\"{ipv4}\")"
            );
        }
        (AF_INET6, Some(port), _, Some(ipv6)) => {
            let ipv6 = Ipv6Addr::from(*ipv6);
            let _ = write!(
                out,
                ", sin6_port=htons({port}), inet_pton(AF_INET6, \"{ipv6}\", &sin6_addr)"
            );
        }
        _ if !rest.is_empty() => {
            out.push_str(", sa_data=");
            quote(out, rest);
        }
        _ => {}
    }
    out.push('}');
}

fn unix_path(out: &mut String, path: &[u8]) {
    match path.split_first() {
        None => {}
        // Abstract: the zero is a part of the name.
        Some((0, name)) => {
            out.push_str(", sun_path=@");
            quote(out, name);
        }
        Some(_) => {
            out.push_str(", sun_path=");
            quote(out, until_zero(path));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(print: impl FnOnce(&mut String)) -> String {
        let mut out = String::new();
        print(&mut out);
        out
    }

    #[test]
    fn addresses_are_written_out() {
        let inet = [2, 0, 0x1f, 0x90, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(
            text(|out| socket_address(out, &inet)),
            "{sa_family=AF_INET, sin_port=htons(8080), sin_addr=inet_addr(\"127.0.0.1\")}"
        );
        assert_eq!(
            text(|out| socket_address(out, b"\x01\0/tmp/x\0yz")),
            "{sa_family=AF_UNIX, sun_path=\"/tmp/x\"}"
        );
        assert_eq!(
            text(|out| socket_address(out, b"\x01\0\0name")),
            "{sa_family=AF_UNIX, sun_path=@\"name\"}"
        );
        let mut inet6 = [0; 28];
        (inet6[0], inet6[3], inet6[23]) = (10, 80, 1);
        assert_eq!(
            text(|out| socket_address(out, &inet6)),
            "{sa_family=AF_INET6, sin6_port=htons(80), inet_pton(AF_INET6, \"::1\", &sin6_addr)}"
        );
        // Cut off, or nothing at all.
        assert_eq!(text(|out| socket_address(out, &[2])), "\"\\2\"");
        assert_eq!(
            text(|out| socket_address(out, &inet[..4])),
            "{sa_family=AF_INET, sa_data=\"\\37\\220\"}"
        );
    }

    #[test]
    fn ends_of_children_are_told_apart() {
        let told = |value| text(|out| status(out, value));
        assert_eq!(told(0x300), "[{WIFEXITED(s) && WEXITSTATUS(s) == 3}]");
        assert_eq!(told(9), "[{WIFSIGNALED(s) && WTERMSIG(s) == SIGKILL}]");
        assert_eq!(told(0x137f), "[{WIFSTOPPED(s) && WSTOPSIG(s) == SIGSTOP}]");
        assert_eq!(told(0xffff), "[{WIFCONTINUED(s)}]");
    }

    #[test]
    fn limits_are_short() {
        assert_eq!(text(|out| limit(out, u64::MAX)), "RLIM64_INFINITY");
        assert_eq!(text(|out| limit(out, 8 << 20)), "8192*1024");
        assert_eq!(text(|out| limit(out, 1000)), "1000");
    }
}
