//! Snapshots of programs, with the engine on host. `DUNE_SNAPSHOT_RETURNS` and
//! `DUNE_SNAPSHOT_RUNS` are for more returns than there is time for each time.
#![expect(unsafe_code, reason = "the programs spoil their own memory")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "what the programs do to themselves is all of one kind"
)]

mod snapshots;

use std::process::ExitCode;

const PLACEMENT: &str = "host";

fn every_byte_and_register_comes_back() {
    let runs = std::env::var("DUNE_SNAPSHOT_RUNS").unwrap_or("60".to_owned());
    snapshots::every_byte_and_register_comes_back(PLACEMENT, &runs);
}

fn a_run_sees_nothing_of_the_one_before() {
    snapshots::a_run_sees_nothing_of_the_one_before(PLACEMENT);
}

fn nothing_is_left_behind_by_many_returns() {
    let returns = std::env::var("DUNE_SNAPSHOT_RETURNS").unwrap_or("3000".to_owned());
    snapshots::nothing_is_left_behind_by_many_returns(PLACEMENT, &returns);
}

fn snapshots_nest() {
    snapshots::snapshots_nest(PLACEMENT);
}

fn threads_of_a_run_end_with_it() {
    snapshots::threads_of_a_run_end_with_it(PLACEMENT);
}

fn a_snapshot_of_several_threads_is_refused() {
    snapshots::a_snapshot_of_several_threads_is_refused(PLACEMENT);
}

fn every_ending_is_told() {
    snapshots::every_ending_is_told(PLACEMENT);
}

fn a_run_without_end_is_interrupted() {
    snapshots::a_run_without_end_is_interrupted(PLACEMENT);
}

fn a_run_whose_first_thread_has_ended_is_interrupted() {
    snapshots::a_run_whose_first_thread_has_ended_is_interrupted(PLACEMENT);
}

fn memory_that_cannot_be_written_comes_back() {
    snapshots::memory_that_cannot_be_written_comes_back(PLACEMENT);
}

fn a_return_from_the_marker_ends_the_other_threads() {
    snapshots::a_return_from_the_marker_ends_the_other_threads(PLACEMENT);
}

fn the_guard_keeps_half_of_its_address_space() {
    snapshots::the_guard_keeps_half_of_its_address_space(PLACEMENT);
}

fn numbers_of_descriptors_stay_the_programs() {
    snapshots::numbers_of_descriptors_stay_the_programs(PLACEMENT);
}

fn limits_and_late_signals_do_not_outlive_a_run() {
    snapshots::limits_and_late_signals_do_not_outlive_a_run(PLACEMENT);
}

fn a_run_that_ends_while_it_is_replaced_is_over() {
    snapshots::a_run_that_ends_while_it_is_replaced_is_over(PLACEMENT, "40");
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        plain every_byte_and_register_comes_back, timeout 200,
        plain a_run_sees_nothing_of_the_one_before,
        plain nothing_is_left_behind_by_many_returns, timeout 200,
        plain snapshots_nest,
        plain threads_of_a_run_end_with_it,
        plain a_snapshot_of_several_threads_is_refused,
        plain every_ending_is_told,
        plain a_run_without_end_is_interrupted,
        plain a_run_whose_first_thread_has_ended_is_interrupted,
        plain memory_that_cannot_be_written_comes_back,
        plain a_return_from_the_marker_ends_the_other_threads,
        plain the_guard_keeps_half_of_its_address_space,
        plain numbers_of_descriptors_stay_the_programs,
        plain limits_and_late_signals_do_not_outlive_a_run,
        plain a_run_that_ends_while_it_is_replaced_is_over, timeout 200,
    };
    snapshots::role().unwrap_or_else(|| dune_testing::main(TESTS))
}
