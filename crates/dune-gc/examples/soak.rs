//! Many threads that change shared and private structures for a while; every value that is
//! read is checked.
//!
//! ```text
//! cargo run --release -p dune-gc --example soak -- --minutes 30 --provider mprotect
//! ```
//!
//! Options: `--minutes N` (1), `--provider NAME` (auto), `--threads N` (4), `--seed N` (1).
//! Ends with 0 and a line of statistics, or with a panic at the first value that is wrong.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dune_gc::{Config, Gc, GcArray, GcCell, Heap, Mutator, Provider, Root, Trace, Weak};

/// A node of a tree, and of a chain in the table.
#[derive(Trace)]
struct Node {
    key: u64,
    /// A function of the key: whoever reads memory that is not its own any more notices.
    seal: u64,
    left: GcCell<Node>,
    right: GcCell<Node>,
    note: Option<Box<str>>,
}

/// Values with a note that were dropped, and made.
static DROPPED: AtomicU64 = AtomicU64::new(0);

const fn seal(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bd1_e995
}

fn node(key: u64) -> Node {
    Node {
        key,
        seal: seal(key),
        left: GcCell::null(),
        right: GcCell::null(),
        note: key.is_multiple_of(64).then(|| format!("node {key}").into()),
    }
}

fn check(node: &Node) {
    assert_eq!(node.seal, seal(node.key), "a node was overwritten");
    if let Some(note) = &node.note {
        assert_eq!(
            **note,
            *format!("node {}", node.key),
            "a note was overwritten"
        );
    }
}

/// xorshift: the order of what happens, not its quality, is the point.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

type Table = GcArray<Node>;
const SLOTS: usize = 1 << 16;

fn work(heap: &Heap, table: &Root<Table>, seed: u64, end: Instant) -> u64 {
    let mut mutator = match heap.attach() {
        Ok(mutator) => mutator,
        Err(error) => panic!("{error}"),
    };
    let mut random = Random(seed.wrapping_mul(2).wrapping_add(1));
    let mut own: Vec<Root<Node>> = Vec::new();
    let mut watched: Vec<(u64, Weak<Node>)> = Vec::new();
    let mut rounds = 0;
    while Instant::now() < end {
        for _ in 0..200 {
            match random.below(100) {
                0..50 => put(&mutator, &table.get(&mutator), &mut random),
                50..80 => look(&mutator, &table.get(&mutator), &mut random),
                80..85 => {
                    let depth = 2 + random.below(9) as u32;
                    let tree = grow(&mut mutator, depth);
                    assert_eq!(count(&mutator, tree.get(&mutator)), (1 << (depth + 1)) - 1);
                    own.push(tree);
                }
                85..90 => {
                    if own.len() > 20 {
                        own.swap_remove(random.below(own.len() as u64) as usize);
                    }
                    own.iter().for_each(|tree| check(tree));
                }
                90..95 => watch(&mutator, &own, &mut watched, &mut random),
                95..99 => exchange(&mutator, &own, &mut random),
                _ => mutator.blocking(std::thread::yield_now),
            }
            mutator.safepoint();
        }
        rounds += 1;
    }
    for tree in &own {
        count(&mutator, tree.get(&mutator));
    }
    rounds
}

/// A new head of a chain; long chains are cut.
fn put(mutator: &Mutator, table: &Table, random: &mut Random) {
    let slot = random.below(SLOTS as u64);
    let new = mutator.alloc(node(slot + random.below(1000) * SLOTS as u64));
    let cell = &table[slot as usize];
    new.left.set(mutator, cell.get(mutator));
    if random.below(8) == 0 {
        new.left.set(mutator, None);
    }
    cell.set(mutator, Some(new));
}

fn look(mutator: &Mutator, table: &Table, random: &mut Random) {
    let slot = random.below(SLOTS as u64);
    let mut next = table[slot as usize].get(mutator);
    let mut steps = 0;
    while let Some(found) = next
        && steps < 1000
    {
        check(&found);
        assert_eq!(found.key % SLOTS as u64, slot, "a node of another chain");
        next = found.left.get(mutator);
        steps += 1;
    }
}

fn grow(mutator: &mut Mutator, depth: u32) -> Root<Node> {
    let root = mutator.make(node(u64::from(depth)));
    if depth > 0 {
        let left = grow(mutator, depth - 1);
        root.left.set(mutator, Some(left.get(mutator)));
        let right = grow(mutator, depth - 1);
        root.right.set(mutator, Some(right.get(mutator)));
    }
    root
}

fn count(mutator: &Mutator, tree: Gc<'_, Node>) -> u64 {
    check(&tree);
    let below = |cell: &GcCell<Node>| cell.get(mutator).map_or(0, |tree| count(mutator, tree));
    1 + below(&tree.left) + below(&tree.right)
}

fn watch(
    mutator: &Mutator,
    own: &[Root<Node>],
    watched: &mut Vec<(u64, Weak<Node>)>,
    random: &mut Random,
) {
    watched.retain(|(key, weak)| match weak.get(mutator) {
        Some(found) => {
            check(&found);
            assert_eq!(found.key, *key, "a weak pointer leads to another object");
            true
        }
        None => false,
    });
    if own.is_empty() || watched.len() > 100 {
        return;
    }
    let mut at = own[random.below(own.len() as u64) as usize].get(mutator);
    while let Some(next) = at.right.get(mutator)
        && random.below(3) != 0
    {
        at = next;
    }
    watched.push((at.key, mutator.downgrade(at)));
    mutator.set_finalizer(at, |_, dead| {
        check(&dead);
        DROPPED.fetch_add(1, Ordering::Relaxed);
    });
}

/// Swaps the two halves of a tree: old objects that get other old ones.
fn exchange(mutator: &Mutator, own: &[Root<Node>], random: &mut Random) {
    if own.is_empty() {
        return;
    }
    let tree = own[random.below(own.len() as u64) as usize].get(mutator);
    let (left, right) = (tree.left.get(mutator), tree.right.get(mutator));
    tree.left.set(mutator, right);
    tree.right.set(mutator, left);
}

struct Arguments {
    minutes: f64,
    provider: Provider,
    threads: u64,
    seed: u64,
}

fn arguments() -> Result<Arguments, String> {
    let mut result = Arguments {
        minutes: 1.0,
        provider: Provider::Auto,
        threads: 4,
        seed: 1,
    };
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        let value = words
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let bad = |error: &dyn std::fmt::Display| format!("{name} {value}: {error}");
        match name.as_str() {
            "--minutes" => result.minutes = value.parse().map_err(|error| bad(&error))?,
            "--provider" => result.provider = value.parse().map_err(|error| bad(&error))?,
            "--threads" => result.threads = value.parse().map_err(|error| bad(&error))?,
            "--seed" => result.seed = value.parse().map_err(|error| bad(&error))?,
            _ => return Err(format!("no such option: {name}")),
        }
    }
    Ok(result)
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = arguments()?;
    let heap = Heap::new(Config::new().provider(arguments.provider))?;
    let table = {
        let mutator = heap.attach()?;
        mutator.root(mutator.alloc_array::<Node>(SLOTS))
    };
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(arguments.minutes * 60.0);
    let rounds: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..arguments.threads)
            .map(|thread| {
                let (heap, table) = (&heap, &table);
                let seed = arguments.seed.wrapping_mul(1000) + thread;
                scope.spawn(move || work(heap, table, seed, end))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread panicked"))
            .sum::<Result<u64, _>>()
    })?;
    let stats = heap.stats();
    println!(
        "{:.0} s, {} threads, provider {}: {rounds} rounds, {} finalized, {} collections ({} \
         minor), pauses {:.1} ms longest and {:.1} ms on average, {} MiB live of {} MiB, {} \
         pages looked at, {} traps",
        start.elapsed().as_secs_f64(),
        arguments.threads,
        arguments.provider,
        DROPPED.load(Ordering::Relaxed),
        stats.collections,
        stats.minor_collections,
        stats.pause_longest.as_secs_f64() * 1e3,
        stats.pause_total.as_secs_f64() * 1e3 / stats.pauses.max(1) as f64,
        stats.live_bytes >> 20,
        stats.heap_bytes >> 20,
        stats.pages_scanned,
        stats.first_write_traps,
    );
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}
