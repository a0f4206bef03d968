//! What the guard does for each system call, grouped by area.
//!
//! The checks that need nothing but the table ([`crate::table`]) are here; the
//! functions of calls that need more are in the modules.

#![expect(unsafe_code, reason = "checked calls are handed to the host kernel")]

pub(crate) mod family;
pub(crate) mod fd;
pub(crate) mod file;
pub(crate) mod fork;
pub(crate) mod ioctl;
pub(crate) mod memory;
pub(crate) mod message;
pub(crate) mod net;
pub(crate) mod net_policy;
pub(crate) mod opened;
pub(crate) mod paths;
pub(crate) mod process;
pub(crate) mod procfs;
pub(crate) mod segment;
pub(crate) mod signal;
pub(crate) mod sockopt;
pub(crate) mod thread;
pub(crate) mod time;
pub(crate) mod timer;

use core::fmt;
use std::os::fd::RawFd;

use dune_kvm::wall::{Region, Wall};
use linux_raw_sys::general::{__NR_mmap, __NR_munmap};

use crate::bounce::Lent;
use zerocopy::{Immutable, IntoBytes};

use crate::guard::Guard;
use crate::host::{Errno, SysResult, decode, raw_syscall, syscall};
use crate::peel::checks_pointers;
use crate::range::{PAGE_SIZE, UserRange};
use crate::signal::SigSet;
use crate::signal::host::mask_for_host;
use crate::signal::record::{call_interruptible, call_walled, call_walled_always, passage_flag};
use crate::table::{Arg, Args, Call, Size};
use crate::user::{PATH_MAX, UserMemory};

/// A function that does a call, given its checked arguments.
pub(crate) type Handler = fn(&mut Guard, Args) -> SysResult;

/// The kernel's largest transfer (`MAX_RW_COUNT`), in bytes.
const MAX_TRANSFER: u64 = 0x7fff_f000;

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This goes into `rax`.
    Return(SysResult),
    /// The registers are as they shall be.
    Registers,
    /// Likewise, and a debugger is to be told of it.
    Stop,
    /// The program has ended.
    Exit(u8),
    /// The thread has ended.
    ThreadExit(u8),
    /// The thread must leave.
    Leave,
    /// The program died.
    Killed(u32),
}

/// The guard's copies of the strings of one call: what it decides by, and what
/// the host kernel gets.
///
/// ```text
///  texts      the guard's own            lent   text 0 | text 1 | signal set
/// ```
pub(crate) struct Strings {
    texts: [Box<[u8; PATH_MAX]>; 2],
    /// Under the key of user memory, as all that is lent ([`crate::bounce`]), and
    /// always at the same place; mapped when first needed.
    lent: Option<Region>,
}

/// Where the signal set lies in what is lent; no call has more than one.
const LENT_SET: usize = 2 * PATH_MAX;
const LENT: usize = LENT_SET + PAGE_SIZE as usize;

impl Strings {
    /// The string that was copied into one of the buffers, without its zero.
    pub(crate) fn text(&self, which: usize) -> Option<&[u8]> {
        let buffer = self.texts.get(which)?;
        let len = buffer.iter().position(|&byte| byte == 0)?;
        Some(&buffer[..len])
    }

    /// Puts another string in its place; its address stays.
    ///
    /// # Errors
    ///
    /// `ENAMETOOLONG` if it does not fit.
    pub(crate) fn set_text(&mut self, which: usize, text: &[u8]) -> Result<(), Errno> {
        let buffer = self.texts.get_mut(which).ok_or(Errno::EINVAL)?;
        let place = buffer.get_mut(..=text.len()).ok_or(Errno::ENAMETOOLONG)?;
        let (place, zero) = place.split_at_mut(text.len());
        place.copy_from_slice(text);
        zero.fill(0);
        self.lend_text(which, text.len() + 1).map(drop)
    }

    /// Lends the first `len` bytes of a text; where, is always the same.
    fn lend_text(&mut self, which: usize, len: usize) -> Result<u64, Errno> {
        let at = self.lent()?.wrapping_add(which * PATH_MAX);
        let text = self.texts.get(which).and_then(|text| text.get(..len));
        let text = text.ok_or(Errno::EINVAL)?;
        // SAFETY: the place of this text, of PATH_MAX bytes, which nobody refers to.
        unsafe { at.copy_from_nonoverlapping(text.as_ptr(), len) };
        Ok(at.expose_provenance() as u64)
    }

    fn lend_set(&mut self, set: SigSet) -> Result<u64, Errno> {
        let at = self.lent()?.wrapping_add(LENT_SET);
        // SAFETY: the place of the set, which nobody refers to.
        unsafe { at.cast::<SigSet>().write(set) };
        Ok(at.expose_provenance() as u64)
    }

    fn lent(&mut self) -> Result<*mut u8, Errno> {
        let region = match &mut self.lent {
            Some(region) => region,
            none => none.insert(Region::map(LENT, Wall::get()).map_err(|_| Errno::ENOMEM)?),
        };
        Ok(region.as_ptr())
    }
}

impl Default for Strings {
    fn default() -> Self {
        Self {
            texts: [Box::new([0; PATH_MAX]), Box::new([0; PATH_MAX])],
            lent: None,
        }
    }
}

impl fmt::Debug for Strings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Strings")
    }
}

/// Arguments that the host kernel may be given for the call they were checked
/// for: every pointer among them is null, user memory, or one of the guard's
/// copies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckedArgs(Args);

impl CheckedArgs {
    pub(crate) fn values(self) -> Args {
        self.0
    }

    /// Makes the call `nr`, which must be the one they were checked for.
    pub(crate) fn forward(self, nr: u32) -> SysResult {
        // SAFETY: by the check (`Guard::check`), the kernel reaches user
        // memory and the guard's copies only, and no descriptor of the guard.
        unsafe { call_walled(nr, &self.0) }
    }
}

/// Makes a call whose arguments the caller has checked one by one.
///
/// The pointers among `args` must be null, checked user memory, or lent
/// ([`crate::bounce`]); the functions of the submodules are few and each says
/// how it checked.
pub(crate) fn forward(nr: u32, args: Args) -> SysResult {
    // SAFETY: as above.
    unsafe { call_walled(nr, &args) }
}

/// As [`forward`], for calls that must not be given up for a signal.
pub(crate) fn forward_at_once(nr: u32, args: Args) -> SysResult {
    // SAFETY: as `forward`.
    unsafe { call_walled_always(nr, &args) }
}

/// A call of the guard itself, whose pointers are its own: not behind the wall.
/// It is not given up for a signal: the guard could not start the whole again.
pub(crate) fn forward_always(nr: u32, args: Args) -> SysResult {
    // SAFETY: no pointer among the arguments comes from the program.
    unsafe { syscall(nr, args) }
}

/// As [`forward_always`], for calls that may wait.
pub(crate) fn forward_interruptible(nr: u32, args: Args) -> SysResult {
    // SAFETY: as `forward_always`.
    unsafe { call_interruptible(nr, &args) }
}

/// `mmap` for the program: memory that forwarded calls reach. The arguments
/// are checked, as for [`forward`].
pub(crate) fn map_for_program(args: Args) -> SysResult {
    let flag = passage_flag();
    // SAFETY: a mapping in user memory, by the caller's checks.
    let at = decode(unsafe { raw_syscall(u64::from(__NR_mmap) | flag, args) })?;
    if flag == 0
        && let Some(wall) = Wall::get()
    {
        let [_, len, prot, ..] = args;
        let len = len.next_multiple_of(PAGE_SIZE);
        // SAFETY: mapped just now, for the program.
        if let Err(errno) = unsafe { wall.give(at, len, prot as u32) } {
            let _ = forward_always(__NR_munmap, [at, len, 0, 0, 0, 0]);
            return Err(Errno::new(errno.0).unwrap_or(Errno::ENOMEM));
        }
    }
    Ok(at)
}

/// A pointer to the guard's own memory, as an argument.
pub(crate) fn own<T: ?Sized>(value: &T) -> u64 {
    (&raw const *value).cast::<u8>().expose_provenance() as u64
}

/// A pointer to the guard's own memory that the kernel will write.
pub(crate) fn own_mut<T: ?Sized>(value: &mut T) -> u64 {
    (&raw mut *value).cast::<u8>().expose_provenance() as u64
}

/// A pointer to `len` bytes that the host kernel may access: null, or user
/// memory. Of no bytes, the pointer is made null.
///
/// # Errors
///
/// `EFAULT` for anything else.
pub(crate) fn user_pointer(addr: u64, len: u64) -> Result<u64, Errno> {
    if addr == 0 || len == 0 {
        Ok(0)
    } else if UserRange::new(addr, len).is_some() || !checks_pointers() {
        Ok(addr)
    } else {
        Err(Errno::EFAULT)
    }
}

impl Guard {
    /// Lends a copy to the host kernel, for a forwarded call.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn lend<T: IntoBytes + Immutable + ?Sized>(&self, value: &T) -> Result<Lent, Errno> {
        self.bounce.lend(value)
    }

    /// As [`user_pointer`], for memory that the host kernel may write.
    ///
    /// # Errors
    ///
    /// Likewise, and `ENOMEM` if a child of `vfork` writes too much.
    pub(crate) fn user_output(&self, addr: u64, len: u64) -> Result<u64, Errno> {
        let at = user_pointer(addr, len)?;
        self.program.note_write(at, len)?;
        Ok(at)
    }

    /// Checks the arguments of `call` by its row in the table.
    ///
    /// # Errors
    ///
    /// The errno that the kernel would give.
    #[inline(always)]
    pub(crate) fn check(&mut self, call: &Call, args: &Args) -> Result<CheckedArgs, Errno> {
        // Registers that are not arguments are not passed on.
        let mut checked = [0; 6];
        let mut strings_used = 0;
        for ((checked, &value), kind) in checked.iter_mut().zip(args).zip(call.args) {
            *checked = match *kind {
                Arg::Value | Arg::Copied(_) | Arg::Checked => value,
                Arg::Fd => self.user_fd(value)?,
                Arg::In(size) => user_pointer(value, byte_count(size, args)?)?,
                Arg::Out(size) | Arg::InOut(size) => {
                    let len = byte_count(size, args)?;
                    self.user_output(value, len)?
                }
                Arg::Pages(len) => {
                    let pages = UserRange::new(value, args[usize::from(len)]);
                    pages.map(|_| value).ok_or(Errno::ENOMEM)?
                }
                Arg::Path | Arg::Text | Arg::SigSet if value == 0 => 0,
                Arg::SigSet => self.copy_signal_set(value)?,
                Arg::Path | Arg::Text => {
                    let at = self.copy_string(value, strings_used, *kind)?;
                    strings_used += 1;
                    at
                }
            };
        }
        self.may_signal(call, &checked)?;
        self.hold_paths(call, &mut checked)?;
        Ok(CheckedArgs(checked))
    }

    /// A descriptor that the program may name.
    ///
    /// # Errors
    ///
    /// `EBADF` for one of the guard's.
    pub(crate) fn user_fd(&self, value: u64) -> Result<u64, Errno> {
        if self.is_hidden_fd(value as RawFd) {
            Err(Errno::EBADF)
        } else {
            Ok(value)
        }
    }

    /// Lends a copy of a signal set of the program.
    fn copy_signal_set(&mut self, addr: u64) -> Result<u64, Errno> {
        let set: SigSet = self.memory().read_value(addr)?;
        self.strings.lend_set(mask_for_host(set))
    }

    /// Copies a string of the program into one of the guard's buffers.
    #[inline(never)]
    fn copy_string(&mut self, addr: u64, which: usize, kind: Arg) -> Result<u64, Errno> {
        // Two buffers serve: no call of the table has more strings.
        let buffer = self.strings.texts.get_mut(which).ok_or(Errno::EINVAL)?;
        let memory = UserMemory::new(self.program.memory_lock(), self.program.pid());
        let len = memory.read_cstr_into(addr, &mut buffer[..])?;
        if kind == Arg::Path {
            procfs::replace_exe_link(&self.program, buffer, len)?;
        }
        let len = buffer
            .iter()
            .position(|&byte| byte == 0)
            .map_or(len, |zero| zero + 1);
        self.strings.lend_text(which, len)
    }

    /// Copies a path into one of the guard's buffers and returns its address.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `ENAMETOOLONG`.
    pub(crate) fn copy_path(&mut self, addr: u64) -> Result<u64, Errno> {
        self.copy_string(addr, 0, Arg::Path)
    }

    /// Copies a path of the program, with its final zero.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `ENAMETOOLONG`.
    pub(crate) fn read_path(&self, addr: u64) -> Result<Vec<u8>, Errno> {
        let mut buffer = [0; PATH_MAX];
        let len = self.memory().read_cstr_into(addr, &mut buffer)?;
        procfs::replace_exe_link(&self.program, &mut buffer, len)?;
        let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(len);
        Ok(buffer[..=end].to_vec())
    }
}

/// How many bytes `size` means with these arguments.
fn byte_count(size: Size, args: &Args) -> Result<u64, Errno> {
    let value = |index: u8| args[usize::from(index)];
    Ok(match size {
        Size::Bytes(bytes) => u64::from(bytes),
        // The kernel cuts long transfers, and so may we: it never goes beyond.
        Size::Arg(index) => value(index).min(MAX_TRANSFER),
        Size::Arg32(index) => u64::from(value(index) as u32),
        Size::Items(index, bytes) => u64::from(value(index) as u32) * u64::from(bytes),
        Size::Bits(index) => {
            let bits = value(index) as i32;
            if bits < 0 {
                return Err(Errno::EINVAL);
            }
            (bits as u64).div_ceil(64) * 8
        }
        Size::BytePerPage(index) => value(index).div_ceil(PAGE_SIZE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::{USER_HI, USER_LO};
    use crate::table;
    use crate::testing::guard;

    /// Every pointer argument of every call is refused when it points at the
    /// guard, straddles the limit, or wraps.
    #[test]
    fn no_call_takes_a_pointer_to_the_guard() {
        let mut guard = guard();
        let mine = [0_u8; 64];
        let lengths_large = 0x10_0000_u64;
        for call in table::calls() {
            for (index, kind) in call.args.iter().enumerate() {
                let sized = matches!(kind, Arg::In(_) | Arg::Out(_) | Arg::InOut(_));
                if !sized && !matches!(kind, Arg::Path | Arg::Text | Arg::SigSet | Arg::Pages(_)) {
                    continue;
                }
                for hostile in [own(&mine), USER_HI, u64::MAX - 3, USER_LO - 1, 1] {
                    let mut args = [0; 6];
                    for (other, kind) in call.args.iter().enumerate() {
                        if *kind == Arg::Value {
                            args[other] = lengths_large;
                        }
                    }
                    args[index] = hostile;
                    let checked = guard.check(call, &args);
                    assert!(
                        checked.is_err(),
                        "{} argument {index}: {hostile:#x}",
                        call.name
                    );
                }
                if sized {
                    let mut args = [lengths_large; 6];
                    for (other, kind) in call.args.iter().enumerate() {
                        if *kind != Arg::Value {
                            args[other] = 0;
                        }
                    }
                    args[index] = USER_HI - 1;
                    assert!(guard.check(call, &args).is_err(), "{} straddles", call.name);
                }
            }
        }
    }

    #[test]
    fn registers_that_are_no_arguments_do_not_reach_the_kernel() {
        let mut guard = guard();
        let call = table::find(linux_raw_sys::general::__NR_getpid).unwrap();
        let checked = guard.check(call, &[u64::MAX; 6]).unwrap();
        assert_eq!(checked.values(), [0; 6]);
    }

    #[test]
    fn long_transfers_are_cut_as_the_kernel_does() {
        let mut guard = guard();
        let call = table::find(linux_raw_sys::general::__NR_write).unwrap();
        assert!(guard.check(call, &[1, USER_LO, u64::MAX, 0, 0, 0]).is_ok());
        assert!(
            guard
                .check(call, &[1, USER_HI - 4096, u64::MAX, 0, 0, 0])
                .is_err()
        );
        assert_eq!(
            guard
                .check(call, &[1, own(&call), 0, 0, 0, 0])
                .unwrap()
                .values()[1],
            0
        );
    }
}
