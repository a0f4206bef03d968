//! Callgates: calls from a compartment into its parent.
//!
//! A gate is a `static` that both sides name. The parent gives a compartment a gate together
//! with the closure behind it ([`Builder::gate`](crate::Builder::gate)); inside,
//! [`Gate::call`] goes there. Arguments and results are plain data, copied: a compartment can
//! pass any bytes, and no more than bytes. The closure runs at ring 0 in the parent, and may
//! borrow from it. It is called by one compartment at a time, and may itself run others.

use core::fmt;
use core::marker::PhantomData;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::access::Memory;
use crate::inside::{self, request};
use crate::shell::Denied;

/// A call with an input and an output of fixed sizes.
///
/// ```
/// use dune_wedge::Gate;
///
/// static SQUARE: Gate<u64, u64> = Gate::new("square");
/// ```
pub struct Gate<I, O> {
    name: &'static str,
    of: PhantomData<fn(I) -> O>,
}

impl<I, O> fmt::Debug for Gate<I, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gate").field(&self.name).finish()
    }
}

impl<I, O> Gate<I, O> {
    /// A gate; the name is for people.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            of: PhantomData,
        }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn address(&'static self) -> u64 {
        core::ptr::from_ref(self) as u64
    }
}

impl<I, O> Gate<I, O>
where
    I: IntoBytes + Immutable,
    O: FromBytes + IntoBytes,
{
    /// Goes through the gate, inside a compartment that has it. No exit.
    ///
    /// A compartment that does not have the gate is ended.
    ///
    /// # Panics
    /// Outside a compartment.
    #[inline]
    pub fn call(&'static self, input: I) -> O {
        assert!(inside::is_inside(), "gates lead out of compartments");
        let mut output = O::new_zeroed();
        let from = input.as_bytes();
        let to = output.as_mut_bytes();
        inside::ask(
            request::GATE,
            [
                self.address(),
                from.as_ptr() as u64,
                from.len() as u64,
                to.as_mut_ptr() as u64,
                to.len() as u64,
            ],
        );
        // The guard wrote through the pointer.
        core::hint::black_box(&mut output);
        output
    }
}

/// A call with bytes in and bytes out.
#[derive(Debug)]
pub struct BytesGate {
    name: &'static str,
    most: usize,
}

impl BytesGate {
    /// A gate that takes up to `most` bytes.
    #[must_use]
    pub const fn new(name: &'static str, most: usize) -> Self {
        Self { name, most }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn most(&self) -> usize {
        self.most
    }

    pub(crate) fn address(&'static self) -> u64 {
        core::ptr::from_ref(self) as u64
    }

    /// Goes through the gate, inside a compartment that has it: the output's first bytes go
    /// into `output`; returns how many there are in all, which may be more than fit.
    ///
    /// A compartment that does not have the gate, or passes more than it takes, is ended.
    ///
    /// # Panics
    /// Outside a compartment.
    pub fn call(&'static self, input: &[u8], output: &mut [u8]) -> usize {
        assert!(inside::is_inside(), "gates lead out of compartments");
        let length = inside::ask(
            request::BYTES_GATE,
            [
                self.address(),
                input.as_ptr() as u64,
                input.len() as u64,
                output.as_mut_ptr() as u64,
                output.len() as u64,
            ],
        );
        core::hint::black_box(output);
        length as usize
    }
}

/// What is behind a gate, for the guard: `(memory, input, its length, output, its length)`.
pub(crate) type Behind<'a> =
    Box<dyn FnMut(&mut Memory<'_>, u64, u64, u64, u64) -> Result<u64, Through> + Send + 'a>;

/// Why a call did not go through.
#[derive(Debug)]
pub(crate) enum Through {
    Sizes,
    Denied(Denied),
}

impl From<Denied> for Through {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

/// The side of a typed gate that the parent is on.
pub(crate) fn typed<'a, I, O>(mut body: impl FnMut(I) -> O + Send + 'a) -> Behind<'a>
where
    I: FromBytes + IntoBytes + 'a,
    O: IntoBytes + Immutable + 'a,
{
    Box::new(move |memory, input, input_size, output, output_size| {
        if input_size != size_of::<I>() as u64 || output_size != size_of::<O>() as u64 {
            return Err(Through::Sizes);
        }
        // Copied once, so that what is checked is what is used.
        let mut value = I::new_zeroed();
        if size_of::<I>() != 0 {
            memory.read(input, value.as_mut_bytes())?;
        }
        let result = body(value);
        if size_of::<O>() != 0 {
            memory.write(output, result.as_bytes())?;
        }
        Ok(0)
    })
}

/// The side of a bytes gate that the parent is on.
pub(crate) fn bytes<'a>(
    most: usize,
    mut body: impl FnMut(&[u8]) -> Vec<u8> + Send + 'a,
) -> Behind<'a> {
    Box::new(move |memory, input, input_size, output, output_size| {
        if input_size > most as u64 {
            return Err(Through::Sizes);
        }
        let mut value = vec![0; input_size as usize];
        memory.read(input, &mut value)?;
        let result = body(&value);
        let fits = result.len().min(output_size as usize);
        memory.write(output, result.get(..fits).unwrap_or_default())?;
        Ok(result.len() as u64)
    })
}
