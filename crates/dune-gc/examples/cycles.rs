//! What reference counts cannot do: people who know each other, in circles, are collected when
//! nobody else knows them.
//!
//! ```text
//! cargo run -p dune-gc --example cycles
//! cargo run -p dune-gc --example cycles -- mprotect
//! ```
//!
//! With the provider `auto`, the default, it uses Dune's dirty bits where it can. In the lab:
//! `cargo build -p dune-gc --examples`, then `cargo dune lab -- target/debug/examples/cycles`.

use std::sync::atomic::{AtomicUsize, Ordering};

use dune_gc::{Config, GcArray, GcCell, Heap, Mutator, Provider, Root, Trace, Weak};

#[derive(Trace)]
struct Person {
    name: String,
    friends: GcCell<GcArray<Person>>,
}

static FAREWELLS: AtomicUsize = AtomicUsize::new(0);

/// A circle: each knows the two beside her.
fn circle(mutator: &mut Mutator, names: &[&str]) -> Root<Person> {
    // Roots, because `make` is a safepoint: mere pointers would not outlive it.
    let people: Vec<Root<Person>> = names
        .iter()
        .map(|name| {
            mutator.make(Person {
                name: (*name).to_owned(),
                friends: GcCell::null(),
            })
        })
        .collect();
    for (index, person) in people.iter().enumerate() {
        let friends = mutator.alloc_array(2);
        for (slot, step) in [1, people.len() - 1].into_iter().enumerate() {
            let friend = &people[(index + step) % people.len()];
            friends[slot].set(mutator, Some(friend.get(mutator)));
        }
        person.friends.set(mutator, Some(friends));
        mutator.set_finalizer(person.get(mutator), |_, person| {
            println!("{} is forgotten", person.name);
            FAREWELLS.fetch_add(1, Ordering::Relaxed);
        });
    }
    people[0].clone()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let provider = match std::env::args().nth(1) {
        Some(name) => name.parse()?,
        None => Provider::Auto,
    };
    let heap = Heap::new(Config::new().provider(provider))?;
    let mut mutator = heap.attach()?;

    let kept = circle(&mut mutator, &["Ada", "Grace", "Barbara"]);
    let seen: Weak<Person> = {
        let lost = circle(&mut mutator, &["Tom", "Dick", "Harry"]);
        mutator.downgrade(lost.get(&mutator))
    };
    // Threads have mutators of their own, and share objects by roots.
    let first = kept.clone();
    let second = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mutator = heap.attach()?;
            let friends = first.friends.get(&mutator);
            let friend = friends.and_then(|friends| friends[0].get(&mutator));
            Ok::<_, dune_gc::GcError>(friend.map(|friend| friend.name.clone()))
        });
        // Nobody is kept waiting meanwhile.
        mutator.blocking(|| thread.join())
    });
    let second = second.map_err(|_| "the thread panicked")??;
    println!("{} knows {}", kept.name, second.unwrap_or_default());

    mutator.collect();
    assert!(seen.get(&mutator).is_none());
    assert_eq!(FAREWELLS.load(Ordering::Relaxed), 3);
    println!("{} is still here; {:?}", kept.name, heap.stats());
    Ok(())
}
