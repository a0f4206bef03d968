//! Where the variables of the program and its libraries are.
#![expect(unsafe_code, reason = "dl_iterate_phdr, pthread_getattr_np")]

use core::ffi::c_void;
use core::mem::MaybeUninit;

/// Ranges of addresses, from and to.
pub(crate) type Ranges = Vec<(usize, usize)>;

/// The variables of the program and of every library that is loaded now, without what cannot
/// hold a pointer to an object: constants that the loader writes before the program begins
/// (`PT_GNU_RELRO`), and Dune's own tables.
pub(crate) fn variables() -> Ranges {
    let mut ranges = Ranges::new();
    let mut holes: Ranges = dune::own_tables()
        .map(|table| (table.start, table.end))
        .into();
    each_image(&mut |image| {
        for header in image.headers {
            let start = image.base + header.p_vaddr as usize;
            let range = (start, start + header.p_memsz as usize);
            match header.p_type {
                libc::PT_LOAD if header.p_flags & libc::PF_W != 0 => ranges.push(range),
                libc::PT_GNU_RELRO => holes.push(range),
                _ => {}
            }
        }
    });
    without(ranges, &holes)
}

/// The parts of ranges that lie in no hole.
fn without(mut ranges: Ranges, holes: &Ranges) -> Ranges {
    for &(from, to) in holes {
        let rest = |(start, end): (usize, usize)| {
            [(start, end.min(from)), (start.max(to), end)]
                .into_iter()
                .filter(|(start, end)| start < end)
        };
        ranges = ranges.into_iter().flat_map(rest).collect();
    }
    ranges
}

/// The calling thread's own variables, in so far as they lie before its control block, as
/// those of the program and of libraries loaded at the start do.
pub(crate) fn thread_variables() -> (usize, usize) {
    const MOST: usize = 1 << 20;
    // SAFETY: has no conditions. With glibc and musl on x86-64 it is the address of the
    // control block.
    let end = unsafe { libc::pthread_self() } as usize;
    let mut start = end;
    each_image(&mut |image| {
        let block = image.thread_variables;
        if block != 0 && (end.saturating_sub(MOST)..end).contains(&block) {
            start = start.min(block);
        }
    });
    (start, end)
}

/// The calling thread's stack, from and to.
pub(crate) fn stack() -> Option<(usize, usize)> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: has no conditions.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: initialises the attributes, or says that it did not.
    if unsafe { libc::pthread_getattr_np(this, attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    let (mut start, mut bytes) = (core::ptr::null_mut(), 0);
    // SAFETY: initialised above.
    let result =
        unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut start, &raw mut bytes) };
    // SAFETY: as above; not used any more.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    (result == 0).then_some((start as usize, start as usize + bytes))
}

struct Image<'a> {
    base: usize,
    headers: &'a [libc::Elf64_Phdr],
    /// Where the calling thread's copy of its thread-local variables is, or 0.
    thread_variables: usize,
}

type Visit<'a> = &'a mut dyn FnMut(&Image<'_>);

fn each_image(visit: Visit<'_>) {
    unsafe extern "C" fn callback(
        info: *mut libc::dl_phdr_info,
        _: libc::size_t,
        visit: *mut c_void,
    ) -> libc::c_int {
        // SAFETY: what the loader hands out.
        let info = unsafe { &*info };
        // SAFETY: the pointer that is passed below.
        let visit = unsafe { &mut *visit.cast::<Visit<'_>>() };
        let headers = if info.dlpi_phdr.is_null() {
            &[]
        } else {
            // SAFETY: as many as the loader says.
            unsafe { core::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) }
        };
        visit(&Image {
            base: info.dlpi_addr as usize,
            headers,
            thread_variables: info.dlpi_tls_data as usize,
        });
        0
    }
    let mut visit = visit;
    // SAFETY: the callback gets what it expects.
    unsafe { libc::dl_iterate_phdr(Some(callback), (&raw mut visit).cast()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        static OWN: Cell<usize> = const { Cell::new(1) };
    }

    fn own_variables_are_found() {
        let address = OWN.with(|own| core::ptr::from_ref(own) as usize);
        let (start, end) = thread_variables();
        assert!(
            (start..end).contains(&address),
            "{address:#x} is not in {start:#x}..{end:#x}"
        );
        let local = 0_u8;
        let (start, end) = stack().unwrap();
        assert!((start..end).contains(&(&raw const local as usize)));
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the loader, which Miri has not")]
    fn a_threads_variables_and_stack_are_found() {
        own_variables_are_found();
        std::thread::spawn(own_variables_are_found).join().unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the loader, which Miri has not")]
    fn the_programs_variables_are_found_and_constants_are_not() {
        static MUTABLE: core::sync::atomic::AtomicUsize = core::sync::atomic::AtomicUsize::new(7);
        // A pointer, which the loader writes.
        static CONSTANT: &[&str] = &["constant"];
        let is_found = |address: usize| {
            variables()
                .iter()
                .any(|(start, end)| (*start..*end).contains(&address))
        };
        assert!(is_found(&raw const MUTABLE as usize));
        assert!(!is_found(CONSTANT.as_ptr() as usize));
        for table in dune::own_tables() {
            assert!(!is_found(table.start) && !is_found(table.end - 1));
        }
    }

    #[test]
    fn holes_may_lie_anywhere() {
        let ranges = vec![(10, 20), (30, 40)];
        let of = |holes: &[(usize, usize)]| without(ranges.clone(), &holes.to_vec());
        assert_eq!(of(&[]), ranges);
        assert_eq!(of(&[(0, 10), (20, 30), (40, 50)]), ranges);
        assert_eq!(of(&[(12, 14), (13, 16)]), [(10, 12), (16, 20), (30, 40)]);
        assert_eq!(of(&[(5, 15), (35, 45)]), [(15, 20), (30, 35)]);
        assert_eq!(of(&[(15, 35)]), [(10, 15), (35, 40)]);
        assert_eq!(of(&[(0, 50)]), []);
    }
}
