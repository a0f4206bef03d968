//! Pointers: on the stack, and within objects.
#![expect(unsafe_code, reason = "pointers to objects")]

use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

use super::mutator::Mutator;
use super::trace::{Trace, Tracer};

/// A pointer to an object, good until its thread's next safepoint: it borrows the
/// [`Mutator`], and a safepoint needs the mutator for itself. Copied freely, and followed at
/// the cost of a pointer. To keep an object for longer, make a [`Root`](crate::Root).
///
/// ```compile_fail
/// # let heap = dune_gc::Heap::new(dune_gc::Config::new()).unwrap();
/// let mut mutator = heap.attach().unwrap();
/// let number = mutator.alloc(5_u64);
/// mutator.collect(); // not while `number` is in use
/// assert_eq!(*number, 5);
/// ```
pub struct Gc<'m, T: Trace> {
    object: NonNull<T>,
    _mutator: PhantomData<&'m Mutator>,
}

impl<'m, T: Trace> Gc<'m, T> {
    /// # Safety
    /// An object of the mutator's heap, which is kept or was looked up since its last
    /// safepoint.
    #[inline]
    pub(super) unsafe fn new(object: NonNull<T>, _: &'m Mutator) -> Self {
        Self {
            object,
            _mutator: PhantomData,
        }
    }

    #[inline]
    pub(super) fn as_ptr(self) -> NonNull<T> {
        self.object
    }

    /// A reference that is good for as long as the pointer is, not only for as long as this
    /// variable.
    #[inline]
    #[must_use]
    pub fn to_ref(self) -> &'m T {
        // SAFETY: no object is freed before the next safepoint, and nobody has a mutable
        // reference to one.
        unsafe { self.object.as_ref() }
    }

    /// Whether two pointers are to the same object.
    #[inline]
    #[must_use]
    pub fn is(self, other: Gc<'_, T>) -> bool {
        self.object == other.object
    }
}

impl<T: Trace> Clone for Gc<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Trace> Copy for Gc<'_, T> {}

impl<T: Trace> Deref for Gc<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.to_ref()
    }
}

impl<T: Trace + fmt::Debug> fmt::Debug for Gc<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// A pointer within an object, null at first. It can be changed through a shared reference and
/// by several threads: a read and a write are one instruction each and two or three
/// comparisons; there is no write barrier, because the page's dirty bit is one.
///
/// Only cells in the heap point to anything: an object is made with null cells, and they are
/// set afterwards.
///
/// ```
/// use dune_gc::{Config, GcCell, Heap, Trace};
///
/// #[derive(Trace)]
/// struct List {
///     value: u64,
///     next: GcCell<List>,
/// }
///
/// let heap = Heap::new(Config::new())?;
/// let mutator = heap.attach()?;
/// let last = mutator.alloc(List { value: 2, next: GcCell::null() });
/// let first = mutator.alloc(List { value: 1, next: GcCell::null() });
/// first.next.set(&mutator, Some(last));
/// assert_eq!(first.next.get(&mutator).unwrap().value, 2);
/// # Ok::<(), dune_gc::GcError>(())
/// ```
#[repr(transparent)]
pub struct GcCell<T: Trace> {
    target: AtomicPtr<T>,
}

impl<T: Trace> GcCell<T> {
    /// A cell without a target.
    #[must_use]
    pub const fn null() -> Self {
        Self {
            target: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// What it points to.
    ///
    /// # Panics
    /// If the cell is in another heap than the mutator's.
    #[inline]
    pub fn get<'m>(&self, mutator: &'m Mutator) -> Option<Gc<'m, T>> {
        let target = NonNull::new(self.target.load(Ordering::Acquire))?;
        mutator.check(target.as_ptr() as usize);
        // SAFETY: the cell is in the heap, otherwise it were null; what has it in reach keeps
        // its target, at least until the next safepoint.
        Some(unsafe { Gc::new(target, mutator) })
    }

    /// Changes what it points to: a few instructions, and never an exit. (With page protection
    /// the first write to a page since a collection costs a signal, with `userfaultfd` a message
    /// to a thread; with [`Provider::Dune`](crate::Provider::Dune), outside Dune mode, a look at
    /// the page tables.) Other threads that read the new pointer see the object that
    /// it points to as it was before.
    ///
    /// # Panics
    /// If the cell is not in the mutator's heap (in a variable, a `Vec`, a `Box`: the
    /// collector would not find it), or the target is not.
    #[inline]
    pub fn set(&self, mutator: &Mutator, target: Option<Gc<'_, T>>) {
        mutator.check(ptr::from_ref(self) as usize);
        let target = match target {
            Some(target) => {
                mutator.check(target.as_ptr().as_ptr() as usize);
                target.as_ptr().as_ptr()
            }
            None => ptr::null_mut(),
        };
        self.target.store(target, Ordering::Release);
        mutator.wrote(ptr::from_ref(self) as usize, size_of::<Self>());
    }
}

impl<T: Trace> Default for GcCell<T> {
    fn default() -> Self {
        Self::null()
    }
}

impl<T: Trace> fmt::Debug for GcCell<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GcCell({:p})", self.target.load(Ordering::Relaxed))
    }
}

// SAFETY: it shows its pointer; nothing else is in it.
unsafe impl<T: Trace> Trace for GcCell<T> {
    const HAS_POINTERS: bool = true;

    #[inline]
    fn trace(&self, tracer: &mut Tracer<'_, '_>) {
        let target = self.target.load(Ordering::Acquire);
        if !target.is_null() {
            tracer.0.mark_word(target as usize);
        }
    }
}
