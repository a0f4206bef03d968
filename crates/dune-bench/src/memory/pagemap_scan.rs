//! `PAGEMAP_SCAN`, which Linux has from 6.7 on: userfaultfd protects pages, the kernel itself
//! gives the right back at the first write, and one call tells which pages those were and
//! protects them again. Collecting begins the next period.
#![expect(unsafe_code, reason = "userfaultfd's and pagemap's ioctls")]

use std::fs::File;
use std::os::fd::AsRawFd as _;

use super::Way;
use super::region::{PAGE, Region};
use super::uffd::{self, FEATURE_PAGEFAULT_FLAG_WP, UFFDIO_UNREGISTER};

const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const SCAN_WP_MATCHING: u64 = 1;
const SCAN_CHECK_WPASYNC: u64 = 2;
const PAGE_IS_WRITTEN: u64 = 2;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == (PAGEMAP_SCAN as usize >> 16) & 0x3fff);

/// `struct page_region`: neighbouring pages of the same categories.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// See the module documentation.
pub(super) struct PagemapScan {
    userfaultfd: File,
    pagemap: File,
    start: u64,
    bytes: u64,
    regions: Vec<PageRegion>,
}

impl PagemapScan {
    pub(super) fn new(region: &Region) -> Result<Self, String> {
        let features = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED;
        let userfaultfd = uffd::open(features).map_err(|error| {
            format!(
                "this kernel has none, Linux has it from 6.7 on, with CONFIG_USERFAULTFD ({error})"
            )
        })?;
        let pagemap = File::open("/proc/self/pagemap")
            .map_err(|error| format!("cannot open /proc/self/pagemap: {error}"))?;
        uffd::register(&userfaultfd, region)?;
        let mut way = Self {
            userfaultfd,
            pagemap,
            start: region.start() as u64,
            bytes: region.bytes() as u64,
            // Every other page at most begins a new one.
            regions: vec![PageRegion::default(); region.pages().div_ceil(2)],
        };
        // Protects everything that was written so far.
        way.scan()?;
        Ok(way)
    }

    /// How many pages were written since the last scan.
    fn scan(&mut self) -> Result<usize, String> {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
            start: self.start,
            end: self.start + self.bytes,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..ScanArgument::default()
        };
        let mut pages = 0;
        while argument.start < argument.end {
            // SAFETY: the argument is what the request wants; the kernel writes as many
            // regions as the vector has.
            let found =
                unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            if found < 0 {
                let error = std::io::Error::last_os_error();
                return Err(format!("PAGEMAP_SCAN: {error}"));
            }
            let regions = self.regions.iter().take(found as usize);
            pages += regions
                .map(|region| (region.end - region.start) as usize / PAGE)
                .sum::<usize>();
            argument.start = argument.walk_end;
        }
        Ok(pages)
    }
}

impl Way for PagemapScan {
    fn arm(&mut self) {}

    fn collect(&mut self) -> usize {
        self.scan().unwrap_or(0)
    }
}

impl Drop for PagemapScan {
    fn drop(&mut self) {
        let mut range = [self.start, self.bytes];
        let _ = uffd::request(&self.userfaultfd, UFFDIO_UNREGISTER, &mut range);
    }
}
