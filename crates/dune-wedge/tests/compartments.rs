//! What a compartment computes, how it ends, and that nothing is left of it.
#![expect(unsafe_code, reason = "misuses memory inside compartments")]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{assert_fault, start};
use dune_wedge::{
    Access, BytesGate, Calls, Compartment, CompartmentError, FileRights, Gate, Grant, OnRefusal,
    Tag,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

fn results_come_back_by_value() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    for n in 0..10_u64 {
        assert_eq!(compartment.run(|n: u64| n * n + 1, n).unwrap(), n * n + 1);
    }
    #[derive(Clone, Copy, Debug, PartialEq, FromBytes, IntoBytes, Immutable)]
    #[repr(C)]
    struct Point {
        x: f64,
        y: f64,
    }
    let turned = compartment.run(
        |p: Point| Point {
            x: -p.y,
            y: p.x.sqrt(),
        },
        Point { x: 4.0, y: 3.0 },
    );
    assert_eq!(turned.unwrap(), Point { x: -3.0, y: 2.0 });
    // More than fits into a page.
    let input: [u16; 20_000] = std::array::from_fn(|n| n as u16);
    let output = compartment
        .run(
            |mut all: [u16; 20_000]| {
                all.reverse();
                all
            },
            input,
        )
        .unwrap();
    assert!(output.iter().rev().eq(input.iter()));
}

fn bytes_go_in_and_out() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    let upper = |input: &[u8]| input.to_ascii_uppercase();
    assert_eq!(
        compartment.run_bytes(upper, b"hello", 100).unwrap(),
        b"HELLO"
    );
    assert_eq!(compartment.run_bytes(upper, b"", 0).unwrap(), b"");
    let long = vec![b'x'; 300_000];
    let output = compartment.run_bytes(upper, &long, 300_000).unwrap();
    assert!(output.len() == long.len() && output.iter().all(|b| *b == b'X'));
    assert!(matches!(
        compartment.run_bytes(upper, b"hello", 4),
        Err(CompartmentError::BadResult { bytes: 5, .. })
    ));
    assert!(matches!(
        compartment.run_bytes(upper, &vec![0; 1 << 20], 4),
        Err(CompartmentError::InputTooLarge { .. })
    ));
}

fn the_standard_library_works_inside() {
    start();
    let mut compartment = Compartment::builder().calls(Calls::RANDOM).build().unwrap();
    let output = compartment
        .run_bytes(
            |input| {
                let text = String::from_utf8_lossy(input);
                let mut counts = BTreeMap::new();
                for word in text.split_whitespace() {
                    *counts.entry(word.to_owned()).or_insert(0_u32) += 1;
                }
                let map: std::collections::HashMap<_, _> = counts.iter().collect();
                assert_eq!(map.len(), counts.len());
                let mut grown = Vec::new();
                for n in 0..10_000_u64 {
                    grown.push(n);
                }
                assert_eq!(grown.iter().sum::<u64>(), 49_995_000);
                thread_local!(static LOCAL: std::cell::Cell<u32> = const { std::cell::Cell::new(7) });
                LOCAL.set(LOCAL.get() + 1);
                let boxed: Box<[u128]> = vec![0; 100].into();
                assert!((boxed.as_ptr() as usize).is_multiple_of(16));
                format!("{counts:?} {:.3} {}", 2.0_f64.powf(0.5), LOCAL.get()).into_bytes()
            },
            b"to be or not to be",
            1000,
        )
        .unwrap();
    assert_eq!(
        String::from_utf8(output).unwrap(),
        r#"{"be": 2, "not": 1, "or": 1, "to": 2} 1.414 8"#
    );
}

fn abort((): ()) {
    std::process::abort()
}

fn exit((): ()) {
    // SAFETY: ends the compartment.
    unsafe { libc::exit(3) }
}

fn spin((): ()) {
    loop {
        std::hint::spin_loop();
    }
}

fn spin_in_calls((): ()) {
    loop {
        std::thread::yield_now();
    }
}

fn every_end_but_a_return_is_an_error_with_its_reason() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    let panicked = compartment.run(|n: u64| assert!(n != 3, "n is {n}"), 3);
    match panicked {
        Err(CompartmentError::Panicked { message }) => {
            assert!(message.starts_with("n is 3, at "), "{message}");
            assert!(message.contains("compartments.rs"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        compartment.run(abort, ()),
        Err(CompartmentError::Aborted)
    ));
    let exited = compartment.run(exit, ());
    assert!(
        matches!(exited, Err(CompartmentError::Exited { status: 3 })),
        "{exited:?}"
    );
    assert!(matches!(
        compartment.run(
            // SAFETY: ends the compartment.
            |()| unsafe { core::arch::asm!("ud2") },
            ()
        ),
        Err(CompartmentError::Exception { vector: 6, .. })
    ));
    assert!(matches!(
        compartment.run(
            // SAFETY: ends the compartment.
            |()| unsafe { core::arch::asm!("hlt") },
            ()
        ),
        Err(CompartmentError::Exception { vector: 13, .. })
    ));
    assert_fault(
        // SAFETY: ends the compartment.
        compartment.run(|()| unsafe { (0x123 as *const u8).read_volatile() }, ()),
        0x123,
        Access::Read,
    );
    // And it goes on after all of that.
    assert_eq!(compartment.run(|n: u8| n + 1, 1).unwrap(), 2);
}

#[expect(unconditional_recursion, reason = "uses up the stack")]
fn recurse(n: u64) -> u64 {
    let here = [n; 64];
    recurse(n + 1) + std::hint::black_box(here)[(n % 64) as usize]
}

fn a_stack_that_overflows_is_an_error() {
    start();
    for limit in [16 << 10, 256 << 10, 1 << 30] {
        let mut compartment = Compartment::builder().stack(limit).build().unwrap();
        let result = compartment.run(recurse, 0);
        assert!(
            matches!(result, Err(CompartmentError::StackOverflow { .. })),
            "{limit}: {result:?}"
        );
        assert_eq!(compartment.run(|n: u8| n + 1, 1).unwrap(), 2);
    }
    // One step over all of the stack.
    let mut compartment = Compartment::builder().build().unwrap();
    let result = compartment.run(
        |()| {
            let large = [0_u8; 700_000];
            std::hint::black_box(&large)[0]
        },
        (),
    );
    assert!(
        matches!(result, Err(CompartmentError::StackOverflow { .. })),
        "{result:?}"
    );
}

fn memory_that_is_used_up_is_an_error() {
    start();
    let mut compartment = Compartment::builder().memory(1 << 20).build().unwrap();
    let fill = |bytes: u64| {
        let mut all = Vec::new();
        for n in 0..bytes / 4096 {
            all.push(vec![n as u8; 4096]);
        }
        all.len() as u64
    };
    assert_eq!(compartment.run(fill, 256 << 10).unwrap(), 64);
    let result = compartment.run(fill, 2 << 20);
    assert!(
        matches!(
            result,
            Err(CompartmentError::OutOfMemory { limit: 1_048_576 })
        ),
        "{result:?}"
    );
    assert_eq!(compartment.run(fill, 256 << 10).unwrap(), 64);
    // What no memory could hold is refused by the allocator, and Rust aborts.
    let result = compartment.run(
        |()| std::hint::black_box(vec![0_u8; 1 << 45]).len() as u64,
        (),
    );
    assert!(
        matches!(
            result,
            Err(CompartmentError::Aborted | CompartmentError::Refused { .. })
        ),
        "{result:?}"
    );
}

fn an_endless_loop_is_ended() {
    start();
    let limit = Duration::from_millis(50);
    let mut compartment = Compartment::builder().time_limit(limit).build().unwrap();
    for _ in 0..3 {
        let begin = Instant::now();
        let result = compartment.run(spin, ());
        assert!(
            matches!(result, Err(CompartmentError::TimeLimit { limit: l }) if l == limit),
            "{result:?}"
        );
        assert!(begin.elapsed() >= limit, "{:?}", begin.elapsed());
        assert_eq!(compartment.run(|n: u8| n + 1, 1).unwrap(), 2);
    }
    // A loop of system calls too.
    let result = compartment.run(spin_in_calls, ());
    assert!(
        matches!(result, Err(CompartmentError::TimeLimit { .. })),
        "{result:?}"
    );
    // And one that waits for ever.
    let (reader, _writer) = std::io::pipe().unwrap();
    use std::os::fd::{AsFd, AsRawFd};
    let fd = reader.as_raw_fd();
    let mut compartment = Compartment::builder()
        .time_limit(limit)
        .file(reader.as_fd(), FileRights::READ)
        .build()
        .unwrap();
    let result = compartment.run(read_one, fd);
    assert!(
        matches!(result, Err(CompartmentError::TimeLimit { .. })),
        "{result:?}"
    );
}

fn read_one(fd: i32) -> i64 {
    let mut byte = 0_u8;
    // SAFETY: one byte.
    unsafe { libc::read(fd, (&raw mut byte).cast(), 1) as i64 }
}

static COUNTER: AtomicU64 = AtomicU64::new(5);

fn runs_know_nothing_of_each_other() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    let count = |()| {
        thread_local!(static LOCAL: std::cell::Cell<u64> = const { std::cell::Cell::new(100) });
        LOCAL.set(LOCAL.get() + 1);
        let kept: &'static mut u64 = Box::leak(Box::new(0));
        *kept += 1;
        COUNTER.fetch_add(1, Ordering::SeqCst) + LOCAL.get() + *kept
    };
    for _ in 0..5 {
        assert_eq!(compartment.run(count, ()).unwrap(), 5 + 101 + 1);
    }
    assert_eq!(COUNTER.load(Ordering::SeqCst), 5, "the process's own");
    // Nothing is left on the stack or in the heap, whether the run ended well or not.
    const SECRET: u64 = 0x5ec2_e7ab_cdef_0123;
    let leave = |fails: u8| {
        let mut place = [0_u64; 512];
        place.fill(SECRET);
        std::hint::black_box(&mut place);
        let heap = Box::leak(vec![SECRET; 5000].into_boxed_slice());
        std::hint::black_box(heap);
        assert!(fails == 0);
    };
    let search = |()| {
        let place = 0_u64;
        let mut found = 0_u64;
        let here = &raw const place as u64 & !7;
        for address in (here - 8000..here).step_by(8) {
            // SAFETY: the stack's own pages, below what is in use.
            found += u64::from(unsafe { (address as *const u64).read_volatile() } == SECRET);
        }
        let mut heap: Vec<u64> = Vec::with_capacity(5000);
        for n in 0..5000 {
            // SAFETY: within the capacity; any bytes will do.
            found +=
                u64::from(unsafe { heap.as_mut_ptr().wrapping_add(n).read_volatile() } == SECRET);
        }
        found
    };
    for fails in [0, 0, 1, 0, 1, 1, 0] {
        assert_eq!(compartment.run(leave, fails).is_ok(), fails == 0);
        assert_eq!(compartment.run(search, ()).unwrap(), 0, "{fails}");
    }
    // Nor in the registers of vectors.
    let put = |n: u64| {
        // SAFETY: a register that may be changed.
        unsafe { core::arch::asm!("movq xmm9, {}", in(reg) n, out("xmm9") _) };
    };
    let get = |()| {
        let n: u64;
        // SAFETY: reads a register.
        unsafe { core::arch::asm!("movq {}, xmm9", out(reg) n) };
        n
    };
    compartment.run(put, SECRET).unwrap();
    assert_eq!(compartment.run(get, ()).unwrap(), 0);
}

static DOUBLE: Gate<u64, u64> = Gate::new("double");
static ECHO: BytesGate = BytesGate::new("echo", 100);
static INNER: Gate<u64, u64> = Gate::new("inner");

/// How many of so many bytes from an address on are of the secret.
fn secret_bytes(address: u64, bytes: u64) -> u64 {
    (address..address + bytes)
        // SAFETY: the compartment's own memory, in use or not.
        .filter(|at| unsafe { (*at as *const u8).read_volatile() } == SECRET_BYTE)
        .count() as u64
}

const SECRET_BYTE: u8 = 0x5e;

fn nothing_that_the_guard_put_there_is_left_for_the_next_run() {
    start();
    let (reader, writer) = std::io::pipe().unwrap();
    use std::io::Write;
    use std::os::fd::{AsFd, AsRawFd};
    let fd = reader.as_raw_fd();
    let mut compartment = Compartment::builder()
        .bytes_gate(&ECHO, |_| vec![SECRET_BYTE; 8000])
        .file(reader.as_fd(), FileRights::READ)
        .build()
        .unwrap();
    // What lies behind the input. Three runs, because pages that are written in every run are
    // treated in another way.
    for _ in 0..3 {
        let long = compartment.run_bytes(|input| vec![input[0]], &[SECRET_BYTE; 20_000], 1);
        assert_eq!(long.unwrap(), [SECRET_BYTE]);
        let found = |input: &[u8]| {
            secret_bytes(input.as_ptr() as u64, 20_000)
                .to_le_bytes()
                .to_vec()
        };
        assert_eq!(compartment.run_bytes(found, b"-", 8).unwrap(), [0; 8]);
    }
    // Inputs on the stack, in its first page and in more.
    const TOP: u64 = 0x1000_0020_0000;
    let search = |()| secret_bytes(TOP - 32_000, 32_000);
    for _ in 0..3 {
        // A new one, whose pages were not written to yet.
        let mut new = Compartment::builder().build().unwrap();
        new.run(|_: [u8; 600]| (), [SECRET_BYTE; 600]).unwrap();
        assert_eq!(new.run(search, ()).unwrap(), 0);
        compartment
            .run(|_: [u8; 600]| (), [SECRET_BYTE; 600])
            .unwrap();
        assert_eq!(compartment.run(search, ()).unwrap(), 0);
        let large = [SECRET_BYTE; 24_000];
        let first = compartment.run(|all: [u8; 24_000]| all[0], large);
        assert_eq!(first.unwrap(), SECRET_BYTE);
        assert_eq!(compartment.run(search, ()).unwrap(), 0);
    }
    // What gates and system calls bring, in pages that the compartment did not write to.
    let search = |()| {
        let all: Vec<u8> = Vec::with_capacity(8000);
        secret_bytes(all.as_ptr() as u64, 8000)
    };
    let gate = |()| {
        let mut all = vec![0; 8000];
        ECHO.call(&[], &mut all);
        u64::from(all[7999])
    };
    let read = |fd: i32| {
        let mut all = vec![0_u8; 8000];
        // SAFETY: the buffer.
        let length = unsafe { libc::read(fd, all.as_mut_ptr().cast(), all.len()) };
        assert_eq!(length, 8000);
        u64::from(all[7999])
    };
    for _ in 0..3 {
        assert_eq!(compartment.run(gate, ()).unwrap(), u64::from(SECRET_BYTE));
        assert_eq!(compartment.run(search, ()).unwrap(), 0);
        (&writer).write_all(&[SECRET_BYTE; 8000]).unwrap();
        assert_eq!(compartment.run(read, fd).unwrap(), u64::from(SECRET_BYTE));
        assert_eq!(compartment.run(search, ()).unwrap(), 0);
    }
}

static BUFFER: [AtomicU64; 1024] = [const { AtomicU64::new(0) }; 1024];

fn memory_that_was_not_touched_yet_can_be_filled_and_returned() {
    start();
    let (reader, writer) = std::io::pipe().unwrap();
    use std::io::Write;
    use std::os::fd::{AsFd, AsRawFd};
    let fd = reader.as_raw_fd();
    let mut compartment = Compartment::builder()
        .file(reader.as_fd(), FileRights::READ)
        .memory(4 << 20)
        .build()
        .unwrap();
    // Variables are shared until they are written to.
    let read = |fd: i32| {
        let into = BUFFER.as_ptr().cast_mut().cast();
        // SAFETY: atomic integers, of which any bytes will do.
        let length = unsafe { libc::read(fd, into, size_of_val(&BUFFER)) };
        assert_eq!(length, 5);
        BUFFER[0].load(Ordering::Relaxed)
    };
    (&writer).write_all(b"hello").unwrap();
    let word = u64::from_le_bytes(*b"hello\0\0\0");
    assert_eq!(compartment.run(read, fd).unwrap(), word);
    assert_eq!(BUFFER[0].load(Ordering::Relaxed), 0, "the process's own");
    // Zeros that were never touched.
    let zeros = compartment.run_bytes(|_| vec![0; 200_000], b"", 200_000);
    assert!(zeros.unwrap().iter().all(|byte| *byte == 0));
    // More than it may have.
    let result = compartment.run_bytes(|_| vec![0; 8 << 20], b"", 8 << 20);
    assert!(
        matches!(result, Err(CompartmentError::OutOfMemory { .. })),
        "{:?}",
        result.map(|all| all.len())
    );
}

fn what_does_not_fit_on_the_stack_is_refused() {
    start();
    let mut compartment = Compartment::builder().stack(64 << 10).build().unwrap();
    let input = compartment.run(|all: [u8; 80_000]| all[1], [1; 80_000]);
    assert!(
        matches!(input, Err(CompartmentError::InputTooLarge { .. })),
        "{input:?}"
    );
    let output = compartment.run(|()| [1_u8; 80_000], ());
    assert!(
        matches!(output, Err(CompartmentError::InputTooLarge { .. })),
        "{:?}",
        output.map(|_| ())
    );
    assert_eq!(compartment.run(|()| [1_u8; 30_000], ()).unwrap()[7], 1);
}

fn a_loop_of_calls_that_run_compartments_is_ended_too() {
    start();
    let mut inner = Compartment::builder().build().unwrap();
    let mut outer = Compartment::builder()
        .time_limit(Duration::from_millis(100))
        .gate(&INNER, |n: u64| inner.run(|n: u64| n + 1, n).unwrap_or(0))
        .build()
        .unwrap();
    let begin = Instant::now();
    let result = outer.run(
        |mut n: u64| {
            loop {
                n = INNER.call(n);
            }
        },
        0,
    );
    let _: Result<u64, _> = result;
    assert!(
        matches!(result, Err(CompartmentError::TimeLimit { .. })),
        "{result:?}"
    );
    assert!(begin.elapsed() >= Duration::from_millis(100));
    drop(outer);
    assert_eq!(inner.run(|n: u64| n, 7).unwrap(), 7);
}

fn gates_lead_to_closures_of_the_parent() {
    start();
    let mut calls = Vec::new();
    let mut compartment = Compartment::builder()
        .gate(&DOUBLE, |n| {
            calls.push(n);
            n * 2
        })
        .bytes_gate(&ECHO, |bytes| bytes.iter().rev().copied().collect())
        .build()
        .unwrap();
    let sum = |n: u64| (0..n).map(|n| DOUBLE.call(n)).sum::<u64>();
    assert_eq!(compartment.run(sum, 5).unwrap(), 20);
    let echo = compartment.run_bytes(
        |input| {
            let mut output = vec![0; 100];
            let length = ECHO.call(input, &mut output);
            output.truncate(length);
            output
        },
        b"stressed",
        100,
    );
    assert_eq!(echo.unwrap(), b"desserts");
    let result = compartment.run_bytes(
        |_| {
            ECHO.call(&[0; 101], &mut []);
            Vec::new()
        },
        b"",
        0,
    );
    assert!(
        matches!(result, Err(CompartmentError::RefusedGate { .. })),
        "{result:?}"
    );
    drop(compartment);
    assert_eq!(calls, [0, 1, 2, 3, 4]);
}

fn a_gate_may_run_another_compartment() {
    start();
    let mut inner = Compartment::builder().build().unwrap();
    let mut outer = Compartment::builder()
        .gate(&INNER, |n: u64| inner.run(|n: u64| n * n, n).unwrap_or(0))
        .build()
        .unwrap();
    let result = outer.run(
        |n: u64| {
            let before = [n; 32];
            let result = INNER.call(n) + INNER.call(n + 1);
            assert!(std::hint::black_box(before).iter().all(|b| *b == n));
            result
        },
        7,
    );
    assert_eq!(result.unwrap(), 49 + 64);
}

fn a_panic_behind_a_gate_goes_on_in_the_parent() {
    start();
    let mut compartment = Compartment::builder()
        .gate(&DOUBLE, |n| {
            assert!(n != 3, "three");
            n
        })
        .build()
        .unwrap();
    let call = |n: u64| DOUBLE.call(n);
    let result =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compartment.run(call, 3)));
    assert!(result.is_err());
    assert_eq!(compartment.run(call, 4).unwrap(), 4);
}

fn tags_are_shared_as_they_were_granted() {
    start();
    let tag = Tag::new(64 << 10).unwrap();
    let number = tag.put(41_u64).unwrap();
    let text = tag.put_bytes(b"hello").unwrap();
    let increment = |place: dune_wedge::In<u64>| place.write(place.read() + 1);

    let mut reader = Compartment::builder()
        .tag(&tag, Grant::Read)
        .build()
        .unwrap();
    assert_eq!(
        reader
            .run(|place: dune_wedge::In<u64>| place.read(), number)
            .unwrap(),
        41
    );
    assert_fault(
        reader.run(increment, number),
        number.address(),
        Access::Write,
    );

    let mut writer = Compartment::builder()
        .tag(&tag, Grant::ReadWrite)
        .build()
        .unwrap();
    writer.run(increment, number).unwrap();
    assert_eq!(tag.get(number).unwrap(), 42);
    assert_eq!(
        reader
            .run(|place: dune_wedge::In<u64>| place.read(), number)
            .unwrap(),
        42
    );

    let mut copier = Compartment::builder()
        .tag(&tag, Grant::CopyOnWrite)
        .build()
        .unwrap();
    let change = |place: dune_wedge::In<u64>| {
        place.write(place.read() + 100);
        place.read()
    };
    for _ in 0..4 {
        assert_eq!(copier.run(change, number).unwrap(), 142);
        assert_eq!(tag.get(number).unwrap(), 42);
    }
    let upper = writer.run(
        |text: dune_wedge::BytesIn| text.write(&text.read().to_ascii_uppercase()),
        text,
    );
    upper.unwrap();
    assert_eq!(tag.get_bytes(text).unwrap(), b"HELLO");
    // Allocated inside, read outside.
    let made = writer.run(
        |tag: u64| {
            let place = dune_wedge::allocate_inside(tag, 6).unwrap();
            place.write(b"inside");
            place
        },
        tag.start(),
    );
    assert_eq!(tag.get_bytes(made.unwrap()).unwrap(), b"inside");
}

fn tags_give_memory_and_take_it_back() {
    let tag = Tag::new(4096).unwrap();
    let blocks: Vec<_> = (0..16).map(|_| tag.allocate(256, 16).unwrap()).collect();
    assert!(tag.allocate(1, 1).is_err());
    for block in blocks
        .iter()
        .step_by(2)
        .chain(blocks.iter().skip(1).step_by(2))
    {
        tag.free(*block).unwrap();
    }
    assert!(tag.free(blocks[0]).is_err(), "freed already");
    assert_eq!(tag.allocate(4096, 4096).unwrap(), tag.start());
    assert!(tag.allocate(1, 3).is_err(), "no alignment");
}

fn descriptors_have_the_rights_that_were_granted() {
    start();
    use std::io::{Seek, Write};
    use std::os::fd::{AsFd, AsRawFd};
    let path = std::env::temp_dir().join("wedge-rights");
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    file.write_all(b"contents").unwrap();
    file.rewind().unwrap();
    let fd = file.as_raw_fd();
    let mut compartment = Compartment::builder()
        .file(file.as_fd(), FileRights::READ | FileRights::STAT)
        .build()
        .unwrap();
    let read = compartment.run(
        |fd: i32| {
            let mut bytes = [0_u8; 16];
            // SAFETY: a buffer of 16 bytes.
            let length = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), 16) };
            assert_eq!(length, 8);
            bytes
        },
        fd,
    );
    assert_eq!(&read.unwrap()[..8], b"contents");
    let size = compartment.run(
        |fd: i32| {
            // SAFETY: plain data.
            let mut stat: libc::stat = unsafe { std::mem::zeroed() };
            // SAFETY: the structure.
            assert_eq!(unsafe { libc::fstat(fd, &raw mut stat) }, 0);
            stat.st_size
        },
        fd,
    );
    assert_eq!(size.unwrap(), 8);
    type Attempt = fn(i32) -> i64;
    // Each with a right that it does not have.
    macro_rules! refused {
        ($($attempt:expr),*) => {$({
            let result = compartment.run($attempt, fd);
            assert!(matches!(result, Err(CompartmentError::Refused { .. })), "{result:?}");
            let _: Attempt = $attempt;
        })*};
    }
    refused!(
        // SAFETY: a buffer of a byte.
        |fd| unsafe { libc::write(fd, b"x".as_ptr().cast(), 1) as i64 },
        // SAFETY: as above.
        |fd| unsafe { libc::pwrite(fd, b"x".as_ptr().cast(), 1, 0) as i64 },
        // SAFETY: no memory.
        |fd| unsafe { libc::lseek(fd, 0, libc::SEEK_SET) },
        // SAFETY: no memory.
        |fd| unsafe { i64::from(libc::ftruncate(fd, 0)) },
        // SAFETY: no memory.
        |fd| unsafe { i64::from(libc::dup(fd)) },
        // SAFETY: no memory.
        |fd| unsafe { i64::from(libc::close(fd)) }
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"contents");
    // Refused calls can be errors inside.
    let mut compartment = Compartment::builder()
        .on_refusal(OnRefusal::Errno)
        .build()
        .unwrap();
    let result = compartment.run(
        |fd: i32| {
            // SAFETY: a buffer of a byte.
            let result = unsafe { libc::write(fd, b"x".as_ptr().cast(), 1) };
            assert_eq!(result, -1);
            std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
        },
        fd,
    );
    assert_eq!(result.unwrap(), libc::EPERM);
    drop(std::fs::remove_file(path));
}

fn printing_goes_to_a_granted_descriptor() {
    start();
    use std::io::Read;
    use std::os::fd::{AsFd, AsRawFd, FromRawFd};
    let (mut reader, writer) = std::io::pipe().unwrap();
    let fd = writer.as_raw_fd();
    let mut compartment = Compartment::builder()
        .file(writer.as_fd(), FileRights::WRITE)
        .build()
        .unwrap();
    let result = compartment.run(
        |fd: i32| {
            use std::io::Write;
            // SAFETY: the descriptor is granted; it is not closed here.
            let mut file = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(fd) });
            writeln!(file, "{:>8}", "from inside").unwrap();
        },
        fd,
    );
    result.unwrap();
    drop(compartment);
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "from inside\n");
}

fn clocks_and_random_numbers_are_granted_as_calls() {
    start();
    let mut compartment = Compartment::builder()
        .calls(Calls::CLOCKS | Calls::RANDOM)
        .build()
        .unwrap();
    let outside = || {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let before = outside();
    let inside = compartment
        .run(
            |()| {
                let now = std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .unwrap()
                    .as_secs();
                // SAFETY: no memory is passed.
                let other = unsafe { libc::time(std::ptr::null_mut()) } as u64;
                assert!(other >= now && other - now < 5);
                let begin = Instant::now();
                assert!(begin.elapsed() < Duration::from_secs(60));
                now
            },
            (),
        )
        .unwrap();
    assert!(inside >= before && inside <= outside());
    let mut plain = Compartment::builder().build().unwrap();
    let result = plain.run(
        |()| {
            std::hint::black_box(std::time::SystemTime::now());
        },
        (),
    );
    assert!(
        matches!(result, Err(CompartmentError::Refused { .. })),
        "{result:?}"
    );
}

fn threads_run_compartments_at_the_same_time() {
    start();
    let threads: Vec<_> = (0..4_u64)
        .map(|thread| {
            std::thread::spawn(move || {
                let mut a = Compartment::builder().build().unwrap();
                let mut b = Compartment::builder()
                    .time_limit(Duration::from_secs(60))
                    .build()
                    .unwrap();
                for n in 0..50_u64 {
                    let work = |n: u64| {
                        let all: Vec<u64> = (0..1000).map(|i| i * n).collect();
                        COUNTER.fetch_add(all.len() as u64, Ordering::SeqCst);
                        all.iter().sum::<u64>() + COUNTER.load(Ordering::SeqCst)
                    };
                    let n = n * 10 + thread;
                    assert_eq!(a.run(work, n).unwrap(), 499_500 * n + 1005);
                    assert_eq!(b.run(work, n + 1).unwrap(), 499_500 * (n + 1) + 1005);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn a_compartment_may_change_threads() {
    start();
    let mut compartment = Compartment::builder().build().unwrap();
    for round in 0..10_u64 {
        compartment = std::thread::spawn(move || {
            assert_eq!(compartment.run(|n: u64| n + 1, round).unwrap(), round + 1);
            compartment
        })
        .join()
        .unwrap();
        assert_eq!(compartment.run(|n: u64| n + 2, round).unwrap(), round + 2);
    }
}

fn threads_outside_dune_mode_may_run_compartments() {
    dune_wedge::start().unwrap();
    assert!(!dune::is_inside());
    let mut compartment = Compartment::builder().build().unwrap();
    assert_eq!(compartment.run(|n: u64| n + 1, 1).unwrap(), 2);
    assert!(!dune::is_inside());
}

dune_testing::tests! {
    smoke results_come_back_by_value,
    ring0 bytes_go_in_and_out,
    ring0 the_standard_library_works_inside,
    ring0 every_end_but_a_return_is_an_error_with_its_reason,
    ring0 a_stack_that_overflows_is_an_error,
    ring0 memory_that_is_used_up_is_an_error,
    ring0 an_endless_loop_is_ended,
    ring0 runs_know_nothing_of_each_other,
    ring0 nothing_that_the_guard_put_there_is_left_for_the_next_run,
    ring0 memory_that_was_not_touched_yet_can_be_filled_and_returned,
    ring0 what_does_not_fit_on_the_stack_is_refused,
    ring0 a_loop_of_calls_that_run_compartments_is_ended_too,
    ring0 gates_lead_to_closures_of_the_parent,
    ring0 a_gate_may_run_another_compartment,
    ring0 a_panic_behind_a_gate_goes_on_in_the_parent,
    ring0 tags_are_shared_as_they_were_granted,
    plain tags_give_memory_and_take_it_back,
    ring0 descriptors_have_the_rights_that_were_granted,
    ring0 printing_goes_to_a_granted_descriptor,
    ring0 clocks_and_random_numbers_are_granted_as_calls,
    ring0 threads_run_compartments_at_the_same_time,
    ring0 a_compartment_may_change_threads,
    ring0 threads_outside_dune_mode_may_run_compartments,
}
