//! Starting a program in the sandbox, in the manner of
//! [`std::process::Command`].

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use dune_loader::{ImageError, find_command};

use crate::calls::segment::Segment;
use crate::clock;
use crate::confine::{self, ConfineError, SecondWall};
use crate::debug::Debugger;
use crate::engine::{Engine, EngineError};
use crate::guard::{End, Guard, MissingCall};
use crate::handler::{HandleError, Handlers, Request};
use crate::host::{Errno, SysResult};
use crate::launch::{self, LaunchError};
use crate::policy::enforced::Enforced;
use crate::policy::{self, Policy, Refusal, RulesError};
use crate::range::USER_HI;
use crate::signal::{self, Dispositions, ThreadSignals};
use crate::snapshot::{Event, Marker, Next, ResumeError, Resumed, Served, Service, SymbolError};
use crate::trace::Tracer;
use crate::working_set::{Running, Sampler};

/// A program to be run, with its arguments and environment.
///
/// The program runs *in this process*: it has the process's descriptors,
/// working directory and id, and the thread that runs it. One program can run
/// at a time in a process, and the process should have no other thread that
/// takes signals.
///
/// ```no_run
/// use dune_sandbox::Command;
///
/// let engine = dune_sandbox::engine::on_host::OnHost::new()?;
/// let outcome = Command::new("ls").args(["-l", "/"]).run(Box::new(engine))?;
/// outcome.end.leave()
/// # ; Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Command {
    program: OsString,
    name: Option<OsString>,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    policy: Policy,
    wall: SecondWall,
    own_checks: bool,
    explain: Option<Arc<File>>,
    crash_report: Option<Arc<File>>,
    hidden: Vec<RawFd>,
    segments: Vec<i32>,
    handlers: Handlers,
    tracer: Option<Arc<Tracer>>,
    service: Option<Arc<Mutex<Option<Served>>>>,
    sampler: Option<Arc<Mutex<Option<Sampler>>>>,
    resumed: Option<Arc<Mutex<Option<Resumed>>>>,
    debugger: Option<Arc<Debugger>>,
}

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// System calls it made that the guard does not have, each answered with
    /// `ENOSYS` (`ENOTTY` for `ioctl` requests).
    pub missing: Vec<MissingCall>,
    /// What the policy refused, each request once.
    pub refused: Vec<Refusal>,
    /// How often it refused something.
    pub refusals: u64,
}

/// Why a program could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The working directory could not be entered.
    #[error("cannot enter {}: {source}", path.display())]
    Directory {
        /// The directory asked for.
        path: PathBuf,
        /// What the host kernel said.
        source: std::io::Error,
    },
    /// An argument or a variable has a zero byte in it.
    #[error("{0:?} holds a zero byte, which no argument or variable can")]
    ZeroByte(OsString),
    /// Something of this process is where the program has to go.
    #[error(
        "this process has memory at {start:#x}, below {USER_HI:#x}, where the program has to go; \
         if the stack limit is unlimited, set one (ulimit -Ss 8192), for without one the kernel \
         maps there; otherwise link the binary as a position-independent executable"
    )]
    Occupied {
        /// Where the first such mapping begins.
        start: u64,
    },
    /// The policy does not fit this machine.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// The process could not be confined.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The program cannot be stopped where it was asked for.
    #[error(transparent)]
    Symbol(#[from] SymbolError),
    /// The engine does not say which memory the program uses.
    #[error("this engine cannot say which memory a program uses; choose another placement")]
    NotNoted,
    /// The saved program cannot be resumed.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// A segment of shared memory that the program is given is not there.
    #[error("cannot find the shared memory {id}: {errno}; ipcs -m lists what there is")]
    Segment {
        /// Its id.
        id: i32,
        /// What the host kernel said.
        errno: Errno,
    },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl RunError {
    /// The exit code that a shell gives: 127 if the program was not found, 126
    /// if it cannot be run, 125 if the sandbox itself failed.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        const SANDBOX_FAILED: u8 = 125;
        match self {
            Self::Launch(LaunchError::Image(error)) => error.exit_code(),
            Self::Launch(LaunchError::Map { .. }) => dune_loader::EXIT_CANNOT_RUN,
            _ => SANDBOX_FAILED,
        }
    }
}

impl From<ImageError> for RunError {
    fn from(error: ImageError) -> Self {
        Self::Launch(error.into())
    }
}

impl Command {
    /// Runs `program`, looked up in `PATH` if it has no slash, with this
    /// process's environment and directory and no arguments.
    #[must_use]
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            name: None,
            args: Vec::new(),
            environment: std::env::vars_os().collect(),
            directory: None,
            policy: Policy::new(),
            wall: SecondWall::default(),
            own_checks: true,
            explain: None,
            crash_report: None,
            hidden: Vec::new(),
            segments: Vec::new(),
            handlers: Handlers::default(),
            tracer: None,
            service: None,
            sampler: None,
            resumed: None,
            debugger: None,
        }
    }

    /// Resumes a program that [`Stopped::save`](crate::snapshot::Stopped::save)
    /// has saved, from where it was then: in the folder, with the environment and
    /// the open files that it had, with this process's standard input, output
    /// and error. The file may come from anybody. If the program is
    /// [served](Command::serve), it is at its marker at once.
    ///
    /// # Errors
    ///
    /// [`ResumeError`], if the file is none, is damaged, or was saved on another
    /// kind of CPU or under another kernel.
    pub fn resume(file: File) -> Result<Self, ResumeError> {
        let resumed = Resumed::read(file)?;
        let mut this = Self::new(resumed.exe());
        this.resumed = Some(Arc::new(Mutex::new(Some(resumed))));
        Ok(this)
    }

    /// Describes the program's death by a signal in `file`: registers and a
    /// backtrace ([`crate::crash::Crash`]). The descriptor is hidden from the
    /// program; see [`crate::host::move_fd_high`].
    ///
    /// A signal that somebody else sends, and that the program does not
    /// handle, ends this process without it.
    #[must_use]
    pub fn crash_report_to(mut self, file: File) -> Self {
        self.crash_report = Some(Arc::new(file));
        self
    }

    /// Writes a line to `file` for each request that the policy refuses, as it
    /// occurs. The descriptor is hidden from the program; see
    /// [`crate::host::move_fd_high`].
    #[must_use]
    pub fn explain_to(mut self, file: File) -> Self {
        self.explain = Some(Arc::new(file));
        self
    }

    /// Hides a descriptor of this process from the program, for as long as it runs; see
    /// [`crate::host::move_fd_high`].
    #[must_use]
    pub fn hide(mut self, descriptor: RawFd) -> Self {
        self.hidden.push(descriptor);
        self
    }

    /// Sets what the program may do. Its environment is made of this
    /// command's by [`Policy::environment`].
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// Sets whether the second wall ([`crate::confine`]) must stand.
    #[must_use]
    pub fn second_wall(mut self, wall: SecondWall) -> Self {
        self.wall = wall;
        self
    }

    /// Leaves the policy to the second wall alone, to test that it stands by
    /// itself.
    #[cfg(feature = "testing")]
    #[doc(hidden)]
    #[must_use]
    pub fn without_own_policy_checks(mut self) -> Self {
        self.own_checks = false;
        self
    }

    /// Hands pointers of forwarded calls to the kernel unchecked from now on, to
    /// test that the wall of protection keys holds by itself.
    #[cfg(feature = "testing")]
    #[doc(hidden)]
    pub fn without_pointer_checks() {
        crate::peel::skip_pointer_checks();
    }

    /// Makes calls as if there were no protection keys from now on, to test
    /// that it is they that hold. Before there is an engine.
    #[cfg(feature = "testing")]
    #[doc(hidden)]
    pub fn without_wall() {
        crate::peel::skip_wall();
    }

    /// Sets `argv[0]`, which otherwise is the program as given.
    #[must_use]
    pub fn arg0(mut self, name: impl AsRef<OsStr>) -> Self {
        self.name = Some(name.as_ref().to_owned());
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let (key, value) = (key.as_ref().to_owned(), value.as_ref().to_owned());
        self.environment.retain(|(other, _)| *other != key);
        self.environment.push((key, value));
        self
    }

    /// Removes a variable of the environment.
    #[must_use]
    pub fn env_remove(mut self, key: impl AsRef<OsStr>) -> Self {
        self.environment.retain(|(other, _)| other != key.as_ref());
        self
    }

    /// Empties the environment.
    #[must_use]
    pub fn env_clear(mut self) -> Self {
        self.environment.clear();
        self
    }

    /// Starts the program in `directory`.
    #[must_use]
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Has `handler` answer the system call of this name. See
    /// [`handler`](crate::handler).
    ///
    /// ```
    /// use dune_sandbox::Command;
    ///
    /// let command = Command::new("id").handle("getuid", |_| Ok(0))?;
    /// # let _ = command;
    /// # Ok::<(), dune_sandbox::HandleError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`HandleError`], if there is no such call or it cannot have a handler.
    pub fn handle(
        mut self,
        call: &str,
        handler: impl Fn(&mut Request<'_>) -> SysResult + Send + Sync + 'static,
    ) -> Result<Self, HandleError> {
        self.handlers.add(call, handler)?;
        Ok(self)
    }

    /// Has every system call of the program traced.
    #[must_use]
    pub fn tracer(mut self, tracer: Arc<Tracer>) -> Self {
        self.tracer = Some(tracer);
        self
    }

    /// Lets the program attach the System V shared memory of this id, which it
    /// has no other way to reach (`shmat`; it stays attached until the program
    /// ends).
    #[must_use]
    pub fn segment(mut self, id: i32) -> Self {
        self.segments.push(id);
        self
    }

    /// Stops the program at its first instruction until gdb is there, and has
    /// it debugged. Of clones of this command, the first that runs is.
    #[must_use]
    pub fn debugger(mut self, debugger: Debugger) -> Self {
        self.debugger = Some(Arc::new(debugger));
        self
    }

    /// Has `service` decide, when the program reaches `marker` and when it
    /// ends, how it goes on: see [`crate::snapshot`]. Of clones of this command,
    /// the first that runs is served.
    #[must_use]
    pub fn serve(mut self, marker: Marker, service: Box<dyn Service>) -> Self {
        let served = Served::new(marker, service);
        self.service = Some(Arc::new(Mutex::new(Some(served))));
        self
    }

    /// Has `sampler` look at which memory the program uses. Of clones of this
    /// command, the first that runs is sampled.
    #[must_use]
    pub fn sample(mut self, sampler: Sampler) -> Self {
        self.sampler = Some(Arc::new(Mutex::new(Some(sampler))));
        self
    }

    /// Runs the program to its end.
    ///
    /// Signals whose default action ends the process end it here as well,
    /// unless the program caused them itself; the caller mimics those with
    /// [`End::leave`].
    ///
    /// # Errors
    ///
    /// If it cannot be started, or the engine fails.
    pub fn run(self, mut engine: Box<dyn Engine>) -> Result<Outcome, RunError> {
        check_user_space_is_free()?;
        let policy = self.policy.from_here();
        // First, so that relative paths of the program are seen from there.
        if let Some(path) = &self.directory {
            std::env::set_current_dir(path).map_err(|source| RunError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        let environment = policy.environment(self.environment)?;
        let search = environment
            .iter()
            .find(|(key, _)| key == "PATH")
            .map(|(_, value)| value.as_os_str());
        let resumed = self.resumed.and_then(|resumed| {
            let mut resumed = resumed.lock().unwrap_or_else(PoisonError::into_inner);
            resumed.take()
        });
        let path = match &resumed {
            Some(resumed) => resumed.exe(),
            None => find_command(&self.program, search)?,
        };
        let name = self.name.as_ref().unwrap_or(&self.program);
        let argv = core::iter::once(name)
            .chain(&self.args)
            .map(|arg| c_string(arg))
            .collect::<Result<Vec<_>, _>>()?;
        let envp = environment
            .iter()
            .map(|(key, value)| {
                let mut text = key.clone();
                text.push("=");
                text.push(value);
                c_string(&text)
            })
            .collect::<Result<Vec<_>, _>>()?;

        let [token, ..] = launch::random_words().map_err(|errno| LaunchError::Host {
            what: "random numbers",
            source: errno.into(),
        })?;
        signal::record::choose_token(token);
        let signals = ThreadSignals::inherited();
        // What ring 3 reads there is no memory of its own, to be counted.
        let is_sampled = self.sampler.is_some();
        let shows_clock = !is_sampled && clock::is_shown_by(engine.as_mut());
        let mut guard = Guard::new(engine, Dispositions::inherited(), signals);
        guard.program.hide(&self.hidden);
        guard.program.set_shows_clock(shows_clock);
        guard.program.set_handlers(self.handlers);
        if let Some(tracer) = self.tracer {
            guard.program.set_tracer(tracer);
        }
        if let Some(debugger) = &self.debugger {
            guard.program.set_debugger(debugger);
        }
        signal::host::take_over_from_libc();
        signal::host::forbid_core_dumps();
        let segments = self.segments.iter().map(|&id| {
            let found = Segment::of(id);
            found.map_err(|errno| RunError::Segment { id, errno })
        });
        let segments = segments.collect::<Result<Vec<_>, _>>()?;
        let needed = if policy.restricts_files() && resumed.is_none() {
            policy::needed::to_load(&path, &environment)?
        } else {
            Vec::new()
        };
        let rules = policy.rules(&needed)?;
        launch::learn_machine()?;
        if let Some(time) = rules.limits.cpu_time {
            confine::limit_cpu_time(time)?;
        }
        confine::confine(&policy, &rules, self.wall)?;
        let policy = Enforced::new(rules, self.explain, self.own_checks)
            .count_tasks()
            .map_err(|errno| LaunchError::Map {
                what: "the count of threads",
                errno,
            })?;
        guard.configure(policy, segments, self.crash_report);
        let served = self.service.and_then(|service| {
            let mut service = service.lock().unwrap_or_else(PoisonError::into_inner);
            service.take()
        });
        let is_served = served.is_some();
        if let Some(served) = served {
            guard.serve(served);
        }
        let stack_limit = guard.program.process().limits.stack();
        let was_saved = resumed.is_some();
        let (mut user, entry) = match resumed {
            Some(resumed) => {
                guard.program.hide(&[resumed.fd()]);
                (resumed.load(&mut guard)?, 0)
            }
            None => {
                let prepared = launch::prepare(&guard, &path, argv, &envp, stack_limit)?;
                let entry = prepared.entry();
                (prepared.load(&mut guard)?, entry)
            }
        };
        if is_served {
            guard.prepare_to_serve(&path, entry)?;
        }
        if is_served
            && was_saved
            && let Next::Finish(end) = guard.tell_service(Event::Marker, &mut user)?
        {
            let (missing, (refused, refusals)) =
                (guard.missing_calls(), guard.program.policy().refusals());
            return Ok(Outcome {
                end,
                missing,
                refused,
                refusals,
            });
        }
        let sampled = self.sampler.and_then(|sampler| {
            let mut sampler = sampler.lock().unwrap_or_else(PoisonError::into_inner);
            sampler.take()
        });
        let sampled = match sampled {
            Some(sampler) => {
                let usage = guard.engine.note_use().ok_or(RunError::NotNoted)?;
                Some(sampler.begin(Arc::clone(&guard.program), usage))
            }
            None => None,
        };
        if let Some(debugger) = &self.debugger {
            debugger.begin(&guard.program, guard.engine.xcr0());
        }
        let end = guard.run(&mut user);
        if let Some(debugger) = &self.debugger {
            debugger.end(end.as_ref().ok().copied());
        }
        let end = end?;
        if let Some(error) = sampled.and_then(Running::end) {
            return Err(error.into());
        }
        let missing = guard.missing_calls();
        let (refused, refusals) = guard.program.policy().refusals();
        Ok(Outcome {
            end,
            missing,
            refused,
            refusals,
        })
    }
}

impl End {
    /// Ends this process as the program ended: with its exit status, or by the
    /// signal it died of, so that a shell sees no difference.
    pub fn leave(self) -> ! {
        match self {
            Self::Exit(status) => std::process::exit(status.into()),
            Self::Killed(signal) => {
                signal::host::die_of(signal);
                // Not reached unless the signal is one that does not kill.
                std::process::exit(128 + signal as i32)
            }
        }
    }
}

fn c_string(text: &OsStr) -> Result<CString, RunError> {
    CString::new(text.as_bytes()).map_err(|_| RunError::ZeroByte(text.to_owned()))
}

/// The program's part of the address space must be empty: what is there would
/// be within its reach.
fn check_user_space_is_free() -> Result<(), RunError> {
    let failed = |source| LaunchError::Host {
        what: "/proc/self/maps",
        source,
    };
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(failed)?;
    // The lines are in the order of addresses.
    let first = maps
        .split('-')
        .next()
        .and_then(|start| u64::from_str_radix(start, 16).ok())
        .ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))?;
    if first < USER_HI {
        Err(RunError::Occupied { start: first })
    } else {
        Ok(())
    }
}
