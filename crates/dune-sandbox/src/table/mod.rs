//! One table of all x86-64 system calls.
//!
//! For each call: its number and name, how it is handled, and what its
//! arguments are. The checks of forwarded calls are made from this table and
//! nothing else, and so are the tests that no call is forgotten.
//!
//! | handling | what happens |
//! |---|---|
//! | [`Handling::Forwarded`] | the arguments are checked as the table says, then the host kernel gets the same call |
//! | [`Handling::Emulated`] | a function of the guard does what the call asks, with host calls of its own where needed |
//! | [`Handling::Control`] | likewise, and it changes the program's registers: `exit`, `execve`, `rt_sigreturn`, `arch_prctl` |
//! | [`Handling::Refused`] | the errno that Linux gives where the call is not configured or not permitted |
//! | [`Handling::Missing`] | `ENOSYS`, and a counted warning: ordinary programs may want it |
//!
//! What a pointer argument may be is the same for every call: null, or an
//! address range in user memory. Null is safe because nothing is ever mapped
//! below [`crate::range::USER_LO`]; the host kernel answers `EFAULT` itself.

mod rows;

use core::fmt;

use crate::calls::{Answer, Handler};
use crate::engine::UserState;
use crate::guard::Guard;
use crate::host::Errno;

/// The six argument registers: rdi, rsi, rdx, r10, r8, r9.
pub type Args = [u64; 6];

/// How many bytes a pointer argument points at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// So many.
    Bytes(u32),
    /// As many as another argument says, a 64-bit number cut to the kernel's
    /// largest transfer.
    Arg(u8),
    /// As many as another argument says, an unsigned 32-bit number.
    Arg32(u8),
    /// As many items (an unsigned 32-bit number in another argument) of so
    /// many bytes.
    Items(u8, u32),
    /// One bit for each of as many as another argument says (a signed 32-bit
    /// number), in words of 64 bits: `fd_set`.
    Bits(u8),
    /// One byte for each page of the length that another argument says.
    BytePerPage(u8),
}

/// What one argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// Plain data: numbers and flags.
    Value,
    /// A file descriptor (or `AT_FDCWD`): not one of the guard's.
    Fd,
    /// A path: copied, `/proc/self/exe` replaced, the copy passed on.
    Path,
    /// Any other string: copied, the copy passed on.
    Text,
    /// Memory that the kernel reads.
    In(Size),
    /// Memory that the kernel writes.
    Out(Size),
    /// Memory that the kernel reads and writes.
    InOut(Size),
    /// A signal set of eight bytes that the kernel reads: copied, and the copy,
    /// without the signal that the guard's threads use among themselves,
    /// passed on.
    SigSet,
    /// Pages, whose number of bytes is in another argument: must be the
    /// program's (`ENOMEM`).
    Pages(u8),
    /// Something that the call's own function copies, and whose copy alone it
    /// checks and uses.
    Copied(Shape),
    /// Several of the kinds above by turns, depending on another argument:
    /// the call's own function checks it.
    Checked,
}

/// What lies at a pointer that the call's own function follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A path.
    Path,
    /// A structure of so many bytes without a pointer.
    Plain(Size),
    /// A null-terminated vector of pointers to strings.
    Strings,
    /// As many `struct iovec` as another argument says, each with memory that
    /// the kernel accesses so.
    Vectors(u8, Flow),
    /// A socket address of as many bytes as another argument says, at most
    /// 128.
    Address(u8),
    /// A `struct msghdr`: an address, vectors of memory that the kernel
    /// accesses so, and control messages.
    Message(Flow),
    /// As many `struct mmsghdr` as another argument says.
    Messages(u8, Flow),
    /// A 32-bit length, which the kernel updates, of the memory at another
    /// argument.
    LengthOf(u8),
    /// A pointer to a signal set, and the set's size.
    SignalSet,
}

/// How the kernel accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It reads it.
    In,
    /// It writes it.
    Out,
}

/// What becomes of a call that a signal interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// Starts again if the handler was installed with `SA_RESTART`.
    IfHandlerSaysSo,
    /// Fails with `EINTR` whenever a handler ran (signal(7)).
    Never,
}

/// How a call is handled. See the module documentation.
#[derive(Clone, Copy)]
pub enum Handling {
    /// Checked and passed on.
    Forwarded,
    /// Done by a function of the guard.
    Emulated(Handler),
    /// Done by a function that also sees the program's registers.
    Control(fn(&mut Guard, &mut UserState, Args) -> Answer),
    /// Always this errno.
    Refused(Errno),
    /// `ENOSYS`, counted.
    Missing,
}

impl fmt::Debug for Handling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forwarded => f.write_str("forwarded"),
            Self::Emulated(_) => f.write_str("emulated"),
            Self::Control(_) => f.write_str("control"),
            Self::Refused(errno) => write!(f, "refused ({errno:?})"),
            Self::Missing => f.write_str("missing"),
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The number in `rax`.
    pub nr: u32,
    /// Its name, as in its manual page.
    pub name: &'static str,
    /// How it is handled.
    pub handling: Handling,
    /// Its arguments; registers beyond them are not passed on.
    pub args: &'static [Arg],
    /// What becomes of it when a signal interrupts it.
    pub restart: Restart,
}

/// An answer that is the same whenever the call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    /// This error.
    Refused(Errno),
    /// The id of the process.
    ProcessId,
    /// The id of the thread.
    ThreadId,
}

impl Call {
    /// The answer to this call, if it does not depend on anything that the
    /// program does: nobody who need not know of the call has to see it.
    #[must_use]
    pub const fn never_changes(&self) -> Option<Constant> {
        match (self.nr, self.handling) {
            (_, Handling::Refused(errno)) => Some(Constant::Refused(errno)),
            (linux_raw_sys::general::__NR_getpid, _) => Some(Constant::ProcessId),
            (linux_raw_sys::general::__NR_gettid, _) => Some(Constant::ThreadId),
            _ => None,
        }
    }
}

/// All calls, in the order of their numbers.
#[must_use]
pub const fn calls() -> &'static [Call] {
    rows::CALLS
}

/// One past the highest number in the table.
pub const END: usize = {
    let last = rows::CALLS[rows::CALLS.len() - 1].nr;
    last as usize + 1
};

/// Row of each number; `u16::MAX` for none.
static INDEX: [u16; END] = {
    let mut index = [u16::MAX; END];
    let mut row = 0;
    while row < rows::CALLS.len() {
        index[rows::CALLS[row].nr as usize] = row as u16;
        row += 1;
    }
    index
};

/// The row of the call `nr`, if there is such a call.
#[must_use]
pub fn find(nr: u32) -> Option<&'static Call> {
    let row = *INDEX.get(nr as usize)?;
    rows::CALLS.get(row as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_and_found() {
        for pair in calls().windows(2) {
            assert!(
                pair[0].nr < pair[1].nr,
                "{} before {}",
                pair[0].name,
                pair[1].name
            );
        }
        for call in calls() {
            assert_eq!(find(call.nr).map(|found| found.name), Some(call.name));
        }
        assert!(find(u32::MAX).is_none());
        assert!(find(0x4000_0000).is_none(), "x32 calls are none of ours");
    }

    #[test]
    fn no_number_is_forgotten() {
        // 336 to 423 were never given out on x86-64.
        let missing: Vec<u32> = (0..END as u32)
            .filter(|nr| !(336..424).contains(nr) && find(*nr).is_none())
            .collect();
        assert_eq!(missing, Vec::<u32>::new());
        assert!(END > linux_raw_sys::general::__NR_file_setattr as usize);
    }

    #[test]
    fn references_between_arguments_are_sound() {
        for call in calls() {
            assert!(call.args.len() <= 6, "{}", call.name);
            for arg in call.args {
                let other = match arg {
                    Arg::In(size)
                    | Arg::Out(size)
                    | Arg::InOut(size)
                    | Arg::Copied(Shape::Plain(size)) => match size {
                        Size::Bytes(_) => continue,
                        Size::Arg(other)
                        | Size::Arg32(other)
                        | Size::Items(other, _)
                        | Size::Bits(other)
                        | Size::BytePerPage(other) => other,
                    },
                    Arg::Copied(
                        Shape::Vectors(other, _)
                        | Shape::Address(other)
                        | Shape::Messages(other, _),
                    ) => other,
                    Arg::Copied(Shape::LengthOf(other)) => {
                        assert_eq!(call.args[*other as usize], Arg::Checked, "{}", call.name);
                        continue;
                    }
                    _ => continue,
                };
                assert_eq!(call.args[*other as usize], Arg::Value, "{}", call.name);
            }
            let refuses = matches!(call.handling, Handling::Refused(_) | Handling::Missing);
            let checked =
                (call.args.iter()).any(|arg| matches!(arg, Arg::Checked | Arg::Copied(_)));
            assert!(
                !checked || matches!(call.handling, Handling::Emulated(_) | Handling::Control(_)),
                "{}: nobody checks its arguments",
                call.name
            );
            assert!(!refuses || call.args.is_empty(), "{}", call.name);
        }
    }
}
