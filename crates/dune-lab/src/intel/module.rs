//! Kernel modules that load faster.
//!
//! Loading KVM takes Bochs four seconds, of which it spends three on looking up
//! each traceable function by name and on checking type information, for
//! tracers that nobody will run. The kernel finds both by the names of ELF
//! sections, and does without when they are not there.

use crate::kernel::{u16_at, u32_at, u64_at};

/// The functions that can be traced; the type information.
const UNWANTED: [&[u8]; 2] = [b"__mcount_loc\0", b".BTF\0"];

/// What the names of unwanted sections begin with instead.
const MARK: u8 = b'x';

/// Renames the unwanted sections of a module in place. They stay where they
/// are, because relocations refer to them. An image that is not understood is
/// left alone: it loads as well, only slower.
pub(super) fn lighten(image: &mut [u8]) {
    for at in unwanted_names(image).unwrap_or_default() {
        image[at] = MARK;
    }
}

/// Where the names of unwanted sections lie in the image.
fn unwanted_names(image: &[u8]) -> Option<Vec<usize>> {
    if image.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let table = usize::try_from(u64_at(image, 40)?).ok()?;
    let size = usize::from(u16_at(image, 58)?);
    let count = usize::from(u16_at(image, 60)?);
    let names_index = usize::from(u16_at(image, 62)?);
    let header = |index: usize| image.get(table.checked_add(index * size)?..);
    let names = usize::try_from(u64_at(header(names_index)?, 24)?).ok()?;
    let name_of = |index: usize| {
        let offset = usize::try_from(u32_at(header(index)?, 0)?).ok()?;
        let at = names.checked_add(offset)?;
        let name = image.get(at..)?;
        UNWANTED
            .iter()
            .any(|unwanted| name.starts_with(unwanted))
            .then_some(at)
    };
    Some((0..count).filter_map(name_of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file of three sections: none, `.BTF`, and the names.
    fn small_module() -> Vec<u8> {
        let mut image = vec![0; 64 + 3 * 64];
        image[..5].copy_from_slice(b"\x7fELF\x02");
        image[40] = 64;
        image[58] = 64;
        image[60] = 3;
        image[62] = 2;
        let names = image.len();
        image.extend_from_slice(b"\0.BTF\0.shstrtab\0.BTF_ids\0");
        image[64 + 64] = 1;
        image[64 + 128] = 6;
        let names_field = 64 + 128 + 24;
        image[names_field..names_field + 8].copy_from_slice(&(names as u64).to_le_bytes());
        image
    }

    #[test]
    fn unwanted_sections_lose_their_names() {
        let mut image = small_module();
        lighten(&mut image);
        let names = String::from_utf8_lossy(&image[256..]).into_owned();
        assert_eq!(names, "\0xBTF\0.shstrtab\0.BTF_ids\0");
    }

    #[test]
    fn broken_images_are_left_alone() {
        let image = small_module();
        for length in 0..image.len() {
            let mut short = image[..length].to_vec();
            lighten(&mut short);
        }
        for at in 0..256 {
            let mut broken = image.clone();
            broken[at] = 0xff;
            lighten(&mut broken);
        }
        let mut other = b"MZ, not ELF".to_vec();
        lighten(&mut other);
        assert_eq!(other, b"MZ, not ELF");
    }
}
