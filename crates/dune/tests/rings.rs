//! Ring 3: what it can do, what it cannot, and that it always comes back.
#![expect(unsafe_code, reason = "snippets of machine code, and signal handlers")]

use std::arch::global_asm;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use dune::memory::{AddressSpace, Frames, Pages, PteFlags};
use dune::{Answers, PageFaultError, Trap, UserContext, vector};
use dune_x86::addr::GuestVirt;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x50_0000;
const STACK_TOP: u64 = DATA + 0x2000;

// Each snippet is position-independent and runs in ring 3.
global_asm!(
    ".macro snippet name",
    "  .globl rings_\\name",
    "rings_\\name:",
    ".endm",
    ".section .rodata.rings, \"a\"",
    "snippet call",
    "  mov eax, 39",
    "  syscall",
    "  mov eax, 40",
    "  syscall",
    "snippet spin",
    "1: jmp 1b",
    "snippet write",
    "  mov dword ptr [rdi], 42",
    "  syscall",
    "snippet read",
    "  mov rax, [rdi]",
    "  syscall",
    "snippet hlt",
    "  hlt",
    "snippet cli",
    "  cli",
    "snippet out",
    "  mov eax, 1",
    "  out 0x70, al",
    "snippet rdmsr",
    "  mov ecx, 0xc0000080",
    "  rdmsr",
    "snippet cr3",
    "  mov rax, cr3",
    "snippet lgdt",
    "  lgdt [rsp]",
    "snippet int80",
    "  int 0x80",
    "snippet notify",
    "  int 0xf0",
    "snippet sysenter",
    "  sysenter",
    "snippet int3",
    "  int3",
    "snippet ud2",
    "  ud2",
    "snippet div",
    "  xor ecx, ecx",
    "  div ecx",
    "snippet farjump",
    "  push 0x10",
    "  lea rax, [rip]",
    "  push rax",
    "  retfq",
    "snippet iopl",
    "  pushfq",
    "  or dword ptr [rsp], 0x3000",
    "  popfq",
    "  pushfq",
    "  pop rax",
    "  syscall",
    "snippet gs",
    "  wrgsbase rdi",
    "  wrfsbase rsi",
    "  syscall",
    "snippet xmm",
    "  movq xmm0, rdi",
    "  movq xmm15, rsi",
    "  syscall",
    "  movq rax, xmm0",
    "  movq rbx, xmm15",
    "  syscall",
    "snippet answers",
    "  mov eax, 39",
    "  syscall",
    "  mov r12, rax",
    "  mov eax, 186",
    "  syscall",
    "  mov r13, rax",
    "  stc",
    "  mov eax, 334",
    "  syscall",
    "  setc bl",
    "  mov r14, rax",
    "  mov eax, 40",
    "  syscall",
    "  mov rax, 0x100000027",
    "  syscall",
    "  mov rax, 512",
    "  syscall",
    "snippet end",
    ".text",
);

macro_rules! snippets {
    ($($name:ident),*) => {
        unsafe extern "C" { $(fn $name();)* }
    };
}
snippets!(
    rings_call,
    rings_spin,
    rings_write,
    rings_read,
    rings_hlt,
    rings_cli,
    rings_out,
    rings_rdmsr,
    rings_cr3,
    rings_lgdt,
    rings_int80,
    rings_notify,
    rings_sysenter,
    rings_int3,
    rings_ud2,
    rings_div,
    rings_farjump,
    rings_iopl,
    rings_gs,
    rings_xmm,
    rings_answers,
    rings_end
);

/// All snippets, and two pages of data and stack.
struct Ring3 {
    space: AddressSpace,
    data: Arc<Pages>,
}

impl Ring3 {
    fn new() -> Self {
        Self::in_space(AddressSpace::empty().unwrap())
    }

    fn in_space(mut space: AddressSpace) -> Self {
        let start = rings_call as *const () as usize;
        let length = rings_end as *const () as usize - start;
        // SAFETY: the snippets are constant data of this program.
        let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, length) };
        let code = Arc::new(Pages::new(Pages::needed(length)).unwrap());
        assert!(code.write(0, bytes));
        space
            .map(GuestVirt::new(CODE), &code, PteFlags::RX)
            .unwrap();
        let data = Arc::new(Pages::new(2).unwrap());
        space
            .map(GuestVirt::new(DATA), &data, PteFlags::RW)
            .unwrap();
        Self { space, data }
    }

    fn at(snippet: unsafe extern "C" fn()) -> UserContext {
        let offset = snippet as *const () as u64 - rings_call as *const () as u64;
        UserContext::new(CODE + offset, STACK_TOP).unwrap()
    }

    fn run(&self, snippet: unsafe extern "C" fn()) -> (Trap, UserContext) {
        let mut context = Self::at(snippet);
        let trap = context.run(&self.space).unwrap();
        (trap, context)
    }
}

fn system_calls_of_ring_3_return_with_number_and_registers() {
    dune::enter().unwrap();
    for space in [
        AddressSpace::empty().unwrap(),
        AddressSpace::around_process().unwrap(),
    ] {
        let ring3 = Ring3::in_space(space);
        let mut context = Ring3::at(rings_call);
        for (index, field) in [3_u64, 5, 7].into_iter().enumerate() {
            let registers = context.registers_mut();
            match index {
                0 => registers.rbx = field,
                1 => registers.r15 = field,
                _ => registers.r8 = field,
            }
        }
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        let registers = context.registers().clone();
        assert_eq!((registers.rax, registers.rip), (39, CODE + 7));
        assert_eq!((registers.rbx, registers.r15, registers.r8), (3, 5, 7));
        assert_eq!(registers.rsp, STACK_TOP);
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        assert_eq!(context.registers().rax, 40);
    }
}

static ANSWERS: Answers = Answers::none()
    .process_id(39)
    .thread_id(186)
    .refuse(334, 38);

fn calls_with_an_answer_are_answered_at_the_entry_and_change_nothing_else() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    let mut context = Ring3::at(rings_answers);
    context.answer_at_entry(Some(&ANSWERS)).unwrap();
    context.set_gs_base(0x1234);
    context.registers_mut().r8 = 0x77;
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    let registers = context.registers().clone();
    assert_eq!(registers.rax, 40, "a call without an answer comes back");
    assert_eq!(registers.r12, u64::from(std::process::id()));
    // SAFETY: takes no argument.
    let thread = unsafe { libc::gettid() };
    assert_eq!(registers.r13, thread as u64);
    assert_eq!(registers.r14 as i64, -38);
    assert_eq!(registers.rbx, 1, "the flags are kept");
    assert_eq!((registers.rsp, registers.r8), (STACK_TOP, 0x77));
    assert_eq!(context.gs_base(), 0x1234);
    for number in [0x1_0000_0027, 512] {
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        assert_eq!(context.registers().rax, number, "beyond the table");
    }

    let mut context = Ring3::at(rings_answers);
    context.answer_at_entry(Some(&ANSWERS)).unwrap();
    context.answer_at_entry(None).unwrap();
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    assert_eq!(context.registers().rax, 39);
}

fn the_answer_to_a_thread_is_its_own_id() {
    dune::enter().unwrap();
    let thread = std::thread::spawn(|| {
        dune::enter().unwrap();
        let ring3 = Ring3::new();
        let mut context = Ring3::at(rings_answers);
        context.answer_at_entry(Some(&ANSWERS)).unwrap();
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        // SAFETY: takes no argument.
        assert_eq!(context.registers().r13, unsafe { libc::gettid() } as u64);
        assert_ne!(context.registers().r12, context.registers().r13);
    });
    thread.join().unwrap();
}

fn an_answer_does_not_return_beyond_the_lower_half() {
    // SYSRET to an address that is not canonical faults in ring 0 on Intel's CPUs.
    const LAST_PAGE: u64 = (1 << 47) - 4096;
    dune::enter().unwrap();
    let mut space = AddressSpace::empty().unwrap();
    let code = Arc::new(Pages::new(1).unwrap());
    // mov eax, 39; syscall
    assert!(code.write(4096 - 7, &[0xb8, 39, 0, 0, 0, 0x0f, 0x05]));
    space
        .map(GuestVirt::new(LAST_PAGE), &code, PteFlags::RX)
        .unwrap();
    let mut context = UserContext::new(LAST_PAGE + 4096 - 7, STACK_TOP).unwrap();
    context.answer_at_entry(Some(&ANSWERS)).unwrap();
    assert_eq!(context.run(&space).unwrap(), Trap::Syscall);
    assert_eq!(context.registers().rip, 1 << 47);
}

fn page_faults_of_ring_3_return_address_and_cause() {
    dune::enter().unwrap();
    let mut ring3 = Ring3::new();
    let mut context = Ring3::at(rings_write);
    context.registers_mut().rdi = 0x60_0008;
    let fault = |trap| match trap {
        Trap::PageFault { address, cause } => (address, cause),
        other => panic!("{other:?}"),
    };
    let (address, cause) = fault(context.run(&ring3.space).unwrap());
    assert_eq!(address, 0x60_0008);
    assert_eq!(cause, PageFaultError::WRITE | PageFaultError::USER);

    let page = Arc::new(Pages::new(1).unwrap());
    let range = ring3
        .space
        .map(GuestVirt::new(0x60_0000), &page, PteFlags::R)
        .unwrap();
    let (_, cause) = fault(context.run(&ring3.space).unwrap());
    assert!(cause.contains(PageFaultError::PRESENT | PageFaultError::WRITE));

    ring3.space.protect(range, PteFlags::RW).unwrap();
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    let mut bytes = [0; 4];
    assert!(page.read(8, &mut bytes));
    assert_eq!(bytes, [42, 0, 0, 0]);

    ring3.space.unmap(range).unwrap();
    let mut context = Ring3::at(rings_write);
    context.registers_mut().rdi = 0x60_0008;
    let (_, cause) = fault(context.run(&ring3.space).unwrap());
    assert!(
        !cause.contains(PageFaultError::PRESENT),
        "unmapped memory is gone from the TLB"
    );

    let (address, cause) = {
        let mut context = UserContext::new(DATA, STACK_TOP).unwrap();
        fault(context.run(&ring3.space).unwrap())
    };
    assert_eq!(address, DATA);
    assert!(
        cause.contains(PageFaultError::INSTRUCTION),
        "data is not executable"
    );
}

fn privileged_instructions_of_ring_3_fault() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    let snippets: [(&str, unsafe extern "C" fn()); 10] = [
        ("hlt", rings_hlt),
        ("cli", rings_cli),
        ("out", rings_out),
        ("rdmsr", rings_rdmsr),
        ("mov cr3", rings_cr3),
        ("lgdt", rings_lgdt),
        ("int 0x80", rings_int80),
        ("int 0xf0", rings_notify),
        ("sysenter", rings_sysenter),
        ("far return to ring 0", rings_farjump),
    ];
    for (name, snippet) in snippets {
        let (trap, _) = ring3.run(snippet);
        // QEMU reads the stack of a far return with the rights of ring 0, which SMAP forbids.
        if matches!(trap, Trap::PageFault { cause, .. } if !cause.contains(PageFaultError::USER)) {
            continue;
        }
        let Trap::Exception { vector: number, .. } = trap else {
            panic!("{name}: {trap:?}")
        };
        assert!(
            number == vector::GENERAL_PROTECTION || number == vector::INVALID_OPCODE,
            "{name}: {trap:?}"
        );
    }
    for (snippet, expected) in [
        (rings_int3 as unsafe extern "C" fn(), vector::BREAKPOINT),
        (rings_ud2, vector::INVALID_OPCODE),
        (rings_div, vector::DIVIDE),
    ] {
        let (trap, _) = ring3.run(snippet);
        assert_eq!(
            trap,
            Trap::Exception {
                vector: expected,
                error: 0
            }
        );
    }
}

fn ring_3_reaches_nothing_of_the_process() {
    dune::enter().unwrap();
    let secret = Box::new(0x1234_5678_u64);
    let address = &raw const *secret as u64;
    let high = address | 0xffff_8000_0000_0000;
    for space in [
        AddressSpace::empty().unwrap(),
        AddressSpace::around_process().unwrap(),
    ] {
        let ring3 = Ring3::in_space(space);
        for target in [
            address,
            high,
            rings_call as *const () as u64,
            0xffff_8000_0000_0000,
        ] {
            for snippet in [rings_read as unsafe extern "C" fn(), rings_write] {
                let mut context = Ring3::at(snippet);
                context.registers_mut().rdi = target;
                let trap = context.run(&ring3.space).unwrap();
                assert!(
                    matches!(trap, Trap::PageFault { address, cause }
                        if address == target && cause.contains(PageFaultError::USER)),
                    "{target:#x}: {trap:?}"
                );
            }
        }
    }
    assert_eq!(*secret, 0x1234_5678);
}

fn ring_3_cannot_pass_for_ring_0() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    // The entry stub tells the rings apart by IOPL, which POPF of ring 3 does not change...
    let (trap, context) = ring3.run(rings_iopl);
    assert_eq!(trap, Trap::Syscall);
    assert_eq!(context.registers().rax >> 12 & 3, 0);
    // ... nor the flags that it is started with.
    let mut context = Ring3::at(rings_cli);
    context.registers_mut().rflags |= 0x3000;
    let trap = context.run(&ring3.space).unwrap();
    assert_eq!(
        trap,
        Trap::Exception {
            vector: vector::GENERAL_PROTECTION,
            error: 0
        }
    );
    // A GS base that points to the runtime is the context's, and nothing else.
    let stolen: u64;
    // SAFETY: reads the base.
    unsafe { std::arch::asm!("rdgsbase {}", out(reg) stolen) };
    let mut context = Ring3::at(rings_gs);
    context.registers_mut().rdi = stolen;
    context.registers_mut().rsi = 0x1000;
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    assert_eq!((context.gs_base(), context.fs_base()), (stolen, 0x1000));
    // And it can go on with that.
    context.registers_mut().rip = Ring3::at(rings_gs).registers().rip;
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    let again: u64;
    // SAFETY: reads the base.
    unsafe { std::arch::asm!("rdgsbase {}", out(reg) again) };
    assert_eq!(stolen, again);
    println!("the standard library still works, so FS is right");
}

fn instruction_pointers_that_are_not_canonical_are_refused() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    for rip in [
        1 << 47,
        0x8000_0000_0000_0000,
        u64::MAX,
        0xffff_8000_0000_0000,
    ] {
        let mut context = UserContext::new(rip, STACK_TOP).unwrap();
        assert_eq!(
            context.run(&ring3.space).unwrap(),
            Trap::Exception {
                vector: vector::GENERAL_PROTECTION,
                error: 0
            }
        );
    }
    for rsp in [u64::MAX, 1 << 47, 0, 0xffff_8000_0000_0000] {
        let mut context = Ring3::at(rings_call);
        context.registers_mut().rsp = rsp;
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        assert_eq!(context.registers().rsp, rsp);
    }
}

fn extended_state_belongs_to_each_context() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    let mut contexts: Vec<_> = (0..4_u64)
        .map(|n| {
            let mut context = Ring3::at(rings_xmm);
            context.registers_mut().rdi = n;
            context.registers_mut().rsi = !n;
            context
        })
        .collect();
    for context in &mut contexts {
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    }
    std::hint::black_box((0..64).map(f64::from).map(f64::sqrt).sum::<f64>());
    for (n, context) in contexts.iter_mut().enumerate() {
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        let registers = context.registers();
        assert_eq!((registers.rax, registers.rbx), (n as u64, !(n as u64)));
    }
    // A context's state can be carried to another.
    let mut context = Ring3::at(rings_xmm);
    context.registers_mut().rdi = 99;
    context.run(&ring3.space).unwrap();
    let state = context.extended_state().to_vec();
    context.reset_extended_state();
    context.registers_mut().rip -= 0;
    context.set_extended_state(&state);
    context.run(&ring3.space).unwrap();
    assert_eq!(context.registers().rax, 99);
    // What XRSTOR would refuse is cleared.
    context.set_extended_state(&[0xff; 4096]);
    context.run(&ring3.space).unwrap();
}

static ALARMS: AtomicU32 = AtomicU32::new(0);
static STOP: AtomicU8 = AtomicU8::new(0);

extern "C" fn on_alarm(_: i32) {
    ALARMS.fetch_add(1, Ordering::SeqCst);
    STOP.store(1, Ordering::SeqCst);
}

fn a_signal_ends_an_endless_loop_in_ring_3() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    let mut context = Ring3::at(rings_spin);
    let handler = on_alarm as *const () as libc::sighandler_t;
    // SAFETY: the handler does what a handler may do.
    unsafe { libc::signal(libc::SIGALRM, handler) };
    for round in 1..=20 {
        STOP.store(0, Ordering::SeqCst);
        let soon = libc::itimerval {
            it_interval: libc::timeval {
                tv_sec: 0,
                tv_usec: 0,
            },
            it_value: libc::timeval {
                tv_sec: 0,
                tv_usec: 2000,
            },
        };
        // SAFETY: a structure of our own.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const soon, std::ptr::null_mut()) };
        while STOP.load(Ordering::SeqCst) == 0 {
            let trap = context.run_unless(&ring3.space, &STOP).unwrap();
            assert_eq!(trap, Trap::Interrupted);
        }
        assert_eq!(ALARMS.load(Ordering::SeqCst), round);
    }
    assert_eq!(
        context.registers().rip,
        Ring3::at(rings_spin).registers().rip
    );
}

fn address_spaces_are_separate_and_leave_nothing_behind() {
    dune::enter().unwrap();
    let before = Frames::in_use();
    let spaces: Vec<_> = (0..8_u8)
        .map(|n| {
            let ring3 = Ring3::new();
            assert!(ring3.data.write(0, &[n; 8]));
            ring3
        })
        .collect();
    let mut context = Ring3::at(rings_read);
    for _ in 0..100 {
        for (n, ring3) in spaces.iter().enumerate() {
            let fresh = Ring3::at(rings_read);
            context.registers_mut().rip = fresh.registers().rip;
            context.registers_mut().rdi = DATA;
            assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
            assert_eq!(context.registers().rax.to_le_bytes(), [n as u8; 8]);
        }
    }
    drop(spaces);
    assert_eq!(Frames::in_use(), before, "all page tables were given back");
}

fn more_address_spaces_than_there_are_identifiers() {
    dune::enter().unwrap();
    let before = Frames::in_use();
    let spaces: Vec<_> = (0..4200).map(|_| AddressSpace::empty().unwrap()).collect();
    // The last have none of their own, and still work.
    let ring3 = Ring3::new();
    let (trap, _) = ring3.run(rings_call);
    assert_eq!(trap, Trap::Syscall);
    drop(spaces);
    drop(ring3);
    assert_eq!(Frames::in_use(), before);
    for round in 0..200 {
        // Identifiers are used again, with nothing of their last owner.
        let ring3 = Ring3::new();
        assert!(ring3.data.write(0, &[round as u8]));
        let mut context = Ring3::at(rings_read);
        context.registers_mut().rdi = DATA;
        assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
        assert_eq!(context.registers().rax as u8, round as u8);
    }
}

fn threads_each_run_ring_3() {
    dune::enter().unwrap();
    let threads: Vec<_> = (0..4_u8)
        .map(|n| {
            std::thread::spawn(move || {
                let ring3 = Ring3::new();
                for round in 0..200_u8 {
                    assert!(ring3.data.write(0, &[n ^ round]));
                    let mut context = Ring3::at(rings_read);
                    context.registers_mut().rdi = DATA;
                    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
                    assert_eq!(context.registers().rax as u8, n ^ round);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn ring_3_needs_dune_mode() {
    assert!(AddressSpace::empty().is_err());
    assert!(UserContext::new(0, 0).is_err());
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    let mut context = Ring3::at(rings_call);
    dune::leave();
    assert!(context.run(&ring3.space).is_err());
    dune::enter().unwrap();
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
}

fn fork_keeps_address_spaces() {
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    assert!(ring3.data.write(0, &[7]));
    // SAFETY: the child only runs ring 3 and exits.
    let child = unsafe { libc::fork() };
    let mut context = Ring3::at(rings_read);
    context.registers_mut().rdi = DATA;
    let trap = context.run(&ring3.space);
    let good = matches!(trap, Ok(Trap::Syscall)) && context.registers().rax as u8 == 7;
    if child == 0 {
        std::process::exit(i32::from(!good));
    }
    let mut status = -1;
    // SAFETY: writes the status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(good);
    assert_eq!(status, 0);
}

fn memory_that_the_host_refuses_is_a_page_fault_of_ring_3() {
    use std::os::fd::AsRawFd;
    dune::enter().unwrap();
    let ring3 = Ring3::new();
    let path = std::env::temp_dir().join(format!("rings-{}", std::process::id()));
    let file = std::fs::File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(8192).unwrap();
    // SAFETY: a fresh mapping.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(mapped, libc::MAP_FAILED);
    // Somewhere else than in the process, so that addresses do not mean the same to both.
    let at = GuestVirt::new(0x70_0000);
    let range = dune::memory::VirtRange::try_new(at, 8192).unwrap();
    // SAFETY: the mapping stays, and nothing holds a reference into it.
    unsafe { ring3.space.map_memory(range, mapped as u64, PteFlags::RW) }.unwrap();
    let mut context = Ring3::at(rings_write);
    context.registers_mut().rdi = 0x70_0010;
    assert_eq!(context.run(&ring3.space).unwrap(), Trap::Syscall);
    file.set_len(0).unwrap();
    for _ in 0..3 {
        let mut context = Ring3::at(rings_write);
        context.registers_mut().rdi = 0x70_1010;
        let trap = context.run(&ring3.space).unwrap();
        let Trap::PageFault { address, cause } = trap else {
            panic!("{trap:?}")
        };
        assert_eq!(address, 0x70_1010);
        assert!(cause.contains(PageFaultError::USER | PageFaultError::WRITE));
    }
    // Code that is gone.
    let mut context = UserContext::new(0x70_0000, STACK_TOP).unwrap();
    ring3.space.protect(range, PteFlags::RWX).unwrap();
    let trap = context.run(&ring3.space).unwrap();
    let Trap::PageFault { address, cause } = trap else {
        panic!("{trap:?}")
    };
    assert_eq!(address, 0x70_0000);
    assert!(cause.contains(PageFaultError::INSTRUCTION));
}

dune_testing::tests! {
    ring0 memory_that_the_host_refuses_is_a_page_fault_of_ring_3,
    smoke system_calls_of_ring_3_return_with_number_and_registers,
    smoke calls_with_an_answer_are_answered_at_the_entry_and_change_nothing_else,
    ring0 the_answer_to_a_thread_is_its_own_id,
    smoke an_answer_does_not_return_beyond_the_lower_half,
    ring0 page_faults_of_ring_3_return_address_and_cause,
    smoke privileged_instructions_of_ring_3_fault,
    ring0 ring_3_reaches_nothing_of_the_process,
    ring0 ring_3_cannot_pass_for_ring_0,
    ring0 instruction_pointers_that_are_not_canonical_are_refused,
    ring0 extended_state_belongs_to_each_context,
    ring0 a_signal_ends_an_endless_loop_in_ring_3,
    ring0 address_spaces_are_separate_and_leave_nothing_behind,
    ring0 more_address_spaces_than_there_are_identifiers,
    ring0 threads_each_run_ring_3,
    ring0 ring_3_needs_dune_mode,
    ring0 fork_keeps_address_spaces,
}
