//! The threads of a program, and how they end.
//!
//! ```text
//!              exit_group, a fatal signal, a failed engine
//!   Running -----------------------------------------------> Ending
//!     |  ^                                                     (for good)
//!     |  | the new program starts
//!     v  |
//!    Replacing: one thread is in `execve`, the others leave
//! ```
//!
//! Whoever leaves `Running` first wins; threads that come later are among those
//! that leave. One exception: where a service returns to a snapshot, the run is
//! over, and what waits in `execve` for the leader to leave leaves itself
//! ([`Threads::gather`]). They are kicked ([`crate::signal::record`]) out of ring 3 and out
//! of waiting calls, and look here before they go on.
//!
//! The leader is the thread whose id is the process's. It never leaves before
//! the others: after its own `exit` it waits, to end the process or to go on
//! with the program that another thread's `execve` has started.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::debug::control::Control;
use crate::engine::{EngineError, UserState};
use crate::guard::End;
use crate::signal::{SigSet, host};
use crate::snapshot::Ending;

/// How the program ended, or why it could not go on.
pub(crate) type Finish = Result<End, EngineError>;

/// What a thread of the program left for others to see.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Member {
    /// Head of its list of robust futexes, in user memory; 0 for none.
    pub(crate) robust_list: u64,
}

/// A program that another thread has started by `execve`, for the leader.
#[derive(Debug)]
pub(crate) struct Takeover {
    pub(crate) user: UserState,
    pub(crate) mask: SigSet,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Running,
    /// By the thread with this id.
    Replacing(u32),
    Ending,
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct State {
    phase: Phase,
    members: BTreeMap<u32, Member>,
    /// What the thread that ended last gave to `exit`.
    last_status: u8,
    finish: Option<Finish>,
    takeover: Option<Takeover>,
    /// How a run of a served program ended, for the leader to see.
    run_end: Option<Ending>,
}

/// The program is ending, or being replaced, by another thread: leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leave;

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    state: Mutex<State>,
    changed: Condvar,
    /// Threads that a debugger has stopped do not hear of kicks.
    debugger: OnceLock<Arc<Control>>,
}

/// What the leader waited for.
#[derive(Debug)]
pub(crate) enum Wake {
    /// The end of the program.
    Finish(Finish),
    /// A new program.
    Takeover(Takeover),
    /// The end of a run of a served program.
    RunEnded(Ending),
}

impl Threads {
    /// The state, which stays as it is until this is dropped.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new thread, `tid`.
    ///
    /// # Errors
    ///
    /// If it is too late.
    pub(crate) fn join(&self, tid: u32) -> Result<(), Leave> {
        let mut state = self.lock();
        match state.phase {
            Phase::Running => {
                state.members.insert(tid, Member::default());
                Ok(())
            }
            Phase::Replacing(_) | Phase::Ending => Err(Leave),
        }
    }

    /// The thread `tid` has left; `status` is what it gave to `exit`, if it
    /// called it. The last one's is the process's, as on Linux since 6.0.
    pub(crate) fn leave(&self, tid: u32, status: Option<u8>) {
        let mut state = self.lock();
        state.members.remove(&tid);
        if let Some(status) = status {
            state.last_status = status;
        }
        self.changed.notify_all();
    }

    /// Whether the thread `tid` must leave.
    pub(crate) fn must_leave(&self, tid: u32) -> bool {
        match self.lock().phase {
            Phase::Running => false,
            Phase::Replacing(by) => by != tid,
            Phase::Ending => true,
        }
    }

    /// Whether `tid` is a thread of the program.
    pub(crate) fn has(&self, tid: u32) -> bool {
        self.lock().members.contains_key(&tid)
    }

    /// Threads of the process `pid` as Linux counts them: with the first one, even if
    /// it has left.
    pub(crate) fn count(&self, pid: u32) -> usize {
        let state = self.lock();
        state.members.len() + usize::from(!state.members.contains_key(&pid))
    }

    /// Changes what a thread is known by.
    pub(crate) fn update(&self, tid: u32, change: impl FnOnce(&mut Member)) {
        if let Some(member) = self.lock().members.get_mut(&tid) {
            change(member);
        }
    }

    /// What is known of the thread `tid`.
    pub(crate) fn member(&self, tid: u32) -> Option<Member> {
        self.lock().members.get(&tid).copied()
    }

    /// Ends the program `pid`, unless it is ending or being replaced already.
    pub(crate) fn end(&self, pid: u32, finish: Finish) {
        let mut state = self.lock();
        match state.phase {
            Phase::Running => {
                state.phase = Phase::Ending;
                state.finish = Some(finish);
                state.kick_all(pid);
                self.release_stopped(None);
                self.changed.notify_all();
            }
            Phase::Ending => {
                state.finish.get_or_insert(finish);
            }
            Phase::Replacing(_) => {}
        }
    }

    /// Threads stop for a debugger in `control`.
    pub(crate) fn set_debugger(&self, control: Arc<Control>) {
        let _ = self.debugger.set(control);
    }

    /// Has the threads that a debugger has stopped leave, but for `except`.
    fn release_stopped(&self, except: Option<u32>) {
        if let Some(control) = self.debugger.get() {
            control.release(except);
        }
    }

    /// A run of the served program `pid` has ended by another thread than the
    /// leader, which is told, unless the program is being replaced already.
    pub(crate) fn end_run(&self, pid: u32, ending: Ending) {
        let mut state = self.lock();
        if state.is_running() {
            state.run_end.get_or_insert(ending);
            host::kick(pid, pid);
            self.changed.notify_all();
        }
    }

    /// Has the leader of a served program look up where it waits for the others.
    pub(crate) fn wake_leader(&self) {
        let _state = self.lock();
        self.changed.notify_all();
    }

    /// The run of the served program `pid` is over: all threads but the leader,
    /// which calls this, leave, also one that waits in `execve`. The leader is
    /// one of the program's threads then, whether it had left or not.
    ///
    /// # Errors
    ///
    /// The program's end, if it has ended for good.
    pub(crate) fn gather(&self, pid: u32) -> Result<(), Finish> {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Ending) {
            // Nobody joins or replaces the program from here on.
            state.phase = Phase::Replacing(pid);
        }
        state.members.entry(pid).or_default();
        if state.has_others(pid) {
            state.kick_others(pid, pid);
            // A host call, whether somebody waits or not. Who waits is the leader,
            // which is here, or one of the others, until it leaves.
            self.changed.notify_all();
        }
        self.release_stopped(Some(pid));
        let mut state = self.wait_for_others(state, pid, |_| true);
        state.run_end = None;
        if matches!(state.phase, Phase::Ending) {
            let exited = Ok(End::Exit(state.last_status));
            return Err(state.finish.take().unwrap_or(exited));
        }
        state.phase = Phase::Running;
        Ok(())
    }

    /// Waits until `tid` is the only thread, as long as `still` holds.
    fn wait_for_others<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        tid: u32,
        still: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while still(&state) && state.has_others(tid) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// How the run ended, if another thread has said so.
    pub(crate) fn take_run_end(&self) -> Option<Ending> {
        self.lock().run_end.take()
    }

    /// The thread `tid` of the process `pid` will replace the program: returns
    /// when all others have left.
    ///
    /// Until then it is one of the threads: who looks whether there are others
    /// sees it.
    ///
    /// # Errors
    ///
    /// If another thread was first, or the run of a served program is over.
    pub(crate) fn begin_replacing(&self, pid: u32, tid: u32) -> Result<(), Leave> {
        let mut state = self.lock();
        if !state.is_running() || state.run_end.is_some() {
            return Err(Leave);
        }
        state.phase = Phase::Replacing(tid);
        state.kick_others(pid, tid);
        self.release_stopped(Some(tid));
        let state = self.wait_for_others(state, tid, |state| state.is_replaced_by(tid));
        if state.is_replaced_by(tid) {
            Ok(())
        } else {
            Err(Leave)
        }
    }

    /// The new program runs, on the thread that replaced the old one.
    pub(crate) fn replaced(&self) {
        let mut state = self.lock();
        state.phase = Phase::Running;
        // By whatever the old one had ended.
        state.run_end = None;
    }

    /// The new program was started by `tid`, which now leaves it to the leader:
    /// that goes on when `tid` has left.
    pub(crate) fn hand_over(&self, tid: u32, takeover: Takeover) {
        let mut state = self.lock();
        // What it had of the old program is gone.
        state.members.insert(tid, Member::default());
        state.takeover = Some(takeover);
    }

    /// The program could not be started after the old one was gone.
    pub(crate) fn end_replacing(&self, finish: Finish) {
        let mut state = self.lock();
        state.phase = Phase::Ending;
        state.finish = Some(finish);
        self.changed.notify_all();
    }

    /// The leader `pid`, which has left, waits for the others. `interrupted` is
    /// asked whether the run of a served program shall end, whenever somebody
    /// [says so](Threads::wake_leader).
    pub(crate) fn wait_as_leader(&self, pid: u32, interrupted: impl Fn() -> bool) -> Wake {
        let mut state = self.lock();
        loop {
            if state.members.is_empty()
                && let Some(takeover) = state.takeover.take()
            {
                state.phase = Phase::Running;
                state.members.insert(pid, Member::default());
                return Wake::Takeover(takeover);
            }
            if state.is_running() {
                let ended = state.run_end.take();
                let ended = ended.or_else(|| interrupted().then_some(Ending::Interrupted));
                if let Some(ending) = ended {
                    // Until the leader has gathered them, nobody begins to
                    // replace the program: there is no leader to wait for.
                    state.phase = Phase::Replacing(pid);
                    return Wake::RunEnded(ending);
                }
            }
            if state.members.is_empty() {
                match state.phase {
                    Phase::Replacing(_) => {}
                    Phase::Running | Phase::Ending => {
                        let exited = Ok(End::Exit(state.last_status));
                        return Wake::Finish(state.finish.take().unwrap_or(exited));
                    }
                }
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl State {
    /// In the child of a `fork`: of all threads, this one is there.
    pub(crate) fn reset(&mut self, tid: u32) {
        *self = Self::default();
        self.members.insert(tid, Member::default());
    }

    /// Whether the program goes on as it is.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// All threads.
    pub(crate) fn members(&self) -> impl Iterator<Item = (u32, Member)> + '_ {
        self.members.iter().map(|(&tid, &member)| (tid, member))
    }

    fn is_replaced_by(&self, tid: u32) -> bool {
        matches!(self.phase, Phase::Replacing(by) if by == tid)
    }

    /// Whether there are threads besides `tid`.
    fn has_others(&self, tid: u32) -> bool {
        self.members.keys().any(|&other| other != tid)
    }

    fn kick_all(&self, pid: u32) {
        for &tid in self.members.keys() {
            host::kick(pid, tid);
        }
    }

    fn kick_others(&self, pid: u32, me: u32) {
        for &tid in self.members.keys().filter(|&&tid| tid != me) {
            host::kick(pid, tid);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Ids that no thread has: kicks go nowhere.
    const LEADER: u32 = u32::MAX / 2;
    const OTHER: u32 = LEADER - 1;

    fn pair() -> Arc<Threads> {
        let threads = Arc::new(Threads::default());
        assert_eq!(threads.join(LEADER), Ok(()));
        assert_eq!(threads.join(OTHER), Ok(()));
        threads
    }

    /// The other thread calls `execve`, and leaves if it must.
    fn replacing(threads: &Arc<Threads>) -> std::thread::JoinHandle<Result<(), Leave>> {
        let begun = Arc::clone(threads);
        let other = std::thread::spawn(move || {
            let result = begun.begin_replacing(LEADER, OTHER);
            if result.is_err() {
                begun.leave(OTHER, None);
            }
            result
        });
        while threads.lock().is_running() {
            std::thread::yield_now();
        }
        other
    }

    #[test]
    fn who_waits_in_execve_is_still_a_thread_and_leaves_when_the_run_is_over() {
        let threads = pair();
        let other = replacing(&threads);
        assert_eq!(threads.lock().members().count(), 2);
        assert!(threads.gather(LEADER).is_ok());
        assert_eq!(other.join().unwrap(), Err(Leave));
        assert!(threads.lock().is_running());
        let left: Vec<u32> = threads.lock().members().map(|(tid, _)| tid).collect();
        assert_eq!(left, [LEADER]);
    }

    #[test]
    fn a_run_that_is_over_is_not_replaced() {
        let threads = pair();
        threads.end_run(LEADER, Ending::Interrupted);
        assert_eq!(threads.begin_replacing(LEADER, OTHER), Err(Leave));
        threads.leave(LEADER, None);
        let wake = threads.wait_as_leader(LEADER, || false);
        assert!(matches!(wake, Wake::RunEnded(Ending::Interrupted)));
        // Nor before the leader has gathered the others.
        assert_eq!(threads.begin_replacing(LEADER, OTHER), Err(Leave));
        threads.leave(OTHER, None);
        assert!(threads.gather(LEADER).is_ok());
        assert!(threads.has(LEADER));
    }

    #[test]
    fn the_leader_takes_over_when_the_other_has_left() {
        let threads = pair();
        let other = replacing(&threads);
        threads.leave(LEADER, None);
        assert_eq!(other.join().unwrap(), Ok(()));
        let (user, mask) = (UserState::default(), 0);
        threads.hand_over(OTHER, Takeover { user, mask });
        assert_eq!(threads.lock().members().count(), 1);
        threads.leave(OTHER, None);
        let wake = threads.wait_as_leader(LEADER, || true);
        assert!(matches!(wake, Wake::Takeover(_)));
    }
}
