//! New threads and processes from inside Dune mode.
//!
//! * A task that shares the memory (`pthread_create`, `vfork`, `posix_spawn`) may use the
//!   same VM: it gets an area with a vCPU of its own, which starts with the registers of its
//!   creator where the system call returns.
//! * A task with a copy of the memory (`fork`) may not: a VM belongs to the memory map that
//!   created it. The child makes itself a new VM with the same windows, and a vCPU with the
//!   registers read from the parent's before the fork.
#![expect(unsafe_code, reason = "clone")]

use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use dune_kvm::sys::{self, Errno, nr};
use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::arch;
use crate::error::EnterError;
use crate::host::{base, run};
use crate::machine::Machine;
use crate::memory::identity::high;
use crate::report;
use crate::signals::{AltStack, MASK_SET, PROCESS_SIGNALS, change_mask};
use crate::thread::{HOST_STACK, ThreadArea, USED};

const CLONE_VM: u64 = 0x100;
const CLONE_SIGHAND: u64 = 0x800;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_SETTLS: u64 = 0x8_0000;
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
/// The call is made again after a handler has run (see [`arch::RESTART`]).
const RESTARTED: Errno = Errno(-arch::RESTART as i32);
const SIGCHLD: u64 = 17;

/// `struct clone_args`, as far as any kernel knows it, with room for what is to come.
const CLONE_ARGS_WORDS: usize = 16;
const CLONE_ARGS_FIRST: usize = 64;

/// A call of the family, in one shape.
struct Request {
    flags: u64,
    /// Stack pointer of the child in the guest; 0 keeps the parent's.
    stack: u64,
    tls: u64,
    call: Call,
}

enum Call {
    /// `clone`: flags, stack, parent's tid, child's tid, tls.
    Clone([usize; 5]),
    /// `clone3`: the structure and its size.
    Clone3([u64; CLONE_ARGS_WORDS], usize),
}

/// Executes `fork`, `vfork`, `clone` or `clone3`.
pub(crate) fn system_call(this: &mut ThreadArea) -> isize {
    let result = Request::read(this.number, &this.arguments).and_then(|request| {
        if request.flags & CLONE_VM != 0 {
            share_memory(this, request)
        } else {
            copy_memory(this, request)
        }
    });
    match result {
        Ok(task) => task as isize,
        Err(errno) => -(errno.0 as isize),
    }
}

impl Request {
    fn read(number: usize, arguments: &[usize; 6]) -> Result<Self, Errno> {
        let [a0, a1, a2, a3, a4, _] = *arguments;
        let clone = |flags: u64, stack: usize, [parent, child, tls]: [usize; 3]| Self {
            flags,
            stack: stack as u64,
            tls: tls as u64,
            call: Call::Clone([flags as usize, stack, parent, child, tls]),
        };
        match number {
            nr::FORK => Ok(clone(SIGCHLD, 0, [0; 3])),
            nr::VFORK => Ok(clone(CLONE_VM | CLONE_VFORK | SIGCHLD, 0, [0; 3])),
            nr::CLONE => Ok(clone(a0 as u32 as u64, a1, [a2, a3, a4])),
            _ => {
                const E2BIG: Errno = Errno(7);
                if a1 < CLONE_ARGS_FIRST {
                    return Err(Errno::EINVAL);
                }
                if a1 > CLONE_ARGS_WORDS * 8 {
                    return Err(E2BIG);
                }
                let mut bytes = [0; CLONE_ARGS_WORDS * 8];
                sys::read_memory(a0 as u64, &mut bytes[..a1])?;
                let mut words = [0; CLONE_ARGS_WORDS];
                for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                    let mut le = [0; 8];
                    le.copy_from_slice(chunk);
                    *word = u64::from_le_bytes(le);
                }
                let [flags, _, _, _, _, stack, stack_size, tls, ..] = words;
                Ok(Self {
                    flags,
                    stack: stack.wrapping_add(stack_size),
                    tls,
                    call: Call::Clone3(words, a1),
                })
            }
        }
    }

    /// Makes the call. With `child`, the new task starts on that area's host stack in
    /// [`child_start`]; without, it returns here too.
    fn make(&mut self, child: Option<&mut ThreadArea>) -> isize {
        let (stack, area) = match child {
            Some(area) => (area.host_rsp, area as *mut ThreadArea),
            None => (0, core::ptr::null_mut()),
        };
        match &mut self.call {
            Call::Clone(arguments) => {
                arguments[1] = stack as usize;
                // SAFETY: the program's own call; the child's stack is an area's.
                unsafe { arch::dune_host_clone(nr::CLONE, arguments, area) }
            }
            Call::Clone3(words, size) => {
                if stack == 0 {
                    words[5] = 0;
                    words[6] = 0;
                } else {
                    words[5] = stack - HOST_STACK as u64;
                    words[6] = HOST_STACK as u64;
                }
                let arguments = [words.as_ptr() as usize, *size, 0, 0, 0];
                // SAFETY: as above.
                unsafe { arch::dune_host_clone(nr::CLONE3, &arguments, area) }
            }
        }
    }
}

fn enter_to_errno(error: &EnterError) -> Errno {
    match error {
        EnterError::Memory(errno) => *errno,
        _ => Errno::EAGAIN,
    }
}

/// Blocks every signal until the new task has its own state, and returns the mask before. A
/// signal that was captured just before that comes first: the new task must have neither the
/// mask of the capture nor the signal.
fn block_signals(this: &ThreadArea) -> Result<u64, Errno> {
    let mask = change_mask(MASK_SET, u64::MAX);
    if this.pending.load(Ordering::Relaxed) != 0 {
        return Err(RESTARTED);
    }
    Ok(mask)
}

fn share_memory(this: &mut ThreadArea, request: Request) -> Result<usize, Errno> {
    let machine = Machine::get().ok_or(Errno::EIO)?;
    let mask = block_signals(this)?;
    let result = share_memory_quietly(this, machine, request, mask);
    change_mask(MASK_SET, mask);
    result
}

fn share_memory_quietly(
    this: &ThreadArea,
    machine: &Machine,
    mut request: Request,
    mask: u64,
) -> Result<usize, Errno> {
    let (child, _) = ThreadArea::acquire(machine).map_err(|e| enter_to_errno(&e))?;
    // SAFETY: the area is ours until the child starts.
    let area = unsafe { &mut *child.as_ptr() };
    if let Err(errno) = prepare_child(this, area, machine, &request) {
        ThreadArea::release(child.as_ptr());
        return Err(errno);
    }
    area.start_mask = mask;
    let vfork = request.flags & CLONE_VFORK != 0;
    let task = request.make(Some(area));
    // From here on the area is the child's, or already somebody else's.
    // After a vfork the child is gone, or runs another program.
    if vfork || task < 0 {
        ThreadArea::release(child.as_ptr());
    }
    sys::check(task)
}

fn prepare_child(
    this: &ThreadArea,
    area: &mut ThreadArea,
    machine: &Machine,
    request: &Request,
) -> Result<(), Errno> {
    let vcpu = this.vcpu.as_ref().ok_or(Errno::EIO)?;
    // SAFETY: the creator's vCPU is stopped.
    let mut registers = unsafe { vcpu.registers() }?;
    // SAFETY: as above.
    let sregs = unsafe { vcpu.special_registers() }?;
    continue_after_call(&mut registers, request.stack);
    area.fs_base = if request.flags & CLONE_SETTLS != 0 {
        request.tls
    } else {
        sregs.fs.base
    };
    area.result = 0;
    area.pending.store(0, Ordering::Relaxed);
    area.depth = this.depth;
    area.freed_by_parent = request.flags & CLONE_VFORK != 0;
    area.altstack = if area.freed_by_parent {
        this.altstack
    } else {
        AltStack::DISABLED
    };
    area.rseq = (0, 0);
    area.refused = (0, 0);
    area.signals = this.signals;
    if request.flags & CLONE_SIGHAND == 0 {
        // SAFETY: points to a static, or into an area.
        area.own_signals.copy_from(unsafe { &*this.signals });
        if request.flags & CLONE_CLEAR_SIGHAND != 0 {
            area.own_signals.clear_handlers();
        }
        area.signals = &raw const area.own_signals;
    }
    area.restart_at(machine, &registers)
        .map_err(|e| enter_to_errno(&e))?;
    let to = area.vcpu.as_ref().ok_or(Errno::EIO)?;
    let mut extended = [0; 4096];
    // SAFETY: both vCPUs are stopped.
    unsafe { vcpu.save_extended_state(&mut extended) }?;
    // SAFETY: as above.
    unsafe { to.restore_extended_state(&extended) }
}

/// The first thing that a new task with shared memory does, on its own host stack.
pub(crate) unsafe extern "C" fn child_start(area: *mut ThreadArea) -> ! {
    base::set(area as u64);
    // SAFETY: the area is this thread's from here on.
    let this = unsafe { &mut *area };
    this.pid = sys::getpid() as u32;
    this.tid = sys::gettid() as u32;
    change_mask(MASK_SET, this.start_mask);
    // SAFETY: on the area's host stack; the creator prepared the vCPU.
    unsafe { run::host_loop(area) }
}

fn copy_memory(this: &mut ThreadArea, mut request: Request) -> Result<usize, Errno> {
    let vcpu = this.vcpu.as_ref().ok_or(Errno::EIO)?;
    // SAFETY: the vCPU is stopped.
    let mut registers = unsafe { vcpu.registers() }?;
    // SAFETY: as above.
    let mut sregs = unsafe { vcpu.special_registers() }?;
    let mut extended = [0; 4096];
    // SAFETY: as above.
    unsafe { vcpu.save_extended_state(&mut extended) }?;
    continue_after_call(&mut registers, request.stack);
    if request.flags & CLONE_SETTLS != 0 {
        sregs.fs.base = request.tls;
    }
    let mask = block_signals(this)?;
    let task = request.make(None);
    if task == 0 {
        if request.flags & CLONE_CLEAR_SIGHAND != 0 {
            // SAFETY: points to a static, or into the area.
            unsafe { &*this.signals }.clear_handlers();
        }
        if let Err(error) = revive(this, &registers, &sregs, &extended) {
            report::die_of_fork(&error);
        }
    }
    change_mask(MASK_SET, mask);
    sys::check(task)
}

/// In the child of a `fork`: a VM, and a vCPU with the state that the parent's had.
fn revive(
    this: &mut ThreadArea,
    registers: &kvm_regs,
    sregs: &kvm_sregs,
    extended: &[u8; 4096],
) -> Result<(), EnterError> {
    let Some(machine) = Machine::get() else {
        return Err(EnterError::Memory(Errno::EIO));
    };
    PROCESS_SIGNALS.drop_stale_writers();
    if !core::ptr::eq(this.signals, &raw const PROCESS_SIGNALS) {
        // The child of a child of `vfork` is a process of its own.
        // SAFETY: points into an area.
        PROCESS_SIGNALS.copy_from(unsafe { &*this.signals });
        this.signals = &raw const PROCESS_SIGNALS;
    }
    machine.renew()?;
    this.state.store(USED, Ordering::Relaxed);
    this.freed_by_parent = false;
    this.fs_base = sregs.fs.base;
    ThreadArea::equip(machine, NonNull::from(&mut *this))?;
    let running = this.running_pcid.load(Ordering::Relaxed);
    this.restart_at(machine, registers)?;
    // The address space that was loaded still is.
    this.running_pcid.store(running, Ordering::Relaxed);
    this.pid = sys::getpid() as u32;
    this.tid = sys::gettid() as u32;
    let refused = |request| {
        move |errno| EnterError::Platform(dune_kvm::vm::VmError::Request { request, errno })
    };
    let Some(vcpu) = this.vcpu.as_ref() else {
        return Err(EnterError::Memory(Errno::EIO));
    };
    // The page tables in use may not be the process's own.
    // SAFETY: the vCPU is stopped.
    unsafe { vcpu.set_special_registers_raw(sregs) }.map_err(refused("KVM_SET_SREGS"))?;
    // SAFETY: as above.
    unsafe { vcpu.restore_extended_state(extended) }.map_err(refused("KVM_SET_XSAVE"))
}

/// The caller's registers, at the end of the call in the child.
fn continue_after_call(registers: &mut kvm_regs, stack: u64) {
    registers.rip = high(arch::address(arch::dune_after_syscall));
    if stack != 0 {
        registers.rsp = stack;
    }
}
