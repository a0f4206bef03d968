//! The guard: what happens when a compartment comes to ring 0.
//!
//! Every value from the compartment is wrong until checked. Memory is reached only through
//! what its page tables allow it, or would if it had used the memory itself ([`Memory`]), and
//! data for the kernel goes through a buffer of the guard's, so that the kernel never sees an
//! address of the compartment's, and sees what was checked.
#![expect(unsafe_code, reason = "makes granted system calls")]

use dune::{PageFaultError, Trap, TrapFrame, UserContext};

use crate::access::Memory;
use crate::compartment::GrantedTag;
use crate::error::{Access, CompartmentError};
use crate::gate::Through;
use crate::image::Image;
use crate::inside::panic::LONGEST_MESSAGE;
use crate::inside::request;
use crate::policy::{Calls, FileRights, OnRefusal, Policy};
use crate::shell::{Denied, Limits, Shell};
use crate::tag::Grant;

/// The most bytes that one call of a compartment moves; it is told, and calls again.
const BUFFER: usize = 64 << 10;
/// `0F 05`.
const SYSCALL_LENGTH: u64 = 2;

/// What the guard needs to know of a compartment while it runs.
#[derive(Debug)]
pub(crate) struct Guard<'r, 'a> {
    pub(crate) shell: &'r mut Shell,
    pub(crate) policy: &'r mut Policy<'a>,
    pub(crate) tags: &'r [GrantedTag<'a>],
    pub(crate) limits: Limits,
    pub(crate) image: &'static Image,
}

/// What follows from a trap.
#[derive(Debug)]
pub(crate) enum Next {
    /// The compartment goes on.
    Resume,
    /// A signal came; the compartment goes on, if it may.
    Interrupted,
    /// The function has returned.
    Returned,
}

type Outcome = Result<Next, CompartmentError>;
/// What a system call returns inside.
type Answer = Result<u64, CompartmentError>;

impl Guard<'_, '_> {
    /// Handles why ring 3 came back.
    #[inline]
    pub(crate) fn on_trap(&mut self, trap: Trap, context: &mut UserContext) -> Outcome {
        match trap {
            Trap::Syscall => self.on_call(context),
            Trap::PageFault { address, cause } => self.on_fault(address, cause, context),
            Trap::Exception { vector, .. } => Err(CompartmentError::Exception {
                vector,
                at: context.registers().rip,
            }),
            Trap::Interrupted => Ok(Next::Interrupted),
        }
    }

    #[cold]
    fn on_fault(&mut self, address: u64, cause: PageFaultError, context: &UserContext) -> Outcome {
        let access = if cause.contains(PageFaultError::INSTRUCTION) {
            Access::Execute
        } else if cause.contains(PageFaultError::WRITE) {
            Access::Write
        } else {
            Access::Read
        };
        let at = context.registers().rip;
        let Err(denied) = self.memory(at).resolve(address, access) else {
            return Ok(Next::Resume);
        };
        let fault = CompartmentError::Fault {
            address,
            access,
            at,
            what: self.describe(address),
        };
        Err(self.error_of(denied, fault))
    }

    /// The compartment's memory, used by the instruction at `at`.
    #[inline]
    pub(crate) fn memory(&mut self, at: u64) -> Memory<'_> {
        Memory {
            shell: self.shell,
            limits: self.limits,
            learned: self.policy.learned.as_deref_mut(),
            at,
        }
    }

    /// What it means for a run that memory was denied; `not_granted` if it had none to give.
    pub(crate) fn error_of(
        &self,
        denied: Denied,
        not_granted: CompartmentError,
    ) -> CompartmentError {
        match denied {
            Denied::NotGranted => not_granted,
            Denied::StackOverflow => CompartmentError::StackOverflow {
                limit: self.limits.stack,
            },
            Denied::OutOfMemory => CompartmentError::OutOfMemory {
                limit: self.limits.memory,
            },
            Denied::Space(error) => CompartmentError::Space(error),
        }
    }

    fn describe(&self, address: u64) -> String {
        use crate::layout::{TAGS_END, TAGS_START};
        if address < 0x1_0000 {
            return "a null pointer".to_owned();
        }
        if address >> 47 != 0 {
            return "the upper half of the address space".to_owned();
        }
        if let Some(tag) = self.tags.iter().find(|tag| tag.contains(address)) {
            return format!("a tag granted as {:?}", tag.grant);
        }
        if (TAGS_START..TAGS_END).contains(&address) {
            return "a tag".to_owned();
        }
        match self.image.name_of(address) {
            Some(name) => format!("code or constants of {name}"),
            None => "memory of the process, or none".to_owned(),
        }
    }

    #[inline]
    fn on_call(&mut self, context: &mut UserContext) -> Outcome {
        let registers = context.registers_mut();
        registers.rax = match registers.rax {
            request::GATE => self.gate(registers)?,
            request::RETURN => return Ok(Next::Returned),
            number => {
                let result = self.call(number, registers)?;
                if result == errno(libc::EINTR) {
                    // There are no signals in a compartment. It makes the call again, unless
                    // the signal says that its time is up.
                    registers.rip = registers.rip.wrapping_sub(SYSCALL_LENGTH);
                    return Ok(Next::Interrupted);
                }
                result
            }
        };
        Ok(Next::Resume)
    }

    #[inline]
    fn gate(&mut self, registers: &TrapFrame) -> Result<u64, CompartmentError> {
        let gate = registers.rdi;
        let refused = |reason| CompartmentError::RefusedGate { gate, reason };
        let entry = self.policy.gates.iter_mut().find(|e| e.address == gate);
        let Some(entry) = entry else {
            if let Some(learned) = &mut self.policy.learned {
                learned.gates.insert(gate);
            }
            return Err(refused("it was not given; Builder::gate gives it"));
        };
        let mut memory = Memory {
            shell: self.shell,
            limits: self.limits,
            learned: self.policy.learned.as_deref_mut(),
            at: registers.rip,
        };
        (entry.behind)(
            &mut memory,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
        )
        .map_err(|through| match through {
            Through::Sizes => refused("input or output do not have the sizes that it takes"),
            Through::Denied(denied) => self.error_of(
                denied,
                refused("input or output are not the compartment's own memory"),
            ),
        })
    }

    /// System calls, and the requests that are seldom.
    #[cold]
    fn call(&mut self, number: u64, registers: &TrapFrame) -> Answer {
        let arguments = [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ];
        let [a, b, c, d, e, _] = arguments;
        let on_refusal = self.policy.on_refusal;
        let refused = |reason| refusal(on_refusal, number, arguments, reason);
        match number {
            request::PANIC => {
                let mut text = vec![0; (b as usize).min(LONGEST_MESSAGE)];
                let message = match self.memory(registers.rip).read(a, &mut text) {
                    Ok(()) => String::from_utf8_lossy(&text).into_owned(),
                    Err(_) => format!("(a message at {a:#x}, which it cannot read)"),
                };
                return Err(CompartmentError::Panicked { message });
            }
            request::BYTES_GATE => return self.gate(registers),
            request::TAG_ALLOCATE => {
                let Some(tag) = self.writable_tag(a) else {
                    return refused("it has no such tag to write to; Builder::tag grants one");
                };
                let (bytes, alignment) = (b.min(1 << 40) as usize, c.min(1 << 40) as usize);
                return Ok(tag.allocate(bytes, alignment).unwrap_or(0));
            }
            request::TAG_FREE => {
                let Some(tag) = self.writable_tag(a) else {
                    return refused("it has no such tag to write to; Builder::tag grants one");
                };
                return match tag.free(b) {
                    Ok(()) => Ok(0),
                    Err(_) => refused("the address was not allocated in the tag"),
                };
            }
            _ => {}
        }
        match number as i64 {
            libc::SYS_exit | libc::SYS_exit_group => {
                Err(CompartmentError::Exited { status: a as i32 })
            }
            libc::SYS_tgkill if c as i32 == libc::SIGABRT => Err(CompartmentError::Aborted),
            libc::SYS_getpid | libc::SYS_gettid => Ok(1),
            // There is nothing to unmap, and no signal to have a stack for.
            libc::SYS_sched_yield | libc::SYS_munmap | libc::SYS_sigaltstack => Ok(0),
            libc::SYS_rt_sigprocmask => {
                // There are no signals in a compartment; the old mask is empty.
                if c == 0 {
                    return Ok(0);
                }
                self.hand_out(registers.rip, 0, c, &[0; 8])
            }
            libc::SYS_read | libc::SYS_pread64 | libc::SYS_recvfrom => {
                let needed = needed(FileRights::READ, number);
                if !self.policy.allows_file(a, needed) {
                    return refused(
                        "it has no right to read from the descriptor; Builder::file grants it",
                    );
                }
                if number as i64 == libc::SYS_recvfrom && e != 0 {
                    return refused("recvfrom with an address cannot be granted");
                }
                self.read(registers.rip, number, [a, b, c, d])
            }
            libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_sendto => {
                let needed = needed(FileRights::WRITE, number);
                if !self.policy.allows_file(a, needed) {
                    return refused(
                        "it has no right to write to the descriptor; Builder::file grants it",
                    );
                }
                if number as i64 == libc::SYS_sendto && e != 0 {
                    return refused("sendto with an address cannot be granted");
                }
                self.write(registers.rip, number, [a, b, c, d])
            }
            libc::SYS_lseek => {
                if !self.policy.allows_file(a, FileRights::SEEK) {
                    return refused(
                        "it has no right to seek in the descriptor; Builder::file grants it",
                    );
                }
                // SAFETY: no memory is involved.
                Ok(unsafe { raw(number, [a, b, c, 0, 0, 0]) })
            }
            libc::SYS_fstat => {
                if !self.policy.allows_file(a, FileRights::STAT) {
                    return refused(
                        "it has no right to the descriptor's state; Builder::file grants it",
                    );
                }
                self.stat(registers.rip, a, b)
            }
            // What libc makes of fstat: an empty path, and AT_EMPTY_PATH alone.
            libc::SYS_newfstatat => {
                let mut path = [1];
                let is_empty = self.memory(registers.rip).read(b, &mut path).is_ok() && path == [0];
                if !is_empty || d != libc::AT_EMPTY_PATH as u64 {
                    return refused("paths cannot be granted; open the file outside");
                }
                if !self.policy.allows_file(a, FileRights::STAT) {
                    return refused(
                        "it has no right to the descriptor's state; Builder::file grants it",
                    );
                }
                self.stat(registers.rip, a, c)
            }
            libc::SYS_clock_gettime | libc::SYS_gettimeofday | libc::SYS_time => {
                if !self.policy.allows_calls(Calls::CLOCKS) {
                    return refused("it was not given Calls::CLOCKS");
                }
                self.clock(registers.rip, number, a, b)
            }
            libc::SYS_getrandom => {
                if !self.policy.allows_calls(Calls::RANDOM) {
                    return refused("it was not given Calls::RANDOM");
                }
                self.random(registers.rip, a, b, c)
            }
            _ => {
                if let Some(learned) = &mut self.policy.learned {
                    learned.refused.insert(number);
                }
                refused("this call cannot be granted")
            }
        }
    }

    fn writable_tag(&self, start: u64) -> Option<&crate::Tag> {
        self.tags
            .iter()
            .find(|tag| tag.tag.start() == start && tag.grant == Grant::ReadWrite)
            .map(|tag| tag.tag)
    }

    /// A call `(descriptor, buffer, length, flags or position)` that fills the buffer.
    fn read(&mut self, at: u64, number: u64, [fd, to, length, more]: [u64; 4]) -> Answer {
        let mut buffer = vec![0; (length as usize).min(BUFFER)];
        let [from, size] = [buffer.as_mut_ptr() as u64, buffer.len() as u64];
        // SAFETY: the kernel writes to the buffer alone: no address is passed on.
        let result = unsafe { raw(number, [fd, from, size, more, 0, 0]) };
        self.hand_out(at, result, to, filled(&buffer, result))
    }

    /// A call `(descriptor, buffer, length, flags or position)` that takes the buffer.
    fn write(&mut self, at: u64, number: u64, [fd, from, length, more]: [u64; 4]) -> Answer {
        let mut buffer = vec![0; (length as usize).min(BUFFER)];
        match self.memory(at).read(from, &mut buffer) {
            Ok(()) => {}
            Err(Denied::NotGranted) => return Ok(errno(libc::EFAULT)),
            Err(denied) => return Err(self.out_of(denied)),
        }
        let [from, size] = [buffer.as_ptr() as u64, buffer.len() as u64];
        // SAFETY: the kernel reads the buffer alone: no address is passed on.
        Ok(unsafe { raw(number, [fd, from, size, more, 0, 0]) })
    }

    fn stat(&mut self, at: u64, fd: u64, to: u64) -> Answer {
        let mut buffer = [0_u8; size_of::<libc::stat>()];
        let into = buffer.as_mut_ptr() as u64;
        // SAFETY: the buffer has the size of the kernel's structure.
        let result = unsafe { raw(libc::SYS_fstat as u64, [fd, into, 0, 0, 0, 0]) };
        self.hand_out(at, result, to, &buffer)
    }

    fn clock(&mut self, at: u64, number: u64, a: u64, b: u64) -> Answer {
        let mut buffer = [0_u8; 16];
        let into = buffer.as_mut_ptr() as u64;
        if number as i64 == libc::SYS_clock_gettime {
            // SAFETY: 16 bytes, as the structure has.
            let result = unsafe { raw(number, [a, into, 0, 0, 0, 0]) };
            return self.hand_out(at, result, b, &buffer);
        }
        let call = libc::SYS_gettimeofday as u64;
        // SAFETY: as above; no time zone is asked for.
        let result = unsafe { raw(call, [into, 0, 0, 0, 0, 0]) };
        if number as i64 == libc::SYS_time {
            let [s0, s1, s2, s3, s4, s5, s6, s7, ..] = buffer;
            let seconds = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            return if a == 0 {
                Ok(seconds)
            } else {
                self.hand_out(at, seconds, a, &seconds.to_le_bytes())
            };
        }
        if a == 0 {
            return Ok(result);
        }
        self.hand_out(at, result, a, &buffer)
    }

    fn random(&mut self, at: u64, to: u64, length: u64, flags: u64) -> Answer {
        let mut buffer = vec![0; (length as usize).min(BUFFER)];
        let [from, size] = [buffer.as_mut_ptr() as u64, buffer.len() as u64];
        // SAFETY: the kernel writes to the buffer alone.
        let result = unsafe { raw(libc::SYS_getrandom as u64, [from, size, flags, 0, 0, 0]) };
        self.hand_out(at, result, to, filled(&buffer, result))
    }

    /// Copies what the kernel answered to where the compartment wants it.
    fn hand_out(&mut self, at: u64, result: u64, to: u64, bytes: &[u8]) -> Answer {
        if (result as i64) < 0 {
            return Ok(result);
        }
        match self.memory(at).write(to, bytes) {
            Ok(()) => Ok(result),
            Err(Denied::NotGranted) => Ok(errno(libc::EFAULT)),
            Err(denied) => Err(self.out_of(denied)),
        }
    }

    /// The error for memory that the compartment has a claim to, and that there is not.
    fn out_of(&self, denied: Denied) -> CompartmentError {
        let limit = self.limits.memory;
        self.error_of(denied, CompartmentError::OutOfMemory { limit })
    }
}

/// The part of a buffer that a call says it has filled.
fn filled(buffer: &[u8], result: u64) -> &[u8] {
    let length = usize::try_from(result as i64).unwrap_or(0);
    buffer.get(..length).unwrap_or_default()
}

/// What a call leads to that was not granted.
fn refusal(
    on_refusal: OnRefusal,
    number: u64,
    arguments: [u64; 6],
    reason: &'static str,
) -> Result<u64, CompartmentError> {
    match on_refusal {
        OnRefusal::Errno => Ok(errno(libc::EPERM)),
        OnRefusal::End => Err(CompartmentError::Refused {
            number,
            arguments: [arguments[0], arguments[1], arguments[2]],
            reason,
        }),
    }
}

/// The rights for reading or writing, at a position or not.
fn needed(right: FileRights, number: u64) -> FileRights {
    match number as i64 {
        libc::SYS_pread64 | libc::SYS_pwrite64 => right | FileRights::SEEK,
        _ => right,
    }
}

fn errno(number: i32) -> u64 {
    i64::from(-number) as u64
}

/// Makes a system call, and returns what the kernel does.
///
/// # Safety
/// The kernel must use memory only as its caller may.
unsafe fn raw(number: u64, arguments: [u64; 6]) -> u64 {
    let result;
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller's word.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}
