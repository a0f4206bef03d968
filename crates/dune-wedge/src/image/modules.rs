//! What the dynamic linker has loaded.
#![expect(
    unsafe_code,
    reason = "program headers, as the dynamic linker shows them"
)]

use core::ffi::{CStr, c_int, c_void};
use std::ffi::CString;

use crate::layout::{page_of, page_up};

/// A program or library.
#[derive(Debug, Clone)]
pub(crate) struct Module {
    pub(crate) name: CString,
    pub(crate) base: u64,
    pub(crate) segments: Vec<Segment>,
    /// Variables that are constants once relocated.
    pub(crate) relro: Option<(u64, u64)>,
    /// The dynamic section.
    pub(crate) dynamic: Option<u64>,
    /// Where the calling thread has the module's thread-local variables.
    pub(crate) thread_locals: Option<u64>,
}

/// A part of a module: whole pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
}

impl Module {
    pub(crate) fn contains(&self, address: u64) -> bool {
        self.segments
            .iter()
            .any(|segment| (segment.start..segment.end).contains(&address))
    }

    /// Keeps the module loaded for good.
    pub(crate) fn pin(&self) {
        let name = if self.name.is_empty() {
            core::ptr::null()
        } else {
            self.name.as_ptr()
        };
        // SAFETY: a module that is loaded; only its reference count changes. The handle is
        // meant to be leaked.
        let _ = unsafe {
            libc::dlopen(
                name,
                libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE,
            )
        };
    }
}

/// All modules but the kernel's own (the vDSO).
pub(crate) fn loaded() -> Vec<Module> {
    let mut modules: Vec<Module> = Vec::new();
    // SAFETY: the callback gets the vector, for the duration of the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut modules).cast::<c_void>()) };
    // SAFETY: a question.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    modules.retain(|module| vdso == 0 || !module.contains(vdso));
    modules
}

unsafe extern "C" fn visit(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    modules: *mut c_void,
) -> c_int {
    // SAFETY: what `loaded` passed.
    let modules = unsafe { &mut *modules.cast::<Vec<Module>>() };
    // SAFETY: the dynamic linker's structure, valid during the callback.
    let info = unsafe { &*info };
    // SAFETY: as above.
    let headers =
        unsafe { core::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let name = if info.dlpi_name.is_null() {
        CString::default()
    } else {
        // SAFETY: a C string of the dynamic linker's.
        unsafe { CStr::from_ptr(info.dlpi_name) }.to_owned()
    };
    let base = info.dlpi_addr;
    let mut module = Module {
        name,
        base,
        segments: Vec::new(),
        relro: None,
        dynamic: None,
        thread_locals: (!info.dlpi_tls_data.is_null()).then_some(info.dlpi_tls_data as u64),
    };
    for header in headers {
        let start = base + header.p_vaddr;
        let end = start + header.p_memsz;
        match header.p_type {
            libc::PT_LOAD => module.segments.push(Segment {
                start: page_of(start),
                end: page_up(end),
                writable: header.p_flags & libc::PF_W != 0,
                executable: header.p_flags & libc::PF_X != 0,
            }),
            // The dynamic linker protects whole pages only.
            libc::PT_GNU_RELRO => module.relro = Some((page_of(start), page_of(end))),
            libc::PT_DYNAMIC => module.dynamic = Some(start),
            _ => {}
        }
    }
    modules.push(module);
    0
}
