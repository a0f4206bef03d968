//! Resuming a program that was saved.
//!
//! What the file says is the program's word: it decides about the program's own
//! memory, registers and handlers, as the program itself could have done by its
//! calls, and about nothing else. Files are opened by their names, with the rights
//! of this process, and only where no policy restricts files.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_dup3, __NR_lseek, __NR_prctl, __NR_pread64, __NR_umask, O_ACCMODE, O_APPEND, O_CLOEXEC,
    O_DIRECTORY, O_NONBLOCK, O_PATH, O_RDONLY, O_RDWR, O_WRONLY, SEEK_SET,
};
use linux_raw_sys::prctl::PR_SET_NAME;

use super::image::{Image, OpenFile, ResumeError};
use super::save::contents;
use crate::calls::memory::{check_limit, map_anonymous, set_access};
use crate::calls::{forward_always, own};
use crate::engine::{Access, UserState};
use crate::guard::Guard;
use crate::host::Errno;
use crate::range::USER_HI;
use crate::signal::frame::{mxcsr_mask, sanitise_xstate};
use crate::signal::{UNBLOCKABLE, bit, host as signals};
use crate::vma::{Attributes, Backing};

/// A saved program, checked as far as its file alone allows.
#[derive(Debug)]
pub(crate) struct Resumed {
    image: Image,
    file: File,
    pages_at: u64,
}

/// What a saved program depends on.
pub(super) struct Machine {
    pub(super) kernel: Vec<u8>,
    pub(super) cpu: Vec<u8>,
}

impl Machine {
    pub(super) fn this() -> io::Result<Self> {
        const KIND: [&str; 5] = ["vendor_id", "cpu family", "model", "stepping", "flags"];
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let all = std::fs::read_to_string("/proc/cpuinfo")?;
        // The first CPU: all are of a kind.
        let lines = all.lines().take_while(|line| !line.is_empty());
        let values: Vec<&str> = lines
            .filter_map(|line| line.split_once(':'))
            .filter(|(name, _)| KIND.contains(&name.trim()))
            .map(|(_, value)| value.trim())
            .collect();
        Ok(Self {
            kernel: kernel.trim_end().into(),
            cpu: values.join(", ").into_bytes(),
        })
    }
}

impl Resumed {
    /// Reads a file that [`super::Stopped::save`] has written, and checks that it
    /// was written on such a machine as this.
    ///
    /// # Errors
    ///
    /// [`ResumeError`].
    pub(crate) fn read(mut file: File) -> Result<Self, ResumeError> {
        const PREFIX: u64 = 24;
        let len = file.metadata()?.len();
        let mut bytes = Vec::new();
        let mut beginning = |bytes: &mut Vec<u8>, most: u64| {
            let left = most.saturating_sub(bytes.len() as u64);
            (&mut file).take(left).read_to_end(bytes).map(drop)
        };
        beginning(&mut bytes, PREFIX)?;
        let header = Image::header_len(&bytes)?;
        beginning(&mut bytes, PREFIX + header)?;
        let (image, pages_at) = Image::decode(&bytes, len)?;
        let here = Machine::this()?;
        for (what, saved, here) in [
            ("the kernel", &image.kernel, &here.kernel),
            ("the CPU", &image.cpu, &here.cpu),
        ] {
            if saved != here {
                return Err(ResumeError::Machine {
                    what,
                    saved: printable(saved),
                    here: printable(here),
                });
            }
        }
        Ok(Self {
            image,
            file,
            pages_at,
        })
    }

    /// The file, which the program must not have.
    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The program's own file.
    pub(crate) fn exe(&self) -> PathBuf {
        OsStr::from_bytes(&self.image.exe).into()
    }

    /// Puts the program into a user space that is empty, and returns the state
    /// it goes on in.
    ///
    /// # Errors
    ///
    /// [`ResumeError`]; then a part may be mapped.
    pub(crate) fn load(self, guard: &mut Guard) -> Result<UserState, ResumeError> {
        let image = &self.image;
        let (xcr0, len) = (guard.engine.xcr0(), guard.engine.xstate_len());
        if image.xcr0 != xcr0 || image.xstate.len() != len {
            return Err(ResumeError::Machine {
                what: "the extended state",
                saved: format!("{:#x}, {} bytes", image.xcr0, image.xstate.len()),
                here: format!("{xcr0:#x}, {len} bytes"),
            });
        }
        self.open_files(guard)?;
        self.fill_memory(guard)?;
        let program = Arc::clone(&guard.program);
        let mut own_state = vec![0; len];
        guard
            .engine
            .save_xstate(&mut own_state)
            .map_err(|_| ResumeError::Damaged("its extended state"))?;
        let mut xstate = image.xstate.clone();
        sanitise_xstate(&mut xstate, xcr0, mxcsr_mask(&own_state));
        guard
            .engine
            .load_xstate(&xstate)
            .map_err(|_| ResumeError::Damaged("its extended state"))?;
        guard
            .set_altstack(image.altstack, 0)
            .map_err(host("the signal stack"))?;
        let mut dispositions = program.dispositions();
        for (signal, action) in (1..).zip(&image.actions) {
            if UNBLOCKABLE & bit(signal) != 0 || dispositions.action(signal) == *action {
                continue;
            }
            let mut action = *action;
            action.mask &= !UNBLOCKABLE;
            dispositions.set_action(signal, action);
            signals::install(signal, &action).map_err(host("a signal handler"))?;
        }
        drop(dispositions);
        guard.signals.mask = image.mask & !UNBLOCKABLE;
        signals::set_mask(guard.signals.mask);
        guard.clear_child_tid = image.clear_child_tid;
        let mut process = program.process_mut();
        process.exe.clone_from(&image.exe);
        process.arguments = image.arguments;
        process.environment = image.environment;
        drop(process);
        let name = [u64::from(PR_SET_NAME), own(&image.name), 0, 0, 0, 0];
        let _ = forward_always(__NR_prctl, name);
        let _ = forward_always(__NR_umask, [image.umask.into(), 0, 0, 0, 0, 0]);
        let tid = guard.tid;
        let _ = program.threads.join(tid);
        let robust_list = image.robust_list;
        let update = |member: &mut crate::threads::Member| member.robust_list = robust_list;
        program.threads.update(tid, update);
        // The thread's id in the C library's own record is that of before.
        let known = guard.memory().read_value::<u32>(image.clear_child_tid);
        if known == Ok(image.tid) {
            let _ = guard.memory().write_value(image.clear_child_tid, &tid);
        }
        Ok(image.user)
    }

    fn fill_memory(&self, guard: &mut Guard) -> Result<(), ResumeError> {
        let program = Arc::clone(&guard.program);
        let image = &self.image;
        let refused = host("the program's memory");
        for area in &image.areas {
            let attributes = Attributes {
                access: Access::READ | Access::WRITE,
                ..area.attributes
            };
            let mut memory = program.memory_mut();
            if area.attributes.backing != Backing::Stack {
                check_limit(&program, &memory, area.range.len(), area.attributes.access)
                    .map_err(&refused)?;
            }
            map_anonymous(&mut memory, area.range, attributes).map_err(&refused)?;
        }
        let mut at = self.pages_at;
        for run in &image.runs {
            let mut done = 0;
            while done < run.len() {
                // User memory that was mapped above, and is nobody else's yet.
                let to = [
                    self.file.as_raw_fd() as u64,
                    run.start() + done,
                    run.len() - done,
                    at + done,
                    0,
                    0,
                ];
                match forward_always(__NR_pread64, to) {
                    Ok(0) => return Err(ResumeError::Short),
                    Ok(read) => done += read,
                    Err(errno) => return Err(refused(errno)),
                }
            }
            at += run.len();
        }
        for area in &image.areas {
            set_access(guard, area.range, area.attributes.access).map_err(&refused)?;
        }
        let mut memory = program.memory_mut();
        let [heap_start, heap_end, mmap_top] = image.space;
        memory.space.heap_start = heap_start;
        memory.space.heap_end = heap_end;
        memory.space.mmap_top = mmap_top;
        Ok(())
    }

    fn open_files(&self, guard: &Guard) -> Result<(), ResumeError> {
        let image = &self.image;
        let here = std::env::current_dir()?;
        let directory = Path::new(OsStr::from_bytes(&image.directory));
        let restricted = guard.program.policy().rules().files.is_some();
        if restricted && (!image.files.is_empty() || here != directory) {
            return Err(ResumeError::Policy);
        }
        if here != directory {
            std::env::set_current_dir(directory).map_err(|_| ResumeError::File {
                path: printable(&image.directory),
                what: "is no folder any more",
            })?;
        }
        let hidden = guard.program.hidden_fds_mut();
        for file in &image.files {
            if hidden.binary_search(&(file.fd as RawFd)).is_ok() {
                return Err(ResumeError::Damaged("its open files"));
            }
            let opened = open(file)?;
            let cloexec = if file.close_on_exec { O_CLOEXEC } else { 0 };
            let source = opened.as_raw_fd();
            if source == file.fd as RawFd {
                let _ = opened.into_raw_fd();
                continue;
            }
            let args = [source as u64, file.fd.into(), cloexec.into(), 0, 0, 0];
            forward_always(__NR_dup3, args).map_err(host("an open file"))?;
        }
        Ok(())
    }
}

/// Opens a file of the program as it had it, if it is still the same.
fn open(file: &OpenFile) -> Result<File, ResumeError> {
    let wrong = |what| ResumeError::File {
        path: printable(&file.path),
        what,
    };
    let path = Path::new(OsStr::from_bytes(&file.path));
    // Looked at before it is opened: to open a device may do something.
    is_the_same(
        file,
        &std::fs::metadata(path).map_err(|_| wrong("is gone"))?,
    )?;
    let access = file.status & O_ACCMODE;
    let kept = file.status & (O_APPEND | O_NONBLOCK | O_PATH | O_DIRECTORY);
    let opened = File::options()
        .read(access == O_RDONLY || access == O_RDWR)
        .write(access == O_WRONLY || access == O_RDWR)
        .custom_flags(kept as i32)
        .open(path)
        .map_err(|_| wrong("cannot be opened any more"))?;
    is_the_same(file, &opened.metadata()?)?;
    if file.contents.is_some() {
        let seek = [
            opened.as_raw_fd() as u64,
            file.offset,
            SEEK_SET.into(),
            0,
            0,
            0,
        ];
        forward_always(__NR_lseek, seek).map_err(host("an open file"))?;
    }
    Ok(opened)
}

fn is_the_same(file: &OpenFile, found: &std::fs::Metadata) -> Result<(), ResumeError> {
    let wrong = |what| {
        Err(ResumeError::File {
            path: printable(&file.path),
            what,
        })
    };
    if (found.dev(), found.ino()) != (file.device, file.inode) {
        return wrong("is another file now");
    }
    if file.contents.is_some_and(|saved| saved != contents(found)) {
        return wrong("has changed");
    }
    Ok(())
}

fn host(what: &'static str) -> impl Fn(Errno) -> ResumeError {
    move |errno| ResumeError::Host { what, errno }
}

/// For a message: what comes from a file may hold anything.
fn printable(bytes: &[u8]) -> String {
    const MOST: usize = 200;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MOST)]);
    text.chars()
        .map(|one| if one.is_control() { '?' } else { one })
        .collect()
}

const _: () = assert!(USER_HI <= 1 << 47, "registers are checked against that");
