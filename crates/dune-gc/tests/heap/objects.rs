//! The Rust interface.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use dune_gc::{
    Config, Gc, GcArray, GcCell, GcError, Heap, Mutator, NoPointers, Provider, Root, Trace, Tracer,
};

use crate::graph::agrees_with_model;
use crate::{config, stressed};

/// Fewer where each instruction is emulated.
fn cases(provider: Provider, native: u32) -> u32 {
    if provider == Provider::Dune {
        native.div_ceil(4)
    } else {
        native
    }
}

pub(crate) fn agrees_with_the_model(provider: Provider) {
    agrees_with_model(config(provider), cases(provider, 24), 300);
}

pub(crate) fn agrees_with_the_model_when_collecting_always(provider: Provider) {
    agrees_with_model(config(provider).stress(), cases(provider, 12), 150);
}

pub(crate) fn agrees_with_the_model_when_the_mark_stack_is_too_short(provider: Provider) {
    agrees_with_model(
        config(provider).mark_stack_entries(2),
        cases(provider, 8),
        150,
    );
}

pub(crate) fn agrees_with_the_model_in_one_stop(provider: Provider) {
    agrees_with_model(config(provider).stop_the_world(), cases(provider, 12), 200);
}

/// The program does something between any two objects that are looked at.
fn in_small_pieces(provider: Provider) -> Config {
    config(provider).young_bytes(4 << 10).pieces(8, 1)
}

pub(crate) fn agrees_with_the_model_in_small_pieces(provider: Provider) {
    let config = in_small_pieces(provider).marks_beside(false);
    agrees_with_model(config, cases(provider, 24), 300);
}

pub(crate) fn agrees_with_the_model_in_small_pieces_with_a_marker(provider: Provider) {
    let config = in_small_pieces(provider).marks_beside(true);
    agrees_with_model(config, cases(provider, 12), 300);
}

/// A list of so many numbers, the last in front.
fn list(mutator: &mut Mutator, len: u64) -> Root<Number> {
    let mut first = mutator.make(number(0));
    for value in 1..len {
        let next = mutator.make(number(value));
        next.next.set(mutator, Some(first.get(mutator)));
        first = next;
    }
    first
}

fn is_whole(mutator: &Mutator, first: &Root<Number>, len: u64) -> bool {
    let mut values = (0..len).rev();
    let mut at = Some(first.get(mutator));
    while let Some(number) = at {
        if values.next() != Some(number.value) {
            return false;
        }
        at = number.next.get(mutator);
    }
    values.next().is_none()
}

/// Allocates until so many more collections are complete.
fn until_collected(
    mutator: &mut Mutator,
    heap: &Heap,
    times: u64,
    mut between: impl FnMut(&Mutator),
) {
    let patience = patience();
    let begin = heap.stats().collections;
    while heap.stats().collections < begin + times {
        assert!(Instant::now() < patience, "no end of a collection");
        drop(mutator.make(number(0)));
        between(mutator);
    }
}

pub(crate) fn a_collection_of_much_takes_many_short_stops(provider: Provider) {
    const LEN: u64 = 20_000;
    let config = config(provider).pieces(500, 1).marks_beside(false);
    let heap = Heap::new(config).unwrap();
    let mut mutator = heap.attach().unwrap();
    let first = list(&mut mutator, LEN);
    let before = heap.stats();
    until_collected(&mut mutator, &heap, 4, |_| ());
    let after = heap.stats();
    let stops = (after.pauses - before.pauses) / (after.collections - before.collections);
    if provider == Provider::None {
        assert_eq!(stops, 1);
    } else {
        // All of the list, or the part of it that is young or written, by 500 words at a time.
        assert!(stops >= 3, "{before:?} {after:?}");
    }
    assert!(is_whole(&mutator, &first, LEN));
}

pub(crate) fn a_long_array_is_looked_through_in_parts(provider: Provider) {
    const LEN: usize = 50_000;
    let config = config(provider).pieces(500, 1).marks_beside(false);
    let heap = Heap::new(config).unwrap();
    let mut mutator = heap.attach().unwrap();
    let before = heap.stats();
    let array: Root<GcArray<Number>> = mutator.root(mutator.alloc_array(LEN));
    for index in (0..LEN).step_by(100) {
        array[index].set(&mutator, Some(mutator.alloc(number(index as u64))));
    }
    until_collected(&mut mutator, &heap, 1, |_| ());
    let after = heap.stats();
    if provider != Provider::None {
        assert!(after.pauses - before.pauses >= 20, "{before:?} {after:?}");
    }
    for index in (0..LEN).step_by(100) {
        assert_eq!(array[index].get(&mutator).unwrap().value, index as u64);
    }
}

#[derive(Trace)]
struct Link {
    next: GcCell<Link>,
    body: GcCell<GcArray<Number>>,
}

/// A queue whose links are larger than what one stop looks at: its end must not run away from the
/// collector.
pub(crate) fn a_collection_ends_however_much_is_allocated_meanwhile(provider: Provider) {
    const LINKS: usize = 50;
    const BODY: usize = 4000;
    let config = config(provider).pieces(100, 1).marks_beside(false);
    let heap = Heap::new(config).unwrap();
    let mut mutator = heap.attach().unwrap();
    let link = |mutator: &mut Mutator| {
        let link = mutator.make(Link {
            next: GcCell::null(),
            body: GcCell::null(),
        });
        link.body.set(mutator, Some(mutator.alloc_array(BODY)));
        link
    };
    let mut first = link(&mut mutator);
    let mut last = first.clone();
    let begin = heap.stats().collections;
    for step in 0..3000 {
        let next = link(&mut mutator);
        last.next.set(&mutator, Some(next.get(&mutator)));
        last = next;
        if step >= LINKS {
            let second = first.get(&mutator).next.get(&mutator).unwrap();
            first = mutator.root(second);
        }
    }
    let stats = heap.stats();
    assert!(stats.collections - begin > 3, "{stats:?}");
    assert!(stats.heap_bytes < 64 << 20, "{stats:?}");
}

pub(crate) fn a_collection_ends_however_much_is_written_meanwhile(provider: Provider) {
    const LEN: u64 = 5_000;
    let config = config(provider).pieces(50, 1).marks_beside(false);
    let heap = Heap::new(config).unwrap();
    let mut mutator = heap.attach().unwrap();
    let first = list(&mut mutator, LEN);
    until_collected(&mut mutator, &heap, 3, |mutator| {
        // Every page that the list is in, which takes more than the next stop to look at.
        let mut at = Some(first.get(mutator));
        while let Some(number) = at {
            at = number.next.get(mutator);
            number.next.set(mutator, at);
        }
    });
    assert!(is_whole(&mutator, &first, LEN));
}

#[derive(Trace)]
struct Number {
    value: u64,
    next: GcCell<Number>,
}

fn number(value: u64) -> Number {
    Number {
        value,
        next: GcCell::null(),
    }
}

/// Pages that no memory stands behind cannot be protected by every kernel: they must be followed
/// all the same.
pub(crate) fn pages_of_a_large_object_that_were_never_touched_are_followed(provider: Provider) {
    const LEN: usize = 200_000;
    let heap = Heap::new(config(provider)).unwrap();
    let mut mutator = heap.attach().unwrap();
    let array: Root<GcArray<Number>> = mutator.root(mutator.alloc_array(LEN));
    // It grows old with almost all of its pages untouched.
    mutator.collect();
    for round in 0..3_u64 {
        let steps = (0..LEN).step_by(2048 - 7 * round as usize);
        for index in steps.clone() {
            let young = mutator.alloc(number(index as u64 + round));
            array[index].set(&mutator, Some(young));
        }
        // Young collections, and what would be put into the place of lost objects.
        for _ in 0..200_000 {
            mutator.alloc(number(u64::MAX));
            mutator.safepoint();
        }
        for index in steps {
            let found = array[index].get(&mutator).unwrap();
            assert_eq!(found.value, index as u64 + round, "at {index}");
        }
    }
    let stats = heap.stats();
    assert!(stats.collections > 5, "{stats:?}");
    if provider != Provider::None {
        assert!(stats.minor_collections > 5, "{stats:?}");
    }
}

/// Each thread hangs lists into all slots of a table, cuts off others' and reads everybody's.
pub(crate) fn threads_share_a_graph_that_changes(provider: Provider) {
    share_a_graph(config(provider).young_bytes(256 << 10), rounds_of(provider));
}

/// The same while a cycle of marking runs beside them all the time.
pub(crate) fn threads_share_a_graph_when_collecting_always(provider: Provider) {
    share_a_graph(config(provider).stress(), rounds_of(provider) / 10);
}

fn rounds_of(provider: Provider) -> u64 {
    if provider == Provider::Dune {
        20_000
    } else {
        40_000
    }
}

fn share_a_graph(config: Config, rounds: u64) {
    const SLOTS: u64 = 256;
    const THREADS: u64 = 4;
    let heap = Heap::new(config).unwrap();
    let table: Root<GcArray<Number>> = {
        let mutator = heap.attach().unwrap();
        mutator.root(mutator.alloc_array(SLOTS as usize))
    };
    let work = |thread: u64| {
        let mut mutator = heap.attach().unwrap();
        let mut random = thread + 1;
        let mut next = |below: u64| {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        let mut own: Vec<Root<Number>> = Vec::new();
        // On a quick machine it goes on until there was something to survive.
        let is_enough = |round| round >= rounds && heap.stats().collections > 3;
        for round in (0..rounds * 100).take_while(|round| !is_enough(*round)) {
            let slot = next(SLOTS);
            let cell = &table[slot as usize];
            // A multiple of the slots beyond it: whoever finds another value was cheated.
            let new = mutator.alloc(number(slot + SLOTS * (round * THREADS + thread)));
            if next(16) != 0 {
                new.next.set(&mutator, cell.get(&mutator));
            }
            cell.set(&mutator, Some(new));
            if next(64) == 0 {
                own.push(mutator.root(new));
            }
            if own.len() > 100 {
                own.swap_remove(next(100) as usize);
            }
            let slot = next(SLOTS);
            let mut at = table[slot as usize].get(&mutator);
            for _ in 0..50 {
                let Some(found) = at else { break };
                assert_eq!(found.value % SLOTS, slot);
                at = found.next.get(&mutator);
            }
            mutator.safepoint();
            if next(1000) == 0 {
                mutator.blocking(|| std::thread::sleep(Duration::from_millis(1)));
            }
        }
        for root in &own {
            let next = root.next.get(&mutator);
            assert!(next.is_none_or(|next| next.value % SLOTS == root.value % SLOTS));
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || work(n))).collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
    assert!(heap.stats().collections > 3, "{:?}", heap.stats());
}

/// A thread within `blocking` (here: in `read`) is not waited for, and finds its objects.
pub(crate) fn threads_that_wait_hold_up_nobody(provider: Provider) {
    use std::io::{Read as _, Write as _};
    let heap = Heap::new(config(provider)).unwrap();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let (says, hears) = mpsc::channel();
    let waiting = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut mutator = heap.attach().unwrap();
            let root = mutator.make(number(41));
            let byte = mutator.blocking(|| {
                says.send(()).unwrap();
                let mut byte = [0];
                reader.read_exact(&mut byte).unwrap();
                byte[0]
            });
            mutator.safepoint();
            root.value + u64::from(byte)
        });
        hears.recv().unwrap();
        let mut mutator = heap.attach().unwrap();
        let before = heap.stats().collections;
        for _ in 0..5 {
            mutator.collect();
        }
        assert!(heap.stats().collections >= before + 5);
        writer.write_all(&[1]).unwrap();
        mutator.blocking(|| thread.join().unwrap())
    });
    assert_eq!(waiting, 42);
}

pub(crate) fn a_finalizer_may_bring_its_object_back_once(provider: Provider) {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let heap = stressed(provider);
    let mut mutator = heap.attach().unwrap();
    let place: Root<GcArray<Number>> = mutator.root(mutator.alloc_array(1));
    let weak = {
        let outer = mutator.alloc(number(1));
        outer.next.set(&mutator, Some(mutator.alloc(number(2))));
        let place = place.clone();
        mutator.set_finalizer(outer, move |mutator, dead| {
            RUNS.fetch_add(1, Ordering::Relaxed);
            place[0].set(mutator, Some(dead));
        });
        mutator.downgrade(outer)
    };
    mutator.collect();
    assert_eq!(RUNS.load(Ordering::Relaxed), 1);
    assert!(
        weak.get(&mutator).is_none(),
        "it was unreachable for a while"
    );
    for _ in 0..3 {
        mutator.collect();
        let back = place[0].get(&mutator).unwrap();
        assert_eq!((back.value, back.next.get(&mutator).unwrap().value), (1, 2));
    }
    place[0].set(&mutator, None);
    mutator.collect();
    assert_eq!(RUNS.load(Ordering::Relaxed), 1, "it was used up");
}

/// Panics when it is dropped, if it is told to.
struct Bomb(bool);
static DROPS: AtomicUsize = AtomicUsize::new(0);
impl Drop for Bomb {
    fn drop(&mut self) {
        DROPS.fetch_add(1, Ordering::Relaxed);
        assert!(!self.0, "on purpose");
    }
}
// SAFETY: a truth value.
unsafe impl NoPointers for Bomb {}
// SAFETY: as above.
unsafe impl Trace for Bomb {
    const HAS_POINTERS: bool = false;
    fn trace(&self, _: &mut Tracer<'_, '_>) {}
}

pub(crate) fn a_panic_in_a_finalizer_or_drop_loses_no_other(provider: Provider) {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    std::panic::set_hook(Box::new(|_| {}));
    let heap = Heap::new(config(provider)).unwrap();
    let mut mutator = heap.attach().unwrap();
    for n in 0..10 {
        mutator.alloc(Bomb(n % 2 == 0));
        let finalized = mutator.alloc(number(n));
        mutator.set_finalizer(finalized, |_, dead| {
            RUNS.fetch_add(1, Ordering::Relaxed);
            assert!(!dead.value.is_multiple_of(2), "on purpose");
        });
    }
    let mut panics = 0;
    panics += usize::from(catch_unwind(AssertUnwindSafe(|| mutator.collect())).is_err());
    // Each safepoint goes on where the last one was thrown out.
    for _ in 0..20 {
        panics += usize::from(catch_unwind(AssertUnwindSafe(|| mutator.safepoint())).is_err());
    }
    let _ = std::panic::take_hook();
    assert_eq!(panics, 10);
    assert_eq!(RUNS.load(Ordering::Relaxed), 10);
    assert_eq!(DROPS.load(Ordering::Relaxed), 10);
    // The heap is as good as before.
    let root = mutator.make(number(7));
    mutator.collect();
    assert_eq!(root.value, 7);
}

pub(crate) fn a_weak_pointer_ends_with_its_heap() {
    // Heaps of one size tend to get one another's addresses.
    let make = || Heap::new(Config::new().provider(Provider::None).max_bytes(1 << 30)).unwrap();
    let mut old = Vec::new();
    for value in 0..20 {
        let heap = make();
        let mutator = heap.attach().unwrap();
        for weak in &old {
            let weak: &dune_gc::Weak<Number> = weak;
            assert!(weak.get(&mutator).is_none());
        }
        old.push(mutator.downgrade(mutator.alloc(number(value))));
        assert_eq!(old.last().unwrap().get(&mutator).unwrap().value, value);
    }
}

pub(crate) fn a_full_heap_says_so() {
    let config = Config::new().provider(Provider::None).max_bytes(64 << 20);
    let heap = Heap::new(config).unwrap();
    let mut mutator = heap.attach().unwrap();
    let mut kept = Vec::new();
    let error = loop {
        match mutator.try_make([0_u64; 1000]) {
            Ok(root) => kept.push(root),
            Err(error) => break error,
        }
        assert!(kept.len() < 10_000, "it never became full");
    };
    assert!(
        matches!(error, GcError::Exhausted { bytes: 8000, .. }),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("raise Config::max_bytes"),
        "{error}"
    );
    assert!(kept.len() > 7000, "{}", kept.len());
    assert!(mutator.try_alloc_array::<Number>(usize::MAX).is_err());
    assert!(mutator.try_alloc_array::<Number>(100 << 20).is_err());
    // What is given up can be used again.
    kept.truncate(10);
    for _ in 0..20_000 {
        mutator.try_make([1_u64; 1000]).unwrap();
    }
    assert!(kept.iter().all(|root| root.iter().all(|word| *word == 0)));
}

pub(crate) fn dunes_dirty_bits_are_refused_outside() {
    if dune_is_native() {
        return;
    }
    let error = Heap::new(Config::new().provider(Provider::Dune)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("writes cannot be tracked by dune: "),
        "{text}"
    );
    // The automatic choice works all the same.
    let heap = Heap::new(Config::new()).unwrap();
    let mut mutator = heap.attach().unwrap();
    let root = mutator.make(number(3));
    mutator.collect();
    assert_eq!(root.value, 3);
}

fn dune_is_native() -> bool {
    dune::run(|| ()).is_ok()
}

/// A thread that leaves Dune mode goes on as before: what it writes is noted.
pub(crate) fn writes_outside_dune_mode_count_too() {
    let heap = Heap::new(config(Provider::Dune)).unwrap();
    let mut mutator = heap.attach().unwrap();
    let array: Root<GcArray<Number>> = mutator.root(mutator.alloc_array(50_000));
    mutator.collect();
    dune::leave();
    assert!(!dune::is_inside());
    for round in 0..4_u64 {
        for index in (0..50_000).step_by(911) {
            array[index].set(&mutator, Some(mutator.alloc(number(index as u64 + round))));
        }
        let before = heap.stats().minor_collections;
        while heap.stats().minor_collections < before + 2 {
            mutator.alloc(number(u64::MAX));
            mutator.safepoint();
        }
        for index in (0..50_000).step_by(911) {
            let found = array[index].get(&mutator).unwrap();
            assert_eq!(found.value, index as u64 + round);
        }
    }
}

pub(crate) fn the_other_process_is_told_whose_heap_it_is() {
    let heap = Heap::new(config(Provider::Mprotect)).unwrap();
    let mut mutator = heap.attach().unwrap();
    let root = mutator.make(number(9));
    let in_child = |body: &mut dyn FnMut(&mut Mutator)| -> i32 {
        // SAFETY: the child uses the heap, which is the point, and nothing that needs a lock
        // of libc.
        match unsafe { libc::fork() } {
            0 => {
                body(&mut mutator);
                // SAFETY: has no conditions.
                unsafe { libc::_exit(3) }
            }
            child => {
                assert!(child > 0);
                let mut status = 0;
                // SAFETY: a child of this process.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                status
            }
        }
    };
    let mut in_child = in_child;
    let aborted =
        |status: i32| libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT;
    assert!(aborted(in_child(&mut |mutator| mutator.collect())));
    assert!(aborted(in_child(&mut |mutator| {
        for _ in 0..100_000 {
            mutator.alloc(number(1));
        }
    })));
    assert!(aborted(in_child(&mut |mutator| drop(
        mutator.root(root.get(mutator))
    ))));
    // Reading is no use of it that could go wrong, and the child may have a heap of its own.
    let status = in_child(&mut |_| {
        assert_eq!(root.value, 9);
        let heap = Heap::new(config(Provider::Mprotect)).unwrap();
        let mut mutator = heap.attach().unwrap();
        let own = mutator.make(number(4));
        mutator.collect();
        assert_eq!(own.value, 4);
    });
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 3,
        "{status}"
    );
    // The parent's is as it was.
    mutator.collect();
    assert_eq!(root.value, 9);
}

/// Used by the test of threads in the other module too: time that nobody should need.
pub(crate) fn patience() -> Instant {
    Instant::now() + Duration::from_secs(120)
}

#[allow(dead_code, reason = "that these are so is what is tested")]
fn bounds() {
    fn can_be_shared<T: Send + Sync>() {}
    can_be_shared::<Heap>();
    can_be_shared::<Root<Number>>();
    can_be_shared::<dune_gc::Weak<Number>>();
    can_be_shared::<GcCell<Number>>();
    let _: Option<(Gc<'_, Number>, AtomicBool, AtomicU64)> = None;
}

/// Objects whose values need `Drop` are young like others, and their memory is used again.
pub(crate) fn what_was_dropped_makes_room(provider: Provider) {
    #[derive(Trace)]
    struct Named {
        _name: String,
        next: GcCell<Named>,
    }
    let heap = Heap::new(config(provider).stop_the_world()).unwrap();
    let mut mutator = heap.attach().unwrap();
    let first = mutator.make(Named {
        _name: "first".to_owned(),
        next: GcCell::null(),
    });
    let rounds = if provider == Provider::Dune {
        50_000
    } else {
        300_000
    };
    for round in 0..rounds {
        let new = mutator.alloc(Named {
            _name: format!("number {round}"),
            next: GcCell::null(),
        });
        first.next.set(&mutator, Some(new));
        mutator.safepoint();
    }
    let stats = heap.stats();
    // Two collections' worth of the smallest heap, not all that was ever made.
    assert!(stats.heap_bytes < 2 << 20, "{stats:?}");
    assert!(stats.collections > 10, "{stats:?}");
}
