//! Looks through the memory of this process.

use core::ops::Range;
use std::fs::File;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;

/// How many of some needles are anywhere in writable memory that is there, except in a range.
/// The needles are given with every byte turned round, so that they are not found themselves.
pub(crate) fn find(turned: &[&[u8]], except: &Range<u64>) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let memory = File::open("/proc/self/mem").unwrap();
    let pages = File::open("/proc/self/pagemap").unwrap();
    let mut found = vec![false; turned.len()];
    // A page, and the end of the one before it. Overwritten at the end, so that the next
    // search does not find what this one has read.
    let mut buffer = vec![0_u8; 2 * PAGE as usize];
    let own = buffer.as_ptr() as u64;
    let own = own - PAGE..own + 3 * PAGE;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (start, end) = words.next().unwrap().split_once('-').unwrap();
        if !words.next().unwrap().starts_with("rw") || line.contains("/dev/kvm") {
            continue;
        }
        let range = u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap();
        let count = (range.end - range.start) / PAGE;
        let mut entries = vec![0; 8 * count as usize];
        pages
            .read_exact_at(&mut entries, range.start / PAGE * 8)
            .unwrap();
        buffer.fill(0);
        for (index, entry) in entries.chunks_exact(8).enumerate() {
            let page = range.start + index as u64 * PAGE;
            // Present, or in swap.
            let is_there = entry[7] & 0b1100_0000 != 0;
            if !is_there || except.contains(&page) || own.contains(&page) {
                buffer.fill(0);
                continue;
            }
            buffer.copy_within(PAGE as usize.., 0);
            if memory
                .read_exact_at(&mut buffer[PAGE as usize..], page)
                .is_err()
            {
                buffer.fill(0);
                continue;
            }
            for (needle, found) in turned.iter().zip(&mut found) {
                *found |= holds(&buffer, needle);
            }
        }
    }
    buffer.fill(0);
    std::hint::black_box(&mut buffer);
    found.into_iter().filter(|found| *found).count()
}

fn holds(buffer: &[u8], turned: &[u8]) -> bool {
    let first = !turned[0];
    buffer.windows(turned.len()).any(|window| {
        window[0] == first
            && window
                .iter()
                .zip(turned)
                .all(|(byte, turned)| *byte == !turned)
    })
}
