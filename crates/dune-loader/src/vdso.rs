//! The functions of a vDSO: system calls that the kernel answers in user mode.
//!
//! A program under Dune gets no vDSO unless the caller passes the address of
//! one (see [`crate::AuxvInputs::vdso`]); libc then uses system calls. The
//! host's own vDSO lies in memory that the program could be shown, and who
//! answers its system calls may call the same functions: this module finds
//! them.
//!
//! ```text
//!  PT_DYNAMIC ─┬─> DT_GNU_HASH: hash of a name -> index ─┐
//!              ├─> DT_SYMTAB:   index -> name, offset <──┘
//!              ╰─> DT_STRTAB:   names
//! ```

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use object::LittleEndian;
use object::elf;
use object::pod::{Pod, from_bytes};
use thiserror::Error;

use crate::addr::UserAddr;
use crate::auxv::{AuxKey, parse_auxv};

const LE: LittleEndian = LittleEndian;

/// Why an image has no functions to be found.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the vDSO has no usable {0}; use system calls instead")]
pub struct VdsoError(&'static str);

/// The image of a vDSO.
///
/// # Examples
///
/// ```
/// use dune_loader::Vdso;
///
/// if let Some((base, image)) = Vdso::host_image()? {
///     let vdso = Vdso::parse(&image).expect("the kernel's own is sound");
///     let offset = vdso.function(c"__vdso_clock_gettime").expect("every x86-64 kernel has it");
///     println!("clock_gettime is at {}", base.checked_add(offset).unwrap());
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Vdso<'a> {
    image: &'a [u8],
    /// Address of the image's first byte, as its own tables count.
    link_base: u64,
    hash_table: usize,
    symbols: usize,
    names: usize,
}

impl<'a> Vdso<'a> {
    /// Finds the tables of an image.
    ///
    /// # Errors
    ///
    /// [`VdsoError`] with the part that is missing.
    pub fn parse(image: &'a [u8]) -> Result<Self, VdsoError> {
        let header: &elf::FileHeader64<LittleEndian> =
            pod_at(image, 0, 0).ok_or(VdsoError("file header"))?;
        if header.e_ident.magic != elf::ELFMAG || header.e_ident.class != elf::ELFCLASS64 {
            return Err(VdsoError("file header"));
        }
        let table = usize::try_from(header.e_phoff.get(LE)).unwrap_or(usize::MAX);
        let segment = |p_type: u32| {
            (0..header.e_phnum.get(LE))
                .map_while(|index| {
                    pod_at::<elf::ProgramHeader64<LittleEndian>>(image, table, index.into())
                })
                .find(|segment| segment.p_type.get(LE) == p_type)
        };
        let load = segment(elf::PT_LOAD).ok_or(VdsoError("PT_LOAD header"))?;
        let link_base = load.p_vaddr.get(LE).wrapping_sub(load.p_offset.get(LE));
        let within = |addr: u64| {
            usize::try_from(addr.wrapping_sub(link_base))
                .ok()
                .filter(|&at| at < image.len())
        };

        let dynamic = segment(elf::PT_DYNAMIC)
            .and_then(|segment| within(segment.p_vaddr.get(LE)))
            .ok_or(VdsoError("PT_DYNAMIC header"))?;
        let entry = |tag: i64| {
            (0..)
                .map_while(|index| pod_at::<elf::Dyn64<LittleEndian>>(image, dynamic, index))
                .take_while(|entry| entry.d_tag.get(LE) != elf::DT_NULL)
                .find(|entry| entry.d_tag.get(LE) == tag)
                .and_then(|entry| within(entry.d_val.get(LE)))
        };
        Ok(Self {
            image,
            link_base,
            hash_table: entry(elf::DT_GNU_HASH).ok_or(VdsoError("DT_GNU_HASH table"))?,
            symbols: entry(elf::DT_SYMTAB).ok_or(VdsoError("DT_SYMTAB table"))?,
            names: entry(elf::DT_STRTAB).ok_or(VdsoError("DT_STRTAB table"))?,
        })
    }

    /// The distance in bytes from the image's first byte to a function.
    #[must_use]
    pub fn function(&self, name: &CStr) -> Option<u64> {
        let symbol = self.candidates(name).find(|symbol| {
            let function = symbol.st_info & 0xf == elf::STT_FUNC;
            let defined = symbol.st_shndx.get(LE) != elf::SHN_UNDEF;
            function && defined && self.is_named(symbol, name)
        })?;
        let offset = symbol.st_value.get(LE).wrapping_sub(self.link_base);
        (offset < self.image.len() as u64).then_some(offset)
    }

    /// The symbols in the name's bucket of the hash table that have its hash.
    ///
    /// ```text
    ///  word 0        1                2             3            4
    ///  buckets: n    first symbol: s  bloom: b x 8  bloom shift  bloom, n buckets, chains
    /// ```
    ///
    /// A bucket is the index of its first symbol; the chain holds the hashes
    /// of the symbols from `s` on, with bit 0 set at the end of each bucket.
    fn candidates(&self, name: &CStr) -> impl Iterator<Item = &'a elf::Sym64<LittleEndian>> {
        let image = self.image;
        let hash = elf::gnu_hash(name.to_bytes());
        let (table, symbols) = (self.hash_table, self.symbols);
        let word = move |index: usize| -> Option<u32> {
            Some(pod_at::<object::U32<LittleEndian>>(image, table, index)?.get(LE))
        };
        let chain = || {
            let (buckets, first, bloom) = (word(0)?, word(1)? as usize, word(2)? as usize);
            let bucket_words = 4 + 2 * bloom;
            let start = word(bucket_words + hash.checked_rem(buckets)? as usize)? as usize;
            let chain_words = bucket_words + buckets as usize;
            Some((start, chain_words.checked_add(start.checked_sub(first)?)?))
        };
        let (start, chain) = chain().unzip();
        let mut ended = false;
        start
            .into_iter()
            .flat_map(|start| start..)
            .zip(chain.into_iter().flat_map(|chain| chain..))
            .map_while(move |(index, at)| {
                let found = word(at).filter(|_| !ended)?;
                ended = found & 1 != 0;
                Some((index, found))
            })
            .filter(move |(_, found)| found | 1 == hash | 1)
            .filter_map(move |(index, _)| pod_at(image, symbols, index))
    }

    fn is_named(&self, symbol: &elf::Sym64<LittleEndian>, name: &CStr) -> bool {
        let at = self.names.saturating_add(symbol.st_name.get(LE) as usize);
        self.image
            .get(at..)
            .is_some_and(|names| names.starts_with(name.to_bytes_with_nul()))
    }
}

impl Vdso<'_> {
    /// Address and bytes of the vDSO that the host kernel gave this process;
    /// `None` when it gave none.
    ///
    /// # Errors
    ///
    /// Those of reading `/proc/self`.
    pub fn host_image() -> io::Result<Option<(UserAddr, Vec<u8>)>> {
        let auxv = fs::read("/proc/self/auxv")?;
        let Some(base) = parse_auxv(&auxv)
            .find(|entry| entry.key == AuxKey::SYSINFO_EHDR)
            .and_then(|entry| UserAddr::new(entry.value).ok())
        else {
            return Ok(None);
        };
        let Some(len) = mapping_len(&fs::read_to_string("/proc/self/maps")?, base) else {
            return Ok(None);
        };
        let mut image = vec![0; len];
        File::open("/proc/self/mem")?.read_exact_at(&mut image, base.get())?;
        Ok(Some((base, image)))
    }
}

/// The length in bytes of the mapping that starts at `base`.
fn mapping_len(maps: &str, base: UserAddr) -> Option<usize> {
    let start = format!("{base:x}-");
    let rest = maps.lines().find_map(|line| line.strip_prefix(&start))?;
    let end = u64::from_str_radix(rest.split(' ').next()?, 16).ok()?;
    usize::try_from(end.checked_sub(base.get())?).ok()
}

/// The element `index` of a table at `offset`, if it lies in the image.
fn pod_at<T: Pod>(image: &[u8], offset: usize, index: usize) -> Option<&T> {
    let at = offset.checked_add(index.checked_mul(size_of::<T>())?)?;
    from_bytes(image.get(at..)?)
        .ok()
        .map(|(element, _)| element)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAMES: [&CStr; 4] = [
        c"__vdso_clock_gettime",
        c"__vdso_gettimeofday",
        c"__vdso_time",
        c"__vdso_getcpu",
    ];

    fn host_image() -> Option<Vec<u8>> {
        let image = Vdso::host_image().unwrap();
        if image.is_none() {
            eprintln!("ignored: the kernel gave this process no vDSO, so none was parsed");
        }
        image.map(|(_, bytes)| bytes)
    }

    #[test]
    fn the_host_s_functions_are_found() {
        let Some(image) = host_image() else { return };
        let vdso = Vdso::parse(&image).unwrap();
        let offsets = NAMES.map(|name| vdso.function(name).unwrap());
        assert!(offsets.iter().all(|&offset| offset > 0), "{offsets:x?}");
        for name in [
            c"",
            c"__vdso_clock_gettim",
            c"__vdso_clock_gettimes",
            c"LINUX_2.6",
        ] {
            assert_eq!(vdso.function(name), None, "{name:?}");
        }
    }

    #[test]
    fn what_is_no_vdso_is_an_error() {
        assert_eq!(Vdso::parse(&[]).unwrap_err(), VdsoError("file header"));
        assert_eq!(
            Vdso::parse(&[0; 4096]).unwrap_err(),
            VdsoError("file header")
        );
        let program = crate::test_elf::TestElf::new().bytes();
        assert_eq!(
            Vdso::parse(&program).unwrap_err(),
            VdsoError("PT_DYNAMIC header")
        );
    }

    #[test]
    fn mappings_are_measured() {
        let base = UserAddr::new(0x7fff_1000).unwrap();
        let maps = "7fff0000-7fff1000 r--p 0 [vvar]\n7fff1000-7fff3000 r-xp 0 [vdso]\n";
        assert_eq!(mapping_len(maps, base), Some(0x2000));
        assert_eq!(mapping_len("", base), None);
    }

    proptest! {
        #[test]
        fn damage_never_leads_out_of_the_image(
            damages in prop::collection::vec((0usize..0x400, any::<u8>()), 1..20),
            cut in 0usize..0x2000,
        ) {
            let Some(mut image) = host_image() else { return Ok(()) };
            for (at, value) in damages {
                image[at] = value;
            }
            image.truncate(cut.max(0x400));
            if let Ok(vdso) = Vdso::parse(&image) {
                for name in NAMES {
                    let offset = vdso.function(name);
                    prop_assert!(offset.is_none_or(|offset| offset < image.len() as u64));
                }
            }
        }
    }
}
