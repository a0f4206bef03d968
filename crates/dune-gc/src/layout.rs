//! How the heap is divided: blocks, pages, size classes.
//!
//! ```text
//! reservation  | segment 0           | segment 1                     | not mapped yet ...
//! blocks       | b0 | b1 | b2 | ...                       64 KiB each
//! a block      | cell 0 | cell 1 | ...                    all of one size class
//! ```
//!
//! An object larger than the largest class has blocks of its own.

/// Bytes of a block, and its alignment.
pub(crate) const BLOCK: usize = 1 << BLOCK_SHIFT;
pub(crate) const BLOCK_SHIFT: u32 = 16;
/// Bytes of a page, the unit of dirty bits.
pub(crate) const PAGE: usize = 1 << PAGE_SHIFT;
pub(crate) const PAGE_SHIFT: u32 = 12;
/// Pages of a block.
pub(crate) const BLOCK_PAGES: usize = BLOCK / PAGE;
/// Alignment of every object.
pub(crate) const GRANULE: usize = 16;
/// The largest size that shares blocks with others.
pub(crate) const SMALL_MAX: usize = 32768;
/// Words of a block's bitmap: a bit for each cell of the smallest class.
pub(crate) const BITMAP_WORDS: usize = BLOCK / GRANULE / 64;

/// Bytes of a cell of each size class. Beyond 256 the steps keep what is lost at the end of a
/// cell below a fifth, and the large ones divide a block without much of a rest.
pub(crate) const CELL_BYTES: [u32; CLASSES] = [
    16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 320, 384, 448, 512,
    640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096, 5456, 6544, 8192, 9360, 10912,
    13104, 16384, 21840, 32768,
];
pub(crate) const CLASSES: usize = 40;

/// The class of each size, in granules rounded up.
pub(crate) static CLASS_OF_GRANULES: [u8; SMALL_MAX / GRANULE + 1] = {
    let mut table = [0; SMALL_MAX / GRANULE + 1];
    let mut granules = 0;
    let mut class = 0;
    while granules <= SMALL_MAX / GRANULE {
        if granules * GRANULE > CELL_BYTES[class] as usize {
            class += 1;
        }
        table[granules] = class as u8;
        granules += 1;
    }
    table
};

/// The size class of an object, `None` where it gets blocks of its own.
#[inline]
pub(crate) fn class_of(bytes: usize) -> Option<usize> {
    // At most one more than fits, so that the sum cannot overflow.
    let granules = bytes.min(SMALL_MAX + 1).div_ceil(GRANULE);
    CLASS_OF_GRANULES
        .get(granules)
        .map(|class| usize::from(*class))
}

/// The factor with which [`cell_at`] divides by a cell's size.
pub(crate) const fn reciprocal(cell_bytes: u32) -> u32 {
    (1_u64 << 32).div_ceil(cell_bytes as u64) as u32
}

/// The number of the cell that holds the byte at `offset` of a block. Exact for each class:
/// the factor is too large by less than `cell_bytes / 2^32` of itself, so the product by less
/// than `2^16 * 2^15 / 2^32` of a cell.
#[inline]
pub(crate) fn cell_at(offset: usize, reciprocal: u32) -> u32 {
    ((offset as u64 * u64::from(reciprocal)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_the_sizes_that_are_mapped_to_it() {
        for bytes in 0..=SMALL_MAX {
            let class = class_of(bytes).unwrap();
            assert!(CELL_BYTES[class] as usize >= bytes);
            assert!(class == 0 || (CELL_BYTES[class - 1] as usize) < bytes.max(1));
        }
        assert_eq!(class_of(SMALL_MAX + 1), None);
        assert_eq!(class_of(usize::MAX), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "tries every offset of every class")]
    fn the_cell_of_an_offset_is_the_quotient() {
        for bytes in CELL_BYTES {
            let factor = reciprocal(bytes);
            for offset in 0..BLOCK {
                assert_eq!(cell_at(offset, factor), offset as u32 / bytes);
            }
        }
    }
}
