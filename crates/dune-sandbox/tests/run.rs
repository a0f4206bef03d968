//! Real programs in the sandbox, with the engine on host, compared with their native runs.

mod programs;

fn main() -> std::process::ExitCode {
    programs::sandbox().unwrap_or_else(programs::run_on_host)
}
