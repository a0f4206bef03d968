//! Objects that describe themselves: their first word is the address of a [`TypeInfo`].
#![expect(unsafe_code, reason = "calls an object's description on the object")]

use core::sync::atomic::{AtomicPtr, Ordering};

use crate::mark::Marker;

/// How to look through objects of one type. Lives as long as the process.
#[derive(Debug)]
pub(crate) struct TypeInfo {
    /// An array: words behind the description and the length, which is their number. It may be
    /// looked through in parts; any other object is always looked through as a whole.
    pub(crate) is_array: bool,
    /// Marks what a part of the object (first address, end) points to; the object begins
    /// with its description.
    pub(crate) trace: unsafe fn(usize, usize, usize, &mut Marker<'_>),
}

impl TypeInfo {
    /// The end of an array; of another object its beginning.
    ///
    /// # Safety
    /// The object has this description.
    pub(crate) unsafe fn end_of_array(&self, object: usize) -> usize {
        const WORD: usize = size_of::<usize>();
        if !self.is_array {
            return object;
        }
        // SAFETY: the second word of an array, which is written before the description and
        // never again.
        let len = unsafe { ((object + WORD) as *const usize).read() };
        object + (2 + len) * WORD
    }
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

/// The description of an object; `None` until it is whole, or if it was forgotten.
///
/// # Safety
/// An allocated cell of a block of typed objects, whose first word is zero until the object
/// is whole.
#[inline]
pub(crate) unsafe fn info(object: usize) -> Option<&'static TypeInfo> {
    let header = object as *mut *mut TypeInfo;
    // SAFETY: the first word of a typed object, aligned as all objects are.
    let header = unsafe { AtomicPtr::from_ptr(header) }.load(Ordering::Acquire);
    // SAFETY: null, or a description, which is never freed.
    unsafe { header.as_ref() }
}

/// Looks at least at that part of an object that lies between two addresses.
///
/// # Safety
/// As [`info`].
#[inline]
pub(crate) unsafe fn trace_part(object: usize, start: usize, end: usize, marker: &mut Marker<'_>) {
    // SAFETY: as the caller says.
    if let Some(info) = unsafe { info(object) } {
        // SAFETY: it is the description of this very object.
        unsafe { (info.trace)(object, start, end, marker) };
    }
}
