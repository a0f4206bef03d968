//! Compartments, and what else keeps parts of a program apart: processes, threads (which do
//! not, and are the floor), and protection keys.
#![expect(unsafe_code, reason = "processes, threads and protection keys by hand")]

use core::ffi::{CStr, c_void};
use core::ptr;
use std::ffi::CString;
use std::path::PathBuf;

use dune_wedge::{Compartment, Gate};

use super::{Bench, Crossing, Way};
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
        label: "as create-run-join, with nothing left of earlier compartments",
        aim: None,
        linux: None,
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

fn thread() {
    let mut thread: libc::pthread_t = 0;
    // SAFETY: the thread does nothing.
    let result =
        unsafe { libc::pthread_create(&raw mut thread, ptr::null(), empty, ptr::null_mut()) };
    if result == 0 {
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

fn create_cold(bench: &Bench, row: &mut Row) {
    // More than are kept of those that end, so each is made from nothing.
    const MADE: u32 = 128;
    let mut failure = None;
    let mut made = Vec::with_capacity(2 * MADE as usize);
    // What was kept so far.
    made.extend((0..MADE).map_while(|_| make().ok()));
    let figure = bench.meter.with_at_most(11).measure_batches(MADE, || {
        let start = clock::ticks();
        for _ in 0..MADE {
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
        let ticks = clock::ticks() - start;
        made.truncate(MADE as usize);
        ticks
    });
    measured(row, failure.map_or(Ok(figure), Err));
    row.note("the end is not counted; page tables and pages were used before");
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
