//! Threads: `clone`, `exit`, `set_tid_address`, robust futexes, and signals to
//! one thread.

use core::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use linux_raw_sys::general::{
    __NR_futex, __NR_membarrier, __NR_tgkill, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID,
    CLONE_FILES, CLONE_FS, CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID,
    CLONE_NEWTIME, CLONE_NEWUSER, CLONE_NEWUTS, CLONE_PARENT_SETTID, CLONE_SETTLS, CLONE_SIGHAND,
    CLONE_THREAD, CLONE_VFORK, CLONE_VM, FUTEX_OWNER_DIED, FUTEX_TID_MASK, FUTEX_WAITERS,
    FUTEX_WAKE,
};

use crate::calls::{Answer, fork, forward, forward_always, forward_at_once, own};
use crate::engine::{Seed, UserState};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::program::{Program, replace_fds};
use crate::range::{USER_HI, UserRange};
use crate::signal::{ThreadSignals, host};
use crate::table::Args;

/// Namespaces, which an unprivileged program may not make.
const NAMESPACES: u64 = (CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET
    | CLONE_NEWTIME) as u64;

/// What threads must share here: the host's threads do.
const SHARED_BY_THREADS: u64 = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND) as u64;

/// Bytes of stack for the guard of a thread; what is not used costs nothing.
const GUARD_STACK: usize = 512 << 10;

/// A call of the `clone` family, in one shape.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Request {
    pub(crate) flags: u64,
    pub(crate) exit_signal: u64,
    /// Stack pointer of the child; 0 for the caller's.
    pub(crate) stack: u64,
    pub(crate) parent_tid: u64,
    pub(crate) child_tid: u64,
    pub(crate) tls: u64,
    pub(crate) pidfd: u64,
}

impl Request {
    pub(crate) const fn has(&self, flag: u32) -> bool {
        self.flags & flag as u64 != 0
    }

    /// The address for `CLONE_CHILD_CLEARTID`, or 0.
    pub(crate) const fn clear_child_tid(&self) -> u64 {
        if self.has(CLONE_CHILD_CLEARTID) {
            self.child_tid
        } else {
            0
        }
    }

    /// The registers of the new task.
    pub(crate) fn child_state(&self, parent: &UserState) -> UserState {
        let mut child = *parent;
        child.regs.rax = 0;
        if self.stack != 0 {
            child.regs.rsp = self.stack;
        }
        if self.has(CLONE_SETTLS) {
            child.fs_base = self.tls;
        }
        child
    }
}

pub(crate) fn clone(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    /// `CSIGNAL`.
    const SIGNAL: u64 = 0xff;
    let [flags, stack, parent_tid, child_tid, tls, _] = args;
    // The kernel looks at the low half.
    let flags = u64::from(flags as u32);
    make_task(
        guard,
        user,
        Request {
            flags: flags & !SIGNAL,
            exit_signal: flags & SIGNAL,
            stack,
            parent_tid,
            child_tid,
            tls,
            // `clone` has one argument for both.
            pidfd: parent_tid,
        },
    )
}

pub(crate) fn clone3(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    match read_clone3(guard, args) {
        Ok(request) => make_task(guard, user, request),
        Err(errno) => Answer::Return(Err(errno)),
    }
}

fn read_clone3(guard: &Guard, args: Args) -> Result<Request, Errno> {
    /// `struct clone_args` of the first version, and the last that is known.
    const FIRST: u64 = 64;
    const WORDS: usize = 11;
    const MOST: u64 = 4096;
    let [at, len, ..] = args;
    if len < FIRST {
        return Err(Errno::EINVAL);
    }
    if len > MOST {
        return Err(Errno::E2BIG);
    }
    let mut bytes = vec![0; (len as usize).max(WORDS * 8)];
    guard.memory().read(at, &mut bytes[..len as usize])?;
    let (known, unknown) = bytes.split_at(WORDS * 8);
    if unknown.iter().any(|&byte| byte != 0) {
        return Err(Errno::E2BIG);
    }
    let mut words = [0_u64; WORDS];
    for (word, bytes) in words.iter_mut().zip(known.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let [
        flags,
        pidfd,
        child_tid,
        parent_tid,
        exit_signal,
        stack,
        stack_size,
        tls,
        set_tid,
        set_tid_size,
        _cgroup,
    ] = words;
    if set_tid != 0 || set_tid_size != 0 {
        // Choosing ids takes a privilege.
        return Err(Errno::EPERM);
    }
    if (stack == 0) != (stack_size == 0) {
        return Err(Errno::EINVAL);
    }
    Ok(Request {
        flags,
        exit_signal,
        stack: stack.wrapping_add(stack_size),
        parent_tid,
        child_tid,
        tls,
        pidfd,
    })
}

/// Decides what a request asks for.
fn make_task(guard: &mut Guard, user: &mut UserState, request: Request) -> Answer {
    if request.flags & NAMESPACES != 0 {
        return Answer::Return(Err(Errno::EPERM));
    }
    if request.has(CLONE_SETTLS) && request.tls >= USER_HI {
        return Answer::Return(Err(Errno::EPERM));
    }
    let implied = [(CLONE_THREAD, CLONE_SIGHAND), (CLONE_SIGHAND, CLONE_VM)];
    if implied
        .iter()
        .any(|&(flag, other)| request.has(flag) && !request.has(other))
    {
        return Answer::Return(Err(Errno::EINVAL));
    }
    if request.has(CLONE_THREAD) {
        let shares_all = request.flags & SHARED_BY_THREADS == SHARED_BY_THREADS;
        if !shares_all || request.has(CLONE_VFORK) {
            return Answer::Return(Err(Errno::EINVAL));
        }
        return Answer::Return(new_thread(guard, user, request));
    }
    fork::make_process(guard, user, request)
}

/// What a new thread takes along.
struct Birth {
    program: Arc<Program>,
    seed: Box<dyn Seed>,
    xstate: Vec<u8>,
    user: UserState,
    request: Request,
    signals: ThreadSignals,
    born: Sender<SysResult>,
}

fn new_thread(guard: &mut Guard, user: &UserState, request: Request) -> SysResult {
    let program = Arc::clone(&guard.program);
    if program.is_journaling() {
        // A child of `vfork` has its parent's memory to keep in order.
        return Err(Errno::EAGAIN);
    }
    let mut xstate = vec![0; guard.engine.xstate_len()];
    guard
        .engine
        .save_xstate(&mut xstate)
        .map_err(|error| guard.engine_failed(error))?;
    let slot = program.policy().take_task()?;
    let (born, birth): (_, Receiver<SysResult>) = channel();
    program.becomes_shared();
    // The new thread begins with every signal blocked, until it has its record.
    host::block_all();
    let spawned = {
        // While the guard makes descriptors, nobody may copy or replace any.
        let mut hidden = program.hidden_fds_mut();
        let before = guard.engine.fds();
        let spawned = guard
            .engine
            .seed()
            .map_err(|_| Errno::EAGAIN)
            .and_then(|seed| {
                let birth = Birth {
                    program: Arc::clone(&program),
                    seed,
                    xstate,
                    user: request.child_state(user),
                    request,
                    signals: ThreadSignals {
                        mask: guard.signals.mask,
                        ..ThreadSignals::default()
                    },
                    born,
                };
                std::thread::Builder::new()
                    .stack_size(GUARD_STACK)
                    .spawn(move || {
                        // A defect of the guard: nothing can be trusted any more.
                        if catch_unwind(AssertUnwindSafe(|| live(birth))).is_err() {
                            std::process::abort();
                        }
                    })
                    .map_err(|_| Errno::EAGAIN)
            });
        // The seed's, or those that the thread's start made.
        replace_fds(&mut hidden, &before, &guard.engine.fds());
        spawned
    };
    let result = spawned.and_then(|_| birth.recv().unwrap_or(Err(Errno::EAGAIN)));
    host::set_mask(guard.signals.mask);
    program
        .policy()
        .settle_task(slot, result.map(|tid| tid as u32));
    result
}

/// The whole life of a thread, from its first moment.
fn live(birth: Birth) {
    let Birth {
        program,
        seed,
        xstate,
        mut user,
        request,
        signals,
        born,
    } = birth;
    if own(&request) < USER_HI {
        // The host kernel found no place for this stack but the program's part.
        let _ = born.send(Err(Errno::EAGAIN));
        return;
    }
    let engine = match seed.grow() {
        Ok(engine) => engine,
        Err(_) => {
            let _ = born.send(Err(Errno::EAGAIN));
            return;
        }
    };
    let mut guard = Guard::of_thread(Arc::clone(&program), engine, signals);
    let tid = guard.tid;
    if guard.engine.load_xstate(&xstate).is_err() || program.threads.join(tid).is_err() {
        let _ = born.send(Err(Errno::EAGAIN));
        return;
    }
    guard.join_debugger();
    guard.clear_child_tid = request.clear_child_tid();
    let told = |flag: u32, at: u64| {
        if request.has(flag) {
            // As the kernel: an address that is none is the program's loss.
            let _ = guard.memory().write_value(at, &tid);
        }
    };
    told(CLONE_PARENT_SETTID, request.parent_tid);
    told(CLONE_CHILD_SETTID, request.child_tid);
    let _ = born.send(Ok(u64::from(tid)));
    host::set_mask(guard.signals.mask);
    let _ = guard.live(&mut user);
    // The vCPU is another thread's before anybody learns that this one is gone.
    let (clear, status) = (guard.clear_child_tid, guard.status);
    host::block_all();
    drop(guard);
    // As long as this thread counts, `execve` waits: later, the word would be one
    // of the next program.
    clear_tid(&program, clear);
    program.threads.leave(tid, status);
}

/// Tells whoever waits for a thread that it has ended.
fn clear_tid(program: &Program, at: u64) {
    const ONE: u64 = 1;
    if at == 0 || UserRange::new(at, 4).is_none() {
        return;
    }
    let memory = crate::user::UserMemory::new(program.memory_lock(), program.pid());
    let _ = memory.write_value(at, &0_u32);
    // The guard, and with it the thread's way behind the wall, is gone; waking accesses nothing.
    let _ = forward_always(__NR_futex, [at, u64::from(FUTEX_WAKE), ONE, 0, 0, 0]);
}

pub(crate) fn exit(_guard: &mut Guard, _user: &mut UserState, args: Args) -> Answer {
    Answer::ThreadExit(args[0] as u8)
}

pub(crate) fn exit_group(_guard: &mut Guard, _user: &mut UserState, args: Args) -> Answer {
    Answer::Exit(args[0] as u8)
}

pub(crate) fn set_tid_address(guard: &mut Guard, args: Args) -> SysResult {
    guard.clear_child_tid = args[0];
    Ok(u64::from(guard.tid))
}

/// Remembered, not passed on: the host kernel would follow the list wherever it
/// leads, into the guard's memory too. See [`Guard::release_robust_futexes`].
pub(crate) fn set_robust_list(guard: &mut Guard, args: Args) -> SysResult {
    let [head, len, ..] = args;
    if len != ROBUST_HEAD_LEN {
        return Err(Errno::EINVAL);
    }
    let tid = guard.tid;
    guard
        .program
        .threads
        .update(tid, |member| member.robust_list = head);
    Ok(0)
}

pub(crate) fn get_robust_list(guard: &mut Guard, args: Args) -> SysResult {
    let [tid, head, len, ..] = args;
    let tid = if tid == 0 { guard.tid } else { tid as u32 };
    let member = guard.program.threads.member(tid).ok_or(Errno::EPERM)?;
    guard.memory().write_value(head, &member.robust_list)?;
    guard.memory().write_value(len, &ROBUST_HEAD_LEN)?;
    Ok(0)
}

/// Bytes of `struct robust_list_head`.
const ROBUST_HEAD_LEN: u64 = 24;

impl Guard {
    /// What the kernel does for a thread that ends while it holds robust
    /// futexes.
    pub(crate) fn die_of_robust_futexes(&self) {
        if let Some(member) = self.program.threads.member(self.tid) {
            self.release_robust_futexes(self.tid, member.robust_list);
        }
    }

    /// Marks the futexes of a list as left behind by `tid`, and wakes one
    /// waiter each (the kernel's `exit_robust_list`; priority inheritance, which
    /// the kernel keeps account of by itself, is left to it).
    ///
    /// The list is the program's and hostile: every pointer is used through
    /// checked copies, and the walk has an end.
    pub(crate) fn release_robust_futexes(&self, tid: u32, head: u64) {
        /// The kernel's `ROBUST_LIST_LIMIT`.
        const LIMIT: usize = 2048;
        const PI: u64 = 1;
        if head == 0 {
            return;
        }
        let memory = self.memory();
        let Ok([first, offset, pending]) = memory.read_value::<[u64; 3]>(head) else {
            return;
        };
        let release = |entry: u64| {
            if entry & PI == 0 {
                self.release_futex(tid, entry.wrapping_add(offset));
            }
        };
        let mut entry = first;
        for _ in 0..LIMIT {
            if entry & !PI == head {
                break;
            }
            // Before the word changes: then the entry may be used again.
            let next = memory.read_value::<u64>(entry & !PI);
            if entry != pending {
                release(entry);
            }
            let Ok(next) = next else { break };
            entry = next;
        }
        if pending != 0 {
            release(pending);
        }
    }

    /// While the word names `tid`, which is at its end, others change nothing
    /// in it but the bit that says they wait: it is set here in any case, so
    /// that the write need not be atomic with the read.
    fn release_futex(&self, tid: u32, at: u64) {
        let Ok(word) = self.memory().read_value::<u32>(at) else {
            return;
        };
        if word & FUTEX_TID_MASK != tid || !at.is_multiple_of(4) {
            return;
        }
        let left = FUTEX_OWNER_DIED | FUTEX_WAITERS;
        if self.memory().write_value(at, &left).is_ok() {
            let _ = forward_at_once(__NR_futex, [at, u64::from(FUTEX_WAKE), 1, 0, 0, 0]);
        }
    }

    /// Clears the leader's own word; other threads' is cleared when their
    /// guard is gone.
    pub(crate) fn release_child_tid(&mut self) {
        let at = core::mem::take(&mut self.clear_child_tid);
        clear_tid(&self.program, at);
    }

    /// Whether `id` is this process's or that of a host thread of it, the
    /// program's or not.
    pub(crate) fn is_own_id(&self, id: u32) -> bool {
        const NO_SIGNAL: u64 = 0;
        let pid = self.pid();
        let args = [u64::from(pid), u64::from(id), NO_SIGNAL, 0, 0, 0];
        id == pid || forward_always(__NR_tgkill, args).is_ok()
    }

    /// Whether `tid` is a host thread of this process that is none of the
    /// program's.
    pub(crate) fn is_hidden_thread(&self, tid: u64) -> bool {
        let tid = tid as u32;
        tid != self.pid() && !self.program.threads.has(tid) && self.is_own_id(tid)
    }
}

/// Barriers on all CPUs that run the program, whose guest they interrupt as any
/// thread. Restartable sequences are not there.
pub(crate) fn membarrier(_guard: &mut Guard, args: Args) -> SysResult {
    /// `MEMBARRIER_CMD_*` from `GLOBAL` to `REGISTER_PRIVATE_EXPEDITED_SYNC_CORE`.
    const KNOWN: u64 = 0x7f;
    const QUERY: u64 = 0;
    let [command, flags, ..] = args;
    let command = u64::from(command as u32);
    if flags as u32 != 0 || command & !KNOWN != 0 {
        return Err(Errno::EINVAL);
    }
    let answer = forward(__NR_membarrier, [command, 0, 0, 0, 0, 0])?;
    Ok(if command == QUERY {
        answer & KNOWN
    } else {
        answer
    })
}

/// The arguments are the group, the thread and the signal.
pub(crate) fn tgkill(guard: &mut Guard, args: Args) -> SysResult {
    if args[0] as u32 == guard.pid() && guard.is_hidden_thread(args[1]) {
        return Err(Errno::ESRCH);
    }
    forward(__NR_tgkill, args)
}

/// The arguments are the thread and the signal.
pub(crate) fn tkill(guard: &mut Guard, args: Args) -> SysResult {
    if guard.is_hidden_thread(args[0]) {
        return Err(Errno::ESRCH);
    }
    forward(linux_raw_sys::general::__NR_tkill, args)
}
