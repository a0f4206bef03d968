//! The hostile program: it makes generated calls with generated structures, and
//! looks for what it must not see.
//!
//! ```text
//!   arena   +----------------------------+  words: numbers, addresses of the
//!           | words | words | words | ...|  arena, the guard, nowhere
//!           +----------------------------+
//!   a call: a row of the table, arguments by their kinds: pointers into the arena or
//!           to where nothing of the program is
//! ```
//!
//! Two kinds of programs take turns. One hands addresses of the guard over, and looks
//! for the guard's secret in what comes back; a second thread changes its structures
//! while the kernel and the guard read them. The other one never does, so that an
//! address of the guard in its memory came from the guard.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dune_sandbox::host::SysResult;
use dune_sandbox::range::{PAGE_SIZE, USER_HI, USER_TOP};
use dune_sandbox::table::{Arg, Call, Handling, Shape, Size, calls};
use linux_raw_sys::general::*;

use super::random::Random;
use super::{Progress, Secret, call};

/// Bytes that structures are made in.
const ARENA_LEN: usize = 64 << 10;
/// What a path may be: the program's folder, and what it must not have.
const PATHS: [&core::ffi::CStr; 8] = [
    c"a",
    c"b",
    c".",
    c"/proc/self/mem",
    c"/proc/self/maps",
    c"/dev/kvm",
    c"/proc/self/fd/5",
    c"/etc/passwd",
];
/// How often the timer ends a call that waits, in microseconds.
const TICK_US: i64 = 10_000;

/// Finding of the program, as its exit status.
pub(crate) const CLEAN: u8 = 0;
pub(crate) const SECRET_SEEN: u8 = 90;
pub(crate) const ADDRESS_SEEN: u8 = 91;

pub(crate) struct Program {
    random: Random,
    arena: &'static [AtomicU64],
    secret: Secret,
    /// Whether addresses of the guard are handed over.
    is_armed: bool,
    pid: u64,
    progress: &'static Progress,
    descriptors: [u64; 8],
}

/// The arena, for the thread that changes it.
static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_tick(_: i32) {}

impl Program {
    pub(crate) fn new(seed: u64, secret: Secret, progress: &'static Progress) -> Self {
        let mut random = Random::new(seed);
        let words = ARENA_LEN / 8;
        let arena: &'static [AtomicU64] =
            Box::leak((0..words).map(|_| AtomicU64::new(0)).collect());
        let is_armed = !random.one_in(3);
        let mut program = Self {
            random,
            arena,
            secret,
            is_armed,
            pid: 0,
            progress,
            descriptors: [0; 8],
        };
        program.pid = call(__NR_getpid, [0; 6]).unwrap_or(0);
        program.open();
        if program.is_armed && program.random.one_in(2) {
            program.race();
        }
        program
    }

    /// Makes `count` calls; the finding.
    pub(crate) fn run(mut self, count: u64) -> u8 {
        for turn in 0..count {
            if turn.is_multiple_of(16) {
                self.tick();
            }
            let row = self.row();
            let arguments = self.arguments(row);
            self.progress.note(turn + 1, row.nr, &arguments);
            let result = call(row.nr, arguments);
            // A copy of this process, or a thread with a copy of this stack.
            if call(__NR_gettid, [0; 6]) != Ok(self.pid) {
                let _ = call(__NR_exit, [0; 6]);
            }
            let finding = self.look(row, result);
            if finding != CLEAN {
                return finding;
            }
        }
        CLEAN
    }

    /// Descriptors of several kinds.
    fn open(&mut self) {
        let mut pipe = [0_i32; 2];
        let mut pair = [0_i32; 2];
        let two = |nr, first: u64, second: u64, ends: &mut [i32; 2]| {
            let ends = (&raw mut *ends).expose_provenance() as u64;
            let _ = if nr == __NR_pipe2 {
                call(nr, [ends, u64::from(O_NONBLOCK), 0, 0, 0, 0])
            } else {
                call(nr, [first, second, 0, ends, 0, 0])
            };
        };
        two(__NR_pipe2, 0, 0, &mut pipe);
        two(__NR_socketpair, 1, 1 | 0o4000, &mut pair);
        let cwd = AT_FDCWD as i64 as u64;
        let at = |text: &core::ffi::CStr| text.as_ptr().expose_provenance() as u64;
        let file = call(
            __NR_openat,
            [cwd, at(c"a"), u64::from(O_RDWR | O_CREAT), 0o600, 0, 0],
        );
        let folder = call(__NR_openat, [cwd, at(c"."), 0, 0, 0, 0]);
        let event = call(__NR_eventfd2, [1, u64::from(O_NONBLOCK), 0, 0, 0, 0]);
        let epoll = call(__NR_epoll_create1, [0; 6]);
        self.descriptors = [
            pipe[0] as u64,
            pipe[1] as u64,
            pair[0] as u64,
            pair[1] as u64,
            file.unwrap_or(u64::MAX),
            folder.unwrap_or(u64::MAX),
            event.unwrap_or(u64::MAX),
            epoll.unwrap_or(u64::MAX),
        ];
    }

    /// Changes words of the arena while they are used.
    fn race(&self) {
        let (arena, secret) = (self.arena, self.secret);
        let mut random = self.random.clone();
        std::thread::spawn(move || {
            while !STOP.load(Ordering::Relaxed) {
                let word = &arena[random.below(512) as usize];
                let before = word.load(Ordering::Relaxed);
                word.store(secret.address(&mut random), Ordering::Relaxed);
                for _ in 0..random.below(64) {
                    core::hint::spin_loop();
                }
                word.store(before, Ordering::Relaxed);
            }
        });
    }

    /// Whatever earlier calls did to the timer, its handler or the mask: calls
    /// that wait end by it.
    fn tick(&self) {
        let none = 0_u64;
        let zeros = [0_u64; 4];
        let set = |signal: u32, action: &[u64; 4]| {
            let action = (&raw const *action).expose_provenance() as u64;
            let _ = call(__NR_rt_sigaction, [u64::from(signal), action, 0, 8, 0, 0]);
        };
        for signal in [SIGSEGV, SIGBUS, SIGILL] {
            set(signal, &zeros);
        }
        // SAFETY: all zeros is a value of it.
        let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
        // No SA_RESTART.
        action.sa_sigaction = on_tick as extern "C" fn(i32) as *const () as usize;
        // SAFETY: an ordinary handler that does nothing.
        unsafe { libc::sigaction(libc::SIGALRM, &raw const action, core::ptr::null_mut()) };
        let mask = (&raw const none).expose_provenance() as u64;
        let _ = call(__NR_rt_sigprocmask, [2, mask, 0, 8, 0, 0]);
        let every: [i64; 4] = [0, TICK_US, 0, TICK_US];
        let every = (&raw const every).expose_provenance() as u64;
        let _ = call(__NR_setitimer, [0, every, 0, 0, 0, 0]);
    }

    fn row(&mut self) -> &'static Call {
        loop {
            let all = calls();
            let row = &all[self.random.below(all.len() as u64) as usize];
            let is_dull = matches!(row.handling, Handling::Refused(_) | Handling::Missing);
            let is_end = [__NR_exit, __NR_exit_group, __NR_rt_sigreturn].contains(&row.nr);
            if !((is_dull || is_end) && !self.random.one_in(64)) {
                return row;
            }
        }
    }

    fn arguments(&mut self, row: &Call) -> [u64; 6] {
        self.fill();
        let mut arguments = [0; 6];
        for (index, argument) in arguments.iter_mut().enumerate() {
            *argument = match row.args.get(index) {
                None => self.number(),
                Some(Arg::Value) => self.number(),
                Some(Arg::Fd) => self.descriptor(),
                Some(Arg::Path | Arg::Text | Arg::Copied(Shape::Path)) => self.path(),
                Some(Arg::Copied(shape)) => self.structure(*shape),
                Some(Arg::Checked) if self.random.one_in(3) => self.number(),
                Some(_) => self.pointer(),
            };
        }
        // Sizes that fit, mostly: what is wrong with the first argument is
        // looked at last.
        for arg in row.args {
            let size = match arg {
                Arg::In(size) | Arg::Out(size) | Arg::InOut(size) => *size,
                Arg::Copied(Shape::Plain(size)) => *size,
                _ => continue,
            };
            if let Size::Arg(other) | Size::Arg32(other) | Size::Items(other, _) = size
                && !self.random.one_in(4)
            {
                arguments[usize::from(other)] = self.random.below(128);
            }
        }
        // The guard's own checks of a set's size come first.
        if row.name.starts_with("rt_sig") && !self.random.one_in(4) {
            arguments[3] = 8;
        }
        arguments
    }

    /// New words for the beginning of the arena, which is where structures are.
    fn fill(&mut self) {
        for index in 0..128 {
            let word = self.word();
            self.arena[index].store(word, Ordering::Relaxed);
        }
    }

    fn word(&mut self) -> u64 {
        match self.random.below(8) {
            0 | 1 => self.pointer(),
            2 => self.number(),
            3 => self.descriptor(),
            // Two numbers of 32 bits.
            4 => self.random.below(40) << 32 | self.random.below(40),
            5 => 0,
            // No address of the guard: those are below 2^47.
            6 => self.random.next() | 1 << 62,
            _ => self.random.below(64),
        }
    }

    fn number(&mut self) -> u64 {
        const NUMBERS: [u64; 16] = [
            0,
            1,
            2,
            8,
            PAGE_SIZE,
            0x7fff_f000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x1_0000_0000,
            1 << 45,
            1 << 62,
            1 << 63,
            u64::MAX - 4095,
            u64::MAX - 7,
            u64::MAX,
        ];
        match self.random.below(6) {
            0 => self.random.pick(&NUMBERS),
            1 => 1 << self.random.below(32),
            2 => self.random.below(256),
            3 => self.pid,
            4 if self.is_armed => self.secret.address(&mut self.random),
            _ => self.random.below(16),
        }
    }

    fn descriptor(&mut self) -> u64 {
        match self.random.below(8) {
            0 => self.random.below(1100),
            1 => self.random.below(12),
            2 => self
                .random
                .pick(&[u64::MAX, AT_FDCWD as i64 as u64, 1 << 31]),
            _ => self.random.pick(&self.descriptors),
        }
    }

    fn path(&mut self) -> u64 {
        if self.random.one_in(4) {
            return self.pointer();
        }
        let path = self.random.pick(&PATHS);
        path.as_ptr().expose_provenance() as u64
    }

    /// Where a structure could be.
    fn pointer(&mut self) -> u64 {
        let start = self.arena.as_ptr().expose_provenance() as u64;
        let end = start + ARENA_LEN as u64;
        match self.random.below(12) {
            0 => 0,
            1 if self.is_armed => self.secret.address(&mut self.random),
            2 if self.is_armed => self.random.pick(&[
                USER_HI - 8,
                USER_HI - 1,
                USER_HI,
                0xffff_8000_0000_0000,
                u64::MAX - 7,
            ]),
            3 => USER_TOP - self.random.below(16),
            4 => end - self.random.below(64),
            5 => start + self.random.below(1024),
            _ => start + self.random.below(120) * 8,
        }
    }

    /// A pointer to a structure of this shape, some of whose words lie.
    fn structure(&mut self, shape: Shape) -> u64 {
        if self.random.one_in(6) {
            return self.pointer();
        }
        let at = self.random.below(32) as usize * 16;
        let mut words = [0_u64; 16];
        match shape {
            Shape::Vectors(..) => {
                for pair in words.chunks_exact_mut(2) {
                    (pair[0], pair[1]) = (self.pointer(), self.length());
                }
            }
            Shape::Strings => {
                for word in &mut words[..4] {
                    *word = self.path();
                }
            }
            Shape::SignalSet => (words[0], words[1]) = (self.pointer(), 8),
            Shape::Message(_) | Shape::Messages(..) => {
                for message in words.chunks_exact_mut(8) {
                    message.copy_from_slice(&[
                        self.pointer(),
                        self.random.below(130),
                        self.pointer(),
                        self.random.below(4),
                        self.pointer(),
                        self.random.below(128),
                        0,
                        self.random.below(8),
                    ]);
                }
            }
            // An address: of the family of IP, Unix or netlink.
            Shape::Address(_) => {
                words[0] = self.random.pick(&[1, 2, 10, 16]) | (self.random.below(1 << 30) << 16);
            }
            Shape::LengthOf(_) => words[0] = self.random.below(256),
            _ => {
                for word in &mut words {
                    *word = self.word();
                }
            }
        }
        if self.random.one_in(4) {
            let index = self.random.below(16) as usize;
            words[index] = self.word();
        }
        for (place, word) in self.arena[at..].iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        self.arena[at..].as_ptr().expose_provenance() as u64
    }

    fn length(&mut self) -> u64 {
        match self.random.below(4) {
            0 => self.number(),
            _ => self.random.below(200),
        }
    }

    /// What must not be in the program's memory.
    fn look(&mut self, row: &Call, result: SysResult) -> u8 {
        let secret = self.secret;
        if result.is_ok_and(|value| secret.holds(value)) {
            return SECRET_SEEN;
        }
        for word in self.arena {
            let value = word.load(Ordering::Relaxed);
            if secret.holds(value) {
                return SECRET_SEEN;
            }
            // Random bytes may be anything.
            if !self.is_armed && row.nr != __NR_getrandom && secret.is_nearby(value) {
                return ADDRESS_SEEN;
            }
        }
        CLEAN
    }
}
