//! Compartments, and what else keeps parts of a program apart: processes, threads (which do
//! not, and are the floor), and protection keys.
#![expect(unsafe_code, reason = "processes, threads and protection keys by hand")]

use core::ffi::{CStr, c_void};
use core::ptr;
use std::ffi::CString;
use std::path::PathBuf;

use dune_wedge::{Compartment, Gate};

use super::{Bench, Crossing, Way, http};
use crate::clock;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, Row};

const BATCH: u32 = 16;
/// A twentieth of a thread, which is less than a hundredth of a process.
const CREATE: f64 = 2_900.0;
const FORK: &str = "fork";
const THREAD: &str = "pthread";
const SPAWN: &str = "posix_spawn";
const KEY: &str = "pkey";

pub(super) const CROSSINGS: &[Crossing] = &[
    Crossing {
        id: "create-run-join",
        label: "make a compartment, run an empty function, end it (Linux: fork, exit, wait)",
        aim: Some(CREATE),
        linux: Some(create_linux),
        dune: Way::Inside(create),
    },
    Crossing {
        id: "create-cold",
        label: "as create-run-join, 128 at a time, with nothing left of earlier ones",
        aim: None,
        linux: Some(create_cold_linux),
        dune: Way::Inside(create_cold),
    },
    Crossing {
        id: "recycled",
        label: "run an empty function in a compartment, back to pristine",
        aim: Some(1_500.0),
        linux: None,
        dune: Way::Inside(recycled),
    },
    Crossing {
        id: "switch",
        label: "from a compartment to its parent and back (Linux: two writes of a key register)",
        aim: Some(300.0),
        linux: Some(keys),
        dune: Way::Inside(switch),
    },
    Crossing {
        id: "input-1k",
        label: "as recycled, with 1 KiB of input and 1 KiB of result",
        aim: None,
        linux: None,
        dune: Way::Inside(input_1k),
    },
    Crossing {
        id: "http-request",
        label: "a request over HTTP, each read in a compartment (base: the same server without)",
        aim: None,
        linux: Some(http::plain_linux),
        dune: Way::AtRing0(http::plain),
    },
    Crossing {
        id: "https-request",
        label: "the same over TLS",
        aim: None,
        linux: Some(http::tls_linux),
        dune: Way::AtRing0(http::tls),
    },
    Crossing {
        id: "https-split",
        label: "the same, and all keys and every record in another compartment",
        aim: None,
        linux: None,
        dune: Way::AtRing0(http::split),
    },
    Crossing {
        id: "idle-memory",
        label: "memory of an idle compartment that has run, 10,000 of them",
        aim: None,
        linux: None,
        dune: Way::Inside(idle_memory),
    },
    Crossing {
        id: "creations",
        label: "growth of the process by 1,000,000 compartments made, run and ended",
        aim: None,
        linux: None,
        dune: Way::Inside(creations),
    },
];

fn create_linux(bench: &Bench, row: &mut Row) {
    let meter = bench.meter.with_at_most(11);
    let fork = super::fork::fork(bench);
    row.add(LINUX, fork);
    row.add(FORK, fork);
    row.add(THREAD, meter.measure(4, thread));
    match worker() {
        Ok((folder, program)) => {
            row.add(SPAWN, meter.measure(1, || spawn(&program)));
            drop(folder);
        }
        Err(error) => row.note(format!("no figure for posix_spawn: {error}")),
    }
    row.note("time in which the CPU idles is included");
}

/// A program that ends at once, in a folder that goes with it: static, and not on the lab's
/// view of the host's files, whose answers take host time.
fn worker() -> std::io::Result<(Folder, CString)> {
    let folder = Folder(std::env::temp_dir().join(format!("wedge-{}", std::process::id())));
    std::fs::create_dir_all(&folder.0)?;
    let program = folder.0.join("true");
    std::fs::copy("/bin/busybox", &program)?;
    let program = CString::new(program.into_os_string().into_encoded_bytes())?;
    Ok((folder, program))
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

extern "C" fn empty(_: *mut c_void) -> *mut c_void {
    ptr::null_mut()
}

fn begin_thread() -> Option<libc::pthread_t> {
    let mut thread: libc::pthread_t = 0;
    // SAFETY: the thread does nothing.
    let result =
        unsafe { libc::pthread_create(&raw mut thread, ptr::null(), empty, ptr::null_mut()) };
    (result == 0).then_some(thread)
}

fn thread() {
    if let Some(thread) = begin_thread() {
        // SAFETY: a thread that was made.
        unsafe { libc::pthread_join(thread, ptr::null_mut()) };
    }
}

fn spawn(program: &CStr) {
    let mut child = 0;
    let name = c"true".as_ptr();
    let arguments = [name.cast_mut(), ptr::null_mut()];
    // SAFETY: strings and a list with its end.
    let result = unsafe {
        libc::posix_spawn(
            &raw mut child,
            program.as_ptr(),
            ptr::null(),
            ptr::null(),
            arguments.as_ptr(),
            ptr::null(),
        )
    };
    let mut status = 0;
    if result == 0 {
        // SAFETY: the kernel writes the status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
    }
}

fn measured(row: &mut Row, result: Result<Figure, String>) {
    match result {
        Ok(figure) => row.add(DUNE, figure),
        Err(reason) => row.set_missing(reason),
    }
}

fn make() -> Result<Compartment<'static>, String> {
    Compartment::builder()
        .build()
        .map_err(|error| error.to_string())
}

fn create(bench: &Bench, row: &mut Row) {
    let mut failure = None;
    let figure = bench.meter.measure(BATCH, || {
        let result = make().and_then(|mut made| made.run(|()| (), ()).map_err(|e| e.to_string()));
        if let Err(error) = result {
            failure = Some(error);
        }
    });
    measured(row, failure.map_or(Ok(figure), Err));
    row.note("page tables and pages are those of a compartment that ended before");
}

/// Compartments, threads and processes that are there at a time, each made from nothing: more
/// than are kept of those that end (64 compartments, five stacks of threads).
const AT_ONCE: u32 = 128;

fn create_cold_linux(bench: &Bench, row: &mut Row) {
    let meter = bench.meter.with_at_most(11);
    row.set_base(FORK);
    let fork = meter.with_at_most(3).measure(1, processes);
    row.add(FORK, fork.of_each(AT_ONCE));
    row.add(THREAD, meter.measure(1, threads).of_each(AT_ONCE));
}

/// Makes processes that end at once, and waits for all of them.
fn processes() {
    let children: Vec<_> = (0..AT_ONCE)
        .map(|_| {
            // SAFETY: the child ends at once.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(0) };
            }
            child
        })
        .collect();
    for child in children.into_iter().filter(|child| *child > 0) {
        let mut status = 0;
        // SAFETY: the kernel writes the status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
    }
}

/// Makes threads that end at once, and waits for all of them.
fn threads() {
    let made: Vec<_> = (0..AT_ONCE).filter_map(|_| begin_thread()).collect();
    for thread in made {
        // SAFETY: a thread that was made.
        unsafe { libc::pthread_join(thread, ptr::null_mut()) };
    }
}

fn create_cold(bench: &Bench, row: &mut Row) {
    let mut failure = None;
    let mut made = Vec::with_capacity(AT_ONCE as usize);
    let figure = bench.meter.with_at_most(11).measure_batches(AT_ONCE, || {
        let start = clock::ticks();
        for _ in 0..AT_ONCE {
            match make() {
                Ok(mut compartment) => {
                    if let Err(error) = compartment.run(|()| (), ()) {
                        failure = Some(error.to_string());
                    }
                    made.push(compartment);
                }
                Err(error) => failure = Some(error),
            }
        }
        made.clear();
        dune_wedge::trim();
        clock::ticks() - start
    });
    measured(row, failure.map_or(Ok(figure), Err));
    row.note("128 at a time, nothing kept of earlier ones but memory that the process had before");
}

fn recycled(bench: &Bench, row: &mut Row) {
    measured(
        row,
        make().and_then(|mut compartment| {
            let mut failure = None;
            let figure = bench.meter.measure(BATCH, || {
                if let Err(error) = compartment.run(|()| (), ()) {
                    failure = Some(error.to_string());
                }
            });
            failure.map_or(Ok(figure), Err)
        }),
    );
}

fn input_1k(bench: &Bench, row: &mut Row) {
    measured(
        row,
        make().and_then(|mut compartment| {
            let mut failure = None;
            let input = [7_u8; 1024];
            let figure = bench.meter.measure(BATCH, || {
                let result = compartment.run(|bytes: [u8; 1024]| bytes, input);
                if !matches!(result, Ok(bytes) if bytes == input) {
                    failure = Some(format!("{:?}", result.map(drop)));
                }
            });
            failure.map_or(Ok(figure), Err)
        }),
    );
}

/// Memory of the process that is not shared with others, in bytes.
fn resident() -> Result<f64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
    let field = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = field.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.map(|kib| kib * 1024.0)
        .ok_or_else(|| "no RssAnon in /proc/self/status".to_owned())
}

fn idle_memory(_: &Bench, row: &mut Row) {
    const LIVE: usize = 10_000;
    row.set_unit("bytes each");
    row.set_aim(f64::from(32 << 10));
    let each = || -> Result<f64, String> {
        dune_wedge::trim();
        drop(make()?);
        let before = resident()?;
        let mut all = Vec::with_capacity(LIVE);
        for _ in 0..LIVE {
            let mut compartment = make()?;
            compartment.run(|()| (), ()).map_err(|e| e.to_string())?;
            all.push(compartment);
        }
        Ok((resident()? - before) / LIVE as f64)
    };
    measured(row, each().map(|bytes| Figure::of(vec![bytes])));
    row.note("what became resident in the process: page tables, pages, and its own records");
}

fn creations(_: &Bench, row: &mut Row) {
    const CREATIONS: u32 = 1_000_000;
    row.set_unit("bytes in all");
    // Less than a byte for each.
    row.set_aim(f64::from(1 << 20));
    let round = || make()?.run(|()| (), ()).map_err(|error| error.to_string());
    let grown = || -> Result<f64, String> {
        for _ in 0..1000 {
            round()?;
        }
        let (before, used) = (resident()?, dune_wedge::usage());
        for _ in 0..CREATIONS {
            round()?;
        }
        if dune_wedge::usage() != used {
            return Err(format!("{used:?} became {:?}", dune_wedge::usage()));
        }
        Ok((resident()? - before).max(0.0))
    };
    measured(row, grown().map(|bytes| Figure::of(vec![bytes])));
}

static NOTHING: Gate<(), ()> = Gate::new("nothing");

fn switch(bench: &Bench, row: &mut Row) {
    const SWITCHES: u32 = 1024;
    let result = Compartment::builder()
        .gate(&NOTHING, |()| ())
        .build()
        .map_err(|error| error.to_string());
    measured(
        row,
        result.and_then(|mut compartment| {
            let mut failure = None;
            let figure = bench.meter.measure_batches(SWITCHES, || {
                // The clock inside is the one outside.
                let result = compartment.run(
                    |()| {
                        let start = clock::ticks();
                        for _ in 0..SWITCHES {
                            NOTHING.call(());
                        }
                        clock::ticks() - start
                    },
                    (),
                );
                result.unwrap_or_else(|error| {
                    failure = Some(error.to_string());
                    0
                })
            });
            failure.map_or(Ok(figure), Err)
        }),
    );
}

/// Rights to a part of memory given up and taken back: what a switch costs where the parts of
/// the program are trusted not to write the register themselves.
fn keys(bench: &Bench, row: &mut Row) {
    // SAFETY: takes a key that nothing uses.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) };
    if key < 0 {
        row.note("no figure for pkey: the CPU or the kernel has no protection keys");
        return;
    }
    row.set_base(KEY);
    let before = read_keys();
    let denied = before | 0b11 << (2 * key);
    let figure = bench.meter.measure(1024, || {
        write_keys(denied);
        write_keys(before);
    });
    row.add(KEY, figure);
    // SAFETY: the key from above.
    unsafe { libc::syscall(libc::SYS_pkey_free, key) };
}

fn read_keys() -> u32 {
    let value: u32;
    // SAFETY: reads the register.
    unsafe {
        core::arch::asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nostack));
    }
    value
}

fn write_keys(value: u32) {
    // SAFETY: changes the rights to a key that nothing uses.
    unsafe {
        core::arch::asm!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0, options(nostack));
    }
}
