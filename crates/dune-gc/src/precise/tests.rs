//! What Miri can follow: the Rust interface without a tracker. (`tests/heap` has the rest.)
//!
//! `MIRIFLAGS="-Zmiri-permissive-provenance" cargo +nightly miri test -p dune-gc --lib`

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Config, GcArray, GcCell, Heap, Provider, Root, Trace};

#[derive(Trace)]
struct Node {
    value: u64,
    name: Option<String>,
    next: GcCell<Node>,
    more: GcCell<GcArray<Node>>,
}

fn node(value: u64) -> Node {
    Node {
        value,
        name: value.is_multiple_of(3).then(|| format!("node {value}")),
        next: GcCell::null(),
        more: GcCell::null(),
    }
}

fn heap() -> Heap {
    let config = Config::new()
        .provider(Provider::None)
        .max_bytes(1 << 20)
        .young_bytes(1 << 10)
        .mark_stack_entries(64);
    Heap::new(config).unwrap()
}

#[test]
fn circles_arrays_weak_pointers_and_drops() {
    let heap = heap();
    let mut mutator = heap.attach().unwrap();
    let first = mutator.make(node(0));
    for value in 1..40 {
        let new = mutator.make(node(value));
        new.next.set(&mutator, first.next.get(&mutator));
        first.next.set(&mutator, Some(new.get(&mutator)));
        let array = mutator.alloc_array(5);
        array[3].set(&mutator, Some(first.get(&mutator)));
        new.more.set(&mutator, Some(array));
    }
    let weak = mutator.downgrade(first.next.get(&mutator).unwrap());
    mutator.collect();
    let mut at = Some(first.get(&mutator));
    let mut expected = [0].into_iter().chain((1..40).rev());
    while let Some(found) = at {
        assert_eq!(Some(found.value), expected.next());
        assert_eq!(found.name.is_some(), found.value.is_multiple_of(3));
        if let Some(more) = found.more.get(&mutator) {
            assert!(more[3].get(&mutator).unwrap().is(first.get(&mutator)));
        }
        at = found.next.get(&mutator);
    }
    assert_eq!(expected.next(), None);
    first.next.set(&mutator, None);
    mutator.collect();
    assert!(weak.get(&mutator).is_none());
}

#[test]
fn finalizers_and_the_end_of_a_heap() {
    static SUM: AtomicUsize = AtomicUsize::new(0);
    let heap = heap();
    let mut mutator = heap.attach().unwrap();
    for value in 1..=10 {
        let object = mutator.alloc(node(value));
        mutator.set_finalizer(object, |_, dead| {
            SUM.fetch_add(dead.value as usize, Ordering::Relaxed);
        });
    }
    mutator.collect();
    mutator.collect();
    assert_eq!(SUM.load(Ordering::Relaxed), 55);
    // Strings that are still in the heap go with it.
    let _root = mutator.make(node(3));
}

#[test]
fn threads_exchange_objects() {
    let heap = heap();
    let place: Root<GcArray<Node>> = {
        let mutator = heap.attach().unwrap();
        mutator.root(mutator.alloc_array(1))
    };
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (heap, place) = (&heap, &place);
            scope.spawn(move || {
                let mut mutator = heap.attach().unwrap();
                for round in 0..30 {
                    let new = mutator.alloc(node(round * 2 + thread));
                    new.next.set(&mutator, place[0].get(&mutator));
                    if round % 8 == 7 {
                        new.next.set(&mutator, None);
                    }
                    place[0].set(&mutator, Some(new));
                    mutator.safepoint();
                }
            });
        }
    });
    let mutator = heap.attach().unwrap();
    assert!(place[0].get(&mutator).is_some());
}
