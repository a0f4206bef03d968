//! Objects that describe themselves: their first word is the address of a [`TypeInfo`].
#![expect(unsafe_code, reason = "calls an object's description on the object")]

use core::sync::atomic::{AtomicPtr, Ordering};

use crate::mark::Marker;

/// How to look through objects of one type. Lives as long as the process.
#[derive(Debug)]
pub(crate) struct TypeInfo {
    /// Marks what a part of the object (first address, end) points to; the object begins
    /// with its description.
    pub(crate) trace: unsafe fn(usize, usize, usize, &mut Marker<'_>),
}

/// Takes the description away: the object is not looked through any more.
///
/// # Safety
/// An allocated cell of a block of typed objects.
pub(crate) unsafe fn forget(object: usize) {
    let header = object as *mut *mut TypeInfo;
    // SAFETY: the first word of a typed object, aligned as all objects are.
    let header = unsafe { AtomicPtr::from_ptr(header) };
    header.store(core::ptr::null_mut(), Ordering::Release);
}

/// Looks through an object.
///
/// # Safety
/// An allocated cell of a block of typed objects, whose first word is zero until the object
/// is whole.
#[inline]
pub(crate) unsafe fn trace(object: usize, marker: &mut Marker<'_>) {
    // SAFETY: as the caller says; all of the object.
    unsafe { trace_part(object, object, usize::MAX, marker) };
}

/// Looks at least at that part of an object that lies between two addresses.
///
/// # Safety
/// As [`trace`].
#[inline]
pub(crate) unsafe fn trace_part(object: usize, start: usize, end: usize, marker: &mut Marker<'_>) {
    let header = object as *mut *mut TypeInfo;
    // SAFETY: the first word of a typed object, aligned as all objects are.
    let header = unsafe { AtomicPtr::from_ptr(header) }.load(Ordering::Acquire);
    // SAFETY: null, or a description, which is never freed.
    let Some(info) = (unsafe { header.as_ref() }) else {
        return;
    };
    // SAFETY: it is the description of this very object.
    unsafe { (info.trace)(object, start, end, marker) };
}
