//! Threads and processes in the sandbox, with the engine in guest, compared with their native
//! runs. Where this machine's KVM does not run ring 0, all of it in the lab.

mod tasks;

use std::process::ExitCode;

fn threads() {
    tasks::in_guest(&[
        "mutex_and_condition",
        "local_storage",
        "a_fault_beside_others",
        "handled_faults_beside_others",
        "exit_ends_all",
        "abort_ends_all",
        "the_leader_leaves_first",
        "exec_ends_the_others",
        "waits_time_out",
        "robust_mutexes",
        "identities",
    ]);
}

/// A vCPU each.
fn very_many_threads() {
    tasks::in_guest(&["five_hundred_at_once"]);
}

fn signals_and_threads() {
    tasks::in_guest(&[
        "signals_find_their_thread",
        "process_signals_find_a_thread",
        "masks_that_block_everything",
    ]);
}

/// One alone: a thread that spins takes the lab's one CPU from all others.
fn races() {
    tasks::in_guest(&["unmapping_beside_readers"]);
}

/// As `races`.
fn views_beside_others() {
    tasks::in_guest(&["rendered_view_race"]);
}

fn processes() {
    tasks::in_guest(&[
        "a_tree_of_forks",
        "fork_copies_memory",
        "clocks_agree",
        "clock_data_are_the_kernels",
        "fork_beside_threads",
        "threads_in_a_child",
        "children_end_by_signals",
        "children_tell_their_end",
        "stopped_and_continued",
    ]);
}

fn features() {
    tasks::in_guest(&[
        "shared_memory",
        "remapped_memory",
        "advised_memory",
        "memory_files",
        "views_of_oneself",
        "thread_identities",
        "refused_cleanly",
    ]);
}

fn vfork_and_spawn() {
    tasks::in_guest(&[
        "vfork_shares_memory",
        "vfork_beside_writers",
        "vfork_and_the_heap",
        "vfork_and_reservations",
        "spawn_errors_are_told",
    ]);
}

fn shells() {
    tasks::in_guest(&["bash_pipes", "bash_jobs_and_traps", "python_processes"]);
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        ring0 threads, timeout 200,
        ring0 very_many_threads, timeout 200,
        ring0 signals_and_threads, timeout 200,
        ring0 races, timeout 300,
        ring0 views_beside_others, timeout 300,
        ring0 processes, timeout 200,
        ring0 features, timeout 200,
        ring0 vfork_and_spawn, timeout 200,
        ring0 shells, timeout 300,
    };
    tasks::role().unwrap_or_else(|| dune_testing::main(TESTS))
}
