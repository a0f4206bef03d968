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
    const AT_FDCWD: usize = -100_isize as usize;
    const O_CLOEXEC: usize = 0o2_000_000;
    let path = c"/proc/self/maps";
    // SAFETY: the path is a terminated string.
    let fd = unsafe {
        sys::call(
            nr::OPENAT,
            [AT_FDCWD, path.as_ptr() as usize, O_CLOEXEC, 0, 0, 0],
        )
    }
    .ok()?;
    let mut scan = Scan::new(address);
    let mut buffer = [0_u8; 2048];
    let found = loop {
        // SAFETY: the kernel writes at most the length of the buffer.
        let read = unsafe {
            sys::call(
                nr::READ,
                [fd, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0, 0],
            )
        };
        match read {
            Ok(length) if length > 0 => {
                if let Some(answer) = buffer.get(..length).and_then(|b| scan.feed(b)) {
                    break answer;
                }
            }
            _ => break None,
        }
    };
    sys::close(fd as i32);
    found
}

/// A scanner of the map's text that may be fed in any pieces.
struct Scan {
    wanted: u64,
    field: Field,
    start: u64,
    end: u64,
    rights: Rights,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Start,
    End,
    Rights(u8),
    Rest,
}

impl Scan {
    fn new(wanted: u64) -> Self {
        Self {
            wanted,
            field: Field::Start,
            start: 0,
            end: 0,
            rights: Rights::empty(),
        }
    }

    /// `Some` as soon as the answer is known.
    fn feed(&mut self, text: &[u8]) -> Option<Option<Rights>> {
        for byte in text {
            match (self.field, byte) {
                (_, b'\n') => *self = Self::new(self.wanted),
                (Field::Start, b'-') => self.field = Field::End,
                (Field::End, b' ') => {
                    if self.start > self.wanted {
                        return Some(None);
                    }
                    self.field = if self.wanted < self.end {
                        Field::Rights(0)
                    } else {
                        Field::Rest
                    };
                }
                (Field::Start, digit) => self.start = self.start << 4 | hexadecimal(*digit),
                (Field::End, digit) => self.end = self.end << 4 | hexadecimal(*digit),
                (Field::Rights(at), letter) => {
                    self.rights |= match letter {
                        b'r' => Rights::READ,
                        b'w' => Rights::WRITE,
                        b'x' => Rights::EXECUTE,
                        _ => Rights::empty(),
                    };
                    if at == 2 {
                        return Some(Some(self.rights));
                    }
                    self.field = Field::Rights(at + 1);
                }
                (Field::Rest, _) => {}
            }
        }
        None
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
        let mut scan = Scan::new(address);
        MAP.as_bytes()
            .chunks(piece)
            .find_map(|c| scan.feed(c))
            .flatten()
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
