//! System calls that ring 3 is told the answer of without an exit.
//!
//! A weak KVM leaves `SYSCALL` at ring 3 when it lands, so the landing can be
//! code of some length. Each vCPU has a landing of its own, one page, which
//! answers the calls whose answer never changes
//! ([`Call::never_changes`](crate::table::Call::never_changes)) and goes on to
//! the common landing, and so to the guard, with all others:
//!
//! ```text
//!   rcx  the address behind SYSCALL      r11  the program's flags      rax  the number
//!
//!   +0  rol, mov %cs, test, ror   at ring 0 after all?          -> ask
//!       test r11                  a flag that SYSCALL cleared?  -> ask
//!       cmp, je; cmp, je; ...     the answered numbers          -> block
//!  ask: jmp                       the common landing, everything as it came
//!  block:                         flags from r11, rax = the answer, jmp *%rcx
//! ```
//!
//! # What ring 3 can do with it
//!
//! Nothing that it could not do without: the page is code that ring 3 runs
//! with its own rights, cannot write, and that reads and writes no memory. All
//! it tells is the program's own process and thread ids.
//!
//! One thing must not happen: that the `jmp` to the program is made at ring 0.
//! A weak KVM that has to interpret a `SYSCALL` arrives at ring 0 as the
//! architecture says, so the level is looked at first. Registers alone take
//! part in that, so no other thread can disturb it, and ring 0 gets here in no
//! other way than by `SYSCALL`, at the start.
//!
//! # Interruptions
//!
//! A kick between the landing and the way back leaves the vCPU in this page.
//! [`place`] tells where, and the engine finishes the call or begins it anew.

use dune_x86::descriptors::{RFLAGS_IF, SYSCALL_FLAG_MASK};

use super::layout::{self, CpuIndex};
use crate::table::{self, Constant};

const PAGE: usize = 4096;

/// Flags that `SYSCALL` clears when it lands at ring 3: those that would
/// disturb the code there. Not IF, which nobody at ring 3 could set again.
pub(super) const FLAG_MASK: u64 = SYSCALL_FLAG_MASK & !RFLAGS_IF;

/// `rol $16, %rcx`
const ROTATE: [u8; 4] = [0x48, 0xc1, 0xc1, 16];
/// `mov %cs, %cx`; `test $3, %cl`; `mov $0, %cx`; `ror $16, %rcx`. An address
/// in the lower half has room for 16 bits. `mov` and `ror` leave ZF alone.
const LEVEL: [u8; 14] = [
    0x66, 0x8c, 0xc9, 0xf6, 0xc1, 3, 0x66, 0xb9, 0, 0, 0x48, 0xc1, 0xc9, 16,
];
/// `jz rel32`, `jnz rel32`, `jmp rel32`
const JZ: [u8; 2] = [0x0f, 0x84];
const JNZ: [u8; 2] = [0x0f, 0x85];
const JMP: [u8; 1] = [0xe9];
/// `test imm32, %r11d`
const TEST_R11: [u8; 3] = [0x41, 0xf7, 0xc3];
/// `cmp imm32, %eax`
const CMP_EAX: [u8; 1] = [0x3d];
/// The six arithmetic flags from r11: `movzx %r11b, %eax`; `shl $8, %eax`;
/// `bt $11, %r11d`; `setc %al`; `add $0x7f, %al`, which overflows if that was
/// set; `sahf`.
const FLAGS: [u8; 18] = [
    0x41, 0x0f, 0xb6, 0xc3, 0xc1, 0xe0, 8, 0x41, 0x0f, 0xba, 0xe3, 11, 0x0f, 0x92, 0xc0, 0x04,
    0x7f, 0x9e,
];
/// `mov imm32, %rax`, sign-extended
const MOV_RAX: [u8; 3] = [0x48, 0xc7, 0xc0];
/// `jmp *%rcx`
const JMP_RCX: [u8; 2] = [0xff, 0xe1];

/// Bytes from one answer's block to the next one's.
const BLOCK: usize = 32;
const _: () = assert!(FLAGS.len() + MOV_RAX.len() + 4 + JMP_RCX.len() <= BLOCK);

/// The answered calls, those first that programs make most.
fn answered() -> impl Iterator<Item = (u32, Constant)> {
    let all = || {
        let rows = table::calls().iter();
        rows.filter_map(|call| Some((call.nr, call.never_changes()?)))
    };
    let is_id = |(_, answer): &(u32, Constant)| !matches!(answer, Constant::Refused(_));
    all()
        .filter(is_id)
        .chain(all().filter(move |call| !is_id(call)))
}

/// Each answer once, in the order of the blocks.
fn answers() -> Vec<Constant> {
    let mut answers = Vec::new();
    for (_, answer) in answered() {
        if !answers.contains(&answer) {
            answers.push(answer);
        }
    }
    answers
}

/// Offset of the first block.
fn blocks_start() -> usize {
    let head = ROTATE.len() + LEVEL.len() + JZ.len() + 4 + TEST_R11.len() + 4 + JNZ.len() + 4;
    let compared = answered().count() * (CMP_EAX.len() + 4 + JZ.len() + 4);
    (head + compared + JMP.len() + 4).next_multiple_of(BLOCK)
}

/// What `answer` is for this thread, as the kernel leaves it in `rax`.
pub(super) fn value(answer: Constant, pid: u32, tid: u32) -> u64 {
    match answer {
        Constant::Refused(errno) => errno.as_rax(),
        Constant::ProcessId => u64::from(pid),
        Constant::ThreadId => u64::from(tid),
    }
}

/// Code under construction.
struct Code {
    page: [u8; PAGE],
    at: usize,
    /// Where the page lies in the guest.
    base: u64,
}

impl Code {
    fn put(&mut self, bytes: &[u8]) {
        self.page[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn immediate(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    /// The distance to `target`, at the end of a jump.
    fn distance(&mut self, target: u64) {
        let next = self.base + self.at as u64 + 4;
        self.immediate(target.wrapping_sub(next) as u32);
    }
}

/// Contents of the page of a vCPU whose thread is `tid`, of the process `pid`.
pub(super) fn page(cpu: CpuIndex, pid: u32, tid: u32) -> [u8; PAGE] {
    let base = cpu.answers();
    let ask = layout::syscall_entry(super::machine::Landing::Ring3);
    let mut code = Code {
        page: [0xcc; PAGE],
        at: 0,
        base,
    };
    let start = blocks_start();
    let answers = answers();
    code.put(&ROTATE);
    code.put(&LEVEL);
    code.put(&JZ);
    code.distance(ask);
    code.put(&TEST_R11);
    code.immediate(FLAG_MASK as u32);
    code.put(&JNZ);
    code.distance(ask);
    for (number, answer) in answered() {
        let block = answers.iter().position(|one| *one == answer).unwrap_or(0);
        code.put(&CMP_EAX);
        code.immediate(number);
        code.put(&JZ);
        code.distance(base + (start + block * BLOCK) as u64);
    }
    code.put(&JMP);
    code.distance(ask);
    for (block, answer) in answers.into_iter().enumerate() {
        code.at = start + block * BLOCK;
        code.put(&FLAGS);
        code.put(&MOV_RAX);
        // Sign-extended: an error number is small and negative, an id below 2^31.
        code.immediate(value(answer, pid, tid) as u32);
        code.put(&JMP_RCX);
    }
    code.page
}

/// Where in the page the vCPU stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing is decided: number, `rcx` and `r11` are there as they came.
    Intact,
    /// The same, but that `rcx` is turned by 16 bits, of which something else
    /// took the place.
    Turned,
    /// This is the answer; `rcx` and `r11` are there as they came.
    Answering(Constant),
}

/// Where an instruction pointer this far into the page stands; `None` for what
/// is no code.
pub(super) fn place(offset: u64) -> Option<Place> {
    let offset = usize::try_from(offset).ok()?;
    let start = blocks_start();
    if offset == 0 {
        return Some(Place::Intact);
    }
    if offset < ROTATE.len() + LEVEL.len() {
        return Some(Place::Turned);
    }
    if offset < start {
        return Some(Place::Intact);
    }
    let answer = *answers().get((offset - start) / BLOCK)?;
    let end = FLAGS.len() + MOV_RAX.len() + 4 + JMP_RCX.len();
    ((offset - start) % BLOCK < end).then_some(Place::Answering(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_answers_fit_the_page() {
        assert!(blocks_start() + answers().len() * BLOCK <= PAGE);
        let numbers: Vec<u32> = answered().map(|(number, _)| number).collect();
        assert!(numbers.len() > 2 && numbers.len() < 300, "{numbers:?}");
    }

    #[test]
    fn jumps_lead_to_the_landing_and_to_the_block_of_the_answer() {
        let cpu = CpuIndex(7);
        let page = page(cpu, 70_000, 70_003);
        let base = cpu.answers();
        let target = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&page[at..at + 4]);
            (base + at as u64 + 4).wrapping_add_signed(i64::from(i32::from_le_bytes(bytes)))
        };
        let mut at = ROTATE.len() + LEVEL.len();
        assert_eq!(target(at + 2), layout::USER_CODE);
        at += 6 + TEST_R11.len() + 4;
        assert_eq!(target(at + 2), layout::USER_CODE);
        at += 6;
        for (number, answer) in answered() {
            assert_eq!(page[at], CMP_EAX[0]);
            assert_eq!(page[at + 1..at + 5], number.to_le_bytes());
            let block = (target(at + 7) - base) as usize;
            assert_eq!(place(block as u64), Some(Place::Answering(answer)));
            let immediate = block + FLAGS.len() + MOV_RAX.len();
            let expected = value(answer, 70_000, 70_003) as u32;
            assert_eq!(page[immediate..immediate + 4], expected.to_le_bytes());
            at += 11;
        }
        assert_eq!((page[at], target(at + 1)), (JMP[0], layout::USER_CODE));
    }

    #[test]
    fn every_place_is_known() {
        let head = (ROTATE.len() + LEVEL.len()) as u64;
        assert_eq!(place(0), Some(Place::Intact));
        assert_eq!(place(ROTATE.len() as u64), Some(Place::Turned));
        assert_eq!(place(head - 4), Some(Place::Turned));
        assert_eq!(place(head), Some(Place::Intact));
        let start = blocks_start() as u64;
        assert_eq!(place(start - 5), Some(Place::Intact));
        assert_eq!(place(start), Some(Place::Answering(Constant::ProcessId)));
        assert_eq!(
            place(start + 25),
            Some(Place::Answering(Constant::ProcessId))
        );
        assert_eq!(place(start + 27), None);
        assert_eq!(place(PAGE as u64 - 1), None);
    }
}
