//! The guard: what handles every trap of the program.
//!
//! One body of code for both placements; what runs ring 3 is the
//! [`Engine`] underneath. Everything that comes from the program (registers,
//! memory, frames) is hostile until checked, and only what was checked is
//! used: a value in the program's memory is read once, into the guard's.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use crate::calls::memory::Space;
use crate::calls::process::Process;
use crate::calls::{Answer, CheckedArgs, Strings};
use crate::engine::{Engine, EngineError, Trap, UserState};
use crate::host::{Errno, SysResult};
use crate::range::{PageRange, UserRange};
use crate::signal::deliver::{
    Interrupted, Mapped, fault_context, signal_of_exception, signal_of_host_fault,
    signal_of_page_fault,
};
use crate::signal::{Signals, record};
use crate::table::{self, Args, Call, Handling};
use crate::user::UserMemory;
use crate::vma::{Areas, effective};

/// What is to be done after a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Run on.
    Continue,
    /// The program has ended with this status (0 to 255).
    Exit(u8),
    /// The program died of this signal.
    Killed(u32),
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It called `exit` with this status.
    Exit(u8),
    /// It died of this signal.
    Killed(u32),
}

/// A system call that the guard does not have, and how often it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingCall {
    /// Its number.
    pub nr: u32,
    /// Its name, if there is such a call.
    pub name: Option<&'static str>,
    /// How often the program made it.
    pub count: u64,
}

/// The guard of one program. See the module documentation.
///
/// There can be one at a time in a process: signal dispositions, descriptors
/// and the user's part of the address space are the process's.
pub struct Guard {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) areas: Areas,
    pub(crate) space: Space,
    pub(crate) signals: Signals,
    pub(crate) process: Process,
    pub(crate) strings: Strings,
    /// Descriptors that the program must not touch, sorted.
    hidden_fds: Vec<RawFd>,
    missing: BTreeMap<u32, u64>,
    /// Set when the engine failed inside a call.
    broken: Option<EngineError>,
}

impl core::fmt::Debug for Guard {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Guard")
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        record::set_kick(None);
    }
}

impl Guard {
    /// A guard without a program yet.
    #[must_use]
    pub(crate) fn new(engine: Box<dyn Engine>, signals: Signals) -> Self {
        let mut hidden_fds = engine.fds();
        hidden_fds.sort_unstable();
        record::set_kick(Some(engine.kick_byte()));
        Self {
            engine,
            areas: Areas::new(),
            space: Space::default(),
            signals,
            process: Process::of_this_process(),
            strings: Strings::default(),
            hidden_fds,
            missing: BTreeMap::new(),
            broken: None,
        }
    }

    /// Runs the program from `user` to its end.
    ///
    /// # Errors
    ///
    /// If the engine fails.
    pub fn run(&mut self, user: &mut UserState) -> Result<End, EngineError> {
        loop {
            let trap = self.engine.run(user)?;
            match self.on_trap(trap, user)? {
                Resume::Continue => {}
                Resume::Exit(status) => return Ok(End::Exit(status)),
                Resume::Killed(signal) => return Ok(End::Killed(signal)),
            }
        }
    }

    /// Handles one trap.
    ///
    /// # Errors
    ///
    /// If the engine fails under it; the program cannot go on then.
    pub fn on_trap(&mut self, trap: Trap, user: &mut UserState) -> Result<Resume, EngineError> {
        let resume = match trap {
            Trap::Syscall => self.on_syscall(user),
            Trap::PageFault { addr, error } => self.on_page_fault(trap, addr, error.needed(), user),
            Trap::HostFault { addr, .. } => {
                self.deliver_fault(user, signal_of_host_fault(addr), fault_context(&trap))
            }
            Trap::Exception { vector, .. } => {
                let info = signal_of_exception(vector, user.regs.rip);
                self.deliver_fault(user, info, fault_context(&trap))
            }
            Trap::Interrupted => Resume::Continue,
        };
        let resume = match resume {
            Resume::Continue => self.deliver_pending(user, None),
            end => end,
        };
        match self.broken.take() {
            Some(error) => Err(error),
            None => Ok(resume),
        }
    }

    /// Calls that the program made and the guard does not have.
    pub fn missing_calls(&self) -> impl Iterator<Item = MissingCall> + '_ {
        self.missing.iter().map(|(&nr, &count)| MissingCall {
            nr,
            name: table::find(nr).map(|call| call.name),
            count,
        })
    }

    /// The program's memory.
    pub(crate) fn memory(&self) -> UserMemory<'_> {
        UserMemory::new(&self.areas, self.process.pid)
    }

    /// Whether `fd` is a descriptor of the guard.
    pub(crate) fn is_hidden_fd(&self, fd: RawFd) -> bool {
        self.hidden_fds.binary_search(&fd).is_ok()
    }

    /// The descriptors of the guard, sorted.
    pub(crate) fn hidden_fds(&self) -> &[RawFd] {
        &self.hidden_fds
    }

    /// Notes that the engine failed; the trap in hand will end the program.
    pub(crate) fn engine_failed(&mut self, error: EngineError) -> Errno {
        self.broken.get_or_insert(error);
        Errno::EIO
    }

    /// Takes `range` out of ring 3's reach, before the host mapping changes.
    pub(crate) fn revoke(&mut self, range: PageRange) -> Result<(), Errno> {
        self.engine
            .revoke(range)
            .map_err(|error| self.engine_failed(error))
    }

    fn on_syscall(&mut self, user: &mut UserState) -> Resume {
        let regs = &user.regs;
        let rax = regs.rax;
        let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
        // As the kernel: the number is the low half.
        let nr = rax as u32;
        let Some(call) = table::find(nr) else {
            self.count_missing(nr);
            user.regs.rax = Errno::ENOSYS.as_rax();
            return Resume::Continue;
        };
        let result = match self.dispatch(call, user, args) {
            Answer::Return(result) => result,
            Answer::Registers => return Resume::Continue,
            Answer::Exit(status) => return Resume::Exit(status),
            Answer::Killed(signal) => return Resume::Killed(signal),
        };
        match result {
            Err(errno @ (Errno::EINTR | Errno::ERESTARTSYS))
                if errno == Errno::ERESTARTSYS || record::is_pending() =>
            {
                self.deliver_pending(user, Some(Interrupted { call, rax, errno }))
            }
            result => {
                user.regs.rax = result.unwrap_or_else(Errno::as_rax);
                Resume::Continue
            }
        }
    }

    fn dispatch(&mut self, call: &'static Call, user: &mut UserState, args: Args) -> Answer {
        match call.handling {
            Handling::Refused(errno) => Answer::Return(Err(errno)),
            Handling::Missing => {
                self.count_missing(call.nr);
                Answer::Return(Err(Errno::ENOSYS))
            }
            Handling::Forwarded => Answer::Return(self.forward_as_told(call, args)),
            Handling::Emulated(handler) => Answer::Return(
                self.check(call, args)
                    .and_then(|checked| handler(self, checked.values())),
            ),
            Handling::Control(handler) => match self.check(call, args) {
                Ok(checked) => handler(self, user, checked.values()),
                Err(errno) => Answer::Return(Err(errno)),
            },
        }
    }

    fn forward_as_told(&mut self, call: &'static Call, args: Args) -> SysResult {
        let checked: CheckedArgs = self.check(call, args)?;
        checked.forward(call.nr)
    }

    pub(crate) fn count_missing(&mut self, nr: u32) {
        // Numbers are the program's choice: do not let them fill memory.
        const MOST: usize = 1024;
        if self.missing.len() < MOST || self.missing.contains_key(&nr) {
            *self.missing.entry(nr).or_insert(0) += 1;
        }
    }

    fn on_page_fault(
        &mut self,
        trap: Trap,
        addr: u64,
        needed: crate::engine::Access,
        user: &mut UserState,
    ) -> Resume {
        let area = UserRange::new(addr, 1).and_then(|_| self.areas.find(addr));
        let mapped = match area {
            Some(area) => {
                let access = effective(area.attributes.access);
                if access.contains(needed) {
                    if let Err(error) = self.engine.admit(addr, area.range, access) {
                        self.engine_failed(error);
                    }
                    return Resume::Continue;
                }
                Mapped::WithoutTheRight
            }
            None => Mapped::Nothing,
        };
        self.deliver_fault(
            user,
            signal_of_page_fault(addr, mapped),
            fault_context(&trap),
        )
    }
}
