//! The heap for programs that do not say where their pointers are: one for the process, with
//! the registers, stacks and variables of the program as roots. The C interface
//! (`include/dune_gc.h`) is these functions.
//!
//! Threads are stopped by a signal (`SIGRTMIN + 6`) wherever they are, also in system calls,
//! which Linux restarts; those that it never restarts (`poll`, `nanosleep` and their like) end
//! early with `EINTR`. A thread that blocks the signal, or handles another one on an alternate
//! stack, is waited for. With [`Provider::Dune`] a registered thread must stay in Dune mode.
//!
//! The heap goes on in a child of `fork`, with the calling thread alone.
#![expect(unsafe_code, reason = "hands out raw memory, handles a signal")]

use core::cell::{Cell, OnceCell};
use core::ffi::c_void;
use core::mem;
use core::ptr;
use core::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::block::Kind;
use crate::collect::Collector;
use crate::cycle::{self, CycleGuard, MarkerThread};
use crate::error::GcError;
use crate::heap::{Core, Parameters, fatal};
use crate::images;
use crate::layout::class_of;
use crate::provider::Provider;
use crate::roots::{Roots, Run};
use crate::space::Lists;
use crate::stats::Stats;
use crate::thread::{SAFE, Thread};

static HEAP: OnceLock<Arc<Core>> = OnceLock::new();
/// So that two threads do not both make it.
static MAKING: Mutex<()> = Mutex::new(());

/// Stands for every thread that is not registered: there is never room in its buffers.
static NOBODY: Thread = Thread::new();

thread_local! {
    /// The calling thread, for the fast path and the signal's handler.
    static CURRENT: Cell<&'static Thread> = const { Cell::new(&NOBODY) };
    /// Takes the thread out of the registry when it ends.
    static REGISTERED: OnceCell<Registration> = const { OnceCell::new() };
}

struct Registration(Arc<Thread>);

impl Drop for Registration {
    fn drop(&mut self) {
        leave(&self.0);
    }
}

/// Makes the heap of the process and registers the calling thread.
///
/// # Errors
/// [`GcError`]; the heap does not exist then, and another provider may be tried.
pub fn init(provider: Provider) -> Result<(), GcError> {
    init_with(provider, false)
}

/// As [`init`]; if `is_stressed`, collects as often as it can.
#[doc(hidden)]
pub fn init_with(provider: Provider, is_stressed: bool) -> Result<(), GcError> {
    let making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if HEAP.get().is_some() {
        return Err(GcError::AlreadyInitialised);
    }
    let signal = stop_signal();
    let parameters = Parameters {
        stop_signal: Some(signal),
        is_stressed,
        ..Parameters::default()
    };
    let core = Arc::new(Core::new(parameters, provider)?);
    install_handler(signal);
    if core.tracker.is_tracking() && cycle::is_worth_a_thread() {
        // It lives as long as the heap, which is for ever. Without it, the program marks.
        mem::forget(MarkerThread::start(&core));
    }
    let _ = HEAP.set(core);
    drop(making);
    register_thread()
}

fn stop_signal() -> i32 {
    libc::SIGRTMIN() + 6
}

/// The heap; made with [`Provider::Auto`] at the first use.
fn heap() -> &'static Core {
    if let Some(core) = HEAP.get() {
        return core;
    }
    match init(Provider::Auto) {
        Ok(()) | Err(GcError::AlreadyInitialised) => {}
        Err(error) => fatal(&error.to_string()),
    }
    match HEAP.get() {
        Some(core) => core,
        None => fatal("the heap is being made"),
    }
}

/// Registers the calling thread: its stack, registers and thread-local variables become
/// roots. Done by itself at a thread's first allocation, and undone at its end. Does nothing
/// the second time.
///
/// # Errors
/// [`GcError`].
pub fn register_thread() -> Result<(), GcError> {
    let core = heap();
    if !ptr::eq(CURRENT.get(), &NOBODY) {
        return Ok(());
    }
    core.tracker
        .admit_thread()
        .map_err(|reason| GcError::Provider {
            provider: Provider::Dune,
            reason,
        })?;
    let stack = images::stack().ok_or(GcError::UnknownStack)?;
    let tls = images::thread_variables();
    let thread = Arc::new(Thread::new());
    thread.stack[0].store(stack.0, Ordering::Relaxed);
    thread.stack[1].store(stack.1, Ordering::Relaxed);
    thread.tls[0].store(tls.0, Ordering::Relaxed);
    thread.tls[1].store(tls.1, Ordering::Relaxed);
    // SAFETY: has no conditions.
    let tid = unsafe { libc::gettid() };
    thread.tid.store(tid, Ordering::Relaxed);
    // SAFETY: `leave` takes it back before the registry's last reference goes.
    let shown: &'static Thread = unsafe { &*Arc::as_ptr(&thread) };
    // The signal may come as soon as the thread is in the list.
    thread.is_critical.store(true, Ordering::SeqCst);
    CURRENT.set(shown);
    // Kept out of the list while the world is stopped: the lock says so.
    core.world.register(&thread);
    // Without the variable (the thread is ending), only `unregister_thread` undoes it.
    let kept = REGISTERED.try_with(|cell| cell.set(Registration(Arc::clone(&thread))));
    if kept.is_err() {
        mem::forget(Arc::clone(&thread));
    }
    thread.is_critical.store(false, Ordering::SeqCst);
    core.world.poll(&thread);
    Ok(())
}

/// Takes the calling thread out of the registry: what it alone keeps alive is not any more.
pub fn unregister_thread() {
    let current = CURRENT.get();
    let Some(core) = HEAP.get().filter(|_| !ptr::eq(current, &NOBODY)) else {
        return;
    };
    if let Some(thread) = core.world.find(current) {
        leave(&thread);
    }
}

fn leave(thread: &Arc<Thread>) {
    let Some(core) = HEAP.get() else { return };
    if !ptr::eq(CURRENT.get(), Arc::as_ptr(thread)) {
        return;
    }
    core.give_back_buffers(thread);
    // It stays safe for ever: the handler returns at once, and nobody waits for it.
    core.world.enter_safe(thread, thread.stack_end());
    CURRENT.set(&NOBODY);
    core.world.unregister(thread);
}

/// Memory that any word of may be a pointer, zero, aligned to 16 bytes; null where there is no
/// more. Constant time; once in a page of them, the heap's lock or a collection.
#[inline]
pub fn malloc(bytes: usize) -> *mut c_void {
    allocate(Kind::Conservative, bytes)
}

/// As [`malloc`], for memory that never holds a pointer: it is not looked through.
#[inline]
pub fn malloc_atomic(bytes: usize) -> *mut c_void {
    allocate(Kind::Atomic, bytes)
}

#[inline]
fn allocate(kind: Kind, bytes: usize) -> *mut c_void {
    let thread = CURRENT.get();
    if let Some(class) = class_of(bytes)
        && let Some(address) = thread.buffers[kind.index()][class].take()
    {
        return address as *mut c_void;
    }
    allocate_slowly(kind, bytes)
}

/// The calling thread, registered.
fn current() -> &'static Thread {
    if ptr::eq(CURRENT.get(), &NOBODY)
        && let Err(error) = register_thread()
    {
        fatal(&error.to_string());
    }
    CURRENT.get()
}

#[cold]
#[inline(never)]
fn allocate_slowly(kind: Kind, bytes: usize) -> *mut c_void {
    let core = heap();
    let address = core.allocate(current(), kind, bytes);
    if core.has_ready.load(Ordering::Relaxed) {
        run_finalizers(core);
    }
    address.map_or(ptr::null_mut(), |address| address as *mut c_void)
}

/// Memory of another size with the same contents, as far as they fit. What is new is zero;
/// null where there is no more memory, and then the old one is as it was.
///
/// # Safety
/// `old` is null or came from this heap, and is not used afterwards.
///
/// # Panics
/// Ends the process if `old` is no object of the heap.
pub unsafe fn realloc(old: *mut c_void, bytes: usize) -> *mut c_void {
    if old.is_null() {
        return malloc(bytes);
    }
    let space = &heap().space;
    let Some(at) = space.cell_of(old as usize) else {
        fatal("realloc of memory that is not the heap's");
    };
    let kind = space.block(at.block).kind();
    let had = space.cell_bytes(at);
    if bytes <= had && bytes >= had / 2 {
        // What is given up now must be zero if it is asked for again.
        let rest = (old as *mut u8).wrapping_add(bytes);
        // SAFETY: the end of the object.
        unsafe { ptr::write_bytes(rest, 0, had - bytes) };
        return old;
    }
    let new = allocate(kind, bytes);
    if !new.is_null() {
        // SAFETY: two objects, both at least so long.
        unsafe { ptr::copy_nonoverlapping(old.cast::<u8>(), new.cast(), had.min(bytes)) };
    }
    new
}

/// Says that an object is not used any more. Nothing relies on it.
///
/// # Safety
/// `object` is null or came from this heap, and is not used afterwards.
pub unsafe fn free(object: *mut c_void) {
    let _ = object;
}

/// Finds everything that is unreachable now, and runs finalizers.
pub fn collect() {
    let core = heap();
    // Registers and stack of a thread that is not registered would not be looked at.
    core.collect_fully(current());
    run_finalizers(core);
}

/// Runs what waits, in the thread that noticed, outside of every lock.
fn run_finalizers(core: &Core) {
    if !core.has_ready.swap(false, Ordering::Acquire) {
        return;
    }
    let thread = CURRENT.get();
    while let Some((object, run)) = core.critically(thread, || core.take_ready()) {
        if let Run::Untyped(function) = run {
            function(object);
        }
    }
}

/// Adds words that may be pointers: a range that is not a variable, a stack or in the heap.
///
/// # Safety
/// The range is readable for as long as the process lives.
pub unsafe fn add_roots(start: *mut c_void, end: *mut c_void) {
    let core = heap();
    core.critically(current(), || {
        core.roots().ranges.push((start as usize, end as usize));
    });
}

/// Registers a function to be called once the object is unreachable, in place of an earlier
/// one; `None` takes that back. It runs after a collection, outside of every lock, in the
/// thread that allocates or collects next. It may make the object reachable again; the
/// finalizer is gone then.
///
/// # Safety
/// The function may be called with the object and `data` at any time, from any registered
/// thread.
pub unsafe fn register_finalizer(
    object: *mut c_void,
    function: Option<unsafe extern "C" fn(*mut c_void, *mut c_void)>,
    data: *mut c_void,
) {
    let core = heap();
    let data = data as usize;
    core.critically(current(), || {
        let run = function.map(|function| {
            // SAFETY: by the caller's word.
            Run::Untyped(Box::new(move |object| unsafe {
                function(object as *mut c_void, data as *mut c_void);
            }))
        });
        let _earlier = core.roots().set_finalizer(object as usize, run);
    });
}

/// What the heap has done so far.
#[must_use]
pub fn stats() -> Stats {
    heap().stats()
}

/// Everything that another thread may hold, from before a `fork` until after it.
struct Forking {
    _collector: MutexGuard<'static, Collector>,
    threads: MutexGuard<'static, Vec<Arc<Thread>>>,
    _roots: MutexGuard<'static, Roots>,
    _lists: MutexGuard<'static, Lists>,
    _cycle: CycleGuard<'static>,
}

thread_local! {
    static FORKING: Cell<Option<mem::ManuallyDrop<Forking>>> = const { Cell::new(None) };
}

/// Waits until nobody collects, and keeps it so.
pub(crate) fn before_fork() {
    let Some(core) = HEAP.get() else { return };
    let thread = CURRENT.get();
    let collector = if ptr::eq(thread, &NOBODY) {
        core.collector()
    } else {
        core.world.while_safe(thread, || core.collector())
    };
    // In the order in which the collector takes them.
    let forking = Forking {
        _collector: collector,
        threads: core.world.hold(),
        _roots: core.roots(),
        _lists: core.space.lists(),
        _cycle: core.cycle.hold(),
    };
    FORKING.set(Some(mem::ManuallyDrop::new(forking)));
}

pub(crate) fn after_fork(is_child: bool) {
    let (Some(core), Some(forking)) = (HEAP.get(), FORKING.take()) else {
        return;
    };
    let mut forking = mem::ManuallyDrop::into_inner(forking);
    if !is_child {
        return;
    }
    core.generation
        .store(crate::fork::generation(), Ordering::Relaxed);
    let this = CURRENT.get();
    // Of the others only the stacks are left, which nobody uses any more.
    forking.threads.retain(|thread| {
        let is_this = ptr::eq(Arc::as_ptr(thread), this);
        if !is_this {
            core.forget_buffers(thread);
        }
        is_this
    });
    for thread in forking.threads.iter() {
        // SAFETY: has no conditions.
        let tid = unsafe { libc::gettid() };
        thread.tid.store(tid, Ordering::Relaxed);
    }
    if let Err(reason) = core.tracker.after_fork(&core.space) {
        fatal(&reason);
    }
    drop(forking);
    if core.has_marker.swap(false, Ordering::Relaxed) {
        match MarkerThread::start(core) {
            Ok(marker) => mem::forget(marker),
            // The program marks. Nobody else takes back a wish of the parent's.
            Err(_) => core.cycle.done(),
        }
    }
}

fn install_handler(signal: i32) {
    // SAFETY: zero is a value of the structure.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_stop as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: a valid action; the handler does what a handler may.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
}

/// Waits until the world goes on. The interrupted registers lie above it on the stack.
extern "C" fn on_stop(_: libc::c_int) {
    let thread = CURRENT.get();
    let Some(core) = HEAP.get().filter(|_| !ptr::eq(thread, &NOBODY)) else {
        return;
    };
    if thread.is_critical.load(Ordering::SeqCst) || thread.state.load(Ordering::SeqCst) == SAFE {
        return;
    }
    let here = 0_u8;
    if !thread.is_on_stack(&raw const here as usize) {
        // In another signal's handler, on an alternate stack: what was interrupted is not known.
        // The collector asks again.
        return;
    }
    // SAFETY: the calling thread's `errno`.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    core.world.poll(thread);
    // SAFETY: as above.
    unsafe { *errno = before };
}
