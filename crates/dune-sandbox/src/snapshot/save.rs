//! Saving a program to a file.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_fcntl, __NR_getitimer, __NR_lseek, __NR_prctl, __NR_umask, F_GETFD, F_GETFL, FD_CLOEXEC,
    SEEK_CUR,
};
use linux_raw_sys::prctl::PR_GET_NAME;

use super::Stopped;
use super::image::{Image, OpenFile};
use super::resume::Machine;
use crate::calls::fd::open_descriptors;
use crate::calls::memory::set_access;
use crate::calls::{forward_always, own_mut};
use crate::engine::{Access, EngineError};
use crate::host::Errno;
use crate::range::{PAGE_SIZE, PageRange};
use crate::signal::SIGNALS;
use crate::vma::{Area, Attributes, Backing, Sharing};

/// Why a program cannot be saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// It has more than one thread.
    #[error(
        "the program has {0} threads; it can be saved while it has one: choose a marker before \
         it makes the others"
    )]
    Threads(usize),
    /// It has made processes.
    #[error("the program has child processes, which cannot be saved; choose another marker")]
    Children,
    /// It has a timer running.
    #[error("the program has a timer running (setitimer, alarm); choose another marker")]
    Timer,
    /// It shares memory with others.
    #[error(
        "the program shares writable memory at {0:#x} with others, which cannot be saved; choose \
         a marker before it does"
    )]
    Shared(u64),
    /// It has something open that is no file.
    #[error(
        "descriptor {fd} is {what}, which cannot be saved; choose a marker before the program \
         opens it"
    )]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What it is.
        what: String,
    },
    /// The file could not be written, or `/proc` not be read.
    #[error("cannot save the program: {0}")]
    Io(#[from] io::Error),
    /// The host kernel refused something.
    #[error("cannot save the program: {0}")]
    Host(#[from] Errno),
    /// The virtual CPU did not answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// How much was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Bytes of memory that were stored: not those that are zero.
    pub memory: u64,
}

const PAGE: usize = PAGE_SIZE as usize;

impl Stopped<'_> {
    /// Saves the program to `file`, which [`crate::Command::resume`] reads. The
    /// program itself may go on afterwards.
    ///
    /// Memory that is mapped from files is saved with the rest. Files that are
    /// open are saved by their names; standard input, output and error are those
    /// of whoever resumes it. Costs a copy of all the memory that is not zero.
    ///
    /// # Errors
    ///
    /// [`SaveError`], for a program with more than one thread, with children,
    /// shared memory, pipes or sockets above all.
    pub fn save(&mut self, file: &File) -> Result<Saved, SaveError> {
        let program = Arc::clone(&self.guard.program);
        let threads = program.threads.lock().members().count();
        if threads > 1 || self.guard.tid != program.pid() {
            return Err(SaveError::Threads(threads));
        }
        if !std::fs::read("/proc/thread-self/children")?.is_empty() {
            return Err(SaveError::Children);
        }
        for which in 0..3 {
            let mut timer = [0_u64; 4];
            forward_always(__NR_getitimer, [which, own_mut(&mut timer), 0, 0, 0, 0])?;
            if timer[2..] != [0, 0] {
                return Err(SaveError::Timer);
            }
        }
        let files = self.open_files()?;
        let areas = self.areas();
        if let Some(area) = areas.iter().find(|area| is_shared_with_others(area)) {
            return Err(SaveError::Shared(area.range.start()));
        }
        let guard = &mut *self.guard;
        let mut xstate = vec![0; guard.engine.xstate_len()];
        guard.engine.save_xstate(&mut xstate)?;
        let mut name = [0; 16];
        let get = [u64::from(PR_GET_NAME), own_mut(&mut name), 0, 0, 0, 0];
        forward_always(__NR_prctl, get)?;
        let umask = forward_always(__NR_umask, [0; 6])?;
        forward_always(__NR_umask, [umask, 0, 0, 0, 0, 0])?;
        let machine = Machine::this()?;
        let space = program.memory().space;
        let process = program.process().clone();
        let dispositions = program.dispositions().clone();
        let member = program.threads.member(guard.tid).unwrap_or_default();
        let mut image = Image {
            kernel: machine.kernel,
            cpu: machine.cpu,
            xcr0: guard.engine.xcr0(),
            user: *self.user,
            xstate,
            mask: guard.signals.mask,
            altstack: guard.signals.altstack,
            actions: (1..=SIGNALS)
                .map(|signal| dispositions.action(signal))
                .collect(),
            tid: guard.tid,
            clear_child_tid: guard.clear_child_tid,
            robust_list: member.robust_list,
            exe: process.exe,
            arguments: process.arguments,
            environment: process.environment,
            name,
            directory: std::env::current_dir()?.into_os_string().into_vec(),
            umask: umask as u32,
            space: [space.heap_start, space.heap_end, space.mmap_top],
            files,
            areas: areas.iter().map(as_saved).collect(),
            runs: Vec::new(),
        };
        self.store(&mut image, &areas, file)
    }

    /// Finds what of the memory is not zero, and writes all of it.
    fn store(
        &mut self,
        image: &mut Image,
        areas: &[Area],
        file: &File,
    ) -> Result<Saved, SaveError> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut scratch = vec![0; PAGE];
        let mut runs_of_areas = Vec::new();
        for area in areas {
            let runs = self.with_right_to_read(area, |stopped| {
                let mut runs: Vec<PageRange> = Vec::new();
                for page in stopped.touched(area, &pagemap)? {
                    // Past the end of its file there is nothing to be saved.
                    let readable = stopped.read(page, &mut scratch).is_ok();
                    if !readable || scratch.iter().all(|&byte| byte == 0) {
                        continue;
                    }
                    match runs.last_mut() {
                        Some(last) if last.end() == page => {
                            if let Some(longer) =
                                PageRange::new(last.start(), last.len() + PAGE_SIZE)
                            {
                                *last = longer;
                            }
                        }
                        _ => runs.extend(PageRange::new(page, PAGE_SIZE)),
                    }
                }
                Ok(runs)
            })?;
            image.runs.extend_from_slice(&runs);
            runs_of_areas.push(runs);
        }
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(&image.encode())?;
        let mut memory = 0;
        for (area, runs) in areas.iter().zip(runs_of_areas) {
            let out = &mut out;
            memory += self.with_right_to_read(area, |stopped| {
                let mut written = 0;
                for run in runs {
                    for page in (run.start()..run.end()).step_by(PAGE) {
                        stopped.read(page, &mut scratch)?;
                        out.write_all(&scratch)?;
                        written += PAGE_SIZE;
                    }
                }
                Ok(written)
            })?;
        }
        out.flush()?;
        Ok(Saved { memory })
    }

    /// Does something while the program could read the area.
    fn with_right_to_read<T>(
        &mut self,
        area: &Area,
        body: impl FnOnce(&mut Self) -> Result<T, SaveError>,
    ) -> Result<T, SaveError> {
        let access = area.attributes.access;
        if area.attributes.effective_access().contains(Access::READ) {
            return body(self);
        }
        set_access(self.guard, area.range, Access::READ)?;
        let done = body(self);
        set_access(self.guard, area.range, access)?;
        done
    }

    /// The pages of an area that may hold something: of memory without a file,
    /// those that were ever used.
    fn touched(&self, area: &Area, pagemap: &File) -> io::Result<Vec<u64>> {
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        let pages = (area.range.start()..area.range.end()).step_by(PAGE);
        if area.attributes.backing == Backing::File {
            return Ok(pages.collect());
        }
        let mut touched = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        let mut pagemap = pagemap;
        pagemap.seek(SeekFrom::Start(area.range.start() / PAGE_SIZE * 8))?;
        let mut page = area.range.start();
        while page < area.range.end() {
            let left = ((area.range.end() - page) / PAGE_SIZE * 8) as usize;
            let len = left.min(buffer.len());
            pagemap.read_exact(&mut buffer[..len])?;
            for entry in buffer[..len].as_chunks::<8>().0 {
                if u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                    touched.push(page);
                }
                page += PAGE_SIZE;
            }
        }
        Ok(touched)
    }

    /// The program's open files, without the three standard ones.
    fn open_files(&self) -> Result<Vec<OpenFile>, SaveError> {
        const STANDARD: RawFd = 2;
        let hidden = self.guard.program.hidden_fds().clone();
        let mut files = Vec::new();
        for fd in open_descriptors().ok_or(Errno::ENOENT)? {
            if fd <= STANDARD || hidden.binary_search(&fd).is_ok() {
                continue;
            }
            let ask = |command| forward_always(__NR_fcntl, [fd as u64, command, 0, 0, 0, 0]);
            let Ok(flags) = ask(F_GETFD.into()) else {
                // The folder's own is gone again by now.
                continue;
            };
            let link = format!("/proc/self/fd/{fd}");
            let path = std::fs::read_link(&link)?;
            let metadata = std::fs::metadata(&link)?;
            let kind = metadata.file_type();
            let is_named = std::fs::metadata(&path)
                .is_ok_and(|named| (named.dev(), named.ino()) == (metadata.dev(), metadata.ino()));
            let can_be_saved = kind.is_file() || kind.is_dir() || kind.is_char_device();
            if !is_named || !can_be_saved {
                let what = path.display().to_string();
                return Err(SaveError::Descriptor { fd, what });
            }
            let offset = forward_always(__NR_lseek, [fd as u64, 0, SEEK_CUR.into(), 0, 0, 0]);
            files.push(OpenFile {
                fd: fd as u32,
                close_on_exec: flags & u64::from(FD_CLOEXEC) != 0,
                status: ask(F_GETFL.into())? as u32,
                offset: offset.unwrap_or(0),
                path: path.into_os_string().into_vec(),
                device: metadata.dev(),
                inode: metadata.ino(),
                contents: kind.is_file().then(|| contents(&metadata)),
            });
        }
        Ok(files)
    }
}

/// What tells that the contents of a file are others.
pub(super) fn contents(metadata: &std::fs::Metadata) -> (u64, u64) {
    const NANOSECONDS: i64 = 1_000_000_000;
    let changed = metadata.mtime().wrapping_mul(NANOSECONDS);
    (
        metadata.len(),
        changed.wrapping_add(metadata.mtime_nsec()) as u64,
    )
}

/// Shared mappings that cannot be written (of files that do not change while
/// they are in use) are as good as private ones.
fn is_shared_with_others(area: &Area) -> bool {
    area.attributes.sharing == Sharing::Shared && area.attributes.access.contains(Access::WRITE)
}

fn as_saved(area: &Area) -> Area {
    let attributes = Attributes {
        sharing: Sharing::Private,
        ..area.attributes
    };
    Area {
        range: area.range,
        attributes,
    }
}
