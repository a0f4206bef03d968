//! What every compartment sees of the program: taken once, when the runtime starts.
//!
//! Code and constants are the process's own pages. Variables are a copy of what they were at
//! that moment, which compartments share until they write to it. Three kinds of values in the
//! copy are replaced:
//!
//! * pointers to libc's allocator lead to the compartment's own ([`crate::inside::heap`]);
//! * functions that a library would have bound at their first call are bound;
//! * pointers into the kernel's vDSO, which a compartment does not have, lead to functions
//!   that make the system call, or are null, which libc takes for "there is none".
//!
//! And the environment, which may hold secrets and lies on the first thread's stack, is empty.

mod bind;
mod modules;
mod tls;

use core::ffi::CStr;
use std::sync::Arc;

use dune::memory::{AddressSpace, Pages, PteFlags, VirtRange, copy_shared};
use dune_x86::addr::GuestVirt;

use self::modules::Module;
use crate::error::StartError;
use crate::inside;
use crate::layout::page_of;

/// A copy of some of the process's variables.
#[derive(Debug)]
struct Variables {
    start: u64,
    end: u64,
    /// From here to there they are constants by now.
    constant: (u64, u64),
    copy: Pages,
}

/// The program as compartments see it.
#[derive(Debug)]
pub(crate) struct Image {
    template: Arc<AddressSpace>,
    /// The ranges that compartments borrow from the template: what one top-level entry each
    /// covers.
    borrowed: Vec<VirtRange>,
    variables: Vec<Variables>,
    thread: Option<(u64, Pages)>,
    names: Vec<(u64, u64, String)>,
}

impl Image {
    /// Takes the image. The thread must be in Dune mode, with a thread image taken outside.
    pub(crate) fn take(thread: Thread) -> Result<Self, StartError> {
        let modules = modules::loaded();
        let template = AddressSpace::empty()?;
        let mut copies = Vec::new();
        let mut names = Vec::new();
        for module in &modules {
            module.pin();
            for segment in &module.segments {
                names.push((segment.start, segment.end, name_of(module)));
                if segment.writable {
                    let constant = module.relro.unwrap_or((segment.start, segment.start));
                    copies.push(Copy::of(segment.start, segment.end, constant));
                } else {
                    let rights = if segment.executable {
                        PteFlags::RX
                    } else {
                        PteFlags::R
                    };
                    map_own(&template, segment.start, segment.end, rights)?;
                }
            }
        }
        for module in &modules {
            for (slot, function) in bind::slots(module) {
                set_word(&mut copies, slot, function);
            }
        }
        replace_pointers(&mut copies);
        if let Some(variable) = symbol(c"environ") {
            set_word(&mut copies, variable, inside::empty_environment());
        }
        set_byte(&mut copies, inside::mark(), 1);

        let mut variables = Vec::new();
        for copy in copies {
            variables.push(copy.settle(&template)?);
        }
        let thread = match thread.0 {
            image if image.bytes.is_empty() => None,
            image => Some((image.start, filled(&image.bytes)?)),
        };
        let mut borrowed: Vec<VirtRange> = Vec::new();
        for (start, _, _) in &names {
            let entry = VirtRange::page(
                GuestVirt::new_truncate(start & !((1 << 39) - 1)),
                dune::memory::PageSize::Size4KiB,
            );
            if !borrowed.contains(&entry) {
                borrowed.push(entry);
            }
        }
        Ok(Self {
            template: Arc::new(template),
            borrowed,
            variables,
            thread,
            names,
        })
    }

    /// Shows a compartment's address space the program.
    pub(crate) fn lend_to(&self, space: &mut AddressSpace) -> Result<(), dune::memory::SpaceError> {
        for range in &self.borrowed {
            space.borrow_from(&self.template, *range)?;
        }
        Ok(())
    }

    /// The initial thread-local variables: the address where they belong, the one where they
    /// are, and how many bytes.
    pub(crate) fn thread_pages(&self) -> Option<(u64, u64, u64)> {
        let (start, pages) = self.thread.as_ref()?;
        Some((*start, pages.range().start().as_u64(), pages.len() as u64))
    }

    /// Where the initial contents of a page are, if it is one that a compartment may change:
    /// variables of the program, or thread-local ones.
    pub(crate) fn original(&self, page: u64) -> Option<u64> {
        if let Some((start, pages)) = &self.thread
            && page >= *start
            && page - start < pages.len() as u64
        {
            return Some(pages.range().start().as_u64() + (page - start));
        }
        self.variables
            .iter()
            .find(|variables| (variables.start..variables.end).contains(&page))
            .filter(|variables| !(variables.constant.0..variables.constant.1).contains(&page))
            .map(|variables| variables.copy.range().start().as_u64() + (page - variables.start))
    }

    /// Which program or library an address is in.
    pub(crate) fn name_of(&self, address: u64) -> Option<&str> {
        self.names
            .iter()
            .find(|(start, end, _)| (*start..*end).contains(&address))
            .map(|(_, _, name)| name.as_str())
    }
}

fn name_of(module: &Module) -> String {
    if module.name.is_empty() {
        return "the program".to_owned();
    }
    let path = module.name.to_string_lossy();
    path.rsplit('/').next().unwrap_or(&path).to_owned()
}

/// Maps memory of the process where it is.
fn map_own(space: &AddressSpace, start: u64, end: u64, rights: PteFlags) -> Result<(), StartError> {
    let at = GuestVirt::new_truncate(start);
    let range = VirtRange::try_new(at, end - start).unwrap_or(VirtRange::empty_at(at));
    map_raw(space, range, start, rights)
}

#[expect(unsafe_code, reason = "shows ring 3 code and constants of the process")]
fn map_raw(
    space: &AddressSpace,
    range: VirtRange,
    memory: u64,
    rights: PteFlags,
) -> Result<(), StartError> {
    // SAFETY: read-only to ring 3; segments of modules that are loaded for good, or copies
    // that are never unmapped.
    unsafe { space.map_memory(range, memory, rights) }?;
    Ok(())
}

fn filled(bytes: &[u8]) -> Result<Pages, StartError> {
    let pages = Pages::new(Pages::needed(bytes.len()))?;
    // The pages were made for so many bytes.
    let _ = pages.write(0, bytes);
    Ok(pages)
}

/// What [`Image::take`] needs of a thread that has just begun. Taken before Dune mode is
/// entered, where a new thread is just a thread.
#[derive(Debug, Default)]
pub(crate) struct Thread(tls::ThreadImage);

impl Thread {
    pub(crate) fn take() -> Result<Self, StartError> {
        tls::take().map(Self).ok_or(StartError::ThreadLocals)
    }
}

/// Variables on their way into the image.
struct Copy {
    start: u64,
    constant: (u64, u64),
    bytes: Vec<u8>,
}

impl Copy {
    #[expect(unsafe_code, reason = "reads all variables of the process")]
    fn of(start: u64, end: u64, constant: (u64, u64)) -> Self {
        let mut bytes = vec![0; (end - start) as usize];
        // SAFETY: a writable segment of a loaded module. Other threads may change variables
        // meanwhile; what is copied then is the old value or the new one, or bytes of both.
        unsafe {
            copy_shared(start as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
        Self {
            start,
            constant,
            bytes,
        }
    }

    fn words(&mut self) -> impl Iterator<Item = &mut [u8; 8]> {
        self.bytes
            .chunks_exact_mut(8)
            .filter_map(|word| word.try_into().ok())
    }

    fn settle(self, template: &AddressSpace) -> Result<Variables, StartError> {
        let copy = filled(&self.bytes)?;
        let range = VirtRange::try_new(GuestVirt::new_truncate(self.start), copy.len() as u64)
            .unwrap_or(VirtRange::empty_at(GuestVirt::ZERO));
        map_raw(template, range, copy.range().start().as_u64(), PteFlags::R)?;
        Ok(Variables {
            start: self.start,
            end: self.start + copy.len() as u64,
            constant: self.constant,
            copy,
        })
    }
}

fn set_word(copies: &mut [Copy], address: u64, value: u64) {
    for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
        set_byte(copies, address + index as u64, byte);
    }
}

fn set_byte(copies: &mut [Copy], address: u64, value: u8) {
    for copy in copies {
        if let Some(byte) = address
            .checked_sub(copy.start)
            .and_then(|offset| copy.bytes.get_mut(offset as usize))
        {
            *byte = value;
            return;
        }
    }
}

/// Replaces the pointers that the module documentation names.
fn replace_pointers(copies: &mut [Copy]) {
    let mut replaced: Vec<(u64, u64)> = Vec::new();
    for (name, own) in inside::replacements() {
        if let Some(address) = symbol(name).filter(|address| *address != own) {
            replaced.push((address, own));
        }
    }
    replaced.sort_unstable();
    let vdso = vdso();
    for copy in copies {
        for word in copy.words() {
            let value = u64::from_le_bytes(*word);
            if let Ok(index) = replaced.binary_search_by_key(&value, |(from, _)| *from) {
                *word = replaced[index].1.to_le_bytes();
            } else if vdso.0 <= value && value < vdso.1 {
                *word = [0; 8];
            }
        }
    }
}

#[expect(unsafe_code, reason = "asks the dynamic linker")]
fn symbol(name: &CStr) -> Option<u64> {
    // SAFETY: a question.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) } as u64;
    (address != 0).then_some(address)
}

/// The kernel's code in this process.
fn vdso() -> (u64, u64) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines()
        .filter(|line| line.ends_with("[vdso]"))
        .find_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            Some((
                page_of(u64::from_str_radix(start, 16).ok()?),
                u64::from_str_radix(end, 16).ok()?,
            ))
        })
        .unwrap_or((0, 0))
}
