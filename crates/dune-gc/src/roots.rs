//! What keeps objects alive from outside, and what is to be done with objects that nothing
//! keeps alive.

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Weak;

use crate::heap::Core;
use crate::mark::Marker;
use crate::precise::Mutator;

/// What to run for an object that is not reachable any more.
pub(crate) enum Run {
    Untyped(Box<dyn FnOnce(usize) + Send>),
    Typed(Box<dyn FnOnce(usize, &Mutator) + Send>),
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untyped(_) => "Untyped",
            Self::Typed(_) => "Typed",
        })
    }
}

/// An object, and how to drop the value in it.
pub(crate) type Droppable = (usize, unsafe fn(usize));

/// See the module documentation. Changed by threads that are in a critical section or stop by
/// themselves; looked through while the world is stopped, when nothing is allocated: each list
/// that objects are moved to then has room for all of them.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    /// Ranges whose words may be pointers: from, to.
    pub(crate) ranges: Vec<(usize, usize)>,
    /// Ranges of the program's variables, found anew before each collection.
    pub(crate) images: Vec<(usize, usize)>,
    /// Single objects, or 0.
    slots: Vec<usize>,
    free_slots: Vec<u32>,
    weak: Vec<Weak<AtomicUsize>>,
    finalizers: Vec<(usize, Run)>,
    /// Finalizers of objects that were found unreachable.
    ready: Vec<(usize, Run)>,
    droppable: Vec<Droppable>,
    /// Objects that were found unreachable, after their finalizers. Their cells are kept until
    /// they are dropped.
    dead: Vec<Droppable>,
}

impl Roots {
    /// Keeps an object.
    pub(crate) fn add_slot(&mut self, object: usize) -> u32 {
        if let Some(slot) = self.free_slots.pop()
            && let Some(place) = self.slots.get_mut(slot as usize)
        {
            *place = object;
            return slot;
        }
        self.slots.push(object);
        (self.slots.len() - 1) as u32
    }

    pub(crate) fn remove_slot(&mut self, slot: u32) {
        if let Some(place) = self.slots.get_mut(slot as usize) {
            *place = 0;
            self.free_slots.push(slot);
        }
    }

    /// Clears the word when the object in it is found unreachable.
    pub(crate) fn add_weak(&mut self, weak: Weak<AtomicUsize>) {
        self.weak.push(weak);
    }

    /// Drops the value when the object is found unreachable.
    pub(crate) fn add_drop(&mut self, object: usize, drop: unsafe fn(usize)) {
        self.droppable.push((object, drop));
        self.dead.reserve(self.droppable.len());
    }

    /// Registers a finalizer in place of an earlier one; `None` just takes that back. Returns
    /// the earlier one, to be dropped without the lock: there may be a root in it. Linear in
    /// the finalizers.
    #[must_use]
    pub(crate) fn set_finalizer(&mut self, object: usize, run: Option<Run>) -> Option<Run> {
        let earlier = self
            .finalizers
            .iter()
            .position(|(other, _)| *other == object);
        let earlier = earlier.map(|index| self.finalizers.swap_remove(index).1);
        if let Some(run) = run {
            self.finalizers.push((object, run));
            self.ready.reserve(self.finalizers.len());
        }
        earlier
    }

    /// Looks where the program's variables are now.
    pub(crate) fn find_images(&mut self) {
        self.images = crate::images::variables();
    }

    /// The next finalizer to run. The object is kept no longer by the list.
    pub(crate) fn take_ready(&mut self) -> Option<(usize, Run)> {
        self.ready.pop()
    }

    /// The values to drop now.
    pub(crate) fn take_dead(&mut self) -> Vec<Droppable> {
        let dead = core::mem::take(&mut self.dead);
        self.dead.reserve(self.droppable.len());
        dead
    }

    /// All values to drop, when the heap goes.
    pub(crate) fn take_droppable(&mut self) -> Vec<Droppable> {
        let mut all = core::mem::take(&mut self.dead);
        all.append(&mut self.droppable);
        all
    }

    /// Marks what is kept by a slot, or for something that is still to be run.
    pub(crate) fn mark(&self, marker: &mut Marker<'_>) {
        let waiting = self.ready.iter().map(|(object, _)| object);
        let dead = self.dead.iter().map(|(object, _)| object);
        for object in self.slots.iter().chain(waiting).chain(dead) {
            marker.mark_word(*object);
        }
    }

    /// After everything reachable was marked: clears weak pointers, moves finalizers and
    /// values of objects that are not marked to those that wait to be run. What a finalizer
    /// or a `Drop` will see lives until the next collection. Whether something waits.
    pub(crate) fn find_unreachable(&mut self, core: &Core, marker: &mut Marker<'_>) -> bool {
        let is_dead = |object: usize, marker: &Marker<'_>| {
            let cell = core.space.cell_of(object);
            cell.is_some_and(|cell| !marker.is_marked(cell))
        };
        self.weak.retain(|weak| {
            let Some(word) = weak.upgrade() else {
                return false;
            };
            let is_dead = is_dead(word.load(Ordering::Relaxed), marker);
            if is_dead {
                word.store(0, Ordering::Release);
            }
            !is_dead
        });
        // All are found before any is marked: of objects that lead to each other, each is
        // finalized once.
        let ready = self.ready.len();
        take_out(&mut self.finalizers, &mut self.ready, |(object, _)| {
            is_dead(*object, marker)
        });
        for (object, _) in &self.ready {
            marker.mark_word(*object);
        }
        marker.drain();
        let dead = self.dead.len();
        take_out(&mut self.droppable, &mut self.dead, |(object, _)| {
            is_dead(*object, marker)
        });
        for (object, _) in &self.dead {
            marker.mark_word(*object);
        }
        marker.drain();
        self.ready.len() > ready || self.dead.len() > dead
    }
}

/// Moves elements from one list to another, in no order, without allocating.
fn take_out<T>(from: &mut Vec<T>, to: &mut Vec<T>, mut is_wanted: impl FnMut(&T) -> bool) {
    let mut index = 0;
    while let Some(element) = from.get(index) {
        if is_wanted(element) {
            to.push(from.swap_remove(index));
        } else {
            index += 1;
        }
    }
}
