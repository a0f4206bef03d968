//! A virtual machine that is a piece of this process: its memory slots are windows over the
//! process's own addresses.
#![expect(unsafe_code, reason = "ioctls on descriptors owned here")]

use core::mem::size_of;
use core::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use kvm_bindings as kvm;
use kvm_bindings::CpuId;

use crate::ioctl;
use crate::sys::{self, Errno};
use crate::vcpu::Vcpu;
use crate::windows::{Claim, WINDOW_SHIFT, WINDOW_SIZE, Windows};

const DEVICE: &core::ffi::CStr = c"/dev/kvm";
/// Linux keeps the last page of the lower half to itself, and refuses a slot over it.
const USER_SPACE_END: u64 = (1 << 47) - 4096;
/// In the GiB of guest physical space that is never given out; only CPUs without
/// "unrestricted guest" ever use it.
const TSS_ADDRESS: usize = 0xfffb_d000;
const MAX_CPUID_ENTRIES: usize = 256;

/// Why a VM could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm ({0}); run `dune check` for the remedy")]
    Open(Errno),
    /// A request on the VM or on KVM itself failed.
    #[error("KVM refused {request} ({errno}); run `dune check` for what this machine offers")]
    Request {
        /// The name of the request.
        request: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The guest physical address space is used up.
    #[error(
        "no guest physical address space is left for {address:#x}: {windows} windows of 1 GiB are in use"
    )]
    Full {
        /// The host virtual address that needed a window.
        address: u64,
        /// How many windows there are.
        windows: usize,
    },
    /// The CPU lacks something without which a process cannot run in ring 0.
    #[error("this CPU, or its KVM, does not offer {0}, which Dune mode needs")]
    Lacks(&'static str),
}

/// What every vCPU of this machine is given, read once.
#[derive(Debug)]
pub struct Host {
    /// CPUID as KVM supports it.
    pub cpuid: CpuId,
    /// Extended state components that host and KVM both support, without the AMX tiles
    /// (which need a permission that a process asks for by itself).
    pub xcr0: u64,
    /// Size in bytes of an XSAVE area, standard format, for `xcr0`.
    pub xsave_size: u32,
    /// Guest physical address bits.
    pub physical_bits: u32,
    /// Size of the shared `kvm_run` area in bytes.
    pub run_size: usize,
}

impl Host {
    /// Registers of a CPUID leaf as the guest will see it; zeros where KVM lists none.
    #[must_use]
    pub fn leaf(&self, function: u32, index: u32) -> (u32, u32, u32, u32) {
        self.cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && (e.index == index || e.flags & 1 == 0))
            .map_or((0, 0, 0, 0), |e| (e.eax, e.ebx, e.ecx, e.edx))
    }

    fn read(kvm_fd: i32) -> Result<Self, VmError> {
        let mut cpuid = CpuId::new(MAX_CPUID_ENTRIES).map_err(|_| VmError::Request {
            request: "a CPUID list",
            errno: Errno::ENOMEM,
        })?;
        // SAFETY: the list has room for as many entries as it says.
        unsafe {
            sys::ioctl_uninterrupted(
                kvm_fd,
                ioctl::KVM_GET_SUPPORTED_CPUID,
                cpuid.as_mut_fam_struct_ptr() as usize,
            )
        }
        .map_err(|errno| VmError::Request {
            request: "KVM_GET_SUPPORTED_CPUID",
            errno,
        })?;
        // The kernel wrote how many entries it filled in; the wrapper has to learn it.
        // SAFETY: the pointer is valid for as long as the wrapper lives.
        let filled = unsafe { (*cpuid.as_fam_struct_ptr()).nent } as usize;
        let entries: Vec<_> = cpuid.as_slice().iter().copied().take(filled).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| VmError::Request {
            request: "a CPUID list",
            errno: Errno::ENOMEM,
        })?;
        // SAFETY: takes no pointer.
        let run_size =
            unsafe { sys::ioctl_uninterrupted(kvm_fd, ioctl::KVM_GET_VCPU_MMAP_SIZE, 0) }.map_err(
                |errno| VmError::Request {
                    request: "KVM_GET_VCPU_MMAP_SIZE",
                    errno,
                },
            )?;
        let mut host = Self {
            cpuid,
            xcr0: 0,
            xsave_size: 0,
            physical_bits: 36,
            run_size,
        };
        if host.leaf(1, 0).2 & (1 << 26) == 0 || !has_osxsave() {
            return Err(VmError::Lacks("XSAVE"));
        }
        const AMX_TILES: u64 = 3 << 17;
        let (low, _, _, high) = host.leaf(0xd, 0);
        // SAFETY: OSXSAVE was checked above.
        let own = unsafe { core::arch::x86_64::_xgetbv(0) };
        host.xcr0 = own & (u64::from(high) << 32 | u64::from(low)) & !AMX_TILES;
        host.xsave_size = host.standard_xsave_size();
        host.physical_bits = (host.leaf(0x8000_0008, 0).0 & 0xff).clamp(36, 52);
        Ok(host)
    }

    fn standard_xsave_size(&self) -> u32 {
        const LEGACY_AND_HEADER: u32 = 512 + 64;
        (2..63)
            .filter(|bit| self.xcr0 & (1 << bit) != 0)
            .map(|bit| {
                let (size, offset, _, _) = self.leaf(0xd, bit);
                offset + size
            })
            .fold(LEGACY_AND_HEADER, u32::max)
    }
}

fn has_osxsave() -> bool {
    core::arch::x86_64::__cpuid(1).ecx & (1 << 27) != 0
}

/// A virtual machine over this process's memory.
///
/// A VM belongs to the memory map that created it: after `fork` every request in the child
/// fails with `EIO`, and the child calls [`renew`](Self::renew). All other methods may be
/// called by any thread at any time, on either side of an entry.
#[derive(Debug)]
pub struct Vm {
    kvm_fd: AtomicI32,
    vm_fd: AtomicI32,
    next_vcpu: AtomicU32,
    windows: Windows,
    host: Host,
}

impl Vm {
    /// Opens `/dev/kvm` and creates a VM without memory and without vCPUs.
    ///
    /// # Errors
    /// [`VmError`], which names the request that failed.
    pub fn new() -> Result<Self, VmError> {
        Self::with_physical_bits(52)
    }

    /// The same, using at most `limit` bits of guest physical address: what a smaller CPU
    /// would offer.
    ///
    /// # Errors
    /// [`VmError`], which names the request that failed.
    pub fn with_physical_bits(limit: u32) -> Result<Self, VmError> {
        let kvm_fd = open_device().map_err(VmError::Open)?;
        let host = Host::read(kvm_fd).inspect_err(|_| sys::close(kvm_fd))?;
        let vm_fd = create_vm(kvm_fd).inspect_err(|_| sys::close(kvm_fd))?;
        Ok(Self {
            kvm_fd: AtomicI32::new(kvm_fd),
            vm_fd: AtomicI32::new(vm_fd),
            next_vcpu: AtomicU32::new(0),
            windows: Windows::new(host.physical_bits.min(limit).max(36)),
            host,
        })
    }

    /// What every vCPU of this machine is given.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The table of windows.
    #[must_use]
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// The VM's descriptor and that of `/dev/kvm`, which a program must not close.
    #[must_use]
    pub fn descriptors(&self) -> [i32; 2] {
        [
            self.kvm_fd.load(Ordering::Relaxed),
            self.vm_fd.load(Ordering::Relaxed),
        ]
    }

    /// Makes sure that a window covers `host`, and returns the guest physical address of
    /// `host`'s GiB and whether the window is new.
    ///
    /// # Errors
    /// [`VmError::Full`] when guest physical space is used up; [`VmError::Request`].
    pub fn ensure_window(&self, host: u64) -> Result<(u64, Fresh), VmError> {
        self.ensure_window_with(host, |_| Ok(()))
    }

    /// The same. `show` enters a new window, whose guest physical address it is given, into
    /// the page tables: before any other thread can find the window, so that a window that
    /// is found can be used. It must not ask for windows itself.
    ///
    /// # Errors
    /// As [`ensure_window`](Self::ensure_window), and those of `show`; then there is no
    /// window.
    pub fn ensure_window_with<E: From<VmError>>(
        &self,
        host: u64,
        show: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<(u64, Fresh), E> {
        let frame = loop {
            match self.windows.claim(host) {
                Claim::Present(frame) => return Ok((u64::from(frame) << WINDOW_SHIFT, Fresh::No)),
                Claim::Busy => sys::sched_yield(),
                Claim::Full => {
                    return Err(E::from(VmError::Full {
                        address: host,
                        windows: self.windows.capacity(),
                    }));
                }
                Claim::Mine(frame) => break frame,
            }
        };
        let guest = u64::from(frame) << WINDOW_SHIFT;
        if let Err(errno) = self.set_slot(frame, host, WINDOW_SIZE) {
            self.windows.abandon(host, frame);
            return Err(E::from(VmError::Request {
                request: "KVM_SET_USER_MEMORY_REGION",
                errno,
            }));
        }
        if let Err(error) = show(guest) {
            let _ = self.set_slot(frame, host, 0);
            self.windows.abandon(host, frame);
            return Err(error);
        }
        self.windows.publish(host, frame);
        Ok((guest, Fresh::Yes))
    }

    /// Gives back a window that was taken by [`Windows::begin_release`]: no translation finds
    /// it any more, and a thread that asks for it waits in
    /// [`ensure_window`](Self::ensure_window). `hide` takes it out of the page tables; KVM
    /// flushes what CPUs remember of it.
    ///
    /// Removing a slot makes KVM (Linux 6.1) forget the second-level entries of all of them,
    /// so do it seldom, and to many at a time.
    pub fn finish_release(&self, host: u64, frame: u16, hide: impl FnOnce()) {
        hide();
        let _ = self.set_slot(frame, host, 0);
        self.windows.abandon(host, frame);
    }

    fn set_slot(&self, frame: u16, host: u64, size: u64) -> Result<(), Errno> {
        let start = host & !(WINDOW_SIZE - 1);
        let region = kvm::kvm_userspace_memory_region {
            slot: u32::from(frame),
            flags: 0,
            guest_phys_addr: u64::from(frame) << WINDOW_SHIFT,
            memory_size: size.min(USER_SPACE_END.saturating_sub(start)),
            userspace_addr: start,
        };
        // SAFETY: the guest may reach this process's whole memory by design; what it may do
        // there is decided by the guest's own page tables.
        unsafe {
            sys::ioctl_uninterrupted(
                self.vm_fd.load(Ordering::Relaxed),
                ioctl::KVM_SET_USER_MEMORY_REGION,
                &raw const region as usize,
            )
        }
        .map(drop)
    }

    /// Makes every vCPU forget all translations, those that are not running included. Dear:
    /// for edits made while no vCPU runs that could do it by itself.
    ///
    /// A slot comes and goes: KVM drops every second-level entry, and with them whatever was
    /// translated through them.
    pub fn flush_every_vcpu(&self) {
        const UNUSED_FRAME: u16 = 0;
        let somewhere = &raw const *self as u64 & !(WINDOW_SIZE - 1);
        if self.set_slot(UNUSED_FRAME, somewhere, 4096).is_ok() {
            let _ = self.set_slot(UNUSED_FRAME, somewhere, 0);
        }
    }

    /// Creates one more vCPU. vCPUs cannot be destroyed before their VM is: pool them.
    ///
    /// # Errors
    /// [`VmError::Request`]; KVM's limit is 1,024 on kernels before 6.4 and 4,096 after.
    pub fn create_vcpu(&self) -> Result<Vcpu, VmError> {
        let id = self.next_vcpu.fetch_add(1, Ordering::Relaxed);
        Vcpu::create(self.vm_fd.load(Ordering::Relaxed), id, &self.host)
    }

    /// In the child of a `fork`: closes what was inherited of the parent's VM and creates a
    /// new one with the same windows. The vCPUs are the caller's to close and create anew.
    /// `hide` takes out of the page tables what another thread was setting up or taking
    /// apart at the moment of the `fork`.
    ///
    /// # Errors
    /// [`VmError::Request`].
    pub fn renew(&self, hide: impl FnMut(u64)) -> Result<(), VmError> {
        sys::close(self.vm_fd.load(Ordering::Relaxed));
        self.vm_fd.store(-1, Ordering::Relaxed);
        self.next_vcpu.store(0, Ordering::Relaxed);
        self.windows.drop_stale_claims(hide);
        self.vm_fd.store(
            create_vm(self.kvm_fd.load(Ordering::Relaxed))?,
            Ordering::Relaxed,
        );
        for (host, frame) in self.windows.iter() {
            self.set_slot(frame, host, WINDOW_SIZE)
                .map_err(|errno| VmError::Request {
                    request: "KVM_SET_USER_MEMORY_REGION",
                    errno,
                })?;
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for fd in self.descriptors() {
            sys::close(fd);
        }
    }
}

/// Whether a window had to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// It was made just now.
    Yes,
    /// It was there.
    No,
}

/// Descriptors live above what programs use by habit (shells, `select`), and close on
/// `execve`.
const FIRST_DESCRIPTOR: usize = 900;

/// Moves a descriptor out of the way of the program's own.
pub(crate) fn move_up(fd: i32) -> i32 {
    const F_DUPFD_CLOEXEC: usize = 1030;
    // SAFETY: duplicating a descriptor touches no memory.
    let moved = unsafe {
        sys::call(
            sys::nr::FCNTL,
            [fd as usize, F_DUPFD_CLOEXEC, FIRST_DESCRIPTOR, 0, 0, 0],
        )
    };
    match moved {
        Ok(high) => {
            sys::close(fd);
            high as i32
        }
        Err(_) => fd,
    }
}

fn open_device() -> Result<i32, Errno> {
    const AT_FDCWD: usize = -100_isize as usize;
    const O_RDWR_CLOEXEC: usize = 2 | 0o2_000_000;
    // SAFETY: the path is a terminated string.
    unsafe {
        sys::call(
            sys::nr::OPENAT,
            [AT_FDCWD, DEVICE.as_ptr() as usize, O_RDWR_CLOEXEC, 0, 0, 0],
        )
    }
    .map(|fd| move_up(fd as i32))
}

fn create_vm(kvm_fd: i32) -> Result<i32, VmError> {
    // SAFETY: takes no pointer.
    let fd =
        unsafe { sys::ioctl_uninterrupted(kvm_fd, ioctl::KVM_CREATE_VM, 0) }.map_err(|errno| {
            VmError::Request {
                request: "KVM_CREATE_VM",
                errno,
            }
        })?;
    let fd = move_up(fd as i32);
    // Only CPUs without "unrestricted guest" need it, and other vendors' KVM may not know it.
    // SAFETY: an address in guest physical space, where no window is ever made.
    let _ = unsafe { sys::ioctl_uninterrupted(fd, ioctl::KVM_SET_TSS_ADDR, TSS_ADDRESS) };
    Ok(fd)
}

const _: () = assert!(size_of::<kvm::kvm_userspace_memory_region>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    /// Where address space randomisation may put a stack.
    #[test]
    fn the_last_gib_of_user_space_can_be_a_window() {
        let Ok(vm) = Vm::new() else {
            println!("ignored: no usable /dev/kvm here");
            return;
        };
        vm.ensure_window((1 << 47) - 8192).unwrap();
        vm.ensure_window(0).unwrap();
    }
}
