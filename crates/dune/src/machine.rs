//! The process's machine: one VM, the process's own page tables, the interrupt table.
#![expect(
    unsafe_code,
    reason = "the interrupt table is written once, before any vCPU exists"
)]

use core::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use dune_kvm::probe::Kvm;
use dune_kvm::sys;
use dune_kvm::vm::{Vm, VmError};
use dune_kvm::windows::{WINDOW_SHIFT, WINDOW_SIZE};
use dune_x86::descriptors::Gate;
use dune_x86::trap::vector;

use crate::arch;
use crate::error::EnterError;
use crate::guest::call::InterruptsOff;
use crate::maps;
use crate::memory::FrameArena;
use crate::memory::identity::{IdentityTables, high};
use crate::options::Options;
use crate::vdso;

const VECTORS: usize = 256;
const STUB_SIZE: u64 = 16;
const INTERRUPT_IST: u8 = 1;
const FATAL_IST: u8 = 2;
/// In a value for CR3: the TLB keeps its entries (SDM vol. 3, 4.10.4.1).
const NO_FLUSH: u64 = 1 << 63;

/// What all threads in Dune mode share.
#[derive(Debug)]
pub(crate) struct Machine {
    vm: Vm,
    tables: IdentityTables,
    /// See [`Machine::cr3`].
    cr3: u64,
    frames: FrameArena,
    interrupt_table: u64,
    vdso: vdso::Place,
    /// The process that the VM belongs to; another one after a `fork`.
    owner: AtomicI32,
}

/// Whether the CPU has process-context identifiers, and they are on.
fn has_pcid(vm: &Vm) -> bool {
    vm.host().leaf(1, 0).2 & (1 << 17) != 0
}

static MACHINE: OnceLock<Machine> = OnceLock::new();
static SETTING_UP: Mutex<()> = Mutex::new(());

impl Machine {
    /// The machine, set up by the first call. Outside Dune mode only.
    pub(crate) fn get_or_create(options: &Options) -> Result<&'static Self, EnterError> {
        if let Some(machine) = MACHINE.get() {
            return Ok(machine);
        }
        let _guard = SETTING_UP.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(machine) = MACHINE.get() {
            return Ok(machine);
        }
        if !options.skip_probe {
            let found = &dune_kvm::probe::probe().kvm;
            if !matches!(found, Kvm::Hardware { .. }) {
                return Err(EnterError::Unusable {
                    found: found.to_string(),
                });
            }
        }
        crate::host::base::prepare();
        crate::rseq::prepare();
        let machine = Self::create(options)?;
        crate::signals::adopt_handlers();
        Ok(MACHINE.get_or_init(|| machine))
    }

    /// The machine, if there is one. Either side.
    #[inline]
    pub(crate) fn get() -> Option<&'static Self> {
        MACHINE.get()
    }

    fn create(options: &Options) -> Result<Self, EnterError> {
        let vm = match options.physical_bits {
            Some(bits) => Vm::with_physical_bits(bits),
            None => Vm::new(),
        }
        .map_err(EnterError::Platform)?;
        crate::host::fault::prepare();
        let tables = IdentityTables::new(&vm)?;
        let frames = FrameArena::new(&vm, &tables)?;
        let interrupt_table = sys::map_anonymous(VECTORS * size_of::<Gate>())
            .map_err(EnterError::Memory)?
            .cast::<Gate>();
        let stubs = high(arch::address(arch::dune_vectors));
        for number in 0..VECTORS {
            let ist = match number as u8 {
                vector::DOUBLE_FAULT | vector::NMI | vector::MACHINE_CHECK => FATAL_IST,
                _ => INTERRUPT_IST,
            };
            let ring = match number as u8 {
                vector::BREAKPOINT | vector::OVERFLOW => 3,
                _ => 0,
            };
            let gate = Gate::interrupt(stubs + number as u64 * STUB_SIZE, ist, ring);
            // SAFETY: the table has room for every vector.
            unsafe { interrupt_table.wrapping_add(number).write(gate) };
        }
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(EnterError::Maps)?;
        let cr3 = tables.root() | if has_pcid(&vm) { NO_FLUSH } else { 0 };
        let machine = Self {
            vm,
            tables,
            cr3,
            frames,
            interrupt_table: interrupt_table as u64,
            vdso: vdso::Place::in_maps(&maps),
            owner: AtomicI32::new(sys::getpid()),
        };
        machine.cover(machine.interrupt_table, 4096)?;
        crate::memory::stack::grow_main_stack();
        machine.cover_process()?;
        Ok(machine)
    }

    /// Windows over everything that the process has mapped now. What it maps later gets a
    /// window when it is first touched.
    fn cover_process(&self) -> Result<(), EnterError> {
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(EnterError::Maps)?;
        for line in maps.lines() {
            let Some((start, end)) = parse_range(line) else {
                continue;
            };
            // What is reserved by the terabyte is covered where it is touched.
            const LARGEST_COVERED_AT_ONCE: u64 = 4 << 30;
            if end <= 1 << 47 && end - start <= LARGEST_COVERED_AT_ONCE {
                self.cover(start, end - start)?;
            }
        }
        Ok(())
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    pub(crate) fn tables(&self) -> &IdentityTables {
        &self.tables
    }

    pub(crate) fn frames(&self) -> &FrameArena {
        &self.frames
    }

    /// Whether the CPU has process-context identifiers, and they are on.
    pub(crate) fn has_pcid(&self) -> bool {
        has_pcid(&self.vm)
    }

    pub(crate) fn vdso(&self) -> vdso::Place {
        self.vdso
    }

    pub(crate) fn interrupt_table(&self) -> u64 {
        self.interrupt_table
    }

    pub(crate) fn xsave_size(&self) -> u32 {
        self.vm.host().xsave_size
    }

    pub(crate) fn xcr0(&self) -> u64 {
        self.vm.host().xcr0
    }

    /// What the process's own page tables are loaded with: PCID 0, keeping its entries.
    #[inline]
    pub(crate) fn cr3(&self) -> u64 {
        self.cr3
    }

    /// Makes sure that the guest reaches `length` bytes at `start`. Either side; no
    /// allocation, no lock. Where guest physical space is used up, windows over memory that
    /// is gone are used again.
    pub(crate) fn cover(&self, start: u64, length: u64) -> Result<(), EnterError> {
        // A signal handler that ran while this thread is setting a window up would wait for
        // that window for ever, should it need it.
        let _off = crate::is_inside().then(InterruptsOff::new);
        match self.tables.cover(&self.vm, start, length) {
            Err(EnterError::Platform(VmError::Full { .. })) if self.reclaim() > 0 => {
                self.tables.cover(&self.vm, start, length)
            }
            result => result,
        }
    }

    /// Gives back every window in which nothing is mapped that could be accessed; returns
    /// how many.
    fn reclaim(&self) -> usize {
        const MOST_FRAMES: usize = 1 << 15;
        const MOST_AT_ONCE: usize = 256;
        let mut live = [0_u64; MOST_FRAMES / 64];
        let windows = self.vm.windows();
        let complete = maps::read(|mapping| {
            let first = mapping.start >> WINDOW_SHIFT;
            let last = (mapping.end - 1).min((1 << 47) - 1) >> WINDOW_SHIFT;
            for chunk in (first..=last).filter(|_| !mapping.rights.is_empty()) {
                if let Some(guest) = windows.to_guest(chunk << WINDOW_SHIFT) {
                    let frame = (guest >> WINDOW_SHIFT) as usize;
                    if let Some(word) = live.get_mut(frame / 64) {
                        *word |= 1 << (frame % 64);
                    }
                }
            }
            true
        });
        if !complete {
            return 0;
        }
        // What is mapped from here on is either seen by the second look, or its owner finds
        // the window taken and waits for another.
        let mut taken = [(0_u64, 0_u16, false); MOST_AT_ONCE];
        let mut count = 0;
        for (host, frame) in windows.iter() {
            let index = usize::from(frame);
            let is_live = live
                .get(index / 64)
                .is_none_or(|word| word >> (index % 64) & 1 == 1);
            if let Some(place) = taken.get_mut(count).filter(|_| !is_live)
                && windows.begin_release(host, frame)
            {
                *place = (host, frame, false);
                count += 1;
            }
        }
        let taken = taken.get_mut(..count).unwrap_or_default();
        let complete = maps::read(|mapping| {
            for (host, _, live) in taken.iter_mut().filter(|_| !mapping.rights.is_empty()) {
                *live |= mapping.start < *host + WINDOW_SIZE && mapping.end > *host;
            }
            true
        });
        let mut released = 0;
        for &mut (host, frame, live) in taken {
            if live || !complete {
                windows.publish(host, frame);
            } else {
                self.vm
                    .finish_release(host, frame, || self.tables.hide(host));
                released += 1;
            }
        }
        released
    }

    /// In a child that was forked natively: makes the VM this process's own, once, whichever
    /// of its threads comes first.
    pub(crate) fn make_ours(&self) -> Result<(), EnterError> {
        let process = sys::getpid();
        loop {
            let owner = self.owner.load(Ordering::Acquire);
            if owner == process {
                return Ok(());
            }
            // Negative while a thread of that process is at it.
            if owner == -process {
                sys::sched_yield();
                continue;
            }
            let claimed =
                self.owner
                    .compare_exchange(owner, -process, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                return self
                    .renew()
                    .inspect_err(|_| self.owner.store(owner, Ordering::Release));
            }
        }
    }

    /// In the child of a `fork`: a VM for this process. See [`Vm::renew`].
    pub(crate) fn renew(&self) -> Result<(), EnterError> {
        for area in crate::thread::ThreadArea::all() {
            // SAFETY: no other thread of the new process is in Dune mode.
            unsafe { &mut *area.as_ptr() }.drop_inherited_vcpu();
        }
        self.vm.renew(|host| self.tables.hide(host))?;
        self.owner.store(sys::getpid(), Ordering::Release);
        Ok(())
    }
}

pub(crate) fn parse_range(line: &str) -> Option<(u64, u64)> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

/// Where this library's large tables are, which never hold the address of an object of the
/// program's: of no interest to a collector that looks through the process's variables. Costs
/// nothing.
#[must_use]
pub fn own_tables() -> [core::ops::Range<usize>; 2] {
    [
        address_range(&dune_kvm::wall::SLOTS),
        address_range(&crate::thread::AREAS),
    ]
}

fn address_range<T>(table: &'static [T]) -> core::ops::Range<usize> {
    let range = table.as_ptr_range();
    range.start as usize..range.end as usize
}

/// The runtime's own descriptors in this process: the VM's and that of `/dev/kvm`. Those of
/// the vCPUs come and go with threads. A program in Dune mode can neither close nor replace
/// them; a sandbox must hide them too.
#[must_use]
pub fn descriptors() -> Vec<i32> {
    let Some(machine) = Machine::get() else {
        return Vec::new();
    };
    machine
        .vm()
        .descriptors()
        .into_iter()
        .chain(crate::thread::ThreadArea::descriptors())
        .collect()
}

/// The extended state components that are enabled (XCR0), and the size in bytes of an XSAVE
/// area for them; `None` before the first entry.
#[must_use]
pub fn extended_features() -> Option<(u64, usize)> {
    Machine::get().map(|machine| (machine.xcr0(), machine.xsave_size() as usize))
}

/// How many windows of 1 GiB of the process's memory the guest has now; 0 before the first
/// entry. Each is one memory slot of KVM.
#[must_use]
pub fn windows() -> usize {
    Machine::get().map_or(0, |machine| machine.vm().windows().len())
}

/// How many virtual CPUs this process has: one for each thread that is in Dune mode, and those
/// kept for the next threads.
#[must_use]
pub fn vcpus() -> usize {
    crate::thread::ThreadArea::descriptors().count()
}
