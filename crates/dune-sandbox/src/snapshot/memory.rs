//! The memory of a snapshot: what was written since, what was unmapped since.
//!
//! A snapshot copies nothing when it is taken. From then on:
//!
//! ```text
//!  first write to a page, by the program, by the guard, or by the host kernel
//!  for a call of the program           --> its contents are copied away (`saved`)
//!  its contents discarded (`madvise`)  --> likewise, or as unmapped
//!  unmapped, replaced, moved           --> the mapping itself is moved away (`aside`)
//!  rights changed, mapped              --> the table of areas tells
//! ```
//!
//! and to return is to unmap what is new, to move back what was moved away,
//! to give back the rights, and to copy back the saved pages. A saved page
//! stays in the list and can be written from then on: the next run that writes
//! to it pays for no fault, and each return for one copy.
//!
//! # Calls that wait
//!
//! What a call of the program may write to is saved before the host kernel gets
//! the call, as far as the program can write there itself, for so far the kernel
//! can. While the call waits, another thread may give the program more rights.
//! So the rest of what it may write to is remembered (`promised`), and saved by
//! the `mprotect` that makes it writable, if there are other threads.
//!
//! # Why not the dirty bits
//!
//! Dirty bits of the program's page tables say which pages of the list were
//! written in *this* run, and spare the copy of the others. But a bit has to be
//! looked at, cleared, and flushed from the TLB for every page that was
//! written, which costs as much as the copy (some 550 instructions for 4 KiB)
//! where most of the list is written in every run, as it is; and on a KVM that
//! shadows page tables there is no clearing them from outside. So the list is
//! kept short instead: pages that several returns in a row have found equal to
//! their copy go back under write protection.

use std::collections::BTreeMap;

use linux_raw_sys::general::{
    __NR_mmap, __NR_mprotect, __NR_mremap, __NR_munmap, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE,
    MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_NONE, PROT_READ, PROT_WRITE,
};

use super::ranges::Ranges;
use crate::calls::memory::{Space, host_prot};
use crate::calls::{forward_always, map_for_program};
use crate::engine::Access;
use crate::guard::Guard;
use crate::host::Errno;
use crate::program::Memory;
use crate::range::{PAGE_SIZE, PageRange, USER_HI};
use crate::user::{Page, copy_page_by_kernel, load_page, page_equals, store_page};
use crate::vma::{Area, Areas, Attributes, Backing, Sharing, effective};

/// Private mappings of files up to this size become anonymous memory with the
/// same contents when a snapshot is taken, for that can be copied back without
/// asking the kernel.
const MOST_DETACHED: u64 = 16 << 20;

/// Every so many returns, the saved pages are compared with their copies...
const LOOK_EVERY: u64 = 16;
/// ...where there are more than so many...
const FEW: usize = 32;
/// ...and those that were equal so often in a row are protected again.
const COLD: u8 = 2;

/// Bytes of mappings that may be set aside, for all snapshots together: half of
/// the guard's part of the address space. They may be more than the machine has
/// memory, for what is not touched costs none; and if they filled that part, the
/// host kernel would put the guard's next mapping, such as a thread's stack,
/// into the program's part.
const MOST_ASIDE: u64 = (ADDRESSES_END - USER_HI) / 2;

/// Ranges that are promised, one by one; if there are more, also what lies between
/// them.
const MOST_PROMISED: usize = 1024;

/// First address that no process has, with four levels of page tables.
const ADDRESSES_END: u64 = 1 << 47;

/// One snapshot's memory.
#[derive(Debug)]
pub(crate) struct Layer {
    /// What was mapped, and where it grew.
    areas: Areas,
    space: Space,
    /// Count of changes of the table when it last agreed with `areas`.
    seen: u64,
    /// Pages whose mapping is still the one of the snapshot, in its place.
    intact: Ranges,
    /// Contents of the pages that may have been written since, by address.
    saved: BTreeMap<u64, Saved>,
    /// Pages that calls may write to, but for the right to do so.
    promised: Ranges,
    /// Mappings of the snapshot that the program has given up since.
    aside: Vec<Aside>,
    /// Bytes in `aside`.
    aside_bytes: u64,
    returns: u64,
}

#[derive(Debug)]
struct Saved {
    contents: Box<Page>,
    /// How often in a row it was found unchanged.
    equal: u8,
}

#[derive(Clone, Copy, Debug)]
struct Aside {
    /// Where it belongs.
    range: PageRange,
    /// Where it is: an address of the guard.
    at: u64,
    attributes: Attributes,
}

/// What a return to a snapshot did to memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Pages copied back.
    pub pages: u64,
    /// Whether the program had changed what is mapped.
    pub remapped: bool,
}

/// All snapshots of a program, the latest last.
pub(crate) type Layers = Vec<Layer>;

fn is_tracked(attributes: &Attributes) -> bool {
    attributes.sharing == Sharing::Private
}

/// Whether the guard may access the memory itself: nobody else can take it
/// away.
fn is_direct(attributes: &Attributes) -> bool {
    attributes.sharing == Sharing::Private && attributes.backing != Backing::File
}

impl Layer {
    fn new(memory: &Memory) -> Self {
        let mut intact = Ranges::default();
        for area in memory.areas.iter() {
            intact.insert(area.range);
        }
        Self {
            areas: memory.areas.clone(),
            space: memory.space,
            seen: memory.areas.changes(),
            intact,
            saved: BTreeMap::new(),
            promised: Ranges::default(),
            aside: Vec::new(),
            aside_bytes: 0,
            returns: 0,
        }
    }

    /// Saves the pages of `range` that are the snapshot's, before somebody
    /// writes to them. Where the program cannot write, nobody does, yet.
    pub(crate) fn note(&mut self, now: &Areas, pid: u32, range: PageRange) {
        for area in now.overlapping(range) {
            let Some(part) = area.range.intersect(range) else {
                continue;
            };
            if !is_tracked(&area.attributes) {
                continue;
            }
            if area.attributes.access.contains(Access::WRITE) {
                self.save_all(pid, part, is_direct(&area.attributes));
            } else {
                self.promised.insert(part);
            }
        }
        if self.promised.len() > MOST_PROMISED {
            self.promised.fill_gaps();
        }
    }

    /// Saves what calls that wait may write to in `range`, before the program
    /// gains the right. Otherwise as [`Layer::keep`].
    ///
    /// # Errors
    ///
    /// Likewise.
    pub(crate) fn keep_promised(
        &mut self,
        now: &Areas,
        pid: u32,
        range: PageRange,
    ) -> Result<(), Errno> {
        for part in self.promised.parts_of(range) {
            self.keep(now, pid, part)?;
        }
        Ok(())
    }

    /// As [`Layer::note`], whatever rights the program has, before contents are
    /// discarded. The caller holds the memory's lock exclusively.
    ///
    /// # Errors
    ///
    /// What the host kernel said to the change of rights that this may need.
    pub(crate) fn keep(&mut self, now: &Areas, pid: u32, range: PageRange) -> Result<(), Errno> {
        for part in self.intact.parts_of(range) {
            for area in now.overlapping(part) {
                let Some(piece) = area.range.intersect(part) else {
                    continue;
                };
                if !is_tracked(&area.attributes) {
                    continue;
                }
                let access = area.attributes.access;
                let closed = !effective(access).contains(Access::READ);
                if closed {
                    protect_host(piece, u64::from(PROT_READ))?;
                }
                self.save_all(pid, piece, is_direct(&area.attributes));
                if closed {
                    protect_host(piece, host_prot(access))?;
                }
            }
        }
        Ok(())
    }

    /// Saves those pages of `part` that are the snapshot's; all of `part` can
    /// be read.
    fn save_all(&mut self, pid: u32, part: PageRange, direct: bool) {
        for page in (part.start()..part.end()).step_by(PAGE_SIZE as usize) {
            if !self.saved.contains_key(&page) && self.intact.contains(page) {
                self.save(pid, page, direct);
            }
        }
    }

    /// Saves a page that can be read; `direct` as by [`is_direct`].
    fn save(&mut self, pid: u32, page: u64, direct: bool) {
        let mut contents = Box::new([0; PAGE_SIZE as usize]);
        if direct {
            load_page(page, &mut contents);
        } else if copy_page_by_kernel(pid, page, &mut contents).is_err() {
            // What cannot be read (past the end of a file) cannot be written.
            return;
        }
        let saved = Saved { contents, equal: 0 };
        self.saved.insert(page, saved);
    }

    /// What may be admitted around the page of `addr`, where the access needs
    /// `needed`: the range, and whether it may be written without a look.
    pub(crate) fn admissible(
        &mut self,
        pid: u32,
        addr: u64,
        area: Area,
        needed: Access,
    ) -> Tracked {
        let page = addr & !(PAGE_SIZE - 1);
        let run = self.intact.run_around(addr);
        let run = run.and_then(|run| run.intersect(area.range));
        let range = run.unwrap_or(area.range);
        if !is_tracked(&area.attributes)
            || !area.attributes.access.contains(Access::WRITE)
            || !self.intact.contains(page)
        {
            return Tracked::Whole(range);
        }
        if needed == Access::WRITE && !self.saved.contains_key(&page) {
            self.save(pid, page, is_direct(&area.attributes));
        }
        if self.saved.contains_key(&page) {
            return Tracked::Whole(PageRange::new(page, PAGE_SIZE).unwrap_or(range));
        }
        // As far as there are only pages that nobody has written to.
        let start = self.saved.range(range.start()..page).next_back();
        let start = start.map_or(range.start(), |(&saved, _)| saved + PAGE_SIZE);
        let end = self.saved.range(page..range.end()).next();
        let end = end.map_or(range.end(), |(&saved, _)| saved);
        Tracked::ReadOnly(PageRange::new(start, end - start).unwrap_or(range))
    }

    /// Moves what is the snapshot's in `range` out of the program's reach,
    /// before the range is unmapped. Ring 3 has no access to it any more.
    /// Earlier snapshots keep `kept_below` bytes.
    ///
    /// # Errors
    ///
    /// `ENOMEM` for more than [`MOST_ASIDE`] in all; nothing was moved then. Or
    /// what the host kernel said; then a part may have been moved.
    fn set_aside(&mut self, now: &Areas, range: PageRange, kept_below: u64) -> Result<(), Errno> {
        let mut pieces = Vec::new();
        for part in self.intact.parts_of(range) {
            for area in now.overlapping(part) {
                let piece = area.range.intersect(part);
                pieces.extend(piece.map(|piece| (piece, area.attributes)));
            }
        }
        let bytes: u64 = pieces.iter().map(|(piece, _)| piece.len()).sum();
        if kept_below + self.aside_bytes + bytes > MOST_ASIDE {
            return Err(Errno::ENOMEM);
        }
        for (piece, attributes) in pieces {
            self.move_aside(piece, attributes)?;
        }
        Ok(())
    }

    fn move_aside(&mut self, piece: PageRange, attributes: Attributes) -> Result<(), Errno> {
        let len = piece.len();
        let at = reserve(len)?;
        match remap(piece.start(), len, at) {
            Ok(()) => {
                self.intact.remove(piece);
                self.aside_bytes += len;
                self.aside.push(Aside {
                    range: piece,
                    at,
                    attributes,
                });
                Ok(())
            }
            Err(errno) => {
                unmap_host(at, len)?;
                // One area of the table may be several mappings of the host,
                // which moves one at a time.
                let half = (len / 2).next_multiple_of(PAGE_SIZE);
                match (
                    PageRange::new(piece.start(), half),
                    PageRange::new(piece.start() + half, len - half),
                ) {
                    (Some(low), Some(high)) if errno == Errno::EFAULT && half < len => {
                        self.move_aside(low, attributes)?;
                        self.move_aside(high, attributes)
                    }
                    _ => Err(errno),
                }
            }
        }
    }

    /// Whether a page of `range` is the snapshot's.
    pub(crate) fn has_part_of(&self, range: PageRange) -> bool {
        !self.intact.parts_of(range).is_empty()
    }

    /// The parts of `range` that are the snapshot's.
    pub(crate) fn parts_of(&self, range: PageRange) -> Vec<PageRange> {
        self.intact.parts_of(range)
    }

    /// Gives up what `self` keeps in favour of `below`, the snapshot before
    /// it: the program goes on as it is.
    fn merge_into(self, below: &mut Self) -> Result<(), Errno> {
        for (page, saved) in self.saved {
            if below.intact.contains(page) {
                below.saved.entry(page).or_insert(saved);
            }
        }
        for aside in self.aside {
            for gap in below.intact.gaps_of(aside.range) {
                unmap_host(aside.at + (gap.start() - aside.range.start()), gap.len())?;
            }
            for part in below.intact.parts_of(aside.range) {
                below.aside.push(Aside {
                    range: part,
                    at: aside.at + (part.start() - aside.range.start()),
                    attributes: aside.attributes,
                });
                below.aside_bytes += part.len();
                below.intact.remove(part);
            }
        }
        Ok(())
    }
}

/// See [`Layer::admissible`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tracked {
    /// With all rights of the area.
    Whole(PageRange),
    /// Without the right to write.
    ReadOnly(PageRange),
}

/// As [`Layer::set_aside`], for the latest of `layers`.
///
/// # Errors
///
/// Likewise.
pub(crate) fn set_aside(layers: &mut Layers, now: &Areas, range: PageRange) -> Result<(), Errno> {
    let Some((top, below)) = layers.split_last_mut() else {
        return Ok(());
    };
    let kept_below = below.iter().map(|layer| layer.aside_bytes).sum();
    top.set_aside(now, range, kept_below)
}

/// Takes a snapshot of the memory.
///
/// Costs no copy of private memory: one walk over the areas, the first time a
/// copy of the writable private mappings of files, and the loss of every page
/// table entry that could be written.
///
/// # Errors
///
/// What the host kernel said; then there is no new snapshot.
pub(crate) fn push(guard: &mut Guard, memory: &mut Memory) -> Result<(), Errno> {
    if memory.layers.is_none() {
        detach_files(guard, memory)?;
    }
    for area in memory.areas.iter() {
        let writable = area.attributes.access.contains(Access::WRITE);
        if writable && is_tracked(&area.attributes) {
            protect_again(guard, area.range, area.attributes.access)?;
        }
    }
    let layer = Layer::new(memory);
    let layers = memory.layers.get_or_insert_default();
    layers
        .get_mut()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .push(layer);
    Ok(())
}

/// Takes the right to write away from ring 3, for the next write to be seen.
fn protect_again(guard: &mut Guard, range: PageRange, access: Access) -> Result<(), Errno> {
    guard.revoke(range)?;
    if guard.engine.needs_host_change() {
        protect_host(range, u64::from(PROT_NONE))?;
        protect_host(range, host_prot(access))?;
    }
    Ok(())
}

/// See [`MOST_DETACHED`].
fn detach_files(guard: &mut Guard, memory: &mut Memory) -> Result<(), Errno> {
    let files: Vec<Area> = memory
        .areas
        .iter()
        .filter(|area| {
            area.attributes.sharing == Sharing::Private
                && area.attributes.backing == Backing::File
                && area.attributes.access.contains(Access::WRITE)
                && area.range.len() <= MOST_DETACHED
        })
        .collect();
    for area in files {
        let mut contents = vec![0; area.range.len() as usize];
        let at = area.range.start();
        if crate::user::copy_by_kernel(guard.pid(), at, &mut contents).is_err() {
            // Longer than its file: it keeps that.
            continue;
        }
        guard.revoke(area.range)?;
        let flags = u64::from(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED);
        let prot = host_prot(area.attributes.access);
        map_for_program([at, area.range.len(), prot, flags, u64::MAX, 0])?;
        let (pages, _) = contents.as_chunks();
        for (page, bytes) in (at..).step_by(PAGE_SIZE as usize).zip(pages) {
            store_page(page, bytes);
        }
        let attributes = Attributes {
            backing: Backing::Anonymous,
            ..area.attributes
        };
        memory.areas.map(area.range, attributes);
    }
    Ok(())
}

/// Returns to the latest snapshot, which stays.
///
/// Costs a copy for each saved page; if what is mapped has changed, a few host
/// calls for each change.
///
/// # Errors
///
/// What the host kernel said; then the program cannot go on.
pub(crate) fn restore(guard: &mut Guard, memory: &mut Memory) -> Result<Restored, Errno> {
    let Some(layers) = memory.layers.take() else {
        return Ok(Restored::default());
    };
    let mut layers = layers
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let done = match layers.last_mut() {
        Some(layer) => restore_layer(guard, memory, layer),
        None => Ok(Restored::default()),
    };
    memory.layers = Some(std::sync::Mutex::new(layers));
    done
}

fn restore_layer(
    guard: &mut Guard,
    memory: &mut Memory,
    layer: &mut Layer,
) -> Result<Restored, Errno> {
    let remapped = memory.areas.changes() != layer.seen;
    let closing = if remapped {
        move_back(guard, memory, layer)?
    } else {
        Vec::new()
    };
    layer.returns += 1;
    // No call waits any more.
    layer.promised = Ranges::default();
    let mut pages = 0;
    let pid = guard.pid();
    // Where nothing was mapped anew, nothing was opened either.
    let is_closed = |area: Option<Area>| {
        !remapped && area.is_some_and(|area| !area.attributes.access.contains(Access::WRITE))
    };
    let mut closed = Vec::new();
    if layer.returns.is_multiple_of(LOOK_EVERY) && layer.saved.len() > FEW {
        pages += copy_back_what_differs(guard, layer, &is_closed, &mut closed)?;
    } else {
        let areas = &layer.areas;
        let mut area: Option<Area> = None;
        for (&page, saved) in &layer.saved {
            if area.is_none_or(|area| !area.range.contains(page)) {
                area = areas.find(page);
            }
            if is_closed(area) {
                closed.push(page);
                continue;
            }
            copy_back(pid, area, page, &saved.contents)?;
            pages += 1;
        }
    }
    for page in closed {
        copy_back_closed(guard, layer, page)?;
        pages += 1;
    }
    for (range, access) in closing {
        protect_host(range, u64::from(PROT_NONE))?;
        protect_host(range, host_prot(access))?;
        // Nobody writes there before the rights change again.
        let written: Vec<u64> = layer
            .saved
            .range(range.start()..range.end())
            .map(|(&page, _)| page)
            .collect();
        if !access.contains(Access::WRITE) {
            for page in written {
                layer.saved.remove(&page);
            }
        }
    }
    if remapped {
        memory.areas.return_to(&layer.areas);
        layer.seen = memory.areas.changes();
    }
    memory.space = layer.space;
    Ok(Restored { pages, remapped })
}

fn copy_back(pid: u32, area: Option<Area>, page: u64, contents: &Page) -> Result<(), Errno> {
    if area.is_some_and(|area| is_direct(&area.attributes)) {
        store_page(page, contents);
        return Ok(());
    }
    // Gone with the end of its file, if it fails: there was nothing to keep it.
    let _ = crate::user::write_by_kernel(pid, page, contents);
    Ok(())
}

/// Copies back a page that the program cannot write to: its contents were
/// discarded, or changed by a debugger. Nobody writes there before the rights change again.
fn copy_back_closed(guard: &mut Guard, layer: &mut Layer, page: u64) -> Result<(), Errno> {
    let area = layer.areas.find(page);
    let range = PageRange::new(page, PAGE_SIZE);
    let (Some(saved), Some(area), Some(range)) = (layer.saved.remove(&page), area, range) else {
        return Ok(());
    };
    guard.revoke(range)?;
    protect_host(range, u64::from(PROT_READ | PROT_WRITE))?;
    copy_back(guard.pid(), Some(area), page, &saved.contents)?;
    protect_host(range, u64::from(PROT_NONE))?;
    protect_host(range, host_prot(area.attributes.access))
}

/// Copies back as few pages as need be, and protects those again that nobody
/// writes to any more. Pages of areas that are closed go into `closed` instead.
fn copy_back_what_differs(
    guard: &mut Guard,
    layer: &mut Layer,
    is_closed: &impl Fn(Option<Area>) -> bool,
    closed: &mut Vec<u64>,
) -> Result<u64, Errno> {
    let pid = guard.pid();
    let mut pages = 0;
    let mut cold = Vec::new();
    for (&page, saved) in &mut layer.saved {
        let area = layer.areas.find(page);
        if is_closed(area) {
            closed.push(page);
            continue;
        }
        let direct = area.is_some_and(|area| is_direct(&area.attributes));
        if direct && page_equals(page, &saved.contents) {
            saved.equal += 1;
            if saved.equal >= COLD {
                cold.extend(area.map(|area| (page, area.attributes.access)));
            }
            continue;
        }
        saved.equal = 0;
        copy_back(pid, area, page, &saved.contents)?;
        pages += 1;
    }
    for (page, access) in cold {
        layer.saved.remove(&page);
        if let Some(range) = PageRange::new(page, PAGE_SIZE) {
            protect_again(guard, range, access)?;
        }
    }
    Ok(pages)
}

/// Gives the program the mappings of the snapshot again, all of them such that
/// saved pages can be copied back. Returns those whose rights have to be set
/// afterwards.
fn move_back(
    guard: &mut Guard,
    memory: &Memory,
    layer: &mut Layer,
) -> Result<Vec<(PageRange, Access)>, Errno> {
    let now: Vec<Area> = memory.areas.iter().collect();
    let mut rights = Vec::new();
    for area in now {
        for gap in layer.intact.gaps_of(area.range) {
            guard.revoke(gap)?;
            unmap_host(gap.start(), gap.len())?;
        }
        for part in layer.intact.parts_of(area.range) {
            rights.push((part, area.attributes.access));
        }
    }
    layer.aside_bytes = 0;
    for aside in layer.aside.drain(..) {
        remap(aside.at, aside.range.len(), aside.range.start())?;
        layer.intact.insert(aside.range);
        rights.push((aside.range, aside.attributes.access));
    }
    let mut closing = Vec::new();
    for (range, access) in rights {
        for area in layer.areas.overlapping(range) {
            let Some(piece) = area.range.intersect(range) else {
                continue;
            };
            let wanted = area.attributes.access;
            let saved = layer
                .saved
                .range(piece.start()..piece.end())
                .next()
                .is_some();
            if access == wanted && (!saved || wanted.contains(Access::WRITE)) {
                continue;
            }
            guard.revoke(piece)?;
            if saved {
                protect_host(piece, u64::from(PROT_READ | PROT_WRITE))?;
            }
            closing.push((piece, wanted));
        }
    }
    Ok(closing)
}

/// Forgets the latest snapshot; the program goes on as it is.
///
/// # Errors
///
/// What the host kernel said to the unmapping of what was kept.
pub(crate) fn pop(memory: &mut Memory) -> Result<(), Errno> {
    let Some(layers) = &mut memory.layers else {
        return Ok(());
    };
    let layers = layers
        .get_mut()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(top) = layers.pop() else {
        return Ok(());
    };
    match layers.last_mut() {
        Some(below) => top.merge_into(below),
        None => {
            memory.layers = None;
            for aside in top.aside {
                unmap_host(aside.at, aside.range.len())?;
            }
            Ok(())
        }
    }
}

/// Address space of the guard, with nothing in it.
fn reserve(len: u64) -> Result<u64, Errno> {
    let flags = u64::from(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
    let at = forward_always(
        __NR_mmap,
        [0, len, u64::from(PROT_NONE), flags, u64::MAX, 0],
    )?;
    if at < USER_HI {
        // The guard's part has no such hole; the program's must not be used.
        unmap_host(at, len)?;
        return Err(Errno::ENOMEM);
    }
    Ok(at)
}

fn remap(from: u64, len: u64, to: u64) -> Result<(), Errno> {
    let flags = u64::from(MREMAP_MAYMOVE | MREMAP_FIXED);
    forward_always(__NR_mremap, [from, len, len, flags, to, 0]).map(drop)
}

fn unmap_host(at: u64, len: u64) -> Result<(), Errno> {
    forward_always(__NR_munmap, [at, len, 0, 0, 0, 0]).map(drop)
}

fn protect_host(range: PageRange, prot: u64) -> Result<(), Errno> {
    forward_always(__NR_mprotect, [range.start(), range.len(), prot, 0, 0, 0]).map(drop)
}
