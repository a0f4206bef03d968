//! The wall around system calls: a seccomp filter.
//!
//! It is made from the table of calls ([`crate::table`]) and from what the
//! guard and its runtime do themselves (`GUARDS_OWN`), so that it cannot
//! drift apart from what is forwarded: a row that is forwarded, emulated or
//! controlled is let through, everything else gets `EPERM`.
//!
//! A few calls are looked at more closely:
//!
//! - `unshare`, which the guard itself uses, of descriptors only;
//! - `mmap`, `mprotect` and `pkey_mprotect` with `PROT_EXEC`: the host process needs no memory
//!   that can be executed beyond what it was started with, for the program's
//!   code is executed in the guest only;
//! - `socket` by its family, as the policy's network says.

use std::collections::BTreeMap;

use linux_raw_sys::general::*;
use linux_raw_sys::net::{AF_INET, AF_INET6, AF_UNIX};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::ConfineError;
use crate::host::Errno;
use crate::policy::{Net, Rules};
use crate::table::{self, Handling};

/// What the guard, the Dune runtime and the C library under them do while a
/// program runs, and no program may ask for (or not by that number).
const GUARDS_OWN: &[u32] = &[
    // Copies from and to memory that may vanish (`crate::user`).
    __NR_process_vm_readv,
    __NR_process_vm_writev,
    // Memory under the key of the program's (`dune_kvm::wall`).
    __NR_pkey_mprotect,
    // Signals: their frames, and the threads' stacks for them.
    __NR_rt_sigreturn,
    __NR_restart_syscall,
    __NR_rt_tgsigqueueinfo,
    __NR_tgkill,
    // Processes and threads of the program are those of this process.
    __NR_clone,
    __NR_clone3,
    __NR_fork,
    __NR_vfork,
    __NR_exit,
    __NR_exit_group,
    __NR_set_robust_list,
    __NR_set_tid_address,
    __NR_rseq,
    __NR_futex,
    __NR_membarrier,
    // Files that the guard reads and writes for the program.
    __NR_unshare,
    __NR_memfd_create,
];

/// Restricts every thread of this process and what they will make.
///
/// # Errors
///
/// If the filter cannot be made or the kernel refuses it.
pub fn restrict(rules: &Rules) -> Result<(), ConfineError> {
    let failed = |error: &dyn std::error::Error| ConfineError::Seccomp(error.to_string());
    let program = program(rules.net).map_err(|error| failed(&error))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|error| failed(&error))
}

/// The numbers that are let through, in order.
pub fn allowed() -> impl Iterator<Item = u32> {
    let asked = table::calls()
        .iter()
        .filter(|call| !matches!(call.handling, Handling::Refused(_) | Handling::Missing))
        .map(|call| call.nr);
    let mut all: Vec<u32> = asked.chain(GUARDS_OWN.iter().copied()).collect();
    all.sort_unstable();
    all.dedup();
    all.into_iter()
}

fn program(net: Net) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        allowed().map(|nr| (i64::from(nr), Vec::new())).collect();
    let no_exec = SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(u64::from(PROT_EXEC)),
        0,
    )?;
    for nr in [__NR_mmap, __NR_mprotect, __NR_pkey_mprotect] {
        rules.insert(nr.into(), vec![SeccompRule::new(vec![no_exec.clone()])?]);
    }
    // A thread of the guard that reads a file where no other thread has it.
    let own_files = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::Eq,
        u64::from(CLONE_FILES),
    )?;
    rules.insert(
        __NR_unshare.into(),
        vec![SeccompRule::new(vec![own_files])?],
    );
    if rules.contains_key(&__NR_socket.into())
        && let Some(families) = families(net)
    {
        let of = |family: u32| {
            let is =
                SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family.into())?;
            SeccompRule::new(vec![is])
        };
        let families = families.iter().map(|family| of(*family));
        rules.insert(__NR_socket.into(), families.collect::<Result<_, _>>()?);
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(Errno::EPERM.number() as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Families of sockets that may be made, or `None` for all.
const fn families(net: Net) -> Option<&'static [u32]> {
    match net {
        Net::None => Some(&[AF_UNIX]),
        Net::Loopback => Some(&[AF_UNIX, AF_INET, AF_INET6]),
        Net::Full => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_follows_the_table() {
        let allowed: Vec<u32> = allowed().collect();
        for call in table::calls() {
            let refused = matches!(call.handling, Handling::Refused(_) | Handling::Missing);
            let own = GUARDS_OWN.contains(&call.nr);
            assert_eq!(allowed.contains(&call.nr), !refused || own, "{}", call.name);
        }
        for nr in [__NR_ptrace, __NR_bpf, __NR_mount, __NR_io_uring_setup] {
            assert!(!allowed.contains(&nr));
        }
    }

    #[test]
    fn a_filter_can_be_made_for_every_network() {
        for net in Net::ALL {
            let program = program(net).unwrap();
            // The kernel takes 4096 instructions.
            assert!(program.len() < 4096, "{}", program.len());
        }
    }
}
