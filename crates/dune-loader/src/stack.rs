//! The stack a program starts with: arguments, environment, auxiliary vector.
//!
//! The words are those of the x86-64 psABI, section 3.4.1; the strings lie as
//! Linux lays them, since programs that rename themselves write over the
//! strings of `argv` and go on into those of `envp`.
//!
//! ```text
//!  top ──────> ┌──────────────────────────────┐  (high addresses)
//!              │ 8 zero bytes                 │
//!              │ filename\0                   │ <── AT_EXECFN
//!              │ envp[0]\0 ... envp[n-1]\0    │     `environment`
//!              │ argv[0]\0 ... argv[argc-1]\0 │     `arguments`
//!              │ 0 to 15 bytes of padding     │
//!              │ "x86_64\0"                   │ <── AT_PLATFORM
//!              │ 16 random bytes              │ <── AT_RANDOM
//!              │ 0 to 15 bytes of padding     │
//!              ├──────────────────────────────┤
//!              │ AT_NULL, 0                   │
//!              │ ...       (key, value)       │     auxiliary vector
//!              ├──────────────────────────────┤
//!              │ NULL                         │
//!              │ envp[n-1] ... envp[0]        │     pointers, envp[0] lowest
//!              ├──────────────────────────────┤
//!              │ NULL                         │
//!              │ argv[argc-1] ... argv[0]     │     pointers, argv[0] lowest
//!              ├──────────────────────────────┤
//!  sp ───────> │ argc                         │     a multiple of 16
//!              └──────────────────────────────┘  (low addresses)
//! ```

use std::ffi::{CStr, CString};

use rustix::io::Errno;
use thiserror::Error;

use crate::addr::{UserAddr, UserRange};
use crate::auxv::{AuxPointers, AuxvInputs};

/// The longest argument or environment string, its NUL included, in bytes
/// (`MAX_ARG_STRLEN`).
pub const STRING_LIMIT: u64 = 32 * 4096;

/// All strings and pointers may take this much however small the stack
/// (`ARG_MAX`), in bytes.
const TOTAL_MINIMUM: u64 = 128 * 1024;

/// And no more than this however large it is: three quarters of Linux's
/// default stack of 8 MiB.
const TOTAL_MAXIMUM: u64 = 6 * 1024 * 1024;

/// What stack pointers are aligned to at a program's start, in bytes.
const ALIGNMENT: u64 = 16;

/// The value `AT_PLATFORM` points at.
const PLATFORM: &CStr = c"x86_64";

/// Why arguments and environment do not fit; Linux says `E2BIG`.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StackError {
    /// One string is longer than [`STRING_LIMIT`].
    #[error(
        "argument or environment string of {len} bytes; Linux accepts {STRING_LIMIT}: pass it by \
         a file or standard input"
    )]
    StringTooLong {
        /// Its length with the NUL, in bytes.
        len: u64,
    },
    /// All strings and pointers together are more than a quarter of the stack.
    #[error(
        "arguments and environment take {len} bytes, more than the {limit} that the stack allows; \
         pass fewer, or raise the stack's limit (ulimit -s)"
    )]
    TooLong {
        /// What they take, pointers included, in bytes.
        len: u64,
        /// What they may take.
        limit: u64,
    },
}

impl StackError {
    /// The errno that `execve` gives.
    #[must_use]
    pub fn errno(&self) -> Errno {
        Errno::TOOBIG
    }
}

/// What a program's first stack is made from.
///
/// # Examples
///
/// ```
/// # use dune_loader::*;
/// # let file = std::fs::File::open("/proc/self/exe")?;
/// # let exe = Elf::parse(&file).unwrap();
/// # let at = |address| UserAddr::new(address).unwrap();
/// # let layout = Layout {
/// #     exe_base: at(0x10_0000_0000),
/// #     interp_base: at(0x20_0000_0000),
/// #     user_range: UserRange::new(at(0x1_0000), at(0x40_0000_0000)).unwrap(),
/// # };
/// # let plan = LoadPlan::new(&exe, None, &layout).unwrap();
/// let stack = InitialStack {
///     top: UserAddr::new(0x30_0000_0000)?,
///     len: 8 << 20,
///     filename: c"/bin/echo",
///     argv: &[c"echo".into(), c"hello".into()],
///     envp: &[c"HOME=/".into()],
///     auxv: AuxvInputs {
///         plan: &plan,
///         ids: Ids::of_this_process(),
///         machine: Machine::of_host()?,
///         random: [7; 16],
///         vdso: None,
///     },
/// }
/// .build()?;
/// assert_eq!(stack.sp.get() % 16, 0);
/// assert_eq!(stack.bytes[..8], 2u64.to_le_bytes(), "argc");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct InitialStack<'a> {
    /// The end of the stack's memory; of any alignment.
    pub top: UserAddr,
    /// The stack's largest size in bytes (`RLIMIT_STACK`; `u64::MAX` for
    /// unlimited), from which the limit for strings follows.
    pub len: u64,
    /// The path given to `execve`.
    pub filename: &'a CStr,
    /// The arguments.
    pub argv: &'a [CString],
    /// The environment.
    pub envp: &'a [CString],
    /// What the auxiliary vector is made from.
    pub auxv: AuxvInputs<'a>,
}

/// A program's first stack, to be copied to [`StackImage::sp`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackImage {
    /// All bytes from `sp` to the stack's top.
    pub bytes: Vec<u8>,
    /// The first stack pointer; a multiple of 16, and `argc` is at it.
    pub sp: UserAddr,
    /// The strings of `argv`, as `/proc/PID/cmdline` shows them.
    pub arguments: UserRange,
    /// The strings of `envp`, as `/proc/PID/environ` shows them.
    pub environment: UserRange,
}

impl InitialStack<'_> {
    /// Lays the stack out.
    ///
    /// # Errors
    ///
    /// [`StackError`] where Linux says `E2BIG`.
    pub fn build(&self) -> Result<StackImage, StackError> {
        self.check_limits()?;
        self.lay_out().ok_or_else(|| StackError::TooLong {
            len: self.string_bytes().saturating_add(self.pointer_bytes()),
            limit: self.len.min(self.top.get()),
        })
    }

    fn strings(&self) -> impl Iterator<Item = &CStr> {
        self.argv.iter().chain(self.envp).map(CString::as_c_str)
    }

    fn string_bytes(&self) -> u64 {
        self.strings().chain([self.filename]).map(byte_len).sum()
    }

    fn pointer_bytes(&self) -> u64 {
        8 * (self.argv.len().max(1) + self.envp.len()) as u64
    }

    /// Linux's rules: each string, and all of them with their pointers.
    fn check_limits(&self) -> Result<(), StackError> {
        if let Some(len) = self.strings().map(byte_len).find(|&len| len > STRING_LIMIT) {
            return Err(StackError::StringTooLong { len });
        }
        let limit = (self.len / 4).clamp(TOTAL_MINIMUM, TOTAL_MAXIMUM);
        let len = self.string_bytes() + self.pointer_bytes();
        if len > limit {
            Err(StackError::TooLong { len, limit })
        } else {
            Ok(())
        }
    }

    /// `None` when the image does not fit between address zero, or the
    /// stack's own limit, and its top.
    fn lay_out(&self) -> Option<StackImage> {
        let mut end = self.top.checked_sub(8)?;
        let mut take = |len: u64| {
            end = end.checked_sub(len)?;
            Some(end)
        };
        let filename = take(byte_len(self.filename))?;
        let environment = block_of(self.envp, &mut take)?;
        let arguments = block_of(self.argv, &mut take)?;
        take(arguments.start().get() % ALIGNMENT)?;
        let platform = take(byte_len(PLATFORM))?;
        let random = take(16)?;

        let aux_count = self.auxv.entry_count();
        let word_count = 1 + self.argv.len() + 1 + self.envp.len() + 1 + 2 * aux_count;
        let words_end = random.get();
        let sp = words_end.checked_sub(8 * word_count as u64)? / ALIGNMENT * ALIGNMENT;
        let sp = UserAddr::new(sp).ok()?;
        let len = self.top.get() - sp.get();
        if len > self.len {
            return None;
        }

        let mut image = Writer {
            bytes: vec![0; usize::try_from(len).ok()?],
            sp,
        };
        image.put(filename, self.filename.to_bytes_with_nul());
        image.put(platform, PLATFORM.to_bytes_with_nul());
        image.put(random, &self.auxv.random);
        let mut words = Vec::with_capacity(word_count);
        words.push(self.argv.len() as u64);
        for (strings, block) in [(self.argv, arguments), (self.envp, environment)] {
            image.put_strings(strings, block, &mut words);
            words.push(0);
        }
        let pointers = AuxPointers {
            random,
            platform,
            filename,
        };
        words.extend(
            self.auxv
                .entries(&pointers)
                .flat_map(|entry| [entry.key.0, entry.value]),
        );
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        image.put(sp, &words);
        Some(StackImage {
            bytes: image.bytes,
            sp,
            arguments,
            environment,
        })
    }
}

/// Takes room for a block of strings.
fn block_of(
    strings: &[CString],
    take: &mut impl FnMut(u64) -> Option<UserAddr>,
) -> Option<UserRange> {
    let len = strings.iter().map(|string| byte_len(string)).sum();
    UserRange::with_len(take(len)?, len)
}

/// A string's length with its NUL, in bytes.
fn byte_len(string: &CStr) -> u64 {
    string.to_bytes_with_nul().len() as u64
}

/// Bytes that will lie at `sp`, written by address.
struct Writer {
    bytes: Vec<u8>,
    sp: UserAddr,
}

impl Writer {
    fn put(&mut self, at: UserAddr, data: &[u8]) {
        let from = (at.get() - self.sp.get()) as usize;
        self.bytes[from..from + data.len()].copy_from_slice(data);
    }

    /// Writes strings from the block's start on, and notes their addresses.
    fn put_strings(&mut self, strings: &[CString], block: UserRange, pointers: &mut Vec<u64>) {
        let mut from = (block.start().get() - self.sp.get()) as usize;
        for string in strings {
            let data = string.as_bytes_with_nul();
            pointers.push(self.sp.get() + from as u64);
            self.bytes[from..from + data.len()].copy_from_slice(data);
            from += data.len();
        }
    }
}

#[cfg(test)]
mod tests;
