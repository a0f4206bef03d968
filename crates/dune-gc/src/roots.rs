//! What keeps objects alive from outside: memory ranges, and what is to be done with objects
//! that nothing keeps alive.

use crate::heap::Core;
use crate::mark::Marker;
use crate::space::Cell;

/// A function to run for an object that is not reachable any more.
pub(crate) type Finalize = Box<dyn FnOnce(usize) + Send>;

/// A registered finalizer.
pub(crate) struct Finalizer {
    pub(crate) object: usize,
    pub(crate) run: Finalize,
}

impl core::fmt::Debug for Finalizer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Finalizer({:#x})", self.object)
    }
}

/// See the module documentation. Changed by threads that are in a critical section; read while
/// the world is stopped, when nothing may be allocated.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    /// Ranges whose words may be pointers: from, to.
    pub(crate) ranges: Vec<(usize, usize)>,
    /// Ranges of the program's variables, found anew before each collection.
    pub(crate) images: Vec<(usize, usize)>,
    finalizers: Vec<Finalizer>,
    /// Finalizers of objects that were found unreachable. Has room for all the others.
    ready: Vec<Finalizer>,
}

impl Roots {
    /// Registers a finalizer; `None` takes those of the object back.
    pub(crate) fn set_finalizer(&mut self, object: usize, run: Option<Finalize>) {
        self.finalizers.retain(|other| other.object != object);
        if let Some(run) = run {
            self.finalizers.push(Finalizer { object, run });
            self.ready.reserve(self.finalizers.len());
        }
    }

    /// Looks where the program's variables are now.
    pub(crate) fn find_images(&mut self) {
        self.images = crate::images::variables();
    }

    pub(crate) fn take_ready(&mut self) -> Vec<Finalizer> {
        let ready = core::mem::take(&mut self.ready);
        self.ready.reserve(self.finalizers.len());
        ready
    }

    /// Moves finalizers of objects that are not marked to the ready ones. The objects, and
    /// what they lead to, live until the next collection. Whether there are any.
    pub(crate) fn find_ready(&mut self, core: &Core, marker: &mut Marker<'_>) -> bool {
        let is_dead = |address: usize, marker: &Marker<'_>| {
            let cell: Option<Cell> = core.space.cell_of(address);
            cell.is_some_and(|cell| !marker.is_marked(cell))
        };
        let first = self.ready.len();
        let mut index = 0;
        while let Some(finalizer) = self.finalizers.get(index) {
            if is_dead(finalizer.object, marker) {
                let dead = self.finalizers.swap_remove(index);
                self.ready.push(dead);
            } else {
                index += 1;
            }
        }
        // All are found before any is marked: of objects that lead to each other, each is
        // finalized once.
        for finalizer in self.ready.get(..).unwrap_or_default() {
            marker.mark_word(finalizer.object);
        }
        marker.drain();
        self.ready.len() > first
    }
}
