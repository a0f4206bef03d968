//! Which pages did this computation write? The CPU knows: it marks them in the page tables,
//! at no cost to the computation.

use dune::memory::{Flush, PageSize, Pages, ProcessTables, Tlb};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune::enter()?;
    let tables = ProcessTables::get().ok_or("Dune mode was entered above")?;
    let tlb = Tlb::of_process();
    let pages = Pages::new(1024)?;
    let start = pages.range().start().as_u64();
    tables.split(pages.range(), PageSize::Size4KiB)?.apply(&tlb);

    let mut written = Vec::new();
    let collect = |written: &mut Vec<u64>| -> Result<(), Box<dyn std::error::Error>> {
        written.clear();
        let flush: Result<Flush, _> = tables.clear_dirty(pages.range(), |leaf| {
            written.push((leaf.va.as_u64() - start) / 4096)
        });
        match flush {
            Ok(flush) => flush.apply(&tlb),
            Err(failure) => return Err(failure.apply(&tlb).into()),
        }
        Ok(())
    };

    collect(&mut written)?; // from here on
    for n in [3_usize, 141, 59, 265] {
        assert!(pages.write(n * 4096 + 100, b"!"));
    }
    collect(&mut written)?;
    println!("pages written: {written:?}");
    Ok(())
}
