//! A thread's way to the heap.
#![expect(unsafe_code, reason = "makes objects of raw memory")]

use core::cell::RefCell;
use core::marker::PhantomData;
use core::sync::atomic::Ordering;
use std::sync::Arc;

use super::cell::Gc;
use super::heap::Heap;
use super::object::{self, GcArray};
use super::root::{Root, Weak};
use super::trace::Trace;
use crate::block::Kind;
use crate::error::GcError;
use crate::heap::{Core, fatal};
use crate::roots::Run;
use crate::thread::Thread;

thread_local! {
    /// The heaps that this thread is registered with.
    static ATTACHED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A registered thread. It stops for collections only in [`safepoint`](Self::safepoint),
/// [`make`](Self::make), [`collect`](Self::collect) and [`blocking`](Self::blocking), which
/// need it for themselves; so pointers that borrow it are good between them. A thread that
/// computes for long without any keeps all others waiting: they wait from the next collection
/// on, and after ten seconds the collector says for whom. A mutator that is leaked
/// (`mem::forget`) lets no collection happen any more.
///
/// Only allocation's slow path, collections and [`Heap::attach`] ever leave the guest in Dune
/// mode.
#[derive(Debug)]
pub struct Mutator {
    heap: Heap,
    thread: Arc<Thread>,
    /// The heap's addresses.
    start: usize,
    bytes: usize,
    /// Writes may have to be noted.
    wants_notes: bool,
    _not_send: PhantomData<*const ()>,
}

impl Mutator {
    pub(super) fn new(heap: Heap) -> Result<Self, GcError> {
        let core = &heap.0.core;
        let id = Arc::as_ptr(core) as usize;
        if ATTACHED.with_borrow(|attached| attached.contains(&id)) {
            return Err(GcError::AlreadyAttached);
        }
        core.tracker
            .admit_thread()
            .map_err(|reason| GcError::Provider {
                provider: crate::Provider::Dune,
                reason,
            })?;
        let thread = Arc::new(Thread::new());
        #[cfg(miri)]
        let tid = 0;
        #[cfg(not(miri))]
        // SAFETY: has no conditions.
        let tid = unsafe { libc::gettid() };
        thread.tid.store(tid, Ordering::Relaxed);
        core.world.register(&thread);
        ATTACHED.with_borrow_mut(|attached| attached.push(id));
        let (start, bytes) = (core.space.start(), core.space.capacity());
        let wants_notes = core.tracker.wants_notes();
        Ok(Self {
            heap,
            thread,
            start,
            bytes,
            wants_notes,
            _not_send: PhantomData,
        })
    }

    /// The heap.
    #[must_use]
    pub fn heap(&self) -> &Heap {
        &self.heap
    }

    fn core(&self) -> &Core {
        &self.heap.0.core
    }

    /// # Panics
    /// If the address is not in this heap.
    #[inline]
    pub(super) fn check(&self, address: usize) {
        if address.wrapping_sub(self.start) >= self.bytes {
            not_in_heap();
        }
    }

    /// Pointers were written.
    #[inline]
    pub(super) fn wrote(&self, address: usize, bytes: usize) {
        if self.wants_notes {
            self.core().tracker.note_written(address, bytes);
        }
    }

    /// Makes an object. Never collects: pointers that were taken before stay good. So call
    /// [`safepoint`](Self::safepoint) once in a while, or use [`make`](Self::make). Some 20
    /// instructions, and once in a page more; for a type that needs `Drop`, a lock more.
    ///
    /// Ends the process, with a message, where the heap is full, as `Box::new` does:
    /// [`try_alloc`](Self::try_alloc) does not.
    #[inline]
    pub fn alloc<T: Trace>(&self, value: T) -> Gc<'_, T> {
        self.try_alloc(value).unwrap_or_else(|error| full(&error))
    }

    /// As [`alloc`](Self::alloc); where the heap is full, it says so.
    ///
    /// # Errors
    /// [`GcError::Exhausted`]; the value is dropped.
    #[inline]
    pub fn try_alloc<T: Trace>(&self, value: T) -> Result<Gc<'_, T>, GcError> {
        let cell = self.cell_for::<T>()?;
        // SAFETY: a fresh cell for the type.
        Ok(unsafe { self.fill(cell, value) })
    }

    #[inline]
    fn cell_for<T: Trace>(&self) -> Result<usize, GcError> {
        let bytes = size_of::<T>() + object::offset_of_value::<T>();
        self.raw(object::kind_of::<T>(), bytes)
    }

    /// # Safety
    /// The cell is from [`cell_for`](Self::cell_for), for this type, and was not filled yet.
    #[inline]
    unsafe fn fill<T: Trace>(&self, cell: usize, value: T) -> Gc<'_, T> {
        // SAFETY: a fresh cell of that kind and size.
        let object = unsafe { object::place(cell, value) };
        self.wrote(cell, size_of::<T>() + object::offset_of_value::<T>());
        if core::mem::needs_drop::<T>() {
            let drop: unsafe fn(usize) = drop_at::<T>;
            self.core().roots().add_drop(object.as_ptr() as usize, drop);
        }
        // SAFETY: just made.
        unsafe { Gc::new(object, self) }
    }

    /// Makes an array of null cells. As [`alloc`](Self::alloc); linear in its length.
    ///
    /// ```
    /// # use dune_gc::{Config, Heap};
    /// # let heap = Heap::new(Config::new())?;
    /// # let mutator = heap.attach()?;
    /// let array = mutator.alloc_array::<u64>(3);
    /// array[1].set(&mutator, Some(mutator.alloc(7)));
    /// assert!(array[0].get(&mutator).is_none());
    /// assert_eq!(*array[1].get(&mutator).unwrap(), 7);
    /// # Ok::<(), dune_gc::GcError>(())
    /// ```
    pub fn alloc_array<T: Trace>(&self, len: usize) -> Gc<'_, GcArray<T>> {
        self.try_alloc_array(len)
            .unwrap_or_else(|error| full(&error))
    }

    /// As [`alloc_array`](Self::alloc_array); where the heap is full, it says so.
    ///
    /// # Errors
    /// [`GcError::Exhausted`].
    pub fn try_alloc_array<T: Trace>(&self, len: usize) -> Result<Gc<'_, GcArray<T>>, GcError> {
        let bytes = object::array_bytes(len).unwrap_or(usize::MAX);
        let cell = self.raw(Kind::Typed, bytes)?;
        // SAFETY: a fresh cell of that size.
        let array = unsafe { object::place_array(cell, len) };
        // SAFETY: just made.
        Ok(unsafe { Gc::new(array, self) })
    }

    #[inline]
    fn raw(&self, kind: Kind, bytes: usize) -> Result<usize, GcError> {
        self.core()
            .allocate_beside(&self.thread, kind, bytes.max(1))
            .ok_or_else(|| self.exhausted(bytes))
    }

    #[cold]
    fn exhausted(&self, bytes: usize) -> GcError {
        GcError::Exhausted {
            bytes,
            capacity: self.bytes,
        }
    }

    /// A safepoint, then [`alloc`](Self::alloc), then [`root`](Self::root). Where the heap is
    /// full, everything unreachable is found first.
    ///
    /// Ends the process where it is full even then: [`try_make`](Self::try_make) does not.
    pub fn make<T: Trace>(&mut self, value: T) -> Root<T> {
        self.try_make(value).unwrap_or_else(|error| full(&error))
    }

    /// As [`make`](Self::make); where the heap is full, it says so.
    ///
    /// # Errors
    /// [`GcError::Exhausted`]; the value is dropped.
    pub fn try_make<T: Trace>(&mut self, value: T) -> Result<Root<T>, GcError> {
        self.safepoint();
        let cell = match self.cell_for::<T>() {
            Ok(cell) => cell,
            Err(_) => {
                self.collect();
                self.cell_for::<T>()?
            }
        };
        // SAFETY: a fresh cell for the type.
        Ok(self.root(unsafe { self.fill(cell, value) }))
    }

    /// Stops for a collection that another thread wants, or collects if one is due. Two loads
    /// otherwise.
    ///
    /// Finalizers that are ready run in here.
    #[inline]
    pub fn safepoint(&mut self) {
        let core = self.core();
        if core.world.is_stop_asked_for()
            || core.is_collection_due()
            || core.has_ready.load(Ordering::Relaxed)
        {
            self.stop();
        }
    }

    #[cold]
    fn stop(&mut self) {
        let core = self.core();
        core.check_process();
        core.world.poll(&self.thread);
        if core.is_collection_due() {
            core.collect_when_due(&self.thread);
        }
        self.run_finalizers();
    }

    /// Finds everything that is unreachable now, with the world stopped, and runs finalizers.
    /// Linear in the live objects.
    pub fn collect(&mut self) {
        self.core().collect_fully(&self.thread);
        self.run_finalizers();
    }

    /// Runs something that may wait (for a lock, a descriptor, another thread); others may
    /// collect meanwhile.
    pub fn blocking<R>(&mut self, body: impl FnOnce() -> R) -> R {
        /// Also when `body` panics.
        struct Leave<'a>(&'a Mutator);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.core().check_process();
                self.0.core().world.leave_safe(&self.0.thread);
            }
        }
        self.core().world.enter_safe(&self.thread, 0);
        let _leave = Leave(self);
        body()
    }

    /// Keeps an object, whatever happens, until the root is dropped. One lock.
    #[must_use = "a root that is dropped keeps nothing"]
    pub fn root<T: Trace>(&self, object: Gc<'_, T>) -> Root<T> {
        self.check(object.as_ptr().as_ptr() as usize);
        Root::new(self.heap.clone(), object.as_ptr())
    }

    /// A pointer that does not keep the object. One lock and an allocation.
    pub fn downgrade<T: Trace>(&self, object: Gc<'_, T>) -> Weak<T> {
        self.check(object.as_ptr().as_ptr() as usize);
        Weak::new(self.core(), object.as_ptr())
    }

    /// Runs a function once the object is unreachable, in place of an earlier one: after a
    /// collection, outside of every lock, in the thread that comes to a safepoint next. One
    /// lock and an allocation.
    ///
    /// *Order.* All objects that a collection finds unreachable are finalized, in no order, also
    /// where they lead to each other: the function sees each of them whole, but the other's
    /// finalizer may have run before.
    ///
    /// *Resurrection.* The function may make the object reachable again, by a root or from
    /// another object; its finalizer is used up then, and another may be set. Weak pointers to
    /// it are null from the moment it was found unreachable, and stay so.
    ///
    /// *`Drop`.* The value is dropped after that, once the object is found unreachable again:
    /// a drop is always the last thing that happens to an object.
    ///
    /// *Panics.* A panic in the function, or in a `Drop`, goes through the
    /// [`safepoint`](Self::safepoint) that ran it; what else waits runs at the next one.
    ///
    /// *The end.* What still waits when the heap goes is not run; values are dropped.
    pub fn set_finalizer<T: Trace>(
        &self,
        object: Gc<'_, T>,
        function: impl for<'m> FnOnce(&'m Mutator, Gc<'m, T>) + Send + 'static,
    ) {
        self.check(object.as_ptr().as_ptr() as usize);
        let address = object.as_ptr().as_ptr() as usize;
        let run = Run::Typed(Box::new(move |address, mutator| {
            let Some(object) = core::ptr::NonNull::new(address as *mut T) else {
                return;
            };
            // SAFETY: the collection that found it unreachable has kept it, and this thread
            // has not come to a safepoint since it was taken from the list.
            function(mutator, unsafe { Gc::new(object, mutator) });
        }));
        let earlier = self.core().roots().set_finalizer(address, Some(run));
        drop(earlier);
    }

    fn run_finalizers(&self) {
        /// What a panic leaves waits for the next safepoint.
        struct Rest<'a>(&'a Core);
        impl Drop for Rest<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.has_ready.store(true, Ordering::Release);
                }
            }
        }
        let core = self.core();
        if !core.has_ready.swap(false, Ordering::Acquire) {
            return;
        }
        let _rest = Rest(core);
        // The guard is a temporary that must be gone before the function runs.
        while let Some((object, run)) = core.take_ready() {
            match run {
                Run::Typed(function) => function(object, self),
                Run::Untyped(function) => function(object),
            }
        }
        let mut dropped = None;
        while let Some((object, drop)) = core.take_dead(dropped) {
            // SAFETY: found unreachable, and taken from the list, once.
            unsafe { drop(object) };
            dropped = Some(object);
        }
    }
}

impl Drop for Mutator {
    fn drop(&mut self) {
        let core = &self.heap.0.core;
        let id = Arc::as_ptr(core) as usize;
        if !core.is_foreign() {
            core.give_back_buffers(&self.thread);
            core.world.enter_safe(&self.thread, 0);
            core.world.unregister(&self.thread);
        }
        // At the end of a thread the list may be gone already.
        let _ = ATTACHED.try_with(|attached| {
            attached.borrow_mut().retain(|other| *other != id);
        });
    }
}

/// Drops a value in place.
///
/// # Safety
/// A `T`, which nobody uses any more.
unsafe fn drop_at<T>(object: usize) {
    // SAFETY: as the caller says.
    unsafe { core::ptr::drop_in_place(object as *mut T) };
}

#[cold]
#[inline(never)]
fn not_in_heap() -> ! {
    panic!(
        "a pointer or a GcCell is not in this mutator's heap: cells can be set only within \
         objects, and an object can lead only to others of the same heap"
    )
}

#[cold]
#[inline(never)]
fn full(error: &GcError) -> ! {
    fatal(&error.to_string())
}
