//! One virtual CPU: creation, first state, and running.
#![expect(
    unsafe_code,
    reason = "ioctls and the memory that KVM shares with its user"
)]

use core::mem::{size_of, zeroed};
use core::ptr;

use dune_x86::descriptors::{
    KERNEL_CS, KERNEL_SS, STAR, SYSCALL_FLAG_MASK, TSS_SELECTOR, TaskState,
};
use dune_x86::regs;
use kvm_bindings as kvm;

use crate::ioctl;
use crate::sys::{self, Errno};
use crate::vm::{Host, VmError, move_up};

/// Where the structures lie that a CPU in 64-bit mode needs. All addresses are guest
/// virtual, except `cr3`.
#[derive(Clone, Copy, Debug)]
pub struct SystemTables {
    /// Guest physical address of the top-level page table.
    pub cr3: u64,
    /// Global descriptor table.
    pub gdt: u64,
    /// Its size in bytes.
    pub gdt_size: u16,
    /// Interrupt descriptor table.
    pub idt: u64,
    /// Its size in bytes.
    pub idt_size: u16,
    /// Task state segment.
    pub tss: u64,
    /// Limit of the task state segment: its size in bytes less one. Larger than the
    /// structure itself where an I/O permission bitmap follows.
    pub tss_limit: u32,
    /// Where `SYSCALL` goes.
    pub syscall_entry: u64,
    /// GS base in ring 0.
    pub gs_base: u64,
    /// FS base.
    pub fs_base: u64,
}

impl SystemTables {
    /// The limit for a [`TaskState`] with nothing behind it.
    pub const PLAIN_TSS_LIMIT: u32 = size_of::<TaskState>() as u32 - 1;
}

/// One virtual CPU. Closing is explicit ([`close`](Self::close)), since a vCPU outlives the
/// `fork`s and the threads that use it.
#[derive(Debug)]
pub struct Vcpu {
    fd: i32,
    id: u32,
    run: *mut kvm::kvm_run,
    run_size: usize,
}

// SAFETY: the descriptor and the shared area may be used from any thread, one at a time;
// the methods that run or change the vCPU are `unsafe` and say so.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(crate) fn create(vm_fd: i32, id: u32, host: &Host) -> Result<Self, VmError> {
        let refused = |request| move |errno| VmError::Request { request, errno };
        // SAFETY: takes no pointer.
        let fd = unsafe { sys::ioctl_uninterrupted(vm_fd, ioctl::KVM_CREATE_VCPU, id as usize) }
            .map_err(refused("KVM_CREATE_VCPU"))?;
        let fd = move_up(fd as i32);
        const PROT_READ_WRITE: usize = 3;
        const MAP_SHARED: usize = 1;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let run = unsafe {
            sys::call(
                sys::nr::MMAP,
                [
                    0,
                    host.run_size,
                    PROT_READ_WRITE,
                    MAP_SHARED,
                    fd as usize,
                    0,
                ],
            )
        }
        .map_err(refused("a mapping of kvm_run"))
        .inspect_err(|_| sys::close(fd))?;
        const MADV_DONTFORK: usize = 10;
        // A child must not share the area with its parent; failing to say so is harmless.
        // SAFETY: the range was mapped above.
        let _ = unsafe {
            sys::raw(
                sys::nr::MADVISE,
                [run, host.run_size, MADV_DONTFORK, 0, 0, 0],
            )
        };
        let vcpu = Self {
            fd,
            id,
            run: run as *mut kvm::kvm_run,
            run_size: host.run_size,
        };
        // SAFETY: the list is as long as it says.
        unsafe {
            vcpu.request(
                ioctl::KVM_SET_CPUID2,
                host.cpuid.as_fam_struct_ptr() as usize,
            )
        }
        .map_err(refused("KVM_SET_CPUID2"))
        .inspect_err(|_| vcpu.close())?;
        Ok(vcpu)
    }

    /// The vCPU's number within its VM.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The vCPU's descriptor.
    #[must_use]
    pub fn descriptor(&self) -> i32 {
        self.fd
    }

    /// The area shared with KVM.
    #[must_use]
    pub fn run_area(&self) -> *mut kvm::kvm_run {
        self.run
    }

    /// Unmaps the shared area and closes the descriptor.
    pub fn close(&self) {
        // SAFETY: the area was mapped by `create`; its user gives the vCPU up.
        let _ = unsafe { sys::unmap(self.run.cast(), self.run_size) };
        sys::close(self.fd);
    }

    /// After a `fork`, in the child: only the descriptor was inherited.
    pub fn close_inherited(&self) {
        sys::close(self.fd);
    }

    /// A request on the vCPU.
    ///
    /// # Safety
    /// `argument` must be what `request` expects, and the vCPU's user must not be running it.
    #[inline(always)]
    pub unsafe fn request(&self, request: u64, argument: usize) -> Result<usize, Errno> {
        // SAFETY: forwarded to the caller.
        unsafe { sys::ioctl(self.fd, request, argument) }
    }

    /// Puts the vCPU into 64-bit mode at ring 0 with these tables.
    ///
    /// The time stamp counter is the host's own (offset 0), since the vDSO computes the time
    /// from it; extended state is enabled as far as host and KVM both have it; SMEP, SMAP,
    /// FSGSBASE, PCID, protection keys and UMIP are on where the CPU has them.
    ///
    /// # Errors
    /// [`VmError::Request`] names the refused request; [`VmError::Lacks`] a missing feature.
    ///
    /// # Safety
    /// The tables must stay in place for as long as the vCPU may run.
    pub unsafe fn set_up(&self, host: &Host, tables: &SystemTables) -> Result<(), VmError> {
        // SAFETY: forwarded to the caller.
        unsafe { self.set_special_registers(host, tables) }?;
        // SAFETY: as above.
        unsafe { self.set_msrs(tables) }?;
        // SAFETY: as above.
        unsafe { self.set_extended_control(host) }?;
        // SAFETY: as above.
        unsafe { self.set_time() }
    }

    unsafe fn set_special_registers(
        &self,
        host: &Host,
        tables: &SystemTables,
    ) -> Result<(), VmError> {
        let refused = |request| move |errno| VmError::Request { request, errno };
        // SAFETY: plain integers; zero is a value of every field.
        let mut sregs: kvm::kvm_sregs = unsafe { zeroed() };
        // SAFETY: KVM fills the structure.
        unsafe { self.request(ioctl::KVM_GET_SREGS, &raw mut sregs as usize) }
            .map_err(refused("KVM_GET_SREGS"))?;
        sregs.cr0 = cr0::FOR_64_BIT;
        sregs.cr3 = tables.cr3;
        sregs.cr4 = cr4::for_cpu(host)?;
        sregs.efer = efer::FOR_64_BIT;
        sregs.cs = code_segment(KERNEL_CS);
        sregs.ss = data_segment(KERNEL_SS);
        sregs.ds = data_segment(0);
        sregs.es = data_segment(0);
        sregs.fs = kvm::kvm_segment {
            base: tables.fs_base,
            ..data_segment(0)
        };
        sregs.gs = kvm::kvm_segment {
            base: tables.gs_base,
            ..data_segment(0)
        };
        sregs.tr = kvm::kvm_segment {
            base: tables.tss,
            limit: tables.tss_limit,
            selector: TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        // After a reset it is a table of 64 KiB at address 0, where ring 3 may have memory:
        // without SMAP it would make itself a call gate there.
        sregs.ldt = kvm::kvm_segment {
            unusable: 1,
            ..Default::default()
        };
        sregs.gdt.base = tables.gdt;
        sregs.gdt.limit = tables.gdt_size - 1;
        sregs.idt.base = tables.idt;
        sregs.idt.limit = tables.idt_size - 1;
        // SAFETY: KVM reads the structure.
        unsafe { self.request(ioctl::KVM_SET_SREGS, &raw const sregs as usize) }
            .map_err(refused("KVM_SET_SREGS"))?;
        Ok(())
    }

    unsafe fn set_msrs(&self, tables: &SystemTables) -> Result<(), VmError> {
        #[repr(C)]
        struct MsrList {
            count: u32,
            pad: u32,
            entries: [kvm::kvm_msr_entry; 6],
        }
        let entry = |index, data| kvm::kvm_msr_entry {
            index,
            reserved: 0,
            data,
        };
        let list = MsrList {
            count: 6,
            pad: 0,
            entries: [
                entry(regs::MSR_STAR, STAR),
                entry(regs::MSR_LSTAR, tables.syscall_entry),
                entry(regs::MSR_CSTAR, 0),
                entry(regs::MSR_FMASK, SYSCALL_FLAG_MASK),
                entry(regs::MSR_PAT, regs::PAT_LINUX),
                entry(regs::MSR_KERNEL_GS_BASE, 0),
            ],
        };
        // SAFETY: the list is as long as it says.
        let set = unsafe { self.request(ioctl::KVM_SET_MSRS, &raw const list as usize) };
        match set {
            Ok(6) => Ok(()),
            Ok(_) => Err(VmError::Request {
                request: "KVM_SET_MSRS",
                errno: Errno::EINVAL,
            }),
            Err(errno) => Err(VmError::Request {
                request: "KVM_SET_MSRS",
                errno,
            }),
        }
    }

    unsafe fn set_extended_control(&self, host: &Host) -> Result<(), VmError> {
        // SAFETY: plain integers; zero is a value of every field.
        let mut xcrs: kvm::kvm_xcrs = unsafe { zeroed() };
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].value = host.xcr0;
        // SAFETY: KVM reads the structure.
        unsafe { self.request(ioctl::KVM_SET_XCRS, &raw const xcrs as usize) }
            .map(drop)
            .map_err(|errno| VmError::Request {
                request: "KVM_SET_XCRS",
                errno,
            })
    }

    unsafe fn set_time(&self) -> Result<(), VmError> {
        let offset = 0_u64;
        let attribute = kvm::kvm_device_attr {
            group: kvm::KVM_VCPU_TSC_CTRL,
            attr: u64::from(kvm::KVM_VCPU_TSC_OFFSET),
            addr: &raw const offset as u64,
            ..Default::default()
        };
        // SAFETY: the attribute points to the 8 bytes that this attribute is.
        unsafe { self.request(ioctl::KVM_SET_DEVICE_ATTR, &raw const attribute as usize) }
            .map(drop)
            .map_err(|_| VmError::Lacks("a settable TSC offset (Linux 5.16 or later)"))
    }

    /// All general registers.
    ///
    /// # Errors
    /// As the kernel says; `EIO` after a `fork`.
    ///
    /// # Safety
    /// The vCPU must not be running.
    pub unsafe fn registers(&self) -> Result<kvm::kvm_regs, Errno> {
        // SAFETY: plain integers; KVM fills the structure.
        let mut registers = unsafe { zeroed() };
        // SAFETY: as above.
        unsafe { self.request(ioctl::KVM_GET_REGS, &raw mut registers as usize) }?;
        Ok(registers)
    }

    /// Sets all general registers.
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// The vCPU must not be running, and will continue with these.
    pub unsafe fn set_registers(&self, registers: &kvm::kvm_regs) -> Result<(), Errno> {
        // SAFETY: KVM reads the structure.
        unsafe { self.request(ioctl::KVM_SET_REGS, ptr::from_ref(registers) as usize) }.map(drop)
    }

    /// Segment, control and table registers.
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// The vCPU must not be running.
    pub unsafe fn special_registers(&self) -> Result<kvm::kvm_sregs, Errno> {
        // SAFETY: plain integers; KVM fills the structure.
        let mut registers = unsafe { zeroed() };
        // SAFETY: as above.
        unsafe { self.request(ioctl::KVM_GET_SREGS, &raw mut registers as usize) }?;
        Ok(registers)
    }

    /// Sets segment, control and table registers.
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// The vCPU must not be running, and will continue with these.
    pub unsafe fn set_special_registers_raw(
        &self,
        registers: &kvm::kvm_sregs,
    ) -> Result<(), Errno> {
        // SAFETY: KVM reads the structure.
        unsafe { self.request(ioctl::KVM_SET_SREGS, ptr::from_ref(registers) as usize) }.map(drop)
    }

    /// Copies the extended state of another vCPU of this process.
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// Neither vCPU may be running, and `area` must be 4096 bytes for the passage.
    pub unsafe fn save_extended_state(&self, area: *mut [u8; 4096]) -> Result<(), Errno> {
        // SAFETY: KVM writes 4096 bytes.
        unsafe { self.request(ioctl::KVM_GET_XSAVE, area as usize) }.map(drop)
    }

    /// The counterpart of [`save_extended_state`](Self::save_extended_state).
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn restore_extended_state(&self, area: *const [u8; 4096]) -> Result<(), Errno> {
        // SAFETY: KVM reads 4096 bytes.
        unsafe { self.request(ioctl::KVM_SET_XSAVE, area as usize) }.map(drop)
    }

    /// Drops every exception and interrupt that waits for the guest.
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// The vCPU must not be running.
    pub unsafe fn clear_events(&self) -> Result<(), Errno> {
        // SAFETY: plain integers; zero means that nothing waits.
        let events: kvm::kvm_vcpu_events = unsafe { zeroed() };
        // SAFETY: KVM reads the structure.
        unsafe { self.request(ioctl::KVM_SET_VCPU_EVENTS, &raw const events as usize) }.map(drop)
    }

    /// Injects a page fault, as though the instruction at the guest's `rip` had raised it.
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// The vCPU must have stopped at that instruction.
    pub unsafe fn inject_page_fault(&self, address: u64, error: u32) -> Result<(), Errno> {
        // SAFETY: forwarded to the caller.
        let mut sregs = unsafe { self.special_registers() }?;
        sregs.cr2 = address;
        // SAFETY: as above.
        unsafe { self.set_special_registers_raw(&sregs) }?;
        // SAFETY: plain integers; KVM fills the structure.
        let mut events: kvm::kvm_vcpu_events = unsafe { zeroed() };
        // SAFETY: as above.
        unsafe { self.request(ioctl::KVM_GET_VCPU_EVENTS, &raw mut events as usize) }?;
        events.exception.injected = 1;
        events.exception.nr = dune_x86::trap::vector::PAGE_FAULT;
        events.exception.has_error_code = 1;
        events.exception.error_code = error;
        events.flags = 0;
        // SAFETY: KVM reads the structure.
        unsafe { self.request(ioctl::KVM_SET_VCPU_EVENTS, &raw const events as usize) }.map(drop)
    }

    /// Queues an external interrupt. The guest must be ready for it
    /// (`ready_for_interrupt_injection` and `if_flag` of the shared area).
    ///
    /// # Errors
    /// As the kernel says.
    ///
    /// # Safety
    /// The guest's interrupt table must handle `vector`.
    pub unsafe fn interrupt(&self, vector: u8) -> Result<(), Errno> {
        let irq = u32::from(vector);
        // SAFETY: KVM reads four bytes.
        unsafe { self.request(ioctl::KVM_INTERRUPT, &raw const irq as usize) }.map(drop)
    }

    /// Enters the guest until the next exit. The reason is in the shared area.
    ///
    /// # Errors
    /// `EINTR` when a signal is pending or `immediate_exit` is set; `EFAULT` when the guest
    /// touched memory that the host side does not have or forbids.
    ///
    /// # Safety
    /// Everything that the guest can reach may change.
    #[inline(always)]
    pub unsafe fn run(&self) -> Result<usize, Errno> {
        // SAFETY: forwarded to the caller.
        unsafe { self.request(ioctl::KVM_RUN, 0) }
    }
}

fn code_segment(selector: u16) -> kvm::kvm_segment {
    kvm::kvm_segment {
        type_: 11,
        l: 1,
        ..flat_segment(selector)
    }
}

fn data_segment(selector: u16) -> kvm::kvm_segment {
    kvm::kvm_segment {
        type_: 3,
        db: 1,
        ..flat_segment(selector)
    }
}

fn flat_segment(selector: u16) -> kvm::kvm_segment {
    kvm::kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        present: 1,
        dpl: 0,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Control register 0 (SDM vol. 3, 2.5).
mod cr0 {
    const PE: u64 = 1 << 0;
    const MP: u64 = 1 << 1;
    const ET: u64 = 1 << 4;
    const NE: u64 = 1 << 5;
    const WP: u64 = 1 << 16;
    const AM: u64 = 1 << 18;
    const PG: u64 = 1 << 31;
    pub(super) const FOR_64_BIT: u64 = PE | MP | ET | NE | WP | AM | PG;
}

/// Extended feature enable register (APM vol. 2, 3.1.7).
mod efer {
    const SCE: u64 = 1 << 0;
    const LME: u64 = 1 << 8;
    const LMA: u64 = 1 << 10;
    const NXE: u64 = 1 << 11;
    pub(super) const FOR_64_BIT: u64 = SCE | LME | LMA | NXE;
}

/// Control register 4 (SDM vol. 3, 2.5).
mod cr4 {
    use super::{Host, VmError};

    const PAE: u64 = 1 << 5;
    const PGE: u64 = 1 << 7;
    const OSFXSR: u64 = 1 << 9;
    const OSXMMEXCPT: u64 = 1 << 10;
    const UMIP: u64 = 1 << 11;
    const FSGSBASE: u64 = 1 << 16;
    const PCIDE: u64 = 1 << 17;
    const OSXSAVE: u64 = 1 << 18;
    const SMEP: u64 = 1 << 20;
    const SMAP: u64 = 1 << 21;
    const PKE: u64 = 1 << 22;

    pub(super) fn for_cpu(host: &Host) -> Result<u64, VmError> {
        let (_, leaf7_b, leaf7_c, _) = host.leaf(7, 0);
        let (_, _, leaf1_c, _) = host.leaf(1, 0);
        let mut value = PAE | PGE | OSFXSR | OSXMMEXCPT | OSXSAVE;
        if leaf7_b & 1 == 0 {
            return Err(VmError::Lacks("FSGSBASE"));
        }
        value |= FSGSBASE;
        for (present, bit) in [
            (leaf7_b & (1 << 7) != 0, SMEP),
            (leaf7_b & (1 << 20) != 0, SMAP),
            (leaf7_c & (1 << 2) != 0, UMIP),
            (leaf7_c & (1 << 3) != 0, PKE),
            (leaf1_c & (1 << 17) != 0, PCIDE),
        ] {
            if present {
                value |= bit;
            }
        }
        Ok(value)
    }
}
