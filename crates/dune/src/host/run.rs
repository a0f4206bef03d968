//! The loop that runs a thread's vCPU.
#![expect(unsafe_code, reason = "KVM's shared area and the thread's own")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "fields of one raw structure"
)]

use core::ptr::{addr_of, addr_of_mut};
use core::sync::atomic::{Ordering, compiler_fence};

use dune_kvm::sys::{self, Errno};
use dune_kvm::vcpu::Vcpu;
use kvm_bindings as kvm;

use crate::arch::{
    self, PORT_DIE, PORT_LEAVE, PORT_MASK, PORT_RUNTIME, PORT_SYSCALL, VECTOR_NOTIFY,
};
use crate::host::{fault, forward, signals};
use crate::mode;
use crate::report;
use crate::thread::ThreadArea;

/// Runs the guest side of the thread until it leaves Dune mode; then returns on the thread's
/// own stack, from `dune_leave`.
///
/// # Safety
/// On the host stack of `area`, which is this thread's and whose vCPU is ready to run.
pub(crate) unsafe extern "C" fn host_loop(area: *mut ThreadArea) -> ! {
    // SAFETY: the area is this thread's for as long as it is in Dune mode.
    let this = unsafe { &mut *area };
    let mut last = Exit::Elsewhere;
    loop {
        let Some(vcpu) = this.vcpu.as_ref() else {
            report::die(b"a thread without a vCPU")
        };
        let run = vcpu.run_area();
        // SAFETY: the area is shared with KVM and with the signal handler of this thread.
        unsafe { addr_of_mut!((*run).immediate_exit).write_volatile(0) };
        compiler_fence(Ordering::SeqCst);
        // After a call the stub itself looks; anywhere else the guest must be told.
        if last == Exit::Elsewhere && this.pending.load(Ordering::Relaxed) != 0 {
            notify(vcpu, run);
        }
        // SAFETY: what the guest can reach is the process itself.
        last = match unsafe { vcpu.run() } {
            // SAFETY: KVM filled in the exit.
            Ok(_) => unsafe { on_exit(area, run) },
            Err(Errno::EINTR) => Exit::Elsewhere,
            Err(Errno::EFAULT) => {
                fault::inject(vcpu, run);
                Exit::Elsewhere
            }
            Err(errno) => report::die_with_number(b"KVM_RUN failed, errno ", errno.0 as u64),
        };
    }
}

/// Where the guest stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// In the stub of a forwarded call.
    Call,
    /// Anywhere.
    Elsewhere,
}

/// Interrupts the guest as soon as it takes interrupts.
fn notify(vcpu: &Vcpu, run: *mut kvm::kvm_run) {
    // SAFETY: the area is shared with KVM, which is not running.
    unsafe {
        let ready = addr_of!((*run).ready_for_interrupt_injection).read_volatile() != 0
            && addr_of!((*run).if_flag).read_volatile() != 0;
        if ready && vcpu.interrupt(VECTOR_NOTIFY).is_ok() {
            addr_of_mut!((*run).request_interrupt_window).write_volatile(0);
        } else {
            addr_of_mut!((*run).request_interrupt_window).write_volatile(1);
        }
    }
}

unsafe fn on_exit(area: *mut ThreadArea, run: *mut kvm::kvm_run) -> Exit {
    // SAFETY: as in the caller.
    let this = unsafe { &mut *area };
    // SAFETY: the area is shared with KVM, which is not running.
    match unsafe { addr_of!((*run).exit_reason).read_volatile() } {
        kvm::KVM_EXIT_IO => {
            // SAFETY: the union holds the port of an I/O exit.
            match unsafe { addr_of!((*run).__bindgen_anon_1.io.port).read_volatile() } {
                PORT_SYSCALL => {
                    // SAFETY: the guest filled in the call page.
                    this.result = unsafe { forward::system_call(area) };
                    Exit::Call
                }
                PORT_LEAVE => {
                    mode::before_return(this);
                    // SAFETY: the guest parked its stack pointer before the exit.
                    unsafe { arch::dune_host_return(area) }
                }
                PORT_RUNTIME => {
                    // SAFETY: the runtime's own call.
                    this.result = unsafe { sys::raw(this.number, this.arguments) };
                    Exit::Elsewhere
                }
                PORT_MASK => {
                    this.result = signals::change_logical_mask(this) as isize;
                    Exit::Elsewhere
                }
                PORT_DIE => signals::die_by_signal(this.result as u32),
                port => report::die_with_number(b"the guest wrote to port ", u64::from(port)),
            }
        }
        kvm::KVM_EXIT_IRQ_WINDOW_OPEN => {
            // SAFETY: as above.
            unsafe { addr_of_mut!((*run).request_interrupt_window).write_volatile(0) };
            Exit::Elsewhere
        }
        kvm::KVM_EXIT_INTR => Exit::Elsewhere,
        kvm::KVM_EXIT_MEMORY_FAULT | kvm::KVM_EXIT_MMIO => {
            if let Some(vcpu) = this.vcpu.as_ref() {
                fault::inject(vcpu, run);
            }
            Exit::Elsewhere
        }
        reason => report::die_of_exit(this, reason),
    }
}

/// The end of the calling thread. Never returns; the area goes back to the pool, unless the
/// thread is a child of `vfork`, whose parent does it.
pub(crate) fn exit_thread(area: *mut ThreadArea, status: usize) -> ! {
    // SAFETY: the area is this thread's.
    let this = unsafe { &mut *area };
    crate::signals::change_mask(crate::signals::MASK_SET, u64::MAX);
    if this.freed_by_parent {
        // SAFETY: ends the thread.
        let _ = unsafe { sys::raw(sys::nr::EXIT, [status, 0, 0, 0, 0, 0]) };
    }
    // SAFETY: no signal can come any more, and after the store nothing uses the stack.
    unsafe { arch::dune_host_exit(this.state.as_ptr(), crate::thread::FREE, status) }
}
