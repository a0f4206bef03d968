//! Compartments that are used again and again, by as many threads as come.

use core::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use crate::compartment::Compartment;
use crate::error::StartError;

/// Makes a compartment of a pool.
type Make<'a> = Box<dyn Fn() -> Result<Compartment<'a>, StartError> + Send + Sync + 'a>;

/// Compartments that are alike, made when they are needed and kept when they are not.
///
/// ```no_run
/// use dune_wedge::{Compartment, Pool};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = Pool::new(16, || Compartment::builder().memory(1 << 20).build());
/// let sum = pool.take()?.run(|n: [u64; 2]| n[0] + n[1], [1, 2])?;
/// # Ok(())
/// # }
/// ```
pub struct Pool<'a> {
    make: Make<'a>,
    idle: Mutex<Vec<Compartment<'a>>>,
    most: usize,
}

impl core::fmt::Debug for Pool<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pool").field("idle", &self.idle()).finish()
    }
}

impl<'a> Pool<'a> {
    /// A pool that keeps up to `most` idle compartments, made by `make`.
    pub fn new(
        most: usize,
        make: impl Fn() -> Result<Compartment<'a>, StartError> + Send + Sync + 'a,
    ) -> Self {
        Self {
            make: Box::new(make),
            idle: Mutex::new(Vec::with_capacity(most)),
            most,
        }
    }

    /// A compartment, pristine; made if none is idle. Goes back to the pool when it is
    /// dropped. Some fifty instructions if one is idle.
    ///
    /// # Errors
    /// As the closure of [`new`](Self::new).
    pub fn take(&self) -> Result<Pooled<'_, 'a>, StartError> {
        let idle = self.lock().pop();
        let compartment = match idle {
            Some(compartment) => compartment,
            None => (self.make)()?,
        };
        Ok(Pooled {
            compartment: Some(compartment),
            pool: self,
        })
    }

    /// How many compartments are idle.
    #[must_use]
    pub fn idle(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Compartment<'a>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A compartment of a pool.
#[derive(Debug)]
pub struct Pooled<'p, 'a> {
    compartment: Option<Compartment<'a>>,
    pool: &'p Pool<'a>,
}

impl<'a> Deref for Pooled<'_, 'a> {
    type Target = Compartment<'a>;

    fn deref(&self) -> &Self::Target {
        match &self.compartment {
            Some(compartment) => compartment,
            None => unreachable!("a compartment that was given back"),
        }
    }
}

impl DerefMut for Pooled<'_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match &mut self.compartment {
            Some(compartment) => compartment,
            None => unreachable!("a compartment that was given back"),
        }
    }
}

impl Drop for Pooled<'_, '_> {
    fn drop(&mut self) {
        if let Some(compartment) = self.compartment.take() {
            let mut idle = self.pool.lock();
            if idle.len() < self.pool.most {
                idle.push(compartment);
            }
        }
    }
}
