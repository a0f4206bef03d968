//! A wall of protection keys: system calls that reach one part of this process's memory only.
//!
//! Protection keys (SDM vol. 3, 4.6.2) bind the host kernel too: what it reads or writes for a
//! system call, at user addresses, it reads or writes with the rights in PKRU that the thread
//! had at the `syscall` instruction. So memory that untrusted parties may name gets a key of
//! its own, everything else keeps key 0, and a call with arguments of theirs is made with key 0
//! denied. Whatever address is among them, the kernel itself then answers `EFAULT` unless the
//! memory was given the key.
//!
//! ```text
//!                    key 0      the wall's key    other keys
//!   open rights      allowed    allowed           denied      a thread as it runs
//!   closed rights    denied     allowed           denied      from WRPKRU to WRPKRU (call)
//! ```
//!
//! While key 0 is denied the thread has no stack and no thread-local storage but what is under
//! the wall's key, so [`call`] works in registers. Two things of the kernel touch user memory
//! at such a moment, without being asked to:
//!
//! - **Signal frames.** Linux before 6.12 writes them with the rights of the interrupted thread,
//!   and kills the process where that fails. So the stack pointer is moved to a [`Stack`] under
//!   the wall's key first. What is there may be changed by any other call behind the wall, so
//!   nothing returns by such a frame: see [`wall_signal_handler!`](crate::wall_signal_handler),
//!   which every handler must be made with.
//! - **Restartable sequences.** The area of a thread that is registered for them would be
//!   written under the denied key: threads that make such calls must not be.
//!
//! Not bound by any key: calls that change the memory map instead of accessing memory (`mmap`,
//! `munmap`, `mprotect`...), and access by way of another process's eyes (`process_vm_readv`,
//! `/proc/self/mem`).
#![expect(unsafe_code, reason = "WRPKRU, and system calls under it")]

use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::OnceLock;

use crate::sys::{self, Errno, nr};

/// Bytes of a stack for signal frames: the largest frame (AMX has 8 KiB of registers), twice
/// over. Handlers do not run on it.
#[doc(hidden)]
pub const STACK_SIZE: usize = 1 << STACK_SHIFT;
#[doc(hidden)]
pub const STACK_SHIFT: usize = 15;
/// How many threads can have a stack: more than can have a virtual CPU.
const MOST_STACKS: usize = 8192;
/// Bytes of address space for all of them.
#[doc(hidden)]
pub const ARENA_SIZE: usize = MOST_STACKS * STACK_SIZE;

/// PKRU as every kernel starts a program with it: keys other than 0 are denied.
const DEFAULT_RIGHTS: u32 = 0x5555_5554;
/// What [`call`] answers where it made no call (Linux's `ERESTARTSYS`, which no call returns).
pub const GIVEN_UP: isize = -512;

/// For the handler's first instructions and for [`call`], which have nothing but registers and
/// this.
#[doc(hidden)]
pub static OPEN_RIGHTS: AtomicU32 = AtomicU32::new(0);
static CLOSED_RIGHTS: AtomicU32 = AtomicU32::new(0);
/// Start of the stacks for signal frames, one after another.
#[doc(hidden)]
pub static ARENA: AtomicUsize = AtomicUsize::new(0);
/// What belongs to each of them, under key 0.
#[doc(hidden)]
pub static SLOTS: [Slot; MOST_STACKS] = [const { Slot::free() }; MOST_STACKS];

/// What belongs to a stack for signal frames.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct Slot {
    /// Where it begins, downwards.
    end: AtomicUsize,
    /// The thread's own stack pointer while it stands on it.
    own: AtomicUsize,
    used: AtomicU32,
}

#[doc(hidden)]
pub const SLOT_SHIFT: usize = 5;
#[doc(hidden)]
pub const SLOT_OWN: usize = offset_of!(Slot, own);
const _: () = assert!(size_of::<Slot>() == 1 << SLOT_SHIFT && offset_of!(Slot, end) == 0);

impl Slot {
    const fn free() -> Self {
        Self {
            end: AtomicUsize::new(0),
            own: AtomicUsize::new(0),
            used: AtomicU32::new(0),
        }
    }
}

/// A thread's stack for signal frames during a [`call`]. Given back when dropped.
#[derive(Debug)]
pub struct Stack(&'static Slot);

impl Stack {
    /// Takes a stack that nobody uses. Allocates nothing; either side.
    ///
    /// # Errors
    /// `EAGAIN` if all are in use.
    pub fn take(_wall: &Wall) -> Result<Self, Errno> {
        let free = |slot: &&Slot| {
            slot.used
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        let (index, slot) = SLOTS
            .iter()
            .enumerate()
            .find(|(_, slot)| free(slot))
            .ok_or(Errno::EAGAIN)?;
        let end = ARENA.load(Ordering::Relaxed) + (index + 1) * STACK_SIZE;
        slot.end.store(end, Ordering::Relaxed);
        Ok(Self(slot))
    }

    /// What [`call`] wants to know of it.
    #[must_use]
    pub fn slot(&self) -> &'static Slot {
        self.0
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.0.used.store(0, Ordering::Release);
    }
}

static WALL: OnceLock<Option<Wall>> = OnceLock::new();

/// The wall of this process. Once it stands it is there to the end, in children too.
#[derive(Debug)]
pub struct Wall {
    key: u32,
}

impl Wall {
    /// Builds the wall if there is none yet; `None` where this machine cannot have one (no
    /// protection keys, or none that holds). Outside any guest only.
    ///
    /// Whoever calls gets open rights, and so do the threads that it makes later.
    ///
    /// # Safety
    /// The thread must not be registered for restartable sequences: it makes a [`call`] to see
    /// whether the wall holds.
    pub unsafe fn build() -> Option<&'static Self> {
        let wall = WALL.get_or_init(Self::try_build).as_ref()?;
        wall.open();
        Some(wall)
    }

    /// The wall, if one was built.
    #[inline]
    #[must_use]
    pub fn get() -> Option<&'static Self> {
        WALL.get()?.as_ref()
    }

    /// Gives the calling thread open rights, if there is a wall: for threads that were there
    /// before it, and run natively. Others have them, or, in a guest, need none.
    pub fn open_for_this_thread() {
        if has_protection_keys()
            && let Some(wall) = Self::get()
        {
            wall.open();
        }
    }

    fn try_build() -> Option<Self> {
        if !has_protection_keys() {
            return None;
        }
        // SAFETY: takes no pointer.
        let key = unsafe { sys::call(nr::PKEY_ALLOC, [0; 6]) }.ok()? as u32;
        let wall = Self { key };
        OPEN_RIGHTS.store(DEFAULT_RIGHTS & !wall.bits(), Ordering::Relaxed);
        CLOSED_RIGHTS.store(!wall.bits(), Ordering::Relaxed);
        wall.open();
        let arena = Region::map(ARENA_SIZE, Some(&wall)).ok()?;
        ARENA.store(arena.start(), Ordering::Relaxed);
        // Threads come and go, and the wall stays.
        core::mem::forget(arena);
        // A kernel that gives out keys and does not heed them is as bad as none.
        wall.holds().then_some(wall)
    }

    /// Its key's two bits in PKRU.
    fn bits(&self) -> u32 {
        3 << (2 * self.key)
    }

    /// Gives the calling thread open rights.
    fn open(&self) {
        // SAFETY: the CPU and the kernel have protection keys, or there were no wall; the
        // rights allow key 0 and thereby everything that there is.
        unsafe { write_rights(OPEN_RIGHTS.load(Ordering::Relaxed)) };
    }

    /// Gives `length` bytes of memory at `start`, whose rights are or become `protection`
    /// (`PROT_READ`...), to whom calls behind the wall are made for.
    ///
    /// # Errors
    /// As `pkey_mprotect(2)`.
    ///
    /// # Safety
    /// As for `mprotect`; nothing in it may need to be out of reach.
    pub unsafe fn give(&self, start: u64, length: u64, protection: u32) -> Result<(), Errno> {
        let arguments = [
            start as usize,
            length as usize,
            protection as usize,
            self.key as usize,
            0,
            0,
        ];
        // SAFETY: the caller's memory.
        unsafe { sys::call(nr::PKEY_MPROTECT, arguments) }.map(drop)
    }

    /// Whether the kernel refuses what the wall is there to make it refuse, and nothing else.
    fn holds(&self) -> bool {
        let (Ok(lent), Ok(stack)) = (Region::map(4096, Some(self)), Stack::take(self)) else {
            return false;
        };
        let pending = 0_u8;
        let own = [0_u8; 8];
        let random = |into: usize| {
            // SAFETY: into memory of this function, or `lent`.
            unsafe {
                call(
                    nr::GETRANDOM,
                    &[into, own.len(), 0, 0, 0, 0],
                    &raw const pending,
                    stack.slot(),
                )
            }
        };
        // No signal here: its handler may not be prepared.
        let all = u64::MAX;
        let mut before = 0_u64;
        let mask = |how: usize, new: &u64, old: *mut u64| {
            let arguments = [how, &raw const *new as usize, old as usize, 8, 0, 0];
            // SAFETY: the kernel reads and writes 8 bytes each.
            unsafe { sys::raw(nr::RT_SIGPROCMASK, arguments) }
        };
        const SET: usize = 2;
        mask(SET, &all, &raw mut before);
        let refused = random((&raw const own).expose_provenance());
        let allowed = random(lent.start());
        mask(SET, &before, core::ptr::null_mut());
        refused == -(Errno::EFAULT.0 as isize) && allowed == own.len() as isize
    }
}

/// Whether the CPU has protection keys and the kernel has switched them on (`CPUID.7.ECX`,
/// `OSPKE`), in ring 3, where they are about.
#[must_use]
pub fn has_protection_keys() -> bool {
    const OSPKE: u32 = 1 << 4;
    let code: u16;
    // SAFETY: reading a selector has no effect.
    unsafe { asm!("mov {0:x}, cs", out(reg) code, options(nomem, nostack, preserves_flags)) };
    let most = core::arch::x86_64::__cpuid(0).eax;
    code & 3 == 3 && most >= 7 && core::arch::x86_64::__cpuid_count(7, 0).ecx & OSPKE != 0
}

/// Loads PKRU.
///
/// # Safety
/// `OSPKE` must be set, and the rights must allow what is accessed next.
unsafe fn write_rights(rights: u32) {
    // SAFETY: as the caller says.
    unsafe {
        asm!(
            "wrpkru",
            in("eax") rights,
            in("ecx") 0,
            in("edx") 0,
            options(nostack, preserves_flags),
        );
    }
}

/// A mapping, under the wall's key if there is a wall. Unmapped when dropped.
#[derive(Debug)]
pub struct Region {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping belongs to no thread.
unsafe impl Send for Region {}

impl Region {
    /// Maps `length` bytes, a multiple of the page size, that calls behind `wall` reach.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn map(length: usize, wall: Option<&Wall>) -> Result<Self, Errno> {
        const READ_WRITE: u32 = 3;
        let at = sys::map_anonymous(length)?;
        let region = Self {
            start: NonNull::new(at).ok_or(Errno::ENOMEM)?,
            length,
        };
        sys::avoid_huge_pages(at, length);
        if let Some(wall) = wall {
            // SAFETY: fresh memory, made to be given away.
            unsafe { wall.give(at as u64, length as u64, READ_WRITE) }?;
        }
        Ok(region)
    }

    /// Address of the first byte.
    #[must_use]
    pub fn start(&self) -> usize {
        self.start.as_ptr().expose_provenance()
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the owner's last use was before.
        let _ = unsafe { sys::unmap(self.start.as_ptr(), self.length) };
    }
}

/// Where a thread whose signal handler interrupted it at `rip` must go on instead, if it was
/// about to make a [`call`]: the handler has set what the call looks at first, and looked it had.
#[must_use]
pub fn gives_up_at(rip: u64) -> Option<u64> {
    let label = |at: *const u8| at.expose_provenance() as u64;
    (label(&raw const dune_wall_start)..label(&raw const dune_wall_end))
        .contains(&rip)
        .then(|| label(&raw const dune_wall_given_up))
}

/// Where the labels are: whoever looks for them needs [`call`] to be there.
#[used]
static LABELLED: unsafe extern "C" fn(usize, *const [usize; 6], *const u8, &'static Slot) -> isize =
    call;

unsafe extern "C" {
    static dune_wall_start: u8;
    static dune_wall_end: u8;
    static dune_wall_given_up: u8;
}

/// Makes the system call `number` with closed rights, unless the byte at `pending` is set: then
/// [`GIVEN_UP`], and nothing was done. Returns the register as the kernel left it. Costs 35
/// instructions more than the bare call.
///
/// No signal slips between the look at `pending` and the call, if the handlers follow
/// [`gives_up_at`].
///
/// # Safety
/// As for the system call, with the arguments that the wall lets through. There must be a wall;
/// the thread must not be registered for restartable sequences; `stack` must be that of a
/// [`Stack`] that this thread alone uses; every handler of a signal that is not blocked must be
/// made with [`wall_signal_handler!`](crate::wall_signal_handler).
#[unsafe(naked)]
pub unsafe extern "C" fn call(
    number: usize,
    arguments: *const [usize; 6],
    pending: *const u8,
    stack: &'static Slot,
) -> isize {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        // rbx = number, rbp = open rights, r12 = stack pointer, r13 = third argument
        "mov rbx, rdi",
        "mov ebp, [rip + {open}]",
        "mov r12, rsp",
        "mov r11, rsi",
        "mov r9, rdx",
        "mov rdi, [r11]",
        "mov rsi, [r11 + 8]",
        "mov r13, [r11 + 16]",
        "mov r10, [r11 + 24]",
        "mov r8, [r11 + 32]",
        "mov eax, [rip + {closed}]",
        "mov [rcx + {own}], rsp",
        // From here to the end of `syscall` a handler sends us to the way out. A `syscall` that
        // was entered and interrupted leaves rip behind it, so a call is never given up after
        // it began.
        ".globl dune_wall_start",
        ".hidden dune_wall_start",
        "dune_wall_start:",
        "cmp byte ptr [r9], 0",
        "jne dune_wall_given_up",
        "mov r9, [r11 + 40]",
        "mov rsp, [rcx]",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // No memory but the wall's from here ...
        "mov rax, rbx",
        "mov rdx, r13",
        "syscall",
        ".globl dune_wall_end",
        ".hidden dune_wall_end",

        "dune_wall_end:",
        "mov rbx, rax",
        "2:",
        "mov eax, ebp",
        "xor ecx, ecx",
        "xor edx, edx",
        "wrpkru",
        // ... to here.
        "mov rax, rbx",
        "mov rsp, r12",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        ".globl dune_wall_given_up",
        ".hidden dune_wall_given_up",
        "dune_wall_given_up:",
        "mov rbx, {given_up}",
        "jmp 2b",
        open = sym OPEN_RIGHTS,
        closed = sym CLOSED_RIGHTS,
        given_up = const GIVEN_UP,
        own = const SLOT_OWN,
    )
}

/// Makes `$name` a signal handler (`SA_SIGINFO`) that does what `$handler` does, a function
/// `extern "C" fn(signal, *info, *context)` that uses no field of the context but the first 23
/// registers and the mask. Only for where there is a wall.
///
/// The kernel starts a handler with its default rights, so this one takes open rights first.
/// Then it looks where it stands: a stack pointer on a [`Stack`] means that
/// a [`call`] was interrupted, and that the frame is where any call behind the wall of any
/// thread may write, should its pointers be unchecked. So the handler does not run there:
///
/// ```text
///   stack of the call    the kernel's frame --- copied once ---+
///   stack of the thread  ... call's caller | call's registers | copies | handler
/// ```
///
/// and nothing returns through the frame. Of the copy it believes what the caller of the call
/// and the program may choose anyway: the result and the mask. Everything else that `call` goes
/// on with comes from the thread's own stack, whose pointer is in the slot, under key 0.
#[macro_export]
macro_rules! wall_signal_handler {
    ($(#[$meta:meta])* $vis:vis $name:ident => $handler:path) => {
        $(#[$meta])*
        #[unsafe(naked)]
        $vis unsafe extern "C" fn $name() {
            ::core::arch::naked_asm!(
                // No memory but code and key 0. rdi = signal, rsi = info, rdx = context
                "mov r8, rdx",
                "mov eax, [rip + {open}]",
                "xor ecx, ecx",
                "xor edx, edx",
                "wrpkru",
                "mov rdx, r8",
                "mov rax, rsp",
                "sub rax, [rip + {arena}]",
                "cmp rax, {arena_size}",
                "jb 2f",
                "jmp {handler}",
                "2:",
                // rbx = the stack pointer of the call, r12 = signal, then the result
                "shr rax, {stack_shift}",
                "shl rax, {slot_shift}",
                "lea rcx, [rip + {slots}]",
                "mov rbx, [rcx + rax + {own}]",
                "mov rsp, rbx",
                "sub rsp, {copies}",
                "and rsp, -16",
                "mov r12d, edi",
                "mov r8, rsi",
                "mov rdi, rsp",
                "mov rsi, rdx",
                "mov ecx, {context} / 8",
                "rep movsq",
                "mov rsi, r8",
                "mov ecx, {info} / 8",
                "rep movsq",
                "mov edi, r12d",
                "lea rsi, [rsp + {context}]",
                "mov rdx, rsp",
                "call {handler}",
                // What came of the call, by where it was interrupted (or sent to).
                "mov rcx, [rsp + {rip}]",
                "mov rax, [rsp + {rax}]",
                "lea rdx, [rip + dune_wall_end]",
                "cmp rcx, rdx",
                "je 3f",
                "mov rax, [rsp + {rbx}]",
                "lea rdx, [rip + dune_wall_given_up]",
                "cmp rcx, rdx",
                "jne 3f",
                "mov rax, {given_up}",
                "3:",
                "mov r12, rax",
                // The mask as the return through the frame would set it; other signals may
                // come now.
                "mov eax, {sigprocmask}",
                "mov edi, 2",
                "lea rsi, [rsp + {mask}]",
                "xor edx, edx",
                "mov r10d, 8",
                "syscall",
                "mov rax, r12",
                "mov rsp, rbx",
                "pop r13",
                "pop r12",
                "pop rbp",
                "pop rbx",
                "ret",
                open = sym $crate::wall::OPEN_RIGHTS,
                arena = sym $crate::wall::ARENA,
                arena_size = const $crate::wall::ARENA_SIZE,
                slots = sym $crate::wall::SLOTS,
                stack_shift = const $crate::wall::STACK_SHIFT,
                slot_shift = const $crate::wall::SLOT_SHIFT,
                own = const $crate::wall::SLOT_OWN,
                copies = const $crate::wall::frame::CONTEXT + $crate::wall::frame::INFO,
                context = const $crate::wall::frame::CONTEXT,
                info = const $crate::wall::frame::INFO,
                rip = const $crate::wall::frame::RIP,
                rax = const $crate::wall::frame::RAX,
                rbx = const $crate::wall::frame::RBX,
                mask = const $crate::wall::frame::MASK,
                given_up = const $crate::wall::GIVEN_UP,
                sigprocmask = const $crate::sys::nr::RT_SIGPROCMASK,
                handler = sym $handler,
            )
        }
    };
}

/// The kernel's `ucontext` and `siginfo` (x86-64, `uapi/asm/ucontext.h`), in bytes.
#[doc(hidden)]
pub mod frame {
    /// `uc_mcontext.gregs`.
    const REGISTERS: usize = 40;
    pub const RBX: usize = REGISTERS + 11 * 8;
    pub const RAX: usize = REGISTERS + 13 * 8;
    pub const RIP: usize = REGISTERS + 16 * 8;
    /// `uc_sigmask`.
    pub const MASK: usize = REGISTERS + 256;
    /// What is copied of `ucontext`: to the end of the mask.
    pub const CONTEXT: usize = MASK + 8;
    /// `siginfo`.
    pub const INFO: usize = 128;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_call_that_was_not_begun_is_given_up() {
        let start = (&raw const dune_wall_start).expose_provenance() as u64;
        let end = (&raw const dune_wall_end).expose_provenance() as u64;
        assert!(gives_up_at(start - 1).is_none());
        assert!(gives_up_at(start).is_some());
        assert!(gives_up_at(end - 2).is_some(), "at the syscall instruction");
        assert!(gives_up_at(end).is_none(), "after it");
    }
}
