//! System calls of ring 3 that the entry stub answers by itself.
//!
//! A guard that would give the same answer every time can say so before: [`Answers`] is a table
//! by call number, which the stub reads before anything is saved. A call that is in it costs
//! some twenty instructions, no exit, and the guard does not see it.
//!
//! ```text
//!   SYSCALL, rax = n -> n < 512 and answers[n] != 0 -> rax = the answer, SYSRET
//!                       otherwise                   -> UserContext::run returns Trap::Syscall
//! ```

/// How many call numbers the table has.
pub(crate) const CALLS: usize = 512;
/// Entry of a call that the guard wants to see.
const ASK: i16 = 0;
/// Entry of a call that gives the process's id.
pub(crate) const PROCESS_ID: i16 = 1;
/// Entry of a call that gives the thread's id.
pub(crate) const THREAD_ID: i16 = 2;

/// Which system calls of ring 3 have an answer that never changes. See the module
/// documentation. Meant for a `static`: see [`UserContext::answer_at_entry`].
///
/// [`UserContext::answer_at_entry`]: crate::UserContext::answer_at_entry
#[derive(Clone, Debug)]
#[repr(transparent)]
pub struct Answers([i16; CALLS]);

impl Answers {
    /// A table without answers: the guard sees every call.
    #[must_use]
    pub const fn none() -> Self {
        Self([ASK; CALLS])
    }

    /// The call `number` fails with the error `errno` (1 to 4095, as in `errno(3)`).
    ///
    /// # Panics
    ///
    /// If the number is above 511 or the error is none; in a `const`, when it is compiled.
    #[must_use]
    pub const fn refuse(self, number: u32, errno: i32) -> Self {
        assert!(0 < errno && errno < 4096, "no error number");
        self.with(number, -(errno as i16))
    }

    /// The call `number` gives the id of the process, as `getpid` does.
    ///
    /// # Panics
    ///
    /// If the number is above 511; in a `const`, when it is compiled.
    #[must_use]
    pub const fn process_id(self, number: u32) -> Self {
        self.with(number, PROCESS_ID)
    }

    /// The call `number` gives the id of the thread, as `gettid` does.
    ///
    /// # Panics
    ///
    /// If the number is above 511; in a `const`, when it is compiled.
    #[must_use]
    pub const fn thread_id(self, number: u32) -> Self {
        self.with(number, THREAD_ID)
    }

    const fn with(mut self, number: u32, entry: i16) -> Self {
        assert!((number as usize) < CALLS, "no such call number");
        self.0[number as usize] = entry;
        self
    }
}
