//! System calls that the embedding program answers itself.
//!
//! A handler stands around the guard's own handling of one system call: it
//! sees the call first, may answer it, or lets it
//! [proceed](Request::proceed), with the same arguments or others, and sees
//! what came of it. Whatever it passes on is checked as if the program had
//! asked for it, so a handler cannot weaken the sandbox by what it lets pass;
//! what it *answers* is its own responsibility.
//!
//! Cost: nothing for calls without a handler but a look whether there are any;
//! with one, a virtual call. No exit.
//!
//! # Threads and processes
//!
//! Handlers run on the thread of the program that made the call, several at a
//! time if the program has several threads. In a child that the program forks,
//! the handler goes on with a copy of whatever it captured: what children must
//! share with the parent has to be in shared memory.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::calls::procfs;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::{self, Args, Call, Handling};

/// A handler of one system call.
pub(crate) type Handler = dyn Fn(&mut Request<'_>) -> SysResult + Send + Sync;

/// The handlers of a program, by the number of their call.
#[derive(Clone, Default)]
pub(crate) struct Handlers(Vec<(u32, Arc<Handler>)>);

impl core::fmt::Debug for Handlers {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let names = self.0.iter().filter_map(|(nr, _)| table::find(*nr));
        f.debug_list().entries(names.map(|call| call.name)).finish()
    }
}

/// Why a call cannot have a handler.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// There is no call of this name.
    #[error("there is no system call {0:?}; `dune syscalls` lists them")]
    Unknown(String),
    /// The call changes the program's registers, or ends it.
    #[error("{0} changes what the thread is, not only its result: it cannot have a handler")]
    Control(&'static str),
}

impl Handlers {
    pub(crate) fn add(
        &mut self,
        name: &str,
        handler: impl Fn(&mut Request<'_>) -> SysResult + Send + Sync + 'static,
    ) -> Result<(), HandleError> {
        let call = table::calls()
            .iter()
            .find(|call| call.name == name)
            .ok_or_else(|| HandleError::Unknown(name.to_owned()))?;
        if let Handling::Control(_) = call.handling {
            return Err(HandleError::Control(call.name));
        }
        self.0.retain(|(nr, _)| *nr != call.nr);
        self.0.push((call.nr, Arc::new(handler)));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn find(&self, nr: u32) -> Option<Arc<Handler>> {
        let found = self.0.iter().find(|(handled, _)| *handled == nr);
        found.map(|(_, handler)| Arc::clone(handler))
    }
}

/// A system call on its way through a handler.
#[derive(Debug)]
pub struct Request<'a> {
    guard: &'a mut Guard,
    call: &'static Call,
    args: Args,
}

impl<'a> Request<'a> {
    pub(crate) fn new(guard: &'a mut Guard, call: &'static Call, args: Args) -> Self {
        Self { guard, call, args }
    }

    /// The call's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.call.name
    }

    /// The arguments, as the program gave them: unchecked numbers.
    #[must_use]
    pub fn args(&self) -> Args {
        self.args
    }

    /// The arguments, to be changed before the call proceeds. A pointer must be
    /// one into the program's own memory, as ever.
    pub fn args_mut(&mut self) -> &mut Args {
        &mut self.args
    }

    /// Lets the guard handle the call as if there were no handler.
    ///
    /// # Errors
    ///
    /// What the program would have got. The guard's internal answer for a call
    /// that a signal prevented ([`Errno::ERESTARTSYS`]) must be returned as it
    /// is.
    pub fn proceed(&mut self) -> SysResult {
        self.guard.handle_without_handler(self.call, &self.args)
    }

    /// Copies from the program's memory.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the program could not read all of it.
    pub fn read(&self, addr: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.guard.memory().read(addr, buffer)
    }

    /// Copies into the program's memory.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the program could not write all of it.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.guard.memory().write(addr, bytes)
    }

    /// Copies a path from the program's memory.
    ///
    /// The copy is what a decision may rest on; a call that proceeds reads the
    /// path again, and another thread may have changed it by then. A handler
    /// that must decide by the path answers the call itself.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `ENAMETOOLONG`.
    pub fn read_path(&self, addr: u64) -> Result<PathBuf, Errno> {
        let mut path = self.guard.read_path(addr)?;
        path.pop();
        Ok(OsString::from_vec(path).into())
    }

    /// Gives the program a new descriptor of a file in memory with these
    /// contents, which nobody can change, positioned at its start: the answer
    /// to an `open`.
    ///
    /// # Errors
    ///
    /// Those of `memfd_create` and `write`; `EFBIG` beyond the program's limit
    /// on file sizes.
    pub fn give_file(&mut self, contents: &[u8]) -> SysResult {
        procfs::sealed_file(&self.guard.program, contents)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::engine::Trap;
    use crate::engine::UserState;
    use crate::guard::Resume;
    use crate::testing::guard;

    fn call(guard: &mut Guard, name: &str, args: Args) -> u64 {
        let call = table::calls().iter().find(|call| call.name == name);
        let mut user = UserState::default();
        user.regs.rax = call.unwrap().nr.into();
        let regs = &mut user.regs;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        let resume = guard.on_trap(Trap::Syscall, &mut user).unwrap();
        assert_eq!(resume, Resume::Continue);
        user.regs.rax
    }

    fn with(handlers: Handlers) -> Guard {
        let guard = guard();
        guard.program.set_handlers(handlers);
        guard
    }

    #[test]
    fn a_handler_answers_its_call_and_no_other() {
        let mut handlers = Handlers::default();
        handlers.add("getppid", |_| Ok(77)).unwrap();
        let mut guard = with(handlers);
        assert_eq!(call(&mut guard, "getppid", [0; 6]), 77);
        assert_eq!(
            call(&mut guard, "getpid", [0; 6]),
            u64::from(std::process::id())
        );
    }

    #[test]
    fn calls_pass_unseen_only_where_none_is_handled() {
        let unseen = |handlers| with(handlers).program.lets_calls_pass_unseen();
        assert!(unseen(Handlers::default()));
        let mut handlers = Handlers::default();
        handlers.add("getppid", |_| Ok(77)).unwrap();
        assert!(!unseen(handlers));
    }

    #[test]
    fn what_proceeds_is_what_the_guard_would_have_said() {
        static SEEN: AtomicU64 = AtomicU64::new(0);
        let mut handlers = Handlers::default();
        handlers
            .add("getpid", |request| {
                let answer = request.proceed()?;
                SEEN.store(answer, Ordering::SeqCst);
                Ok(answer + 1)
            })
            .unwrap();
        let pid = u64::from(std::process::id());
        assert_eq!(call(&mut with(handlers), "getpid", [0; 6]), pid + 1);
        assert_eq!(SEEN.load(Ordering::SeqCst), pid);
    }

    #[test]
    fn a_handler_passes_on_nothing_that_the_guard_would_refuse() {
        let secret = [1_u8; 16];
        let at = crate::calls::own(&secret);
        let mut handlers = Handlers::default();
        handlers
            .add("write", move |request| {
                *request.args_mut() = [1, at, 16, 0, 0, 0];
                request.proceed()
            })
            .unwrap();
        let answer = call(&mut with(handlers), "write", [1, 0, 0, 0, 0, 0]);
        assert_eq!(answer, Errno::EFAULT.as_rax());
    }

    #[test]
    fn calls_that_cannot_have_a_handler_are_named() {
        let mut handlers = Handlers::default();
        assert_eq!(
            handlers.add("exit_group", |_| Ok(0)),
            Err(HandleError::Control("exit_group"))
        );
        assert_eq!(
            handlers.add("opne", |_| Ok(0)),
            Err(HandleError::Unknown("opne".to_owned()))
        );
    }

    #[test]
    fn a_file_of_a_handler_has_its_contents_and_cannot_be_changed() {
        let mut handlers = Handlers::default();
        handlers
            .add("openat", |request| request.give_file(b"contents"))
            .unwrap();
        let fd = call(&mut with(handlers), "openat", [0; 6]);
        let link = format!("/proc/self/fd/{fd}");
        assert_eq!(std::fs::read(&link).unwrap(), b"contents");
        assert!(std::fs::write(&link, b"changed").is_err());
        crate::calls::forward_always(linux_raw_sys::general::__NR_close, [fd, 0, 0, 0, 0, 0])
            .unwrap();
    }
}
