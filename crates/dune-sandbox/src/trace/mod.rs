//! Tracing: every system call of the program, decoded.
//!
//! ```text
//! Guard::on_syscall --> Tracer::before   what the program passes, as text
//!        |
//!    the call
//!        |
//!        +-----------> Tracer::after    what it got; the whole to the sink
//! ```
//!
//! How an argument is printed comes from the call's row in [`crate::table`] and
//! from `signature`, the names of numbers from `names`, structures from
//! `values`. Without a tracer a call costs one comparison more.
//!
//! A line is complete when the call is over, so that a call that waits is not
//! seen yet; calls that do not return (`exit`) are told at once.

mod filter;
mod hook;
mod names;
mod signature;
mod summary;
mod text;
mod values;

use core::fmt::Write;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

pub use filter::{Filter, FilterError};
pub use summary::{Count, table_of};

use linux_raw_sys::general::{__NR_brk, __NR_exit, __NR_exit_group, __NR_mmap, __NR_mremap};

use crate::host::{Errno, SysResult};
use crate::signal::SigInfo;
use crate::table::{self, Args, Call};
use crate::user::UserMemory;
use signature::{As, is_told_after, signature};
use summary::{Failed, Summary};
use values::{Values, pointer};

/// Where events go. Called on whatever thread the program runs; one call to
/// write a whole line keeps lines whole.
pub trait Sink: Send + Sync {
    /// A system call is over, or will not return.
    fn call(&self, event: &CallEvent<'_>);

    /// A signal reaches the program: its `siginfo`, decoded.
    fn signal(&self, event: &SignalEvent<'_>);

    /// The descriptors it writes to, which the program must not touch.
    fn descriptors(&self) -> Vec<RawFd>;
}

/// A system call.
#[derive(Clone, Debug)]
pub struct CallEvent<'a> {
    /// The thread that made it.
    pub thread: u32,
    /// When it began.
    pub began: SystemTime,
    /// Its number.
    pub number: u32,
    /// Its name; `syscall_0x...` for a number that no call has.
    pub name: &'a str,
    /// Its arguments, decoded.
    pub args: &'a [String],
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took, from the trap to the answer.
    pub took: Duration,
}

/// A signal that reaches the program.
#[derive(Clone, Debug)]
pub struct SignalEvent<'a> {
    /// The thread that gets it.
    pub thread: u32,
    /// Its name.
    pub name: &'a str,
    /// What is known of it: `{si_signo=SIGUSR1, si_code=SI_USER, ...}`.
    pub info: &'a str,
}

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned a number.
    Value(u64),
    /// It returned an address.
    Address(u64),
    /// It failed.
    Failed(Errno),
    /// A signal prevented it; it may begin again.
    Interrupted,
    /// It does not return.
    Gone,
}

impl core::fmt::Display for Outcome {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Value(value) => write!(f, "{}", *value as i64),
            Self::Address(0) => f.write_str("NULL"),
            Self::Address(address) => write!(f, "{address:#x}"),
            Self::Failed(errno) => write!(f, "-1 {errno:?} ({})", description(*errno)),
            Self::Interrupted => f.write_str("? ERESTARTSYS (To be restarted)"),
            Self::Gone => f.write_str("?"),
        }
    }
}

/// What the error means, without the number that `std` adds.
fn description(errno: Errno) -> String {
    let text = errno.to_string();
    match text.rfind(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Calls that do not return.
const EXITS: [u32; 2] = [__NR_exit, __NR_exit_group];

/// Calls whose result is an address.
const RETURN_ADDRESSES: [u32; 3] = [__NR_mmap, __NR_mremap, __NR_brk];

/// What is traced, and how.
pub struct Options {
    /// Which calls.
    pub filter: Filter,
    /// Most bytes of a string or buffer.
    pub text_limit: usize,
    /// Where events go; `None` to count only.
    pub sink: Option<Arc<dyn Sink>>,
    /// Whether calls are counted.
    pub counting: Counting,
}

impl core::fmt::Debug for Options {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Options")
            .field("text_limit", &self.text_limit)
            .field("counting", &self.counting)
            .finish_non_exhaustive()
    }
}

/// Whether calls are counted for a summary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// They are.
    On,
    /// They are not.
    Off,
}

/// Traces the program of a [`crate::Command`].
pub struct Tracer {
    filter: Filter,
    text_limit: usize,
    sink: Option<Arc<dyn Sink>>,
    summary: Option<Summary>,
}

impl core::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Tracer").finish_non_exhaustive()
    }
}

/// A call that has begun.
#[derive(Debug)]
pub(crate) struct Begun {
    nr: u32,
    args: Args,
    /// The arguments that were printed already.
    words: Vec<Option<String>>,
    wall: SystemTime,
    at: Instant,
}

impl Tracer {
    /// A tracer.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, if there is none for the counters.
    pub fn new(options: Options) -> Result<Self, Errno> {
        let summary = match options.counting {
            Counting::On => Some(Summary::new()?),
            Counting::Off => None,
        };
        Ok(Self {
            filter: options.filter,
            text_limit: options.text_limit,
            sink: options.sink,
            summary,
        })
    }

    /// What was counted so far, the dearest call first; nothing if counting is
    /// off.
    #[must_use]
    pub fn counts(&self) -> Vec<Count> {
        self.summary
            .as_ref()
            .map(Summary::counts)
            .unwrap_or_default()
    }

    /// The descriptors that the program must not touch.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let sink = self.sink.as_ref();
        sink.map(|sink| sink.descriptors()).unwrap_or_default()
    }

    /// A call begins.
    pub(crate) fn before(
        &self,
        nr: u32,
        args: Args,
        memory: UserMemory<'_>,
        thread: u32,
    ) -> Option<Begun> {
        if !self.filter.wants(nr) {
            return None;
        }
        let mut begun = Begun {
            nr,
            args,
            words: Vec::new(),
            wall: SystemTime::UNIX_EPOCH,
            at: Instant::now(),
        };
        if let Some(sink) = &self.sink {
            begun.wall = SystemTime::now();
            begun.words = self.words_before(nr, args, memory);
            if EXITS.contains(&nr) {
                let words: Vec<String> = begun.words.drain(..).flatten().collect();
                self.tell(
                    sink.as_ref(),
                    &begun,
                    &words,
                    Outcome::Gone,
                    Duration::ZERO,
                    thread,
                );
            }
        }
        // Not what the tracer itself takes.
        begun.at = Instant::now();
        Some(begun)
    }

    fn words_before(&self, nr: u32, args: Args, memory: UserMemory<'_>) -> Vec<Option<String>> {
        let call = table::find(nr);
        let values = self.values(call, args, memory, None);
        match (call, signature(nr)) {
            (Some(call), Some(signature)) => shown(nr, args, signature)
                .iter()
                .enumerate()
                .map(|(index, &how)| {
                    let now = !is_told_after(call, index, how);
                    now.then(|| word(&values, index, how))
                })
                .collect(),
            _ => args.iter().map(|&arg| Some(hex(arg))).collect(),
        }
    }

    /// A call is over. `result` is `None` if it does not return.
    pub(crate) fn after(
        &self,
        mut begun: Begun,
        result: Option<SysResult>,
        memory: UserMemory<'_>,
        thread: u32,
    ) {
        let took = begun.at.elapsed();
        let outcome = match result {
            None => Outcome::Gone,
            Some(Err(Errno::ERESTARTSYS)) => Outcome::Interrupted,
            Some(Err(errno)) => Outcome::Failed(errno),
            Some(Ok(value)) if RETURN_ADDRESSES.contains(&begun.nr) => Outcome::Address(value),
            Some(Ok(value)) => Outcome::Value(value),
        };
        // It begins again, and is counted then.
        if let Some(summary) = self
            .summary
            .as_ref()
            .filter(|_| outcome != Outcome::Interrupted)
        {
            let failed = match outcome {
                Outcome::Failed(_) => Failed::Yes,
                _ => Failed::No,
            };
            summary.count(begun.nr, failed, took);
        }
        let told = EXITS.contains(&begun.nr);
        if let Some(sink) = self.sink.as_ref().filter(|_| !told) {
            let words = self.words_after(&mut begun, result, memory);
            self.tell(sink.as_ref(), &begun, &words, outcome, took, thread);
        }
    }

    fn words_after(
        &self,
        begun: &mut Begun,
        result: Option<SysResult>,
        memory: UserMemory<'_>,
    ) -> Vec<String> {
        let call = table::find(begun.nr);
        let value = result.and_then(Result::ok);
        let values = self.values(call, begun.args, memory, value);
        let signature = signature(begun.nr).unwrap_or_default();
        let words = core::mem::take(&mut begun.words);
        words
            .into_iter()
            .enumerate()
            .map(|(index, printed)| match (printed, signature.get(index)) {
                (Some(printed), _) => printed,
                (None, Some(&how)) => word(&values, index, how),
                (None, None) => hex(begun.args[index]),
            })
            .collect()
    }

    /// A signal reaches the program.
    pub(crate) fn signal(&self, info: &SigInfo, thread: u32) {
        let Some(sink) = &self.sink else { return };
        let (mut name, mut text) = (String::new(), String::new());
        names::signal(&mut name, u64::from(info.signal()));
        values::signal_info(&mut text, info);
        sink.signal(&SignalEvent {
            thread,
            name: &name,
            info: &text,
        });
    }

    fn values<'a>(
        &self,
        call: Option<&'static Call>,
        args: Args,
        memory: UserMemory<'a>,
        result: Option<u64>,
    ) -> Values<'a> {
        Values {
            memory,
            call,
            args,
            result,
            limit: self.text_limit,
        }
    }

    fn tell(
        &self,
        sink: &dyn Sink,
        begun: &Begun,
        args: &[String],
        outcome: Outcome,
        took: Duration,
        thread: u32,
    ) {
        let call = table::find(begun.nr);
        let unknown;
        let name = match call {
            Some(call) => call.name,
            None => {
                unknown = format!("syscall_{:#x}", begun.nr);
                &unknown
            }
        };
        sink.call(&CallEvent {
            thread,
            began: begun.wall,
            number: begun.nr,
            name,
            args,
            outcome,
            took,
        });
    }
}

/// The arguments that mean something: the mode of `open` only where a file may
/// be made.
fn shown(nr: u32, args: Args, signature: &'static [As]) -> &'static [As] {
    use linux_raw_sys::general::{__NR_open, __NR_openat, O_CREAT, O_DIRECTORY, O_TMPFILE};
    const MAKES: u64 = (O_CREAT | (O_TMPFILE & !O_DIRECTORY)) as u64;
    let flags = if nr == __NR_open {
        args[1]
    } else if nr == __NR_openat {
        args[2]
    } else {
        return signature;
    };
    if flags & MAKES == 0 {
        &signature[..signature.len() - 1]
    } else {
        signature
    }
}

fn word(values: &Values<'_>, index: usize, how: As) -> String {
    let mut word = String::new();
    values.print(&mut word, index, how);
    word
}

fn hex(value: u64) -> String {
    let mut word = String::new();
    pointer(&mut word, value);
    word
}

/// A signal by its name: `SIGINT`, `SIGRT_3`.
#[must_use]
pub fn signal_name(number: u32) -> String {
    let mut name = String::new();
    names::signal(&mut name, number.into());
    name
}

/// The event as one line, without its end: `read(3, "abc", 4096) = 3`.
#[must_use]
pub fn line_of(event: &CallEvent<'_>) -> String {
    /// The column of the sign, as far as a line leaves room.
    const COLUMN: usize = 39;
    let mut line = format!("{}({})", event.name, event.args.join(", "));
    while line.len() < COLUMN {
        line.push(' ');
    }
    let _ = write!(line, " = {}", event.outcome);
    line
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use linux_raw_sys::general::*;

    use super::*;
    use crate::testing::UserPages;

    struct Lines(Arc<Mutex<Vec<String>>>);

    impl Sink for Lines {
        fn call(&self, event: &CallEvent<'_>) {
            self.0.lock().unwrap().push(line_of(event));
        }

        fn signal(&self, event: &SignalEvent<'_>) {
            let line = format!("--- {} {} ---", event.name, event.info);
            self.0.lock().unwrap().push(line);
        }

        fn descriptors(&self) -> Vec<RawFd> {
            Vec::new()
        }
    }

    fn traced(nr: u32, args: &[u64], result: SysResult, pages: &UserPages) -> String {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let tracer = Tracer::new(Options {
            filter: Filter::all(),
            text_limit: 32,
            sink: Some(Arc::new(Lines(Arc::clone(&lines)))),
            counting: Counting::Off,
        })
        .unwrap();
        let memory = UserMemory::new(&pages.memory, std::process::id());
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        let begun = tracer.before(nr, all, memory, 1).unwrap();
        tracer.after(begun, Some(result), memory, 1);
        let line = lines.lock().unwrap().remove(0);
        // Without the alignment.
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn calls_are_printed_as_people_know_them() {
        let pages = UserPages::anonymous(1);
        let memory = UserMemory::new(&pages.memory, std::process::id());
        let at = pages.start();
        let cwd = AT_FDCWD as i64 as u64;
        memory.write(at, b"/etc/x\0").unwrap();
        let trace = |nr, args: &[u64], result| traced(nr, args, result, &pages);
        assert_eq!(
            trace(__NR_openat, &[cwd, at, u64::from(O_CLOEXEC), 0o644], Ok(3)),
            "openat(AT_FDCWD, \"/etc/x\", O_RDONLY|O_CLOEXEC) = 3"
        );
        assert_eq!(
            trace(
                __NR_openat,
                &[cwd, at, u64::from(O_CREAT | O_WRONLY), 0o644],
                Err(Errno::EACCES)
            ),
            "openat(AT_FDCWD, \"/etc/x\", O_WRONLY|O_CREAT, 0644) = -1 EACCES (Permission denied)"
        );
        assert_eq!(
            trace(__NR_read, &[0, at, 4096], Ok(4)),
            "read(0, \"/etc\", 4096) = 4"
        );
        assert_eq!(
            trace(__NR_read, &[0, at, 4096], Err(Errno::EAGAIN)),
            format!("read(0, {at:#x}, 4096) = -1 EAGAIN (Resource temporarily unavailable)")
        );
        assert_eq!(
            trace(__NR_mmap, &[0, 8192, 3, 0x22, u64::MAX, 0], Ok(0x1000)),
            "mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x1000"
        );
        assert_eq!(trace(__NR_kill, &[7, 15], Ok(0)), "kill(7, SIGTERM) = 0");
        assert_eq!(trace(__NR_exit_group, &[3], Ok(0)), "exit_group(3) = ?");
        assert_eq!(
            trace(500, &[1], Err(Errno::ENOSYS)),
            "syscall_0x1f4(0x1, NULL, NULL, NULL, NULL, NULL) = -1 ENOSYS \
             (Function not implemented)"
        );
    }

    #[test]
    fn what_the_program_does_not_have_is_an_address() {
        let pages = UserPages::anonymous(1);
        let mine = 7_u64;
        let addr = crate::calls::own(&mine);
        for nr in (0..table::END as u32).filter(|nr| table::find(*nr).is_some()) {
            // Nothing of the guard's memory is shown, whatever the call.
            let line = traced(nr, &[addr; 6], Ok(8), &pages);
            assert!(!line.contains("[7"), "{line}");
            let line = traced(nr, &[u64::MAX; 6], Err(Errno::EFAULT), &pages);
            assert!(line.contains('('), "{line}");
        }
    }
}
