//! The kernel's soft-dirty bits: `/proc/self/clear_refs` arms, `/proc/self/pagemap` tells.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use super::Way;
use super::region::{PAGE, Region};

const SOFT_DIRTY: u64 = 1 << 55;

/// See the module documentation.
pub(super) struct SoftDirty {
    pagemap: File,
    first: usize,
    entries: Vec<u8>,
}

impl SoftDirty {
    pub(super) fn new(region: &Region) -> Result<Self, String> {
        let pagemap = File::open("/proc/self/pagemap")
            .map_err(|error| format!("cannot open /proc/self/pagemap: {error}"))?;
        let mut way = Self {
            pagemap,
            first: region.start() as usize / PAGE,
            entries: vec![0; region.pages() * 8],
        };
        way.arm();
        let before = way.collect();
        region.write(region.pages());
        if (before, way.collect()) != (0, 1) {
            return Err("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)".to_owned());
        }
        Ok(way)
    }
}

impl Way for SoftDirty {
    fn arm(&mut self) {
        // Where the kernel refuses, the number of pages found says so.
        let _ = fs::write("/proc/self/clear_refs", "4");
    }

    fn collect(&mut self) -> usize {
        let offset = self.first as u64 * 8;
        if self
            .pagemap
            .read_exact_at(&mut self.entries, offset)
            .is_err()
        {
            return 0;
        }
        let entries = self.entries.chunks_exact(8);
        entries
            .filter_map(|bytes| bytes.try_into().ok().map(u64::from_ne_bytes))
            .filter(|entry| entry & SOFT_DIRTY != 0)
            .count()
    }
}
