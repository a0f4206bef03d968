//! The process's memory map, read without allocating: what is mapped at an address, and
//! what may be done there. Either side.
#![expect(unsafe_code, reason = "open and read by raw system calls")]

use dune_kvm::sys::{self, nr};

bitflags::bitflags! {
    /// Rights of a mapping.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Rights: u8 {
        const READ = 1;
        const WRITE = 2;
        const EXECUTE = 4;
    }
}

/// The rights of the mapping that holds `address`; `None` where nothing is mapped or the map
/// cannot be read.
pub(crate) fn rights(address: u64) -> Option<Rights> {
    let mut found = None;
    read(|mapping| {
        if mapping.start <= address && address < mapping.end {
            found = Some(mapping.rights);
        }
        found.is_none() && mapping.start <= address
    });
    found
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) rights: Rights,
}

/// Shows every mapping in ascending order, until `visit` says `false`. Whether the map was
/// read to its end, or as far as was wanted.
pub(crate) fn read(mut visit: impl FnMut(Mapping) -> bool) -> bool {
    const AT_FDCWD: usize = -100_isize as usize;
    const O_CLOEXEC: usize = 0o2_000_000;
    let path = c"/proc/self/maps";
    // SAFETY: the path is a terminated string.
    let opened = unsafe {
        sys::call(
            nr::OPENAT,
            [AT_FDCWD, path.as_ptr() as usize, O_CLOEXEC, 0, 0, 0],
        )
    };
    let Ok(fd) = opened else { return false };
    let mut scan = Scan::new();
    let mut buffer = [0_u8; 2048];
    let complete = loop {
        // SAFETY: the kernel writes at most the length of the buffer.
        let read = unsafe {
            sys::call(
                nr::READ,
                [fd, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0],
            )
        };
        match read {
            Ok(0) => break true,
            Ok(length) => {
                let text = buffer.get(..length).unwrap_or(&[]);
                if !scan.feed(text, &mut visit) {
                    break true;
                }
            }
            Err(sys::Errno::EINTR) => {}
            Err(_) => break false,
        }
    };
    sys::close(fd as i32);
    complete
}

/// A scanner of the map's text that may be fed in any pieces.
struct Scan {
    field: Field,
    mapping: Mapping,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Start,
    End,
    Rights(u8),
    Rest,
}

impl Scan {
    const fn new() -> Self {
        let mapping = Mapping {
            start: 0,
            end: 0,
            rights: Rights::empty(),
        };
        Self {
            field: Field::Start,
            mapping,
        }
    }

    /// `false` as soon as `visit` says so.
    fn feed(&mut self, text: &[u8], visit: &mut impl FnMut(Mapping) -> bool) -> bool {
        for byte in text {
            let mapping = &mut self.mapping;
            match (self.field, byte) {
                (_, b'\n') => *self = Self::new(),
                (Field::Start, b'-') => self.field = Field::End,
                (Field::End, b' ') => self.field = Field::Rights(0),
                (Field::Start, digit) => mapping.start = mapping.start << 4 | hexadecimal(*digit),
                (Field::End, digit) => mapping.end = mapping.end << 4 | hexadecimal(*digit),
                (Field::Rights(at), letter) => {
                    mapping.rights |= match letter {
                        b'r' => Rights::READ,
                        b'w' => Rights::WRITE,
                        b'x' => Rights::EXECUTE,
                        _ => Rights::empty(),
                    };
                    self.field = if at < 2 {
                        Field::Rights(at + 1)
                    } else {
                        Field::Rest
                    };
                    if at == 2 && !visit(self.mapping) {
                        return false;
                    }
                }
                (Field::Rest, _) => {}
            }
        }
        true
    }
}

fn hexadecimal(digit: u8) -> u64 {
    match digit {
        b'0'..=b'9' => u64::from(digit - b'0'),
        b'a'..=b'f' => u64::from(digit - b'a') + 10,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
55d0c0000000-55d0c0002000 r-xp 00000000 08:01 123    /bin/a b-c
55d0c0003000-55d0c0004000 rw-p 00000000 00:00 0
7f0000000000-7f0000001000 ---p 00000000 00:00 0      [guard]
";

    fn ask(address: u64, piece: usize) -> Option<Rights> {
        let (mut scan, mut found) = (Scan::new(), None);
        for text in MAP.as_bytes().chunks(piece) {
            scan.feed(text, &mut |m| {
                if (m.start..m.end).contains(&address) {
                    found = Some(m.rights);
                }
                found.is_none()
            });
        }
        found
    }

    #[test]
    fn a_map_fed_in_any_pieces_gives_the_rights_of_an_address() {
        for piece in 1..MAP.len() {
            assert_eq!(
                ask(0x55d0_c000_1fff, piece),
                Some(Rights::READ | Rights::EXECUTE)
            );
            assert_eq!(ask(0x55d0_c000_2000, piece), None);
            assert_eq!(
                ask(0x55d0_c000_3000, piece),
                Some(Rights::READ | Rights::WRITE)
            );
            assert_eq!(ask(0x7f00_0000_0000, piece), Some(Rights::empty()));
            assert_eq!(ask(0, piece), None);
            assert_eq!(ask(u64::MAX, piece), None);
        }
    }

    #[test]
    fn the_process_itself_can_be_asked() {
        let local = 0_u8;
        let here = rights(&raw const local as u64).unwrap();
        assert!(here.contains(Rights::READ | Rights::WRITE));
        assert_eq!(rights(0), None);
    }
}
