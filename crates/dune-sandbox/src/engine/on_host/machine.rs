//! The virtual machine: one VM, its vCPUs, and the requests that the engine
//! makes of them.
#![expect(unsafe_code, reason = "KVM's requests and the area that KVM shares")]

use core::ptr::NonNull;
use core::sync::atomic::AtomicU8;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use dune_kvm::ioctl;
use dune_kvm::probe::{self, DEVICE, Kvm};
use dune_kvm::sys::{self, Errno};
use dune_x86::addr::GuestPhys;
use dune_x86::descriptors::{STAR, SYSCALL_FLAG_MASK, TSS_SELECTOR, USER_CS, USER_SS};
use dune_x86::regs;
use kvm_bindings as kvm;

use super::answers;
use super::layout::{self, CpuIndex};
use crate::engine::EngineError;
use crate::host::move_fd_high;

/// Requests that no other part of the workspace makes.
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_SET_DEBUGREGS: u64 = 0x4080_aea2;
const _: () = assert!(size_of::<kvm::kvm_debugregs>() == 0x80);

/// What the engine exchanges with KVM through the shared area at each exit.
const SYNCED: u64 = (kvm::KVM_SYNC_X86_REGS | kvm::KVM_SYNC_X86_SREGS) as u64;

/// Bytes of `struct kvm_xsave`.
pub(super) const KVM_XSAVE_BYTES: usize = 4096;

/// Where `SYSCALL` from ring 3 arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Landing {
    /// At ring 0, as the architecture says.
    Ring0,
    /// At `LSTAR`, and still at ring 3: a weak KVM.
    Ring3,
}

/// How `KVM_RUN` came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// The guest wrote to an I/O port.
    Out(u16),
    /// The guest read from an I/O port, and waits for the value.
    In,
    /// An access to guest physical memory that the host side does not have, or
    /// not with this right, which KVM tried to interpret.
    Mmio { gpa: u64, write: bool },
    /// An access to memory that the host side could not supply; where, if KVM
    /// says so.
    Unbacked { gpa: Option<u64> },
    /// A signal, or the kick byte.
    Interrupted,
    /// Everything else; the exit reason.
    Other(u32),
}

/// The extended state that ring 3 has.
#[derive(Clone, Copy, Debug)]
pub(super) struct XState {
    /// XCR0.
    pub(super) xcr0: u64,
    /// Bytes of an XSAVE area for it in the standard format.
    pub(super) len: usize,
    /// Whether KVM's own requests carry all of it.
    pub(super) kvm_carries_it: bool,
}

/// The virtual machine, without memory yet.
#[derive(Debug)]
pub(super) struct Vm {
    vm: OwnedFd,
    /// `/dev/kvm`. Kept for the VMs of forked processes: the program may give up the right
    /// to open it.
    device: OwnedFd,
    run_len: usize,
    landing: Landing,
    features: probe::Features,
    xstate: XState,
}

impl Vm {
    /// On the device that another VM was made on, if there is one.
    pub(super) fn new(device: Option<OwnedFd>) -> Result<Self, EngineError> {
        let report = probe::probe();
        let landing = match &report.kvm {
            Kvm::Weak { measurements, .. } if measurements.syscall_cpl == Some(3) => Landing::Ring3,
            Kvm::Weak { .. } | Kvm::Hardware { .. } => Landing::Ring0,
            Kvm::Absent(_) | Kvm::NoPermission { .. } | Kvm::Broken(_) => {
                return Err(EngineError::Kvm {
                    what: "to run a program here",
                    source: std::io::Error::other(report.kvm.to_string()),
                });
            }
        };
        let (Some(_), Some(features)) = (&report.cpuid, report.features()) else {
            return Err(no_cpuid());
        };
        let kept = match device {
            Some(device) => device,
            None => open_device()?,
        };
        let device = kept.as_raw_fd();
        let cap = kvm::KVM_CAP_SYNC_REGS as usize;
        let sync = plain(
            device,
            "KVM_CHECK_EXTENSION",
            ioctl::KVM_CHECK_EXTENSION,
            cap,
        )?;
        if sync as u64 & SYNCED != SYNCED {
            return Err(EngineError::Kvm {
                what: "KVM_CAP_SYNC_REGS",
                source: std::io::Error::other("use Linux 4.17 or later"),
            });
        }
        let vm = create(device, "KVM_CREATE_VM", ioctl::KVM_CREATE_VM, 0)?;
        // Only CPUs without "unrestricted guest" need it; other vendors' KVM
        // may not know it.
        let _ = plain(
            vm.as_raw_fd(),
            "",
            ioctl::KVM_SET_TSS_ADDR,
            layout::KVM_PRIVATE_GPA,
        );
        let request = ioctl::KVM_GET_VCPU_MMAP_SIZE;
        let run_len = plain(device, "KVM_GET_VCPU_MMAP_SIZE", request, 0)?;
        Ok(Self {
            vm,
            device: kept,
            run_len,
            landing,
            features,
            xstate: XState::of_this_cpu(features.xcr0_mask),
        })
    }

    /// What the program must neither use nor close.
    pub(super) fn fds(&self) -> [RawFd; 2] {
        [self.vm.as_raw_fd(), self.device.as_raw_fd()]
    }

    /// The descriptor, for memory slots.
    pub(super) fn fd(&self) -> RawFd {
        self.vm.as_raw_fd()
    }

    pub(super) fn physical_bits(&self) -> u32 {
        u32::from(self.features.physical_bits)
    }
}

/// A vCPU.
#[derive(Debug)]
pub(super) struct Machine {
    run: NonNull<kvm::kvm_run>,
    run_len: usize,
    vcpu: OwnedFd,
    landing: Landing,
    features: probe::Features,
    xstate: XState,
}

// SAFETY: the pointer leads to memory that belongs to this value; nothing of
// it is bound to a thread.
unsafe impl Send for Machine {}

impl Machine {
    /// The vCPU number `index` of `vm`, without state.
    pub(super) fn new(vm: &Vm, index: CpuIndex) -> Result<Self, EngineError> {
        let Some(cpuid) = &probe::probe().cpuid else {
            return Err(no_cpuid());
        };
        let request = ioctl::KVM_CREATE_VCPU;
        let vcpu = create(vm.fd(), "KVM_CREATE_VCPU", request, index.0 as usize)?;
        let run = map_run(vcpu.as_raw_fd(), vm.run_len)?;
        let machine = Self {
            run,
            run_len: vm.run_len,
            vcpu,
            landing: vm.landing,
            features: vm.features,
            xstate: vm.xstate,
        };
        let list = cpuid.as_fam_struct_ptr() as usize;
        // SAFETY: the list is as long as it says.
        unsafe { machine.request("KVM_SET_CPUID2", ioctl::KVM_SET_CPUID2, list) }?;
        Ok(machine)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.vcpu.as_raw_fd()
    }

    /// Where the area lies that KVM shares, and its length.
    pub(super) fn shared_area(&self) -> (usize, usize) {
        (self.run.as_ptr() as usize, self.run_len)
    }

    pub(super) fn landing(&self) -> Landing {
        self.landing
    }

    pub(super) fn xstate(&self) -> XState {
        self.xstate
    }

    /// Puts the vCPU at ring 3 in 64-bit mode, with the page tables at `cr3`.
    ///
    /// # Safety
    ///
    /// From here on the guest reaches what the page tables say, which must be
    /// memory that ring 3 may have, and the guard's pages as `layout` has them.
    pub(super) unsafe fn set_up(&self, index: CpuIndex, cr3: GuestPhys) -> Result<(), EngineError> {
        let mut sregs = kvm::kvm_sregs::default();
        // SAFETY: KVM fills the structure.
        unsafe {
            let sregs = &raw mut sregs as usize;
            self.request("KVM_GET_SREGS", ioctl::KVM_GET_SREGS, sregs)
        }?;
        sregs.cr0 = control::CR0;
        sregs.cr3 = cr3.as_u64();
        sregs.cr4 = control::cr4(&self.features);
        sregs.efer = control::EFER;
        sregs.cs = segment(USER_CS, 11, 1);
        sregs.ss = segment(USER_SS, 3, 0);
        // Null selectors, as Linux starts a program; the hidden parts do not
        // matter in 64-bit mode but for the bases.
        sregs.ds = segment(0, 3, 0);
        (sregs.es, sregs.fs, sregs.gs) = (sregs.ds, sregs.ds, sregs.ds);
        sregs.tr = kvm::kvm_segment {
            base: index.task(),
            limit: layout::TASK_LIMIT,
            selector: TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        sregs.ldt = kvm::kvm_segment {
            unusable: 1,
            ..Default::default()
        };
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = layout::GDT_BYTES - 1;
        sregs.idt.base = layout::IDT;
        sregs.idt.limit = layout::IDT_BYTES - 1;
        // SAFETY: KVM reads the structure.
        unsafe {
            let sregs = &raw const sregs as usize;
            self.request("KVM_SET_SREGS", ioctl::KVM_SET_SREGS, sregs)
        }?;
        self.set_msrs(&[
            (regs::MSR_STAR, STAR),
            (regs::MSR_LSTAR, layout::syscall_entry(self.landing)),
            (
                regs::MSR_FMASK,
                match self.landing {
                    Landing::Ring0 => SYSCALL_FLAG_MASK,
                    Landing::Ring3 => answers::FLAG_MASK,
                },
            ),
            (regs::MSR_PAT, regs::PAT_LINUX),
        ])?;
        if self.features.xcr0_mask != 0 {
            let mut xcrs = kvm::kvm_xcrs {
                nr_xcrs: 1,
                ..Default::default()
            };
            xcrs.xcrs[0].value = self.xstate.xcr0;
            // SAFETY: KVM reads the structure.
            unsafe {
                self.request(
                    "KVM_SET_XCRS",
                    ioctl::KVM_SET_XCRS,
                    &raw const xcrs as usize,
                )
            }?;
        }
        let offset = 0_u64;
        let attribute = kvm::kvm_device_attr {
            group: kvm::KVM_VCPU_TSC_CTRL,
            attr: u64::from(kvm::KVM_VCPU_TSC_OFFSET),
            addr: &raw const offset as u64,
            ..Default::default()
        };
        // The vDSO computes the time from the host's counter. A KVM that runs
        // ring 3 on the bare processor may not know the attribute, and does not
        // need it.
        // SAFETY: the attribute points to the 8 bytes that this attribute is.
        let offset = unsafe {
            let attribute = &raw const attribute as usize;
            self.request("a TSC offset of 0", ioctl::KVM_SET_DEVICE_ATTR, attribute)
        };
        if self.landing == Landing::Ring0 {
            offset?;
        }
        let run = self.run.as_ptr();
        // SAFETY: the area is mapped, and KVM reads it in KVM_RUN only.
        unsafe { (*run).kvm_valid_regs = SYNCED };
        Ok(())
    }

    /// Where system calls land from here on.
    pub(super) fn land_at(&self, address: u64) -> Result<(), EngineError> {
        self.set_msrs(&[(regs::MSR_LSTAR, address)])
    }

    pub(super) fn set_msrs(&self, values: &[(u32, u64)]) -> Result<(), EngineError> {
        const MOST: usize = 4;
        #[repr(C)]
        struct List {
            count: u32,
            pad: u32,
            entries: [kvm::kvm_msr_entry; MOST],
        }
        let count = values.len().min(MOST);
        let mut list = List {
            count: count as u32,
            pad: 0,
            entries: [kvm::kvm_msr_entry::default(); MOST],
        };
        for (entry, &(index, data)) in list.entries.iter_mut().zip(values) {
            *entry = kvm::kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
        }
        // SAFETY: the list is as long as it says.
        let set = unsafe {
            self.request(
                "KVM_SET_MSRS",
                ioctl::KVM_SET_MSRS,
                &raw const list as usize,
            )
        }?;
        if set == count {
            return Ok(());
        }
        Err(EngineError::Kvm {
            what: "KVM_SET_MSRS",
            source: Errno::EINVAL.to_io(),
        })
    }

    /// The registers that KVM exchanges through the shared area.
    #[inline]
    fn synced(&self) -> *mut kvm::kvm_sync_regs {
        let run = self.run.as_ptr();
        // SAFETY: a place within the mapped area; nothing is read.
        unsafe { &raw mut (*run).s.regs }
    }

    /// Registers as of the last exit.
    #[inline]
    pub(super) fn regs(&self) -> kvm::kvm_regs {
        // SAFETY: KVM filled them at the last exit; `set_up` asked it to.
        unsafe { (*self.synced()).regs }
    }

    /// Registers for the next entry.
    #[inline]
    pub(super) fn set_regs(&mut self, regs: &kvm::kvm_regs) {
        // SAFETY: the area is mapped, and this thread is not in KVM_RUN.
        unsafe { (*self.synced()).regs = *regs };
        let run = self.run.as_ptr();
        // SAFETY: as above.
        unsafe { (*run).kvm_dirty_regs = u64::from(kvm::KVM_SYNC_X86_REGS) };
    }

    /// Of the segment and control registers as of the last exit, what matters.
    #[inline]
    pub(super) fn segments(&self) -> Segments {
        // SAFETY: KVM filled them at the last exit; `set_up` asked it to.
        let sregs = unsafe { &(*self.synced()).sregs };
        Segments {
            cs: sregs.cs.selector,
            fs_base: sregs.fs.base,
            gs_base: sregs.gs.base,
            cr2: sregs.cr2,
        }
    }

    /// Enters the guest until the next exit.
    #[inline]
    pub(super) fn enter(&mut self) -> Result<Exit, EngineError> {
        // SAFETY: what the guest may change was given to it by `set_up`.
        let result = unsafe { sys::ioctl(self.vcpu.as_raw_fd(), ioctl::KVM_RUN, 0) };
        let run = self.run.as_ptr();
        // SAFETY: the area is mapped; KVM writes it in KVM_RUN only, and of its
        // unions the member that goes with the exit reason.
        let run = unsafe { &*run };
        match result {
            Ok(_) => Ok(match run.exit_reason {
                kvm::KVM_EXIT_IO => {
                    // SAFETY: the member of this exit reason.
                    let io = unsafe { run.__bindgen_anon_1.io };
                    match u32::from(io.direction) {
                        kvm::KVM_EXIT_IO_OUT => Exit::Out(io.port),
                        _ => Exit::In,
                    }
                }
                kvm::KVM_EXIT_MMIO => {
                    // SAFETY: the member of this exit reason.
                    let mmio = unsafe { run.__bindgen_anon_1.mmio };
                    Exit::Mmio {
                        gpa: mmio.phys_addr,
                        write: mmio.is_write != 0,
                    }
                }
                kvm::KVM_EXIT_INTR => Exit::Interrupted,
                reason => Exit::Other(reason),
            }),
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(Exit::Interrupted),
            Err(Errno::EFAULT) => {
                // SAFETY: an integer in a union of integers; used only if it is
                // the member of this exit reason.
                let gpa = unsafe { run.__bindgen_anon_1.memory_fault.gpa };
                let is_told = run.exit_reason == kvm::KVM_EXIT_MEMORY_FAULT;
                Ok(Exit::Unbacked {
                    gpa: is_told.then_some(gpa),
                })
            }
            Err(errno) => Err(EngineError::Kvm {
                what: "KVM_RUN",
                source: errno.to_io(),
            }),
        }
    }

    /// `kvm_run.immediate_exit`.
    pub(super) fn kick_byte(&self) -> NonNull<AtomicU8> {
        let run = self.run.as_ptr();
        // SAFETY: within the mapped area.
        let byte = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: a place in a mapped area is not null.
        unsafe { NonNull::new_unchecked(byte.cast()) }
    }

    /// Whether an exception has been raised and not delivered.
    pub(super) fn exception_is_pending(&self) -> Result<bool, EngineError> {
        let mut events = kvm::kvm_vcpu_events::default();
        // SAFETY: KVM fills the structure.
        unsafe {
            let events = &raw mut events as usize;
            self.request("KVM_GET_VCPU_EVENTS", ioctl::KVM_GET_VCPU_EVENTS, events)
        }?;
        Ok(events.exception.injected != 0 || events.exception.pending != 0)
    }

    /// Reads and resets DR6.
    pub(super) fn take_dr6(&self) -> Result<u64, EngineError> {
        const DR6_RESET: u64 = 0xffff_0ff0;
        let mut debug = kvm::kvm_debugregs::default();
        // SAFETY: KVM fills the structure.
        unsafe {
            let debug = &raw mut debug as usize;
            self.request("KVM_GET_DEBUGREGS", KVM_GET_DEBUGREGS, debug)
        }?;
        let dr6 = core::mem::replace(&mut debug.dr6, DR6_RESET);
        // SAFETY: KVM reads the structure.
        unsafe {
            let debug = &raw const debug as usize;
            self.request("KVM_SET_DEBUGREGS", KVM_SET_DEBUGREGS, debug)
        }?;
        Ok(dr6)
    }

    /// The extended state as KVM has it.
    pub(super) fn xsave(&self, area: &mut [u8; KVM_XSAVE_BYTES]) -> Result<(), EngineError> {
        let area = area.as_mut_ptr() as usize;
        // SAFETY: KVM writes as many bytes as the area has.
        unsafe { self.request("KVM_GET_XSAVE", ioctl::KVM_GET_XSAVE, area) }.map(drop)
    }

    /// Gives KVM the extended state.
    pub(super) fn set_xsave(&self, area: &[u8; KVM_XSAVE_BYTES]) -> Result<(), EngineError> {
        let area = area.as_ptr() as usize;
        // SAFETY: KVM reads as many bytes as the area has.
        unsafe { self.request("KVM_SET_XSAVE", ioctl::KVM_SET_XSAVE, area) }.map(drop)
    }

    /// A request on the vCPU.
    ///
    /// # Safety
    ///
    /// `argument` must be what `request` expects.
    unsafe fn request(
        &self,
        what: &'static str,
        request: u64,
        argument: usize,
    ) -> Result<usize, EngineError> {
        // SAFETY: forwarded to the caller.
        unsafe { sys::ioctl(self.vcpu.as_raw_fd(), request, argument) }.map_err(|errno| {
            EngineError::Kvm {
                what,
                source: errno.to_io(),
            }
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and the kick byte is valid no longer.
        let _ = unsafe { sys::unmap(self.run.as_ptr().cast(), self.run_len) };
    }
}

/// See [`Machine::segments`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments {
    pub(super) cs: u16,
    pub(super) fs_base: u64,
    pub(super) gs_base: u64,
    pub(super) cr2: u64,
}

impl XState {
    /// The extended state of this CPU under a KVM that offers its guests
    /// `offered`. Where it offers nothing, ring 3 runs on the bare processor
    /// and has what this process has.
    fn of_this_cpu(offered: u64) -> Self {
        /// Their state takes 8 KiB, and a process has to ask for them.
        const AMX_TILES: u64 = 3 << 17;
        const X87_SSE: u64 = 3;
        let own = own_xcr0() & !AMX_TILES;
        let xcr0 = if offered == 0 { own } else { own & offered } | X87_SSE;
        let len = (2..63)
            .filter(|component| xcr0 >> component & 1 == 1)
            .map(|component| {
                let leaf = core::arch::x86_64::__cpuid_count(0xd, component);
                (leaf.eax + leaf.ebx) as usize
            })
            .fold(512 + 64, usize::max);
        Self {
            xcr0,
            len,
            kvm_carries_it: offered != 0 && len <= KVM_XSAVE_BYTES,
        }
    }
}

fn own_xcr0() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if core::arch::x86_64::__cpuid(1).ecx & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: OSXSAVE says that the instruction is there.
    unsafe { core::arch::x86_64::_xgetbv(0) }
}

fn no_cpuid() -> EngineError {
    EngineError::NoMemory {
        what: "a CPUID list",
    }
}

fn plain(
    fd: RawFd,
    what: &'static str,
    request: u64,
    argument: usize,
) -> Result<usize, EngineError> {
    // SAFETY: the requests made here take no pointer.
    unsafe { sys::ioctl_uninterrupted(fd, request, argument) }.map_err(|errno| EngineError::Kvm {
        what,
        source: errno.to_io(),
    })
}

/// A request that makes a descriptor, which is moved out of the program's way.
fn open_device() -> Result<OwnedFd, EngineError> {
    let what = "to open /dev/kvm";
    let mut options = std::fs::File::options();
    let device = options.read(true).write(true).open(DEVICE);
    let device = device.and_then(|device| move_fd_high(device.into()));
    device.map_err(|source| EngineError::Kvm { what, source })
}

fn create(
    fd: RawFd,
    what: &'static str,
    request: u64,
    argument: usize,
) -> Result<OwnedFd, EngineError> {
    let fd = plain(fd, what, request, argument)? as RawFd;
    // SAFETY: KVM has just made it for this caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    move_fd_high(fd).map_err(|source| EngineError::Kvm { what, source })
}

fn map_run(vcpu: RawFd, len: usize) -> Result<NonNull<kvm::kvm_run>, EngineError> {
    const PROT_READ_WRITE: usize = 3;
    const MAP_SHARED: usize = 1;
    let refused = |errno: Errno| EngineError::Kvm {
        what: "a mapping of kvm_run",
        source: errno.to_io(),
    };
    if len < size_of::<kvm::kvm_run>() {
        return Err(refused(Errno::EINVAL));
    }
    let arguments = [0, len, PROT_READ_WRITE, MAP_SHARED, vcpu as usize, 0];
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let address = unsafe { sys::call(sys::nr::MMAP, arguments) }.map_err(refused)?;
    NonNull::new(address as *mut kvm::kvm_run).ok_or_else(|| refused(Errno::ENOMEM))
}

fn segment(selector: u16, type_: u8, l: u8) -> kvm::kvm_segment {
    kvm::kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

/// Control registers (SDM vol. 3, 2.5).
mod control {
    use dune_kvm::probe::Features;

    const PE: u64 = 1 << 0;
    const MP: u64 = 1 << 1;
    const ET: u64 = 1 << 4;
    const NE: u64 = 1 << 5;
    const WP: u64 = 1 << 16;
    const AM: u64 = 1 << 18;
    const PG: u64 = 1 << 31;
    /// AM, so that ring 3 may ask for alignment checks as under Linux.
    pub(super) const CR0: u64 = PE | MP | ET | NE | WP | AM | PG;

    const SCE: u64 = 1 << 0;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    const NXE: u64 = 1 << 11;
    pub(super) const EFER: u64 = SCE | LME | LMA | NXE;

    const PAE: u64 = 1 << 5;
    const OSFXSR: u64 = 1 << 9;
    const OSXMMEXCPT: u64 = 1 << 10;
    const UMIP: u64 = 1 << 11;
    const FSGSBASE: u64 = 1 << 16;
    const OSXSAVE: u64 = 1 << 18;
    const SMEP: u64 = 1 << 20;
    const SMAP: u64 = 1 << 21;

    /// Without PKE: the sandbox has no calls for protection keys, so that a
    /// program which changes PKRU could only lock itself out.
    pub(super) fn cr4(features: &Features) -> u64 {
        [
            (features.umip, UMIP),
            (features.fsgsbase, FSGSBASE),
            (features.xcr0_mask != 0, OSXSAVE),
            (features.smep, SMEP),
            (features.smap, SMAP),
        ]
        .iter()
        .filter(|(present, _)| *present)
        .fold(PAE | OSFXSR | OSXMMEXCPT, |value, (_, bit)| value | bit)
    }
}
