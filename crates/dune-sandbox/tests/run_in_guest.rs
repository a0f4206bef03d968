//! Real programs in the sandbox, with the engine in guest, compared with their native runs.
//! Where this machine's KVM does not run ring 0, all of it in the lab.

mod programs;

use std::process::ExitCode;

fn busybox_applets() {
    programs::run_in_guest(&["busybox"]);
}

fn text_and_file_tools() {
    programs::run_in_guest(&[
        "ls",
        "cat",
        "sort",
        "tar",
        "gzip",
        "xz",
        "bzip2",
        "sha256sum",
        "wc",
        "find",
        "stat",
        "readlink",
        "diff",
        "env",
        "id",
        "date",
        "od",
        "cut",
        "comm",
        "join",
        "dd",
        "factor",
        "script",
        "missing",
        "no_such",
        "sed",
        "awk",
        "openssl",
    ]);
}

fn grep_over_all_documentation() {
    programs::run_in_guest(&["grep_recursive"]);
}

fn shells() {
    programs::run_in_guest(&["bash_loop", "shell"]);
}

fn perl() {
    programs::run_in_guest(&["perl"]);
}

fn python() {
    programs::run_in_guest(&["python"]);
}

fn sqlite() {
    programs::run_in_guest(&["sqlite"]);
}

fn exit_codes_and_fatal_signals() {
    programs::run_in_guest(&[
        "exit_code",
        "segmentation",
        "bus_error",
        "abort",
        "division",
        "illegal",
        "privileged",
        "breakpoint",
        "not_executable",
        "killed_by",
    ]);
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        ring0 busybox_applets, timeout 200,
        ring0 text_and_file_tools, timeout 200,
        ring0 grep_over_all_documentation, timeout 200,
        ring0 shells,
        ring0 perl, timeout 100,
        ring0 python, timeout 300,
        ring0 sqlite,
        ring0 exit_codes_and_fatal_signals, timeout 200,
    };
    programs::sandbox().unwrap_or_else(|| dune_testing::main(TESTS))
}
