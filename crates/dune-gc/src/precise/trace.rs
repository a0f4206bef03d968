//! Which values lead to which objects.
#![expect(unsafe_code, reason = "the promises of `Trace`")]

use core::num;
use core::sync::atomic;
use std::sync::{Mutex, RwLock};

use crate::mark::Marker;

/// A value whose pointers to objects the collector can find. Derive it:
///
/// ```
/// use dune_gc::{GcCell, Trace};
///
/// #[derive(Trace)]
/// struct Node {
///     key: u64,
///     left: GcCell<Node>,
///     right: GcCell<Node>,
/// }
/// ```
///
/// # Safety
/// [`trace`](Self::trace) passes every [`GcCell`](crate::GcCell) within the value to the
/// tracer, and it may be called by another thread while the value is in use; if there is none,
/// and only then, [`HAS_POINTERS`](Self::HAS_POINTERS) may be `false`. `Drop` of the value, if
/// it has one, does not touch its `GcCell`s.
pub unsafe trait Trace: Send + Sync + 'static {
    /// Whether a value can hold a [`GcCell`](crate::GcCell).
    const HAS_POINTERS: bool;

    /// Shows every [`GcCell`](crate::GcCell) to the tracer.
    fn trace(&self, tracer: &mut Tracer<'_, '_>);
}

/// What [`Trace::trace`] shows pointers to.
#[derive(Debug)]
pub struct Tracer<'a, 'b>(pub(super) &'a mut Marker<'b>);

/// A type that can hold no [`GcCell`](crate::GcCell), whatever its value.
///
/// # Safety
/// That is so.
pub unsafe trait NoPointers: Send + Sync + 'static {}

macro_rules! no_pointers {
    ($([$($parameters:tt)*] $type:ty),* $(,)?) => {$(
        // SAFETY: it holds nothing but plain data.
        unsafe impl<$($parameters)*> NoPointers for $type {}
        // SAFETY: as above.
        unsafe impl<$($parameters)*> Trace for $type {
            const HAS_POINTERS: bool = false;
            #[inline]
            fn trace(&self, _: &mut Tracer<'_, '_>) {}
        }
    )*};
}

no_pointers! {
    [] (), [] bool, [] char, [] f32, [] f64, [] String, [] Box<str>, [] &'static str,
    [] u8, [] u16, [] u32, [] u64, [] u128, [] usize,
    [] i8, [] i16, [] i32, [] i64, [] i128, [] isize,
    [] num::NonZeroU8, [] num::NonZeroU16, [] num::NonZeroU32, [] num::NonZeroU64,
    [] num::NonZeroUsize, [] num::NonZeroI32, [] num::NonZeroI64,
    [] atomic::AtomicBool, [] atomic::AtomicU8, [] atomic::AtomicU16, [] atomic::AtomicU32,
    [] atomic::AtomicU64, [] atomic::AtomicUsize, [] atomic::AtomicI32, [] atomic::AtomicI64,
    [] std::time::Duration, [] std::time::Instant, [] std::path::PathBuf,
    [T: NoPointers] Mutex<T>, [T: NoPointers] RwLock<T>,
}

// SAFETY: it holds only values that do not.
unsafe impl<T: NoPointers> NoPointers for Vec<T> {}
// SAFETY: as above.
unsafe impl<T: NoPointers> NoPointers for Option<T> {}
// SAFETY: as above.
unsafe impl<T: NoPointers, const N: usize> NoPointers for [T; N] {}

// SAFETY: the value is traced, if there is one; it cannot change while it is in the heap.
unsafe impl<T: Trace> Trace for Option<T> {
    const HAS_POINTERS: bool = T::HAS_POINTERS;
    #[inline]
    fn trace(&self, tracer: &mut Tracer<'_, '_>) {
        if let Some(value) = self {
            value.trace(tracer);
        }
    }
}

// SAFETY: every element is traced.
unsafe impl<T: Trace, const N: usize> Trace for [T; N] {
    const HAS_POINTERS: bool = T::HAS_POINTERS;
    #[inline]
    fn trace(&self, tracer: &mut Tracer<'_, '_>) {
        for value in self {
            value.trace(tracer);
        }
    }
}

// SAFETY: elements outside of the heap, whose cells are null for ever (see `GcCell::set`).
unsafe impl<T: NoPointers> Trace for Vec<T> {
    const HAS_POINTERS: bool = false;
    #[inline]
    fn trace(&self, _: &mut Tracer<'_, '_>) {}
}

macro_rules! tuples {
    ($(($($name:ident $index:tt),+))*) => {$(
        // SAFETY: every member is traced.
        unsafe impl<$($name: Trace),+> Trace for ($($name,)+) {
            const HAS_POINTERS: bool = false $(|| $name::HAS_POINTERS)+;
            #[inline]
            fn trace(&self, tracer: &mut Tracer<'_, '_>) {
                $(self.$index.trace(tracer);)+
            }
        }
    )*};
}

tuples! {
    (A 0)
    (A 0, B 1)
    (A 0, B 1, C 2)
    (A 0, B 1, C 2, D 3)
}
