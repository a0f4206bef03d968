//! Binding what the dynamic linker would bind at the first call.
//!
//! A library that was not linked with `-z now` finds the functions of others when it first
//! calls them, through tables of the dynamic linker that a compartment does not have. So the
//! copy of its variables that compartments get has all of them bound.
#![expect(unsafe_code, reason = "reads the dynamic section of loaded modules")]

use core::ffi::CStr;

use super::modules::Module;

const DT_PLTRELSZ: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_JMPREL: u64 = 23;
const R_X86_64_JUMP_SLOT: u64 = 7;
const SYMBOL_SIZE: u64 = 24;

#[repr(C)]
#[derive(Clone, Copy)]
struct Relocation {
    offset: u64,
    info: u64,
    addend: i64,
}

/// Every slot of a module that is to hold the address of a function, and that address.
pub(super) fn slots(module: &Module) -> Vec<(u64, u64)> {
    let Some(dynamic) = module.dynamic else {
        return Vec::new();
    };
    let (mut strings, mut symbols, mut relocations, mut bytes) = (0, 0, 0, 0);
    let mut at = dynamic as *const [u64; 2];
    loop {
        // SAFETY: the dynamic section of a loaded module, which ends with a null tag.
        let [tag, value] = unsafe { at.read() };
        let address = if value < module.base {
            module.base + value
        } else {
            value
        };
        match tag {
            0 => break,
            DT_STRTAB => strings = address,
            DT_SYMTAB => symbols = address,
            DT_JMPREL => relocations = address,
            DT_PLTRELSZ => bytes = value,
            _ => {}
        }
        at = at.wrapping_add(1);
    }
    if strings == 0 || symbols == 0 || relocations == 0 {
        return Vec::new();
    }
    let count = bytes as usize / size_of::<Relocation>();
    (0..count)
        .filter_map(|index| {
            // SAFETY: as many as the dynamic section says.
            let relocation = unsafe {
                (relocations as *const Relocation)
                    .wrapping_add(index)
                    .read()
            };
            if relocation.info & 0xffff_ffff != R_X86_64_JUMP_SLOT {
                return None;
            }
            let slot = module.base + relocation.offset;
            // SAFETY: a slot of the module's.
            let now = unsafe { (slot as *const u64).read() };
            // Bound slots lead elsewhere; what is the module's own function is its stub too.
            if !module.contains(now) {
                return None;
            }
            let symbol = symbols + (relocation.info >> 32) * SYMBOL_SIZE;
            // SAFETY: the symbol that the relocation names; its name's offset comes first.
            let name = strings + u64::from(unsafe { (symbol as *const u32).read() });
            // SAFETY: a string of the module's.
            let name = unsafe { CStr::from_ptr(name as *const _) };
            // SAFETY: a question.
            let function = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            (!function.is_null()).then_some((slot, function as u64))
        })
        .collect()
}
