//! Windows: memory anywhere in the address space, on CPUs with few physical address bits,
//! and windows used again when memory goes away.
#![expect(unsafe_code, reason = "maps memory at addresses of its own choice")]

use dune::Options;

const GIB: u64 = 1 << 30;
/// What client processors have.
const BITS: u32 = 39;
/// So many windows there are with 39 bits.
const MOST: u64 = (1 << (BITS - 30)) - 2;

fn enter() {
    dune::enter_with(&Options::new().physical_bits(BITS)).unwrap();
    assert!(dune::is_inside());
}

/// Maps a page at an address of our choice; `None` where something is.
fn map(address: u64, length: usize, rights: i32) -> Option<*mut u8> {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: refuses addresses where something is mapped.
    let mapped = unsafe { libc::mmap(address as *mut _, length, rights, flags, -1, 0) };
    (mapped != libc::MAP_FAILED).then_some(mapped.cast())
}

fn unmap(address: *mut u8, length: usize) {
    // SAFETY: mapped by `map`, and not used any more.
    assert_eq!(unsafe { libc::munmap(address.cast(), length) }, 0);
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn a_small_process_has_few_windows() {
    enter();
    println!("{} windows", dune::windows());
    assert!(
        (2..=24).contains(&dune::windows()),
        "{} windows",
        dune::windows()
    );
}

fn memory_all_over_the_address_space() {
    enter();
    // 400 places, from the lowest addresses to the highest.
    let pages: Vec<_> = (0..400_u64)
        .filter_map(|n| map(n * 300 * GIB + 64 * 4096 * (n + 1), 4096, READ_WRITE))
        .collect();
    assert!(pages.len() > 380, "{}", pages.len());
    for (n, page) in pages.iter().enumerate() {
        // SAFETY: mapped above.
        unsafe { page.cast::<usize>().write_volatile(n) };
    }
    for (n, page) in pages.iter().enumerate() {
        // SAFETY: mapped above.
        assert_eq!(unsafe { page.cast::<usize>().read_volatile() }, n);
    }
    assert!(dune::windows() >= pages.len());
}

fn windows_are_used_again_when_memory_goes_away() {
    enter();
    let kept = vec![7_u8; 1 << 20];
    for n in 0..MOST + 200 {
        let Some(page) = map((1000 + n) * GIB, 4096, READ_WRITE) else {
            continue;
        };
        // SAFETY: mapped above.
        unsafe { page.write_volatile(n as u8) };
        // SAFETY: as above.
        assert_eq!(unsafe { page.read_volatile() }, n as u8);
        unmap(page, 4096);
    }
    assert!(kept.iter().all(|byte| *byte == 7));
    assert!(dune::windows() as u64 <= MOST);
    // And where there was a window once, there is one again.
    let page = map(1000 * GIB, 4096, READ_WRITE).unwrap();
    // SAFETY: mapped above.
    unsafe { page.write_volatile(1) };
}

fn split_windows_are_used_again_too() {
    use dune::memory::{PageSize, ProcessTables, Tlb, VirtRange};
    use dune_x86::addr::GuestVirt;
    enter();
    let tables = ProcessTables::get().unwrap();
    for round in 0..2 {
        for n in 0..MOST + 100 {
            let Some(page) = map((2000 + n) * GIB, 4096, READ_WRITE) else {
                continue;
            };
            // SAFETY: mapped above.
            unsafe { page.write_volatile(n as u8) };
            if n % 10 == 0 {
                let at = GuestVirt::new(page as u64);
                let range = VirtRange::page(at, PageSize::Size4KiB);
                tables
                    .split(range, PageSize::Size4KiB)
                    .unwrap()
                    .apply(&Tlb::of_process());
            }
            // SAFETY: as above.
            assert_eq!(unsafe { page.read_volatile() }, n as u8, "round {round}");
            unmap(page, 4096);
        }
    }
}

fn reservations_of_terabytes_cost_no_windows_until_touched() {
    enter();
    let before = dune::windows();
    let size = 16_usize << 40;
    let base = map(4000 * GIB, size, libc::PROT_NONE).unwrap();
    assert_eq!(dune::windows(), before);
    for n in 0..64_usize {
        let at = base.wrapping_add(n * (200 << 30));
        // SAFETY: within the reservation.
        assert_eq!(unsafe { libc::mprotect(at.cast(), 4096, READ_WRITE) }, 0);
        // SAFETY: accessible since the line above.
        unsafe { at.write_volatile(n as u8) };
        // SAFETY: as above.
        assert_eq!(unsafe { at.read_volatile() }, n as u8);
    }
    assert!(dune::windows() <= before + 65);
    unmap(base, size);
}

fn a_thread_may_map_and_touch_while_windows_are_taken_back() {
    enter();
    let threads: Vec<_> = (0..2_u64)
        .map(|thread| {
            std::thread::spawn(move || {
                for n in 0..MOST * 2 / 3 {
                    let Some(page) = map((3000 + thread * 4000 + n) * GIB, 4096, READ_WRITE) else {
                        continue;
                    };
                    for value in 0..3_u8 {
                        // SAFETY: mapped above, and this thread's.
                        unsafe { page.write_volatile(value) };
                        // SAFETY: as above.
                        assert_eq!(unsafe { page.read_volatile() }, value);
                    }
                    unmap(page, 4096);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn more_memory_than_guest_physical_space_is_a_signal_not_a_hang() {
    enter();
    // SAFETY: the child only touches memory.
    let child = unsafe { libc::fork() };
    if child == 0 {
        for n in 0..MOST + 50 {
            if let Some(page) = map((1000 + n) * GIB, 4096, READ_WRITE) {
                // SAFETY: mapped above.
                unsafe { page.write_volatile(1) };
            }
        }
        std::process::exit(0);
    }
    let mut status = 0;
    // SAFETY: writes the status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
}

dune_testing::tests! {
    ring0 a_small_process_has_few_windows,
    ring0 memory_all_over_the_address_space,
    ring0 windows_are_used_again_when_memory_goes_away,
    ring0 split_windows_are_used_again_too,
    ring0 reservations_of_terabytes_cost_no_windows_until_touched,
    ring0 a_thread_may_map_and_touch_while_windows_are_taken_back,
    ring0 more_memory_than_guest_physical_space_is_a_signal_not_a_hang,
}
