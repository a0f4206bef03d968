//! Memory: `mmap`, `mprotect`, `munmap`, `mremap`, `brk`, `madvise`.
//!
//! The guard chooses every address, so the host kernel only ever gets
//! `MAP_FIXED` or `MAP_FIXED_NOREPLACE` inside the user's part. Order of
//! steps: see [`crate::engine`].
//!
//! Differences from Linux, all on the safe side: huge page mappings fail as if
//! none were reserved, `MAP_GROWSDOWN` mappings do not grow, `mprotect` over a
//! hole changes nothing, `mremap` neither duplicates nor leaves the old range.

use std::os::fd::RawFd;
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_madvise, __NR_memfd_create, __NR_mprotect, __NR_mremap, __NR_msync, __NR_munmap,
    MADV_COLD, MADV_COLLAPSE, MADV_DODUMP, MADV_DOFORK, MADV_DONTDUMP, MADV_DONTNEED, MADV_FREE,
    MADV_HUGEPAGE, MADV_KEEPONFORK, MADV_MERGEABLE, MADV_NOHUGEPAGE, MADV_NORMAL, MADV_PAGEOUT,
    MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_RANDOM, MADV_REMOVE, MADV_SEQUENTIAL,
    MADV_UNMERGEABLE, MADV_WILLNEED, MADV_WIPEONFORK, MAP_32BIT, MAP_ANONYMOUS, MAP_FIXED,
    MAP_FIXED_NOREPLACE, MAP_HUGETLB, MAP_LOCKED, MAP_NONBLOCK, MAP_NORESERVE, MAP_POPULATE,
    MAP_PRIVATE, MAP_SHARED, MAP_SHARED_VALIDATE, MAP_SYNC, MAP_TYPE, MFD_HUGETLB, MREMAP_FIXED,
    MREMAP_MAYMOVE, PROT_EXEC, PROT_NONE, PROT_READ, PROT_SEM, PROT_WRITE,
};

use crate::calls::opened::check_mapping;
use crate::calls::{forward, forward_always, map_for_program};
use crate::engine::Access;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::policy::Remedy;
use crate::program::{Memory, Program};
use crate::range::{PAGE_SIZE, PageRange, USER_LO, USER_TOP, UserRange};
use crate::table::Args;
use crate::user::{load_page, store_page};
use crate::vma::{Area, Attributes, Backing, Sharing, effective};

/// Where the program's memory grows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Space {
    /// First address of the heap, page-aligned.
    pub(crate) heap_start: u64,
    /// The program break, of any alignment.
    pub(crate) heap_end: u64,
    /// Mappings are placed downwards from here.
    pub(crate) mmap_top: u64,
    /// Where the kernel's data for clocks are shown; 0 for nowhere.
    pub(crate) clock: u64,
}

/// `MAP_32BIT` places a mapping below this.
const LOW_TOP: u64 = 0x8000_0000;

/// Flags of `mmap` that the host kernel may see as they are.
const PLAIN_FLAGS: u32 =
    MAP_ANONYMOUS | MAP_NORESERVE | MAP_POPULATE | MAP_NONBLOCK | MAP_LOCKED | MAP_SYNC;

/// The rights in a `prot` argument.
fn access_of(prot: u64) -> Result<Access, Errno> {
    if prot & !u64::from(PROT_READ | PROT_WRITE | PROT_EXEC | PROT_SEM) != 0 {
        return Err(Errno::EINVAL);
    }
    // PROT_READ, PROT_WRITE and PROT_EXEC are the bits of `Access`.
    Ok(Access::from_bits_truncate(prot as u8))
}

/// The rights of the host mapping: those that ring 3 has in effect, but never
/// the right to execute, which the host process needs for nothing.
pub(crate) fn host_prot(access: Access) -> u64 {
    u64::from((effective(access) - Access::EXEC).bits())
}

/// `len` rounded up to pages.
fn page_len(len: u64) -> Option<u64> {
    len.checked_next_multiple_of(PAGE_SIZE)
}

pub(crate) fn mmap(guard: &mut Guard, args: Args) -> SysResult {
    let [addr, len, prot, flags, fd, offset] = args;
    let flags = flags as u32;
    let access = access_of(prot)?;
    if len == 0 || !offset.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    let len = page_len(len).ok_or(Errno::ENOMEM)?;
    let sharing = match flags & MAP_TYPE {
        MAP_PRIVATE => Sharing::Private,
        MAP_SHARED | MAP_SHARED_VALIDATE => Sharing::Shared,
        _ => return Err(Errno::EINVAL),
    };
    let anonymous = flags & MAP_ANONYMOUS != 0;
    if flags & MAP_HUGETLB != 0 {
        return Err(Errno::ENOMEM);
    }
    let program = Arc::clone(&guard.program);
    // Nobody may put another file in the place of `fd` until it is mapped.
    let hidden = (!anonymous).then(|| program.hidden_fds_mut());
    if let Some(hidden) = &hidden {
        if hidden.binary_search(&(fd as RawFd)).is_ok() {
            return Err(Errno::EBADF);
        }
        check_mapping(fd, access.contains(Access::EXEC))?;
    }
    let mut memory = program.memory_mut();
    let range = choose(&memory, addr, len, flags)?;
    check_limit(&program, &memory, len, access)?;

    let place = if memory.areas.is_free(range) {
        MAP_FIXED_NOREPLACE
    } else {
        guard.revoke(range)?;
        memory.set_aside(range)?;
        MAP_FIXED
    };
    let host_flags = (flags & (PLAIN_FLAGS | MAP_TYPE)) | place;
    let args = [
        range.start(),
        len,
        host_prot(access),
        u64::from(host_flags),
        fd,
        offset,
    ];
    if let Err(errno) = map_for_program(args) {
        if place == MAP_FIXED {
            forget_if_gone(&mut memory, range);
        }
        return Err(errno);
    }
    let backing = if anonymous {
        Backing::Anonymous
    } else {
        Backing::File
    };
    memory.areas.map(
        range,
        Attributes {
            access,
            sharing,
            backing,
        },
    );
    guard.admit_ahead(&memory, range);
    Ok(range.start())
}

/// After a failed `MAP_FIXED` or move: the kernel may have unmapped what was
/// there before it failed. The table must not promise memory that is gone.
fn forget_if_gone(memory: &mut Memory, range: PageRange) {
    const MS_ASYNC: u64 = 1;
    let probe = [range.start(), range.len(), MS_ASYNC, 0, 0, 0];
    if memory.areas.is_mapped(range) && forward_always(__NR_msync, probe).is_ok() {
        return;
    }
    // The same pages, so this fails only if nothing is left to unmap.
    let _ = forward_always(__NR_munmap, [range.start(), range.len(), 0, 0, 0, 0]);
    memory.areas.unmap(range);
}

/// Where a mapping goes.
fn choose(memory: &Memory, addr: u64, len: u64, flags: u32) -> Result<PageRange, Errno> {
    if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) != 0 {
        if !addr.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        if addr < USER_LO {
            // As below vm.mmap_min_addr.
            return Err(Errno::EPERM);
        }
        let range = PageRange::new(addr, len).ok_or(Errno::ENOMEM)?;
        if flags & MAP_FIXED_NOREPLACE != 0 && !memory.areas.is_free(range) {
            return Err(Errno::EEXIST);
        }
        return Ok(range);
    }
    let hint = PageRange::new(addr & !(PAGE_SIZE - 1), len);
    if let Some(hint) = hint.filter(|hint| memory.areas.is_free(*hint)) {
        return Ok(hint);
    }
    let top = if flags & MAP_32BIT != 0 {
        LOW_TOP
    } else {
        memory.space.mmap_top
    };
    memory
        .areas
        .find_free(len, USER_LO, top)
        .or_else(|| memory.areas.find_free(len, USER_LO, USER_TOP))
        .ok_or(Errno::ENOMEM)
}

/// `ENOMEM` if `more` bytes exceed the program's limit.
pub(crate) fn check_limit(
    program: &Program,
    memory: &Memory,
    more: u64,
    access: Access,
) -> Result<(), Errno> {
    let limits = program.process().limits;
    limits.check_address_space(memory.areas.bytes(), more)?;
    if access.contains(Access::WRITE) {
        check_writable(program, memory, more)?;
    }
    Ok(())
}

/// `ENOMEM` if `more` writable bytes exceed what the policy gives: those that
/// can be written count, whoever else sees them, but for the main stack, which
/// has a limit of its own.
fn check_writable(program: &Program, memory: &Memory, more: u64) -> Result<(), Errno> {
    let policy = program.policy();
    let Some(limit) = policy.rules().limits.memory else {
        return Ok(());
    };
    let counts = |attributes: &Attributes| {
        attributes.access.contains(Access::WRITE) && attributes.backing != Backing::Stack
    };
    let used: u64 = memory
        .areas
        .iter()
        .filter(|area| counts(&area.attributes))
        .map(|area| area.range.len())
        .sum();
    match used.checked_add(more) {
        Some(sum) if sum <= limit => Ok(()),
        _ => {
            let request = "more memory".to_owned();
            Err(policy.refuse(request, Remedy::Memory, Errno::ENOMEM))
        }
    }
}

pub(crate) fn mprotect(guard: &mut Guard, args: Args) -> SysResult {
    let [addr, len, prot, ..] = args;
    let access = access_of(prot)?;
    if !addr.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    if len == 0 {
        return Ok(0);
    }
    let range = page_len(len)
        .and_then(|len| PageRange::new(addr, len))
        .ok_or(Errno::ENOMEM)?;
    let program = Arc::clone(&guard.program);
    let mut memory = program.memory_mut();
    if !memory.areas.is_mapped(range) {
        return Err(Errno::ENOMEM);
    }
    let is_clock = |area: Area| area.attributes.backing == Backing::Clock;
    if access != Access::READ && memory.areas.overlapping(range).any(is_clock) {
        return Err(Errno::EACCES);
    }
    // Area by area, so that a refusal half-way leaves the table true.
    let pieces: Vec<(PageRange, Access)> = memory
        .areas
        .overlapping(range)
        .filter_map(|area| Some((area.range.intersect(range)?, area.attributes.access)))
        .collect();
    if access.contains(Access::WRITE) {
        let gained = pieces
            .iter()
            .filter(|(_, old)| !old.contains(Access::WRITE));
        let gained: u64 = gained.map(|(piece, _)| piece.len()).sum();
        if gained > 0 {
            check_writable(&program, &memory, gained)?;
        }
    }
    for (piece, old) in pieces {
        if old == access {
            continue;
        }
        guard.revoke(piece)?;
        if !program.is_single() && !old.contains(Access::WRITE) && access.contains(Access::WRITE) {
            memory.keep_promised(program.pid(), piece)?;
        }
        protect_piece(&mut memory, piece, old, access)?;
        guard.admit_ahead(&memory, piece);
    }
    Ok(0)
}

fn protect_piece(
    memory: &mut Memory,
    piece: PageRange,
    old: Access,
    new: Access,
) -> Result<(), Errno> {
    let set =
        |prot: u64| forward_always(__NR_mprotect, [piece.start(), piece.len(), prot, 0, 0, 0]);
    let emptied = if (effective(old) - effective(new)) == Access::EXEC {
        // The host does not see that right: make it drop the pages' copies
        // in a shadowing KVM by taking everything first.
        set(u64::from(PROT_NONE))
    } else {
        Ok(0)
    };
    if let Err(errno) = emptied.and_then(|_| set(host_prot(new))) {
        // A part may have changed: the host knows several mappings where the
        // table has one area (`madvise` tells them apart), and goes through
        // them one by one. Undo it, so that no right in the table is missing
        // in the host.
        set(host_prot(old))?;
        return Err(errno);
    }
    memory.areas.protect(piece, new).map_err(|_| Errno::ENOMEM)
}

pub(crate) fn munmap(guard: &mut Guard, args: Args) -> SysResult {
    let [addr, len, ..] = args;
    if !addr.is_multiple_of(PAGE_SIZE) || len == 0 {
        return Err(Errno::EINVAL);
    }
    let range = page_len(len)
        .and_then(|len| PageRange::new(addr, len))
        .ok_or(Errno::EINVAL)?;
    let program = Arc::clone(&guard.program);
    unmap(guard, &mut program.memory_mut(), range)?;
    Ok(0)
}

/// Unmaps whatever is in `range`.
pub(crate) fn unmap(guard: &mut Guard, memory: &mut Memory, range: PageRange) -> Result<(), Errno> {
    if memory.areas.is_free(range) {
        return Ok(());
    }
    guard.revoke(range)?;
    memory.set_aside(range)?;
    forward_always(__NR_munmap, [range.start(), range.len(), 0, 0, 0, 0])?;
    memory.areas.unmap(range);
    Ok(())
}

pub(crate) fn mremap(guard: &mut Guard, args: Args) -> SysResult {
    let [addr, old_len, new_len, flags, new_addr, _] = args;
    let flags = flags as u32;
    if flags & !(MREMAP_MAYMOVE | MREMAP_FIXED) != 0
        || (flags & MREMAP_FIXED != 0 && flags & MREMAP_MAYMOVE == 0)
        || !addr.is_multiple_of(PAGE_SIZE)
    {
        return Err(Errno::EINVAL);
    }
    let pages = |start, len| page_len(len).and_then(|len| PageRange::new(start, len));
    let old = pages(addr, old_len).ok_or(Errno::EINVAL)?;
    let new_len = page_len(new_len)
        .filter(|&len| len != 0)
        .ok_or(Errno::EINVAL)?;
    let program = Arc::clone(&guard.program);
    let memory = &mut *program.memory_mut();
    let area = memory.areas.find(addr).ok_or(Errno::EFAULT)?;
    if old.end() > area.range.end() || area.attributes.backing == Backing::Clock {
        return Err(Errno::EFAULT);
    }
    let attributes = area.attributes;
    if new_len > old.len() {
        check_limit(&program, memory, new_len - old.len(), attributes.access)?;
    }

    let new = if flags & MREMAP_FIXED != 0 {
        let new = pages(new_addr, new_len).ok_or(Errno::EINVAL)?;
        if new.intersect(old).is_some() {
            return Err(Errno::EINVAL);
        }
        unmap(guard, memory, new)?;
        new
    } else {
        if new_len <= old.len() {
            if let Some(tail) = PageRange::new(old.start() + new_len, old.len() - new_len) {
                unmap(guard, memory, tail)?;
            }
            return Ok(old.start());
        }
        let grown = PageRange::new(old.start(), new_len);
        let next = PageRange::new(old.end(), new_len - old.len());
        if let (Some(grown), Some(next)) = (grown, next)
            && memory.areas.is_free(next)
        {
            let in_place = [old.start(), old.len(), new_len, 0, 0, 0];
            if forward_always(__NR_mremap, in_place).is_ok() {
                memory.areas.map(grown, attributes);
                return Ok(grown.start());
            }
        }
        if flags & MREMAP_MAYMOVE == 0 {
            return Err(Errno::ENOMEM);
        }
        memory
            .areas
            .find_free(new_len, USER_LO, memory.space.mmap_top)
            .ok_or(Errno::ENOMEM)?
    };
    // What the kernel would do first, and would not undo if the move failed.
    let old = match PageRange::new(old.start() + new_len, old.len().saturating_sub(new_len)) {
        Some(tail) => {
            unmap(guard, memory, tail)?;
            PageRange::new(old.start(), new_len).ok_or(Errno::EINVAL)?
        }
        None => old,
    };
    if memory.is_in_snapshot(old) {
        return move_by_copy(guard, memory, old, new, attributes);
    }
    guard.revoke(old)?;
    let moving = u64::from(MREMAP_MAYMOVE | MREMAP_FIXED);
    let args = [old.start(), old.len(), new_len, moving, new.start(), 0];
    if let Err(errno) = forward_always(__NR_mremap, args) {
        // Kernels since 6.17 move mapping by mapping, and may have moved some.
        let _ = forward_always(__NR_munmap, [new.start(), new.len(), 0, 0, 0, 0]);
        forget_if_gone(memory, old);
        return Err(errno);
    }
    memory.areas.unmap(old);
    memory.areas.map(new, attributes);
    Ok(new.start())
}

/// Moves memory of which a snapshot needs the old place: a copy goes to the
/// program. Only memory that is the program's alone can be copied.
fn move_by_copy(
    guard: &mut Guard,
    memory: &mut Memory,
    old: PageRange,
    new: PageRange,
    attributes: Attributes,
) -> SysResult {
    let plain = attributes.sharing == Sharing::Private && attributes.backing != Backing::File;
    let access = attributes.access;
    if !plain || !effective(access).contains(Access::READ) {
        return Err(Errno::ENOMEM);
    }
    let writable = access | Access::READ | Access::WRITE;
    map_anonymous(
        memory,
        new,
        Attributes {
            access: writable,
            ..attributes
        },
    )?;
    let pages = (old.start()..old.end()).step_by(PAGE_SIZE as usize);
    let mut contents = [0; PAGE_SIZE as usize];
    for (from, to) in pages.zip((new.start()..).step_by(PAGE_SIZE as usize)) {
        load_page(from, &mut contents);
        // What was never touched stays so.
        if contents.iter().any(|&byte| byte != 0) {
            store_page(to, &contents);
        }
    }
    if writable != access {
        protect_piece(memory, new, writable, access)?;
    }
    unmap(guard, memory, old)?;
    Ok(new.start())
}

/// Returns the break in force, new or old: the kernel's `brk` never fails.
pub(crate) fn brk(guard: &mut Guard, args: Args) -> SysResult {
    let [wanted, ..] = args;
    let program = Arc::clone(&guard.program);
    let memory = &mut *program.memory_mut();
    let Space {
        heap_start,
        heap_end,
        ..
    } = memory.space;
    if wanted < heap_start || wanted >= USER_TOP {
        return Ok(heap_end);
    }
    let old_top = heap_end.next_multiple_of(PAGE_SIZE);
    let new_top = wanted.next_multiple_of(PAGE_SIZE);
    let done = if new_top > old_top {
        let grown = grow_heap(&program, memory, old_top, new_top - old_top);
        if let (Ok(()), Some(new)) = (grown, PageRange::new(old_top, new_top - old_top)) {
            guard.admit_ahead(memory, new);
        }
        grown
    } else {
        match PageRange::new(new_top, old_top - new_top) {
            Some(tail) => unmap(guard, memory, tail),
            None => Ok(()),
        }
    };
    if done.is_ok() {
        memory.space.heap_end = wanted;
    }
    Ok(memory.space.heap_end)
}

fn grow_heap(program: &Program, memory: &mut Memory, at: u64, len: u64) -> Result<(), Errno> {
    let range = PageRange::new(at, len).ok_or(Errno::ENOMEM)?;
    if !memory.areas.is_free(range) {
        return Err(Errno::ENOMEM);
    }
    let access = Access::READ | Access::WRITE;
    check_limit(program, memory, len, access)?;
    map_anonymous(
        memory,
        range,
        Attributes {
            backing: Backing::Heap,
            ..Attributes::anonymous(access)
        },
    )
}

/// Maps fresh private memory where nothing is mapped.
pub(crate) fn map_anonymous(
    memory: &mut Memory,
    range: PageRange,
    attributes: Attributes,
) -> Result<(), Errno> {
    let flags = u64::from(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE);
    let prot = host_prot(attributes.access);
    map_for_program([range.start(), range.len(), prot, flags, u64::MAX, 0])?;
    memory.areas.map(range, attributes);
    Ok(())
}

/// Maps a piece of a file privately where nothing is mapped.
pub(crate) fn map_file(
    memory: &mut Memory,
    range: PageRange,
    access: Access,
    fd: RawFd,
    offset: u64,
) -> Result<(), Errno> {
    let flags = u64::from(MAP_PRIVATE | MAP_FIXED_NOREPLACE);
    let prot = host_prot(access);
    map_for_program([range.start(), range.len(), prot, flags, fd as u64, offset])?;
    let attributes = Attributes {
        access,
        sharing: Sharing::Private,
        backing: Backing::File,
    };
    memory.areas.map(range, attributes);
    Ok(())
}

/// Before the contents of `range` go: keeps what a snapshot needs of it. Memory
/// without a file gives way to fresh memory, which has nothing to be discarded.
fn keep_before_discarding(guard: &mut Guard, range: PageRange) -> Result<(), Errno> {
    let program = Arc::clone(&guard.program);
    let mut memory = program.memory_mut();
    let Some(parts) = memory.with_top(|top| top.parts_of(range)) else {
        return Ok(());
    };
    for part in parts {
        let areas: Vec<_> = memory.areas.overlapping(part).collect();
        for area in areas {
            let Some(piece) = area.range.intersect(part) else {
                continue;
            };
            match (area.attributes.sharing, area.attributes.backing) {
                (Sharing::Shared, _) => {}
                (Sharing::Private, Backing::File) => memory.keep(program.pid(), piece)?,
                (Sharing::Private, _) => {
                    unmap(guard, &mut memory, piece)?;
                    map_anonymous(&mut memory, piece, area.attributes)?;
                }
            }
        }
    }
    Ok(())
}

/// Sets the rights of pages that are mapped.
pub(crate) fn set_access(guard: &mut Guard, range: PageRange, access: Access) -> Result<(), Errno> {
    let prot = u64::from(access.bits());
    mprotect(guard, [range.start(), range.len(), prot, 0, 0, 0]).map(drop)
}

/// The arguments are the guard's copy of the name, and flags.
pub(crate) fn memfd_create(_guard: &mut Guard, args: Args) -> SysResult {
    // The areas have pages of 4 KiB; as a kernel without huge pages.
    if args[1] & u64::from(MFD_HUGETLB) != 0 {
        return Err(Errno::EINVAL);
    }
    forward(__NR_memfd_create, args)
}

pub(crate) fn madvise(guard: &mut Guard, args: Args) -> SysResult {
    let [addr, len, advice, ..] = args;
    let advice = advice as u32;
    // Not MADV_DONTFORK: the child's table would promise memory that is not there.
    let known = matches!(
        advice,
        MADV_NORMAL
            | MADV_RANDOM
            | MADV_SEQUENTIAL
            | MADV_WILLNEED
            | MADV_DONTNEED
            | MADV_FREE
            | MADV_REMOVE
            | MADV_DOFORK
            | MADV_MERGEABLE
            | MADV_UNMERGEABLE
            | MADV_HUGEPAGE
            | MADV_NOHUGEPAGE
            | MADV_DONTDUMP
            | MADV_DODUMP
            | MADV_WIPEONFORK
            | MADV_KEEPONFORK
            | MADV_COLD
            | MADV_PAGEOUT
            | MADV_POPULATE_READ
            | MADV_POPULATE_WRITE
            | MADV_COLLAPSE
    );
    if !known || !addr.is_multiple_of(PAGE_SIZE) {
        return Err(Errno::EINVAL);
    }
    if len == 0 {
        return Ok(0);
    }
    let len = page_len(len).ok_or(Errno::EINVAL)?;
    let range = UserRange::new(addr, len)
        .and_then(PageRange::covering)
        .ok_or(Errno::ENOMEM)?;
    if matches!(advice, MADV_DONTNEED | MADV_FREE | MADV_REMOVE) {
        keep_before_discarding(guard, range)?;
    }
    // Rights do not change, only contents: page tables stay as they are.
    forward_always(
        __NR_madvise,
        [range.start(), range.len(), u64::from(advice), 0, 0, 0],
    )
}
