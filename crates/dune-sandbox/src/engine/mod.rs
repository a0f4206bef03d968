//! What runs ring 3: the one thing that differs between the placements.
//!
//! The guard ([`crate::Guard`]) is one body of Rust. Where it runs, at ring 0
//! inside the guest or on the host side after an exit, is decided by the
//! [`Engine`] underneath it:
//!
//! | engine | ring 3 ends by | for |
//! |---|---|---|
//! | on host | an exit of the vCPU | any KVM that runs ring 3 natively |
//! | in guest | a trap to ring 0 of the same guest | KVM that runs ring 0 natively |
//! | mock (tests) | a script | unit tests of the guard |
//!
//! ```text
//!             +-------- Trap ---------+
//!             |                       v
//!        Engine::run              Guard::on_trap ---- host kernel
//!             ^                       |   (mmap, read, ...)
//!             +-- admit/revoke, regs -+
//! ```
//!
//! # Memory: who knows what
//!
//! The guard's table of virtual memory areas ([`crate::vma`]) is the only
//! record of what the program may reach. An engine's page tables are a cache
//! of it, filled by [`Engine::admit`] when the program faults and emptied by
//! [`Engine::revoke`]. An engine may start with nothing mapped.
//!
//! Addresses are the same in ring 3 and in the host process. What ring 3 may
//! do to a page is at most what the guard admitted, and the host's own rights
//! to it (`PROT_READ`, `PROT_WRITE`; never `PROT_EXEC`, which the guard keeps
//! off host mappings) are equal to the program's.
//!
//! **Order.** Rights are taken away first in the engine, then in the host
//! process: the guard calls `revoke(range)`, *then* `munmap`, `mprotect`,
//! `mremap` or `mmap(MAP_FIXED)` of the same pages, *then* returns to `run`.
//! The host call always lessens the host's rights to every page of the range
//! that was present (where only `PROT_EXEC` is taken, which the host does not
//! see, the guard passes through `PROT_NONE`), so a KVM that shadows page
//! tables drops its copies by then at the latest, with no invalidation from
//! inside the guest. Rights are given in the other order: host first, `admit`
//! at the next fault.

#![expect(unsafe_code, reason = "the wall of protection keys is built")]

pub mod in_guest;
pub mod mock;
pub mod on_host;

use dune_kvm::wall::{Slot, Wall};

use crate::range::PageRange;

bitflags::bitflags! {
    /// What ring 3 may do to a page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// Data reads. On x86 a page that can be written or executed can be
        /// read too; the guard adds this flag accordingly.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Instruction fetches.
        const EXEC = 4;
    }
}

bitflags::bitflags! {
    /// The page fault error code (Intel SDM volume 3, 4.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PageFaultError: u32 {
        /// The page was mapped, the right was missing.
        const PRESENT = 1 << 0;
        /// A write.
        const WRITE = 1 << 1;
        /// From ring 3.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RSVD = 1 << 3;
        /// An instruction fetch.
        const INSTR = 1 << 4;
    }
}

impl PageFaultError {
    /// The right that the faulting access needed.
    #[must_use]
    pub fn needed(self) -> Access {
        if self.contains(Self::INSTR) {
            Access::EXEC
        } else if self.contains(Self::WRITE) {
            Access::WRITE
        } else {
            Access::READ
        }
    }
}

/// General registers of the program, in the order of `struct kvm_regs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "register names")]
pub struct UserRegs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

const _: () = assert!(size_of::<UserRegs>() == 18 * 8);

/// The program's state outside the extended registers.
///
/// Invariants that the guard keeps, and that an engine may rely on when
/// [`Engine::run`] is called: `rip` is canonical and below 2^47, `rflags` holds
/// only bits of [`UserState::RFLAGS_USER`] besides bit 1 and `IF`, `fs_base`
/// and `gs_base` are canonical and below 2^47. General registers are
/// arbitrary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserState {
    /// General registers, instruction pointer and flags.
    pub regs: UserRegs,
    /// Base address of the `fs` segment. Current after each `run`, even if the
    /// program has used `WRFSBASE` or loaded the selector.
    pub fs_base: u64,
    /// Base address of the `gs` segment, likewise.
    pub gs_base: u64,
}

impl UserState {
    /// Flags that ring 3 may choose: CF PF AF ZF SF TF DF OF RF AC ID.
    /// Everything else the engine sets by itself (bit 1 and IF set; IOPL, NT,
    /// VM, VIF, VIP clear).
    pub const RFLAGS_USER: u64 = 0x0025_0dd5;
}

/// Why ring 3 ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// A `SYSCALL` instruction. `rip` is after it, `rax` holds the number,
    /// `rcx` and `r11` are as the hardware leaves them (`rip` and `rflags`).
    Syscall,
    /// A page fault (#PF) from ring 3; `rip` is at the faulting instruction.
    PageFault {
        /// The faulting address (CR2).
        addr: u64,
        /// The error code.
        error: PageFaultError,
    },
    /// The page is admitted and yet the host could not supply it: a file
    /// mapping past the end of its file, memory that KVM cannot back
    /// (`KVM_RUN` says EFAULT, a memory fault exit or an MMIO exit). `rip` is
    /// at the instruction.
    HostFault {
        /// The address, to the page at least.
        addr: u64,
        /// What the access was, as far as the engine can tell.
        error: PageFaultError,
    },
    /// Any other exception of ring 3, with `rip` as the hardware leaves it:
    /// at the instruction for faults, after it for #BP, #OF and #DB traps.
    Exception {
        /// 0 to 31.
        vector: u8,
        /// The error code, or 0 for vectors without one.
        error: u32,
        /// DR6 as of a #DB, else 0.
        dr6: u64,
    },
    /// The kick byte ([`Engine::kick_byte`]) was found set. The engine has
    /// cleared it. Nothing of the program's state has changed otherwise.
    Interrupted,
}

impl Trap {
    /// The address that a fault is about.
    #[must_use]
    pub const fn address(&self) -> Option<u64> {
        match *self {
            Self::PageFault { addr, .. } | Self::HostFault { addr, .. } => Some(addr),
            Self::Syscall | Self::Exception { .. } | Self::Interrupted => None,
        }
    }
}

/// What engines hold of the machine, for as long as their program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Virtual CPUs: as many as there were threads at once, at most.
    pub vcpus: usize,
    /// Memory slots of the virtual machine.
    pub slots: usize,
}

/// The engine cannot go on; the program cannot be run any further.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A request to KVM failed.
    #[error("KVM refused {what}: {source}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
    /// The virtual CPU stopped for a reason that no program can cause.
    #[error(
        "the virtual CPU stopped: {what} at rip {rip:#x}; the kernel log may say why (dmesg | tail)"
    )]
    Stopped {
        /// The exit reason in words.
        what: String,
        /// Where it happened.
        rip: u64,
    },
    /// No memory for page tables or windows.
    #[error("no memory left for {what}; lower the load or raise the memory limit")]
    NoMemory {
        /// What it was for.
        what: &'static str,
    },
}

/// How a call with arguments of the program gets from the guard to the host
/// kernel: behind the wall of protection keys ([`dune_kvm::wall`]), where the
/// machine has them.
#[derive(Clone, Copy, Debug)]
pub enum Passage {
    /// As any call: there is no wall.
    Open,
    /// By the Dune runtime, which sees to the wall ([`dune::WALLED`]).
    ByRuntime,
    /// By [`dune_kvm::wall::call`]. The thread has no restartable sequences.
    Walled {
        /// The thread's stack for signal frames.
        stack: &'static Slot,
    },
}

/// The wall of protection keys, built if there is none and the machine has keys.
/// The calling thread must run natively; it and the threads that it makes can
/// reach the program's memory from then on.
fn build_wall() -> Option<&'static Wall> {
    if !dune_kvm::wall::has_protection_keys() {
        return None;
    }
    dune::forgo_restartable_sequences();
    // SAFETY: the registration was taken back above.
    unsafe { Wall::build() }
}

/// Runs one thread of ring 3. See the module documentation for the protocol.
///
/// The engines of a program's threads share the page tables: what one of them
/// admits or revokes holds for all. The guard calls [`Engine::admit`] with the
/// memory's lock held, and [`Engine::revoke`] with it held exclusively until
/// the host's part of the change is made, so that no other thread can bring a
/// page back in between. What an engine locks by itself it locks last.
pub trait Engine {
    /// Runs the program from `user` until its next trap, and stores its state
    /// there again.
    ///
    /// Must return [`Trap::Interrupted`] without running anything if the kick
    /// byte is set on entry, and soon if it becomes set later.
    ///
    /// # Errors
    ///
    /// If the virtual CPU is of no more use.
    fn run(&mut self, user: &mut UserState) -> Result<Trap, EngineError>;

    /// Whether the engine may give the answers that never change
    /// ([`Call::never_changes`](crate::table::Call::never_changes)) by itself,
    /// without a trap. An engine that cannot, traps.
    ///
    /// # Errors
    ///
    /// If the engine is of no more use.
    fn answer_by_itself(&mut self, may: bool) -> Result<(), EngineError>;

    /// Lets ring 3 reach the page of `addr` with the rights `access`, as the
    /// answer to a [`Trap::PageFault`] that the guard found permitted. The
    /// whole of `area`, which contains the page, is mapped in the host process
    /// and has the same rights: an engine should admit as much of it at once
    /// as is cheap (host pages need not be populated).
    ///
    /// The page may already be admitted with other rights: they are replaced.
    ///
    /// # Errors
    ///
    /// If there is no memory for page tables or no window can be made.
    fn admit(&mut self, addr: u64, area: PageRange, access: Access) -> Result<(), EngineError>;

    /// New memory, or memory with new rights, that the program has not touched
    /// yet and that is not admitted: an engine for which a fault is dearer than
    /// page table entries may admit it now.
    ///
    /// # Errors
    ///
    /// As [`Engine::admit`].
    fn admit_ahead(&mut self, _range: PageRange, _access: Access) -> Result<(), EngineError> {
        Ok(())
    }

    /// Whether ring 3 can be shown the kernel's data for clocks, `len` bytes at
    /// `data` of the host process. Asked once, before anything runs.
    fn shows_clock(&mut self, _data: u64, _len: u64) -> bool {
        false
    }

    /// Lets ring 3 read, at `range`, the host process's memory at `data`, which
    /// lies in what [`Engine::shows_clock`] was asked of.
    ///
    /// # Errors
    ///
    /// As [`Engine::admit`].
    fn admit_clock(&mut self, _range: PageRange, _data: u64) -> Result<(), EngineError> {
        Err(EngineError::NoMemory { what: "clocks" })
    }

    /// Takes `range` out of ring 3's reach; pages that were never admitted may
    /// be among it. Called *before* the host mappings change, which the caller
    /// does next (see the module documentation).
    ///
    /// # Errors
    ///
    /// If the tables cannot be edited.
    fn revoke(&mut self, range: PageRange) -> Result<(), EngineError>;

    /// Whether [`Engine::revoke`] takes effect only together with a change of
    /// the host's mapping that follows it: on a KVM that shadows page tables.
    fn needs_host_change(&self) -> bool {
        true
    }

    /// From now on, has the CPU note which pages ring 3 uses, in units as small
    /// as pages are; the value says which. To be called before anything is
    /// admitted. `None` if the engine cannot.
    fn note_use(&mut self) -> Option<Box<dyn Usage>> {
        None
    }

    /// Makes ready what an engine for a further thread of the program needs
    /// that this thread must provide. May make descriptors.
    ///
    /// # Errors
    ///
    /// If there is no further virtual CPU.
    fn seed(&mut self) -> Result<Box<dyn Seed>, EngineError>;

    /// Must be called in the child of a `fork`, by the thread that called it,
    /// before anything else: a VM belongs to the process that made it. Nothing
    /// is admitted afterwards, the extended state is as after `execve`, and the
    /// descriptors and the kick byte are others.
    ///
    /// # Errors
    ///
    /// If there is no new VM.
    fn renew(&mut self) -> Result<(), EngineError>;

    /// XCR0 as ring 3 has it: which components [`Engine::save_xstate`] holds.
    fn xcr0(&self) -> u64;

    /// Bytes of the extended state in the standard (not compacted) XSAVE
    /// format for [`Engine::xcr0`], at least 576.
    fn xstate_len(&self) -> usize;

    /// Stores the program's extended state in `area`, which has
    /// [`Engine::xstate_len`] bytes, in the standard XSAVE format.
    ///
    /// # Errors
    ///
    /// If the virtual CPU does not answer.
    fn save_xstate(&mut self, area: &mut [u8]) -> Result<(), EngineError>;

    /// Loads the program's extended state from `area`, as `save_xstate` made
    /// it. The guard has checked that MXCSR and the XSAVE header hold nothing
    /// that `XRSTOR` would refuse.
    ///
    /// # Errors
    ///
    /// If the virtual CPU refuses it.
    fn load_xstate(&mut self, area: &[u8]) -> Result<(), EngineError>;

    /// Puts the extended state in the state after `execve` (FCW 0x37f, MXCSR
    /// 0x1f80, everything else clear).
    ///
    /// # Errors
    ///
    /// If the virtual CPU refuses it.
    fn reset_xstate(&mut self) -> Result<(), EngineError>;

    /// How this thread's calls for the program are made. Every engine says it: one
    /// that wraps another and forgot would leave the wall out.
    fn passage(&self) -> Passage;

    /// A byte that a signal handler of the guard sets to 1 to make
    /// [`Engine::run`] return [`Trap::Interrupted`]. For KVM it is
    /// `kvm_run.immediate_exit`, which has no gap between the check and the
    /// wait: a signal that comes before `KVM_RUN` sets the byte, one that
    /// comes during it makes it return. Valid as long as the engine is.
    fn kick_byte(&self) -> core::ptr::NonNull<core::sync::atomic::AtomicU8>;

    /// What the engine and its siblings hold of the machine now. Costs a lock;
    /// not for the hot path.
    fn holdings(&self) -> Holdings;

    /// File descriptors of the engine and its siblings, which the program must
    /// neither use nor close. They change by [`Engine::seed`], [`Seed::grow`]
    /// and [`Engine::renew`] alone, and none of them can be opened again through `/proc/self/fd` to any effect. Engines should
    /// move them out of the program's way with [`crate::host::move_fd_high`].
    fn fds(&self) -> Vec<std::os::fd::RawFd>;
}

/// Which pages ring 3 has used, for a thread of its own to ask.
pub trait Usage: Send {
    /// Calls `seen` for every piece of memory that ring 3 has used since the
    /// last time. What the host kernel reads or writes for a call is not among
    /// it. The memory's lock is held exclusively, and where
    /// [`Usage::needs_host_change`], the caller changes the host's mappings of
    /// what was seen before it lets go.
    ///
    /// # Errors
    ///
    /// If the tables cannot be edited.
    fn collect(&self, seen: &mut dyn FnMut(PageRange)) -> Result<(), EngineError>;

    /// As [`Engine::needs_host_change`].
    fn needs_host_change(&self) -> bool;
}

/// An engine to be, on its way to the thread that will use it.
pub trait Seed: Send {
    /// The engine, for the calling thread. Its extended state is as after
    /// `execve`.
    ///
    /// # Errors
    ///
    /// If there is no further virtual CPU.
    fn grow(self: Box<Self>) -> Result<Box<dyn Engine>, EngineError>;
}

/// Tells of a page that was used.
fn seen_leaf(leaf: &dune_x86::paging::Leaf, seen: &mut dyn FnMut(PageRange)) {
    // The guard's own pages are none of the program's.
    if let Some(range) = PageRange::new(leaf.va.as_u64(), leaf.size.bytes()) {
        seen(range);
    }
}
