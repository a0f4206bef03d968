//! The probe guest: a VM of six pages and one vCPU.
#![expect(
    unsafe_code,
    reason = "KVM's ioctls and the memory of the probe guest are raw system interfaces"
)]

use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_EXIT_IO, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};

use dune_x86::descriptors::{
    KERNEL_CS, KERNEL_SS, RFLAGS_FIXED, RFLAGS_IOPL, STAR, USER_CS, USER_SS,
};
use dune_x86::regs::{MSR_FMASK, MSR_LSTAR, MSR_STAR};

use super::{
    DEVICE, Depth, ExitName, LOOP_ATTEMPTS, LOOP_ITERATIONS, LOOP_LIMIT, Measurements, ProbeError,
    Weakness,
};
use crate::ioctl;
use crate::sys::{self, Errno};

/// The guest's memory, one page each, at guest physical = guest virtual:
///
/// ```text
/// 0x0000 PML4   0x1000 PDPT   0x2000 PD   0x3000 PT   0x4000 code   0x5000 data
/// ```
///
/// All of it is mapped for both rings, read, write and execute: it holds
/// nothing to protect.
const GUEST_PAGES: usize = 6;
const PAGE: usize = 4096;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// The port that each test writes to when it is done.
const PORT: u8 = 0xd5;

/// `syscall; hlt`
const SYSCALL_AT: u64 = CODE;
/// `mov eax, cs; out PORT, eax`
const LANDING_AT: u64 = CODE + 0x10;
/// `mov ecx, LOOP_ITERATIONS; 1: dec ecx; jnz 1b; out PORT, eax`
const LOOP_AT: u64 = CODE + 0x20;
/// `xorps xmm0, xmm0; movups [rdi], xmm0; out PORT, eax`
const SSE_AT: u64 = CODE + 0x40;

const CODE_PARTS: [(u64, &[u8]); 4] = [
    (SYSCALL_AT, &[0x0f, 0x05, 0xf4]),
    (LANDING_AT, &[0x8c, 0xc8, 0xe7, PORT]),
    (LOOP_AT, &{
        let n = LOOP_ITERATIONS.to_le_bytes();
        [
            0xb9, n[0], n[1], n[2], n[3], 0xff, 0xc9, 0x75, 0xfc, 0xe7, PORT,
        ]
    }),
    (SSE_AT, &[0x0f, 0x57, 0xc0, 0x0f, 0x11, 0x07, 0xe7, PORT]),
];

const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_SCE_LME_LMA: u64 = 1 << 0 | 1 << 8 | 1 << 10;
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ring {
    Kernel,
    User,
}

/// `/dev/kvm`, open.
pub(super) struct Device(Descriptor);

impl Device {
    pub(super) fn open() -> Result<Self, Errno> {
        const AT_FDCWD: usize = -100_isize as usize;
        const O_RDWR_CLOEXEC: usize = 0o2_000_002;
        let path = std::ffi::CString::new(DEVICE).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the path is terminated and outlives the call.
        let fd = unsafe {
            let path = path.as_ptr() as usize;
            sys::call(sys::nr::OPENAT, [AT_FDCWD, path, O_RDWR_CLOEXEC, 0, 0, 0])
        }?;
        Ok(Self(Descriptor(fd as i32)))
    }

    pub(super) fn api_version(&self) -> Result<u32, ProbeError> {
        self.0
            .plain("KVM_GET_API_VERSION", ioctl::KVM_GET_API_VERSION)
            .map(|v| v as u32)
    }

    pub(super) fn supported_cpuid(&self) -> Result<CpuId, ProbeError> {
        const CALL: &str = "KVM_GET_SUPPORTED_CPUID";
        const MOST_ENTRIES: usize = 256;
        let no_memory = |_| ProbeError::Call {
            call: CALL,
            error: Errno::ENOMEM,
        };
        let mut list = CpuId::new(MOST_ENTRIES).map_err(no_memory)?;
        let header = list.as_mut_fam_struct_ptr();
        // SAFETY: the list has room for as many entries as its header says.
        unsafe {
            self.0
                .request(CALL, ioctl::KVM_GET_SUPPORTED_CPUID, header as usize)
        }?;
        // The kernel wrote the number of entries behind the wrapper's back.
        // SAFETY: the header is initialised and alive.
        let filled = unsafe { (*header).nent } as usize;
        CpuId::from_entries(&list.as_slice()[..filled.min(MOST_ENTRIES)]).map_err(no_memory)
    }
}

/// Fields are dropped in order: the vCPU before the VM before the memory that
/// both refer to.
pub(super) struct ProbeGuest {
    run: Mapping,
    vcpu: Descriptor,
    _vm: Descriptor,
    _memory: Mapping,
}

impl ProbeGuest {
    pub(super) fn new(device: &Device, cpuid: &CpuId) -> Result<Self, ProbeError> {
        let vm = Descriptor(device.0.plain("KVM_CREATE_VM", ioctl::KVM_CREATE_VM)? as i32);
        let memory = Mapping::anonymous(GUEST_PAGES * PAGE)?;
        memory.fill_guest();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: (GUEST_PAGES * PAGE) as u64,
            userspace_addr: memory.address as u64,
        };
        const SET_REGION: &str = "KVM_SET_USER_MEMORY_REGION";
        // SAFETY: the memory is this guest's alone and outlives the VM.
        unsafe {
            let region = &raw const region as usize;
            vm.request(SET_REGION, ioctl::KVM_SET_USER_MEMORY_REGION, region)
        }?;
        let vcpu = Descriptor(vm.plain("KVM_CREATE_VCPU", ioctl::KVM_CREATE_VCPU)? as i32);
        let run_size = device
            .0
            .plain("KVM_GET_VCPU_MMAP_SIZE", ioctl::KVM_GET_VCPU_MMAP_SIZE)?;
        if run_size < size_of::<kvm_run>() {
            return Err(ProbeError::Call {
                call: "KVM_GET_VCPU_MMAP_SIZE",
                error: Errno::EINVAL,
            });
        }
        let run = Mapping::shared(&vcpu, run_size)?;
        // SAFETY: the list is as long as it says.
        unsafe {
            let list = cpuid.as_fam_struct_ptr() as usize;
            vcpu.request("KVM_SET_CPUID2", ioctl::KVM_SET_CPUID2, list)
        }?;
        let guest = Self {
            run,
            vcpu,
            _vm: vm,
            _memory: memory,
        };
        guest.set_syscall_msrs()?;
        Ok(guest)
    }

    fn set_syscall_msrs(&self) -> Result<(), ProbeError> {
        const CALL: &str = "KVM_SET_MSRS";
        const COUNT: usize = 3;
        #[repr(C)]
        struct MsrList {
            count: u32,
            pad: u32,
            entries: [kvm_msr_entry; COUNT],
        }
        let entry = |index, data| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        let list = MsrList {
            count: COUNT as u32,
            pad: 0,
            entries: [
                entry(MSR_STAR, STAR),
                entry(MSR_LSTAR, LANDING_AT),
                entry(MSR_FMASK, 0),
            ],
        };
        // SAFETY: the list is as long as it says.
        let set = unsafe {
            self.vcpu
                .request(CALL, ioctl::KVM_SET_MSRS, &raw const list as usize)
        }?;
        if set == COUNT {
            Ok(())
        } else {
            Err(ProbeError::Call {
                call: CALL,
                error: Errno::EINVAL,
            })
        }
    }

    /// The three tests, in the order that decides soonest.
    pub(super) fn tests(
        &mut self,
        depth: Depth,
    ) -> Result<(Option<Weakness>, Measurements), ProbeError> {
        let mut found = Measurements::default();
        let mut weakness = None;
        let enough =
            |weakness: &Option<Weakness>| weakness.is_some() && depth == Depth::UntilDecided;

        let cpl = self.syscall_cpl()?;
        found.syscall_cpl = Some(cpl);
        if cpl != 0 {
            weakness = Some(Weakness::SyscallKeepsRing(cpl));
        }
        if enough(&weakness) {
            return Ok((weakness, found));
        }

        let best = self.ring0_loop()?;
        found.ring0_loop = Some(best);
        if best >= LOOP_LIMIT {
            weakness = weakness.or(Some(Weakness::Ring0Interpreted(best)));
        }
        if enough(&weakness) {
            return Ok((weakness, found));
        }

        // Last, because a vCPU may be of no more use after an internal error.
        let sse = self.ring0_sse()?;
        found.ring0_sse = Some(sse);
        if !sse {
            weakness = weakness.or(Some(Weakness::NoVectorsAtRing0));
        }
        Ok((weakness, found))
    }

    fn syscall_cpl(&mut self) -> Result<u8, ProbeError> {
        const STEP: &str = "at a SYSCALL from ring 3";
        self.place(Ring::User, SYSCALL_AT)?;
        match self.run()? {
            KVM_EXIT_IO => {
                let mut regs = kvm_regs::default();
                // SAFETY: KVM fills the structure.
                unsafe {
                    let regs = &raw mut regs as usize;
                    self.vcpu.request("KVM_GET_REGS", ioctl::KVM_GET_REGS, regs)
                }?;
                Ok((regs.rax & 3) as u8)
            }
            exit => Err(ProbeError::Exit {
                step: STEP,
                exit: ExitName(exit),
            }),
        }
    }

    fn ring0_loop(&mut self) -> Result<Duration, ProbeError> {
        const STEP: &str = "in a loop at ring 0";
        let mut best = Duration::MAX;
        for _ in 0..LOOP_ATTEMPTS {
            self.place(Ring::Kernel, LOOP_AT)?;
            let started = Instant::now();
            let exit = self.run()?;
            best = best.min(started.elapsed());
            if exit != KVM_EXIT_IO {
                return Err(ProbeError::Exit {
                    step: STEP,
                    exit: ExitName(exit),
                });
            }
            if best < LOOP_LIMIT {
                break;
            }
        }
        Ok(best)
    }

    fn ring0_sse(&mut self) -> Result<bool, ProbeError> {
        self.place(Ring::Kernel, SSE_AT)?;
        Ok(self.run()? == KVM_EXIT_IO)
    }

    /// Puts the vCPU into long mode at `rip` in `ring`.
    fn place(&mut self, ring: Ring, rip: u64) -> Result<(), ProbeError> {
        let dpl = if ring == Ring::User { 3 } else { 0 };
        let (code, data) = match ring {
            Ring::Kernel => (KERNEL_CS, KERNEL_SS),
            Ring::User => (USER_CS, USER_SS),
        };
        let segment = |selector, type_, l| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..kvm_segment::default()
        };
        let mut sregs = kvm_sregs::default();
        // SAFETY: KVM fills the structure.
        unsafe {
            let sregs = &raw mut sregs as usize;
            self.vcpu
                .request("KVM_GET_SREGS", ioctl::KVM_GET_SREGS, sregs)
        }?;
        sregs.cs = segment(code, 0xb, 1);
        let data = segment(data, 0x3, 0);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            type_: 0xb,
            present: 1,
            limit: 0x67,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        };
        sregs.gdt = kvm_dtable::default();
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = CR0_PE_MP_ET_NE_WP_PG;
        sregs.cr3 = 0;
        sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
        sregs.efer = EFER_SCE_LME_LMA;
        // SAFETY: KVM reads the structure; the guest reaches its own pages only.
        unsafe {
            let sregs = &raw const sregs as usize;
            self.vcpu
                .request("KVM_SET_SREGS", ioctl::KVM_SET_SREGS, sregs)
        }?;
        let regs = kvm_regs {
            rip,
            rsp: DATA + PAGE as u64 / 2,
            rdi: DATA,
            // IOPL 3 lets ring 3 use `out` without a TSS.
            rflags: RFLAGS_FIXED | if ring == Ring::User { RFLAGS_IOPL } else { 0 },
            ..kvm_regs::default()
        };
        // SAFETY: as above.
        unsafe {
            let regs = &raw const regs as usize;
            self.vcpu.request("KVM_SET_REGS", ioctl::KVM_SET_REGS, regs)
        }?;
        Ok(())
    }

    /// Runs until an exit that is not a signal's and returns its reason.
    fn run(&mut self) -> Result<u32, ProbeError> {
        loop {
            match self.vcpu.plain("KVM_RUN", ioctl::KVM_RUN) {
                Ok(_) => break,
                Err(ProbeError::Call {
                    error: Errno::EINTR | Errno::EAGAIN,
                    ..
                }) => {}
                Err(error) => return Err(error),
            }
        }
        let run = self.run.address.cast::<kvm_run>();
        // SAFETY: `run` maps a whole `kvm_run`, which KVM filled before
        // `KVM_RUN` came back and does not touch now.
        Ok(unsafe { (*run).exit_reason })
    }
}

/// A descriptor of KVM, closed when dropped.
struct Descriptor(i32);

impl Descriptor {
    /// A request that takes no argument.
    fn plain(&self, call: &'static str, request: u64) -> Result<usize, ProbeError> {
        // SAFETY: without an argument, nothing of this process is reached but
        // the memory and the `kvm_run` area of the guest.
        unsafe { self.request(call, request, 0) }
    }

    /// # Safety
    /// `argument` must be what `request` expects.
    unsafe fn request(
        &self,
        call: &'static str,
        request: u64,
        argument: usize,
    ) -> Result<usize, ProbeError> {
        // SAFETY: forwarded to the caller.
        unsafe { sys::ioctl(self.0, request, argument) }
            .map_err(|error| ProbeError::Call { call, error })
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        sys::close(self.0);
    }
}

/// Memory of this process, unmapped when dropped.
struct Mapping {
    address: *mut u8,
    len: usize,
}

impl Mapping {
    fn anonymous(len: usize) -> Result<Self, ProbeError> {
        let address = sys::map_anonymous(len).map_err(|error| ProbeError::Call {
            call: "mmap of the probe guest",
            error,
        })?;
        Ok(Self { address, len })
    }

    fn shared(file: &Descriptor, len: usize) -> Result<Self, ProbeError> {
        const PROT_READ_WRITE: usize = 3;
        const MAP_SHARED: usize = 1;
        let arguments = [0, len, PROT_READ_WRITE, MAP_SHARED, file.0 as usize, 0];
        // SAFETY: no address is given, so that nothing mapped can be replaced.
        let address =
            unsafe { sys::call(sys::nr::MMAP, arguments) }.map_err(|error| ProbeError::Call {
                call: "mmap of kvm_run",
                error,
            })?;
        Ok(Self {
            address: address as *mut u8,
            len,
        })
    }

    /// Writes page tables and code.
    fn fill_guest(&self) {
        const PRESENT_WRITE_USER: u64 = 7;
        let entry = |index: usize, value: u64| {
            assert!(
                index < GUEST_PAGES * PAGE / 8,
                "entry {index} lies outside the guest"
            );
            // SAFETY: just checked.
            let slot = unsafe { self.address.cast::<u64>().add(index) };
            // SAFETY: the slot lies in memory that this object owns.
            unsafe { slot.write(value | PRESENT_WRITE_USER) };
        };
        let table = |number: usize| number * PAGE / 8;
        entry(table(0), 0x1000);
        entry(table(1), 0x2000);
        entry(table(2), 0x3000);
        for page in 0..GUEST_PAGES {
            entry(table(3) + page, (page * PAGE) as u64);
        }
        for (at, bytes) in CODE_PARTS {
            // SAFETY: the parts are short and lie within the code page.
            let to = unsafe { self.address.add(at as usize) };
            // SAFETY: as above, and a slice of constants overlaps no mapping.
            unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this object mapped the range, and nothing borrows from it.
        let _ = unsafe { sys::unmap(self.address, self.len) };
    }
}
