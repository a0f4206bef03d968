//! Where a function begins in a compartment, and how it ends.
#![expect(unsafe_code, reason = "the guard passes addresses in registers")]

use super::{ask, request};

/// A function that captures nothing: all that goes into a compartment is its input.
pub(crate) const fn captures_nothing<F>() -> bool {
    size_of::<F>() == 0
}

/// Makes the value of a type that has only one.
fn the_one<F: Copy>() -> F {
    const { assert!(captures_nothing::<F>()) };
    // SAFETY: a type without bytes has one value, if it has any; that it has one is known
    // since the caller of `run` passed it.
    unsafe { core::ptr::NonNull::<F>::dangling().read() }
}

/// Begins a function on plain input.
pub(crate) unsafe extern "C" fn typed<F, I, T>(input: *const I, result: *mut T) -> !
where
    F: Fn(I) -> T + Copy,
{
    // SAFETY: the guard has put the input there.
    let input = unsafe { input.read() };
    let value = the_one::<F>()(input);
    // SAFETY: the guard has left room there.
    unsafe { result.write(value) };
    end()
}

/// Begins a function on bytes. The result is where its bytes are, and how many.
pub(crate) unsafe extern "C" fn bytes<F>(
    result: *mut [u64; 2],
    input: *const u8,
    length: usize,
) -> !
where
    F: Fn(&[u8]) -> Vec<u8> + Copy,
{
    // SAFETY: the guard has put so many bytes there.
    let input = unsafe { core::slice::from_raw_parts(input, length) };
    let value = the_one::<F>()(input).leak();
    // SAFETY: the guard has left room there.
    unsafe { result.write([value.as_ptr() as u64, value.len() as u64]) };
    end()
}

fn end() -> ! {
    loop {
        ask(request::RETURN, [0; 5]);
    }
}
