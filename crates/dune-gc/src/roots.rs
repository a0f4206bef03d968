//! What keeps objects alive from outside, and what is to be done with objects that nothing
//! keeps alive.

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::collections::HashMap;
use std::sync::Weak;

use crate::heap::Core;
use crate::mark::Marker;
use crate::precise::Mutator;

/// What to run for an object that is not reachable any more.
pub(crate) enum Run {
    Untyped(Box<dyn FnOnce(usize) + Send>),
    Typed(Box<TypedRun>),
}

type TypedRun = dyn FnOnce(usize, &Mutator) + Send;

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
    /// Ranges of the program's variables, found anew before each stop of the world.
    pub(crate) images: Vec<(usize, usize)>,
    /// Single objects, or 0.
    slots: Vec<usize>,
    free_slots: Vec<u32>,
    weak: Aging<Weak<AtomicUsize>>,
    /// Of young objects, and of old ones, by the object.
    finalizers: [HashMap<usize, Run>; 2],
    /// Finalizers of objects that were found unreachable.
    ready: Vec<(usize, Run)>,
    droppable: Aging<Droppable>,
    /// Objects that were found unreachable, after their finalizers. Their cells are kept until
    /// they are dropped, and not looked through: nobody will follow a pointer in them.
    dead: Vec<Droppable>,
    /// Those of them that were dropped since the last collection.
    dropped: Vec<usize>,
}

/// A list of things to be done with objects, of which a minor collection looks only at those
/// that were added since the last collection: all others are of old objects.
#[derive(Debug)]
struct Aging<T> {
    all: Vec<T>,
    /// So many at the beginning are old.
    old: usize,
}

impl<T> Default for Aging<T> {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            old: 0,
        }
    }
}

impl<T> Aging<T> {
    /// Calls `take` with the elements that `is_wanted` chooses and takes them out; the others
    /// are old afterwards. Allocates nothing.
    fn sift(&mut self, only_young: bool, is_wanted: impl Fn(&T) -> bool, mut take: impl FnMut(T)) {
        let mut index = if only_young { self.old } else { 0 };
        while let Some(element) = self.all.get(index) {
            if is_wanted(element) {
                take(self.all.swap_remove(index));
            } else {
                index += 1;
            }
        }
        self.old = self.all.len();
    }
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
        self.weak.all.push(weak);
    }

    /// Drops the value when the object is found unreachable.
    pub(crate) fn add_drop(&mut self, object: usize, drop: unsafe fn(usize)) {
        self.droppable.all.push((object, drop));
        self.dead.reserve(self.droppable.all.len());
    }

    /// Registers a finalizer in place of an earlier one; `None` just takes that back. Returns
    /// the earlier one, to be dropped without the lock: there may be a root in it.
    #[must_use]
    pub(crate) fn set_finalizer(&mut self, object: usize, run: Option<Run>) -> Option<Run> {
        let [young, old] = &mut self.finalizers;
        let earlier = young.remove(&object).or_else(|| old.remove(&object));
        if let Some(run) = run {
            young.insert(object, run);
            old.reserve(young.len());
            self.ready.reserve(young.len() + old.len());
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

    /// The next value to drop; and the one before was. Its cell is kept no longer by the list,
    /// but marked still.
    pub(crate) fn take_dead(&mut self, dropped: Option<usize>) -> Option<Droppable> {
        self.dropped.extend(dropped);
        self.dead.pop()
    }

    /// Objects whose values are gone, and that nobody can reach.
    pub(crate) fn take_dropped(&mut self) -> Vec<usize> {
        core::mem::take(&mut self.dropped)
    }

    /// Whether finalizers or values wait.
    pub(crate) fn is_something_ready(&self) -> bool {
        !self.ready.is_empty() || !self.dead.is_empty()
    }

    /// The heap goes: all weak pointers are null (other objects may get these addresses), and
    /// these values are to be dropped.
    pub(crate) fn close(&mut self) -> Vec<Droppable> {
        for word in self.weak.all.drain(..).filter_map(|weak| weak.upgrade()) {
            word.store(0, Ordering::Release);
        }
        let mut all = core::mem::take(&mut self.dead);
        all.append(&mut self.droppable.all);
        self.droppable.old = 0;
        all
    }

    /// Marks what is kept by a slot, or for something that is still to be run.
    pub(crate) fn mark(&self, marker: &mut Marker<'_>) {
        let waiting = self.ready.iter().map(|(object, _)| object);
        for object in self.slots.iter().chain(waiting) {
            marker.mark_word(*object);
        }
        for (object, _) in &self.dead {
            marker.keep(*object);
        }
    }

    /// After everything reachable was marked: clears weak pointers, moves finalizers and
    /// values of objects that are not marked to those that wait to be run. What a finalizer
    /// will see lives until the next collection; of what is to be dropped, the cell alone.
    /// After a minor collection (`only_young`) old objects are not looked at. Whether
    /// something waits.
    pub(crate) fn find_unreachable(
        &mut self,
        core: &Core,
        marker: &mut Marker<'_>,
        only_young: bool,
    ) -> bool {
        let is_dead = |object: usize, marker: &Marker<'_>| {
            let cell = core.space.cell_of(object);
            cell.is_some_and(|cell| !marker.is_marked(cell))
        };
        self.weak.sift(
            only_young,
            |weak| {
                // Also one that nobody has any more.
                weak.upgrade()
                    .is_none_or(|word| is_dead(word.load(Ordering::Relaxed), marker))
            },
            |weak| {
                if let Some(word) = weak.upgrade() {
                    word.store(0, Ordering::Release);
                }
            },
        );
        // All are found before any is marked: of objects that lead to each other, each is
        // finalized once.
        let [young, old] = &mut self.finalizers;
        self.ready
            .extend(young.extract_if(|object, _| is_dead(*object, marker)));
        if !only_young {
            self.ready
                .extend(old.extract_if(|object, _| is_dead(*object, marker)));
        }
        old.extend(young.drain());
        for (object, _) in &self.ready {
            marker.mark_word(*object);
        }
        marker.drain();
        self.droppable.sift(
            only_young,
            |(object, _)| is_dead(*object, marker),
            |droppable| self.dead.push(droppable),
        );
        for (object, _) in &self.dead {
            core.forget_description(*object);
            marker.keep(*object);
        }
        self.is_something_ready()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_survived_one_look_is_passed_over_by_the_next_at_young_ones() {
        let mut list = Aging::default();
        list.all.extend([1, 2, 3, 4]);
        let mut taken = Vec::new();
        list.sift(true, |n| n % 2 == 0, |n| taken.push(n));
        list.all.extend([5, 6]);
        list.sift(true, |_| true, |n| taken.push(n));
        taken.sort_unstable();
        assert_eq!(taken, [2, 4, 5, 6]);
        list.sift(false, |_| true, |n| taken.push(n));
        taken.sort_unstable();
        assert_eq!(taken, [1, 2, 3, 4, 5, 6]);
    }
}
