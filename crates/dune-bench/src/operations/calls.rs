//! Operations of one thread: system calls, memory, signals.
#![expect(
    unsafe_code,
    reason = "system calls by number, memory, a signal handler"
)]

use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::meter::{Meter, ticks};

const PAGE: usize = 4096;
const MUCH: usize = 64 << 10;
/// Pages that a sample of the page fault touches.
const PAGES: u32 = 512;

fn last_error(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

/// A call for which nothing has to be done: `rseq` without an area. Linux refuses it, and so
/// does every guard, by itself.
pub(crate) fn null(meter: &Meter<'_>) -> Result<(), String> {
    meter.repeat(|| {
        // SAFETY: without an area it changes nothing.
        let result = unsafe { libc::syscall(libc::SYS_rseq, 0, 0, 0, 0) };
        if result == -1 {
            Ok(())
        } else {
            Err(format!("rseq without an area gave {result}"))
        }
    })
}

pub(crate) fn getppid(meter: &Meter<'_>) -> Result<(), String> {
    asked(meter, libc::SYS_getppid)
}

pub(crate) fn getpid(meter: &Meter<'_>) -> Result<(), String> {
    asked(meter, libc::SYS_getpid)
}

fn asked(meter: &Meter<'_>, number: libc::c_long) -> Result<(), String> {
    // SAFETY: takes no argument and changes nothing.
    let expected = unsafe { libc::syscall(number) };
    meter.repeat(|| {
        // SAFETY: as above.
        let result = unsafe { libc::syscall(number) };
        if result == expected && result >= 0 {
            Ok(())
        } else {
            Err(format!("call {number} gave {result}, first {expected}"))
        }
    })
}

/// The clock as libc reads it: by a system call only where there is no vDSO.
pub(crate) fn clock(meter: &Meter<'_>) -> Result<(), String> {
    let mut before = 0;
    meter.repeat(|| {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: libc writes the time.
        if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) } != 0 {
            return Err(last_error("clock_gettime"));
        }
        let now = time.tv_sec * 1_000_000_000 + time.tv_nsec;
        if now < core::mem::replace(&mut before, now) {
            return Err("the clock went backwards".to_owned());
        }
        Ok(())
    })
}

pub(crate) fn read_byte(meter: &Meter<'_>) -> Result<(), String> {
    read(meter, 1)
}

pub(crate) fn read_much(meter: &Meter<'_>) -> Result<(), String> {
    read(meter, MUCH)
}

/// Reads the start of this program's own file, which is cached and long enough.
fn read(meter: &Meter<'_>, length: usize) -> Result<(), String> {
    let file = File::open(own_file()?).map_err(|error| format!("open this program: {error}"))?;
    let mut buffer = vec![0; length];
    meter.repeat(|| match file.read_at(&mut buffer, 0) {
        Ok(count) if count == length => Ok(()),
        Ok(count) => Err(format!("read {count} bytes of {length}")),
        Err(error) => Err(format!("read: {error}")),
    })
}

pub(crate) fn write_byte(meter: &Meter<'_>) -> Result<(), String> {
    write(meter, 1)
}

pub(crate) fn write_much(meter: &Meter<'_>) -> Result<(), String> {
    write(meter, MUCH)
}

/// Writes the start of a file without a name, over and over.
fn write(meter: &Meter<'_>, length: usize) -> Result<(), String> {
    let (path, file) = new_file()?;
    fs::remove_file(&path).map_err(|error| format!("remove {}: {error}", path.display()))?;
    let buffer = vec![1; length];
    meter.repeat(|| match file.write_at(&buffer, 0) {
        Ok(count) if count == length => Ok(()),
        Ok(count) => Err(format!("wrote {count} bytes of {length}")),
        Err(error) => Err(format!("write: {error}")),
    })
}

/// A file of our own: where temporary files are, no other machine has to be asked.
fn new_file() -> Result<(PathBuf, File), String> {
    let path = std::env::temp_dir().join(format!("dune-operations-{}", std::process::id()));
    let file = OpenOptions::new().write(true).create_new(true).open(&path);
    file.map_err(|error| format!("make {}: {error}", path.display()))
        .map(|file| (path, file))
}

pub(crate) fn open_close(meter: &Meter<'_>) -> Result<(), String> {
    let (path, _file) = new_file()?;
    let name = CString::new(path.clone().into_os_string().into_vec())
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let outcome = meter.repeat(|| {
        // SAFETY: a string with its end.
        let file = unsafe { libc::open(name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        // SAFETY: a descriptor of our own, or -1.
        if unsafe { libc::close(file) } == 0 {
            Ok(())
        } else {
            Err(last_error("open and close"))
        }
    });
    fs::remove_file(&path).map_err(|error| format!("remove {}: {error}", path.display()))?;
    outcome
}

/// The path that this program was started by: `/proc` need not be there.
fn own_file() -> Result<PathBuf, String> {
    std::env::args_os()
        .next()
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .ok_or_else(|| "start this program by its absolute path".to_owned())
}

/// A page that is mapped, written and unmapped.
pub(crate) fn map_touch_unmap(meter: &Meter<'_>) -> Result<(), String> {
    meter.repeat(|| {
        let memory = map(PAGE)?;
        // SAFETY: the page was just mapped for writing.
        unsafe { memory.write_volatile(1) };
        unmap(memory, PAGE)
    })
}

/// The first touch of each of many pages; mapping and unmapping them is not counted.
pub(crate) fn page_fault(meter: &Meter<'_>) -> Result<(), String> {
    meter.batches(PAGES, |pages| {
        let length = pages as usize * PAGE;
        let memory = map(length)?;
        // SAFETY: our own new memory. A kernel without huge pages refuses, which is as good.
        unsafe { libc::madvise(memory.cast(), length, libc::MADV_NOHUGEPAGE) };
        let start = ticks();
        for offset in (0..length).step_by(PAGE) {
            // SAFETY: within the mapping.
            unsafe { memory.wrapping_add(offset).write_volatile(1) };
        }
        let taken = ticks() - start;
        unmap(memory, length).map(|()| taken)
    })
}

fn map(length: usize) -> Result<*mut u8, String> {
    // SAFETY: a new mapping where the kernel likes.
    let memory = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(last_error("mmap"));
    }
    Ok(memory.cast())
}

fn unmap(memory: *mut u8, length: usize) -> Result<(), String> {
    // SAFETY: what `map` mapped; nothing refers to it any more.
    if unsafe { libc::munmap(memory.cast(), length) } == 0 {
        Ok(())
    } else {
        Err(last_error("munmap"))
    }
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// A signal that a thread sends itself, its handler, and back.
pub(crate) fn signal(meter: &Meter<'_>) -> Result<(), String> {
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: the handler only counts.
    if unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) } == libc::SIG_ERR {
        return Err(last_error("signal"));
    }
    meter.repeat(|| {
        let before = HANDLED.load(Ordering::Relaxed);
        // SAFETY: the signal has a handler.
        unsafe { libc::raise(libc::SIGUSR1) };
        if HANDLED.load(Ordering::Relaxed) == before + 1 {
            Ok(())
        } else {
            Err("the handler did not run once".to_owned())
        }
    })
}
