//! Both interfaces, with every provider: those that this machine has natively, and Dune's dirty
//! bits at ring 0. Each test has a process of its own; the heap of the C interface is the
//! process's.
#![expect(
    unsafe_code,
    reason = "hand-written Trace, raw memory of the C interface, fork"
)]
#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a test")]

mod graph;
mod objects;
mod words;

use dune_gc::{Config, Heap, Provider};

/// Small heaps that collect often.
fn config(provider: Provider) -> Config {
    Config::new()
        .provider(provider)
        .max_bytes(1 << 30)
        .young_bytes(32 << 10)
}

/// A heap that collects at every safepoint.
fn stressed(provider: Provider) -> Heap {
    Heap::new(config(provider).stress()).unwrap()
}

macro_rules! each_provider {
    ($($module:ident :: $test:ident),* $(,)?) => {
        mod none { $(pub(crate) fn $test() { crate::$module::$test(dune_gc::Provider::None) })* }
        mod mprotect { $(pub(crate) fn $test() { crate::$module::$test(dune_gc::Provider::Mprotect) })* }
        mod userfaultfd { $(pub(crate) fn $test() { crate::$module::$test(dune_gc::Provider::Userfaultfd) })* }
        mod dune_bits { $(pub(crate) fn $test() { crate::$module::$test(dune_gc::Provider::Dune) })* }
        dune_testing::tests! {
            $(
                plain none::$test, timeout 300,
                plain mprotect::$test, timeout 300,
                plain userfaultfd::$test, timeout 300,
                ring0 dune_bits::$test, timeout 300,
            )*
            plain objects::the_other_process_is_told_whose_heap_it_is,
            plain objects::a_weak_pointer_ends_with_its_heap,
            plain objects::a_full_heap_says_so,
            plain objects::dunes_dirty_bits_are_refused_outside,
            plain words::a_full_heap_is_a_null_pointer,
            ring0 objects::writes_outside_dune_mode_count_too,
        }
    };
}

each_provider! {
    objects::agrees_with_the_model,
    objects::agrees_with_the_model_when_collecting_always,
    objects::agrees_with_the_model_when_the_mark_stack_is_too_short,
    objects::agrees_with_the_model_in_one_stop,
    objects::agrees_with_the_model_in_small_pieces,
    objects::agrees_with_the_model_in_small_pieces_with_a_marker,
    objects::a_collection_of_much_takes_many_short_stops,
    objects::a_long_array_is_looked_through_in_parts,
    objects::a_collection_ends_however_much_is_written_meanwhile,
    objects::a_collection_ends_however_much_is_allocated_meanwhile,
    objects::pages_of_a_large_object_that_were_never_touched_are_followed,
    objects::threads_share_a_graph_that_changes,
    objects::threads_share_a_graph_when_collecting_always,
    objects::threads_that_wait_hold_up_nobody,
    objects::a_finalizer_may_bring_its_object_back_once,
    objects::a_panic_in_a_finalizer_or_drop_loses_no_other,
    objects::what_was_dropped_makes_room,
    words::random_objects_agree_with_a_model,
    words::registers_stack_variables_and_ranges_keep,
    words::threads_in_system_calls_stop_and_go_on,
    words::finalizers_run_once_and_may_bring_back,
    words::the_heap_goes_on_after_fork,
    words::a_thread_on_an_alternate_stack_is_waited_for,
}
