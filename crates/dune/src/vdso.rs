//! Clocks without the kernel's data pages.
//!
//! The vDSO's functions read the time from pages of the kernel (`[vvar]`), which not every
//! kernel lets KVM show to a guest. Where the guest cannot read them, it is given another
//! vDSO at the same addresses, in its own page tables only, whose functions make the system
//! call: correct, at the price of an exit.
#![expect(unsafe_code, reason = "reads the vDSO, and maps another in its place")]

use core::sync::atomic::{AtomicBool, Ordering};

use dune_kvm::sys::Errno;
use dune_loader::Vdso;
use dune_x86::addr::{GuestVirt, PageSize, VirtRange};
use dune_x86::paging::PteFlags;

use crate::arch;
use crate::error::EnterError;
use crate::machine::Machine;
use crate::memory::{Pages, ProcessTables, Tlb};
use crate::options::Options;

/// Where the vDSO and its data are in this process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    data: Option<u64>,
    image: Option<(u64, u64)>,
}

impl Place {
    pub(crate) fn in_maps(maps: &str) -> Self {
        let mut place = Self::default();
        for line in maps.lines() {
            let Some((start, end)) = crate::machine::parse_range(line) else {
                continue;
            };
            if line.ends_with("[vvar]") {
                place.data.get_or_insert(start);
            } else if line.ends_with("[vdso]") {
                place.image = Some((start, end));
            }
        }
        place
    }
}

/// The functions, and the numbers of the system calls that do the same.
const FUNCTIONS: [(&core::ffi::CStr, u32); 6] = [
    (c"__vdso_clock_gettime", 228),
    (c"__vdso_gettimeofday", 96),
    (c"__vdso_time", 201),
    (c"__vdso_clock_getres", 229),
    (c"__vdso_getcpu", 309),
    (c"__vdso_getrandom", 318),
];

static SETTLED: AtomicBool = AtomicBool::new(false);
/// Whether the guest reads the data pages.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// Whether code in Dune mode reads the kernel's data for clocks (`[vvar]`), so that the vDSO
/// answers there without a system call. False before the first entry.
#[must_use]
pub fn shows_clock_data() -> bool {
    SHOWN.load(Ordering::Acquire)
}

/// Looks, once in a process and from inside Dune mode, whether the guest reads the data
/// pages, and replaces the vDSO if not.
pub(crate) fn settle(machine: &Machine, options: &Options) -> Result<(), EnterError> {
    if SETTLED.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    let place = machine.vdso();
    let (Some(data), Some((start, end))) = (place.data, place.image) else {
        return Ok(());
    };
    let mut byte = 0_u8;
    // SAFETY: a fault ends the copy.
    let unreadable = unsafe { arch::dune_copy(&raw mut byte, data as *const u8, 1) } != 0;
    if !unreadable && !options.system_call_clocks {
        SHOWN.store(true, Ordering::Release);
        return Ok(());
    }
    replace(machine, start, end)
}

fn replace(machine: &Machine, start: u64, end: u64) -> Result<(), EnterError> {
    let no_memory = || EnterError::Memory(Errno::ENOMEM);
    let length = (end - start) as usize;
    // SAFETY: the kernel mapped the image there, readable, and never changes it.
    let mut image = unsafe { core::slice::from_raw_parts(start as *const u8, length) }.to_vec();
    if let Ok(vdso) = Vdso::parse(&image) {
        let places = FUNCTIONS.map(|(name, number)| (vdso.function(name), number));
        for (offset, number) in places {
            let Some(offset) = offset.map(|o| o as usize) else {
                continue;
            };
            let [a, b, c, d] = number.to_le_bytes();
            // mov eax, number; syscall; ret
            let code = [0xb8, a, b, c, d, 0x0f, 0x05, 0xc3];
            if let Some(entry) = image.get_mut(offset..offset + code.len()) {
                entry.copy_from_slice(&code);
            }
        }
    }
    let pages = Pages::new(Pages::needed(length))?;
    if !pages.write(0, &image) {
        return Err(no_memory());
    }
    let tables = ProcessTables::get().ok_or_else(no_memory)?;
    let range = VirtRange::try_new(GuestVirt::new_truncate(start), length as u64)
        .map_err(|_| no_memory())?;
    let tlb = Tlb::of_process();
    tables
        .split(range, PageSize::Size4KiB)
        .map_err(|_| no_memory())?
        .apply(&tlb);
    machine.cover(pages.range().start().as_u64(), length as u64)?;
    for (index, page) in range.pages(PageSize::Size4KiB).enumerate() {
        let from = pages.range().start().as_u64() + index as u64 * PageSize::Size4KiB.bytes();
        let to = tables
            .translate(GuestVirt::new_truncate(from))
            .ok_or_else(no_memory)?;
        let one = VirtRange::page(page, PageSize::Size4KiB);
        // SAFETY: no function of the vDSO runs between the two: threads of this process that
        // are in Dune mode by now came through here, and this one is here.
        let flush = unsafe { tables.unmap(one, |_| ()) };
        // SAFETY: the pages are given up to this mapping below.
        let mapped = unsafe { tables.map(one, to, PageSize::Size4KiB, PteFlags::RX) };
        match flush {
            Ok(flush) => flush.apply(&tlb),
            Err(failure) => drop(failure.apply(&tlb)),
        }
        mapped.map_err(|_| no_memory())?;
    }
    // The guest's for good.
    core::mem::forget(pages);
    Ok(())
}
