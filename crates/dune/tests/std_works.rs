//! The standard library works in Dune mode as it did before.
#![expect(unsafe_code, reason = "AVX, and libc in the shared helpers")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "every call is libc's, with arguments made on the spot"
)]

mod common;

use std::backtrace::Backtrace;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::{Arc, Barrier, Condvar, Mutex, Once, OnceLock, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::*;

fn enters_and_leaves() {
    assert!(!dune::is_inside());
    for _ in 0..3 {
        enter();
        enter();
        dune::leave();
        assert!(!dune::is_inside());
        dune::leave();
    }
    assert!(dune::run(dune::is_inside).unwrap());
    assert!(!dune::is_inside());
}

fn a_closure_that_panics_leaves_dune_mode() {
    let result = std::panic::catch_unwind(|| dune::run(|| panic!("inside {}", dune::is_inside())));
    let message = *result.unwrap_err().downcast::<String>().unwrap();
    assert_eq!(message, "inside true");
    assert!(!dune::is_inside());
}

fn the_stack_and_what_it_borrows_stay() {
    let mut numbers = vec![1, 2, 3];
    let borrowed = &mut numbers;
    let local = std::hint::black_box([7_u8; 4096]);
    dune::run(|| borrowed.push(4)).unwrap();
    assert_eq!(local, [7; 4096]);
    assert_eq!(numbers, [1, 2, 3, 4]);
}

fn prints_and_formats() {
    enter();
    println!(
        "to standard output: {:>8.3} {:#x}",
        std::f64::consts::PI,
        255
    );
    eprintln!("to standard error: {:?}", Some("x"));
    assert_eq!(format!("{:>8.3}", std::f64::consts::E), "   2.718");
    assert_eq!("1.5e3".parse::<f64>().unwrap(), 1500.0);
}

fn files_are_written_and_read() {
    enter();
    let folder = std::env::temp_dir().join(format!("dune-std-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("file");
    let mut file = std::fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let text: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    file.write_all(&text).unwrap();
    file.seek(SeekFrom::Start(400)).unwrap();
    let mut four = [0; 4];
    file.read_exact(&mut four).unwrap();
    assert_eq!(u32::from_le_bytes(four), 100);
    assert_eq!(std::fs::read(&path).unwrap(), text);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 800_000);
    std::fs::rename(&path, folder.join("other")).unwrap();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    let missing = std::fs::read(&path).unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
    std::fs::remove_dir_all(&folder).unwrap();
}

fn inet_sockets_carry_data() {
    enter();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(text.to_uppercase().as_bytes()).unwrap();
        text.len()
    });
    let mut client = TcpStream::connect(address).unwrap();
    let line = "abc".repeat(50_000);
    client.write_all(line.as_bytes()).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(server.join().unwrap(), 150_000);
    assert_eq!(answer, line.to_uppercase());

    let (one, two) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    one.send_to(b"datagram", two.local_addr().unwrap()).unwrap();
    let mut buffer = [0; 64];
    let (length, from) = two.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"datagram");
    assert_eq!(from, one.local_addr().unwrap());
    two.set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let timeout = two.recv(&mut buffer).unwrap_err();
    assert_eq!(timeout.kind(), std::io::ErrorKind::WouldBlock);
}

fn unix_sockets_carry_data() {
    enter();
    let path = std::env::temp_dir().join(format!("dune-socket-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        BufReader::new(stream)
            .lines()
            .map(|l| l.unwrap().len())
            .sum::<usize>()
    });
    let mut client = UnixStream::connect(&path).unwrap();
    for n in 0..1000 {
        writeln!(client, "line {n:04}").unwrap();
    }
    drop(client);
    assert_eq!(server.join().unwrap(), 9 * 1000);
    std::fs::remove_file(&path).unwrap();
    let (one, two) = UnixDatagram::pair().unwrap();
    one.send(b"x").unwrap();
    assert_eq!(two.recv(&mut [0; 8]).unwrap(), 1);
}

fn channels_mutexes_and_condition_variables_work() {
    enter();
    const EACH: u64 = 2_000;
    let (sender, receiver) = mpsc::sync_channel(7);
    let producers: Vec<_> = (0..4)
        .map(|n| {
            let sender = sender.clone();
            thread::spawn(move || (0..EACH).for_each(|i| sender.send(n * EACH + i).unwrap()))
        })
        .collect();
    drop(sender);
    let sum: u64 = receiver.iter().sum();
    producers.into_iter().for_each(|p| p.join().unwrap());
    assert_eq!(sum, (0..4 * EACH).sum::<u64>());

    let turn = Arc::new((Mutex::new(0_u32), Condvar::new()));
    let threads: Vec<_> = (0..2)
        .map(|me| {
            let turn = Arc::clone(&turn);
            thread::spawn(move || {
                for _ in 0..1_000 {
                    let mut now = turn.0.lock().unwrap();
                    while *now % 2 != me {
                        now = turn.1.wait(now).unwrap();
                    }
                    *now += 1;
                    turn.1.notify_all();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(*turn.0.lock().unwrap(), 2_000);

    let lock = RwLock::new(0);
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                barrier.wait();
                for _ in 0..500 {
                    *lock.write().unwrap() += 1;
                    assert!(*lock.read().unwrap() > 0);
                }
            });
        }
    });
    assert_eq!(*lock.read().unwrap(), 2_000);
    let (_guard, timed_out) = {
        let guard = turn.0.lock().unwrap();
        turn.1
            .wait_timeout(guard, Duration::from_millis(10))
            .unwrap()
    };
    assert!(timed_out.timed_out());
}

fn one_time_initialisation_works() {
    enter();
    static CELL: OnceLock<u32> = OnceLock::new();
    static ONCE: Once = Once::new();
    let results: Vec<u32> = (0..8)
        .map(|n| {
            thread::spawn(move || {
                ONCE.call_once(|| ());
                *CELL.get_or_init(|| n)
            })
        })
        .map(|t| t.join().unwrap())
        .collect();
    assert!(results.iter().all(|r| *r == results[0]));
}

fn panics_are_caught_with_their_backtrace() {
    enter();
    struct Dropped<'a>(&'a Mutex<u32>);
    impl Drop for Dropped<'_> {
        fn drop(&mut self) {
            *self.0.lock().unwrap() += 1;
        }
    }
    let dropped = Mutex::new(0);
    for n in 0..100_u32 {
        let caught = std::panic::catch_unwind(|| {
            let _one = Dropped(&dropped);
            assert!(n > 100, "number {n}");
        });
        let message = *caught.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, format!("number {n}"));
    }
    assert_eq!(*dropped.lock().unwrap(), 100);
    assert!(dune::is_inside());
    let panicked = thread::spawn(|| panic!("in a thread")).join();
    assert!(panicked.is_err());
    let trace = Backtrace::force_capture().to_string();
    assert!(
        trace.contains("panics_are_caught_with_their_backtrace"),
        "{trace}"
    );
}

fn a_panic_in_main_thread_of_a_process_prints_a_backtrace() {
    enter();
    let (ended, text) = child_with_stderr(|| {
        unsafe { std::env::set_var("RUST_BACKTRACE", "1") };
        panic!("the last one");
    });
    assert_eq!(ended, Ended::Exited(101));
    assert!(text.contains("the last one"), "{text}");
    assert!(text.contains("stack backtrace:"), "{text}");
    assert!(text.contains("a_panic_in_main_thread"), "{text}");
}

fn memory_of_any_size_is_allocated() {
    enter();
    for shift in 0..28 {
        let size = (1_usize << shift) + 3;
        let mut memory = vec![0_u8; size];
        memory[0] = 1;
        memory[size - 1] = 2;
        memory[size / 2] = 3;
        assert_eq!(memory[size - 1], 2);
        let zero = memory.iter().step_by(4096).filter(|b| **b == 0).count();
        assert!(zero + 3 >= size.div_ceil(4096));
    }
    // GiBs of address space, touched here and there.
    for gib in [1, 5, 40, 300] {
        let length = gib << 30;
        let start = map(length, READ_WRITE);
        for step in 0..=64 {
            let at = start.wrapping_add((length - 1) / 64 * step);
            unsafe { at.write_volatile(step as u8) };
        }
        for step in 0..=64 {
            let at = start.wrapping_add((length - 1) / 64 * step);
            assert_eq!(unsafe { at.read_volatile() }, step as u8);
        }
        unmap(start, length);
    }
}

fn freed_memory_comes_back_zeroed() {
    enter();
    let length = 8 << 20;
    for round in 0..20_u8 {
        let start = map(length, READ_WRITE);
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, length) };
        assert!(bytes.iter().step_by(512).all(|b| *b == 0), "round {round}");
        bytes.fill(round + 1);
        unsafe { libc::madvise(start.cast(), length / 2, libc::MADV_DONTNEED) };
        assert!(bytes[..length / 2].iter().step_by(512).all(|b| *b == 0));
        assert!(
            bytes[length / 2..]
                .iter()
                .step_by(512)
                .all(|b| *b == round + 1)
        );
        unmap(start, length);
    }
}

fn moved_mappings_keep_their_contents() {
    enter();
    let small = map(64 << 10, READ_WRITE);
    unsafe { small.write_bytes(0x5a, 64 << 10) };
    let large = unsafe { libc::mremap(small.cast(), 64 << 10, 3 << 30, libc::MREMAP_MAYMOVE) };
    assert_ne!(large, libc::MAP_FAILED);
    let large: *mut u8 = large.cast();
    assert_eq!(unsafe { large.add(65_535).read() }, 0x5a);
    assert_eq!(unsafe { large.add((3 << 30) - 1).read() }, 0);
    unmap(large, 3 << 30);
}

#[target_feature(enable = "avx2,fma")]
fn dot_product(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::*;
    let mut sum = _mm256_setzero_ps();
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        let (a, b) = unsafe { (_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(b.as_ptr())) };
        sum = _mm256_fmadd_ps(a, b, sum);
    }
    let mut lanes = [0.0; 8];
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    lanes.iter().sum()
}

fn vector_instructions_compute() {
    let a: Vec<f32> = (0..4096_u16).map(f32::from).collect();
    let expected = a.iter().map(|x| f64::from(*x) * 2.0).sum::<f64>();
    assert!(is_x86_feature_detected!("avx2"), "the lab's CPU has AVX2");
    enter();
    assert!(is_x86_feature_detected!("avx2"));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (a, b) = (a.clone(), vec![2.0; 4096]);
            thread::spawn(move || {
                (0..200)
                    .map(|_| {
                        thread::yield_now();
                        f64::from(unsafe { dot_product(&a, &b) })
                    })
                    .fold(0.0, f64::max)
            })
        })
        .collect();
    for thread in threads {
        let result = thread.join().unwrap();
        assert!(
            (result - expected).abs() < 64.0,
            "{result} is not {expected}"
        );
    }
}

fn floating_point_control_survives_entry_and_exit() {
    const ROUND_UP: u32 = 2 << 13;
    fn set(value: u32) {
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value) };
    }
    fn get() -> u32 {
        let mut value = 0_u32;
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value) };
        value
    }
    let normal = get();
    set(normal | ROUND_UP);
    enter();
    assert_eq!(get() & (3 << 13), ROUND_UP);
    set(normal);
    dune::leave();
    assert_eq!(get() & (3 << 13), normal & (3 << 13));
}

fn hash_maps_and_randomness_work() {
    enter();
    let mut map = HashMap::new();
    for n in 0..50_000_u64 {
        map.insert(n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n);
    }
    assert_eq!(map.len(), 50_000);
    assert_eq!(map.get(&0x9e37_79b9_7f4a_7c15), Some(&1));
    let mut bytes = [0_u8; 256];
    assert_eq!(
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), 256, 0) },
        256
    );
    assert!(bytes.iter().any(|b| *b != bytes[0]));
}

fn clocks_go_forward_and_agree_with_the_kernels() {
    let before = (Instant::now(), SystemTime::now());
    enter();
    let mut last = Instant::now();
    assert!(last >= before.0);
    assert!(SystemTime::now() >= before.1);
    for _ in 0..10_000 {
        let now = Instant::now();
        assert!(now >= last);
        last = now;
    }
    // The vDSO's clock, computed from the TSC, beside the kernel's own.
    for _ in 0..50 {
        let mut kernel: libc::timespec = unsafe { std::mem::zeroed() };
        let mut vdso = kernel;
        let mut after = kernel;
        unsafe {
            libc::syscall(
                libc::SYS_clock_gettime,
                libc::CLOCK_MONOTONIC,
                &raw mut kernel,
            );
            libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut vdso);
            libc::syscall(
                libc::SYS_clock_gettime,
                libc::CLOCK_MONOTONIC,
                &raw mut after,
            );
        }
        let nanoseconds =
            |t: &libc::timespec| i128::from(t.tv_sec) * 1_000_000_000 + i128::from(t.tv_nsec);
        assert!(nanoseconds(&kernel) <= nanoseconds(&vdso));
        assert!(nanoseconds(&vdso) <= nanoseconds(&after));
    }
    let start = Instant::now();
    thread::sleep(Duration::from_millis(30));
    assert!(start.elapsed() >= Duration::from_millis(30));
}

fn the_environment_and_arguments_are_there() {
    enter();
    assert!(std::env::args().count() >= 1);
    assert!(std::env::current_exe().unwrap().exists());
    assert!(std::env::current_dir().is_ok());
    unsafe { std::env::set_var("DUNE_TEST_VARIABLE", "set inside") };
    dune::leave();
    assert_eq!(std::env::var("DUNE_TEST_VARIABLE").unwrap(), "set inside");
}

fn deep_recursion_uses_the_whole_stack() {
    fn down(n: u32) -> u64 {
        let local = std::hint::black_box([u64::from(n); 128]);
        if n == 0 {
            local[0]
        } else {
            down(n - 1) + local[5]
        }
    }
    enter();
    // Most of the usual 8 MiB.
    assert_eq!(down(2_000), (0..=2_000_u64).sum::<u64>());
}

dune_testing::tests! {
    smoke enters_and_leaves,
    ring0 a_closure_that_panics_leaves_dune_mode,
    ring0 the_stack_and_what_it_borrows_stay,
    ring0 prints_and_formats,
    ring0 files_are_written_and_read,
    ring0 inet_sockets_carry_data,
    ring0 unix_sockets_carry_data,
    smoke channels_mutexes_and_condition_variables_work,
    ring0 one_time_initialisation_works,
    ring0 panics_are_caught_with_their_backtrace,
    ring0 a_panic_in_main_thread_of_a_process_prints_a_backtrace,
    ring0 memory_of_any_size_is_allocated,
    ring0 freed_memory_comes_back_zeroed,
    ring0 moved_mappings_keep_their_contents,
    ring0 vector_instructions_compute,
    ring0 floating_point_control_survives_entry_and_exit,
    ring0 hash_maps_and_randomness_work,
    ring0 clocks_go_forward_and_agree_with_the_kernels,
    ring0 the_environment_and_arguments_are_there,
    ring0 deep_recursion_uses_the_whole_stack,
}
