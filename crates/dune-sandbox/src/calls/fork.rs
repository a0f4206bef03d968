//! Processes: `fork`, `vfork`, and `clone` without `CLONE_THREAD`.
//!
//! The host process forks, so ids, children, groups, sessions and waiting are
//! the kernel's own. Of the host's threads the child has the one that called;
//! it holds all locks of the program at that moment, so that they are whole in
//! the child, and libc's `fork` sees to those of the allocator.

#![expect(unsafe_code, reason = "fork")]

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_pidfd_open, __NR_pipe2, CLONE_CHILD_SETTID, CLONE_CLEAR_SIGHAND, CLONE_FILES, CLONE_FS,
    CLONE_IO, CLONE_PARENT_SETTID, CLONE_PIDFD, CLONE_SETTLS, CLONE_SIGHAND, CLONE_SYSVSEM,
    CLONE_UNTRACED, CLONE_VFORK, CLONE_VM, O_CLOEXEC, SIGCHLD,
};

use crate::calls::thread::Request;
use crate::calls::{Answer, forward_always, own_mut};
use crate::engine::UserState;
use crate::guard::{Guard, leave_process};
use crate::host::{Errno, move_fd_high};
use crate::program::Program;
use crate::signal::{Action, Disposition, SIGNALS, host, record};
use crate::table::Args;
use crate::vfork::take_over;

unsafe extern "C" {
    /// libc's: it keeps the allocator's locks whole in the child.
    safe fn fork() -> i32;
}

pub(crate) fn fork_call(guard: &mut Guard, user: &mut UserState, _args: Args) -> Answer {
    let request = Request {
        exit_signal: u64::from(SIGCHLD),
        ..Request::default()
    };
    make_process(guard, user, request)
}

pub(crate) fn vfork_call(guard: &mut Guard, user: &mut UserState, _args: Args) -> Answer {
    let request = Request {
        flags: u64::from(CLONE_VFORK | CLONE_VM),
        exit_signal: u64::from(SIGCHLD),
        ..Request::default()
    };
    make_process(guard, user, request)
}

/// A new process.
pub(crate) fn make_process(guard: &mut Guard, user: &mut UserState, request: Request) -> Answer {
    /// What a process may be asked for here.
    const KNOWN: u64 = (CLONE_VM
        | CLONE_VFORK
        | CLONE_SETTLS
        | CLONE_PARENT_SETTID
        | CLONE_CHILD_SETTID
        | linux_raw_sys::general::CLONE_CHILD_CLEARTID
        | CLONE_PIDFD
        | CLONE_UNTRACED
        | CLONE_SYSVSEM
        | CLONE_IO) as u64
        | CLONE_CLEAR_SIGHAND;
    let shared = CLONE_FILES | CLONE_FS | CLONE_SIGHAND;
    if request.has(shared)
        || request.flags & !KNOWN != 0
        || request.exit_signal != u64::from(SIGCHLD)
        || (request.has(CLONE_VM) && !request.has(CLONE_VFORK))
        || (request.has(CLONE_PIDFD)
            && request.has(CLONE_PARENT_SETTID)
            && request.pidfd == request.parent_tid)
    {
        return Answer::Return(Err(Errno::EINVAL));
    }
    let pipe = if request.has(CLONE_VFORK) {
        match hidden_pipe(&guard.program) {
            Ok(pipe) => Some(pipe),
            Err(errno) => return Answer::Return(Err(errno)),
        }
    } else {
        None
    };
    fork_with(guard, user, request, pipe)
}

/// A pipe that the program cannot touch: read end, write end.
fn hidden_pipe(program: &Program) -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut hidden = program.hidden_fds_mut();
    let mut ends: [RawFd; 2] = [-1; 2];
    let args = [own_mut(&mut ends), u64::from(O_CLOEXEC), 0, 0, 0, 0];
    forward_always(__NR_pipe2, args)?;
    let [read, write] = ends.map(|end| {
        // SAFETY: the kernel has just made it, and nobody knows it.
        unsafe { OwnedFd::from_raw_fd(end) }
    });
    let high = |end| move_fd_high(end).map_err(|error| Errno::of(&error));
    let (read, write) = (high(read)?, high(write)?);
    program.pass(&mut hidden, read.as_raw_fd());
    program.pass(&mut hidden, write.as_raw_fd());
    Ok((read, write))
}

fn fork_with(
    guard: &mut Guard,
    user: &mut UserState,
    request: Request,
    pipe: Option<(OwnedFd, OwnedFd)>,
) -> Answer {
    let program = Arc::clone(&guard.program);
    let give_up = |pipe: Option<(OwnedFd, OwnedFd)>, errno| {
        if let Some((read, write)) = pipe {
            program.close_passing(read);
            program.close_passing(write);
        }
        Answer::Return(Err(errno))
    };
    let mut xstate = vec![0; guard.engine.xstate_len()];
    if let Err(error) = guard.engine.save_xstate(&mut xstate) {
        let errno = guard.engine_failed(error);
        return give_up(pipe, errno);
    }
    host::block_all();
    if record::is_disturbed() {
        // As the kernel: the signal first, then the call again. What was noted
        // belongs to the parent alone. Whoever takes it sets the mask.
        return give_up(pipe, Errno::ERESTARTSYS);
    }
    let slot = match program.policy().take_task() {
        Ok(slot) => slot,
        Err(errno) => {
            host::set_mask(guard.signals.mask);
            return give_up(pipe, errno);
        }
    };
    let locks = program.lock_all();
    let before = guard.engine.fds();
    let child = fork();
    if child == 0 {
        // All signals are blocked since before the fork.
        record::forget();
        // The other end is closed with everything that is passed on.
        let write_end = pipe.map(|(read, write)| {
            let _ = read.into_raw_fd();
            write
        });
        match program.became_child(locks, guard.engine.as_mut(), &before, write_end) {
            Ok(tid) => guard.tid = tid,
            Err(error) => leave_process(Err(error)),
        }
        record::set_kick(Some(guard.engine.kick_byte()));
        record::set_passage(guard.engine.passage());
        if let Err(error) = guard.engine.load_xstate(&xstate) {
            leave_process(Err(error));
        }
        guard.escape_debugger();
        in_child(guard, user, request);
        return Answer::Registers;
    }
    let error = std::io::Error::last_os_error();
    drop(locks);
    let made = u32::try_from(child).map_err(|_| Errno::EAGAIN);
    program.policy().settle_task(slot, made);
    host::set_mask(guard.signals.mask);
    if child < 0 {
        return give_up(pipe, Errno::of(&error));
    }
    let child = child as u32;
    if request.has(CLONE_PARENT_SETTID) {
        let _ = guard.memory().write_value(request.parent_tid, &child);
    }
    if request.has(CLONE_PIDFD)
        && let Ok(fd) = forward_always(__NR_pidfd_open, [u64::from(child), 0, 0, 0, 0, 0])
    {
        let _ = guard.memory().write_value(request.pidfd, &(fd as u32));
    }
    if let Some((read, write)) = pipe {
        program.close_passing(write);
        let (threads, tid) = (&program.threads, guard.tid);
        guard.away_from_debugger(user, &xstate);
        take_over(&program, &read, || threads.must_leave(tid));
        guard.back_to_debugger();
        program.close_passing(read);
    }
    Answer::Return(Ok(u64::from(child)))
}

/// The rest of what makes a child, which runs on from here.
fn in_child(guard: &mut Guard, user: &mut UserState, request: Request) {
    *user = request.child_state(user);
    guard.clear_child_tid = request.clear_child_tid();
    if request.has(CLONE_CHILD_SETTID) {
        let _ = guard.memory().write_value(request.child_tid, &guard.tid);
    }
    if request.flags & CLONE_CLEAR_SIGHAND != 0 {
        let mut dispositions = guard.program.dispositions();
        for signal in 1..=SIGNALS {
            if dispositions.action(signal).disposition() == Disposition::Handler {
                dispositions.set_action(signal, Action::default());
                host::set_default(signal);
            }
        }
    }
    host::set_mask(guard.signals.mask);
}

/// Tells the parent of a `vfork` what this child has written, if that is what
/// this process is: before it ends or starts another program.
pub(crate) fn finish_vfork(program: &Program) {
    if let Some(journal) = program.take_journal() {
        // The parent is gone if it cannot be told.
        let _ = journal.tell(&program.memory(), program.pid());
        program.close_passing(journal.into_pipe());
    }
}
