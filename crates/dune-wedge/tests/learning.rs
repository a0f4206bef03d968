//! A run in which everything is allowed says what it used, and granting that is enough.
#![expect(unsafe_code, reason = "learning is without protection")]

use std::os::fd::{AsFd, AsRawFd};

use dune_wedge::{Calls, Compartment, CompartmentError, FileRights, Gate, Grant, In, Tag};
use zerocopy::{Immutable, IntoBytes};

#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Input {
    number: In<u64>,
    heap: u64,
    fd: i32,
    unused: u32,
}

fn work(input: Input) -> u64 {
    let now = std::time::SystemTime::now();
    assert!(now > std::time::UNIX_EPOCH);
    input.number.write(input.number.read() + 1);
    let mut byte = 0_u8;
    // SAFETY: one byte.
    let read = unsafe { libc::read(input.fd, (&raw mut byte).cast(), 1) };
    assert_eq!(read, 1);
    // SAFETY: granted or not is what is tested.
    let heap = unsafe { (input.heap as *const u64).read_volatile() };
    u64::from(byte) + heap
}

fn a_run_says_what_it_used_and_the_grants_are_enough() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
    let tag = Tag::new(4096).unwrap();
    let other = Tag::new(4096).unwrap();
    let heap = Box::new(1000_u64);
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let mut input = Input {
        number: tag.put(1_u64).unwrap(),
        heap: &raw const *heap as u64,
        fd: file.as_raw_fd(),
        unused: 0,
    };
    // SAFETY: the function reads one number of the process's heap.
    let (result, learned) = unsafe { Compartment::builder().learn(work, input) }.unwrap();
    assert_eq!(result.unwrap(), 1000 + 0x7f);
    assert_eq!(tag.get(input.number).unwrap(), 2);
    print!("{learned}");
    assert_eq!(learned.calls, Calls::CLOCKS);
    assert_eq!(
        learned.files.into_iter().collect::<Vec<_>>(),
        [(input.fd, FileRights::READ)]
    );
    assert_eq!(
        learned.tags.into_iter().collect::<Vec<_>>(),
        [(tag.start(), true)]
    );
    let memory: Vec<_> = learned.memory.iter().collect();
    assert_eq!(memory.len(), 1, "{memory:?}");
    assert!(memory[0].0 == "[heap]" && !memory[0].1.written && memory[0].1.pages == 1);
    assert!(learned.refused.is_empty());
    drop(other);

    // The next compartment has nothing of that.
    let mut plain = Compartment::builder().build().unwrap();
    let result = plain.run(
        // SAFETY: it is not granted, which ends the compartment.
        |heap: u64| unsafe { (heap as *const u64).read_volatile() },
        input.heap,
    );
    assert!(
        matches!(result, Err(CompartmentError::Fault { .. })),
        "{result:?}"
    );

    // With what was learned, and the number passed in the tag, it works.
    input.heap = tag.put(1000_u64).unwrap().address();
    let mut compartment = Compartment::builder()
        .calls(learned.calls)
        .file(file.as_fd(), FileRights::READ)
        .tag(&tag, Grant::ReadWrite)
        .build()
        .unwrap();
    let byte = compartment.run(work, input).unwrap() - 1000;
    assert_eq!(byte, u64::from(b'E'));
    // And there is nothing more to learn.
    let builder = Compartment::builder()
        .calls(learned.calls)
        .file(file.as_fd(), FileRights::READ)
        .tag(&tag, Grant::ReadWrite);
    // SAFETY: as above.
    let (result, learned) = unsafe { builder.learn(work, input) }.unwrap();
    assert!(result.is_ok() && learned.is_empty(), "{learned}");
}

fn what_cannot_be_granted_is_named() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
    // SAFETY: a system call without memory.
    let attempt = |()| unsafe { i64::from(libc::getppid()) };
    // SAFETY: the function uses no memory of the process.
    let (result, learned) = unsafe { Compartment::builder().learn(attempt, ()) }.unwrap();
    assert!(
        matches!(result, Err(CompartmentError::Refused { .. })),
        "{result:?}"
    );
    assert_eq!(
        learned.refused.into_iter().collect::<Vec<_>>(),
        [libc::SYS_getppid as u64]
    );
    // SAFETY: as above.
    let (result, learned) =
        unsafe { Compartment::builder().learn(|n: u64| GATE.call(n), 1) }.unwrap();
    assert!(
        matches!(result, Err(CompartmentError::RefusedGate { .. })),
        "{result:?}"
    );
    let gate = &raw const GATE as u64;
    assert!(
        learned.gates.contains(&gate) && learned.to_string().contains(".gate("),
        "{learned}"
    );
}

static GATE: Gate<u64, u64> = Gate::new("gate");

fn buffers_of_the_process_are_learned_too() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let mut buffer = vec![0_u8; 64];
    let input = [file.as_raw_fd() as u64, buffer.as_mut_ptr() as u64];
    let read = |[fd, to]: [u64; 2]| {
        // SAFETY: granted or not is what is tested.
        unsafe { libc::read(fd as i32, to as *mut _, 4) as i64 }
    };
    // SAFETY: the function writes to a buffer that is there for it.
    let (result, learned) = unsafe { Compartment::builder().learn(read, input) }.unwrap();
    assert_eq!(result.unwrap(), 4);
    assert_eq!(std::hint::black_box(&buffer)[..4], *b"\x7fELF");
    let memory: Vec<_> = learned.memory.values().collect();
    assert!(memory.len() == 1 && memory[0].written, "{learned}");
}

dune_testing::tests! {
    ring0 buffers_of_the_process_are_learned_too,
    ring0 a_run_says_what_it_used_and_the_grants_are_enough,
    ring0 what_cannot_be_granted_is_named,
}
