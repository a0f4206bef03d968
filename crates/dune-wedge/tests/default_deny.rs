//! What a compartment was not given it does not have, whatever runs in it: a test for every
//! kind of resource, each attacked by Rust and by native code in
//! C that runs in the compartment.
#![expect(unsafe_code, reason = "calls native code that attacks")]

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{assert_fault, start};
use dune_wedge::{Access, Compartment, CompartmentError, FileRights, Gate, Grant, OnRefusal, Tag};

unsafe extern "C" {
    fn attack_read(address: u64) -> u64;
    fn attack_write(address: u64);
    fn attack_jump(address: u64) -> u64;
    fn attack_return_to(address: u64);
    fn attack_call(all: *const u64) -> i64;
    fn attack_overread() -> u64;
    fn attack_every_call(secret: u64) -> u64;
    fn attack_smash(address: u64) -> u64;
}

/// Who attacks: Rust, or native code in C.
type Form = u64;
const RUST: Form = 0;
const C: Form = 1;
const FORMS: [Form; 2] = [RUST, C];

fn read([form, address]: [u64; 2]) -> u64 {
    if form == C {
        // SAFETY: what it may do is what is tested.
        return unsafe { attack_read(address) };
    }
    // SAFETY: as above.
    unsafe { (address as *const u64).read_volatile() }
}

fn write([form, address]: [u64; 2]) {
    if form == C {
        // SAFETY: as above.
        unsafe { attack_write(address) };
        return;
    }
    // SAFETY: as above.
    unsafe { (address as *mut u64).write_volatile(0x6a7e5) };
}

fn jump([form, address]: [u64; 2]) -> u64 {
    if form == C {
        // SAFETY: as above.
        return unsafe { attack_jump(address) };
    }
    // SAFETY: as above.
    let function: extern "C" fn(u64, u64) -> u64 = unsafe { core::mem::transmute(address) };
    function(1, 2)
}

fn return_to([form, address]: [u64; 2]) {
    if form == C {
        // SAFETY: as above.
        unsafe { attack_return_to(address) };
        return;
    }
    // SAFETY: as above.
    unsafe { core::arch::asm!("push {}", "ret", in(reg) address) };
}

fn call([form, number, a, b, c, d, e]: [u64; 7]) -> i64 {
    if form == C {
        // SAFETY: as above.
        return unsafe { attack_call([number, a, b, c, d, e].as_ptr()) };
    }
    let result;
    // SAFETY: as above.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    result
}

/// Calls that say and do nothing, or end the compartment.
const HARMLESS: [i64; 8] = [
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_munmap,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
];

/// How many system calls were not refused.
fn every_call([form, secret]: [u64; 2]) -> u64 {
    if form == C {
        // SAFETY: as above.
        return unsafe { attack_every_call(secret) };
    }
    const EPERM: i64 = -(libc::EPERM as i64);
    (0..470)
        .filter(|number| !HARMLESS.contains(number))
        .filter(|number| call([RUST, *number as u64, secret, 4096, 7, 0x22, u64::MAX]) != EPERM)
        .count() as u64
}

/// Nobody reads or writes there.
#[track_caller]
fn assert_out_of_reach(compartment: &mut Compartment<'_>, address: u64) {
    for form in FORMS {
        let attack = [form, address];
        assert_fault(compartment.run(read, attack), address, Access::Read);
        assert_fault(compartment.run(write, attack), address, Access::Write);
    }
}

const SECRET: u64 = 0x5ec2_e7ab_cdef_0123;
static GLOBAL: AtomicU64 = AtomicU64::new(0);
static CONSTANT: [u64; 4] = [1, 2, 3, 4];

fn the_parents_stack_and_heap_are_out_of_reach() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    let on_stack = SECRET;
    let on_heap = Box::new(SECRET);
    for address in [&raw const on_stack as u64, &raw const *on_heap as u64] {
        assert_out_of_reach(&mut compartment, address);
        // Nor by the alias that ring 0 has of all of the process.
        let high = address | 0xffff_8000_0000_0000;
        assert_out_of_reach(&mut compartment, high);
    }
    assert_eq!((on_stack, *on_heap), (SECRET, SECRET));
}

fn the_parents_thread_locals_are_out_of_reach() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    thread_local!(static LOCAL: AtomicU64 = const { AtomicU64::new(1) });
    LOCAL.with(|local| local.store(SECRET, Ordering::SeqCst));
    let address = LOCAL.with(|local| local.as_ptr() as u64);
    assert_out_of_reach(&mut compartment, address);
    let own = compartment.run(|()| LOCAL.with(|local| local.load(Ordering::SeqCst)), ());
    assert_eq!(own.unwrap(), 1, "a compartment has its own");
}

fn the_parents_globals_are_copies_from_the_start() {
    start();
    GLOBAL.store(SECRET, Ordering::SeqCst);
    let mut compartment = Compartment::builder().build().unwrap();
    let address = GLOBAL.as_ptr() as u64;
    for form in FORMS {
        let attack = [form, address];
        assert_eq!(compartment.run(read, attack).unwrap(), 0);
        compartment.run(write, attack).unwrap();
        assert_eq!(GLOBAL.load(Ordering::SeqCst), SECRET);
        assert_eq!(compartment.run(read, attack).unwrap(), 0);
    }
}

fn code_and_constants_cannot_be_changed() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    let constant = CONSTANT.as_ptr() as u64;
    for form in FORMS {
        assert_eq!(compartment.run(read, [form, constant]).unwrap(), 1);
    }
    let code = code_and_constants_cannot_be_changed as *const () as u64;
    let libc = libc::getpid as *const () as u64;
    for address in [constant, code, libc] {
        for form in FORMS {
            let result = compartment.run(write, [form, address]);
            assert_fault(result, address, Access::Write);
        }
    }
}

fn data_cannot_be_executed() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    for form in FORMS {
        let result = compartment.run(
            |form: Form| {
                let code = Box::leak(Box::new([0xc3_u8; 16]));
                jump([form, code.as_ptr() as u64])
            },
            form,
        );
        assert!(
            matches!(
                result,
                Err(CompartmentError::Fault {
                    access: Access::Execute,
                    ..
                })
            ),
            "{result:?}"
        );
        let address = GLOBAL.as_ptr() as u64;
        let result = compartment.run(jump, [form, address]);
        assert_fault(result, address, Access::Execute);
    }
}

fn other_tags_are_out_of_reach() {
    start();
    let own = Tag::new(4096).unwrap();
    let other = Tag::new(4096).unwrap();
    own.put(SECRET).unwrap();
    other.put(SECRET).unwrap();
    let mut compartment = Compartment::builder()
        .tag(&own, Grant::ReadWrite)
        .build()
        .unwrap();
    for form in FORMS {
        let own = compartment.run(read, [form, own.start()]);
        assert_eq!(own.unwrap(), SECRET);
    }
    assert_out_of_reach(&mut compartment, other.start());
    // Nor what lies around its own.
    for address in [own.start() - 8, own.start() + 4096] {
        if !(other.start()..other.start() + 4096).contains(&address) {
            assert_out_of_reach(&mut compartment, address);
        }
    }
    // Nor by asking for memory in it, or for what it has to be free.
    const ALLOCATE: u64 = 0x5744_0004;
    const FREE: u64 = 0x5744_0005;
    for request in [ALLOCATE, FREE] {
        for form in FORMS {
            let result = compartment.run(call, [form, request, other.start(), 16, 16, 0, 0]);
            assert!(
                matches!(result, Err(CompartmentError::Refused { .. })),
                "{result:?}"
            );
        }
    }
    let result = compartment.run(
        |tag: u64| u64::from(dune_wedge::allocate_inside(tag, 16).is_some()),
        other.start(),
    );
    assert!(
        matches!(result, Err(CompartmentError::Refused { .. })),
        "{result:?}"
    );
}

fn a_tag_is_gone_with_the_compartment_that_had_it() {
    start();
    let tag = Tag::new(4096).unwrap();
    tag.put(SECRET).unwrap();
    let address = tag.start();
    for grant in [Grant::Read, Grant::ReadWrite, Grant::CopyOnWrite] {
        let mut with = Compartment::builder().tag(&tag, grant).build().unwrap();
        assert_eq!(with.run(read, [C, address]).unwrap(), SECRET);
        let wrote = with.run(write, [RUST, address]).is_ok();
        assert_eq!(wrote, grant != Grant::Read);
        drop(with);
        // It has the address space of the one before, and so on.
        let mut without: Vec<_> = (0..3)
            .map(|_| Compartment::builder().build().unwrap())
            .collect();
        for compartment in &mut without {
            assert_out_of_reach(compartment, address);
        }
        let place = tag.put(SECRET).unwrap();
        tag.free(place.address()).unwrap();
        let mut writer = Compartment::builder()
            .tag(&tag, Grant::ReadWrite)
            .build()
            .unwrap();
        writer
            .run(|place: dune_wedge::In<u64>| place.write(SECRET), {
                // The first word again.
                tag.free(address).unwrap();
                tag.put(SECRET).unwrap()
            })
            .unwrap();
    }
}

fn another_compartments_memory_is_out_of_reach() {
    start();
    let mut one = Compartment::builder().build().unwrap();
    let mut other = Compartment::builder().build().unwrap();
    let place = one
        .run(
            |()| {
                let leaked: &'static mut u64 = Box::leak(Box::new(SECRET));
                GLOBAL.store(SECRET, Ordering::SeqCst);
                &raw const *leaked as u64
            },
            (),
        )
        .unwrap();
    // The same addresses are there in the other, and other memory.
    let found = |[form, at]: [u64; 2]| {
        let of_heap = read([form, at]);
        let of_global = read([form, GLOBAL.as_ptr() as u64]);
        u64::from(of_heap == SECRET || of_global == SECRET)
    };
    for form in FORMS {
        assert_eq!(other.run(found, [form, place]).unwrap(), 0);
    }
    // Pages of a compartment that ended go to others, empty.
    for _ in 0..100 {
        let mut compartment = Compartment::builder().build().unwrap();
        let result = compartment.run(
            |()| {
                let all: Vec<u64> = Vec::with_capacity(4000);
                // SAFETY: within the capacity; any bytes will do.
                let found = (0..4000)
                    .filter(|n| unsafe { all.as_ptr().wrapping_add(*n).read_volatile() } != 0)
                    .count();
                let mut fill = vec![SECRET; 4000];
                std::hint::black_box(&mut fill);
                found as u64
            },
            (),
        );
        assert_eq!(result.unwrap(), 0);
    }
}

fn a_descriptor_that_was_not_granted_is_refused() {
    start();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let other = std::fs::File::open("/proc/self/exe").unwrap();
    let mut compartment = Compartment::builder()
        .file(file.as_fd(), FileRights::all())
        .build()
        .unwrap();
    let attempt = |form, fd: i32| [form, libc::SYS_read as u64, fd as u64, 0x1000, 0, 0, 0];
    for form in FORMS {
        let granted = compartment.run(call, attempt(form, file.as_raw_fd()));
        assert_eq!(granted.unwrap(), 0);
        for fd in [other.as_raw_fd(), 0, 1, 2, -1, i32::MAX] {
            let result = compartment.run(call, attempt(form, fd));
            assert!(
                matches!(result, Err(CompartmentError::Refused { number: 0, .. })),
                "{fd}: {result:?}"
            );
        }
    }
}

fn the_kernel_is_never_given_memory_that_is_not_the_compartments() {
    start();
    let mut secret = Box::new(SECRET);
    let address = &raw mut *secret as u64;
    let (reader, writer) = std::io::pipe().unwrap();
    let mut compartment = Compartment::builder()
        .file(reader.as_fd(), FileRights::READ)
        .file(writer.as_fd(), FileRights::WRITE)
        .build()
        .unwrap();
    const EFAULT: i64 = -(libc::EFAULT as i64);
    use std::io::Write;
    let (from, to) = (reader.as_raw_fd() as u64, writer.as_raw_fd() as u64);
    for form in FORMS {
        let write_out = [form, libc::SYS_write as u64, to, address, 8, 0, 0];
        assert_eq!(compartment.run(call, write_out).unwrap(), EFAULT);
        // Read over it: the bytes are lost, the secret is not. Nor over its own constants.
        for place in [address, CONSTANT.as_ptr() as u64] {
            (&writer).write_all(&[1; 8]).unwrap();
            let read_in = [form, libc::SYS_read as u64, from, place, 8, 0, 0];
            assert_eq!(compartment.run(call, read_in).unwrap(), EFAULT);
        }
    }
    assert_eq!((*secret, CONSTANT[0]), (SECRET, 1));
}

fn every_system_call_is_refused_without_a_grant() {
    start();
    let secret = Box::new([SECRET; 512]);
    let mut compartment = Compartment::builder()
        .on_refusal(OnRefusal::Errno)
        .build()
        .unwrap();
    let address = secret.as_ptr() as u64;
    for form in FORMS {
        assert_eq!(compartment.run(every_call, [form, address]).unwrap(), 0);
    }
    assert_eq!(*secret, [SECRET; 512]);
}

static GATE: Gate<u64, u64> = Gate::new("gate");
static OTHER: Gate<u64, u64> = Gate::new("other");

fn a_gate_that_was_not_given_is_closed() {
    start();
    let mut compartment = Compartment::builder()
        .gate(&GATE, |n| n + 1)
        .build()
        .unwrap();
    assert_eq!(compartment.run(|n: u64| GATE.call(n), 1).unwrap(), 2);
    let result = compartment.run(|n: u64| OTHER.call(n), 1);
    assert!(
        matches!(result, Err(CompartmentError::RefusedGate { .. })),
        "{result:?}"
    );
    // By its name alone.
    let constant = CONSTANT.as_ptr() as u64;
    for form in FORMS {
        let request = [
            GATE_REQUEST,
            &raw const OTHER as u64,
            constant,
            8,
            constant,
            8,
        ];
        let result = compartment.run(call, with(form, request));
        assert!(
            matches!(result, Err(CompartmentError::RefusedGate { .. })),
            "{result:?}"
        );
    }
}

const GATE_REQUEST: u64 = 0x5744_0002;

fn with(form: Form, [number, a, b, c, d, e]: [u64; 6]) -> [u64; 7] {
    [form, number, a, b, c, d, e]
}

fn forged_calls_through_a_gate_reach_nothing() {
    start();
    let mut entered = 0;
    let secret = Box::new(SECRET);
    let mut compartment = Compartment::builder()
        .gate(&GATE, |n| {
            entered += 1;
            n + 1
        })
        .build()
        .unwrap();
    let gate = &raw const GATE as u64;
    let outside = &raw const *secret as u64;
    let constant = CONSTANT.as_ptr() as u64;
    // The input from the parent, the output into the parent or over constants, wrong sizes,
    // addresses that are none.
    for (gate, input, input_size, output, output_size) in [
        (gate, outside, 8, constant, 8),
        (gate, constant, 8, outside, 8),
        (gate, constant, 8, constant, 8),
        (gate, constant, 16, 0x1000, 8),
        (gate, constant, 8, 0x1000, 1 << 40),
        (gate, u64::MAX - 3, 8, u64::MAX - 3, 8),
        (gate + 8, constant, 8, constant, 8),
        (0, 0, 0, 0, 0),
    ] {
        let request = [GATE_REQUEST, gate, input, input_size, output, output_size];
        for form in FORMS {
            let result = compartment.run(call, with(form, request));
            assert!(
                matches!(result, Err(CompartmentError::RefusedGate { .. })),
                "{request:x?}: {result:?}"
            );
        }
    }
    drop(compartment);
    // Those whose output alone was bad came in; what they said was a plain number.
    assert_eq!((*secret, CONSTANT[0], entered), (SECRET, 1, 4));
}

fn returning_from_nowhere_yields_a_result_and_nothing_else() {
    start();
    const RETURN_REQUEST: u64 = 0x5744_0000;
    let mut compartment = Compartment::builder()
        .gate(&GATE, |n| n + 1)
        .build()
        .unwrap();
    // A return that the function did not make: whatever is in the place of the result, which
    // is the compartment's own.
    for form in FORMS {
        let forged = compartment.run(
            |all: [u64; 7]| call(all) as u64,
            with(form, [RETURN_REQUEST, 0, 0, 0, 0, 0]),
        );
        assert_eq!(forged.unwrap(), 0);
    }
    // Bytes from the parent as the result.
    let secret = Box::new([SECRET; 8]);
    let result = compartment.run_bytes(
        |input| {
            let mut address = [0; 8];
            address.copy_from_slice(input);
            let address = u64::from_le_bytes(address);
            // SAFETY: a vector that lies about where it is; never dropped.
            unsafe { Vec::from_raw_parts(address as *mut u8, 64, 64) }
        },
        &(secret.as_ptr() as u64).to_le_bytes(),
        64,
    );
    assert!(
        matches!(result, Err(CompartmentError::BadResult { .. })),
        "{result:?}"
    );
    assert_eq!(*secret, [SECRET; 8]);
}

fn jumps_into_the_parent_lead_nowhere() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    // The runtime's code in the upper half, which ring 0 enters by.
    let base: u64;
    // SAFETY: reads the base.
    unsafe { std::arch::asm!("rdgsbase {}", out(reg) base) };
    for address in [
        base,
        dune::enter as *const () as u64 | 0xffff_8000_0000_0000,
    ] {
        for form in FORMS {
            let jumped = compartment.run(jump, [form, address]).map(drop);
            let returned = compartment.run(return_to, [form, address]);
            for result in [jumped, returned] {
                assert!(
                    matches!(
                        result,
                        Err(CompartmentError::Fault { .. } | CompartmentError::Exception { .. })
                    ),
                    "{address:#x}: {result:?}"
                );
            }
        }
    }
    // Code of the program can be run, by the compartment, with the compartment's rights: a
    // function that leaves Dune mode has nothing to leave, and its instructions fault.
    let result = compartment.run(
        |()| {
            dune::leave();
            u64::from(dune::is_inside())
        },
        (),
    );
    assert_eq!(result.unwrap(), 0);
    assert!(dune::is_inside());
    // Privileged instructions in the parent's code, which are somewhere.
    let result = compartment.run(|()| u64::from(dune::enter().is_ok()), ());
    assert!(result.is_err(), "{result:?}");
    let result = compartment.run(
        |address: u64| {
            // SAFETY: what it may do is what is tested.
            unsafe { attack_smash(address) }
        },
        base,
    );
    assert!(result.is_err(), "{result:?}");
}

fn reading_past_a_buffer_ends_at_the_heap() {
    start();
    let mut compartment = Compartment::builder().memory(1 << 20).build().unwrap();
    // SAFETY: what it may do is what is tested.
    let native = compartment.run(|()| unsafe { attack_overread() }, ());
    let rust = compartment.run(
        |()| {
            let buffer = Box::leak(Box::new([0_u8; 16])).as_ptr();
            // SAFETY: as above.
            let byte = |n| unsafe { buffer.wrapping_add(n).read_volatile() };
            (0..usize::MAX).map(|n| u64::from(byte(n))).sum::<u64>()
        },
        (),
    );
    for result in [native, rust] {
        assert!(
            matches!(result, Err(CompartmentError::OutOfMemory { .. })),
            "{result:?}"
        );
    }
}

fn the_environment_is_empty() {
    start();
    assert!(std::env::vars_os().count() > 0);
    let mut compartment = Compartment::builder().build().unwrap();
    let count = compartment.run(|()| std::env::vars_os().count() as u64, ());
    assert_eq!(count.unwrap(), 0);
    // SAFETY: a name.
    let path = compartment.run(|()| unsafe { libc::getenv(c"PATH".as_ptr()) } as u64, ());
    assert_eq!(path.unwrap(), 0);
}

static KEPT: Mutex<Vec<u64>> = Mutex::new(Vec::new());

fn what_the_heap_held_at_the_start_is_not_in_the_image() {
    KEPT.lock().unwrap().push(SECRET);
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    let address = KEPT.lock().unwrap().as_ptr() as u64;
    let result = compartment.run(|()| KEPT.lock().unwrap().iter().sum::<u64>(), ());
    assert_fault(result, address, Access::Read);
}

dune_testing::tests! {
    smoke the_parents_stack_and_heap_are_out_of_reach,
    ring0 the_parents_thread_locals_are_out_of_reach,
    ring0 the_parents_globals_are_copies_from_the_start,
    ring0 code_and_constants_cannot_be_changed,
    ring0 data_cannot_be_executed,
    ring0 other_tags_are_out_of_reach,
    ring0 a_tag_is_gone_with_the_compartment_that_had_it,
    ring0 another_compartments_memory_is_out_of_reach,
    ring0 a_descriptor_that_was_not_granted_is_refused,
    ring0 the_kernel_is_never_given_memory_that_is_not_the_compartments,
    ring0 every_system_call_is_refused_without_a_grant,
    ring0 a_gate_that_was_not_given_is_closed,
    ring0 forged_calls_through_a_gate_reach_nothing,
    ring0 returning_from_nowhere_yields_a_result_and_nothing_else,
    ring0 jumps_into_the_parent_lead_nowhere,
    ring0 reading_past_a_buffer_ends_at_the_heap,
    ring0 the_environment_is_empty,
    ring0 what_the_heap_held_at_the_start_is_not_in_the_image,
}
