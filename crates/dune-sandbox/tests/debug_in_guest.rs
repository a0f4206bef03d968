//! Programs under gdb, with the engine in guest. Where this machine's KVM does
//! not run ring 0, all of it in the lab.

mod debug;

use std::process::ExitCode;

const PLACEMENT: &str = "guest";

fn a_backtrace_names_every_function() {
    debug::scenarios::a_backtrace_names_every_function(PLACEMENT);
}

fn vector_registers_are_seen_and_set() {
    debug::scenarios::vector_registers_are_seen_and_set(PLACEMENT);
}

fn memory_written_by_gdb_is_the_programs() {
    debug::scenarios::memory_written_by_gdb_is_the_programs(PLACEMENT);
}

fn single_steps_are_single_instructions() {
    debug::scenarios::single_steps_are_single_instructions(PLACEMENT);
}

fn threads_have_names_and_backtraces() {
    debug::scenarios::threads_have_names_and_backtraces(PLACEMENT);
}

fn a_breakpoint_is_hit_by_every_thread() {
    debug::scenarios::a_breakpoint_is_hit_by_every_thread(PLACEMENT);
}

fn a_fault_stops_at_its_instruction() {
    debug::scenarios::a_fault_stops_at_its_instruction(PLACEMENT);
}

fn signals_are_passed_on_or_not() {
    debug::scenarios::signals_are_passed_on_or_not(PLACEMENT);
}

fn a_program_goes_on_after_gdb_detaches() {
    debug::scenarios::a_program_goes_on_after_gdb_detaches(PLACEMENT);
}

fn children_run_without_breakpoints() {
    debug::scenarios::children_run_without_breakpoints(PLACEMENT);
}

fn a_new_program_is_followed() {
    debug::scenarios::a_new_program_is_followed(PLACEMENT);
}

fn interrupted_calls_start_again() {
    debug::scenarios::interrupted_calls_start_again(PLACEMENT);
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        ring0 a_backtrace_names_every_function, timeout 300,
        ring0 vector_registers_are_seen_and_set, timeout 300,
        ring0 memory_written_by_gdb_is_the_programs, timeout 300,
        ring0 single_steps_are_single_instructions, timeout 300,
        ring0 threads_have_names_and_backtraces, timeout 300,
        ring0 a_breakpoint_is_hit_by_every_thread, timeout 300,
        ring0 a_fault_stops_at_its_instruction, timeout 300,
        ring0 signals_are_passed_on_or_not, timeout 300,
        ring0 a_program_goes_on_after_gdb_detaches, timeout 300,
        ring0 children_run_without_breakpoints, timeout 300,
        ring0 a_new_program_is_followed, timeout 300,
        ring0 interrupted_calls_start_again, timeout 300,
    };
    debug::role().unwrap_or_else(|| dune_testing::main(TESTS))
}
