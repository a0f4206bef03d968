//! Pointers to objects from anywhere.
#![expect(unsafe_code, reason = "pointers to objects")]

use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use super::cell::Gc;
use super::heap::Heap;
use super::mutator::Mutator;
use super::trace::Trace;
use crate::heap::Core;

/// Keeps an object from any place and any thread, in Dune mode or not; the object is read
/// through it like through an `Arc`. Making, cloning and dropping one takes a lock.
pub struct Root<T: Trace> {
    heap: Heap,
    slot: u32,
    object: NonNull<T>,
}

// SAFETY: a `T` is `Sync` and `Send`, and the table of roots has a lock.
unsafe impl<T: Trace> Send for Root<T> {}
// SAFETY: as above.
unsafe impl<T: Trace> Sync for Root<T> {}

impl<T: Trace> Root<T> {
    pub(super) fn new(heap: Heap, object: NonNull<T>) -> Self {
        let slot = heap.0.core.roots().add_slot(object.as_ptr() as usize);
        Self { heap, slot, object }
    }

    /// A pointer that can be put into objects.
    ///
    /// # Panics
    /// If the mutator is another heap's.
    #[inline]
    pub fn get<'m>(&self, mutator: &'m Mutator) -> Gc<'m, T> {
        mutator.check(self.object.as_ptr() as usize);
        // SAFETY: the root keeps it until now, and nothing is freed before the next safepoint.
        unsafe { Gc::new(self.object, mutator) }
    }
}

impl<T: Trace> Clone for Root<T> {
    fn clone(&self) -> Self {
        Self::new(self.heap.clone(), self.object)
    }
}

impl<T: Trace> Drop for Root<T> {
    fn drop(&mut self) {
        if self.heap.0.core.is_foreign() {
            return;
        }
        self.heap.0.core.roots().remove_slot(self.slot);
    }
}

impl<T: Trace> Deref for Root<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the root keeps it, and nobody has a mutable reference to an object.
        unsafe { self.object.as_ref() }
    }
}

impl<T: Trace + fmt::Debug> fmt::Debug for Root<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// A pointer that does not keep its object. It is null once a collection has found the object
/// unreachable, also if a finalizer brings the object back.
pub struct Weak<T: Trace> {
    target: Arc<AtomicUsize>,
    _target: PhantomData<fn() -> T>,
}

impl<T: Trace> Weak<T> {
    pub(super) fn new(core: &Core, object: NonNull<T>) -> Self {
        let target = Arc::new(AtomicUsize::new(object.as_ptr() as usize));
        core.roots().add_weak(Arc::downgrade(&target));
        Self {
            target,
            _target: PhantomData,
        }
    }

    /// The object, if it is still there.
    ///
    /// # Panics
    /// If the mutator is another heap's.
    #[inline]
    pub fn get<'m>(&self, mutator: &'m Mutator) -> Option<Gc<'m, T>> {
        let object = NonNull::new(self.target.load(Ordering::Acquire) as *mut T)?;
        mutator.check(object.as_ptr() as usize);
        // SAFETY: it was not found unreachable at the last collection, and the next one is at
        // a safepoint.
        Some(unsafe { Gc::new(object, mutator) })
    }
}

impl<T: Trace> Clone for Weak<T> {
    fn clone(&self) -> Self {
        Self {
            target: Arc::clone(&self.target),
            _target: PhantomData,
        }
    }
}

impl<T: Trace> fmt::Debug for Weak<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weak({:#x})", self.target.load(Ordering::Relaxed))
    }
}
