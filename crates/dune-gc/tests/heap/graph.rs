//! Random graphs of objects beside a model of them.
//!
//! A *step* changes the heap and the model alike. After each collection of everything, what the
//! roots lead to must be what the model says, object by object and pointer by pointer; weak
//! pointers, finalizers and drops must have seen exactly what is unreachable in the model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use dune_gc::{Config, Gc, GcArray, GcCell, Heap, Mutator, NoPointers, Root, Trace, Tracer, Weak};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, TestRunner};

/// Pointers of a node.
const EDGES: usize = 3;

/// What happened to an object, in the order in which it did.
#[derive(Clone, Debug, Default)]
struct Log(Arc<Mutex<Vec<(u64, Fate)>>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Finalized,
    Dropped,
}

impl Log {
    fn add(&self, id: u64, fate: Fate) {
        self.0.lock().unwrap().push((id, fate));
    }

    fn of(&self, id: u64) -> Vec<Fate> {
        let log = self.0.lock().unwrap();
        let of_it = log.iter().filter(|(other, _)| *other == id);
        of_it.map(|(_, fate)| *fate).collect()
    }
}

/// Says when it is dropped.
struct Witness {
    id: u64,
    log: Log,
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.log.add(self.id, Fate::Dropped);
    }
}

// SAFETY: a number and a list of numbers.
unsafe impl NoPointers for Witness {}
// SAFETY: as above.
unsafe impl Trace for Witness {
    const HAS_POINTERS: bool = false;
    fn trace(&self, _: &mut Tracer<'_, '_>) {}
}

#[derive(Trace)]
struct Node {
    id: u64,
    edges: [GcCell<Node>; EDGES],
    array: GcCell<GcArray<Node>>,
    witness: Option<Witness>,
}

/// One step. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A new node that is kept, and points to these; with a drop that is watched or without.
    New(Vec<usize>, bool),
    /// So many nodes that nobody keeps.
    Garbage(usize),
    /// From where this path leads, set an edge to where that path leads.
    Link(Vec<usize>, usize, Vec<usize>),
    Unlink(Vec<usize>, usize),
    /// A new array of so many pointers, of which one is set.
    Array(Vec<usize>, usize, usize, Vec<usize>),
    /// Sets one pointer of an array, if there is one.
    Store(Vec<usize>, usize, Vec<usize>),
    Forget(usize),
    Watch(Vec<usize>),
    Finalize(Vec<usize>),
    Safepoint,
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    let path = || prop::collection::vec(any::<usize>(), 1..6);
    let edge = any::<usize>;
    let length = prop::sample::select(vec![1_usize, 7, 600, 5000, 20_000]);
    prop_oneof![
        6 => (prop::collection::vec(any::<usize>(), 0..EDGES), any::<bool>())
            .prop_map(|(targets, is_watched)| Step::New(targets, is_watched)),
        3 => (1..200_usize).prop_map(Step::Garbage),
        8 => (path(), edge(), path()).prop_map(|(from, edge, to)| Step::Link(from, edge, to)),
        2 => (path(), edge()).prop_map(|(from, edge)| Step::Unlink(from, edge)),
        2 => (path(), length, edge(), path())
            .prop_map(|(from, length, index, to)| Step::Array(from, length, index, to)),
        4 => (path(), edge(), path()).prop_map(|(from, index, to)| Step::Store(from, index, to)),
        5 => any::<usize>().prop_map(Step::Forget),
        2 => path().prop_map(Step::Watch),
        2 => path().prop_map(Step::Finalize),
        4 => Just(Step::Safepoint),
        1 => Just(Step::Collect),
    ]
}

#[derive(Clone, Debug, Default)]
struct Model {
    edges: [Option<u64>; EDGES],
    array: Option<Vec<Option<u64>>>,
    is_watched: bool,
    has_finalizer: bool,
}

struct Both {
    mutator: Mutator,
    nodes: BTreeMap<u64, Model>,
    roots: Vec<(u64, Root<Node>)>,
    weak: Vec<(u64, Weak<Node>)>,
    log: Log,
    next_id: u64,
}

impl Both {
    fn new(heap: &Heap) -> Self {
        Self {
            mutator: heap.attach().unwrap(),
            nodes: BTreeMap::new(),
            roots: Vec::new(),
            weak: Vec::new(),
            log: Log::default(),
            next_id: 1,
        }
    }

    /// Where a path leads: from a root, by edges as far as they go.
    fn walk(&self, path: &[usize]) -> Option<(u64, Gc<'_, Node>)> {
        let (first, rest) = path.split_first()?;
        let (id, root) = self.roots.get(first % self.roots.len().max(1))?;
        let (mut id, mut at) = (*id, root.get(&self.mutator));
        for choice in rest {
            let edge = choice % EDGES;
            let Some(next) = at.edges[edge].get(&self.mutator) else {
                break;
            };
            id = self.nodes[&id].edges[edge].expect("the model has this edge too");
            at = next;
        }
        assert_eq!(at.id, id);
        Some((id, at))
    }

    fn node(&self, id: u64, is_watched: bool) -> Node {
        let log = self.log.clone();
        Node {
            id,
            edges: [const { GcCell::null() }; EDGES],
            array: GcCell::null(),
            witness: is_watched.then(|| Witness { id, log }),
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::New(targets, is_watched) => {
                let id = self.next_id;
                self.next_id += 1;
                let mut model = Model {
                    is_watched: *is_watched,
                    ..Model::default()
                };
                let new = self.mutator.alloc(self.node(id, *is_watched));
                for (edge, target) in targets.iter().enumerate() {
                    if let Some((target, object)) = self.walk(&[*target]) {
                        new.edges[edge].set(&self.mutator, Some(object));
                        model.edges[edge] = Some(target);
                    }
                }
                let root = self.mutator.root(new);
                self.roots.push((id, root));
                self.nodes.insert(id, model);
            }
            Step::Garbage(count) => {
                for _ in 0..*count {
                    self.mutator.alloc(self.node(0, false));
                }
            }
            Step::Link(from, edge, to) => {
                let edge = edge % EDGES;
                if let (Some((from, object)), Some((to, target))) = (self.walk(from), self.walk(to))
                {
                    object.edges[edge].set(&self.mutator, Some(target));
                    self.nodes.get_mut(&from).unwrap().edges[edge] = Some(to);
                }
            }
            Step::Unlink(from, edge) => {
                let edge = edge % EDGES;
                if let Some((from, object)) = self.walk(from) {
                    object.edges[edge].set(&self.mutator, None);
                    self.nodes.get_mut(&from).unwrap().edges[edge] = None;
                }
            }
            Step::Array(from, length, index, to) => {
                if let (Some((from, object)), Some((to, target))) = (self.walk(from), self.walk(to))
                {
                    let array = self.mutator.alloc_array(*length);
                    let index = index % length;
                    array[index].set(&self.mutator, Some(target));
                    object.array.set(&self.mutator, Some(array));
                    let mut model = vec![None; *length];
                    model[index] = Some(to);
                    self.nodes.get_mut(&from).unwrap().array = Some(model);
                }
            }
            Step::Store(from, index, to) => {
                if let (Some((from, object)), Some((to, target))) = (self.walk(from), self.walk(to))
                    && let Some(array) = object.array.get(&self.mutator)
                {
                    let index = index % array.len();
                    array[index].set(&self.mutator, Some(target));
                    let model = self.nodes.get_mut(&from).unwrap();
                    model.array.as_mut().unwrap()[index] = Some(to);
                }
            }
            Step::Forget(which) => {
                if self.roots.len() > 1 {
                    self.roots.swap_remove(which % self.roots.len());
                }
            }
            Step::Watch(path) => {
                if let Some((id, object)) = self.walk(path) {
                    let weak = self.mutator.downgrade(object);
                    self.weak.push((id, weak));
                }
            }
            Step::Finalize(path) => {
                if let Some((id, object)) = self.walk(path) {
                    let log = self.log.clone();
                    self.mutator.set_finalizer(object, move |_, dead| {
                        assert_eq!(dead.id, id, "the finalizer of another object");
                        log.add(id, Fate::Finalized);
                    });
                    self.nodes.get_mut(&id).unwrap().has_finalizer = true;
                }
            }
            Step::Safepoint => self.mutator.safepoint(),
            Step::Collect => {
                self.mutator.collect();
                self.check();
            }
        }
    }

    fn reachable(&self) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        let mut left: Vec<u64> = self.roots.iter().map(|(id, _)| *id).collect();
        while let Some(id) = left.pop() {
            if found.insert(id) {
                let model = &self.nodes[&id];
                left.extend(model.edges.iter().flatten());
                left.extend(model.array.iter().flatten().flatten());
            }
        }
        found
    }

    /// Everything that is reachable is as the model says, and nothing else is left.
    fn check(&mut self) {
        let reachable = self.reachable();
        self.check_objects(&reachable);
        for (id, weak) in &self.weak {
            match weak.get(&self.mutator) {
                Some(object) => {
                    assert_eq!(object.id, *id);
                    assert!(reachable.contains(id), "a weak pointer to a dead object");
                }
                None => assert!(!reachable.contains(id), "a weak pointer lost its object"),
            }
        }
        self.weak.retain(|(id, _)| reachable.contains(id));
        // What a finalizer has seen is dropped one collection later.
        self.mutator.collect();
        self.check_objects(&reachable);
        for (id, model) in &self.nodes {
            let expected: &[Fate] = match (reachable.contains(id), model) {
                (true, _) => &[],
                (false, model) => match (model.has_finalizer, model.is_watched) {
                    (true, true) => &[Fate::Finalized, Fate::Dropped],
                    (true, false) => &[Fate::Finalized],
                    (false, true) => &[Fate::Dropped],
                    (false, false) => &[],
                },
            };
            assert_eq!(self.log.of(*id), expected, "of object {id}");
        }
    }

    fn check_objects(&self, reachable: &BTreeSet<u64>) {
        let mutator = &self.mutator;
        let mut seen = BTreeSet::new();
        let mut left: Vec<(u64, Gc<'_, Node>)> = self
            .roots
            .iter()
            .map(|(id, root)| (*id, root.get(mutator)))
            .collect();
        while let Some((id, object)) = left.pop() {
            assert_eq!(object.id, id);
            if !seen.insert(id) {
                continue;
            }
            let model = &self.nodes[&id];
            assert_eq!(object.witness.is_some(), model.is_watched);
            let mut follow = |cell: &GcCell<Node>, expected: Option<u64>| {
                let found = cell.get(mutator);
                assert_eq!(found.map(|object| object.id), expected);
                left.extend(expected.zip(cell.get(mutator)));
            };
            for (cell, expected) in object.edges.iter().zip(model.edges) {
                follow(cell, expected);
            }
            let array = object.array.get(mutator);
            assert_eq!(
                array.map(|array| array.len()),
                model.array.as_ref().map(Vec::len)
            );
            if let (Some(array), Some(expected)) = (array, &model.array) {
                for (cell, expected) in array.iter().zip(expected) {
                    follow(cell, *expected);
                }
            }
        }
        assert_eq!(seen, *reachable);
    }
}

/// Tries `cases` random sequences of steps in heaps of this kind.
pub(crate) fn agrees_with_model(config: Config, cases: u32, steps: usize) {
    let runs = Runs {
        cases,
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Runs::default()
    };
    TestRunner::new(runs)
        .run(&prop::collection::vec(step(), 1..steps), |steps| {
            let heap = Heap::new(config).unwrap();
            let mut both = Both::new(&heap);
            for step in &steps {
                both.take(step);
            }
            both.take(&Step::Collect);
            let (log, nodes) = (both.log.clone(), both.nodes.clone());
            drop((both, heap));
            // The heap's end drops what is left.
            for (id, model) in nodes {
                let fates = log.of(id);
                let dropped = fates.iter().filter(|fate| **fate == Fate::Dropped).count();
                prop_assert_eq!(dropped, usize::from(model.is_watched));
            }
            Ok(())
        })
        .unwrap();
}
