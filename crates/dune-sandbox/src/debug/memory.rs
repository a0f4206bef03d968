//! The program's memory as a debugger reads and writes it, and breakpoints.
//!
//! Reads are the guard's checked copies: what the program could read. Writes go
//! further: private memory that the program itself may not write (its code,
//! constants) is written too, through the host mapping, which is made writable
//! for the moment. The program's own page tables, and what it may do, do not
//! change; nothing but user memory can be reached. A page that lies over a file
//! becomes a copy, as by `MAP_PRIVATE`; shared memory that the program may not
//! write is not written either.

use linux_raw_sys::general::{__NR_mprotect, PROT_READ, PROT_WRITE};

use super::control::State;
use crate::calls::forward_always;
use crate::calls::memory::host_prot;
use crate::engine::Access;
use crate::host::Errno;
use crate::program::{Memory, Program};
use crate::range::{PAGE_SIZE, PageRange, UserRange};
use crate::user::{UserMemory, write_by_kernel};
use crate::vma::{Attributes, Sharing};

/// The instruction `int3`.
pub(crate) const INT3: u8 = 0xcc;

/// Fills `buffer` from `addr` as far as there is memory that can be read, and
/// returns how far; breakpoints are not seen.
///
/// # Errors
///
/// `EFAULT` if there is none at `addr`.
pub(crate) fn peek(
    program: &Program,
    state: &State,
    addr: u64,
    buffer: &mut [u8],
) -> Result<usize, Errno> {
    let memory = UserMemory::new(program.memory_lock(), program.pid());
    let mut done = 0;
    while done < buffer.len() {
        let at = addr.checked_add(done as u64).ok_or(Errno::EFAULT)?;
        let rest_of_page = (PAGE_SIZE - at % PAGE_SIZE) as usize;
        let end = done + rest_of_page.min(buffer.len() - done);
        match memory.read(at, &mut buffer[done..end]) {
            Ok(()) => done = end,
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    for (at, byte) in breakpoints_in(state, addr, done) {
        buffer[at] = byte;
    }
    Ok(done)
}

/// Stores `bytes` at `addr`; breakpoints among them stay.
///
/// # Errors
///
/// `EFAULT` where nothing is mapped, `EACCES` for shared memory that the
/// program may not write; what the host kernel says. Then a part may have been
/// written.
pub(crate) fn poke(
    program: &Program,
    state: &mut State,
    addr: u64,
    bytes: &[u8],
) -> Result<(), Errno> {
    let mut with_breakpoints = bytes.to_vec();
    for (at, _) in breakpoints_in(state, addr, bytes.len()) {
        with_breakpoints[at] = INT3;
    }
    write(program, addr, &with_breakpoints)?;
    for (index, &byte) in bytes.iter().enumerate() {
        if let Some(original) = state.breakpoints_mut().get_mut(&(addr + index as u64)) {
            *original = byte;
        }
    }
    Ok(())
}

/// Offsets into `len` bytes from `addr`, and what was there.
fn breakpoints_in(state: &State, addr: u64, len: usize) -> Vec<(usize, u8)> {
    state
        .breakpoints()
        .range(addr..addr.saturating_add(len as u64))
        .map(|(&at, &byte)| ((at - addr) as usize, byte))
        .collect()
}

/// Sets a breakpoint.
///
/// # Errors
///
/// As [`poke`]; `EACCES` for shared memory, which others would see.
pub(crate) fn set_breakpoint(program: &Program, state: &mut State, addr: u64) -> Result<(), Errno> {
    if state.breakpoints().contains_key(&addr) {
        return Ok(());
    }
    let area = program.memory().areas.find(addr).ok_or(Errno::EFAULT)?;
    if area.attributes.sharing == Sharing::Shared {
        return Err(Errno::EACCES);
    }
    let mut byte = [0];
    UserMemory::new(program.memory_lock(), program.pid()).read(addr, &mut byte)?;
    write(program, addr, &[INT3])?;
    state.breakpoints_mut().insert(addr, byte[0]);
    Ok(())
}

/// Removes a breakpoint. Returns whether there was one.
pub(crate) fn remove_breakpoint(program: &Program, state: &mut State, addr: u64) -> bool {
    let Some(byte) = state.breakpoints_mut().remove(&addr) else {
        return false;
    };
    let mut now = [0];
    let memory = UserMemory::new(program.memory_lock(), program.pid());
    // The program may have put something else there meanwhile, or nothing.
    if memory.read(addr, &mut now).is_ok() && now[0] == INT3 {
        let _ = write(program, addr, &[byte]);
    }
    true
}

/// Removes all breakpoints.
pub(crate) fn remove_breakpoints(program: &Program, state: &mut State) {
    let all: Vec<u64> = state.breakpoints().keys().copied().collect();
    for addr in all {
        remove_breakpoint(program, state, addr);
    }
}

/// Takes the breakpoints out of the memory of a child of `fork`, a copy. What
/// a child of `vfork` keeps account of does not hear of it: its parent keeps
/// them.
pub(crate) fn clean_child(program: &Program, state: &State) {
    let memory = program.memory_mut();
    for (&addr, &byte) in state.breakpoints() {
        // What is not there any more holds no breakpoint.
        let _ = write_in(program.pid(), &memory, addr, &[byte]);
    }
}

fn write(program: &Program, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    let range = UserRange::new(addr, bytes.len() as u64).ok_or(Errno::EFAULT)?;
    // Exclusively: the rights of the host's mapping change for a moment.
    let memory = program.memory_mut();
    memory.note_write(program.pid(), range)?;
    if let Some(pages) = PageRange::covering(range) {
        // Also where the program itself cannot write.
        memory.keep(program.pid(), pages)?;
    }
    write_in(program.pid(), &memory, addr, bytes)
}

fn write_in(pid: u32, memory: &Memory, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    let range = UserRange::new(addr, bytes.len() as u64).ok_or(Errno::EFAULT)?;
    if bytes.is_empty() {
        return Ok(());
    }
    let pages = PageRange::covering(range).ok_or(Errno::EFAULT)?;
    if !memory.areas.is_mapped(pages) {
        return Err(Errno::EFAULT);
    }
    for area in memory.areas.overlapping(pages) {
        let Some(part) = area.range.intersect(pages) else {
            continue;
        };
        let start = part.start().max(range.start());
        let end = part.end().min(range.end());
        let part_of_bytes = (start - addr) as usize..(end - addr) as usize;
        write_part(pid, part, area.attributes, start, &bytes[part_of_bytes])?;
    }
    Ok(())
}

/// Writes to pages of one area.
fn write_part(
    pid: u32,
    pages: PageRange,
    attributes: Attributes,
    addr: u64,
    bytes: &[u8],
) -> Result<(), Errno> {
    if attributes.effective_access().contains(Access::WRITE) {
        return write_by_kernel(pid, addr, bytes);
    }
    if attributes.sharing == Sharing::Shared {
        return Err(Errno::EACCES);
    }
    let protect = |prot: u64| {
        let args = [pages.start(), pages.len(), prot, 0, 0, 0];
        forward_always(__NR_mprotect, args)
    };
    protect(u64::from(PROT_READ | PROT_WRITE))?;
    let written = write_by_kernel(pid, addr, bytes);
    protect(host_prot(attributes.access))?;
    written
}
