//! The interface for C: any word may be a pointer.

use core::ffi::c_void;
use std::arch::asm;
use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use dune_gc::{Provider, conservative as gc};

const EDGES: usize = 4;

/// An object of the tests.
#[repr(C)]
struct Object {
    id: usize,
    seal: usize,
    edges: [*mut Object; EDGES],
}

fn seal(id: usize) -> usize {
    id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5555
}

fn new(id: usize) -> *mut Object {
    let object = gc::malloc(size_of::<Object>()).cast::<Object>();
    assert!(!object.is_null());
    // SAFETY: a new object, which is zero.
    unsafe {
        assert!((*object).id == 0 && (*object).edges.iter().all(|edge| edge.is_null()));
        (*object).id = id;
        (*object).seal = seal(id);
    }
    object
}

fn check(object: *const Object, id: usize) {
    // SAFETY: an object that something keeps, which is what is tested.
    unsafe {
        assert_eq!((*object).id, id);
        assert_eq!((*object).seal, seal(id), "object {id} was overwritten");
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }
}

/// A table of objects that point to each other at random, by addresses within them, changed for
/// a while beside a model.
pub(crate) fn random_objects_agree_with_a_model(provider: Provider) {
    const TABLE: usize = 3000;
    gc::init_with(provider, true).unwrap();
    let table = gc::malloc(TABLE * 8).cast::<usize>();
    let mut model: Vec<Option<(usize, [Option<usize>; EDGES])>> = vec![None; TABLE];
    // Where each object of the model is; hidden, so that the table alone keeps it.
    let mut random = Random(7);
    let mut next_id = 1;
    let get = |slot: usize| -> *mut Object {
        // SAFETY: within the table; an address within an object leads to its beginning.
        (unsafe { table.add(slot).read() } & !63) as *mut Object
    };
    let steps = if provider == Provider::Dune {
        30_000
    } else {
        150_000
    };
    for step in 0..steps {
        let slot = random.below(TABLE);
        match random.below(10) {
            0..4 => {
                // 64 bytes, so that the beginning can be told from an address within.
                let object = gc::malloc(64).cast::<Object>();
                // SAFETY: a new object; the slot is within the table.
                unsafe {
                    (*object).id = next_id;
                    (*object).seal = seal(next_id);
                    table.add(slot).write(object as usize + random.below(64));
                }
                model[slot] = Some((next_id, [None; EDGES]));
                next_id += 1;
            }
            4..8 => {
                let (edge, to) = (random.below(EDGES), random.below(TABLE));
                if let (Some(_), Some((target, _))) = (&model[slot], model[to]) {
                    // SAFETY: both are in the table.
                    unsafe { (*get(slot)).edges[edge] = get(to) };
                    model[slot].as_mut().unwrap().1[edge] = Some(target);
                }
            }
            8 => {
                // SAFETY: within the table.
                unsafe { table.add(slot).write(0) };
                model[slot] = None;
            }
            _ => {
                // Garbage of every size, which must be zero.
                let bytes = 1 + random.below(if step % 50 == 0 { 300_000 } else { 3000 });
                let garbage = gc::malloc(bytes).cast::<u8>();
                // SAFETY: a new object of that size.
                let all = unsafe { std::slice::from_raw_parts_mut(garbage, bytes) };
                assert!(all.iter().all(|byte| *byte == 0));
                all.fill(0xa5);
            }
        }
        if step % (steps / 10) == 0 {
            for (slot, model) in model.iter().enumerate() {
                let Some((id, edges)) = model else { continue };
                check(get(slot), *id);
                for (edge, target) in edges.iter().enumerate() {
                    if let Some(target) = target {
                        // SAFETY: in the table, so it is kept, and so is what it points to.
                        check(unsafe { (*get(slot)).edges[edge] }, *target);
                    }
                }
            }
        }
    }
    let stats = gc::stats();
    assert!(stats.collections > 100, "{stats:?}");
    std::hint::black_box(table);
}

static RAN: AtomicUsize = AtomicUsize::new(0);
static LAST: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(object: *mut c_void, data: *mut c_void) {
    check(object.cast(), data as usize);
    RAN.fetch_add(1, Ordering::SeqCst);
    LAST.store(data as usize, Ordering::SeqCst);
}

fn finalized(id: usize) -> *mut Object {
    let object = new(id);
    // SAFETY: the function looks at the object, which it is called with.
    unsafe { gc::register_finalizer(object.cast(), Some(count), id as *mut c_void) };
    object
}

/// Calls something deep in the stack, so that what it leaves there is not in the way.
#[inline(never)]
fn far_down<R>(body: impl FnOnce() -> R) -> R {
    let space = [0_u8; 16384];
    std::hint::black_box(&space);
    body()
}

extern "C" fn collect() {
    far_down(gc::collect);
}

static KEPT: AtomicPtr<Object> = AtomicPtr::new(ptr::null_mut());
thread_local! {
    static OWN: Cell<*mut Object> = const { Cell::new(ptr::null_mut()) };
}

pub(crate) fn registers_stack_variables_and_ranges_keep(provider: Provider) {
    gc::init(provider).unwrap();
    // In a register alone: it is complemented before and after.
    let hidden = far_down(|| !(finalized(1) as usize));
    let shown: usize;
    // SAFETY: a call that keeps to the calling convention.
    unsafe {
        asm!("not r12", "call {collect}", "mov rax, r12", "not r12",
            collect = sym collect, inout("r12") hidden => _, lateout("rax") shown,
            clobber_abi("C"));
    }
    check(shown as *const Object, 1);
    assert_eq!(
        RAN.load(Ordering::SeqCst),
        0,
        "what a register holds was collected"
    );

    KEPT.store(far_down(|| finalized(2)), Ordering::SeqCst);
    OWN.set(far_down(|| finalized(3)));
    // Otherwise the compiler sees that nobody ever reads it.
    OWN.with(|own| std::hint::black_box(own.as_ptr()));
    // An address within the object, on the stack alone.
    let within = [far_down(|| finalized(4)) as usize + 17];
    // SAFETY: memory that stays.
    let range = unsafe { libc::calloc(4, 8) }.cast::<usize>();
    // SAFETY: as above.
    unsafe {
        range.add(1).write(far_down(|| finalized(5)) as usize);
        gc::add_roots(range.cast(), range.add(4).cast());
    }
    // In another object, by an address within it.
    let holder = far_down(|| {
        let holder = finalized(6);
        // SAFETY: a new object.
        unsafe { (*holder).edges[3] = finalized(7).cast::<u8>().add(40).cast() };
        holder
    });
    for _ in 0..5 {
        std::hint::black_box(&within);
        collect();
    }
    std::hint::black_box((&within, holder));
    // The one in the register may be gone by now.
    let last = LAST.load(Ordering::SeqCst);
    assert_eq!(
        RAN.load(Ordering::SeqCst),
        usize::from(last == 1),
        "{last} was collected"
    );

    // What nothing points to goes: all but a few that stale words seem to point to.
    let before = RAN.load(Ordering::SeqCst);
    far_down(|| {
        for id in 100..1100 {
            finalized(id);
        }
    });
    for _ in 0..3 {
        collect();
    }
    let gone = RAN.load(Ordering::SeqCst) - before;
    assert!(
        gone > 900,
        "of 1000 objects that nothing points to, {gone} were collected"
    );
    // Memory that never holds pointers is not looked through.
    let before = RAN.load(Ordering::SeqCst);
    let atomic = gc::malloc_atomic(8 * 1000).cast::<usize>();
    far_down(|| {
        for n in 0..1000 {
            // SAFETY: within the object.
            unsafe { atomic.add(n).write(finalized(2000 + n) as usize) };
        }
    });
    for _ in 0..3 {
        collect();
    }
    let gone = RAN.load(Ordering::SeqCst) - before;
    assert!(
        gone > 900,
        "memory without pointers kept {} objects",
        1000 - gone
    );
    std::hint::black_box(atomic);
}

pub(crate) fn threads_in_system_calls_stop_and_go_on(provider: Provider) {
    gc::init(provider).unwrap();
    let mut writers = Vec::new();
    let mut threads = Vec::new();
    let (says, hears) = mpsc::channel();
    for n in 1..=3 {
        let (mut reader, writer) = std::io::pipe().unwrap();
        writers.push(writer);
        let says = says.clone();
        threads.push(std::thread::spawn(move || {
            let own = new(n);
            // SAFETY: the thread's own object.
            unsafe { (*own).edges[0] = new(n * 10) };
            says.send(()).unwrap();
            let mut byte = [0];
            // Linux makes the call again after the signal.
            // SAFETY: one byte of this thread.
            let read = reader.read(&mut byte);
            assert_eq!(read.unwrap(), 1);
            check(own, n);
            // SAFETY: it is kept by `own`.
            check(unsafe { (*own).edges[0] }, n * 10);
        }));
        hears.recv().unwrap();
    }
    // Long enough for all of them to be in `read`.
    std::thread::sleep(Duration::from_millis(50));
    for _ in 0..20 {
        for _ in 0..2000 {
            new(usize::MAX);
        }
        gc::collect();
    }
    for mut writer in writers {
        writer.write_all(&[1]).unwrap();
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

extern "C" fn bring_back(object: *mut c_void, _: *mut c_void) {
    RAN.fetch_add(1, Ordering::SeqCst);
    KEPT.store(object.cast(), Ordering::SeqCst);
}

pub(crate) fn finalizers_run_once_and_may_bring_back(provider: Provider) {
    gc::init(provider).unwrap();
    far_down(|| {
        for id in 1..200 {
            let object = new(id);
            // SAFETY: a new object.
            unsafe {
                (*object).edges[1] = new(id * 1000);
                gc::register_finalizer(object.cast(), Some(bring_back), ptr::null_mut());
            }
        }
        // Taken back.
        let object = finalized(500);
        // SAFETY: as above.
        unsafe { gc::register_finalizer(object.cast(), None, ptr::null_mut()) };
    });
    for _ in 0..4 {
        collect();
    }
    let ran = RAN.load(Ordering::SeqCst);
    assert!((150..200).contains(&ran), "{ran} of 199 finalizers ran");
    assert_eq!(
        LAST.load(Ordering::SeqCst),
        0,
        "a finalizer ran that was taken back"
    );
    let back = KEPT.load(Ordering::SeqCst);
    // SAFETY: the variable keeps it since its finalizer ran.
    unsafe {
        let id = (*back).id;
        check(back, id);
        check((*back).edges[1], id * 1000);
    }
}

/// Fills a list with numbers and checks it, often enough for some collections.
fn use_the_heap(rounds: usize) {
    let first = new(1);
    let mut old = first;
    for n in 2..1000 {
        let next = new(n);
        // SAFETY: both are of this list.
        unsafe { (*old).edges[0] = next };
        old = next;
    }
    for round in 0..rounds {
        let mut at = first;
        for n in 1..1000 {
            check(at, n);
            // Old objects get young ones.
            let young = new(n + round);
            // SAFETY: of this list, which `first` keeps.
            unsafe {
                (*at).edges[1] = young;
                new(usize::MAX);
                check((*at).edges[1], n + round);
                at = (*at).edges[0];
            }
        }
        assert!(at.is_null());
    }
    std::hint::black_box(first);
}

pub(crate) fn the_heap_goes_on_after_fork(provider: Provider) {
    /// Also where a check fails: the others would go on for ever.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    gc::init(provider).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&is_over);
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    use_the_heap(2);
                }
            });
        }
        let kept = new(77);
        for _ in 0..3 {
            // SAFETY: the child uses the heap, which allows it, and ends by `_exit`.
            let child = unsafe { libc::fork() };
            assert!(child >= 0);
            if child == 0 {
                check(kept, 77);
                let before = gc::stats();
                let is_alive = (0..100).any(|_| {
                    use_the_heap(10);
                    let after = gc::stats();
                    after.collections > before.collections
                        && (provider == Provider::None
                            || after.minor_collections > before.minor_collections)
                });
                gc::collect();
                check(kept, 77);
                // SAFETY: has no conditions.
                unsafe { libc::_exit(if is_alive { 3 } else { 4 }) };
            }
            let mut status = 0;
            use_the_heap(5);
            // SAFETY: a child of this process. The collector's signal makes it end early.
            while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {}
            assert!(libc::WIFEXITED(status), "the child ended with {status:#x}");
            assert_eq!(libc::WEXITSTATUS(status), 3);
            check(kept, 77);
        }
    });
}

static IN_HANDLER: AtomicBool = AtomicBool::new(false);
static MAY_RETURN: AtomicBool = AtomicBool::new(false);

extern "C" fn linger(_: libc::c_int) {
    IN_HANDLER.store(true, Ordering::SeqCst);
    while !MAY_RETURN.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
}

/// A thread in a handler on an alternate stack cannot be stopped: its own stack is not looked
/// at from there. So the collection waits for the handler's end, and nothing is lost.
pub(crate) fn a_thread_on_an_alternate_stack_is_waited_for(provider: Provider) {
    gc::init(provider).unwrap();
    // SAFETY: a valid action, whose handler touches two variables.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = linger as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
        assert_eq!(
            libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()),
            0
        );
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // Rust gives its threads an alternate stack, too small for what the kernel saves
            // under some CPUs: one of its own.
            let mut stack = vec![0_u8; 256 << 10];
            let alternate = libc::stack_t {
                ss_sp: stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: stack.len(),
            };
            // SAFETY: memory that outlives its use.
            let result = unsafe { libc::sigaltstack(&raw const alternate, ptr::null_mut()) };
            assert_eq!(result, 0);
            let own = new(5);
            // SAFETY: this thread's own object.
            unsafe { (*own).edges[2] = new(50) };
            // SAFETY: a signal with a handler, to this thread.
            unsafe { libc::raise(libc::SIGUSR1) };
            check(own, 5);
            // SAFETY: `own` keeps it.
            check(unsafe { (*own).edges[2] }, 50);
            let none = libc::stack_t {
                ss_flags: libc::SS_DISABLE,
                ..alternate
            };
            // SAFETY: the memory is not in use any more.
            unsafe { libc::sigaltstack(&raw const none, ptr::null_mut()) };
        });
        let end = crate::objects::patience();
        while !IN_HANDLER.load(Ordering::SeqCst) {
            assert!(std::time::Instant::now() < end);
            std::thread::yield_now();
        }
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            MAY_RETURN.store(true, Ordering::SeqCst);
        });
        for _ in 0..3 {
            gc::collect();
            for _ in 0..5000 {
                new(usize::MAX);
            }
        }
        assert!(
            MAY_RETURN.load(Ordering::SeqCst),
            "the world was stopped without the thread"
        );
        thread.join().unwrap();
    });
}

pub(crate) fn a_full_heap_is_a_null_pointer() {
    // Fewer addresses than a heap likes to have.
    let limit = libc::rlimit {
        rlim_cur: 1 << 30,
        rlim_max: 1 << 30,
    };
    // SAFETY: of this process alone.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
    assert_eq!(result, 0);
    gc::init(Provider::None).unwrap();
    let table = gc::malloc(8 * 4096).cast::<*mut c_void>();
    let mut count = 0;
    loop {
        let object = gc::malloc_atomic(1 << 20);
        if object.is_null() {
            break;
        }
        // SAFETY: within the table.
        unsafe { table.add(count).write(object) };
        count += 1;
        assert!(count < 2048, "there is more than the limit allows");
    }
    assert!(count > 50, "only {count} MiB");
    assert!(gc::malloc(usize::MAX).is_null());
    // Small ones have room still, and what is given up is found.
    // SAFETY: all of the table.
    unsafe { ptr::write_bytes(table, 0, 4096) };
    for _ in 0..count * 2 {
        assert!(!gc::malloc_atomic(1 << 20).is_null());
    }
    check(new(3), 3);
}
