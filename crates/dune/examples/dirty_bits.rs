//! Which pages did this computation write? The CPU knows: it marks them in the page tables,
//! at no cost to the computation.
//!
//! The incremental copy of checkpoints and of live migration: a copy of some memory is kept up
//! to date by what the tracker reports, however many threads write meanwhile.

use std::sync::Arc;

use dune::dirty::Tracker;
use dune::memory::{PageSize, Pages};

const PAGES: usize = 1024;
const PAGE: usize = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune::enter()?;
    let pages = Arc::new(Pages::new(PAGES)?);
    let tracker = Tracker::start(pages.range())?;
    let mut copy = vec![0; PAGES * PAGE];

    let threads: Vec<_> = (1..=3_usize)
        .map(|number| {
            let pages = Arc::clone(&pages);
            std::thread::spawn(move || {
                for n in 0..100 {
                    assert!(pages.write((n * n * number) % PAGES * PAGE, &[number as u8]));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")?;
    }

    let written = tracker.collect()?;
    let start = pages.range().start().as_u64();
    for page in written.pages() {
        let at = (page.as_u64() - start) as usize;
        assert!(pages.read(at, &mut copy[at..at + PAGE]));
    }
    let runs = written.runs().count();
    println!("{} of {PAGES} pages copied, in {runs} runs", written.len());

    let mut all = vec![0; PAGES * PAGE];
    assert!(pages.read(0, &mut all));
    assert!(all == copy, "a write was missed");

    // What was merely looked at counts for the working set.
    let used = tracker.collect_accessed()?;
    println!("{} KiB used", used.bytes() / 1024);
    assert!(tracker.collect()?.is_empty(), "nothing was written since");
    for page in pages.range().pages(PageSize::Size4KiB).take(3) {
        assert!(used.contains(page));
    }
    Ok(())
}
