//! What each thread in Dune mode has: its area, its stacks, its vCPU; and the pool of them.
//!
//! A thread's memory is one mapping:
//!
//! ```text
//!   guard page
//!   host stack      128 KiB   the host side of the thread (and signal frames of the kernel)
//!   guard page
//!   trap stack      512 KiB   the report that there is no room left (320 KiB), handlers of
//!                             exceptions and the delivery of signals (192 KiB)
//!   guard page
//!   interrupt stack  16 KiB   IST 1: only between a trap and the move to the trap stack
//!   fatal stack      64 KiB   IST 2: double fault, NMI, machine check
//!   ThreadArea               found through the GS base, on both sides
//!   flush page                unmapped to make KVM flush every vCPU's TLB
//! ```
//!
//! vCPUs cannot be destroyed before their VM, so areas are never freed: they are pooled.
#![expect(unsafe_code, reason = "raw memory shared by the two sides of a thread")]

use core::mem::{offset_of, size_of};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use dune_kvm::sys::{self, Errno};
use dune_kvm::vcpu::{SystemTables, Vcpu};
use dune_kvm::wall::{Stack, Wall};
use dune_x86::descriptors::{GDT_ENTRIES, TaskState, global_descriptor_table};

use crate::arch;
use crate::error::EnterError;
use crate::machine::Machine;
use crate::memory::ValidPcids;
use crate::memory::identity::high;
use crate::signals::{AltStack, SignalTable};

const PAGE: usize = 4096;
pub(crate) const HOST_STACK: usize = 128 << 10;
pub(crate) const TRAP_STACK: usize = 512 << 10;
const INTERRUPT_STACK: usize = 16 << 10;
const FATAL_STACK: usize = 64 << 10;
/// Room that no handler may use: for the report that there is no room left. Its backtrace,
/// which reads debug information, wants more than 64 KiB.
pub(crate) const TRAP_RESERVE: usize = 320 << 10;
/// How many threads can be in Dune mode at once: the most vCPUs that any kernel allows.
pub(crate) const MAX_THREADS: usize = 4096;

/// States of an area.
pub(crate) const FREE: u32 = 0;
pub(crate) const USED: u32 = 1;

/// A thread's part of the runtime, shared by both of its sides and by the entry stubs. All
/// fields above `gdt` are known to `entry.S` by offset.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct ThreadArea {
    /// The area's own (low) address.
    pub(crate) this: *mut Self,
    /// The call page: a forwarded system call and its result.
    pub(crate) number: usize,
    pub(crate) arguments: [usize; 6],
    pub(crate) result: isize,
    /// Stack pointer of the caller of the forwarded system call.
    pub(crate) call_rsp: u64,
    /// A captured signal waits for delivery.
    pub(crate) pending: AtomicU32,
    /// Nesting of the trap being handled.
    pub(crate) depth: u32,
    pub(crate) pid: u32,
    pub(crate) tid: u32,
    pub(crate) scratch: u64,
    pub(crate) ist: u64,
    pub(crate) trap_low: u64,
    pub(crate) trap_high: u64,
    pub(crate) trap_limit: u64,
    pub(crate) xsave_size: u64,
    pub(crate) low_trap: u64,
    pub(crate) high_run: u64,
    /// The context that ring 3 is running, by its high alias, and its XSAVE area.
    pub(crate) user: u64,
    pub(crate) user_xsave: u64,
    pub(crate) run_rsp: u64,
    pub(crate) cr3: u64,
    pub(crate) fs_base: u64,
    pub(crate) parked_rsp: u64,
    pub(crate) host_rsp: u64,
    /// Floating-point control words of the caller of ring 3.
    pub(crate) mxcsr: u32,
    pub(crate) x87_control: u32,

    pub(crate) gdt: [u64; GDT_ENTRIES],
    pub(crate) tss: TaskState,
    pub(crate) state: AtomicU32,
    pub(crate) vcpu: Option<Vcpu>,
    /// The vCPU's descriptor, for other threads to see; -1 while there is none.
    descriptor: AtomicI32,
    /// Which signal was captured, its siginfo, and the mask before it.
    pub(crate) signal: u32,
    pub(crate) siginfo: [u64; 16],
    pub(crate) signal_mask: u64,
    pub(crate) altstack: AltStack,
    /// The process's signal table, or `own_signals` in a `vfork` child.
    pub(crate) signals: *const SignalTable,
    pub(crate) own_signals: SignalTable,
    /// A child of `vfork`: its parent frees the area.
    pub(crate) freed_by_parent: bool,
    /// The rseq area that was registered before entry, and its size; 0 for none.
    pub(crate) rseq: (usize, u32),
    pub(crate) flush_page: *mut u8,
    /// Where the kernel puts signal frames during a call behind the wall, if there is one.
    pub(crate) wall_stack: Option<Stack>,
    /// Signal mask with which a new thread starts.
    pub(crate) start_mask: u64,
    /// The address space that ring 3 runs in on this vCPU: its PCID plus one, or 0.
    pub(crate) running_pcid: AtomicU32,
    pub(crate) valid_pcids: ValidPcids,
    /// The page fault under way was made by the host side, which refused the memory.
    pub(crate) injected: AtomicU32,
    /// Registers with which the host side refused memory, as one number, and how often in a
    /// row.
    pub(crate) refused: (u64, u32),
}

pub(crate) static AREAS: [AtomicPtr<ThreadArea>; MAX_THREADS] =
    [const { AtomicPtr::new(ptr::null_mut()) }; MAX_THREADS];
static AREA_COUNT: AtomicUsize = AtomicUsize::new(0);

impl ThreadArea {
    /// The area of the current thread, which must be in Dune mode or on its host side.
    #[inline(always)]
    pub(crate) fn current() -> *mut Self {
        let this;
        // SAFETY: the invariant of both sides: GS base is the area, whose first field is
        // its address.
        unsafe {
            core::arch::asm!("mov {}, gs:[0]", out(reg) this, options(nostack, pure, readonly, preserves_flags));
        }
        this
    }

    fn allocate(machine: &Machine) -> Result<NonNull<Self>, EnterError> {
        let length = 3 * PAGE
            + HOST_STACK
            + TRAP_STACK
            + INTERRUPT_STACK
            + FATAL_STACK
            + size_of::<Self>()
            + PAGE;
        let base = sys::map_anonymous(length).map_err(EnterError::Memory)?;
        sys::avoid_huge_pages(base, length);
        let mut next = base;
        let mut take = |size: usize| {
            let start = next;
            next = next.wrapping_add(size);
            start
        };
        let guards = [take(PAGE)];
        let host_stack = take(HOST_STACK);
        let guards = [guards[0], take(PAGE)];
        let trap_stack = take(TRAP_STACK);
        let guards = [guards[0], guards[1], take(PAGE)];
        let interrupt_stack = take(INTERRUPT_STACK);
        let fatal_stack = take(FATAL_STACK);
        let area = take(size_of::<Self>()).cast::<Self>();
        let flush_page = take(PAGE);
        for guard in guards {
            // SAFETY: nothing uses the page.
            unsafe { sys::forbid(guard, PAGE) }.map_err(EnterError::Memory)?;
        }
        machine.cover(base as u64, length as u64)?;

        let mut tss = TaskState::new();
        tss.ist[0] = high(interrupt_stack as u64 + INTERRUPT_STACK as u64);
        tss.ist[1] = high(fatal_stack as u64 + FATAL_STACK as u64);
        tss.rsp[0] = tss.ist[0];
        let tss_address = high(area as u64 + offset_of!(Self, tss) as u64);
        let value = Self {
            this: area,
            number: 0,
            arguments: [0; 6],
            result: 0,
            call_rsp: 0,
            pending: AtomicU32::new(0),
            depth: 0,
            pid: 0,
            tid: 0,
            scratch: 0,
            ist: tss.ist[0],
            trap_low: trap_stack as u64,
            trap_high: trap_stack as u64 + TRAP_STACK as u64,
            trap_limit: trap_stack as u64 + TRAP_RESERVE as u64,
            xsave_size: u64::from(machine.xsave_size()),
            low_trap: arch::address(arch::dune_low_trap),
            high_run: high(arch::address(arch::dune_high_run)),
            user: 0,
            user_xsave: 0,
            run_rsp: 0,
            cr3: machine.cr3(),
            fs_base: 0,
            parked_rsp: 0,
            host_rsp: host_stack as u64 + HOST_STACK as u64,
            mxcsr: 0,
            x87_control: 0,
            gdt: global_descriptor_table(tss_address, SystemTables::PLAIN_TSS_LIMIT),
            tss,
            state: AtomicU32::new(USED),
            vcpu: None,
            descriptor: AtomicI32::new(-1),
            signal: 0,
            siginfo: [0; 16],
            signal_mask: 0,
            altstack: AltStack::DISABLED,
            signals: &raw const crate::signals::PROCESS_SIGNALS,
            own_signals: SignalTable::new(),
            freed_by_parent: false,
            rseq: (0, 0),
            flush_page,
            wall_stack: None,
            start_mask: 0,
            running_pcid: AtomicU32::new(0),
            valid_pcids: ValidPcids::new(),
            injected: AtomicU32::new(0),
            refused: (0, 0),
        };
        // SAFETY: fresh memory of the right size and alignment.
        unsafe { area.write(value) };
        NonNull::new(area).ok_or(EnterError::Memory(Errno::ENOMEM))
    }

    /// Takes an area from the pool, or makes one. Its vCPU exists and has been set up, or
    /// carries what its last user left in it.
    ///
    /// Runs on either side, allocates by raw system calls only.
    pub(crate) fn acquire(machine: &Machine) -> Result<(NonNull<Self>, Age), EnterError> {
        let (area, age) = Self::take(machine)?;
        // SAFETY: the area is ours now.
        unsafe { &mut *area.as_ptr() }
            .stand_behind_wall()
            .inspect_err(|_| Self::release(area.as_ptr()))?;
        Ok((area, age))
    }

    /// Gives the area what calls behind the wall need, if there is one and it has not got it.
    pub(crate) fn stand_behind_wall(&mut self) -> Result<(), EnterError> {
        if let Some(wall) = Wall::get()
            && self.wall_stack.is_none()
        {
            // As the area itself, for ever.
            self.wall_stack = Some(Stack::take(wall).map_err(EnterError::Memory)?);
        }
        Ok(())
    }

    fn take(machine: &Machine) -> Result<(NonNull<Self>, Age), EnterError> {
        let count = AREA_COUNT.load(Ordering::Acquire).min(MAX_THREADS);
        for slot in AREAS.iter().take(count) {
            let Some(area) = NonNull::new(slot.load(Ordering::Acquire)) else {
                continue;
            };
            // SAFETY: areas are never freed; the state is atomic.
            let state = unsafe { &(*area.as_ptr()).state };
            if state
                .compare_exchange(FREE, USED, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                // SAFETY: the area is ours now.
                let has_vcpu = unsafe { (*area.as_ptr()).vcpu.is_some() };
                if has_vcpu {
                    return Ok((area, Age::Used));
                }
                return Self::equip(machine, area).map(|()| (area, Age::New));
            }
        }
        let index = AREA_COUNT.fetch_add(1, Ordering::AcqRel);
        let Some(slot) = AREAS.get(index) else {
            AREA_COUNT.fetch_sub(1, Ordering::AcqRel);
            return Err(EnterError::TooManyThreads { limit: MAX_THREADS });
        };
        let area = Self::allocate(machine).inspect_err(|_| {
            // Nobody has taken a later place yet, in all likelihood; else this one stays empty.
            let _ =
                AREA_COUNT.compare_exchange(index + 1, index, Ordering::AcqRel, Ordering::Relaxed);
        })?;
        slot.store(area.as_ptr(), Ordering::Release);
        Self::equip(machine, area).map(|()| (area, Age::New))
    }

    /// Gives an area without a vCPU a new one.
    pub(crate) fn equip(machine: &Machine, area: NonNull<Self>) -> Result<(), EnterError> {
        // SAFETY: the caller owns the area.
        let this = unsafe { &mut *area.as_ptr() };
        let made = machine.vm().create_vcpu().and_then(|vcpu| {
            let tables = this.system_tables(machine);
            // SAFETY: the tables lie in the area, which is never freed.
            unsafe { vcpu.set_up(machine.vm().host(), &tables) }
                .inspect_err(|_| vcpu.close())
                .map(|()| vcpu)
        });
        match made {
            Ok(vcpu) => {
                this.descriptor.store(vcpu.descriptor(), Ordering::Release);
                this.vcpu = Some(vcpu);
                Ok(())
            }
            Err(error) => {
                this.state.store(FREE, Ordering::Release);
                Err(EnterError::Platform(error))
            }
        }
    }

    /// Brings the vCPU to the start of `rip` with the area's FS base, whatever it did before.
    /// IF is clear until the code there sets it.
    pub(crate) fn restart_at(
        &mut self,
        machine: &Machine,
        registers: &kvm_bindings::kvm_regs,
    ) -> Result<(), EnterError> {
        crate::memory::forget_all(self);
        self.running_pcid.store(0, Ordering::Relaxed);
        let tables = self.system_tables(machine);
        let Some(vcpu) = self.vcpu.as_ref() else {
            return Err(EnterError::Memory(Errno::EIO));
        };
        // SAFETY: the tables lie in the area, which is never freed.
        unsafe { vcpu.set_up(machine.vm().host(), &tables) }.map_err(EnterError::Platform)?;
        let refused = |request| {
            move |errno| EnterError::Platform(dune_kvm::vm::VmError::Request { request, errno })
        };
        // SAFETY: the vCPU is stopped.
        unsafe { vcpu.clear_events() }.map_err(refused("KVM_SET_VCPU_EVENTS"))?;
        // SAFETY: as above; the registers are those of an entry point.
        unsafe { vcpu.set_registers(registers) }.map_err(refused("KVM_SET_REGS"))
    }

    fn system_tables(&self, machine: &Machine) -> SystemTables {
        let area = self.this as u64;
        SystemTables {
            cr3: self.cr3 & !(1 << 63),
            gdt: high(area + offset_of!(Self, gdt) as u64),
            gdt_size: (GDT_ENTRIES * 8) as u16,
            idt: high(machine.interrupt_table()),
            idt_size: 4096,
            tss: high(area + offset_of!(Self, tss) as u64),
            tss_limit: SystemTables::PLAIN_TSS_LIMIT,
            syscall_entry: high(arch::address(arch::dune_syscall_entry)),
            gs_base: high(area),
            fs_base: self.fs_base,
        }
    }

    /// Gives an area back. Its thread must never use it again.
    pub(crate) fn release(area: *mut Self) {
        // SAFETY: areas are never freed; the state is atomic.
        unsafe { (*area).state.store(FREE, Ordering::Release) };
    }

    /// Every area there is, whoever uses it.
    pub(crate) fn all() -> impl Iterator<Item = NonNull<Self>> {
        let count = AREA_COUNT.load(Ordering::Acquire).min(MAX_THREADS);
        AREAS
            .iter()
            .take(count)
            .filter_map(|slot| NonNull::new(slot.load(Ordering::Acquire)))
    }

    /// In the child of a `fork`: gives up the vCPU that was inherited.
    pub(crate) fn drop_inherited_vcpu(&mut self) {
        if let Some(vcpu) = self.vcpu.take() {
            self.descriptor.store(-1, Ordering::Release);
            vcpu.close_inherited();
        }
        self.state.store(FREE, Ordering::Relaxed);
    }

    /// The descriptors of all vCPUs.
    pub(crate) fn descriptors() -> impl Iterator<Item = i32> {
        Self::all()
            // SAFETY: areas are never freed; the descriptor is atomic.
            .map(|area| unsafe { &(*area.as_ptr()).descriptor }.load(Ordering::Acquire))
            .filter(|fd| *fd >= 0)
    }

    /// Whether one area is all there is, so that no other vCPU can hold translations.
    #[inline]
    pub(crate) fn only_one() -> bool {
        AREA_COUNT.load(Ordering::Acquire) <= 1
    }
}

/// Whether an acquired area's vCPU has run before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
    New,
    Used,
}
