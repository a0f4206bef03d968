//! The engine of the placement "on host": ring 3 in a vCPU, everything else
//! outside of it.
//!
//! ```text
//!   ring 3 of the guest           ring 0 of the guest         the host side
//!   -------------------           -------------------         -------------
//!   SYSCALL ------------------->  landing: out  ------------>  Trap::Syscall
//!     (weak KVM: the landing is at ring 3 too, and has some answers itself)
//!   page fault, #UD, int3 ----->  vector's stub: out ------->  Trap::PageFault, ...
//!   <---------------------------  iretq  <-------------------  run
//!   <--------------------------------------------------------  run (weak KVM, after SYSCALL)
//! ```
//!
//! Ring 0 of the guest holds nothing but stubs of one `out` each (module `layout`),
//! so the engine works under a KVM that interprets ring 0 as well as under one
//! that runs it. Registers go in and out through the area that KVM shares
//! (`KVM_CAP_SYNC_REGS`), so that a trap costs one system call, `KVM_RUN`.
//!
//! # Where the vCPU stands
//!
//! ```text
//!             run                      out of a stub at ring 0
//!   Ring3 ----------> (ring 3 runs) -----------------------------> Ring0
//!     ^                 |  ^                                         |
//!     |  landing at     |  |     run: frame on the stack, iretq      |
//!     +-----------------+  +-----------------------------------------+
//!       ring 3, signal
//! ```
//!
//! At `Ring3` the registers are the program's own and are set as they are. At
//! `Ring0` the program's `rip`, `rflags` and `rsp` go into the frame on the
//! guard's stack and the vCPU continues at an `iretq`.
//!
//! # Page tables
//!
//! Filled when the program faults, a whole block of them at a time, and more
//! where it runs through memory in order. A weak KVM shadows them and does not
//! see them change; that the engine takes entries away only ahead of a change
//! of the host's mapping ([`Engine::revoke`]) makes up for it. For the same
//! reason a page that held a table never holds another one: KVM would go on
//! using what it knew of the first.
#![expect(
    unsafe_code,
    reason = "the guard's pages in the guest and the kick byte"
)]

mod answers;
mod arenas;
mod layout;
mod machine;

use core::mem::{ManuallyDrop, offset_of};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dune_kvm::wall::{Stack, Wall};
use dune_x86::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use dune_x86::descriptors::{KERNEL_CS, RFLAGS_FIXED, RFLAGS_IF, USER_CS, USER_SS};
use dune_x86::paging::{MapError, NoFlush, PageTable, PteFlags};
use dune_x86::trap::vector;
use kvm_bindings::kvm_regs;

use self::answers::Place;
use self::arenas::{Handle, Memory, Short, WINDOW};
use self::layout::{CpuIndex, Frame, MOST_CPUS, Stub};
use self::machine::{Exit, KVM_XSAVE_BYTES, Landing, Machine, Vm};
use super::{
    Access, Engine, EngineError, Holdings, PageFaultError, Passage, Seed, Trap, Usage, UserRegs,
    UserState, seen_leaf,
};
use crate::clock;
use crate::host;
use crate::range::PageRange;
use crate::signal::host::thread_id;

const PAGE: u64 = 4096;

/// What one fault admits at least, where the area goes that far: the pages of
/// one table.
const BLOCK: u64 = PAGE * 512;
/// What one fault admits at most.
const MOST_AHEAD: u64 = 64 << 20;

/// The first address that is not canonical.
const LOWER_HALF_END: u64 = 1 << 47;

/// Of a page fault's error code: PKRU forbids the access.
const PROTECTION_KEY: u32 = dune_x86::trap::PageFaultError::PROTECTION_KEY.bits();

/// Where the vCPU stands between two runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// At ring 3: registers are the program's.
    Ring3,
    /// At ring 0, in a stub of the guard.
    Ring0,
}

/// The engine of one thread. See the module documentation.
#[derive(Debug)]
pub struct OnHost {
    shared: Arc<Shared>,
    /// Always there; given back to the others when the engine goes.
    cpu: ManuallyDrop<Cpu>,
    /// The address that follows what was admitted last, and how much that was.
    ahead: (u64, u64),
    /// How often KVM has failed to supply a page, and not said which, since
    /// the last sign of progress.
    suspicion: u32,
    /// For signal frames while the host kernel works behind the wall, if there
    /// is one.
    wall_stack: Option<Stack>,
    /// Whether calls whose answer never changes may be answered unseen.
    unseen: bool,
}

/// What the engines of a program's threads share.
///
/// Fields are dropped in order: the vCPUs and the VM before their memory.
#[derive(Debug)]
struct Shared {
    /// vCPUs of threads that have ended: they live as long as their VM.
    idle: Mutex<Vec<Cpu>>,
    /// All vCPUs that there are.
    made: Mutex<Vec<Made>>,
    vm: Vm,
    guest: Mutex<Guest>,
    /// Whether KVM shall set the accessed bits.
    notes_use: AtomicBool,
}

/// For a thread of its own. A KVM that shadows the tables sets accessed bits
/// where it looks a page up, so all of the program's pages are taken away once
/// theirs were read: they are looked up again, and admitted again, when they
/// are used again.
struct Used(Arc<Shared>);

impl Usage for Used {
    fn collect(&self, seen: &mut dyn FnMut(PageRange)) -> Result<(), EngineError> {
        let guest = self.0.guest();
        let all = virt_range(0, crate::range::USER_HI);
        let flush = guest
            .tables
            .unmap(all, |leaf| {
                if leaf.flags().contains(PteFlags::ACCESSED) {
                    seen_leaf(&leaf, seen);
                }
            })
            .map_err(|_| no_tables(&guest.memory))?;
        // By the caller's change of the host's mappings.
        flush.ignore(NoFlush::CoveredByLargerFlush);
        Ok(())
    }

    fn needs_host_change(&self) -> bool {
        true
    }
}

/// The guest's memory and page tables.
#[derive(Debug)]
struct Guest {
    tables: PageTable<Handle, Handle>,
    memory: Rc<Memory>,
}

// SAFETY: all handles to the memory are in this one value, and it is reached
// through its mutex only.
unsafe impl Send for Guest {}

/// What must be given up in the child of a `fork`.
#[derive(Clone, Copy, Debug)]
struct Made {
    fd: RawFd,
    /// Address and length of the area that KVM shares.
    area: (usize, usize),
}

/// One vCPU with its pages.
#[derive(Debug)]
struct Cpu {
    machine: Machine,
    index: CpuIndex,
    stack: NonNull<u8>,
    scratch: NonNull<u8>,
    /// Where it lands at ring 3.
    answers: Option<NonNull<u8>>,
    stand: Stand,
    /// The segment bases that the vCPU has.
    bases: (u64, u64),
}

// SAFETY: the pages belong to the vCPU, and nothing of it to a thread.
unsafe impl Send for Cpu {}

impl Shared {
    fn new(device: Option<OwnedFd>) -> Result<Self, EngineError> {
        let vm = Vm::new(device)?;
        let memory = Rc::new(Memory::new(vm.fd(), vm.physical_bits()));
        let handle = Handle(Rc::clone(&memory));
        let tables = PageTable::new(handle.clone(), handle).map_err(|_| no_tables(&memory))?;
        let guest = Guest { tables, memory };
        let user = PteFlags::USER;
        fill(
            guest.guard_page(layout::USER_CODE, PteFlags::RX | user)?,
            &layout::user_code(),
        );
        fill(
            guest.guard_page(layout::RING0_CODE, PteFlags::RX)?,
            &layout::ring0_code(),
        );
        fill(
            guest.guard_page(layout::DESCRIPTORS, PteFlags::R)?,
            &layout::descriptors(),
        );
        Ok(Self {
            idle: Mutex::default(),
            made: Mutex::default(),
            vm,
            guest: Mutex::new(guest),
            notes_use: AtomicBool::new(false),
        })
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn made(&self) -> MutexGuard<'_, Vec<Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU that nobody uses, an old one if there is any.
    fn cpu(&self) -> Result<Cpu, EngineError> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let cpu = match idle {
            Some(cpu) => cpu,
            None => self.new_cpu()?,
        };
        // Never dropped before the VM: what is in `made` is mapped and open.
        if let Err(error) = cpu.reset_xstate() {
            self.keep(cpu);
            return Err(error);
        }
        Ok(cpu)
    }

    /// Puts a vCPU among those that nobody uses.
    fn keep(&self, cpu: Cpu) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(cpu);
    }

    fn new_cpu(&self) -> Result<Cpu, EngineError> {
        let mut made = self.made();
        let index = CpuIndex(made.len() as u32);
        if index.0 >= MOST_CPUS {
            return Err(EngineError::NoMemory {
                what: "virtual CPUs",
            });
        }
        let machine = Machine::new(&self.vm, index)?;
        let guest = self.guest();
        fill(
            guest.guard_page(index.task(), PteFlags::R)?,
            &layout::task(index),
        );
        let stack = guest.guard_page(index.stack(), PteFlags::RW)?;
        let scratch = guest.guard_page(index.scratch(), PteFlags::RW | PteFlags::USER)?;
        let answers = match machine.landing() {
            Landing::Ring0 => None,
            Landing::Ring3 => {
                Some(guest.guard_page(index.answers(), PteFlags::RX | PteFlags::USER)?)
            }
        };
        // SAFETY: nothing but the guard's pages and the program's memory
        // (`admit`) is ever mapped.
        unsafe { machine.set_up(index, guest.tables.root()) }?;
        made.push(Made {
            fd: machine.fd(),
            area: machine.shared_area(),
        });
        Ok(Cpu {
            machine,
            index,
            stack,
            scratch,
            answers,
            stand: Stand::Ring3,
            bases: (0, 0),
        })
    }

    /// Gives up, in the child of a `fork`, what belongs to the parent: other
    /// threads' parts too, which nobody else will give up here.
    ///
    /// # Safety
    ///
    /// This value and everything made by it must be forgotten, not dropped. The device is the
    /// caller's from then on.
    unsafe fn abandon(&self) -> OwnedFd {
        let made = self.made();
        for made in made.iter() {
            let (start, len) = made.area;
            // SAFETY: the area of a vCPU that nobody will use.
            let _ = unsafe { dune_kvm::sys::unmap(start as *mut u8, len) };
            host::close(made.fd);
        }
        let [vm, device] = self.vm.fds();
        host::close(vm);
        // Taken by another thread at the moment of the fork: that thread is not
        // here to give it back, and the memory stays.
        if let Ok(guest) = self.guest.try_lock() {
            guest.memory.unmap_arenas();
        }
        // SAFETY: its owner is forgotten, as the caller promises.
        unsafe { OwnedFd::from_raw_fd(device) }
    }
}

impl OnHost {
    /// An engine with nothing mapped, its extended state as after `execve`.
    ///
    /// Costs one VM, one vCPU and one memory slot, about 2 ms on a weak KVM.
    ///
    /// # Errors
    ///
    /// If there is no usable KVM, or it refuses a request.
    pub fn new() -> Result<Self, EngineError> {
        Self::on(None, stack_behind(super::build_wall())?)
    }

    fn on(device: Option<OwnedFd>, wall_stack: Option<Stack>) -> Result<Self, EngineError> {
        Self::in_vm(Arc::new(Shared::new(device)?), wall_stack)
    }

    fn in_vm(shared: Arc<Shared>, wall_stack: Option<Stack>) -> Result<Self, EngineError> {
        let cpu = shared.cpu()?;
        Ok(Self {
            shared,
            cpu: ManuallyDrop::new(cpu),
            ahead: (0, 0),
            suspicion: 0,
            unseen: false,
            wall_stack,
        })
    }

    fn user_address(&self, gpa: u64) -> Option<u64> {
        self.shared.guest().memory.user_address(gpa)
    }

    /// Gives the vCPU the program's registers.
    fn load(&mut self, user: &UserState) -> Result<(), EngineError> {
        let mut regs = to_kvm(&user.regs);
        regs.rflags = sanitised(user.regs.rflags);
        match self.cpu.stand {
            Stand::Ring3 => {}
            Stand::Ring0 => {
                self.write_frame(&Frame {
                    error: 0,
                    rip: regs.rip,
                    cs: u64::from(USER_CS),
                    rflags: regs.rflags,
                    rsp: regs.rsp,
                    ss: u64::from(USER_SS),
                });
                regs.rip = layout::iretq();
                regs.rsp = self.cpu.index.iretq_frame();
                regs.rflags = RFLAGS_FIXED;
            }
        }
        self.cpu.machine.set_regs(&regs);
        let bases = (user.fs_base, user.gs_base);
        if bases != self.cpu.bases {
            const MSR_FS_BASE: u32 = 0xc000_0100;
            const MSR_GS_BASE: u32 = 0xc000_0101;
            self.cpu
                .machine
                .set_msrs(&[(MSR_FS_BASE, bases.0), (MSR_GS_BASE, bases.1)])?;
            self.cpu.bases = bases;
        }
        Ok(())
    }

    /// Enters the guest until a stub exits, a signal arrives at ring 3, or
    /// something goes wrong.
    fn enter(&mut self, user: &mut UserState) -> Result<Trap, EngineError> {
        let mut interrupted = false;
        let trap = loop {
            match self.cpu.machine.enter()? {
                Exit::Interrupted => {
                    // SAFETY: the byte is in the area that the machine owns.
                    let kick = unsafe { self.cpu.machine.kick_byte().as_ref() };
                    interrupted |= kick.swap(0, Ordering::SeqCst) != 0;
                    if interrupted && let Some(trap) = self.interrupted_answer(user)? {
                        interrupted = trap != Trap::Interrupted;
                        break trap;
                    }
                    if interrupted && self.at_rest_in_ring3()? {
                        interrupted = false;
                        self.store(user);
                        break Trap::Interrupted;
                    }
                }
                Exit::Out(port) => break self.after_out(port, user)?,
                Exit::In => {
                    let regs = self.settle()?;
                    self.store_regs(user, &regs);
                    break general_protection();
                }
                Exit::Mmio { gpa, write } => {
                    let regs = self.settle()?;
                    self.store_regs(user, &regs);
                    let mut error = PageFaultError::USER;
                    error.set(PageFaultError::WRITE, write);
                    let Some(addr) = self.user_address(gpa) else {
                        // Its window was taken back meanwhile: the next try ends
                        // in a page fault.
                        self.suspect_everything()?;
                        break Trap::Interrupted;
                    };
                    break Trap::HostFault { addr, error };
                }
                Exit::Unbacked { gpa } => match gpa.and_then(|gpa| self.user_address(gpa)) {
                    Some(addr) => {
                        self.store(user);
                        break Trap::HostFault {
                            addr,
                            error: PageFaultError::USER,
                        };
                    }
                    None => self.suspect_everything()?,
                },
                Exit::Other(reason) => return Err(self.stopped(reason)),
            }
        };
        if interrupted {
            // The stub had to finish first: the next run starts with this.
            // SAFETY: as above.
            unsafe { self.cpu.machine.kick_byte().as_ref() }.store(1, Ordering::SeqCst);
        }
        Ok(trap)
    }

    /// Whether the registers are the program's: not in the middle of a stub,
    /// and no exception on its way to one.
    fn at_rest_in_ring3(&self) -> Result<bool, EngineError> {
        let rip = self.cpu.machine.regs().rip;
        if layout::is_ring0_code(rip) || layout::is_user_code(rip) {
            return Ok(false);
        }
        Ok(!self.cpu.machine.exception_is_pending()?)
    }

    /// What a vCPU that stands in a page of answers is on the way to: the guard
    /// is asked, if nothing is decided yet; otherwise the program goes on
    /// behind its call, and nothing is left of it but the interruption.
    fn interrupted_answer(&mut self, user: &mut UserState) -> Result<Option<Trap>, EngineError> {
        let regs = self.cpu.machine.regs();
        let Some(place) = layout::offset_in_answers(regs.rip).and_then(answers::place) else {
            return Ok(None);
        };
        if self.cpu.machine.exception_is_pending()? {
            return Ok(None);
        }
        self.store_regs(user, &regs);
        user.regs.rflags = sanitised(regs.r11);
        user.regs.rip = regs.rcx;
        if place == Place::Turned {
            user.regs.rip = regs.rcx.rotate_right(16) & (LOWER_HALF_END - 1);
            user.regs.rcx = user.regs.rip;
        }
        if !is_lower_half(user.regs.rip) {
            return Ok(Some(general_protection()));
        }
        Ok(Some(match place {
            Place::Intact | Place::Turned => Trap::Syscall,
            Place::Answering(answer) => {
                let (pid, tid) = ids();
                user.regs.rax = answers::value(answer, pid, tid);
                Trap::Interrupted
            }
        }))
    }

    /// Finishes an access that KVM exited for, so that it does not disturb the
    /// next entry, and returns the registers as they were before: what KVM
    /// made of the access does not count.
    ///
    /// Leaves the kick byte set: the next run comes back at once with
    /// [`Trap::Interrupted`], which loses nothing.
    fn settle(&mut self) -> Result<kvm_regs, EngineError> {
        /// More than the pieces of any access.
        const MOST_PIECES: u32 = 64;
        let regs = self.cpu.machine.regs();
        // SAFETY: the byte is in the area that the machine owns.
        let kick = unsafe { self.cpu.machine.kick_byte().as_ref() };
        for _ in 0..MOST_PIECES {
            kick.store(1, Ordering::SeqCst);
            if self.cpu.machine.enter()? == Exit::Interrupted {
                return Ok(regs);
            }
        }
        Err(EngineError::Stopped {
            what: "an access without end".to_owned(),
            rip: regs.rip,
        })
    }

    /// After KVM has said that some page cannot be supplied, and not which:
    /// takes all of the program's pages away, so that the access, which is
    /// tried again now, ends in a page fault that has an address
    /// ([`Self::page_fault`]). The guard admits the other pages again as the
    /// program needs them.
    fn suspect_everything(&mut self) -> Result<(), EngineError> {
        self.suspicion += 1;
        self.shared
            .guest()
            .unmap(virt_range(0, crate::range::USER_HI))
    }

    fn page_fault(&mut self, addr: u64, error: PageFaultError) -> Trap {
        /// A page that can be read and not written (a full file system) shows
        /// by the same instruction's failing again and again.
        const ENOUGH: u32 = 8;
        if self.suspicion > 0 {
            let readable = dune_kvm::sys::read_memory(addr, &mut [0]).is_ok();
            if !readable || self.suspicion > ENOUGH {
                self.suspicion = 0;
                return Trap::HostFault { addr, error };
            }
        }
        Trap::PageFault { addr, error }
    }

    fn after_out(&mut self, port: u16, user: &mut UserState) -> Result<Trap, EngineError> {
        let regs = self.cpu.machine.regs();
        let segments = self.cpu.machine.segments();
        let ring0 = segments.cs == KERNEL_CS;
        let landing = self.cpu.machine.landing();
        let stub = (port == u16::from(layout::PORT))
            .then(|| layout::stub_at(regs.rip, landing))
            .flatten();
        match stub {
            Some(Stub::Exception(vector)) if ring0 => {
                self.cpu.stand = Stand::Ring0;
                self.exception(vector, user)
            }
            // A weak KVM that has to interpret a SYSCALL, as it does when rsp
            // is not canonical, gets to ring 0 after all.
            Some(Stub::Syscall) => {
                self.cpu.stand = if ring0 { Stand::Ring0 } else { Stand::Ring3 };
                self.cpu.bases = (segments.fs_base, segments.gs_base);
                store_all(user, &regs, self.cpu.bases);
                user.regs.rip = regs.rcx;
                user.regs.rflags = sanitised(regs.r11);
                if !ring0 && segments.cs != USER_CS || !is_lower_half(regs.rcx) {
                    return Ok(general_protection());
                }
                self.suspicion = 0;
                Ok(Trap::Syscall)
            }
            _ if ring0 => Err(EngineError::Stopped {
                what: format!("port {port:#x} from ring 0"),
                rip: regs.rip,
            }),
            _ => {
                self.store(user);
                Ok(general_protection())
            }
        }
    }

    fn exception(&mut self, number: u8, user: &mut UserState) -> Result<Trap, EngineError> {
        let regs = self.cpu.machine.regs();
        let segments = self.cpu.machine.segments();
        let frame = self.read_frame();
        if frame.cs & 3 != 3 {
            return Err(EngineError::Stopped {
                what: format!("exception {number} in the guard's own code"),
                rip: frame.rip,
            });
        }
        self.cpu.bases = (segments.fs_base, segments.gs_base);
        store_all(user, &regs, self.cpu.bases);
        user.regs.rip = frame.rip;
        user.regs.rsp = frame.rsp;
        user.regs.rflags = sanitised(frame.rflags);
        if frame.cs != u64::from(USER_CS) {
            // A far jump to a code segment that is not ours: nothing that runs
            // there is served.
            return Ok(general_protection());
        }
        let has_error_code = dune_x86::trap::ERROR_CODE_VECTORS >> number & 1 == 1;
        let error = if has_error_code {
            frame.error as u32
        } else {
            0
        };
        Ok(match number {
            // The CPU itself wanted something at ring 0's level for an
            // instruction of ring 3 (a descriptor): no page helps.
            vector::PAGE_FAULT if error & PageFaultError::USER.bits() == 0 => general_protection(),
            // No page helps against the program's own protection keys either.
            vector::PAGE_FAULT if error & PROTECTION_KEY != 0 => Trap::Exception {
                vector: number,
                error,
                dr6: 0,
            },
            vector::PAGE_FAULT => {
                self.page_fault(segments.cr2, PageFaultError::from_bits_truncate(error))
            }
            vector::DEBUG => Trap::Exception {
                vector: number,
                error: 0,
                dr6: self.cpu.machine.take_dr6()?,
            },
            _ => Trap::Exception {
                vector: number,
                error,
                dr6: 0,
            },
        })
    }

    fn stopped(&self, reason: u32) -> EngineError {
        let what = match reason {
            kvm_bindings::KVM_EXIT_SHUTDOWN => "shutdown (triple fault)".to_owned(),
            kvm_bindings::KVM_EXIT_INTERNAL_ERROR => "internal error of KVM".to_owned(),
            kvm_bindings::KVM_EXIT_FAIL_ENTRY => "failed entry".to_owned(),
            kvm_bindings::KVM_EXIT_HLT => "halt".to_owned(),
            other => format!("exit reason {other}"),
        };
        EngineError::Stopped {
            what,
            rip: self.cpu.machine.regs().rip,
        }
    }

    /// The program's state, from a vCPU that stands at ring 3.
    fn store(&mut self, user: &mut UserState) {
        let regs = self.cpu.machine.regs();
        self.store_regs(user, &regs);
    }

    fn store_regs(&mut self, user: &mut UserState, regs: &kvm_regs) {
        let segments = self.cpu.machine.segments();
        self.cpu.stand = Stand::Ring3;
        self.cpu.bases = (segments.fs_base, segments.gs_base);
        store_all(user, regs, self.cpu.bases);
    }

    fn write_frame(&mut self, frame: &Frame) {
        // SAFETY: the offset lies in the stack's page, at its end.
        let at = unsafe { self.cpu.stack.add(layout::FRAME_OFFSET) }.cast::<Frame>();
        // SAFETY: ring 3 cannot reach the page, and ring 0 does not run now.
        unsafe { at.as_ptr().write_volatile(*frame) };
    }

    fn read_frame(&self) -> Frame {
        // SAFETY: the offset lies in the stack's page, at its end.
        let at = unsafe { self.cpu.stack.add(layout::FRAME_OFFSET) }.cast::<Frame>();
        // SAFETY: ring 3 cannot reach the page, and ring 0 does not run now.
        unsafe { at.as_ptr().read_volatile() }
    }

    /// What to admit for a fault at `addr` in `area`: the block around it, and
    /// twice as much as last time if it follows on what was admitted then.
    fn extent(&mut self, addr: u64, area: PageRange) -> PageRange {
        let page = addr & !(PAGE - 1);
        let (expected, last) = self.ahead;
        let follows = page == expected && page & (BLOCK - 1) == 0;
        let len = if follows {
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

    /// Runs one of the snippets: those that work on the extended state, which
    /// ring 3 has to do by itself where KVM's requests do not carry all of it,
    /// and the one that tries out whether a word can be read. After an error
    /// the engine is of no more use.
    fn run_snippet(&mut self, rip: u64, rdi: u64) -> Result<(), EngineError> {
        let mask = self.cpu.machine.xstate().xcr0;
        let mut user = UserState {
            regs: UserRegs {
                rax: mask & 0xffff_ffff,
                rdx: mask >> 32,
                rdi,
                rip,
                ..UserRegs::default()
            },
            fs_base: self.cpu.bases.0,
            gs_base: self.cpu.bases.1,
        };
        self.load(&user)?;
        let mut interrupted = false;
        let exit = loop {
            match self.cpu.machine.enter()? {
                Exit::Interrupted => {
                    // SAFETY: the byte is in the area that the machine owns.
                    let kick = unsafe { self.cpu.machine.kick_byte().as_ref() };
                    interrupted |= kick.swap(0, Ordering::SeqCst) != 0;
                }
                exit => break exit,
            }
        };
        if interrupted {
            // SAFETY: as above.
            unsafe { self.cpu.machine.kick_byte().as_ref() }.store(1, Ordering::SeqCst);
        }
        let end = self.cpu.machine.regs().rip;
        let at_end = layout::stub_at(end, self.cpu.machine.landing()) == Some(Stub::Snippet);
        if at_end && exit == Exit::Out(u16::from(layout::PORT)) {
            self.store(&mut user);
            return Ok(());
        }
        Err(EngineError::Stopped {
            what: format!("{exit:?} instead of the extended state"),
            rip: end,
        })
    }
}

impl Engine for OnHost {
    fn run(&mut self, user: &mut UserState) -> Result<Trap, EngineError> {
        // SAFETY: the byte is in the area that the machine owns.
        let kick = unsafe { self.cpu.machine.kick_byte().as_ref() };
        if kick.swap(0, Ordering::SeqCst) != 0 {
            return Ok(Trap::Interrupted);
        }
        if !is_lower_half(user.regs.rip) {
            // IRETQ would fault at ring 0; for the program it is the fault of
            // the jump that led there.
            return Ok(general_protection());
        }
        self.load(user)?;
        self.enter(user)
    }

    fn answer_by_itself(&mut self, may: bool) -> Result<(), EngineError> {
        self.unseen = may;
        let cpu = &self.cpu;
        let landing = match cpu.answers {
            Some(page) if may => {
                // Of the thread that had the vCPU before, or of nobody.
                let (pid, tid) = ids();
                fill(page, &answers::page(cpu.index, pid, tid));
                cpu.index.answers()
            }
            _ => layout::syscall_entry(cpu.machine.landing()),
        };
        cpu.machine.land_at(landing)
    }

    fn admit(&mut self, addr: u64, area: PageRange, access: Access) -> Result<(), EngineError> {
        let extent = self.extent(addr, area);
        let mut flags = user_flags(access);
        if self.shared.notes_use.load(Ordering::Relaxed) {
            flags.remove(PteFlags::ACCESSED);
        }
        self.shared.guest().map(extent, flags)
    }

    fn note_use(&mut self) -> Option<Box<dyn Usage>> {
        self.shared.notes_use.store(true, Ordering::Relaxed);
        Some(Box::new(Used(Arc::clone(&self.shared))))
    }

    fn admit_ahead(&mut self, range: PageRange, access: Access) -> Result<(), EngineError> {
        // A fault would admit as much. Of what is larger, such as the stack of a
        // thread, nobody knows where it is touched first.
        if range.len() > BLOCK {
            return Ok(());
        }
        self.shared.guest().map(range, user_flags(access))
    }

    fn shows_clock(&mut self, _data: u64, _len: u64) -> bool {
        let first = virt_range(layout::CLOCK, layout::CLOCK + PAGE);
        let shown = self.shared.guest().map_clock(first, 0);
        if shown.is_ok() && self.run_snippet(layout::look(), layout::CLOCK).is_ok() {
            return true;
        }
        // The vCPU stands anywhere.
        if let Ok(new) = Self::new() {
            *self = new;
        }
        false
    }

    fn admit_clock(&mut self, range: PageRange, data: u64) -> Result<(), EngineError> {
        let start = clock::host().map_or(0, |clock| clock.data);
        let range = virt_range(range.start(), range.end());
        self.shared
            .guest()
            .map_clock(range, data.wrapping_sub(start))
    }

    fn revoke(&mut self, range: PageRange) -> Result<(), EngineError> {
        self.shared
            .guest()
            .unmap(virt_range(range.start(), range.end()))
    }

    fn seed(&mut self) -> Result<Box<dyn Seed>, EngineError> {
        let wall_stack = stack_behind(Wall::get())?;
        let engine = Self::in_vm(Arc::clone(&self.shared), wall_stack)?;
        Ok(Box::new(Sown(engine)))
    }

    fn renew(&mut self) -> Result<(), EngineError> {
        // SAFETY: the old engine is forgotten below, also if there is no new
        // one: then the process ends, as the trait says.
        let device = unsafe { self.shared.abandon() };
        let new = Self::on(Some(device), self.wall_stack.take());
        let old = core::mem::replace(self, new?);
        let unseen = old.unseen;
        core::mem::forget(old);
        // The ids are the child's own.
        self.answer_by_itself(unseen)
    }

    fn xcr0(&self) -> u64 {
        self.cpu.machine.xstate().xcr0
    }

    fn xstate_len(&self) -> usize {
        self.cpu.machine.xstate().len
    }

    fn save_xstate(&mut self, area: &mut [u8]) -> Result<(), EngineError> {
        let len = self.xstate_len().min(area.len());
        if self.cpu.machine.xstate().kvm_carries_it {
            let mut state = [0; KVM_XSAVE_BYTES];
            self.cpu.machine.xsave(&mut state)?;
            area[..len].copy_from_slice(&state[..len]);
            return Ok(());
        }
        // XSAVE leaves the header's reserved bytes and the components in their
        // initial state as they are.
        // SAFETY: the page is the guest's scratch, and the guest does not run.
        unsafe { self.cpu.scratch.write_bytes(0, PAGE as usize) };
        self.run_snippet(layout::save(), self.cpu.index.scratch())?;
        // SAFETY: a copy of bytes; what they are is the program's business.
        unsafe { self.cpu.scratch.copy_to_nonoverlapping(non_null(area), len) };
        Ok(())
    }

    fn load_xstate(&mut self, area: &[u8]) -> Result<(), EngineError> {
        let len = self.xstate_len().min(area.len());
        if self.cpu.machine.xstate().kvm_carries_it {
            let mut state = [0; KVM_XSAVE_BYTES];
            state[..len].copy_from_slice(&area[..len]);
            return self.cpu.machine.set_xsave(&state);
        }
        // SAFETY: the page is the guest's scratch, and the guest does not run.
        unsafe {
            self.cpu
                .scratch
                .as_ptr()
                .copy_from_nonoverlapping(area.as_ptr(), len)
        };
        self.run_snippet(layout::restore(), self.cpu.index.scratch())
    }

    fn reset_xstate(&mut self) -> Result<(), EngineError> {
        self.cpu.reset_xstate()
    }

    fn passage(&self) -> Passage {
        match &self.wall_stack {
            Some(stack) => Passage::Walled {
                stack: stack.slot(),
            },
            None => Passage::Open,
        }
    }

    fn kick_byte(&self) -> NonNull<AtomicU8> {
        self.cpu.machine.kick_byte()
    }

    fn holdings(&self) -> Holdings {
        Holdings {
            vcpus: self.shared.made().len(),
            slots: self.shared.guest().memory.slots(),
        }
    }

    fn fds(&self) -> Vec<RawFd> {
        let made = self.shared.made();
        let vcpus = made.iter().map(|made| made.fd);
        vcpus.chain(self.shared.vm.fds()).collect()
    }
}

/// What a thread needs to make calls behind `wall`.
fn stack_behind(wall: Option<&Wall>) -> Result<Option<Stack>, EngineError> {
    wall.map(Stack::take)
        .transpose()
        .map_err(|_| EngineError::NoMemory {
            what: "signal frames",
        })
}

impl Drop for OnHost {
    fn drop(&mut self) {
        // SAFETY: taken once, here.
        let cpu = unsafe { ManuallyDrop::take(&mut self.cpu) };
        self.shared.keep(cpu);
    }
}

/// A vCPU on its way to its thread; back among the idle ones if it does not get
/// there.
struct Sown(OnHost);

impl Seed for Sown {
    fn grow(self: Box<Self>) -> Result<Box<dyn Engine>, EngineError> {
        if self.0.wall_stack.is_some() {
            // libc has registered the new thread.
            dune::forgo_restartable_sequences();
        }
        Ok(Box::new(self.0))
    }
}

impl Cpu {
    fn reset_xstate(&self) -> Result<(), EngineError> {
        const FCW: usize = 0;
        const MXCSR: usize = 24;
        const MXCSR_MASK: usize = 28;
        const XSTATE_BV: usize = 512;
        let mut state = [0; KVM_XSAVE_BYTES];
        state[FCW..FCW + 2].copy_from_slice(&0x37f_u16.to_le_bytes());
        state[MXCSR..MXCSR + 4].copy_from_slice(&0x1f80_u32.to_le_bytes());
        state[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&0xffff_u32.to_le_bytes());
        // X87 and SSE are given; everything else is in its initial state.
        state[XSTATE_BV] = 3;
        self.machine.set_xsave(&state)
    }
}

impl Guest {
    /// Maps a fresh page of the guard at `virt`.
    fn guard_page(&self, virt: u64, flags: PteFlags) -> Result<NonNull<u8>, EngineError> {
        use dune_x86::paging::FrameAllocator;
        let frame = self
            .tables
            .tables()
            .allocate_table()
            .ok_or_else(|| no_tables(&self.memory))?;
        let used = PteFlags::ACCESSED | PteFlags::DIRTY;
        self.tables
            .map(
                GuestVirt::new_truncate(virt),
                frame,
                PageSize::Size4KiB,
                flags | used,
            )
            .map_err(|_| no_tables(&self.memory))?;
        Ok(self.memory.frame(frame))
    }

    /// Maps `range`, a window at a time.
    fn map(&self, range: PageRange, flags: PteFlags) -> Result<(), EngineError> {
        let mut start = range.start();
        while start < range.end() {
            let end = range.end().min((start | (WINDOW - 1)) + 1);
            let gpa = self.window(start)?;
            self.map_piece(virt_range(start, end), GuestPhys::new_truncate(gpa), flags)?;
            start = end;
        }
        Ok(())
    }

    /// The guest physical address of `start`. Takes windows back where there are
    /// many: what is not in the page tables now needs none.
    fn window(&self, start: u64) -> Result<u64, EngineError> {
        if self.memory.is_crowded() {
            let is_used = |piece| {
                let mut leaves = 0_u32;
                self.tables
                    .for_each_leaf(virt_range(piece, piece + WINDOW), |_| leaves += 1);
                leaves > 0
            };
            self.memory.release_windows(is_used).map_err(refused)?;
        }
        self.memory.window(start).map_err(refused)
    }

    fn map_piece(
        &self,
        range: VirtRange,
        gpa: GuestPhys,
        flags: PteFlags,
    ) -> Result<(), EngineError> {
        let map = || self.tables.map_range(range, gpa, PageSize::Size4KiB, flags);
        let result = match map() {
            Err(MapError::AlreadyMapped { .. }) => {
                // Admitted before, perhaps with fewer rights. The translation
                // stays the same, and a stale entry that is too strict only
                // faults once more.
                self.unmap(range)?;
                map()
            }
            result => result,
        };
        result.map_err(|_| no_tables(&self.memory))
    }

    /// Maps the kernel's data for clocks from `offset` on, for reading.
    fn map_clock(&self, range: VirtRange, offset: u64) -> Result<(), EngineError> {
        let gpa = self.memory.clock().map_err(refused)?;
        let gpa = GuestPhys::new_truncate(gpa + offset);
        self.map_piece(range, gpa, user_flags(Access::READ))
    }

    fn unmap(&self, range: VirtRange) -> Result<(), EngineError> {
        let flush = self
            .tables
            .unmap(range, |_| ())
            .map_err(|_| no_tables(&self.memory))?;
        // For `revoke`: the host's change of the same pages, which comes next,
        // makes KVM drop whatever it or a TLB holds of them.
        flush.ignore(NoFlush::CoveredByLargerFlush);
        Ok(())
    }
}

/// The process and the thread that this is.
fn ids() -> (u32, u32) {
    (std::process::id(), thread_id())
}

fn fill(page: NonNull<u8>, contents: &[u8; PAGE as usize]) {
    // SAFETY: a page of an arena that nothing else knows yet.
    unsafe {
        page.as_ptr()
            .copy_from_nonoverlapping(contents.as_ptr(), contents.len())
    };
}

fn non_null(area: &mut [u8]) -> NonNull<u8> {
    NonNull::from(area).cast()
}

fn no_tables(memory: &Memory) -> EngineError {
    memory.short().map_or(
        EngineError::NoMemory {
            what: "page tables",
        },
        refused,
    )
}

fn refused(short: Short) -> EngineError {
    match short {
        Short::Addresses => EngineError::NoMemory {
            what: "guest physical addresses",
        },
        Short::Host(errno) => EngineError::Kvm {
            what: "memory for the guest",
            source: errno.to_io(),
        },
    }
}

const fn general_protection() -> Trap {
    Trap::Exception {
        vector: vector::GENERAL_PROTECTION,
        error: 0,
        dr6: 0,
    }
}

const fn is_lower_half(address: u64) -> bool {
    address < LOWER_HALF_END
}

/// The flags as ring 3 may have them.
const fn sanitised(rflags: u64) -> u64 {
    rflags & UserState::RFLAGS_USER | RFLAGS_FIXED | RFLAGS_IF
}

/// Accessed and dirty are set from the start, so that nobody has to come back
/// to set them.
fn user_flags(access: Access) -> PteFlags {
    let mut flags = PteFlags::PRESENT | PteFlags::USER | PteFlags::ACCESSED | PteFlags::DIRTY;
    flags.set(PteFlags::WRITABLE, access.contains(Access::WRITE));
    flags.set(PteFlags::NO_EXECUTE, !access.contains(Access::EXEC));
    flags
}

fn virt_range(start: u64, end: u64) -> VirtRange {
    let start = GuestVirt::new_truncate(start);
    VirtRange::try_new(start, end - start.as_u64()).unwrap_or(VirtRange::empty_at(start))
}

fn store_all(user: &mut UserState, regs: &kvm_regs, (fs_base, gs_base): (u64, u64)) {
    user.regs = from_kvm(regs);
    user.regs.rflags = sanitised(regs.rflags);
    user.fs_base = fs_base;
    user.gs_base = gs_base;
}

// `UserRegs` has the order of `kvm_regs`, so that these are plain copies.
const _: () = assert!(size_of::<UserRegs>() == size_of::<kvm_regs>());
const _: () = assert!(offset_of!(UserRegs, rsp) == offset_of!(kvm_regs, rsp));
const _: () = assert!(offset_of!(UserRegs, rflags) == offset_of!(kvm_regs, rflags));

fn to_kvm(regs: &UserRegs) -> kvm_regs {
    kvm_regs {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rsp: regs.rsp,
        rbp: regs.rbp,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

fn from_kvm(regs: &kvm_regs) -> UserRegs {
    UserRegs {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rsp: regs.rsp,
        rbp: regs.rbp,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}
