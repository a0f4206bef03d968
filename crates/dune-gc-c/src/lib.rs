//! The C interface of `dune-gc`; see `include/dune_gc.h` there.
#![expect(unsafe_code, reason = "a C interface")]

use core::ffi::{CStr, c_char, c_int, c_void};
use core::ptr;

use gc::conservative;
use gc::{GcError, Provider};

/// `struct dune_gc_stats`.
#[derive(Debug)]
#[repr(C)]
#[allow(non_camel_case_types, reason = "the name in C")]
pub struct dune_gc_stats {
    collections: u64,
    minor_collections: u64,
    pauses: u64,
    pause_total_ns: u64,
    pause_longest_ns: u64,
    heap_bytes: u64,
    live_bytes: u64,
    pages_scanned: u64,
    first_write_traps: u64,
}

const _: () = assert!(size_of::<dune_gc_stats>() == 9 * 8);

#[unsafe(no_mangle)]
extern "C" fn dune_gc_init(provider: *const c_char) -> c_int {
    let name = if provider.is_null() {
        c"auto"
    } else {
        // SAFETY: a string, as the header says.
        unsafe { CStr::from_ptr(provider) }
    };
    let Ok(provider) = name.to_str().unwrap_or_default().parse::<Provider>() else {
        return libc::EINVAL;
    };
    match conservative::init(provider) {
        Ok(()) => 0,
        Err(error) => {
            if std::env::var_os("DUNE_GC_VERBOSE").is_some() {
                eprintln!("dune-gc: {error}");
            }
            match error {
                GcError::Reserve(_) => libc::ENOMEM,
                GcError::AlreadyInitialised => libc::EALREADY,
                _ => libc::ENOTSUP,
            }
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn dune_gc_malloc(size: usize) -> *mut c_void {
    conservative::malloc(size)
}

#[unsafe(no_mangle)]
extern "C" fn dune_gc_malloc_atomic(size: usize) -> *mut c_void {
    conservative::malloc_atomic(size)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dune_gc_realloc(old: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: as the header says.
    unsafe { conservative::realloc(old, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dune_gc_free(object: *mut c_void) {
    // SAFETY: as the header says.
    unsafe { conservative::free(object) };
}

#[unsafe(no_mangle)]
extern "C" fn dune_gc_collect() {
    conservative::collect();
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dune_gc_add_roots(lo: *mut c_void, hi: *mut c_void) {
    // SAFETY: as the header says.
    unsafe { conservative::add_roots(lo, hi) };
}

#[unsafe(no_mangle)]
extern "C" fn dune_gc_register_thread() -> c_int {
    match conservative::register_thread() {
        Ok(()) => 0,
        Err(_) => libc::ENOTSUP,
    }
}

#[unsafe(no_mangle)]
extern "C" fn dune_gc_unregister_thread() -> c_int {
    conservative::unregister_thread();
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dune_gc_register_finalizer(
    object: *mut c_void,
    function: Option<unsafe extern "C" fn(*mut c_void, *mut c_void)>,
    data: *mut c_void,
) {
    // SAFETY: as the header says.
    unsafe { conservative::register_finalizer(object, function, data) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dune_gc_get_stats(into: *mut dune_gc_stats) {
    let stats = conservative::stats();
    let nanoseconds = |time: std::time::Duration| time.as_nanos() as u64;
    let stats = dune_gc_stats {
        collections: stats.collections,
        minor_collections: stats.minor_collections,
        pauses: stats.pauses,
        pause_total_ns: nanoseconds(stats.pause_total),
        pause_longest_ns: nanoseconds(stats.pause_longest),
        heap_bytes: stats.heap_bytes,
        live_bytes: stats.live_bytes,
        pages_scanned: stats.pages_scanned,
        first_write_traps: stats.first_write_traps,
    };
    // SAFETY: as the header says.
    unsafe { ptr::write(into, stats) };
}
