//! Snapshots of programs, with the engine in guest. `DUNE_SNAPSHOT_RETURNS` and
//! `DUNE_SNAPSHOT_RUNS` are for more returns than there is time for each time.
#![expect(unsafe_code, reason = "the programs spoil their own memory")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "what the programs do to themselves is all of one kind"
)]

mod snapshots;

use std::process::ExitCode;

const PLACEMENT: &str = "guest";

fn every_byte_and_register_comes_back() {
    let runs = std::env::var("DUNE_SNAPSHOT_RUNS").unwrap_or("12".to_owned());
    snapshots::every_byte_and_register_comes_back(PLACEMENT, &runs);
}

fn a_run_sees_nothing_of_the_one_before() {
    snapshots::a_run_sees_nothing_of_the_one_before(PLACEMENT);
}

fn nothing_is_left_behind_by_many_returns() {
    let returns = std::env::var("DUNE_SNAPSHOT_RETURNS").unwrap_or("1000".to_owned());
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
    snapshots::a_run_that_ends_while_it_is_replaced_is_over(PLACEMENT, "10");
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        ring0 every_byte_and_register_comes_back, timeout 200,
        ring0 a_run_sees_nothing_of_the_one_before,
        ring0 nothing_is_left_behind_by_many_returns, timeout 200,
        ring0 snapshots_nest,
        ring0 threads_of_a_run_end_with_it,
        ring0 a_snapshot_of_several_threads_is_refused,
        ring0 every_ending_is_told,
        ring0 a_run_without_end_is_interrupted,
        ring0 a_run_whose_first_thread_has_ended_is_interrupted,
        ring0 memory_that_cannot_be_written_comes_back,
        ring0 a_return_from_the_marker_ends_the_other_threads,
        ring0 the_guard_keeps_half_of_its_address_space,
        ring0 numbers_of_descriptors_stay_the_programs,
        ring0 limits_and_late_signals_do_not_outlive_a_run,
        ring0 a_run_that_ends_while_it_is_replaced_is_over, timeout 200,
    };
    snapshots::role().unwrap_or_else(|| dune_testing::main(TESTS))
}
