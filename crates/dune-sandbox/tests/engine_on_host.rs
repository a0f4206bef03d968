//! The engine of the placement "on host", on this machine's own KVM: programs
//! of a few instructions in ring 3, and every way they can end.
#![expect(
    unsafe_code,
    reason = "programs in assembly, mapped where the test wants them"
)]

use std::arch::global_asm;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use dune_kvm::probe::{self, Placement};
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::engine::{Access, Engine, EngineError, PageFaultError, Trap, UserState};
use dune_sandbox::host;
use dune_sandbox::range::PageRange;

const PAGE: u64 = 4096;
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x1234_5678_9000;
const STACK: u64 = 0x3fff_f000_0000;
const STACK_LEN: u64 = 64 * PAGE;

const PROT_NONE: u64 = 0;
const PROT_READ: u64 = 1;
const PROT_READ_WRITE: u64 = 3;

const PF_WRITE_ABSENT: PageFaultError =
    PageFaultError::from_bits_retain(PageFaultError::USER.bits() | PageFaultError::WRITE.bits());

/// User space is one for the whole process: tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// A piece of position-independent code.
macro_rules! program {
    ($name:ident, $($line:literal),* $(,)?) => {
        global_asm!(
            ".pushsection .rodata",
            concat!("program_", stringify!($name), ":"),
            $($line,)*
            concat!("program_", stringify!($name), "_end:"),
            ".byte 0",
            ".popsection",
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("program_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("program_", stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: the two labels enclose the code.
            unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

fn mmap(start: u64, len: u64, prot: u64) {
    const MAP_PRIVATE_ANONYMOUS_FIXED_NORESERVE: u64 = 0x4032;
    let flags = MAP_PRIVATE_ANONYMOUS_FIXED_NORESERVE;
    // SAFETY: user space holds nothing but what these tests put there.
    unsafe { host::syscall(9, [start, len, prot, flags, u64::MAX, 0]) }.unwrap();
}

fn mprotect(start: u64, len: u64, prot: u64) {
    // SAFETY: as above.
    unsafe { host::syscall(10, [start, len, prot, 0, 0, 0]) }.unwrap();
}

fn munmap(start: u64, len: u64) {
    // SAFETY: as above.
    unsafe { host::syscall(11, [start, len, 0, 0, 0, 0]) }.unwrap();
}

/// Writes to memory of the program that the test has mapped.
fn poke(addr: u64, value: u64) {
    // SAFETY: the test has mapped it.
    unsafe { (addr as *mut u64).write_volatile(value) };
}

/// Reads memory of the program that the test has mapped.
fn peek(addr: u64) -> u64 {
    // SAFETY: the test has mapped it.
    unsafe { (addr as *const u64).read_volatile() }
}

fn range(start: u64, len: u64) -> PageRange {
    PageRange::new(start, len).unwrap()
}

/// A program, and as much of a guard as a test needs.
struct Program {
    engine: OnHost,
    user: UserState,
    areas: Vec<(PageRange, Access)>,
    faults: u32,
    _turn: std::sync::MutexGuard<'static, ()>,
}

impl Program {
    /// Code, a page of data and a stack.
    fn new(code: &[u8]) -> Self {
        let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if probe::probe().natural_placement() == Placement::Lab {
            panic!("this test needs a KVM: {}", probe::probe().kvm);
        }
        let mut program = Self {
            engine: OnHost::new().unwrap(),
            user: UserState::default(),
            areas: Vec::new(),
            faults: 0,
            _turn: turn,
        };
        let code_len = (code.len() as u64).next_multiple_of(PAGE);
        program.area(CODE, code_len, PROT_READ_WRITE, Access::READ | Access::EXEC);
        // SAFETY: just mapped, and large enough.
        unsafe { (CODE as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
        mprotect(CODE, code_len, PROT_READ);
        program.area(DATA, PAGE, PROT_READ_WRITE, Access::READ | Access::WRITE);
        program.area(
            STACK,
            STACK_LEN,
            PROT_READ_WRITE,
            Access::READ | Access::WRITE,
        );
        program.user.regs.rip = CODE;
        program.user.regs.rsp = STACK + STACK_LEN;
        program.user.regs.rdi = DATA;
        program
    }

    fn area(&mut self, start: u64, len: u64, prot: u64, access: Access) {
        mmap(start, len, prot);
        self.areas.push((range(start, len), access));
    }

    /// Runs to the first trap that is not a fault to be served.
    fn try_run(&mut self) -> Result<Trap, EngineError> {
        loop {
            let trap = self.engine.run(&mut self.user)?;
            let Trap::PageFault { addr, error } = trap else {
                return Ok(trap);
            };
            let area = self.areas.iter().find(|(range, _)| range.contains(addr));
            match area {
                Some(&(range, access)) if access.contains(error.needed()) => {
                    self.faults += 1;
                    assert!(self.faults < 100_000, "the same fault for ever: {trap:?}");
                    self.engine.admit(addr, range, access)?;
                }
                _ => return Ok(trap),
            }
        }
    }

    fn run(&mut self) -> Trap {
        self.try_run().unwrap()
    }

    /// Runs to a system call and returns its number.
    fn syscall(&mut self) -> u64 {
        match self.run() {
            Trap::Syscall => self.user.regs.rax,
            trap => panic!(
                "{trap:?} at {:#x} instead of a system call",
                self.user.regs.rip
            ),
        }
    }

    fn exception(&mut self) -> (u8, u32) {
        match self.run() {
            Trap::Exception { vector, error, .. } => (vector, error),
            trap => panic!(
                "{trap:?} at {:#x} instead of an exception",
                self.user.regs.rip
            ),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        for &(range, _) in &self.areas {
            munmap(range.start(), range.len());
        }
    }
}

program!(
    sum,
    "xor eax, eax",
    "mov ecx, 1000000",
    "2: add rax, rcx",
    "dec rcx",
    "jnz 2b",
    "mov [rdi], rax",
    "push rax",
    "pop rbx",
    "syscall",
    "ud2",
);

#[test]
fn a_program_computes_and_calls() {
    let mut program = Program::new(sum());
    assert_eq!(program.syscall(), 500_000_500_000);
    assert_eq!(program.user.regs.rbx, 500_000_500_000);
    assert_eq!(peek(DATA), 500_000_500_000);
    let regs = program.user.regs;
    assert_eq!(regs.rcx, regs.rip);
    assert_eq!(regs.rip, CODE + sum().len() as u64 - 2);
    assert_eq!(
        regs.r11 & UserState::RFLAGS_USER,
        regs.rflags & UserState::RFLAGS_USER
    );
    assert_eq!(program.exception(), (6, 0));
    assert_eq!(
        program.user.regs.rip, regs.rip,
        "a fault leaves rip at the instruction"
    );
}

program!(
    registers,
    "1: syscall",
    "inc rax",
    "inc rbx",
    "inc rdx",
    "inc rsi",
    "inc rdi",
    "inc rbp",
    "inc rsp",
    "inc r8",
    "inc r9",
    "inc r10",
    "inc r12",
    "inc r13",
    "inc r14",
    "inc r15",
    "jmp 1b",
);

#[test]
fn every_register_goes_in_and_out() {
    let mut program = Program::new(registers());
    program.syscall();
    for round in 0..3_u64 {
        let regs = &mut program.user.regs;
        let mut value = 0xdead_beef_0000_0000 + round;
        for register in [
            &mut regs.rax,
            &mut regs.rbx,
            &mut regs.rdx,
            &mut regs.rsi,
            &mut regs.rdi,
            &mut regs.rbp,
            &mut regs.rsp,
            &mut regs.r8,
            &mut regs.r9,
            &mut regs.r10,
            &mut regs.r12,
            &mut regs.r13,
            &mut regs.r14,
            &mut regs.r15,
        ] {
            *register = value;
            value += 0x1_0001;
        }
        let before = *regs;
        program.syscall();
        let regs = program.user.regs;
        let pairs = [
            (before.rax, regs.rax),
            (before.rbx, regs.rbx),
            (before.rdx, regs.rdx),
            (before.rsi, regs.rsi),
            (before.rdi, regs.rdi),
            (before.rbp, regs.rbp),
            (before.rsp, regs.rsp),
            (before.r8, regs.r8),
            (before.r9, regs.r9),
            (before.r10, regs.r10),
            (before.r12, regs.r12),
            (before.r13, regs.r13),
            (before.r14, regs.r14),
            (before.r15, regs.r15),
        ];
        for (n, (before, after)) in pairs.into_iter().enumerate() {
            assert_eq!(after, before + 1, "register {n}");
        }
    }
}

program!(touch, "mov qword ptr [rdi], 1", "mov rax, [rdi]", "syscall");

#[test]
fn a_fault_outside_every_area_is_reported() {
    let mut program = Program::new(touch());
    for addr in [
        0x5000,
        DATA + PAGE,
        0x3fff_0000_0008,
        0x5555_5555_0000,
        0x7fff_8000_4000,
    ] {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = addr;
        let trap = program.run();
        let Trap::PageFault { addr: found, error } = trap else {
            panic!("{trap:?}")
        };
        assert_eq!(found, addr);
        assert_eq!(
            error & !PageFaultError::PRESENT,
            PF_WRITE_ABSENT,
            "{addr:#x}"
        );
        assert_eq!(program.user.regs.rip, CODE);
    }
    // The engine is as good as before.
    program.user.regs.rip = CODE;
    program.user.regs.rdi = DATA;
    assert_eq!(program.syscall(), 1);
}

/// A program that uses memory at ever other places, and gives it up, does not use up the
/// memory slots; and a slot's second place shows nothing of its first.
#[test]
fn windows_over_memory_that_is_gone_are_taken_back() {
    const FIRST: u64 = 0x100_0000_0000;
    const WINDOW: u64 = 64 << 20;
    const ROUNDS: u64 = 1000;
    let mut program = Program::new(exchange());
    let before = program.engine.holdings();
    let mut most = 0;
    for round in 0..ROUNDS {
        let at = FIRST + round * WINDOW;
        mmap(at, PAGE, PROT_READ_WRITE);
        program
            .areas
            .push((range(at, PAGE), Access::READ | Access::WRITE));
        program.user.regs.rip = CODE;
        program.user.regs.rdi = at;
        program.user.regs.rsi = round + 1;
        assert_eq!(program.syscall(), 0, "{round}: what was there before");
        assert_eq!(peek(at), round + 1);
        // The memory that stays is as it was.
        program.user.regs.rip = CODE;
        program.user.regs.rdi = DATA;
        program.user.regs.rsi = round + 1;
        assert_eq!(program.syscall(), round);
        program.engine.revoke(range(at, PAGE)).unwrap();
        munmap(at, PAGE);
        program.areas.pop();
        most = most.max(program.engine.holdings().slots);
    }
    assert!(most < before.slots + ROUNDS as usize / 3, "{most} slots");
    assert_eq!(program.engine.holdings().vcpus, before.vcpus);
}

program!(exchange, "mov rax, [rdi]", "mov [rdi], rsi", "syscall");

#[test]
fn the_guards_pages_cannot_be_written() {
    let mut program = Program::new(touch());
    // All but the scratch page, which holds the program's own state. The last is
    // where a weak KVM's vCPU has answers.
    program.engine.answer_by_itself(true).unwrap();
    for page in (0..5).chain([0x103]) {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = 0x7fff_8000_0000 + page * PAGE;
        let trap = program.run();
        assert!(
            matches!(trap, Trap::PageFault { .. }),
            "page {page}: {trap:?}"
        );
    }
}

program!(load, "mov rax, [rdi]", "syscall");

#[test]
fn ring_0_pages_cannot_be_read() {
    let mut program = Program::new(load());
    for page in 1..5 {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = 0x7fff_8000_0000 + page * PAGE;
        let trap = program.run();
        assert!(
            matches!(trap, Trap::PageFault { .. }),
            "page {page}: {trap:?}"
        );
    }
}

#[test]
fn memory_of_this_process_is_not_there() {
    let secret = Box::new(0x5ec2e7_u64);
    let mut program = Program::new(load());
    program.user.regs.rdi = (&raw const *secret).addr() as u64;
    let trap = program.run();
    assert!(matches!(trap, Trap::PageFault { .. }), "{trap:?}");
}

#[test]
fn rights_given_and_taken_are_what_ring_3_has() {
    let mut program = Program::new(touch());
    assert_eq!(program.syscall(), 1);
    for round in 0..3 {
        // Read only.
        program.engine.revoke(range(DATA, PAGE)).unwrap();
        mprotect(DATA, PAGE, PROT_READ);
        program.areas[1].1 = Access::READ;
        program.user.regs.rip = CODE;
        let trap = program.run();
        let Trap::PageFault { addr, error } = trap else {
            panic!("round {round}: {trap:?}")
        };
        assert_eq!((addr, error.needed()), (DATA, Access::WRITE));
        // Nothing at all.
        program.engine.revoke(range(DATA, PAGE)).unwrap();
        mprotect(DATA, PAGE, PROT_NONE);
        program.areas[1].1 = Access::empty();
        let trap = program.run();
        assert!(
            matches!(trap, Trap::PageFault { addr: DATA, .. }),
            "round {round}: {trap:?}"
        );
        // Everything again.
        mprotect(DATA, PAGE, PROT_READ_WRITE);
        program.areas[1].1 = Access::READ | Access::WRITE;
        assert_eq!(program.syscall(), 1);
    }
}

#[test]
fn a_right_added_to_a_page_in_use_is_seen() {
    let mut program = Program::new(touch());
    program.areas[1].1 = Access::READ;
    program.user.regs.rip = CODE + touch().len() as u64 - 5;
    program.syscall();
    program.areas[1].1 = Access::READ | Access::WRITE;
    program.user.regs.rip = CODE;
    assert_eq!(program.syscall(), 1);
}

#[test]
fn a_page_replaced_is_seen() {
    let mut program = Program::new(load());
    for value in 1..10_u64 {
        program.engine.revoke(range(DATA, PAGE)).unwrap();
        mmap(DATA, PAGE, PROT_READ_WRITE);
        poke(DATA, value);
        program.user.regs.rip = CODE;
        assert_eq!(program.syscall(), value);
    }
}

program!(jump, "jmp rdi");

#[test]
fn data_cannot_be_executed() {
    let mut program = Program::new(jump());
    let trap = program.run();
    let Trap::PageFault { addr, error } = trap else {
        panic!("{trap:?}")
    };
    assert_eq!((addr, error.needed()), (DATA, Access::EXEC));
    assert_eq!(program.user.regs.rip, DATA);
}

#[test]
fn a_jump_beyond_the_canonical_addresses_is_a_fault_of_the_program() {
    let mut program = Program::new(jump());
    for target in [1 << 47, 0x8000_dead_beef_0000, 0xffff_7fff_ffff_ffff] {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = target;
        assert_eq!(program.exception().0, 13, "{target:#x}");
    }
    // An engine told to start there says the same.
    program.user.regs.rip = 1 << 47;
    assert_eq!(program.exception(), (13, 0));
    // Kernel addresses are canonical, and not there.
    program.user.regs.rip = CODE;
    program.user.regs.rdi = 0xffff_ffff_8000_0000;
    let trap = program.run();
    assert!(
        matches!(
            trap,
            Trap::PageFault { .. } | Trap::Exception { vector: 13, .. }
        ),
        "{trap:?}"
    );
}

#[test]
fn the_guards_stubs_are_of_no_use_to_a_program() {
    let mut program = Program::new(jump());
    program.user.regs.rax = 0x77;
    // Every place in the code that ring 3 might run.
    for offset in 0..0x40 {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = 0x7fff_8000_0000 + offset;
        // As though SYSCALL had been made by code at an address of no code.
        program.user.regs.rcx = 0xffff_8000_0000_0000;
        program.user.regs.r11 = u64::MAX;
        let trap = program.run();
        assert_ne!(trap, Trap::Syscall, "at {offset:#x}");
        assert_eq!(program.user.regs.rflags & !UserState::RFLAGS_USER, 0x202);
    }
    // And in the code that it may not.
    program.user.regs.rflags = 0x202;
    for offset in (0..0x440).step_by(16) {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = 0x7fff_8000_1000 + offset;
        let trap = program.run();
        assert!(
            matches!(trap, Trap::PageFault { .. }),
            "at {offset:#x}: {trap:?}"
        );
    }
}

program!(
    ports,
    "out 0xd5, al",
    "out 0xd5, eax",
    "mov dx, 0xd5",
    "out dx, al",
    "in al, dx",
    "in al, 0xd5",
    "out 0x80, al",
    "in eax, dx",
    "lea rsi, [rip]",
    "outsb",
    "mov ecx, 3",
    "rep outsb",
    "rep insb",
);

#[test]
fn ports_are_not_for_ring_3() {
    let code = ports();
    let mut program = Program::new(code);
    for at in [0, 2, 8, 9, 10, 12, 14] {
        program.user.regs.rip = CODE + at;
        program.user.regs.rdx = 0xd5;
        program.user.regs.rax = 0x1234_5678;
        let (vector, _) = loop {
            match program.run() {
                Trap::Interrupted => {}
                Trap::Exception { vector, error, .. } => break (vector, error),
                trap => panic!("{trap:?} at {at}"),
            }
        };
        assert_eq!(vector, 13, "at {at}");
        assert_eq!(program.user.regs.rax, 0x1234_5678, "at {at}");
    }
    // String forms.
    let strings = code.len() as u64 - (2 + 2 + 5 + 1);
    for at in [strings, strings + 6, strings + 8] {
        program.user.regs.rip = CODE + at;
        program.user.regs.rsi = DATA;
        program.user.regs.rdi = DATA;
        program.user.regs.rcx = 3;
        let trap = loop {
            match program.run() {
                Trap::Interrupted => {}
                trap => break trap,
            }
        };
        assert!(
            matches!(trap, Trap::Exception { vector: 13, .. }),
            "{trap:?}"
        );
    }
}

program!(breakpoint, "nop", "int3", "nop");

#[test]
fn a_breakpoint_leaves_rip_behind_it() {
    let mut program = Program::new(breakpoint());
    assert_eq!(program.exception(), (3, 0));
    assert_eq!(program.user.regs.rip, CODE + 2);
}

program!(divide, "xor ecx, ecx", "div ecx");

#[test]
fn a_division_by_zero_is_an_exception() {
    let mut program = Program::new(divide());
    assert_eq!(program.exception(), (0, 0));
    assert_eq!(program.user.regs.rip, CODE + 2);
}

program!(
    privileged,
    "hlt",
    "cli",
    "mov rax, cr0",
    "rdmsr",
    "lgdt [rdi]",
    "invlpg [rdi]",
    "wbinvd",
    "swapgs",
    "clts",
    "mov cr3, rax",
    "sysretq",
);

#[test]
fn privileged_instructions_are_faults() {
    let code = privileged();
    let mut program = Program::new(code);
    for at in [0, 1, 2, 5, 7, 10, 13, 15, 18, 20, 23] {
        program.user.regs.rip = CODE + at;
        program.user.regs.rcx = 0xc000_0082;
        let (vector, _) = program.exception();
        assert!(vector == 13 || vector == 6, "at {at}: vector {vector}");
        assert_eq!(program.user.regs.rip, CODE + at);
    }
}

program!(
    interrupts, "int 0x80", "int 0x50", "int 14", "int 1", "int 8", "int 2"
);

#[test]
fn software_interrupts_open_no_gate() {
    let mut program = Program::new(interrupts());
    for at in [0, 2, 4, 6, 8, 10] {
        program.user.regs.rip = CODE + at;
        let (vector, _) = program.exception();
        assert!(vector == 13 || vector == 6, "at {at}: vector {vector}");
    }
}

program!(step, "nop", "nop", "mov eax, 39", "syscall", "nop", "nop");

#[test]
fn single_steps_stop_after_each_instruction() {
    const TF: u64 = 1 << 8;
    const SINGLE_STEP: u64 = 1 << 14;
    let mut program = Program::new(step());
    program.user.regs.rip = CODE;
    program.user.regs.rflags |= TF;
    for at in [1, 2, 7] {
        let trap = program.run();
        let Trap::Exception { vector: 1, dr6, .. } = trap else {
            panic!("{trap:?}")
        };
        assert_eq!(program.user.regs.rip, CODE + at);
        assert_ne!(dr6 & SINGLE_STEP, 0, "dr6 {dr6:#x}");
    }
    assert_eq!(program.syscall(), 39);
    assert_ne!(program.user.regs.rflags & TF, 0);
    program.user.regs.rflags &= !TF;
    program.user.regs.rip = CODE + 2;
    assert_eq!(program.syscall(), 39);
}

program!(
    flags, "push rdi", "popfq", "syscall", "pushfq", "pop rax", "syscall"
);

#[test]
fn odd_flags_do_not_reach_the_guard() {
    const TF: u64 = 1 << 8;
    let mut program = Program::new(flags());
    for bit in 0..22 {
        program.user.regs.rip = CODE;
        program.user.regs.rsp = STACK + STACK_LEN;
        program.user.regs.rflags = 0x202;
        program.user.regs.rdi = 0x202 | 1 << bit;
        let mut trap = program.run();
        while matches!(trap, Trap::Exception { vector: 1, .. }) {
            assert_eq!(1 << bit, TF);
            trap = program.run();
        }
        assert_eq!(trap, Trap::Syscall, "bit {bit}");
        let kept = program.user.regs.rflags & !UserState::RFLAGS_USER;
        assert_eq!(kept, 0x202, "bit {bit}");
        program.user.regs.rflags &= !TF;
        assert_eq!(program.run(), Trap::Syscall, "bit {bit}");
        let seen = program.user.regs.rax;
        assert_eq!(seen & 0x3000, 0, "IOPL with bit {bit}");
        assert_ne!(seen & 0x200, 0, "IF with bit {bit}");
    }
}

program!(
    asks_and_looks,
    "push rdi",
    "popfq",
    "syscall",
    "pushfq",
    "pop rdi",
    "cld",
    "mov rsi, rax",
    "mov eax, 1",
    "syscall",
);

const GETPID: u64 = 39;
const GETTID: u64 = 186;
const PTRACE: u64 = 101;

/// Whether the KVM here lets the landing answer: one that leaves `SYSCALL` at ring 3.
fn answers_at_ring3() -> bool {
    matches!(
        &probe::probe().kvm,
        probe::Kvm::Weak { measurements, .. } if measurements.syscall_cpl == Some(3)
    )
}

#[test]
fn answers_that_never_change_leave_everything_else_as_it_was() {
    let mut program = Program::new(asks_and_looks());
    let tid = std::fs::read_link("/proc/thread-self").unwrap();
    let tid: u64 = tid.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let expected = [
        (GETPID, u64::from(std::process::id())),
        (GETTID, tid),
        (PTRACE, (-1_i64) as u64),
        // As the kernel: the number is the low half.
        (0xdead_0000_0000 | GETPID, u64::from(std::process::id())),
    ];
    // Any of the flags that a program may have, but for single steps.
    let flags = [
        0, 1, 4, 0x10, 0x40, 0x80, 0x800, 0x8d5, 0x400, 0x4000, 0x4_0000,
    ];
    for (may, (number, answer)) in [true, false]
        .into_iter()
        .flat_map(|may| expected.map(|call| (may, call)))
    {
        program.engine.answer_by_itself(may).unwrap();
        for flags in flags {
            let asked = !may || !answers_at_ring3() || flags & 0x4_4400 != 0;
            let user = &mut program.user;
            user.regs.rip = CODE;
            user.regs.rsp = STACK + STACK_LEN;
            user.regs.rflags = 0x202;
            user.regs.rax = number;
            user.regs.rdi = 0x202 | flags;
            user.regs.rbx = 0xb;
            user.regs.rdx = 0xd;
            user.regs.r15 = 0xf;
            if asked {
                assert_eq!(program.syscall(), number, "flags {flags:#x}");
                assert_eq!(program.user.regs.rip, CODE + 4);
                program.user.regs.rax = answer;
            }
            assert_eq!(program.syscall(), 1, "call {number:#x}, flags {flags:#x}");
            let regs = &program.user.regs;
            assert_eq!(regs.rsi, answer, "call {number:#x}, flags {flags:#x}");
            // The guard takes NT away.
            let kept = 0x202 | flags & UserState::RFLAGS_USER;
            assert_eq!(regs.rdi, kept, "call {number:#x}");
            assert_eq!((regs.rbx, regs.rdx, regs.r15), (0xb, 0xd, 0xf));
            assert_eq!(regs.rsp, STACK + STACK_LEN);
        }
    }
}

#[test]
fn calls_with_an_answer_of_their_own_reach_the_guard() {
    let mut program = Program::new(asks_and_looks());
    program.engine.answer_by_itself(true).unwrap();
    for number in [0, 38, 110, 512, 9_999, u64::from(u32::MAX)] {
        program.user.regs.rip = CODE;
        program.user.regs.rsp = STACK + STACK_LEN;
        program.user.regs.rax = number;
        program.user.regs.rdi = 0x202;
        assert_eq!(program.syscall(), number);
    }
}

#[test]
fn pages_of_answers_are_of_no_use_to_a_program() {
    if !answers_at_ring3() {
        return;
    }
    let mut program = Program::new(jump());
    program.engine.answer_by_itself(true).unwrap();
    let page = 0x7fff_8010_3000;
    for offset in 0..PAGE {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = page + offset;
        program.user.regs.rax = 0x77;
        program.user.regs.rcx = 0x7fff_ffff_f000;
        program.user.regs.r11 = u64::MAX;
        program.user.regs.rflags = 0x202;
        let trap = program.run();
        let regs = &program.user.regs;
        assert_eq!(
            regs.rflags & !UserState::RFLAGS_USER,
            0x202,
            "at {offset:#x}"
        );
        if trap == Trap::Syscall {
            assert!(regs.rip < 1 << 47, "at {offset:#x}");
        }
    }
}

program!(
    asks_without_a_stack,
    "mov rsp, rdi",
    "syscall",
    "mov rbx, rax",
    "mov eax, cs",
    "mov rsi, rax",
    "hlt",
);

/// A weak KVM has to interpret some of these `SYSCALL`s, and arrives at ring 0 then.
#[test]
fn no_answer_is_given_at_ring_0() {
    let mut program = Program::new(asks_without_a_stack());
    program.engine.answer_by_itself(true).unwrap();
    let pid = u64::from(std::process::id());
    for stack in [0, 8, DATA + 1, 1 << 47, 0x8000_dead_beef_0000, u64::MAX] {
        for _ in 0..3 {
            program.user.regs.rip = CODE;
            program.user.regs.rax = GETPID;
            program.user.regs.rdi = stack;
            let mut trap = program.run();
            if trap == Trap::Syscall {
                assert_eq!(program.user.regs.rax, GETPID);
                program.user.regs.rax = pid;
                trap = program.run();
            }
            assert!(
                matches!(trap, Trap::Exception { vector: 13, .. }),
                "{trap:?} with stack {stack:#x}"
            );
            assert_eq!(program.user.regs.rip, CODE + 13);
            assert_eq!((program.user.regs.rbx, program.user.regs.rsi & 3), (pid, 3));
        }
    }
}

program!(
    ids_for_ever,
    "1: mov eax, 39",
    "syscall",
    "cmp rax, r12",
    "jne 2f",
    "mov eax, 101",
    "syscall",
    "cmp rax, r13",
    "jne 2f",
    "inc rbx",
    "jmp 1b",
    "2: ud2",
);

/// The program is nearly always in the page of answers or in the kernel of it.
#[test]
fn kicks_reach_a_program_that_asks_for_nothing_but_its_id() {
    let mut program = Program::new(ids_for_ever());
    program.engine.answer_by_itself(true).unwrap();
    program.user.regs.r12 = u64::from(std::process::id());
    program.user.regs.r13 = (-1_i64) as u64;
    kicked(&mut program, Duration::from_micros(400), |program| {
        let mut kicks = 0;
        while kicks < 300 {
            match program.run() {
                Trap::Interrupted => kicks += 1,
                Trap::Syscall if program.user.regs.rax == GETPID => {
                    program.user.regs.rax = program.user.regs.r12;
                }
                Trap::Syscall if program.user.regs.rax == PTRACE => {
                    program.user.regs.rax = program.user.regs.r13;
                }
                trap => panic!("{trap:?} {:x?}", program.user),
            }
        }
    });
    assert!(program.user.regs.rbx > 0);
}

#[test]
fn bits_that_ring_3_may_not_have_are_dropped_at_entry() {
    let mut program = Program::new(flags());
    program.user.regs.rip = CODE + 4;
    program.user.regs.rflags = !(1 << 8 | 1 << 18);
    assert_eq!(program.run(), Trap::Syscall);
    assert_eq!(program.user.regs.rax & 0x3000, 0);
    assert_eq!(program.user.regs.rax & (1 << 14 | 1 << 17), 0);
}

program!(
    align,
    "pushfq",
    "or dword ptr [rsp], 0x40000",
    "popfq",
    "mov eax, [rdi + 1]",
    "syscall"
);

#[test]
fn alignment_checks_work_where_ring_3_asks_for_them() {
    let mut program = Program::new(align());
    match program.run() {
        Trap::Exception { vector: 17, .. } => {}
        Trap::Syscall => eprintln!("this CPU does not check (QEMU's does not)"),
        trap => panic!("{trap:?}"),
    }
}

program!(bases, "mov rax, fs:[0]", "mov rbx, gs:[8]", "syscall");

#[test]
fn segment_bases_are_the_programs() {
    let mut program = Program::new(bases());
    poke(DATA, 11);
    poke(DATA + 8, 22);
    program.user.fs_base = DATA;
    program.user.gs_base = DATA;
    assert_eq!(program.syscall(), 11);
    assert_eq!(program.user.regs.rbx, 22);
    assert_eq!((program.user.fs_base, program.user.gs_base), (DATA, DATA));
    program.user.fs_base = DATA + 8;
    program.user.regs.rip = CODE;
    assert_eq!(program.syscall(), 22);
}

program!(write_base, "wrfsbase rdi", "mov rax, fs:[0]", "syscall");

#[test]
fn a_base_written_by_the_program_is_reported() {
    let mut program = Program::new(write_base());
    poke(DATA, 33);
    match program.run() {
        Trap::Syscall => {
            assert_eq!(program.user.regs.rax, 33);
            assert_eq!(program.user.fs_base, DATA);
        }
        // A CPU without the instruction.
        trap => assert!(
            matches!(trap, Trap::Exception { vector: 6, .. }),
            "{trap:?}"
        ),
    }
}

program!(
    vectors,
    "vmovups ymm0, [rdi]",
    "vmovups ymm15, [rdi]",
    "syscall",
    "vmovups [rdi + 64], ymm0",
    "vmovups [rdi + 96], ymm15",
    "syscall",
);

#[test]
fn vector_registers_survive_traps_and_can_be_swapped() {
    if !std::is_x86_feature_detected!("avx") {
        eprintln!("no AVX on this CPU");
        return;
    }
    let mut program = Program::new(vectors());
    let pattern: [u8; 32] = std::array::from_fn(|n| n as u8 * 7 + 1);
    let words = || {
        pattern
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
    };
    for (at, word) in (DATA..).step_by(8).zip(words()) {
        poke(at, word);
    }
    program.syscall();
    let mut area = vec![0xff; program.engine.xstate_len()];
    program.engine.save_xstate(&mut area).unwrap();
    assert_eq!(area[160..176], pattern[..16], "xmm0");
    assert_eq!(area[576..592], pattern[16..], "the upper half of ymm0");
    assert_eq!(area[24..28], 0x1f80_u32.to_le_bytes(), "MXCSR");

    // Other values while a handler would run.
    program.engine.reset_xstate().unwrap();
    let mut clear = vec![0xff; program.engine.xstate_len()];
    program.engine.save_xstate(&mut clear).unwrap();
    assert_eq!(clear[160..176], [0; 16], "xmm0 after the reset");
    assert_eq!(clear[0..2], 0x37f_u16.to_le_bytes(), "FCW after the reset");

    program.engine.load_xstate(&area).unwrap();
    program.syscall();
    for at in [DATA + 64, DATA + 96] {
        for (at, word) in (at..).step_by(8).zip(words()) {
            assert_eq!(peek(at), word, "at {at:#x}");
        }
    }
}

program!(spin, "1: inc rax", "jmp 1b");

static KICK: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_alarm(_: i32) {
    // SAFETY: null, or the byte of an engine that outlives the signals.
    if let Some(byte) = unsafe { KICK.load(Ordering::SeqCst).as_ref() } {
        byte.store(1, Ordering::SeqCst);
    }
}

/// Runs `body` with the program, whose engine is kicked every so often meanwhile.
///
/// The signal goes to this thread: one for the process (a timer's) may interrupt
/// another, and a program that makes no exit would then run for ever.
fn kicked<R>(program: &mut Program, every: Duration, body: impl FnOnce(&mut Program) -> R) -> R {
    const SIGALRM: i32 = 14;
    /// Whatever way the body ends.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
            KICK.store(std::ptr::null_mut(), Ordering::SeqCst);
        }
    }
    KICK.store(program.engine.kick_byte().as_ptr(), Ordering::SeqCst);
    // SAFETY: the handler stores one byte.
    unsafe { signal(SIGALRM, on_alarm) };
    // SAFETY: no precondition.
    let me = unsafe { pthread_self() };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                std::thread::sleep(every);
                // SAFETY: the thread waits for this one.
                unsafe { pthread_kill(me, SIGALRM) };
            }
        });
        let _over = Over(&over);
        body(program)
    })
}

unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn pthread_self() -> usize;
    fn pthread_kill(thread: usize, number: i32) -> i32;
}

#[test]
fn a_kick_ends_a_program_that_makes_no_call() {
    const SIGUSR1: i32 = 10;
    let mut program = Program::new(spin());
    KICK.store(program.engine.kick_byte().as_ptr(), Ordering::SeqCst);
    // SAFETY: the handler stores one byte.
    unsafe { signal(SIGUSR1, on_alarm) };
    // SAFETY: no precondition.
    let me = unsafe { pthread_self() };
    for _ in 0..5 {
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            // SAFETY: the thread waits for this one.
            unsafe { pthread_kill(me, SIGUSR1) };
        });
        let before = program.user.regs.rax;
        assert_eq!(program.run(), Trap::Interrupted);
        assert!(program.user.regs.rax > before, "it has run meanwhile");
        assert!((CODE..CODE + 16).contains(&program.user.regs.rip));
        kicker.join().unwrap();
    }
    // A kick before the run: nothing is run.
    // SAFETY: the engine lives.
    unsafe { program.engine.kick_byte().as_ref() }.store(1, Ordering::SeqCst);
    let before = program.user;
    assert_eq!(program.run(), Trap::Interrupted);
    assert_eq!(program.user, before);
}

program!(
    calls_and_faults,
    "1: mov eax, 1",
    "syscall",
    "add rbx, rax",
    "mov rdx, [rsi]",
    "add rsi, 4096",
    "dec r12",
    "jnz 1b",
    "mov eax, 2",
    "syscall",
);

#[test]
fn kicks_at_any_moment_lose_nothing() {
    const ROUNDS: u64 = 3_000;
    const BIG: u64 = 0x2000_0000;
    let mut program = Program::new(calls_and_faults());
    program.area(
        BIG,
        ROUNDS * PAGE,
        PROT_READ_WRITE,
        Access::READ | Access::WRITE,
    );
    program.user.regs.rsi = BIG;
    program.user.regs.r12 = ROUNDS;
    let (mut calls, mut kicks) = (0, 0);
    kicked(&mut program, Duration::from_micros(300), |program| {
        loop {
            match program.run() {
                Trap::Interrupted => kicks += 1,
                Trap::Syscall if program.user.regs.rax == 1 => calls += 1,
                Trap::Syscall => break,
                trap => panic!("{trap:?}"),
            }
        }
    });
    assert_eq!((calls, program.user.regs.rbx), (ROUNDS, ROUNDS));
    assert!(kicks > 0);
}

#[test]
fn memory_in_many_places_is_reached() {
    let mut program = Program::new(touch());
    for n in 0..40_u64 {
        let at = 0x10_0000_0000 + n * (3 << 30) + n * PAGE;
        program.area(at, PAGE, PROT_READ_WRITE, Access::READ | Access::WRITE);
        program.user.regs.rip = CODE;
        program.user.regs.rdi = at;
        assert_eq!(program.syscall(), 1);
        assert_eq!(peek(at), 1);
    }
}

/// What a child of `fork` would close and unmap must still be the engine's.
#[test]
fn a_seed_that_does_not_grow_leaves_its_cpu_for_the_next() {
    let mut program = Program::new(touch());
    drop(program.engine.seed().unwrap());
    let one = program.engine.fds();
    drop(program.engine.seed().unwrap());
    assert_eq!(program.engine.fds(), one);
    for fd in one {
        let name = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert!(name.to_string_lossy().contains("kvm"), "{name:?}");
    }
}

#[test]
fn an_area_over_gib_borders_is_reached() {
    let mut program = Program::new(touch());
    let start = (9 << 30) - 2 * PAGE;
    program.area(
        start,
        4 * PAGE,
        PROT_READ_WRITE,
        Access::READ | Access::WRITE,
    );
    for page in 0..4 {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = start + page * PAGE;
        assert_eq!(program.syscall(), 1);
    }
}

#[test]
fn what_the_host_cannot_supply_is_a_host_fault() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGE).unwrap();
    let mut program = Program::new(load());
    const MAP_SHARED_FIXED: u64 = 0x11;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file) as u64;
    // SAFETY: user space is the tests'.
    unsafe { host::syscall(9, [DATA, 2 * PAGE, PROT_READ, MAP_SHARED_FIXED, fd, 0]) }.unwrap();
    program.areas[1] = (range(DATA, 2 * PAGE), Access::READ);
    assert_eq!(program.syscall(), 0);
    program.user.regs.rip = CODE;
    program.user.regs.rdi = DATA + PAGE + 8;
    let trap = program.run();
    let Trap::HostFault { addr, .. } = trap else {
        panic!("{trap:?}")
    };
    assert_eq!(addr & !(PAGE - 1), DATA + PAGE);
    assert_eq!(program.user.regs.rip, CODE);
    // The program can go on elsewhere.
    program.user.regs.rdi = DATA;
    loop {
        match program.run() {
            Trap::Interrupted => {}
            trap => break assert_eq!(trap, Trap::Syscall),
        }
    }
}

program!(
    compat,
    "push 0x23",
    "lea rax, [rip + 2f]",
    "push rax",
    "retfq",
    "2: nop",
    "syscall",
    "ud2"
);

#[test]
fn code_of_32_bits_is_not_served() {
    let mut program = Program::new(compat());
    let trap = program.run();
    assert!(
        matches!(trap, Trap::Exception { .. } | Trap::PageFault { .. }),
        "{trap:?}"
    );
}

program!(stack, "mov rsp, rdi", "push rax", "syscall");

#[test]
fn an_odd_stack_is_the_programs_own_trouble() {
    let mut program = Program::new(stack());
    for rsp in [0, 8, 1 << 47, 0x8000_0000_0000_1000, 0xffff_ffff_ffff_f000] {
        program.user.regs.rip = CODE;
        program.user.regs.rdi = rsp;
        let trap = program.run();
        assert!(
            matches!(trap, Trap::Exception { .. } | Trap::PageFault { .. }),
            "{trap:?}"
        );
        assert_eq!(program.user.regs.rsp, rsp);
    }
    // SYSCALL does not care for it.
    program.user.regs.rip = CODE + 4;
    program.user.regs.rsp = 0xffff_ffff_ffff_f000;
    assert_eq!(program.run(), Trap::Syscall);
}

program!(
    walk,
    "1: mov byte ptr [rdi], 1",
    "add rdi, 4096",
    "dec rcx",
    "jnz 1b",
    "syscall",
);

/// Numbers that look random and are the same in each run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn throw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// What a hostile program would try first; the dice do the rest.
const NASTY: &[&[u8]] = &[
    &[0x0f, 0x01, 0xc1],             // vmcall
    &[0x0f, 0x01, 0xd9],             // vmmcall
    &[0x0f, 0x01, 0xd8],             // vmrun
    &[0x0f, 0x01, 0xda],             // vmload
    &[0x0f, 0x34],                   // sysenter
    &[0x0f, 0x35],                   // sysexit
    &[0x0f, 0x07],                   // sysret
    &[0x48, 0x0f, 0x07],             // sysretq
    &[0xf1],                         // int1
    &[0xcf],                         // iretd
    &[0x48, 0xcf],                   // iretq
    &[0x48, 0xcb],                   // retfq
    &[0x8e, 0xd0],                   // mov ss, eax
    &[0x8e, 0xd8],                   // mov ds, eax
    &[0x8e, 0xe0],                   // mov fs, eax
    &[0x8e, 0xe8],                   // mov gs, eax
    &[0x0f, 0x01, 0x07],             // sgdt [rdi]
    &[0x0f, 0x01, 0x0f],             // sidt [rdi]
    &[0x0f, 0x01, 0xe0],             // smsw eax
    &[0x0f, 0x00, 0xc8],             // str eax
    &[0x0f, 0x00, 0xc0],             // sldt eax
    &[0x0f, 0x01, 0xd1],             // xsetbv
    &[0x0f, 0x01, 0xef],             // wrpkru
    &[0x0f, 0xc7, 0xf0],             // rdrand eax
    &[0x0f, 0x33],                   // rdpmc
    &[0x0f, 0x01, 0xc8],             // monitor
    &[0x0f, 0x01, 0xc9],             // mwait
    &[0x0f, 0x01, 0xf9],             // rdtscp
    &[0x0f, 0xa2],                   // cpuid
    &[0x0f, 0x09],                   // wbinvd
    &[0x0f, 0x21, 0xc0],             // mov rax, dr0
    &[0x0f, 0x23, 0xf8],             // mov dr7, rax
    &[0x0f, 0x22, 0xc0],             // mov cr0, rax
    &[0x44, 0x0f, 0x20, 0xc0],       // mov rax, cr8
    &[0xf3, 0x48, 0x0f, 0xae, 0xd0], // wrfsbase rax
    &[0xf3, 0x48, 0x0f, 0xae, 0xd8], // wrgsbase rax
    &[0x9d],                         // popfq
    &[0xe6, 0xd5],                   // out 0xd5, al
    &[0xe4, 0xd5],                   // in al, 0xd5
    &[0xf3, 0x6e],                   // rep outsb
    &[0xcd, 0x80],                   // int 0x80
    &[0xcc],                         // int3
    &[0x0f, 0x05],                   // syscall
    &[0xff, 0xe0],                   // jmp rax
    &[0x0f, 0xae, 0x0f],             // fxrstor [rdi]
    &[0x0f, 0xae, 0x2f],             // xrstor [rdi]
    &[0xdb, 0xe3],                   // fninit
    &[0xc7, 0xf8, 0, 0, 0, 0],       // xbegin
];

fn hostile_program(dice: &mut Dice) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..dice.throw() % 4 {
        code.extend_from_slice(NASTY[dice.throw() as usize % NASTY.len()]);
    }
    code.extend((0..8).flat_map(|_| dice.throw().to_le_bytes()));
    for _ in 0..dice.throw() % 4 {
        code.extend_from_slice(NASTY[dice.throw() as usize % NASTY.len()]);
    }
    code
}

/// Registers as likely to be a guard's address, a selector or a page of the
/// program as anything else.
fn hostile_value(dice: &mut Dice) -> u64 {
    const LIKELY: [u64; 17] = [
        0,
        3,
        0x10,
        0x23,
        0x2b,
        0x33,
        0x40,
        0xd5,
        CODE,
        DATA,
        DATA + PAGE - 1,
        STACK + PAGE,
        0x7fff_8000_0000,
        0x7fff_8000_1000,
        0x7fff_8010_3000,
        0x7fff_ffff_ffff,
        0xffff_8000_0000_0000,
    ];
    match dice.throw() % 4 {
        0 => dice.throw(),
        1 => dice.throw() >> (dice.throw() % 64),
        _ => LIKELY[dice.throw() as usize % LIKELY.len()],
    }
}

/// `DUNE_HOSTILE_PROGRAMS` sets how many are tried, `DUNE_HOSTILE_SEED` which.
#[test]
fn no_instruction_harms_the_engine() {
    let setting = |name: &str, default: u64| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let programs = setting("DUNE_HOSTILE_PROGRAMS", 200);
    let mut dice = Dice(setting("DUNE_HOSTILE_SEED", 0x5eed));
    let mut program = Program::new(&[0x90; 64]);
    program.engine.answer_by_itself(true).unwrap();
    let mut seen = std::collections::BTreeMap::new();
    kicked(&mut program, Duration::from_millis(5), |program| {
        for number in 0..programs {
            let code = hostile_program(&mut dice);
            mprotect(CODE, PAGE, PROT_READ_WRITE);
            // SAFETY: the page is the program's and writable now.
            unsafe { (CODE as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
            mprotect(CODE, PAGE, PROT_READ);
            let regs = &mut program.user.regs;
            for register in [
                &mut regs.rax,
                &mut regs.rbx,
                &mut regs.rcx,
                &mut regs.rdx,
                &mut regs.rsi,
                &mut regs.rdi,
                &mut regs.rbp,
                &mut regs.rsp,
                &mut regs.r8,
                &mut regs.r11,
            ] {
                *register = hostile_value(&mut dice);
            }
            regs.rip = CODE;
            regs.rflags = hostile_value(&mut dice);
            program.user.fs_base = hostile_value(&mut dice) & 0x7fff_ffff_ffff;
            program.user.gs_base = hostile_value(&mut dice) & 0x7fff_ffff_ffff;
            program.faults = 0;
            for _ in 0..6 {
                let trap = match program.try_run() {
                    Ok(trap) => trap,
                    Err(error) => panic!("program {number}, {code:02x?}: {error}"),
                };
                let kind = match trap {
                    Trap::Exception { vector, .. } => format!("exception {vector}"),
                    Trap::PageFault { .. } => "page fault".to_owned(),
                    other => format!("{other:?}"),
                };
                *seen.entry(kind).or_insert(0_u32) += 1;
                let rflags = program.user.regs.rflags & !UserState::RFLAGS_USER;
                // A kick that comes first leaves everything as it was.
                let untouched = trap == Trap::Interrupted;
                assert!(
                    untouched || rflags == 0x202,
                    "program {number}, {code:02x?}: {rflags:#x}"
                );
                // As a handler would that goes on behind the fault.
                program.user.regs.rip = CODE + dice.throw() % 80;
            }
        }
    });
    println!("{seen:?}");
    // The engine is as good as new.
    mprotect(CODE, PAGE, PROT_READ_WRITE);
    let code = sum();
    // SAFETY: the page is the program's and writable now.
    unsafe { (CODE as *mut u8).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    mprotect(CODE, PAGE, PROT_READ);
    program.user = UserState::default();
    program.user.regs.rip = CODE;
    program.user.regs.rdi = DATA;
    program.user.regs.rsp = STACK + STACK_LEN;
    program.engine.reset_xstate().unwrap();
    loop {
        match program.run() {
            Trap::Interrupted => {}
            trap => break assert_eq!(trap, Trap::Syscall),
        }
    }
    assert_eq!(program.user.regs.rax, 500_000_500_000);
}

/// The best of several batches: what the thing costs when nobody else wants
/// the processor.
fn best(batches: u32, in_each: u32, mut once: impl FnMut()) -> Duration {
    (0..batches)
        .map(|_| {
            let started = Instant::now();
            for _ in 0..in_each {
                once();
            }
            started.elapsed() / in_each
        })
        .min()
        .unwrap_or_default()
}

/// Not a test of a promise but of its price: `cargo test -- --ignored --nocapture`.
#[test]
#[ignore = "measures; run it alone and in release"]
fn measure() {
    let first = Instant::now();
    probe::probe();
    println!("probe: {:?}", first.elapsed());
    println!(
        "engine, made and dropped: {:?}",
        best(20, 1, || drop(OnHost::new().unwrap()))
    );
    let mut made = Vec::new();
    println!(
        "engine, made: {:?}",
        best(10, 1, || made.push(OnHost::new().unwrap()))
    );
    drop(made);

    let mut program = Program::new(registers());
    program.syscall();
    println!(
        "system call and back: {:?}",
        best(100, 50, || _ = program.syscall())
    );
    drop(program);

    let mut program = Program::new(breakpoint());
    let exception = best(100, 50, || {
        program.user.regs.rip = CODE;
        program.exception();
    });
    println!("exception and back: {exception:?}");
    drop(program);

    let mut program = Program::new(bases());
    program.user.fs_base = DATA;
    program.user.gs_base = DATA;
    let change = best(100, 50, || {
        program.user.regs.rip = CODE;
        program.user.fs_base ^= 8;
        program.syscall();
    });
    println!("system call after a change of fs: {change:?}");
    drop(program);

    const PAGES: u64 = 5_120;
    const BIG: u64 = 0x10_0000_0000;
    let mut program = Program::new(walk());
    let access = Access::READ | Access::WRITE;
    program.area(BIG, PAGES * PAGE, PROT_READ_WRITE, access);
    let mut walk = |fresh: bool| {
        best(10, 1, || {
            if fresh {
                program.engine.revoke(range(BIG, PAGES * PAGE)).unwrap();
                mmap(BIG, PAGES * PAGE, PROT_READ_WRITE);
            }
            program.user.regs.rip = CODE;
            program.user.regs.rdi = BIG;
            program.user.regs.rcx = PAGES;
            program.syscall();
        }) / PAGES as u32
    };
    println!(
        "first touch: {:?} a page; second: {:?}",
        walk(true),
        walk(false)
    );
    drop(program);
    let native = |fresh: bool| {
        best(10, 1, || {
            if fresh {
                mmap(BIG, PAGES * PAGE, PROT_READ_WRITE);
            }
            for page in 0..PAGES {
                poke(BIG + page * PAGE, 1);
            }
        }) / PAGES as u32
    };
    println!(
        "natively: {:?} a page; second: {:?}",
        native(true),
        native(false)
    );
    munmap(BIG, PAGES * PAGE);
}
