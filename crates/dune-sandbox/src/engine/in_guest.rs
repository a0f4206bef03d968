//! The engine of the placement "in guest": the guard at ring 0 of the same guest as ring 3,
//! in Dune mode. A trap costs no exit.
//!
//! ```text
//!   ring 3 of the guest                        ring 0 of the guest: this process
//!   -------------------                        ---------------------------------
//!   SYSCALL, fault, signal ---- entry stub --> UserContext::run returns, Trap
//!   <------------------------------- iretq --- run
//!                                              guard: raw SYSCALL --- exit ---> host kernel
//! ```
//!
//! Ring 3 runs in an address space of its own that has nothing of the guard in its lower
//! half, not even for ring 0. The program's memory is reached by the guard at the same
//! addresses through the process's own page tables.
#![expect(
    unsafe_code,
    reason = "maps the program's memory, which is the process's too"
)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use dune::memory::{AddressSpace, PteFlags, SpaceError, VirtRange};
use dune::{Answers, TrapFrame, UserContext, vector};
use dune_x86::addr::GuestVirt;

use super::{
    Access, Engine, EngineError, Holdings, PageFaultError, Passage, Seed, Trap, Usage, UserRegs,
    UserState, seen_leaf,
};
use crate::range::{PageRange, USER_HI};
use crate::table::{self, Constant};

const PAGE: u64 = 4096;
/// What one fault admits at least, where the area goes that far.
const BLOCK: u64 = 64 << 10;
/// What one fault admits at most.
const MOST_AHEAD: u64 = 64 << 20;
/// In pieces of this size memory is mapped by pages of 4 KiB.
const BY_SMALL_PAGES: u64 = 1 << 20;

/// What the entry stub answers, if the guard need not see every call.
static ANSWERS: Answers = {
    let calls = table::calls();
    let mut answers = Answers::none();
    let mut row = 0;
    while row < calls.len() {
        let call = &calls[row];
        answers = match call.never_changes() {
            Some(Constant::Refused(errno)) => answers.refuse(call.nr, errno.number()),
            Some(Constant::ProcessId) => answers.process_id(call.nr),
            Some(Constant::ThreadId) => answers.thread_id(call.nr),
            None => answers,
        };
        row += 1;
    }
    answers
};

/// The engine. See the module documentation. It belongs to the thread that made it, which is
/// in Dune mode from then on.
#[derive(Debug)]
pub struct InGuest {
    space: Arc<Space>,
    context: UserContext,
    kick: Box<AtomicU8>,
    xcr0: u64,
    /// The address that follows what was admitted last, and how much that was.
    ahead: (u64, u64),
    /// The page that was refused although it is admitted, and by which instruction.
    refused: (u64, u64),
}

/// The address space of all threads.
#[derive(Debug)]
struct Space {
    space: AddressSpace,
    /// Held while the tables are edited. The guard's lock of the memory is held around it, so
    /// that it is free at the moment of a `fork`.
    edit: Mutex<()>,
    /// Whether the CPU shall set the accessed bits.
    notes_use: AtomicBool,
}

/// For a thread that need not be in Dune mode.
struct Used(Arc<Space>);

impl Usage for Used {
    fn collect(&self, seen: &mut dyn FnMut(PageRange)) -> Result<(), EngineError> {
        let _edit = self.0.edit.lock().unwrap_or_else(PoisonError::into_inner);
        self.0
            .space
            .clear_accessed(everything(), |leaf| seen_leaf(&leaf, seen))
            .map_err(refused)
    }

    fn needs_host_change(&self) -> bool {
        false
    }
}

impl Space {
    /// Takes `range` away from ring 3 on every vCPU.
    fn unmap(&self, range: VirtRange) -> Result<(), EngineError> {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        self.space.unmap_memory(range).map_err(refused)
    }
}

/// What the engine of a new thread begins with. That thread is in Dune mode as the one that
/// made it.
struct Sown(Arc<Space>);

impl Seed for Sown {
    fn grow(self: Box<Self>) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(InGuest::in_space(self.0)?))
    }
}

impl InGuest {
    /// Enters Dune mode, and an engine with nothing mapped.
    ///
    /// # Errors
    ///
    /// If Dune mode cannot be entered.
    pub fn new() -> Result<Self, EngineError> {
        // Natively: the rights that a wall gives and takes are the host's.
        if !dune::is_inside() && super::build_wall().is_some() {
            dune::signals::adopt_handlers();
        }
        dune::enter().map_err(|error| EngineError::Kvm {
            what: "Dune mode",
            source: std::io::Error::other(error),
        })?;
        let space = AddressSpace::empty().map_err(refused)?;
        Self::in_space(Arc::new(Space {
            space,
            edit: Mutex::new(()),
            notes_use: AtomicBool::new(false),
        }))
    }

    fn in_space(space: Arc<Space>) -> Result<Self, EngineError> {
        dune::enter().map_err(|error| EngineError::Kvm {
            what: "Dune mode",
            source: std::io::Error::other(error),
        })?;
        let context = UserContext::new(0, 0).map_err(refused)?;
        let (xcr0, _) = dune::extended_features().unwrap_or((3, 576));
        Ok(Self {
            space,
            context,
            kick: Box::new(AtomicU8::new(0)),
            xcr0,
            ahead: (0, 0),
            refused: (0, 0),
        })
    }

    /// What to admit for a fault at `addr` in `area`: the block around it, and twice as much
    /// as last time if it follows on what was admitted then.
    fn extent(&mut self, addr: u64, area: PageRange) -> PageRange {
        let page = addr & !(PAGE - 1);
        let (expected, last) = self.ahead;
        let len = if page == expected && page & (BLOCK - 1) == 0 {
            (last * 2).min(MOST_AHEAD)
        } else {
            BLOCK
        };
        let block = page & !(BLOCK - 1);
        let start = block.max(area.start());
        let end = (block + len).min(area.end());
        self.ahead = (end, len);
        PageRange::new(start, end - start).unwrap_or(area)
    }

    /// Whether the page tables allow an access that faulted. Then it is the host that has
    /// nothing there; but another look is free, and a TLB may have been late.
    fn is_host_fault(&mut self, addr: u64, error: PageFaultError) -> bool {
        let Ok(walk) = self.space.space.walk(GuestVirt::new_truncate(addr)) else {
            return false;
        };
        let allowed = walk.permissions().is_some_and(|rights| {
            rights.user
                && (rights.writable || !error.contains(PageFaultError::WRITE))
                && (rights.executable || !error.contains(PageFaultError::INSTR))
        });
        if !allowed {
            self.refused = (0, 0);
            return false;
        }
        let this = (addr, self.context.registers().rip);
        core::mem::replace(&mut self.refused, this) == this
    }

    /// What the guard is told of a trap that is no system call, by far the most frequent.
    #[cold]
    fn other_trap(&mut self, trap: dune::Trap) -> Trap {
        match trap {
            dune::Trap::Syscall => Trap::Syscall,
            dune::Trap::Interrupted => {
                self.kick.store(0, Ordering::SeqCst);
                Trap::Interrupted
            }
            dune::Trap::PageFault { address, cause } => {
                if !cause.contains(dune::PageFaultError::USER) {
                    return general_protection();
                }
                self.page_fault(address, PageFaultError::from_bits_truncate(cause.bits()))
            }
            dune::Trap::Exception { vector, error } => Trap::Exception {
                vector,
                error,
                dr6: if vector == vector::DEBUG {
                    dune::exceptions::take_debug_status()
                } else {
                    0
                },
            },
        }
    }

    fn page_fault(&mut self, addr: u64, error: PageFaultError) -> Trap {
        if self.is_host_fault(addr, error) {
            self.refused = (0, 0);
            Trap::HostFault { addr, error }
        } else {
            Trap::PageFault { addr, error }
        }
    }
}

impl Engine for InGuest {
    fn run(&mut self, user: &mut UserState) -> Result<Trap, EngineError> {
        load(self.context.registers_mut(), &user.regs);
        self.context.set_fs_base(user.fs_base);
        self.context.set_gs_base(user.gs_base);
        let trap = self
            .context
            .run_unless(&self.space.space, &self.kick)
            .map_err(refused)?;
        store(&mut user.regs, self.context.registers());
        user.fs_base = self.context.fs_base();
        user.gs_base = self.context.gs_base();
        if trap != dune::Trap::Syscall {
            return Ok(self.other_trap(trap));
        }
        self.refused = (0, 0);
        Ok(Trap::Syscall)
    }

    fn answer_by_itself(&mut self, may: bool) -> Result<(), EngineError> {
        self.context
            .answer_at_entry(may.then_some(&ANSWERS))
            .map_err(refused)
    }

    fn admit(&mut self, addr: u64, area: PageRange, access: Access) -> Result<(), EngineError> {
        let extent = self.extent(addr, area);
        let _edit = self
            .space
            .edit
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut flags = user_flags(access);
        let mut piece = extent.len();
        if self.space.notes_use.load(Ordering::Relaxed) {
            flags.remove(PteFlags::ACCESSED);
            piece = piece.min(BY_SMALL_PAGES);
        }
        for at in (extent.start()..extent.end()).step_by(piece as usize) {
            let Some(part) = PageRange::new(at, piece.min(extent.end() - at)) else {
                continue;
            };
            // SAFETY: the guard has mapped the area for the program, revokes it before it
            // unmaps it, and holds no reference into it.
            let replaced = unsafe {
                let space = &self.space.space;
                space.replace_memory(virt_range(part), part.start(), flags)
            };
            replaced.map_err(refused)?;
        }
        Ok(())
    }

    fn note_use(&mut self) -> Option<Box<dyn Usage>> {
        self.space.notes_use.store(true, Ordering::Relaxed);
        Some(Box::new(Used(Arc::clone(&self.space))))
    }

    fn shows_clock(&mut self, _data: u64, _len: u64) -> bool {
        dune::shows_clock_data()
    }

    fn admit_clock(&mut self, range: PageRange, data: u64) -> Result<(), EngineError> {
        let range = virt_range(range);
        let _edit = self
            .space
            .edit
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the kernel's data, which everybody may read and nobody can write or unmap;
        // ring 3 gets the right to read alone.
        unsafe {
            self.space
                .space
                .replace_memory(range, data, user_flags(Access::READ))
        }
        .map_err(refused)
    }

    fn revoke(&mut self, range: PageRange) -> Result<(), EngineError> {
        self.space.unmap(virt_range(range))
    }

    fn needs_host_change(&self) -> bool {
        false
    }

    fn seed(&mut self) -> Result<Box<dyn Seed>, EngineError> {
        Ok(Box::new(Sown(Arc::clone(&self.space))))
    }

    fn renew(&mut self) -> Result<(), EngineError> {
        // Dune mode has gone on by itself, in a new VM, and the page tables are a copy. The
        // guard wants to see every page again.
        self.space.unmap(everything())?;
        self.context.reset_extended_state();
        self.refused = (0, 0);
        Ok(())
    }

    fn xcr0(&self) -> u64 {
        self.xcr0
    }

    fn xstate_len(&self) -> usize {
        self.context.extended_state().len()
    }

    fn save_xstate(&mut self, area: &mut [u8]) -> Result<(), EngineError> {
        let state = self.context.extended_state();
        let len = state.len().min(area.len());
        area[..len].copy_from_slice(&state[..len]);
        Ok(())
    }

    fn load_xstate(&mut self, area: &[u8]) -> Result<(), EngineError> {
        self.context.set_extended_state(area);
        Ok(())
    }

    fn reset_xstate(&mut self) -> Result<(), EngineError> {
        self.context.reset_extended_state();
        Ok(())
    }

    fn passage(&self) -> Passage {
        Passage::ByRuntime
    }

    fn kick_byte(&self) -> NonNull<AtomicU8> {
        NonNull::from(&*self.kick)
    }

    fn holdings(&self) -> Holdings {
        Holdings {
            vcpus: dune::vcpus(),
            slots: dune::windows(),
        }
    }

    fn fds(&self) -> Vec<RawFd> {
        dune::descriptors()
    }
}

fn refused(error: SpaceError) -> EngineError {
    match error {
        SpaceError::OutOfTables(_) | SpaceError::Map(_) | SpaceError::Edit(_) => {
            EngineError::NoMemory {
                what: "page tables",
            }
        }
        other => EngineError::Kvm {
            what: "an address space",
            source: std::io::Error::other(other),
        },
    }
}

fn general_protection() -> Trap {
    Trap::Exception {
        vector: vector::GENERAL_PROTECTION,
        error: 0,
        dr6: 0,
    }
}

/// All that can be the program's.
fn everything() -> VirtRange {
    let start = GuestVirt::ZERO;
    VirtRange::try_new(start, USER_HI).unwrap_or(VirtRange::empty_at(start))
}

fn virt_range(range: PageRange) -> VirtRange {
    let start = GuestVirt::new_truncate(range.start());
    VirtRange::try_new(start, range.end() - range.start()).unwrap_or(VirtRange::empty_at(start))
}

/// Ring 3's rights as page table flags; accessed and dirty from the start, which saves the
/// CPU the writing.
fn user_flags(access: Access) -> PteFlags {
    let mut flags = PteFlags::PRESENT | PteFlags::USER | PteFlags::ACCESSED | PteFlags::DIRTY;
    flags.set(PteFlags::WRITABLE, access.contains(Access::WRITE));
    flags.set(PteFlags::NO_EXECUTE, !access.contains(Access::EXEC));
    flags
}

fn load(frame: &mut TrapFrame, regs: &UserRegs) {
    frame.rax = regs.rax;
    frame.rbx = regs.rbx;
    frame.rcx = regs.rcx;
    frame.rdx = regs.rdx;
    frame.rsi = regs.rsi;
    frame.rdi = regs.rdi;
    frame.rsp = regs.rsp;
    frame.rbp = regs.rbp;
    frame.r8 = regs.r8;
    frame.r9 = regs.r9;
    frame.r10 = regs.r10;
    frame.r11 = regs.r11;
    frame.r12 = regs.r12;
    frame.r13 = regs.r13;
    frame.r14 = regs.r14;
    frame.r15 = regs.r15;
    frame.rip = regs.rip;
    frame.rflags = regs.rflags;
}

fn store(regs: &mut UserRegs, frame: &TrapFrame) {
    regs.rax = frame.rax;
    regs.rbx = frame.rbx;
    regs.rcx = frame.rcx;
    regs.rdx = frame.rdx;
    regs.rsi = frame.rsi;
    regs.rdi = frame.rdi;
    regs.rsp = frame.rsp;
    regs.rbp = frame.rbp;
    regs.r8 = frame.r8;
    regs.r9 = frame.r9;
    regs.r10 = frame.r10;
    regs.r11 = frame.r11;
    regs.r12 = frame.r12;
    regs.r13 = frame.r13;
    regs.r14 = frame.r14;
    regs.r15 = frame.r15;
    regs.rip = frame.rip;
    regs.rflags = frame.rflags;
}
