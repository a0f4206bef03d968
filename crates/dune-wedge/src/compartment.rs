//! Compartments: what they are given, and running functions in them.
#![expect(
    unsafe_code,
    reason = "maps tags, which stay as long as the compartment"
)]

use std::cell::RefCell;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use dune::UserContext;
use dune::memory::PteFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::CompartmentError;
use crate::error::StartError;
use crate::gate::{self, BytesGate, Gate};
use crate::guard::{Guard, Next};
use crate::inside::entry;
use crate::layout::{LARGEST_INPUT, LARGEST_STACK, PAGE, STACK_TOP, page_up};
use crate::learn::Learned;
use crate::policy::{Calls, File, FileRights, GateEntry, OnRefusal, Policy};
use crate::runtime::{Runtime, runtime};
use crate::shell::{Limits, Shell};
use crate::tag::{Grant, Tag};

const DEFAULT_STACK: usize = 256 << 10;
const DEFAULT_MEMORY: usize = 16 << 20;
const DEFAULT_TIME: Duration = Duration::from_secs(5);
/// Input and result of a run that fit into the top page of the stack with room to spare are
/// put there and fetched from there directly.
const SMALL: usize = 2048;

/// Says what a compartment is given. Without any of it, it has its stack, its heap and its
/// own copy of the program's variables, and computes.
#[derive(Debug)]
#[must_use = "nothing is made before `build`"]
pub struct Builder<'a> {
    policy: Policy<'a>,
    tags: Vec<GrantedTag<'a>>,
    limits: Limits,
    time: Duration,
}

/// A tag that a compartment was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GrantedTag<'a> {
    pub(crate) tag: &'a Tag,
    pub(crate) grant: Grant,
}

impl GrantedTag<'_> {
    pub(crate) fn contains(&self, address: u64) -> bool {
        (self.tag.start()..self.tag.end()).contains(&address)
    }
}

impl Default for Builder<'_> {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            tags: Vec::new(),
            limits: Limits {
                stack: DEFAULT_STACK as u64,
                memory: DEFAULT_MEMORY as u64,
            },
            time: DEFAULT_TIME,
        }
    }
}

impl<'a> Builder<'a> {
    /// Grants a tag. Granted twice, the last grant counts.
    pub fn tag(mut self, tag: &'a Tag, grant: Grant) -> Self {
        self.tags.retain(|known| known.tag.start() != tag.start());
        self.tags.push(GrantedTag { tag, grant });
        self
    }

    /// Grants a file descriptor with some rights, which the guard checks at every call. Inside,
    /// it has the same number.
    pub fn file(mut self, fd: BorrowedFd<'a>, rights: FileRights) -> Self {
        self.policy.files.push(File { fd, rights });
        self
    }

    /// Grants system calls that are not about descriptors.
    pub fn calls(mut self, calls: Calls) -> Self {
        self.policy.calls |= calls;
        self
    }

    /// Says what a system call that was not granted leads to.
    pub fn on_refusal(mut self, on_refusal: OnRefusal) -> Self {
        self.policy.on_refusal = on_refusal;
        self
    }

    /// Grants a gate: calls through it run `body` in the parent.
    pub fn gate<I, O>(
        mut self,
        gate: &'static Gate<I, O>,
        body: impl FnMut(I) -> O + Send + 'a,
    ) -> Self
    where
        I: FromBytes + IntoBytes + 'a,
        O: IntoBytes + Immutable + 'a,
    {
        self.policy.gates.push(GateEntry {
            address: gate.address(),
            name: gate.name(),
            behind: gate::typed(body),
        });
        self
    }

    /// Grants a gate for bytes.
    pub fn bytes_gate(
        mut self,
        gate: &'static BytesGate,
        body: impl FnMut(&[u8]) -> Vec<u8> + Send + 'a,
    ) -> Self {
        self.policy.gates.push(GateEntry {
            address: gate.address(),
            name: gate.name(),
            behind: gate::bytes(gate.most(), body),
        });
        self
    }

    /// Limits the stack, in bytes (default 256 KiB, at most 1020 KiB).
    pub fn stack(mut self, bytes: usize) -> Self {
        self.limits.stack = (bytes as u64).clamp(PAGE, LARGEST_STACK);
        self
    }

    /// Limits the memory of its own, in bytes: stack, heap, input, and variables that it
    /// writes to (default 16 MiB).
    pub fn memory(mut self, bytes: usize) -> Self {
        self.limits.memory = page_up((bytes as u64).max(PAGE));
        self
    }

    /// Limits how long one run may take, by the clock on the wall, the time in gates
    /// included (default 5 s). It is kept to within some 20 ms, and late rather than early.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time = limit;
        self
    }

    /// Runs a function once with everything allowed, and notes what it used beyond what was
    /// granted here: for finding out which grants a function needs.
    ///
    /// Memory of the process is there where it is in the process, but global variables are
    /// the copy from the start, as in any compartment. What could never be granted is refused
    /// here too.
    ///
    /// # Errors
    /// [`StartError`]; how the run ended is the first part of the result.
    ///
    /// # Safety
    /// There is no protection: the function and what it calls must be trusted with the input,
    /// and must not free what was allocated in the process.
    pub unsafe fn learn<F, I, T>(
        mut self,
        body: F,
        input: I,
    ) -> Result<(Result<T, CompartmentError>, Learned), StartError>
    where
        F: Fn(I) -> T + Copy,
        I: IntoBytes + Immutable,
        T: FromBytes + IntoBytes,
    {
        self.policy.learned = Some(Box::default());
        let mut compartment = self.build()?;
        let result = compartment.run(body, input);
        let learned = compartment.policy.learned.take().unwrap_or_default();
        // It shows too much by now to be used again.
        drop(compartment.shell.take());
        Ok((result, *learned))
    }

    /// Makes the compartment. Starts the runtime if nobody did ([`start`](crate::start)).
    ///
    /// # Errors
    /// [`StartError`]
    pub fn build(self) -> Result<Compartment<'a>, StartError> {
        let runtime = runtime()?;
        let mut compartment = Compartment {
            shell: Some(runtime.take_shell()?),
            runtime,
            policy: self.policy,
            tags: Vec::new(),
            limits: self.limits,
            time: self.time,
        };
        for granted in self.tags {
            compartment.show(granted)?;
        }
        Ok(compartment)
    }
}

/// A part of the process that holds only what it was given. See the
/// [crate's documentation](crate) for what that is.
#[derive(Debug)]
pub struct Compartment<'a> {
    shell: Option<Shell>,
    runtime: &'static Runtime,
    policy: Policy<'a>,
    tags: Vec<GrantedTag<'a>>,
    limits: Limits,
    time: Duration,
}

thread_local! {
    /// Registers of compartments that this thread runs: one for each that is in a gate of
    /// another. A compartment that does not run has none.
    static CONTEXTS: RefCell<Vec<UserContext>> = const { RefCell::new(Vec::new()) };
}

impl<'a> Compartment<'a> {
    /// Says what a compartment is given.
    pub fn builder() -> Builder<'a> {
        Builder::default()
    }

    fn show(&mut self, granted: GrantedTag<'a>) -> Result<(), dune::memory::SpaceError> {
        let (rights, copied) = match granted.grant {
            Grant::Read => (PteFlags::R, false),
            Grant::ReadWrite => (PteFlags::RW, false),
            Grant::CopyOnWrite => (PteFlags::R, true),
        };
        let (start, end) = (granted.tag.start(), granted.tag.end());
        if let Some(shell) = &mut self.shell {
            // Noted first: what was mapped in part is unmapped with the compartment.
            self.tags.push(granted);
            // SAFETY: the tag is borrowed for as long as the compartment lives, which
            // unmaps it in the end.
            unsafe { shell.show(start, end, rights, copied) }?;
        }
        Ok(())
    }

    /// Runs a function on an input and returns its result.
    ///
    /// The function captures nothing (that is checked when it is compiled): what goes in is
    /// the input, plain data, and what comes out is the result, of a type for which any bytes
    /// will do, because the bytes are the compartment's. Afterwards the compartment is as it
    /// was before, so that runs know nothing of each other, except through what they were
    /// granted.
    ///
    /// In a thread in Dune mode it does not exit, but for memory that the process uses for
    /// the first time and for calls that the guard passes on. In another thread it enters Dune
    /// mode and leaves it again (some 7,000 instructions).
    ///
    /// # Errors
    /// [`CompartmentError`]: everything that went wrong inside.
    ///
    /// # Panics
    /// When a closure behind a gate panics, that panic goes on here.
    #[inline]
    pub fn run<F, I, T>(&mut self, body: F, input: I) -> Result<T, CompartmentError>
    where
        F: Fn(I) -> T + Copy,
        I: IntoBytes + Immutable,
        T: FromBytes + IntoBytes,
    {
        const {
            assert!(
                entry::captures_nothing::<F>(),
                "a function that runs in a compartment captures nothing: pass it what it needs"
            );
            assert!(align_of::<I>() <= 64 && align_of::<T>() <= 64);
        }
        let _ = body;
        let input_at = STACK_TOP - (size_of::<I>() as u64).next_multiple_of(64);
        let result_at = input_at - (size_of::<T>() as u64).next_multiple_of(64);
        let begin = Begin {
            rip: entry::typed::<F, I, T> as *const () as u64,
            // As after a call (psABI 3.2.2).
            rsp: result_at - 8,
            arguments: [input_at, result_at, 0],
        };
        let mut value = T::new_zeroed();
        self.enter(
            begin,
            (input_at, input.as_bytes()),
            (result_at, value.as_mut_bytes()),
        )?;
        Ok(value)
    }

    /// Runs a function on bytes and returns bytes, at most `most` of them.
    ///
    /// As [`run`](Self::run) otherwise.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`CompartmentError::InputTooLarge`],
    /// [`CompartmentError::BadResult`].
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn run_bytes<F>(
        &mut self,
        body: F,
        input: &[u8],
        most: usize,
    ) -> Result<Vec<u8>, CompartmentError>
    where
        F: Fn(&[u8]) -> Vec<u8> + Copy,
    {
        const {
            assert!(
                entry::captures_nothing::<F>(),
                "a function that runs in a compartment captures nothing: pass it what it needs"
            );
        }
        let _ = body;
        if input.len() as u64 > LARGEST_INPUT {
            return Err(CompartmentError::InputTooLarge {
                bytes: input.len() as u64,
                limit: LARGEST_INPUT,
            });
        }
        let result_at = STACK_TOP - 64;
        let begin = Begin {
            rip: entry::bytes::<F> as *const () as u64,
            rsp: result_at - 8,
            arguments: [result_at, Shell::INPUT, input.len() as u64],
        };
        let mut place = [0_u64; 2];
        let mut output = Vec::new();
        self.enter_with(
            begin,
            (Shell::INPUT, input),
            (result_at, place.as_mut_bytes()),
            |guard, place| {
                let [address, bytes] = <[u64; 2]>::read_from_bytes(place).unwrap_or_default();
                let bad = CompartmentError::BadResult { address, bytes };
                if bytes > most as u64 {
                    return Err(bad);
                }
                output.resize(bytes as usize, 0);
                let read = guard.memory(begin.rip).read(address, &mut output);
                read.map_err(|denied| guard.error_of(denied, bad))
            },
        )?;
        Ok(output)
    }

    /// Puts everything back as it was at the start, and gives back the memory that the
    /// compartment does not need to begin again. [`run`](Self::run) leaves a compartment
    /// as it was, but keeps the memory for the next run.
    pub fn trim(&mut self) {
        if let Some(shell) = &mut self.shell {
            shell.reset();
            shell.trim();
        }
    }

    /// Memory of its own, in bytes, page tables not counted.
    #[must_use]
    pub fn private_bytes(&self) -> usize {
        self.shell
            .as_ref()
            .map_or(0, |shell| shell.private_pages() * PAGE as usize)
    }

    #[inline]
    fn enter(
        &mut self,
        begin: Begin,
        input: (u64, &[u8]),
        result: (u64, &mut [u8]),
    ) -> Result<(), CompartmentError> {
        self.enter_with(begin, input, result, |_, _| Ok(()))
    }

    /// Runs from `begin` to the end, in Dune mode; `finish` sees the result before the
    /// compartment is reset.
    fn enter_with(
        &mut self,
        begin: Begin,
        input: (u64, &[u8]),
        result: (u64, &mut [u8]),
        finish: impl FnOnce(&mut Guard<'_, 'a>, &[u8]) -> Result<(), CompartmentError>,
    ) -> Result<(), CompartmentError> {
        if !dune::is_inside() {
            return dune::run(|| self.enter_with(begin, input, result, finish))?;
        }
        let time = self.time;
        let runtime = self.runtime;
        let Some(shell) = &mut self.shell else {
            return Ok(());
        };
        let reset = ResetAtEnd(shell);
        let mut guard = Guard {
            shell: &mut *reset.0,
            policy: &mut self.policy,
            tags: &self.tags,
            limits: self.limits,
            image: runtime.image(),
        };
        put(&mut guard, input, result.0)?;
        let mut context = Context::take()?;
        let context = context.get();
        context.reset(begin.rip, begin.rsp);
        let registers = context.registers_mut();
        [registers.rdi, registers.rsi, registers.rdx] = begin.arguments;
        context.set_fs_base(crate::layout::THREAD_POINTER);

        let watchdog = runtime.watchdog();
        let timed = watchdog.begin(&watchdog.slot(), time);
        loop {
            let trap = context.run(&guard.shell.space)?;
            match guard.on_trap(trap, context)? {
                // Looked at after every trap: the interruption may have come while a gate ran
                // another compartment.
                Next::Resume | Next::Interrupted if timed.is_late() => {
                    return Err(CompartmentError::TimeLimit { limit: time });
                }
                Next::Resume | Next::Interrupted => {}
                Next::Returned => break,
            }
        }
        drop(timed);
        fetch(&mut guard, result.0, result.1)?;
        finish(&mut guard, result.1)
    }
}

/// Where a run begins.
#[derive(Clone, Copy, Debug)]
struct Begin {
    rip: u64,
    rsp: u64,
    arguments: [u64; 3],
}

/// The offset in the top page of the stack of what lies there whole.
fn in_top_page(address: u64, bytes: usize) -> Option<usize> {
    (bytes <= SMALL && address >= STACK_TOP - PAGE && address + bytes as u64 <= STACK_TOP)
        .then(|| (address - (STACK_TOP - PAGE)) as usize)
}

/// Puts the input where it belongs, and makes room for the result.
fn put(
    guard: &mut Guard<'_, '_>,
    (at, input): (u64, &[u8]),
    result_at: u64,
) -> Result<(), CompartmentError> {
    let limits = guard.limits;
    let limit = limits.stack;
    let bytes = STACK_TOP - result_at;
    if bytes > limit {
        return Err(CompartmentError::InputTooLarge { bytes, limit });
    }
    if let Some(offset) = in_top_page(at, input.len())
        && let Some(frame) = guard.shell.stack_top()
        && frame.write(offset, input)
    {
        return Ok(());
    }
    // The stack down to the result, if the input is there; otherwise the input area.
    let (from, to) = if at >= result_at {
        (result_at, STACK_TOP)
    } else {
        (at, at + input.len() as u64)
    };
    let too_large = |bytes| CompartmentError::InputTooLarge { bytes, limit };
    let populated = guard.shell.populate(from, to - from, limits);
    populated.map_err(|denied| guard.error_of(denied, too_large(to - from)))?;
    let written = guard.shell.space.write(at, input);
    written.map_err(|_| too_large(input.len() as u64))
}

/// Fetches the result.
fn fetch(guard: &mut Guard<'_, '_>, at: u64, into: &mut [u8]) -> Result<(), CompartmentError> {
    if let Some(offset) = in_top_page(at, into.len())
        && let Some(frame) = guard.shell.stack_top()
        && frame.read(offset, into)
    {
        return Ok(());
    }
    let bytes = into.len() as u64;
    let bad = CompartmentError::BadResult { address: at, bytes };
    let read = guard.memory(at).read(at, into);
    read.map_err(|denied| guard.error_of(denied, bad))
}

/// Resets the compartment however the run ends.
struct ResetAtEnd<'s>(&'s mut Shell);

impl Drop for ResetAtEnd<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.reset();
    }
}

/// A context of this thread's, put back at the end.
struct Context(Option<UserContext>);

impl Context {
    #[inline]
    fn take() -> Result<Self, dune::memory::SpaceError> {
        let kept = CONTEXTS.with_borrow_mut(Vec::pop);
        match kept {
            Some(context) => Ok(Self(Some(context))),
            None => UserContext::new(0, 0).map(|context| Self(Some(context))),
        }
    }

    fn get(&mut self) -> &mut UserContext {
        match &mut self.0 {
            Some(context) => context,
            // `take` has put it there, and only `drop` takes it away.
            None => unreachable!("a context that was given back"),
        }
    }
}

impl Drop for Context {
    #[inline]
    fn drop(&mut self) {
        if let Some(mut context) = self.0.take() {
            // What it computed with is nobody's business: it may have been a key.
            context.wipe();
            // A thread that is ending frees it instead.
            let _ = CONTEXTS.try_with(|contexts| contexts.borrow_mut().push(context));
        }
    }
}

impl Drop for Compartment<'_> {
    fn drop(&mut self) {
        let Some(mut shell) = self.shell.take() else {
            return;
        };
        let mut is_clean = true;
        for granted in &self.tags {
            let hidden = shell.hide(granted.tag.start(), granted.tag.end());
            is_clean &= hidden.is_ok();
        }
        // What still shows a tag must not be anybody else's.
        if is_clean {
            self.runtime.keep_shell(shell);
        }
    }
}
