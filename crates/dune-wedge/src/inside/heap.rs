//! The compartment's heap: what `malloc` and its relatives are inside.
//!
//! libc's own allocator cannot be used: its state at the start of the runtime speaks of
//! memory that the compartment does not have. This one is simple: a block is a power of two,
//! with 16 bytes before what the caller gets; free blocks of a size form a list; new ones come
//! from the end. All of its state is in the heap itself, so a heap of zeros is an empty one.
//! Memory is used when it is touched, and the guard keeps to the limit.
//!
//! ```text
//!   heap: [next, free lists of 32 sizes][header | block][header | block] ...
//! ```
#![expect(unsafe_code, reason = "an allocator, by libc's interface")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "fields of one raw structure"
)]

use core::ffi::{CStr, c_void};
use core::ptr;

use crate::layout::{HEAP_END, HEAP_START};

const SIZES: usize = 32;
const SMALLEST_SHIFT: u32 = 5;
const HEADER: usize = 16;
const ENOMEM: i32 = libc::ENOMEM;
const EINVAL: i32 = libc::EINVAL;

#[repr(C)]
struct Heap {
    /// Offset from the start of the heap of what was never given out; 0 before the first
    /// block.
    end: usize,
    free: [*mut Block; SIZES],
}

/// Before what the caller gets.
#[repr(C)]
struct Block {
    /// The power of two that the block is long.
    shift: u32,
    /// How far what the caller got lies behind the end of the first header, for alignment.
    moved: u32,
    next: *mut Self,
}

const _: () = assert!(size_of::<Block>() == HEADER);

fn heap() -> *mut Heap {
    HEAP_START as *mut Heap
}

fn no_memory() -> *mut c_void {
    set_errno(ENOMEM);
    ptr::null_mut()
}

fn set_errno(value: i32) {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() = value };
}

extern "C" fn malloc(size: usize) -> *mut c_void {
    let Some(whole) = size.checked_add(HEADER).filter(|n| *n <= 1 << 40) else {
        return no_memory();
    };
    let shift = whole
        .next_power_of_two()
        .trailing_zeros()
        .max(SMALLEST_SHIFT);
    let heap = heap();
    // SAFETY: the heap is this compartment's alone, which has one thread.
    unsafe {
        let Some(list) = (&raw mut (*heap).free)
            .cast::<*mut Block>()
            .wrapping_add((shift - SMALLEST_SHIFT) as usize)
            .as_mut()
            .filter(|_| ((shift - SMALLEST_SHIFT) as usize) < SIZES)
        else {
            return no_memory();
        };
        let mut block = *list;
        if block.is_null() {
            let start = (*heap).end.max(size_of::<Heap>().next_multiple_of(HEADER));
            let end = start + (1 << shift);
            if end > (HEAP_END - HEAP_START) as usize {
                return no_memory();
            }
            (*heap).end = end;
            block = (HEAP_START as usize + start) as *mut Block;
        } else {
            *list = (*block).next;
        }
        block.write(Block {
            shift,
            moved: 0,
            next: ptr::null_mut(),
        });
        block.wrapping_add(1).cast()
    }
}

/// The first header of the block that an address is in.
unsafe fn block_of(address: *mut c_void) -> *mut Block {
    let header = address.cast::<Block>().wrapping_sub(1);
    // SAFETY: an address that was given out has a header before it.
    let moved = unsafe { (*header).moved };
    header.wrapping_byte_sub(moved as usize)
}

unsafe extern "C" fn free(address: *mut c_void) {
    if address.is_null() {
        return;
    }
    // SAFETY: the caller's word, as of libc's.
    unsafe {
        let block = block_of(address);
        let list = (&raw mut (*heap()).free)
            .cast::<*mut Block>()
            .wrapping_add((*block).shift.wrapping_sub(SMALLEST_SHIFT) as usize % SIZES);
        (*block).next = *list;
        *list = block;
    }
}

extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    let Some(bytes) = count.checked_mul(size) else {
        return no_memory();
    };
    let end = {
        // SAFETY: the compartment's own heap.
        unsafe { (*heap()).end.max(size_of::<Heap>()) }
    };
    let memory = malloc(bytes);
    // What was never given out is zero.
    if !memory.is_null() && (memory as usize) < HEAP_START as usize + end {
        // SAFETY: a block of so many bytes.
        unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
    }
    memory
}

/// Bytes that the caller may use at an address.
unsafe extern "C" fn malloc_usable_size(address: *mut c_void) -> usize {
    if address.is_null() {
        return 0;
    }
    // SAFETY: as for `free`.
    unsafe {
        let block = block_of(address);
        let end = block.wrapping_byte_add(1 << (*block).shift);
        end as usize - address as usize
    }
}

unsafe extern "C" fn realloc(address: *mut c_void, size: usize) -> *mut c_void {
    if address.is_null() {
        return malloc(size);
    }
    // SAFETY: as for `free`.
    let had = unsafe { malloc_usable_size(address) };
    if size <= had {
        return address;
    }
    let memory = malloc(size);
    if !memory.is_null() {
        // SAFETY: two blocks, both as long as that.
        unsafe {
            ptr::copy_nonoverlapping(address.cast::<u8>(), memory.cast::<u8>(), had);
            free(address);
        }
    }
    memory
}

extern "C" fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    if !alignment.is_power_of_two() || alignment > 1 << 30 {
        set_errno(EINVAL);
        return ptr::null_mut();
    }
    if alignment <= HEADER {
        return malloc(size);
    }
    let Some(whole) = size.checked_add(alignment) else {
        return no_memory();
    };
    let memory = malloc(whole);
    if memory.is_null() {
        return memory;
    }
    let moved = (memory as usize).next_multiple_of(alignment) - memory as usize;
    let aligned = memory.wrapping_byte_add(moved);
    if moved != 0 {
        // SAFETY: blocks and alignments are multiples of a header, so one fits in between.
        unsafe {
            let block = memory.cast::<Block>().wrapping_sub(1);
            aligned.cast::<Block>().wrapping_sub(1).write(Block {
                shift: (*block).shift,
                moved: moved as u32,
                next: ptr::null_mut(),
            });
        }
    }
    aligned
}

unsafe extern "C" fn posix_memalign(into: *mut *mut c_void, alignment: usize, size: usize) -> i32 {
    if !alignment.is_power_of_two() || alignment < size_of::<usize>() {
        return EINVAL;
    }
    let memory = aligned_alloc(alignment, size);
    if memory.is_null() {
        return ENOMEM;
    }
    // SAFETY: the caller's pointer.
    unsafe { into.write(memory) };
    0
}

extern "C" fn valloc(size: usize) -> *mut c_void {
    aligned_alloc(4096, size)
}

/// What stands in for libc's functions.
pub(super) fn functions() -> [(&'static CStr, u64); 9] {
    [
        (c"malloc", malloc as *const () as u64),
        (c"free", free as *const () as u64),
        (c"calloc", calloc as *const () as u64),
        (c"realloc", realloc as *const () as u64),
        (c"memalign", aligned_alloc as *const () as u64),
        (c"aligned_alloc", aligned_alloc as *const () as u64),
        (c"posix_memalign", posix_memalign as *const () as u64),
        (c"valloc", valloc as *const () as u64),
        (
            c"malloc_usable_size",
            malloc_usable_size as *const () as u64,
        ),
    ]
}
