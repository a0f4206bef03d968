//! Programs under gdb, with the engine on host.

mod debug;

use std::process::ExitCode;

const PLACEMENT: &str = "host";

fn a_backtrace_names_every_function() {
    debug::scenarios::a_backtrace_names_every_function(PLACEMENT);
}

fn registers_set_by_gdb_are_the_programs() {
    debug::scenarios::registers_set_by_gdb_are_the_programs(PLACEMENT);
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

fn lines_are_stepped_over_and_into() {
    debug::scenarios::lines_are_stepped_over_and_into(PLACEMENT);
}

fn a_watch_sees_the_value_change() {
    debug::scenarios::a_watch_sees_the_value_change(PLACEMENT);
}

fn threads_have_names_and_backtraces() {
    debug::scenarios::threads_have_names_and_backtraces(PLACEMENT);
}

fn a_breakpoint_is_hit_by_every_thread() {
    debug::scenarios::a_breakpoint_is_hit_by_every_thread(PLACEMENT);
}

fn one_thread_is_stepped_while_others_stay() {
    debug::scenarios::one_thread_is_stepped_while_others_stay(PLACEMENT);
}

fn a_fault_stops_at_its_instruction() {
    debug::scenarios::a_fault_stops_at_its_instruction(PLACEMENT);
}

fn signals_are_passed_on_or_not() {
    debug::scenarios::signals_are_passed_on_or_not(PLACEMENT);
}

fn a_loop_is_interrupted() {
    debug::scenarios::a_loop_is_interrupted(PLACEMENT);
}

fn a_program_goes_on_after_gdb_detaches() {
    debug::scenarios::a_program_goes_on_after_gdb_detaches(PLACEMENT);
}

fn a_program_goes_on_without_its_gdb() {
    debug::scenarios::a_program_goes_on_without_its_gdb(PLACEMENT);
}

fn a_running_program_goes_on_without_its_gdb() {
    debug::scenarios::a_running_program_goes_on_without_its_gdb(PLACEMENT);
}

fn nonsense_does_not_hurt() {
    debug::scenarios::nonsense_does_not_hurt(PLACEMENT);
}

fn a_socket_is_its_owners_and_goes_with_its_client() {
    debug::scenarios::a_socket_is_its_owners_and_goes_with_its_client(PLACEMENT);
}

fn a_program_is_killed() {
    debug::scenarios::a_program_is_killed(PLACEMENT);
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
        plain a_backtrace_names_every_function, timeout 120,
        plain registers_set_by_gdb_are_the_programs, timeout 120,
        plain vector_registers_are_seen_and_set, timeout 120,
        plain memory_written_by_gdb_is_the_programs, timeout 120,
        plain single_steps_are_single_instructions, timeout 120,
        plain lines_are_stepped_over_and_into, timeout 120,
        plain a_watch_sees_the_value_change, timeout 120,
        plain threads_have_names_and_backtraces, timeout 120,
        plain a_breakpoint_is_hit_by_every_thread, timeout 120,
        plain one_thread_is_stepped_while_others_stay, timeout 120,
        plain a_fault_stops_at_its_instruction, timeout 120,
        plain signals_are_passed_on_or_not, timeout 120,
        plain a_loop_is_interrupted, timeout 120,
        plain a_program_goes_on_after_gdb_detaches, timeout 120,
        plain a_program_goes_on_without_its_gdb, timeout 120,
        plain a_running_program_goes_on_without_its_gdb, timeout 120,
        plain nonsense_does_not_hurt, timeout 120,
        plain a_socket_is_its_owners_and_goes_with_its_client, timeout 120,
        plain a_program_is_killed, timeout 120,
        plain children_run_without_breakpoints, timeout 120,
        plain a_new_program_is_followed, timeout 120,
        plain interrupted_calls_start_again, timeout 120,
    };
    debug::role().unwrap_or_else(|| dune_testing::main(TESTS))
}
