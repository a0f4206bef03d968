//! How an object of the Rust interface lies in its cell.
//!
//! ```text
//! has pointers   | description | value ...          the value at 8, or at 16 if it is aligned so
//! array          | description | length | cell 0 | cell 1 | ...
//! no pointers    | value ...
//! ```
#![expect(unsafe_code, reason = "values in raw memory")]

use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering};

use super::cell::GcCell;
use super::trace::{Trace, Tracer};
use crate::block::Kind;
use crate::layout::GRANULE;
use crate::mark::Marker;
use crate::typed::TypeInfo;

/// Where the value of a type lies in a cell.
pub(super) const fn offset_of_value<T: Trace>() -> usize {
    const {
        assert!(
            align_of::<T>() <= GRANULE,
            "objects are aligned to 16 bytes at most"
        );
    }
    if !T::HAS_POINTERS {
        0
    } else if align_of::<T>() <= 8 {
        8
    } else {
        16
    }
}

pub(super) const fn kind_of<T: Trace>() -> Kind {
    if T::HAS_POINTERS {
        Kind::Typed
    } else {
        Kind::Atomic
    }
}

struct Described<T>(PhantomData<T>);

impl<T: Trace> Described<T> {
    const VALUE: &'static TypeInfo = &TypeInfo {
        is_array: false,
        trace: trace_value::<T>,
    };
    const ARRAY: &'static TypeInfo = &TypeInfo {
        is_array: true,
        trace: trace_array::<T>,
    };
}

unsafe fn trace_value<T: Trace>(object: usize, _: usize, _: usize, marker: &mut Marker<'_>) {
    let value = (object + offset_of_value::<T>()) as *const T;
    // SAFETY: the description is written after the value, which stays until it is swept;
    // nobody has a mutable reference to a value in the heap.
    let value = unsafe { &*value };
    value.trace(&mut Tracer(marker));
}

unsafe fn trace_array<T: Trace>(object: usize, start: usize, end: usize, marker: &mut Marker<'_>) {
    let array = (object + size_of::<usize>()) as *const GcArray<T>;
    // SAFETY: as in `trace_value`.
    let cells = unsafe { &*array }.cells();
    let first = cells.as_ptr() as usize;
    let index = |address: usize| address.saturating_sub(first).div_ceil(size_of::<usize>());
    // A cell that lies across `start` would be one that is not aligned.
    let (from, to) = (index(start).min(cells.len()), index(end).min(cells.len()));
    for cell in cells.get(from..to).unwrap_or_default() {
        cell.trace(&mut Tracer(marker));
    }
}

/// Makes a value of a fresh cell.
///
/// # Safety
/// The cell is zero, nobody else's, of the kind and size of `T`.
pub(super) unsafe fn place<T: Trace>(cell: usize, value: T) -> NonNull<T> {
    let place = (cell + offset_of_value::<T>()) as *mut T;
    // SAFETY: within the cell.
    unsafe { place.write(value) };
    if T::HAS_POINTERS {
        // SAFETY: the cell is zero.
        unsafe { describe(cell, Described::<T>::VALUE) };
    }
    // SAFETY: an address in the heap.
    unsafe { NonNull::new_unchecked(place) }
}

/// Makes an array of null cells of a fresh cell.
///
/// # Safety
/// The cell is zero, nobody else's, and [`array_bytes`] long.
pub(super) unsafe fn place_array<T: Trace>(cell: usize, len: usize) -> NonNull<GcArray<T>> {
    let array = (cell + size_of::<usize>()) as *mut GcArray<T>;
    // SAFETY: within the cell. The array's cells are zero, which is null.
    unsafe { array.cast::<usize>().write(len) };
    // SAFETY: the cell is zero.
    unsafe { describe(cell, Described::<T>::ARRAY) };
    // SAFETY: an address in the heap.
    unsafe { NonNull::new_unchecked(array) }
}

pub(super) fn array_bytes(len: usize) -> Option<usize> {
    len.checked_add(2)?.checked_mul(size_of::<usize>())
}

/// From here on the collector looks through the object.
///
/// # Safety
/// The first word of a typed cell.
unsafe fn describe(cell: usize, info: &'static TypeInfo) {
    let header = cell as *mut *mut TypeInfo;
    // SAFETY: aligned, and looked at as an atomic by everybody.
    let header = unsafe { AtomicPtr::from_ptr(header) };
    header.store(core::ptr::from_ref(info).cast_mut(), Ordering::Release);
}

/// An array of [`GcCell`]s, made by [`Mutator::alloc_array`](crate::Mutator::alloc_array). It
/// derefs to a slice.
#[derive(Debug)]
#[repr(C)]
pub struct GcArray<T: Trace> {
    len: usize,
    cells: [GcCell<T>; 0],
}

const _: () = assert!(core::mem::offset_of!(GcArray<u64>, len) == 0);

impl<T: Trace> GcArray<T> {
    fn cells(&self) -> &[GcCell<T>] {
        let first = (core::ptr::from_ref(self) as usize + size_of::<usize>()) as *const GcCell<T>;
        // SAFETY: the only values of this type are those that `place_array` made, in the
        // heap, with so many cells behind the length.
        unsafe { core::slice::from_raw_parts(first, self.len) }
    }
}

impl<T: Trace> core::ops::Deref for GcArray<T> {
    type Target = [GcCell<T>];

    #[inline]
    fn deref(&self) -> &[GcCell<T>] {
        self.cells()
    }
}

// SAFETY: an array in the heap is traced by `trace_array`; this is for `GcCell<GcArray<T>>`,
// whose target must be a type that can be traced.
unsafe impl<T: Trace> Trace for GcArray<T> {
    const HAS_POINTERS: bool = true;

    fn trace(&self, tracer: &mut Tracer<'_, '_>) {
        for cell in self.cells() {
            cell.trace(tracer);
        }
    }
}
