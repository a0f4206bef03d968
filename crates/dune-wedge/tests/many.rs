//! Many compartments: at once, one after the other, pooled.

use dune_wedge::{Compartment, Grant, Pool, Tag, usage};

fn start() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
}

fn ten_thousand_live_at_once_within_32_kib_each() {
    const LIVE: usize = 10_000;
    start();
    // What the first one needs once.
    drop(Compartment::builder().build().unwrap());
    let before = usage();
    let resident = resident_bytes();
    let mut all: Vec<_> = (0..LIVE)
        .map(|_| Compartment::builder().build().unwrap())
        .collect();
    for (n, compartment) in all.iter_mut().enumerate() {
        assert_eq!(
            compartment.run(|n: u64| n * 2, n as u64).unwrap(),
            n as u64 * 2
        );
    }
    let after = usage();
    let pages = after.pages_in_use - before.pages_in_use + after.tables - before.tables;
    let bytes = pages * 4096 / LIVE;
    println!("{bytes} bytes of pages and tables each");
    assert!(bytes <= 32 << 10, "{bytes}");
    let resident = (resident_bytes() - resident) / LIVE;
    println!("{resident} bytes of resident memory each");
    assert!(resident <= 32 << 10, "{resident}");
    // All of them still work, in another order, having allocated and written to globals.
    for (n, compartment) in all.iter_mut().enumerate().rev().step_by(97) {
        let sum = compartment.run(|n: u64| vec![n; 100].iter().sum::<u64>(), n as u64);
        assert_eq!(sum.unwrap(), n as u64 * 100);
        compartment.trim();
    }
    drop(all);
    assert!(
        usage().pages_in_use <= before.pages_in_use + 64 * 2,
        "{:?}",
        usage()
    );
}

/// Memory of the process that is not shared with other processes.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap();
    let kib: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

fn creations_leak_nothing() {
    start();
    let count: usize = std::env::var("DUNE_WEDGE_CREATIONS").map_or(20_000, |n| n.parse().unwrap());
    let tag = Tag::new(4096).unwrap();
    let place = tag.put(7_u64).unwrap();
    let round = |n: u64| {
        let mut compartment = Compartment::builder()
            .tag(&tag, Grant::ReadWrite)
            .build()
            .unwrap();
        if n.is_multiple_of(16) {
            // With a heap, and now and then a failure.
            let result = compartment.run(
                |n: u64| {
                    let all = vec![n; 2000];
                    assert!(n != 160);
                    all.iter().sum::<u64>()
                },
                n % 320,
            );
            assert_eq!(result.is_err(), n % 320 == 160);
        }
        let seven = compartment.run(|place: dune_wedge::In<u64>| place.read(), place);
        assert_eq!(seven.unwrap(), 7);
    };
    for n in 0..2000 {
        round(n);
    }
    let (before, resident) = (usage(), resident_bytes());
    for n in 0..count as u64 {
        round(n);
    }
    assert_eq!(usage(), before);
    let grown = resident_bytes().saturating_sub(resident);
    assert!(
        grown < 1 << 20,
        "{grown} bytes more after {count} creations"
    );
    println!("{count} creations, {grown} bytes more");
}

fn creations_from_nothing_leak_nothing() {
    start();
    // More at once than are kept of those that ended.
    let round = || {
        let mut all: Vec<_> = (0..200)
            .map(|_| Compartment::builder().build().unwrap())
            .collect();
        for compartment in &mut all {
            assert_eq!(compartment.run(|n: u64| n + 1, 1).unwrap(), 2);
        }
    };
    round();
    let (before, resident) = (usage(), resident_bytes());
    for _ in 0..20 {
        round();
    }
    assert_eq!(usage(), before);
    let grown = resident_bytes().saturating_sub(resident);
    assert!(grown < 1 << 20, "{grown}");
}

fn a_pool_serves_threads_and_forgets() {
    start();
    let pool = Pool::new(3, || Compartment::builder().build());
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let pool = &pool;
            scope.spawn(move || {
                for n in 0..50 {
                    let sum = pool.take().unwrap().run(
                        |n: [u64; 2]| Box::new(n[0] * 10).wrapping_add(n[1]),
                        [thread, n],
                    );
                    assert_eq!(sum.unwrap(), 10 * thread + n);
                }
            });
        }
    });
    assert!((1..=3).contains(&pool.idle()));
    assert!(
        pool.take()
            .unwrap()
            .run(|n: u8| assert!(n != 0), 0)
            .is_err()
    );
    assert_eq!(pool.take().unwrap().run(|n: u8| n, 5).unwrap(), 5);
}

dune_testing::tests! {
    ring0 ten_thousand_live_at_once_within_32_kib_each, timeout 120,
    ring0 creations_leak_nothing, timeout 120,
    ring0 creations_from_nothing_leak_nothing,
    ring0 a_pool_serves_threads_and_forgets,
}
