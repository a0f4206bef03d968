//! The guard's own pages in the guest: what they hold and where they lie.
//!
//! ```text
//!  guest virtual            rights          holds
//!  USER_CODE     +0x0000    ring 3: r-x     system call landing (weak KVM), XSAVE, XRSTOR
//!  RING0_CODE    +0x1000    ring 0: r-x     one stub a vector, IRETQ, system call landing
//!  DESCRIPTORS   +0x2000    ring 0: r--     GDT, IDT
//!  CLOCK         +0x8000    ring 3: r--     the kernel's data for clocks, for a trial
//!
//!  and for each vCPU, four pages from `CPUS` on:
//!  task          +0x0000    ring 0: r--     TSS with the I/O permission bitmap
//!  stack         +0x1000    ring 0: rw-     where exceptions push their frames
//!  scratch       +0x2000    ring 3: rw-     the extended state on its way in or out
//!  answers       +0x3000    ring 3: r-x     system calls answered at ring 3 (weak KVM)
//! ```
//!
//! All of them lie above [`USER_HI`](crate::range::USER_HI), so that no area of
//! the program can be there.
//!
//! # What ring 3 can do with them
//!
//! It can read and run `USER_CODE` and each `answers`, and write each `scratch`;
//! nothing else.
//!
//! * The landing is one `out`. Jumping there makes a system call from an
//!   address that the program chose (`rcx`): nothing that `SYSCALL` at that
//!   address would not do, and the engine checks the address.
//! * `CLOCK` is the kernel's, and what it tells every process may read.
//! * The snippets (XSAVE, XRSTOR, a load) work on the program's own state at an
//!   address that ring 3 must have the right to reach anyway.
//! * An `out` to [`PORT`] anywhere else ends in an exit whose `rip` is no
//!   stub's: a general protection fault for the program, as is any other port,
//!   which the bitmap refuses.
//! * `scratch` holds nothing but the program's own extended state, and the
//!   engine believes nothing that it finds there. Another thread can spoil it
//!   on its way, which is its program's own loss.
//! * `answers` touches no memory and tells ids that the program may ask for
//!   (module `answers`).

#![expect(unsafe_code, reason = "descriptors as bytes")]

use dune_x86::descriptors::{Gate, TaskState, global_descriptor_table};

use super::machine::Landing;

const PAGE: u64 = 4096;
const BASE: u64 = 0x7fff_8000_0000;

/// Code that ring 3 may run.
pub(super) const USER_CODE: u64 = BASE;
/// Code that only ring 0 may run.
pub(super) const RING0_CODE: u64 = BASE + PAGE;
/// Global and interrupt descriptor tables.
pub(super) const DESCRIPTORS: u64 = BASE + 2 * PAGE;
/// A first look at the kernel's data for clocks.
pub(super) const CLOCK: u64 = BASE + 8 * PAGE;
/// The pages of the first vCPU.
const CPUS: u64 = BASE + (1 << 20);
/// Bytes from one vCPU's pages to the next one's.
const CPU_STRIDE: u64 = 4 * PAGE;
/// As many vCPUs as any KVM has.
pub(super) const MOST_CPUS: u32 = 4096;

const _: () = assert!(BASE >= crate::range::USER_HI);
const _: () = assert!(CPUS + MOST_CPUS as u64 * CPU_STRIDE <= 1 << 47);

/// Which vCPU, from 0 up to [`MOST_CPUS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CpuIndex(pub(super) u32);

impl CpuIndex {
    /// Task state segment.
    pub(super) const fn task(self) -> u64 {
        CPUS + self.0 as u64 * CPU_STRIDE
    }

    /// The stack that every exception arrives on.
    pub(super) const fn stack(self) -> u64 {
        self.task() + PAGE
    }

    /// Room for the extended state.
    pub(super) const fn scratch(self) -> u64 {
        self.task() + 2 * PAGE
    }

    /// Code that answers system calls at ring 3.
    pub(super) const fn answers(self) -> u64 {
        self.task() + 3 * PAGE
    }

    /// The stack's top: 16-byte aligned, as the CPU aligns it anyway.
    const fn stack_top(self) -> u64 {
        self.stack() + PAGE
    }

    /// Guest virtual address of the part of the frame that `IRETQ` takes.
    pub(super) const fn iretq_frame(self) -> u64 {
        self.stack_top() - size_of::<Frame>() as u64 + 8
    }
}

/// Where KVM on a CPU without "unrestricted guest" keeps pages of its own:
/// guest physical addresses that the engine never uses.
pub(super) const KVM_PRIVATE_GPA: usize = 0xfffb_d000;

/// The port that the stubs use. Without an interrupt controller or a timer in
/// the kernel, no port means anything to KVM.
pub(super) const PORT: u8 = 0xd5;

/// Bytes from one vector's stub to the next.
const STUB: u64 = 16;
/// Vectors that the CPU itself raises; the others have no gate.
const VECTORS: u64 = 32;

const IRETQ_AT: u64 = RING0_CODE + VECTORS * STUB;
const RING0_LANDING: u64 = IRETQ_AT + STUB;
const RING3_LANDING: u64 = USER_CODE;
const SAVE_AT: u64 = USER_CODE + STUB;
const RESTORE_AT: u64 = USER_CODE + 2 * STUB;
const LOOK_AT: u64 = USER_CODE + 3 * STUB;

/// `out PORT, al`: one port, so that one bit of the bitmap is enough.
const OUT: [u8; 2] = [0xe6, PORT];
/// Behind each `out`, which is never stepped over.
const UD2: [u8; 2] = [0x0f, 0x0b];
const IRETQ: [u8; 2] = [0x48, 0xcf];
/// `xsave64 [rdi]`
const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x27];
/// `xrstor64 [rdi]`
const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];
/// `mov rax, [rdi]`
const LOAD: [u8; 3] = [0x48, 0x8b, 0x07];

pub(super) const GDT: u64 = DESCRIPTORS;
pub(super) const GDT_BYTES: u16 = (dune_x86::descriptors::GDT_ENTRIES * 8) as u16;
pub(super) const IDT: u64 = DESCRIPTORS + 0x100;
pub(super) const IDT_BYTES: u16 = (VECTORS * 16) as u16;
const _: () = assert!(GDT + GDT_BYTES as u64 <= IDT && IDT_BYTES as u64 <= PAGE - 0x100);

/// The bitmap has a bit for each port up to [`PORT`]'s byte, and one more byte
/// of ones that the CPU reads along (SDM vol. 1, 19.5.2).
const BITMAP_BYTES: usize = PORT as usize / 8 + 2;
/// Limit of the task state segment, bitmap included.
pub(super) const TASK_LIMIT: u32 = (size_of::<TaskState>() + BITMAP_BYTES - 1) as u32;

/// What an exception leaves on the stack, lowest address first (SDM vol. 3,
/// figure 6-9). The error code is there for some vectors only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Frame {
    pub(super) error: u64,
    pub(super) rip: u64,
    pub(super) cs: u64,
    pub(super) rflags: u64,
    pub(super) rsp: u64,
    pub(super) ss: u64,
}

const _: () = assert!(size_of::<Frame>() == 48);

/// Offset of the frame in the stack's page.
pub(super) const FRAME_OFFSET: usize = PAGE as usize - size_of::<Frame>();

/// A place where ring 3 may end with an `out`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stub {
    /// An exception, by its vector.
    Exception(u8),
    /// A system call.
    Syscall,
    /// The extended state has been saved or restored, or a word been read.
    Snippet,
}

/// The stub whose `out` exited with the instruction pointer at `rip`, which
/// KVM leaves at the `out` or behind it.
pub(super) fn stub_at(rip: u64, landing: Landing) -> Option<Stub> {
    let is = |at: u64| rip.wrapping_sub(at) <= OUT.len() as u64;
    let vector = rip.wrapping_sub(RING0_CODE) / STUB;
    if vector < VECTORS && is(RING0_CODE + vector * STUB) {
        return Some(Stub::Exception(vector as u8));
    }
    if is(syscall_entry(landing)) {
        return Some(Stub::Syscall);
    }
    let ends = [
        SAVE_AT + XSAVE.len() as u64,
        RESTORE_AT + XRSTOR.len() as u64,
        LOOK_AT + LOAD.len() as u64,
    ];
    if ends.into_iter().any(is) {
        return Some(Stub::Snippet);
    }
    None
}

/// `LSTAR`: a page that the level at which `SYSCALL` arrives can run.
pub(super) const fn syscall_entry(landing: Landing) -> u64 {
    match landing {
        Landing::Ring0 => RING0_LANDING,
        Landing::Ring3 => RING3_LANDING,
    }
}

/// Where ring 0 continues to return to ring 3 by way of the frame.
pub(super) const fn iretq() -> u64 {
    IRETQ_AT
}

/// Where ring 3 continues to save its extended state at `rdi`.
pub(super) const fn save() -> u64 {
    SAVE_AT
}

/// Where ring 3 continues to load its extended state from `rdi`.
pub(super) const fn restore() -> u64 {
    RESTORE_AT
}

/// Where ring 3 continues to read a word at `rdi`.
pub(super) const fn look() -> u64 {
    LOOK_AT
}

/// Whether `rip` lies in code of the guard that ring 0 runs.
pub(super) const fn is_ring0_code(rip: u64) -> bool {
    RING0_CODE <= rip && rip < RING0_CODE + PAGE
}

/// Whether `rip` lies in code of the guard that ring 3 may run.
pub(super) const fn is_user_code(rip: u64) -> bool {
    USER_CODE <= rip && rip < USER_CODE + PAGE
}

/// How far `rip` lies into the page of answers of some vCPU.
pub(super) const fn offset_in_answers(rip: u64) -> Option<u64> {
    let offset = rip.wrapping_sub(CPUS);
    if offset / CPU_STRIDE >= MOST_CPUS as u64 || offset % CPU_STRIDE < 3 * PAGE {
        return None;
    }
    Some(offset % PAGE)
}

/// Contents of [`USER_CODE`].
pub(super) fn user_code() -> [u8; PAGE as usize] {
    let mut page = [0xcc; PAGE as usize];
    put(&mut page, RING3_LANDING - USER_CODE, &[&OUT, &UD2]);
    put(&mut page, SAVE_AT - USER_CODE, &[&XSAVE, &OUT, &UD2]);
    put(&mut page, RESTORE_AT - USER_CODE, &[&XRSTOR, &OUT, &UD2]);
    put(&mut page, LOOK_AT - USER_CODE, &[&LOAD, &OUT, &UD2]);
    page
}

/// Contents of [`RING0_CODE`].
pub(super) fn ring0_code() -> [u8; PAGE as usize] {
    let mut page = [0xcc; PAGE as usize];
    for vector in 0..VECTORS {
        put(&mut page, vector * STUB, &[&OUT, &UD2]);
    }
    put(&mut page, IRETQ_AT - RING0_CODE, &[&IRETQ, &UD2]);
    put(&mut page, RING0_LANDING - RING0_CODE, &[&OUT, &UD2]);
    page
}

/// Contents of [`DESCRIPTORS`].
pub(super) fn descriptors() -> [u8; PAGE as usize] {
    const BREAKPOINT: u64 = 3;
    const OVERFLOW: u64 = 4;
    /// All vectors use the first interrupt stack, so that the frame is always
    /// in the same place. None of them can arrive while another is handled:
    /// the stubs do nothing that faults.
    const STACK_NUMBER: u8 = 1;
    let mut page = [0; PAGE as usize];
    // The segment of the first: each vCPU's task register is set directly.
    let table = global_descriptor_table(CpuIndex(0).task(), TASK_LIMIT);
    for (n, entry) in table.iter().enumerate() {
        put(
            &mut page,
            GDT - DESCRIPTORS + 8 * n as u64,
            &[&entry.to_le_bytes()],
        );
    }
    for vector in 0..VECTORS {
        let ring = if matches!(vector, BREAKPOINT | OVERFLOW) {
            3
        } else {
            0
        };
        let gate = Gate::interrupt(RING0_CODE + vector * STUB, STACK_NUMBER, ring);
        put(
            &mut page,
            IDT - DESCRIPTORS + 16 * vector,
            &[&bytes_of_gate(gate)],
        );
    }
    page
}

/// Contents of a vCPU's task page.
pub(super) fn task(cpu: CpuIndex) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    let mut state = TaskState::new();
    state.rsp[0] = cpu.stack_top();
    state.ist[0] = cpu.stack_top();
    state.iomap_base = size_of::<TaskState>() as u16;
    put(&mut page, 0, &[&bytes_of_task(state)]);
    let bitmap = &mut page[size_of::<TaskState>()..][..BITMAP_BYTES];
    bitmap.fill(0xff);
    bitmap[usize::from(PORT) / 8] &= !(1 << (PORT % 8));
    page
}

fn bytes_of_gate(gate: Gate) -> [u8; size_of::<Gate>()] {
    // SAFETY: two integers, `repr(C)`, without padding.
    unsafe { core::mem::transmute(gate) }
}

fn bytes_of_task(state: TaskState) -> [u8; size_of::<TaskState>()] {
    // SAFETY: integers only, `repr(C, packed(4))`, without padding.
    unsafe { core::mem::transmute(state) }
}

fn put(page: &mut [u8], at: u64, parts: &[&[u8]]) {
    let mut at = at as usize;
    for part in parts {
        page[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stubs_are_told_by_their_out() {
        for landing in [Landing::Ring0, Landing::Ring3] {
            let entry = syscall_entry(landing);
            assert_eq!(stub_at(entry, landing), Some(Stub::Syscall));
            assert_eq!(stub_at(entry + 2, landing), Some(Stub::Syscall));
            assert_eq!(stub_at(entry + 3, landing), None);
            assert_eq!(stub_at(SAVE_AT, landing), None);
            assert_eq!(stub_at(SAVE_AT + 4, landing), Some(Stub::Snippet));
            assert_eq!(stub_at(RESTORE_AT + 6, landing), Some(Stub::Snippet));
            assert_eq!(
                stub_at(RING0_CODE + 16 * 14, landing),
                Some(Stub::Exception(14))
            );
            assert_eq!(
                stub_at(RING0_CODE + 16 * 31 + 2, landing),
                Some(Stub::Exception(31))
            );
            assert_eq!(stub_at(IRETQ_AT, landing), None);
            assert_eq!(stub_at(0, landing), None);
            assert_eq!(stub_at(u64::MAX, landing), None);
        }
        assert_eq!(stub_at(RING3_LANDING, Landing::Ring0), None);
        assert_eq!(stub_at(RING0_LANDING, Landing::Ring3), None);
    }

    #[test]
    fn pages_of_answers_are_told_from_everything_else() {
        for cpu in [CpuIndex(0), CpuIndex(1), CpuIndex(MOST_CPUS - 1)] {
            assert_eq!(offset_in_answers(cpu.answers()), Some(0));
            assert_eq!(offset_in_answers(cpu.answers() + 0xfff), Some(0xfff));
            assert_eq!(offset_in_answers(cpu.answers() - 1), None);
            assert_eq!(offset_in_answers(cpu.task()), None);
        }
        assert_eq!(offset_in_answers(CpuIndex(MOST_CPUS).answers()), None);
        assert_eq!(offset_in_answers(USER_CODE), None);
        assert_eq!(offset_in_answers(0x40_0000), None);
    }

    #[test]
    fn the_bitmap_allows_one_port() {
        let page = task(CpuIndex(0));
        let bitmap = &page[size_of::<TaskState>()..=TASK_LIMIT as usize];
        let allowed: Vec<usize> = (0..bitmap.len() * 8)
            .filter(|port| bitmap[port / 8] >> (port % 8) & 1 == 0)
            .collect();
        assert_eq!(allowed, [usize::from(PORT)]);
        assert_eq!(bitmap.last(), Some(&0xff));
    }

    #[test]
    fn only_the_breakpoint_gates_are_open_to_ring_3() {
        let page = descriptors();
        for vector in 0..VECTORS as usize {
            let at = (IDT - DESCRIPTORS) as usize + 16 * vector;
            let ring = page[at + 5] >> 5 & 3;
            assert_eq!(
                ring,
                if vector == 3 || vector == 4 { 3 } else { 0 },
                "vector {vector}"
            );
            assert_eq!(
                page[at + 4],
                1,
                "vector {vector} uses the first interrupt stack"
            );
        }
    }
}
