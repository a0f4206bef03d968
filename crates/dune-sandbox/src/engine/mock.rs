//! An engine that plays a script of traps: for tests of the guard without KVM.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, Ordering};
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Access, Engine, EngineError, Holdings, Passage, Seed, Trap, UserState};
use crate::range::PageRange;

/// Bytes of extended state that the mock keeps: FXSAVE area and XSAVE header.
const XSTATE_LEN: usize = 576;

/// What the guard asked of the mock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// [`Engine::admit`].
    Admit(u64, PageRange, Access),
    /// [`Engine::revoke`].
    Revoke(PageRange),
}

/// See the module documentation.
#[derive(Debug)]
pub struct MockEngine {
    /// Traps still to come, each with the state it leaves, first one first.
    pub script: VecDeque<(UserState, Trap)>,
    /// What was asked so far; shared, so that a test sees it while the guard
    /// has the engine.
    pub requests: Arc<Mutex<Vec<Request>>>,
    /// The extended state.
    pub xstate: Vec<u8>,
    kick: Box<AtomicU8>,
}

impl Default for MockEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl MockEngine {
    /// An engine with an empty script.
    #[must_use]
    pub fn new() -> Self {
        let mut mock = Self {
            script: VecDeque::new(),
            requests: Arc::default(),
            xstate: vec![0; XSTATE_LEN],
            kick: Box::new(AtomicU8::new(0)),
        };
        mock.clear_xstate();
        mock
    }

    fn note(&self, request: Request) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.push(request);
    }

    fn clear_xstate(&mut self) {
        self.xstate.fill(0);
        self.xstate[0..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        self.xstate[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        self.xstate[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
        self.xstate[512] = 3;
    }
}

impl Engine for MockEngine {
    fn run(&mut self, user: &mut UserState) -> Result<Trap, EngineError> {
        if self.kick.swap(0, Ordering::SeqCst) != 0 {
            return Ok(Trap::Interrupted);
        }
        let (state, trap) = self.script.pop_front().ok_or(EngineError::Stopped {
            what: "end of the script".into(),
            rip: user.regs.rip,
        })?;
        *user = state;
        Ok(trap)
    }

    fn answer_by_itself(&mut self, _may: bool) -> Result<(), EngineError> {
        // It traps at every call.
        Ok(())
    }

    fn admit(&mut self, addr: u64, area: PageRange, access: Access) -> Result<(), EngineError> {
        self.note(Request::Admit(addr, area, access));
        Ok(())
    }

    fn revoke(&mut self, range: PageRange) -> Result<(), EngineError> {
        self.note(Request::Revoke(range));
        Ok(())
    }

    fn seed(&mut self) -> Result<Box<dyn Seed>, EngineError> {
        Err(EngineError::NoMemory {
            what: "a second script",
        })
    }

    fn renew(&mut self) -> Result<(), EngineError> {
        self.clear_xstate();
        Ok(())
    }

    fn xcr0(&self) -> u64 {
        3
    }

    fn xstate_len(&self) -> usize {
        XSTATE_LEN
    }

    fn save_xstate(&mut self, area: &mut [u8]) -> Result<(), EngineError> {
        area.copy_from_slice(&self.xstate);
        Ok(())
    }

    fn load_xstate(&mut self, area: &[u8]) -> Result<(), EngineError> {
        self.xstate.copy_from_slice(area);
        Ok(())
    }

    fn reset_xstate(&mut self) -> Result<(), EngineError> {
        self.clear_xstate();
        Ok(())
    }

    fn passage(&self) -> Passage {
        Passage::Open
    }

    fn kick_byte(&self) -> NonNull<AtomicU8> {
        NonNull::from(&*self.kick)
    }

    fn holdings(&self) -> Holdings {
        Holdings::default()
    }

    fn fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
}
