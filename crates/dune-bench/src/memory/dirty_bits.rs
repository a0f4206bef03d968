//! `dune::dirty`: the CPU's own bits. Collecting begins the next period, so there is nothing
//! to arm.

use dune::dirty::{PageSet, Tracker};
use dune::memory::VirtRange;
use dune_x86::addr::GuestVirt;

use super::Way;
use super::region::Region;

/// See the module documentation.
pub(super) struct DirtyBits {
    tracker: Tracker,
    found: PageSet,
}

impl DirtyBits {
    pub(super) fn new(region: &Region) -> Result<Self, String> {
        let start = GuestVirt::new_truncate(region.start() as u64);
        let range =
            VirtRange::try_new(start, region.bytes() as u64).map_err(|error| error.to_string())?;
        let tracker = Tracker::start(range).map_err(|error| error.to_string())?;
        let found = PageSet::new(range, tracker.granularity());
        Ok(Self { tracker, found })
    }
}

impl Way for DirtyBits {
    fn arm(&mut self) {}

    fn collect(&mut self) -> usize {
        match self.tracker.collect_into(&mut self.found) {
            Ok(()) => self.found.len(),
            Err(_) => 0,
        }
    }
}
