//! KVM's own dirty log: a small virtual machine whose memory is the region writes to it, and
//! `KVM_GET_DIRTY_LOG` tells, and protects the pages again.
//!
//! ```text
//!   guest physical
//!   0x0000_0000   the program and its list of addresses (16 MiB, not logged)
//!   0x1000_0000   the region, logged
//! ```
#![expect(unsafe_code, reason = "KVM's ioctls, the memory of a virtual machine")]

use core::ptr;
use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::Way;
use super::region::{PAGE, Region};
use dune_kvm::sys;
use kvm_bindings as kvm;

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_RUN: u64 = 0xae80;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;

const PROGRAM_BYTES: usize = 16 << 20;
const REGION_AT: u32 = 0x1000_0000;
const CODE_AT: usize = 0x1000;
const LIST_AT: usize = 0x1_0000;
/// Protected mode without paging, by 32 bits: `lodsd; movb $1, (%eax); dec %ecx; jnz; hlt`.
const CODE: [u8; 8] = [0xad, 0xc6, 0x00, 0x01, 0x49, 0x75, 0xf9, 0xf4];

/// See the module documentation.
pub(super) struct KvmLog {
    vcpu: File,
    vm: File,
    program: Region,
    bitmap: Vec<u64>,
}

fn call(file: &File, request: u64, argument: usize) -> Result<usize, String> {
    // SAFETY: the arguments are structures of this function's callers, as the requests want
    // them; the memory that the virtual machine reaches is the region and the program's.
    unsafe { sys::ioctl_uninterrupted(file.as_raw_fd(), request, argument) }
        .map_err(|error| format!("KVM's request {request:#x}: {error}"))
}

fn owned(fd: usize) -> File {
    // SAFETY: a descriptor that KVM has just made, and that nobody else owns.
    unsafe { File::from_raw_fd(fd as i32) }
}

fn memory(vm: &File, slot: u32, flags: u32, at: u32, region: &Region) -> Result<(), String> {
    let slot = kvm::kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: u64::from(at),
        memory_size: region.bytes() as u64,
        userspace_addr: region.start() as u64,
    };
    call(vm, KVM_SET_USER_MEMORY_REGION, &raw const slot as usize).map(drop)
}

impl KvmLog {
    pub(super) fn new(region: &Region) -> Result<Self, String> {
        if LIST_AT + region.pages() * 4 > PROGRAM_BYTES {
            return Err("the range is too large for this benchmark".to_owned());
        }
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| format!("cannot open /dev/kvm: {error}"))?;
        let vm = owned(call(&device, KVM_CREATE_VM, 0)?);
        let program = Region::new(PROGRAM_BYTES);
        // SAFETY: the program's memory, which nobody runs yet.
        unsafe {
            ptr::copy_nonoverlapping(
                CODE.as_ptr(),
                program.start().wrapping_add(CODE_AT),
                CODE.len(),
            );
        }
        memory(&vm, 0, 0, 0, &program)?;
        memory(&vm, 1, kvm::KVM_MEM_LOG_DIRTY_PAGES, REGION_AT, region)?;
        let vcpu = owned(call(&vm, KVM_CREATE_VCPU, 0)?);
        call(&device, KVM_GET_VCPU_MMAP_SIZE, 0)?;
        let mut sregs = kvm::kvm_sregs::default();
        call(&vcpu, KVM_GET_SREGS, &raw mut sregs as usize)?;
        let flat = |type_: u8| kvm::kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 8,
            type_,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(11);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            *segment = flat(3);
        }
        sregs.cr0 |= 1;
        call(&vcpu, KVM_SET_SREGS, &raw const sregs as usize)?;
        let mut way = Self {
            vcpu,
            vm,
            program,
            bitmap: vec![0; region.pages().div_ceil(64)],
        };
        // The first touch of each page is a matter of its own, and so is the program's.
        way.write(region, 1);
        if way.collect() != region.pages() {
            return Err("the log does not show what was written".to_owned());
        }
        Ok(way)
    }
}

impl Way for KvmLog {
    fn arm(&mut self) {}

    fn write(&mut self, region: &Region, step: usize) {
        let list = self.program.start().wrapping_add(LIST_AT).cast::<u32>();
        let mut count = 0;
        for page in (0..region.pages()).step_by(step) {
            let address = REGION_AT + (page * PAGE) as u32;
            // SAFETY: `new` checked that the list has room for every page.
            unsafe { list.wrapping_add(count).write_volatile(address) };
            count += 1;
        }
        let registers = kvm::kvm_regs {
            rip: CODE_AT as u64,
            rsi: LIST_AT as u64,
            rcx: count as u64,
            rflags: 2,
            ..Default::default()
        };
        let started = call(&self.vcpu, KVM_SET_REGS, &raw const registers as usize);
        // Where it fails, the number of pages found says so.
        let _ = started.and_then(|_| call(&self.vcpu, KVM_RUN, 0));
    }

    fn collect(&mut self) -> usize {
        let mut log = kvm::kvm_dirty_log {
            slot: 1,
            ..Default::default()
        };
        log.__bindgen_anon_1.dirty_bitmap = self.bitmap.as_mut_ptr().cast();
        if call(&self.vm, KVM_GET_DIRTY_LOG, &raw const log as usize).is_err() {
            return 0;
        }
        self.bitmap
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }
}

const _: () = assert!(size_of::<kvm::kvm_dirty_log>() == 16);
