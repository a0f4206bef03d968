//! Clocks without a system call: a vDSO for the program.
//!
//! The kernel's functions (`[vdso]`) compute the time from the time-stamp
//! counter and from data that the kernel keeps up to date (`[vvar]`), which
//! they find right in front of themselves. The program gets the same:
//!
//! ```text
//!   user memory         as ring 3 sees it                    in the host process
//!   base                the kernel's data, for reading only  zeros, for reading only
//!   base + data_len     a copy of the kernel's functions     the same
//! ```
//!
//! So it is the one area that ring 3 sees other than the host process: the
//! kernel's data cannot be mapped twice. Nobody can write to it, the rights of
//! its pages cannot be extended, and it cannot be moved, so that a page's place
//! tells which page of the data it is. What it holds every process may read.
//!
//! Where the guest cannot read the data, or the kernel's clock is not the
//! time-stamp counter, there is no vDSO, and clocks are system calls; also
//! where somebody wants to see or answer the program's calls.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use dune_loader::Vdso;

use crate::calls::memory::map_anonymous;
use crate::engine::{Access, Engine};
use crate::guard::Guard;
use crate::host::Errno;
use crate::program::Memory;
use crate::range::{PAGE_SIZE, PageRange};
use crate::vma::{Area, Attributes, Backing, Sharing};

/// The kernel's data and functions, as this process has them.
#[derive(Debug)]
pub(crate) struct HostClock {
    /// Where the data are.
    pub(crate) data: u64,
    /// Bytes of data; the functions follow.
    pub(crate) data_len: u64,
    /// The functions, as the program gets them.
    image: Vec<u8>,
}

/// What this process has, asked once: a program that has given up its identity
/// may not read it any more.
pub(crate) fn host() -> Option<&'static HostClock> {
    static CLOCK: OnceLock<Option<HostClock>> = OnceLock::new();
    CLOCK.get_or_init(HostClock::find).as_ref()
}

/// Whether a program under `engine` can have a vDSO. Before it begins.
pub(crate) fn is_shown_by(engine: &mut dyn Engine) -> bool {
    host().is_some_and(|clock| engine.shows_clock(clock.data, clock.data_len))
}

impl HostClock {
    fn find() -> Option<Self> {
        /// The first time namespace's (`PROC_TIME_INIT_INO`). In another one the data
        /// are arranged differently.
        const FIRST_NAMESPACE: u64 = 0xefff_fffa;
        const CLOCK_SOURCE: &str =
            "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        if fs::metadata("/proc/self/ns/time").is_ok_and(|found| found.ino() != FIRST_NAMESPACE)
            || fs::read_to_string(CLOCK_SOURCE).ok()?.trim() != "tsc"
        {
            return None;
        }
        let (base, mut image) = Vdso::host_image().ok()??;
        let maps = fs::read_to_string("/proc/self/maps").ok()?;
        let data = data_before(&maps, base.get())?;
        replace_others(&mut image)?;
        Some(Self {
            data,
            data_len: base.get() - data,
            image,
        })
    }

    /// Bytes of user memory that the whole takes.
    pub(crate) fn len(&self) -> u64 {
        self.data_len + (self.image.len() as u64).next_multiple_of(PAGE_SIZE)
    }
}

/// The first address of the kernel's data, which end at `end`.
fn data_before(maps: &str, end: u64) -> Option<u64> {
    let mut lines = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let from = u64::from_str_radix(from, 16).ok()?;
        let to = u64::from_str_radix(to, 16).ok()?;
        rest.rsplit(' ')
            .next()?
            .starts_with("[vvar")
            .then_some((from, to))
    });
    let (start, mut reached) = lines.next()?;
    for (from, to) in lines {
        if from != reached {
            return None;
        }
        reached = to;
    }
    (reached == end).then_some(start)
}

/// Functions that ask more of the CPU than the guest's has, or keep state in
/// memory of a kind that there is not: they make the call, or are not there.
fn replace_others(image: &mut [u8]) -> Option<()> {
    /// `mov eax, 309; syscall; ret`
    const GETCPU: [u8; 8] = [0xb8, 0x35, 0x01, 0, 0, 0x0f, 0x05, 0xc3];
    /// `mov rax, -ENOSYS; ret`
    const NOT_THERE: [u8; 8] = [0x48, 0xc7, 0xc0, 0xda, 0xff, 0xff, 0xff, 0xc3];
    let vdso = Vdso::parse(image).ok()?;
    let others = [
        (vdso.function(c"__vdso_getcpu"), GETCPU),
        (vdso.function(c"__vdso_getrandom"), NOT_THERE),
        (vdso.function(c"__vdso_sgx_enter_enclave"), NOT_THERE),
    ];
    for (offset, code) in others {
        let Some(offset) = offset else { continue };
        let offset = usize::try_from(offset).ok()?;
        image
            .get_mut(offset..offset + code.len())?
            .copy_from_slice(&code);
    }
    Some(())
}

/// Maps data and functions at `base`, where nothing is mapped.
pub(crate) fn map(guard: &mut Guard, clock: &HostClock, base: u64) -> Result<(), Errno> {
    let pages = |start, len| PageRange::new(start, len).ok_or(Errno::ENOMEM);
    let data = pages(base, clock.data_len)?;
    let functions = pages(data.end(), clock.len() - clock.data_len)?;
    let writable = Access::READ | Access::WRITE;
    {
        let program = std::sync::Arc::clone(&guard.program);
        let mut memory = program.memory_mut();
        let attributes = Attributes {
            access: Access::READ,
            sharing: Sharing::Shared,
            backing: Backing::Clock,
        };
        map_anonymous(&mut memory, data, attributes)?;
        map_anonymous(&mut memory, functions, Attributes::anonymous(writable))?;
    }
    guard.memory().write(functions.start(), &clock.image)?;
    crate::calls::memory::set_access(guard, functions, Access::READ | Access::EXEC)
}

/// How far the first page of `area` lies in the data; `None` if it is not of
/// the data.
pub(crate) fn offset_of(memory: &Memory, area: Area) -> Option<u64> {
    let offset = area.range.start().checked_sub(memory.space.clock)?;
    let len = host()?.data_len;
    (area.attributes.backing == Backing::Clock
        && memory.space.clock != 0
        && offset + area.range.len() <= len)
        .then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_what_lies_right_before_the_functions() {
        let maps = "1000-2000 r--p 00000000 00:00 0   /lib/x\n\
                    7000-b000 r--p 00000000 00:00 0   [vvar]\n\
                    b000-d000 r--p 00000000 00:00 0   [vvar_vclock]\n\
                    d000-f000 r-xp 00000000 00:00 0   [vdso]\n";
        assert_eq!(data_before(maps, 0xd000), Some(0x7000));
        assert_eq!(data_before(maps, 0xe000), None);
        assert_eq!(data_before("", 0xd000), None);
        let apart = maps.replace("b000-d000", "c000-d000");
        assert_eq!(data_before(&apart, 0xd000), None);
    }

    #[test]
    fn functions_that_cannot_work_are_replaced() {
        let Some((_, mut image)) = Vdso::host_image().unwrap() else {
            return;
        };
        let before = image.clone();
        replace_others(&mut image).unwrap();
        let vdso = Vdso::parse(&image).unwrap();
        let at = vdso.function(c"__vdso_getcpu").unwrap() as usize;
        assert_eq!(image[at..at + 3], [0xb8, 0x35, 0x01]);
        let clock = vdso.function(c"__vdso_clock_gettime").unwrap() as usize;
        assert_eq!(image[clock..clock + 8], before[clock..clock + 8]);
    }
}
