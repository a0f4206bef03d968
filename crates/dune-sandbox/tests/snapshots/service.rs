//! The services of the snapshot tests.

use std::collections::BTreeMap;
use std::io::{Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use dune_sandbox::End;
use dune_sandbox::engine::Access;
use dune_sandbox::host::move_fd_high;
use dune_sandbox::snapshot::{Ending, Event, Next, Service, SnapshotError, Stopped};

pub(crate) fn of(name: &str, runs: u64) -> Box<dyn Service> {
    let input = Input::new();
    match name {
        "compare" => Box::new(Compare {
            runs,
            done: 0,
            input,
            shadow: None,
        }),
        "numbered" => Box::new(Runs {
            runs,
            done: 0,
            input,
            each: |done| format!("run {done}\n").into_bytes(),
            told: Told::Nothing,
        }),
        "endings" => Box::new(Runs {
            runs,
            done: 0,
            input,
            each: |done| vec![done as u8],
            told: Told::Ends,
        }),
        "interrupt" => Box::new(Runs {
            runs,
            done: 0,
            input,
            each: |done| vec![(done % 3) as u8],
            told: Told::Interrupts,
        }),
        "rewind" => Box::new(Rewind {
            done: 0,
            threads: 0,
            input,
        }),
        "leaks" => Box::new(Leaks {
            runs,
            done: 0,
            before: None,
        }),
        "nested" => Box::new(Nested {
            step: 0,
            ends: 0,
            input,
        }),
        other => panic!("no service {other}"),
    }
}

/// A file in memory that becomes a run's standard input.
struct Input(std::fs::File);

impl Input {
    fn new() -> Self {
        let name = c"input";
        // SAFETY: a string; the descriptor is new.
        let fd = unsafe {
            use std::os::fd::FromRawFd;
            OwnedFd::from_raw_fd(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))
        };
        Self(move_fd_high(fd).unwrap().into())
    }

    fn give(&mut self, bytes: &[u8], program: &mut Stopped<'_>) {
        self.0.set_len(0).unwrap();
        self.0.rewind().unwrap();
        self.0.write_all(bytes).unwrap();
        self.0.rewind().unwrap();
        program.give_descriptor(self.0.as_raw_fd(), 0).unwrap();
    }
}

fn failed(error: &SnapshotError) -> Next {
    println!("{error}");
    Next::Finish(End::Exit(124))
}

/// Everything of the program that a return must give back.
#[derive(PartialEq)]
struct Shadow {
    registers: dune_sandbox::engine::UserState,
    extended: Vec<u8>,
    areas: Vec<dune_sandbox::vma::Area>,
    pages: BTreeMap<u64, Vec<u8>>,
    files: BTreeMap<RawFd, String>,
    mask: u64,
    umask: u32,
    directory: std::path::PathBuf,
    children: String,
    alarm: i64,
}

impl Shadow {
    fn of(program: &mut Stopped<'_>) -> Self {
        let mut pages = BTreeMap::new();
        let areas = program.areas();
        for area in &areas {
            let readable = area.attributes.effective_access().contains(Access::READ);
            for page in (area.range.start()..area.range.end()).step_by(4096) {
                let mut bytes = vec![0; 4096];
                if readable
                    && program.read(page, &mut bytes).is_ok()
                    && bytes.iter().any(|&byte| byte != 0)
                {
                    pages.insert(page, bytes);
                }
            }
        }
        let mut files = BTreeMap::new();
        for fd in 0..64 {
            let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
            // SAFETY: no memory.
            let (offset, flags) = unsafe {
                let offset = libc::lseek(fd, 0, libc::SEEK_CUR);
                (offset, libc::fcntl(fd, libc::F_GETFD))
            };
            if let Ok(link) = link {
                files.insert(fd, format!("{} {offset} {flags}", link.display()));
            }
        }
        // SAFETY: the process's own.
        let umask = unsafe {
            let mask = libc::umask(0);
            libc::umask(mask);
            mask
        };
        // SAFETY: a set and a timer, filled by the calls.
        let (mask, alarm) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
            let mut timer: libc::itimerval = std::mem::zeroed();
            libc::getitimer(libc::ITIMER_REAL, &raw mut timer);
            ((&raw const set).cast::<u64>().read(), timer.it_value.tv_sec)
        };
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        Self {
            registers: program.registers(),
            extended: program.extended_state().unwrap(),
            areas,
            pages,
            files,
            mask,
            umask,
            directory: std::env::current_dir().unwrap(),
            children,
            alarm,
        }
    }

    fn difference(&self, other: &Self) -> Option<String> {
        if self.areas != other.areas {
            return Some(format!("areas: {:#?} {:#?}", self.areas, other.areas));
        }
        for page in self.pages.keys().chain(other.pages.keys()) {
            if self.pages.get(page) != other.pages.get(page) {
                let area = self.areas.iter().find(|area| area.range.contains(*page));
                return Some(format!("page {page:#x} of {area:?}"));
            }
        }
        if self.files != other.files {
            return Some(format!("files: {:#?} {:#?}", self.files, other.files));
        }
        if self != other {
            return Some(format!(
                "state: {:x?} {:x?}, {:x} {:x}, {:o} {:o}, {:?} {:?}, {} {}, {} {}, extended {}",
                self.registers,
                other.registers,
                self.mask,
                other.mask,
                self.umask,
                other.umask,
                self.directory,
                other.directory,
                self.children,
                other.children,
                self.alarm,
                other.alarm,
                self.extended == other.extended,
            ));
        }
        None
    }
}

struct Compare {
    runs: u64,
    done: u64,
    input: Input,
    shadow: Option<Shadow>,
}

impl Service for Compare {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        match event {
            Event::Marker => {
                if let Err(error) = program.push() {
                    return failed(&error);
                }
                self.shadow = Some(Shadow::of(program));
            }
            Event::Ended(_) => {
                if let Err(error) = program.restore() {
                    return failed(&error);
                }
                let now = Shadow::of(program);
                let difference = self.shadow.as_ref().and_then(|then| then.difference(&now));
                if let Some(difference) = difference {
                    println!("after run {}: {difference}", self.done);
                    return Next::Finish(End::Exit(1));
                }
                self.done += 1;
                if self.done == self.runs {
                    println!("all the same");
                    return Next::Finish(End::Exit(0));
                }
            }
        }
        let seed = self.done.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 12345;
        self.input.give(&seed.to_le_bytes(), program);
        Next::Continue
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.input.0.as_raw_fd()]
    }
}

#[derive(PartialEq)]
enum Told {
    Nothing,
    Ends,
    Interrupts,
}

struct Runs {
    runs: u64,
    done: u64,
    input: Input,
    each: fn(u64) -> Vec<u8>,
    told: Told,
}

impl Service for Runs {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let done = match event {
            Event::Marker => program.push().map(drop),
            Event::Ended(ending) => {
                // Whatever the run did to its limits, a service may write.
                self.input.0.write_all(b"a service's file").unwrap();
                match (&self.told, ending) {
                    (Told::Nothing, _) => {}
                    (Told::Ends, Ending::End(end)) => println!("{end:?}"),
                    (_, ending) => println!("{ending:?}"),
                }
                self.done += 1;
                if self.done == self.runs {
                    return Next::Finish(End::Exit(0));
                }
                program.restore().map(drop)
            }
        };
        if let Err(error) = done {
            return failed(&error);
        }
        self.input.give(&(self.each)(self.done), program);
        if self.told == Told::Interrupts && self.done % 3 != 2 {
            let interrupter = program.interrupter();
            let before = block_signals();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                interrupter.interrupt();
            });
            set_signals(&before);
        }
        Next::Continue
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.input.0.as_raw_fd()]
    }
}

/// Returns to its snapshot wherever the program comes to the marker again.
struct Rewind {
    done: u8,
    /// How many the process had at the snapshot, KVM's own among them.
    threads: usize,
    input: Input,
}

impl Service for Rewind {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let done = match event {
            Event::Marker if program.depth() == 0 => {
                self.threads = threads();
                program.push().map(drop)
            }
            Event::Marker => {
                self.done += 1;
                let restored = program.restore().map(drop);
                if !becomes(self.threads) {
                    println!("threads of run {} run on", self.done);
                    return Next::Finish(End::Exit(1));
                }
                restored
            }
            Event::Ended(ending) => {
                println!("{ending:?}");
                return Next::Finish(End::Exit(0));
            }
        };
        if let Err(error) = done {
            return failed(&error);
        }
        self.input.give(&[self.done], program);
        Next::Continue
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.input.0.as_raw_fd()]
    }
}

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Whether there are `count` threads. Those that end are gone a moment after the
/// program has heard of it.
fn becomes(count: usize) -> bool {
    for _ in 0..500 {
        if threads() == count {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: sets that the calls fill.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

fn set_signals(mask: &libc::sigset_t) {
    // SAFETY: a set of the kernel's.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}

struct Leaks {
    runs: u64,
    done: u64,
    before: Option<(u64, usize, usize)>,
}

impl Service for Leaks {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let done = match event {
            Event::Marker => program.push().map(drop),
            Event::Ended(_) => {
                self.done += 1;
                program.restore().map(drop)
            }
        };
        if let Err(error) = done {
            return failed(&error);
        }
        if self.done == self.runs / 10 {
            self.before = Some(resources());
        }
        if self.done == self.runs {
            let (resident, mappings, files) = resources();
            let (resident_before, mappings_before, files_before) = self.before.unwrap();
            let same = mappings == mappings_before && files == files_before;
            if same && resident <= resident_before + 200 {
                println!("no leak");
            } else {
                println!("{:?} {:?}", self.before, resources());
            }
            return Next::Finish(End::Exit(0));
        }
        Next::Continue
    }
}

/// Resident memory in KiB, mappings, descriptors.
fn resources() -> (u64, usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.unwrap().trim().trim_end_matches(" kB");
    let mappings = std::fs::read_to_string("/proc/self/maps").unwrap();
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (resident.parse().unwrap(), mappings.lines().count(), files)
}

/// Goes up and down a stack of three snapshots.
struct Nested {
    step: u32,
    ends: u32,
    input: Input,
}

impl Service for Nested {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let text;
        let done = match event {
            Event::Marker => {
                self.step += 1;
                text = match self.step {
                    1 => "first",
                    2 => "deep",
                    3 => "end",
                    4 => "on",
                    5..7 => "bottom",
                    _ => "merged",
                };
                if self.step <= 3 {
                    program.push().map(drop)
                } else {
                    Ok(())
                }
            }
            Event::Ended(_) => {
                self.ends += 1;
                match self.ends {
                    1 => {
                        assert_eq!(program.depth(), 3);
                        text = "again";
                        program.restore().map(drop)
                    }
                    2 => {
                        // The last snapshot goes, and the one before it comes back.
                        text = "back";
                        let gone = program.restore().and_then(|_| program.pop());
                        gone.and_then(|()| program.restore()).map(drop)
                    }
                    3 => {
                        text = "bottom";
                        // Forgotten without going back to it first.
                        let gone = program.pop();
                        assert_eq!(program.depth(), 1);
                        gone.and_then(|()| program.restore()).map(drop)
                    }
                    4 => {
                        text = "merged";
                        program.restore().map(drop)
                    }
                    _ => return Next::Finish(End::Exit(0)),
                }
            }
        };
        if let Err(error) = done {
            return failed(&error);
        }
        self.input.give(text.as_bytes(), program);
        Next::Continue
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.input.0.as_raw_fd()]
    }
}
