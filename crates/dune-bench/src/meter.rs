//! Repeats an operation and takes the median.

use crate::clock::{self, Clock};

/// Measures operations, always the same way: a sample is a batch of operations between two
/// readings of the clock, and the figure is the median of the samples, for one operation.
/// Batches make the readings themselves negligible; the median makes the odd timer
/// interrupt so.
#[derive(Clone, Debug)]
pub(crate) struct Meter {
    clock: Clock,
    samples: usize,
}

/// Samples that are thrown away, so that caches, page tables and predictors are warm.
const WARM_UP: usize = 3;

impl Meter {
    pub(crate) fn new(clock: Clock, samples: usize) -> Self {
        Self { clock, samples }
    }

    /// The figure of an operation that can be repeated as it is.
    #[inline(always)]
    pub(crate) fn measure(&self, batch: u32, mut operation: impl FnMut()) -> Figure {
        self.measure_batches(batch, || {
            let start = clock::ticks();
            for _ in 0..batch {
                operation();
            }
            clock::ticks() - start
        })
    }

    /// The figure of operations that need preparation: `batch` prepares, does as many
    /// operations as said, and returns the ticks that those took.
    #[inline(always)]
    pub(crate) fn measure_batches(
        &self,
        operations: u32,
        mut batch: impl FnMut() -> u64,
    ) -> Figure {
        let mut samples = Vec::with_capacity(self.samples);
        for _ in 0..WARM_UP {
            batch();
        }
        for _ in 0..self.samples {
            samples.push(self.clock.per_operation(batch(), operations));
        }
        Figure::of(samples)
    }

    /// The same meter with fewer samples, for what takes long.
    pub(crate) fn with_at_most(&self, samples: usize) -> Self {
        Self {
            clock: self.clock.clone(),
            samples: self.samples.min(samples),
        }
    }

    /// The clock, for what is timed elsewhere.
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(crate) fn samples(&self) -> usize {
        self.samples
    }
}

/// What an operation costs, in the clock's unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figure {
    /// The median of the samples, to a tenth.
    pub(crate) median: f64,
    /// The smallest sample.
    pub(crate) least: f64,
    /// The largest sample.
    pub(crate) most: f64,
}

impl Figure {
    /// The figure of one of so many operations that were measured as one.
    pub(crate) fn of_each(self, operations: u32) -> Self {
        let share = |value: f64| (value / f64::from(operations) * 10.0).round() / 10.0;
        Self {
            median: share(self.median),
            least: share(self.least),
            most: share(self.most),
        }
    }

    /// The figure of a set of samples.
    ///
    /// # Panics
    /// When there is none.
    pub(crate) fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let (Some(&least), Some(&most)) = (samples.first(), samples.last()) else {
            panic!("a figure needs a sample");
        };
        let middle = samples.len() / 2;
        let median = if samples.len().is_multiple_of(2) {
            f64::midpoint(samples[middle - 1], samples[middle])
        } else {
            samples[middle]
        };
        let tenth = |value: f64| (value * 10.0).round() / 10.0;
        Self {
            median: tenth(median),
            least: tenth(least),
            most: tenth(most),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Figure::of(vec![3.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Figure::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
        assert_eq!(Figure::of(vec![7.26]).median, 7.3);
    }

    proptest! {
        #[test]
        fn the_median_lies_between_the_ends(samples in prop::collection::vec(0.0..1e9, 1..100)) {
            let figure = Figure::of(samples);
            prop_assert!(figure.least <= figure.median && figure.median <= figure.most);
        }
    }
}
